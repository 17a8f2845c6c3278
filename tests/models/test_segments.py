"""Items that share rows have the embeddings and gradients of items in rows of their own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax.config import MeshConfig
from xmc_jax.data import rows
from xmc_jax.data.types import Inputs, Prompts
from xmc_jax.models import backbone, dual, layers
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.segments import POOLINGS
from xmc_jax.runtime import sharding

N, T, K, E = 24, 9, 3, 5
ENCODER = BertConfig(vocab_size=50, hidden=16, layers=2, heads=4, ff=32, max_positions=16)
DECODER = backbone.from_hf(
    {
        "model_type": "gemma3_text",  # layers that slide, and layers that do not
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
)
TOWERS = {
    "encoder": (ENCODER, Prompts(), "image_text"),
    "text_image": (DECODER, Prompts((7, 3), (5,), (9,)), "text_image"),
    "image_text": (DECODER, Prompts((7, 3, 4), (5,), (9, 9)), "image_text"),
}


def items(images, shortest=1):
    rng = np.random.default_rng(0)
    lengths = rng.integers(shortest, T + 1, N, np.int32)
    inputs = Inputs(rng.integers(0, 50, (N, T), np.int32), lengths)
    if not images:
        return inputs
    vectors = rng.standard_normal((N, K, E)).astype(np.float16)
    return inputs.replace(images=vectors, image_count=rng.integers(0, K + 1, N, np.int32))


def tower(name, images, **fields):
    return dual.DualEncoder(TOWERS[name][0], image_width=E if images else 0, **fields)


def apart(name, inputs, positions="contiguous"):
    """Each item in a row of its own."""
    _, prompts, order = TOWERS[name]
    return rows.one_each(inputs, prompts, order, positions)


def packed(name, inputs, positions="contiguous", groups=1, spare=1):
    """Items that share rows of 64 places; some rows are empty."""
    _, prompts, order = TOWERS[name]
    images = 0 if inputs.images is None else K
    layout = rows.layout(prompts, order, positions, T, images, 64)
    group = np.arange(N) // (N // groups)
    fitted = rows.fit(layout, layout.own_tokens(inputs), group)
    return rows.compose(layout, inputs, fitted, fitted.rows + spare, groups=groups)


@functools.partial(jax.jit, static_argnums=0)
def embed(model, params, inputs):
    """Embeddings alone."""
    return model.apply({"params": params}, inputs, method="encode").unit


@functools.partial(jax.jit, static_argnums=0)
def encode(model, params, inputs):
    """Embeddings, and the gradient of a function of all of them."""

    def value(params):
        unit = model.apply({"params": params}, inputs, method="encode").unit
        return (unit * jnp.sin(jnp.arange(unit.size)).reshape(unit.shape)).sum(), unit

    return jax.value_and_grad(value, has_aux=True)(params)


def params(model):
    drawn = jax.jit(lambda: dual.init_params(model, 0))()
    leaves, tree = jax.tree.flatten(dual.nn.unbox(drawn))
    rng = np.random.default_rng(0)
    return tree.unflatten([0.3 * rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


def assert_alike(ours, theirs):
    (_, unit), grads = ours
    (_, expected), expected_grads = theirs
    np.testing.assert_allclose(unit, expected, rtol=0, atol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_grads))
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize(
    ("name", "images", "pooling", "positions"),
    [
        ("encoder", False, "mean", "contiguous"),
        pytest.param("encoder", True, "cls", "padded", marks=pytest.mark.slow),
        pytest.param("encoder", True, "last", "contiguous", marks=pytest.mark.scale),
        pytest.param("text_image", True, "mean", "padded", marks=pytest.mark.slow),
        pytest.param("text_image", False, "cls", "contiguous", marks=pytest.mark.scale),
        pytest.param("image_text", True, "last", "contiguous", marks=pytest.mark.slow),
        ("text_image", False, "max", "contiguous"),
    ],
)
def test_as_with_padding(name, images, pooling, positions):
    model, inputs = tower(name, images, pooling=pooling), items(images)
    weights, shared = params(model), packed(name, inputs, positions)
    assert len(shared.tokens) <= N // 2
    expected = encode(model, weights, apart(name, inputs, positions))
    assert_alike(encode(model, weights, shared), expected)


@pytest.mark.slow
@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_item_without_a_token_is_the_head(pooling):
    name = "bare"
    TOWERS[name] = (DECODER, Prompts(head=(7, 3)), "image_text")
    model, inputs = tower(name, False, pooling=pooling), items(False, shortest=0)
    assert (inputs.lengths == 0).any()
    weights = params(model)
    expected = embed(model, weights, apart(name, inputs))
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).max() < 1e-5
    np.testing.assert_allclose(
        embed(model, weights, packed(name, inputs)), expected, rtol=0, atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("images", [False, True])
def test_rows_added_to_one_by_one_are_those_of_tokens_or_all_different(images):
    """Of positions each row would be added to by every sequence, which is slow on GPUs."""
    model = tower("encoder", images)
    program = encode.lower(model, params(model), packed("encoder", items(images))).as_text()
    written = re.findall(r'"stablehlo\.scatter".*?\}\) : \(tensor<([\dx]+)xf32>', program, re.S)
    different = re.findall(r'"stablehlo\.scatter".*?unique_indices = (\w+)', program, re.S)
    contended = [shape for shape, unique in zip(written, different) if unique == "false"]
    assert contended == [f"{ENCODER.vocab_size}x{ENCODER.hidden}"]
    # Read are tokens and slots; nothing is in a layer.
    program = embed.lower(model, params(model), packed("encoder", items(images))).as_text()
    assert program.count('"stablehlo.gather"') == 2


def test_where_there_is_no_token_nothing_is_looked_up():
    table, tokens = jnp.arange(1.0, 7).reshape(3, 2), jnp.array([[2, -1, 0, -1]])
    found, backward = jax.vjp(lambda table: layers.lookup(table, tokens), table)
    np.testing.assert_array_equal(found, [[[5, 6], [0, 0], [1, 2], [0, 0]]])
    (gradient,) = backward(jnp.where(tokens[..., None] < 0, jnp.nan, 2.0) * jnp.ones(2))
    np.testing.assert_array_equal(gradient, [[2, 2], [0, 0], [2, 2]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("encoder", False), ("image_text", True)])
def test_each_device_has_rows_of_its_own(name, images):
    model, inputs = tower(name, images), items(images)
    weights, mesh = params(model), sharding.make_mesh(MeshConfig(4, 2, 1))
    expected = encode(model, weights, apart(name, inputs))
    shared = packed(name, inputs, groups=8)
    shared = jax.device_put(shared, sharding.of_batch(shared, mesh))
    step = jax.jit(sharding.under(mesh, lambda w, i: encode.__wrapped__(model, w, i)))
    assert_alike(step(weights, shared), expected)
    # Nothing of a batch's tokens leaves its device: what is gathered is smaller than one part.
    text = step.lower(weights, shared).compile().as_text()
    part = shared.tokens.size // 8 * 16
    for line in text.splitlines():
        if "= f32[" in line and ("all-gather(" in line or "all-to-all(" in line):
            shape = [int(n) for n in line.split("= f32[")[1].split("]")[0].split(",") if n]
            assert np.prod(shape) < part, line


@pytest.mark.parametrize("name", ["encoder", pytest.param("image_text", marks=pytest.mark.slow)])
def test_where_there_is_no_item_nothing_takes_part(name):
    model, inputs = tower(name, False), items(False)
    weights, (_, prompts, order) = params(model), TOWERS[name]
    layout = rows.layout(prompts, order, "contiguous", T, 0, 64)
    fitted = rows.fit(layout, layout.own_tokens(inputs))
    at = np.flatnonzero(np.arange(2 * N) % 3 != 0)[:N]
    some = rows.compose(layout, inputs, fitted, fitted.rows, at, (2 * N,))
    (_, unit), grads = encode(model, weights, some)
    expected = embed(model, weights, apart(name, inputs))
    np.testing.assert_allclose(unit[at], expected, rtol=0, atol=1e-6)
    assert not np.delete(unit, at, axis=0).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "image_text"])
def test_what_is_not_finite_stays_with_its_item(name):
    model, inputs = tower(name, True), items(True)
    bad = int(np.flatnonzero(inputs.image_count)[0])
    weights, before = params(model), packed(name, inputs)
    inputs.images[bad, 0] = np.inf
    unit = np.asarray(embed(model, weights, packed(name, inputs)))
    assert np.isnan(unit[bad]).all()
    rest = np.arange(N) != bad
    np.testing.assert_allclose(unit[rest], embed(model, weights, before)[rest], rtol=0, atol=1e-6)


def test_dropout_drops_anew_in_each_place():
    model, inputs = tower("encoder", False), packed("encoder", items(False))
    same = inputs.replace(tokens=np.where(inputs.tokens < 0, -1, 7))

    @jax.jit
    def dropped(key):
        rngs = {"dropout": key}
        variables = {"params": params(model)}
        return model.apply(variables, same, False, rngs=rngs, method="encode").unit

    first, again = dropped(jax.random.key(1)), dropped(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.asarray(first).round(4), axis=0)) == N
