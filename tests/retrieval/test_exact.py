"""Exact search against a sort of all inner products: ties, padding, blocks and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import MeshConfig
from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import exact
from xmc_jax.runtime import sharding


def sorted_search(queries, database, k):
    scores = queries.astype(np.float64) @ database.astype(np.float64).T
    ids = np.lexsort((np.broadcast_to(np.arange(len(database)), scores.shape), -scores))[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def integers(seed, *shape):
    """Small integers: inner products are exact in any order, and full of ties."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("q", "count", "k", "query_block", "database_block"),
    [
        (7, 50, 5, 512, 32_768),  # everything smaller than a block
        (9, 101, 20, 4, 17),  # ragged blocks both ways
        (3, 40, 40, 2, 7),  # all rows, k larger than a block
        (3, 64, 64, 2, 32),  # all rows of blocks without padding
        (1, 1, 1, 4, 4),
        (5, 64, 3, 5, 16),  # nothing to pad
        (9, 3001, 20, 4, 32_768),  # by maxima of groups, the last of which is ragged
        (9, 3001, 5, 4, 1024),  # likewise, in blocks
        (3, 2049, 4, 3, 1056),  # a block ends in groups of padding alone
    ],
)
def test_equals_a_full_sort(q, count, k, query_block, database_block):
    queries, database = integers(0, q, 6), integers(1, count, 6)
    scores, ids = exact.search(queries, database, k, query_block, database_block)
    want_scores, want_ids = sorted_search(queries, database, k)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_array_equal(scores, want_scores)
    assert scores.dtype == np.float32
    assert ids.dtype == np.int32


@pytest.mark.parametrize(("count", "database_block"), [(40, 7), (3001, 1024), (600, 32_768)])
def test_excluded_rows_are_not_found(count, database_block):
    """Queries that exclude nothing, a few rows, more than fit the smallest width, and all rows."""
    generator = np.random.default_rng(7)
    queries, database = integers(0, 6, 6), integers(1, count, 6)
    numbers = (0, 1, 5, count // 2, count - 2, count)
    excluded = [generator.permutation(count)[:n] for n in numbers]
    scores, ids = exact.search(
        queries, database, 9, 2, database_block, excluded=Csr.of_rows(excluded, count)
    )
    products = queries @ database.T
    for row, without in enumerate(excluded):
        allowed = np.setdiff1d(np.arange(count), without)
        want = allowed[np.argsort(-products[row, allowed], kind="stable")][:9]
        np.testing.assert_array_equal(ids[row, : len(want)], want)
        np.testing.assert_array_equal(scores[row, : len(want)], products[row, want])
        assert (ids[row, len(want) :] == -1).all() and (scores[row, len(want) :] == -np.inf).all()


def test_padding_is_never_returned_even_when_all_products_are_negative():
    scores, ids = exact.search(-np.ones((2, 4)), np.ones((5, 4)), 5, 3, 3)
    np.testing.assert_array_equal(ids, np.tile(np.arange(5), (2, 1)))
    np.testing.assert_array_equal(scores, -4)


@pytest.mark.parametrize(
    "sizes", [*(pytest.param(s, marks=pytest.mark.slow) for s in ((8, 1, 1), (2, 4, 1))), (2, 2, 2)]
)
def test_eight_devices_equal_one(sizes):
    mesh = sharding.make_mesh(MeshConfig(*sizes))
    # (9, 9): some devices hold padding alone; (40, 40): none holds any.
    for count, k in ((101, 20), (9, 9), (64, 5), (40, 40)):
        queries, database = integers(2, 11, 6), integers(3, count, 6)
        got = exact.search(queries, database, k, 4, 5, mesh)
        want = exact.search(queries, database, k)
        np.testing.assert_array_equal(got[1], want[1])
        np.testing.assert_array_equal(got[0], want[0])
        excluded = Csr.of_rows([ids[:3] for ids in want[1]], count)
        without = exact.search(queries, database, k, 4, 5, mesh, excluded=excluded)
        np.testing.assert_array_equal(without[1][:, : k - 3], want[1][:, 3:])


def test_one_compilation_for_all_blocks_and_calls_and_no_implicit_transfer():
    queries, database = integers(4, 23, 6), integers(5, 32, 6)
    before = exact.search_block._cache_size()
    with jax.transfer_guard("disallow"):
        exact.search(queries, database, 4, 8, 16)
        exact.search(queries[:3], database, 4, 8, 16)
    assert exact.search_block._cache_size() == before + 1
    # Databases that lie alike share a program, also where all of their rows are wanted.
    for count in (1, 20, 32):
        exact.search(queries, database[:count], count, 8, 64)
    assert exact.search_block._cache_size() == before + 2


def test_tpus_may_approximate_and_others_find_all():
    queries, database = integers(4, 5, 6), integers(5, 700, 6)
    want = exact.search(queries, database, 4)
    for got, expected in zip(exact.search(queries, database, 4, recall_target=0.9), want):
        np.testing.assert_array_equal(got, expected)
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    placed = exact.place(database, mesh)
    fields = {"k": 4, "block": placed.block, "mesh": mesh}

    def lowered(recall_target):
        traced = exact.search_block.trace(
            jnp.asarray(queries), placed.rows, 700, **fields, recall_target=recall_target
        )
        return traced.lower(lowering_platforms=("tpu",)).as_text()

    assert "ApproxTopK" in lowered(0.9)
    assert "ApproxTopK" not in lowered(1.0)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_more_rows_than_the_host_hands_over_at_a_time(sizes, monkeypatch):
    monkeypatch.setattr(exact, "_ROWS", 7)
    rows = integers(6, 101, 6)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    placed = exact.place(rows, mesh)
    np.testing.assert_array_equal(np.asarray(placed.rows)[:101], rows)
    assert not np.asarray(placed.rows)[101:].any()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_a_mapped_file_is_placed_in_order_and_searched(sizes, tmp_path):
    rows, queries = integers(6, 101, 6), integers(7, 5, 6)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    devices = jax.devices()[: int(np.prod(sizes))]
    mesh = sharding.make_mesh(MeshConfig(*sizes), devices)
    for dtype in ("float32", "bfloat16"):
        database = exact.place(mapped, mesh, 7, dtype)
        assert database.block <= 7 and database.count == 101 and database.rows.dtype == dtype
        placed = np.asarray(database.rows, np.float32)
        np.testing.assert_array_equal(placed[:101], rows)  # of shard s, position p: in order
        assert not placed[101:].any()
        found = exact.search(queries, database, 20)
        for got, want in zip(found, exact.search(queries, rows, 20)):
            np.testing.assert_array_equal(got, want)


def test_a_database_written_on_the_devices_is_searched():
    mesh = sharding.make_mesh(MeshConfig())
    shape, block, by_rows = exact.layout(101, 6, mesh, 5)
    rows, queries = integers(8, 101, 6), integers(9, 5, 6)
    padded = np.ones(shape, np.float32)  # padding is never returned, whatever it holds
    padded[:101] = rows
    database = exact.Database(jax.device_put(padded, by_rows), 101, block)
    for got, want in zip(exact.search(queries, database, 101), exact.search(queries, rows, 101)):
        np.testing.assert_array_equal(got, want)
    assert shape[0] % (8 * block) == 0 and block <= 5


def test_what_is_not_finite_on_the_devices_is_named():
    mesh = sharding.make_mesh(MeshConfig())
    rows = np.ones((20, 4), np.float32)
    rows[13, 1] = np.inf
    with pytest.raises(ValueError, match="row 13 of database"):
        exact.search(rows[:3], exact.place(rows, mesh, dtype="bfloat16"), 2)
    with pytest.raises(ValueError, match="row 1 of queries"):
        exact.search(rows[12:14], exact.place(rows[:5], mesh), 2)
    padded = exact.place(rows[:13], mesh)
    padded = exact.Database(padded.rows.at[13:].set(jnp.nan), 13, padded.block)
    assert exact.search(rows[:3], padded, 2)[1].shape == (3, 2)


def test_bad_input_is_named():
    good = np.ones((3, 4), np.float32)
    with pytest.raises(ValueError, match=r"k in \[1, 3\], the rows to search, got 4"):
        exact.search(good, good, 4)
    with pytest.raises(ValueError, match=r"queries \[Q, 4\], got shape \(3, 2\)"):
        exact.search(good[:, :2], good, 1)
    bad = good.copy()
    bad[1, 2] = np.nan
    with pytest.raises(ValueError, match="row 1 of database"):
        exact.search(good, bad, 1)
    assert exact.search(good[:0], good, 2)[1].shape == (0, 2)
