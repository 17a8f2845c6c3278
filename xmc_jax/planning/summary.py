"""The mode "plan" of the command: a config and the name of a topology to text and a verdict."""

from collections.abc import Sequence

from xmc_jax.config import RunConfig
from xmc_jax.data.types import DataShape
from xmc_jax.planning import plan as planning
from xmc_jax.planning import shape, topology
from xmc_jax.planning.hardware import GIB
from xmc_jax.planning.plan import Plan
from xmc_jax.runtime.wording import counted
from xmc_jax.training.program import Program


def make(config: RunConfig, name: str) -> tuple[str, bool]:
    """Plans a run; what to print, and whether the run fits.

    Args:
        config: of the run.
        name: of the topology, see `topology.find`.

    Raises:
        ValueError: config, data and topology do not go together; says which and how.
    """
    where = topology.find(name)
    data, origin = shape.of(config)
    prompts, tokenised = shape.prompts(config)

    def build(config: RunConfig) -> Program:
        return Program(config, data, prompts, where.devices)

    program = build(config)
    made = planning.make(program, where)
    said = f"{tokenised}, {counted(len(prompts.head + prompts.middle + prompts.tail), 'token')}"
    blocks = [_heading(program, made), _data(data, origin, said), *tables(made)]
    blocks.append(_verdict(made))
    if not made.fits:
        change, tried = planning.cheapest_change(build, config, where, made)
        if change:
            blocks.append(f"fits with {change} (compiled)")
        else:
            blocks.append(
                "\n".join(["nothing tried makes it fit:", *(f"  {one}" for one in tried)])
            )
    return "\n\n".join(blocks), made.fits


def tables(plan: Plan) -> list[str]:
    """The tables of a plan: memory of a device, programs, collectives, host and disk."""
    largest = plan.largest
    held = sum(plan.parts.values())
    memory = [[name, _gib(size)] for name, size in plan.parts.items()]
    memory += [
        [f"other arguments of {largest.name}", _gib(largest.beside + largest.arguments - held)],
        [f"activations of {largest.name}", _gib(largest.activations)],
        ["needed", _gib(largest.memory)],
        ["there is", _gib(plan.topology.memory)],
    ]
    rows, collectives = [], []
    chips = len(plan.topology.devices)
    for each in plan.programs:
        row = [each.name, f"{each.per_epoch:,.1f}", _gib(each.memory)]
        row += [f"{each.flops.total / chips / 1e12:,.3f}"]
        if each.costs is None:
            rows.append([*row, *["did not compile"] * 2])
            continue
        row += [_gib(each.costs.accessed), _gib(sum(each.costs.sent().values()))]
        if each.seconds is not None:
            times = (each.seconds.compute, each.seconds.memory, each.seconds.collectives)
            row += [f"{1e3 * t:,.1f}" for t in (*times, each.seconds.total)]
        rows.append(row)
        for kind, size in each.costs.sent().items():
            calls = sum(one.calls for one in each.costs.collectives if one.kind == kind)
            collectives.append([each.name, kind, f"{calls:,}", f"{size / 2**20:,.1f}"])
    head = ["program", "per epoch", "GiB", "TFLOP", "GiB moved", "GiB sent"]
    head += [f"ms {what}" for what in ("compute", "memory", "collectives", "total")]
    blocks = [
        _table(["memory of a device", "GiB"], memory),
        _table(head, rows),
    ]
    if collectives:
        blocks.append(_table(["collectives of", "kind", "calls", "MiB sent a call"], collectives))
    return [
        *blocks,
        _table(["memory of a host", "GiB"], [[k, _gib(v)] for k, v in plan.host.items()]),
        _table(["disk", "GiB"], [[k, _gib(v)] for k, v in plan.disk.items()]),
    ]


def _heading(program: Program, plan: Plan) -> str:
    config, where = program.config, plan.topology
    mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    lines = [
        f"{config.encoder.backbone} on {where.name}: "
        f"{counted(len(where.devices), 'device')} of {_gib(where.memory)} GiB, hosts: "
        f"{where.hosts}, mesh {mesh}",
        f"B = {config.train.batch_size:,} in {counted(config.train.n_chunks, 'chunk')}, remat "
        f"{config.encoder.remat}, tables {config.tables.dtype}, "
        f"{counted(plan.steps, 'step')} an epoch, {counted(plan.epochs, 'epoch')}",
    ]
    if not where.exact:
        lines.append(
            "ESTIMATE: compiled for this machine's processor, which holds bfloat16 activations "
            "in float32; rates and capacities are published ones"
        )
    return "\n".join(lines)


def _data(data: DataShape, origin: str, prompts: str) -> str:
    counts = {"document": data.documents, "label": data.labels, "pair": data.pairs}
    said = [counted(count, noun) for noun, count in (counts | {"token": data.length}).items()]
    if data.image_width:
        said.append(f"{counted(data.images_per_item, 'image')} of {data.image_width}")
    return f"{', '.join(said)}; {origin}\nprompts {prompts}"


def _verdict(plan: Plan) -> str:
    largest, available = plan.largest, _gib(plan.topology.memory)
    fits = "fits" if plan.fits else "does not fit"
    lines = [f"{fits}: {_gib(largest.memory)} of {available} GiB ({largest.name})"]
    if (epoch := plan.epoch_seconds()) is not None:
        lines.append(
            f"at published rates, nothing overlapped, at the least: step "
            f"{plan.step.seconds.total:.3f} s, epoch {epoch / 60:,.1f} min, run "
            f"{epoch * plan.epochs / 3600:,.1f} h"
        )
    unknown = [each.name for each in plan.programs if each.costs and each.costs.unknown_loops]
    if unknown:
        lines.append(f"loops of unknown length counted once: {', '.join(unknown)}")
    return "\n".join(lines)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text, the first column to the left and the others to the right."""
    rows = [head, *([*row, *[""] * (len(head) - len(row))] for row in rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
