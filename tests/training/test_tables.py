"""Tables against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import MeshConfig, TablesConfig
from xmc_jax.runtime import sharding
from xmc_jax.training import tables
from xmc_jax.training.state import Tables


def csr(rng, documents, labels):
    rows = [rng.choice(labels, rng.integers(0, 4), replace=False) for _ in range(documents)]
    indptr = np.cumsum([0, *map(len, rows)])
    return indptr, np.concatenate(rows).astype(np.int32), rows


@pytest.mark.parametrize("block", [1, 7, 10_000])
def test_centroids_are_means_over_the_documents_of_a_label(block):
    rng = np.random.default_rng(0)
    indptr, indices, rows = csr(rng, 60, 25)
    indices[indices == 24] = 0  # label 24 has no documents
    rows = [np.where(row == 24, 0, row) for row in rows]
    bank = rng.normal(size=(60, 5)).astype(np.float32)
    pairs = tables.label_pairs(indptr, indices, 25, block)
    assert np.all(np.diff(pairs.labels.ravel()) >= 0)  # the sum promises XLA sorted labels
    centroids = tables.centroids_of(jnp.asarray(bank), pairs)
    for label in range(25):
        members = [i for i in range(60) for x in rows[i] if x == label]
        expected = bank[members].mean(0) if members else np.zeros(5)
        np.testing.assert_allclose(centroids[label], expected, atol=1e-6)
    assert not np.any(centroids[24])


def test_pairs_are_those_of_a_stable_sort_by_label():
    rng = np.random.default_rng(7)
    indptr, indices, _ = csr(rng, 200, 30)
    pairs = tables.label_pairs(indptr, indices, 30, 64)
    by_label = np.argsort(indices, kind="stable")
    documents = np.repeat(np.arange(200), np.diff(indptr))[by_label]
    assert pairs.documents.dtype == pairs.labels.dtype == np.int32
    assert pairs.documents.shape == pairs.labels.shape == (-(-len(indices) // 64), 64)
    assert np.array_equal(pairs.documents.ravel()[: len(indices)], documents)
    assert np.array_equal(pairs.labels.ravel()[: len(indices)], indices[by_label])
    assert np.all(pairs.labels.ravel()[len(indices) :] == 30)  # padding is no label


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_centroids_of_a_bank_split_by_width_stay_split(sizes):
    rng = np.random.default_rng(8)
    indptr, indices, _ = csr(rng, 60, 25)
    bank = rng.normal(size=(60, 16)).astype(np.float32)
    pairs = tables.label_pairs(indptr, indices, 25, 16)
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    by_width = sharding.named((None, "table_width"), bank.shape, mesh, "bank")
    split = tables.centroids_of(jax.device_put(bank, by_width), pairs)
    assert split.sharding.is_equivalent_to(by_width, 2)
    assert np.array_equal(split, tables.centroids_of(jnp.asarray(bank), pairs))


def test_adding_a_block_of_pairs_is_local_to_each_device():
    mesh = sharding.make_mesh(MeshConfig())
    by_width = sharding.named((None, "table_width"), (60, 16), mesh, "bank")
    bank = jax.ShapeDtypeStruct((60, 16), jnp.bfloat16, sharding=by_width)
    sums = jax.ShapeDtypeStruct((25, 16), jnp.float32, sharding=by_width)
    block = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = tables.add_pairs.lower(sums, bank, block, block, mesh=mesh).compile()
    text = compiled.as_text()
    assert not any(kind in text for kind in ("all-", "reduce-scatter", "collective-"))
    assert compiled.memory_analysis().alias_size_in_bytes == 25 * 2 * 4  # the sums are donated


def test_centroids_sum_in_float32_and_keep_the_dtype_of_the_bank():
    # 400 ones: a bfloat16 sum would stop at 256.
    indptr, indices = np.arange(401), np.zeros(400, np.int32)
    pairs = tables.label_pairs(indptr, indices, 2, 16)
    centroids = tables.centroids_of(jnp.ones((400, 3), jnp.bfloat16), pairs)
    assert centroids.dtype == jnp.bfloat16
    assert np.array_equal(np.asarray(centroids, np.float32), [[1, 1, 1], [0, 0, 0]])


def test_leave_one_out_is_the_mean_of_the_others():
    rng = np.random.default_rng(6)
    bank = rng.normal(size=(6, 4)).astype(np.float32)
    members = np.array([0, 2, 3])
    centroids = np.stack([bank[members].mean(0), bank[5]])  # label 1 has document 5 alone
    rest = tables.leave_one_out(
        jnp.asarray(centroids)[np.array([0, 1, 0])],
        jnp.array([3.0, 1.0, 3.0]),
        jnp.asarray(bank[[2, 2, 3]]),
    )
    np.testing.assert_allclose(rest[0], bank[[0, 3]].mean(0), atol=1e-6)
    np.testing.assert_allclose(rest[2], bank[[0, 2]].mean(0), atol=1e-6)
    assert not np.any(rest[1])


def test_a_label_set_without_documents_has_zero_centroids():
    pairs = tables.label_pairs(np.zeros(4, np.int64), np.zeros(0, np.int32), 3)
    assert not np.any(tables.centroids_of(jnp.ones((3, 2)), pairs))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_write_rows_keeps_the_last_write_of_a_row(dtype):
    rng = np.random.default_rng(1)
    table = rng.normal(size=(20, 3)).astype(dtype)
    write = jax.jit(tables.write_rows)
    for _ in range(20):
        ids = rng.integers(0, 20, 30).astype(np.int32)
        rows = rng.normal(size=(30, 3)).astype(np.float32)
        expected = table.copy()
        for i, row in zip(ids, rows):
            expected[i] = row.astype(dtype)
        written = write(table, ids, rows)
        assert written.dtype == dtype
        assert np.array_equal(written, expected)


def test_write_rows_of_a_table_split_by_width():
    mesh = sharding.make_mesh(MeshConfig())
    by_width = sharding.named((None, "table_width"), (10, 16), mesh, "bank")
    by_row = sharding.named(("batch", None), (16, 16), mesh, "rows")
    table = jax.device_put(np.zeros((10, 16), np.float32), by_width)
    rows = jax.device_put(np.arange(256, dtype=np.float32).reshape(16, 16), by_row)
    ids = np.array([3, 3, 5, 3, 9, 0, 5, 9, 1, 1, 1, 2, 2, 4, 6, 6], np.int32)
    written = jax.jit(tables.write_rows, out_shardings=by_width)(table, ids, rows)
    expected = np.zeros((10, 16), np.float32)
    for i, row in zip(ids, np.asarray(rows)):
        expected[i] = row
    assert np.array_equal(written, expected)


@pytest.mark.parametrize("mode", ["stale", "exact", "ema"])
def test_a_step_writes_documents_and_moves_centroids_only_by_ema(mode):
    rng = np.random.default_rng(2)
    bank, centroids = rng.normal(size=(9, 4)), rng.normal(size=(7, 4))
    document = rng.normal(size=(3, 4)).astype(np.float32)
    before = Tables(
        document_bank=jnp.asarray(bank, jnp.float32),
        centroids=jnp.asarray(centroids, jnp.float32),
        label_bank=None,
        free_vector_of=jnp.zeros(7, jnp.int32),
        leaf_order=jnp.arange(9, dtype=jnp.int32),
    )
    ids, labels = np.array([8, 0, 4]), np.array([1, 5, 5, 2, 2, 1])  # two labels per document
    after = tables.after_step(before, ids, document, labels, TablesConfig(centroids=mode))
    bank[ids] = document
    if mode == "ema":
        old = centroids.copy()
        for column, label in enumerate(labels):
            centroids[label] = 0.95 * old[label] + 0.05 * document[column // 2]
    np.testing.assert_allclose(after.document_bank, bank, rtol=1e-6)
    np.testing.assert_allclose(after.centroids, centroids, rtol=1e-5)


def test_a_step_without_prime_has_no_centroids_to_move():
    before = Tables(
        document_bank=jnp.zeros((2, 3)),
        centroids=None,
        label_bank=None,
        free_vector_of=None,
        leaf_order=jnp.arange(2),
    )
    after = tables.after_step(
        before, np.array([1]), np.ones((1, 3)), np.array([0]), TablesConfig(centroids="ema")
    )
    assert after.centroids is None
    assert np.array_equal(after.document_bank, [[0, 0, 0], [1, 1, 1]])


def test_shared_free_vectors_are_balanced_clusters():
    rng = np.random.default_rng(3)
    centers = np.eye(6)[:4]
    blob = rng.permutation(np.repeat(np.arange(4), 10))
    labels = jnp.asarray(centers[blob] + 0.05 * rng.normal(size=(40, 6)), jnp.float32)
    vector = tables.free_vector_map(labels, np.ones(40, int), 4, 0, jax.random.key(0))
    assert vector.dtype == np.int32
    assert len({(int(v), int(b)) for v, b in zip(vector, blob)}) == 4
    means = tables.cluster_means(labels, vector, 4)
    for v in range(4):
        np.testing.assert_allclose(means[v], labels[vector == v].mean(0), atol=1e-6)


@pytest.mark.slow
def test_frequent_labels_have_private_vectors():
    labels = jnp.asarray(np.random.default_rng(4).normal(size=(21, 6)), jnp.float32)
    frequency = np.ones(21, int)
    frequency[[7, 2, 11]] = [9, 9, 30]
    vector = np.asarray(tables.free_vector_map(labels, frequency, 8, 3, jax.random.key(0)))
    assert tables.num_free_vectors(21, 8, 3) == 11
    assert list(vector[[11, 2, 7]]) == [0, 1, 2]  # falling frequency, ties to the lower label
    shared = np.delete(vector, [2, 7, 11])
    assert sorted(set(shared)) == list(range(3, 11))
    assert np.ptp(np.bincount(shared)[3:]) <= 1
    means = tables.cluster_means(labels, vector, 12)
    np.testing.assert_allclose(means[:3], labels[np.array([11, 2, 7])], rtol=1e-6)
    assert not np.any(means[11])  # a vector that no label uses


@pytest.mark.slow
def test_free_vectors_of_labels_split_by_width_are_those_of_one_device():
    with jax.enable_x64(True):
        labels = np.random.default_rng(9).normal(size=(101, 16))
        frequency, key = np.arange(101), jax.random.key(1)
        mesh = sharding.make_mesh(MeshConfig())
        by_width = sharding.named((None, "table_width"), labels.shape, mesh, "labels")
        split = jax.device_put(labels, by_width)
        one = tables.free_vector_map(jnp.asarray(labels), frequency, 4, 3, key)
        many = tables.free_vector_map(split, frequency, 4, 3, key)
        assert isinstance(many, np.ndarray) and np.array_equal(one, many)
        means = tables.cluster_means(split, many, 7)
        assert means.sharding.is_equivalent_to(by_width, 2)
        for vector in range(7):
            expected = labels[one == vector].mean(axis=0)
            np.testing.assert_allclose(means[vector], expected, atol=1e-12)


def test_cluster_means_of_bfloat16_are_float32():
    labels = jnp.ones((300, 2), jnp.bfloat16)  # a bfloat16 sum would stop at 256
    means = tables.cluster_means(labels, np.zeros(300, np.int32), 1)
    assert means.dtype == jnp.float32 and np.array_equal(means, [[1, 1]])


@pytest.mark.parametrize(("shared", "private"), [(20, 0), (65_536, 0), (18, 2), (100, 5), (1, 19)])
def test_with_vectors_enough_each_label_has_its_own(shared, private):
    labels = jnp.asarray(np.random.default_rng(5).normal(size=(20, 6)), jnp.float32)
    vector = tables.free_vector_map(labels, np.arange(20), shared, private, jax.random.key(0))
    assert tables.num_free_vectors(20, shared, private) == 20
    assert sorted(np.asarray(vector)) == list(range(20))


@pytest.mark.parametrize(
    ("shared", "private", "message"),
    [
        (12, 0, "power of two, or at least 20.*got 12; nearest: 8, 16"),
        (17, 1, "power of two, or at least 19.*got 17; nearest: 16, 19"),
        (0, 0, "free_vectors: expected at least 1, got 0"),
        (4, 21, "private_vectors: expected 0 to 20 labels, got 21"),
        (4, -1, "private_vectors: expected 0 to 20 labels, got -1"),
    ],
)
def test_numbers_of_free_vectors_that_cannot_be_made(shared, private, message):
    with pytest.raises(ValueError, match=message):
        tables.num_free_vectors(20, shared, private)
