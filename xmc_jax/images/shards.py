"""Fetched images as files: Parquet shards, each made from a file that survives a kill.

A shard has one row per URL in the order of the list: `id`, `k`, and either `bytes` or `error`. Its
row groups are small, so that a reader needs little memory. Its bytes follow from its rows alone.
"""

import os
import pathlib
import struct
import threading
import zlib
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from xmc_jax.files import atomic

SCHEMA = pa.schema(
    [("id", pa.string()), ("k", pa.int32()), ("bytes", pa.binary()), ("error", pa.string())]
)
_GROUP_BYTES = 1 << 23  # of images in a row group, but for the last one over
# Before each record of a partial file: row, bytes of the error, bytes of the image, and the CRC of
# those and both. An image has an error of no bytes.
_FIELDS, _CRC = struct.Struct("<IIQ"), struct.Struct("<I")


class Image(NamedTuple):
    """One to fetch: the k-th of an item."""

    id: str
    k: int
    url: str


def read(path: pathlib.Path) -> tuple[list[tuple[str, int]], list[str | None]]:
    """Id and k of a shard's rows, and their errors, None where there is an image."""
    table = pa.parquet.read_table(path, columns=["id", "k", "error"])
    ids, ks, errors = (column.to_pylist() for column in table.columns)
    return list(zip(ids, ks)), errors


def has_failures(path: pathlib.Path) -> bool:
    """Whether a shard lacks an image."""
    return any(read(path)[1])


class Partial:
    """The outcomes of a shard's URLs as they come, in a file that a kill at any moment leaves good.

    A record goes to its end in one piece; one that a kill has cut is cut off when next opened.

    Args:
        path: of the file.
        shard: path of the shard that it is to become; its images, if it exists, are the start.
        rows: of the shard.
        retry_failed: forget the failures among earlier outcomes.

    Attributes:
        outcomes: row -> where its outcome is in the file.
    """

    def __init__(self, path: pathlib.Path, shard: pathlib.Path, rows: int, retry_failed: bool):
        self._path, self._shard, self._rows = path, shard, rows
        self._retry_failed = retry_failed
        self._lock = threading.Lock()
        self.outcomes: dict[int, tuple[int, int, int]] = {}  # place, lengths of error and image

    def __enter__(self) -> "Partial":
        if self._shard.exists():
            self._reopen()
        self._file = open(self._path, "a+b")
        self._file.truncate(self._read_back())
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, row: int, error: str, data: bytes = b"") -> None:
        """Appends the outcome of a row, from any thread: an image, or why there is none."""
        text = error.encode("utf-8")
        fields = _FIELDS.pack(row, len(text), len(data))
        crc = zlib.crc32(data, zlib.crc32(text, zlib.crc32(fields)))
        with self._lock:
            place = self._file.seek(0, os.SEEK_END)
            for part in (_CRC.pack(crc), fields, text, data):
                self._file.write(part)
            self._file.flush()  # to the system, which a kill does not stop
            self.outcomes[row] = (place + _CRC.size + _FIELDS.size, len(text), len(data))

    def read(self, row: int) -> tuple[str, bytes]:
        """The outcome of a row: error and image, one of them empty."""
        place, text, data = self.outcomes[row]
        with self._lock:
            self._file.seek(place)
            return self._file.read(text).decode("utf-8"), self._file.read(data)

    def _reopen(self) -> None:
        """Takes a finished shard apart, for its failures to be tried again."""
        with (
            open(self._path, "wb") as self._file,
            pa.parquet.ParquetFile(self._shard) as shard,
        ):
            row = 0
            for group in range(shard.num_row_groups):
                table = shard.read_row_group(group, columns=["bytes"])
                for data in table.column("bytes"):
                    if data.is_valid:
                        self.add(row, "", data.as_py())
                    row += 1
            atomic.to_disk(self._file)
        self.outcomes.clear()
        self._shard.unlink()

    def _read_back(self) -> int:
        """Fills `outcomes`; returns where the last good record ends."""
        end, size = 0, self._file.seek(0, os.SEEK_END)
        self._file.seek(0)
        while size - end >= _CRC.size + _FIELDS.size:
            (crc,) = _CRC.unpack(self._file.read(_CRC.size))
            fields = self._file.read(_FIELDS.size)
            row, text, data = _FIELDS.unpack(fields)
            place = end + _CRC.size + _FIELDS.size
            if row >= self._rows or place + text + data > size:
                break
            if crc != zlib.crc32(self._file.read(text + data), zlib.crc32(fields)):
                break
            if not (text and self._retry_failed):
                self.outcomes[row] = (place, text, data)
            end = place + text + data
        return end


def write(path: pathlib.Path, rows: list[Image], partial: Partial) -> None:
    """Writes a shard, which is at `path` when it is whole and on the disk."""
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with (
        atomic.replaced(path) as file,
        pa.parquet.ParquetWriter(file, SCHEMA, write_statistics=False, **options) as writer,
    ):
        group, size = [], 0
        for row, image in enumerate(rows):
            error, data = partial.read(row)
            group.append((image.id, image.k, None if error else data, error or None))
            size += len(data)
            if size >= _GROUP_BYTES or row == len(rows) - 1:
                columns = [
                    pa.array(column, kind) for column, kind in zip(zip(*group), SCHEMA.types)
                ]
                writer.write_table(pa.table(columns, schema=SCHEMA))
                group, size = [], 0
