"""benchmarks/search.py and benchmarks/goodput.py: what is searched, what is read of a run."""

import numpy as np
import pytest

from benchmarks import goodput, search


def test_variants_differ_by_a_few_words_and_titles_stay():
    titles = ["a b c d e", "f g h i", "j"]
    found = search.varied(titles, 50, np.random.default_rng(0))
    assert found[:3] == titles
    assert len(found) == 50
    known = set("abcdefghij")
    for variant in map(str.split, found[3:]):
        assert set(variant) <= known
        lost = min(len(set(title.split()) - set(variant)) for title in titles)
        assert lost <= 3
        assert 1 <= len(variant) <= 8
    assert len(set(found)) > 40


def test_time_of_epochs_is_read_from_records():
    records = [
        {"step": 2, "time/step": 1.0, "time/data_wait": 0.1},
        {"step": 5, "time/step": 2.0, "time/data_wait": 0.0, "train/loss": 1.0},
        {"step": 5, "time/boundary": 2.0},
        {"step": 5, "time/share/step": 0.9, "time/share/boundary": 0.1},
        {"step": 10, "time/step": 1.0, "time/data_wait": 0.0},
        {"step": 10, "time/boundary": 5.0},
        {"step": 10, "time/share/step": 0.6, "time/share/boundary": 0.4},
    ]
    first, second = goodput.epochs(records)
    assert first["steps_seconds"] == pytest.approx(8.0)
    assert first["data_wait"] == pytest.approx(0.2 / 8)
    assert first["boundary"] == pytest.approx(0.2)
    assert second["boundary"] == pytest.approx(0.5)
    assert goodput.shares(records) == {"step": 0.6, "boundary": 0.4}
