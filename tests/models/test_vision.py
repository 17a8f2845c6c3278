"""Image encoders against plain numpy, from checkpoints as published; what config.json may say."""

import dataclasses
import functools
import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from xmc_jax.config import MeshConfig
from xmc_jax.models import backbone, hf, hf_weights, vision
from xmc_jax.models.vision import VisionConfig
from xmc_jax.runtime import sharding

PUBLISHED = pathlib.Path(__file__).parent / "published" / "vision"
SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 14,
    "patch_size": 4,  # two rows and columns of pixels are not looked at
}
# A config.json of each family, and what its checkpoints put before all names.
MODELS = {
    "siglip": ({"model_type": "siglip", "vision_config": SIZES}, "vision_model."),
    "siglip alone": ({"model_type": "siglip_vision_model", **SIZES}, ""),
    "vit": ({"model_type": "vit", **SIZES}, ""),
    "vit of a classifier": ({"model_type": "vit", **SIZES, "qkv_bias": False}, "vit."),
}
ALL = pytest.mark.parametrize("model", MODELS)
FAMILIES = pytest.mark.parametrize("model", tuple(backbone.IMAGE_FAMILIES))


def checkpoint(model: str) -> dict[str, np.ndarray]:
    """Tensors by the names and in the shapes of transformers, random."""
    D, F, P = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["patch_size"]
    shapes = {}

    def dense(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (D,), (D,)

    if model.startswith("vit"):
        shapes["embeddings.cls_token"] = (1, 1, D)
        shapes["embeddings.position_embeddings"] = (1, 10, D)
        shapes["embeddings.patch_embeddings.projection.weight"] = (D, 3, P, P)
        shapes["embeddings.patch_embeddings.projection.bias"] = (D,)
        for layer in range(SIZES["num_hidden_layers"]):
            one = f"encoder.layer.{layer}."
            for name in ("query", "key", "value"):
                dense(f"{one}attention.attention.{name}", D, D)
                if model == "vit of a classifier":
                    del shapes[f"{one}attention.attention.{name}.bias"]
            dense(one + "attention.output.dense", D, D)
            dense(one + "intermediate.dense", F, D)
            dense(one + "output.dense", D, F)
            norm(one + "layernorm_before")
            norm(one + "layernorm_after")
        norm("layernorm")
    else:
        shapes["embeddings.position_embedding.weight"] = (9, D)
        shapes["embeddings.patch_embedding.weight"] = (D, 3, P, P)
        shapes["embeddings.patch_embedding.bias"] = (D,)
        for layer in range(SIZES["num_hidden_layers"]):
            one = f"encoder.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                dense(f"{one}self_attn.{name}", D, D)
            dense(one + "mlp.fc1", F, D)
            dense(one + "mlp.fc2", D, F)
            norm(one + "layer_norm1")
            norm(one + "layer_norm2")
        norm("post_layernorm")
        shapes["head.probe"] = (1, 1, D)
        shapes["head.attention.in_proj_weight"] = (3 * D, D)
        shapes["head.attention.in_proj_bias"] = (3 * D,)
        dense("head.attention.out_proj", D, D)
        norm("head.layernorm")
        dense("head.mlp.fc1", F, D)
        dense("head.mlp.fc2", D, F)
    rng = np.random.default_rng(7)
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def unused(model: str) -> dict[str, np.ndarray]:
    """What published checkpoints hold besides."""
    names = {
        "siglip": ("text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale", "logit_bias"),
        "siglip alone": (),
        "vit": ("pooler.dense.weight", "pooler.dense.bias"),
        "vit of a classifier": ("classifier.weight", "classifier.bias"),
    }
    return {name: np.ones(2, np.float32) for name in names[model]}


def write(folder: pathlib.Path, model: str) -> pathlib.Path:
    config, prefix = MODELS[model]
    tensors = {prefix + name: tensor for name, tensor in checkpoint(model).items()}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors | unused(model), folder / hf.WEIGHTS)
    return folder


def load(folder: pathlib.Path):
    source = hf.resolve(str(folder))
    config = hf.load_vision_config(source)
    return config, hf_weights.load_params(source, config)


def pixels(n: int = 8, size: int = SIZES["image_size"]) -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (n, size, size, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode(config, dtype, params, pixels):
    return vision.Vision(config, dtype).apply({"params": params}, pixels, True)


def reference(model: str, images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The model written from its definition over transformers' own names: pooled, states."""
    w = {name: tensor.astype(np.float64) for name, tensor in checkpoint(model).items()}
    vit = model.startswith("vit")
    D, P, H = SIZES["hidden_size"], SIZES["patch_size"], SIZES["num_attention_heads"]
    eps = 1e-12 if vit else 1e-6

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def norm(name, x):
        scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def gelu(x):
        if vit:
            return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def attend(query, key, value):
        out = np.empty_like(query)
        for head in np.split(np.arange(D), H):
            scores = query[..., head] @ key[..., head].swapaxes(1, 2) / math.sqrt(D // H)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[..., head] = weights / weights.sum(-1, keepdims=True) @ value[..., head]
        return out

    patch = "embeddings." + ("patch_embeddings.projection" if vit else "patch_embedding")
    x = np.empty((len(images), 9, D))
    for row in range(3):
        for column in range(3):
            part = images[:, row * P : (row + 1) * P, column * P : (column + 1) * P]
            x[:, 3 * row + column] = np.einsum("nyxc,dcyx->nd", part, w[f"{patch}.weight"])
    x += w[f"{patch}.bias"]
    if vit:
        x = np.concatenate([np.tile(w["embeddings.cls_token"], (len(x), 1, 1)), x], axis=1)
        x += w["embeddings.position_embeddings"]
    else:
        x += w["embeddings.position_embedding.weight"]
    states = [x]
    for layer in range(SIZES["num_hidden_layers"]):
        if vit:
            one = f"encoder.layer.{layer}."
            before, after = one + "layernorm_before", one + "layernorm_after"
            of = one + "attention.attention."
            query, key, value = of + "query", of + "key", of + "value"
            out, up, down = "attention.output.dense", "intermediate.dense", "output.dense"
        else:
            one = f"encoder.layers.{layer}."
            before, after = one + "layer_norm1", one + "layer_norm2"
            of = one + "self_attn."
            query, key, value = of + "q_proj", of + "k_proj", of + "v_proj"
            out, up, down = "self_attn.out_proj", "mlp.fc1", "mlp.fc2"
        y = norm(before, x)
        x = x + dense(one + out, attend(dense(query, y), dense(key, y), dense(value, y)))
        x = x + dense(one + down, gelu(dense(one + up, norm(after, x))))
        states.append(x)
    if vit:
        return norm("layernorm", x)[:, 0], states
    x = norm("post_layernorm", x)
    parts = zip(
        np.split(w["head.attention.in_proj_weight"], 3),
        np.split(w["head.attention.in_proj_bias"], 3),
    )
    probe = np.tile(w["head.probe"], (len(x), 1, 1))
    x = attend(*(y @ weight.T + bias for y, (weight, bias) in zip((probe, x, x), parts)))
    x = dense("head.attention.out_proj", x)
    x = x + dense("head.mlp.fc2", gelu(dense("head.mlp.fc1", norm("head.layernorm", x))))
    return x[:, 0], states


@ALL
def test_every_layer_and_the_pooled_vector_are_those_of_the_definition(model, tmp_path):
    config, params = load(write(tmp_path, model))
    pooled, states = encode(config, jnp.float32, params, pixels())
    expected, expected_states = reference(model, pixels())
    assert len(states) == 1 + config.layers
    np.testing.assert_allclose(states, expected_states, rtol=0, atol=2e-5)
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=2e-5)


@ALL
def test_import_has_the_tree_of_init(model, tmp_path):
    config, params = load(write(tmp_path, model))
    made = jax.eval_shape(lambda: vision.Vision(config).init(jax.random.key(0), pixels(1)))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), params)
    expected = nn.unbox(made)["params"]
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), expected)


@pytest.mark.slow
@FAMILIES
def test_bfloat16_is_close(model, tmp_path):
    config, params = load(write(tmp_path, model))
    pooled, states = encode(config, jnp.bfloat16, params, pixels())
    expected, _ = encode(config, jnp.float32, params, pixels())
    assert pooled.dtype == states.dtype == jnp.float32
    cosine = (pooled * expected).sum(-1) / jnp.linalg.norm(pooled, axis=-1)
    assert (cosine / jnp.linalg.norm(expected, axis=-1) > 0.999).all()


@pytest.mark.slow
@FAMILIES
def test_parameters_in_parts_and_images_over_devices(model, tmp_path):
    folder = write(tmp_path, model)
    config, whole = load(folder)
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    images = pixels()
    boxed = jax.eval_shape(lambda: vision.Vision(config).init(jax.random.key(0), images))["params"]
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        nn.unbox(boxed),
        sharding.of_params(boxed, mesh),
    )
    params = hf_weights.load_params(hf.resolve(str(folder)), config, abstract)
    jax.tree.map(np.testing.assert_array_equal, params, whole)

    module = vision.Vision(config)
    split = jax.device_put(images, sharding.of_batch(images, mesh))
    run = jax.jit(sharding.under(mesh, lambda p, x: module.apply({"params": p}, x)))
    pooled = run(params, split)
    np.testing.assert_allclose(pooled, reference(model, images)[0], rtol=0, atol=2e-5)
    assert pooled.sharding.spec[0] == ("data", "fsdp")


def test_an_image_is_encoded_on_its_own(tmp_path):
    config, params = load(write(tmp_path, "siglip"))
    images = pixels()
    pooled, _ = encode(config, jnp.float32, params, images)
    order = np.random.default_rng(0).permutation(8)
    again, _ = encode(config, jnp.float32, params, images[order])
    np.testing.assert_allclose(again, pooled[order], rtol=0, atol=1e-6)
    beyond = images.copy()
    beyond[:, 12:], beyond[:, :, 12:] = 9.0, 9.0  # no whole patch
    again, _ = encode(config, jnp.float32, params, beyond)
    np.testing.assert_array_equal(again, pooled)


@pytest.mark.parametrize("shape", [(2, 12, 12, 3), (2, 3, 14, 14), (14, 14, 3)])
def test_another_resolution_is_refused(shape):
    config = backbone.images_from_hf(MODELS["siglip"][0])
    with pytest.raises(ValueError, match=r"expected pixels \[n, 14, 14, 3\], got") as error:
        jax.eval_shape(
            lambda: vision.Vision(config).init(jax.random.key(0), jnp.zeros(shape, jnp.float32))
        )
    assert "\n" not in str(error.value) and str(list(shape)) in str(error.value)


def edit(folder: pathlib.Path, change) -> None:
    """Rewrites the weights of a folder after `change(tensors)`."""
    tensors = dict(safetensors.numpy.load_file(folder / hf.WEIGHTS))
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / hf.WEIGHTS)


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    def change(tensors):
        del tensors["vision_model.head.probe"]
        tensors["vision_model.embeddings.patch_embedding.weight"] = np.zeros((12, 3, 5, 5), "f4")
        tensors["vision_model.encoder.adapter"] = np.zeros(2, "f4")

    edit(write(tmp_path, "siglip"), change)
    with pytest.raises(ValueError, match="weights do not fit a siglip of 3 layers") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    for part in (
        "Missing: ['vision_model.head.probe']",
        "Not known: ['vision_model.encoder.adapter']",
        "expected (12, 3, 4, 4) got (12, 3, 5, 5)",
    ):
        assert part in str(error.value)


def test_an_image_encoder_is_no_text_encoder(tmp_path):
    with pytest.raises(ValueError, match=r"model_type to be one of .*'bert'.* got 'siglip'"):
        hf.load_config(hf.resolve(str(write(tmp_path, "siglip"))))


def published(name: str) -> dict:
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


SO400M = VisionConfig("siglip", 1152, 27, 16, 4304, 384, 14)
EXPECTED = {
    "siglip2-so400m-patch14-384": (SO400M, 428_225_600),
    "siglip-so400m-patch14-384": (SO400M, 428_225_600),
    "siglip2-base-patch16-224": (VisionConfig(), 92_884_224),
    "siglip2-large-patch16-256": (
        VisionConfig("siglip", 1024, 24, 16, 4096, 256, 16),
        315_956_224,
    ),
    # without the pooler of 590,592 that the file of 86,389,248 has
    "vit-base-patch16-224-in21k": (
        VisionConfig("vit", eps=1e-12, hidden_act="gelu"),
        85_798_656,
    ),
}


def test_every_file_is_of_a_model_here():
    stems = {path.name.removesuffix(".json") for path in PUBLISHED.iterdir()}
    assert stems == {stem for name in EXPECTED for stem in (name, f"{name}.preprocessor")}


@pytest.mark.parametrize("name", EXPECTED)
def test_published_models_have_their_parameters(name):
    config, count = EXPECTED[name]
    assert backbone.images_from_hf(published(name)) == config
    assert config.side == {384: 27, 256: 16, 224: 14}[config.image_size]
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    made = jax.eval_shape(vision.Vision(config).init, jax.random.key(0), images)
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == count
    params = nn.unbox(made)
    pooled = jax.eval_shape(vision.Vision(config, jnp.bfloat16).apply, params, images)
    assert (pooled.shape, pooled.dtype) == ((1, config.hidden), jnp.float32)


def test_what_a_config_lacks_is_the_default_of_its_family():
    assert backbone.images_from_hf({"model_type": "siglip"}) == VisionConfig()
    assert backbone.images_from_hf({"model_type": "siglip_vision_model"}) == VisionConfig()
    vit = VisionConfig("vit", eps=1e-12, hidden_act="gelu")
    assert backbone.images_from_hf({"model_type": "vit"}) == vit
    assert backbone.images_from_hf({"model_type": "vit", "qkv_bias": False}) == dataclasses.replace(
        vit, qkv_bias=False
    )
    config = {"model_type": "vit", "image_size": [32, 32], "patch_size": [8, 8]}
    assert backbone.images_from_hf(config) == dataclasses.replace(vit, image_size=32, patch_size=8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "clip"}, r"one of \('siglip', 'siglip_vision_model', 'vit'\), got 'clip'"),
        ({"model_type": None}, "got None"),
        ({"vision_config": [1]}, "vision_config to be an object"),
        ({"vision_config": {"num_channels": 1}}, "expected num_channels = 3, got 1"),
        ({"vision_config": {"vision_use_head": False}}, "expected vision_use_head = True"),
        ({"vision_config": {"hidden_size": "768"}}, "hidden_size to be a int, got '768'"),
        ({"vision_config": {"image_size": [32, 16]}}, r"image_size to be a int, got \[32, 16\]"),
        ({"vision_config": {"image_size": True}}, "image_size to be a int, got True"),
        ({"vision_config": {"layer_norm_eps": None}}, "layer_norm_eps to be a float, got None"),
        ({"vision_config": {"hidden_act": "tanh"}}, "hidden_act: expected one of .*'tanh'"),
        ({"vision_config": {"num_attention_heads": 7}}, "heads: expected a divisor of hidden"),
        ({"vision_config": {"patch_size": 300}}, "patch_size: expected at most image_size = 224"),
        ({"vision_config": {"num_hidden_layers": 0}}, "layers: expected at least 1, got 0"),
        ({"model_type": "vit", "qkv_bias": 1}, "qkv_bias to be a bool, got 1"),
    ],
)
def test_other_configs_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as error:
        backbone.images_from_hf({"model_type": "siglip", **change})
    assert "\n" not in str(error.value)


def test_the_folder_of_a_bad_config_is_named(tmp_path):
    (write(tmp_path, "vit") / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(ValueError, match=f"{tmp_path}: config.json: expected model_type"):
        load(tmp_path)
