"""Weak and strong scaling on paper: what chips send per step, and the share of the step it takes.

TPU_LIBRARY_PATH=... python -m benchmarks.weak_scaling --output benchmarks/results/weak_scaling.json

Compiles the training step of Qwen2.5-3B on LF-AmazonTitles-131K with images for slices of TPU v5e,
without any TPU (package libtpu), and reads from the compiled programs what each chip computes and
sends. Times are those of published rates, nothing overlapped: the larger of computing and main
memory, and then the collectives. A row takes minutes; those that the file has are not repeated.
`--plot docs/weak_scaling.png` draws them (matplotlib); `--only 16` compiles some rows.

No weights and no data are needed: the sizes are those of the model's config.json, read from the hub
or from --model, a folder that holds it.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.planning import plan, programs, shape, topology
from xmc_jax.training.program import Program

VARIANT = "qwen25_3b/amazontitles_131k"
PER_CHIP = 128  # documents, in weak scaling
STRONG = 2048  # documents, in strong scaling
# Weights are gathered whole: the loops of permutations that XLA else writes send the same bytes,
# and take several times as long to compile.
OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
PACKAGES = ("jax", "jaxlib", "libtpu")


@dataclasses.dataclass(frozen=True)
class Row:
    """One compiled step.

    Attributes:
        topology: see `topology.find`.
        mesh: data, fsdp, tensor.
        batch: B.
    """

    topology: str
    mesh: tuple[int, int, int]
    batch: int

    @property
    def chips(self) -> int:
        """Of the slice."""
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    @property
    def name(self) -> str:
        """That of the row in the results."""
        return f"{self.topology} {self.mesh} {self.batch}"


# The mesh of each size that sends least per link: groups of `fsdp` take whole rows of the torus, or
# all of it. Among more than 16 chips XLA gathers small shards by all-reduce, at twice the bytes.
ROWS = (
    Row("v5e:4x4", (1, 16, 1), PER_CHIP * 16),
    Row("v5e:8x8", (1, 64, 1), PER_CHIP * 64),
    Row("v5e:16x16", (16, 16, 1), PER_CHIP * 256),
    Row("v5e:8x8", (1, 64, 1), STRONG),
    Row("v5e:16x16", (16, 16, 1), STRONG),
)


def measure(row: Row, model: str | None) -> dict[str, Any]:
    """Compiles the step of a row, for its figures.

    Args:
        row: which.
        model: folder with config.json; None for the hub.
    """
    fields = vixml.get_config(VARIANT).to_dict()
    fields["encoder"]["remat"] = "nothing_saveable"  # all of a batch at once, and little kept
    fields["train"] |= {"batch_size": row.batch, "n_chunks": 1}
    fields["mesh"] = dict(zip(("data", "fsdp", "tensor"), row.mesh))
    if model is not None:
        fields["encoder"]["backbone"] = model
    found = topology.find(row.topology)
    prompts, _ = shape.prompts(RunConfig.from_dict(fields))
    data, _ = shape.of(RunConfig.from_dict(fields))
    program = Program(RunConfig.from_dict(fields), data, prompts, found.devices)
    step = next(each for each in programs.of(program) if each.name == programs.TRAIN_STEP)
    start = time.perf_counter()
    compiled = plan.compile_one(step, program, found, OPTIONS)
    if compiled.costs is None:
        raise RuntimeError(f"{row.name}: needs {compiled.memory} bytes of {found.memory}")
    largest = max(compiled.costs.collectives, key=lambda one: one.bytes * one.size)
    return {
        **dataclasses.asdict(row),
        "compile_seconds": time.perf_counter() - start,
        "memory_bytes": compiled.memory,
        "flops": compiled.flops.total / row.chips,
        "accessed_bytes": compiled.costs.accessed,
        "sent_bytes": compiled.costs.sent(),
        "seconds": dataclasses.asdict(compiled.seconds),
        "share": compiled.seconds.collectives / compiled.seconds.total,
        "largest_collective": {"kind": largest.kind, "bytes": largest.bytes},
    }


def table(results: dict[str, Any]) -> str:
    """The results as a table of Markdown.

    Args:
        results: name of a row -> its figures.
    """
    lines = [
        "| | chips | mesh | B | memory | TFLOP | all-gather | all-reduce | others | computing | "
        "main memory | collectives | share |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.name not in results:
            continue
        one = results[row.name]
        sent = dict(one["sent_bytes"])
        gather = sent.pop("all-gather", 0)
        total = sent.pop("all-reduce", 0) + sent.pop("reduce-scatter", 0)
        seconds = one["seconds"]
        kind = "weak" if row.batch == PER_CHIP * row.chips else "strong"
        lines.append(
            f"| {kind} | {row.chips} | {' × '.join(map(str, row.mesh))} | {row.batch:,} | "
            f"{one['memory_bytes'] / 2**30:.1f} GiB | {one['flops'] / 1e12:.0f} | "
            f"{gather / 1e9:.2f} GB | {total / 1e9:.2f} GB | {sum(sent.values()) / 1e9:.2f} GB | "
            f"{seconds['compute']:.3f} s | {seconds['memory']:.3f} s | "
            f"{seconds['collectives']:.3f} s | {100 * one['share']:.1f} % |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], out: pathlib.Path) -> None:
    """Draws the share of the collectives over the number of chips.

    Args:
        results: see `table`.
        out: .png file.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    kinds = {
        f"weak: B = {PER_CHIP} a chip": lambda row: row.batch == PER_CHIP * row.chips,
        f"strong: B = {STRONG:,}": lambda row: row.batch == STRONG,
    }
    for label, chosen in kinds.items():
        points = [
            (row.chips, 100 * results[row.name]["share"])
            for row in ROWS
            if chosen(row) and row.name in results
        ]
        axes.plot(*zip(*points), marker="o", label=label)
    axes.axhline(15, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.chips for row in ROWS}), sorted({row.chips for row in ROWS}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("chips (TPU v5e)")
    axes.set_ylabel("collectives, % of the step")
    axes.set_title("Qwen2.5-3B, nothing overlapped, published link rates", fontsize=10)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=pathlib.Path, help="JSON of the results, gone on with")
    parser.add_argument("--model", help="folder with the model's config.json; default: the hub")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of chips; default: all")
    parser.add_argument("--plot", type=pathlib.Path, help=".png file to draw")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    out, results = arguments.output, {}
    if out is not None and out.exists():
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
    for row in ROWS:
        chosen = arguments.only is None or row.chips in arguments.only
        if not chosen or row.name in results:
            continue
        results[row.name] = measure(row, arguments.model)
        if out is not None:
            content = {"benchmark": "weak_scaling", "settings": {"variant": VARIANT}}
            content |= environment(PACKAGES) | {"results": results}
            save(out, content)
    print(table(results))
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
