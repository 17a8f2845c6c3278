"""A config.json of sizes that no model has is refused before anything is made of them."""

import json
import math

import pytest

from xmc_jax.data import packaged
from xmc_jax.models import backbone

QWEN = json.loads((packaged.tiny_decoder() / "config.json").read_text())
GEMMA = {
    "model_type": "gemma3_text",
    **{"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 4},
    **{"num_key_value_heads": 1, "intermediate_size": 16, "vocab_size": 32},
}


@pytest.mark.parametrize("base", [QWEN, GEMMA])
@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**12},
        {"hidden_size": 10**12},
        {"vocab_size": 10**30},
        {"rms_norm_eps": math.nan},
        {"rope_theta": math.nan},
        {"rope_theta": -1.0},
        {"rope_scaling": {"rope_type": "linear", "factor": math.inf}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 0}},
        {
            "rope_scaling": {
                **{"rope_type": "llama3", "factor": 2.0},
                "original_max_position_embeddings": math.inf,
            }
        },
    ],
)
def test_decoders(base, fields):
    backbone.from_hf(base)
    with pytest.raises(ValueError, match="expected") as refused:
        backbone.from_hf(base | fields)
    assert "\n" not in str(refused.value)


def test_a_pattern_of_no_layers():
    with pytest.raises(ValueError, match="sliding_window_pattern of at least 1, got 0"):
        backbone.from_hf(GEMMA | {"sliding_window_pattern": 0})


@pytest.mark.parametrize(
    "fields",
    [{"model_type": ["vit"]}, {"num_hidden_layers": 10**12}, {"layer_norm_eps": math.nan}],
)
def test_image_encoders(fields):
    backbone.images_from_hf({"model_type": "vit"})
    with pytest.raises(ValueError, match="expected"):
        backbone.images_from_hf({"model_type": "vit"} | fields)
