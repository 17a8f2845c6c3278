"""Items in rows without padding: first-fit decreasing, then prompts, texts and images. Pure numpy.

A row has R places and holds items one after the other, as many as fit. What a model computes is of
the shape [rows, R], whatever the lengths of the items are.
"""

import dataclasses
import math

import jax
import numpy as np

from xmc_jax.data.types import NO_PROMPTS, Inputs, Prompts, Rows, own_tokens

_SHORTEST = 4  # tokens of an item, of which as many as fit may share a row
_LENGTHS = 1 << 15  # of items, that the places of a row are chosen by
_ATTENTION = 0.6  # the cost of a place in attention by that of its D numbers elsewhere, of a layer
_HEADS = 16  # a row has so many times the places of its head, so that the head is a small part


@dataclasses.dataclass(frozen=True)
class Layout:
    """How items become rows; see `types.Rows`.

    Attributes:
        prompts: around each text.
        order: of text and images, one of `types.ORDERS`.
        positions: "contiguous", counted over what is there; or "padded", where the padding of a
            text and images that are missing count, too.
        length: T, most tokens of a text.
        images: K, most images of an item.
        width: R, places of a row.
        per_row: M, most items of a row.
    """

    prompts: Prompts
    order: str
    positions: str
    length: int
    images: int
    width: int
    per_row: int

    @property
    def head(self) -> int:
        """Tokens of the prompt that all texts begin with."""
        return len(self.prompts.head)

    @property
    def longest(self) -> int:
        """Most tokens of an item, without the head."""
        return longest(self.prompts, self.length, self.images)

    @property
    def places(self) -> int:
        """Places of a row without its head."""
        return self.width - self.head

    def own_tokens(self, items: Inputs) -> np.ndarray:
        """i64[n], see `types.own_tokens`."""
        return own_tokens(items.lengths.astype(np.int64), items.image_count, self.prompts)

    def most_rows(self, items: int) -> int:
        """Rows that hold any so many items.

        Of rows but the last, each holds so many of the longest: a row is full only when the next
        item does not fit.
        """
        return -(-items // min(self.per_row, max(1, self.places // max(1, self.longest))))


def layout(
    prompts: Prompts, order: str, positions: str, length: int, images: int, multiple: int | None
) -> Layout:
    """The layout for items of some size.

    Args:
        multiple: what the places of a row are a multiple of: 64 suits CPUs, 128 GPUs and TPUs.
            None is one item per row, with all its padding.
    """
    width, per_row = len(prompts.head) + longest(prompts, length, images), 1
    if multiple is not None:
        width = -(-max(width, _HEADS * len(prompts.head)) // multiple) * multiple
        per_row = width // _SHORTEST
    return Layout(prompts, order, positions, length, images, width, per_row)


def suited(layout: Layout, lengths: np.ndarray, multiple: int, hidden: int) -> Layout:
    """The layout with as many places in a row as make a model fastest.

    Short rows cost attention less; how full they are depends on the lengths.

    Args:
        lengths: i[n], own tokens of items like those that will be laid out.
        multiple: what the places of a row are a multiple of.
    """
    lengths = lengths[:: 1 + len(lengths) // _LENGTHS]
    least = -(-max(layout.head + layout.longest, _HEADS * layout.head) // multiple) * multiple
    result = []
    for width in range(least, 2 * least + 1, multiple):
        one = dataclasses.replace(layout, width=width, per_row=width // _SHORTEST)
        # Of a place: what is computed once, and what attention computes with each place of its row.
        cost = 1 + _ATTENTION * width / hidden
        result.append((fit(one, lengths).rows * width * cost, one))
    return min(result, key=lambda pair: pair[0])[1]


def longest(prompts: Prompts, length: int, images: int) -> int:
    """See `Layout.longest`."""
    return length + images + len(prompts.middle) + len(prompts.tail)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where items lie. All are of n items."""

    group: np.ndarray  # i64[n], which group of rows each is in
    row: np.ndarray  # i64[n], in its group
    start: np.ndarray  # i64[n], its first place in the row, the head not counted
    number: np.ndarray  # i64[n], how many items stand before it in the row

    def take(self, chosen: np.ndarray, group: np.ndarray) -> "Fit":
        """Some of the items, with other numbers for their groups."""
        return Fit(group, self.row[chosen], self.start[chosen], self.number[chosen])

    @property
    def rows(self) -> int:
        """Rows of the group that has most."""
        return int(self.row.max(initial=-1)) + 1


def fit(layout: Layout, lengths: np.ndarray, group: np.ndarray | None = None) -> Fit:
    """First-fit decreasing in each group.

    Args:
        lengths: i[n], own tokens of each item.
        group: i[n], the group of each; None is one for all.
    """
    n = len(lengths)
    if group is None or not group.any():
        return Fit(np.zeros(n, np.int64), *first_fit(lengths, layout.places, layout.per_row))
    result = [np.empty(n, np.int64) for _ in range(3)]
    for number in np.unique(group):
        chosen = np.flatnonzero(group == number)
        fitted = first_fit(lengths[chosen], layout.places, layout.per_row)
        for whole, part in zip(result, fitted):
            whole[chosen] = part
    return Fit(group, *result)


def first_fit(lengths: np.ndarray, places: int, most: int) -> tuple[np.ndarray, ...]:
    """Items to rows, longest first, each to the first row that it fits into.

    Row by row: each takes the longest items that are left and fit. Rows that come out alike are
    filled together, so that the time follows from the number of different lengths.

    Args:
        lengths: i[n], at least 0.

    Returns:
        i64[n] each: the row, the first place in it, and the number of items before it in the row.

    Raises:
        ValueError: an item is longer than a row.
    """
    n = len(lengths)
    row, start, number = (np.empty(n, np.int64) for _ in range(3))
    if lengths.max(initial=0) > places:
        raise ValueError(f"rows: expected items of at most {places} tokens, got {lengths.max()}")
    ordered = np.argsort(-lengths.astype(np.int32), kind="stable")
    values, counts = (x[::-1].tolist() for x in np.unique(lengths, return_counts=True))
    nexts = (np.cumsum(counts) - counts).tolist()
    rows, left = 0, n
    while left:
        free, taken, parts = places, 0, []
        for i, value in enumerate(values):
            fitting = most - taken
            if value:
                fitting = min(fitting, free // value)
            if count := min(counts[i], fitting):
                parts.append((i, count, places - free, taken))
                free -= count * value
                taken += count
                if taken == most:
                    break
        alike = min(counts[i] // count for i, count, *_ in parts)
        for i, count, begin, before in parts:
            chosen = ordered[nexts[i] : nexts[i] + alike * count].reshape(alike, count)
            row[chosen] = np.arange(rows, rows + alike)[:, None]
            start[chosen] = begin + values[i] * np.arange(count)
            number[chosen] = before + np.arange(count)
            nexts[i] += alike * count
            counts[i] -= alike * count
        if 0 in counts:
            there = [i for i, count in enumerate(counts) if count]
            values, counts, nexts = ([x[i] for i in there] for x in (values, counts, nexts))
        left -= alike * taken
        rows += alike
    return row, start, number


def compose(
    layout: Layout,
    items: Inputs,
    fitted: Fit,
    rows: int,
    at: np.ndarray | None = None,
    slots: tuple[int, ...] | None = None,
    groups: int = 1,
    chunks: int = 1,
) -> Rows:
    """Prompts, texts and images of n items, written into rows.

    Args:
        rows: of each group; at least `fitted.rows`.
        at: i[n], the number of each item among the slots; their order by default.
        slots: shape of the slots, over all groups; n of them by default.
        groups: how many. Row i of group `s * chunks + c` is row `(s * rows + i) * chunks + c`.
        chunks: parts of each device's rows, which stand in turn.

    Source: ViXML sec. 3.1, eq. 3, 4, supp. A.
    """
    n, prompts, shards = len(items.lengths), layout.prompts, groups // chunks
    at, slots = np.arange(n) if at is None else at, (n,) if slots is None else slots

    def indices(end: int, *shape: int) -> np.ndarray:
        """i32[*slots, *shape], all past the end, and those of a shard different."""
        one = np.arange(end, end + math.prod((*slots, *shape)) // shards, dtype=np.int32)
        return np.tile(one, shards).reshape(*slots, *shape)

    def by_slot(x: np.ndarray) -> np.ndarray:
        """A view in which the slots are the first axis."""
        return x.reshape(-1, *x.shape[len(slots) :])

    writer = _Writer(layout, fitted, rows, groups, chunks)
    result = Rows(
        tokens=writer.tokens,
        segments=writer.segments,
        positions=writer.positions,
        slots=indices(rows * layout.per_row),
        per_row=layout.per_row,
        head=layout.head,
        longest=layout.head + layout.longest,
    )
    by_slot(result.slots)[at] = fitted.row * layout.per_row + fitted.number
    if items.images is not None:
        shape, dtype = items.images.shape[1:], items.images.dtype
        result = result.replace(
            images=np.zeros((*slots, *shape), dtype),
            image_places=indices(rows * layout.width, shape[0]),
        )
        by_slot(result.images)[at] = items.images

    def write_text() -> None:
        writer.write(items.tokens, items.lengths)

    def write_images() -> None:
        if items.images is not None:
            count, number = items.image_count, np.arange(result.image_places.shape[-1])
            places = by_slot(result.image_places)
            there = number < count[:, None]
            places[at] = np.where(there, writer.place_in_group()[:, None] + number, places[at])
            writer.write(np.full((n, len(number)), -1), count)

    first, second = write_text, write_images
    if layout.order == "image_text":
        first, second = second, first
    first()
    writer.write_prompt(prompts.middle)
    second()
    writer.write_prompt(prompts.tail)
    return result


class _Writer:
    """Rows into which n items are written, piece by piece. They have their heads already.

    Attributes:
        tokens: see `types.Rows`.
        segments: see there.
        positions: see there.
    """

    def __init__(self, layout: Layout, fitted: Fit, rows: int, groups: int, chunks: int):
        self._layout, self._fitted, head = layout, fitted, layout.head
        self.tokens = np.full((groups * rows, layout.width), -1, np.int32)
        self.segments, self.positions = np.full_like(self.tokens, -1), np.zeros_like(self.tokens)
        self.tokens[:, :head], self.positions[:, :head] = layout.prompts.head, np.arange(head)
        shard, chunk = np.divmod(fitted.group, chunks)
        self._row = (shard * rows + fitted.row) * chunks + chunk
        # Where the next piece of each item goes, and the position of its first token.
        self._place = self._row * layout.width + head + fitted.start
        self._position = np.full(len(self._row), head)

    def place_in_group(self) -> np.ndarray:
        """i64[n], the next place of each item, counted within its group."""
        return self._place - (self._row - self._fitted.row) * self._layout.width

    def write(self, piece: np.ndarray, count: np.ndarray) -> None:
        """Writes the first `count`, i[n], of i[n, w] tokens."""
        offset = np.arange(piece.shape[1])
        there = offset < count[:, None]
        target = (self._place[:, None] + offset)[there]
        self.tokens.reshape(-1)[target] = piece[there]
        self.segments.reshape(-1)[target] = np.repeat(self._fitted.number, count)
        self.positions.reshape(-1)[target] = (self._position[:, None] + offset)[there]
        self._place = self._place + count
        padded = self._layout.positions == "padded"
        self._position = self._position + (len(offset) if padded else count)

    def write_prompt(self, ids: tuple[int, ...]) -> None:
        """Writes the same tokens for all items."""
        if ids:
            shape = len(self._row), len(ids)
            self.write(np.broadcast_to(np.array(ids), shape), np.full(shape[0], len(ids)))


def one_each(
    items: Inputs,
    prompts: Prompts = NO_PROMPTS,
    order: str = "image_text",
    positions: str = "contiguous",
) -> Rows:
    """Items with a row of its own each, with room for the longest."""
    items = jax.tree.map(np.asarray, items)
    images = 0 if items.images is None else items.images.shape[1]
    of = layout(prompts, order, positions, items.tokens.shape[1], images, None)
    fitted = Fit(*(np.arange(len(items.lengths)) * factor for factor in (0, 1, 0, 0)))
    return compose(of, items, fitted, len(items.lengths))
