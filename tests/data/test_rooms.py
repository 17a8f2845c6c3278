"""Rooms of packed batches: small, few, and never too small; labels dealt to groups."""

import dataclasses
import itertools

import numpy as np
import pytest

from xmc_jax.data import batches, packing, store
from xmc_jax.types import Packing, Prompts


@pytest.fixture
def data(prepared):
    return store.open(prepared)


def fits(room: Packing, lengths) -> bool:
    """By the definition, sequence by sequence."""
    for group in lengths:
        room_left, widths = room.tokens, [w for c, w in room.classes for _ in range(c)]
        for length, width in zip(sorted(group), widths, strict=True):
            if length > width:
                return False
            room_left -= width if room.padded else length
        if room_left < 0:
            return False
    return True


def test_the_first_room_takes_batches_as_sampled_and_the_last_any():
    rng, width = np.random.default_rng(0), 32
    draw = lambda: rng.integers(5, 25, (2, 100))  # noqa: E731
    rooms = packing.rooms([draw() for _ in range(32)], width)
    assert rooms[-1] == Packing(100 * width, ((100, width),))
    tokens = [room.tokens for room in rooms]
    assert tokens == sorted(tokens) and len(set(rooms)) == len(rooms) <= 4
    assert rooms[0].tokens < 1.2 * 100 * 14.5  # of 3,200 with padding
    for _ in range(50):
        lengths = draw()
        chosen = packing.choose(rooms, lengths)
        assert chosen is rooms[0] and fits(chosen, lengths)
    for shift in range(0, 12):
        lengths = np.minimum(draw() + shift, width)
        chosen = packing.choose(rooms, lengths)
        assert fits(chosen, lengths)
        for smaller in rooms[: rooms.index(chosen)]:
            assert not fits(smaller, lengths)


def test_widths_waste_least():
    lengths = np.random.default_rng(0).integers(3, 12, 200)
    found = packing.widths(lengths, 3)

    def places(widths):
        return sum(min(w for w in widths if w >= length) for length in lengths)

    possible = itertools.combinations(range(3, 11), 2)
    assert places(found) == min(places((*pair, 11)) for pair in possible)
    assert len(found) == 3 and found[-1] == 11 and list(found) == sorted(found)
    assert packing.widths(lengths, 1) == (11,)
    assert packing.widths(np.array([0, 0]), 4) == (1,)


@pytest.mark.parametrize(("groups", "places"), [(1, 9), (3, 3), (4, 4)])
def test_labels_are_dealt_by_tokens(groups, places):
    rng = np.random.default_rng(0)
    lengths, loads = rng.integers(1, 20, 9), rng.integers(20, 25, groups)
    dealt = packing.deal(loads, lengths, places)
    assert np.bincount(dealt, minlength=groups).max() <= places
    sums = loads + np.bincount(dealt, weights=lengths, minlength=groups)
    assert sums.max() - sums.min() <= 20


@pytest.mark.parametrize(("shards", "chunks", "per_document"), [(1, 1, 2), (2, 2, 1)])
def test_a_packed_batch_holds_every_sampled_label_once(data, shards, chunks, per_document):
    groups = packing.Groups(shards, chunks, Prompts(), data.max_length)
    order = np.random.default_rng(0).permutation(data.num_documents).astype(np.int32)
    plain = batches.Sampler(data, 8, per_document, seed=3)
    sampler = batches.Sampler(data, 8, per_document, seed=3, groups=groups)
    group = np.repeat(groups.of(8), per_document)
    for step in range(2):
        batch, expected = sampler.build(order, step, step), plain.build(order, step, step)
        np.testing.assert_array_equal(batch.document_ids, expected.document_ids)
        np.testing.assert_array_equal(batch.relevance, expected.relevance)
        np.testing.assert_array_equal(batch.label_ids[batch.columns], expected.label_ids)
        there = batch.label.lengths >= 0
        assert sorted(batch.label_ids[there]) == sorted(set(expected.label_ids))
        assert set(batch.columns) == set(np.flatnonzero(there))
        np.testing.assert_array_equal(
            batch.label.lengths[there], data.label.lengths[batch.label_ids[there]]
        )
        np.testing.assert_array_equal(batch.label.tokens, data.label.tokens[batch.label_ids])
        tokens = np.maximum(batch.label.lengths, 0).reshape(8, -1)
        both = np.concatenate([batch.document.lengths[:, None], tokens], axis=1)
        of_row = group.reshape(8, -1)[:, 0]
        lengths = np.stack([both[of_row == g].ravel() for g in range(shards * chunks)])
        assert fits(batch.packing, lengths)
        # Every process builds its own rows of the same batch.
        halves = [sampler.build(order, step, step, np.arange(8) // 4 == i) for i in range(2)]
        for field in dataclasses.fields(batch):
            if isinstance(whole := getattr(batch, field.name), np.ndarray):
                parts = [getattr(half, field.name) for half in halves]
                np.testing.assert_array_equal(np.concatenate(parts), whole)
        assert halves[0].packing == halves[1].packing == batch.packing


def test_groups_of_one_size():
    groups = packing.Groups(2, 2, Prompts(), 8)
    assert groups.of(8).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    with pytest.raises(ValueError, match="a multiple of 2 batch shards times 2 chunks, got 10"):
        groups.of(10)
