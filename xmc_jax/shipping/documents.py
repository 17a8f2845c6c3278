"""New documents from a file or a pipe, some at a time: records of JSONL, CSV or Parquet.

A record has `text`, or `title` and perhaps `content`; perhaps `id`, `images`, and `only` and
`exclude` (or `filter`), ids of the labels that may and may not be predicted for it. Cells are as
`data.record_cells` takes them. Images are paths within the file's folder, or the files themselves:
bytes in Parquet (also within Hugging Face's struct), in other files `data:image/png;base64,...` or
an object with `bytes`, in base64.

Records without ids have their numbers, from 0. Where others of the file have ids, the number stands
behind `row-`, so that no id is there twice.
"""

import base64
import binascii
import dataclasses
import hashlib
import os
import pathlib
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from absl import logging

from xmc_jax.data.tables import cell_values, named_columns, table_files, table_format
from xmc_jax.files import paths
from xmc_jax.files.digests import sha256
from xmc_jax.files.text_files import TextFile
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping.contents import ModelInput
from xmc_jax.shipping.labels import Label
from xmc_jax.shipping.predictor import Query

MAX_IMAGE = 32 << 20
"""Most bytes of a picture's file."""
STDIN = "-"

FIELDS = {
    "id": ("id", "uid"),
    "text": ("text", "title"),
    "content": ("content",),
    "images": ("images", "image"),
    "only": ("only",),
    "exclude": ("exclude", "filter"),
}
"""What records may say -> the columns that are taken for it unless others are named."""

_SEPARATOR = "|"  # of ids and paths in a text
_BATCH_BYTES = 64 << 20  # of pictures and texts, after which a batch is not waited for
DATA_URL = re.compile(r"data:[\w/+.;=-]{0,100};base64,")
"""How a data: URL of base64 begins."""
_ROW = "row-"


@dataclasses.dataclass(frozen=True)
class Document:
    """A record.

    Attributes:
        query: what is to be ranked.
        at: where it is, as errors begin with it.
        problem: why it cannot be; None if it can.
        digest: SHA-256 of the pipe's lines up to it; None of files.
    """

    id: str
    query: Query
    at: str
    problem: str | None
    digest: str | None


class DocumentFile:
    """A file of records, or standard input.

    Args:
        columns: "field=column" for fields whose columns have other names; "field=" to leave one
            out.
        numbered: whether a record without an id has its number as one; otherwise it is a problem.
        allow_paths: whether paths of images may lead out of the file's folder.
        section: of the flags that say all this, "predict" or "labels"; for errors.
        fields: those of `FIELDS` that are read.

    Attributes:
        digest: SHA-256 of the file; None of a pipe.
        total: records, where that is known.

    Raises:
        ValueError: there is no such file, it is of another kind, or it has no column of texts.
    """

    def __init__(
        self,
        path: str,
        model: ModelInput,
        columns: Sequence[str] = (),
        numbered: bool = True,
        delimiter: str = "",
        allow_paths: bool = False,
        section: str = "predict",
        fields: Sequence[str] = tuple(FIELDS),
    ):
        self._model, self._numbered, self._allow_paths = model, numbered, allow_paths
        self._flag, self._fields = f"--{section}.columns", fields
        self._folder = pathlib.Path()
        self._lines: _Lines | None = None
        self._empty_only = False  # whether there was one
        self.digest = self.total = None
        if path == STDIN:
            self._lines = _Lines(sys.stdin.buffer)
            self._table = table_files.open_stream("stdin", iter(self._lines))
        else:
            where = pathlib.Path(path)
            self._folder = where.parent
            self._table = table_files.open_table(
                where, table_files.delimiter(delimiter, f"--{section}.delimiter")
            )
            self.digest = sha256(where)
            self.total = self._table.count()
        self.name = str(self._table.path)
        given = named(columns, self._flag, fields)
        self._columns = self._find(given) if self._table.columns else {}
        self._with_ids = self._columns.get("id") in self._table.columns
        used = self._columns.values()
        unread = [name for name in self._table.columns if name and name not in used]
        if self._table.dialect:
            logging.info("%s: %s", self.name, self._table.dialect)
        if unread:
            logging.info("%s: not read: %s", self.name, _some(unread))

    def documents(self, start: int = 0, digest: str | None = None) -> Iterator[Document]:
        """The documents from a number on, in order; of a pipe once.

        Args:
            start: those before are passed over.
            digest: of the pipe's lines up to there, as it has to be.

        Raises:
            ValueError: a record is damaged, which nothing after it can be told from; or a pipe does
                not begin as it did.
        """
        fields = tuple(self._columns)
        text = self._columns.get("text")
        required = [text] if text is not None and "images" not in self._columns else []
        rows = self._table.rows(list(self._columns.values()), required) if fields else ()
        number = -1
        for number, (place, cells) in enumerate(rows):
            now = None if self._lines is None else self._lines.digest
            if number >= start:
                yield self._document(number, self._table.at(place), dict(zip(fields, cells)), now)
            elif number == start - 1 and now != digest:
                raise self._other(start)
        if number + 1 < start:
            raise self._other(start)

    def batches(
        self, size: int, start: int = 0, digest: str | None = None
    ) -> Iterator[list[Document]]:
        """The same, some at a time: as many, or fewer where they are large."""
        batch, held = [], 0
        for document in self.documents(start, digest):
            batch.append(document)
            held += sum(map(len, document.query.images)) + len(document.query.text)
            if len(batch) == size or held >= _BATCH_BYTES:
                yield batch
                batch, held = [], 0
        if batch:
            yield batch

    def check_ends(self, count: int, digest: str | None) -> None:
        """Raises ValueError unless a pipe has these documents and no more; of a file it has."""
        if self._lines is not None and next(self.documents(count, digest), None) is not None:
            raise self._other(count)

    def _other(self, count: int) -> ValueError:
        return ValueError(
            f"{self.name}: expected the {counted(count, 'record')} that are done already, found "
            "others; "
            "give the same again, or begin anew with --overwrite"
        )

    def _find(self, chosen: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """Field -> column."""
        there, columns = self._table.columns, {}
        loose = self._table.loose
        for field in self._fields:
            usual = FIELDS[field]
            names = chosen.get(field)
            if names is None:
                used = {name for given in chosen.values() for name in given}
                names = [n for n in named_columns.usual(self._table, usual) if n not in used]
                if field == "text" and len(names) > 1:
                    raise ValueError(
                        f"{self.name}: expected a column text or title, found both; say which: "
                        f"{self._flag}=text=title, or text=title,content=text for both"
                    )
                if not names and loose and field not in ("text", "content"):
                    names = usual  # perhaps of a later record
                names = names[:1]
            elif missing := [name for name in names if name not in there and not loose]:
                raise ValueError(
                    f"{self.name}: expected a column {missing[0]}, as {self._flag} says, "
                    f"found {_some(there)}"
                )
            if names:
                columns[field] = names[0]
        if "text" not in columns and not (self._model.images and "images" in columns):
            raise ValueError(
                f"{self.name}: expected a column text or title, found {_some(there)}; say which it "
                f"is: {self._flag}=text=NAME"
            )
        if self._model.text == "title":
            columns.pop("content", None)
        if self._model.images is None and columns.get("images") in there:
            logging.warning("%s: pictures are left out: the model was trained without", self.name)
        if self._model.images is None:
            columns.pop("images", None)
        return columns

    def _document(
        self, number: int, at: str, cells: Mapping[str, Any], digest: str | None
    ) -> Document:
        values: dict[str, Any] = {
            "id": "",
            "text": "",
            "content": "",
            "images": (),
            "only": None,
            "exclude": (),
        }
        problem = None
        for field, cell in cells.items():
            if cell_values.is_null(cell) or (field == "id" and cell == ""):
                continue
            if field == "only" and cell == "" and not self._empty_only:
                self._empty_only = True
                logging.warning(
                    "%s: column %s is empty: no label may be predicted for this document, nor for "
                    "others with an empty one; in JSON and Parquet null sets no bounds, and "
                    "--predict.columns=only= leaves the column out",
                    at,
                    self._columns[field],
                )
            try:
                values[field] = self._value(field, cell)
            except ValueError as error:
                problem = problem or f"column {self._columns[field]}: {error}"
        if not values["id"] and self._numbered:
            values["id"] = f"{_ROW}{number}" if self._with_ids else str(number)
        elif not values["id"]:
            named = f"; {self._flag}=id=NAME names a column of ids"
            problem = problem or f"expected an id, found none{'' if self._with_ids else named}"
        text = values["text"]
        if values["content"]:
            text = f"{text} {values['content']}".strip()
        if not (text.strip() or values["images"]):
            problem = problem or "expected a text or a picture, found neither"
        query = Query(text, values["images"], values["only"], values["exclude"])
        return Document(values["id"], query, at, problem, digest)

    def _value(self, field: str, cell: Any) -> Any:
        if field == "id":
            return self._given(cell_values.identifier(cell))
        if field in ("text", "content"):
            return cell_values.text(cell)
        if field == "images":
            listed = _listed(cell)[: self._model.images.per_item]
            return tuple(_picture(one, self._folder, self._allow_paths) for one in listed)
        return tuple(cell_values.identifiers(cell, _SEPARATOR))

    def _given(self, uid: str) -> str:
        """An id that a record has, unless a record without one may have the same."""
        number = uid.removeprefix(_ROW) if self._with_ids else uid
        if self._numbered and number.isdecimal() and (number != uid or not self._with_ids):
            raise ValueError(
                f"expected another id, since records without one are numbered, found {uid!r:.60}; "
                "give all records ids, or none"
            )
        return uid


def named(columns: Sequence[str], flag: str, fields: Sequence[str]) -> dict[str, list[str]]:
    """Field -> its column as a list of one; an empty list leaves the field out.

    Args:
        flag: that has them, for errors.

    Raises:
        ValueError: something else.
    """
    chosen: dict[str, list[str]] = {}
    for column in columns:
        field, equals, name = column.partition("=")
        if not equals or field not in fields or field in chosen:
            raise ValueError(
                f"{flag}: expected FIELD=NAME, FIELD one of {', '.join(fields)}, each once, got "
                f"{column!r}"
            )
        chosen[field] = [name] if name else []
    return chosen


def labels(
    path: str,
    model: ModelInput,
    columns: Sequence[str] = (),
    delimiter: str = "",
    allow_paths: bool = False,
) -> Iterator[Label]:
    """Labels of a file: records as of documents, each with an id.

    Raises:
        ValueError: see `DocumentFile`; a label that cannot be read, or no column of ids.
    """
    fields = ("id", "text", "content", "images")
    source = DocumentFile(path, model, columns, False, delimiter, allow_paths, "labels", fields)
    for document in source.documents():
        if document.problem is not None:
            raise ValueError(f"{document.at}: {document.problem}")
        yield Label(document.query.text, document.query.images, document.id, document.at)


def ids_of(path: str) -> dict[str, int] | None:
    """Ids of labels -> their lines, of a file with one in a line; None without a file."""
    if not path:
        return None
    line_of: dict[str, int] = {}
    for number, line in TextFile(pathlib.Path(path)).lines(table_format.MAX_RECORD):
        try:
            if line.strip():
                line_of.setdefault(cell_values.identifier(line.decode("utf-8")), number)
        except UnicodeDecodeError:
            raise ValueError(f"{path}:{number}: expected an id in UTF-8, found another") from None
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    if not line_of:
        raise ValueError(f"{path}: expected ids of labels, one in a line, found none")
    return line_of


class _Lines:
    """Numbered lines of a pipe."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash = file, hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        limit, number = table_format.MAX_RECORD, 0
        while line := self._file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise ValueError(
                    f"stdin:{number}: expected a line of at most {limit} bytes, found a longer one"
                )
            self._hash.update(line)
            yield number, line


def _listed(cell: Any) -> list[Any]:
    if isinstance(cell, list):
        return cell
    if isinstance(cell, str):
        return cell_values.images(cell, _SEPARATOR)
    return [cell]


def _picture(cell: Any, folder: pathlib.Path, allow_paths: bool) -> bytes:
    """The bytes of a picture that a record names or holds."""
    if isinstance(cell, dict):  # Hugging Face's Image
        held = cell.get("bytes")
        cell = cell.get("path") if held is None else held
        if isinstance(held, str):
            cell = decoded(held)
    if isinstance(cell, str):
        if start := DATA_URL.match(cell[:200]):
            cell = decoded(cell[start.end() :])
        elif cell_values.is_url(cell):
            raise ValueError(
                f"expected a path or a picture, found the URL {cell[:100]}; fetch it first: "
                "python -m xmc_jax.images.fetch"
            )
        else:
            return _read(paths.within(folder, cell, allow_paths), cell)
    if not isinstance(cell, bytes):
        raise ValueError(f"expected a path or a picture, found {cell!r:.60}")
    if not 0 < len(cell) <= MAX_IMAGE:
        raise ValueError(f"expected a picture of 1 to {MAX_IMAGE} bytes, found {len(cell)}")
    return cell


def decoded(text: str) -> bytes:
    """The bytes of base64, which may be wrapped; ValueError for another text."""
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        raise ValueError(f"expected base64, found {text[:40]!r}") from None


def _read(path: pathlib.Path, name: str) -> bytes:
    """A picture's file; errors have the name that the record has."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError(f"expected a file, found something else: {name:.200}")
            content = file.read(MAX_IMAGE + 1)
    except OSError as error:  # its own message has the path once more
        raise ValueError(
            f"expected a picture, found {(error.strerror or 'nothing').lower()}: {name:.200}"
        ) from None
    if not 0 < len(content) <= MAX_IMAGE:
        size = f"more than {MAX_IMAGE} bytes" if content else "an empty file"
        raise ValueError(f"expected a picture, found {size}: {name:.200}")
    return content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe that nobody writes to


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names)
    return listed[:200] + ("..." if len(listed) > 200 else "")
