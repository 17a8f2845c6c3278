"""Which images of a finished image folder have changed since it was made.

Of each item the folder keeps a digest of the contents of its image files, and a stamp of their
names, sizes and times. Where the stamp is the same, nothing is read; where it is not, the contents
decide. So files that were copied or touched cost a reading, and only images that are others are
encoded anew.
"""

import dataclasses
import hashlib
import itertools
import json
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from xmc_jax.data import image_vectors
from xmc_jax.images.image_sources import ImageSource
from xmc_jax.runtime.wording import counted

FAILURES = "failures.jsonl"
"""Of an image folder: a line for each image that could not be read."""


@dataclasses.dataclass(frozen=True, eq=False)
class ChangedImages:
    """What stays of a folder when it is made anew, since some of its images have changed.

    Attributes:
        opened: the folder.
        kept: split -> bool[n], items whose vectors stay.
        stamps: split -> u8[n, 16], as they are now.
        failures: split and item -> number and reason of each image that could not be read.
    """

    opened: image_vectors.ImageStore
    kept: Mapping[str, np.ndarray]
    stamps: Mapping[str, np.ndarray]
    failures: Mapping[tuple[str, int], list[tuple[int, str]]]


def find(
    opened: image_vectors.ImageStore,
    sources: Mapping[str, ImageSource],
    per_item: int,
    origin: Mapping[str, Any],
    overwrite: bool = False,
) -> ChangedImages | None:
    """Compares a folder with its images; writes down where they are if they are the same.

    Items that have no image any more keep their vectors: pictures may be deleted once they are
    encoded.

    Args:
        opened: the folder.
        sources: the images of some of its splits.
        per_item: K, the first so many images of an item count.
        origin: where they are; see `images.read_origin`.
        overwrite: whether images of another source may replace those that the folder has.

    Returns:
        None if no images have changed, or if the folder cannot tell, with a warning.

    Raises:
        ValueError: they have, and are of another source than the folder was made from.
    """
    kept, stamps, touched, gone = {}, {}, 0, 0
    for split, source in sources.items():
        contents = image_vectors.read_contents(opened, split)
        if contents is None:
            logging.warning(
                "%s: made by an earlier version, which kept no digests of the images; whether they "
                "have changed cannot be known, unless it is made anew under another name",
                opened.folder,
            )
            return None
        before, stamps[split] = image_vectors.read_stamps(opened, split), source.stamps()
        items = np.flatnonzero((before != stamps[split]).any(1))
        now, readable = _contents(source, items, per_item)
        lost = ~readable & (getattr(opened, split).count(items, 1) > 0)
        stamps[split][items[lost]] = before[items[lost]]
        kept[split] = np.ones(len(source), bool)
        kept[split][items[readable & (now != contents[items]).any(1)]] = False
        touched, gone = touched + len(items) - int(lost.sum()), gone + int(lost.sum())
    if gone:
        logging.warning(
            "%s: the images of %s are not there any more; their vectors are kept",
            opened.folder,
            counted(gone, "item"),
        )
    before, changed = (
        image_vectors.read_origin(opened.folder),
        sum(int((~k).sum()) for k in kept.values()),
    )
    if not changed:
        if touched or before != origin:
            image_vectors.write_origin(opened.folder, origin, stamps)
        return None
    if before.get("source") != origin["source"] and not overwrite:
        raise ValueError(
            f"{opened.folder}: expected the images of {before.get('source')}, found others of "
            f"{counted(changed, 'item')} in {origin['source']}; name that source, or "
            f"{image_vectors.REMEDY}"
        )
    logging.info("%s: the images of %s have changed", opened.folder, counted(changed, "item"))
    return ChangedImages(opened, kept, stamps, _read_failures(opened.folder / FAILURES))


def of_image(image: bytes | str) -> bytes:
    """The digest of an image's file; zeros for one that is not there, which is a reason."""
    return (
        bytes(image_vectors.CONTENT) if isinstance(image, str) else hashlib.sha256(image).digest()
    )


def of_item(of_images: Sequence[bytes]) -> np.ndarray:
    """u8[32], the digest of an item from those of its images; zeros if it has none."""
    digest = (
        hashlib.sha256(b"".join(of_images)).digest() if of_images else bytes(image_vectors.CONTENT)
    )
    return np.frombuffer(digest, np.uint8)


def _contents(source: ImageSource, items: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """u8[m, 32] and bool[m]: digests of the images of the items i[m], and whether one is there."""
    contents = np.zeros((len(items), image_vectors.CONTENT), np.uint8)
    readable = np.zeros(len(items), bool)
    grouped = itertools.groupby(source.read(limit, items), key=operator.itemgetter(0))
    for item, group in grouped:
        row, digests = int(np.searchsorted(items, item)), []
        for _, _, image in group:
            digests.append(of_image(image))
            readable[row] |= isinstance(image, bytes)
        contents[row] = of_item(digests)
    return contents, readable


def _read_failures(path: pathlib.Path) -> dict[tuple[str, int], list[tuple[int, str]]]:
    failures: dict[tuple[str, int], list[tuple[int, str]]] = {}
    with path.open("rb") as file:
        for line in map(json.loads, file):
            reasons = failures.setdefault((line["split"], line["item"]), [])
            reasons.append((line["k"], line["reason"]))
    return failures
