"""Packed sequences: embeddings and gradients are those of padded ones, whatever the room."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmc_jax import sharding
from xmc_jax.models import decoder_config, dual, layers, packing
from xmc_jax.models.bert import BertConfig
from xmc_jax.types import Inputs, Packing, Prompts, own_tokens

N, T, K, E = 24, 9, 3, 5
ENCODER = BertConfig(vocab_size=50, hidden=16, layers=2, heads=4, ff=32, max_positions=16)
DECODER = decoder_config.from_hf(
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
    "encoder": {"sizes": ENCODER},
    "text_image": {"sizes": DECODER, "order": "text_image", "prompts": Prompts((7, 3), (5,), (9,))},
    "image_text": {"sizes": DECODER, "prompts": Prompts((7, 3, 4), (5,), (9, 9))},
}


def items(images):
    rng = np.random.default_rng(0)
    inputs = Inputs(rng.integers(0, 50, (N, T), np.int32), rng.integers(1, T + 1, N, np.int32))
    if not images:
        return inputs
    vectors = rng.standard_normal((N, K, E)).astype(np.float16)
    return inputs.replace(images=vectors, image_count=rng.integers(0, K + 1, N, np.int32))


def tower(name, images, **fields):
    return dual.DualEncoder(**TOWERS[name], image_width=E if images else 0, **fields)


def room(model, inputs, groups=1, spare=0, padded=False) -> Packing:
    """Two classes that just fit, and the tokens that do."""
    lengths = np.asarray(own_tokens(inputs.lengths, inputs.image_count, model.prompts))
    lengths = np.sort(lengths.reshape(groups, -1), axis=1)
    half = lengths.shape[1] // 2
    first, last = lengths[:, :half].max(), lengths.max()
    classes = (half, int(first)), (lengths.shape[1] - half, int(last))
    tokens = sum(c * w for c, w in classes) if padded else int(lengths.sum(axis=1).max()) + spare
    return Packing(tokens, classes)


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
        pytest.param("text_image", False, "cls", "contiguous", marks=pytest.mark.slow),
        pytest.param("image_text", True, "last", "contiguous", marks=pytest.mark.slow),
        ("text_image", False, "max", "contiguous"),
    ],
)
def test_as_with_padding(name, images, pooling, positions):
    model, inputs = tower(name, images, pooling=pooling, positions=positions), items(images)
    weights = params(model)
    expected = encode(model, weights, inputs)
    for shape in (room(model, inputs, spare=3), room(model, inputs, padded=True)):
        assert_alike(encode(model, weights, inputs.replace(packing=shape)), expected)


def test_of_tables_only_that_of_tokens_has_rows_added_to_it_one_by_one():
    """Of S positions each row would be added to by every sequence, which is slow on GPUs."""
    model, inputs = tower("encoder", False), items(False)
    inputs = inputs.replace(packing=room(model, inputs, spare=3))
    program = encode.lower(model, params(model), inputs).as_text()
    assert '"stablehlo.scatter"' in program
    rows = r"tensor<[\dx]+xi32>, tensor<[\dx]+xf32>\)"  # their numbers, and what is added to each
    added_to = re.findall(rf"\}}\) : \(tensor<([\dx]+)xf32>, {rows}", program)
    assert added_to == [f"{ENCODER.vocab_size}x{ENCODER.hidden}"]


def test_where_there_is_no_token_nothing_is_looked_up():
    table, tokens = jnp.arange(1.0, 7).reshape(3, 2), jnp.array([[2, -1, 0, -1]])
    rows, backward = jax.vjp(lambda table: layers.lookup(table, tokens), table)
    np.testing.assert_array_equal(rows, [[[5, 6], [0, 0], [1, 2], [0, 0]]])
    (gradient,) = backward(jnp.where(tokens[..., None] < 0, jnp.nan, 2.0) * jnp.ones(2))
    np.testing.assert_array_equal(gradient, [[2, 2], [0, 0], [2, 2]])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "images"), [("encoder", False), ("image_text", True)])
def test_each_device_packs_its_own_part(name, images):
    model, inputs = tower(name, images), items(images)
    weights, mesh = params(model), sharding.make_mesh(sharding.MeshConfig(4, 2, 1))
    expected = encode(model, weights, inputs)
    packed = inputs.replace(packing=room(model, inputs, groups=8))
    packed = jax.device_put(packed, sharding.of_batch(packed, mesh))
    step = jax.jit(sharding.under(mesh, lambda w, i: encode.__wrapped__(model, w, i)))
    assert_alike(step(weights, packed), expected)
    # Nothing of a batch's tokens leaves its device: what is gathered is smaller than one part.
    text = step.lower(weights, packed).compile().as_text()
    part = packed.packing.tokens * 16
    for line in text.splitlines():
        if "= f32[" in line and ("all-gather(" in line or "all-to-all(" in line):
            shape = [int(n) for n in line.split("= f32[")[1].split("]")[0].split(",") if n]
            assert np.prod(shape) < part, line


@pytest.mark.parametrize("name", ["encoder", pytest.param("image_text", marks=pytest.mark.slow)])
def test_where_there_is_no_item_nothing_takes_part(name):
    model, inputs = tower(name, False), items(False)
    weights, absent = params(model), np.arange(N) % 5 == 0
    there = jax.tree.map(lambda x: x[~absent], inputs)
    expected = embed(model, weights, there)
    shape = room(model, there)
    (count, width), last = shape.classes
    shape = Packing(shape.tokens, ((count + absent.sum(), width), last))
    lengths = np.where(absent, -1, inputs.lengths).astype(np.int32)
    (_, unit), grads = encode(model, weights, inputs.replace(lengths=lengths, packing=shape))
    np.testing.assert_allclose(unit[~absent], expected, rtol=0, atol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_what_has_no_room_shows():
    model, inputs = tower("encoder", False), items(False)
    weights, shape = params(model), room(model, inputs)
    short = Packing(shape.tokens - 1, shape.classes)
    (count, width), last = shape.classes
    narrow = Packing(shape.tokens, ((count, width - 1), last))
    for room_ in (short, narrow):
        assert np.isnan(embed(model, weights, inputs.replace(packing=room_))).all()
    with pytest.raises(ValueError, match="expected classes of 24 sequences in 1 groups"):
        embed(model, weights, inputs.replace(packing=Packing(9, ((3, 3),))))


def test_dropout_is_that_of_padded_sequences():
    model, inputs = tower("encoder", False), items(False)
    weights = params(model)

    @jax.jit
    def dropped(inputs):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply({"params": weights}, inputs, False, rngs=rngs, method="encode").unit

    expected = dropped(inputs)
    packed = dropped(inputs.replace(packing=room(model, inputs, spare=5)))
    np.testing.assert_allclose(packed, expected, rtol=0, atol=1e-5)
    assert np.abs(expected - embed(model, weights, inputs)).max() > 0.1


def test_rows_that_are_moved_have_the_gradient_of_a_gather():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 3)).astype(np.float32)
    source = np.stack([rng.permutation(9) for _ in range(2)])[:, :6].astype(np.int32)  # 7, 8: none
    target = np.full((2, 7), 6, np.int32)
    for g in range(2):
        for i, j in enumerate(source[g]):
            if j < 7:
                target[g, j] = i
    weight = rng.standard_normal((2, 6, 3)).astype(np.float32)
    value, grad = jax.value_and_grad(lambda x: (packing.moved(x, source, target) * weight).sum())(x)
    expected, grads = 0.0, np.zeros_like(x)
    for g in range(2):
        for i, j in enumerate(source[g]):
            if j < 7:
                expected += (x[g, j] * weight[g, i]).sum()
                grads[g, j] = weight[g, i]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(grad, grads)
