"""Writing an image folder item by item; see `image_vectors` for its files."""

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field

from xmc_jax.data import image_vectors
from xmc_jax.data.image_vectors import CONTENT, FORMAT, ORIGIN, PROGRESS, REMEDY, STAMP
from xmc_jax.data.store import SPLITS
from xmc_jax.files import array_files, array_folders, atomic, json_files, locks, manifests
from xmc_jax.files.array_folders import MANIFEST

_COMMIT_BYTES = 64 << 20
_COMMIT_SECONDS = 5.0
_MOST_DIFFERENCES = 4  # fields that an error names


class _SplitProgress(BaseModel, strict=True):
    """What of a split is durable."""

    items: int
    images: int
    with_image: int


class _ProgressPerSplit(BaseModel, strict=True):
    train: _SplitProgress
    test: _SplitProgress
    label: _SplitProgress


class _WriterProgress(BaseModel, strict=True):
    counts: _ProgressPerSplit = Field(alias="done")


class ImageWriter:
    """Writes an image folder item by item; after a kill, another writer continues its work.

    Vectors and offsets are appended to files in `partial`, a folder beside the target. Every few
    seconds they are made durable, and then `progress.json` says how much of them counts; what lies
    behind, whole or torn, is cut by the next writer. The finished `partial` takes the target's
    place in one move. So the finished folder is the same, byte for byte, however often the work was
    interrupted, and an old folder stays until the new one is whole.

    Args:
        counts: "train", "test", "label" -> number of items.
        encoder: what made the vectors: "name", "revision" (or None) and "digest".
        source: whatever else the vectors follow from, as JSON: processing, images per item.
        overwrite: replace a folder that is of other inputs or damaged.
        compared: whether items come with digests of their contents, and stamps.

    Attributes:
        folder: see `image_vectors.path`.
        partial: the folder to which other files of the image folder are written.
        finished: whether the folder is whole; then there is nothing to append.

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
        self.partial = image_vectors.partial(self.folder)
        self.finished = False
        self._inputs = {
            "format": FORMAT,
            "dataset": dataset,
            "encoder": {**encoder, "E": int(width)},
            "counts": {split: int(counts[split]) for split in SPLITS},
            "source": json.loads(json.dumps(source or {})),
        }
        self._width, self._overwrite, self._compared = int(width), overwrite, compared
        self._files: dict[str, dict[str, Any]] = {}
        self._progress = _no_counts()
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lock = self.folder.with_name(f".{self.folder.name}.lock")
            stack.enter_context(locks.locked(lock, str(self.folder), remove=True))
            stack.callback(self._close_files)
            is_empty = not self.folder.exists() or not any(self.folder.iterdir())
            if not is_empty and self._is_whole():
                self.finished = True
                for split, count in self._inputs["counts"].items():
                    self._progress[split].items = count
            else:
                self._resume()
            self._stack = stack.pop_all()

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def written(self) -> dict[str, int]:
        """Split -> how many of its items are written; the next one to append."""
        return {split: counts.items for split, counts in self._progress.items()}

    def renew(self) -> None:
        """Begins to make a finished folder anew, or continues; it stays until `finish`."""
        self.finished = False
        self._resume()

    def append(self, split: str, item: int, vectors: np.ndarray) -> None:
        """Adds the next item of a split, with its images f[m, E] in order; see `extend`."""
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
        """Adds the next items of a split.

        Args:
            split: "train", "test" or "label", in any order and as often as wished.
            item: the first one's number, `written[split]`.
            counts: i[n], images of each; may be 0.
            vectors: f[sum(counts), E], their images in order.
            contents: u8[n, 32], if items are `compared`.
            stamps: u8[n, 16], likewise.

        Raises:
            ValueError: another item is due, or a vector does not fit float16; nothing is added.
        """
        counts = np.asarray(counts, np.int64)
        if not len(counts):
            return
        progress, end = self._progress[split], self._inputs["counts"][split]
        if item != progress.items or item + len(counts) > end:
            given = f"{item} and {len(counts) - 1} after it" if len(counts) > 1 else item
            raise ValueError(
                f"{self.folder}: {split}: expected item {progress.items} of {end}, got {given}"
            )
        half = self._half(split, item, counts, np.asarray(vectors))
        ends = (progress.images + np.cumsum(counts)).astype("<i8")
        parts = {"rows": half, "indptr": ends}
        parts |= {"contents": contents, "stamps": stamps} if self._compared else {}
        for part, rows in parts.items():
            self._files[split][part].write(np.ascontiguousarray(rows).data)
            self._pending += rows.nbytes
        progress.items += len(counts)
        progress.images += len(half)
        progress.with_image += int((counts > 0).sum())
        if self._pending > _COMMIT_BYTES or time.monotonic() > self._committed + _COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes all that was appended durable; happens by itself every few seconds."""
        if self.finished:
            return
        for files in self._files.values():
            for file in files.values():
                atomic.to_disk(file)
        progress = {split: counts.model_dump() for split, counts in self._progress.items()}
        self._write_json(PROGRESS, self._inputs | {"done": progress})
        self._pending, self._committed = 0, time.monotonic()

    def finish(self, origin: Mapping[str, Any] | None = None) -> pathlib.Path:
        """Completes the folder and gives it its place.

        Returns:
            The folder, for `image_vectors.open`.

        Raises:
            ValueError: items are still missing.
        """
        if self.finished:
            return self.folder
        counts = self._inputs["counts"]
        if self.written != counts:
            raise ValueError(f"{self.folder}: expected {counts} items, got {self.written} so far")
        self.commit()
        for split in SPLITS:
            for part, (dtype, shape) in self._parts(split).items():
                file = self._files[split][part]
                file.seek(0)
                file.write(array_files.header(dtype, shape))
                atomic.to_disk(file)
        names = [f"{s}.{part}.npy" for s in SPLITS for part in self._parts(s) if part != "stamps"]
        progress = self._progress
        facts = {
            "images": {split: progress[split].images for split in SPLITS},
            "with_image": {
                split: round(progress[split].with_image / max(counts[split], 1), 6)
                for split in SPLITS
            },
            "files": array_folders.facts(self.partial, names),
        }
        if origin is not None:
            self._write_json(ORIGIN, origin)
        self._write_json(MANIFEST, self._inputs | facts)
        self._close_files()
        atomic.move_folder(self.partial, self.folder)
        (self.folder / PROGRESS).unlink()
        self.finished = True
        return self.folder

    def close(self) -> None:
        """Lets go of the folder; what was appended since the last commit is lost."""
        if self.finished:  # what a killed writer left
            shutil.rmtree(self.partial, ignore_errors=True)
        self._stack.close()

    def _parts(self, split: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Names of a split's arrays -> dtype and shape, as far as they are written."""
        items, images = self._progress[split].items, self._progress[split].images
        parts = {
            "rows": (np.dtype("<f2"), (images, self._width)),
            "indptr": (np.dtype("<i8"), (items + 1,)),
        }
        if self._compared:
            parts |= {
                "contents": (np.dtype("u1"), (items, CONTENT)),
                "stamps": (np.dtype("u1"), (items, STAMP)),
            }
        return parts

    def _close_files(self) -> None:
        with contextlib.ExitStack() as stack:  # closes all, even where one's disk is full
            for files in self._files.values():
                for file in files.values():
                    stack.callback(file.close)
        self._files = {}

    def _is_whole(self) -> bool:
        """Whether the folder is whole and of these inputs; False if it may be made anew."""
        try:
            manifest = image_vectors.open(self.folder, verify=self._overwrite).manifest
            # Earlier versions recorded names of images, which are compared by contents now.
            source = {k: v for k, v in manifest["source"].items() if k != "images"}
            where = f"{self.folder}/{MANIFEST}"
            _check_same(where, self._inputs, manifest | {"source": source})
        except ValueError:
            if self._overwrite:
                return False
            raise
        (self.folder / PROGRESS).unlink(missing_ok=True)  # killed before it was removed
        return True

    def _resume(self) -> None:
        """Cuts what lies behind the durable work, and opens the files."""
        try:
            progress = self._read_progress()
        except ValueError:
            if not self._overwrite:
                raise
            progress = None
        self._progress = progress or _no_counts()
        if progress is None:
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir()
            self.commit()  # from now on the files belong to these inputs
        for split in SPLITS:
            self._files[split] = {
                part: _open_cut(self.partial / f"{split}.{part}.npy", dtype, shape)
                for part, (dtype, shape) in self._parts(split).items()
            }
        self._pending, self._committed = 0, time.monotonic()

    def _read_progress(self) -> dict[str, _SplitProgress] | None:
        """What an earlier writer of the same inputs has made durable; None if there was none."""
        path = self.partial / PROGRESS
        if not path.is_file():
            return None
        recorded = json_files.read(path)
        progress = json_files.validate(
            path, _WriterProgress, recorded, "begin anew with --overwrite"
        )
        _check_same(str(path), self._inputs, recorded)
        return {split: getattr(progress.counts, split) for split in SPLITS}

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


def _no_counts() -> dict[str, _SplitProgress]:
    return {split: _SplitProgress(items=0, images=0, with_image=0) for split in SPLITS}


def _open_cut(file: pathlib.Path, dtype: np.dtype, shape: tuple[int, ...]):
    """Opens an array file for appending behind the rows that it is said to have; or a new one."""
    begin = array_files.header(dtype, shape)
    size = len(begin) + int(np.prod(shape)) * dtype.itemsize
    actual = file.stat().st_size if file.is_file() else 0
    new = not shape[0] or shape == (1,)
    if not new and actual < size:
        raise ValueError(
            f"{file}: bytes: expected at least {size} by {PROGRESS}, found {actual}; begin anew "
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
        rest = len(differ) - _MOST_DIFFERENCES
        more = [f"and {rest} more"] if rest > 0 else []
        listed = "; ".join([*differ[:_MOST_DIFFERENCES], *more])
        raise ValueError(f"{where}: made from other inputs ({listed}); {REMEDY}")
