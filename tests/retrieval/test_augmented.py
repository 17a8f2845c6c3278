"""Retrieval-augmented inference against a dense version written from the formula."""

import numpy as np
import pytest

from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import augmented
from xmc_jax.retrieval.augmented import AugmentedConfig


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum() if len(x) else x


def naive(scores, ids, dense, config):
    """f64[L] of one document: the formula, with a dense label matrix."""
    num_labels = dense.shape[1]
    kept = ids >= 0
    if config.separate_softmax:
        p = np.zeros(len(ids))
        for side in (kept & (ids < num_labels), ids >= num_labels):
            p[side] = softmax(scores[side] / config.temperature)
    else:
        p = np.zeros(len(ids))
        p[kept] = softmax(scores[kept] / config.temperature)
    y = np.zeros(num_labels)
    for item, weight in zip(ids[kept], p[kept]):
        if item < num_labels:
            y[item] += config.label_weight * weight
        else:
            row = dense[item - num_labels]
            if config.normalize_rows:
                row = row / max(row.sum(), 1)
            y += (1 - config.label_weight) * weight * row
    return y


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
    scores = generator.uniform(-1, 1, ids.shape).astype(np.float32)
    missing = generator.random(ids.shape) < 0.2
    missing[0] = True  # nothing found at all
    missing[1, :labels] = True  # no label found
    ids[missing], scores[missing] = -1, -np.inf
    return scores, ids, positives, dense


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_equals_the_dense_formula(monkeypatch, separate, normalize):
    monkeypatch.setattr(augmented, "_BLOCK", 3)
    config = AugmentedConfig(
        temperature=0.3, label_weight=0.7, separate_softmax=separate, normalize_rows=normalize
    )
    generator = np.random.default_rng(0)
    for _ in range(50):
        scores, ids, positives, dense = problem(generator)
        got_scores, got_ids = augmented.augment(scores, ids, positives, config, 9)
        for i in range(len(ids)):
            want = naive(scores[i].astype(np.float64), ids[i], dense, config)
            have = min(9, int((want > 0).sum()))
            order = np.argsort(-want, kind="stable")[:have]
            np.testing.assert_allclose(got_scores[i, :have], want[order], rtol=1e-6)
            np.testing.assert_allclose(want[got_ids[i, :have]], want[order], rtol=1e-12)
            assert len(set(got_ids[i, :have])) == have
            assert (got_ids[i, have:] == -1).all()
            assert (got_scores[i, have:] == -np.inf).all()


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
    [("mode", "both"), ("labels", 0), ("temperature", 0.0), ("label_weight", 1.5)],
)
def test_bad_config_names_its_field(field, value):
    with pytest.raises(ValueError, match=rf"eval\.augmented.*{field}.*got.*{value}"):
        AugmentedConfig(**{field: value})
