"""Decoders without torch: golden files, masks, rotations, invariances, configurations."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden_models import DECODERS, golden
from tests.golden_models import FOLDER as GOLDEN
from tests.padded_rows import places_of, rows_of
from xmc_jax.config import LoraConfig, MeshConfig
from xmc_jax.models import backbone, decoder, dual, hf, hf_weights, layers
from xmc_jax.models.decoder_config import RopeScaling
from xmc_jax.models.segments import POOLINGS
from xmc_jax.runtime import sharding


@functools.partial(jax.jit, static_argnums=0)
def states_of(model, params, tokens, lengths, positions=None):
    places = places_of(tokens, lengths, positions)
    return model.apply({"params": params}, *places, hidden_states=True)[1]


def real(file):
    return (np.arange(file["tokens"].shape[1]) < file["lengths"][:, None])[None, ..., None]


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_golden_hidden_states(family):
    config, params, file = golden(family)
    assert config.family == family and config.layers == 3
    if family == "gemma3":
        assert config.sliding == (True, False, True) and config.window < file["lengths"].max()
    states = states_of(decoder.Decoder(config), params, file["tokens"], file["lengths"])
    mask = real(file)
    np.testing.assert_allclose(states * mask, file["hidden_states"] * mask, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_later_tokens_change_nothing_before_them(family):
    config, params, file = golden(family)
    model, lengths = decoder.Decoder(config), file["lengths"]
    states = states_of(model, params, file["tokens"], lengths)
    for cut in (1, 4, 8):
        tokens = file["tokens"].copy()
        tokens[:, cut:] = 1 + (tokens[:, cut:] + 7) % 50  # padding too
        changed = states_of(model, params, tokens, lengths)
        np.testing.assert_allclose(changed[:, :, :cut], states[:, :, :cut], rtol=0, atol=1e-6)
        assert np.abs(changed[:, :, cut:] - states[:, :, cut:]).max() > 0.1


@pytest.mark.slow
def test_embedding_is_the_same_alone_and_at_any_padding():
    config, params, file = golden("gemma3")
    tokens, lengths = file["tokens"], file["lengths"]

    @jax.jit
    def encode(tokens, lengths):
        models = [dual.DualEncoder(config, pooling=pooling) for pooling in POOLINGS]
        variables, inputs = {"params": {"backbone": params}}, rows_of(tokens, lengths)
        pooled = [model.apply(variables, inputs, method="encode").pooled for model in models]
        return jnp.stack(pooled, axis=1)

    together = encode(tokens, lengths)
    padded = np.full((len(tokens), 13), 7, np.int32)
    padded[:, : tokens.shape[1]] = np.where(real(file)[0, ..., 0], tokens, 7)
    np.testing.assert_allclose(encode(padded[::-1], lengths[::-1])[::-1], together, atol=1e-5)
    row = 2
    alone = encode(tokens[row : row + 1, : lengths[row]], lengths[row : row + 1])
    np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-5)


def influence(config, params, positions=None):
    """bool[S, S]: whether the token of the column changes the vector of the row."""
    S = 8
    tokens = np.tile(np.arange(1, S + 1, dtype=np.int32), (S + 1, 1))
    np.fill_diagonal(tokens, 30)  # the last row of S + 1 is as it was
    lengths = np.full(S + 1, S, np.int32)
    if positions is not None:
        positions = np.tile(np.asarray(positions, np.int32), (S + 1, 1))
    states = states_of(decoder.Decoder(config), params, tokens, lengths, positions)[-1]
    return np.asarray(np.abs(states[:-1] - states[-1]).max(-1) > 1e-6).T


@pytest.mark.parametrize("window", [1, 3])
def test_a_sliding_layer_attends_to_its_window_only(window):
    config, params, _ = golden("gemma3")
    config = dataclasses.replace(config.first(1), window=window)
    params = params | {"layers": jax.tree.map(lambda x: x[:1], params["layers"])}
    assert config.sliding == (True,)
    row, column = np.indices((8, 8))
    near = (column <= row) & (row - column < window)
    np.testing.assert_array_equal(influence(config, params), near)
    full = dataclasses.replace(config, sliding=(False,))
    if window == 3:
        np.testing.assert_array_equal(influence(full, params), column <= row)
        # the window is of positions, in which a padded text leaves a gap
        positions = np.array([0, 1, 2, 3, 9, 10, 11, 12])
        apart = positions[row] - positions[column]
        np.testing.assert_array_equal(
            influence(config, params, positions), (column <= row) & (apart < window)
        )


def test_positions_default_to_the_index_and_only_differences_count():
    config, params, file = golden("llama")
    model = decoder.Decoder(config)
    tokens, lengths = file["tokens"], file["lengths"]
    expected = states_of(model, params, tokens, lengths)
    index = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))
    for positions in (index, index + 11):
        states = states_of(model, params, tokens, lengths, positions)
        np.testing.assert_allclose(states, expected, rtol=0, atol=1e-5)
    stretched = states_of(model, params, tokens, lengths, 2 * index)
    assert np.abs(stretched - expected)[:, 1:].max() > 1e-3


def test_rotary_frequencies_by_definition():
    def frequency(theta, width, pair):
        return 1 / theta ** (2 * pair / width)

    for theta, width in ((10_000.0, 64), (1e6, 128), (100.0, 6)):
        plain = [frequency(theta, width, pair) for pair in range(width // 2)]
        ours = decoder.rotary_frequencies(theta, width, RopeScaling())
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
        linear = decoder.rotary_frequencies(theta, width, RopeScaling("linear", 8.0))
        np.testing.assert_allclose(linear, np.divide(plain, 8), rtol=1e-6)


def test_llama3_frequencies_by_definition():
    """Llama 3's: long wavelengths stretched, short ones not, between them in proportion."""
    theta, width, factor, low, high, original = 5e5, 64, 32.0, 1.0, 4.0, 8192
    expected, kinds = [], set()
    for pair in range(width // 2):
        frequency = 1 / theta ** (2 * pair / width)
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            kinds.add("high")
        elif wavelength > original / low:
            kinds.add("low")
            frequency /= factor
        else:
            kinds.add("between")
            smooth = (original / wavelength - low) / (high - low)
            frequency = (1 - smooth) * frequency / factor + smooth * frequency
        expected.append(frequency)
    assert kinds == {"low", "between", "high"}
    rope = RopeScaling("llama3", factor, low, high, original)
    np.testing.assert_allclose(decoder.rotary_frequencies(theta, width, rope), expected, rtol=1e-6)


def test_rotation_turns_pairs_half_a_width_apart():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 8), np.float32)
    frequencies = np.array([1.0, 0.3, 0.1, 0.01], np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [3, 4, 9, 10, 40]])
    turned = layers.rotate(x, *layers.rotary_tables(jnp.asarray(positions), frequencies))
    expected = np.empty_like(x)
    for (n, s, h, i), _ in np.ndenumerate(x[..., :4]):
        pair = complex(x[n, s, h, i], x[n, s, h, i + 4])
        pair *= np.exp(1j * positions[n, s] * frequencies[i])
        expected[n, s, h, i], expected[n, s, h, i + 4] = pair.real, pair.imag
    np.testing.assert_allclose(turned, expected, rtol=0, atol=1e-5)
    assert layers.rotate(x.astype(jnp.bfloat16), 1.0, 0.0).dtype == jnp.bfloat16


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attention_by_a_loop(heads, kv_heads):
    rng = np.random.default_rng(heads)
    n, T, W = 2, 5, 4
    query = rng.standard_normal((n, T, heads, W), np.float32)
    key, value = rng.standard_normal((2, n, T, kv_heads, W), np.float32)
    mask = np.tril(rng.random((n, 1, T, T)) < 0.7) | np.eye(T, dtype=bool)
    expected = np.empty((n, T, heads, W))
    for row, t, head in np.ndindex(n, T, heads):
        group = head // (heads // kv_heads)
        seen = [s for s in range(T) if mask[row, 0, t, s]]
        scores = [0.3 * query[row, t, head] @ key[row, s, group] for s in seen]
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[row, t, head] = sum(w * value[row, s, group] for w, s in zip(weights, seen))
    ours = layers.attention(query, key, value, mask, scale=0.3)
    np.testing.assert_allclose(ours, expected.reshape(n, T, -1), rtol=0, atol=1e-5)
    by_width = layers.attention(query, key, value, mask)
    np.testing.assert_array_equal(by_width, layers.attention(query, key, value, mask, scale=0.5))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_by_definition_and_in_float32(offset):
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((3, 200)) * 5, rng.standard_normal(200)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 0.1) * (scale + offset)
    norm = layers.RMSNorm(0.1, offset)
    variables = {"params": {"scale": scale.astype(np.float32)}}
    ours = norm.apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
    # of a rounded input, the rounded output: nothing is rounded between
    rounded = jnp.asarray(x, jnp.bfloat16)
    out = norm.apply(variables, rounded)
    assert out.dtype == jnp.bfloat16
    wide = norm.apply(variables, rounded.astype(jnp.float32))
    np.testing.assert_array_equal(out, wide.astype(jnp.bfloat16))
    # the norm of a new model changes no direction: its whole scale is 1
    fresh = norm.init(jax.random.key(0), ours)["params"]["scale"].value
    np.testing.assert_array_equal(fresh + offset, np.ones(200))


def gradient(family, loss):
    config, params, file = golden(family)
    model, tokens, lengths = decoder.Decoder(config), file["tokens"], file["lengths"]
    return jax.jit(jax.grad(lambda params: loss(model, params, tokens, lengths)))(params)


def squares(model, params, tokens, lengths):
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    return jnp.square(model.apply({"params": params}, *places_of(tokens, lengths))[mask, :3]).sum()


def squares_by_a_loop(model, params, tokens, lengths):
    """The same without a scan: each layer by itself, a layer's kind known in advance."""
    c, S = model.config, tokens.shape[1]
    x = jnp.asarray(params["token_embedding"])[tokens] * jnp.float32(c.embedding_scale)
    behind = np.arange(S)[:, None] - np.arange(S)
    for layer, sliding in enumerate(c.sliding or (False,) * c.layers):
        theta, rope, mask = c.rope_theta, c.rope, behind >= 0
        if sliding:
            mask &= behind < c.window
            theta, rope = c.local_rope_theta, RopeScaling()
        tables = layers.rotary_tables(
            jnp.arange(S)[None], decoder.rotary_frequencies(theta, c.head_dim, rope)
        )
        one = decoder.DecoderLayer(c, model.dtype, layers.NO_LORA, True, False)
        own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])  # noqa: B023
        x, _ = one.apply({"params": own}, x, tables, mask[None, None], None)
    x = layers.RMSNorm(c.eps, c.norm_offset).apply({"params": params["final_norm"]}, x)
    return jnp.square(x[np.arange(S) < lengths[:, None], :3]).sum()


def assert_same_gradients(ours, expected):
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(expected)):
        atol = 1e-4 * np.abs(other).max()
        np.testing.assert_allclose(
            one, other, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_gradients_of_the_scan_are_those_of_a_loop(family):
    scanned = gradient(family, squares)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(scanned))
    assert_same_gradients(scanned, gradient(family, squares_by_a_loop))


@functools.cache
def gradient_with_dropout(remat):
    """Of all parameters, adapters among them; every kind of dropout is on."""
    config, params, file = golden("gemma3")
    lora = LoraConfig(rank=2, dropout=0.2)
    model = decoder.Decoder(config.with_dropout(0.2), remat=remat, lora=lora)
    inputs = places_of(file["tokens"], file["lengths"])
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]["layers"]
    rng, stack = np.random.default_rng(0), {}
    for name, leaves in params["layers"].items():
        stack[name] = dict(leaves)
        for part in sorted(shapes[name].keys() - leaves.keys()):
            stack[name][part] = rng.standard_normal(shapes[name][part].value.shape, np.float32)

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        hidden = model.apply({"params": params}, *inputs, deterministic=False, rngs=rngs)
        return jnp.square(hidden[real(file)[0, ..., 0], :3]).sum()

    return jax.jit(jax.grad(loss))(params | {"layers": stack})


@pytest.mark.slow
@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(remat, marks=pytest.mark.scale) if remat.startswith("dots") else remat
        for remat in layers.REMAT[1:]
    ],
)
def test_remat_changes_no_gradient(remat):
    assert_same_gradients(gradient_with_dropout(remat), gradient_with_dropout("none"))


@pytest.mark.slow
def test_bfloat16_is_close_and_pools_in_float32():
    config, params, file = golden("qwen3")
    inputs = rows_of(file["tokens"], file["lengths"])
    rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)

    @functools.partial(jax.jit, static_argnums=0)
    def encode(model, params):
        return model.apply({"params": {"backbone": params}}, inputs, method="encode")

    exact = encode(dual.DualEncoder(config), params)
    out = encode(dual.DualEncoder(config, compute_dtype="bfloat16"), rounded)
    assert out.unit.dtype == out.pooled.dtype == jnp.float32
    assert (np.asarray(exact.unit) * np.asarray(out.unit)).sum(-1).min() > 0.995
    assert np.abs(exact.unit - out.unit).max() > 1e-6
    model = decoder.Decoder(config, jnp.bfloat16)
    places = places_of(file["tokens"], file["lengths"])
    hidden = jax.eval_shape(model.apply, {"params": rounded}, inputs.tokens, *places[1:])
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_eight_devices_give_what_one_gives(family):
    config, params, file = golden(family)
    model = dual.DualEncoder(config)
    tokens, lengths = np.tile(file["tokens"], (4, 1))[:16], np.tile(file["lengths"], 4)[:16]
    inputs = rows_of(tokens, lengths)
    encode = jax.jit(
        lambda params, inputs: model.apply({"params": params}, inputs, method="encode").unit
    )
    params = {"backbone": params}
    expected = encode(params, inputs)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.of_params(boxed, mesh))
        inputs = inputs.replace(slots=np.arange(16) % 4)  # of each of four groups
        inputs = jax.device_put(inputs, sharding.of_batch(inputs, mesh))
        np.testing.assert_allclose(encode(spread, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_dropout_of_attention():
    config, params, file = golden("qwen2")
    model = dual.DualEncoder(config.with_dropout(0.4))

    @functools.partial(jax.jit, static_argnums=1)
    def encode(key, deterministic=False):
        inputs = rows_of(file["tokens"], file["lengths"])
        variables = {"params": {"backbone": params}}
        return model.apply(
            variables, inputs, deterministic, rngs={"dropout": key}, method="encode"
        ).unit

    key = jax.random.key(3)
    np.testing.assert_array_equal(encode(key), encode(key))
    assert np.abs(encode(key) - encode(jax.random.key(4))).max() > 1e-3
    # a text of one token attends to itself alone: kept and scaled up, or dropped
    assert np.abs(encode(key) - encode(key, True)).max() > 1e-3


def test_first_layers_are_the_first_layers():
    _, params, file = golden("gemma3")
    source = hf.resolve(str(GOLDEN / "gemma3"))
    two = hf.load_config(source, layers=2)
    assert two.sliding == (True, False)
    loaded = hf_weights.load_params(source, two)
    jax.tree.map(
        lambda ours, whole: np.testing.assert_array_equal(ours, whole[:2]),
        loaded["layers"],
        params["layers"],
    )
    states = states_of(decoder.Decoder(two), loaded, file["tokens"], file["lengths"])
    mask = real(file)
    # all but the last, which is normalised
    np.testing.assert_allclose(
        (states * mask)[:2], (file["hidden_states"] * mask)[:2], rtol=0, atol=2e-5
    )


VARIED = {
    "qwen2": {"sliding": (False, True, True), "window": 5},
    "qwen3": {"qkv_bias": True, "out_bias": True, "tied": False, "eos_id": (3, 4)},
    "llama": {"rope": RopeScaling("linear", 2.5), "pad_id": None, "bos_id": None, "eos_id": None},
    "gemma3": {"query_width": 7, "local_rope_theta": 50.0, "rope": RopeScaling()},
}


@pytest.mark.parametrize("family", DECODERS)
def test_config_round_trip(family):
    config = backbone.from_hf(json.loads((GOLDEN / family / "config.json").read_text()))
    varied = dataclasses.replace(config, ff=13, attention_dropout=0.25, **VARIED[family])
    for one in (config, varied, config.first(1), config.with_dropout(0.5)):
        assert backbone.from_hf(json.loads(json.dumps(backbone.to_hf(one)))) == one
        assert backbone.from_hf(backbone.to_hf(one)) == one
    assert backbone.is_decoder(config)
    assert config.with_dropout(0.5).attention_dropout == 0.5


def published(**fields):
    """A config.json of the hub's style, with so little in it that defaults count."""
    return {
        "model_type": "qwen2",
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | fields


def test_sliding_layers_of_published_configs():
    def sliding(**fields):
        return backbone.from_hf(published(**fields)).sliding

    assert sliding() == sliding(use_sliding_window=False, sliding_window=4) == ()
    on = {"use_sliding_window": True, "sliding_window": 4}
    assert sliding(**on) == ()  # from layer 28 on
    assert sliding(**on, max_window_layers=3) == (False, False, False, True)
    kinds = ["sliding_attention", "full_attention"]
    assert sliding(layer_types=2 * kinds, sliding_window=4) == (True, False, True, False)
    assert sliding(layer_types=["full_attention"] * 4) == ()
    gemma = {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 4}
    assert sliding(**gemma) == (True,) * 5 + (False, True)
    assert sliding(**gemma, sliding_window_pattern=2) == (True, False) * 3 + (True,)


def test_rope_of_both_styles():
    def rope(**fields):
        config = backbone.from_hf(published(**fields))
        return config.rope_theta, config.rope, config.local_rope_theta

    assert rope() == (10_000.0, RopeScaling(), None)
    linear = (1e6, RopeScaling("linear", 4.0), None)
    assert rope(rope_theta=1e6, rope_scaling={"type": "linear", "factor": 4}) == linear
    assert rope(rope_theta=1e6, rope_scaling={"rope_type": "linear", "factor": 4.0}) == linear
    one = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
    assert rope(rope_parameters=one) == linear
    gemma = {"model_type": "gemma3_text", "head_dim": 4}
    assert rope(**gemma) == (1e6, RopeScaling(), 10_000.0)
    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    assert rope(**gemma, rope_parameters=both) == (5e5, RopeScaling("linear", 8.0), 2e4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mistral"}, r"one of \('bert', .*'llama', .*got 'mistral'"),
        ({"model_type": "gemma3", "text_config": [1]}, r"text_config to be an object, got \[1\]"),
        ({"model_type": "gemma3"}, "text_config to be an object, got None"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type of.*got 'yarn'"),
        ({"rope_scaling": {"type": "dynamic"}}, "rope_type of.*got 'dynamic'"),
        ({"rope_scaling": "linear"}, "rope_scaling to be an object, got 'linear'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type of.*got 'longrope'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": "two"}},
            "factor to be a float, got 'two'",
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            "factor: expected at least 1, got 0.5",
        ),
        ({"mlp_bias": True}, "mlp_bias = False, got True"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = None, got 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = False, got True"),
        ({"hidden_act": "swish2"}, "hidden_act: expected one of.*got 'swish2'"),
        ({"hidden_size": None}, "hidden_size to be a int, got None"),
        ({"hidden_size": 16.0}, "hidden_size to be a int, got 16.0"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers to be a int, got 'two'"),
        ({"num_hidden_layers": True}, "num_hidden_layers to be a int, got True"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps to be a float, got 'small'"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings to be a bool, got 1"),
        ({"model_type": "llama", "attention_bias": "no"}, "attention_bias to be a bool, got 'no'"),
        ({"eos_token_id": "</s>"}, "eos_token_id to be a int, got '</s>'"),
        ({"num_key_value_heads": 3}, "kv_heads: expected a divisor of heads = 4, got 3"),
        ({"num_attention_heads": 0}, "heads: expected at least 1, got 0"),
        ({"head_dim": 3}, "head_dim: expected an even number, got 3"),
        ({"vocab_size": 0}, "vocab_size: expected at least 1, got 0"),
        ({"attention_dropout": 1.0}, "attention_dropout: expected a fraction"),
        ({"layer_types": ["full_attention"]}, "expected 4 layer_types, got 1"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types of.*chunked_attention"),
        ({"layer_types": "full_attention"}, "layer_types of.*got 'full_attention'"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
            "sliding_window to be a int, got None",
        ),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message) as error:
        backbone.from_hf(published(**change))
    assert "\n" not in str(error.value)


def test_unknown_architecture_lists_the_known():
    with pytest.raises(ValueError, match="got 'roberta'") as error:
        backbone.from_hf({"model_type": "roberta", "architectures": ["RobertaModel"]})
    message = str(error.value)
    for kind in ("bert", "distilbert", "qwen2", "qwen3", "llama", "gemma3_text", "gemma3"):
        assert repr(kind) in message
    assert "RobertaModel" in message and "\n" not in message
