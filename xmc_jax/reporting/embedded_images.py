"""Thumbnails of items as data URIs, where a dataset's pictures are at hand: few, and small."""

import base64
import importlib.util
import io
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from xmc_jax.data.store import SPLITS, Store

SIDE = 96
"""Pixels of the longer side of a thumbnail, at most."""

_ITEMS = 200_000  # of a dataset in all; of more, looking for their pictures takes too long
_SOURCE_BYTES = 1 << 30  # of the files there, likewise
_PICTURES = 240  # at most
_PICTURE_BYTES = 1 << 20  # of all, as data URIs
_QUALITY = 78  # of JPEG

Item = tuple[str, int]
"""Split and number of an item."""


def data_uris(
    source: Any | None, data: Store, wanted: Iterable[Item]
) -> tuple[dict[Item, str], str]:
    """The first picture of items, those named first taking precedence.

    Args:
        source: where pictures are, a `vision.sources.Place`; None where none are at hand.
        wanted: items; of those without a picture, or with one that cannot be read, none is shown.

    Returns:
        Data URIs, and why there are none, "" if that goes without saying.
    """
    if source is None:
        return {}, ""
    if importlib.util.find_spec("PIL") is None or importlib.util.find_spec("pyarrow") is None:
        return {}, 'No pictures: they take pip install "xmc_jax[vision]".'
    if not source.path.exists():
        return {}, f"No pictures: {source.path} is not there any more."
    counts = {split: len(getattr(data, split)) for split in SPLITS}
    if sum(counts.values()) > _ITEMS:
        return {}, f"No pictures: they are shown of datasets of up to {_ITEMS:,} items."
    if _size(source.path) > _SOURCE_BYTES:
        gibibytes = _SOURCE_BYTES >> 30
        return {}, f"No pictures: they are shown of folders of up to {gibibytes} GiB."
    wanted = list(dict.fromkeys(wanted))[:_PICTURES]
    uris: dict[Item, str] = {}
    try:
        for split in SPLITS:
            items = np.array([item for of, item in wanted if of == split], np.int64)
            if len(items):
                uris |= _of_split(source, data, split, items)
    except ValueError as error:  # a run that has ended well ends so without its pictures, too
        return {}, f"No pictures: {error}."
    kept, left = {}, _PICTURE_BYTES
    for item in wanted:
        if item in uris and len(uris[item]) <= left:
            kept[item] = uris[item]
            left -= len(uris[item])
    return kept, ""


def _of_split(source: Any, data: Store, split: str, items: np.ndarray) -> dict[Item, str]:
    name, rows, raw_rows = split, items, data.raw_rows()
    if split in raw_rows:
        # Held-out documents are some of the raw training documents.
        name, rows = "train", raw_rows[split][items]
    uids = data.raw_uids()[name]
    opened = source.open(name, uids)
    item_of = dict(zip(rows.tolist(), items.tolist()))
    uris = {}
    for row, _, image in opened.read(1, np.sort(rows)):
        if isinstance(image, bytes):
            picture = _decoded(image)
            if picture is not None:
                uris[split, item_of[row]] = _uri(picture)
    return uris


def _decoded(data: bytes):
    """The decoded picture; None if it cannot be decoded."""
    from xmc_jax.images import decoding  # what it imports is an extra

    try:
        return decoding.decode(data)
    except ValueError:
        return None


def _uri(picture) -> str:
    """Encoded anew, so that nothing of a file from anywhere is in the page but its colours."""
    picture.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _size(source: pathlib.Path) -> int:
    """Bytes of a file, or of the files of a folder."""
    if source.is_file():
        return source.stat().st_size
    return sum(path.stat().st_size for path in source.iterdir() if path.is_file())
