"""Where an epoch's time goes: steps, waiting for data, and the boundary that follows them.

python -m benchmarks.goodput --output benchmarks/results/goodput.json \
    --config.data.raw_dir=.../LF-DebianTitles-26K

Trains --variant by the command in a folder of its own and reads what the run has noted of itself.
By default MiniLM with three layers and the reference's settings on LF-DebianTitles-26K for two
epochs: centroids anew at both boundaries, new leaves at the first; the last one encodes all
documents anew. Compilation is not in it. Any --config.field=value is an override.

    boundary     seconds of it, over those of the epoch's steps and of itself
    data_wait    seconds in which the loop had no batch, over those of its steps: an upper bound of
                 what the devices lacked, since they may have had steps in hand
    shares       of the whole run's wall time, by phase
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.environment import environment, save

PACKAGES = ("jax", "jaxlib", "flax", "grain", "numpy")
DEFAULTS = (
    "--config.train.epochs=2",
    "--config.train.zero_shot=False",
    "--config.curriculum.start=0",
)


def epochs(records: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Seconds of each epoch's steps, its waiting for data and its boundary.

    Args:
        records: of a run's metrics.jsonl, in their order.
    """
    found, steps, waited, before = [], 0.0, 0.0, 0
    for record in records:
        if "time/step" in record:
            count, before = record["step"] - before, record["step"]
            steps += count * record["time/step"]
            waited += count * record["time/data_wait"]
        elif "time/boundary" in record:
            boundary = record["time/boundary"]
            found.append(
                {
                    "steps_seconds": steps,
                    "data_wait_seconds": waited,
                    "boundary_seconds": boundary,
                    "data_wait": waited / steps,
                    "boundary": boundary / (steps + boundary),
                }
            )
            steps = waited = 0.0
    return found


def shares(records: list[dict[str, Any]]) -> dict[str, float]:
    """Phase -> its share of the run's wall time, as of the last record of it."""
    prefix = "time/share/"
    last = next(r for r in reversed(records) if any(name.startswith(prefix) for name in r))
    return {n.removeprefix(prefix): x for n, x in last.items() if n.startswith(prefix)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="minilm_l3/debian_26k,reference")
    parser.add_argument("--output", type=pathlib.Path)
    arguments, overrides = parser.parse_known_args()
    if unknown := [flag for flag in overrides if not flag.startswith("--config.")]:
        parser.error(f"expected overrides --config.field=value, got {' '.join(unknown)}")
    overrides = [*DEFAULTS, *overrides]
    with tempfile.TemporaryDirectory() as folder:
        command = (sys.executable, "-m", "xmc_jax.main")
        config = f"--config=configs/vixml.py:{arguments.variant}"
        data = f"--config.data.data_dir={folder}/data"
        workdir = pathlib.Path(folder, "run")
        subprocess.run([*command, config, data, f"--workdir={workdir}", *overrides], check=True)
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    results = {"epochs": epochs(records), "shares": shares(records)}
    for number, epoch in enumerate(results["epochs"]):
        print(
            f"epoch {number}: steps {epoch['steps_seconds']:.1f} s, of which waiting for data "
            f"{100 * epoch['data_wait']:.2f} %; boundary {epoch['boundary_seconds']:.2f} s, "
            f"{100 * epoch['boundary']:.2f} % of the epoch"
        )
    content = {
        "benchmark": "goodput",
        "settings": {
            "variant": arguments.variant,
            "overrides": [x for x in overrides if not x.startswith("--config.data.")],
        },
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)


if __name__ == "__main__":
    main()
