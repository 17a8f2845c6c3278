"""The dual encoder and the combiner without torch."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.padded_rows import places_of, rows_of
from xmc_jax.config import MeshConfig, PrimeConfig
from xmc_jax.models import dual
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.combiner import SumCombiner
from xmc_jax.models.layers import normalize
from xmc_jax.runtime import sharding

TINY = BertConfig(vocab_size=50, hidden=16, layers=2, heads=4, ff=32, max_positions=12)


def prime_model(**kwargs):
    prime = PrimeConfig(heads=4, ff_dim=24)
    return dual.DualEncoder(TINY, prime=prime, num_free_vectors=10, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed=0):
    return nn.unbox(dual.init_params(model, seed))


def test_parameter_tree_and_shardings():
    model = prime_model()
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    assert set(boxed) == {"backbone", "combiner", "free_vectors"}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = sharding.of_params(boxed, mesh)
    P = jax.sharding.PartitionSpec
    assert shardings["backbone"]["layers"]["query"]["kernel"].spec == P(
        None, ("fsdp",), ("tensor",)
    )
    assert shardings["backbone"]["layers"]["down"]["kernel"].spec == P(None, ("tensor",), ("fsdp",))
    assert shardings["backbone"]["token_embedding"].spec == P(None, ("tensor", "fsdp"))
    assert shardings["free_vectors"].spec == P(None, ("tensor", "data", "fsdp"))
    without = jax.eval_shape(lambda: dual.init_params(dual.DualEncoder(TINY), 0))
    assert set(without) == {"backbone"}


@pytest.mark.slow
def test_init_is_a_function_of_the_seed_and_of_xavier_bound():
    first, other = init(prime_model(), 0), init(prime_model(), 1)
    # the backbone is drawn alike with and without PRIME
    alone = init(dual.DualEncoder(TINY), 0)
    jax.tree.map(np.testing.assert_array_equal, first["backbone"], alone["backbone"])
    assert np.abs(first["free_vectors"] - other["free_vectors"]).max() > 0
    bound = np.sqrt(6 / (10 + 16))
    assert 0.9 * bound < np.abs(first["free_vectors"]).max() <= bound
    # layers of the stack are drawn apart
    kernel = first["backbone"]["layers"]["up"]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0


@pytest.mark.slow
def test_prototypes_are_unit_and_use_the_rows_asked_for():
    model = prime_model()
    params = init(model)
    pooled, centroids = jax.random.normal(jax.random.key(0), (2, 5, 16))
    ids = jnp.array([3, 3, 0, 9, 1])

    @functools.partial(jax.jit, static_argnums=1)
    def prototype(params, deterministic=True):
        return model.apply(
            {"params": params},
            pooled,
            ids,
            centroids,
            deterministic,
            method="prototype",
            rngs={"dropout": jax.random.key(0)},
        )

    z = prototype(params)
    assert z.shape == (5, 16) and z.dtype == jnp.float32
    np.testing.assert_allclose(np.linalg.norm(z, axis=-1), 1, atol=1e-6)
    moved = params | {"free_vectors": params["free_vectors"].at[3].add(1.0)}
    changed = np.abs(prototype(moved) - z).max(-1) > 1e-4
    np.testing.assert_array_equal(changed, ids == 3)
    assert np.abs(prototype(params, False) - z).max() > 1e-3


def test_mean_pooling_counts_real_tokens_only():
    model = dual.DualEncoder(TINY)
    params = {"backbone": init(prime_model())["backbone"]}
    tokens, lengths = jnp.arange(1, 13)[None] % 50, jnp.array([5])

    @jax.jit
    def both(params):
        def encode(model):
            return model.backbone(*places_of(tokens, lengths)), model.encode(
                rows_of(tokens, lengths)
            )

        return model.apply({"params": params}, method=encode)

    hidden, out = both(params)
    np.testing.assert_allclose(out.pooled[0], np.mean(hidden[0, :5], axis=0), atol=1e-6)
    np.testing.assert_allclose(out.unit, out.pooled / np.linalg.norm(out.pooled), atol=1e-6)


def test_normalize_of_zero_is_zero_with_a_finite_gradient():
    np.testing.assert_array_equal(normalize(jnp.zeros((1, 4))), np.zeros((1, 4)))
    assert np.isfinite(jax.grad(lambda x: normalize(x).sum())(jnp.zeros(4))).all()


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    model = prime_model()
    params = init(model)
    tokens = jax.random.randint(jax.random.key(0), (16, 12), 1, 50)
    inputs = rows_of(tokens, jnp.arange(16) % 12 + 1)
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode").unit)
    expected = encode(params, inputs)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.of_params(boxed, mesh))
        inputs = inputs.replace(slots=np.arange(16) % 4)  # of each of four groups
        inputs = jax.device_put(inputs, sharding.of_batch(inputs, mesh))
        np.testing.assert_allclose(encode(spread, inputs), expected, rtol=0, atol=1e-5)


def test_sum_combiner_adds_unit_text_free_vector_and_unit_centroid():
    rng = np.random.default_rng(0)
    pooled, free, centroid = rng.normal(size=(3, 5, 8)).astype(np.float32)
    centroid[2] = 0  # a label without documents

    def length_one(x):
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    out = SumCombiner().apply({}, 7 * pooled, free, centroid)
    expected = length_one(length_one(pooled) + free + length_one(centroid))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"HIGHEST"}),
        ({"precision": "high"}, {"HIGH"}),
        ({"compute_dtype": "bfloat16"}, {"DEFAULT"}),
    ],
)
def test_products_name_their_precision(fields, expected):
    """Of the tower, of label prototypes, and of both backward passes.

    Those that choose positions and that sum tokens are exact whatever is asked for.
    """
    model = prime_model(**fields)
    inputs = rows_of(jnp.ones((2, 3), jnp.int32), jnp.array([2, 3]))

    def value(params):
        pooled = model.apply({"params": params}, inputs, method="encode").pooled
        arguments = pooled, jnp.arange(2), pooled
        return model.apply({"params": params}, *arguments, method="prototype").sum()

    program = jax.jit(jax.grad(value)).lower(jax.eval_shape(init, model)).as_text()
    products = [line for line in program.splitlines() if "stablehlo.dot_general" in line]
    found = [re.search(r"precision = \[(\w+), (\w+)\]", line) for line in products]
    named = [match[1] if match else "DEFAULT" for match in found]
    assert {*named} - {"HIGHEST"} == expected - {"HIGHEST"}
    assert expected == {"HIGHEST"} or named.count("HIGHEST") == 4
    assert len(products) > 3 * 6  # kernels of a layer, forwards and both ways backwards


@pytest.mark.parametrize(
    ("heads", "free_vectors", "message"),
    [
        (3, 1, "prime.heads: expected a divisor of D = 16, got 3"),
        (4, 0, "at least one free vector, got 0"),
    ],
)
def test_prototypes_that_cannot_be_made_are_refused(heads, free_vectors, message):
    prime = PrimeConfig(heads=heads)
    model = dual.DualEncoder(TINY, prime=prime, num_free_vectors=free_vectors)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: dual.init_params(model, 0))
