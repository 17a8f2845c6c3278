"""Which backbone a model is: the one place that tells encoders and decoders apart."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from xmc_jax.config import LoraConfig
from xmc_jax.models import bert, decoder, decoder_config
from xmc_jax.models.bert import Bert, BertConfig
from xmc_jax.models.decoder import Decoder
from xmc_jax.models.decoder_config import DecoderConfig

Sizes = BertConfig | DecoderConfig


def is_decoder(sizes: Sizes) -> bool:
    """Whether it is causal, takes prompts, and texts without the tokenizer's special tokens."""
    return isinstance(sizes, DecoderConfig)


def build(sizes: Sizes, dtype: str, remat: str, lora: LoraConfig) -> Bert | Decoder:
    """The module of a backbone.

    Args:
        sizes: of the backbone.
        dtype: of activations and products.
        remat: see `Decoder`.
        lora: its adapters.

    Raises:
        ValueError: a target of `lora` is not one of its layers.
    """
    family, module = (decoder, Decoder) if is_decoder(sizes) else (bert, Bert)
    lora.check_targets(family.PROJECTIONS)
    return module(sizes, jnp.dtype(dtype), remat, lora)


def from_hf(config: Mapping[str, Any]) -> Sizes:
    """The sizes in a Hugging Face config.json.

    Raises:
        ValueError: an architecture that is not there, naming those that are, or see
            `decoder_config.from_hf`.
    """
    kind = config.get("model_type")
    if kind in bert.FAMILIES:
        return bert.from_hf(config)
    if kind in decoder_config.MODEL_TYPES:
        return decoder_config.from_hf(config)
    known = (*bert.FAMILIES, *decoder_config.MODEL_TYPES)
    raise ValueError(
        f"config.json: expected model_type to be one of {known}, got {kind!r} "
        f"(architectures {config.get('architectures')})"
    )


def to_hf(sizes: Sizes) -> dict[str, Any]:
    """The config.json of a backbone; `from_hf` reads it back."""
    return (decoder_config if is_decoder(sizes) else bert).to_hf(sizes)
