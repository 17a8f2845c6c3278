"""Composes what an item consists of, prompts, text and images, into one sequence."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from xmc_jax.types import ORDERS, Inputs, Prompts

POSITIONS = ("contiguous", "padded")
NO_PROMPTS = Prompts()


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


@flax.struct.dataclass
class Sequence:
    """n composed items without gaps, right padded.

    Attributes:
        tokens: i32[n, S]; -1 where an image stands, and past the end.
        lengths: i32[n].
        positions: i32[n, S] where the padding counts, else None: 0, 1, 2, ...
        images: i32[n, S], the number of the image that stands there or -1; None for text only.
    """

    tokens: jax.Array
    lengths: jax.Array
    positions: jax.Array | None = None
    images: jax.Array | None = None


def compose(
    inputs: Inputs, prompts: Prompts, order: str = "image_text", positions: str = "contiguous"
) -> Sequence:
    """Prompts, texts and images of n items, one after the other.

    All that may be there is laid out with its padding; what is there moves up over the gaps.

    Args:
        inputs: texts of at most T tokens, and at most K images.
        prompts: static token ids.
        order: see `FusionConfig`; without images it has no meaning.
        positions: see `FusionConfig`.

    Source: ViXML sec. 3.1, eq. 3, 4, supp. A.
    """
    K = 0 if inputs.images is None else inputs.images.shape[1]
    tokens = jnp.asarray(inputs.tokens)
    n, T = tokens.shape
    if not K and prompts == NO_PROMPTS:
        return Sequence(_cut(tokens, inputs.lengths), inputs.lengths)

    def prompt(ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        row = jnp.asarray(ids, tokens.dtype)
        return jnp.broadcast_to(row, (n, len(ids))), jnp.full(n, len(ids))

    count = inputs.image_count if K else jnp.zeros(n, jnp.int32)
    text, images = (tokens, inputs.lengths), (jnp.full((n, K), -1, tokens.dtype), count)
    first, second = (images, text) if order == "image_text" else (text, images)
    pieces = (prompt(prompts.head), first, prompt(prompts.middle), second, prompt(prompts.tail))
    laid_out = jnp.concatenate([piece for piece, _ in pieces], axis=1)
    S = laid_out.shape[1]
    source, end = jnp.broadcast_to(jnp.arange(S), (n, S)), 0
    for piece, length in pieces:
        end = end + length
        # What follows moves up over what this one lacks.
        gap = piece.shape[1] - length
        source = source + jnp.where(jnp.arange(S) >= end[:, None], gap[:, None], 0)
    numbers = None
    if K:
        before = len(prompts.head)
        before += 0 if first is images else T + len(prompts.middle)
        numbers = source - before
        numbers = jnp.where((numbers >= 0) & (numbers < K), numbers, -1)
    moved_up = jnp.take_along_axis(laid_out, jnp.minimum(source, S - 1), axis=1)
    return Sequence(
        tokens=_cut(moved_up, end),
        lengths=end,
        positions=source if positions == "padded" else None,
        images=numbers,
    )


def _cut(tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """-1 in the place of what stands past the end of each sequence."""
    return jnp.where(jnp.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)


def place(embeddings: jax.Array, images: jax.Array, numbers: jax.Array) -> jax.Array:
    """Token embeddings with image embeddings in their places.

    Args:
        embeddings: [n, S, D], of tokens.
        images: [n, K, D], projected.
        numbers: see `Sequence.images`.

    Returns:
        [n, S, D] of the dtype of `embeddings`.
    """
    images = images.astype(embeddings.dtype)
    for k in range(images.shape[1]):  # few; a gather would be a scatter in the backward pass
        embeddings = jnp.where((numbers == k)[..., None], images[:, k, None], embeddings)
    return embeddings
