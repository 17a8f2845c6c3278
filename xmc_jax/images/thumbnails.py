"""Small pictures of items, for artifacts: see `inference.thumbnails`."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from absl import logging

from xmc_jax.images import decoding
from xmc_jax.images.image_sources import ImageSource
from xmc_jax.runtime.wording import counted

SIDE = 96
"""Pixels of the longer side, at most; larger than pictures are shown, for dense screens."""

_AHEAD = 64  # read before they are due


def make(source: ImageSource, uids: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Id and WebP file of each item whose first image can be read; several threads make them.

    Args:
        source: of the items, see `sources.open`.
        uids: of its n items.
    """
    failed, seen = 0, set()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending: deque[tuple[str, Future]] = deque()

        def finished(left: int) -> Iterator[tuple[str, bytes]]:
            nonlocal failed
            while len(pending) > left:
                uid, future = pending.popleft()
                try:
                    made = future.result()
                except ValueError:
                    failed += 1
                    continue
                yield uid, made

        for item, _, image in source.read(1):
            if uids[item] in seen:
                continue
            seen.add(uids[item])
            pending.append((uids[item], pool.submit(_make, image)))
            yield from finished(_AHEAD)
        yield from finished(0)
    if failed:
        logging.warning("thumbnails: none of %s, which cannot be read", counted(failed, "image"))


def _make(image: bytes | str) -> bytes:
    if isinstance(image, str):  # why there is none
        raise ValueError(image)
    return decoding.thumbnail(decoding.decode(image), SIDE)
