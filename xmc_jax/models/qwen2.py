"""Qwen2 and Qwen2.5: queries, keys and values have biases."""

from collections.abc import Mapping
from typing import Any

from xmc_jax.models import decoder, decoder_config
from xmc_jax.models.decoder_config import DecoderConfig

DEFAULTS = decoder_config.DEFAULTS | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    return decoder_config.from_hf(config, "qwen2", DEFAULTS, qkv_bias=True, out_bias=False)


def _to_hf(sizes: DecoderConfig) -> dict[str, Any]:
    fields = decoder_config.to_hf(sizes, "Qwen2Model")
    del fields["attention_bias"]
    return fields


FAMILY = decoder.family("qwen2", "Qwen2Model", DEFAULTS, from_hf=_from_hf, to_hf=_to_hf)
