"""Numbered records of images: files of a folder, lines of base64, cells of a table.

A record is one image or several. An image is the bytes of its file or, as a str, the reason why
there are none.
"""

import base64
import binascii
import dataclasses
import os
import pathlib
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from xmc_jax.data.tables.parquet_tables import ParquetRows
from xmc_jax.data.tables.text_tables import TextCells
from xmc_jax.files import paths

_KEYS = ("uid", "id", "index")
_COLUMNS = ("bytes", "image", "base64", "path")  # in this order, where there are several
URLS = ("url", "urls")
_DATA_URL = re.compile(r"data:[\w/+.;=-]*;base64,")
_SCAN_BYTES = 4 << 20
_PEEKED = 16  # cells


class Records(Protocol):
    """Records that are read by number."""

    def fetch(self, numbers: np.ndarray) -> Iterator[list[bytes | str]]:
        """The images of each of the records i[n], in that order."""

    def stamps(self, numbers: np.ndarray) -> Iterator[bytes] | None:
        """Names, sizes and times of the image files of the records i[n]; None without such files.

        Files that hold many records are not among them: see `ImageSource.files`.
        """


def stamp(path: pathlib.Path) -> bytes:
    """Name, size and time of a file."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return os.fsencode(path.name) + b"\0"
    return os.fsencode(path.name) + b"\0%d\0%d\0" % (facts.st_size, facts.st_mtime_ns)


@dataclasses.dataclass(frozen=True, eq=False)
class FileRecords:
    """One image file per record."""

    folder: pathlib.Path
    names: list[str]
    max_bytes: int

    def fetch(self, numbers: np.ndarray) -> Iterator[list[bytes | str]]:
        """See `Records`."""
        for number in numbers.tolist():
            name = self.names[number]
            yield [_read_file(self.folder / name, name, self.max_bytes)]

    def stamps(self, numbers: np.ndarray) -> Iterator[bytes]:
        """See `Records`."""
        return (stamp(self.folder / self.names[number]) for number in numbers.tolist())


class LineRecords:
    """Lines of a file, one image each in base64; reads the whole file once, for their places."""

    def __init__(self, path: pathlib.Path, max_bytes: int):
        self._path, self._max_bytes = path, max_bytes
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def fetch(self, numbers: np.ndarray) -> Iterator[list[bytes | str]]:
        """See `Records`."""
        longest = 4 * self._max_bytes // 3 + 1024
        with self._path.open("rb") as file:
            for number in numbers.tolist():
                start, end = self._offsets[number : number + 2].tolist()
                if end - start > longest:
                    yield [f"a line of {_too_large(end - start, longest)}"]
                    continue
                file.seek(start)
                yield [_decode(file.read(end - start), self._max_bytes)]

    def stamps(self, numbers: np.ndarray) -> None:
        """See `Records`."""


@dataclasses.dataclass(frozen=True, eq=False)
class TableRecords:
    """Cells of a column, each with images, paths of images, or lists of these.

    Attributes:
        cells: of the column.
        column: its name, which says what a cell holds: "bytes", "image", "base64" or "path".
        folder: of the table; paths start there.
        max_bytes: of an image.
        allow_paths: whether paths may lead out of the folder.
    """

    cells: ParquetRows | TextCells
    column: str
    folder: pathlib.Path
    max_bytes: int
    allow_paths: bool

    def fetch(self, numbers: np.ndarray) -> Iterator[list[bytes | str]]:
        """See `Records`."""
        for cell in self.cells.fetch(numbers):
            yield self._images(cell, self._read)

    def stamps(self, numbers: np.ndarray) -> Iterator[bytes] | None:
        """See `Records`."""
        # A column `image` may have paths, too; if the first cells have none, the others are not
        # looked at: all of them would be read.
        peeked = {"path": len(numbers), "image": _PEEKED}.get(self.column, 0)
        if not any(self._stamps(numbers[:peeked])):
            return None
        return self._stamps(numbers)

    def _stamps(self, numbers: np.ndarray) -> Iterator[bytes]:
        for cell in self.cells.fetch(numbers):
            stamps: list[bytes] = []

            def note(name: str, stamps: list[bytes] = stamps) -> str:
                try:
                    path = self._path(name)
                except ValueError:
                    path = pathlib.Path()  # a file that is not read
                stamps.append(name.encode("utf-8", "surrogatepass") + stamp(path))
                return ""

            self._images(cell, note)
            yield b"".join(stamps)

    def _images(self, cell: Any, read: Callable[[str], bytes | str]) -> list[bytes | str]:
        """The images of a cell; `read` gives the image at a path."""
        images = []
        for value in cell if isinstance(cell, list) else [cell]:
            kind = self.column
            if isinstance(value, dict):  # Hugging Face's Image
                kind = kind if value.get("bytes") else "path"
                value = value.get("bytes") or value.get("path")
            if isinstance(value, str) and value and kind == "path":
                images.append(read(value))
            elif value is not None and value != "":
                images.append(_held(value, kind, self.max_bytes))
        return images

    def _read(self, name: str) -> bytes | str:
        try:
            return _read_file(self._path(name), name, self.max_bytes)
        except ValueError as error:
            return str(error)

    def _path(self, name: str) -> pathlib.Path:
        """The file of a name, which another system may have written in another way.

        Names may be surrounded by blanks, have the other Unicode form (macOS), or backslashes.
        """
        bare = name.strip()
        forms = (unicodedata.normalize(form, bare) for form in ("NFC", "NFD"))
        first = paths.within(self.folder, name, self.allow_paths)
        for other in (name, bare, *forms, bare.replace("\\", "/")):
            path = paths.within(self.folder, other, self.allow_paths)
            if os.path.lexists(path):
                return path
        return first


def _held(cell: Any, column: str, max_bytes: int) -> bytes | str:
    """The image in a cell."""
    if isinstance(cell, bytes) and column != "path":
        if len(cell) > max_bytes:
            return _too_large(len(cell), max_bytes)
        return _decode(cell, max_bytes) if column == "base64" else cell or "no bytes"
    if isinstance(cell, str):
        return _decode(cell, max_bytes)
    return f"a cell of type {type(cell).__name__} in column {column}"


def _read_file(path: pathlib.Path, name: str, max_bytes: int) -> bytes | str:
    try:
        facts = os.stat(path)
        if not stat.S_ISREG(facts.st_mode):
            return f"not a file: {name:.200}"
        if facts.st_size > max_bytes:
            return _too_large(facts.st_size, max_bytes)
        return path.read_bytes() or f"an empty file: {name:.200}"
    except OSError as error:
        return f"{(error.strerror or 'unreadable').lower()}: {name:.200}"


def _too_large(size: int, max_bytes: int) -> str:
    return f"{size} bytes, more than {max_bytes}"


def _line_offsets(path: pathlib.Path) -> np.ndarray:
    """i64[lines + 1], where lines begin and the last one ends."""
    ends = [np.zeros(1, np.int64)]
    at = 0
    with path.open("rb") as file:
        while block := file.read(_SCAN_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + at + 1)
            at += len(block)
    offsets = np.concatenate(ends)
    return offsets if offsets[-1] == at else np.append(offsets, at)


def _decode(text: bytes | str, max_bytes: int) -> bytes | str:
    if isinstance(text, str):
        start = _DATA_URL.match(text[:200])
        text = text[start.end() if start else 0 :].encode("ascii", "replace")
    text = b"".join(text.split())
    if len(text) // 4 * 3 > max_bytes + 3:
        return _too_large(len(text) // 4 * 3, max_bytes)
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error:
        return "not base64"
    return data or "no bytes"


def columns_of(path: pathlib.Path, columns: Mapping[str, str]) -> tuple[str, str]:
    """The columns of keys and of images, of those there are (name -> type or "")."""
    key, image = next((name for name in _KEYS if name in columns), None), image_column(columns)
    if image is None and any(name in columns for name in URLS):
        raise ValueError(
            f"{path}: expected images, found their URLs; download them first with python -m "
            "xmc_jax.images.fetch and name what that makes"
        )
    if key is None or image is None:
        raise ValueError(
            f"{path}: expected a column {', '.join(_KEYS)} and one of {', '.join(_COLUMNS)}, found "
            f"{', '.join(columns) or 'none'}"
        )
    return key, image


def image_column(columns: Mapping[str, str]) -> str | None:
    """The column of images: of the known names, or the only one of bytes."""
    binary = [name for name, kind in columns.items() if kind.endswith("binary")]
    named = next((name for name in _COLUMNS if name in columns), None)
    return binary[0] if named is None and len(binary) == 1 else named
