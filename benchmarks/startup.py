"""Seconds from the command to the first training step, without and with programs kept on disk.

python -m benchmarks.startup

Three starts of a variant, `--repeat` times, after one that prepares the data and does not count:
"cold", in a new workdir and with an empty folder of compiled programs, is told to stop after its
first step, and saves; "again" is the same command again and goes on; "other" is another run, in a
new workdir, with the same programs. The first step is over when the progress bar says so. What else
a start does is in all: reading weights and data; in "cold" and "other" also encoding the data for
the first tables, and evaluating the weights that training begins with.

The results go to --out: "benchmark", "settings", environment ("processor", "cores", "python",
"versions", "date", "commit") and "results": of each start seconds and CPU seconds until then (of
all threads; they suffer less from other work on the machine), their medians, and the ratios of
"again" and "other" to "cold".
"""

import argparse
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import environment, save

NAMES = ("cold", "again", "other")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
_STEPS = re.compile(rb"train: .*? ([0-9]+)/[0-9]+ \[")


def start(variant: str, workdir: pathlib.Path, compiled: pathlib.Path) -> tuple[float, float]:
    """Starts the command and has it stop after its first step.

    Args:
        variant: of configs/vixml.py; "" for the default one.
        workdir: of the run.
        compiled: folder of compiled programs.

    Returns:
        Seconds, and CPU seconds, until the step was done.

    Raises:
        RuntimeError: it ended otherwise; with the end of what it said.
    """
    config = "--config=configs/vixml.py" + (f":{variant}" if variant else "")
    words = [config, f"--workdir={workdir}", f"--compilation_cache={compiled}"]
    started, said, found = time.perf_counter(), b"", None
    process = subprocess.Popen(
        [sys.executable, "-m", "xmc_jax.main", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=pathlib.Path(__file__).parents[1],
    )
    try:
        while chunk := process.stderr.read1():
            said += chunk
            steps = _STEPS.findall(said)
            if found is None and any(step != steps[0] for step in steps):
                found = time.perf_counter() - started, _cpu_seconds(process.pid)
                process.send_signal(signal.SIGTERM)
        if found is None or process.wait() != 128 + signal.SIGTERM:
            raise RuntimeError(f"exit code {process.wait()}: {said[-1000:].decode()}")
        return found
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _cpu_seconds(pid: int) -> float:
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="", help="of configs/vixml.py, by default its default")
    parser.add_argument("--repeat", type=int, default=2, help="default 2")
    out = pathlib.Path(__file__).parent / "results" / "startup.json"
    parser.add_argument("--out", type=pathlib.Path, default=out, help="JSON file of the results")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    starts: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        start(arguments.variant, folder / "first", folder / "none")
        for pair in range(arguments.repeat):
            workdirs = {"cold": f"run{pair}", "again": f"run{pair}", "other": f"other{pair}"}
            compiled = folder / f"compiled{pair}"
            for name in NAMES:
                taken = start(arguments.variant, folder / workdirs[name], compiled)
                starts[name].append(taken)
                print(f"{name}  {taken[0]:.1f} s to the first step, {taken[1]:.1f} CPU s")
    results: dict[str, Any] = {}
    for name in NAMES:
        seconds, cpu = zip(*starts[name])
        results[name] = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "seconds_median": statistics.median(seconds),
            "cpu_seconds_median": statistics.median(cpu),
        }
    for name in NAMES[1:]:
        for unit in ("seconds", "cpu_seconds"):
            ratio = results[name][f"{unit}_median"] / results["cold"][f"{unit}_median"]
            results[name][f"{unit}_ratio"] = ratio
        print(
            f"{name}: {results[name]['seconds_ratio']:.2f} of the time of the cold start, "
            f"{results[name]['cpu_seconds_ratio']:.2f} of its CPU time"
        )
    content = {
        "benchmark": "startup",
        "settings": {"variant": arguments.variant, "repeat": arguments.repeat},
        **environment(PACKAGES),
        "results": results,
    }
    save(arguments.out, content)
    return content


if __name__ == "__main__":
    main()
