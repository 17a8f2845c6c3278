"""First-fit decreasing: as by the definition, full rows, and fast."""

import numpy as np
import pytest

from xmc_jax.data import rows
from xmc_jax.data.types import NO_PROMPTS


def by_a_loop(lengths, places, most):
    """Longest first, each to the first row with room for it: the items of each row."""
    found = []
    for item in np.argsort(-lengths, kind="stable"):
        for row in found:
            if len(row) < most and lengths[row].sum() + lengths[item] <= places:
                row.append(item)
                break
        else:
            found.append([item])
    return found


@pytest.mark.parametrize(("shortest", "longest", "most"), [(1, 20, 99), (0, 7, 4), (3, 3, 5)])
def test_first_fit_is_that_of_the_definition(shortest, longest, most):
    lengths = np.random.default_rng(0).integers(shortest, longest + 1, 200)
    row, start, number = rows.first_fit(lengths, 20, most)
    expected = by_a_loop(lengths, 20, most)
    assert row.max() + 1 == len(expected)
    ours = [sorted(lengths[row == i].tolist()) for i in range(len(expected))]
    assert sorted(ours) == sorted(sorted(lengths[items].tolist()) for items in expected)
    for i in range(len(expected)):
        mine = np.flatnonzero(row == i)
        mine = mine[np.argsort(number[mine])]
        assert number[mine].tolist() == list(range(len(mine))) and len(mine) <= most
        assert start[mine].tolist() == [0, *np.cumsum(lengths[mine])[:-1].tolist()]
        assert lengths[mine].sum() <= 20


def test_rows_of_titles_are_full():
    """Lengths as those of titles; a million at once."""
    rng = np.random.default_rng(0)
    lengths = np.clip(np.round(rng.lognormal(np.log(13), 0.45, 1_000_000)), 3, 32).astype(int)
    for places, least in ((64, 0.98), (128, 0.99)):
        row, _, number = rows.first_fit(lengths, places, places // 4)
        assert lengths.sum() / (places * (row.max() + 1)) > least
        assert number.max() < places // 4


def test_an_item_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="items of at most 8 tokens, got 9"):
        rows.first_fit(np.array([9, 1]), 8, 4)


def test_rows_suit_the_lengths():
    """Short ones where items come in halves, whole ones where they are all cut."""
    layout = rows.layout(NO_PROMPTS, "image_text", "contiguous", 32, 0, 64)
    for lengths, expected in (([20] * 100, 40), ([32] * 100, 32)):
        assert rows.suited(layout, np.array(lengths), 8, 384).width == expected
    assert rows.suited(layout, np.array([20] * 100), 128, 384).width == 128
