"""Memory and time of `prepare` on records with long texts, which it must not hold.

python -m benchmarks.prepare_memory --documents=100000 --words=5000

Records are made in a temporary folder, or in --folder, where they stay and are not made again:
texts of --words words, put together from runs of words of the bundled titles; three labels each of
--labels. Then the whole command runs in a process of its own, conversion and tokenising. It needs
three times the bytes of the records on disk.

The results go to --output: "benchmark", "settings", environment and "results": "bytes" of the
records, "seconds" of the command, "processor_seconds" of its threads, and "rss", the most memory
that it held at a time, in bytes.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.environment import environment, save

PACKAGES = ("numpy", "tokenizers", "transformers")
_RUN = 50  # words that stay together
_RUNS = 20_000  # different runs


def write_records(folder: pathlib.Path, documents: int, words: int, labels: int) -> int:
    """Writes train.jsonl and labels.jsonl; returns their bytes."""
    from xmc_jax.data import bundled, raw

    generator = np.random.default_rng(0)
    titles = raw.read_items(bundled.path("LF-DebianTitles-3K") / "trn.json.gz").titles
    known = np.array([word for title in titles for word in title.split() if word.isalpha()])
    runs = [" ".join(known[generator.integers(len(known), size=_RUN)]) for _ in range(_RUNS)]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "labels.jsonl").open("w", encoding="utf-8") as file:
        for label in range(labels):
            title = titles[label % len(titles)]
            file.write(json.dumps({"id": f"l{label}", "text": f"{title} {label}"}) + "\n")
    with (folder / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(documents):
            drawn = generator.integers(_RUNS, size=max(words // _RUN, 1)).tolist()
            text = " ".join(runs[i] for i in drawn)
            own = [f"l{label}" for label in generator.integers(labels, size=3).tolist()]
            file.write(json.dumps({"id": f"d{number}", "text": text, "labels": own}) + "\n")
    return sum(path.stat().st_size for path in folder.glob("*.jsonl"))


def measure(records: pathlib.Path, out: pathlib.Path, max_length: int) -> dict[str, Any]:
    """Runs the command; its time and memory."""
    command = [sys.executable, "-m", "xmc_jax.data.prepare", f"--records={records}"]
    command += ["--dataset=Long", f"--out={out}", f"--max_length={max_length}"]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "rss": 1024 * usage.ru_maxrss,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=100_000, help="default 100,000")
    parser.add_argument("--words", type=int, default=5_000, help="of each, default 5,000")
    parser.add_argument("--labels", type=int, default=1_000, help="default 1,000")
    parser.add_argument("--max_length", type=int, default=64, help="tokens kept, default 64")
    parser.add_argument("--folder", type=pathlib.Path, help="where the records stay")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    arguments = parser.parse_args()
    names = ("documents", "words", "labels", "max_length")
    settings = {name: getattr(arguments, name) for name in names}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made:
        records = (arguments.folder or pathlib.Path(made)) / "-".join(
            str(settings[name]) for name in names[:3]
        )
        if not (records / "whole").exists():
            write_records(records, *(settings[name] for name in names[:3]))
            (records / "whole").touch()
        size = sum(path.stat().st_size for path in records.glob("*.jsonl"))
        results = {"bytes": size} | measure(records, pathlib.Path(made), arguments.max_length)
    print(
        f"{size / 1e9:.2f} GB in {results['seconds']:.0f} s, {results['processor_seconds']:.0f} s "
        f"of processor; at most {results['rss'] / 2**20:.0f} MiB of memory"
    )
    content = {"benchmark": "prepare_memory", "settings": settings}
    if arguments.output is not None:
        save(arguments.output, content | environment(PACKAGES) | {"results": results})


if __name__ == "__main__":
    main()
