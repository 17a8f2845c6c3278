"""Fields of records: which column of a file is which, and records field by field."""

import dataclasses
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from xmc_jax.data.tables import cell_values
from xmc_jax.data.tables.table_format import Table

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
"""What records may say -> the columns that are taken for it unless others are named.

Capitals in the names of columns do not count.
"""

_PEEKED = 100  # records that are looked at for a hint


@dataclasses.dataclass(frozen=True)
class Form:
    """How the labels of a document are written, where they are not in one cell of one row.

    Attributes:
        label_columns: columns of 0 and 1, one for each label, whose names are ids of labels; "*"
            for all columns that are no other field's.
        row_per_pair: rows of one id that follow each other are one document.
        separator: of ids in a text.
    """

    label_columns: tuple[str, ...] = ()
    row_per_pair: bool = False
    separator: str = "|"


@dataclasses.dataclass(frozen=True)
class Opened:
    """A table and what is taken from it."""

    table: Table  # the file
    columns: Mapping[str, str]  # field -> column
    label_columns: Sequence[str] = ()  # see `Form`; none of them is "*"
    merged: bool = False  # whether rows of one id are one record, see `Form`
    separator: str = "|"  # see `Form`
    allow_paths: bool = False  # whether paths of images may lead out of the file's folder

    def records(self) -> Iterator["Record"]:
        """All of them, in order.

        Raises:
            ValueError: a record is damaged; names its place.
        """
        if not self.merged:
            yield from self._rows()
            return
        last, uid = None, None
        for record in self._rows():
            same, uid = uid, record("id", cell_values.identifier)
            if last is not None and uid == same:
                last.merge(record)
                continue
            if last is not None:
                yield last
            last = record
        if last is not None:
            yield last

    def _rows(self) -> Iterator["Record"]:
        places = {field: place for place, field in enumerate(self.columns)}
        required = [self.columns["text"]] if "text" in self.columns else []
        names, count = list(self.columns.values()), len(self.columns)
        if self.label_columns:
            places["labels"] = count
        for place, cells in self.table.rows([*names, *self.label_columns], required):
            record = Record(self, place, places, cells)
            if self.label_columns:
                cells[count:] = [record.flags(self.label_columns, cells[count:])]
            yield record


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
        return self._error(self._opened.columns.get(field, field), problem)

    def flags(self, columns: Sequence[str], cells: Sequence[Any]) -> list[str]:
        """The columns whose cell says that the document has their label."""
        matched = []
        for column, cell in zip(columns, cells):
            try:
                if cell_values.flag(cell):
                    matched.append(column)
            except ValueError as error:
                raise self._error(column, str(error)) from None
        return matched

    def merge(self, other: "Record") -> None:
        """Adds the labels and weights of a record that is of the same document."""
        for field, at in self._places.items():
            cell, more = self._cells[at], other._cells[at]
            if field in ("labels", "weights"):
                cells = (self, other)
                self._cells[at] = [
                    one
                    for record in cells
                    for one in record(field, cell_values.listed, self._opened.separator)
                ]
            elif field != "id" and more != cell and not (cell_values.is_null(more) or more == ""):
                raise other.error(
                    field,
                    f"expected nothing, or what {self._opened.table.at(self.place)} has, which is "
                    "of the same document; other documents need other ids",
                )

    def _error(self, column: str, problem: str) -> ValueError:
        return ValueError(f"{self._opened.table.at(self.place)}: column {column}: {problem}")


def open_fields(
    table: Table,
    fields: Sequence[str],
    named: Mapping[str, Sequence[str]],
    needed: Iterable[str],
    form: Form | None = None,
    allow_paths: bool = False,
) -> Opened:
    """A table with the columns of its fields.

    Args:
        fields: of `FIELDS`, those that are to be taken.
        needed: of `fields`, those that the table must have.
        form: how labels are written; None where the table has none.

    Raises:
        ValueError: columns are missing, or several are one field.
    """
    form = form or Form()
    if not table.columns:
        raise ValueError(f"{table.path}: expected records, found an empty file")
    matched = columns(table, fields, named)
    flags: Sequence[str] = form.label_columns
    if "labels" not in fields:
        flags = ()
    elif flags == ("*",):
        matched.pop("labels", None)
        flags = [name for name in table.columns if name and name not in matched.values()]
    elif flags:
        matched.pop("labels", None)
        if absent := [name for name in flags if name not in table.columns]:
            there = ", ".join(table.columns)[:200]
            raise ValueError(
                f"{table.path}: expected a column {absent[0]}, as --label_columns says, found "
                f"{there}"
            )
    for field in needed:
        if field not in matched and not (field == "labels" and flags):
            names = [*filter(None, named.get(field, ())), *FIELDS[field]]
            raise missing(table, field, list(dict.fromkeys(names)))
    merged = form.row_per_pair and "labels" in fields
    if merged and "id" not in matched:
        raise missing(table, "id", FIELDS["id"])
    return Opened(table, matched, flags, merged, form.separator, allow_paths)


def columns(table: Table, fields: Iterable[str], named: Mapping[str, Sequence[str]]) -> dict:
    """Field -> the column of a table that it is in, of the fields that the table has.

    Args:
        named: field -> columns that are to be taken for it where a table has them, before those
            that `FIELDS` names; "" for none at all.

    Raises:
        ValueError: several columns are one field.
    """
    wanted = {
        field: [name for name in dict.fromkeys(names) if name in table.columns]
        for field, names in named.items()
    }
    taken = {name for names in wanted.values() for name in names}
    matched = {}
    for field in fields:
        names = wanted.get(field, [])
        if not names and "" not in named.get(field, ()):
            names = [name for name in usual(table, FIELDS[field]) if name not in taken]
        if len(names) > 1:
            remedy = f"--column {field}={names[-1]}"
            if field == "text":
                remedy += f", or --column {field}={names[-1]} --column content={names[0]} for both"
            raise ValueError(
                f"{table.path}: expected one column for {field}, found {' and '.join(names)}; say "
                f"which: {remedy}"
            )
        if names:
            matched[field] = names[0]
    return matched


def usual(table: Table, names: Sequence[str]) -> list[str]:
    """The columns of a table that have one of these names, in any case, in the names' order."""
    return [column for name in names for column in table.columns if column.strip().lower() == name]


def missing(table: Table, field: str, names: Sequence[str], flag: str = "--column") -> ValueError:
    """That a table has none of these columns for a field, with the nearest one that it has."""
    columns = [column for column in table.columns if column]
    nearest = [
        *(match for name in names for match in difflib.get_close_matches(name, columns, 1)),
        *(column for name in names for column in columns if name in column.lower()),
    ]
    remedy = f"{flag} {field}={nearest[0] if nearest else 'NAME'}"
    if field == "labels" and not nearest and (flags := _flags(table)):
        remedy += f", or --label_columns={','.join(flags)} if each label has a column of 0 and 1"
    there = ", ".join(table.columns)
    return ValueError(
        f"{table.path}: expected a column {' or '.join(names)}, found "
        f"{there[:200]}{'...' if len(there) > 200 else ''}; {remedy}"
    )


def _flags(table: Table) -> list[str]:
    """Columns that have nothing but 0 and 1 in the first records."""
    names = [name for name in table.columns if name]
    matched = dict.fromkeys(names, True)
    for _, cells in itertools.islice(table.rows(names), _PEEKED):
        for name, cell in zip(names, cells):
            try:
                cell_values.flag(cell)
            except ValueError:
                matched[name] = False
    return [name for name in names if matched[name]]
