"""Prototypes for labels that came after training: of their text, and of the labels nearest to it.

A trained label's prototype is made of its text, its free vector and its centroid. A new label has
its text alone. What it lacks it can borrow from the trained labels whose texts are nearest:

    neighbours = nearest(new, trained, config)
    free, centroids = borrowed(neighbours, free_vectors, row_of), borrowed(neighbours, centroids)
    index = prototypes(new, free, centroids, neighbours, combine, config)

Everything is arrays; what they take is O((n + L) D), never n times L.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jax.sharding import Mesh

from xmc_jax.config import NewLabelsConfig
from xmc_jax.retrieval import exact

Combine = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(pooled text embeddings, free vectors, centroids), each f32[m, D] -> unit prototypes [m, D]."""

_BLOCK = 1_024  # new labels whose neighbours' vectors are gathered at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
    """Which trained labels n new ones borrow from.

    Attributes:
        ids: i32[n, k], nearest first, ties to the lower label.
        weights: f32[n, k]; they add up to 1, or are all 0 where a label's text stands alone.
    """

    ids: np.ndarray
    weights: np.ndarray

    @property
    def has_neighbour(self) -> np.ndarray:
        """bool[n], whether a label has a neighbour."""
        return self.weights.any(axis=1)


def nearest(
    new: np.ndarray,
    trained: np.ndarray | exact.Database,
    config: NewLabelsConfig,
    mesh: Mesh | None = None,
) -> Neighbours:
    """The trained labels whose texts are nearest to those of new labels, and their weights.

    Args:
        new: f32[n, D], text embeddings of the new labels, of any length.
        trained: [L, D], unit text embeddings (not prototypes) of the trained labels, by the same
            encoder; on the host, perhaps memory-mapped, or on the devices.
        config: see `NewLabelsConfig`; with how="text" nothing is searched, and k is 0.
        mesh: see `exact.search`.

    Raises:
        ValueError: widths differ, or an embedding is not finite, or one on the host not unit.

    Source: ViXML reference code, which leaves it unfinished with one neighbour and a threshold.
    """
    if config.how == "text" or not len(new):
        empty = np.empty((len(new), 0), np.float32)
        return Neighbours(empty.astype(np.int32), empty)
    if not isinstance(trained, exact.Database):
        _check_unit(trained)
    k = min(config.neighbours, len(trained))
    cosines, ids = exact.search(unit(new), trained, k, mesh=mesh)
    logits = np.where(cosines >= config.threshold, cosines.astype(np.float64), -np.inf)
    top = np.where(np.isfinite(logits[:, :1]), logits[:, :1], 0)
    weights = np.exp((logits - top) / config.temperature)
    weights /= np.maximum(weights.sum(axis=1, keepdims=True), 1)  # the nearest alone adds 1
    return Neighbours(ids, weights.astype(np.float32))


def borrowed(
    neighbours: Neighbours, table: np.ndarray, row_of: np.ndarray | None = None
) -> np.ndarray:
    """f32[n, D], the weighted mean of the neighbours' vectors; 0 for a label without a neighbour.

    Args:
        neighbours: see `nearest`.
        table: [L, D] such as centroids, or [C, D] such as free vectors; of any float type, perhaps
            memory-mapped.
        row_of: i32[L], which row of the table a trained label has; by default its own.
    """
    ids = neighbours.ids if row_of is None else np.asarray(row_of)[neighbours.ids]
    mean = np.zeros((len(ids), table.shape[1]), np.float32)
    for start in range(0, len(ids), _BLOCK):
        part = slice(start, start + _BLOCK)
        vectors = np.asarray(table[ids[part]], np.float32)
        mean[part] = np.einsum("nk,nkd->nd", neighbours.weights[part], vectors)
    return mean


def prototypes(
    new: np.ndarray,
    free: np.ndarray,
    centroids: np.ndarray,
    neighbours: Neighbours,
    combine: Combine,
    config: NewLabelsConfig,
) -> np.ndarray:
    """f32[n, D], what the index holds for new labels: vectors of length `config.scale`.

    A label without a neighbour has its normalised text embedding, which is what a sum of text and
    nothing is, and what PRIME's own loss term on label texts trains.

    Args:
        new: f32[n, D], text embeddings before normalisation.
        free: f32[n, D], see `borrowed`.
        centroids: f32[n, D], see `borrowed`.
        neighbours: see `nearest`.
        combine: the model's combiner; it is given all labels that have neighbours, in blocks.
        config: see `NewLabelsConfig`.
    """
    rows, borrowing = unit(new), np.flatnonzero(neighbours.has_neighbour)
    for start in range(0, len(borrowing), _BLOCK):
        part = borrowing[start : start + _BLOCK]
        rows[part] = np.asarray(combine(new[part], free[part], centroids[part]), np.float32)
    return np.float32(config.scale) * rows


def _check_unit(trained: np.ndarray) -> None:
    for start in range(0, len(trained), _BLOCK):
        lengths = np.linalg.norm(np.asarray(trained[start : start + _BLOCK], np.float32), axis=1)
        wrong = np.flatnonzero(np.abs(lengths - 1) > 0.01)  # bfloat16 is that coarse
        if len(wrong):
            raise ValueError(
                f"new_labels: expected unit text embeddings of the trained labels, got row "
                f"{start + wrong[0]} of length {lengths[wrong[0]]:.4g}; normalise them"
            )


def unit(x: np.ndarray) -> np.ndarray:
    """f32[n, D], the rows of [n, D] at length 1."""
    x = np.asarray(x, np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
