"""The list of model families: the one place that knows all of them."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from xmc_jax.config import LoraConfig
from xmc_jax.models import bert, gemma3, llama, qwen2, qwen3, vision
from xmc_jax.models.bert import BertConfig
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.models.family import Family
from xmc_jax.models.vision import VisionConfig

Sizes = BertConfig | DecoderConfig

FAMILIES = {
    family.name: family
    for family in (
        bert.BERT,
        bert.DISTILBERT,
        llama.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma3.FAMILY,
    )
}
"""Text encoders by name."""
IMAGE_FAMILIES = {family.name: family for family in (vision.SIGLIP, vision.VIT)}
"""Image encoders by name."""


def family_of(sizes: Sizes | VisionConfig) -> Family:
    """The family of a model.

    Raises:
        ValueError: there is none of that name.
    """
    known = IMAGE_FAMILIES if isinstance(sizes, VisionConfig) else FAMILIES
    if sizes.family not in known:
        raise ValueError(
            f"{type(sizes).__name__}.family: expected one of {tuple(known)}, got {sizes.family!r}"
        )
    return known[sizes.family]


def is_decoder(sizes: Sizes) -> bool:
    """Whether attention is causal; decoders take prompts, and texts without special tokens."""
    return family_of(sizes).causal


def build(sizes: Sizes, dtype: str, remat: str, lora: LoraConfig) -> nn.Module:
    """The module of a backbone.

    Args:
        sizes: of the backbone.
        dtype: of activations and products.
        remat: see `layers.stack`.
        lora: its adapters.

    Raises:
        ValueError: a target of `lora` is not one of its layers.
    """
    family = family_of(sizes)
    lora.check_targets(family.projections)
    return family.module(sizes, jnp.dtype(dtype), remat, lora)


def from_hf(config: Mapping[str, Any]) -> Sizes:
    """The sizes in a text encoder's config.json.

    Raises:
        ValueError: an unknown architecture, a variant that is not computed here, a field of the
            wrong type, or sizes that do not fit together.
    """
    return _from_hf(config, FAMILIES)


def images_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    """The sizes in an image encoder's config.json; raises as `from_hf`."""
    return _from_hf(config, IMAGE_FAMILIES)


def _from_hf(config: Mapping[str, Any], families: Mapping[str, Family]) -> Any:
    by_type = {kind: family for family in families.values() for kind in family.model_types}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in by_type:
        raise ValueError(
            f"config.json: expected model_type to be one of {tuple(by_type)}, got {kind!r} "
            f"(architectures {config.get('architectures')})"
        )
    return by_type[kind].from_hf(config)


def to_hf(sizes: Sizes | VisionConfig) -> dict[str, Any]:
    """The config.json of a model; `from_hf` reads it back."""
    return family_of(sizes).to_hf(sizes)
