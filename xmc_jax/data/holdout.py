"""A validation split made as the test split was: some sources' training documents, held out."""

import dataclasses

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.data.raw_folder import RawDataset


def choose(source_of: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whole sources in a random order, until they have a share of the documents.

    Args:
        source_of: i[n], the source of each document, numbered from 0.
        fraction: that share, at least.
        seed: of the order.

    Returns:
        bool[n], whether a document is of these sources.
    """
    # One draw outside of training: no stream of rng is for it.
    sources = np.random.default_rng(seed).permutation(np.unique(source_of))
    sizes = np.cumsum(np.bincount(source_of)[sources])
    return np.isin(source_of, sources[: np.searchsorted(sizes, fraction * len(source_of)) + 1])


def hold_out(dataset: RawDataset, fraction: float, seed: int) -> RawDataset:
    """Splits the training documents into train and test; documents of one source stay together.

    Labels keep their ids. The training filter's pairs of held-out documents, renumbered, become the
    filter, and are taken out of those documents' positives, as the test split's makers did: such
    predictions are removed before they are counted, so they could never be right.

    Args:
        dataset: training documents, their filter, labels. Without sources each document is its own.
        fraction: share of the documents to hold out, at least; whole sources in a random order.
        seed: of that order.

    Raises:
        ValueError: nothing would be left to train on.
    """
    train = dataset.splits["train"]
    count = len(train.titles)
    source_of = dataset.groups.get("train", np.arange(count))
    held = choose(source_of, fraction, seed)
    if held.all():
        raise ValueError(
            f"validation_fraction: expected to leave documents to train on, got {fraction} of "
            f"{count} documents from {len(np.unique(source_of))} sources"
        )
    ids = {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}
    pairs = dataset.filter[held[dataset.filter[:, 0]]]
    pairs[:, 0] = np.searchsorted(ids["test"], pairs[:, 0])
    splits = {
        split: dataclasses.replace(
            train,
            uids=[train.uids[i] for i in rows],
            titles=[train.titles[i] for i in rows],
            contents=[train.contents[i] for i in rows],
            positives=train.positives.take(rows),
        )
        for split, rows in ids.items()
    }
    positives = _without(splits["test"].positives, pairs)
    splits["test"] = dataclasses.replace(splits["test"], positives=positives)
    return RawDataset(
        splits=splits | {"label": dataset.splits["label"]},
        groups={split: dataset.groups["train"][rows] for split, rows in ids.items()}
        if dataset.groups
        else {},
        filter=pairs,
        raw_rows={split: rows.astype(np.int32) for split, rows in ids.items()},
        merged={"train": dataset.merged["train"], "test": 0},
    )


def _without(positives: Csr, pairs: np.ndarray) -> Csr:
    rows = positives.row_ids()
    listed = pairs[:, 0].astype(np.int64) * positives.columns + pairs[:, 1]
    kept = ~np.isin(rows * positives.columns + positives.indices, listed)
    counts = np.bincount(rows[kept], minlength=positives.rows)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return Csr(indptr, positives.indices[kept], None, positives.columns)
