"""Image encoders: SigLIP and SigLIP 2 of fixed resolution, ViT. Pixels in, a vector per image out.

They are frozen: run once over a dataset's images, so that there is no dropout and no adapter.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.models import layers
from xmc_jax.runtime import sharding
from xmc_jax.runtime.sharding import Axis

FAMILIES = ("siglip", "vit")
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of an image encoder.

    Attributes:
        family: one of FAMILIES. "siglip" is SigLIP and SigLIP 2 and has the attention-pooling head,
            "vit" has a class token.
        hidden: D; the width E of an image's vector too.
        layers: number of layers.
        heads: H; divides D.
        ff: F.
        image_size: pixels per side. What is left beyond whole patches is not looked at.
        patch_size: P, pixels per side of a patch.
        eps: of the norms.
        hidden_act: a key of ACTIVATIONS; "gelu" is the exact one.
        qkv_bias: queries, keys and values have biases.
    """

    family: str = "siglip"
    hidden: int = 768
    layers: int = 12
    heads: int = 12
    ff: int = 3072
    image_size: int = 224
    patch_size: int = 16
    eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    qkv_bias: bool = True

    def __post_init__(self):
        for name in ("hidden", "layers", "heads", "ff", "image_size", "patch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"VisionConfig.{name}: expected at least 1, got {value}")
        layers.check_sizes(self)
        for name, fits, expected in (
            ("family", self.family in FAMILIES, f"one of {FAMILIES}"),
            ("hidden_act", self.hidden_act in ACTIVATIONS, f"one of {tuple(ACTIVATIONS)}"),
            ("heads", self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}"),
            (
                "patch_size",
                self.patch_size <= self.image_size,
                f"at most image_size = {self.image_size}",
            ),
        ):
            if not fits:
                raise ValueError(
                    f"VisionConfig.{name}: expected {expected}, got {getattr(self, name)!r}"
                )

    @property
    def side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


# Hugging Face's name of each field, and what a config.json that lacks it means.
_NAMES = {
    "hidden": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ff": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "eps": "layer_norm_eps",
    "hidden_act": "hidden_act",
}
_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": _BASE
    | {"layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True},
    "vit": _BASE | {"layer_norm_eps": 1e-12, "hidden_act": "gelu", "qkv_bias": True},
}
_MODEL_TYPES = {
    "siglip": "siglip",  # with a text tower, as SigLIP 2 of fixed resolution calls itself too
    "siglip_vision_model": "siglip",
    "vit": "vit",
}
MODEL_TYPES = tuple(_MODEL_TYPES)


# Our path -> Hugging Face's name; {} is the layer, stacked on our side. Kernels are transposed.
HF_NAMES: dict[str, dict[str, str]] = {
    "siglip": {
        "patch_embedding": "embeddings.patch_embedding",
        "position_embedding": "embeddings.position_embedding.weight",
        "layers/attention_norm": "encoder.layers.{}.layer_norm1",
        "layers/query": "encoder.layers.{}.self_attn.q_proj",
        "layers/key": "encoder.layers.{}.self_attn.k_proj",
        "layers/value": "encoder.layers.{}.self_attn.v_proj",
        "layers/out": "encoder.layers.{}.self_attn.out_proj",
        "layers/mlp_norm": "encoder.layers.{}.layer_norm2",
        "layers/up": "encoder.layers.{}.mlp.fc1",
        "layers/down": "encoder.layers.{}.mlp.fc2",
        "final_norm": "post_layernorm",
        "head/probe": "head.probe",
        "head/in_proj_weight": "head.attention.in_proj_weight",
        "head/in_proj_bias": "head.attention.in_proj_bias",
        "head/out": "head.attention.out_proj",
        "head/norm": "head.layernorm",
        "head/up": "head.mlp.fc1",
        "head/down": "head.mlp.fc2",
    },
    "vit": {
        "patch_embedding": "embeddings.patch_embeddings.projection",
        "class_token": "embeddings.cls_token",
        "position_embedding": "embeddings.position_embeddings",
        "layers/attention_norm": "encoder.layer.{}.layernorm_before",
        "layers/query": "encoder.layer.{}.attention.attention.query",
        "layers/key": "encoder.layer.{}.attention.attention.key",
        "layers/value": "encoder.layer.{}.attention.attention.value",
        "layers/out": "encoder.layer.{}.attention.output.dense",
        "layers/mlp_norm": "encoder.layer.{}.layernorm_after",
        "layers/up": "encoder.layer.{}.intermediate.dense",
        "layers/down": "encoder.layer.{}.output.dense",
        "final_norm": "layernorm",
    },
}


def from_hf(config: Mapping[str, Any]) -> VisionConfig:
    """The image encoder of a Hugging Face config.json, as published or as transformers 5 writes it.

    Args:
        config: the parsed file; of a model of images and texts, with a vision_config.

    Raises:
        ValueError: another architecture, a variant that is not computed here, a field of the wrong
            type, or sizes that do not fit together.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        hint = "; of SigLIP 2, those of fixed resolution are here" if kind == "siglip2" else ""
        raise ValueError(
            f"config.json: expected model_type to be one of {MODEL_TYPES}, got {kind!r} "
            f"(architectures {config.get('architectures')}){hint}"
        )
    family = _MODEL_TYPES[kind]
    own, defaults = config, _DEFAULTS[family]
    if kind == "siglip":
        own = config.get("vision_config")
        own = {} if own is None else own  # all of it transformers' defaults
        if not isinstance(own, Mapping):
            raise ValueError(f"config.json: expected vision_config to be an object, got {own!r}")
    for name, expected in (("num_channels", 3), ("vision_use_head", True)):
        if (value := own.get(name, expected)) != expected:
            raise ValueError(f"config.json: expected {name} = {expected!r}, got {value!r}")
    values = {field: _field(own, name, defaults[name]) for field, name in _NAMES.items()}
    if "qkv_bias" in defaults:
        values["qkv_bias"] = _field(own, "qkv_bias", defaults["qkv_bias"])
    return VisionConfig(family=family, **values)


def _field(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name, default)
    if name in ("image_size", "patch_size") and isinstance(value, list | tuple):
        # height and width; only squares are here
        value = value[0] if len(value) == 2 and value[0] == value[1] else value
    kinds = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, kinds) or isinstance(value, bool) is not isinstance(default, bool):
        raise ValueError(
            f"config.json: expected {name} to be a {kinds[-1].__name__}, got {value!r}"
        )
    return value


_normal = nn.initializers.normal(0.02)


class Layer(nn.Module):
    """One pre-norm transformer layer, as the body of a scan."""

    config: VisionConfig
    dtype: jnp.dtype
    hidden_states: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """f32[n, T, D] -> f32[n, T, D], and that again as a scanned output if asked."""
        c = self.config

        def dense(name: str, features: int, axes: tuple[Axis, Axis], x: jax.Array, bias=True):
            return layers.Dense(
                features,
                axes,
                kernel_init=_normal,
                bias_init=nn.initializers.zeros if bias else None,
                dtype=self.dtype,
                name=name,
            )(x)

        def heads(name: str) -> jax.Array:
            y = dense(name, c.hidden, ("embed", ("heads", c.heads)), normed, c.qkv_bias)
            return y.reshape(*y.shape[:2], c.heads, -1)

        normed = layers.LayerNorm(c.eps, name="attention_norm")(x)
        y = _attention(heads("query"), heads("key"), heads("value"))
        x += dense("out", c.hidden, (("heads", c.heads), "embed"), y)

        normed = layers.LayerNorm(c.eps, name="mlp_norm")(x)
        y = ACTIVATIONS[c.hidden_act](dense("up", c.ff, ("embed", "mlp"), normed))
        x += dense("down", c.hidden, ("mlp", "embed"), y)
        return x, (x if self.hidden_states else None)


def _attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """`layers.attention` among all patches [n, T, H, W], by cuDNN where it can.

    There the scores stay on the chip. Written out they are f32[n, H, T, T], for a batch of 128 of
    so400m's 27 x 27 patches 4 GB in every layer, and moving them takes longer than computing them.
    """
    fits = query.dtype == jnp.bfloat16 and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    if fits and _has_cudnn():
        y = jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
        return y.reshape(*y.shape[:2], -1)
    return layers.attention(query, key, value)


def _has_cudnn() -> bool:
    # Asked when a program is traced, of the default devices: JAX offers no branch at lowering here,
    # as its own check for cuDNN fails elsewhere.
    device = jax.local_devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return int(device.compute_capability.split(".")[0]) >= 8


class Head(nn.Module):
    """SigLIP's attention pooling: a learned query attends to all patches, then a feed-forward.

    Source: transformers, modeling_siglip.py, SiglipMultiheadAttentionPoolingHead; Lee et al., Set
    Transformer, arXiv 1810.00825.
    """

    config: VisionConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """f32[n, T, D] -> f32[n, D]."""
        c, D = self.config, self.config.hidden

        def param(name: str, init: layers.Initializer, axes: tuple[str | None, ...], *shape: int):
            value = self.param(name, nn.with_logical_partitioning(init, axes), shape)
            return jnp.asarray(value, self.dtype)

        def dense(name: str, features: int, axes: tuple[Axis, Axis], x: jax.Array) -> jax.Array:
            return layers.Dense(features, axes, kernel_init=_normal, dtype=self.dtype, name=name)(x)

        def heads(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:2], c.heads, -1)

        probe = param("probe", _normal, (None, None, "embed"), 1, 1, D)
        # Query, key and value one below the other, as torch packs them.
        weight = param("in_proj_weight", _normal, (None, "embed"), 3 * D, D)
        bias = param("in_proj_bias", nn.initializers.zeros, (None,), 3 * D)
        query = jnp.broadcast_to(probe @ weight[:D].T + bias[:D], (len(x), 1, D))
        key, value = jnp.split(x.astype(self.dtype) @ weight[D:].T + bias[D:], 2, axis=-1)
        x = layers.attention(heads(query), heads(key), heads(value))
        x = dense("out", D, (("heads", c.heads), "embed"), x).astype(jnp.float32)

        y = layers.LayerNorm(c.eps, name="norm")(x)
        y = ACTIVATIONS[c.hidden_act](dense("up", c.ff, ("embed", "mlp"), y))
        x += dense("down", D, ("mlp", "embed"), y)
        return x[:, 0]


class Vision(nn.Module):
    """Pixels to one vector per image, E = D.

    Of SigLIP it is the output of the attention-pooling head, which transformers' get_image_features
    gives and the ViXML reference stores. Of ViT it is the class token after the last norm: the
    pooler that some checkpoints have is a layer of their pretraining task, and of others missing.

    Attributes:
        config: see `VisionConfig`.
        dtype: of products; norms, softmax and the residual stream are float32, as under autocast.
    """

    config: VisionConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: jax.Array, hidden_states: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Encodes images, each on its own.

        Args:
            pixels: f32[n, image_size, image_size, 3], normalised as the model wants.
            hidden_states: return also the input of the first layer and the output of each.

        Returns:
            f32[n, E], or that and f32[layers + 1, n, T, D]; T is the number of patches, for ViT
            preceded by the class token.

        Raises:
            ValueError: images of another size.
        """
        c, n = self.config, len(pixels)
        if pixels.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"image encoder: expected pixels [n, {c.image_size}, {c.image_size}, 3], got "
                f"{list(pixels.shape)}; resize images as the model's preprocessor_config.json says"
            )
        covered, P = c.side * c.patch_size, c.patch_size
        x = pixels[:, :covered, :covered].reshape(n, c.side, P, c.side, P, 3)
        # Within a patch the order of a convolution's kernel: channel, row, column.
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(n, c.side**2, 3 * P * P)
        x = layers.Dense(
            c.hidden, (None, "embed"), kernel_init=_normal, dtype=self.dtype, name="patch_embedding"
        )(x).astype(jnp.float32)

        def param(name: str, *shape: int) -> jax.Array:
            axes = (None,) * (len(shape) - 1) + ("embed",)
            # asarray: weights as read from disk are numpy
            init = nn.with_logical_partitioning(_normal, axes)
            return jnp.asarray(self.param(name, init, shape), jnp.float32)

        if c.family == "vit":
            first = jnp.broadcast_to(param("class_token", 1, 1, c.hidden), (n, 1, c.hidden))
            x = jnp.concatenate([first, x], axis=1)
        batch = (1,) * (c.family == "vit")  # that axis is there in its checkpoints
        x += param("position_embedding", *batch, x.shape[1], c.hidden)
        if not self.is_initializing():
            x = sharding.constrain(x, "batch", None, None)
        first = x

        scanned = layers.stack(Layer, c.layers, "none")
        x, outputs = scanned(c, self.dtype, hidden_states, name="layers")(x)
        x = layers.LayerNorm(c.eps, name="final_norm")(x[:, 0] if c.family == "vit" else x)
        pooled = x if c.family == "vit" else Head(c, self.dtype, name="head")(x)
        if not self.is_initializing():
            pooled = sharding.constrain(pooled, "batch", None)
        return (pooled, jnp.concatenate([first[None], outputs])) if hidden_states else pooled
