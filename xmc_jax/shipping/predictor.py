"""Ranked labels for new documents, from an exported model:

from xmc_jax.shipping.predictor import Predictor
predictor = Predictor.open("runs/first/export")
predictor.predict(["geany: fast and lightweight IDE"], k=5)
"""

import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xmc_jax.data.csr import Csr
from xmc_jax.data.tables import cell_values
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.metrics import first
from xmc_jax.runtime import sharding
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping import artifact, predict_config
from xmc_jax.shipping.artifact import Artifact
from xmc_jax.shipping.query_encoder import ROWS, Encoded, Item, QueryEncoder

_CHECKED = 65_536  # rows looked at at a time
_STEP = 256  # searches are for so many, or a multiple, so that few are compiled


@dataclasses.dataclass(frozen=True)
class Query(Item):
    """A document, and what may be predicted for it.

    Attributes:
        only: ids of the labels that may be predicted; None for all.
        exclude: ids of labels that may not be.
    """

    only: Sequence[str] | None = None
    exclude: Sequence[str] = ()


class Prediction(NamedTuple):
    """A label that was ranked.

    Attributes:
        id: its identifier.
        text: what it says.
        score: inner product in [-1, 1], or what was mixed, in [0, 1].
    """

    id: str
    text: str
    score: float


class Predictions(list[Prediction]):
    """What was ranked for a document, best first.

    Attributes:
        cut: whether the document's text has more tokens than the model takes. The tokens past the
            limit have no effect on the ranking.
    """

    def __init__(self, ranked: Iterable[Prediction], cut: bool):
        super().__init__(ranked)
        self.cut = cut


class Ranking(NamedTuple):
    """Ranked labels of n documents as arrays.

    Attributes:
        scores: f32[n, k], descending; -inf where there are no more labels.
        rows: i32[n, k], rows of the artifact's labels; -1 where there are no more.
        cut: bool[n], see `Predictions`.
    """

    scores: np.ndarray
    rows: np.ndarray
    cut: np.ndarray


class Predictor:
    """A model and what it ranks. Methods may be called from several threads; one runs at a time.

    Args:
        tower: its encoder.

    Attributes:
        labels: i32[l], rows of the artifact's labels that are ranked.
    """

    def __init__(
        self,
        opened: Artifact,
        tower: QueryEncoder,
        index: str = "auto",
        labels: np.ndarray | None = None,
    ):
        if index not in predict_config.INDEXES:
            raise ValueError(f"index: expected one of {predict_config.INDEXES}, got {index!r:.60}")
        self.artifact, self._tower = opened, tower
        self._whole = labels is None
        self.labels = np.arange(len(opened.labels), dtype=np.int32) if self._whole else labels
        self._of: Predictor | None = None  # what it is a part of
        self._lock = threading.RLock()
        self._approximate = None
        wanted = index == "scann" or (index == "auto" and self._whole and scann.available())
        if wanted and opened.index is not None:
            self._approximate = scann.ScannIndex.load(opened.index, opened.labels.embeddings)
        elif index == "scann":
            raise ValueError(
                f"{opened.folder}: expected a ScaNN index, found none; export with "
                "--config.export.index=True, or search exactly"
            )

    @classmethod
    def open(
        cls,
        folder,
        index: str = "auto",
        verify: bool = True,
        mesh: sharding.MeshConfig | None = None,
    ) -> "Predictor":
        """Opens an exported folder.

        Args:
            folder: what `--mode=export` wrote.

        Raises:
            ValueError: no such folder, or parts that do not fit; see `artifact.open`.
        """
        opened = artifact.open(folder, verify)
        return cls(opened, QueryEncoder(opened, mesh), index)

    def predict(
        self, documents: str | Query | Iterable[str | Query], k: int = 10, ranking: str = "auto"
    ) -> list[Predictions]:
        """The k best labels of each document, best first.

        Args:
            documents: texts or `Query`; a single one is a list of one document.
            k: labels per document; fewer where fewer may be predicted.

        Raises:
            ValueError: a document that is neither, a label id that is not there, a picture that
                cannot be read, another k than a whole number of at least 1, or a ranking that the
                artifact has nothing for.
        """
        scores, rows, cut = self.rank(documents, k, ranking)
        return [
            Predictions(
                (self._prediction(row, score) for row, score in zip(*pair) if row >= 0), is_cut
            )
            for *pair, is_cut in zip(rows.tolist(), scores.tolist(), cut.tolist())
        ]

    def rank(
        self,
        documents: str | Query | Iterable[str | Query],
        k: int = 10,
        ranking: str = "auto",
        rows: tuple[int, ...] = ROWS,
        problems: dict[int, str] | None = None,
    ) -> Ranking:
        """`predict` as arrays, with at most as many columns as there are labels.

        Args:
            problems: gets the number of each document that cannot be ranked, and the reason; such a
                document has no labels. Without `problems`, the first such document is an error.

        Raises:
            ValueError: see `predict`.
        """
        queries, k = _queries(documents), _count(k)
        self._mix(ranking)
        with self._lock:
            embedded = self._encoded(queries, rows, problems)
            found = self.rank_embedded(embedded.vectors, queries, k, ranking, rows, problems)
        return Ranking(*found, embedded.cut)

    def embed(
        self, documents: str | Query | Iterable[str | Query], rows: tuple[int, ...] = ROWS
    ) -> np.ndarray:
        """f32[n, D], unit embeddings of documents; `rows` as of `rank`."""
        return self.embed_measured(documents, rows).vectors

    def embed_measured(
        self, documents: str | Query | Iterable[str | Query], rows: tuple[int, ...] = ROWS
    ) -> Encoded:
        """Unit embeddings of documents, and which texts were cut; `rows` as of `rank`."""
        queries = _queries(documents)
        with self._lock:
            return self._encoded(queries, rows)

    def _encoded(
        self,
        queries: Sequence[Query],
        rows: tuple[int, ...],
        problems: dict[int, str] | None = None,
    ) -> Encoded:
        """See `encode_measured`; a query with neither text nor picture is a problem."""
        blank = {
            number: "expected a text or a picture, got neither"
            for number, query in enumerate(queries)
            if isinstance(query.text, str) and not query.text.strip() and query.images in ((), [])
        }
        if problems is None and blank:
            raise ValueError(f"item {min(blank)}: {blank[min(blank)]}")
        embedded = self._tower.encode_measured(queries, rows=rows, problems=problems)
        for number, problem in blank.items():
            problems.setdefault(number, problem)
        return embedded

    def rank_embedded(
        self,
        embedded: np.ndarray,
        queries: Sequence[Query],
        k: int,
        ranking: str = "auto",
        rows: tuple[int, ...] = ROWS,
        problems: dict[int, str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows as of `rank`, of f32[n, D] embeddings.

        Documents that `problems` already has are left out.
        """
        k = min(_count(k), len(self.labels))
        mix = self._mix(ranking)
        out_scores = np.full((len(queries), k), -np.inf, np.float32)
        out_rows = np.full((len(queries), k), -1, np.int32)
        allowed: dict[int, tuple[np.ndarray | None, np.ndarray]] = {}
        for number, query in enumerate(queries):
            if problems is not None and number in problems:
                continue
            try:
                allowed[number] = self._allowed(query)
            except ValueError as error:
                if problems is None:
                    raise
                problems[number] = str(error)
        numbers = list(allowed)
        if numbers and k:
            with self._lock:
                found = self._ranked(embedded[numbers], list(allowed.values()), k, mix, rows)
            out_scores[numbers], out_rows[numbers] = found
        return out_scores, out_rows

    def neighbours(
        self, documents: str | Query | Iterable[str | Query], k: int = 10
    ) -> list[Predictions]:
        """The k nearest training documents of each document, nearest first.

        Raises:
            ValueError: the artifact was exported without documents; else see `predict`.
        """
        k = _count(k)
        embedded = self.embed_measured(documents)
        scores, rows = self.neighbours_embedded(embedded.vectors, k)
        there = self.artifact.documents
        return [
            Predictions(
                (Prediction(there.ids[row], there.texts[row], score) for row, score in zip(*pair)),
                is_cut,
            )
            for *pair, is_cut in zip(rows.tolist(), scores.tolist(), embedded.cut.tolist())
        ]

    def neighbours_embedded(
        self, embedded: np.ndarray, k: int, rows: tuple[int, ...] = ROWS
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `neighbours`, of f32[n, D] embeddings.

        Returns:
            f32[n, min(k, N)] inner products, descending, and i32[n, min(k, N)] rows of the
            artifact's documents.
        """
        there = self.artifact.documents
        if there is None:
            raise ValueError(
                f"{self.artifact.folder}: expected training documents, found none; export with "
                "--config.export.documents=True"
            )
        with self._lock:
            return self._documents.search(embedded, min(k, len(there)), rows)

    def restricted(self, ids: Iterable[str]) -> "Predictor":
        """The same over some of the labels; searched exactly.

        Args:
            ids: identifiers of labels.

        Raises:
            ValueError: there is no such label.
        """
        rows = self._rows_of(ids, "labels")
        rows = rows if self._whole else rows[np.isin(rows, self.labels)]
        part = Predictor(self.artifact, self._tower, "exact", rows)
        part._of = self._of or self
        return part

    def row(self, name: str) -> int:
        """The row of a label's id.

        Raises:
            ValueError: there is no such label.
        """
        row = self._row_of.get(cell_values.normal(name)) if isinstance(name, str) else None
        if row is None:
            raise ValueError(
                f"label {name!r:.60}: expected one of the {counted(len(self._row_of), 'label')} of "
                f"{self.artifact.folder}, found no such id{self.hint(name)}"
            )
        return row

    def hint(self, name: Any) -> str:
        """What may be wrong with an unknown id, as the end of an error; "" if nothing is seen."""
        if not isinstance(name, str):
            return ""
        for separator in "|,; ":
            pieces = [piece for one in name.split(separator) if (piece := one.strip())]
            if len(pieces) > 1 and all(cell_values.normal(x) in self._row_of for x in pieces):
                return (
                    f"; {separator!r} separates {len(pieces)} ids of labels here: give them as a "
                    "list of ids, or as a text in which '|' separates them"
                )
        if whole := self._id_with.get(cell_values.normal(name)):
            return (
                f"; the id {whole!r:.60} has the separator '|': give it as an element of a list, "
                f"{[whole]!r:.70}"
            )
        return cell_values.hint(name)

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `QueryEncoder.prepare`; several threads may."""
        return self._tower.prepare(image, limits)

    def warm_up(
        self,
        k: int,
        rows: tuple[int, ...] = ROWS,
        exclude: int = 0,
        neighbours: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Compiles and reads all that predictions may need.

        Args:
            k: labels per document, at most.
            exclude: labels that are excluded of a document, likewise.
            neighbours: training documents per document, likewise.
            progress: called before each program, and at the end, with the numbers of programs that
                are ready and of all.
        """
        mix, documents, count = self.artifact.ranking, self.artifact.documents, len(self.labels)
        searches = {(_rounded(depth), False) for depth in range(1, k + 1)}
        near: set[int] = set()
        if documents is not None:
            apart = self._prior is not None and not self._prior.all()
            searches |= {(_rounded(augmented.depths(mix, n)[0]), apart) for n in range(1, k + 1)}
            near = {_rounded(n) for n in (augmented.depths(mix, k)[1], *range(1, neighbours + 1))}
        with self._lock:
            self.row(self.artifact.labels.ids[0])
            programs = self._tower.programs(rows)
            for size in rows:
                embedded = np.zeros((size, self.artifact.model.width), np.float32)
                for number in exact.excluded_counts(min(exclude, count)):
                    excluded = Csr.of_rows([np.arange(number)] * size, count)
                    programs += [
                        functools.partial(self._nearest, embedded, depth, rows, excluded, mixed)
                        for depth, mixed in sorted(searches)
                    ]
                programs += [
                    functools.partial(self._documents.search, embedded, depth, rows)
                    for depth in sorted(near)
                ]
            for number, run in enumerate(programs):
                progress(number, len(programs))
                run()
            progress(len(programs), len(programs))

    def warm_up_pictures(self) -> None:
        """See `QueryEncoder.warm_up_pictures`."""
        with self._lock:
            self._tower.warm_up_pictures()

    def _prediction(self, row: int, score: float) -> Prediction:
        there = self.artifact.labels
        return Prediction(there.ids[row], there.texts[row], score)

    def _mix(self, ranking: str) -> augmented.AugmentedConfig | None:
        if ranking not in predict_config.RANKINGS:
            raise ValueError(f"ranking: expected one of {predict_config.RANKINGS}, got {ranking!r}")
        mix = self.artifact.ranking
        if ranking == "plain" or (ranking == "auto" and not mix.enabled):
            return None
        if self.artifact.documents is None:
            raise ValueError(
                f"{self.artifact.folder}: expected training documents for ranking=augmented, found "
                "none; export with --config.export.documents=True, or rank plainly"
            )
        return mix

    def _allowed(self, query: Query) -> tuple[np.ndarray | None, np.ndarray]:
        """Columns of `labels` that alone may be predicted, None for all; and those that may not."""
        only = None if query.only is None else self._columns(query.only, "only")
        exclude = () if query.exclude is None else query.exclude
        return only, self._columns(exclude, "exclude")

    def _columns(self, ids: Iterable[str], where: str) -> np.ndarray:
        """i32[m], ascending, of label ids; those of labels that are not ranked are left out."""
        rows = self._rows_of(ids, where)
        if self._whole:
            return rows
        columns = np.searchsorted(self.labels, rows)
        ranked = columns < len(self.labels)
        ranked[ranked] = self.labels[columns[ranked]] == rows[ranked]
        return columns[ranked].astype(np.int32)

    def _rows_of(self, ids: Iterable[str], where: str) -> np.ndarray:
        """i32[m], ascending, of label ids, each once."""
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise ValueError(f"{where}: expected a list of label ids, got {ids!r:.60}")
        try:
            return np.unique(np.array([self.row(name) for name in ids], np.int32))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def _ranked(
        self,
        embedded: np.ndarray,
        allowed: Sequence[tuple[np.ndarray | None, np.ndarray]],
        k: int,
        mix: augmented.AugmentedConfig | None,
        rows: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32[n, k] and i32[n, k] rows of the artifact, as `evaluate.evaluate` ranks documents."""
        out_scores = np.full((len(embedded), k), -np.inf, np.float32)
        out_rows = np.full((len(embedded), k), -1, np.int32)
        depth, near = k, None
        if mix is not None:
            depth, of_documents = augmented.depths(mix, k)
            near = self._documents.search(embedded, of_documents, rows)
        whole = [number for number, (only, _) in enumerate(allowed) if only is None]
        if whole:
            excluded = Csr.of_rows([allowed[number][1] for number in whole], len(self.labels))
            nearest = self._nearest(embedded[whole], depth, rows, excluded, mix is not None)
            if mix is None:
                scores, columns = first(*nearest, k)
            else:
                of_whole = tuple(x[whole] for x in near)
                scores, columns = augmented.rank(
                    nearest,
                    of_whole,
                    self._positives,
                    mix,
                    k,
                    excluded,
                    self._prior,
                    self._label_counts,
                )
            out_scores[whole] = scores
            out_rows[whole] = np.where(columns < 0, -1, self.labels[columns])
        for number, (only, excluded) in enumerate(allowed):
            if only is not None:
                of_one = None if near is None else tuple(x[number] for x in near)
                some = np.setdiff1d(only, excluded)
                scores, columns = self._ranked_among(some, embedded[number], depth, k, mix, of_one)
                out_scores[number] = scores
                out_rows[number] = np.where(columns < 0, -1, self.labels[columns])
        return out_scores, out_rows

    def _nearest(
        self,
        embedded: np.ndarray,
        k: int,
        rows: tuple[int, ...],
        excluded: Csr,
        mixed: bool,
    ) -> augmented.Nearest:
        """The nearest columns of `labels` that may be predicted."""
        if mixed and self._prior is not None and not self._prior.all():
            columns, database = self._of_positive_prior
            scores, places = database.search(embedded, k, rows, excluded.select(columns))
            return scores, np.where(places < 0, -1, columns[places]).astype(np.int32)
        if self._approximate is not None:
            return self._approximate.search(embedded, min(k, len(self.labels)), excluded)
        return self._rows.search(embedded, k, rows, excluded)

    def _ranked_among(
        self,
        columns: np.ndarray,
        embedded: np.ndarray,
        depth: int,
        k: int,
        mix: augmented.AugmentedConfig | None,
        near: augmented.Nearest | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32[k] and i32[k], the ranking of a document among a few columns of `labels`, i[m]."""
        prior = self._prior if mix is not None else None
        if prior is not None:
            columns = columns[prior[columns] > 0]
        if not len(columns):
            return np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
        nearest = _nearest_of(
            embedded, self.artifact.labels.embeddings[self.labels[columns]], depth
        )
        if mix is None:
            (scores,), (places,) = first(*nearest, k)
        else:
            # Documents by their place in `near`, labels by their place in `columns`.
            positives = self._positives.take(near[1]).select(columns)
            documents = near[0][None], np.arange(len(near[1]), dtype=np.int32)[None]
            some = None if prior is None else prior[columns]
            (scores,), (places,) = augmented.rank(
                nearest,
                documents,
                positives,
                mix,
                k,
                prior=some,
                label_counts=self._label_counts[near[1]],
            )
        return scores, np.where(places < 0, -1, columns[places]).astype(np.int32)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        if self._of is not None:
            return self._of._row_of
        ids = map(cell_values.normal, self.artifact.labels.ids)
        return {name: row for row, name in enumerate(ids)}

    @functools.cached_property
    def _id_with(self) -> dict[str, str]:
        """Piece -> the first label's id with it, of ids that the separator of ids is part of."""
        found: dict[str, str] = {}
        for name in self._row_of:
            for piece in name.split("|") if "|" in name else ():
                found.setdefault(piece.strip(), name)
        return found

    @functools.cached_property
    def _rows(self) -> "_Rows":
        embeddings = self.artifact.labels.embeddings
        return _Rows(embeddings if self._whole else embeddings[self.labels], self._tower.mesh)

    @functools.cached_property
    def _documents(self) -> "_Rows":
        if self._of is not None:
            return self._of._documents
        return _Rows(self.artifact.documents.embeddings, self._tower.mesh)

    @functools.cached_property
    def _prior(self) -> np.ndarray | None:
        prior = self.artifact.labels.prior
        return None if prior is None else prior[self.labels]

    @functools.cached_property
    def _of_positive_prior(self) -> tuple[np.ndarray, "_Rows"]:
        """i64[m], the columns of `labels` whose prior is not 0, and their embeddings."""
        columns = np.flatnonzero(self._prior)
        embeddings = self.artifact.labels.embeddings[self.labels[columns]]
        return columns, _Rows(embeddings, self._tower.mesh)

    @functools.cached_property
    def _label_counts(self) -> np.ndarray:
        """i64[N], labels of each training document, whether they are ranked or not."""
        return self.artifact.documents.positives.counts()

    @functools.cached_property
    def _positives(self) -> Csr:
        """[N, l]: labels of the training documents, of those that are ranked."""
        positives = self.artifact.documents.positives
        return positives if self._whole else positives.select(self.labels)


def _queries(documents: Any) -> list[Query]:
    """Documents as queries."""
    if isinstance(documents, (str, Query)):
        documents = [documents]
    if isinstance(documents, (bytes, Mapping)) or not isinstance(documents, Iterable):
        raise ValueError(
            f"documents: expected texts or Query objects, got {type(documents).__name__}"
        )
    queries = [Query(text=one) if isinstance(one, str) else one for one in documents]
    for number, query in enumerate(queries):
        if not isinstance(query, Query):
            raise ValueError(f"documents[{number}]: expected a text or a Query, got {query!r:.60}")
    return queries


def _count(k: Any) -> int:
    """A number of labels or documents as an int."""
    try:
        if isinstance(k, (bool, np.bool_)) or operator.index(k) < 1:
            raise TypeError
    except TypeError:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r:.60}") from None
    return operator.index(k)


def _rounded(k: int) -> int:
    """How many are searched for where k are wanted."""
    return -(-k // _STEP) * _STEP


def _nearest_of(query: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[1, m], i32[1, m]: the k nearest of a few rows."""
    scores = np.einsum("ld,d->l", embeddings, query)  # not by BLAS, which may add in other orders
    order = np.argsort(-scores, kind="stable")[:k].astype(np.int32)
    return scores[None, order], order[None]


class _Rows:
    """Embeddings on the devices, searched exactly for few queries or many."""

    def __init__(self, embeddings: np.ndarray, mesh: Mesh):
        for start in range(0, len(embeddings), _CHECKED):
            if not np.isfinite(embeddings[start : start + _CHECKED]).all():
                raise ValueError("artifact: expected finite embeddings, found others")
        self._placed = exact.place(embeddings, mesh) if len(embeddings) else None

    def search(
        self, queries: np.ndarray, k: int, rows: tuple[int, ...], excluded: Csr | None = None
    ) -> augmented.Nearest:
        """The best min(k, rows there are) of each query, see `exact.search`."""
        if self._placed is None or not len(queries):
            count = 0 if self._placed is None else min(k, self._placed.count)
            nothing = np.zeros((len(queries), count), np.float32)
            return nothing, nothing.astype(np.int32)
        placed, mesh = self._placed, self._placed.rows.sharding.mesh
        searched, k = exact.depth(placed, _rounded(k)), min(k, placed.count)
        found = []
        start = 0
        while start < len(queries):
            left = len(queries) - start
            size = next((r for r in rows if r >= left), rows[-1])
            part = queries[start : start + size]
            block = np.zeros((size, queries.shape[1]), np.float32)
            block[: len(part)] = part
            without = None
            if excluded is not None:
                of_part = excluded.take(np.arange(start, start + len(part)))
                without = exact.excluded_rows(of_part, size)
            given = sharding.put_whole((block, without, np.int32(placed.count)), mesh)
            block, without, count = given
            best = exact.search_block(
                block, placed.rows, count, without, k=searched, block=placed.block, mesh=mesh
            )
            found.append([x[: len(part), :k] for x in jax.device_get(best)])
            start += size
        return tuple(np.concatenate(x) for x in zip(*found))
