"""Metrics against the definitions on random small problems, and at full size."""

import gzip
import math
import os
import pathlib
import time

import numpy as np
import pytest

from xmc_jax.retrieval import metrics

SHARED = os.environ.get("XMC_SHARED_DATA")
AMAZON = (
    pathlib.Path(SHARED) if SHARED else pathlib.Path(__file__).parents[3] / "shared" / "data"
) / "LF-AmazonTitles-131K"


def naive(predictions, positives, weight, k):
    """The definitions, one document at a time, in plain Python."""
    rows = {name: [] for name in metrics.NAMES}
    best = {"PSP": [], "PSnDCG": []}
    for predicted, true in zip(predictions, positives):
        hits = [float(label >= 0 and label in true) for label in predicted[:k]]
        n = len(true)
        ideal = sum(1 / math.log2(r + 2) for r in range(min(k, n))) or 1.0
        gains = [hit * weight[label] for hit, label in zip(hits, predicted[:k])]
        best_gains = sorted((weight[label] for label in true), reverse=True)[:k]

        def dcg(x):
            return sum(value / math.log2(r + 2) for r, value in enumerate(x))

        ranks = [r + 1 for r, hit in enumerate(hits) if hit]
        rows["P"].append(sum(hits) / k)
        rows["nDCG"].append(dcg(hits) / ideal)
        rows["PSP"].append(sum(gains) / k)
        best["PSP"].append(sum(best_gains) / k)
        rows["PSnDCG"].append(dcg(gains) / ideal)
        best["PSnDCG"].append(dcg(best_gains) / ideal)
        rows["R"].append(sum(hits) / max(n, 1))
        rows["Hit"].append(float(any(hits)))
        rows["MAP"].append(sum((i + 1) / r for i, r in enumerate(ranks)) / max(min(k, n), 1))
        rows["MRR"].append(1 / ranks[0] if ranks else 0.0)
    mean = {name: math.fsum(x) / len(x) for name, x in rows.items()}
    for name, x in best.items():
        mean[name] /= math.fsum(x) / len(x)
    return {f"{name}@{k}": value for name, value in mean.items()}


def csr(rows):
    indptr = np.cumsum([0] + [len(row) for row in rows])
    return indptr, np.array([label for row in rows for label in row], np.int32)


def random_problem(generator):
    """Predictions from scores with ties, then filtered; some rows short, some without positives."""
    m, num_labels, k = (int(generator.integers(*span)) for span in ((1, 9), (2, 30), (1, 12)))
    sizes = np.minimum(generator.integers(0, 8, m), num_labels)
    if not sizes.any():
        sizes[0] = 1
    positives = [generator.permutation(num_labels)[:size].tolist() for size in sizes]
    scores = generator.integers(0, 4, (m, num_labels)).astype(np.float32)
    extra = int(generator.integers(0, 4))
    width = k + extra
    ids = np.full((m, width), -1, np.int32)
    top = np.full((m, width), -np.inf, np.float32)
    for i in range(m):
        have = min(num_labels, width, int(generator.integers(0, width + 1)))
        order = np.argsort(-scores[i], kind="stable")[:have]
        ids[i, :have], top[i, :have] = order, scores[i, order]
    pairs = np.array(
        [(i, j) for i in range(m) for j in generator.permutation(num_labels)[:extra]], np.int32
    ).reshape(-1, 2)
    weight = 1 + 10 * generator.random(num_labels)
    return ids, top, pairs, positives, weight, k


def test_metrics_equal_the_definitions_on_1000_random_problems():
    generator = np.random.default_rng(0)
    for _ in range(1000):
        ids, top, pairs, positives, weight, k = random_problem(generator)
        scores, kept = metrics.drop_filtered(top, ids, pairs, k)
        # The filter's oracle: per row, what is not filtered, in order.
        filtered = set(map(tuple, pairs.tolist()))
        for i, row in enumerate(ids):
            want = [(s, j) for s, j in zip(top[i], row) if j >= 0 and (i, j) not in filtered][:k]
            want += [(-np.inf, -1)] * (k - len(want))
            assert list(zip(scores[i], kept[i])) == want
        ks = tuple(range(1, k + 1))
        got = metrics.metrics(kept, *csr(positives), weight, ks)
        want = {}
        for cut in ks:
            want |= naive(kept.tolist(), positives, weight, cut)
        assert got.keys() == want.keys()
        for name in want:
            assert abs(got[name] - want[name]) <= 1e-12, name


def test_a_perfect_prediction_scores_one_and_documents_without_positives_zero():
    weight = np.array([1.0, 5.0, 3.0])
    perfect = metrics.metrics(np.array([[1, 2, 0]], np.int32), *csr([[1, 2]]), weight, (1, 2))
    assert set(perfect) == {f"{name}@{k}" for name in metrics.NAMES for k in (1, 2)}
    assert all(
        value == pytest.approx(1, abs=1e-15) for name, value in perfect.items() if name != "R@1"
    )
    assert perfect["R@1"] == 0.5
    halved = metrics.metrics(
        np.array([[1, 2, 0], [0, 1, 2]], np.int32), *csr([[1, 2], []]), weight, (1,)
    )
    assert halved["P@1"] == halved["nDCG@1"] == halved["MRR@1"] == 0.5
    assert halved["PSP@1"] == 1  # the quotient of means: the empty row adds nothing to either


@pytest.mark.parametrize(
    ("ids", "positives", "ks", "message"),
    [
        ([[0, 0]], [[0]], (2,), "twice among the predictions of document 0"),
        ([[0, 1]], [[1, 1]], (2,), "twice among the positives of document 0"),
        ([[0, 1]], [[0]], (3,), "expected ks within the 2"),
        ([[0, 1]], [[0], [1]], (1,), "of the 2 documents"),
        ([[0, 3]], [[0]], (1,), r"predictions in \[-1, 3\), got 0 to 3"),
        ([[0, 1]], [[]], (1,), "at least one positive"),
    ],
)
def test_bad_input_is_named(ids, positives, ks, message):
    with pytest.raises(ValueError, match=message):
        metrics.metrics(np.array(ids, np.int32), *csr(positives), np.ones(3), ks)


def test_filter_keeps_the_order_of_long_lists():
    ids = np.random.default_rng(0).permutation(500).astype(np.int32)[None]
    pairs = np.array([(0, label) for label in range(0, 500, 3)], np.int32)
    scores = -np.arange(500, dtype=np.float32)[None]
    got_scores, got_ids = metrics.drop_filtered(scores, ids, pairs, 200)
    np.testing.assert_array_equal(got_ids[0], ids[ids % 3 != 0][:200])
    np.testing.assert_array_equal(got_scores[0], scores[ids % 3 != 0][:200])


def test_filter_of_another_split_is_refused():
    with pytest.raises(ValueError, match=r"documents in \[0, 1\), got 0 to 4"):
        metrics.drop_filtered(
            np.ones((1, 2), np.float32), np.array([[0, 1]]), np.array([[0, 1], [4, 0]]), 1
        )


def test_filtered_per_document():
    assert metrics.filtered_per_document(np.array([[0, 1], [2, 1], [2, 3]])) == 2
    assert metrics.filtered_per_document(np.zeros((0, 2), np.int32)) == 0


@pytest.mark.slow
@pytest.mark.skipif(not AMAZON.exists(), reason="needs LF-AmazonTitles-131K's test labels")
def test_full_size_under_five_seconds():
    """134,835 documents at k = 100, half of the positives predicted; the filter included."""
    with gzip.open(AMAZON / "tst_X_Y.txt.gz", "rt") as file:
        m, num_labels = map(int, file.readline().split())
        rows = [[int(pair.split(":")[0]) for pair in line.split()] for line in file]
    with gzip.open(AMAZON / "filter_labels_test.txt.gz", "rt") as file:
        pairs = np.loadtxt(file, np.int32)
    assert (m, num_labels, len(rows), len(pairs)) == (134_835, 131_073, 134_835, 79_663)
    indptr, positives = csr(rows)
    generator = np.random.default_rng(0)
    extra = metrics.filtered_per_document(pairs)
    # Distinct within a row, spread over all labels; then positives at random ranks.
    ids = (
        generator.integers(0, num_labels, (m, 1))
        + np.arange(100 + extra) * (num_labels // (100 + extra))
    ) % num_labels
    row_of = np.repeat(np.arange(m), np.diff(indptr))
    rank = (np.arange(len(positives)) - indptr[row_of]) * 19 + generator.integers(0, 19)
    keep = ~(ids[row_of] == positives[:, None]).any(1) & (generator.random(len(positives)) < 0.5)
    ids[row_of[keep], rank[keep]] = positives[keep]
    ids = ids.astype(np.int32)
    scores = np.tile(-np.arange(ids.shape[1], dtype=np.float32), (m, 1))

    start = time.perf_counter()
    kept = metrics.drop_filtered(scores, ids, pairs, 100)[1]
    filtered = time.perf_counter()
    got = metrics.metrics(kept, indptr, positives, np.ones(num_labels))
    seconds = time.perf_counter() - filtered
    print(f"metrics {seconds:.2f} s, filter {filtered - start:.2f} s")
    assert 0.4 < got["R@100"] < 0.6
    assert seconds < 5
    assert filtered - start < 5


def test_unknown_metrics_are_refused():
    assert metrics.parse("P@1+nDCG@5") == (("P", 1), ("nDCG", 5))
    with pytest.raises(ValueError, match=r"tune.metric: expected some of P, .*, got 'F1'"):
        metrics.parse("P@1+F1@3")
