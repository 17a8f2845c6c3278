"""What a run needs on named devices: every program of it compiled ahead of time, and added up."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from xmc_jax.planning import flops, hardware, hlo
from xmc_jax.planning.flops import Flops
from xmc_jax.planning.hardware import Seconds
from xmc_jax.planning.hlo import Costs
from xmc_jax.planning.topology import Topology
from xmc_jax.training.program import Compilable, Program

_TRIED = 6  # compilations of changed configs at most
_EXCEEDED = re.compile(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of the run, compiled.

    Attributes:
        name: of the program.
        per_epoch: runs of it in an epoch.
        arguments: bytes of a device that they take.
        beside: bytes of what stays on a device while it runs and is no argument of it.
        peak: bytes of a device while it runs, arguments included, `beside` not.
        flops: over all devices; see `flops.count`.
        costs: of one device; None if it did not compile, for want of memory.
        seconds: at published rates; None if those are not known, or it did not compile.
    """

    name: str
    per_epoch: float
    arguments: int
    beside: int
    peak: int
    flops: Flops
    costs: Costs | None
    seconds: Seconds | None

    @property
    def memory(self) -> int:
        """Bytes of a device while it runs."""
        return self.peak + self.beside


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        topology: where it would run.
        mesh: its axes and their sizes.
        parts: bytes of a device that stay there, by what they hold.
        batch: bytes of a device that a batch takes.
        programs: of the run.
        steps: per epoch.
        epochs: of the run.
        host: bytes of a host's memory, by what they hold.
        disk: bytes, by what they hold; of the dataset on every host.
    """

    topology: Topology
    mesh: Mapping[str, int]
    parts: Mapping[str, int]
    batch: int
    programs: tuple[Compiled, ...]
    steps: int
    epochs: int
    host: Mapping[str, int]
    disk: Mapping[str, int]

    @property
    def largest(self) -> Compiled:
        """The program that needs most memory."""
        return max(self.programs, key=lambda program: program.memory)

    @property
    def memory(self) -> int:
        """Bytes that a device needs."""
        return self.largest.memory

    @property
    def fits(self) -> bool:
        """Whether every program was compiled and finds the memory it needs."""
        compiled = all(program.costs is not None for program in self.programs)
        return compiled and self.memory <= self.topology.memory


def make(program: Program, topology: Topology) -> Plan:
    """Compiles every program of a run.

    Args:
        program: over the devices of the topology.
        topology: its devices.
    """
    compiled = tuple(compile_one(each, program, topology) for each in program.programs())
    parts = resident(program)
    step = next(each for each in compiled if each.name == "train_step")
    return Plan(
        topology=topology,
        mesh=dict(program.mesh.shape),
        parts=parts,
        batch=max(step.arguments - sum(parts.values()) + step.beside, 0),
        programs=compiled,
        steps=program.steps_per_epoch,
        epochs=program.config.train.epochs,
        host=on_host(program, topology),
        disk=on_disk(program),
    )


def compile_one(each: Compilable, program: Program, topology: Topology) -> Compiled:
    """Compiles a program of the run and reads what it needs.

    Args:
        each: of `program.programs()`.
        program: whose program it is.
        topology: its devices.
    """
    operations = flops.count(each.jaxpr())
    lowered = each.lower()
    arguments = per_device(lowered.args_info)
    beside = max(sum(resident(program).values()) - arguments, 0)
    common = {
        "name": each.name,
        "per_epoch": each.per_epoch,
        "arguments": arguments,
        "beside": beside,
        "flops": operations,
    }
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        exceeded = _EXCEEDED.search(str(error))
        if not exceeded:
            raise
        peak = int(float(exceeded[1]) * _UNITS[exceeded[2]])
        return Compiled(**common, peak=peak, costs=None, seconds=None)
    costs = hlo.read(compiled.as_text(), program.mesh.size)
    where = topology.slice(program.mesh)
    return Compiled(
        **common,
        peak=_peak(compiled.memory_analysis(), topology),
        costs=costs,
        seconds=None if where is None else hardware.seconds(where, operations, costs),
    )


def _peak(memory: Any, topology: Topology) -> int:
    beside = memory.output_size_in_bytes - memory.alias_size_in_bytes
    whole = memory.argument_size_in_bytes + beside + memory.temp_size_in_bytes
    return whole + memory.generated_code_size_in_bytes


def per_device(tree: Any) -> int:
    """Bytes of one device that arrays with shardings take.

    Args:
        tree: of ShapeDtypeStructs.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
