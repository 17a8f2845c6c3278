"""Image encoders: SigLIP and SigLIP 2 of fixed resolution, ViT. Pixels in, a vector per image out.

They are frozen: run once over a dataset's images, so that there is no dropout and no adapter.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.models import layers
from xmc_jax.models.family import (
    ACTIVATIONS,
    Family,
    Stored,
    check,
    check_sizes,
    fused,
    named,
    read_fields,
    refuse_others,
)
from xmc_jax.runtime import sharding
from xmc_jax.runtime.sharding import Axis


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Sizes and constants of an image encoder.

    Attributes:
        family: "siglip" (SigLIP and SigLIP 2, with the attention-pooling head) or "vit" (with a
            class token).
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
        check_sizes(self, ("hidden", "layers", "heads", "ff", "image_size", "patch_size"))
        most = self.image_size
        check(
            self,
            ("heads", self.hidden % self.heads == 0, f"a divisor of hidden = {self.hidden}"),
            ("patch_size", self.patch_size <= most, f"at most image_size = {most}"),
        )

    @property
    def side(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch_size


_normal = nn.initializers.normal(0.02)


class VisionLayer(nn.Module):
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


class PoolingHead(nn.Module):
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

        def dense(name: str, features: int, axes: tuple[Axis, Axis], x: jax.Array) -> jax.Array:
            return layers.Dense(features, axes, kernel_init=_normal, dtype=self.dtype, name=name)(x)

        def heads(name: str, x: jax.Array) -> jax.Array:
            y = dense(name, D, ("embed", ("heads", c.heads)), x)
            return y.reshape(*y.shape[:2], c.heads, -1)

        init = nn.with_logical_partitioning(_normal, (None, None, "embed"))
        probe = jnp.asarray(self.param("probe", init, (1, 1, D)), self.dtype)
        query = jnp.broadcast_to(heads("query", probe), (len(x), 1, c.heads, D // c.heads))
        x = layers.attention(query, heads("key", x), heads("value", x))
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

        scanned = layers.stack(VisionLayer, c.layers, "none")
        x, outputs = scanned(c, self.dtype, hidden_states, name="layers")(x)
        x = layers.LayerNorm(c.eps, name="final_norm")(x[:, 0] if c.family == "vit" else x)
        pooled = x if c.family == "vit" else PoolingHead(c, self.dtype, name="head")(x)
        if not self.is_initializing():
            pooled = sharding.constrain(pooled, "batch", None)
        return (pooled, jnp.concatenate([first[None], outputs])) if hidden_states else pooled


# Hugging Face's name of each field, and what a config.json that lacks it means.
_FIELDS: dict[str, tuple[str, Any]] = {
    "hidden": ("hidden_size", 768),
    "layers": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "ff": ("intermediate_size", 3072),
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 16),
}
_SIGLIP_FIELDS = _FIELDS | {
    "eps": ("layer_norm_eps", 1e-6),
    "hidden_act": ("hidden_act", "gelu_pytorch_tanh"),
}
_VIT_FIELDS = _FIELDS | {
    "eps": ("layer_norm_eps", 1e-12),
    "hidden_act": ("hidden_act", "gelu"),
    "qkv_bias": ("qkv_bias", True),
}
_QUERY_KEY_VALUE = ("head/query", "head/key", "head/value")
_SIGLIP_TENSORS = {
    "patch_embedding/kernel": Stored("embeddings.patch_embedding.weight", patches=True),
    "patch_embedding/bias": Stored("embeddings.patch_embedding.bias"),
    **fused("head.attention.in_proj_weight", *(f"{path}/kernel" for path in _QUERY_KEY_VALUE)),
    **fused("head.attention.in_proj_bias", *(f"{path}/bias" for path in _QUERY_KEY_VALUE)),
    **named(
        {
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
            "head/out": "head.attention.out_proj",
            "head/norm": "head.layernorm",
            "head/up": "head.mlp.fc1",
            "head/down": "head.mlp.fc2",
        }
    ),
}
_VIT_PATCHES = "embeddings.patch_embeddings.projection"
_VIT_TENSORS = {
    "patch_embedding/kernel": Stored(f"{_VIT_PATCHES}.weight", patches=True),
    "patch_embedding/bias": Stored(f"{_VIT_PATCHES}.bias"),
    **named(
        {
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
        }
    ),
}


def _family(
    name: str,
    model_types: tuple[str, ...],
    fields: Mapping[str, tuple[str, Any]],
    tensors: Mapping[str, Stored],
) -> Family:
    def from_hf(config: Mapping[str, Any]) -> VisionConfig:
        tower = config
        if config["model_type"] == "siglip":  # with a text tower
            tower = config.get("vision_config")
            tower = {} if tower is None else tower  # transformers' defaults
            if not isinstance(tower, Mapping):
                raise ValueError(
                    f"config.json: expected vision_config to be an object, got {tower!r}"
                )
        refuse_others(tower, {"num_channels": (3,), "vision_use_head": (True,)})
        sides = {}
        for side in ("image_size", "patch_size"):
            match tower.get(side):
                case [int() as height, width] if height == width:
                    sides[side] = height
        return VisionConfig(family=name, **read_fields({**tower, **sides}, fields))

    def to_hf(sizes: VisionConfig) -> dict[str, Any]:
        values = {hf_name: getattr(sizes, field) for field, (hf_name, _) in fields.items()}
        return {"model_type": model_types[-1], **values}

    return Family(
        name=name,
        model_types=model_types,
        from_hf=from_hf,
        to_hf=to_hf,
        tensors=tensors,
        module=Vision,
        inputs=lambda sizes: (jnp.zeros((1, sizes.image_size, sizes.image_size, 3)),),
    )


# SigLIP 2 of fixed resolution calls itself siglip, too.
SIGLIP = _family("siglip", ("siglip", "siglip_vision_model"), _SIGLIP_FIELDS, _SIGLIP_TENSORS)
VIT = _family("vit", ("vit",), _VIT_FIELDS, _VIT_TENSORS)
