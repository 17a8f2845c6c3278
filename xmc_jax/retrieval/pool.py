"""What was retrieved, once, scored in many settings of `AugmentedConfig`: for `tuning`.

In exact agreement with `augmented.augment`, ties included, at a few operations for a setting.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import numpy as np

from xmc_jax.retrieval import augmented
from xmc_jax.retrieval.augmented import AugmentedConfig

_BLOCK = 128  # documents whose labels' scores are a matrix at a time
FAR = np.iinfo(np.int32).max
"""The rank of what was not found, or is filtered."""


class Pool:
    """What was retrieved for some documents, laid out so that a setting costs few operations.

    The labels that can be predicted for a document, by any setting, are its row of a matrix, by
    ascending number; a setting mixes two such matrices, of labels' mass and of documents' mass.
    Documents go in blocks of about as many labels, so that there is little padding.
    """

    def __init__(self, labels, documents, positives, truth, pairs, mode, prior, k):
        counts = np.where(documents[1] >= 0, positives.counts()[documents[1]], 0).sum(axis=1)
        order = np.argsort(counts, kind="stable")
        self._positives = len(truth.indices)
        self._blocks = [
            _Block(
                *(order[start : start + _BLOCK], labels, documents, positives, truth, pairs, mode),
                *(prior, k),
            )
            for start in range(0, len(order), _BLOCK)
        ]

    def ranks(self, settings: Sequence[AugmentedConfig]) -> np.ndarray:
        """i32[S, nnz], the rank of each positive in each setting, `FAR` if k or more."""
        out = np.full((len(settings), self._positives), FAR, np.int32)
        order = sorted(range(len(settings)), key=lambda i: _by_cost(settings[i]))

        def fill(block: "_Block") -> None:
            found = block.ranks([settings[i] for i in order])
            for i, (positive, rank) in zip(order, found):
                out[i, positive] = rank  # no other block has these positives

        with futures.ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(fill, self._blocks))
        return out


def _by_cost(one: AugmentedConfig) -> tuple:
    """Neighbours in this order share what takes longest."""
    return (
        *(one.temperature, one.documents, one.normalize_rows, one.filter_first, one.labels),
        *(one.separate_softmax, one.label_weight, one.prior_weight),
    )


class _Last:
    """A value that is made anew only when what it depends on is another than last time."""

    def __init__(self):
        self._key: Any = None
        self._value: Any = None

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key != self._key:
            self._key, self._value = key, make()
        return self._value


class _Block:
    """Some documents (rows) and the labels that can be predicted for them (columns)."""

    def __init__(self, rows, labels, documents, positives, truth, pairs, mode, prior, k):
        num_labels = positives.columns
        (self._label_scores, label_ids), (self._document_scores, document_ids) = (
            (scores[rows].astype(np.float64), ids[rows]) for scores, ids in (labels, documents)
        )
        place = np.full(truth.rows, -1)
        place[rows] = np.arange(len(rows))
        mine = place[pairs[:, 0]] >= 0
        filtered = place[pairs[mine, 0]] * num_labels + pairs[mine, 1]

        def is_filtered(row, label):
            return np.isin(row * num_labels + label, filtered)

        found = label_ids >= 0
        row, item = np.nonzero(found)
        dropped = np.zeros(found.shape, bool)
        dropped[row, item] = is_filtered(row, label_ids[row, item])
        # Ranks of items by whether filtered labels are dropped first.
        self._ranks = {
            first: _item_ranks(
                np.where(found & ~(dropped & first), self._label_scores, -np.inf),
                np.where(document_ids >= 0, self._document_scores, -np.inf),
                mode,
            )
            for first in (False, True)
        }
        # (row, label) of what labels and documents add, except to filtered labels.
        kept = ~dropped[row, item]
        label_row, self._label_item = row[kept], item[kept]
        row, item = np.nonzero(document_ids >= 0)
        passed = positives.take(document_ids[row, item])
        self._passed_to = np.zeros(document_ids.shape)
        self._passed_to[row, item] = passed.counts()
        row, item = (np.repeat(x, passed.counts()) for x in (row, item))
        kept = ~is_filtered(row, passed.indices)
        row, item, label = row[kept], item[kept], passed.indices[kept]
        keys = np.concatenate(
            [
                label_row * num_labels + label_ids[label_row, self._label_item],
                row * num_labels + label,
            ]
        )
        cells, cell_of = np.unique(keys, return_inverse=True)
        cell_row, label_of = np.divmod(cells, num_labels)
        column = np.arange(len(cells)) - np.searchsorted(cell_row, cell_row)
        self.shape = len(rows), int(column.max(initial=0)) + 1
        self._cells = cell_row * self.shape[1] + column  # in the flat matrix
        of_label, of_document = np.split(cell_of, [len(label_row)])
        self._label_row, self._label_cell = label_row, self._cells[of_label]
        # By cell; within one by rank, the order in which `augment` adds.
        order = np.argsort(of_document, kind="stable")
        of_document = of_document[order]
        self._first = np.flatnonzero(np.diff(of_document, prepend=-1))
        self._document_cell = self._cells[of_document[self._first]]
        self._entries = (row * document_ids.shape[1] + item)[order]  # in the flat matrix of items
        self._cell_ranks = {first: self._best_ranks(*self._ranks[first]) for first in self._ranks}
        self._prior = None
        if prior is not None:
            self._prior = np.ones(self.shape)
            self._prior.flat[self._cells] = prior[label_of]
        # Which positive a cell is, -1 if none.
        wanted = truth.take(rows)
        keys = wanted.row_ids() * num_labels + wanted.indices
        number = np.repeat(truth.indptr[rows] - wanted.indptr[:-1], wanted.counts())
        hit = np.isin(keys, cells)
        self._positive = np.full(self.shape, -1)
        self._positive.flat[self._cells[np.searchsorted(cells, keys[hit])]] = (
            number + np.arange(len(keys))
        )[hit]
        self._k = min(k, self.shape[1])

    def ranks(self, settings: Sequence[AugmentedConfig]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each setting, numbers of positives among the first k, and their ranks."""
        label_side, document_side, power, absent = _Last(), _Last(), _Last(), _Last()
        room = np.empty((2, *self.shape))  # as new arrays of this size would cost as much as sums
        for one in settings:
            limits, joint = _limits(one), one.mode == "joint"
            score = self._mix(
                one,
                label_side.get(
                    (one.temperature, limits[0], one.filter_first),
                    lambda one=one: self._label_side(one),
                ),
                document_side.get(
                    (one.temperature, limits[1], one.normalize_rows, joint and one.filter_first),
                    lambda one=one: self._document_side(one),
                ),
                room,
            )
            weight = 0 if self._prior is None else one.prior_weight
            if weight:
                score *= power.get(weight, lambda w=weight: augmented.powers(self._prior, w))
            score += absent.get(
                (*limits, one.filter_first, weight != 0),
                lambda one=one, weight=weight: self._absent(one, weight),
            )
            yield self._first_positives(score)

    def _label_side(self, one: AugmentedConfig):
        """Mass of each cell before it is divided by the sum, the sum, and the best score."""
        mass, total, top = self._mass(one, self._label_scores, side=0)
        cells = np.zeros(self.shape)
        cells.flat[self._label_cell] = mass[self._label_row, self._label_item]
        return cells, total, top

    def _document_side(self, one: AugmentedConfig):
        mass, total, top = self._mass(one, self._document_scores, side=1)
        if one.normalize_rows:
            mass = mass / np.maximum(self._passed_to, 1)
        cells = np.zeros(self.shape)
        if len(self._first):
            cells.flat[self._document_cell] = np.add.reduceat(
                mass.ravel()[self._entries], self._first
            )
        return cells, total, top

    def _mass(self, one: AugmentedConfig, scores: np.ndarray, side: int):
        kept = self._ranks[one.filter_first][side] < _limits(one)[side]
        logits = np.where(kept, scores / one.temperature, -np.inf)
        top = logits.max(axis=1, initial=-np.inf)
        mass = np.exp(logits - np.where(np.isfinite(top), top, 0)[:, None])
        return mass, mass.sum(axis=1), top

    def _mix(self, one: AugmentedConfig, label_side, document_side, room) -> np.ndarray:
        sides, weights = (label_side, document_side), (one.label_weight, 1 - one.label_weight)
        totals, tops = (np.stack([side[i] for side in sides]) for i in (1, 2))
        scale = np.ones(totals.shape)
        if not one.separate_softmax:  # one softmax over both
            top = tops.max(axis=0)
            scale = np.exp(tops - np.where(np.isfinite(top), top, 0))
            totals = (totals * scale).sum(axis=0)
        scale = scale * np.array(weights)[:, None] / np.where(totals > 0, totals, 1)
        for side, factor, out in zip(sides, scale, room):
            np.multiply(side[0], factor[:, None], out=out)
        return np.add(*room, out=room[0])

    def _absent(self, one: AugmentedConfig, weight: float) -> np.ndarray:
        """-inf for cells that this setting does not retrieve, or its prior removes; else 0."""
        ranks, limits = self._cell_ranks[one.filter_first], _limits(one)
        absent = (ranks[0] >= limits[0]) & (ranks[1] >= limits[1])
        if weight:
            absent |= self._prior == 0
        return np.where(absent, -np.inf, 0.0)

    def _first_positives(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # More than k where scores are equal; columns, as labels, then say which comes first.
        least = np.partition(score, -self._k, axis=1)[:, -self._k, None]
        cell = np.flatnonzero(score >= np.maximum(least, np.finfo(np.float64).min))
        row = cell // self.shape[1]
        order = np.lexsort((cell, -score.ravel()[cell], row))
        cell, row = cell[order], row[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        positive = self._positive.ravel()[cell]
        first = (positive >= 0) & (rank < self._k)
        return positive[first], rank[first]

    def _best_ranks(self, label_ranks: np.ndarray, document_ranks: np.ndarray):
        """Of each cell, the rank of its label, and of the first document that has it."""
        of_label, of_document = np.full((2, *self.shape), FAR)
        of_label.flat[self._label_cell] = label_ranks[self._label_row, self._label_item]
        if len(self._first):
            of_document.flat[self._document_cell] = np.minimum.reduceat(
                document_ranks.ravel()[self._entries], self._first
            )
        return of_label, of_document


def _item_ranks(labels: np.ndarray, documents: np.ndarray, mode: str):
    """Ranks of labels and of documents, apart or together, by score; -inf has none."""
    both = np.concatenate([labels, documents], axis=1)
    sides = (labels, documents) if mode == "split" else (both,)
    ranks = []
    for scores in sides:
        order = np.argsort(-scores, axis=1, kind="stable")
        rank = np.empty(scores.shape, np.int64)
        np.put_along_axis(rank, order, np.arange(scores.shape[1])[None], axis=1)
        ranks.append(np.where(scores > -np.inf, rank, FAR))
    return np.split(np.concatenate(ranks, axis=1), [labels.shape[1]], axis=1)


def _limits(one: AugmentedConfig) -> tuple[int, int]:
    """Below which rank a label and a document are retrieved."""
    both = one.labels + one.documents
    return (one.labels, one.documents) if one.mode == "split" else (both, both)
