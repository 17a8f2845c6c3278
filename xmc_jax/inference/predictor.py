"""Ranked labels for new documents, from an exported model:

from xmc_jax.inference.predictor import Predictor
predictor = Predictor.open("runs/first/export")
predictor.predict(["geany: fast and lightweight IDE"], k=5)
"""

import dataclasses
import functools
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xmc_jax import sharding
from xmc_jax.data.csr import Csr
from xmc_jax.inference import artifact, config
from xmc_jax.inference.artifact import Artifact
from xmc_jax.inference.tower import ROWS, Item, Tower
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.metrics import drop_filtered, filtered_per_document

_CHECKED = 65_536  # rows looked at at a time
_STEP = 128  # searches are for so many, or a multiple, so that few are compiled
_FEW = 4096  # labels of a restricted predictor that are searched on the host, with nothing compiled


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
        self.artifact, self._tower, self._index = opened, tower, index
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
        self, documents: Sequence[str | Query], k: int = 10, ranking: str = "auto"
    ) -> list[list[Prediction]]:
        """The k best labels of each document, best first.

        Args:
            documents: texts, or `Query`.
            k: labels per document; fewer where fewer may be predicted.
            ranking: see `PredictConfig`.

        Raises:
            ValueError: a label id that is not there, a picture that cannot be read, or a ranking
                that the artifact has nothing for.
        """
        scores, rows = self.rank(documents, k, ranking)
        return [
            [self._prediction(row, score) for row, score in zip(*pair) if row >= 0]
            for pair in zip(rows.tolist(), scores.tolist())
        ]

    def rank(
        self,
        documents: Sequence[str | Query],
        k: int = 10,
        ranking: str = "auto",
        rows: tuple[int, ...] = ROWS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`predict` as arrays.

        Args:
            documents: see `predict`.
            k: see `predict`.
            ranking: see `predict`.
            rows: see `Tower.encode`.

        Returns:
            f32[n, k] scores, descending, and i32[n, k] rows of the artifact's labels; -inf and -1
            where there are no more.
        """
        queries = [Query(text=q) if isinstance(q, str) else q for q in documents]
        if not queries:
            return np.empty((0, k), np.float32), np.empty((0, k), np.int32)
        with self._lock:
            embedded = self._tower.encode(queries, rows=rows)
            return self.rank_embedded(embedded, queries, k, ranking, rows)

    def embed(self, documents: Sequence[str | Query], rows: tuple[int, ...] = ROWS) -> np.ndarray:
        """f32[n, D], unit embeddings of documents; `rows` as of `Tower.encode`."""
        queries = [Query(text=q) if isinstance(q, str) else q for q in documents]
        with self._lock:
            return self._tower.encode(queries, rows=rows)

    def rank_embedded(
        self,
        embedded: np.ndarray,
        queries: Sequence[Query],
        k: int,
        ranking: str = "auto",
        rows: tuple[int, ...] = ROWS,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rank`, of f32[n, D] embeddings."""
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        mix = self._mix(ranking)
        out_scores = np.full((len(queries), k), -np.inf, np.float32)
        out_rows = np.full((len(queries), k), -1, np.int32)
        listed = [i for i, query in enumerate(queries) if query.only is not None]
        for i in listed:
            part = self.restricted(queries[i].only)
            one = dataclasses.replace(queries[i], only=None)
            found = part.rank_embedded(embedded[i : i + 1], [one], k, ranking, rows)
            out_scores[i], out_rows[i] = found[0][0], found[1][0]
        others = np.setdiff1d(np.arange(len(queries)), listed)
        if len(others) and len(self.labels):
            pairs = self._pairs([queries[i].exclude for i in others])
            with self._lock:
                scores, columns = self._ranked(embedded[others], pairs, k, mix, rows)
            out_scores[others] = scores
            out_rows[others] = np.where(columns < 0, -1, self.labels[columns])
        return out_scores, out_rows

    def neighbours(self, documents: Sequence[str | Query], k: int = 10) -> list[list[Prediction]]:
        """The k nearest training documents of each document, nearest first.

        Raises:
            ValueError: the artifact was exported without documents.
        """
        scores, rows = self.neighbours_embedded(self.embed(documents), k)
        there = self.artifact.documents
        return [
            [Prediction(there.ids[row], there.texts[row], score) for row, score in zip(*pair)]
            for pair in zip(rows.tolist(), scores.tolist())
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
            return self._documents.search(embedded, k, rows)

    def restricted(self, ids: Iterable[str]) -> "Predictor":
        """The same over some of the labels; searched exactly.

        Args:
            ids: identifiers of labels.

        Raises:
            ValueError: there is no such label.
        """
        rows = np.unique(np.array([self.row(name) for name in ids], np.int32))
        rows = rows if self._whole else rows[np.isin(rows, self.labels)]
        part = Predictor(self.artifact, self._tower, "exact", rows)
        part._of = self._of or self
        return part

    def row(self, name: str) -> int:
        """The row of a label's id.

        Raises:
            ValueError: there is no such label.
        """
        row = self._row_of.get(name)
        if row is None:
            raise ValueError(
                f"label {name!r}: expected one of the {len(self._row_of)} labels of "
                f"{self.artifact.folder}, found no such id"
            )
        return row

    def prepare(self, image: bytes, limits: Any = None) -> np.ndarray:
        """See `Tower.prepare`; several threads may."""
        return self._tower.prepare(image, limits)

    def warm_up(
        self, k: int, rows: tuple[int, ...] = ROWS, exclude: int = 0, neighbours: int = 0
    ) -> None:
        """Compiles and reads all that predictions may need.

        Args:
            k: labels per document, at most.
            rows: see `Tower.encode`.
            exclude: labels that are excluded of a document, likewise.
            neighbours: training documents per document, likewise.
        """
        mix, documents = self.artifact.ranking, self.artifact.documents
        both = mix.labels + mix.documents if mix.mode == "joint" else 0
        with self._lock:
            self._tower.warm_up(rows)
            self.row(self.artifact.labels.ids[0])
            for size in rows:
                embedded = np.zeros((size, self.artifact.model.width), np.float32)
                self._warm_up_search(
                    self._nearest, embedded, max(k, mix.labels, both) + exclude, rows
                )
                if documents is not None:
                    most = max(neighbours, mix.documents, both and both + exclude)
                    self._warm_up_search(self._documents.search, embedded, most, rows)

    def _warm_up_search(self, search, embedded, most: int, rows) -> None:
        for wanted in range(_STEP, most + _STEP, _STEP):
            search(embedded, wanted, rows)

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

    def _pairs(self, excluded: Sequence[Sequence[str]]) -> np.ndarray:
        """i32[p, 2]: (query, column of `labels`) that may not be predicted."""
        pairs = [(i, self.row(name)) for i, names in enumerate(excluded) for name in names]
        pairs = np.unique(np.array(pairs, np.int64).reshape(-1, 2), axis=0)
        pairs = pairs[np.isin(pairs[:, 1], self.labels)]
        pairs[:, 1] = np.searchsorted(self.labels, pairs[:, 1])
        return pairs.astype(np.int32)

    def _ranked(self, embedded, pairs, k, mix, rows) -> tuple[np.ndarray, np.ndarray]:
        """Scores and columns of `labels`, as `evaluate.evaluate` ranks test documents."""
        extra = filtered_per_document(pairs)
        count = len(self.labels)
        nearest = self._nearest(embedded, max(k, mix.labels if mix else 0) + extra, rows)
        if mix is None:
            return drop_filtered(*nearest, pairs, k)
        if mix.mode == "split":
            retrieved = self._documents.search(embedded, mix.documents, rows)
        else:
            wanted = mix.labels + mix.documents + (extra if mix.filter_first else 0)
            both = augmented.union(
                *self._nearest(embedded, wanted, rows),
                *self._documents.search(embedded, wanted, rows),
                count,
            )
            best = np.argsort(-both[0], axis=1, kind="stable")[:, :wanted]
            retrieved = tuple(np.take_along_axis(x, best, axis=1) for x in both)
        scores, ids = augmented.to_mix(mix, nearest, retrieved, pairs, extra, count)
        ids, positives = self._passed_on(ids)
        mixed = augmented.augment(scores, ids, positives, mix, k + extra)
        return drop_filtered(*mixed, pairs, k)

    def _nearest(self, embedded, k: int, rows) -> tuple[np.ndarray, np.ndarray]:
        if self._approximate is not None:
            return self._approximate.search(embedded, min(k, len(self.labels)))
        return self._rows.search(embedded, k, rows)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        if self._of is not None:
            return self._of._row_of
        return {name: row for row, name in enumerate(self.artifact.labels.ids)}

    @functools.cached_property
    def _rows(self) -> "_Rows | _Few":
        embeddings = self.artifact.labels.embeddings
        if self._whole:
            return _Rows(embeddings, self._tower.mesh)
        few = len(self.labels) <= _FEW
        part = embeddings[self.labels]
        return _Few(part) if few else _Rows(part, self._tower.mesh)

    @functools.cached_property
    def _documents(self) -> "_Rows":
        if self._of is not None:
            return self._of._documents
        return _Rows(self.artifact.documents.embeddings, self._tower.mesh)

    def _passed_on(self, ids: np.ndarray) -> tuple[np.ndarray, Csr]:
        """Retrieved items, and the labels of the documents among them, of those that are ranked.

        Args:
            ids: columns of `labels`, or l + document.

        Returns:
            The same, documents numbered as the rows of the second.
        """
        whole, count = self.artifact.documents.positives, len(self.labels)
        if self._whole:
            return ids, whole
        documents = ids >= count
        different, number = np.unique(ids[documents], return_inverse=True)
        taken = whole.take(different - count)
        kept = np.isin(taken.indices, self.labels)
        ends = np.concatenate([[0], np.cumsum(kept)])
        columns = np.searchsorted(self.labels, taken.indices[kept]).astype(np.int32)
        ids = ids.copy()
        ids[documents] = count + number
        return ids, Csr(ends[taken.indptr], columns, None, count)


class _Few:
    """Embeddings of few rows, searched exactly on the host."""

    def __init__(self, embeddings: np.ndarray):
        _check_finite(embeddings)
        self._embeddings = np.ascontiguousarray(embeddings)

    def search(
        self, queries: np.ndarray, k: int, rows: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `_Rows.search`."""
        del rows
        scores = queries @ self._embeddings.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k].astype(np.int32)
        return np.take_along_axis(scores, best, axis=1), best


class _Rows:
    """Embeddings on the devices, searched exactly for few queries or many."""

    def __init__(self, embeddings: np.ndarray, mesh: Mesh):
        _check_finite(embeddings)
        self._placed = exact.place(embeddings, mesh)

    def search(
        self, queries: np.ndarray, k: int, rows: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best min(k, rows there are) of each query, see `exact.search`.

        Queries go in blocks of the sizes of `rows`. As many are searched for as any such k needs,
        so that scores are the same to the bit for all of these.
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


def _check_finite(embeddings: np.ndarray) -> None:
    for start in range(0, len(embeddings), _CHECKED):
        if not np.isfinite(embeddings[start : start + _CHECKED]).all():
            raise ValueError("artifact: expected finite embeddings, found others")
