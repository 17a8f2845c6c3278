"""Files of records: JSONL, CSV and its relatives, fastText's lines, Parquet.

They are one after another rows of cells, see `record_table.Table`; their fields are in
`record_fields`.
"""

import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

from xmc_jax.data.tables import text_tables
from xmc_jax.data.tables.parquet_tables import ParquetTable
from xmc_jax.data.tables.table_format import Table
from xmc_jax.files.text_files import TextFile

_JSON = (".jsonl", ".ndjson", ".json")
_USUAL = {".csv": ",", ".tsv": "\t", ".tab": "\t"}  # what separates cells, by the name
_TEXTS = (*_JSON, *_USUAL, ".txt")
SUFFIXES = (*_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS), ".parquet")
"""Of the files that can be read; capitals do not count."""

IN_FOLDERS = (".parquet", ".jsonl", ".csv", ".jsonl.gz", ".csv.gz")
"""Of files that are taken for tables wherever they lie; the others may be anything."""

_ELSEWHERE = {
    ".xlsx": "; save the sheet as CSV UTF-8",
    ".xls": "; save the sheet as CSV UTF-8",
    ".ods": "; save the sheet as CSV UTF-8",
    ".feather": "; pandas writes .parquet with to_parquet",
    ".pkl": "; pandas writes .parquet with to_parquet",
}
_NAMES = {
    "train": ("train", "trn"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "tst"),
    "label": ("label", "labels", "lbl"),
}


def find(folder: pathlib.Path, role: str) -> list[pathlib.Path]:
    """The files of a folder that are named after a role, in order; [] if none is.

    That is `train.csv`, `labels.jsonl.gz` and so on, or several files with numbers behind the name,
    such as `train-00000-of-00002.parquet`. A .txt of documents counts where there is no other.

    Args:
        role: "train", "validation", "test" or "label".

    Raises:
        ValueError: several files that do not belong together, or some of them missing.
    """
    suffixes = "|".join(re.escape(suffix) for suffix in SUFFIXES)
    pattern = re.compile(
        rf"({'|'.join(_NAMES[role])})(?:[-_.](\d+)(?:[-_.]of[-_.](\d+))?)?({suffixes})",
        re.IGNORECASE,
    )
    matches = sorted(
        (match[1].lower(), match[4].lower(), int(match[2] or -1), int(match[3] or 0), path.name)
        for path in folder.iterdir()
        if (match := pattern.fullmatch(path.name)) and path.is_file()
    )
    lines = [one for one in matches if one[1].startswith(".txt")]
    matches = [one for one in matches if one not in lines] or (lines if role != "label" else [])
    for path in [] if matches else sorted(folder.iterdir()):
        if path.suffix.lower() in _ELSEWHERE and path.stem.lower() in _NAMES[role]:
            open_table(path)  # says what to make of it
    names = [name for *_, name in matches]
    if len({(stem, suffix, number >= 0) for stem, suffix, number, *_ in matches}) > 1 or any(
        one[:3] == other[:3] for one, other in itertools.pairwise(matches)
    ):
        raise ValueError(
            f"{folder}: expected one file of {role}, or numbered ones of one kind, found "
            f"{', '.join(names)}"
        )
    if any(total not in (0, len(matches)) for *_, total, _ in matches):
        raise ValueError(
            f"{folder}: expected all {max(total for *_, total, _ in matches)} files that "
            f"{names[0]} is one of, found {len(matches)}"
        )
    return [folder / name for name in names]


def open_table(
    path: pathlib.Path, delimiter: str = "", headerless: Sequence[str] = (), limit: int = 0
) -> Table:
    """Opens a file and reads which columns it has.

    Args:
        path: the file; the ending of its name says what it is.
        delimiter: what separates the cells of CSV whose header has it; "" if each header is to tell
            it.
        headerless: names of the columns of a CSV or .txt file that may have no header; cells are
            then separated by tabs, but for .csv.
        limit: most bytes of a record of a text file; 0 for `record_table.MAX_RECORD`.

    Raises:
        ValueError: no such file, another kind of file, or a damaged one.
    """
    name = path.name.lower().removesuffix(".gz")
    kind = pathlib.PurePath(name).suffix
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(
            f"{path}: expected a name ending in {', '.join(SUFFIXES)}{_ELSEWHERE.get(kind, '')}"
        )
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of records, found none")
    if kind == ".parquet":
        return ParquetTable(path)
    file = TextFile(path)
    if kind in _USUAL or (headerless and kind == ".txt"):
        usual = _USUAL.get(kind, "\t")
        return text_tables.DelimitedText(file, limit, delimiter, usual, headerless)
    if kind == ".txt":
        return text_tables.FastText(file, limit)
    is_list = next(file.blocks(), b"").lstrip().startswith(b"[")
    return (text_tables.JsonList if is_list else text_tables.JsonLines)(file, limit)


def open_stream(name: str, lines: Iterator[tuple[int, bytes]]) -> Table:
    """JSON lines that can be read once, such as a pipe's; the columns are those of the first.

    Raises:
        ValueError: the first record is damaged.
    """
    return text_tables.JsonStream(name, lines)


def delimiter(written: str, flag: str = "delimiter") -> str:
    """The character that a flag names as what separates cells: itself, or "tab"; "" for none.

    Raises:
        ValueError: the flag has something else.
    """
    matches = {"tab": "\t", "\\t": "\t"}.get(written, written)
    if len(matches) > 1 or matches in ('"', "\r", "\n"):
        raise ValueError(f"{flag}: expected one character, or tab, got {written!r}")
    return matches
