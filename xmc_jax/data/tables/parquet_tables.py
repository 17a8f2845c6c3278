"""Parquet files of records, column by column; single cells by row number, in bounded memory.

Errors are one line that begins with the place, `file: row n`, rows counted from 0.
"""

import contextlib
import functools
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from xmc_jax.data.tables import table_format
from xmc_jax.data.tables.table_format import Table
from xmc_jax.files import text_files
from xmc_jax.runtime.wording import counted

_BATCH_BYTES = 4 << 20  # of the rows that are decoded at a time
_FIRST_ROWS = 256
_ROWS_PER_BYTE = 64  # of a file, at most
_HELD_ROWS = 1 << 14  # at most, reordered at a time, where a table's order is not the items'
_HELD_BYTES = 256 << 20  # of those
# Types of columns, as Arrow writes them, whose cells `record_cells` takes or refuses.
_LIST = re.compile(r"(?:large_|fixed_size_)?list(?:_view)?<\w+: (.*)>(?:\[\d+\])?")
_KINDS = re.compile(
    r"(large_)?(string|binary)(_view)?\b|u?int\d+|halffloat|float|double|bool|null|struct<"
    r"|dictionary<|decimal"
)
_ENDED = object()


class ParquetTable(Table):
    """A Parquet file: its columns, and their cells in order, decoded a few at a time.

    Attributes:
        num_rows: rows.
        starts: i64[groups + 1], the first row of each row group and the end.

    Raises:
        ValueError: the file is damaged, or pyarrow is missing.
    """

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        with self._opened() as file:
            schema = file.schema_arrow
            self.types = {field.name: str(field.type) for field in schema}
            if len(self.types) < len(schema.names):
                raise ValueError(
                    f"{path}: expected columns that differ, found {', '.join(schema.names)}"
                )
            self.columns = tuple(self.types)
            meta = file.metadata
            self.num_rows = meta.num_rows
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            self.starts = np.cumsum([0, *(group.num_rows for group in groups)])
        size, held = path.stat().st_size, sum(group.total_byte_size for group in groups)
        if self.num_rows > _ROWS_PER_BYTE * size or held > text_files.most_bytes(path):
            raise ValueError(
                f"{path}: expected what {size} bytes may hold, found "
                f"{counted(self.num_rows, 'row')} of "
                f"{held} bytes: a file made to be slow"
            )

    def at(self, place: int) -> str:
        return f"{self.path}: row {place}"

    def count(self) -> int:
        return self.num_rows

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        columns = [self._checked(name) for name in names]
        row = 0
        for cells in itertools.zip_longest(*columns, fillvalue=_ENDED):
            if any(cell is _ENDED for cell in cells):
                row = -1
                break
            yield row, list(cells)
            row += 1
        if row != self.num_rows:
            raise ValueError(
                f"{self.path}: expected {self.num_rows} cells in every column, as the file says, "
                f"found other numbers of {', '.join(names)}"
            )

    def _checked(self, name: str) -> Iterator[Any]:
        """The cells of a column that records may have, with the limit of their texts."""
        kind = leaf = self.types[name]
        while inner := _LIST.fullmatch(leaf):
            leaf = inner[1]
        if not _KINDS.match(leaf):
            raise ValueError(
                f"{self.path}: column {name}: expected texts, numbers or lists of them, found type "
                f"{kind:.60}; cast the column to text, as pandas does with astype(str)"
            )
        limit, row = table_format.MAX_RECORD, 0
        for batch in self.batches(name, 0):
            try:
                cells: Iterable[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                cells = (cell.as_py() for cell in batch)  # up to the one that is no UTF-8
            try:
                for cell in cells:
                    if isinstance(cell, str) and len(cell) > limit:
                        raise ValueError(
                            f"{self.at(row)}: column {name}: expected at most {limit} characters, "
                            f"found {len(cell)}"
                        )
                    yield cell
                    row += 1
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.at(row)}: column {name}: expected UTF-8, found byte "
                    f"0x{error.object[error.start]:02x}"
                ) from None

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
                    f"{self._tables[table].path}: expected {counted(starts[-1], 'row')}, found "
                    f"{self._start}"
                )
        return self._batch[row - self._start].as_py()


def _size(cell: Any) -> int:
    if isinstance(cell, bytes | str):
        return len(cell)
    if isinstance(cell, list | dict):
        return sum(map(_size, cell.values() if isinstance(cell, dict) else cell))
    return 0
