"""Retrieval-augmented inference against a dense version written from the formula."""

import numpy as np
import pytest

from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import augmented
from xmc_jax.retrieval.augmented import AugmentedConfig


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum() if len(x) else x


def naive(scores, ids, dense, config, prior=None):
    """f64[L] of one document: the formula, with a dense label matrix; nan where nothing is."""
    num_labels = dense.shape[1]
    kept = ids >= 0
    if config.separate_softmax:
        p = np.zeros(len(ids))
        for side in (kept & (ids < num_labels), ids >= num_labels):
            p[side] = softmax(scores[side] / config.temperature)
    else:
        p = np.zeros(len(ids))
        p[kept] = softmax(scores[kept] / config.temperature)
    y, there = np.zeros(num_labels), np.zeros(num_labels, bool)
    for item, weight in zip(ids[kept], p[kept]):
        if item < num_labels:
            y[item] += config.label_weight * weight
            there[item] = True
        else:
            row = dense[item - num_labels]
            there |= row > 0
            if config.normalize_rows:
                row = row / max(row.sum(), 1)
            y += (1 - config.label_weight) * weight * row
    if prior is not None and config.prior_weight:
        there &= prior > 0
        y = y * np.where(there, prior, 1) ** config.prior_weight
    return np.where(there, y, np.nan)


def problem(generator, documents=12, num_labels=15, m=7, labels=4, neighbours=5):
    dense = (generator.random((documents, num_labels)) < 0.2).astype(np.float64)
    dense[3] = 0  # a train document without positives
    positives = Csr(
        np.concatenate([[0], np.cumsum(dense.sum(1))]).astype(np.int64),
        np.nonzero(dense)[1].astype(np.int32),
        None,
        num_labels,
    )
    ids = np.concatenate(
        [
            [generator.permutation(num_labels)[:labels] for _ in range(m)],
            [num_labels + generator.permutation(documents)[:neighbours] for _ in range(m)],
        ],
        axis=1,
    ).astype(np.int32)
    # Of few values, so that there are ties.
    scores = np.round(generator.uniform(-1, 1, ids.shape), 1).astype(np.float32)
    missing = generator.random(ids.shape) < 0.2
    missing[0] = True  # nothing found at all
    missing[1, :labels] = True  # no label found
    ids[missing], scores[missing] = -1, -np.inf
    return scores, ids, positives, dense


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("prior_weight", [None, 0.0, 0.4, 1.0, -0.3])
def test_equals_the_dense_formula(monkeypatch, separate, normalize, prior_weight):
    monkeypatch.setattr(augmented, "_BLOCK", 3)
    generator = np.random.default_rng(0)
    config = AugmentedConfig(
        temperature=0.3,
        label_weight=0.7,
        separate_softmax=separate,
        normalize_rows=normalize,
        prior_weight=prior_weight or 0.0,
    )
    removed = 0
    for _ in range(30):
        scores, ids, positives, dense = problem(generator)
        prior = None
        if prior_weight is not None:
            # Of any scale; zeros where they have a meaning.
            prior = generator.integers(prior_weight < 0, 4, positives.columns) * 1e3
        got_scores, got_ids = augmented.augment(scores, ids, positives, config, 9, prior)
        assert got_scores.dtype == np.float32 and got_ids.dtype == np.int32
        for i in range(len(ids)):
            want = naive(scores[i].astype(np.float64), ids[i], dense, config, prior)
            have = min(9, int((~np.isnan(want)).sum()))
            order = np.argsort(-want, kind="stable")[:have]  # nan last
            np.testing.assert_allclose(got_scores[i, :have], want[order], rtol=1e-6)
            np.testing.assert_allclose(want[got_ids[i, :have]], want[order], rtol=1e-12)
            assert len(set(got_ids[i, :have])) == have
            assert (got_ids[i, have:] == -1).all()
            assert (got_scores[i, have:] == -np.inf).all()
            if prior is not None and prior_weight:
                removed += (prior[ids[i][(ids[i] >= 0) & (ids[i] < len(prior))]] == 0).sum()
    assert (removed > 0) == (prior_weight in (0.4, 1.0))


def test_without_a_prior_or_its_weight_results_are_the_same_bits():
    scores, ids, positives, _ = problem(np.random.default_rng(2))
    want = augmented.augment(scores, ids, positives, AugmentedConfig(), 9)
    prior = np.linspace(0, 5, positives.columns)
    weightless = AugmentedConfig(prior="a file", prior_weight=0.0)
    ones = np.ones(positives.columns)
    for config, given in ((weightless, prior), (AugmentedConfig(prior_weight=2.0), ones)):
        got = augmented.augment(scores, ids, positives, config, 9, given)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)


def test_the_unit_of_a_prior_does_not_matter():
    scores, ids, positives, _ = problem(np.random.default_rng(3))
    prior = np.random.default_rng(4).uniform(0.1, 2, positives.columns)
    config = AugmentedConfig(prior_weight=0.5)
    want = augmented.augment(scores, ids, positives, config, 9, prior)[1]
    assert (want != augmented.augment(scores, ids, positives, config, 9)[1]).any()
    for unit in (1e-6, 100.0):
        got = augmented.augment(scores, ids, positives, config, 9, unit * prior)[1]
        np.testing.assert_array_equal(got, want)


def test_a_prior_that_does_not_fit_is_named():
    scores, ids, positives, _ = problem(np.random.default_rng(5))
    ones = np.ones(positives.columns)

    def mix(given, /, **fields):
        return augmented.augment(scores, ids, positives, AugmentedConfig(**fields), 9, given)

    with pytest.raises(ValueError, match=r"expected the prior 'a\.tsv', got none"):
        mix(None, prior="a.tsv")
    with pytest.raises(ValueError, match=r"a prior of 15 labels, got shape \(14,\)"):
        mix(ones[1:])
    with pytest.raises(ValueError, match=r"whose power -1 is below 3e38, got 0"):
        mix(0 * ones, prior_weight=-1.0)
    with pytest.raises(ValueError, match=r"whose power 2 is below 3e38, got 1e\+30"):
        mix(1e30 * ones, prior_weight=2.0)
    with pytest.raises(ValueError, match="the tuned weights themselves, got only their name"):
        mix(None, weights="tuned")


def test_label_weight_one_keeps_the_order_of_the_labels():
    scores, ids, positives, _ = problem(np.random.default_rng(1))
    config = AugmentedConfig(label_weight=1.0)
    for row, item, got in zip(scores, ids, augmented.augment(scores, ids, positives, config, 4)[1]):
        labels = (item >= 0) & (item < positives.columns)
        want = item[labels][np.argsort(-row[labels], kind="stable")]
        np.testing.assert_array_equal(got[: len(want)], want)


def test_ties_go_to_the_lower_label():
    positives = Csr(np.array([0, 2]), np.array([3, 1], np.int32), None, 5)
    ids, scores = np.array([[4, 2, 5]], np.int32), np.array([[0.5, 0.5, 0.1]], np.float32)
    got = augmented.augment(scores, ids, positives, AugmentedConfig(), 5)[1]
    np.testing.assert_array_equal(got, [[2, 4, 1, 3, -1]])


def test_union_numbers_documents_after_labels():
    scores, ids = augmented.union(
        np.array([[0.5, 0.4]], np.float32),
        np.array([[2, 0]]),
        np.array([[0.9, -np.inf]], np.float32),
        np.array([[1, -1]]),
        num_labels=3,
    )
    np.testing.assert_array_equal(ids, [[2, 0, 4, -1]])
    np.testing.assert_array_equal(scores, np.array([[0.5, 0.4, 0.9, -np.inf]], np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("mode", "both"), ("labels", 0), ("temperature", 0.0), ("label_weight", 1.5)),
        *(("prior_weight", float("inf")), ("weights", "best")),
    ],
)
def test_bad_config_names_its_field(field, value):
    with pytest.raises(ValueError, match=rf"eval\.augmented.*{field}.*got.*{value}"):
        AugmentedConfig(**{field: value})
