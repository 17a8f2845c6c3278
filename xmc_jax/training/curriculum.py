"""The order of the training documents: NGAME's curriculum of growing clusters, and the clustering.

A batch made of near neighbours holds hard negatives. The leaves of a balanced clustering of the
document bank are permuted whole, so that batches are unions of leaves, and the documents of each
leaf are permuted. The plan is a function of the epoch alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from xmc_jax.config import CurriculumConfig
from xmc_jax.runtime import rng, sharding, stopping

ITERATIONS = 20  # of 2-means, at each level, at most
TOLERANCE = 1e-4  # pyxclib's; see `balanced_kmeans`
BLOCK = 1 << 26  # numbers of a device's part of a table that it holds in float32 at a time
CACHED = 1 << 20  # the same of clusters or tiles that a CPU works on: they stay in its caches


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

    Source: ViXML reference, utils.py, train: clustering, like doubling, is done at an epoch's end
    and orders the epochs after it.
    """
    if cfg.start is None:
        return EpochPlan(None, None)

    def size(end_of: int) -> int:
        return cfg.cluster_size * 2 ** sum(e <= end_of for e in cfg.double_at)

    since = epoch - cfg.start
    latest = cfg.start + (since - 1) // cfg.update_every * cfg.update_every
    return EpochPlan(
        cluster_size=size(latest) if since > 0 else None,
        new_cluster_size=size(epoch) if since >= 0 and since % cfg.update_every == 0 else None,
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
        i32[N]: a random permutation; or the leaves in random order, each kept whole, its documents
        in random order.
    """
    generator = rng.host(seed, rng.Stream.ORDER, epoch)
    num_documents = len(leaf_order)
    if epoch_plan.cluster_size is None:
        return generator.permutation(num_documents).astype(np.int32)
    sizes = leaf_sizes(num_documents, num_leaves(num_documents, epoch_plan.cluster_size))
    turn_of_leaf = np.repeat(generator.permutation(len(sizes)), sizes)
    within_leaf = generator.random(num_documents)
    return leaf_order[np.lexsort((within_leaf, turn_of_leaf))].astype(np.int32)


def balanced_kmeans(
    embeddings: jax.Array,
    leaves: int,
    key: jax.Array,
    iterations: int = ITERATIONS,
    tolerance: float | None = TOLERANCE,
    rows: np.ndarray | None = None,
    block: int = BLOCK,
) -> tuple[jax.Array, jax.Array]:
    """Recursive balanced 2-means under cosine: a split halves a cluster, give or take one point.

    All clusters of a level are split in one compiled program, which a clustering of the same points
    into more or fewer leaves shares; they are `[2^level, ceil(n / 2^level)]` slots. A table may be
    split by width over its mesh, as `sharding` has tables: each device then keeps to its columns,
    and inner products alone, a number per point, are summed over devices. Deterministic for a given
    key.

    A split starts from a random point of the cluster and the one least similar to it. Clusters are
    split in groups, and a group is iterated until all its clusters are done; a cluster that is done
    earlier stays as it is, so that groups do not matter. A group fills a block; on a CPU it is one
    cluster, or as many as stay in its caches.

    A device holds, beside its part of the table, about two blocks of rows in float32 and some 20
    numbers per point: no other copy of the table, in any type. 2.25M x 2048 in bfloat16 are 0.58 GB
    and 0.8 GB more on each of 16 chips; 9.2 GB and 0.8 GB more on one GPU.

    Args:
        embeddings: [N, D], float32 or bfloat16; normalised here.
        leaves: a power of two, at most n.
        key: device key, of the KMEANS stream.
        iterations: of 2-means, at each level, at most.
        tolerance: a cluster is done when its points' mean similarity to the center of their half
            gains less, cosine. None: it takes all iterations.
        rows: i32[n] on the host, the rows to cluster, all different; all of them by default.
        block: numbers of a device's part of the table that it holds in float32 at a time.

    Returns:
        order: i32[n], rows leaf by leaf; leaf i holds `leaf_sizes(n, leaves)[i]` of them, in the
            order they were given in.
        leaf_of: i32[N], the leaf of each row; -1 where it is not among `rows`.
        Both are on all devices of the table.

    Raises:
        ValueError: `leaves` is not a power of two, or exceeds n.

    Source: NGAME; pyxclib, b_kmeans_dense.
    """
    embeddings = jnp.asarray(embeddings)
    num_rows = embeddings.shape[0]
    rows = np.arange(num_rows) if rows is None else rows
    num_points = len(rows)
    if leaves < 1 or leaves & (leaves - 1):
        raise ValueError(f"balanced_kmeans: leaves: expected a power of two, got {leaves}")
    if leaves > num_points:
        raise ValueError(
            f"balanced_kmeans: leaves: expected at most one per point, {num_points}, got {leaves}; "
            "ask for fewer, or for larger clusters"
        )
    mesh = sharding.mesh_of(embeddings)
    scale = _scale(embeddings, mesh=mesh)
    # What comes from the host goes into compiled functions as numpy, which makes it the same on all
    # devices of all processes.
    slots = np.asarray(rows, np.int32)[None]
    draws = jax.device_get(jax.random.uniform(key, (leaves,)))
    for clusters in (1 << level for level in range(leaves.bit_length() - 1)):
        stopping.check()
        # Draw i: the seed of node i, the root being 1.
        slots = split(
            embeddings,
            scale,
            slots,
            draws[clusters : 2 * clusters],
            iterations=iterations,
            tolerance=tolerance,
            block=block,
            mesh=mesh,
        ).block_until_ready()
    sizes = leaf_sizes(num_points, leaves)
    leaf = np.repeat(np.arange(leaves, dtype=np.int32), sizes)
    column = np.arange(num_points) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = (leaf * slots.shape[1] + column).astype(np.int32)
    return _flatten(slots, place, leaf, num_rows=num_rows, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("iterations", "tolerance", "block", "mesh"))
def split(
    embeddings: jax.Array,
    scale: jax.Array,
    slots: jax.Array,
    draws: jax.Array,
    *,
    iterations: int,
    tolerance: float | None,
    block: int,
    mesh: Mesh,
) -> jax.Array:
    """Splits each cluster of a level of `balanced_kmeans`.

    A slot holds a row or, only ever the last of a cluster, N for padding: sizes within a level
    differ by at most one. A left half takes the odd point.

    Args:
        embeddings: [N, D], split by width over `mesh`.
        scale: f32[N + 1], 1 / length of each row, then 0.
        slots: i32[c, m].
        draws: f32[c], in [0, 1): which point a cluster starts from.
        iterations: see `balanced_kmeans`.
        tolerance: see `balanced_kmeans`.
        block: see `balanced_kmeans`.
        mesh: what the table is on.

    Returns:
        i32[2 c, ceil(m / 2)].
    """
    table = _by_width(embeddings, mesh)
    at_once = min(block, CACHED) if mesh.devices.flat[0].platform == "cpu" else block
    local = functools.partial(
        _split_local,
        iterations=iterations,
        tolerance=tolerance,
        block=block,
        at_once=at_once,
        axes=table[1] or (),
    )
    whole = PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(table, whole, whole, whole), out_specs=whole)(
        embeddings, scale, slots, draws
    )


def _split_local(
    embeddings,
    scale,
    slots,
    draws,
    *,
    iterations: int,
    tolerance: float | None,
    block: int,
    at_once: int,
    axes,
):
    """`split` on a device that has some columns of the table; `axes` split them."""
    (clusters, width), columns = slots.shape, embeddings.shape[1]
    # Clusters are split in groups; one that is larger than a block is gone through in tiles.
    points = max(at_once // columns, 1)
    tiles = 1 if width <= max(block // columns, 1) else -(-width // points)
    group = min(1 << (max(points // width, 1).bit_length() - 1), clusters)
    slots = jnp.pad(slots, ((0, 0), (0, -width % tiles)), constant_values=embeddings.shape[0])

    def halve(part):
        slots, draws = part
        left = _left(embeddings, scale, slots, draws, tiles, iterations, tolerance, axes)
        return _halves(slots, left, (width + 1) // 2, embeddings.shape[0])

    parts = slots.reshape(-1, group, slots.shape[1]), draws.reshape(-1, group)
    return jax.lax.map(halve, parts).reshape(2 * clusters, -1)


def _left(
    embeddings,
    scale,
    slots,
    draws,
    tiles: int,
    iterations: int,
    tolerance: float | None,
    axes,
):
    """Left halves, bool[g, m], of clusters i32[g, m].

    A tile [g, m / tiles, D] of rows is held at a time.
    """
    clusters = len(slots)
    dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
    real = slots < len(embeddings)
    size = jnp.sum(real, axis=1, dtype=jnp.int32)
    half = (size + 1) // 2
    weight = scale[slots]

    def gather(slots):
        return embeddings.at[slots].get(mode="clip").astype(dtype)

    def tiled(x):  # [g, m] -> [tiles, g, m / tiles]
        return x.reshape(clusters, tiles, -1).swapaxes(0, 1)

    held, rows = tiled(slots), gather
    if tiles == 1:  # gathered once, for all iterations
        held, rows = gather(held), lambda tile: tile

    def along(axis):  # [g, m]: what lies towards the left seed is low
        products = jax.lax.map(
            lambda tile: jnp.einsum("gmd,gd->gm", rows(tile), axis, precision="highest"), held
        )
        products = products.swapaxes(0, 1).reshape(slots.shape)
        return jnp.where(real, jax.lax.psum(products, axes) * weight, jnp.inf)

    def weighted_sum(weight):
        return jax.lax.map(
            lambda tile: jnp.einsum("gm,gmd->gd", tile[0], rows(tile[1]), precision="highest"),
            (tiled(weight), held),
        ).sum(axis=0)

    total = weighted_sum(weight)

    def refine(carry):
        rounds, axis, left, before, moving = carry
        left = jnp.where(moving[:, None], _lowest(along(axis), half), left)
        center = weighted_sum(jnp.where(left, weight, 0))
        sums = jnp.stack([center, total - center])
        length = jnp.sqrt(jax.lax.psum(jnp.sum(sums * sums, axis=2, keepdims=True), axes))
        # A vector of zeros stays one: a document not yet visited has no direction.
        centers = sums / jnp.maximum(length, 1e-12)
        # The cosines of a half's points to its center add up to the length of their sum.
        similarity = jnp.sum(length, axis=(0, 2)) / size
        if tolerance is not None:  # of the same numbers on all devices: their loops end together
            moving &= similarity - before >= tolerance
        return rounds + 1, centers[1] - centers[0], left, similarity, moving

    def unfinished(carry):
        # The last round is there for its cut alone: a cut is compiled once.
        again = carry[0] < iterations + 1
        return again if tolerance is None else again & jnp.any(carry[-1])

    cluster = jnp.arange(clusters)

    def point(column):
        return gather(slots[cluster, column]) * weight[cluster, column][:, None]

    # Departs: pyxclib draws both seeds. Of likes, such as a title that is there twice, two would
    # tell nothing apart; of others, too, leaves are more alike so.
    seed = point(jnp.minimum((draws * size).astype(jnp.int32), size - 1))
    axis = point(jnp.argmin(along(seed), axis=1)) - seed
    none = jnp.zeros(slots.shape, bool)
    start = 0, axis, none, jnp.full(clusters, -2, dtype), jnp.ones(clusters, bool)
    return jax.lax.while_loop(unfinished, refine, start)[2]


def _halves(slots, left, out_width: int, padding: int):
    """i32[2 g, out_width]: each half keeps the order of its points.

    Padding follows those on the right, or is dropped.
    """
    clusters = len(slots)
    lefts = jnp.cumsum(left, axis=1, dtype=jnp.int32)
    column = jnp.arange(slots.shape[1], dtype=jnp.int32)
    target = jnp.where(left, lefts - 1, out_width + column - lefts)
    halves = jnp.full((clusters, 2 * out_width), padding, jnp.int32)
    cluster = jnp.arange(clusters)[:, None]
    halves = halves.at[cluster, target].set(slots, mode="drop", unique_indices=True)
    return halves.reshape(2 * clusters, out_width)


def _lowest(scores: jax.Array, count: jax.Array) -> jax.Array:
    """bool[g, m]: the `count` (i32[g]) lowest scores of each row; of equal ones the first.

    Bit by bit, the bound is found below which there are too few: 32 counts take a tenth of the time
    of a sort.
    """
    bits = 8 * scores.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    keys = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0, scores), unsigned)  # -0 is 0
    sign = unsigned.type(1 << (bits - 1))
    keys = jnp.where(keys & sign, ~keys, keys | sign)  # in the order of the scores

    def largest(bits, dtype, fits):
        def with_bit(i, value):
            candidate = value | jnp.left_shift(dtype.type(1), (bits - 1 - i).astype(dtype))
            return jnp.where(fits(candidate), candidate, value)

        return jax.lax.fori_loop(0, bits, with_bit, jnp.zeros(len(scores), dtype))[:, None]

    def fewer(chosen, than):
        return jnp.sum(chosen, axis=1, dtype=jnp.int32) < than

    bound = largest(bits, unsigned, lambda bound: fewer(keys < bound[:, None], count))
    below, equal = keys < bound, keys == bound
    missing = count - jnp.sum(below, axis=1, dtype=jnp.int32)
    column = jnp.arange(scores.shape[1], dtype=jnp.int32)
    last = largest(
        scores.shape[1].bit_length(),
        jnp.dtype(jnp.int32),
        lambda last: fewer(equal & (column < last[:, None]), missing),
    )
    return below | (equal & (column <= last))


@functools.partial(jax.jit, static_argnames="mesh")
def _scale(embeddings: jax.Array, *, mesh: Mesh) -> jax.Array:
    """f32[N + 1]: 1 / length of each row, then 0."""
    table = _by_width(embeddings, mesh)

    def local(embeddings):
        dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
        square = jnp.sum(jnp.square(embeddings.astype(dtype)), axis=1)
        length = jnp.sqrt(jax.lax.psum(square, table[1] or ()))
        return jnp.append(1 / jnp.maximum(length, 1e-12), 0)

    return jax.shard_map(local, mesh=mesh, in_specs=table, out_specs=PartitionSpec())(embeddings)


@functools.partial(jax.jit, static_argnames=("num_rows", "mesh"))
def _flatten(
    slots: jax.Array, place: jax.Array, leaf: jax.Array, *, num_rows: int, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    order = slots.reshape(-1)[place]
    leaf_of = jnp.full(num_rows, -1, jnp.int32).at[order].set(leaf, unique_indices=True)
    return jax.lax.with_sharding_constraint((order, leaf_of), sharding.replicated(mesh))


def _by_width(table: jax.Array, mesh: Mesh) -> PartitionSpec:
    return sharding.spec((None, "table_width"), table.shape, mesh, "table")
