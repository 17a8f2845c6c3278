"""Items, rows and batches: the arrays that travel between the parts of the package.

Shape letters, the same in every docstring of the package:

    N train documents   M test documents   L labels   B documents of a batch   U labels of a batch
    T tokens per text   D model width      H heads    F feed-forward width     V vocabulary
    C free vectors      E image width      K images   k retrieved
    S tokens of a sequence, prompts included
"""

import dataclasses

import flax.struct
import jax

ORDERS = ("text_image", "image_text")
"""Allowed orders of text and images in a sequence. Encoders always put images first."""

Array = jax.Array  # or a numpy array: a batch is numpy until it is handed to the devices


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids that stand around every text of a decoder, documents and labels alike.

    A sequence is head, text, middle, images, tail; or, in the order "image_text", head, images,
    middle, text, tail. All prompts are empty for encoders, whose texts carry their special tokens
    with them.

    Source: ViXML sec. 3.1, eq. 1 and 4. Departs: the reference tokenises each piece with the
    tokenizer's special tokens, so that Llama and Gemma get a BOS before every piece; here once.

    Attributes:
        head: the tokenizer's own first tokens (BOS), if it has some, once; then the prefix of what
            comes first.
        middle: the prefix of what comes second, whether the item has images or not; () where no
            item can have any.
        tail: the closing suffix; without one, the tokenizer's own last tokens (EOS), if any.
    """

    head: tuple[int, ...] = ()
    middle: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()


NO_PROMPTS = Prompts()


@dataclasses.dataclass(frozen=True)
class DataShape:
    """Counts of a dataset: all that the shapes of a run's arrays depend on.

    Attributes:
        documents: N.
        test: M.
        labels: L.
        length: T.
        pairs: (document, label) pairs of the training set.
        positives: labels of the 1, 2, 4, ... training documents that have most, together.
        image_width: E; 0 for text only.
        images_per_item: K; 0 for text only.
    """

    documents: int
    test: int
    labels: int
    length: int
    pairs: int
    positives: tuple[int, ...]
    image_width: int = 0
    images_per_item: int = 0

    def most_positives(self, documents: int) -> int:
        """An upper bound for the labels of so many documents in a row, which repeat after all N."""
        different = min(documents, self.documents)
        at_most = self.positives[: (different - 1).bit_length() + 1][-1]
        return max(-(-documents // self.documents) * at_most, 1)


@flax.struct.dataclass
class Inputs:
    """A slice of a split, as it is read: texts, and images where there are some.

    Attributes:
        tokens: i32[n, T], right padded; what stands past `lengths` is ignored.
        lengths: i32[n], tokens per text, in [1, T]; from 0 where texts are bare, for a decoder that
            puts its prompts around them.
        images: f[n, K, E] frozen image embeddings (float16 from the image folder), or None for
            text only; what stands past `image_count` is ignored.
        image_count: i32[n], images per item, in [0, K]; or None for text only.
    """

    tokens: Array
    lengths: Array
    images: Array | None = None
    image_count: Array | None = None


def own_tokens(lengths: Array, image_count: Array | None, prompts: Prompts) -> Array:
    """Tokens of items in a row, images and prompts included but for the head that all share.

    Args:
        lengths: i[n], of texts.
        image_count: i[n], or None for text only.

    Returns:
        i[n].
    """
    closing = len(prompts.middle) + len(prompts.tail)
    return lengths + closing + (0 if image_count is None else image_count)


@flax.struct.dataclass
class Rows:
    """Items that lie one after the other in rows of R places; `data.rows` makes them.

    A row holds at most M items, its segments. The prompt that all texts begin with, the head,
    stands once at the start of each row, and every segment sees it.

    The rows are divided into groups, a device's part of a batch each, of r rows. Slots and places
    of images are counted within a group: an index past its end is that of an item or an image that
    is not there. No two of a group are equal.

    Attributes:
        tokens: i32[rows, R] token ids; -1 for an image, and where there is nothing.
        segments: i32[rows, R], the number in the row, from 0, of the item that each place belongs
            to; -1 in the head, and where there is nothing.
        positions: i32[rows, R] of each place in its own sequence, the head included.
        slots: i32[n, ...] of each item, its row times M plus its number in the row.
        images: f[n, ..., K, E] frozen image embeddings, or None for text only.
        image_places: i32[n, ..., K] of each image, its row times R plus its place in the row.
        per_row: M.
        head: tokens of the head.
        longest: `positions` are below it; None is not known.
    """

    tokens: Array
    segments: Array
    positions: Array
    slots: Array
    images: Array | None = None
    image_places: Array | None = None
    per_row: int = flax.struct.field(pytree_node=False, default=1)
    head: int = flax.struct.field(pytree_node=False, default=0)
    longest: int | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Batch:
    """Documents, and what they are compared with: labels sampled for them, or all labels.

    Attributes:
        items: texts of the B documents and of the different ones among the U sampled labels. The
            first slot of row i is that of document i; slot `1 + p` holds one of the labels, or
            none. Labels stand in any order. Where documents are compared with all labels, there is
            the first slot alone.
        document_ids: i32[B], all different.
        label_ids: i32[U], the label in slot `1 + p` of row i, at `i * positives_per_document + p`;
            0 where there is none. None, like the next two, where documents are compared with all
            labels.
        columns: i32[U], which of `label_ids` is the label of each column; column
            `i * positives_per_document + p` was sampled for row i.
        relevance: bool[B, U]; `relevance[i, j]` says that the label of column j is a positive of
            document_ids[i].
        positives: i32[m], the positives of all documents, one document after the other, in an equal
            part for each shard of the batch, which is filled up with L. None, like the next two,
            where labels are sampled.
        owners: i32[m], the row of the document that has each of `positives`.
        frequency: f32[m], training documents that have each of `positives`, 1 as padding.
    """

    items: Rows
    document_ids: Array
    label_ids: Array | None = None
    columns: Array | None = None
    relevance: Array | None = None
    positives: Array | None = None
    owners: Array | None = None
    frequency: Array | None = None
