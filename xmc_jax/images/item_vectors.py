"""From image files to vectors: read, decoded in threads, encoded, written in order."""

import collections
import dataclasses
import itertools
import json
import operator
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import tqdm

from xmc_jax.data import image_vectors, image_writer
from xmc_jax.files import atomic
from xmc_jax.images import changes, decoding
from xmc_jax.images.changes import ChangedImages
from xmc_jax.images.encoders import Encoder
from xmc_jax.images.image_sources import ImageSource
from xmc_jax.images.images_config import ImagesConfig

_THREADS = 32  # that decode, at most; Pillow lets go of the interpreter meanwhile
_SMALL_PIXELS = 1 << 22  # images up to here are decoded side by side, larger ones singly
_AHEAD_BATCHES = 2  # images read before they are due
_AHEAD_BYTES = 256 << 20  # of those, encoded
_BATCH_ITEMS = 1 << 12  # most items of a batch; those without images take no room in it


@dataclasses.dataclass(eq=False)
class _Batch:
    """Items in a row whose images are encoded at a time; `prepared` has those that can be read.

    A failure is item, number of the image, and reason. See `changes.of_item` for `contents`.
    """

    first: int
    counts: list[int] = dataclasses.field(default_factory=list)
    contents: list[np.ndarray] = dataclasses.field(default_factory=list)
    prepared: list[np.ndarray] = dataclasses.field(default_factory=list)
    failures: list[tuple[int, int, str]] = dataclasses.field(default_factory=list)

    @property
    def end(self) -> int:
        return self.first + len(self.counts)

    def add_empty(self, count: int) -> None:
        """Adds items without images."""
        self.counts += [0] * count
        self.contents += [changes.of_item([])] * count


def append(
    writer: image_writer.ImageWriter,
    encoder: Encoder,
    opened: Mapping[str, ImageSource],
    uids: Mapping[str, Sequence[str]],
    config: ImagesConfig,
    kept: ChangedImages | None,
) -> None:
    """Appends all items that are missing, with the vectors of those that have not changed."""
    written = writer.written
    total = sum(len(source) for source in opened.values())
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    prepare = _preparation(encoder, config.alpha)
    start, images = time.monotonic(), [0]  # images of this run
    try:
        with (
            _Failures(writer.partial / changes.FAILURES, written) as failures,
            tqdm.tqdm(
                total=total,
                initial=sum(written.values()),
                desc="embedding",
                unit="item",
                disable=None,
            ) as bar,
        ):
            for split, source in opened.items():
                stamps = source.stamps() if kept is None else kept.stamps[split]
                items = np.arange(len(source))
                if kept is not None:
                    items = np.flatnonzero(~kept.kept[split])
                items = items[items >= written[split]]

                def write(split: str, stamps: np.ndarray, batch: _Batch, vectors: Any) -> None:
                    rows = np.empty((0, encoder.width), np.float32)
                    if vectors is not None:
                        rows = jax.device_get(vectors)[: len(batch.prepared)]
                    count = len(batch.prepared)
                    if kept is not None:
                        rows = _with_kept(kept, split, batch, rows)
                    failures.add(split, uids[split], batch.failures)  # before they count as done
                    part = stamps[batch.first : batch.end]
                    contents = np.stack(batch.contents)
                    writer.extend(split, batch.first, batch.counts, rows, contents, part)
                    images[0] += count
                    rate = images[0] / max(time.monotonic() - start, 1e-9)
                    bar.set_postfix_str(f"{rate:,.1f} images/s", refresh=False)
                    bar.update(len(batch.counts))

                pending = None
                read = source.read(config.per_item, items)
                ready = _in_threads(read, prepare, pool, _AHEAD_BATCHES * config.batch_size)
                for batch in _batches(ready, written[split], len(source), config.batch_size):
                    vectors = encoder.embed(batch.prepared) if batch.prepared else None
                    if pending is not None:
                        write(split, stamps, *pending)
                    pending = batch, vectors
                if pending is not None:
                    write(split, stamps, *pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _with_kept(kept: ChangedImages, split: str, batch: _Batch, rows: np.ndarray) -> np.ndarray:
    """f[m, E], the vectors of a batch with those of its items that stay, which it gets, too."""
    stays = kept.kept[split][batch.first : batch.end]
    before = getattr(kept.opened, split)
    bounds = before.indptr[batch.first : batch.end + 1]
    contents = image_vectors.read_contents(kept.opened, split)
    counts = np.where(stays, np.diff(bounds), batch.counts)
    merged = np.empty((counts.sum(), before.rows.shape[1]), np.float32)
    there = np.repeat(stays, np.diff(bounds))
    merged[np.repeat(stays, counts)] = before.rows[bounds[0] : bounds[-1]][there]
    merged[np.repeat(~stays, counts)] = rows
    batch.counts = counts.tolist()
    for place in np.flatnonzero(stays).tolist():
        item = batch.first + place
        batch.contents[place] = contents[item]
        batch.failures += [(item, *why) for why in kept.failures.get((split, item), ())]
    batch.failures.sort()
    return merged


_Prepared = tuple[bytes, np.ndarray | str]  # digest of an image; what encoders take, or a reason


def _preparation(encoder: Encoder, alpha: str) -> Callable[[bytes | str], _Prepared]:
    """What threads do with an image: decode and prepare it, or say why not; bounded in memory."""
    small, alone = decoding.DecodeLimits(max_pixels=_SMALL_PIXELS), threading.Lock()

    def prepare(data: bytes | str) -> _Prepared:
        digest = changes.of_image(data)
        if isinstance(data, str):
            return digest, data
        try:
            try:
                return digest, encoder.prepare(decoding.decode(data, small, alpha))
            except decoding.TooLarge:
                with alone:
                    return digest, encoder.prepare(decoding.decode(data, alpha=alpha))
        except ValueError as error:
            return digest, str(error).removeprefix("image: ")

    return prepare


def _in_threads(
    source: Iterable[tuple[int, int, bytes | str]],
    prepare: Callable[[bytes | str], _Prepared],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[tuple[int, int, _Prepared]]:
    """Images prepared, in the order they come in; at most `ahead` are read before they are due."""
    waiting: collections.deque = collections.deque()
    held = 0
    for item, k, data in source:
        waiting.append((item, k, len(data), pool.submit(prepare, data)))
        held += len(data)
        while len(waiting) > ahead or held > _AHEAD_BYTES:
            item, k, size, future = waiting.popleft()
            held -= size
            yield item, k, future.result()
    for item, k, _, future in waiting:
        yield item, k, future.result()


def _batches(
    ready: Iterable[tuple[int, int, _Prepared]], first: int, end: int, size: int
) -> Iterator[_Batch]:
    """Batches of whole items, from the first item to the end.

    Where a batch ends follows from where it begins. So one that is begun again after a kill is the
    same, and so are its vectors to the last bit.
    """
    batch = _Batch(first)
    grouped = itertools.groupby(ready, key=operator.itemgetter(0))
    for item, group in itertools.chain(grouped, [(end, ())]):
        group = list(group)
        good = [image for *_, (_, image) in group if not isinstance(image, str)]
        while item - batch.first >= _BATCH_ITEMS:
            batch.add_empty(_BATCH_ITEMS - len(batch.counts))
            yield batch
            batch = _Batch(batch.end)
        batch.add_empty(item - batch.end)
        if len(batch.prepared) + len(good) > size:
            yield batch
            batch = _Batch(item)
        if item < end:
            batch.counts.append(len(good))
            batch.contents.append(changes.of_item([digest for *_, (digest, _) in group]))
            batch.prepared += good
            batch.failures += [(i, k, why) for i, k, (_, why) in group if isinstance(why, str)]
    if batch.counts:
        yield batch


class _Failures:
    """failures.jsonl, cut after the lines of the items that are written (split -> count)."""

    def __init__(self, path: pathlib.Path, written: Mapping[str, int]):
        self._file = path.open("a+b")
        self._file.seek(0)
        kept = 0
        for line in self._file:
            try:
                failure = json.loads(line)
                if not line.endswith(b"\n") or failure["item"] >= written[failure["split"]]:
                    break
            except (ValueError, KeyError, TypeError):  # torn by a kill
                break
            kept += len(line)
        self._file.truncate(kept)

    def __enter__(self) -> "_Failures":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, split: str, uids: Sequence[str], failures: list[tuple[int, int, str]]) -> None:
        """Makes the failures of a split's items durable."""
        if not failures:
            return
        for item, k, reason in failures:
            line = {"split": split, "item": item, "uid": uids[item], "k": k, "reason": reason}
            self._file.write(json.dumps(line).encode() + b"\n")
        atomic.to_disk(self._file)
