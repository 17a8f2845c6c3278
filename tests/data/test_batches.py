"""Batches: a function of (order, step) alone, the same for any number of processes."""

import jax
import numpy as np
import pytest

from xmc_jax.data import batches, rows, store
from xmc_jax.data.csr import Csr
from xmc_jax.data.types import NO_PROMPTS


@pytest.fixture
def data(prepared):
    return store.open(prepared)


def order_of(n, seed=0):
    return np.random.default_rng(seed).permutation(n).astype(np.int32)


def assert_equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(leaves_a) == len(leaves_b) == 8
    for x, y in zip(leaves_a, leaves_b):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(("n", "size"), [(20, 6), (20, 5), (20, 20), (7, 1)])
def test_every_document_once_per_epoch(n, size):
    order = order_of(n)
    whole = batches.complete(order, size)
    assert len(whole) == -(-n // size) * size and whole.dtype == np.int32
    np.testing.assert_array_equal(whole[:n], order)
    for batch in whole.reshape(-1, size):
        assert len(set(batch)) == size
    np.testing.assert_array_equal(np.unique(whole), np.arange(n))


def test_a_batch_of_more_than_all_documents_repeats_them():
    assert batches.complete(order_of(3), 8).tolist() == [*order_of(3)] * 2 + [*order_of(3)[:2]]
    assert batches.fitting_batch_size(20, 8, multiple=4) == 8
    assert batches.fitting_batch_size(9, 256, multiple=1) == 9
    assert batches.fitting_batch_size(9, 256, multiple=8) == 16


@pytest.mark.parametrize(("size", "shards"), [(8, 1), (8, 4), (56, 2)])
def test_all_positives_of_a_batch(data, size, shards):
    """In parts for the shards, for one process and for two, and where documents repeat."""
    sampler = batches.Sampler(data, size, labels="all", shards=shards)
    order = batches.complete(order_of(20), size)
    batch = sampler.build(order, 0, 0)
    entries = batch.positives < data.num_labels
    found = np.stack([batch.owners[entries], batch.positives[entries]], axis=1)
    positives = data.positives("train").take(batch.document_ids)
    expected = np.stack([positives.row_ids(), positives.indices], axis=1)
    assert sorted(found.tolist()) == sorted(expected.tolist())
    part = len(batch.positives) // shards
    shard = np.flatnonzero(entries) // part
    np.testing.assert_array_equal(found[:, 0] // (size // shards), shard)
    frequency = data.label_frequency[batch.positives[entries]]
    np.testing.assert_array_equal(batch.frequency[entries], frequency)
    assert part == data.shape.most_positives(size // shards)
    if shards > 1:
        half = sampler.build(order, 0, 0, np.arange(size // 2, size))
        np.testing.assert_array_equal(half.positives, batch.positives[part * shards // 2 :])
        np.testing.assert_array_equal(half.owners, batch.owners[part * shards // 2 :])


@pytest.mark.parametrize("per_document", [1, 3])
@pytest.mark.parametrize("weighting", batches.WEIGHTINGS)
def test_contents(data, per_document, weighting):
    sampler = batches.Sampler(data, 8, per_document, weighting, seed=5)
    order = batches.complete(order_of(20), 8)
    positives = data.positives("train")
    sets = [set(positives.take(np.array([i])).indices.tolist()) for i in range(20)]
    for step in range(3):
        batch = sampler.build(order, step, 100 + step)
        np.testing.assert_array_equal(batch.document_ids, order[step * 8 : step * 8 + 8])
        label_ids = batch.label_ids[batch.columns]
        expected = [[label in sets[i] for label in label_ids] for i in batch.document_ids]
        np.testing.assert_array_equal(batch.relevance, expected)
        assert batch.relevance.shape == (8, 8 * per_document) and batch.relevance.dtype == bool
        for row, i in enumerate(batch.document_ids):
            own = label_ids[row * per_document : (row + 1) * per_document].tolist()
            assert set(own) <= sets[i]
            assert len(set(own)) == min(per_document, len(sets[i]))


def layout_of(data, multiple=64):
    return rows.layout(NO_PROMPTS, "image_text", "contiguous", data.max_length, 0, multiple)


def texts_of(items, groups, chunks):
    """The tokens in each slot, () where there is no item, read place by place."""
    count = len(items.tokens) // groups
    found = []
    for number, slot in enumerate(items.slots.ravel()):
        document = number // items.slots.shape[1]
        shards = groups // chunks
        shard, within = divmod(document, len(items.slots) // shards)
        row, segment = divmod(int(slot), items.per_row)
        if row >= count:
            found.append(())
            continue
        row = (shard * count + row) * chunks + within % chunks
        found.append(tuple(items.tokens[row][items.segments[row] == segment].tolist()))
    return found


@pytest.mark.parametrize("multiple", [64, None])
@pytest.mark.parametrize(("shards", "chunks", "per_document"), [(1, 1, 2), (2, 2, 1)])
def test_rows_hold_each_document_and_each_different_label_once(
    data, shards, chunks, per_document, multiple
):
    arguments = layout_of(data, multiple), shards, chunks
    sampler = batches.Sampler(data, 8, per_document, "uniform", 3, "sampled", *arguments)
    order = order_of(data.num_documents)

    def text(split, item):
        return tuple(split.tokens[item, : split.lengths[item]].tolist())

    for step in range(2):
        batch = sampler.build(order, step, step)
        found = texts_of(batch.items, shards * chunks, chunks)
        by_document = [
            found[i : i + 1 + per_document] for i in range(0, len(found), len(found) // 8)
        ]
        assert [x[0] for x in by_document] == [text(data.train, i) for i in batch.document_ids]
        labels = [x for some in by_document for x in some[1:]]
        there = np.array([bool(x) for x in labels])
        assert labels == [
            text(data.label, i) if one else () for i, one in zip(batch.label_ids, there)
        ]
        assert set(batch.columns) == set(np.flatnonzero(there))
        assert len(set(batch.label_ids[there])) == there.sum() < len(there)
        tokens = sum(map(len, found))
        assert (batch.items.segments >= 0).sum() == tokens
        # Every process builds its own shards of the same batch.
        halves = [
            sampler.build(order, step, step, np.arange(8) // (8 // shards) == i)
            for i in range(shards)
        ]
        assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *halves), batch)


def test_few_numbers_of_rows_of_which_the_last_holds_any_batch(data):
    sampler = batches.Sampler(data, 8, layout=layout_of(data))
    counts = sampler.row_counts
    assert list(counts) == sorted(set(counts)) and len(counts) <= 4
    layout = layout_of(data)
    rng = np.random.default_rng(0)
    for lengths in (rng.integers(0, layout.longest + 1, 16), np.full(16, layout.longest)):
        assert rows.fit(layout, lengths).rows <= counts[-1]
    assert batches.Sampler(data, 8, layout=layout_of(data, None)).row_counts == (16,)


@pytest.mark.parametrize(("groups", "places"), [(1, 9), (3, 3), (4, 4)])
def test_labels_are_dealt_by_tokens(groups, places):
    rng = np.random.default_rng(0)
    lengths, loads = rng.integers(1, 20, 9), rng.integers(20, 25, groups)
    dealt = batches.deal(loads, lengths, places)
    assert np.bincount(dealt, minlength=groups).max() <= places
    sums = loads + np.bincount(dealt, weights=lengths, minlength=groups)
    assert sums.max() - sums.min() <= 20


def test_independent_of_history(data):
    order = batches.complete(order_of(20), 6)
    sampler = batches.Sampler(data, 6, seed=2)
    straight = [sampler.build(order, step, step) for step in range(4)]
    again = batches.Sampler(data, 6, seed=2)
    for step in (3, 0, 2, 2):
        assert_equal(again.build(order, step, step), straight[step])


def test_step_and_seed_change_the_draw(data):
    order = batches.complete(order_of(20), 20)
    labels = [
        batches.Sampler(data, 20, seed=seed).build(order, 0, step).relevance.tolist()
        for seed, step in ((0, 0), (0, 1), (1, 0))
    ]
    assert labels[0] != labels[1] and labels[0] != labels[2] and labels[1] != labels[2]


def test_chances_are_proportional_to_weights():
    weights = np.array([1.0, 2.0, 5.0, 8.0])
    positives = Csr(np.arange(0, 30_001, 3), np.tile(np.int32([0, 1, 3]), 10_000), None, 4)
    drawn = batches.sample(positives, weights, 2, np.random.default_rng(0)).reshape(-1, 2)
    first = np.bincount(drawn[:, 0], minlength=4) / 10_000
    np.testing.assert_allclose(first, [1 / 11, 2 / 11, 0, 8 / 11], atol=0.015)
    second = np.bincount(drawn[drawn[:, 0] == 3, 1], minlength=4) / (first[3] * 10_000)
    np.testing.assert_allclose(second, [1 / 3, 2 / 3, 0, 0], atol=0.02)
    assert (drawn[:, 0] != drawn[:, 1]).all()


def test_few_positives_repeat_and_none_are_random():
    positives = Csr(np.array([0, 2, 2, 5]), np.int32([4, 6, 1, 2, 3]), None, 50)
    drawn = batches.sample(positives, np.ones(50), 5, np.random.default_rng(0)).reshape(3, 5)
    assert sorted(np.bincount(drawn[0])[[4, 6]].tolist()) == [2, 3]
    assert sorted(np.bincount(drawn[2])[[1, 2, 3]].tolist()) == [1, 2, 2]
    assert drawn[1].min() >= 0 and drawn[1].max() < 50 and len(set(drawn[1])) > 1
    relevance = batches.relevance(positives, drawn.ravel())
    assert not relevance[1].any() and relevance[0, :5].all() and relevance[2, 10:].all()


def test_relevance_against_a_loop():
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 5, 40)
    positives = Csr(
        np.concatenate([[0], np.cumsum(counts)]),
        generator.integers(0, 30, counts.sum()).astype(np.int32),
        None,
        30,
    ).deduplicated()
    labels = generator.integers(0, 30, 64).astype(np.int32)
    found = batches.relevance(positives, labels)
    for i in range(40):
        row = positives.indices[positives.indptr[i] : positives.indptr[i + 1]]
        np.testing.assert_array_equal(found[i], np.isin(labels, row))
    empty = Csr(np.zeros(3, np.int64), np.empty(0, np.int32), None, 30)
    assert not batches.relevance(empty, labels).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "batch_size and positives_per_document of at least 1, got 0 and 1"),
        ((4, 0), "batch_size and positives_per_document of at least 1, got 4 and 0"),
        (
            (10, 1, "uniform", 0, "all", None, 2, 2),
            "a multiple of 2 batch shards times 2 chunks, got 10",
        ),
        ((4, 1, "frequency"), "weighting among inverse_propensity, uniform, got 'frequency'"),
    ],
)
def test_refusals(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches.Sampler(data, *arguments)
