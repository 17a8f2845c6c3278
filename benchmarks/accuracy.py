"""Accuracy of a variant over several seeds: trains each, prints a row per seed, mean and spread.

python -m benchmarks.accuracy --variant=minilm_l3/debian_3k,reference --seeds 0 1 2 3 4

A run that is in --workdir already is not repeated, an interrupted one goes on. The results go to
--output, with the hardware, versions and date.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata

import numpy as np

from xmc_jax.retrieval.evaluate import format_table

PACKAGES = ("jax", "flax", "optax", "transformers", "numpy")


def run(variant: str, seed: int, workdir: pathlib.Path, overrides: list[str]) -> dict:
    """metrics.json of one seed, trained if it is not there."""
    folder = workdir / f"seed{seed}"
    if not (folder / "metrics.json").exists():
        config = f"configs/vixml.py:{variant}" if variant else "configs/vixml.py"
        subprocess.run(
            [
                *(sys.executable, "-m", "xmc_jax.main", f"--config={config}"),
                *(f"--workdir={folder}", f"--config.train.seed={seed}", *overrides),
            ],
            check=True,
        )
    return json.loads((folder / "metrics.json").read_text())


def summary(results: dict[int, dict], row: str) -> dict[str, dict[str, float]]:
    """Rows of a table: each seed, their mean, their standard deviation (of a sample)."""
    metrics = {seed: found[row] for seed, found in results.items()}
    values = {name: [m[name] for m in metrics.values()] for name in next(iter(metrics.values()))}
    rows = {f"seed {seed}": m for seed, m in metrics.items()}
    rows["mean"] = {name: float(np.mean(v)) for name, v in values.items()}
    if len(metrics) > 1:
        rows["standard deviation"] = {n: float(np.std(v, ddof=1)) for n, v in values.items()}
    return rows


def environment() -> dict:
    """Where and when: processor, versions, date, commit."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    processor = [
        line.split(":", 1)[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": processor[0] if processor else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="", help="of configs/vixml.py; its default if empty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, help="runs/accuracy/<variant> if not given")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    arguments, overrides = parser.parse_known_args()
    name = (arguments.variant or "default").replace("/", "-").replace(",", "-")
    workdir = arguments.workdir or pathlib.Path("runs/accuracy") / name
    results = {seed: run(arguments.variant, seed, workdir, overrides) for seed in arguments.seeds}
    tables = {
        row: summary(results, row)
        for row in ("plain", "augmented")
        if row in results[arguments.seeds[0]]
    }
    for row, table in tables.items():
        print(f"\n{name}, {row}, percent\n")
        print(format_table(table))
    if arguments.output:
        content = {"variant": name, "overrides": overrides} | environment() | {"results": tables}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
