"""The plan, the order, and balanced 2-means against a direct recursion."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import CurriculumConfig, MeshConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import curriculum


@pytest.mark.parametrize(
    "cfg",
    [
        CurriculumConfig(10, 5, 16, (20, 40, 60, 80, 100, 120)),
        CurriculumConfig(4, 2, 16, (8, 12, 16, 20, 24)),
        CurriculumConfig(2, 2, 16, (4, 6, 8)),
        CurriculumConfig(3, 4, 8, (0, 5, 6)),
        CurriculumConfig(0, 1, 4),
    ],
)
def test_plan_is_what_a_run_of_the_loop_would_do(cfg):
    size, in_force = cfg.cluster_size, None
    for epoch in range(150):
        made = None
        if epoch in cfg.double_at:  # at the epoch's end
            size *= 2
        if epoch >= cfg.start and (epoch - cfg.start) % cfg.update_every == 0:
            made = size
        assert curriculum.plan(epoch, cfg) == curriculum.EpochPlan(in_force, made)
        in_force = made or in_force


def test_plan_without_a_start_is_always_random():
    cfg = CurriculumConfig(start=None)
    assert {curriculum.plan(e, cfg) for e in range(50)} == {curriculum.EpochPlan(None, None)}


def test_leaves_are_those_of_the_reference():
    assert curriculum.num_leaves(294_805, 16) == 32_768
    assert curriculum.num_leaves(10, 100) == 1
    for n in range(1, 400):
        for size in (2, 3, 16):
            leaves = max(1, 2 ** int(np.ceil(np.log2(n / size))))
            assert curriculum.num_leaves(n, size) == leaves
            sizes = curriculum.leaf_sizes(n, leaves)
            assert len(sizes) == leaves and sizes.sum() == n and np.ptp(sizes) <= 1


@pytest.mark.parametrize("size", [16, 2000])  # of a leaf; there is one with all documents
def test_order_permutes_leaves_and_the_documents_within_each(size):
    leaf_order = np.random.default_rng(0).permutation(1003).astype(np.int32)
    plan = curriculum.EpochPlan(size, None)
    order = curriculum.order(plan, leaf_order, seed=1, epoch=7)
    assert order.dtype == np.int32 and sorted(order) == list(range(1003))
    sizes = curriculum.leaf_sizes(1003, curriculum.num_leaves(1003, size))
    leaves = {frozenset(leaf): leaf for leaf in np.split(leaf_order, np.cumsum(sizes)[:-1])}
    start, kept = 0, 0
    while start < len(order):
        members = next(leaf for leaf in leaves if order[start] in leaf)
        found = order[start : start + len(members)]
        assert members == frozenset(found)
        kept += np.array_equal(found, leaves.pop(members))
        start += len(members)
    assert not leaves and not kept
    assert np.array_equal(order, curriculum.order(plan, leaf_order, seed=1, epoch=7))
    assert not np.array_equal(order, curriculum.order(plan, leaf_order, seed=1, epoch=8))
    assert not np.array_equal(order, curriculum.order(plan, leaf_order, seed=2, epoch=7))


def test_random_order_is_a_permutation_that_forgets_the_leaves():
    plan = curriculum.EpochPlan(None, 16)
    one = curriculum.order(plan, np.arange(100, dtype=np.int32), seed=0, epoch=3)
    two = curriculum.order(plan, np.arange(100, dtype=np.int32)[::-1], seed=0, epoch=3)
    assert one.dtype == np.int32 and sorted(one) == list(range(100))
    assert np.array_equal(one, two) and not np.array_equal(one, np.arange(100))


def points(n, d=6, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(dtype)


def check_tree(order, leaf_of, n, leaves):
    order, leaf_of = np.asarray(order), np.asarray(leaf_of)
    assert order.dtype == leaf_of.dtype == np.int32
    assert sorted(order) == list(range(n))
    sizes = curriculum.leaf_sizes(n, leaves)
    assert np.array_equal(np.bincount(leaf_of, minlength=leaves), sizes)
    assert np.array_equal(leaf_of[order], np.repeat(np.arange(leaves), sizes))


@pytest.mark.parametrize(
    ("n", "leaves"),
    [
        *((1, 1), (5, 1), (2, 2), (11, 8)),
        *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((3, 2), (7, 4), (8, 8))),
    ],
)
def test_leaves_hold_every_point_once_and_differ_by_one(n, leaves):
    check_tree(*curriculum.balanced_kmeans(points(n), leaves, jax.random.key(n)), n, leaves)


@pytest.mark.parametrize(
    "x", [np.ones((11, 6)), np.zeros((11, 6)), np.repeat(points(4), 3, 0)[:11]]
)
def test_duplicates_and_zeros_still_halve(x):
    result = curriculum.balanced_kmeans(jnp.asarray(x, jnp.float32), 8, jax.random.key(0))
    check_tree(*result, 11, 8)


def test_likes_stay_together_whichever_of_them_a_cluster_starts_from():
    x = jnp.asarray(points(2)[[0, 1, 0, 1]])
    found = {
        tuple(curriculum.balanced_kmeans(x, 2, jax.random.key(seed))[0].tolist())
        for seed in range(8)
    }
    assert found == {(0, 2, 1, 3), (1, 3, 0, 2)}


def numpy_kmeans(x, leaves, key, iterations, tolerance):
    """The definition, cluster by cluster, from the points that the key draws."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    clusters = [np.arange(len(x))]
    draws = np.asarray(jax.random.uniform(key, (leaves,)))
    while len(clusters) < leaves:
        halves = []
        for node, members in enumerate(clusters, start=len(clusters)):
            size, y = len(members), x[members]
            seed = y[int(draws[node] * size)]
            centers, before = np.stack([seed, y[np.argmin(y @ seed)]]), -np.inf
            for _ in range(iterations + 1):
                split = np.array_split(np.argsort(y @ (centers[1] - centers[0]), kind="stable"), 2)
                centers = np.stack([y[half].mean(0) for half in split])
                centers /= np.linalg.norm(centers, axis=1, keepdims=True)
                cosines = [y[half] @ center for half, center in zip(split, centers)]
                similarity = np.concatenate(cosines).mean()
                if tolerance is not None and similarity - before < tolerance:
                    break
                before = similarity
            halves += [np.sort(members[half]) for half in split]
        clusters = halves
    return np.concatenate(clusters)


@pytest.mark.parametrize(
    ("iterations", "tolerance"),
    [
        (6, None),
        *(pytest.param(*limits, marks=pytest.mark.slow) for limits in ((0, None), (3, 0.01))),
    ],
)
def test_it_is_balanced_2_means(iterations, tolerance):
    with jax.enable_x64(True):
        x, key = points(203, dtype=np.float64), jax.random.key(3)
        order, _ = curriculum.balanced_kmeans(jnp.asarray(x), 8, key, iterations, tolerance)
        assert np.array_equal(order, numpy_kmeans(x, 8, key, iterations, tolerance))


@pytest.mark.parametrize("block", [203 * 6, 30 * 6])  # clusters together; one by one, or in tiles
def test_each_cluster_stops_where_it_gains_too_little(block):
    with jax.enable_x64(True):
        x, key = points(203, dtype=np.float64), jax.random.key(3)
        order, _ = curriculum.balanced_kmeans(jnp.asarray(x), 8, key, 20, 0.01, block=block)
        assert np.array_equal(order, numpy_kmeans(x, 8, key, 20, 0.01))
        assert not np.array_equal(order, numpy_kmeans(x, 8, key, 20, None))


@pytest.mark.slow
def test_well_separated_blobs_are_found():
    rng = np.random.default_rng(5)
    blobs, size, dim = 8, 16, 16
    centers = np.linalg.qr(rng.normal(size=(dim, dim)))[0][:blobs]
    blob_of = rng.permutation(np.repeat(np.arange(blobs), size))
    x = centers[blob_of] + 0.05 * rng.normal(size=(blobs * size, dim))
    lengths = rng.uniform(0.1, 10, (len(x), 1))  # cosine: lengths do not matter
    _, leaf_of = curriculum.balanced_kmeans(
        jnp.asarray(x * lengths, jnp.float32), blobs, jax.random.key(0)
    )
    pairs = {(int(leaf), int(blob)) for leaf, blob in zip(leaf_of, blob_of)}
    assert len(pairs) == blobs


def test_same_key_same_leaves_and_fewer_leaves_compile_nothing():
    x, key = jnp.asarray(points(128, d=16)), jax.random.key(0)
    first = curriculum.balanced_kmeans(x, 16, key)
    compiled = curriculum.split._cache_size()
    again = curriculum.balanced_kmeans(x, 16, key)
    for one, two in zip(first, again):
        assert np.array_equal(one, two)
    curriculum.balanced_kmeans(x, 8, jax.random.key(1))
    assert curriculum.split._cache_size() == compiled
    other, _ = curriculum.balanced_kmeans(x, 16, jax.random.key(1))
    assert not np.array_equal(first[0], other)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_lowest_are_those_of_a_stable_sort(dtype):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        scores = rng.integers(-2, 3, (40, 13)).astype(dtype) * rng.choice([1, 1e-30, 1e30], (40, 1))
        scores = np.where(scores == 0, rng.choice([0.0, -0.0], scores.shape), scores).astype(dtype)
        scores[:, 10:] = np.inf  # padding
        count = rng.integers(1, 11, 40).astype(np.int32)
        found = jax.jit(curriculum._lowest)(jnp.asarray(scores), jnp.asarray(count))
        rank = np.argsort(np.argsort(scores, axis=1, kind="stable"), axis=1)
        assert np.array_equal(found, rank < count[:, None])


def width_split(x, sizes=(8, 1, 1)):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    return jax.device_put(x, sharding.named((None, "table_width"), x.shape, mesh, "bank"))


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_a_table_split_by_width_gives_the_leaves_of_one_device(sizes):
    with jax.enable_x64(True):
        x, key = points(203, d=16, dtype=np.float64), jax.random.key(0)
        one = curriculum.balanced_kmeans(jnp.asarray(x), 4, key)
        many = width_split(x, sizes)
        assert not many.sharding.is_fully_replicated
        for a, b in zip(one, curriculum.balanced_kmeans(many, 4, key)):
            assert np.array_equal(a, b)
            assert b.sharding.is_fully_replicated and len(b.sharding.device_set) == 8


# In points: 1, 5, 40 of 203.
@pytest.mark.parametrize(
    "block", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 40 * 16)), 5 * 16]
)
def test_blocks_change_nothing(block):
    with jax.enable_x64(True):
        x, key = jnp.asarray(points(203, d=16, dtype=np.float64)), jax.random.key(0)
        whole, _ = curriculum.balanced_kmeans(x, 4, key)
        blocks, _ = curriculum.balanced_kmeans(x, 4, key, block=block)
        assert np.array_equal(whole, blocks)


@pytest.mark.slow
def test_some_rows_alone_are_clustered_as_a_table_of_their_own():
    with jax.enable_x64(True):
        x, key = points(90, dtype=np.float64), jax.random.key(2)
        rows = np.sort(np.random.default_rng(1).choice(90, 50, replace=False))
        order, leaf_of = curriculum.balanced_kmeans(jnp.asarray(x), 4, key, rows=rows)
        alone, leaf_alone = curriculum.balanced_kmeans(jnp.asarray(x[rows]), 4, key)
        assert np.array_equal(order, rows[alone])
        assert np.array_equal(np.asarray(leaf_of)[rows], leaf_alone)
        assert np.all(np.delete(leaf_of, rows) == -1)


def test_a_table_in_bfloat16_is_clustered_in_float32():
    x, key = jnp.asarray(points(128, d=16), jnp.bfloat16), jax.random.key(0)
    half, _ = curriculum.balanced_kmeans(x, 4, key)
    full, _ = curriculum.balanced_kmeans(x.astype(jnp.float32), 4, key)
    assert np.array_equal(half, full)


# Whole clusters; tiles of 64 points.
@pytest.mark.parametrize(("block", "tolerance"), [(1 << 26, 1e-5), (64 * 2, None)])
def test_devices_exchange_a_number_per_point_and_never_rows(block, tolerance):
    n, d = 512, 16
    table = width_split(points(n, d=d))
    lowered = curriculum.split.lower(
        table,
        jax.ShapeDtypeStruct((n + 1,), jnp.float32),
        jax.ShapeDtypeStruct((2, n // 2), jnp.int32),
        jax.ShapeDtypeStruct((2,), jnp.float32),
        iterations=3,
        tolerance=tolerance,
        block=block,
        mesh=table.sharding.mesh,
    )
    found = re.findall(
        r"= (.*?) (all-\w+|reduce-scatter|collective-\w+)\(", lowered.compile().as_text()
    )
    assert {kind for _, kind in found} == {"all-reduce"}
    numbers = [
        int(np.prod([int(i) for i in shape.split(",") if i]))
        for result, _ in found
        for shape in re.findall(r"\[([\d,]*)\]", result)
    ]
    assert max(numbers) <= n


@pytest.mark.parametrize("leaves", [0, 3, 12])
def test_leaves_must_be_a_power_of_two(leaves):
    with pytest.raises(ValueError, match=f"expected a power of two, got {leaves}"):
        curriculum.balanced_kmeans(points(20), leaves, jax.random.key(0))


def test_more_leaves_than_points_are_refused():
    with pytest.raises(ValueError, match="at most one per point, 5, got 8"):
        curriculum.balanced_kmeans(points(5), 8, jax.random.key(0))
