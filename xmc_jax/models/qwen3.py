"""Qwen3: queries and keys are normalised per head."""

from collections.abc import Mapping
from typing import Any

from xmc_jax.models import decoder, decoder_config, qwen2
from xmc_jax.models.decoder_config import DecoderConfig

DEFAULTS = qwen2.DEFAULTS | {"head_dim": 128}


def _from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    return decoder_config.from_hf(config, "qwen3", DEFAULTS, qk_norm=True)


FAMILY = decoder.family("qwen3", "Qwen3Model", DEFAULTS, from_hf=_from_hf)
