"""Which documents are held out: whole sources, in a random order."""

import math

import numpy as np

from xmc_jax.data.csr import Csr


def choose(source_of: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whole sources in a random order, until they have a share of the documents.

    Args:
        source_of: i[n], the source of each document, numbered from 0.
        fraction: that share, at least.

    Returns:
        bool[n], whether a document is of these sources.
    """
    sources, sizes = _drawn(source_of, seed)
    count = np.searchsorted(np.cumsum(sizes), fraction * len(source_of)) + 1
    return np.isin(source_of, sources[:count])


def choose_within(source_of: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Whole sources in a random order, those left out that would make it more than a share.

    Args:
        source_of: i[n], the source of each document, numbered from 0.
        fraction: that share, at most, but for rounding it up; more if even the smallest source is.

    Returns:
        bool[n], whether a document is of these sources.
    """
    sources, sizes = _drawn(source_of, seed)
    left = math.ceil(fraction * len(source_of))
    taken = []
    for source, size in zip(sources.tolist(), sizes.tolist()):
        if size <= left:
            taken.append(source)
            left -= size
            if not left:
                break
    return np.isin(source_of, taken or sources[np.argmin(sizes)])


def _drawn(source_of: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sources in a random order, and how many documents each has."""
    # One draw outside of training: no stream of rng is for it.
    sources = np.random.default_rng(seed).permutation(np.unique(source_of))
    return sources, np.bincount(source_of)[sources]


def without(positives: Csr, pairs: np.ndarray) -> Csr:
    """A matrix without some of its entries.

    Args:
        pairs: i[p, 2], (row, column), in it or not.
    """
    rows = positives.row_ids()
    listed = pairs[:, 0].astype(np.int64) * positives.columns + pairs[:, 1]
    kept = ~np.isin(rows * positives.columns + positives.indices, listed)
    counts = np.bincount(rows[kept], minlength=positives.rows)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    return Csr(indptr, positives.indices[kept], None, positives.columns)
