"""Ranked labels for new documents, from an exported model:

from xmc_jax.shipping.predictor import Predictor
predictor = Predictor.open("runs/first/export")
predictor.predict(["geany: fast and lightweight IDE"], k=5)
"""

import copy
import dataclasses
import functools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from xmc_jax.config import MeshConfig
from xmc_jax.data.tables import cell_values
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping import artifact
from xmc_jax.shipping.artifact import Artifact
from xmc_jax.shipping.query_encoder import ROWS, Encoded, Item, QueryEncoder
from xmc_jax.shipping.ranker import Allowed, Ranker


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


Queries = str | Query | Iterable[str | Query]
"""A text or a query, or several."""


class Predictor:
    """A model and what it ranks. Methods may be called from several threads; one runs at a time.

    Args:
        opened: the artifact.
        encoder: its encoder.
        index: see `PredictConfig`.

    Attributes:
        artifact: as opened.
        labels: i32[l], rows of the artifact's labels that are ranked.
    """

    def __init__(self, opened: Artifact, encoder: QueryEncoder, index: str = "auto"):
        self.artifact, self._encoder = opened, encoder
        self._ranker = Ranker(opened, encoder.mesh, index)
        self._lock = threading.RLock()

    @property
    def labels(self) -> np.ndarray:
        return self._ranker.labels

    @classmethod
    def open(
        cls,
        folder,
        index: str = "auto",
        verify: bool = True,
        mesh: MeshConfig | None = None,
    ) -> "Predictor":
        """Opens an exported folder.

        Args:
            folder: what `--mode=export` wrote.
            index: see `PredictConfig`.
            verify: whether to hash every file.
            mesh: how to split the model; all local devices by default.

        Raises:
            ValueError: no such folder, or parts that do not fit; see `artifact.open`.
        """
        opened = artifact.open(folder, verify)
        return cls(opened, QueryEncoder(opened, mesh), index)

    def predict(self, documents: Queries, k: int = 10, ranking: str = "auto") -> list[Predictions]:
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
        return _listed(self.artifact.labels, *self.rank(documents, k, ranking))

    def rank(
        self,
        documents: Queries,
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
            rows: see `QueryEncoder.encode_measured`. With one size, the result of a document is the
                same to the bit whatever it is ranked with.
            problems: gets the number of each document that cannot be ranked, and the reason; such a
                document has no labels. Without `problems`, the first such document is an error.

        Raises:
            ValueError: see `predict`.
        """
        queries, k = _queries(documents), _count(k)
        self._ranker.mix(ranking)
        with self._lock:
            embedded = self._encoded(queries, rows, problems)
            ranked = self.rank_embedded(embedded.vectors, queries, k, ranking, rows, problems)
        return Ranking(*ranked, embedded.cut)

    def embed(self, documents: Queries, rows: tuple[int, ...] = ROWS) -> np.ndarray:
        """f32[n, D], unit embeddings of documents; `rows` as of `rank`."""
        return self.embed_measured(documents, rows).vectors

    def embed_measured(self, documents: Queries, rows: tuple[int, ...] = ROWS) -> Encoded:
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
        embedded = self._encoder.encode_measured(queries, rows=rows, problems=problems)
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
        mix = self._ranker.mix(ranking)
        out_scores = np.full((len(queries), k), -np.inf, np.float32)
        out_rows = np.full((len(queries), k), -1, np.int32)
        allowed: dict[int, Allowed] = {}
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
                ranked = self._ranker.rank(embedded[numbers], list(allowed.values()), k, mix, rows)
            out_scores[numbers], out_rows[numbers] = ranked
        return out_scores, out_rows

    def neighbours(self, documents: Queries, k: int = 10) -> list[Predictions]:
        """The k nearest training documents of each document, nearest first.

        Raises:
            ValueError: the artifact was exported without documents; else see `predict`.
        """
        k = _count(k)
        embedded = self.embed_measured(documents)
        nearest = self.neighbours_embedded(embedded.vectors, k)
        return _listed(self.artifact.documents, *nearest, embedded.cut)

    def neighbours_embedded(
        self, embedded: np.ndarray, k: int, rows: tuple[int, ...] = ROWS
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `neighbours`, of f32[n, D] embeddings.

        Returns:
            f32[n, min(k, N)] inner products, descending, and i32[n, min(k, N)] rows of the
            artifact's documents.
        """
        if self.artifact.documents is None:
            raise ValueError(
                f"{self.artifact.folder}: expected training documents, found none; export with "
                "--config.export.documents=True"
            )
        with self._lock:
            return self._ranker.documents.search(
                embedded, min(k, len(self.artifact.documents)), rows
            )

    def restricted(self, ids: Iterable[str]) -> "Predictor":
        """The predictor of some of the labels; it searches exactly.

        Args:
            ids: identifiers of labels.

        Raises:
            ValueError: there is no such label.
        """
        part = copy.copy(self)
        part._ranker = self._ranker.restricted(self._rows_of(ids, "labels"))
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
        return self._encoder.prepare(image, limits)

    def warm_up(
        self,
        k: int,
        rows: tuple[int, ...] = ROWS,
        exclude: int = 0,
        neighbours: int = 0,
        progress: Callable[[int, int], None] = lambda ready, total: None,
    ) -> None:
        """Compiles all that texts may need, so that no later call waits for it.

        Args:
            k: labels per document, at most.
            rows: see `rank`.
            exclude: labels excluded of a document, at most.
            neighbours: training documents per document, at most.
            progress: called before each program, and at the end, with the numbers of programs that
                are ready and of all.
        """
        with self._lock:
            self.row(self.artifact.labels.ids[0])
            programs = self._encoder.programs(rows)
            programs += self._ranker.programs(k, rows, exclude, neighbours)
            for number, run in enumerate(programs):
                progress(number, len(programs))
                run()
            progress(len(programs), len(programs))

    def warm_up_pictures(self) -> None:
        """See `QueryEncoder.warm_up_pictures`."""
        with self._lock:
            self._encoder.warm_up_pictures()

    def _allowed(self, query: Query) -> Allowed:
        only = None
        if query.only is not None:
            only = self._ranker.columns(self._rows_of(query.only, "only"))
        exclude = () if query.exclude is None else query.exclude
        return only, self._ranker.columns(self._rows_of(exclude, "exclude"))

    def _rows_of(self, ids: Iterable[str], where: str) -> np.ndarray:
        """i32[m], ascending, of label ids, each once."""
        if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
            raise ValueError(f"{where}: expected a list of label ids, got {ids!r:.60}")
        try:
            return np.unique(np.array([self.row(name) for name in ids], np.int32))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        ids = map(cell_values.normal, self.artifact.labels.ids)
        return {name: row for row, name in enumerate(ids)}

    @functools.cached_property
    def _id_with(self) -> dict[str, str]:
        """Piece -> the first label's id with it, of ids that the separator of ids is part of."""
        ids: dict[str, str] = {}
        for name in self._row_of:
            for piece in name.split("|") if "|" in name else ():
                ids.setdefault(piece.strip(), name)
        return ids


def _listed(items: Any, scores: np.ndarray, rows: np.ndarray, cut: np.ndarray) -> list[Predictions]:
    """Rows of an artifact's labels or documents as lists, one for each query."""
    return [
        Predictions(
            (
                Prediction(items.ids[row], items.texts[row], score)
                for row, score in zip(*pair)
                if row >= 0
            ),
            is_cut,
        )
        for *pair, is_cut in zip(rows.tolist(), scores.tolist(), cut.tolist())
    ]


def _queries(documents: Any) -> list[Query]:
    """Documents as queries; ValueError for anything else."""
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
    """A number of labels or documents as an int; ValueError unless it is at least 1."""
    try:
        if isinstance(k, (bool, np.bool_)) or operator.index(k) < 1:
            raise TypeError
    except TypeError:
        raise ValueError(f"k: expected a whole number of at least 1, got {k!r:.60}") from None
    return operator.index(k)
