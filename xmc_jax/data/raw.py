"""Readers of the Extreme Classification Repository's files, plain or gzipped.

Errors are one line, `file:line: expected ..., found ...`. Line ends may be LF or CRLF, and a UTF-8
byte order mark is skipped. Values are parsed in bulk after each line has matched a pattern, so what
is accepted is exact and large files are still fast.
"""

import codecs
import dataclasses
import gzip
import json
import math
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator

import numpy as np

from xmc_jax.data.csr import Csr

# Possessive quantifiers: no backtracking, so that no line takes more than linear time.
_ENTRY = rb"\d++:[-+]?+(?:\d++(?:\.\d*+)?+|\.\d++)(?:[eE][-+]?+\d++)?+"
_ROW = re.compile(rb"[ \t]*+(?:" + _ENTRY + rb"(?:[ \t]++|$))*+")
_PAIR = re.compile(rb"[ \t]*+\d++[ \t]++\d++[ \t]*+")
_HEADER = re.compile(rb"[ \t]*+(\d{1,10})[ \t]++(\d{1,10})[ \t]*+")
_MAX_ID = 2**31 - 1  # ids are kept as int32
_BLOCK = 1 << 16  # lines parsed at a time
# What is compressed far beyond what texts and numbers are is made to fill the memory: so many bytes
# are free, and those after them may be so many times those of the file. A line counts as so many
# more, as it takes time even where it is empty.
_FREE_BYTES, _EXPANSION, _LINE_BYTES = 1 << 24, 100, 64
MAX_LINE = 16 << 20
"""Most bytes of a line."""


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Documents or labels, in file order.

    Attributes:
        uids: n identifiers; row numbers where the file has none.
        titles: n texts.
        contents: n longer texts, "" where the file has none.
        positives: labels of each item, as in the file; None where the file says nothing of labels.
    """

    uids: list[str]
    titles: list[str]
    contents: list[str]
    positives: Csr | None


def read_items(path, encoding: str = "utf-8", num_labels: int | None = None) -> Items:
    """Reads `*.json` (one object per line) or `*.raw.txt` (one text per line), or `.gz` of these.

    A JSON object has `title` and perhaps `uid`, `content`, `target_ind`, `target_rel`. A text file
    in which every line begins with an id and an arrow (`id->text`) gives ids and texts.

    Args:
        path: the file.
        encoding: "utf-8", or "latin-1" as the reference reads everything.
        num_labels: L, to check label ids against; None checks only that they are not negative.

    Raises:
        ValueError: names file, line, what was expected and what was found.
    """
    path = pathlib.Path(path)
    if encoding not in ("utf-8", "latin-1"):
        raise ValueError(f"{path}: expected encoding utf-8 or latin-1, got {encoding!r}")
    name = path.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return _read_json(path, encoding, num_labels)
    if not name.endswith(".txt"):
        raise ValueError(
            f"{path}: expected a name ending in .json, .jsonl or .txt (or these + .gz)"
        )
    texts = [_decode(path, number, line, encoding) for number, line in _lines(path)]
    pairs = [text.split("->", 1) for text in texts]
    # Decided for the file as a whole: a title may well contain an arrow.
    if texts and all(len(p) == 2 and p[0] and not any(map(str.isspace, p[0])) for p in pairs):
        return Items([p[0] for p in pairs], [p[1] for p in pairs], [""] * len(pairs), None)
    return Items([str(i) for i in range(len(texts))], texts, [""] * len(texts), None)


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
    if path.suffix == ".npz":
        return _read_npz(path)
    lines = _lines(path)
    _, first = next(lines, (1, b""))
    header = _HEADER.fullmatch(first)
    if not header or int(header[2]) > _MAX_ID:
        raise ValueError(
            f"{path}:1: expected 'rows columns', two whole numbers, found {_shown(first)}"
        )
    rows, columns = int(header[1]), int(header[2])
    counts: list[int] = []  # grown by what is there, not by what the header promises
    pending: list[bytes] = []
    blocks: list[np.ndarray] = []
    for number, line in lines:
        if len(counts) == rows:
            if line.strip():
                raise ValueError(
                    f"{path}:{number}: expected {rows} rows as in the header, found one more"
                )
            continue
        if not _ROW.fullmatch(line):
            bad = next((t for t in line.split() if not re.fullmatch(_ENTRY, t)), line)
            raise ValueError(
                f"{path}:{number}: expected 'label:value' entries, found {_shown(bad)}"
            )
        counts.append(line.count(b":"))
        pending.append(line)
        if len(pending) == _BLOCK:
            blocks.append(_numbers(pending))
            pending = []
    if len(counts) != rows:
        raise ValueError(f"{path}: expected {rows} rows as in the header, found {len(counts)}")
    entries = np.concatenate(blocks + [_numbers(pending)]).reshape(-1, 2)
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    with np.errstate(over="ignore"):  # an overflow is an infinity, refused below
        values = entries[:, 1].astype(np.float32)
    wrong = np.flatnonzero((entries[:, 0] >= columns) | ~np.isfinite(values))
    if len(wrong):
        row = np.searchsorted(indptr, wrong[0], side="right") - 1
        label, value = entries[wrong[0]]
        raise ValueError(
            f"{path}:{row + 2}: expected labels in [0, {columns}) with finite values, "
            f"found {label:.0f}:{value:g}"
        )
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
            raise ValueError(f"{path}:{number}: expected 'point label', found {_shown(line)}")
        numbers.append(number)
        kept.append(line)
    pairs = _numbers(kept).reshape(-1, 2)
    limits = [_MAX_ID if limit is None else limit for limit in (num_points, num_labels)]
    wrong = np.flatnonzero((pairs >= limits).any(axis=1))
    if len(wrong):
        raise ValueError(
            f"{path}:{numbers[wrong[0]]}: expected a point in [0, {limits[0]}) and a label in "
            f"[0, {limits[1]}), found {_shown(kept[wrong[0]])}"
        )
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
            raise ValueError(
                f"{path}:{number}: expected 'uid<tab>group', one group per uid, "
                f"found {_shown(line)}"
            )
    return groups


def whole_lines(path: pathlib.Path, limit: int = MAX_LINE) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file or of its `.gz` form, with their ends, without a byte order mark.

    Args:
        path: the file.
        limit: most bytes of a line.

    Raises:
        ValueError: the file cannot be read, is a damaged gzip file or one that grows more than a
            hundredfold, or has a longer line.
    """
    zipped = path.suffix.lower() == ".gz"
    try:
        if zipped and path.stat().st_size == 0:  # which gzip takes for empty contents
            raise EOFError
        left = most_bytes(path) if zipped else math.inf
        with gzip.open(path, "rb") if zipped else open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(limit + 1), b""), 1):
                left -= len(line) + _LINE_BYTES
                if left < 0:
                    raise ValueError(
                        f"{path}:{number}: expected a gzip file of at most {_EXPANSION} times its "
                        "size, found a larger one; decompress it yourself if it is meant so"
                    )
                if len(line) > limit:
                    raise ValueError(
                        f"{path}:{number}: expected a line of at most {limit} bytes, found a "
                        "longer one"
                    )
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a whole gzip file, found a damaged or cut one; download it again"
        ) from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def most_bytes(path: pathlib.Path) -> int:
    """Of what a compressed file may hold: a hundred times its own, and some that are free."""
    return _FREE_BYTES + _EXPANSION * path.stat().st_size


def _read_json(path: pathlib.Path, encoding: str, num_labels: int | None) -> Items:
    limit = _MAX_ID if num_labels is None else num_labels
    uids, titles, contents = [], [], []
    counts, labels = [], []
    blank = without_labels = 0
    for number, line in _lines(path):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            raise ValueError(f"{path}:{blank}: expected a JSON object, found a blank line")
        text = _decode(path, number, line, encoding)
        try:
            item = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}:{number}: expected a JSON object, found {_shown(line)}"
            ) from error
        if not isinstance(item, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, found {_shown(line)}")
        fields = [item.get("uid", str(len(uids))), item.get("title"), item.get("content", "")]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(
                f"{path}:{number}: expected text in title, uid and content, found {_shown(line)}"
            )
        if b"\\ud" in line.lower() and any("\ud800" <= c <= "\udfff" for c in "".join(fields)):
            raise ValueError(f"{path}:{number}: expected Unicode text, found half of a \\u pair")
        for column, field in zip((uids, titles, contents), fields):
            column.append(field)
        targets = item.get("target_ind")
        if targets is None:
            without_labels += 1
            continue
        weights = item.get("target_rel", [])
        if not (
            isinstance(targets, list)
            and set(map(type, targets)) <= {int}
            and all(0 <= target < limit for target in targets)
        ):
            raise ValueError(
                f"{path}:{number}: expected target_ind to be a list of labels in [0, {limit}), "
                f"found {_shown(repr(targets).encode())}"
            )
        if not (
            isinstance(weights, list)
            and len(weights) in ({len(targets)} if "target_rel" in item else {0})
            and set(map(type, weights)) <= {int, float}
            and all(0 < weight < float("inf") for weight in weights)
        ):
            raise ValueError(
                f"{path}:{number}: expected target_rel to be {len(targets)} positive numbers, "
                f"found {_shown(repr(weights).encode())}"
            )
        counts.append(len(targets))
        labels.append(np.asarray(targets, np.int32))
    if without_labels == len(uids):
        return Items(uids, titles, contents, None)
    if without_labels:
        raise ValueError(
            f"{path}: expected target_ind in all {len(uids)} objects or in none, "
            f"found {without_labels} without"
        )
    indices = np.concatenate(labels)
    columns = int(indices.max(initial=-1)) + 1 if num_labels is None else num_labels
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Items(uids, titles, contents, Csr(indptr, indices, None, columns))


def _read_npz(path: pathlib.Path) -> Csr:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > most_bytes(path):
            raise ValueError(f"an archive that grows to {size} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("format", "shape", "indptr", "indices", "data")}
    except Exception as error:  # a damaged zip raises a dozen types; all mean the same here
        raise ValueError(
            f"{path}: expected an .npz of a CSR matrix without pickled objects, "
            f"found {_shown(f'{type(error).__name__}: {error}'.encode())}"
        ) from error
    shape, indptr, indices, data = (arrays[n] for n in ("shape", "indptr", "indices", "data"))
    if arrays["format"].tolist() not in (b"csr", "csr"):
        raise ValueError(f"{path}: expected format csr, found {arrays['format'].tolist()!r}")
    integers = all(a.dtype.kind in "iu" and a.ndim == 1 for a in (shape, indptr, indices))
    if not integers or shape.shape != (2,) or data.ndim != 1 or data.dtype.kind not in "iufb":
        raise ValueError(
            f"{path}: expected vectors of numbers in shape [2], indptr, indices and data, found "
            + ", ".join(f"{n} {arrays[n].dtype}{list(arrays[n].shape)}" for n in arrays)
        )
    rows, columns = (int(size) for size in shape)
    indptr = indptr.astype(np.int64)
    if len(indptr) != rows + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{path}: expected an ascending indptr of {rows + 1} numbers from 0")
    if not (indptr[-1] == len(indices) == len(data)):
        raise ValueError(
            f"{path}: expected {indptr[-1]} entries as in indptr, "
            f"found {len(indices)} indices and {len(data)} values"
        )
    with np.errstate(over="ignore"):
        values = data.astype(np.float32)
    if columns > _MAX_ID or ((indices < 0) | (indices >= columns) | ~np.isfinite(values)).any():
        raise ValueError(f"{path}: expected labels in [0, {columns}) with finite values")
    return Csr(indptr, indices.astype(np.int32), values, columns)


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without their ends and without a byte order mark."""
    return ((number, line.rstrip(b"\r\n")) for number, line in whole_lines(path))


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


def _shown(found: bytes) -> str:
    return repr(found[:60].decode("utf-8", "replace")) + ("..." if len(found) > 60 else "")
