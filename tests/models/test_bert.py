"""Encoders without torch: golden files, invariances, dropout, configurations."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_models import ENCODERS, golden
from tests.golden_models import FOLDER as GOLDEN
from tests.padded_rows import places_of, rows_of
from xmc_jax.data import packaged
from xmc_jax.models import backbone, bert, dual, hf, hf_weights, layers


@functools.partial(jax.jit, static_argnums=0)
def hidden_states(config, params, tokens, lengths):
    return bert.Bert(config).apply(
        {"params": params}, *places_of(tokens, lengths), hidden_states=True
    )


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(model, params, inputs, deterministic=True, key=None):
    return model.apply(
        {"params": {"backbone": params}},
        inputs,
        deterministic,
        rngs=None if key is None else {"dropout": key},
        method="encode",
    )


@pytest.mark.parametrize("family", ENCODERS)
def test_golden_hidden_states(family):
    config, params, file = golden(family)
    assert config.layers == 2
    hidden, states = hidden_states(config, params, file["tokens"], file["lengths"])
    real = (np.arange(file["tokens"].shape[1]) < file["lengths"][:, None])[None, ..., None]
    np.testing.assert_allclose(states * real, file["hidden_states"] * real, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(hidden, states[-1])


@pytest.mark.slow
def test_golden_minilm_embeddings():
    source = hf.resolve(packaged.MINILM_NAME)
    config = hf.load_config(source)
    file = np.load(GOLDEN / "minilm.npz")
    inputs = rows_of(file["tokens"], file["lengths"])
    out = encode(dual.DualEncoder(config), hf_weights.load_params(source, config), inputs)
    np.testing.assert_allclose(out.unit, file["embeddings"], rtol=0, atol=1e-5)


def test_packaged_minilm_is_found():
    assert (packaged.minilm() / "model.safetensors").is_file()
    assert (
        hf.load_config(hf.ModelSource(packaged.minilm(), "minilm", None, ""), layers=3).layers == 3
    )


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("bert", "mean"), pytest.param("distilbert", "cls", marks=pytest.mark.slow)],
)
def test_embedding_is_the_same_alone_in_any_batch_and_at_any_padding(family, pooling):
    config, params, file = golden(family)
    tokens, lengths = file["tokens"], file["lengths"]
    model = dual.DualEncoder(config, pooling=pooling)

    def pooled(tokens, lengths):
        return encode(model, params, rows_of(tokens, lengths)).pooled

    together = pooled(tokens, lengths)
    for T in (9, 24):
        # what stands past a text's length must not matter: fill it with tokens
        padded = np.full((len(tokens), T), 7, np.int32)
        for row, (text, length) in enumerate(zip(tokens, lengths)):
            padded[row, :length] = text[:length]
        np.testing.assert_allclose(pooled(padded, lengths), together, rtol=0, atol=1e-5)
        np.testing.assert_allclose(
            pooled(padded[::-1], lengths[::-1])[::-1], together, rtol=0, atol=1e-5
        )
    for row, length in list(enumerate(lengths))[::3]:
        alone = pooled(tokens[row : row + 1, :length], lengths[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-5)


def test_first_layers_are_the_first_layers():
    config, params, file = golden("bert")
    source = hf.resolve(str(GOLDEN / "bert"))
    one = hf.load_config(source, layers=1)
    _, states = hidden_states(
        one, hf_weights.load_params(source, one), file["tokens"], file["lengths"]
    )
    _, expected = hidden_states(config, params, file["tokens"], file["lengths"])
    assert states.shape[0] == 2
    np.testing.assert_allclose(states, expected[:2], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_remat_changes_no_gradient():
    config, params, file = golden("bert")

    def gradient(remat):
        model = dual.DualEncoder(config, remat=remat)

        def loss(params):
            out = model.apply(
                {"params": {"backbone": params}},
                rows_of(file["tokens"], file["lengths"]),
                False,
                rngs={"dropout": jax.random.key(0)},
                method="encode",
            )
            return jnp.square(out.pooled).sum()

        return jax.jit(jax.grad(loss))(params)

    kept = jax.tree.leaves(gradient("none"))
    largest = max(np.abs(leaf).max() for leaf in kept)
    for remat in ("nothing_saveable", "projections"):  # the others: tests of decoders
        for ours, expected in zip(jax.tree.leaves(gradient(remat)), kept):
            # The biases of keys have a gradient of rounding errors alone.
            scale = max(np.abs(expected).max(), 1e-2 * largest)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * scale)


def test_bfloat16_is_close_and_pools_in_float32():
    config, params, file = golden("bert")
    inputs = rows_of(file["tokens"], file["lengths"])
    exact = encode(dual.DualEncoder(config), params, inputs)
    rounded = encode(dual.DualEncoder(config, compute_dtype="bfloat16"), params, inputs)
    assert rounded.unit.dtype == rounded.pooled.dtype == jnp.float32
    apply = bert.Bert(config, jnp.bfloat16).apply
    hidden = jax.eval_shape(apply, {"params": params}, *inputs_of(file))
    assert hidden.dtype == jnp.bfloat16
    assert (np.asarray(exact.unit) * np.asarray(rounded.unit)).sum(-1).min() > 0.995


def inputs_of(file):
    return places_of(file["tokens"], file["lengths"])


def test_dropout_mask_is_bernoulli_and_a_function_of_the_seed():
    seeds = jax.random.bits(jax.random.key(0), (2, 2), jnp.uint32)
    x = jnp.ones((1000, 1000))
    a, b = (np.asarray(layers.dropout(x, 0.1, seed)) for seed in seeds)
    np.testing.assert_array_equal(a, layers.dropout(x, 0.1, seeds[0]))
    assert set(np.unique(a)) == {np.float32(0), np.float32(1) / np.float32(0.9)}
    dropped = a == 0
    sigma = np.sqrt(0.1 * 0.9 / a.size)
    assert abs(dropped.mean() - 0.1) < 5 * sigma
    # rows and columns each have the spread of independent draws
    for axis in (0, 1):
        chi2 = np.square(dropped.sum(axis) - 100).sum() / 90
        assert 800 < chi2 < 1220
    # no dependence on neighbours near or far, nor between seeds
    both = [(dropped[:, d:] & dropped[:, : 1000 - d]).mean() for d in (1, 2, 16, 256)]
    both += [(dropped[d:] & dropped[:-d]).mean() for d in (1, 8, 128)]
    both += [(dropped & (b == 0)).mean()]
    np.testing.assert_allclose(both, 0.01, rtol=0, atol=5 * np.sqrt(0.01 / 7e5))


@pytest.mark.slow
def test_dropout_of_the_encoder():
    config, params, file = golden("bert")
    model = dual.DualEncoder(config)

    def unit(key, deterministic=False):
        return encode(
            model, params, rows_of(file["tokens"], file["lengths"]), deterministic, key
        ).unit

    key = jax.random.key(3)
    np.testing.assert_array_equal(unit(key), unit(key))
    assert np.abs(unit(key) - unit(jax.random.key(4))).max() > 1e-3
    assert np.abs(unit(key) - unit(key, True)).max() > 1e-3
    # other key implementations do
    assert np.isfinite(unit(jax.random.key(3, impl="rbg"))).all()


@pytest.mark.slow
def test_layers_do_not_share_dropout_masks():
    config, params, file = golden("bert")
    config = dataclasses.replace(config, dropout=0.5)
    # with these weights the output of a layer is the norm of its last dropout mask
    params = jax.tree.map(np.zeros_like, params)
    params["layers"]["down"]["bias"] += 1
    params["layers"]["output_norm"]["scale"] += 1
    model, rngs = bert.Bert(config), {"dropout": jax.random.key(0)}
    _, states = jax.jit(
        lambda params: model.apply(
            {"params": params},
            *inputs_of(file),
            deterministic=False,
            hidden_states=True,
            rngs=rngs,
        )
    )(params)
    first, second = np.asarray(states[1:]) > 0
    assert 0.4 < first.mean() < 0.6
    assert 0.4 < (first == second).mean() < 0.6


@pytest.mark.parametrize("family", ENCODERS)
def test_config_round_trip(family):
    config = backbone.from_hf(json.loads((GOLDEN / family / "config.json").read_text()))
    assert backbone.from_hf(backbone.to_hf(config)) == config
    changed = dataclasses.replace(config, layers=7, ff=12, dropout=0.3, attention_dropout=0.2)
    assert backbone.from_hf(backbone.to_hf(changed)) == changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, r"\('bert', 'distilbert', .*got 't5'"),
        ({"hidden_act": "swish"}, "hidden_act.*'swish'"),
        ({"num_attention_heads": 3}, "divisor of hidden = 16, got 3"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers to be a int, got 'two'"),
        ({"hidden_size": None}, "hidden_size to be a int, got None"),
        ({"hidden_dropout_prob": 1.0}, "dropout: expected a fraction"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'absolute'"),
        ({"is_decoder": True}, "is_decoder = False"),
        ({"intermediate_size": 0}, "ff: expected at least 1, got 0"),
    ],
)
def test_config_errors(change, message):
    raw = json.loads((GOLDEN / "bert" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        backbone.from_hf(raw | change)
