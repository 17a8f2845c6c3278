"""Text files of records: JSON objects, CSV and its relatives, lines as fastText has them.

Memory holds one record at a time. Errors are one line that begins with the place, `file:line`,
lines counted from 1.
"""

import abc
import array
import codecs
import csv
import itertools
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from xmc_jax.data.tables import table_format
from xmc_jax.data.tables.cell_values import Absent
from xmc_jax.data.tables.table_format import Table
from xmc_jax.files import json_files
from xmc_jax.files.text_files import TextFile

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
"""Characters that may separate the cells of a line, in the order in which they are preferred."""

_PEEKED = 1000  # records of a JSON file that are looked at for its columns
_PREFIX = "__label__"  # of labels in fastText's lines
_BLANKS = re.compile(r"[ \t\r\n]*+")


class TextTable(Table):
    """A text file of records.

    Args:
        limit: most bytes of a record; 0 for `table_format.MAX_RECORD`.
    """

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file.path)
        self._file, self._limit = file, limit or table_format.MAX_RECORD
        if file.encoding != "UTF-8":
            self._add_to_dialect(file.encoding)
        if file.zipped and file.path.suffix.lower() != ".gz":
            self._add_to_dialect("gzipped")

    @abc.abstractmethod
    def records(self) -> Iterator[tuple[int, Any]]:
        """The first line of each record, and the record."""

    def _add_to_dialect(self, note: str) -> None:
        self.dialect += f"{', ' if self.dialect else ''}{note}"

    def _first_line(self) -> bytes:
        """The first line that is not blank; b"" if there is none."""
        return next((line for _, line in self._file.lines(self._limit) if line.strip()), b"")


class _JsonTable(Table):
    """A table whose records are JSON objects."""

    @property
    def loose(self) -> bool:
        return True

    @abc.abstractmethod
    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The first line of each record, and the record."""

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record in self.records():
            cells = [record.get(name) for name in names]
            for name in required:
                if name not in record:
                    cells[names.index(name)] = Absent(tuple(record))
            yield number, cells


class JsonLines(_JsonTable, TextTable):
    """One object per line."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        names: dict[str, None] = {}
        for _, record in itertools.islice(self.records(), _PEEKED):
            names |= dict.fromkeys(record)
        self.columns = tuple(names)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return _objects(self.at, self._file.lines(self._limit))

    def count(self) -> int | None:
        if not self._file.plain:
            return None
        return sum(block.count(b"\n") for block in self._file.blocks())


class JsonStream(_JsonTable):
    """JSON lines that come once, such as those of a pipe; the columns are those of the first.

    Raises:
        ValueError: the first record is damaged.
    """

    def __init__(self, name: str, lines: Iterator[tuple[int, bytes]]):
        super().__init__(pathlib.Path(name))
        records = _objects(self.at, lines)
        first = list(itertools.islice(records, 1))
        self.columns = tuple(first[0][1]) if first else ()
        self._left = itertools.chain(first, records)

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self._left


class JsonList(JsonLines):
    """One list of objects."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        self._add_to_dialect("one JSON list")

    def count(self) -> None:
        return None

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        text = _Characters(self._file.blocks(), self.at)
        expected, first = "[", True
        while True:
            character = text.next()
            if not expected:
                if character:
                    raise text.error("expected nothing behind the list of objects")
                return
            if character == "]" and (expected == "," or (expected == "{" and first)):
                text.index, expected = text.index + 1, ""
            elif character != expected:
                raise text.error(f"expected {expected!r} of a list of objects")
            elif expected == "{":
                yield text.line, text.value(self._limit)
                expected, first = ",", False
            else:
                text.index, expected = text.index + 1, "{"


class _Characters:
    """The characters of a file, of which a part is in memory; `index` is the next one's in it."""

    def __init__(self, blocks: Iterator[bytes], where: Callable[[int], str]):
        self._blocks, self._where = blocks, where
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self.index, self.line = "", 0, 1

    def next(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            end = _BLANKS.match(self._text, self.index).end()
            self._move(end)
            if end < len(self._text):
                return self._text[end]
            if not self._read_block():
                return ""

    def value(self, limit: int) -> dict[str, Any]:
        """The object of at most `limit` characters that begins here; goes behind it."""
        while True:
            try:
                value, end = _decoded(
                    self._where, self.line, _decoder.raw_decode, self._text, self.index
                )
            except json.JSONDecodeError:
                if len(self._text) - self.index <= limit and self._read_block():
                    continue
                raise self.error(
                    f"expected a JSON object, whole and of at most {limit} bytes"
                ) from None
            self._move(end)
            return value

    def error(self, expected: str) -> ValueError:
        """An error at the next character."""
        rest = self._text[self.index : self.index + 60]
        return ValueError(
            f"{self._where(self.line)}: {expected}, found {repr(rest) if rest else 'the end'}"
        )

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self.index, end)
        self.index = end

    def _read_block(self) -> bool:
        """Appends a block to the part in memory; False at the end of the file."""
        block = next(self._blocks, None)
        try:
            more = self._decoder.decode(block or b"", block is None)
        except UnicodeDecodeError as error:
            raise _no_utf8(self._where(self.line), error) from None
        self._text, self.index = self._text[self.index :] + more, 0
        return block is not None


class DelimitedText(TextTable):
    """CSV: a header, and then a line of cells for each record, quoted as RFC 4180 says.

    Line ends within quotes belong to the cell. The header tells what separates the cells.

    Args:
        delimiter: what separates the cells of files whose header has it; "" if each header is to
            tell it.
        usual: what separates them by the file's name.
        headerless: names of the columns of a file that may have no header.

    Raises:
        ValueError: two columns have one name, or none has.
    """

    def __init__(
        self,
        file: TextFile,
        limit: int = 0,
        delimiter: str = "",
        usual: str = ",",
        headerless: Sequence[str] = (),
    ):
        super().__init__(file, limit)
        # The limit of the whole process; `_lines_of_cells` bounds a record.
        csv.field_size_limit(max(csv.field_size_limit(), self._limit))
        self._delimiter = self._detected(delimiter, usual, headerless)
        if self._delimiter != usual:
            name = DELIMITERS.get(self._delimiter, repr(self._delimiter))
            self._add_to_dialect(f"separated by {name}")
        line, header = next(self._lines_of_cells(), (1, []))
        self.columns = [name.strip() for name in header]
        self._header = not headerless or bool(set(headerless) & set(self.columns))
        if not self._header and header:
            self.columns = list(headerless)
        named = [name for name in self.columns if name]
        if header and not named:
            raise ValueError(f"{self.path}: expected a header with the columns' names, found none")
        if len(set(named)) < len(named):
            raise ValueError(
                f"{self.at(line)}: expected columns that differ, found {', '.join(named)}"
            )

    def records(self) -> Iterator[tuple[int, list[str]]]:
        width = len(self.columns)
        for number, record in itertools.islice(self._lines_of_cells(), int(self._header), None):
            if not any(record):
                continue
            if len(record) < width or any(record[width:]):
                hint = f"; a cell with {self._delimiter!r} in it needs quotes around it"
                raise ValueError(
                    f"{self.at(number)}: expected {width} cells, as in the header, found "
                    f"{len(record)}{hint if len(record) > width else ''}"
                )
            yield number, record

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        places = [self.columns.index(name) for name in names]
        for number, record in self.records():
            yield number, [record[place] for place in places]

    def _detected(self, named: str, usual: str, headerless: Sequence[str]) -> str:
        """What separates the names of the header: the character that makes most of them."""
        header, best, most = self._first_line().decode("utf-8", "replace"), usual, 1
        if header.strip().lower() in {f"sep={delimiter}".strip() for delimiter in DELIMITERS}:
            raise ValueError(
                f"{self.at(1)}: expected the columns' names, found {header.strip()!r}, which Excel "
                "reads as a separator; remove this line"
            )
        if named and named in header:
            return named
        for delimiter in dict.fromkeys((usual, *DELIMITERS)):
            try:
                names = next(csv.reader([header], delimiter=delimiter), [])
            except csv.Error:  # A CR that is neither quoted nor at the end of the line.
                raise ValueError(
                    f"{self.at(1)}: expected lines that end in LF or CRLF, found a CR within one; "
                    "save the table as CSV UTF-8, not as CSV of a Macintosh"
                ) from None
            if len(names) > most and {name.strip() for name in names} >= set(headerless):
                best, most = delimiter, len(names)
        return best

    def _lines_of_cells(self) -> Iterator[tuple[int, list[str]]]:
        """As `records`, with the header, rows of empty cells, and rows of any width."""
        first, size = 1, 0

        def lines() -> Iterator[str]:
            nonlocal size
            for number, line in self._file.lines(self._limit):
                size += len(line)
                if size > self._limit:
                    raise ValueError(
                        f"{self.at(first)}: expected a record of at most {self._limit} bytes, "
                        "found a longer one; is a quote not closed?"
                    )
                yield _utf8(self.at, number, line)

        reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        while True:
            first, size = reader.line_num + 1, 0
            try:
                record = next(reader, None)
            except csv.Error as error:
                problem = str(error)
                if problem == "unexpected end of data":
                    problem = "a quote that is not closed"
                raise ValueError(f"{self.at(first)}: expected CSV, found {problem}") from None
            if record is None:
                return
            if record:  # not a blank line
                yield first, record


class FastText(TextTable):
    """A text per line, with its labels as words that begin with `__label__`."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        self._add_to_dialect("fastText's lines")
        first = self._first_line()
        if first and _PREFIX.encode() not in first:
            raise ValueError(
                f"{self.path}: expected lines of fastText, with labels such as {_PREFIX}tea, "
                f"found {first[:60].decode('utf-8', 'replace').strip()!r}; the name of a table "
                "ends in .csv, .tsv or .jsonl"
            )
        self.columns = ("text", "labels") if first else ()

    def records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in self._file.lines(self._limit):
            words = _utf8(self.at, number, line).split()
            if words:
                labels = [word.removeprefix(_PREFIX) for word in words if word.startswith(_PREFIX)]
                text = " ".join(word for word in words if not word.startswith(_PREFIX))
                yield number, {"text": text, "labels": labels}

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record in self.records():
            yield number, [record[name] for name in names]


class TextCells:
    """Cells of a column of a text file, by the numbers of their records.

    The file is read once. Its cells are kept in a temporary file, and memory holds their offsets.
    """

    def __init__(self, table: Table, column: str):
        self._table, self._column = table, column
        self._copy = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends = array.array("q", [0])

    def keys(self, key: str) -> Iterator[tuple[int, Any]]:
        """Place and cell of a column of keys of every record; to be read whole before `fetch`.

        Raises:
            ValueError: a record is damaged; names its line.
        """
        for number, (cell, identity) in self._table.rows([self._column, key]):
            content = json.dumps(cell).encode()
            self._copy.write(content)
            self._ends.append(self._ends[-1] + len(content))
            yield number, identity
        self._copy.flush()

    def fetch(self, numbers: np.ndarray) -> Iterator[Any]:
        """The cells of the records i[n], in that order."""
        for number in numbers.tolist():
            start, end = self._ends[number : number + 2]
            yield json.loads(os.pread(self._copy.fileno(), end - start, start))


def _objects(
    at: Callable[[int], str], lines: Iterator[tuple[int, bytes]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The object of each line that is not blank, with the line's number."""
    for number, line in lines:
        if not line.strip():
            continue
        text = _utf8(at, number, line)
        try:
            record = _decoded(at, number, _decoder.decode, text)
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict):
            remedy = "; one object per line, or the whole file one list of objects"
            raise ValueError(
                f"{at(number)}: expected a JSON object, found {text.strip()[:60]!r}"
                f"{remedy if text.lstrip()[:1] in ('[', '{', '}', ']') else ''}"
            )
        yield number, record


def _decoded(at: Callable[[int], str], line: int, decode: Callable[..., Any], *text: Any) -> Any:
    """What `decode` gives of a text; JSONDecodeError is left to the caller."""
    try:
        return decode(*text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(
            f"{at(line)}: expected a JSON object, found {json_files.problem(error)}"
        ) from None


def _utf8(at: Callable[[int], str], number: int, line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _no_utf8(at(number), error) from None


def _no_utf8(where: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(
        f"{where}: expected UTF-8, found byte 0x{error.object[error.start]:02x}; convert the file, "
        "with iconv -f latin1 -t utf-8 or what its encoding is"
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return record


_decoder = json.JSONDecoder(object_pairs_hook=_object)
