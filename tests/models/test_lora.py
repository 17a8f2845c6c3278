"""Low-rank adapters of the one Dense, and of backbones."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.padded_rows import rows_of
from xmc_jax.config import LoraConfig, MeshConfig
from xmc_jax.models import backbone, bert, decoder, dual, layers
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.models.layers import NO_LORA
from xmc_jax.runtime import sharding

DECODER = DecoderConfig(
    family="qwen3",
    vocab_size=50,
    hidden=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=6,
    ff=24,
    qk_norm=True,
)
BERT = BertConfig(vocab_size=50, hidden=16, layers=2, heads=4, ff=32, max_positions=12)


def dense(lora, features=5, **kwargs):
    return layers.Dense(features, ("embed", "mlp"), nn.initializers.normal(), lora=lora, **kwargs)


def params_of(rank, width=7, features=5):
    rng = np.random.default_rng(0)
    shapes = {
        "kernel": (width, features),
        "bias": (features,),
        "lora_a": (width, rank),
        "lora_b": (rank, features),
    }
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def apply(module, params, x, **kwargs):
    return np.asarray(module.apply({"params": params}, x, **kwargs))


@pytest.mark.parametrize(
    ("scaling", "scale"), [("rslora", 6 / np.sqrt(3)), ("classic", 2.0)], ids=["rslora", "classic"]
)
def test_adapters_add_their_scaled_product(scaling, scale):
    lora = LoraConfig(rank=3, alpha=6.0, scaling=scaling)
    assert lora.scale == pytest.approx(scale)
    params = params_of(3)
    x = np.random.default_rng(1).standard_normal((4, 2, 7), np.float32)
    merged = params["kernel"] + scale * params["lora_a"] @ params["lora_b"]
    expected = x @ merged + params["bias"]
    np.testing.assert_allclose(apply(dense(lora), params, x), expected, rtol=0, atol=1e-5)
    # what the exported kernel does
    plain = apply(dense(NO_LORA), {"kernel": merged, "bias": params["bias"]}, x)
    np.testing.assert_allclose(plain, expected, rtol=0, atol=1e-5)


def test_zero_lora_b_changes_nothing():
    params = params_of(3)
    params["lora_b"][:] = 0
    x = np.random.default_rng(1).standard_normal((4, 7), np.float32)
    without = {name: params[name] for name in ("kernel", "bias")}
    np.testing.assert_array_equal(
        apply(dense(LoraConfig(rank=3)), params, x), apply(dense(NO_LORA), without, x)
    )


def test_dropout_is_of_the_adapters_input_alone():
    eye = np.eye(100, dtype=np.float32)
    params = {"kernel": 10 * eye, "lora_a": eye, "lora_b": eye}
    lora = LoraConfig(rank=100, alpha=100.0, scaling="classic", dropout=0.2)
    x = np.ones((50, 100), np.float32)
    module = dense(lora, 100, bias_init=None, deterministic=False)
    y = apply(module, params, x, rngs={"dropout": jax.random.key(0)})
    kept = np.isclose(y, 11.25)  # 10 + 1 / 0.8
    assert (kept | (y == 10)).all()
    assert abs(kept.mean() - 0.8) < 5 * np.sqrt(0.2 * 0.8 / y.size)
    other = apply(module, params, x, rngs={"dropout": jax.random.key(1)})
    assert (y != other).any()
    quiet = dense(lora, 100, bias_init=None)
    np.testing.assert_array_equal(apply(quiet, params, x), np.full_like(x, 11))


def test_products_in_bfloat16_whatever_is_stored():
    lora, params = LoraConfig(rank=3, alpha=3.0), jax.tree.map(jnp.asarray, params_of(3))
    x = jax.random.normal(jax.random.key(0), (4, 7))
    exact = apply(dense(lora), params, x)
    stored = params | {"kernel": params["kernel"].astype(jnp.bfloat16)}
    for tree in (params, stored):
        rounded = dense(lora, dtype=jnp.bfloat16).apply({"params": tree}, x)
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), exact, rtol=0.05, atol=0.2)
    # under float32 products a kernel that is stored in bfloat16 is rounded, and nothing else
    wide = dense(lora).apply({"params": stored}, x)
    assert wide.dtype == jnp.float32
    as_stored = params | {"kernel": stored["kernel"].astype(jnp.float32)}
    np.testing.assert_array_equal(wide, apply(dense(lora), as_stored, x))


def abstract(sizes, lora):
    boxed = jax.eval_shape(lambda: dual.init_params(dual.DualEncoder(sizes, lora=lora), 0))
    return nn.unbox(boxed)["backbone"]


@pytest.mark.slow
def test_adapters_of_a_new_model():
    lora = LoraConfig(rank=4, targets=("query", "down"))
    model = dual.DualEncoder(DECODER, lora=lora)
    stack = jax.jit(lambda: nn.unbox(dual.init_params(model, 0))["backbone"]["layers"])()
    assert {name for name, leaves in stack.items() if "lora_a" in leaves} == set(lora.targets)
    for name in lora.targets:
        kernel, a, b = (stack[name][part] for part in ("kernel", "lora_a", "lora_b"))
        _, width, features = kernel.shape
        assert a.shape == (2, width, 4) and b.shape == (2, 4, features)
        assert not b.any()
        bound = width**-0.5
        assert 0.8 * bound < np.abs(a).max() <= bound
        assert (a[0] != a[1]).all()  # layers are drawn apart


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(DECODER, id="decoder"),
        pytest.param(BERT, id="bert", marks=pytest.mark.slow),
    ],
)
def test_a_new_model_is_the_pretrained_one(sizes):
    targets = decoder.PROJECTIONS if sizes is DECODER else bert.PROJECTIONS
    lora = LoraConfig(rank=4, dropout=0.5, targets=targets)
    sizes = sizes.first(1)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: 0.3 * rng.standard_normal(leaf.shape, np.float32), abstract(sizes, lora)
    )
    for name in targets:
        params["layers"][name]["lora_b"][:] = 0
    bare = {
        name: {part: leaf for part, leaf in leaves.items() if not part.startswith("lora_")}
        for name, leaves in params["layers"].items()
    }
    inputs = rows_of(np.arange(12, dtype=np.int32).reshape(2, 6), np.array([6, 4], np.int32))

    def encode(params, lora):
        model = dual.DualEncoder(sizes, lora=lora)
        return model.apply({"params": {"backbone": params}}, inputs, method="encode").unit

    def loss(params):
        unit = encode(params, lora)
        return (unit * np.arange(16)).sum(), unit

    gradient, unit = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = jax.jit(lambda params: encode(params, NO_LORA))(params | {"layers": bare})
    np.testing.assert_allclose(unit, expected, rtol=0, atol=1e-6)
    for name in targets:  # so A begins to move only once B has
        assert not gradient["layers"][name]["lora_a"].any()
        assert np.abs(gradient["layers"][name]["lora_b"]).max() > 0


def test_adapters_are_split_like_their_kernels():
    model = dual.DualEncoder(DECODER, lora=LoraConfig(rank=4))
    boxed = jax.eval_shape(lambda: dual.init_params(model, 0))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    stack = sharding.of_params(boxed, mesh)["backbone"]["layers"]
    P, fsdp, tensor = jax.sharding.PartitionSpec, ("fsdp",), ("tensor",)
    for name, (rows, columns) in {"gate": (fsdp, tensor), "down": (tensor, fsdp)}.items():
        assert stack[name]["kernel"].spec == P(None, rows, columns)
        a, b = (None, fsdp) if rows == fsdp else (fsdp, None)
        assert stack[name]["lora_a"].spec == P(None, rows, a)
        assert stack[name]["lora_b"].spec == P(None, b, columns)


def test_unknown_targets():
    lora = LoraConfig(rank=2, targets=("query", "gate", "head"))
    with pytest.raises(
        ValueError, match=r"encoder.lora.targets: expected .*got \['gate', 'head'\]"
    ):
        backbone.build(BERT, "float32", "none", lora)
    with pytest.raises(ValueError, match=r"encoder.lora.targets: .*got \['head'\]") as error:
        backbone.build(DECODER, "float32", "none", lora)
    for name in decoder.PROJECTIONS:
        assert repr(name) in str(error.value)
    assert "\n" not in str(error.value)
    assert set(decoder.PROJECTIONS) == {*bert.PROJECTIONS, "gate"}
    backbone.build(BERT, "float32", "none", dataclasses.replace(lora, rank=0))
