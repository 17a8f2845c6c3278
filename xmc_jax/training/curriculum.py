"""The order of the training documents: NGAME's curriculum of growing clusters, and the clustering.

A batch made of near neighbours holds hard negatives. Leaves of a balanced clustering of the
document bank are permuted whole, so that batches are unions of leaves; the plan is a function of
the epoch alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from xmc_jax import rng


@dataclasses.dataclass(frozen=True)
class CurriculumConfig:
    """When documents are clustered, and how finely.

    Attributes:
        start: the first epoch whose end clusters the documents; earlier orders are random. None:
            all are.
        update: epochs from one clustering to the next.
        cluster_size: documents per leaf at first, before rounding leaves up to a power of two.
        double_at: epochs at whose end `cluster_size` doubles, before that end's clustering.
    """

    start: int | None = 10
    update: int = 5
    cluster_size: int = 16
    double_at: tuple[int, ...] = ()

    def __post_init__(self):
        if self.start is not None and self.start < 0:
            raise ValueError(
                f"curriculum.start: expected an epoch from 0 on, or None, got {self.start}"
            )
        if self.update < 1:
            raise ValueError(f"curriculum.update: expected at least 1 epoch, got {self.update}")
        if self.cluster_size < 2:
            raise ValueError(
                f"curriculum.cluster_size: expected at least 2 documents, got {self.cluster_size}"
            )
        if list(self.double_at) != sorted(set(self.double_at)):
            raise ValueError(
                f"curriculum.double_at: expected increasing epochs, got {self.double_at}"
            )


@dataclasses.dataclass(frozen=True)
class EpochPlan:
    """What the curriculum does in one epoch.

    Attributes:
        cluster_size: of the leaves that order this epoch, for `num_leaves`; None for a random
            order.
        new_cluster_size: of the leaves made at the boundary that ends this epoch; None keeps the
            old.
    """

    cluster_size: int | None
    new_cluster_size: int | None


def plan(epoch: int, cfg: CurriculumConfig) -> EpochPlan:
    """The plan of an epoch, a function of its number.

    Args:
        epoch: from 0.
        cfg: see `CurriculumConfig`.

    Source: ViXML reference, utils.py, train: clustering, like doubling, is done at an epoch's end,
        and
    orders the epochs after it.
    """
    if cfg.start is None:
        return EpochPlan(None, None)

    def size(end_of: int) -> int:
        return cfg.cluster_size * 2 ** sum(e <= end_of for e in cfg.double_at)

    since = epoch - cfg.start
    latest = cfg.start + (since - 1) // cfg.update * cfg.update
    return EpochPlan(
        cluster_size=size(latest) if since > 0 else None,
        new_cluster_size=size(epoch) if since >= 0 and since % cfg.update == 0 else None,
    )


def num_leaves(num_documents: int, cluster_size: int) -> int:
    """The power of two 2^ceil(log2(num_documents / cluster_size)), at least 1.

    Leaves hold between half of `cluster_size` and all of it.
    """
    leaves = 1
    while leaves * cluster_size < num_documents:
        leaves *= 2
    return leaves


def leaf_sizes(num_points: int, leaves: int) -> np.ndarray:
    """Points in each leaf of `balanced_kmeans`, i64[leaves]; they differ by at most one.

    Args:
        num_points: n.
        leaves: a power of two.
    """
    sizes = np.array([num_points])
    while len(sizes) < leaves:
        sizes = np.stack([(sizes + 1) // 2, sizes // 2], axis=1).ravel()
    return sizes


def order(epoch_plan: EpochPlan, leaf_order: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits the documents.

    Args:
        epoch_plan: of this epoch.
        leaf_order: i32[N] on the host, documents leaf by leaf, as of the last clustering.
        seed: the run's seed.
        epoch: from 0.

    Returns:
        i32[N]: a random permutation, or the leaves in random order, each kept whole.
    """
    generator = rng.host(seed, rng.Stream.ORDER, epoch)
    num_documents = len(leaf_order)
    if epoch_plan.cluster_size is None:
        return generator.permutation(num_documents).astype(np.int32)
    sizes = leaf_sizes(num_documents, num_leaves(num_documents, epoch_plan.cluster_size))
    leaves = generator.permutation(len(sizes))
    ends = np.cumsum(sizes[leaves])
    # Position i of the order lies in leaf l; its document stands `shift[l]` further in leaf_order.
    shift = (np.cumsum(sizes) - sizes)[leaves] - (ends - sizes[leaves])
    return leaf_order[np.arange(num_documents) + np.repeat(shift, sizes[leaves])].astype(np.int32)


def balanced_kmeans(
    embeddings: jax.Array, leaves: int, key: jax.Array, iterations: int = 10
) -> tuple[jax.Array, jax.Array]:
    """Recursive balanced 2-means under cosine: a split halves a cluster, give or take one point.

    All clusters of a level are split at once, in `[2^level, ceil(n / 2^level)]` slots. A level is
    one compiled program, which a clustering of the same points into more or fewer leaves shares.
    Deterministic for a given key.

    Args:
        embeddings: f32[n, D]; normalised here.
        leaves: a power of two, at most n.
        key: device key, of the KMEANS stream.
        iterations: of 2-means, at each level.

    Returns:
        order: i32[n], points leaf by leaf; leaf i holds `leaf_sizes(n, leaves)[i]` of them.
        leaf_of: i32[n], the leaf of each point.

    Raises:
        ValueError: `leaves` is not a power of two, or exceeds n.

    Source: NGAME; pyxclib, b_kmeans_dense.
    """
    # Departs: pyxclib iterates until a cluster's mean similarity gains less than 1e-4; here every
    # cluster takes the same number of iterations, for static shapes.
    num_points = embeddings.shape[0]
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"balanced_kmeans: leaves: expected a power of two, got {leaves}")
    if leaves > num_points:
        raise ValueError(
            f"balanced_kmeans: leaves: expected at most one per point, {num_points}, got {leaves}; "
            "ask for fewer, or for larger clusters"
        )
    slots = jnp.arange(num_points, dtype=jnp.int32)[None]
    draws = jax.random.uniform(key, (2, leaves))  # column i: seeds of node i, the root being 1
    for clusters in (1 << level for level in range(leaves.bit_length() - 1)):
        slots = _split(embeddings, slots, draws[:, clusters : 2 * clusters], iterations)
    return _flatten(slots, num_points)


@functools.partial(jax.jit, static_argnames="iterations")
def _split(embeddings: jax.Array, slots: jax.Array, draws: jax.Array, iterations: int) -> jax.Array:
    """Splits each cluster: i32[c, m] slots to i32[2 c, ceil(m / 2)]; `draws` f32[2, c], in [0, 1).

    A slot holds a point or, only ever the last of a cluster, n for padding: sizes within a level
    differ by at most one. A left half takes the odd point.
    """
    num_points = embeddings.shape[0]
    clusters, width = slots.shape
    real = slots < num_points
    size = jnp.sum(real, axis=1, dtype=jnp.int32)
    half = (size + 1) // 2

    points = embeddings[jnp.minimum(slots, num_points - 1)]
    points = points.astype(jnp.promote_types(points.dtype, jnp.float32))
    points = _normalize(points) * real[..., None]
    total = jnp.sum(points, axis=1)

    def sort_along(axis):  # slots from the left seed to the right one, padding last
        along = jnp.einsum("cmd,cd->cm", points, axis, precision="highest")
        return jnp.argsort(jnp.where(real, along, jnp.inf), axis=1)

    def refine(_, axis):
        left = jnp.argsort(sort_along(axis), axis=1) < half[:, None]
        left = jnp.einsum("cm,cmd->cd", left.astype(points.dtype), points, precision="highest")
        return _normalize(total - left) - _normalize(left)

    # Two different points of the cluster as seeds.
    first = jnp.minimum((draws[0] * size).astype(jnp.int32), size - 1)
    step = 1 + jnp.minimum((draws[1] * (size - 1)).astype(jnp.int32), size - 2)
    second = (first + step) % size
    rows = jnp.arange(clusters)
    axis = jax.lax.fori_loop(0, iterations, refine, points[rows, second] - points[rows, first])

    column = jnp.arange((width + 1) // 2)
    left = jnp.where(column < half[:, None], column, width)
    right = half[:, None] + column
    right = jnp.where(right < size[:, None], right, width)
    slots = jnp.take_along_axis(slots, sort_along(axis), axis=1)
    slots = jnp.pad(slots, ((0, 0), (0, 1)), constant_values=num_points)
    halves = jnp.stack([left, right], axis=1).reshape(clusters, -1)
    return jnp.take_along_axis(slots, halves, axis=1).reshape(2 * clusters, -1)


@functools.partial(jax.jit, static_argnames="num_points")
def _flatten(slots: jax.Array, num_points: int) -> tuple[jax.Array, jax.Array]:
    leaves, width = slots.shape
    sizes = leaf_sizes(num_points, leaves)
    leaf = np.repeat(np.arange(leaves, dtype=np.int32), sizes)
    column = np.arange(num_points) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    points = slots.reshape(-1)[leaf * width + column]
    return points, jnp.zeros(num_points, jnp.int32).at[points].set(leaf, unique_indices=True)


def _normalize(x: jax.Array) -> jax.Array:
    # A vector of zeros stays one: a document not yet visited has no direction.
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
