"""Prototypes of new labels against loops written from the definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import MeshConfig, NewLabelsConfig
from xmc_jax.models.combiner import SumCombiner, TransformerCombiner
from xmc_jax.retrieval import exact, new_labels
from xmc_jax.runtime import sharding

D = 8


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def add_up(pooled, free, centroids):
    """The sum combiner, as its docstring defines it."""
    return unit(unit(pooled) + free + unit(centroids))


def naive(new, known, free, centroids, config, combine):
    """f64[n, D], label by label: all cosines, a sort, a softmax over what is near enough."""
    rows = []
    for text in new.astype(np.float64):
        cosines = known.astype(np.float64) @ unit(text)
        near = np.argsort(-cosines, kind="stable")[: config.neighbours]
        near = [i for i in near if cosines[i] >= config.threshold]
        row = unit(text)
        if config.how == "nearest" and near:
            weights = np.exp(cosines[near] / config.temperature)
            weights /= weights.sum()
            borrowed = (weights @ table[near].astype(np.float64) for table in (free, centroids))
            row = combine(text, *borrowed)
        rows.append(config.scale * row)
    return np.array(rows)


def made(new, known, free, centroids, config, combine):
    found = new_labels.nearest(new, known, config)
    tables = (new_labels.borrowed(found, table) for table in (free, centroids))
    return new_labels.prototypes(new, *tables, found, combine, config)


@pytest.fixture
def labels():
    """Texts of 9 new labels; unit texts, free vectors and centroids of 30 trained ones."""
    return 3 * drawn(0, 9, D), unit(drawn(1, 30, D)), drawn(2, 30, D), 0.7 * unit(drawn(3, 30, D))


@pytest.mark.parametrize(
    "config",
    [
        NewLabelsConfig(how="text", scale=0.9),
        NewLabelsConfig(neighbours=1, threshold=-1, scale=1),
        NewLabelsConfig(neighbours=1, threshold=0.6, scale=1),
        NewLabelsConfig(neighbours=4, threshold=0.6, temperature=0.05, scale=0.8),
        NewLabelsConfig(neighbours=100, threshold=-1, temperature=0.3, scale=1.1),
    ],
)
def test_equals_loops_over_labels(monkeypatch, labels, config):
    monkeypatch.setattr(new_labels, "_BLOCK", 4)
    got = made(*labels, config, add_up)
    np.testing.assert_allclose(got, naive(*labels, config, add_up), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), config.scale, rtol=1e-5)
    assert got.dtype == np.float32


def test_a_threshold_parts_the_labels(labels):
    """So that the test above has labels of both kinds, and with some of their neighbours."""
    new, known, *_ = labels
    found = new_labels.nearest(new, known, NewLabelsConfig(neighbours=4, threshold=0.6))
    assert 0 < found.has_neighbour.sum() < len(new)
    assert {0, 1, 2} < set((found.weights > 0).sum(axis=1))
    np.testing.assert_allclose(found.weights.sum(axis=1), found.has_neighbour, rtol=1e-6)
    cosines = np.take_along_axis(unit(new) @ known.T, found.ids, axis=1)
    np.testing.assert_array_equal(found.weights > 0, cosines >= 0.6)
    assert (np.diff(cosines, axis=1) <= 0).all()


def test_a_copy_of_a_trained_label_has_its_prototype(labels):
    _, known, free, centroids = labels
    config = NewLabelsConfig(neighbours=1, threshold=0.99, scale=1)
    copies = 5 * known[[7, 0, 29]]
    got = made(copies, known, free, centroids, config, add_up)
    want = add_up(known, free, centroids)[[7, 0, 29]]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_texts_alone_are_a_sum_of_nothing_else(labels):
    """What a label without neighbours has is by definition what the sum gives of zeros."""
    new, *tables = labels
    got = made(new, *tables, NewLabelsConfig(how="text", scale=1), None)
    zeros = jnp.zeros_like(new)
    want = SumCombiner().apply({}, jnp.asarray(new), zeros, zeros)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("kind", [SumCombiner(), TransformerCombiner(2, 16, 0.1)])
def test_combiners_get_texts_before_normalisation(labels, kind):
    new, known, free, centroids = labels
    params = jax.jit(kind.init)(jax.random.key(0), *(jnp.zeros((1, D)),) * 3)
    combine = jax.jit(lambda *vectors: kind.apply(params, *vectors))

    def one(*vectors):
        return np.asarray(combine(*(np.float32(x)[None] for x in vectors)), np.float64)[0]

    config = NewLabelsConfig(neighbours=3, threshold=0.5, scale=1)
    got = made(new, known, free, centroids, config, combine)
    want = naive(new, known, free, centroids, config, one)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    # Those of PRIME's network depend on the length of the text embedding, the sum's do not.
    doubled = made(2 * new, known, free, centroids, config, combine)
    assert np.allclose(doubled, got, atol=1e-5) == isinstance(kind, SumCombiner)


def test_shared_free_vectors_are_looked_up(labels):
    new, known, free, _ = labels
    found = new_labels.nearest(new, known, NewLabelsConfig(neighbours=3))
    row_of = np.random.default_rng(0).integers(5, size=30).astype(np.int32)
    np.testing.assert_array_equal(
        new_labels.borrowed(found, free[:5], row_of), new_labels.borrowed(found, free[:5][row_of])
    )


def test_tables_may_be_bfloat16(labels):
    new, known, _, centroids = labels
    found = new_labels.nearest(new, known, NewLabelsConfig(neighbours=3))
    narrow = np.asarray(jnp.asarray(centroids, jnp.bfloat16))
    got = new_labels.borrowed(found, narrow)
    np.testing.assert_array_equal(got, new_labels.borrowed(found, narrow.astype(np.float32)))
    assert got.dtype == np.float32


def test_a_database_on_the_devices_serves(labels):
    new, known, *_ = labels
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    config = NewLabelsConfig(neighbours=3)
    want, got = (
        new_labels.nearest(new, database, config) for database in (known, exact.place(known, mesh))
    )
    np.testing.assert_array_equal(got.ids, want.ids)
    np.testing.assert_allclose(got.weights, want.weights, rtol=1e-5)


def test_no_labels_at_all(labels):
    _, *tables = labels
    assert made(np.zeros((0, D)), *tables, NewLabelsConfig(), add_up).shape == (0, D)


def test_texts_of_another_width_are_refused(labels):
    _, known, *_ = labels
    with pytest.raises(ValueError, match=r"expected queries \[Q, 8\], got shape \(2, 4\)"):
        new_labels.nearest(drawn(0, 2, 4), known, NewLabelsConfig())


def test_prototypes_are_not_taken_for_texts(labels):
    new, known, *_ = labels
    with pytest.raises(ValueError, match=r"expected unit text embeddings .* row 3 of length 2"):
        lengths = np.where(np.arange(30) == 3, 2, 1)[:, None]
        new_labels.nearest(new, known * lengths, NewLabelsConfig())
