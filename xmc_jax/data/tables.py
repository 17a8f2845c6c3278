"""Tables as files, in bounded memory: of images, for `vision.sources`, single cells by row number;
and Parquet of all kinds, column by column.
"""

import array
import contextlib
import csv
import functools
import io
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from xmc_jax.data import raw

MAX_LINE = 256 << 20  # bytes of a record of a text table
_SHOWN_RECORDS = 1000  # looked at for the columns of a JSONL file
_BATCH_BYTES = 4 << 20  # of the rows of a Parquet file that are decoded at a time
_FIRST_ROWS = 256
_ROWS_PER_BYTE = 64  # of a file, at most
_HELD_ROWS = 1 << 14  # at most, reordered at a time, where a table's order is not the items'
_HELD_BYTES = 256 << 20  # of those


class TextTable:
    """A JSONL or CSV file, read through once for its keys and for where its records begin.

    Attributes:
        path: the file.
        columns: names; the types are unknown, "".
        offsets: i64[n + 1], where records begin and the last one ends, once `cells` are through.

    Raises:
        ValueError: the file is empty or its beginning damaged.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.json = path.suffix == ".jsonl"
        self.offsets = array.array("q")
        self.header: list[str] = []
        if not self.json:
            # Cells with base64 are longer than what the reader takes by itself.
            csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE))
        self.columns: dict[str, str] = {}
        for _, record, _ in itertools.islice(self._parsed(), _SHOWN_RECORDS if self.json else 1):
            self.header = list(record)
            self.columns |= dict.fromkeys(record, "")
        if not self.columns:
            raise ValueError(f"{path}: expected a table, found an empty file")

    def cells(self, key: str) -> Iterator[Any]:
        """The key of every record; finds the offsets.

        Raises:
            ValueError: a record is damaged; names its line.
        """
        self.offsets = array.array("q")
        parsed = self._parsed()
        end = 0
        if not self.json:
            _, _, end = next(parsed)
        for start, record, after in parsed:
            self.offsets.append(start)
            yield self._pick(record, key)
            end = after
        self.offsets.append(end)

    def cell(self, record: bytes, column: str) -> Any:
        """A cell of the record that these bytes are."""
        if self.json:
            return json.loads(record).get(column)
        rows = csv.reader(io.StringIO(record.decode("utf-8"), newline=""))
        return self._pick(next(filter(None, rows)), column)  # blank lines may surround it

    def _pick(self, record: Any, column: str) -> Any:
        if self.json:
            return record.get(column)
        at = self.header.index(column)
        return record[at] if at < len(record) else None

    def _parsed(self) -> Iterator[tuple[int, Any, int]]:
        """First byte, record and the byte behind it; of a CSV the header is the first record."""
        with self.path.open("rb") as file:
            if file.read(3) != b"\xef\xbb\xbf":
                file.seek(0)
            yield from self._json(file) if self.json else self._csv(file)

    def _json(self, file) -> Iterator[tuple[int, dict, int]]:
        start = file.tell()
        number = 0
        while line := file.readline(MAX_LINE):
            number += 1
            end = start + len(line)
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{self.path}:{number}: expected JSON, found {line[:60]!r}"
                    ) from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{self.path}:{number}: expected an object, found {line[:60]!r}"
                    )
                yield start, record, end
            start = end

    def _csv(self, file) -> Iterator[tuple[int, list[str], int]]:
        end = start = file.tell()

        def lines() -> Iterator[str]:
            nonlocal end
            while line := file.readline(MAX_LINE):
                end += len(line)
                yield line.decode("utf-8")

        reader = csv.reader(lines(), strict=True)
        while True:
            try:
                row = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(
                    f"{self.path}:{reader.line_num}: expected CSV in utf-8, found {error}"
                ) from error
            if row is None:
                return
            if row:  # not a blank line
                yield start, row, end
            start = end


class ParquetTable:
    """A Parquet file: its columns, and their cells in order, decoded a few at a time.

    Attributes:
        path: the file.
        columns: name -> type, as Arrow calls it.
        num_rows: rows.
        starts: i64[groups + 1], the first row of each row group and the end.

    Raises:
        ValueError: the file is damaged, or pyarrow is missing.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        with self._opened() as file:
            schema = file.schema_arrow
            self.columns = {field.name: str(field.type) for field in schema}
            if len(self.columns) < len(schema.names):
                raise ValueError(
                    f"{path}: expected columns that differ, found {', '.join(schema.names)}"
                )
            meta = file.metadata
            self.num_rows = meta.num_rows
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        size, held = path.stat().st_size, sum(group.total_byte_size for group in groups)
        if self.num_rows > _ROWS_PER_BYTE * size or held > raw.most_bytes(path):
            raise ValueError(
                f"{path}: expected what {size} bytes may hold, found {self.num_rows} rows of "
                f"{held} bytes: a file made to be slow"
            )

    def check(self, *columns: str) -> None:
        """Raises ValueError unless the columns are there."""
        for column in columns:
            if column not in self.columns:
                raise ValueError(
                    f"{self.path}: expected a column {column}, found {', '.join(self.columns)}"
                )

    def cells(self, column: str, group: int = 0) -> Iterator[Any]:
        """The cells of a column from a row group on."""
        for batch in self.batches(column, group):
            yield from batch.to_pylist()

    def batches(self, column: str, group: int) -> Iterator[Any]:
        """Arrow arrays of a column, one behind the other, from a row group on."""
        with self._opened() as file:
            for number in range(group, len(self.starts) - 1):
                facts = file.metadata.row_group(number)
                # Of all columns: asked for a damaged column's own size, pyarrow ends the process.
                size = facts.num_rows * _BATCH_BYTES // max(facts.total_byte_size, 1)
                for batch in file.iter_batches(
                    batch_size=min(max(size, 1), 1 << 14),
                    row_groups=[number],
                    columns=[column],
                    use_threads=False,
                ):
                    yield batch.column(column)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ValueError(
                f"{self.path}: expected the pyarrow package to read it, got none; pip install "
                '"xmc_jax[vision]"'
            ) from error
        damage = (
            pyarrow.ArrowException,
            OSError,
            UnicodeDecodeError,
        )  # looked up now: not at exit, in a reader's end
        try:
            with pyarrow.parquet.ParquetFile(
                self.path, buffer_size=1 << 20, pre_buffer=False
            ) as file:
                yield file
        except damage as error:
            message = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.path}: expected a Parquet file, found a damaged one: {message}"
            ) from error


class ParquetRows:
    """A column of Parquet files, its rows numbered over all of them.

    Files are read forwards. Where rows are wanted in another order, a few at a time are read in the
    files' order and held; a table sorted as it is wanted is read once, another one many times over.
    """

    def __init__(self, tables: list[ParquetTable], column: str):
        self._cursor = functools.partial(_Cursor, tables, column)
        self._shared = self._cursor()

    def fetch(self, numbers: np.ndarray) -> Iterator[Any]:
        """The cells of the rows i[n], in that order."""
        # Short lists come one after another, each a little further on than the last.
        cursor = self._shared if len(numbers) < _FIRST_ROWS else self._cursor()
        start, count = 0, _FIRST_ROWS
        while start < len(numbers):
            part = numbers[start : start + count]
            if (np.diff(part) >= 0).all():
                yield from map(cursor.at, part.tolist())
                start += len(part)
                continue
            held, size, ordered = {}, 0, np.unique(part).tolist()
            for number in ordered:
                held[number] = cursor.at(number)
                size += _size(held[number])
                if size > _HELD_BYTES:
                    break
            if len(held) < len(ordered):  # too much: half of it
                count = len(part) // 2
                continue
            yield from map(held.__getitem__, part.tolist())
            start += len(part)
            # Next, what makes two thirds of the most, should they be as large as these.
            count = min(2 * _HELD_BYTES * len(part) // (3 * size + 1), _HELD_ROWS)
            count = max(count, 1)


class _Cursor:
    """Reads single cells of a column; forwards is cheap, backwards begins a row group again."""

    def __init__(self, tables: list[ParquetTable], column: str):
        self._tables = tables
        self._column = column
        self._firsts = np.cumsum([0] + [table.num_rows for table in tables])
        self._table = -1
        self._batches: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._start = 0  # row, within the table, of the batch's first

    def at(self, number: int) -> Any:
        """The cell of a record."""
        table = int(np.searchsorted(self._firsts, number, side="right")) - 1
        row = number - int(self._firsts[table])
        starts = self._tables[table].starts
        group = int(np.searchsorted(starts, row, side="right")) - 1
        end = self._start + len(self._batch)
        if table != self._table or row < self._start or starts[group] > end:
            self._batches = self._tables[table].batches(self._column, group)
            self._table, self._batch, self._start = table, (), int(starts[group])
        while row >= self._start + len(self._batch):
            self._start += len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                raise ValueError(
                    f"{self._tables[table].path}: expected {starts[-1]} rows, found {self._start}"
                )
        return self._batch[row - self._start].as_py()


def _size(cell: Any) -> int:
    if isinstance(cell, bytes | str):
        return len(cell)
    if isinstance(cell, list | dict):
        return sum(map(_size, cell.values() if isinstance(cell, dict) else cell))
    return 0
