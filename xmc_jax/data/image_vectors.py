"""Image folders: the images of every item as frozen vectors, `<data_dir>/<dataset>/images-<name>/`.

They depend on neither tokenizer nor text length, and so are no part of a dataset folder. Files:

    {train,test,label}.rows.npy      f16[images, E], in item order
    {train,test,label}.indptr.npy    i64[n + 1], the range of each item's rows, empty without images
    {train,test,label}.contents.npy  u8[n, 32], a digest of the files of each item's images
    manifest.json                    what all that was made from, and the digests of the files

and beside them, of this machine and no part of the vectors' identity,

    {train,test,label}.stamps.npy    u8[n, 16], of names, sizes and times of each item's files
    origin.json                      where the images were

so that images which changed later are known without reading those that did not. Folders of
published embeddings, and those of earlier versions, have neither contents nor stamps. All arrays
are memory-mapped; nothing here ever makes an array over all items and images.

`python -m xmc_jax.images.embed` makes such a folder of pictures or of published embeddings.
"""

import contextlib
import errno
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from xmc_jax.data import store
from xmc_jax.data.image_rows import ImageRows, ImageStore
from xmc_jax.data.store import SPLITS
from xmc_jax.files import array_files, array_folders, atomic, json_files
from xmc_jax.files.array_folders import FileFacts

FORMAT = 1
"""Version of the folder's layout."""
CONTENT, STAMP = 32, 16
"""Bytes of an item's digest of contents, and of its stamp."""
REMEDY = (
    "choose another folder (--name, --config.data.images.name), or make this one anew with python "
    "-m xmc_jax.images.embed --overwrite"
)

PROGRESS, ORIGIN = "progress.json", "origin.json"
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class _EncoderFacts(BaseModel, strict=True):
    name: str
    E: int


class _PerSplit(BaseModel, strict=True):
    train: int
    test: int
    label: int


class _Shares(BaseModel, strict=True):
    train: float
    test: float
    label: float


class _ImageManifest(BaseModel, strict=True):
    """The fields that are read."""

    dataset: str
    encoder: _EncoderFacts
    counts: _PerSplit
    images: _PerSplit
    with_image: _Shares
    source: dict[str, Any]
    files: dict[str, FileFacts]


def path(data_dir, dataset: str, name: str) -> pathlib.Path:
    """The image folder called `name` of a dataset.

    Raises:
        ValueError: the dataset's or the folder's name is not one part of a path.
    """
    for field, value in (("dataset", dataset), ("name", name)):
        if not value or value != pathlib.Path(value).name or value == "..":
            raise ValueError(f"images: {field}: expected a name without slashes, got {value!r}")
    return pathlib.Path(data_dir) / dataset / f"images-{name}"


def open(folder, expect: Mapping[str, int] | None = None, verify: bool = False) -> ImageStore:
    """Opens an image folder after checking it against its manifest.

    Args:
        folder: what `ImageWriter.finish` returned.
        expect: split -> number of items that the dataset has.
        verify: also hash every file; sizes, dtypes, shapes and offsets are always checked.

    Raises:
        ValueError: the folder differs from its manifest or from `expect`; names both values.
    """
    folder = pathlib.Path(folder)
    begun = any((place / PROGRESS).is_file() for place in (folder, partial(folder)))
    if begun and not (folder / array_folders.MANIFEST).is_file():
        raise ValueError(
            f"{folder}: expected an image folder with a manifest.json, found an unfinished one; "
            "python -m xmc_jax.images.embed finishes it"
        )
    manifest = array_folders.read_manifest(
        folder, FORMAT, _ImageManifest, "an image folder", REMEDY
    )
    counts = manifest.content["counts"]
    for split, count in (expect or {}).items():
        manifest.compare(f"{split} items", count, counts[split])
    names = [f"{split}.{part}.npy" for split in SPLITS for part in ("rows", "indptr", "contents")]
    optional = [name for name in names if name.endswith("contents.npy")]
    files = manifest.content["files"]
    arrays = manifest.open([n for n in names if n in files or n not in optional], verify)
    splits = {}
    for split in SPLITS:
        rows, indptr, file = arrays[f"{split}.rows"], arrays[f"{split}.indptr"], f"{split}.indptr"
        ends = int(indptr[0]), int(indptr[-1])
        manifest.compare_file(f"{file}.npy: items", counts[split], len(indptr) - 1)
        manifest.compare_file(f"{file}.npy: first and last offset", (0, len(rows)), ends)
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if len(falls):
            before, after = indptr[falls[0] : falls[0] + 2]
            manifest.compare_file(f"{file}.npy: offset {falls[0] + 1}", f"{before} or more", after)
        splits[split] = ImageRows(rows, indptr)
    return ImageStore(folder, manifest.content, manifest.digest, **splits)


def check_settings(opened: ImageStore, settings: Mapping[str, Any]) -> None:
    """Compares what a folder was made with and what a config asks for.

    Args:
        settings: "encoder", "revision", "per_item", "layout" and "dtype", as `data.images` of a
            config has them. A revision of None is any, and so is what a folder does not record.

    Raises:
        ValueError: one of them differs; names both values.
    """
    manifest, origin = opened.manifest, read_origin(opened.folder)
    source, encoder = manifest["source"], manifest["encoder"]
    recorded = {"encoder": encoder["name"], "revision": encoder.get("revision")}
    recorded |= source.get("processing", {})
    for field, wanted in settings.items():
        actual = source["per_item"] if field == "per_item" else recorded.get(field, wanted)
        fits = actual >= wanted if field == "per_item" else actual == wanted
        if field == "revision":
            fits = wanted in (None, actual, origin.get("revision")) or "published" in source
        if not fits:
            raise ValueError(
                f"{opened.folder}: expected data.images.{field} = {wanted}, found one made with "
                f"{actual}; set that, or {REMEDY}"
            )


def read_origin(folder: pathlib.Path) -> dict[str, Any]:
    """Where the images of a folder were; {} where it does not say.

    Returns:
        "source", the path; "revision" of the encoder as it was asked for; and "files", a mapping
        from the path of each file that was compared as a whole to `stamp_of` it.
    """
    return json_files.read(folder / ORIGIN, optional=True)


def read_contents(opened: ImageStore, split: str) -> np.ndarray | None:
    """u8[n, 32], the digests of a split's items; None of a folder that has none."""
    name = f"{split}.contents.npy"
    return array_files.mapped(opened.folder / name) if name in opened.manifest["files"] else None


def read_stamps(opened: ImageStore, split: str) -> np.ndarray:
    """u8[n, 16], the stamps of a split's items; zeros, which no item has, where they are lost."""
    with contextlib.suppress(ValueError):
        stamps = array_files.mapped(opened.folder / f"{split}.stamps.npy")
        if stamps.dtype == np.uint8 and stamps.shape == (len(getattr(opened, split)), STAMP):
            return stamps
    return np.zeros((len(getattr(opened, split)), STAMP), np.uint8)


def write_origin(
    folder: pathlib.Path, origin: Mapping[str, Any], stamps: Mapping[str, np.ndarray] = {}
) -> None:
    """Writes where the images are now, whose contents are known to be the same.

    A folder that may not be written to stays as it is: the images are compared anew each time.

    Args:
        stamps: split -> u8[n, 16].
    """
    try:
        for split, rows in stamps.items():
            with atomic.replaced(folder / f"{split}.stamps.npy") as file:
                file.write(array_files.header(rows.dtype, rows.shape))
                file.write(np.ascontiguousarray(rows).data)
        atomic.write(folder / ORIGIN, json.dumps(origin, indent=1) + "\n")
    except OSError as error:
        if error.errno not in _READ_ONLY:
            raise


def stamp_of(path: pathlib.Path) -> list[int] | None:
    """Size in bytes and time of change in nanoseconds of a file; None if there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]


def partial(folder: pathlib.Path) -> pathlib.Path:
    """The folder beside an image folder in which it is being made."""
    return folder.with_name(f".{folder.name}.partial")


def digests(uids: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Split -> SHA-256 of its items' identifiers, as the manifest of a dataset folder has them."""
    return {split: hashlib.sha256(store.lines(uids[split])).hexdigest() for split in SPLITS}


def report(folder) -> str:
    """A few lines on an image folder: items, images, and the share of items that have some."""
    opened = open(folder)
    manifest = opened.manifest
    encoder = manifest["encoder"]
    lines = [f"{manifest['dataset']} in {folder}: {encoder['name']}, {encoder['E']} wide"]
    for split, share in opened.shares.items():
        items, images = manifest["counts"][split], manifest["images"][split]
        lines.append(
            f"  {split:5}  items {items:,}  images {images:,}  with an image {share:.2f} %"
        )
    return "\n".join(lines)
