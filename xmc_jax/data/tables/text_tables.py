"""Text files of records: JSON objects, CSV and its relatives, lines as fastText has them.

Memory holds a record at a time. Errors are one line that begins with the place, `file:line`, lines
counted from 1.
"""

import abc
import array
import codecs
import csv
import io
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
        file: the file.
        limit: most bytes of a record; 0 for `record_table.MAX_RECORD`.

    Attributes:
        seekable: whether a record can be read alone, from the bytes between two records' ends.
        begin: where the first record begins, in bytes, if `seekable`.
    """

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file.path)
        self._file, self._limit = file, limit or table_format.MAX_RECORD
        self.seekable, self.begin = file.plain, file.begin
        if file.encoding != "UTF-8":
            self._add_to_dialect(file.encoding)
        if file.zipped and file.path.suffix.lower() != ".gz":
            self._add_to_dialect("gzipped")

    @abc.abstractmethod
    def records(self) -> Iterator[tuple[int, Any, int]]:
        """First line of each record; the record; and where it ends, in bytes, if `seekable`."""

    @abc.abstractmethod
    def cell(self, record: Any, column: str) -> Any:
        """A cell of one of `records`."""

    @abc.abstractmethod
    def parse(self, content: bytes) -> Any:
        """One of `records`, from the bytes between the end of the one before and its own."""

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record, _ in self.records():
            yield number, [self.cell(record, name) for name in names]

    def _add_to_dialect(self, note: str) -> None:
        self.dialect += f"{', ' if self.dialect else ''}{note}"


class JsonLines(TextTable):
    """One object per line."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        names: dict[str, None] = {}
        for _, record, _ in itertools.islice(self.records(), _PEEKED):
            names |= dict.fromkeys(record)
        self.columns = tuple(names)

    @property
    def loose(self) -> bool:
        return True

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record, _ in self.records():
            yield number, _cells(record, names, required)

    def records(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        return _objects(self.at, self._file.lines(self._limit), self.begin)

    def cell(self, record: dict[str, Any], column: str) -> Any:
        return record.get(column)

    def parse(self, content: bytes) -> dict[str, Any]:
        return json.loads(content)

    def count(self) -> int | None:
        if not self.seekable:
            return None
        return sum(block.count(b"\n") for block in self._file.blocks())


class JsonStream(Table):
    """JSON lines that come once, such as those of a pipe.

    The columns are those of the first record.

    Args:
        name: what errors call it.
        lines: numbered.

    Raises:
        ValueError: the first record is damaged.
    """

    def __init__(self, name: str, lines: Iterator[tuple[int, bytes]]):
        super().__init__(pathlib.Path(name))
        records = _objects(self.at, lines, 0)
        first = list(itertools.islice(records, 1))
        self.columns = tuple(first[0][1]) if first else ()
        self._left = itertools.chain(first, records)

    @property
    def loose(self) -> bool:
        return True

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        for number, record, _ in self._left:
            yield number, _cells(record, names, required)


class JsonList(JsonLines):
    """One list of objects."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        self.seekable = False
        self._add_to_dialect("one JSON list")

    def records(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        text = _Characters(self._file.blocks(), self.at)
        expected, first = "[", True
        while True:
            found = text.next()
            if not expected:
                if found:
                    raise text.error("expected nothing behind the list of objects")
                return
            if found == "]" and (expected == "," or (expected == "{" and first)):
                text.at, expected = text.at + 1, ""
            elif found != expected:
                raise text.error(f"expected {expected!r} of a list of objects")
            elif expected == "{":
                record, line = text.value(self._limit)
                yield line, record, 0
                expected, first = ",", False
            else:
                text.at, expected = text.at + 1, "{"


class _Characters:
    """The characters of a file, of which a part is held.

    Attributes:
        at: index of the next character within the part.
    """

    def __init__(self, blocks: Iterator[bytes], where: Callable[[int], str]):
        self._blocks, self._where = blocks, where
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self.at, self._line = "", 0, 1

    def next(self) -> str:
        """The next character that is no blank; "" at the end."""
        while True:
            end = _BLANKS.match(self._text, self.at).end()
            self._move(end)
            if end < len(self._text):
                return self._text[end]
            if not self._more():
                return ""

    def value(self, limit: int) -> tuple[dict[str, Any], int]:
        """The object that begins at the next character, and its line; goes behind it.

        Args:
            limit: most characters of the object.
        """
        line = self._line
        while True:
            try:
                found, end = _decoded(self._where, line, _decoder.raw_decode, self._text, self.at)
            except json.JSONDecodeError:
                if len(self._text) - self.at <= limit and self._more():
                    continue
                raise self.error(
                    f"expected a JSON object, whole and of at most {limit} bytes"
                ) from None
            self._move(end)
            return found, line

    def error(self, expected: str) -> ValueError:
        """An error at the next character."""
        found = repr(self._text[self.at : self.at + 60]) if self.at < len(self._text) else "the end"
        return ValueError(f"{self._where(self._line)}: {expected}, found {found}")

    def _move(self, end: int) -> None:
        self._line += self._text.count("\n", self.at, end)
        self.at = end

    def _more(self) -> bool:
        """Puts a block behind what is held; False at the end of the file."""
        block = next(self._blocks, None)
        try:
            more = self._decoder.decode(block or b"", block is None)
        except UnicodeDecodeError as error:
            raise _no_utf8(self._where(self._line), error) from None
        self._text, self.at = self._text[self.at :] + more, 0
        return block is not None


class DelimitedText(TextTable):
    """CSV: a header, and then a line of cells for each record, quoted as RFC 4180 says.

    Line ends within quotes belong to the cell. The header tells what separates the cells.

    Args:
        file: the file.
        limit: see `TextTable`.
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
        # Of the whole process; what bounds a record is `_all`.
        csv.field_size_limit(max(csv.field_size_limit(), self._limit))
        self._delimiter = self._told(delimiter, usual, headerless)
        if self._delimiter != usual:
            said = DELIMITERS.get(self._delimiter, repr(self._delimiter))
            self._add_to_dialect(f"separated by {said}")
        line, header, end = next(self._all(), (1, [], 0))
        self.columns = [name.strip() for name in header]
        self._header = not headerless or bool(set(headerless) & set(self.columns))
        if self._header:
            self.begin = end
        elif header:
            self.columns = list(headerless)
        named = [name for name in self.columns if name]
        if header and not named:
            raise ValueError(f"{self.path}: expected a header with the columns' names, found none")
        if len(set(named)) < len(named):
            raise ValueError(
                f"{self.at(line)}: expected columns that differ, found {', '.join(named)}"
            )

    def records(self) -> Iterator[tuple[int, list[str], int]]:
        width = len(self.columns)
        for number, record, end in itertools.islice(self._all(), int(self._header), None):
            if not any(record):
                continue
            if len(record) < width or any(record[width:]):
                hint = f"; a cell with {self._delimiter!r} in it needs quotes around it"
                raise ValueError(
                    f"{self.at(number)}: expected {width} cells, as in the header, found "
                    f"{len(record)}{hint if len(record) > width else ''}"
                )
            yield number, record, end

    def rows(
        self, names: Sequence[str], required: Sequence[str] = ()
    ) -> Iterator[tuple[int, list[Any]]]:
        places = [self.columns.index(name) for name in names]
        for number, record, _ in self.records():
            yield number, [record[place] for place in places]

    def cell(self, record: Sequence[str], column: str) -> str:
        return record[self.columns.index(column)]

    def parse(self, content: bytes) -> list[str]:
        lines = io.StringIO(content.decode(), newline="")
        return next(filter(any, csv.reader(lines, delimiter=self._delimiter)))

    def _told(self, named: str, usual: str, headerless: Sequence[str]) -> str:
        """What separates the names of the header: the character that makes most of them."""
        line = next((line for _, line in self._file.lines(self._limit) if line.strip()), b"")
        header, best, most = line.decode("utf-8", "replace"), usual, 1
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

    def _all(self) -> Iterator[tuple[int, list[str], int]]:
        """As `records`, with the header, rows of empty cells, and rows of any width."""
        first, size, end = 1, 0, self._file.begin

        def lines() -> Iterator[str]:
            nonlocal size, end
            for number, line in self._file.lines(self._limit):
                size += len(line)
                end += len(line)
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
                yield first, record, end


class FastText(TextTable):
    """A text per line, with its labels as words that begin with `__label__`."""

    def __init__(self, file: TextFile, limit: int = 0):
        super().__init__(file, limit)
        self._add_to_dialect("fastText's lines")
        first = next((line for _, line in self._file.lines(self._limit) if line.strip()), b"")
        if first and _PREFIX.encode() not in first:
            raise ValueError(
                f"{self.path}: expected lines of fastText, with labels such as {_PREFIX}tea, "
                f"found {first[:60].decode('utf-8', 'replace').strip()!r}; the name of a table "
                "ends in .csv, .tsv or .jsonl"
            )
        self.columns = ("text", "labels") if first else ()

    def records(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        end = self.begin
        for number, line in self._file.lines(self._limit):
            end += len(line)
            if line.strip():
                yield number, _labelled(_utf8(self.at, number, line)), end

    def cell(self, record: dict[str, Any], column: str) -> Any:
        return record[column]

    def parse(self, content: bytes) -> dict[str, Any]:
        return _labelled(content.decode())


class TextCells:
    """Cells of a column of a text file, by the numbers of their records.

    Memory holds where the records end. A file whose records cannot be read alone, such as a gzip
    file, is read once, and its cells are kept in a temporary file.

    Args:
        table: the file.
        column: name of the column.
    """

    def __init__(self, table: TextTable, column: str):
        self._table, self._column = table, column
        self._copy = None if table.seekable else tempfile.TemporaryFile()  # noqa: SIM115
        self._ends = array.array("q", [table.begin if table.seekable else 0])

    def keys(self, key: str) -> Iterator[tuple[int, Any]]:
        """Place and cell of a column of keys of every record; to be read whole before `fetch`.

        Raises:
            ValueError: a record is damaged; names its line.
        """
        for number, record, end in self._table.records():
            if self._copy is not None:
                line = json.dumps(self._table.cell(record, self._column)).encode()
                self._copy.write(line)
                end = self._ends[-1] + len(line)
            self._ends.append(end)
            yield number, self._table.cell(record, key)
        if self._copy is not None:
            self._copy.flush()

    def fetch(self, numbers: np.ndarray) -> Iterator[Any]:
        """The cells of the records i[n], in that order."""
        if self._copy is not None:
            for content in self._contents(self._copy.fileno(), numbers):
                yield json.loads(content)
            return
        with self._table.path.open("rb") as file:
            for content in self._contents(file.fileno(), numbers):
                yield self._table.cell(self._table.parse(content), self._column)

    def _contents(self, file: int, numbers: np.ndarray) -> Iterator[bytes]:
        for number in numbers.tolist():
            start, end = self._ends[number : number + 2]
            yield os.pread(file, end - start, start)


def _labelled(line: str) -> dict[str, Any]:
    """The text and the labels of a line of fastText."""
    words = line.split()
    labels = [word.removeprefix(_PREFIX) for word in words if word.startswith(_PREFIX)]
    return {"text": " ".join(w for w in words if not w.startswith(_PREFIX)), "labels": labels}


def _cells(record: dict[str, Any], names: Sequence[str], required: Sequence[str]) -> list[Any]:
    cells = [record.get(name) for name in names]
    for name in required:
        if name not in record:
            cells[names.index(name)] = Absent(tuple(record))
    return cells


def _objects(
    at: Callable[[int], str], lines: Iterator[tuple[int, bytes]], end: int
) -> Iterator[tuple[int, dict[str, Any], int]]:
    """The object of each line that is not blank, with its line and where it ends, in bytes."""
    for number, line in lines:
        end += len(line)
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
        yield number, record, end


def _decoded(at: Callable[[int], str], line: int, decode: Callable[..., Any], *text: Any) -> Any:
    """What `decode` gives of a text; JSONDecodeError is left to the caller."""
    try:
        return decode(*text)
    except json.JSONDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        found = json_files.problem(error)
    raise ValueError(f"{at(line)}: expected a JSON object, found {found}")


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
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r:.60} twice")
    return found


_decoder = json.JSONDecoder(object_pairs_hook=_object)
