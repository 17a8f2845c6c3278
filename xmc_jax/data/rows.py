"""Items in rows without padding: first-fit decreasing, then prompts, texts and images. Pure numpy.

A row has R places and holds items one after the other, as many as fit. What a model computes is of
the shape [rows, R], whatever the lengths of the items are.
"""

import dataclasses
import math

import jax
import numpy as np

from xmc_jax.types import NO_PROMPTS, Inputs, Prompts, Rows, own_tokens

_SHORTEST = 4  # tokens of an item, of which as many as fit may share a row
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
        prompts: see `Layout`.
        order: see `Layout`.
        positions: see `Layout`.
        length: see `Layout`.
        images: see `Layout`.
        multiple: what the places of a row are a multiple of: 64 suits CPUs, 128 GPUs and TPUs.
            None is one item per row, with all its padding.
    """
    width, per_row = len(prompts.head) + longest(prompts, length, images), 1
    if multiple is not None:
        width = -(-max(width, _HEADS * len(prompts.head)) // multiple) * multiple
        per_row = width // _SHORTEST
    return Layout(prompts, order, positions, length, images, width, per_row)


def longest(prompts: Prompts, length: int, images: int) -> int:
    """See `Layout.longest`."""
    return length + images + len(prompts.middle) + len(prompts.tail)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Where items lie. All are of n items.

    Attributes:
        group: i64[n], which group of rows each is in.
        row: i64[n], in its group.
        start: i64[n], its first place in the row, the head not counted.
        number: i64[n], how many items stand before it in the row.
    """

    group: np.ndarray
    row: np.ndarray
    start: np.ndarray
    number: np.ndarray

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
        layout: see `Layout`.
        lengths: i[n], own tokens of each item.
        group: i[n], the group of each; None is one for all.
    """
    n = len(lengths)
    if group is None or not group.any():
        return Fit(np.zeros(n, np.int64), *first_fit(lengths, layout.places, layout.per_row))
    found = [np.empty(n, np.int64) for _ in range(3)]
    for number in np.unique(group):
        chosen = np.flatnonzero(group == number)
        fitted = first_fit(lengths[chosen], layout.places, layout.per_row)
        for whole, part in zip(found, fitted):
            whole[chosen] = part
    return Fit(group, *found)


def first_fit(lengths: np.ndarray, places: int, most: int) -> tuple[np.ndarray, ...]:
    """Items to rows, longest first, each to the first row that it fits into.

    Row by row: each takes the longest items that are left and fit. Rows that come out alike are
    filled together, so that the time follows from the number of different lengths.

    Args:
        lengths: i[n], at least 0.
        places: of a row.
        most: items of a row.

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
        layout: see `Layout`.
        items: numpy arrays, of the n items.
        fitted: where they lie.
        rows: of each group; at least `fitted.rows`.
        at: i[n], the number of each item among the slots; their order by default.
        slots: shape of the slots, over all groups; n of them by default.
        groups: how many. Row i of group `s * chunks + c` is row `(s * rows + i) * chunks + c`.
        chunks: parts of each device's rows, which stand in turn.

    Source: ViXML sec. 3.1, eq. 3, 4, supp. A.
    """
    n, width, head, prompts = len(items.lengths), layout.width, layout.head, layout.prompts
    at, slots = np.arange(n) if at is None else at, (n,) if slots is None else slots
    count, shards = math.prod(slots), groups // chunks
    shard, chunk = np.divmod(fitted.group, chunks)
    row = (shard * rows + fitted.row) * chunks + chunk
    tokens = np.full((groups * rows, width), -1, np.int32)
    segments, positions = np.full_like(tokens, -1), np.zeros_like(tokens)
    tokens[:, :head], positions[:, :head] = prompts.head, np.arange(head)
    place, position = row * width + head + fitted.start, np.full(n, head)

    def write(piece: np.ndarray, count: np.ndarray) -> None:
        nonlocal place, position
        offset = np.arange(piece.shape[1])
        there = offset < count[:, None]
        target = (place[:, None] + offset)[there]
        tokens.reshape(-1)[target] = piece[there]
        segments.reshape(-1)[target] = np.repeat(fitted.number, count)
        positions.reshape(-1)[target] = (position[:, None] + offset)[there]
        place = place + count
        position = position + (len(offset) if layout.positions == "padded" else count)

    def write_prompt(ids: tuple[int, ...]) -> None:
        if ids:
            write(np.broadcast_to(np.array(ids), (n, len(ids))), np.full(n, len(ids)))

    def write_text() -> None:
        write(items.tokens, items.lengths)

    def past_the_end(end: int, *shape: int) -> np.ndarray:
        one = np.arange(end, end + count // shards * math.prod(shape), dtype=np.int32)
        return np.tile(one, shards).reshape(count, *shape)

    found = Rows(
        tokens=tokens,
        segments=segments,
        positions=positions,
        slots=past_the_end(rows * layout.per_row),
        per_row=layout.per_row,
        head=head,
        longest=head + layout.longest,
    )
    found.slots[at] = fitted.row * layout.per_row + fitted.number
    images = items.images
    if images is not None:
        per_item = images.shape[1]
        found = found.replace(
            images=np.zeros((count, *images.shape[1:]), images.dtype),
            image_places=past_the_end(rows * width, per_item),
        )
        found.images[at] = images

    def write_images() -> None:
        if images is None:
            return
        local = place - (row - fitted.row) * width
        there = np.arange(per_item) < items.image_count[:, None]
        found.image_places[at] = np.where(
            there, local[:, None] + np.arange(per_item), found.image_places[at]
        )
        write(np.full((n, per_item), -1), items.image_count)

    first, second = write_text, write_images
    if layout.order == "image_text":
        first, second = second, first
    first()
    write_prompt(prompts.middle)
    second()
    write_prompt(prompts.tail)
    found = found.replace(slots=found.slots.reshape(slots))
    if images is None:
        return found
    return found.replace(
        images=found.images.reshape(*slots, *images.shape[1:]),
        image_places=found.image_places.reshape(*slots, per_item),
    )


def one_each(
    items: Inputs,
    prompts: Prompts = NO_PROMPTS,
    order: str = "image_text",
    positions: str = "contiguous",
) -> Rows:
    """Items with a row of its own each, with room for the longest.

    Args:
        items: numpy arrays.
        prompts: see `Layout`.
        order: see `Layout`.
        positions: see `Layout`.
    """
    items = jax.tree.map(np.asarray, items)
    images = 0 if items.images is None else items.images.shape[1]
    of = layout(prompts, order, positions, items.tokens.shape[1], images, None)
    fitted = Fit(*(np.arange(len(items.lengths)) * factor for factor in (0, 1, 0, 0)))
    return compose(of, items, fitted, len(items.lengths))
