"""Batches by random access: (order, step) -> Batch. Pure numpy, no state.

Every process samples the label ids of the whole batch, which is cheap, and gathers texts and
relevance for its own rows only; so any number of processes sees the same global batch.
"""

import functools

import numpy as np

from xmc_jax import rng
from xmc_jax.data import packing
from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.types import Batch, Packing

_SAMPLES = 32  # batches that the room of a packed one is estimated from
WEIGHTINGS = ("inverse_propensity", "uniform")
LABELS = ("sampled", "all")


def complete(order: np.ndarray, batch_size: int) -> np.ndarray:
    """An epoch's order, its last batch completed with the epoch's first documents.

    Args:
        order: i32[N], every document once.
        batch_size: B.

    Returns:
        i32[ceil(N / B) * B]; the documents of a batch are all different if N >= B.

    Departs: the reference ends its epoch with a short batch; a completed one keeps shapes static,
    visits every document, and has as many steps.
    """
    return np.resize(order, -(-len(order) // batch_size) * batch_size)


def fitting_batch_size(num_documents: int, batch_size: int, multiple: int) -> int:
    """The documents of a batch: `batch_size`, or all documents where these are fewer.

    Args:
        num_documents: N.
        batch_size: the most that are wanted, divisible by `multiple`.
        multiple: parts that a batch is divided into. All documents are rounded up to a multiple of
            it; `complete` then repeats some.
    """
    return min(batch_size, -(-num_documents // multiple) * multiple)


class Sampler:
    """Builds batches of documents, labels sampled for them, and their relevance."""

    def __init__(
        self,
        store: Store,
        batch_size: int,
        positives_per_document: int = 1,
        weighting: str = "inverse_propensity",
        seed: int = 0,
        labels: str = "sampled",
        groups: packing.Groups | None = None,
    ):
        """
        Args:
            store: the dataset.
            batch_size: B, documents of a global batch.
            positives_per_document: labels sampled per document; U = B * positives_per_document.
            weighting: a positive's chance is proportional to its inverse propensity, or "uniform".
            seed: the run's seed.
            labels: "sampled", those of the batch; or "all", where nothing is sampled and a batch
                has the positives of its documents instead.
            groups: how batches are packed; None for texts with their padding.

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
        self._store = store
        self._positives = store.positives("train")
        self._batch_size = batch_size
        self._per_document = positives_per_document
        self._seed = seed
        self._most_positives = int(self._positives.counts().max(initial=1))
        self._all_labels = labels == "all"
        self._frequency = np.append(store.label_frequency, 1).astype(np.float32)
        uniform = weighting == "uniform"
        self._weights = np.ones(store.num_labels) if uniform else store.inverse_propensity
        self._groups = groups

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
            step_in_epoch: which B documents of `order`.
            global_step: steps since the start of training; numbers the random draw.
            rows: i[n], this process's documents among the B; the labels sampled for them are its
                own, too.

        Returns:
            A Batch of numpy arrays: n of the B documents and the n * positives_per_document labels
            sampled for them; `relevance` is bool[n, U], over the columns of the whole batch.
        """
        size, per_document = self._batch_size, self._per_document
        batch = order[step_in_epoch * size : (step_in_epoch + 1) * size]
        if self._all_labels:
            document_ids = batch[rows].astype(np.int32)
            positives = padded(self._positives.take(document_ids), self._most_positives)
            room = None
            if self._groups is not None:
                tokens = self._store.train.own_tokens(batch, self._groups.prompts)
                room = packing.choose(self._rooms, self._by_group(tokens))
            return Batch(
                document=self._store.train.inputs(document_ids),
                document_ids=document_ids,
                positives=positives,
                frequency=self._frequency[positives],
                packing=room,
            )
        generator = rng.host(self._seed, rng.Stream.SAMPLE, global_step)
        label_ids = sample(self._positives.take(batch), self._weights, per_document, generator)
        document_ids = batch[rows].astype(np.int32)
        relevant = relevance(self._positives.take(document_ids), label_ids)
        if self._groups is None:
            local_labels = label_ids.reshape(size, per_document)[rows].ravel()
            return Batch(
                document=self._store.train.inputs(document_ids),
                label=self._store.label.inputs(local_labels),
                document_ids=document_ids,
                label_ids=local_labels,
                relevance=relevant,
            )
        at, columns, lengths = self._deal(batch, label_ids)
        at = at.reshape(size, per_document)[rows].ravel()
        local_labels = np.maximum(at, 0).astype(np.int32)
        label = self._store.label.inputs(local_labels)
        return Batch(
            document=self._store.train.inputs(document_ids),
            label=label.replace(lengths=np.where(at < 0, -1, label.lengths).astype(np.int32)),
            document_ids=document_ids,
            label_ids=local_labels,
            relevance=relevant,
            columns=columns.reshape(size, per_document)[rows].ravel(),
            packing=packing.choose(self._rooms, lengths),
        )

    @functools.cached_property
    def _group(self) -> np.ndarray:
        """i64[B], the group of each row of a batch; a ValueError where they differ in size."""
        return self._groups.of(self._batch_size)

    @functools.cached_property
    def _rooms(self) -> tuple[Packing, ...]:
        samples = [self._sampled_lengths(number) for number in range(_SAMPLES)]
        return packing.rooms(samples, self._groups.width)

    def _deal(self, batch: np.ndarray, label_ids: np.ndarray) -> tuple[np.ndarray, ...]:
        """The different ones among the sampled labels, dealt to the groups of a batch.

        Args:
            batch: i[B], the documents.
            label_ids: i32[U], sampled for them.

        Returns:
            at: i64[U], labels where they are encoded, place `i * positives_per_document + p` in the
                group of row i; -1 where there is none.
            columns: i32[U], the place of each of `label_ids`.
            lengths: i64[g, m], tokens of the documents and labels of each group.
        """
        per_document, prompts = self._per_document, self._groups.prompts
        documents = self._by_group(self._store.train.own_tokens(batch, prompts))
        labels, of = np.unique(label_ids, return_inverse=True)
        lengths = self._store.label.own_tokens(labels, prompts)
        groups = packing.deal(documents.sum(axis=1), lengths, documents.shape[1] * per_document)
        # The places of a group are dealt in turn.
        places = np.argsort(np.repeat(self._group, per_document), kind="stable")
        order = np.argsort(groups, kind="stable")
        turn = np.arange(len(labels)) - np.searchsorted(groups[order], groups[order])
        place = np.empty(len(labels), np.int64)
        place[order] = places.reshape(len(documents), -1)[groups[order], turn]
        at, tokens = np.full(len(label_ids), -1), np.zeros(len(label_ids), np.int64)
        at[place], tokens[place] = labels, lengths
        by_row = self._by_group(tokens.reshape(-1, per_document)).reshape(len(documents), -1)
        return at, place[of].astype(np.int32), np.concatenate([documents, by_row], axis=1)

    def _by_group(self, rows: np.ndarray) -> np.ndarray:
        """[B, ...] -> [g, B / g, ...]."""
        groups = self._groups.shards * self._groups.chunks
        by_group = rows[np.argsort(self._group, kind="stable")]
        return by_group.reshape(groups, -1, *rows.shape[1:])

    def _sampled_lengths(self, number: int) -> np.ndarray:
        """i64[g, m], tokens of each group of a batch of documents in random order."""
        generator = rng.host(self._seed, rng.Stream.ROOM, number)
        count = self._store.num_documents
        some = generator.choice(count, min(count, self._batch_size), replace=False)
        batch = np.resize(some, self._batch_size)
        if self._all_labels:
            return self._by_group(self._store.train.own_tokens(batch, self._groups.prompts))
        positives = self._positives.take(batch)
        drawn = sample(positives, self._weights, self._per_document, generator)
        return self._deal(batch, drawn)[2]


def sample(
    positives: Csr, weights: np.ndarray, per_document: int, generator: np.random.Generator
) -> np.ndarray:
    """Labels drawn for each document among its positives.

    They are drawn without replacement. A document with fewer positives than `per_document` has all
    of them, repeated in turn; one without any has random labels, which are negatives to it.

    Args:
        positives: labels of the n documents.
        weights: f64[L]; the first label of a document is drawn with chances proportional to these,
            the next likewise among the rest.
        per_document: labels per document.
        generator: where the randomness comes from.

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


def padded(positives: Csr, width: int) -> np.ndarray:
    """The labels of each row side by side.

    Args:
        positives: labels of the n documents.
        width: P, at least the labels of any row.

    Returns:
        i32[n, P], padded with L.
    """
    result = np.full((positives.rows, width), positives.columns, np.int32)
    result[np.arange(width) < positives.counts()[:, None]] = positives.indices
    return result


def relevance(positives: Csr, label_ids: np.ndarray) -> np.ndarray:
    """Which columns are positives of which rows, by the full ground truth.

    Args:
        positives: labels of the n documents.
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
