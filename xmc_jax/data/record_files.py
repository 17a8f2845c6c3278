"""JSONL, CSV and Parquet files as rows of cells, one after another, for `records`.

Memory holds a record at a time, of Parquet a few megabytes. Errors are one line that begins with
the place, `file:line` where lines are counted from 1, in Parquet `file: row n` from 0.
"""

import abc
import csv
import dataclasses
import difflib
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from xmc_jax.data import raw, tables

MAX_RECORD = 16 << 20
"""Most bytes of a line of JSONL, of a record of CSV, and characters of a text in Parquet."""

FIELDS = {
    "id": ("id", "uid"),
    "text": ("text", "title"),
    "content": ("content",),
    "labels": ("labels",),
    "weights": ("weights",),
    "filter": ("filter",),
    "group": ("group",),
    "split": ("split",),
    "images": ("images", "image"),
}
"""What records may say -> the columns that are taken for it unless others are named."""

_JSON = (".jsonl", ".ndjson", ".json")
_TEXTS = (*_JSON, ".csv")
SUFFIXES = (*_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS), ".parquet")
"""Of the files that can be read."""

_PEEKED = 1000  # records of a JSONL file looked at for its columns
# Types of Parquet columns, as Arrow writes them, whose cells `record_cells` understands or refuses.
_LIST = re.compile(r"(?:large_|fixed_size_)?list(?:_view)?<\w+: (.*)>(?:\[\d+\])?")
_KINDS = re.compile(
    r"(large_)?(string|binary)(_view)?\b|u?int\d+|halffloat|float|double|bool|null|struct<"
    r"|dictionary<"
)
_ENDED = object()
_NAMES = {"train": ("train", "trn"), "test": ("test", "tst"), "label": ("label", "labels", "lbl")}


def find(folder: pathlib.Path, role: str) -> list[pathlib.Path]:
    """The files of a folder that are named `train`, `test` or `label`, in order; [] if none is.

    That is `train.csv`, `labels.jsonl.gz` and so on, or several files with numbers behind the name,
    such as `train-00000-of-00002.parquet`.

    Args:
        folder: where to look.
        role: "train", "test" or "label".

    Raises:
        ValueError: several files that do not belong together, or some of them missing.
    """
    suffixes = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    pattern = re.compile(
        rf"({'|'.join(_NAMES[role])})(?:[-_.](\d+)(?:[-_.]of[-_.](\d+))?)?({suffixes})"
    )
    found = sorted(
        (match[1], match[4], int(match[2] or -1), int(match[3] or 0), path.name)
        for path in folder.iterdir()
        if (match := pattern.fullmatch(path.name)) and path.is_file()
    )
    names = [name for *_, name in found]
    if len({(stem, suffix, number >= 0) for stem, suffix, number, *_ in found}) > 1 or any(
        one[:3] == other[:3] for one, other in itertools.pairwise(found)
    ):
        raise ValueError(
            f"{folder}: expected one file of {role}, or numbered ones of one kind, found "
            f"{', '.join(names)}"
        )
    if any(total not in (0, len(found)) for *_, total, _ in found):
        raise ValueError(
            f"{folder}: expected all {max(total for *_, total, _ in found)} files that "
            f"{names[0]} is one of, found {len(found)}"
        )
    return [folder / name for name in names]


class Table(abc.ABC):
    """A file of records.

    Attributes:
        path: the file.
        columns: their names.
    """

    def __init__(self, path: pathlib.Path, columns: Sequence[str]):
        self.path = path
        self.columns = columns

    @abc.abstractmethod
    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        """Place and cells of each record; a null and what a JSON object lacks are None.

        Args:
            names: of the columns.
            required: of those, which no JSON object may lack.

        Raises:
            ValueError: a record is damaged; names its place.
        """

    def at(self, place: int) -> str:
        """A place, as errors begin with it."""
        return f"{self.path}:{place}"


def open_table(path: pathlib.Path) -> Table:
    """Opens a file and reads which columns it has.

    Raises:
        ValueError: no such file, another kind of file, or one without columns.
    """
    name = path.name.lower()
    if not name.endswith(SUFFIXES):
        raise ValueError(f"{path}: expected a name ending in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of records, found none")
    if name.endswith(".parquet"):
        return _Parquet(path)
    return _Csv(path) if name.removesuffix(".gz").endswith(".csv") else _Json(path)


def open_stream(name: str, lines: Iterator[tuple[int, bytes]]) -> Table:
    """JSONL that can be read once, such as a pipe's; its columns are those of the first record.

    Args:
        name: what errors call it.
        lines: numbered.

    Raises:
        ValueError: there is no record, or the first is damaged.
    """
    return _Stream(pathlib.Path(name), lines)


class _Json(Table):
    """One object per line."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path, ())
        names: dict[str, None] = {}
        for _, record in itertools.islice(self._records(), _PEEKED):
            names |= dict.fromkeys(record)
        if not names:
            raise ValueError(f"{path}: expected records, found an empty file")
        self.columns = tuple(names)

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record in self._records():
            for name in required:
                if name not in record:
                    raise ValueError(
                        f"{self.at(number)}: expected {name!r}, as in other records, found "
                        f"{', '.join(record)[:200] or 'an empty object'}"
                    )
            yield number, [record.get(name) for name in names]

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._lines():
            if not line.strip():
                continue
            text = _utf8(self.at(number), line)
            try:
                record = _decode(text)
            except json.JSONDecodeError:
                record = None
            except RecursionError:
                raise ValueError(
                    f"{self.at(number)}: expected a JSON object, found one nested too deeply"
                ) from None
            except ValueError as error:
                raise ValueError(
                    f"{self.at(number)}: expected a JSON object, found {str(error)[:80]}"
                ) from None
            if not isinstance(record, dict):
                remedy = "; one object per line, without a list around them"
                raise ValueError(
                    f"{self.at(number)}: expected a JSON object, found {text.strip()[:60]!r}"
                    f"{remedy if text.lstrip()[:1] in ('[', '{', '}', ']') else ''}"
                )
            yield number, record

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        return raw.whole_lines(self.path, MAX_RECORD)


class _Stream(_Json):
    """The same of lines that come once."""

    def __init__(self, path: pathlib.Path, lines: Iterator[tuple[int, bytes]]):
        Table.__init__(self, path, ())
        self._given = lines
        records = super()._records()
        first = next(records, None)
        if first is None:
            raise ValueError(f"{path}: expected records, found none")
        self.columns = tuple(first[1])
        self._left = itertools.chain([first], records)

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self._left

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        return self._given


class _Csv(Table):
    """Commas, a header, quoted as RFC 4180 says; line ends within quotes belong to the cell."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path, ())
        # Of the whole process; what bounds a record is `_lines`.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD))
        _, header = next(self._records(), (0, []))
        self.columns = [name.strip() for name in header]
        if not any(self.columns):
            raise ValueError(f"{path}: expected a header with the columns' names, found none")
        named = [name for name in self.columns if name]
        if len(set(named)) < len(named):
            raise ValueError(f"{path}:1: expected columns that differ, found {', '.join(named)}")

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        places = [self.columns.index(name) for name in names]
        width = len(self.columns)
        for number, record in itertools.islice(self._records(), 1, None):
            if len(record) != width:
                raise ValueError(
                    f"{self.at(number)}: expected {width} cells, as in the header, found "
                    f"{len(record)}"
                )
            yield number, [record[place] or None for place in places]

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Records, the header first, with the line that each begins in."""
        begin, size = 1, 0

        def lines() -> Iterator[str]:
            nonlocal size
            for number, line in raw.whole_lines(self.path, MAX_RECORD):
                size += len(line)
                if size > MAX_RECORD:
                    raise ValueError(
                        f"{self.at(begin)}: expected a record of at most {MAX_RECORD} bytes, found "
                        "a longer one; is a quote not closed?"
                    )
                yield _utf8(self.at(number), line)

        reader = csv.reader(lines(), strict=True)
        while True:
            begin, size = reader.line_num + 1, 0
            try:
                record = next(reader, None)
            except csv.Error as error:
                problem = str(error)
                if problem == "unexpected end of data":
                    problem = "a quote that is not closed"
                raise ValueError(f"{self.at(begin)}: expected CSV, found {problem}") from None
            if record is None:
                return
            if record:  # not a blank line
                yield begin, record


class _Parquet(Table):
    def __init__(self, path: pathlib.Path):
        self._table = tables.ParquetTable(path)
        super().__init__(path, tuple(self._table.columns))

    def at(self, place: int) -> str:
        return f"{self.path}: row {place}"

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        columns = [self._cells(name) for name in names]
        row = 0
        for cells in itertools.zip_longest(*columns, fillvalue=_ENDED):
            if any(cell is _ENDED for cell in cells):
                row = -1
                break
            yield row, list(cells)
            row += 1
        if row != self._table.num_rows:
            raise ValueError(
                f"{self.path}: expected {self._table.num_rows} cells in every column, as the file "
                f"says, found other numbers of {', '.join(names)}"
            )

    def _cells(self, name: str) -> Iterator[Any]:
        kind = leaf = self._table.columns[name]
        while inner := _LIST.fullmatch(leaf):
            leaf = inner[1]
        if not _KINDS.match(leaf):
            raise ValueError(
                f"{self.path}: column {name}: expected texts, numbers or lists of them, found "
                f"type {kind:.60}"
            )
        row = 0
        for batch in self._table.batches(name, 0):
            try:
                cells: Iterable[Any] = batch.to_pylist()
            except UnicodeDecodeError:
                cells = (cell.as_py() for cell in batch)  # up to the one that is no UTF-8
            try:
                for cell in cells:
                    if isinstance(cell, str) and len(cell) > MAX_RECORD:
                        raise ValueError(
                            f"{self.at(row)}: column {name}: expected at most {MAX_RECORD} "
                            f"characters, found {len(cell)}"
                        )
                    yield cell
                    row += 1
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.at(row)}: column {name}: expected UTF-8, found byte "
                    f"0x{error.object[error.start]:02x}"
                ) from None


@dataclasses.dataclass(frozen=True)
class Opened:
    """A table and what is taken from it.

    Attributes:
        table: the file.
        columns: field -> column.
    """

    table: Table
    columns: Mapping[str, str]

    def records(self) -> Iterator["Record"]:
        """All of them, in order."""
        places = {field: place for place, field in enumerate(self.columns)}
        required = [self.columns["text"]] if "text" in self.columns else []
        for place, cells in self.table.rows(list(self.columns.values()), required):
            yield Record(self, place, places, cells)


class Record:
    """A record of a table; calling it with a field gives the cell, converted."""

    __slots__ = ("_cells", "_opened", "_places", "place")

    def __init__(self, opened: Opened, place: int, places: Mapping[str, int], cells: list[Any]):
        self._opened, self.place, self._places, self._cells = opened, place, places, cells

    def __call__(self, field: str, convert: Callable[..., Any], *arguments: Any) -> Any:
        """`convert` of the cell, or of None where the table has none; its errors get the place."""
        at = self._places.get(field)
        try:
            return convert(None if at is None else self._cells[at], *arguments)
        except ValueError as error:
            raise self.error(field, str(error)) from None

    def has(self, field: str) -> bool:
        """Whether the table has a column for a field."""
        return field in self._places

    def error(self, field: str, problem: str) -> ValueError:
        """What is wrong with a field, with the place."""
        column = self._opened.columns[field]
        return ValueError(f"{self._opened.table.at(self.place)}: column {column}: {problem}")


def columns(table: Table, fields: Iterable[str], named: Mapping[str, Sequence[str]]) -> dict:
    """Field -> the column of a table that it is in, of the fields that the table has.

    Args:
        table: its columns are looked through.
        fields: of `FIELDS`.
        named: field -> columns that are to be taken for it where a table has them, before those
            that `FIELDS` names; "" for none at all.

    Raises:
        ValueError: several columns are one field.
    """
    asked = {
        field: [name for name in dict.fromkeys(names) if name in table.columns]
        for field, names in named.items()
    }
    taken = {name for names in asked.values() for name in names}
    found = {}
    for field in fields:
        names = asked.get(field, [])
        if not names and "" not in named.get(field, ()):
            names = [name for name in FIELDS[field] if name in table.columns and name not in taken]
        if len(names) > 1:
            remedy = f"--column {field}={names[-1]}"
            if field == "text":
                remedy += f", or --column {field}={names[-1]} --column content={names[0]} for both"
            raise ValueError(
                f"{table.path}: expected one column for {field}, found {' and '.join(names)}; say "
                f"which: {remedy}"
            )
        if names:
            found[field] = names[0]
    return found


def missing(table: Table, field: str, names: Sequence[str]) -> ValueError:
    """That a table has none of these columns for a field, with the nearest one that it has."""
    columns = [column for column in table.columns if column]
    nearest = [
        *(match for name in names for match in difflib.get_close_matches(name, columns, 1)),
        *(column for name in names for column in columns if name in column.lower()),
    ]
    remedy = f"--column {field}={nearest[0] if nearest else 'NAME'}"
    if len(table.columns) == 1 and (other := re.search(r"[;\t|]", table.columns[0])):
        remedy = f"separate cells by commas, not by {other[0]!r}"
    there = ", ".join(table.columns)
    return ValueError(
        f"{table.path}: expected a column {' or '.join(names)}, found "
        f"{there[:200]}{'...' if len(there) > 200 else ''}; {remedy}"
    )


def _utf8(where: str, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8, found byte 0x{line[error.start]:02x}; convert the file, "
            "with iconv -f latin1 -t utf-8 or what its encoding is"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return found


_decode = json.JSONDecoder(object_pairs_hook=_object).decode
