"""What an item's sequence is made of, prompts, text and images, and what a backbone takes."""

import dataclasses

from xmc_jax.data.types import NO_PROMPTS, ORDERS, Prompts

POSITIONS = ("contiguous", "padded")


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """What an item's sequence is made of. Encoders put images first, and take no other prompts
    than those before texts.

    Attributes:
        prefix: text before the item's. An encoder tokenises both as one, as sentence-transformers
            does: what stands between them, such as a blank, belongs to the prefix. None is what the
            folder of an encoder says, see `hf_modules.Modules.prompt`; of a decoder, nothing.
        label_prefix: the same of labels, for encoders alone. None is as the folder says if `prefix`
            is None, else as `prefix`.
        image_prefix: text before the item's images, in runs with images; also for an item that has
            none.
        suffix: text at the end; "" is what the tokenizer itself ends texts with, if anything.
        order: "text_image" or "image_text".
        positions: "contiguous", counted over what is there; or "padded", where the padding of a
            text and images that are missing take positions too, as in the reference code.

    Source: ViXML eq. 1, 3, 4, Table 6; reference code, run scripts.
    """

    prefix: str | None = None
    label_prefix: str | None = None
    image_prefix: str = ""
    suffix: str = ""
    order: str = "image_text"
    positions: str = "contiguous"

    def __post_init__(self):
        for name, known in (("order", ORDERS), ("positions", POSITIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"fusion.{name}: expected one of {known}, got {value!r}")


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
