"""Retrieval-augmented inference: nearest labels and the labels of nearest train documents.

Who ranks labels does it in this order, so that excluded labels never leave a list short:

    search      `depths` labels and train documents; labels that may not be predicted are not found
    mix         softmax over what was found, summed by label
    fill up     labels that were not mixed follow by inner product, until there are k
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from xmc_jax.config import AugmentedConfig
from xmc_jax.data.csr import Csr
from xmc_jax.runtime.wording import counted

Nearest = tuple[np.ndarray, np.ndarray]
"""f32[M, K] inner products, best first, and i32[M, K] ids; -inf and -1 where there are no more."""

RETIRED = ("filter_first",)
"""Fields of `AugmentedConfig` in files of earlier versions, which have no effect any more."""

_BLOCK = 128  # documents whose labels' scores are a matrix at a time
_FAR = np.iinfo(np.int64).max  # rank of what was not found


def depths(config: AugmentedConfig, k: int) -> tuple[int, int]:
    """How many labels and train documents are searched for, so that k labels can be ranked."""
    labels, documents = _limits(config)
    return max(labels, k), documents


def rank(
    labels: Nearest,
    documents: Nearest,
    positives: Csr,
    config: AugmentedConfig,
    k: int,
    excluded: Csr | None = None,
    prior: np.ndarray | None = None,
    label_counts: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels by `(w sum_labels p_l e_l + (1 - w) sum_documents p_d Y_d) * prior^g`.

    p is the softmax over the scores of the items that are mixed, e_l the indicator of a label, Y_d
    the row of positives of a train document, g the prior's weight. The labels in `labels` that are
    not mixed follow in their order, with score 0. So the first labels of a list do not depend on
    its length.

    Args:
        labels: of M documents the nearest labels, without excluded ones and those whose prior is 0;
            at least as many as `depths` says, or all there are.
        documents: the nearest train documents, likewise.
        positives: [N, L] of the train documents.
        config: see `AugmentedConfig`.
        k: labels to return.
        excluded: [M, L], labels that may not be predicted; None for none.
        prior: f[L], finite, at least 0; None for 1 throughout.
        label_counts: i[N], labels of each train document, those that are not ranked included; by
            default those of `positives`.

    Returns:
        f32[M, k] scores, descending, and i32[M, k] label ids; ties go to the lower id, rows with
        fewer labels end in -inf and -1.

    Raises:
        ValueError: the config asks for a prior or for tuned weights and there are none here, or a
            prior is not of these labels, or too large with this exponent.

    Source: ViXML supp. E and `eval_mm.py::predict`; RAE-XMC (joint search). There, excluded labels
    are mixed and then removed. The prior is not in them; as the exponent of a prior, Menon et al.
    2021, "Long-tail learning via logit adjustment".
    """
    mixture = Mixture(labels, documents, positives, config.mode, excluded, prior, label_counts)
    return mixture.rank([config], k)[0]


class Mixture:
    """The labels and the train documents found for M documents, to be ranked under any settings.

    Args:
        labels: see `rank`, as all below; as many as any of the settings needs.
        documents: likewise.
        positives: [N, L].
        mode: of all settings.
        excluded: [M, L], or None.
        prior: f[L], or None.
        label_counts: i[N], or None.
        reuse: keep between calls of `rank` what settings have in common. Takes memory: per document
            about 100 bytes for each label of its neighbours.

    Raises:
        ValueError: see `rank`.
    """

    def __init__(
        self,
        labels: Nearest,
        documents: Nearest,
        positives: Csr,
        mode: str,
        excluded: Csr | None = None,
        prior: np.ndarray | None = None,
        label_counts: np.ndarray | None = None,
        reuse: bool = False,
    ):
        if prior is not None and prior.shape != (positives.columns,):
            raise ValueError(
                f"augmented: expected a prior of {counted(positives.columns, 'label')}, got shape "
                f"{prior.shape}"
            )
        self._count, self._has_prior = len(labels[1]), prior is not None
        order = np.arange(self._count)
        if reuse:  # documents with about as many labels in a block, so that there is little padding
            counts = np.where(documents[1] >= 0, positives.counts()[documents[1]], 0).sum(axis=1)
            order = np.argsort(counts, kind="stable")
        self._blocks = [order[i : i + _BLOCK] for i in range(0, self._count, _BLOCK)]

        def candidates(block: int) -> _Candidates:
            rows = self._blocks[block]
            return _Candidates(
                *(tuple(x[rows] for x in neighbours) for neighbours in (labels, documents)),
                positives,
                mode,
                None if excluded is None else excluded.take(rows),
                prior,
                label_counts,
            )

        self._candidates = functools.cache(candidates) if reuse else candidates

    def rank(
        self, settings: Sequence[AugmentedConfig], k: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k best labels of each document under each of the settings; see the function `rank`.

        Neighbours that differ in `label_weight` or `separate_softmax` alone share most of the work.
        """
        for config in settings:
            if config.weights == "tuned":
                raise ValueError(
                    "eval.augmented.weights: expected the tuned weights themselves, got only their "
                    "name; read them with retrieval.tuned.read"
                )
            if not self._has_prior and config.prior is not None:
                raise ValueError(f"augmented: expected the prior {config.prior!r}, got none")
        shape = self._count, k
        out = [(np.full(shape, -np.inf, "f4"), np.full(shape, -1, "i4")) for _ in settings]

        def fill(block: int) -> None:
            rows, some = self._blocks[block], self._candidates(block)
            for config, (scores, ids) in zip(settings, out):
                key = some.keys(config)
                row, place, column = _best(key, k)
                scores[rows[row], place] = np.maximum(key[row, column], 0)
                ids[rows[row], place] = some.labels[row, column]

        if len(self._blocks) > 1:
            with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
                list(threads.map(fill, range(len(self._blocks))))
        elif self._blocks:
            fill(0)
        return out


class _Candidates:
    """The labels that some setting may rank for m documents, so that a setting costs little.

    A document has a row; the columns are its labels, ascending. A setting mixes two such matrices,
    of the labels' mass and of the documents' mass.

    Args:
        labels: see `rank`.
        documents: see `rank`.
        positives: see `rank`.
        mode: see `AugmentedConfig`.
        excluded: [m, L], or None.
        prior: see `rank`.
        label_counts: see `rank`.

    Attributes:
        labels: i32[m, C], -1 past a document's last label.
    """

    def __init__(
        self,
        labels: Nearest,
        documents: Nearest,
        positives: Csr,
        mode: str,
        excluded: Csr | None = None,
        prior: np.ndarray | None = None,
        label_counts: np.ndarray | None = None,
    ):
        num_labels = positives.columns
        (self._label_scores, label_ids), (self._document_scores, document_ids) = (
            (scores.astype(np.float64), ids) for scores, ids in (labels, documents)
        )
        self._ranks = _ranks(self._label_scores, self._document_scores, mode)
        label_row, label_item = np.nonzero(label_ids >= 0)
        row, item = np.nonzero(document_ids >= 0)
        passed = positives.take(document_ids[row, item])
        self._passed_to = np.zeros(document_ids.shape)  # labels of each document
        self._passed_to[row, item] = passed.counts()
        if label_counts is not None:
            self._passed_to[row, item] = label_counts[document_ids[row, item]]
        row, item = (np.repeat(x, passed.counts()) for x in (row, item))
        kept = np.ones(len(row), bool)
        if excluded is not None:
            kept &= ~np.isin(
                row * num_labels + passed.indices,
                excluded.row_ids() * num_labels + excluded.indices,
            )
        if prior is not None:
            kept &= prior[passed.indices] > 0
        row, item = row[kept], item[kept]
        keys = np.concatenate(
            [
                label_row * num_labels + label_ids[label_row, label_item],
                row * num_labels + passed.indices[kept],
            ]
        )
        order = np.argsort(keys, kind="stable")
        new = np.diff(keys[order], prepend=-1) > 0
        of_row, of_label = np.divmod(keys[order][new], num_labels)
        column = np.arange(len(of_row)) - np.searchsorted(of_row, of_row)
        self._shape = len(label_ids), int(column.max(initial=0)) + 1
        cells = of_row * self._shape[1] + column  # in the flat matrix
        self.labels = np.full(self._shape, -1, np.int32)
        self.labels.flat[cells] = of_label
        cell_of = np.empty(len(keys), np.int64)
        cell_of[order] = cells[np.cumsum(new) - 1]
        # In the flat matrices of items: each label that was found, and each label of a document.
        self._label_cells, self._cells = np.split(cell_of, [len(label_row)])
        self._label_items = label_row * label_ids.shape[1] + label_item
        self._items = row * document_ids.shape[1] + item
        # Of each cell: the place of its label, its rank, and the rank of its first document.
        self._place, *self._first = (np.full(self._shape, _FAR) for _ in range(3))
        self._place.flat[self._label_cells] = label_item
        self._first[0].flat[self._label_cells] = self._ranks[0].flat[self._label_items]
        backwards = slice(None, None, -1)  # the last one that is written is the best
        self._first[1].flat[self._cells[backwards]] = self._ranks[1].flat[self._items[backwards]]
        self._prior = None
        if prior is not None:
            self._prior = np.ones(self._shape)
            self._prior.flat[cells] = prior[of_label]
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._buffers = np.empty((2, *self._shape))  # new arrays would cost as much as sums

    def keys(self, config: AugmentedConfig) -> np.ndarray:
        """f64[m, C] that sorts the labels of each document, the best highest.

        At least 0 are scores of labels that are mixed; those below are of labels that follow, and
        -inf is of no label. The array is overwritten by the next call.
        """
        limits = _limits(config)
        weight = 0 if self._prior is None else config.prior_weight
        sides = (
            self._once("labels", (config.temperature, limits[0]), self._label_side),
            self._once(
                "documents",
                (config.temperature, limits[1], config.normalize_rows),
                self._document_side,
            ),
        )
        key = self._mix(config, sides)
        if weight:
            key *= self._once("prior", (weight,), lambda w: _powers(self._prior, w))
        mixed, others = self._once("order", limits, self._order)
        np.copyto(key, others, where=~mixed)
        return key

    def _once(self, name: str, key: tuple, make: Callable[..., Any]) -> Any:
        """What is made of a key; made anew only when the key is another than last time."""
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = key, make(*key)
        return self._kept[name][1]

    def _label_side(self, temperature: float, limit: int):
        """Mass of each cell before it is divided by the sum, the sum, and the best logit."""
        mass, total, top = _mass(self._label_scores, self._ranks[0], limit, temperature)
        cells = np.zeros(self._shape)
        cells.flat[self._label_cells] = mass.ravel()[self._label_items]
        return cells, total, top

    def _document_side(self, temperature: float, limit: int, normalize_rows: bool):
        mass, total, top = _mass(self._document_scores, self._ranks[1], limit, temperature)
        if normalize_rows:
            mass = mass / np.maximum(self._passed_to, 1)
        cells = np.bincount(self._cells, mass.ravel()[self._items], math.prod(self._shape))
        return cells.reshape(self._shape), total, top

    def _mix(self, config: AugmentedConfig, sides) -> np.ndarray:
        weights = config.label_weight, 1 - config.label_weight
        totals, tops = (np.stack([side[i] for side in sides]) for i in (1, 2))
        scale = np.ones(totals.shape)
        if not config.separate_softmax:  # one softmax over both
            top = tops.max(axis=0)
            scale = np.exp(tops - np.where(np.isfinite(top), top, 0))
            totals = (totals * scale).sum(axis=0)
        scale = scale * np.array(weights)[:, None] / np.where(totals > 0, totals, 1)
        for side, factor, out in zip(sides, scale, self._buffers):
            np.multiply(side[0], factor[:, None], out=out)
        return np.add(*self._buffers, out=self._buffers[0])

    def _order(self, *limits: int) -> tuple[np.ndarray, np.ndarray]:
        """bool[m, C], what is mixed, and f64[m, C], keys of the others."""
        mixed = (self._first[0] < limits[0]) | (self._first[1] < limits[1])
        return mixed, np.where(self._place < _FAR, -1.0 - self._place, -np.inf)


def _best(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The k highest of each row, without -inf; ties go to the lower column.

    Args:
        keys: f64[m, C].
        k: at least 1.

    Returns:
        i64[n] each: row, rank in it from 0, and column; by row and rank.
    """
    width = keys.shape[1]
    k = min(k, width)
    least = np.partition(keys, width - k, axis=1)[:, width - k, None]  # more than k may equal it
    cell = np.flatnonzero(keys >= np.maximum(least, np.finfo(np.float64).min))
    row, column = np.divmod(cell, width)
    order = np.lexsort((column, -keys.flat[cell], row))
    row, column = row[order], column[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    first = rank < k
    return row[first], rank[first], column[first]


def _powers(prior: np.ndarray, weight: float) -> np.ndarray:
    """f64: `prior ** weight`, which mixed probabilities are multiplied with.

    Args:
        prior: f, finite, at least 0.
        weight: `AugmentedConfig.prior_weight`.

    Raises:
        ValueError: it is beyond float32, as 0 with a negative weight is.
    """
    with np.errstate(divide="ignore", over="ignore"):
        factors = np.power(prior, weight, dtype=np.float64)
    if not (factors <= np.finfo(np.float32).max).all():
        worst = prior.flat[np.argmax(np.where(np.isnan(factors), np.inf, factors))]
        raise ValueError(
            f"eval.augmented.prior: expected numbers whose power {weight:g} is below 3e38, got "
            f"{worst:g}; scale them, or set --config.eval.augmented.prior_weight nearer to 0"
        )
    return factors


def _limits(config: AugmentedConfig) -> tuple[int, int]:
    """Below which rank a label and a document are mixed."""
    both = config.labels + config.documents
    return (config.labels, config.documents) if config.mode == "split" else (both, both)


def _ranks(labels: np.ndarray, documents: np.ndarray, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """i64 ranks of labels [m, K] and documents [m, J], best first: of each alone or of both."""
    ranks = tuple(np.where(x > -np.inf, np.arange(x.shape[1]), _FAR) for x in (labels, documents))
    if mode == "split":
        return ranks
    both = np.concatenate([labels, documents], axis=1)
    order = np.argsort(-both, axis=1, kind="stable")  # labels before documents of the same score
    rank = np.empty(both.shape, np.int64)
    np.put_along_axis(rank, order, np.arange(both.shape[1])[None], axis=1)
    return tuple(np.split(np.where(both > -np.inf, rank, _FAR), [labels.shape[1]], axis=1))


def _mass(scores: np.ndarray, ranks: np.ndarray, limit: int, temperature: float):
    """f64[m, K] `exp((score - best) / temperature)`, their sum f64[m], and the best logit f64[m].

    Of items of rank below `limit`. A sum does not depend on how many others were found.
    """
    logits = np.where(ranks < limit, scores / temperature, -np.inf)
    top = logits.max(axis=1, initial=-np.inf)
    mass = np.exp(logits - np.where(np.isfinite(top), top, 0)[:, None])
    return mass, np.cumsum(mass, axis=1)[:, -1] if mass.size else np.zeros(len(mass)), top
