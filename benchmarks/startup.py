"""Seconds from the command to the first training step, without and with programs kept on disk.

python -m benchmarks.startup

The command trains a variant in a new workdir, with an empty folder of compiled programs ("cold")
and then, in another new workdir, with the same one ("warm"); `--repeat` such pairs, after a start
that prepares the data and does not count. The first step is over when the progress bar says so;
then the process is killed. What else a start does, as reading the data, encoding it and evaluating
the weights that training begins with, is in both.

The results go to --out: "benchmark", "settings", environment ("processor", "cores", "python",
"versions", "date", "commit") and "results": seconds of each start, the medians, and "ratio", that
of the warm median to the cold one.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import environment

PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_STEPS = re.compile(rb"train: .*? [1-9][0-9]*/[0-9]+ \[")


def seconds_to_first_step(variant: str, workdir: pathlib.Path, compiled: pathlib.Path) -> float:
    """Starts the command, and kills it after its first step.

    Args:
        variant: of configs/vixml.py; "" for the default one.
        workdir: a new folder.
        compiled: folder of compiled programs.

    Raises:
        RuntimeError: it ended without a step; with the end of what it said.
    """
    config = "--config=configs/vixml.py" + (f":{variant}" if variant else "")
    words = [config, f"--workdir={workdir}", f"--compilation_cache={compiled}"]
    started, said = time.perf_counter(), b""
    process = subprocess.Popen(
        [sys.executable, "-m", "xmc_jax.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
    )
    try:
        while chunk := process.stderr.read1():
            said += chunk
            if _STEPS.search(said):
                return time.perf_counter() - started
        raise RuntimeError(f"no step, exit code {process.wait()}: {said[-1000:].decode()}")
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="", help="of configs/vixml.py, by default its default")
    parser.add_argument("--repeat", type=int, default=2, help="pairs of starts, default 2")
    out = pathlib.Path(__file__).parent / "results" / "startup.json"
    parser.add_argument("--out", type=pathlib.Path, default=out, help="JSON file of the results")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    results: dict[str, Any] = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        seconds_to_first_step(arguments.variant, folder / "first", folder / "none")
        for pair in range(arguments.repeat):
            for name in ("cold", "warm"):
                seconds = seconds_to_first_step(
                    arguments.variant, folder / f"{name}{pair}", folder / f"compiled{pair}"
                )
                results[name].append(seconds)
                print(f"{name}  {seconds:.1f} s to the first step")
        results["compiled_bytes"] = sum(
            path.stat().st_size for path in (folder / "compiled0").rglob("*") if path.is_file()
        )
    for name in ("cold", "warm"):
        results[f"{name}_median"] = statistics.median(results[name])
    results["ratio"] = results["warm_median"] / results["cold_median"]
    print(f"ratio {results['ratio']:.2f}; {results['compiled_bytes'] / 2**20:.0f} MiB of programs")
    content = {
        "benchmark": "startup",
        "settings": {"variant": arguments.variant, "repeat": arguments.repeat},
        **environment(PACKAGES),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")
    return content


if __name__ == "__main__":
    main()
