"""Llama 3: the decoder stack as it is."""

from xmc_jax.models import decoder, decoder_config

FAMILY = decoder.family("llama", "LlamaModel", decoder_config.DEFAULTS)
