"""Padded texts as rows of one item each, whether their values are known or traced."""

import jax.numpy as jnp

from xmc_jax.data.types import Rows


def places_of(tokens, lengths, positions=None):
    """What a backbone takes of tokens i32[n, S] and lengths i32[n]: those, segments, positions."""
    index = jnp.arange(tokens.shape[1])
    segments = jnp.where(index < jnp.asarray(lengths)[:, None], 0, -1)
    positions = index if positions is None else positions
    return tokens, segments, jnp.broadcast_to(positions, tokens.shape)


def rows_of(tokens, lengths):
    """Rows without prompts and images."""
    tokens, segments, positions = places_of(tokens, lengths)
    tokens = jnp.where(segments < 0, -1, tokens)
    return Rows(tokens, segments, positions, jnp.arange(len(tokens)))
