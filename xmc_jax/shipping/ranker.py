"""Labels and training documents ranked for embeddings, as arrays; `Predictor` is the interface."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from xmc_jax.config import AugmentedConfig, PredictConfig, choices
from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import augmented, exact, scann
from xmc_jax.retrieval.metrics import first
from xmc_jax.runtime import sharding
from xmc_jax.shipping.artifact import Artifact

INDEXES, RANKINGS = choices(PredictConfig, "index"), choices(PredictConfig, "ranking")
_CHECKED = 65_536  # rows looked at at a time
_STEP = 256  # searches are for so many, or a multiple, so that few programs are compiled

Allowed = tuple[np.ndarray | None, np.ndarray]
"""Columns of labels that alone may be ranked, None for all; columns that may not. i32, ascending"""


class Ranker:
    """Ranks all labels of an artifact, or some.

    Args:
        labels: i32[l], ascending rows of the labels to rank; None for all.
        whole: the ranker of all labels, whose arrays of documents are shared.

    Attributes:
        labels: i32[l], rows of the labels that are ranked; l columns.
        approximate: the ScaNN index that is searched, None for exact search.
    """

    def __init__(
        self,
        opened: Artifact,
        mesh: Mesh,
        index: str = "auto",
        labels: np.ndarray | None = None,
        whole: "Ranker | None" = None,
    ):
        if index not in INDEXES:
            raise ValueError(f"index: expected one of {INDEXES}, got {index!r:.60}")
        self.artifact, self._mesh, self._all = opened, mesh, whole
        self._is_whole = labels is None
        self.labels = np.arange(len(opened.labels), dtype=np.int32) if self._is_whole else labels
        self.approximate = None
        wanted = index == "scann" or (index == "auto" and self._is_whole and scann.available())
        if wanted and opened.index is not None:
            self.approximate = scann.ScannIndex.load(opened.index, opened.labels.embeddings)
        elif index == "scann":
            raise ValueError(
                f"{opened.folder}: expected a ScaNN index, found none; export with "
                "--config.export.index=True, or search exactly"
            )

    def restricted(self, labels: np.ndarray) -> "Ranker":
        """The ranker of some of the labels, i32[l] ascending rows; it searches exactly."""
        return Ranker(self.artifact, self._mesh, "exact", labels, self._all or self)

    def mix(self, ranking: str) -> AugmentedConfig | None:
        """How labels and neighbours are mixed; None to rank labels by inner product.

        Raises:
            ValueError: no such ranking, or no documents for it.
        """
        if ranking not in RANKINGS:
            raise ValueError(f"ranking: expected one of {RANKINGS}, got {ranking!r}")
        mix = self.artifact.ranking
        if ranking == "plain" or (ranking == "auto" and not mix.enabled):
            return None
        if self.artifact.documents is None:
            raise ValueError(
                f"{self.artifact.folder}: expected training documents for ranking=augmented, found "
                "none; export with --config.export.documents=True, or rank plainly"
            )
        return mix

    def columns(self, rows: np.ndarray) -> np.ndarray:
        """i32[m], the columns of rows of labels; rows that are not ranked are left out."""
        if self._is_whole:
            return rows
        columns = np.searchsorted(self.labels, rows)
        ranked = columns < len(self.labels)
        ranked[ranked] = self.labels[columns[ranked]] == rows[ranked]
        return columns[ranked].astype(np.int32)

    def rank(
        self,
        embedded: np.ndarray,
        allowed: Sequence[Allowed],
        k: int,
        mix: AugmentedConfig | None,
        rows: tuple[int, ...],
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32[n, k] scores and i32[n, k] rows of labels, as `evaluate.evaluate` ranks documents.

        Args:
            embedded: f32[n, D].
        """
        out_scores = np.full((len(embedded), k), -np.inf, np.float32)
        out_rows = np.full((len(embedded), k), -1, np.int32)
        depth, near = k, None
        if mix is not None:
            depth, of_documents = augmented.depths(mix, k)
            near = self.documents.search(embedded, of_documents, rows)
        whole = [number for number, (only, _) in enumerate(allowed) if only is None]
        if whole:
            excluded = Csr.of_rows([allowed[number][1] for number in whole], len(self.labels))
            nearest = self._nearest(embedded[whole], depth, rows, excluded, mix is not None)
            if mix is None:
                scores, columns = first(*nearest, k)
            else:
                scores, columns = augmented.rank(
                    nearest,
                    tuple(x[whole] for x in near),
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
                scores, columns = self._rank_among(some, embedded[number], depth, k, mix, of_one)
                out_scores[number] = scores
                out_rows[number] = np.where(columns < 0, -1, self.labels[columns])
        return out_scores, out_rows

    def programs(
        self, k: int, rows: tuple[int, ...], exclude: int, neighbours: int
    ) -> list[Callable[[], Any]]:
        """Calls that compile the searches of `Predictor.warm_up`, one program each."""
        mix, documents, count = self.artifact.ranking, self.artifact.documents, len(self.labels)
        searches = {(_rounded(depth), False) for depth in range(1, k + 1)}
        near: set[int] = set()
        if documents is not None:
            apart = self._prior is not None and not self._prior.all()
            searches |= {(_rounded(augmented.depths(mix, n)[0]), apart) for n in range(1, k + 1)}
            near = {_rounded(n) for n in (augmented.depths(mix, k)[1], *range(1, neighbours + 1))}
        programs: list[Callable[[], Any]] = []
        for size in rows:
            embedded = np.zeros((size, self.artifact.model.width), np.float32)
            for number in exact.excluded_counts(min(exclude, count)):
                excluded = Csr.of_rows([np.arange(number)] * size, count)
                programs += [
                    functools.partial(self._nearest, embedded, depth, rows, excluded, mixed)
                    for depth, mixed in sorted(searches)
                ]
            programs += [
                functools.partial(self.documents.search, embedded, depth, rows)
                for depth in sorted(near)
            ]
        return programs

    def _nearest(
        self,
        embedded: np.ndarray,
        k: int,
        rows: tuple[int, ...],
        excluded: Csr,
        mixed: bool,
    ) -> augmented.Nearest:
        """The k nearest allowed columns of f32[n, D]; `mixed` leaves out labels of prior 0."""
        if mixed and self._prior is not None and not self._prior.all():
            columns, database = self._of_positive_prior
            scores, places = database.search(embedded, k, rows, excluded.select(columns))
            return scores, np.where(places < 0, -1, columns[places]).astype(np.int32)
        if self.approximate is not None:
            return self.approximate.search(embedded, min(k, len(self.labels)), excluded)
        return self._rows.search(embedded, k, rows, excluded)

    def _rank_among(
        self,
        columns: np.ndarray,
        embedded: np.ndarray,
        depth: int,
        k: int,
        mix: AugmentedConfig | None,
        near: augmented.Nearest | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """f32[k] and i32[k], the ranking of one document among some columns, i[m]."""
        prior = self._prior if mix is not None else None
        if prior is not None:
            columns = columns[prior[columns] > 0]
        if not len(columns):
            return np.full(k, -np.inf, np.float32), np.full(k, -1, np.int32)
        embeddings = self.artifact.labels.embeddings[self.labels[columns]]
        products = np.einsum("ld,d->l", embeddings, embedded)  # BLAS may add in other orders
        order = np.argsort(-products, kind="stable")[:depth].astype(np.int32)
        nearest = products[None, order], order[None]
        if mix is None:
            (scores,), (places,) = first(*nearest, k)
        else:
            # Documents by their place in `near`, labels by their place in `columns`.
            documents = near[0][None], np.arange(len(near[1]), dtype=np.int32)[None]
            (scores,), (places,) = augmented.rank(
                nearest,
                documents,
                self._positives.take(near[1]).select(columns),
                mix,
                k,
                prior=None if prior is None else prior[columns],
                label_counts=self._label_counts[near[1]],
            )
        return scores, np.where(places < 0, -1, columns[places]).astype(np.int32)

    @functools.cached_property
    def documents(self) -> "DeviceRows":
        """The embeddings of the training documents."""
        if self._all is not None:
            return self._all.documents
        return DeviceRows(self.artifact.documents.embeddings, self._mesh)

    @functools.cached_property
    def _rows(self) -> "DeviceRows":
        embeddings = self.artifact.labels.embeddings
        return DeviceRows(embeddings if self._is_whole else embeddings[self.labels], self._mesh)

    @functools.cached_property
    def _prior(self) -> np.ndarray | None:
        prior = self.artifact.labels.prior
        return None if prior is None else prior[self.labels]

    @functools.cached_property
    def _of_positive_prior(self) -> tuple[np.ndarray, "DeviceRows"]:
        """i64[m], the columns whose prior is not 0, and their embeddings."""
        columns = np.flatnonzero(self._prior)
        embeddings = self.artifact.labels.embeddings[self.labels[columns]]
        return columns, DeviceRows(embeddings, self._mesh)

    @functools.cached_property
    def _label_counts(self) -> np.ndarray:
        """i64[N], labels of each training document, whether they are ranked or not."""
        return self.artifact.documents.positives.counts()

    @functools.cached_property
    def _positives(self) -> Csr:
        """[N, l]: ranked labels of the training documents."""
        positives = self.artifact.documents.positives
        return positives if self._is_whole else positives.select(self.labels)


class DeviceRows:
    """Embeddings f32[m, D] on the devices, searched exactly for few queries or many.

    Raises:
        ValueError: some are not finite.
    """

    def __init__(self, embeddings: np.ndarray, mesh: Mesh):
        for start in range(0, len(embeddings), _CHECKED):
            if not np.isfinite(embeddings[start : start + _CHECKED]).all():
                raise ValueError("artifact: expected finite embeddings, found others")
        self._placed = exact.place(embeddings, mesh) if len(embeddings) else None

    def search(
        self, queries: np.ndarray, k: int, rows: tuple[int, ...], excluded: Csr | None = None
    ) -> augmented.Nearest:
        """The best min(k, m) of each query, see `exact.search`.

        Queries go in blocks of the sizes of `rows`, and k is rounded up, so that few programs are
        compiled.
        """
        if self._placed is None or not len(queries):
            count = 0 if self._placed is None else min(k, self._placed.count)
            nothing = np.zeros((len(queries), count), np.float32)
            return nothing, nothing.astype(np.int32)
        placed, mesh = self._placed, self._placed.rows.sharding.mesh
        searched, k = exact.depth(placed, _rounded(k)), min(k, placed.count)
        parts = []
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
            block, without, count = sharding.put_whole(
                (block, without, np.int32(placed.count)), mesh
            )
            best = exact.search_block(
                block, placed.rows, count, without, k=searched, block=placed.block, mesh=mesh
            )
            parts.append([x[: len(part), :k] for x in jax.device_get(best)])
            start += size
        return tuple(np.concatenate(x) for x in zip(*parts))


def _rounded(k: int) -> int:
    """How many are searched for where k are wanted."""
    return -(-k // _STEP) * _STEP
