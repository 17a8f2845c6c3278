"""A decoder's training step by what its layers keep for the backward pass: time and memory.

python -m benchmarks.remat
python -m benchmarks.remat --topology=v5p:2x2x1 --model=qwen2.5-3b --batch=2048 --chunks=16

The step is that of `benchmarks.decoder_step`, once with each policy of `encoder.remat`. The first
command takes steps on this machine, one with each policy in turn; of --steps rounds after one that
does not count, the medians. The second allocates nothing and takes no step: memory is what the
compiled step asks for, on one chip of a TPU that need not be there (package libtpu).

The results go to --out: "benchmark", "settings", environment and "results"; bytes and seconds.

Needs jax, flax, optax and numpy only.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import decoder_step
from benchmarks.decoder_workload import CHOSEN, MODELS, Settings, batch_of
from benchmarks.environment import environment, save
from xmc_jax.models import layers
from xmc_jax.models.decoder_config import DecoderConfig


def compiled(
    settings: Settings, sizes: DecoderConfig, device: jax.Device, policies: Sequence[str]
) -> dict[str, tuple[decoder_step.Program, Any, dict[str, Any]]]:
    """Program, compiled step, and what that says of itself, by policy.

    Args:
        settings: of the step, but for `remat`.
        sizes: of the decoder.
        device: for what.
        policies: of `layers.REMAT`.
    """
    found = {}
    for policy in policies:
        program = decoder_step.Program(dataclasses.replace(settings, remat=policy), sizes, device)
        step, seconds = program.compile()
        memory = decoder_step.memory(step, device)
        found[policy] = (program, step, {"compile_seconds": seconds, "memory": memory})
    return found


def measure(
    settings: Settings, sizes: DecoderConfig, device: jax.Device, policies: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Steps with each policy in turn; times and memory by policy.

    Args:
        settings: of the step, but for `remat`.
        sizes: of the decoder.
        device: where.
        policies: of `layers.REMAT`.
    """
    programs = compiled(settings, sizes, device, policies)
    states = {policy: program.draw() for policy, (program, *_) in programs.items()}
    seconds: dict[str, list[float]] = {policy: [] for policy in programs}
    losses = {}
    for step in range(1 + settings.steps):
        for policy, (program, run, _) in programs.items():
            state, frozen = states[policy]
            batch = jax.block_until_ready(program.put(batch_of(settings, sizes, step)))
            start = time.perf_counter()
            state, metrics = jax.block_until_ready(run(state, frozen, batch))
            if step:
                seconds[policy].append(time.perf_counter() - start)
            states[policy], losses[policy] = (state, frozen), float(metrics["loss"])
    return {
        policy: {
            "step_seconds": statistics.median(seconds[policy]),
            "step_seconds_each": seconds[policy],
            "times_first": statistics.median(
                a / b for a, b in zip(seconds[policy], seconds[policies[0]])
            ),
            "loss": losses[policy],
            **found,
        }
        for policy, (_, _, found) in programs.items()
    }


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """The results as they are printed, a policy a line.

    Args:
        results: of `measure`, or what `compiled` says.
    """
    found = []
    for policy, one in results.items():
        line = f"{policy:<34}temporary {one['memory']['temporary'] / 1e9:7.3f} GB"
        if one["memory"]["peak"] is not None:
            line += f"   peak {one['memory']['peak'] / 1e9:7.3f} GB"
        if "step_seconds" in one:
            line += f"   step {one['step_seconds']:.3f} s, {one['times_first']:.3f} of the first's"
        found.append(line)
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    for name in ("batch", "length", "chunks", "lora_rank", "steps"):
        parser.add_argument(f"--{name}", type=int, help="see benchmarks.decoder_step")
    parser.add_argument("--policies", nargs="+", choices=layers.REMAT, default=layers.REMAT)
    parser.add_argument("--topology", help="compile for one chip of this TPU, such as v5p:2x2x1")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file of the results")
    arguments = parser.parse_args(argv)
    device = decoder_step.device_of(arguments.topology)
    sizes = MODELS[arguments.model]
    chosen = CHOSEN.get(arguments.model, {}) | {
        "dtype": "float32" if device.platform == "cpu" else "bfloat16",
    }
    chosen |= {
        field.name: value
        for field in dataclasses.fields(Settings)[1:]
        if (value := getattr(arguments, field.name, None)) is not None
    }
    try:
        settings = Settings(arguments.model, **chosen)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.topology:
        programs = compiled(settings, sizes, device, arguments.policies)
        results = {policy: found for policy, (_, _, found) in programs.items()}
    else:
        results = measure(settings, sizes, device, arguments.policies)
    content = {
        "benchmark": "remat",
        "settings": dataclasses.asdict(settings)
        | {"remat": "each", "sizes": dataclasses.asdict(sizes)},
        "device": {"kind": device.device_kind, "topology": arguments.topology},
        **environment(decoder_step.PACKAGES),
        "results": results,
    }
    print("\n".join(lines(results)))
    if arguments.out is not None:
        save(arguments.out, content)
    return content


if __name__ == "__main__":
    main()
