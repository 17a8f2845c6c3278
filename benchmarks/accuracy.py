"""Accuracy of a variant over several seeds: trains each, prints a row per seed, mean and spread.

python -m benchmarks.accuracy --variant=minilm_l3/debian_3k,reference --seeds 0 1 2 3 4

Any --config.field=value is an override, the seed apart. The run of seed n is in

    <workdir>/<variant>-<hash>/seed<n>

where the hash is of the variant's config and the overrides, in their order. A finished run that is
there already is not repeated, an interrupted one goes on, a changed recipe is another folder.

The results go to --output: "benchmark", "settings" ("variant", the config's "name", "overrides",
and "split": "test", or "validation" where data.validation_fraction held documents out), environment
("processor", "cores", "python", "versions", "date", "commit") and the printed tables ("results").
"""

import argparse
import hashlib
import json
import pathlib
import subprocess
import sys

import numpy as np

from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.retrieval.evaluate import format_table

PACKAGES = ("jax", "flax", "optax", "transformers", "numpy")


def run_folder(variant: str, overrides: list[str]) -> str:
    """Name of the folder of the runs of a variant with overrides; others have another one.

    Raises:
        ValueError: the variant is unknown.
    """
    content = json.dumps([vixml.get_config(variant).to_dict(), overrides], sort_keys=True)
    return f"{_name(variant)}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def run(variant: str, seed: int, workdir: pathlib.Path, overrides: list[str]) -> dict:
    """metrics.json of one seed, trained if it is not there: training writes it at its end."""
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


def _name(variant: str) -> str:
    return (variant or "default").replace("/", "-").replace(",", "-")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(arguments, overrides) of a command line; exits with a message if it is mistaken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="", help="of configs/vixml.py; its default if empty")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/accuracy"))
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    # Taken out first: argparse would read one with a space in its value as one more seed.
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    arguments = parser.parse_args([argument for argument in argv if argument not in overrides])
    for override in overrides:
        field, equals, _ = override.partition("=")
        if not equals:
            parser.error(f"{override}: expected {override}=value")
        if field == "--config.train.seed":
            parser.error(f"{override}: expected the seeds in --seeds")
    return arguments, overrides


def main() -> None:
    arguments, overrides = parse(sys.argv[1:])
    try:
        workdir = arguments.workdir / run_folder(arguments.variant, overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results = {seed: run(arguments.variant, seed, workdir, overrides) for seed in arguments.seeds}
    config = json.loads((workdir / f"seed{arguments.seeds[0]}" / "config.json").read_text())
    split = "validation" if config["data"]["validation_fraction"] > 0 else "test"
    tables = {
        row: summary(results, row)
        for row in ("plain", "augmented")
        if row in results[arguments.seeds[0]]
    }
    for row, table in tables.items():
        print(f"\n{_name(arguments.variant)}, {row}, {split} split, percent\n")
        print(format_table(table))
    print(f"\nthe runs are in {workdir}")
    if arguments.output:
        settings = {
            "variant": _name(arguments.variant),
            "name": config["name"],
            "overrides": overrides,
            "split": split,
        }
        content = {"benchmark": "accuracy", "settings": settings}
        content |= environment(PACKAGES) | {"results": tables}
        save(arguments.output, content)


if __name__ == "__main__":
    main()
