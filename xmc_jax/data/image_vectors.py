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
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from xmc_jax.data import store
from xmc_jax.data.image_rows import ImageRows, ImageStore
from xmc_jax.data.store import SPLITS
from xmc_jax.files import array_files, atomic, json_files, locks, manifests
from xmc_jax.files.digests import sha256

FORMAT = 1
"""Version of the folder's layout."""
CONTENT, STAMP = 32, 16
"""Bytes of an item's digest of contents, and of its stamp."""
REMEDY = (
    "choose another folder (--name, --config.data.images.name), or make this one anew with python "
    "-m xmc_jax.images.embed --overwrite"
)

_COMMIT_BYTES = 64 << 20
_COMMIT_SECONDS = 5.0
_MANIFEST, _PROGRESS, _ORIGIN = "manifest.json", "progress.json", "origin.json"
_UNFINISHED = r"(train|test|label)\.(rows|indptr)\.npy|\.?progress\.json.*|failures\.jsonl"
_FACTS = ("bytes", "sha256", "dtype", "shape")  # of each file
_SHOWN = 4  # fields that differ
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


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
        folder: what `Writer.finish` returned.
        expect: split -> number of items that the dataset has.
        verify: also hash every file; sizes, dtypes, shapes and offsets are always checked.

    Raises:
        ValueError: the folder differs from its manifest or from `expect`; names both values.
    """
    folder = pathlib.Path(folder)
    try:
        content = (folder / _MANIFEST).read_bytes()
        manifest = json.loads(content)
        recorded = _recorded(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        begun = any((place / _PROGRESS).is_file() for place in (folder, _partial(folder)))
        state = "an unfinished one" if begun else "none that can be read"
        raise ValueError(
            f"{folder}: expected an image folder with a manifest.json, found {state}; make one "
            "with python -m xmc_jax.images.embed, which also finishes what was begun"
        ) from error
    _compare(f"{folder}/manifest.json: format", FORMAT, manifest.get("format"))
    for split, count in (expect or {}).items():
        _compare(f"{folder}/manifest.json: {split} items", count, manifest["counts"].get(split))
    arrays = {}
    for name, facts in recorded.items():
        file = folder / name
        _compare(f"{file}: bytes", facts["bytes"], file.stat().st_size if file.is_file() else 0)
        if verify:
            _compare(f"{file}: sha256", facts["sha256"], sha256(file))
        try:
            array = array_files.mapped(file)
        except ValueError as error:
            raise ValueError(f"{file}: expected a NumPy array file, found a damaged one") from error
        _compare(f"{file}: dtype", facts["dtype"], str(array.dtype))
        _compare(f"{file}: shape", facts["shape"], list(array.shape))
        arrays[name] = array
    splits = {}
    for split in SPLITS:
        rows, indptr = arrays[f"{split}.rows.npy"], arrays[f"{split}.indptr.npy"]
        file = folder / f"{split}.indptr.npy"
        _compare(f"{file}: items", manifest["counts"][split], len(indptr) - 1)
        _compare(
            f"{file}: first and last offset", (0, len(rows)), (int(indptr[0]), int(indptr[-1]))
        )
        falls = np.flatnonzero(np.diff(indptr) < 0)
        if len(falls):
            _compare(
                f"{file}: offset {falls[0] + 1}",
                f"{indptr[falls[0]]} or more",
                indptr[falls[0] + 1],
            )
        splits[split] = ImageRows(rows, indptr)
    return ImageStore(folder, manifest, hashlib.sha256(content).hexdigest(), **splits)


def check_settings(opened: ImageStore, settings: Mapping[str, Any]) -> None:
    """Compares what a folder was made with and what a config asks for.

    Args:
        opened: the folder.
        settings: "encoder", "revision", "per_item", "layout" and "dtype", as `data.images` of a
            config has them. A revision of None is any, and so is what a folder does not record.

    Raises:
        ValueError: one of them differs; names both values.
    """
    manifest, origin = opened.manifest, read_origin(opened.folder)
    source, encoder = manifest["source"], manifest["encoder"]
    recorded = {"encoder": encoder["name"], "revision": encoder.get("revision")}
    recorded |= source.get("processing", {})
    for field, asked in settings.items():
        found = source["per_item"] if field == "per_item" else recorded.get(field, asked)
        fits = found >= asked if field == "per_item" else found == asked
        if field == "revision":
            fits = asked in (None, found, origin.get("revision")) or "published" in source
        if not fits:
            raise ValueError(
                f"{opened.folder}: expected data.images.{field} = {asked}, found one made with "
                f"{found}; set that, or {REMEDY}"
            )


def read_origin(folder: pathlib.Path) -> dict[str, Any]:
    """Where the images of a folder were; {} where it does not say.

    Returns:
        "source", the path; "revision" of the encoder as it was asked for; and "files", a mapping
        from the path of each file that was compared as a whole to `stamp_of` it.
    """
    return json_files.read(folder / _ORIGIN, optional=True)


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
        folder: see `path`.
        origin: see `read_origin`.
        stamps: split -> u8[n, 16].
    """
    try:
        for split, rows in stamps.items():
            with atomic.replaced(folder / f"{split}.stamps.npy") as file:
                file.write(array_files.header(rows.dtype, rows.shape))
                file.write(np.ascontiguousarray(rows).data)
        atomic.write(folder / _ORIGIN, json.dumps(origin, indent=1) + "\n")
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


class Writer:
    """Writes an image folder item by item; after a kill, another one goes on where it was.

    Vectors and offsets are appended to files in `partial`, a folder beside the target. Every few
    seconds they are made durable, and then `progress.json` says how much of them counts; what lies
    behind, whole or torn, is cut by the next writer. Finished, `partial` takes the target's place
    in one move. So the finished folder is the same, byte for byte, however often the work was
    interrupted, and a folder that is made anew is there until the new one is.

    Args:
        folder: see `path`.
        counts: "train", "test", "label" -> number of items.
        width: E.
        dataset: its name.
        encoder: what made the vectors: "name", "revision" (or None) and "digest".
        source: whatever else the vectors follow from, as JSON: processing, images per item.
        overwrite: make anew what is there if it is of other inputs or damaged.
        compared: whether items come with digests of their contents, and stamps.

    Attributes:
        folder: see `path`.
        partial: where files go that shall be in the folder.
        finished: whether the folder is there; then there is nothing to append.

    Raises:
        ValueError: the folder was begun from or made of something else, is damaged, or another
            process is writing it.
    """

    def __init__(
        self,
        folder,
        counts: Mapping[str, int],
        width: int,
        dataset: str,
        encoder: Mapping[str, Any],
        source: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        compared: bool = False,
    ):
        if sorted(counts) != sorted(SPLITS) or set(encoder) != {"name", "revision", "digest"}:
            raise ValueError(
                f"{folder}: expected counts of train, test and label and an encoder's name, "
                f"revision and digest, got {sorted(counts)} and {sorted(encoder)}"
            )
        self.folder = pathlib.Path(folder)
        self.partial = _partial(self.folder)
        self.finished = False
        self._inputs = {
            "format": FORMAT,
            "dataset": dataset,
            "encoder": {**encoder, "E": int(width)},
            "counts": {split: int(counts[split]) for split in SPLITS},
            "source": json.loads(json.dumps(source or {})),
        }
        self._overwrite = overwrite
        self._compared = compared
        self._files: dict[str, dict[str, Any]] = {}
        self._items = self._rows = self._with_image = dict.fromkeys(SPLITS, 0)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = self.folder.with_name(f".{self.folder.name}.lock")
            stack.enter_context(locks.locked(lock, str(self.folder), remove=True))
            stack.callback(self._close_files)
            if self.folder.exists() and self._is_whole():
                self.finished, self._items = True, dict(self._inputs["counts"])
            else:
                self._resume()
            self._stack = stack.pop_all()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def done(self) -> dict[str, int]:
        """Split -> how many of its items are there; the next one to append."""
        return dict(self._items)

    def renew(self) -> None:
        """Begins to make a finished folder anew, or goes on with it; it stays until `finish`."""
        self.finished = False
        self._resume()

    def append(self, split: str, item: int, vectors: np.ndarray) -> None:
        """Adds the next item of a split.

        Args:
            split: "train", "test" or "label", in any order and as often as wished.
            item: its number, `done[split]`.
            vectors: f[m, E], its images in order; m may be 0.

        Raises:
            ValueError: another item is due, or a vector does not fit float16; nothing is added.
        """
        self.extend(split, item, [len(vectors)], vectors)

    def extend(
        self,
        split: str,
        item: int,
        counts: Sequence[int],
        vectors: np.ndarray,
        contents: np.ndarray | None = None,
        stamps: np.ndarray | None = None,
    ) -> None:
        """Adds the next items of a split: `append` for many.

        Args:
            split: "train", "test" or "label".
            item: the first one's number, `done[split]`.
            counts: i[n], images of each.
            vectors: f[sum(counts), E], their images in order.
            contents: u8[n, 32], if items are `compared`.
            stamps: u8[n, 16], likewise.

        Raises:
            ValueError: as `append`.
        """
        counts = np.asarray(counts, np.int64)
        if not len(counts):
            return
        due, end = self._items[split], self._inputs["counts"][split]
        if item != due or item + len(counts) > end:
            found = f"{item} and {len(counts) - 1} after it" if len(counts) > 1 else item
            raise ValueError(f"{self.folder}: {split}: expected item {due} of {end}, got {found}")
        half = self._half(split, item, counts, np.asarray(vectors))
        ends = (self._rows[split] + np.cumsum(counts)).astype("<i8")
        parts = {"rows": half, "indptr": ends}
        parts |= {"contents": contents, "stamps": stamps} if self._compared else {}
        for part, rows in parts.items():
            self._files[split][part].write(np.ascontiguousarray(rows).data)
            self._pending += rows.nbytes
        self._items[split] += len(counts)
        self._rows[split] += len(half)
        self._with_image[split] += int((counts > 0).sum())
        if self._pending > _COMMIT_BYTES or time.monotonic() > self._committed + _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes all that was appended durable; happens by itself every few seconds."""
        if self.finished:
            return
        for files in self._files.values():
            for file in files.values():
                atomic.to_disk(file)
        done = {
            split: {
                "items": self._items[split],
                "images": self._rows[split],
                "with_image": self._with_image[split],
            }
            for split in SPLITS
        }
        self._write_json(_PROGRESS, self._inputs | {"done": done})
        self._pending, self._committed = 0, time.monotonic()

    def finish(self, origin: Mapping[str, Any] | None = None) -> pathlib.Path:
        """Completes the folder and gives it its place.

        Args:
            origin: see `read_origin`.

        Returns:
            The folder, for `open`.

        Raises:
            ValueError: items are still missing.
        """
        if self.finished:
            return self.folder
        if self._items != self._inputs["counts"]:
            raise ValueError(
                f"{self.folder}: expected {self._inputs['counts']} items, got {self._items} so far"
            )
        self.commit()
        recorded = {}
        for split in SPLITS:
            for part, (dtype, shape) in self._parts(split).items():
                file, name = self._files[split][part], f"{split}.{part}.npy"
                file.seek(0)
                file.write(array_files.header(dtype, shape))
                atomic.to_disk(file)
                if part == "stamps":
                    continue
                path = self.partial / name
                facts = {"bytes": path.stat().st_size, "sha256": sha256(path)}
                recorded[name] = facts | {"dtype": str(dtype), "shape": list(shape)}
        counts = self._inputs["counts"]
        shares = {s: round(self._with_image[s] / max(counts[s], 1), 6) for s in SPLITS}
        if origin is not None:
            self._write_json(_ORIGIN, origin)
        facts = {"images": self._rows, "with_image": shares, "files": recorded}
        self._write_json(_MANIFEST, self._inputs | facts)
        self._close_files()
        atomic.move_folder(self.partial, self.folder)
        (self.folder / _PROGRESS).unlink()
        self.finished = True
        return self.folder

    def close(self) -> None:
        """Lets go of the folder; what was appended since the last commit is lost."""
        if self.finished:  # what a killed writer left
            shutil.rmtree(self.partial, ignore_errors=True)
        self._stack.close()

    @property
    def _width(self) -> int:
        return self._inputs["encoder"]["E"]

    def _parts(self, split: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Names of a split's arrays -> dtype and shape, as far as they are."""
        items = self._items[split]
        parts = {
            "rows": (np.dtype("<f2"), (self._rows[split], self._width)),
            "indptr": (np.dtype("<i8"), (items + 1,)),
        }
        if self._compared:
            parts |= {
                "contents": (np.dtype("u1"), (items, CONTENT)),
                "stamps": (np.dtype("u1"), (items, STAMP)),
            }
        return parts

    def _close_files(self) -> None:
        with contextlib.ExitStack() as stack:  # goes through all, even where one's disk is full
            for files in self._files.values():
                for file in files.values():
                    stack.callback(file.close)
        self._files = {}

    def _is_whole(self) -> bool:
        """Whether the folder is there and of these inputs, or else may be made anew."""
        try:
            manifest = open(self.folder, verify=self._overwrite).manifest
            # Earlier versions recorded names of images, which are compared by contents now.
            source = {k: v for k, v in manifest["source"].items() if k != "images"}
            where = f"{self.folder}/{_MANIFEST}"
            _check_same(where, self._inputs, manifest | {"source": source})
        except ValueError:
            begun = not (self.folder / _MANIFEST).exists() and self._holds_nothing_else()
            if self._overwrite or begun:
                return False
            raise
        (self.folder / _PROGRESS).unlink(missing_ok=True)  # killed before it was removed
        return True

    def _holds_nothing_else(self) -> bool:
        """Whether the folder holds no file but what earlier versions left unfinished there."""
        names = [path.name for path in self.folder.iterdir()]
        return all(re.fullmatch(_UNFINISHED, name) for name in names)

    def _resume(self) -> None:
        """Cuts what lies behind the work that is done, and opens the files."""
        progress = self.partial / _PROGRESS
        done = {split: {"items": 0, "images": 0, "with_image": 0} for split in SPLITS}
        try:
            recorded = self._recorded_progress(progress)
        except ValueError:
            if not self._overwrite:
                raise
            recorded = None
        if recorded is None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
        self._items, self._rows, self._with_image = (
            {split: (recorded or done)[split][field] for split in SPLITS}
            for field in ("items", "images", "with_image")
        )
        if recorded is None:
            self.commit()  # from now on the files belong to these inputs
        for split in SPLITS:
            self._files[split] = {}
            is_new = self._items[split] == 0
            for part, (dtype, shape) in self._parts(split).items():
                file = _open_cut(self.partial / f"{split}.{part}.npy", dtype, shape, is_new)
                self._files[split][part] = file
        self._pending, self._committed = 0, time.monotonic()

    def _recorded_progress(self, progress: pathlib.Path) -> dict[str, dict[str, int]] | None:
        """What a writer before has made durable; None if there was none.

        Raises:
            ValueError: it was one of other inputs, or the files are damaged.
        """
        if not progress.is_file():
            return None
        try:
            recorded = json.loads(progress.read_bytes())
            fields = ("items", "images", "with_image")
            done = {s: {field: int(recorded["done"][s][field]) for field in fields} for s in SPLITS}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{progress}: expected the progress of a writer, found a damaged file; begin "
                "anew with --overwrite"
            ) from error
        _check_same(str(progress), self._inputs, recorded)
        return done

    def _half(self, split: str, item: int, counts: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """f16[m, E] after checking shape and range."""
        if vectors.size == 0 and counts.sum() == 0:
            return np.empty((0, self._width), "<f2")
        if vectors.shape != (counts.sum(), self._width):
            raise ValueError(
                f"{self.folder}: {split}: item {item}: expected vectors of shape "
                f"{[int(counts.sum()), self._width]}, got {list(vectors.shape)}"
            )
        with np.errstate(over="ignore"):
            half = np.ascontiguousarray(vectors, "<f2")
        bad = np.argwhere((half.view("<u2") & 0x7C00) == 0x7C00)  # infinite or not a number
        if len(bad):
            row, column = bad[0]
            ends = np.cumsum(counts)
            place = int(np.searchsorted(ends, row, side="right"))
            raise ValueError(
                f"{self.folder}: {split}: item {item + place}: image "
                f"{row - (ends[place] - counts[place])}: expected numbers within float16's "
                f"65504, got {float(vectors[row, column]):g}"
            )
        return half

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        atomic.write(self.partial / name, json.dumps(content, indent=1) + "\n")


def _partial(folder: pathlib.Path) -> pathlib.Path:
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


def _recorded(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """File -> what the manifest says of it; KeyError or TypeError where it lacks a field."""
    files = manifest["files"]
    recorded = {
        name: {field: files[name][field] for field in _FACTS}
        for split in SPLITS
        for name in (f"{split}.{part}.npy" for part in ("rows", "indptr", "contents"))
        if name in files or not name.endswith("contents.npy")
    }
    encoder = manifest["encoder"]
    kinds = [(manifest["dataset"], str), (encoder["name"], str), (encoder["E"], int)]
    kinds += [(manifest["source"], dict)]
    for split in SPLITS:
        kinds += [(manifest[field][split], int) for field in ("counts", "images")]
        if type(manifest["with_image"][split]) not in (int, float):
            raise TypeError("shares that are no numbers")
    for value, kind in kinds:
        if type(value) is not kind:
            raise TypeError(f"{value!r:.60} that is no {kind.__name__}")
    return recorded


def _open_cut(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...], new: bool):
    """Opens an array file for appending behind the rows that it is said to have; or a new one."""
    begin = array_files.header(dtype, shape)
    size = len(begin) + int(np.prod(shape)) * dtype.itemsize
    found = file.stat().st_size if file.is_file() else 0
    if not new and found < size:
        raise ValueError(
            f"{file}: bytes: expected at least {size} by {_PROGRESS}, found {found}; begin anew "
            "with --overwrite"
        )
    opened = file.open("w+b" if new else "r+b", buffering=1 << 20)
    if new:
        opened.write(begin + bytes(size - len(begin)))  # the first offset
    else:
        opened.truncate(size)
        opened.seek(size)
    return opened


def _check_same(where: str, inputs: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    differ = manifests.difference({name: recorded.get(name) for name in inputs}, inputs)
    if differ:
        more = [f"and {len(differ) - _SHOWN} more"] if len(differ) > _SHOWN else []
        listed = "; ".join([*differ[:_SHOWN], *more])
        raise ValueError(f"{where}: made from other inputs ({listed}); {REMEDY}")


def _compare(what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise ValueError(f"{what}: expected {expected}, found {found}; {REMEDY}")
