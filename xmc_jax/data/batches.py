"""Batches by random access: (order, step) -> Batch. Pure numpy, no state.

Every process samples the label ids of the whole batch, which is cheap, and gathers texts and
relevance for its own rows only; so any number of processes sees the same global batch.
"""

import functools
import heapq
from typing import NamedTuple

import jax
import numpy as np

from xmc_jax.config import TrainConfig, choices
from xmc_jax.data import rows as row_layout
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.data.types import NO_PROMPTS, Batch, Rows
from xmc_jax.runtime import rng

_SAMPLES = 32  # batches in random order, which the number of rows of a batch follows from
_LARGER = (1.0, 1.1, 1.25)  # numbers of rows, by the one for documents in random order
WEIGHTINGS = choices(TrainConfig, "sampling")
LABELS = choices(TrainConfig, "labels")


def complete(order: np.ndarray, batch_size: int) -> np.ndarray:
    """An epoch's order, its last batch completed with the epoch's first documents.

    Args:
        order: i32[N], every document once.

    Returns:
        i32[ceil(N / B) * B]; the documents of a batch are all different if N >= B.

    Departs: the reference ends its epoch with a short batch; a completed one keeps shapes static,
    visits every document, and has as many steps.
    """
    return np.resize(order, -(-len(order) // batch_size) * batch_size)


def fitting_batch_size(num_documents: int, batch_size: int, multiple: int) -> int:
    """The documents of a batch: `batch_size`, or all documents where these are fewer.

    Args:
        batch_size: the most that are wanted, divisible by `multiple`.
        multiple: parts that a batch is divided into. All documents are rounded up to a multiple of
            it; `complete` then repeats some.
    """
    return min(batch_size, -(-num_documents // multiple) * multiple)


class _Contents(NamedTuple):
    """What a batch encodes: B documents, then the different ones of the labels sampled for them."""

    lengths: np.ndarray  # i64[B + u], own tokens of each
    group: np.ndarray  # i64[B + u] of each: a chunk of a device's part of the batch
    labels: np.ndarray  # i[u]
    place: np.ndarray  # i64[u], which of the U places of labels each has
    columns: np.ndarray  # i32[U], the place of the label of each column


class Sampler:
    """Builds batches of documents, labels sampled for them, and their relevance.

    Row b of a batch is in chunk b mod `chunks` of the shard that it lies on. Each chunk of each
    shard has rows of its own, as many in all of them. A program is compiled for each number of
    rows, so there are few: some that fit nearly every batch of documents in random order, larger
    ones for batches of clusters, whose lengths are alike, and one that fits all. The lengths looked
    at are those of the whole batch, so that all processes take the same.
    """

    def __init__(
        self,
        store: Store,
        batch_size: int,
        positives_per_document: int = 1,
        weighting: str = "inverse_propensity",
        seed: int = 0,
        labels: str = "sampled",
        layout: row_layout.Layout | None = None,
        shards: int = 1,
        chunks: int = 1,
    ):
        """
        Args:
            positives_per_document: labels sampled per document; U = B * positives_per_document.
            weighting: a positive's chance is proportional to its inverse propensity, or "uniform".
            labels: "sampled", those of the batch; or "all", where nothing is sampled and a batch
                has the positives of its documents instead.
            layout: how texts become rows; by default, each has one.
            chunks: parts of these that are encoded one after the other.

        Raises:
            ValueError: names field, expected, got.
        """
        if labels not in LABELS:
            raise ValueError(f"batches: expected labels among {', '.join(LABELS)}, got {labels!r}")
        if batch_size < 1 or positives_per_document < 1:
            raise ValueError(
                "batches: expected batch_size and positives_per_document of at least 1, got "
                f"{batch_size} and {positives_per_document}"
            )
        if weighting not in WEIGHTINGS:
            raise ValueError(
                f"batches: expected weighting among {', '.join(WEIGHTINGS)}, got {weighting!r}"
            )
        if batch_size % (shards * chunks):
            raise ValueError(
                f"train.batch_size: expected a multiple of {shards} batch shards times {chunks} "
                f"chunks, got {batch_size}"
            )
        self._store = store
        self._positives = store.positives("train")
        self._batch_size = batch_size
        self._per_document = positives_per_document
        self._seed = seed
        self._most_positives = store.shape.most_positives(batch_size // shards)
        self._all_labels = labels == "all"
        self._slots = 1 if self._all_labels else 1 + positives_per_document
        self._frequency = np.append(store.label_frequency, 1).astype(np.float32)
        uniform = weighting == "uniform"
        self._weights = np.ones(store.num_labels) if uniform else store.inverse_propensity
        per_item = store.train.per_item
        self._layout = layout or row_layout.layout(
            NO_PROMPTS, "image_text", "contiguous", store.max_length, per_item, None
        )
        shard, within = np.divmod(np.arange(batch_size), batch_size // shards)
        self._shard, self._chunks = shard, chunks
        self._group = shard * chunks + within % chunks

    def build(
        self,
        order: np.ndarray,
        step_in_epoch: int,
        global_step: int,
        rows: np.ndarray | slice = slice(None),
    ) -> Batch:
        """One process's rows of the batch of a step; a function of the arguments alone.

        Args:
            order: i32[steps * B], see `complete`.
            global_step: steps since the start of training; numbers the random draw.
            rows: i[n], this process's documents among the B, all those of some shards; the slots of
                labels next to them are its own, too.

        Returns:
            A Batch of numpy arrays: n of the B documents and n * positives_per_document slots of
            labels; `relevance` is bool[n, U], over the columns of the whole batch.
        """
        size, per_document = self._batch_size, self._per_document
        batch = order[step_in_epoch * size : (step_in_epoch + 1) * size]
        mine = np.arange(size)[rows]
        document_ids = batch[mine].astype(np.int32)
        if self._all_labels:
            positives, owners = self._positives_of(mine, document_ids)
            return Batch(
                items=self._rows_of(batch, mine, self._contents(batch)),
                document_ids=document_ids,
                positives=positives,
                owners=owners,
                frequency=self._frequency[positives],
            )
        generator = rng.host(self._seed, rng.Stream.SAMPLE, global_step)
        label_ids = sample(self._positives.take(batch), self._weights, per_document, generator)
        contents = self._contents(batch, label_ids)
        placed = np.zeros(len(label_ids), np.int32)
        placed[contents.place] = contents.labels
        return Batch(
            items=self._rows_of(batch, mine, contents),
            document_ids=document_ids,
            label_ids=placed.reshape(size, per_document)[mine].ravel(),
            columns=contents.columns.reshape(size, per_document)[mine].ravel(),
            relevance=relevance(self._positives.take(document_ids), label_ids),
        )

    @functools.cached_property
    def row_counts(self) -> tuple[int, ...]:
        """Numbers of rows of a group that batches may have, ascending; the last fits any batch."""
        groups = self._group.max() + 1
        most = self._layout.most_rows(self._slots * self._batch_size // groups)
        if self._layout.per_row == 1:
            return (most,)
        needed = np.array([self._sampled_rows(number) for number in range(_SAMPLES)])
        usual = max(needed.mean() + 3 * needed.std(), needed.max())
        return tuple(sorted({min(int(np.ceil(x * usual)), most) for x in _LARGER} | {most}))

    def _positives_of(self, mine: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`Batch.positives` and `Batch.owners` of documents i[n], which fill some shards."""
        of_ids, most = self._positives.take(ids), self._most_positives
        shards, shard_of_row = np.unique(self._shard[mine], return_inverse=True)
        row = of_ids.row_ids()
        shard = shard_of_row[row]
        start = np.searchsorted(shard, np.arange(len(shards)))
        place = shard * most + np.arange(len(row)) - start[shard]
        positives = np.full(len(shards) * most, of_ids.columns, np.int32)
        owners = np.zeros(len(shards) * most, np.int32)
        positives[place], owners[place] = of_ids.indices, mine[row]
        return positives, owners

    def _rows_of(self, batch: np.ndarray, mine: np.ndarray, contents: _Contents) -> Rows:
        """The rows of the shards of some documents of a batch, i[n], with their slots [n, ...]."""
        chunks, shards = self._chunks, np.unique(self._shard[mine])
        fitted = row_layout.fit(self._layout, contents.lengths, contents.group)
        chosen = np.flatnonzero(np.isin(contents.group // chunks, shards))
        shard, chunk = np.divmod(contents.group[chosen], chunks)
        fitted_here = fitted.take(chosen, np.searchsorted(shards, shard) * chunks + chunk)
        slot = np.concatenate([np.arange(len(batch)) * self._slots, self._slot_of(contents.place)])
        row, within = np.divmod(slot[chosen], self._slots)
        items = self._store.train.inputs(batch[chosen[chosen < len(batch)]])
        if len(contents.labels):
            labels = contents.labels[chosen[chosen >= len(batch)] - len(batch)]
            both = items, self._store.label.inputs(labels)
            items = jax.tree.map(lambda *sides: np.concatenate(sides), *both)
        return row_layout.compose(
            self._layout,
            items,
            fitted_here,
            next(count for count in self.row_counts if count >= fitted.rows),
            np.searchsorted(mine, row) * self._slots + within,
            (len(mine), self._slots),
            len(shards) * chunks,
            chunks,
        )

    def _contents(self, batch: np.ndarray, label_ids: np.ndarray | None = None) -> _Contents:
        """What a batch of documents, i[B], and labels sampled for them, i32[U] or None, encodes.

        The labels are dealt to the groups so that these have about as many tokens each.
        """
        prompts, group = self._layout.prompts, self._group
        lengths, none = self._store.train.own_tokens(batch, prompts), np.zeros(0, np.int64)
        if label_ids is None:
            return _Contents(lengths, group, none, none, none)
        per_document = self._per_document
        labels, of = np.unique(label_ids, return_inverse=True)
        label_lengths = self._store.label.own_tokens(labels, prompts)
        loads = np.bincount(group, lengths).astype(np.int64)
        dealt = deal(loads, label_lengths, per_document * len(batch) // len(loads))
        # The places of a group are dealt in turn.
        places = np.argsort(np.repeat(group, per_document), kind="stable")
        order = np.argsort(dealt, kind="stable")
        turn = np.arange(len(labels)) - np.searchsorted(dealt[order], dealt[order])
        place = np.empty(len(labels), np.int64)
        place[order] = places.reshape(len(loads), -1)[dealt[order], turn]
        return _Contents(
            lengths=np.concatenate([lengths, label_lengths]),
            group=np.concatenate([group, dealt]),
            labels=labels,
            place=place,
            columns=place[of].astype(np.int32),
        )

    def _slot_of(self, place: np.ndarray) -> np.ndarray:
        """i64[u], the slots of labels by their places among labels."""
        return place // self._per_document * self._slots + 1 + place % self._per_document

    def _sampled_rows(self, number: int) -> int:
        """Rows of each group of a batch of documents in random order."""
        generator = rng.host(self._seed, rng.Stream.LENGTHS, number)
        count, drawn = self._store.num_documents, None
        some = generator.choice(count, min(count, self._batch_size), replace=False)
        batch = np.resize(some, self._batch_size)
        if not self._all_labels:
            positives = self._positives.take(batch)
            drawn = sample(positives, self._weights, self._per_document, generator)
        contents = self._contents(batch, drawn)
        return row_layout.fit(self._layout, contents.lengths, contents.group).rows


def deal(loads: np.ndarray, lengths: np.ndarray, places: int) -> np.ndarray:
    """Items dealt to groups so that these have about as many tokens each.

    Longest first, each to the group that has fewest tokens, of those with a place left.

    Args:
        loads: i[g], tokens that each has already.
        lengths: i[u], tokens of the items.
        places: of each group; g times as many are at least u.

    Returns:
        i64[u], the group of each.
    """
    groups = np.zeros(len(lengths), np.int64)
    if len(loads) == 1:
        return groups
    heap = [(int(load), group) for group, load in enumerate(loads)]
    heapq.heapify(heap)
    left = [places] * len(loads)
    for item in np.argsort(-lengths, kind="stable").tolist():
        load, group = heap[0]
        groups[item] = group
        left[group] -= 1
        if left[group]:
            heapq.heapreplace(heap, (load + int(lengths[item]), group))
        else:
            heapq.heappop(heap)
    return groups


def sample(
    positives: Csr, weights: np.ndarray, per_document: int, generator: np.random.Generator
) -> np.ndarray:
    """Labels drawn for each document among its positives.

    They are drawn without replacement. A document with fewer positives than `per_document` has all
    of them, repeated in turn; one without any has random labels, which are negatives to it.

    Args:
        weights: f64[L]; the first label of a document is drawn with chances proportional to these,
            the next likewise among the rest.

    Returns:
        i32[n * per_document], the labels of document i at `i * per_document`.

    Source: ViXML reference, DatasetD.__getitem__ (one per document, by inverse propensity).
    """
    # A race of exponential clocks: who rings first has a chance proportional to the rate.
    clocks = generator.standard_exponential(len(positives.indices)) / weights[positives.indices]
    ranked = positives.indices[np.lexsort((clocks, positives.row_ids()))]
    counts = positives.counts()[:, None]
    rank = np.arange(per_document)[None, :] % np.maximum(counts, 1)
    drawn = generator.integers(positives.columns, size=(positives.rows, per_document))
    present = np.broadcast_to(counts > 0, drawn.shape)
    drawn[present] = ranked[(positives.indptr[:-1, None] + rank)[present]]
    return drawn.ravel().astype(np.int32)


def relevance(positives: Csr, label_ids: np.ndarray) -> np.ndarray:
    """Which columns are positives of which rows, by the full ground truth.

    Args:
        label_ids: i32[U], columns; a label may occur more than once.

    Returns:
        bool[n, U].
    """
    by_label = np.argsort(label_ids, kind="stable")
    ascending = label_ids[by_label]
    first = np.searchsorted(ascending, positives.indices, side="left")
    count = np.searchsorted(ascending, positives.indices, side="right") - first
    # Entry e of the positives covers `count[e]` columns from `first[e]` on in the sorted order.
    ends = np.cumsum(count)
    columns = np.arange(ends[-1] if len(ends) else 0) + np.repeat(first - (ends - count), count)
    result = np.zeros((positives.rows, len(label_ids)), bool)
    result[np.repeat(positives.row_ids(), count), by_label[columns]] = True
    return result
