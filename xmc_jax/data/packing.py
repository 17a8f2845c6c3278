"""Which room a batch without padding gets, from the lengths of what is in it. Pure numpy.

A program is compiled for each room, so there are few: one that fits nearly every batch of documents
in random order, larger ones for batches of clusters, whose lengths are alike, and one that fits
all. The lengths looked at are those of the whole batch, so that all processes take the same.
"""

import dataclasses
import heapq

import numpy as np

from xmc_jax.types import Packing, Prompts

CLASSES = 4  # of length, in which attention is computed
_LARGER = (1.0, 1.1, 1.25)  # rooms, by the one for documents in random order
_MULTIPLE = 64  # of tokens; a tile of a matrix product is no larger


@dataclasses.dataclass(frozen=True)
class Groups:
    """How a batch is divided: each part is packed by itself.

    Row b is in part b mod `chunks` of the batch shard that it lies on.

    Attributes:
        shards: devices' parts of a batch.
        chunks: parts of these that are encoded one after the other.
        prompts: around each text; what all texts begin with is not counted.
        width: S, most tokens of a sequence without that.
    """

    shards: int
    chunks: int
    prompts: Prompts
    width: int

    def of(self, rows: int) -> np.ndarray:
        """i64[rows], the group of each row of a batch.

        Raises:
            ValueError: groups would not have the same number of rows.
        """
        if rows % (self.shards * self.chunks):
            raise ValueError(
                f"train.batch_size: expected a multiple of {self.shards} batch shards times "
                f"{self.chunks} chunks, got {rows}"
            )
        shard, within = np.divmod(np.arange(rows), rows // self.shards)
        return shard * self.chunks + within % self.chunks


def rooms(samples: list[np.ndarray], width: int) -> tuple[Packing, ...]:
    """The rooms of a run, ascending; the last fits any batch.

    Args:
        samples: i[g, m] of some batches, lengths of the m sequences of each group.
        width: S.
    """
    lengths = np.sort(np.concatenate(samples), axis=1)
    sums, m = lengths.sum(axis=1), lengths.shape[1]
    tokens = max(sums.mean() + 3 * sums.std(), sums.max())
    ends = np.unique(np.linspace(0, m, min(CLASSES, m) + 1).round().astype(int))
    widest = lengths[:, ends[1:] - 1].max(axis=0) + 1
    widest[-1] = width
    found = []
    for factor in _LARGER:
        widths = np.minimum(np.ceil(factor * widest).astype(int), width)
        classes: dict[int, int] = {}
        for count, to in zip(np.diff(ends), widths):
            classes[int(to)] = classes.get(int(to), 0) + int(count)
        most = sum(count * to for to, count in classes.items())
        room = int(-(-factor * tokens // _MULTIPLE) * _MULTIPLE)
        classes = tuple((count, to) for to, count in classes.items())
        found.append(Packing(min(room, most), classes))
    found.append(whole(m, width))
    return tuple(dict.fromkeys(found))


def widths(lengths: np.ndarray, most: int) -> tuple[int, ...]:
    """Widths for items that are encoded by length, such that little is padded.

    Args:
        lengths: i[n], tokens of all items.
        most: how many widths, at most.

    Returns:
        Ascending; the last is the longest item's.
    """
    values, counts = np.unique(np.maximum(lengths, 1), return_counts=True)
    items = np.append(0, np.cumsum(counts))
    # cost[j]: places of the values before j, with as many widths as the round.
    cost, chosen = np.append(0.0, np.full(len(values), np.inf)), []
    for _ in range(min(most, len(values))):
        # Of [i, j]: the last width is values[j], of the values from i on.
        tried = cost[:-1, None] + (items[None, 1:] - items[:-1, None]) * values.astype(float)
        tried[np.tri(len(values), k=-1, dtype=bool)] = np.inf
        cost = np.append(np.inf, tried.min(axis=0))
        chosen.append(tried.argmin(axis=0))
    found, end = [], len(values)
    for first in reversed(chosen):
        if end:
            found.append(int(values[end - 1]))
            end = int(first[end - 1])
    return tuple(reversed(found))


def whole(count: int, width: int) -> Packing:
    """Room for any `count` sequences of at most `width` tokens."""
    return Packing(count * width, ((count, width),))


def choose(known: tuple[Packing, ...], lengths: np.ndarray) -> Packing:
    """The first room that a batch fits into.

    Args:
        known: as of `rooms`.
        lengths: i[g, m], of the sequences of each group.
    """
    lengths = np.sort(lengths, axis=1)
    tokens, most = int(lengths.sum(axis=1).max()), lengths.max(axis=0)
    for room in known[:-1]:
        widths = np.repeat(*np.array(room.classes).T[::-1])
        if (room.padded or tokens <= room.tokens) and (most <= widths).all():
            return room
    return known[-1]


def deal(loads: np.ndarray, lengths: np.ndarray, places: int) -> np.ndarray:
    """Sequences dealt to groups so that these have about as many tokens each.

    Longest first, each to the group that has fewest tokens, of those with a place left.

    Args:
        loads: i[g], tokens that each has already.
        lengths: i[u], tokens of the sequences.
        places: of each group; g times as many are at least u.

    Returns:
        i64[u], the group of each.
    """
    groups = np.zeros(len(lengths), np.int64)
    if len(loads) == 1:
        return groups
    heap = [(int(load), group) for group, load in enumerate(loads)]
    heapq.heapify(heap)
    left = [places] * len(loads)
    for sequence in np.argsort(-lengths, kind="stable").tolist():
        load, group = heap[0]
        groups[sequence] = group
        left[group] -= 1
        if left[group]:
            heapq.heapreplace(heap, (load + int(lengths[sequence]), group))
        else:
            heapq.heappop(heap)
    return groups
