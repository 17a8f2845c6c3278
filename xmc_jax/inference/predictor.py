"""Ranked labels for new documents, from an exported model:

from xmc_jax.inference.predictor import Predictor
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

from xmc_jax import sharding
from xmc_jax.data import record_cells
from xmc_jax.data.csr import Csr
from xmc_jax.inference import artifact, config
from xmc_jax.inference.artifact import Artifact
from xmc_jax.inference.tower import ROWS, Encoded, Item, Tower
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.metrics import drop_filtered

_CHECKED = 65_536  # rows looked at at a time
_STEP = 128  # searches are for so many, or a multiple, so that few are compiled


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
        opened: see `Artifact`.
        tower: its encoder.
        index: see `PredictConfig`.

    Attributes:
        artifact: as opened.
        labels: i32[l], rows of the artifact's labels that are ranked.
    """

    def __init__(
        self,
        opened: Artifact,
        tower: Tower,
        index: str = "auto",
        labels: np.ndarray | None = None,
    ):
        if index not in config.INDEXES:
            raise ValueError(f"index: expected one of {config.INDEXES}, got {index!r:.60}")
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
            index: see `PredictConfig`.
            verify: see `artifact.open`.
            mesh: see `Tower`.

        Raises:
            ValueError: no such folder, or parts that do not fit; see `artifact.open`.
        """
        opened = artifact.open(folder, verify)
        return cls(opened, Tower(opened, mesh), index)

    def predict(
        self, documents: str | Query | Iterable[str | Query], k: int = 10, ranking: str = "auto"
    ) -> list[Predictions]:
        """The k best labels of each document, best first.

        Args:
            documents: texts or `Query`; a single one is a list of one document.
            k: labels per document; fewer where fewer may be predicted.
            ranking: see `PredictConfig`.

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
            documents: see `predict`.
            k: see `predict`.
            ranking: see `predict`.
            rows: see `Tower.encode_measured`. With one size, the result of a document is the same
                to the bit whatever it is ranked with.
            problems: gets the number of each document that cannot be ranked, and the reason; such a
                document has no labels. Without `problems`, the first such document is an error.

        Raises:
            ValueError: see `predict`.
        """
        queries, k = _queries(documents), _count(k)
        self._mix(ranking)
        with self._lock:
            embedded = self._tower.encode_measured(queries, rows=rows, problems=problems)
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
            return self._tower.encode_measured(queries, rows=rows)

    def rank_embedded(
        self,
        embedded: np.ndarray,
        queries: Sequence[Query],
        k: int,
        ranking: str = "auto",
        rows: tuple[int, ...] = ROWS,
        problems: dict[int, str] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows as of `rank`, of f32[n, D] embeddings; documents that `problems` already
        has are left out.
        """
        k = min(_count(k), len(self.labels))
        mix = self._mix(ranking)
        out_scores = np.full((len(queries), k), -np.inf, np.float32)
        out_rows = np.full((len(queries), k), -1, np.int32)
        asked, of_extra = {}, {}  # by number; numbers by how much more their searches ask for
        for number, query in enumerate(queries):
            if problems is not None and number in problems:
                continue
            try:
                asked[number] = self._allowed(query)
            except ValueError as error:
                if problems is None:
                    raise
                problems[number] = str(error)
                continue
            excluded = len(asked[number][1])
            of_extra.setdefault(-(-excluded // _STEP) * _STEP, []).append(number)
        # Apart, so that no document's search depends on what is excluded for another.
        for extra, numbers in of_extra.items() if len(self.labels) else ():
            some = [asked[number] for number in numbers]
            with self._lock:
                found = self._ranked(embedded[numbers], some, extra, k, mix, rows)
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
        row = self._row_of.get(record_cells.normal(name)) if isinstance(name, str) else None
        if row is None:
            raise ValueError(
                f"label {name!r:.60}: expected one of the {len(self._row_of)} labels of "
                f"{self.artifact.folder}, found no such id"
            )
        return row

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `Tower.prepare`; several threads may."""
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
            rows: see `Tower.encode`.
            exclude: labels that are excluded of a document, likewise.
            neighbours: training documents per document, likewise.
            progress: called before each program, and at the end, with the numbers of programs that
                are ready and of all.
        """
        mix, documents = self.artifact.ranking, self.artifact.documents
        both = mix.labels + mix.documents if mix.mode == "joint" else 0
        most = max(k, mix.labels, both) + -(-exclude // _STEP) * _STEP
        searches = [(self._nearest, most)]
        if documents is not None:
            near = max(neighbours, mix.documents, most if both else 0)
            searches.append((self._documents.search, near))
        with self._lock:
            self.row(self.artifact.labels.ids[0])
            programs = self._tower.programs(rows)
            for size in rows:
                embedded = np.zeros((size, self.artifact.model.width), np.float32)
                programs += [
                    functools.partial(search, embedded, wanted, rows)
                    for search, most in searches
                    for wanted in range(_STEP, most + _STEP, _STEP)
                ]
            for number, compile in enumerate(programs):
                progress(number, len(programs))
                compile()
            progress(len(programs), len(programs))

    def warm_up_pictures(self) -> None:
        """See `Tower.warm_up_pictures`."""
        with self._lock:
            self._tower.warm_up_pictures()

    def _prediction(self, row: int, score: float) -> Prediction:
        there = self.artifact.labels
        return Prediction(there.ids[row], there.texts[row], score)

    def _mix(self, ranking: str) -> augmented.AugmentedConfig | None:
        if ranking not in config.RANKINGS:
            raise ValueError(f"ranking: expected one of {config.RANKINGS}, got {ranking!r}")
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
        """i32[m], ascending, of label ids, each once.

        Raises:
            ValueError: there is no such label, or something else than a collection of ids.
        """
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
        extra: int,
        k: int,
        mix: augmented.AugmentedConfig | None,
        rows: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32[n, k] and i32[n, k] rows of the artifact, as `evaluate.evaluate` ranks documents.

        Args:
            embedded: f32[n, D].
            allowed: of each, see `_allowed`.
            extra: at least as many as any of them excludes.
            k: labels.
            mix: None for labels by inner product.
            rows: sizes of blocks.
        """
        joint = mix is not None and mix.mode == "joint"
        in_common = 0  # labels searched, or labels and documents together
        if mix is not None:
            in_common = mix.labels + (mix.documents if joint else 0)
        near = None
        if mix is not None:
            margin = extra if joint and mix.filter_first else 0
            wanted = in_common + margin if joint else mix.documents
            documents = len(self.artifact.documents)
            near = self._documents.search(embedded, min(wanted, documents), rows)
        depth = max(k, in_common) + extra
        whole = [number for number, (only, _) in enumerate(allowed) if only is None]
        out_scores = np.full((len(embedded), k), -np.inf, np.float32)
        out_rows = np.full((len(embedded), k), -1, np.int32)
        if whole:
            nearest = self._nearest(embedded[whole], min(depth, len(self.labels)), rows)
            pairs = _pairs([allowed[number][1] for number in whole])
            positives = self._positives if mix is not None else None
            retrieved = None if near is None else tuple(x[whole] for x in near)
            scores, columns = _mixed(
                nearest, retrieved, pairs, extra, k, mix, len(self.labels), positives, self._prior
            )
            out_scores[whole] = scores
            out_rows[whole] = np.where(columns < 0, -1, self.labels[columns])
        for number, (only, excluded) in enumerate(allowed):
            if only is None or not len(only):
                continue
            own = self.labels[only]
            nearest = _nearest_of(embedded[number], self.artifact.labels.embeddings[own], depth)
            excluded = np.searchsorted(only, excluded[np.isin(excluded, only)])
            retrieved = positives = None
            if mix is not None:
                retrieved, positives = self._neighbours_of(*(x[number] for x in near), own)
            scores, columns = _mixed(
                nearest,
                retrieved,
                _pairs([excluded]),
                extra,
                k,
                mix,
                len(own),
                positives,
                None if self._prior is None else self.artifact.labels.prior[own],
            )
            out_scores[number] = scores[0]
            out_rows[number] = np.where(columns[0] < 0, -1, own[columns[0]])
        return out_scores, out_rows

    def _nearest(self, embedded, k: int, rows) -> tuple[np.ndarray, np.ndarray]:
        if self._approximate is not None:
            return self._approximate.search(embedded, min(k, len(self.labels)))
        return self._rows.search(embedded, k, rows)

    def _neighbours_of(
        self, scores: np.ndarray, rows: np.ndarray, labels: np.ndarray
    ) -> tuple[tuple[np.ndarray, np.ndarray], Csr]:
        """Retrieved documents (f32[m], i32[m]), numbered anew, and their labels among some."""
        found = self.artifact.documents.positives.take(rows)
        kept = np.isin(found.indices, labels)
        ends = np.concatenate([[0], np.cumsum(kept)])
        indices = np.searchsorted(labels, found.indices[kept]).astype(np.int32)
        numbers = np.arange(len(rows), dtype=np.int32)
        return (scores[None], numbers[None]), Csr(ends[found.indptr], indices, None, len(labels))

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        if self._of is not None:
            return self._of._row_of
        ids = map(record_cells.normal, self.artifact.labels.ids)
        return {name: row for row, name in enumerate(ids)}

    @functools.cached_property
    def _rows(self) -> "_Rows":
        embeddings = self.artifact.labels.embeddings
        return _Rows(embeddings if self._whole else embeddings[self.labels], self._tower.mesh)

    @functools.cached_property
    def _documents(self) -> "_Rows":
        if self._of is not None:
            return self._of._documents
        return _Rows(self.artifact.documents.embeddings, self._tower.mesh)

    @property
    def _prior(self) -> np.ndarray | None:
        prior = self.artifact.labels.prior
        return None if prior is None else prior[self.labels]

    @functools.cached_property
    def _positives(self) -> Csr:
        """[N, l]: labels of the training documents, of those that are ranked."""
        whole = self.artifact.documents.positives
        if self._whole:
            return whole
        kept = np.isin(whole.indices, self.labels)
        ends = np.concatenate([[0], np.cumsum(kept)])
        indices = np.searchsorted(self.labels, whole.indices[kept]).astype(np.int32)
        return Csr(ends[whole.indptr], indices, None, len(self.labels))


def _queries(documents: Any) -> list[Query]:
    """Documents as queries.

    Raises:
        ValueError: something that is neither a text nor a `Query`, nor a collection of these.
    """
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
    """A number of labels or documents as an int.

    Raises:
        ValueError: it is no whole number of at least 1.
    """
    try:
        if isinstance(k, (bool, np.bool_)) or operator.index(k) < 1:
            raise TypeError
    except TypeError:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r:.60}") from None
    return operator.index(k)


def _pairs(excluded: Sequence[np.ndarray]) -> np.ndarray:
    """i32[p, 2]: (query, column) that may not be predicted."""
    numbers = np.repeat(np.arange(len(excluded)), [len(columns) for columns in excluded])
    columns = np.concatenate([np.zeros(0, np.int32), *excluded])
    return np.stack([numbers, columns], axis=1).astype(np.int32)


def _nearest_of(query: np.ndarray, embeddings: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[1, m], i32[1, m]: the k nearest of a few rows, on the host: a program for every number
    of rows would take longer to compile than any search.
    """
    scores = np.einsum("ld,d->l", embeddings, query)  # not by BLAS, which may add in other orders
    order = np.argsort(-scores, kind="stable")[:k].astype(np.int32)
    return scores[None, order], order[None]


def _mixed(
    nearest: tuple[np.ndarray, np.ndarray],
    retrieved: tuple[np.ndarray, np.ndarray] | None,
    pairs: np.ndarray,
    extra: int,
    k: int,
    mix: augmented.AugmentedConfig | None,
    count: int,
    positives: Csr | None,
    prior: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and columns of what is left after mixing and filtering.

    Args:
        nearest: labels, best first.
        retrieved: documents; None where nothing is mixed.
        pairs: see `_pairs`.
        extra: at least as many as any query has of them.
        k: labels.
        mix: None for labels by inner product.
        count: of labels.
        positives: [N, count] of the documents.
        prior: f64[count], or None.
    """
    if mix is None:
        return drop_filtered(*nearest, pairs, k)
    if mix.mode == "joint":
        wanted = mix.labels + mix.documents + (extra if mix.filter_first else 0)
        nearest = tuple(x[:, :wanted] for x in nearest)
        retrieved = augmented.merge(nearest, retrieved, count, wanted)
    items = augmented.to_mix(mix, nearest, retrieved, pairs, count)
    mixed = augmented.augment(*items, positives, mix, k + extra, prior)
    return drop_filtered(*mixed, pairs, k)


class _Rows:
    """Embeddings on the devices, searched exactly for few queries or many."""

    def __init__(self, embeddings: np.ndarray, mesh: Mesh):
        for start in range(0, len(embeddings), _CHECKED):
            if not np.isfinite(embeddings[start : start + _CHECKED]).all():
                raise ValueError("artifact: expected finite embeddings, found others")
        self._placed = exact.place(embeddings, mesh)

    def search(
        self, queries: np.ndarray, k: int, rows: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best min(k, rows there are) of each query, see `exact.search`.

        Queries go in blocks of the sizes of `rows`. As many are searched for as any such k needs,
        so that few programs are compiled.
        """
        placed, mesh = self._placed, self._placed.rows.sharding.mesh
        searched, k = (min(n, placed.count) for n in (-(-k // _STEP) * _STEP, k))
        found = []
        start = 0
        while start < len(queries):
            left = len(queries) - start
            size = next((r for r in rows if r >= left), rows[-1])
            part = queries[start : start + size]
            block = np.zeros((size, queries.shape[1]), np.float32)
            block[: len(part)] = part
            best = exact.search_block(
                sharding.put_whole(block, mesh),
                placed.rows,
                k=searched,
                count=placed.count,
                block=placed.block,
                mesh=mesh,
            )
            found.append([x[: len(part), :k] for x in jax.device_get(best)])
            start += size
        return tuple(np.concatenate(x) for x in zip(*found))
