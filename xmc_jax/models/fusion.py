"""Composes what an item consists of, prompts and text, into one sequence."""

import dataclasses

import jax
import jax.numpy as jnp

from xmc_jax.types import Inputs, Prompts

POSITIONS = ("contiguous", "padded")
NO_PROMPTS = Prompts()


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """What stands around a text that goes into a decoder; encoders take none of it.

    Attributes:
        prefix: text before the item's.
        image_prefix: text before the item's images, where it has some.
        suffix: text at the end; "" is what the tokenizer itself ends texts with, if anything.
        positions: "contiguous", counted over real tokens; or "padded", where the padding of a text
            takes positions too, as in the reference code.

    Source: ViXML eq. 1, 4, Table 6; reference code, run script for decoders.
    """

    prefix: str = ""
    image_prefix: str = ""
    suffix: str = ""
    positions: str = "contiguous"

    def __post_init__(self):
        if self.positions not in POSITIONS:
            raise ValueError(
                f"fusion.positions: expected one of {POSITIONS}, got {self.positions!r}"
            )


def compose(
    inputs: Inputs, prompts: Prompts, positions: str = "contiguous"
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Head, text and tail of n items, one after the other without gaps.

    Args:
        inputs: texts of at most T tokens.
        prompts: static token ids.
        positions: see `FusionConfig`.

    Returns:
        tokens: i32[n, S], S = len(head) + T + len(tail); right padded.
        lengths: i32[n].
        positions: i32[n, S] where the padding counts, else None: 0, 1, 2, ...

    Source: ViXML sec. 3.1, supp. A.
    """
    head, tail = prompts.head, prompts.tail
    if not head and not tail:
        return inputs.tokens, inputs.lengths, None
    tokens = jnp.asarray(inputs.tokens)
    n, T = tokens.shape
    at = jnp.arange(len(head) + T + len(tail))
    end = len(head) + inputs.lengths[:, None]  # where the tail begins
    before = jnp.broadcast_to(jnp.asarray(head, tokens.dtype), (n, len(head)))
    after = jnp.zeros((n, len(tail)), tokens.dtype)
    sequence = jnp.concatenate([before, tokens, after], axis=1)
    if tail:
        of_tail = jnp.asarray(tail, tokens.dtype)[jnp.clip(at - end, 0, len(tail) - 1)]
        sequence = jnp.where(at < end, sequence, of_tail)
    lengths = inputs.lengths + len(head) + len(tail)
    if positions == "contiguous":
        return sequence, lengths, None
    return sequence, lengths, jnp.where(at < end, at, at + (T - inputs.lengths[:, None]))
