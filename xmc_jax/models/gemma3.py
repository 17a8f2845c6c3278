"""Gemma 3: sliding layers with a rotary base of their own, norms around each sublayer.

Of the multimodal models, whose config.json has a text_config, only the text model is read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from xmc_jax.models import decoder, decoder_config
from xmc_jax.models.decoder_config import DecoderConfig
from xmc_jax.models.family import named, read_fields

DEFAULTS = decoder_config.DEFAULTS | {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "sliding_window": 4096,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_TENSORS = decoder.TENSORS | named(
    {
        "layers/attention_post_norm": "layers.{}.post_attention_layernorm",
        "layers/mlp_norm": "layers.{}.pre_feedforward_layernorm",
        "layers/mlp_post_norm": "layers.{}.post_feedforward_layernorm",
    }
)


def _from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    text = config
    if config["model_type"] == "gemma3":
        text = config.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"config.json: expected text_config to be an object, got {text!r}")
    given = read_fields(
        text,
        {
            "pattern": ("sliding_window_pattern", 6),
            "local_rope_theta": ("rope_local_base_freq", 10_000.0),
            "query_width": ("query_pre_attn_scalar", 256),
            "hidden_act": ("hidden_activation", text.get("hidden_act", DEFAULTS["hidden_act"])),
        },
    )
    if (pattern := given.pop("pattern")) < 1:
        raise ValueError(
            f"config.json: expected sliding_window_pattern of at least 1, got {pattern}"
        )
    if isinstance(text.get("rope_parameters"), Mapping):
        given["local_rope_theta"], _ = decoder_config.read_rope(text, DEFAULTS, "sliding_attention")
    sizes = decoder_config.from_hf(
        text,
        "gemma3",
        DEFAULTS,
        rope_kind="full_attention",
        slides=lambda layer: (layer + 1) % pattern != 0,
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
        **given,
    )
    return dataclasses.replace(sizes, embedding_scale=math.sqrt(sizes.hidden))


def _to_hf(sizes: DecoderConfig) -> dict[str, Any]:
    fields = decoder_config.to_hf(sizes, "Gemma3TextModel") | {
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": sizes.query_width or sizes.head_dim,
        "rope_local_base_freq": sizes.local_rope_theta,
    }
    fields["hidden_activation"] = fields.pop("hidden_act")
    fields.pop("use_sliding_window", None)
    return fields


FAMILY = decoder.family(
    "gemma3",
    "Gemma3TextModel",
    DEFAULTS,
    model_types=("gemma3_text", "gemma3"),
    from_hf=_from_hf,
    to_hf=_to_hf,
    tensors=_TENSORS,
)
