"""What a run needs on named devices: every program of it compiled ahead of time, and added up."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from flax import traverse_util

from xmc_jax.config import RunConfig
from xmc_jax.planning import hardware, hlo, programs
from xmc_jax.planning.hardware import Seconds
from xmc_jax.planning.hlo import Costs
from xmc_jax.planning.programs import Compilable
from xmc_jax.planning.topology import Topology
from xmc_jax.training import flops
from xmc_jax.training.flops import Flops
from xmc_jax.training.memory import per_device
from xmc_jax.training.program import Program

# libtpu, of a program that is too large: what it would need, arguments included.
_EXCEEDED = re.compile(r"(?:Used |HLO temporaries \()([\d.]+)([KMG]?)\b")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_REMAT = "nothing_saveable"  # keeps least


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program of the run, compiled.

    Attributes:
        name: of the program.
        per_epoch: calls of it in an epoch.
        beside: bytes of a device that stay there while it runs and are no argument of it.
        arguments: bytes of a device that it is given.
        activations: bytes of a device that it takes beside those.
        flops: over all devices; see `flops.count`.
        costs: of one device; None if it did not compile, for want of memory.
        seconds: at published rates; None if those are not known, or it did not compile.
    """

    name: str
    per_epoch: float
    beside: int
    arguments: int
    activations: int
    flops: Flops
    costs: Costs | None
    seconds: Seconds | None

    @property
    def memory(self) -> int:
        """Bytes of a device while it runs."""
        return self.beside + self.arguments + self.activations


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        topology: where it would run.
        mesh: its axes and their sizes.
        parts: bytes of a device that stay there throughout, by what they hold.
        programs: of the run.
        steps: per epoch.
        epochs: of the run.
        host: bytes of a host's memory, by what they hold.
        disk: bytes, by what they hold.
    """

    topology: Topology
    mesh: Mapping[str, int]
    parts: Mapping[str, int]
    programs: tuple[Compiled, ...]
    steps: int
    epochs: int
    host: Mapping[str, int]
    disk: Mapping[str, int]

    @property
    def largest(self) -> Compiled:
        """The program that needs most memory."""
        return max(self.programs, key=lambda each: each.memory)

    @property
    def fits(self) -> bool:
        """Whether every program was compiled and finds the memory it needs."""
        return all(_fits(each, self.topology) for each in self.programs)

    @property
    def step(self) -> Compiled:
        """The training step."""
        return next(each for each in self.programs if each.name == programs.TRAIN_STEP)

    def epoch_seconds(self) -> float | None:
        """Of all programs; None if the rates are not known."""
        if any(each.seconds is None for each in self.programs):
            return None
        return sum(each.seconds.total * each.per_epoch for each in self.programs)


def make(program: Program, topology: Topology) -> Plan:
    """Compiles every program of a run over the devices of a topology."""
    return Plan(
        topology=topology,
        mesh=dict(program.mesh.shape),
        parts=parts(program),
        programs=tuple(compile_one(each, program, topology) for each in programs.of(program)),
        steps=program.steps_per_epoch,
        epochs=program.config.train.epochs,
        host=on_host(program, topology),
        disk=on_disk(program),
    )


def compile_one(
    each: Compilable,
    program: Program,
    topology: Topology,
    options: Mapping[str, str] | None = None,
) -> Compiled:
    """Compiles a program of the run and reads what it needs.

    Args:
        each: of `programs.of`.
        program: whose program it is.
        topology: its devices.
        options: of XLA, by name; a run has none.
    """
    traced = each.trace()
    operations = flops.count(traced.jaxpr)
    lowered = traced.lower()
    given = set(map(id, jax.tree.leaves(each.arguments)))
    resident = jax.tree.leaves((program.abstract, program.abstract_frozen))
    arguments = per_device(each.arguments)  # also those that it does not use
    common = {
        "name": each.name,
        "per_epoch": each.per_epoch,
        "beside": per_device([leaf for leaf in resident if id(leaf) not in given]),
        "flops": operations,
    }
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        exceeded = _EXCEEDED.search(str(error))
        if not exceeded:
            raise
        used = int(float(exceeded[1]) * _UNITS[exceeded[2]])
        return Compiled(
            **common,
            arguments=arguments,
            activations=max(used - arguments, 0),
            costs=None,
            seconds=None,
        )
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes  # padded, and without what is not used
    costs = hlo.read(compiled.as_text(), program.mesh.size)
    where = topology.slice(program.mesh)
    return Compiled(
        **common,
        arguments=max(arguments, used),
        activations=_peak(memory, topology) - used,
        costs=costs,
        seconds=None if where is None else hardware.seconds(where, operations, costs),
    )


def _peak(memory: Any, topology: Topology) -> int:
    """Bytes of a device while a program runs, arguments included.

    Of TPUs XLA's own figure: what it calls temporary there overlaps with donated arguments, and
    programs run whose sum exceeds the memory. On processors that figure leaves out what is
    temporary.
    """
    if topology.sides:
        return memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + made + memory.temp_size_in_bytes


def parts(program: Program) -> dict[str, int]:
    """Bytes of a device that stay there throughout a run, by what they hold."""
    state = program.abstract
    flat = traverse_util.flatten_dict(state.params, sep="/")
    adapters = [leaf for path, leaf in flat.items() if path.endswith(("lora_a", "lora_b"))]
    held = {
        "frozen weights": program.abstract_frozen,
        "adapters": adapters,
        "other trained weights": [leaf for leaf in flat.values() if leaf not in adapters],
        "moments": state.opt_state,
        **{
            field.name.replace("_", " "): getattr(state.tables, field.name)
            for field in dataclasses.fields(state.tables)
        },
    }
    sizes = {name: per_device(tree) for name, tree in held.items()}
    return {name: size for name, size in sizes.items() if size}


def on_host(program: Program, topology: Topology) -> dict[str, int]:
    """Bytes of a host's memory during a run, by what they hold, without memory-mapped files."""
    config, shape, hosts = program.config, program.shape, topology.hosts
    width, batch = program.sizes.width, _bytes(program.abstract_batch())
    stacked = max(jax.tree.leaves(jax.tree.map(_bytes, program.abstract_frozen)), default=0)
    state = _bytes(program.abstract)
    return {
        "batches made ahead": (config.train.prefetch + 1) * batch // hosts,
        "one weight, while weights are read": stacked,
        "pairs of documents and labels": 8 * shape.pairs if program.model.prime else 0,
        "a checkpoint under way": state // hosts,
        "test embeddings, scores": 4 * shape.test * (width + 2 * config.eval.k),
    }


def on_disk(program: Program) -> dict[str, int]:
    """Bytes on disk, by what they hold."""
    config, shape = program.config, program.shape
    items = shape.documents + shape.test + shape.labels
    checkpoints = config.train.keep + 2  # the best, and the one that is being written
    return {
        "dataset folder, on every host": items * (4 * shape.length + 2) + 4 * shape.pairs,
        "image folder, on every host, at most": 2
        * items
        * shape.image_width
        * shape.images_per_item,
        "checkpoints": checkpoints * _bytes(program.abstract),
    }


def cheapest_change(
    build: Callable[[RunConfig], Program], config: RunConfig, topology: Topology, plan: Plan
) -> tuple[str | None, list[str]]:
    """The first change that makes a run fit, each tried by compiling what did not fit.

    Args:
        build: a config -> its program over the devices.
        config: that does not fit.
        topology: the devices.
        plan: of that config.

    Returns:
        What to change, None if nothing tried is enough; and what was tried.
    """
    needy = [each.name for each in plan.programs if not _fits(each, topology)]
    tried: list[str] = []
    for change, changed in changes(config, len(topology.devices)):
        tried.append(change)
        try:
            program = build(changed)
        except ValueError:  # a mesh that divides no heads, chunks that divide no batch
            continue
        if sum(parts(program).values()) > topology.memory:
            continue  # no need to compile
        every = {each.name: each for each in programs.of(program)}
        order = [name for name in needy if name in every]
        order += [name for name in every if name not in needy]
        if all(_fits(compile_one(every[name], program, topology), topology) for name in order):
            return change, tried
    return None, tried


def changes(config: RunConfig, devices: int) -> Iterator[tuple[str, RunConfig]]:
    """Changed configs, in order of what they cost: time, more time, precision, other sharding."""
    chunks = 4 * config.train.n_chunks
    if config.train.batch_size % chunks == 0:
        yield f"--config.train.n_chunks={chunks}", config.replace(train={"n_chunks": chunks})
    if config.encoder.remat != _REMAT:
        yield f"--config.encoder.remat={_REMAT}", config.replace(encoder={"remat": _REMAT})
    narrow = config.tables.dtype == "bfloat16"
    if not narrow:
        yield "--config.tables.dtype=bfloat16", config.replace(tables={"dtype": "bfloat16"})
    if (config.mesh.fsdp, config.mesh.tensor) != (devices, 1):
        flags = f"--config.mesh.data=1 --config.mesh.fsdp={devices} --config.mesh.tensor=1"
        sharded = config.replace(mesh={"data": 1, "fsdp": devices, "tensor": 1})
        yield flags, sharded
        if not narrow:
            flags += " --config.tables.dtype=bfloat16"
            yield flags, sharded.replace(tables={"dtype": "bfloat16"})


def _fits(each: Compiled, topology: Topology) -> bool:
    return each.costs is not None and each.memory <= topology.memory


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
