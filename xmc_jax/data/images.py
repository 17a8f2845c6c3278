"""Image folders: the images of every item as frozen vectors, `<data_dir>/<dataset>/images-<name>/`.

They depend on neither tokenizer nor text length, and so are no part of a dataset folder. Files:
`{train,test,label}.rows.npy` f16[images, E] in item order; `.indptr.npy` i64[n + 1], the range of
each item's rows, empty for one without images; and `manifest.json`, written last. All arrays are
memory-mapped; nothing here ever makes an array over all items and images.

`python -m xmc_jax.vision.embed` makes such a folder of pictures or of published embeddings.
"""

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from xmc_jax.data import store
from xmc_jax.data.image_rows import ImageRows, ImageStore
from xmc_jax.data.store import SPLITS
from xmc_jax.files import array_files
from xmc_jax.files.digests import sha256

FORMAT = 1
"""Version of the folder's layout."""

_HEADER = 128  # bytes before an array; NumPy leaves room in them for any number of rows
_COMMIT_BYTES = 64 << 20
_COMMIT_SECONDS = 5.0
_PROGRESS = "progress.json"
_FACTS = ("bytes", "sha256", "dtype", "shape")  # of each file


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
        content = (folder / "manifest.json").read_bytes()
        manifest = json.loads(content)
        recorded = _recorded(manifest)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        state = "an unfinished one" if (folder / _PROGRESS).is_file() else "none that can be read"
        raise ValueError(
            f"{folder}: expected an image folder with a manifest.json, found {state}; make one "
            "with python -m xmc_jax.vision.embed, which also finishes what was begun"
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
        rows, indptr = (arrays[name] for name in _names(split))
        file = folder / _names(split)[1]
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


class Writer:
    """Writes an image folder item by item; after a kill, another one goes on where it was.

    Vectors and offsets are appended to the folder's own files. Every few seconds those are made
    durable, and then `progress.json` says how much of them counts; what lies behind, whole or torn,
    is cut by the next writer. So the finished folder is the same, byte for byte, however often the
    work was interrupted. With the manifest already there, nothing is left to append.

    Args:
        folder: see `path`; made if it is not there.
        counts: "train", "test", "label" -> number of items.
        width: E.
        dataset: its name.
        encoder: what made the vectors: "name", "revision" (or None) and "digest".
        source: whatever else the vectors follow from, as JSON: processing, files, images per item.
        overwrite: discard what the folder holds if it is of other inputs or damaged.

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
    ):
        if sorted(counts) != sorted(SPLITS) or set(encoder) != {"name", "revision", "digest"}:
            raise ValueError(
                f"{folder}: expected counts of train, test and label and an encoder's name, "
                f"revision and digest, got {sorted(counts)} and {sorted(encoder)}"
            )
        self.folder = pathlib.Path(folder)
        self._inputs = {
            "format": FORMAT,
            "dataset": dataset,
            "encoder": {**encoder, "E": int(width)},
            "counts": {split: int(counts[split]) for split in SPLITS},
            "source": json.loads(json.dumps(source or {})),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, Any] = {}
        self._lock = self.folder.with_name(f".{self.folder.name}.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{self.folder}: expected no other writer, found a process that is writing it"
            ) from error
        try:
            self._begin(overwrite)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def done(self) -> dict[str, int]:
        """Split -> how many of its items are there; the next one to append."""
        return dict(self._items)

    @property
    def finished(self) -> bool:
        """Whether the folder has its manifest."""
        return (self.folder / "manifest.json").is_file()

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

    def extend(self, split: str, item: int, counts: Sequence[int], vectors: np.ndarray) -> None:
        """Adds the next items of a split: `append` for many.

        Args:
            split: "train", "test" or "label".
            item: the first one's number, `done[split]`.
            counts: i[n], images of each.
            vectors: f[sum(counts), E], their images in order.

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
        ends = self._rows[split] + np.cumsum(counts)
        rows, indptr = self._files[split]
        rows.write(half.data)
        indptr.write(ends.astype("<i8").data)
        self._items[split] += len(counts)
        self._rows[split] += len(half)
        self._with_image[split] += int((counts > 0).sum())
        self._pending += half.nbytes + ends.nbytes
        if self._pending > _COMMIT_BYTES or time.monotonic() > self._committed + _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes all that was appended durable; happens by itself every few seconds."""
        if self.finished:
            return
        for file in (file for pair in self._files.values() for file in pair):
            file.flush()
            os.fsync(file.fileno())
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

    def finish(self) -> pathlib.Path:
        """Completes the folder; its manifest comes last.

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
        files = {}
        for split in SPLITS:
            shapes = ((self._rows[split], self._width), (self._items[split] + 1,))
            for name, file, dtype, shape in zip(
                _names(split), self._files[split], ("<f2", "<i8"), shapes
            ):
                file.seek(0)
                file.write(_header(dtype, shape))
                file.flush()
                os.fsync(file.fileno())
                found = self.folder / name
                files[name] = {
                    "bytes": found.stat().st_size,
                    "sha256": sha256(found),
                    "dtype": str(np.dtype(dtype)),
                    "shape": list(shape),
                }
        counts = self._inputs["counts"]
        shares = {s: round(self._with_image[s] / max(counts[s], 1), 6) for s in SPLITS}
        facts = {"images": self._rows, "with_image": shares, "files": files}
        self._write_json("manifest.json", self._inputs | facts)
        (self.folder / _PROGRESS).unlink()
        return self.folder

    def close(self) -> None:
        """Lets go of the folder; what was appended since the last commit is lost."""
        with contextlib.ExitStack() as stack:  # goes through all, even where one's disk is full
            stack.callback(self._lock.close)
            for file in (file for pair in self._files.values() for file in pair):
                stack.callback(file.close)
        self._files = {}

    @property
    def _width(self) -> int:
        return self._inputs["encoder"]["E"]

    def _begin(self, overwrite: bool) -> None:
        """Finds out how far the work has come; discards it where that is no use and allowed."""
        try:
            self._resume(verify=overwrite)
        except ValueError:
            if not overwrite:
                raise
            # The manifest first: half a folder must not look like a whole one.
            for name in ("manifest.json", _PROGRESS, *(n for s in SPLITS for n in _names(s))):
                (self.folder / name).unlink(missing_ok=True)
            self._resume(verify=False)

    def _resume(self, verify: bool) -> None:
        """Cuts what lies behind the work that is done, and opens the files."""
        manifest, progress = self.folder / "manifest.json", self.folder / _PROGRESS
        if manifest.is_file():
            _check_same(str(manifest), self._inputs, open(self.folder, verify=verify).manifest)
            progress.unlink(missing_ok=True)  # killed between the two
            self._items = dict(self._inputs["counts"])
            return
        done = {split: {"items": 0, "images": 0, "with_image": 0} for split in SPLITS}
        if progress.is_file():
            try:
                recorded = json.loads(progress.read_bytes())
                done = {
                    s: {field: int(recorded["done"][s][field]) for field in done[s]} for s in done
                }
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{progress}: expected the progress of a writer, found a damaged file; begin "
                    "anew with --overwrite"
                ) from error
            _check_same(str(progress), self._inputs, recorded)
        self._items, self._rows, self._with_image = (
            {split: done[split][field] for split in SPLITS}
            for field in ("items", "images", "with_image")
        )
        if not progress.is_file():
            self.commit()  # from now on the files belong to these inputs
        for split in SPLITS:
            sizes = (2 * self._width * self._rows[split], 8 * (self._items[split] + 1))
            opened = []
            for name, size, dtype, shape in zip(
                _names(split), sizes, ("<f2", "<i8"), ((0, self._width), (0,))
            ):
                file = _open_cut(self.folder / name, size, dtype, shape, self._items[split] == 0)
                opened.append(file)
                self._files[split] = opened
        self._pending, self._committed = 0, time.monotonic()

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
        partial = self.folder / f".{name}.partial"
        with partial.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.folder / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the rename itself
        finally:
            os.close(descriptor)


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
    recorded = {
        name: {field: manifest["files"][name][field] for field in _FACTS}
        for split in SPLITS
        for name in _names(split)
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


def _names(split: str) -> tuple[str, str]:
    return f"{split}.rows.npy", f"{split}.indptr.npy"


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    facts = {"descr": dtype, "fortran_order": False, "shape": tuple(int(n) for n in shape)}
    np.lib.format.write_array_header_1_0(file, facts)
    if len(file.getvalue()) != _HEADER:
        raise ValueError(f"images: expected a header of {_HEADER} bytes for {facts}")
    return file.getvalue()


def _open_cut(file: pathlib.Path, size: int, dtype: str, shape: tuple[int, ...], new: bool):
    """Opens an array file for appending behind its first `size` bytes; a new one is emptied."""
    found = file.stat().st_size if file.is_file() else 0
    if not new and found < _HEADER + size:
        raise ValueError(
            f"{file}: bytes: expected at least {_HEADER + size} by {_PROGRESS}, found {found}; "
            "begin anew with --overwrite"
        )
    opened = file.open("w+b" if new else "r+b", buffering=1 << 20)
    if new:
        opened.write(_header(dtype, shape))
        if dtype == "<i8":
            opened.write(bytes(8))
    else:
        opened.truncate(_HEADER + size)
        opened.seek(_HEADER + size)
    return opened


def _check_same(where: str, inputs: Mapping[str, Any], recorded: Mapping[str, Any]) -> None:
    expected, found = dict(_leaves(inputs)), dict(_leaves({k: recorded.get(k) for k in inputs}))
    for field in expected | found:
        _compare(f"{where}: {field}", expected.get(field), found.get(field))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _compare(what: str, expected: Any, found: Any) -> None:
    if expected != found:
        raise ValueError(
            f"{what}: expected {expected}, found {found}; choose another folder (--out, --name), "
            "or make this one anew with --overwrite"
        )
