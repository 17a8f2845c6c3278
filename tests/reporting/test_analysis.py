"""What a report shows, against counts by hand and loops written from the definitions."""

import math

import numpy as np
import pytest

from xmc_jax.data.csr import Csr
from xmc_jax.reporting import analysis
from xmc_jax.retrieval.metrics import metrics

# Three documents, six labels. Label 0 has 40 training documents, 1 has 8, 2 and 3 have 2, 4 has 1,
# 5 has none.
FREQUENCY = np.array([40, 8, 2, 2, 1, 0])
POSITIVES = Csr(np.array([0, 2, 3, 5]), np.array([0, 2, 4, 1, 5], np.int32), None, 6)
IDS = np.array([[0, 1, 3, 2, 4, 5], [0, 1, 2, 3, 5, 4], [1, 0, -1, -1, -1, -1]], np.int32)
SCORES = np.array(
    [
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        [0.95, 0.5, 0.4, 0.3, 0.2, 0.1],
        [0.6, 0.1, -np.inf, -np.inf, -np.inf, -np.inf],
    ],
    np.float32,
)
FOUND = analysis.find(IDS, POSITIVES)


def random(seed: int, m: int = 300, labels: int = 80, k: int = 12):
    """Rankings, scores, positives and frequencies of random documents, some without positives."""
    generator = np.random.default_rng(seed)
    ids = np.argsort(generator.random((m, labels)), axis=1)[:, :k].astype(np.int32)
    scores = -np.sort(-generator.random((m, k)), axis=1).astype(np.float32)
    none = generator.random(m) < 0.1  # of these, predictions end early
    ids[none, 3:], scores[none, 3:] = -1, -np.inf
    counts = generator.integers(0, 9, m)
    rows = [np.sort(generator.choice(labels, count, replace=False)) for count in counts]
    indptr = np.concatenate([[0], np.cumsum(counts)])
    positives = Csr(indptr, np.concatenate(rows).astype(np.int32), None, labels)
    return ids, scores, positives, generator.geometric(0.05, labels) - 1


def test_what_is_found():
    # Document 1's positive is its last prediction; label 5 of document 2 is not predicted.
    assert FOUND.rank.tolist() == [0, 3, 5, 0, 6]
    assert FOUND.right.tolist() == [
        [True, False, False, True, False],
        [False] * 5,
        [True, False, False, False, False],
    ]


@pytest.mark.parametrize(
    ("frequency", "limit", "names"),
    [
        ([0, 1, 2, 3, 4, 5, 8, 9], 9, ["9", "5–8", "3–4", "2", "1", "0"]),
        ([1, 2, 3, 4, 5, 8, 9], 4, ["4–9", "2–3", "1"]),
        ([2, 2, 5_000], 9, ["4,097–5,000", "2"]),
        ([0, 0], 9, ["0"]),
        ([1], 9, ["1"]),
        (list(range(1, 10_001)), 5, ["1,001–10,000", "101–1,000", "11–100", "2–10", "1"]),
    ],
)
def test_bins_hold_each_label_once_head_first(frequency, limit, names):
    frequency = np.array(frequency)
    bins = analysis.frequency_bins(frequency, limit)
    assert bins.names == names
    assert (bins.low[bins.of_label] <= frequency).all()
    assert (frequency <= bins.high[bins.of_label]).all()
    assert bins.labels.sum() == len(frequency) and bins.labels.min() > 0


def test_by_frequency_by_hand():
    bins = analysis.frequency_bins(FREQUENCY)
    assert bins.names == ["33–40", "5–8", "2", "1", "0"]
    found = analysis.by_frequency(FOUND, POSITIVES, bins)
    # Right among the first five: labels 0 and 2 of document 0, label 1 of document 2.
    np.testing.assert_allclose(found.contribution, np.array([1, 1, 1, 0, 0]) / 15)
    assert found.predicted[1].tolist() == [2, 1, 0, 0, 0]
    np.testing.assert_allclose(found.precision[1], [1 / 2, 1, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(found.precision[5], [1 / 3, 1 / 3, 1 / 4, 0, 0])
    np.testing.assert_allclose(found.recall[5], [1, 1, 1, 0, 0])
    np.testing.assert_allclose(found.recall[100], [1, 1, 1, 1, 0])


@pytest.mark.parametrize("seed", range(3))
def test_by_frequency_adds_up_to_the_metrics(seed):
    ids, _, positives, frequency = random(seed)
    bins = analysis.frequency_bins(frequency, 6)
    found = analysis.find(ids, positives)
    split = analysis.by_frequency(found, positives, bins)
    ks = (1, 5)
    whole = metrics(ids, positives.indptr, positives.indices, np.ones(positives.columns), ks)
    assert split.contribution.sum() == pytest.approx(whole["P@5"], rel=1e-12)
    for k in ks:
        right = np.nansum(split.precision[k] * split.predicted[k])
        assert right / (k * len(ids)) == pytest.approx(whole[f"P@{k}"], rel=1e-12)
    assert found.right.any(axis=1).mean() == pytest.approx(whole["Hit@5"], rel=1e-12)
    for b in range(len(bins.low)):  # from the definition
        truth = [
            set(positives.indices[a:z]) for a, z in zip(positives.indptr, positives.indptr[1:])
        ]
        inside = {int(label) for label in np.flatnonzero(bins.of_label == b)}
        total = sum(len(t & inside) for t in truth)
        hit = sum(len(t & inside & set(row[:5])) for t, row in zip(truth, ids.tolist()))
        expected = hit / total if total else math.nan
        assert split.recall[5][b] == pytest.approx(expected, nan_ok=True)


def test_scores_are_counted_by_rank_and_by_right_or_wrong():
    found = analysis.score_histograms(SCORES, FOUND.right, bins=10)
    assert found.edges[0] == pytest.approx(0.1) and found.edges[-1] == pytest.approx(0.95)
    assert found.right.sum(axis=1).tolist() == [2, 0, 0, 1, 0]
    assert found.wrong.sum(axis=1).tolist() == [1, 3, 2, 1, 2]
    assert found.wrong[0, -1] == 1  # 0.95, in the last bin and not beyond it
    nothing = np.full((3, 6), -np.inf, np.float32)
    assert analysis.score_histograms(nothing, FOUND.right) is None
    same = analysis.score_histograms(np.full((2, 5), 0.5, np.float32), FOUND.right[:2])
    assert same.right.sum() + same.wrong.sum() == 10


def test_precision_by_score():
    scores = np.linspace(0, 1, 40, dtype=np.float32)[::-1, None].repeat(5, axis=1).copy()
    right = scores > 0.5
    scores[0] = -np.inf  # predicts nothing
    found = analysis.by_score(scores, right, groups=10)
    assert found.documents.tolist() == [13, 13, 13]  # no group of less than ten
    np.testing.assert_allclose(found.precision, [0, 6 / 13, 1])
    assert (np.diff(found.score) > 0).all() and (found.low <= found.high).all()
    assert (found.interval[0] <= found.precision).all()
    assert (found.precision <= found.interval[1]).all()
    assert analysis.by_score(np.full((2, 5), -np.inf, np.float32), right[:2]) is None


def test_wilson():
    # The two roots p of |share - p| = z sqrt(p (1 - p) / n).
    for share, count in ((0.0, 10), (0.3, 20), (1.0, 5), (0.5, 1000)):
        low, high = analysis.wilson(np.array(share), np.array(count))
        for p in (low, high):
            if 0 < p < 1:
                assert abs(share - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count))
    assert analysis.wilson(np.array(0.0), np.array(4))[0] == 0


def test_change():
    before = np.array([[1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    after = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    found = analysis.change(before, after)
    assert found.difference.tolist() == [1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    assert (found.helped, found.unchanged, found.hurt) == (1, 1, 2)
    assert found.first.tolist() == [[1, 1], [1, 1]]


def test_examples():
    chosen = analysis.examples(SCORES, FOUND.right, POSITIVES, 2)
    # Document 0 has both of two, document 2 one of two, document 1 nothing.
    assert chosen["best"].tolist() == [0, 2]
    assert chosen["worst"].tolist() == [1]
    assert len(chosen["random"]) == 2
    empty = Csr(np.array([0, 0, 0, 0]), np.zeros(0, np.int32), None, 6)
    nothing = analysis.examples(SCORES, np.zeros((3, 5), bool), empty, 2)
    assert all(len(rows) == 0 for rows in nothing.values())


@pytest.mark.parametrize("seed", range(3))
def test_confused_labels_against_a_loop(seed):
    ids, _, positives, _ = random(seed, m=400, labels=25, k=6)
    found = analysis.find(ids, positives)
    pairs: dict[tuple[int, int], list[int]] = {}
    for row, (a, z) in enumerate(zip(positives.indptr, positives.indptr[1:])):
        truth = positives.indices[a:z].tolist()
        if ids[row, 0] not in truth:
            for label in set(truth) - set(ids[row, :5].tolist()):
                pairs.setdefault((label, int(ids[row, 0])), []).append(row)
    expected = sorted(pairs.items(), key=lambda item: (-len(item[1]), item[0]))[:7]
    got = analysis.confused(found, positives, 7)
    assert list(zip(got.missed.tolist(), got.predicted.tolist())) == [pair for pair, _ in expected]
    assert got.documents.tolist() == [len(rows) for _, rows in expected]
    assert got.example.tolist() == [rows[0] for _, rows in expected]


def test_curves():
    records = [{"step": step, "train/loss": float(step)} for step in range(1, 6)] + [{"step": 6}]
    found = analysis.curve(records, "train/loss", limit=2)
    assert found.records == 3
    assert found.steps.tolist() == [2.0, 4.5] and found.values.tolist() == [2.0, 4.5]
    whole = analysis.curve(records, "train/loss")
    assert whole.records == 1 and whole.values.tolist() == [1, 2, 3, 4, 5]
    assert analysis.curve(records, "eval/P@1") is None
