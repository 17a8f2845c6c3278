"""Reads the text of a compiled program: what each device moves, loops counted as often as they run.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as
the loops around it turn.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all"),
    *("collective-permute", "collective-broadcast"),
)
_BITS = {
    **{"pred": 8, "token": 0, "opaque": 0},
    **{f"{kind}{bits}": bits for kind in "su" for bits in (1, 2, 4, 8, 16, 32, 64)},
    **{"bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128},
}
# Instructions that move nothing: names for what is there, or for what others do.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "async-start", "async-update", "async-done", "copy-done", "slice-done", "after-all"),
    *("add-dependency", "opt-barrier", "optimization-barrier", "partition-id", "replica-id"),
    *(f"{kind}-done" for kind in COLLECTIVES),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # in place; which operand is the update
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_NAME = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\]([^{]*)\{([^}]*)\}")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d, ]*\},?\s*)*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program, as one device holds it.

    Attributes:
        bytes: without padding.
        local: whether it lies in a chip's own fast memory (VMEM) instead of its main memory.
    """

    bytes: int
    local: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: unique within its computation.
        opcode: such as "fusion".
        arrays: what it gives, tuples flattened.
        operands: names of instructions of the same computation.
        text: of the line, from the operands on.
        root: whether it is what its computation gives.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of what it gives, wherever that lies."""
        return sum(array.bytes for array in self.arrays)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
        kind: one of COLLECTIVES.
        groups: places of devices in the program's mesh, flattened; each group exchanges among
            itself. Of a permutation, its pairs.
        bytes: that each device gives into it, per call.
        calls: per run of the program.
        source: the operation of the model that it comes from, as traced; "" if not recorded.
    """

    kind: str
    groups: tuple[tuple[int, ...], ...]
    bytes: int
    calls: int
    source: str

    @property
    def size(self) -> int:
        """Devices of a group."""
        return max(map(len, self.groups))

    @property
    def sent(self) -> float:
        """Bytes that each device sends per call, by the best algorithm on a ring."""
        others = self.size - 1
        return self.bytes * {
            "all-gather": others,
            "all-reduce": 2 * others / self.size,
            "reduce-scatter": others / self.size,
            "all-to-all": others / self.size,
            "ragged-all-to-all": others / self.size,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a program moves, per device.

    Attributes:
        accessed: bytes read from and written to main memory.
        collectives: in the order of the text; those between fewer than two devices left out.
        unknown_loops: loops whose turns XLA does not know, counted once.
    """

    accessed: int
    collectives: tuple[Collective, ...]
    unknown_loops: int

    def sent(self) -> dict[str, int]:
        """Bytes that a device sends per run, by kind."""
        sent: dict[str, float] = {}
        for one in self.collectives:
            sent[one.kind] = sent.get(one.kind, 0) + one.sent * one.calls
        return {kind: round(count) for kind, count in sorted(sent.items())}


def read(text: str, devices: int) -> Costs:
    """The costs of a compiled program.

    Args:
        text: of `jax.stages.Compiled.as_text`.
        devices: number of them.

    Raises:
        ValueError: the text is not a program's.
    """
    return _HloReader(*_parse(text), devices).costs()


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """The computations of a program by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            if head[1]:
                entry = head[2]
        elif line.startswith("}"):
            current = None
        elif current is not None and (name := _NAME.match(line)):
            instruction = _instruction(name[2], line[name.end() :], bool(name[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(f"hlo: expected the text of a compiled program, got {text[:80]!r}")
    return computations, entry


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest, 0) - 1
    operands = () if opcode in ("constant", "parameter") else re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(name, opcode, _arrays(kind), tuple(operands), rest, root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"hlo: expected balanced parentheses, got {text[start : start + 80]!r}")


def _arrays(kind: str) -> tuple[Array, ...]:
    arrays = []
    for dtype, dims, layout in _ARRAY.findall(kind):
        sizes = [int(size.strip(" <=")) for size in dims.split(",") if size.strip(" <=")]
        bits = _BITS.get(dtype, 8)  # the many formats of eight bits
        arrays.append(Array(math.ceil(math.prod(sizes) * bits / 8), "S(1)" in (layout or "")))
    return tuple(arrays)


class _HloReader:
    """Walks a program from its entry; each computation is looked at once."""

    def __init__(self, computations: Mapping[str, Computation], entry: str, devices: int):
        self.computations, self.entry, self.devices = computations, entry, devices
        self.accessed, self.unknown = 0, 0
        self.collectives: list[Collective] = []

    def costs(self) -> Costs:
        self._walk(self.entry, 1, fused=False)
        return Costs(self.accessed, tuple(self.collectives), self.unknown)

    def _walk(self, name: str, times: int, fused: bool) -> None:
        computation = self.computations[name]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                self._collective(computation, one, kind, times)
            if not fused:
                self.accessed += times * self._moved(computation, one)
            for called, turns, within in self._called(computation, one):
                self._walk(called, times * turns, fused or within)

    def _called(
        self, computation: Computation, one: Instruction
    ) -> Iterator[tuple[str, int, bool]]:
        """Computations that an instruction runs, how often, and whether as one with it."""
        called = dict(_CALLED.findall(one.text))
        if one.opcode == "while":
            known = self._turns(computation, one, called)
            self.unknown += known is None
            turns = 1 if known is None else known
            yield called["body"], turns, False
            yield called["condition"], turns + 1, False
        elif one.opcode == "conditional":
            branches = _BRANCHES.search(one.text)
            names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else called.values()
            for name in names:  # any of them may run; all are counted
                yield name, 1, False
        elif one.opcode == "fusion":
            yield called["calls"], 1, True
        elif one.opcode == "async-start":
            yield called["calls"], 1, False
        elif one.opcode == "call":
            yield called["to_apply"], 1, False

    def _turns(
        self, computation: Computation, one: Instruction, called: Mapping[str, str]
    ) -> int | None:
        """Of a loop: as XLA says, or from first value, step and bound of the number it counts."""
        if known := _TRIPS.search(one.text):
            return int(known[1])
        condition, body = (self.computations[called[name]] for name in ("condition", "body"))
        test, last = _root(condition), _root(body)
        start = _through(computation, one.operands[0])
        if test.opcode != "compare" or "direction=LT" not in test.text or last.opcode != "tuple":
            return None
        counter = _through(condition, test.operands[0])
        place = re.search(r"index=(\d+)", counter.text)
        if not place or start.opcode != "tuple":
            return None
        step = _through(body, last.operands[int(place[1])])
        first, bound = (
            _number(within, name)
            for within, name in (
                (computation, start.operands[int(place[1])]),
                (condition, test.operands[1]),
            )
        )
        added = [n for name in step.operands if (n := _number(body, name)) is not None]
        if step.opcode != "add" or len(added) != 1 or None in (first, bound):
            return None
        return max(-(-(bound - first) // added[0]), 0)

    def _collective(
        self, computation: Computation, one: Instruction, kind: str, times: int
    ) -> None:
        if "chain_id=" in one.text and not _starts(computation, one):
            return  # a later link of the chain of fusions that an asynchronous one becomes
        given = sum(computation[name].bytes for name in one.operands)
        groups = _groups(one.text, self.devices)
        if kind == "collective-permute":
            groups = tuple(pair for pair in groups if pair[0] != pair[1])
        # On TPU a sum that is split at once is one fusion of both.
        if kind == "all-reduce" and _is_scattered(computation, one):
            kind = "reduce-scatter"
        if groups and max(map(len, groups)) > 1:
            source = re.search(r'op_name="([^"]*)"', one.text)
            self.collectives.append(
                Collective(kind, groups, given, times, source[1] if source else "")
            )

    def _moved(self, computation: Computation, one: Instruction) -> int:
        """Bytes of main memory that an instruction reads and writes."""
        if one.opcode in _FREE:
            return 0
        inputs = [computation[name] for name in one.operands if name in computation]
        if one.opcode != "fusion":
            return _moved_by_one(inputs, one)
        inner = self._inner(one)
        read = [
            self._read(inner, parameter)
            for number, parameter in _parameters(inner)
            if number < len(inputs) and _main(inputs[number])
        ]
        return sum(read) + (self._written(inner, _root(inner)) if _main(one) else 0)

    def _inner(self, fusion: Instruction) -> Computation:
        return self.computations[dict(_CALLED.findall(fusion.text))["calls"]]

    def _read(self, computation: Computation, value: Instruction) -> int:
        """Bytes that a fused computation reads of a value: of slices of it the slices alone."""
        total = 0
        for user in computation.values():
            for place, name in enumerate(user.operands):
                if name != value.name:
                    continue
                if user.opcode == "bitcast":
                    total += self._read(computation, user)
                elif user.opcode == "fusion":
                    inner = self._inner(user)
                    within = next(each for number, each in _parameters(inner) if number == place)
                    total += self._read(inner, within)
                elif user.opcode in _SLICES and place == 0:
                    total += user.bytes
                elif user.opcode not in _UPDATES or place:
                    return value.bytes
        return min(total, value.bytes)

    def _written(self, computation: Computation, value: Instruction) -> int:
        """Bytes that a fused computation writes of what it gives: of updates those alone."""
        if value.opcode == "bitcast":
            return self._written(computation, computation[value.operands[0]])
        if value.opcode == "tuple":
            return sum(self._written(computation, computation[name]) for name in value.operands)
        if value.opcode == "fusion":
            inner = self._inner(value)
            return self._written(inner, _root(inner))
        if value.opcode in _UPDATES:
            return computation[value.operands[_UPDATES[value.opcode]]].bytes
        return _main(value)


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _parameters(computation: Computation) -> Iterator[tuple[int, Instruction]]:
    for one in computation.values():
        if one.opcode == "parameter":
            yield int(one.text.partition(")")[0]), one


def _through(computation: Computation, name: str) -> Instruction:
    """The instruction behind copies of what it gives."""
    one = computation[name]
    while one.opcode in ("copy", "bitcast"):
        one = computation[one.operands[0]]
    return one


def _number(computation: Computation, name: str) -> int | None:
    one = _through(computation, name)
    value = re.match(r"(-?\d+)\)", one.text) if one.opcode == "constant" else None
    return int(value[1]) if value else None


def _main(one: Instruction) -> int:
    """Bytes of what it gives that lie in main memory."""
    return sum(array.bytes for array in one.arrays if not array.local)


def _moved_by_one(inputs: list[Instruction], one: Instruction) -> int:
    """Of slices and gathers the part, of updates in place the update, else all."""
    if one.opcode in _SLICES:
        return 2 * min(one.bytes, inputs[0].bytes)
    if one.opcode == "slice-start":  # gives its source again, and the slice
        return one.arrays[1].bytes * (1 + (not one.arrays[1].local))
    if one.opcode in _UPDATES:
        return 2 * inputs[_UPDATES[one.opcode]].bytes
    if one.opcode == "copy-start":  # gives the copy, and its source again
        return sum(array.bytes for array in one.arrays[:2] if not array.local)
    if one.opcode.endswith("-start"):
        return 2 * sum(map(_main, inputs))
    return _main(one) + sum(map(_main, inputs))


def _starts(computation: Computation, one: Instruction) -> bool:
    users = (each for each in computation.values() if one.name in each.operands)
    return any("AsyncCollectiveStart" in user.text for user in users)


def _is_scattered(computation: Mapping[str, Instruction], one: Instruction) -> bool:
    users = [each for each in computation.values() if one.name in each.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _groups(text: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Which devices a collective is among, from its attributes in any of XLA's notations."""
    if mesh := _MESH.search(text):
        return _mesh_groups(*mesh.groups())
    if iota := re.search("replica_groups=" + _IOTA.pattern, text):
        return _rows(_numbers(iota))
    listed = _LISTED.search(text)
    listed_groups = re.findall(r"\{([\d, ]+)\}", listed[1]) if listed else []
    groups = tuple(tuple(int(n) for n in group.split(",")) for group in listed_groups)
    return groups or (tuple(range(devices)),)


@functools.lru_cache(maxsize=1024)
def _mesh_groups(axes: str, order: str, among: str) -> tuple[tuple[int, ...], ...]:
    """`mesh['a'=4,'b'=2] {'a'}`, in which an axis may be a part of one, `'a':(2)2`."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    chosen = {
        name: (int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", among)
    }
    shape, grouped = [], []
    for name, size in sizes.items():
        before, within = chosen.get(name, (size, 1))
        grouped.append(len(shape) + 1)
        shape += [before, within, size // (before * within)]
    iota = _IOTA.search(order)
    numbers = _numbers(iota) if iota else np.arange(math.prod(sizes.values()))
    numbers = numbers.reshape(shape)
    apart = [axis for axis in range(numbers.ndim) if axis not in grouped]
    inner = math.prod(numbers.shape[axis] for axis in grouped)
    return _rows(numbers.transpose(apart + grouped).reshape(-1, inner))


def _numbers(iota: re.Match) -> np.ndarray:
    """`[4,2]<=[2,4]T(1,0)`."""
    shape, sizes = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    if iota[3]:
        numbers = numbers.transpose([int(n) for n in iota[3].split(",")])
    return numbers.reshape(shape)


def _rows(numbers: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in numbers.tolist())
