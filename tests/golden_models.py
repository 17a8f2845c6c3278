"""The tiny models of `tests/golden`, one per family, with what transformers computes of them."""

import functools
import pathlib

import numpy as np

from xmc_jax.models import backbone, hf, hf_weights

FOLDER = pathlib.Path(__file__).parent / "golden"
ENCODERS = tuple(name for name, family in backbone.FAMILIES.items() if not family.causal)
DECODERS = tuple(name for name, family in backbone.FAMILIES.items() if family.causal)


@functools.cache
def golden(family):
    """Sizes, parameters, and arrays: tokens, lengths, hidden_states."""
    source = hf.resolve(str(FOLDER / family))
    config = hf.load_config(source)
    return config, hf_weights.load_params(source, config), np.load(FOLDER / f"{family}.npz")
