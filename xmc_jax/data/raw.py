"""Readers of the Extreme Classification Repository's files, plain or gzipped.

Errors are one line, `file:line: expected ..., found ...`. Line ends may be LF or CRLF, and a UTF-8
byte order mark is skipped. Values are parsed in bulk after each line has matched a pattern, so what
is accepted is exact and large files are still fast.
"""

import dataclasses
import itertools
import pathlib
import re
import zipfile
from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from xmc_jax.data.csr import Csr, concatenated
from xmc_jax.files import text_files
from xmc_jax.files.text_files import TextFile
from xmc_jax.runtime.wording import counted

# Possessive quantifiers: no backtracking, so that no line takes more than linear time.
_ENTRY = rb"\d++:[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d++)?+"
_ROW = re.compile(rb"[ \t]*+(?:" + _ENTRY + rb"(?:[ \t]++|$))*+")
_PAIR = re.compile(rb"[ \t]*+\d++[ \t]++\d++[ \t]*+")
_HEADER = re.compile(rb"[ \t]*+(\d{1,10})[ \t]++(\d{1,10})[ \t]*+")
_FEATURES_HEADER = re.compile(rb"[ \t]*+\d{1,10}(?:[ \t]++\d{1,10}){2}[ \t]*+")
_MAX_ID = 2**31 - 1  # ids are kept as int32
_BLOCK = 1 << 16  # lines parsed at a time
_ITEMS, _BYTES = 1 << 14, 2 << 20  # items and bytes of lines that a block of items has at most


@dataclasses.dataclass(frozen=True, eq=False)
class RawItems:
    """Documents or labels, in file order.

    Attributes:
        uids: n identifiers; row numbers where the file has none.
        titles: n texts; none where the texts were handed on while the file was read.
        contents: n longer texts, "" where the file has none; likewise.
        positives: labels of each item, as in the file; None where the file says nothing of labels.
    """

    uids: list[str]
    titles: list[str]
    contents: list[str]
    positives: Csr | None

    def __len__(self) -> int:
        return len(self.uids)

    def texts(self, kind: str) -> list[str]:
        """What is tokenised of each item: its "title", or its "title_content"."""
        if kind == "title":
            return self.titles
        return [f"{title} {more}".strip() for title, more in zip(self.titles, self.contents)]

    def take(self, rows: Sequence[int]) -> "RawItems":
        """The items of these rows, in that order."""
        lists = [
            [column[row] for row in rows] for column in (self.uids, self.titles, self.contents)
        ]
        positives = None if self.positives is None else self.positives.take(np.asarray(rows, int))
        return RawItems(*lists, positives)


def read_items(path, encoding: str = "utf-8", num_labels: int | None = None) -> RawItems:
    """Reads `*.json` (one object per line) or `*.raw.txt` (one text per line), or `.gz` of these.

    A JSON object has `title` and perhaps `uid`, `content`, `target_ind`, `target_rel`. A text file
    in which every line begins with an id and an arrow (`id->text`) gives ids and texts.

    Args:
        encoding: "utf-8", or "latin-1" as the reference reads everything.
        num_labels: L, to check label ids against; None checks only that they are not negative.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    return together(list(blocks(path, encoding, num_labels)))


def blocks(path, encoding: str = "utf-8", num_labels: int | None = None) -> Iterator[RawItems]:
    """What `read_items` reads, some megabytes of it at a time; nothing of an empty file.

    Arguments and errors are those of `read_items`.
    """
    path = pathlib.Path(path)
    if encoding not in ("utf-8", "latin-1"):
        raise ValueError(f"{path}: expected encoding utf-8 or latin-1, got {encoding!r}")
    name = path.name.lower().removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        yield from _json_blocks(path, encoding, num_labels)
    elif name.endswith(".txt"):
        yield from _text_blocks(path, encoding)
    else:
        raise ValueError(
            f"{path}: expected a name ending in .json, .jsonl or .txt (or these + .gz)"
        )


def together(parts: Sequence[RawItems]) -> RawItems:
    """The items of several blocks, one block after the other."""
    columns = [
        [one for part in parts for one in getattr(part, name)]
        for name in ("uids", "titles", "contents")
    ]
    positives = [part.positives for part in parts]
    return RawItems(
        *columns, concatenated(positives) if parts and positives[0] is not None else None
    )


def read_label_matrix(path) -> Csr:
    """Reads a sparse matrix, as text or as `.npz`.

    The text is a header `rows columns`, then one line `label:value label:value ...` per row; blank
    lines after the last row are ignored. An `.npz` has the arrays that scipy.sparse.save_npz writes
    for CSR; pickled objects are refused.

    Args:
        path: a text file, its `.gz` form, or an `.npz`.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    path = pathlib.Path(path)
    if path.suffix.lower() == ".npz":
        return _read_npz(path)
    lines = _lines(path)
    _, first = next(lines, (1, b""))
    if _FEATURES_HEADER.fullmatch(first):
        raise ValueError(
            f"{path}:1: expected 'rows columns' of a matrix of labels, found {_quoted(first)}, as "
            "a file of features begins: points, features, labels; take the matrix of labels alone "
            "(trn_X_Y.txt, tst_X_Y.txt), which the repository has with the raw texts"
        )
    header = _HEADER.fullmatch(first)
    if not header or int(header[2]) > _MAX_ID:
        raise _refusal(path, 1, "'rows columns', two whole numbers", first)
    rows, columns = int(header[1]), int(header[2])
    counts: list[int] = []  # grown by what is there, not by what the header promises
    pending: list[bytes] = []
    blocks: list[np.ndarray] = []
    for number, line in lines:
        if len(counts) == rows:
            if line.strip():
                expected = f"{counted(rows, 'row')} as in the header"
                raise _refusal(path, number, expected, line)
            continue
        if not _ROW.fullmatch(line):
            bad = next((t for t in line.split() if not re.fullmatch(_ENTRY, t)), line)
            raise _refusal(path, number, "'label:value' entries", bad)
        counts.append(line.count(b":"))
        pending.append(line)
        if len(pending) == _BLOCK:
            blocks.append(_numbers(pending))
            pending = []
    if len(counts) != rows:
        raise ValueError(
            f"{path}: expected {counted(rows, 'row')} as in the header, found {len(counts)}"
        )
    entries = np.concatenate(blocks + [_numbers(pending)]).reshape(-1, 2)
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    with np.errstate(over="ignore"):  # an overflow is an infinity, refused below
        values = entries[:, 1].astype(np.float32)
    wrong = np.flatnonzero((entries[:, 0] >= columns) | ~np.isfinite(values))
    if len(wrong):
        row = np.searchsorted(indptr, wrong[0], side="right") - 1
        label, value = entries[wrong[0]]
        expected = f"labels in [0, {columns}) with finite values"
        raise _refusal(path, row + 2, expected, f"{label:.0f}:{value:g}".encode())
    return Csr(indptr, entries[:, 0].astype(np.int32), values, columns)


def read_filter(path, num_points: int | None = None, num_labels: int | None = None) -> np.ndarray:
    """Reads `point label` pairs, which are to be removed from predictions.

    Args:
        path: a text file or its `.gz` form. An empty file is no pairs.
        num_points: rows of the split, to check points against; None for no check.
        num_labels: L, to check labels against; None for no check.

    Returns:
        i32[p, 2], in file order.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    path = pathlib.Path(path)
    numbers, kept = [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        if not _PAIR.fullmatch(line):
            raise _refusal(path, number, "'point label'", line)
        numbers.append(number)
        kept.append(line)
    pairs = _numbers(kept).reshape(-1, 2)
    limits = [_MAX_ID if limit is None else limit for limit in (num_points, num_labels)]
    wrong = np.flatnonzero((pairs >= limits).any(axis=1))
    if len(wrong):
        expected = f"a point in [0, {limits[0]}) and a label in [0, {limits[1]})"
        raise _refusal(path, numbers[wrong[0]], expected, kept[wrong[0]])
    return pairs.astype(np.int32)


def read_groups(path) -> dict[str, str]:
    """Reads `uid <tab> group` lines: which items come from one source and must stay in one split.

    Args:
        path: a text file or its `.gz` form, UTF-8.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    path = pathlib.Path(path)
    groups: dict[str, str] = {}
    for number, line in _lines(path):
        fields = _decode(path, number, line, "utf-8").split("\t")
        if len(fields) != 2 or groups.setdefault(fields[0], fields[1]) != fields[1]:
            raise _refusal(path, number, "'uid<tab>group', one group per uid", line)
    return groups


def read_names(path) -> list[str]:
    """Reads a file of identifiers, one per line, each once.

    Args:
        path: a text file or its `.gz` form, UTF-8.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    path = pathlib.Path(path)
    names: dict[str, int] = {}
    for number, line in _lines(path):
        name = _decode(path, number, line, "utf-8")
        if not name or names.setdefault(name, number) != number:
            raise _refusal(path, number, "a uid per line, each once", line)
    return list(names)


def _chunks(path: pathlib.Path) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines, as many at a time as a block has."""
    chunk: list[tuple[int, bytes]] = []
    size = 0
    for number, line in _lines(path):
        if chunk and (len(chunk) == _ITEMS or size + len(line) > _BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append((number, line))
        size += len(line)
    if chunk:
        yield chunk


def _text_blocks(path: pathlib.Path, encoding: str) -> Iterator[RawItems]:
    # Decided for the file as a whole: a title may well contain an arrow.
    with_ids = all(
        _split_id(_decode(path, number, line, encoding)) for number, line in _lines(path)
    )
    first = 0
    for chunk in _chunks(path):
        texts = [_decode(path, number, line, encoding) for number, line in chunk]
        if with_ids:
            uids, texts = map(list, zip(*map(_split_id, texts)))
        else:
            uids = list(map(str, range(first, first + len(texts))))
        first += len(texts)
        yield RawItems(uids, texts, [""] * len(texts), None)


def _split_id(text: str) -> tuple[str, str] | None:
    """The id before an arrow and the text behind it; None where there is none."""
    uid, arrow, rest = text.partition("->")
    return (uid, rest) if arrow and uid and not any(map(str.isspace, uid)) else None


class _RawObject(BaseModel, strict=True):
    """A line of a file of objects."""

    title: str
    uid: str = ""
    content: str = ""
    target_ind: list[int] | None = None
    target_rel: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None


def _json_blocks(path: pathlib.Path, encoding: str, num_labels: int | None) -> Iterator[RawItems]:
    count, blank, labelled = 0, 0, None
    limit = _MAX_ID if num_labels is None else num_labels
    for chunk in _chunks(path):
        columns: tuple[list[str], ...] = ([], [], [])
        labels: list[list[int]] = []
        for number, line in chunk:
            if not line.strip():
                blank = blank or number
                continue
            if blank:
                raise _refusal(path, blank, "a JSON object", b"")
            item = _object(path, number, line, encoding, limit)
            uid = item.uid if "uid" in item.model_fields_set else str(count)
            for column, field in zip(columns, (uid, item.title, item.content)):
                column.append(field)
            if labelled not in (None, item.target_ind is not None):
                raise _refusal(path, number, "target_ind in all objects or in none", line)
            labelled = item.target_ind is not None
            labels.append(item.target_ind or [])
            count += 1
        if not labelled:
            yield RawItems(*columns, None)
            continue
        counts = np.fromiter(map(len, labels), np.int64, len(labels))
        indices = np.fromiter(itertools.chain.from_iterable(labels), np.int32, counts.sum())
        width = int(indices.max(initial=-1)) + 1 if num_labels is None else num_labels
        indptr = np.concatenate([[0], np.cumsum(counts)])
        yield RawItems(*columns, Csr(indptr, indices, None, width))


def _object(path: pathlib.Path, number: int, line: bytes, encoding: str, limit: int) -> _RawObject:
    text = _decode(path, number, line, encoding)
    try:
        item = _RawObject.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        expected = "a JSON object"
        if first["loc"]:
            kind = first["msg"].removeprefix("Input should be ").replace("Field required", "a text")
            expected = f"{kind} as {'.'.join(map(str, first['loc']))}"
        raise _refusal(path, number, expected, line) from None
    targets, weights = item.target_ind, item.target_rel
    if targets and not 0 <= min(targets) <= max(targets) < limit:
        raise _refusal(path, number, f"labels in [0, {limit}) as target_ind", line)
    weighted = targets is not None and "target_rel" in item.model_fields_set
    if weighted and (weights is None or len(weights) != len(targets)):
        expected = f"{counted(len(targets), 'number')} as target_rel, one for each label"
        raise _refusal(path, number, expected, line)
    return item


def _read_npz(path: pathlib.Path) -> Csr:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > text_files.most_bytes(path):
            raise ValueError(f"an archive that grows to {size} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("format", "shape", "indptr", "indices", "data")}
    except Exception as error:  # a damaged zip raises a dozen types; all mean the same here
        raise ValueError(
            f"{path}: expected an .npz of a CSR matrix without pickled objects, "
            f"found {_quoted(f'{type(error).__name__}: {error}'.encode())}"
        ) from error
    shape, indptr, indices, data = (arrays[n] for n in ("shape", "indptr", "indices", "data"))
    if arrays["format"].tolist() not in (b"csr", "csr"):
        raise ValueError(f"{path}: expected format csr, found {arrays['format'].tolist()!r}")
    integers = all(a.dtype.kind in "iu" and a.ndim == 1 for a in (shape, indptr, indices))
    numbers = data.ndim == 1 and data.dtype.kind in "iufb"
    fits = integers and numbers and shape.shape == (2,) and len(indptr) == shape[0] + 1
    if not (fits and len(indices) == len(data) == indptr[-1]):
        raise ValueError(
            f"{path}: expected a CSR matrix of numbers, shape [2], indptr [rows + 1], indices and "
            "data [indptr[-1]], found "
            + ", ".join(f"{n} {arrays[n].dtype}{list(arrays[n].shape)}" for n in arrays)
        )
    columns, indptr = int(shape[1]), indptr.astype(np.int64)
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{path}: expected indptr to ascend from 0, found another")
    with np.errstate(over="ignore"):
        values = data.astype(np.float32)
    if columns > _MAX_ID or ((indices < 0) | (indices >= columns) | ~np.isfinite(values)).any():
        raise ValueError(f"{path}: expected labels in [0, {columns}) with finite values")
    return Csr(indptr, indices.astype(np.int32), values, columns)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends and without a byte order mark."""
    return ((number, line.rstrip(b"\r\n")) for number, line in TextFile(path).lines())


def _decode(path: pathlib.Path, number: int, line: bytes, encoding: str) -> str:
    try:
        return line.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}:{number}: expected {encoding} text, found byte 0x{line[error.start]:02x}; "
            "if the file is latin-1, say --encoding=latin-1"
        ) from error


def _numbers(lines: list[bytes]) -> np.ndarray:
    """f64[...]: all numbers of lines that have matched a pattern."""
    text = b" ".join(lines).replace(b":", b" ")
    # numpy reads one number from a blank string
    return np.fromstring(text, np.float64, sep=" ") if text.strip() else np.empty(0)


def _quoted(line: bytes) -> str:
    return repr(line[:60].decode("utf-8", "replace")) + ("..." if len(line) > 60 else "")


def _refusal(path: pathlib.Path, number: int, expected: str, line: bytes) -> ValueError:
    return ValueError(f"{path}:{number}: expected {expected}, found {_quoted(line)}")
