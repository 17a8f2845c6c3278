"""Retrieval-augmented inference against a dense version written from the formula."""

import numpy as np
import pytest

from xmc_jax.config import AugmentedConfig
from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import augmented


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum() if len(x) else x


def naive(labels, documents, dense, config, excluded, prior):
    """Ids and scores of one document: the formula with a dense label matrix, then what follows."""
    num_labels = dense.shape[1]
    items = [(s, 0, i) for s, i in zip(*labels) if i >= 0]
    items += [(s, 1, i) for s, i in zip(*documents) if i >= 0]
    limits = config.labels, config.documents
    if config.mode == "joint":
        mixed = sorted(items, key=lambda x: (-x[0], x[1]))[: sum(limits)]
    else:
        mixed = [x for side in (0, 1) for x in [y for y in items if y[1] == side][: limits[side]]]
    p = {}
    for sides in ((0,), (1,)) if config.separate_softmax else ((0, 1),):
        some = [x for x in mixed if x[1] in sides]
        p |= dict(zip(some, softmax(np.array([x[0] for x in some]) / config.temperature)))
    y = {}
    for item in mixed:
        _, side, number = item
        if side == 0:
            y[number] = y.get(number, 0) + config.label_weight * p[item]
            continue
        row = np.flatnonzero(dense[number])
        share = 1 / len(row) if config.normalize_rows and len(row) else 1
        for label in row:
            if not excluded[label] and (prior is None or prior[label] > 0):
                y[label] = y.get(label, 0) + (1 - config.label_weight) * p[item] * share
    if prior is not None:
        y = {label: score * prior[label] ** config.prior_weight for label, score in y.items()}
    ids = sorted(y, key=lambda label: (-y[label], label))
    ids += [i for _, side, i in items if side == 0 and i not in y]
    return ids[:num_labels], [y.get(label, 0.0) for label in ids]


def nearest(generator, m, count, K, allowed=None):
    """Random items with scores of few values, so that there are ties; some rows are short."""
    ids, scores = np.full((m, K), -1, np.int32), np.full((m, K), -np.inf, np.float32)
    for row in range(m):
        may = np.arange(count) if allowed is None else np.flatnonzero(allowed[row])
        some = generator.permutation(may)[: generator.integers(K + 1) if row else 0]
        found = np.sort(np.round(generator.uniform(-1, 1, len(some)), 1))[::-1]
        order = np.lexsort((some, -found))
        ids[row, : len(some)], scores[row, : len(some)] = some[order], found[order]
    return scores, ids


def problem(generator, documents=12, num_labels=15, m=7):
    """Nearest labels and documents, positives, dense positives, excluded as bool[m, L]."""
    dense = (generator.random((documents, num_labels)) < 0.2).astype(np.float64)
    dense[3] = 0  # a train document without positives
    excluded = generator.random((m, num_labels)) < 0.3
    excluded[2] = True
    return (
        nearest(generator, m, num_labels, 9, ~excluded),
        nearest(generator, m, documents, 8),
        sparse(dense),
        dense,
        excluded,
    )


def sparse(dense) -> Csr:
    return Csr.of_pairs(np.argwhere(dense), *dense.shape)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "joint"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("prior_weight", [None, 0.0, 0.4, -0.3])
def test_equals_the_dense_formula(monkeypatch, mode, separate, normalize, prior_weight):
    monkeypatch.setattr(augmented, "_BLOCK", 3)
    generator = np.random.default_rng(0)
    config = AugmentedConfig(
        mode=mode,
        labels=4,
        documents=3,
        temperature=0.3,
        label_weight=0.7,
        separate_softmax=separate,
        normalize_rows=normalize,
        prior_weight=prior_weight or 0.0,
    )
    for _ in range(20):
        labels, documents, positives, dense, excluded = problem(generator)
        prior = None
        if prior_weight is not None:  # of any scale; where it is 0, a label is not ranked
            prior = generator.integers(0, 4, positives.columns) * 1e3
            gone = (labels[1] < 0) | (prior[labels[1]] == 0)
            labels = np.where(gone, -np.inf, labels[0]), np.where(gone, -1, labels[1])
            order = np.argsort(gone, axis=1, kind="stable")
            labels = tuple(np.take_along_axis(x, order, axis=1) for x in labels)
        for k in (1, 5, 40):
            got_scores, got_ids = augmented.rank(
                labels, documents, positives, config, k, sparse(excluded), prior
            )
            assert got_scores.dtype == np.float32 and got_ids.dtype == np.int32
            for i in range(len(got_ids)):
                sides = (tuple(x[i] for x in found) for found in (labels, documents))
                ids, scores = naive(*sides, dense, config, excluded[i], prior)
                have = min(k, len(ids))
                np.testing.assert_allclose(got_scores[i, :have], scores[:have], rtol=1e-5)
                np.testing.assert_array_equal(got_ids[i, :have], ids[:have])
                assert (got_ids[i, have:] == -1).all()
                assert (got_scores[i, have:] == -np.inf).all()


def test_the_first_labels_do_not_depend_on_how_many_are_ranked_or_were_found():
    generator = np.random.default_rng(1)
    config = AugmentedConfig(labels=3, documents=3, separate_softmax=True)
    labels, documents, positives, _, _ = problem(generator)
    whole = augmented.rank(labels, documents, positives, config, 15)
    for k, found in ((2, 3), (3, 5), (7, 7)):
        few = augmented.rank(tuple(x[:, :found] for x in labels), documents, positives, config, k)
        for ours, of_all in zip(few, whole):
            np.testing.assert_array_equal(ours, of_all[:, :k])


def test_a_prior_of_ones_changes_no_bit():
    labels, documents, positives, _, _ = problem(np.random.default_rng(2))
    want = augmented.rank(labels, documents, positives, AugmentedConfig(), 9)
    prior = np.linspace(1, 5, positives.columns)
    weightless = AugmentedConfig(prior="a file", prior_weight=0.0)
    ones = np.ones(positives.columns)
    for config, given in ((weightless, prior), (AugmentedConfig(prior_weight=2.0), ones)):
        got = augmented.rank(labels, documents, positives, config, 9, prior=given)
        for a, b in zip(got, want):
            np.testing.assert_array_equal(a, b)


def test_the_unit_of_a_prior_does_not_matter():
    labels, documents, positives, _, _ = problem(np.random.default_rng(3))
    prior = np.random.default_rng(4).uniform(0.1, 2, positives.columns)
    config = AugmentedConfig(prior_weight=0.5)

    def ids(given):
        return augmented.rank(labels, documents, positives, config, 9, prior=given)[1]

    assert (ids(prior) != ids(None)).any()
    for unit in (1e-6, 100.0):
        np.testing.assert_array_equal(ids(unit * prior), ids(prior))


def test_a_prior_that_does_not_fit_is_named():
    labels, documents, positives, _, _ = problem(np.random.default_rng(5))
    ones = np.ones(positives.columns)

    def mix(given, /, **fields):
        config = AugmentedConfig(**fields)
        return augmented.rank(labels, documents, positives, config, 9, prior=given)

    with pytest.raises(ValueError, match=r"expected the prior 'a\.tsv', got none"):
        mix(None, prior="a.tsv")
    with pytest.raises(ValueError, match=r"a prior of 15 labels, got shape \(14,\)"):
        mix(ones[1:])
    with pytest.raises(ValueError, match=r"whose power 2 is below 3e38, got 1e\+30"):
        mix(1e30 * ones, prior_weight=2.0)
    with pytest.raises(ValueError, match="the tuned weights themselves, got only their name"):
        mix(None, weights="tuned")
