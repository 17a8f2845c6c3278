"""Maps from items to their rows of an array of images, as published with ViXML: `*_map.npy`.

Such a file is an object array, for each item -1 or a list of row numbers, and so a pickle: a small
program that may call whatever can be imported. It is not given to Python's unpickler.
`pickletools` takes the program apart, and the few instructions that np.save needs for an array of
lists (its pickles are of protocols 2 to 4) are carried out here. Names of NumPy stand for plain
records, nothing is imported or called, and memory stays within a small multiple of the file.
"""

import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import pickletools
import re
import sys
import warnings
from typing import Any, BinaryIO, Literal

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.runtime.wording import counted

_BYTES_PER_ITEM = 1024  # far more than the rows of one item take
_DEPTH = 8  # of marks on the stack; an array in an array takes five
_MADE_PER_BYTE = 32  # bytes of memory; an empty list takes 56, and two bytes in a file
_NAMES = {
    "numpy ndarray": "ndarray",
    "numpy dtype": "dtype",
    # How protocol 2, of np.save before NumPy 1.17, writes bytes.
    "_codecs encode": "encode",
    "__builtin__ bytes": "bytes",
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # of NumPy 1 and 2
    _NAMES |= {f"{_module} {_name}": _name for _name in ("_reconstruct", "scalar")}
_DTYPE = re.compile(r"O8?|[iu][1248]")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


def read(path, num_rows: int | None = None) -> Csr:
    """Reads which rows are whose images.

    Args:
        path: an object array of -1 or rows for each item; or an integer array [n] or [n, K] with -1
            where there is no image.
        num_rows: rows of the array of images, to check against; None checks only the signs.

    Returns:
        Rows of each item in the file's order, without values; none where the item has no image.

    Raises:
        ValueError: the file is damaged, holds anything else, or names a row that is not there.
            Nothing in the file has been executed.
    """
    path = pathlib.Path(path)
    try:
        counts, rows = _read(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        cut = isinstance(error, IndexError)
        actual = "a damaged pickle" if cut else " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected -1 or row numbers for each item, found {actual}; "
            "nothing in it was executed"
        ) from error
    limit = 2**31 if num_rows is None else num_rows
    if rows.max(initial=-1) >= limit:
        item = int(np.searchsorted(np.cumsum(counts), np.argmax(rows >= limit), side="right"))
        raise ValueError(
            f"{path}: item {item}: expected rows below {limit}, the rows of the images, "
            f"found {rows[rows >= limit][0]}"
        )
    indptr = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    return Csr(indptr, rows.astype(np.int32), None, limit)


def _read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """i64[n] rows per item and i64[...] the rows."""
    with path.open("rb") as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):  # later ones are for structures
            raise ValueError(f"version {version} of NumPy's format")
        try:
            with warnings.catch_warnings(action="ignore"):  # of a damaged header's parser
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        except Exception as error:  # a damaged header raises a dozen types; all mean the same here
            raise ValueError("a damaged NumPy header") from error
        start = file.tell()
        if dtype.kind != "O":
            return _integers(file, dtype, shape, "F" if fortran else "C")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            size = len(data) - start
            # An item takes at least one byte, so that a header cannot promise more than is there.
            if len(shape) != 1 or not 0 <= shape[0] <= size:
                raise ValueError(f"objects of shape {shape} in {size} bytes")
            if size > (1 << 20) + _BYTES_PER_ITEM * shape[0]:
                raise ValueError(f"{size} bytes for {counted(shape[0], 'item')}")
            data.seek(start)
            with warnings.catch_warnings(action="ignore"):  # of a damaged text
                items = _run(data)
            if len(items) != shape[0] or data.tell() != len(data):
                raise ValueError(
                    f"{counted(len(items), 'item')} and {len(data) - data.tell()} bytes behind "
                    f"them, where the header says {counted(shape[0], 'item')} and the end"
                )
            return _flatten(items, size)


def _integers(
    file: BinaryIO, dtype: np.dtype, shape: tuple, order: Literal["C", "F"]
) -> tuple[np.ndarray, np.ndarray]:
    if dtype.kind not in "iu" or len(shape) not in (1, 2) or 0 in shape[1:]:
        raise ValueError(f"{dtype} of shape {shape}")
    size = os.fstat(file.fileno()).st_size - file.tell()
    if size != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{dtype} of shape {shape} in {size} bytes")
    rows = np.fromfile(file, dtype).reshape(shape, order=order).astype(np.int64)
    if rows.ndim == 1:
        rows = rows[:, None]
    if rows.min(initial=0) < -1:
        raise ValueError(f"row {rows.min()}")
    return (rows >= 0).sum(1), rows[rows >= 0]


def _flatten(items: list, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Checks what the instructions built: -1, or a list of row numbers, for each item."""
    counts = np.zeros(len(items), np.int64)
    total = 0
    for i, item in enumerate(items):
        if type(item) is int and item == -1:
            items[i] = ()
            continue
        if type(item) is _PickledObject and type(item.value) is np.ndarray:
            item = item.value
        counts[i] = len(item) if type(item) in (list, np.ndarray) else 0
        total += int(counts[i])
        if total > size:  # one list standing for many items
            raise ValueError(f"more rows than the file's {size} bytes")
        if type(item) is np.ndarray:
            item = items[i] = item.tolist()
        if type(item) is not list or any(type(row) is not int or row < 0 for row in item):
            raise ValueError(f"{_quoted(item)} for item {i}")
    return counts, np.fromiter(itertools.chain.from_iterable(items), np.int64, total)


@dataclasses.dataclass(slots=True, eq=False)
class _PickledObject:
    """Stands for what a pickle refers to or makes.

    Attributes:
        kind: one of the values of `_NAMES`, of which "dtype" is the class; "a dtype"; "an array".
        value: of a dtype its code, as "<i8"; of an array its integers, or a list of its objects.
    """

    kind: str
    value: Any = None


def _named(name: str) -> _PickledObject:
    if name not in _NAMES:
        raise ValueError(f"a reference to {_quoted(name)}")
    return _PickledObject(_NAMES[name])


def _called(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _PickledObject("_reconstruct"), (_PickledObject("ndarray"), (0,), b"b"):
            return _PickledObject("an array")
        case _PickledObject("dtype"), (str() as code, False | 0, True | 1) if _DTYPE.fullmatch(
            code
        ):
            return _PickledObject("a dtype", f"|{code}")
        case _PickledObject("scalar"), (_PickledObject("a dtype", code), bytes() as data):
            (value,) = _decoded(code, data).tolist()
            return value
        case _PickledObject("encode"), (str() as text, "latin1"):
            return text.encode("latin-1")
        case _PickledObject("bytes"), ():
            return b""
    raise ValueError(f"a call of {_quoted(function)} that no array of rows makes")


def _build(record: Any, state: Any) -> None:
    match record, state:
        case _PickledObject("a dtype", code), (_, "<" | ">" | "|" | "=" as order, *_):
            record.value = order + code[1:]
        case _PickledObject("an array"), (_, (length,), _PickledObject("a dtype", code), _, values):
            values = values if "O" in code else _decoded(code, values)
            if type(values) not in (list, np.ndarray) or length != len(values):
                raise ValueError("an array whose values do not fit its shape")
            record.value = values
        case _:
            raise ValueError(f"an instruction to change {_quoted(record)}")


def _decoded(code: str, data: Any) -> np.ndarray:
    if type(data) is not bytes or "O" in code:
        raise ValueError("a damaged array of integers")
    return np.frombuffer(data, code)


def _run(data: mmap.mmap) -> list:
    """Carries out the instructions from the file's position on; returns the array's items."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    made = 0  # bytes

    def popped(start: int) -> list:
        if start < 0:
            raise IndexError
        values = stack[start:]
        del stack[start:]
        return values

    for opcode, argument, position in pickletools.genops(data):
        match opcode.name:
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINPUT" | "LONG_BINPUT":
                if argument != len(memo):  # picklers count up; any other would be an allocation
                    raise ValueError(f"memo {argument} after {len(memo)} others")
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "MARK":
                if len(marks) == _DEPTH:
                    raise ValueError(f"lists nested deeper than {_DEPTH}")
                marks.append(len(stack))
            case "EMPTY_LIST":
                stack.append([])
                made += sys.getsizeof([])
            case "APPEND" | "APPENDS" as op:
                values = popped(marks.pop() if op == "APPENDS" else len(stack) - 1)
                if type(stack[-1]) is not list:
                    raise ValueError("an instruction to extend something other than a list")
                stack[-1].extend(values)
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3" as op:
                values = popped(marks.pop() if op == "TUPLE" else len(stack) - int(op[-1]))
                stack.append(tuple(values))
                made += sys.getsizeof(stack[-1])
            case "SHORT_BINUNICODE" | "BINUNICODE" | "SHORT_BINBYTES" | "BINBYTES":
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE" as op:
                stack.append(_CONSTANTS[op])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                stack.append(_named(" ".join([stack.pop(-2), stack.pop()])))
            case "REDUCE":
                stack.append(_called(stack.pop(-2), stack.pop()))
                made += sys.getsizeof(stack[-1])
            case "BUILD":
                _build(stack[-2], stack.pop())
            case "PROTO" | "FRAME" | "STOP":
                pass
            case op:
                raise ValueError(f"instruction {op}, which no array of rows needs")
        if made > _MADE_PER_BYTE * (2048 + position):
            raise ValueError("more lists or numbers than its bytes can be")
    match stack:
        case [_PickledObject("an array", list() as items)]:
            return items
    raise ValueError("something other than one array of objects")


def _quoted(actual: Any) -> str:
    if type(actual) in (str, bytes, int, bool, type(None)):
        return ascii(actual)[:80]
    return actual.kind if type(actual) is _PickledObject else f"<{type(actual).__name__}>"
