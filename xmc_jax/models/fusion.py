"""What an item's sequence is made of, prompts, text and images, and what a backbone takes."""

from xmc_jax.config import FusionConfig, choices
from xmc_jax.data.types import NO_PROMPTS, Prompts

POSITIONS = choices(FusionConfig, "positions")


def check(decoder: bool, longest: int, most: int, prompts: Prompts, order: str) -> None:
    """Raises ValueError unless a backbone takes such sequences.

    Args:
        decoder: whether it is one.
        longest: tokens of the longest sequence, prompts and images included.
        most: as many as it has positions for.
        prompts: around each text.
        order: see `FusionConfig`.
    """
    if longest > most:
        kind = "prompts" if decoder else "images"
        raise ValueError(
            f"encoder: expected texts of at most {most} tokens, {kind} included, got {longest}; "
            "prepare the data with a smaller --config.data.max_length"
        )
    if decoder:
        return
    if prompts != NO_PROMPTS:
        raise ValueError(
            "fusion: expected no prefix and no suffix, which only decoders take, got some"
        )
    if order != "image_text":
        raise ValueError(
            f"fusion.order: expected 'image_text', as encoders take images, got {order!r}"
        )
