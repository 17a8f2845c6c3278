"""Maps from items to their rows of an array of images, as published with ViXML: `*_map.npy`.

Such a file is an object array, for each item -1 or a list of row numbers, and so a pickle: a small
program that may call whatever can be imported. It is not given to Python's unpickler. The few
instructions that np.save needs for an array of lists (its pickles are of protocols 2 to 4) are
carried out here; names of NumPy stand for plain records, nothing is imported or called, and nothing
grows beyond what the file's bytes pay for.
"""

import dataclasses
import itertools
import math
import mmap
import os
import pathlib
import re
import struct
import warnings
from typing import Any, BinaryIO, Literal

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.wording import counted

_BYTES_PER_ITEM = 1024  # far more than the rows of one item take
_DEPTH = 8  # of marks on the stack; an array in an array takes five
_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")  # of NumPy 1 and 2
_HOMES = {
    "ndarray": ("numpy",),
    "dtype": ("numpy",),
    "_reconstruct": _CORE,
    "scalar": _CORE,
    # How protocol 2, of np.save before NumPy 1.17, writes bytes.
    "encode": ("_codecs",),
    "bytes": ("__builtin__",),
}
_INTEGER = re.compile(r"[iu][1248]")
_INT32 = struct.Struct("<i").unpack_from
_UINT16 = struct.Struct("<H").unpack_from
_UINT32 = struct.Struct("<I").unpack_from


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
    except (ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
        cut = isinstance(error, IndexError | struct.error)
        found = "a file cut short" if cut else " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: expected -1 or row numbers for each item, found {found}; "
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
            return _flatten(_run(data, start, shape[0]), size)


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
        if type(item) is _Array and item.dtype is not None and item.dtype.code != "O":
            item = items[i] = item.values
        counts[i] = len(item) if type(item) is list else 0
        total += int(counts[i])
        if total > size:  # one list standing for many items
            raise ValueError(f"more rows than the file's {size} bytes")
        if type(item) is not list or any(type(row) is not int or row < 0 for row in item):
            raise ValueError(f"{_shown(item)} for item {i}")
    return counts, np.fromiter(itertools.chain.from_iterable(items), np.int64, total)


@dataclasses.dataclass(slots=True, eq=False)
class _Dtype:
    """What a pickle says of a dtype: "O" or an integer's code such as "i8", and its byte order."""

    code: str
    order: str = "|"

    def __post_init__(self):
        if self.code == "O8":
            self.code = "O"
        if self.code != "O" and not _INTEGER.fullmatch(self.code):
            raise ValueError(f"an array of {_shown(self.code)}")

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a damaged dtype")
        self.order = state[1]

    def integers(self, data: Any) -> list[int]:
        if type(data) is not bytes or self.code == "O" or len(data) % int(self.code[1]):
            raise ValueError("a damaged array of integers")
        return np.frombuffer(data, np.dtype(self.order + self.code)).tolist()


@dataclasses.dataclass(slots=True, eq=False)
class _Array:
    """What a pickle says of an array: its dtype and, in a list, its values; None before `build`."""

    dtype: _Dtype | None = None
    values: list | None = None

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) != 5 or type(state[2]) is not _Dtype:
            raise ValueError("a damaged array")
        _, shape, dtype, _, values = state
        if dtype.code != "O":
            values = dtype.integers(values)
        if type(values) is not list or type(shape) is not tuple or shape != (len(values),):
            raise ValueError("an array whose values do not fit its shape")
        self.dtype, self.values = dtype, values


@dataclasses.dataclass(slots=True, eq=False)
class _Name:
    """A name that an instruction refers to; only `apply` gives it a meaning."""

    module: Any
    name: Any

    def __post_init__(self):
        known = type(self.name) is str and self.module in _HOMES.get(self.name, ())
        if not known:
            raise ValueError(f"a reference to {_shown(self.module)}, {_shown(self.name)}")

    def apply(self, arguments: Any) -> Any:
        if type(arguments) is tuple:
            match self.name, *arguments:
                case "_reconstruct", _Name(name="ndarray"), (0,), b"b":
                    return _Array()
                case "dtype", str() as code, False | 0, True | 1:
                    return _Dtype(code)
                case "scalar", _Dtype() as dtype, bytes() as data if len(data) <= 8:
                    (value,) = dtype.integers(data)
                    return value
                case "encode", str() as text, "latin1":
                    return text.encode("latin-1")
                case ("bytes",):
                    return b""
        raise ValueError(f"a call of {self.name} that no array of rows makes")


def _run(data: mmap.mmap, at: int, num_items: int) -> list:
    """Carries out the instructions from byte `at` on; returns the array's items.

    Every instruction puts at most one thing on the stack, no more lists are made than there are
    items, and what the same bytes may be turned into is counted, so that memory and time stay
    within a small multiple of the file.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    lists = tuples = decoded = 0

    def pop_mark() -> list:
        mark = marks.pop()
        taken = stack[mark:]
        del stack[mark:]
        return taken

    def take(length: int) -> bytes:
        nonlocal at
        at += length
        if at > len(data):
            raise IndexError
        return data[at - length : at]

    def line() -> str:
        nonlocal at
        end = data.find(b"\n", at, at + 100)
        if end < 0:
            raise ValueError("a name without an end")
        name, at = data[at:end].decode("ascii"), end + 1
        return name

    while True:
        op = data[at]
        at += 1
        if op == 0x4A:  # BININT
            stack.append(_INT32(data, at)[0])
            at += 4
        elif op == 0x94:  # MEMOIZE
            memo.append(stack[-1])
        elif op == 0x5D:  # EMPTY_LIST
            lists += 1
            if lists > num_items + 1:
                raise ValueError(f"more lists than the {num_items} items")
            stack.append([])
        elif op == 0x28:  # MARK
            if len(marks) == _DEPTH:
                raise ValueError(f"lists nested deeper than {_DEPTH}")
            marks.append(len(stack))
        elif op in (0x65, 0x61):  # APPENDS, APPEND
            values = pop_mark() if op == 0x65 else [stack.pop()]
            if type(stack[-1]) is not list:
                raise ValueError("an instruction to extend something other than a list")
            stack[-1].extend(values)
        elif op == 0x4B:  # BININT1
            stack.append(data[at])
            at += 1
        elif op == 0x4D:  # BININT2
            stack.append(_UINT16(data, at)[0])
            at += 2
        elif op in (0x71, 0x72):  # BINPUT, LONG_BINPUT
            index = take(1)[0] if op == 0x71 else _UINT32(take(4))[0]
            if index != len(memo):  # picklers count up; anything else would be an allocation
                raise ValueError(f"memo {index} after {len(memo)} others")
            memo.append(stack[-1])
        elif op in (0x68, 0x6A):  # BINGET, LONG_BINGET
            stack.append(memo[take(1)[0] if op == 0x68 else _UINT32(take(4))[0]])
        elif op == 0x8A:  # LONG1
            length = take(1)[0]
            if length > 8:
                raise ValueError(f"an integer of {length} bytes")
            stack.append(int.from_bytes(take(length), "little", signed=True))
        elif op in (0x29, 0x74, 0x85, 0x86, 0x87):  # EMPTY_TUPLE, TUPLE, TUPLE1 to TUPLE3
            tuples += 1
            if tuples > 16 + at // 4:  # each belongs to an array or a scalar, which takes more
                raise ValueError("more tuples than arrays need")
            if op in (0x85, 0x86, 0x87):
                length = op - 0x84
                if len(stack) < length:
                    raise IndexError
                marks.append(len(stack) - length)
            stack.append(() if op == 0x29 else tuple(pop_mark()))
        elif op in (0x8C, 0x58):  # SHORT_BINUNICODE, BINUNICODE
            stack.append(take(take(1)[0] if op == 0x8C else _UINT32(take(4))[0]).decode("utf-8"))
        elif op in (0x43, 0x42):  # SHORT_BINBYTES, BINBYTES
            stack.append(take(take(1)[0] if op == 0x43 else _UINT32(take(4))[0]))
        elif op in (0x4E, 0x88, 0x89):  # NONE, NEWTRUE, NEWFALSE
            stack.append({0x4E: None, 0x88: True, 0x89: False}[op])
        elif op == 0x63:  # GLOBAL
            module = line()
            stack.append(_Name(module, line()))
        elif op == 0x93:  # STACK_GLOBAL
            name = stack.pop()
            stack.append(_Name(stack.pop(), name))
        elif op == 0x52:  # REDUCE
            arguments = stack.pop()
            if type(stack[-1]) is not _Name:
                raise ValueError(f"a call of {_shown(stack[-1])}")
            stack.append(stack.pop().apply(arguments))
            decoded += len(stack[-1]) if type(stack[-1]) is bytes else 0
        elif op == 0x62:  # BUILD
            state = stack.pop()
            if type(stack[-1]) not in (_Array, _Dtype):
                raise ValueError(f"an instruction to change {_shown(stack[-1])}")
            stack[-1].build(state)
            decoded += len(stack[-1].values) if type(stack[-1]) is _Array else 0
        elif op == 0x80:  # PROTO
            take(1)
        elif op == 0x95:  # FRAME
            take(8)
        elif op == 0x2E:  # STOP
            break
        else:
            raise ValueError(f"instruction 0x{op:02x}, which no array of rows needs")
        if decoded > 2 * at:  # the same bytes over and over; once as bytes, once as numbers is fine
            raise ValueError("more numbers than bytes")
    result = stack[0] if len(stack) == 1 else None
    if type(result) is not _Array or result.dtype is None or result.dtype.code != "O":
        raise ValueError("something other than one array of objects")
    if len(result.values) != num_items or at != len(data):
        raise ValueError(
            f"{len(result.values)} items and {len(data) - at} bytes behind them, where the header "
            f"says {num_items} items and the end"
        )
    return result.values


def _shown(found: Any) -> str:
    if type(found) in (str, bytes, int, bool, type(None)):
        return ascii(found)[:80]
    return f"<{type(found).__name__.lstrip('_').lower()}>"
