"""The Dense module of sentence-transformers: a layer behind the pooling, as LaBSE has one."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from xmc_jax.models import layers

# By the class of PyTorch.
ACTIVATIONS = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": functools.partial(jax.nn.gelu, approximate=False),
    "Sigmoid": jax.nn.sigmoid,
}
_INPUT = "sentence_embedding"


@dataclasses.dataclass(frozen=True)
class DenseConfig:
    """Sizes of the layer.

    Attributes:
        features: width of the embeddings.
        activation: a key of ACTIVATIONS.
        bias: whether there is one.
    """

    features: int
    activation: str = "Tanh"
    bias: bool = True


def from_config(config: Mapping[str, Any], width: int) -> DenseConfig | None:
    """The layer that the config.json of a module describes; None for one not computed here.

    Args:
        config: the parsed file.
        width: D, of what is pooled.
    """
    features, bias = config.get("out_features"), config.get("bias", True)
    activation = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    plain = (
        config.get("in_features") == width
        and type(features) is int
        and 1 <= features < 1 << 16
        and type(bias) is bool
        and activation in ACTIVATIONS
        and not config.get("use_residual")
        and {config.get(f"module_{end}_name") for end in ("input", "output")} <= {None, _INPUT}
    )
    return DenseConfig(features, activation, bias) if plain else None


def to_config(config: DenseConfig, width: int) -> dict[str, Any]:
    """The config.json of the module; see `from_config`."""
    place = {"Identity": "linear"}.get(config.activation, "activation")
    return {
        "in_features": width,
        "out_features": config.features,
        "bias": config.bias,
        "activation_function": f"torch.nn.modules.{place}.{config.activation}",
    }


def apply(config: DenseConfig, pooled: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """f32[n, D] -> f32[n, features]; for a compact method, whose parameters get the name "dense".

    Args:
        config: see `DenseConfig`.
        pooled: embeddings before the layer.
        dtype: of the product.
    """
    y = layers.Dense(
        config.features,
        (None, None),
        kernel_init=nn.initializers.normal(0.02),
        bias_init=nn.initializers.zeros if config.bias else None,
        dtype=dtype,
        name="dense",
    )(pooled)
    return ACTIVATIONS[config.activation](layers.wide(y))
