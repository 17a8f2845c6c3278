"""Ranked labels for a file of documents: time, memory, batch sizes, kills.

python -m benchmarks.predict --artifact runs/26k/export --output benchmarks/results/predict.json

Documents are drawn from the words of the artifact's own training documents, with their lengths. All
of them go through `--mode=predict` once, in a process that notes its memory when the model is
loaded and what it takes at most from then on. Then some of them with other batch sizes; and once
more by the command, which is killed (SIGKILL) --kills times and given again. Outputs are compared
by SHA-256: those of the first documents must be the first lines of the whole output.
"""

import argparse
import hashlib
import json
import pathlib
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.environment import environment, save

PACKAGES = ("flax", "jax", "jaxlib", "numpy", "tokenizers", "transformers")
ROOT = pathlib.Path(__file__).parents[1]


def draw(folder: pathlib.Path, count: int, seed: int, out: pathlib.Path) -> None:
    """Writes documents as JSONL.

    Args:
        folder: an artifact with training documents.
        count: how many.
        seed: of the choice.
        out: file to write.
    """
    from xmc_jax.shipping import artifact

    there = artifact.open(folder, verify=False).documents
    words = [text.split() for text in there.texts]
    lengths = np.array([len(some) for some in words])
    all_words = np.concatenate([np.array(some, object) for some in words])
    generator = np.random.default_rng(seed)
    with out.open("w", encoding="utf-8") as file:
        for number in range(count):
            drawn = generator.integers(len(all_words), size=max(generator.choice(lengths), 1))
            record = {"id": f"d{number}", "text": " ".join(all_words[drawn])}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def worker(arguments: argparse.Namespace) -> None:
    """Makes one output in this process, and prints what it took as JSON."""
    from xmc_jax.runtime import command

    command.keep_freed_memory()
    from xmc_jax.config import PredictConfig
    from xmc_jax.runtime import compilation
    from xmc_jax.shipping import artifact, predict_files

    compilation.keep(None)
    loaded = {}

    class Noted(predict_files.QueryEncoder):
        def __init__(self, *given):
            super().__init__(*given)
            loaded["rss"] = _status("VmRSS")
            pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak, from here on

    predict_files.QueryEncoder = Noted
    config = PredictConfig(k=arguments.k, batch_size=arguments.batch_size, index=arguments.index)
    opened = artifact.open(arguments.artifact)
    report = predict_files.predict(opened, config, arguments.source, arguments.target)
    print(
        json.dumps(
            {
                "documents": report.progress.documents,
                "seconds": report.seconds,
                "documents_per_second": report.progress.documents / report.seconds,
                "processor_seconds": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
                "rss_model_loaded": loaded["rss"],
                "rss_peak": _status("VmHWM"),
            }
        )
    )


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def _measured(arguments, source: pathlib.Path, target: pathlib.Path, batch_size: int) -> dict:
    flags = [f"--artifact={arguments.artifact}", f"--k={arguments.k}", f"--index={arguments.index}"]
    own = [f"--source={source}", f"--target={target}", f"--batch_size={batch_size}"]
    command = [sys.executable, "-m", "benchmarks.predict", "--worker", *flags, *own]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return json.loads(done.stdout) | {"sha256": _digest(target.read_bytes())}


def _killed(arguments, source: pathlib.Path, target: pathlib.Path, count: int) -> dict:
    """Gives the command again and again, killed after about even shares of its work."""
    command = [
        *(sys.executable, "-m", "xmc_jax.main", "--mode=predict"),
        *(f"--artifact={arguments.artifact}", f"--input={source}", f"--output={target}"),
        *(f"--predict.k={arguments.k}", f"--predict.index={arguments.index}"),
        "--predict.batch_size=256",
    ]
    progress = target.with_name(f"{target.name}.progress.json")
    kept: list[int] = []
    for number in range(1, arguments.kills + 1):
        wanted = number * count // (arguments.kills + 1)
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        while _documents(progress) < wanted and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL or target.exists():
            raise SystemExit(f"kill {number}: expected a process at work, found it at its end")
        kept.append(_documents(progress))
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return {"documents_kept": kept, "sha256": _digest(target.read_bytes())}


def _documents(progress: pathlib.Path) -> int:
    return json.loads(progress.read_bytes())["documents"] if progress.exists() else 0


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first(path: pathlib.Path, count: int) -> bytes:
    """The first lines of a file."""
    with path.open("rb") as file:
        return b"".join(line for line, _ in zip(file, range(count)))


def measure(arguments: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """All of it.

    Args:
        arguments: flags.
        folder: for the files.
    """
    source, whole = folder / "documents.jsonl", folder / "whole.jsonl"
    draw(arguments.artifact, arguments.documents, arguments.seed, source)
    results: dict[str, Any] = {}
    results["whole"] = found = _measured(arguments, source, whole, arguments.batch_size)
    found["memory_above_model"] = found["rss_peak"] - found["rss_model_loaded"]
    found["bytes"] = whole.stat().st_size
    print(
        f"{found['documents']:,} documents: {found['seconds']:.1f} s, "
        f"{found['documents_per_second']:,.0f} documents/s; "
        f"{found['rss_model_loaded'] / 2**20:,.0f} MiB with the model, at most "
        f"{found['memory_above_model'] / 2**20:,.0f} MiB more",
        flush=True,
    )
    some = folder / "some.jsonl"
    some.write_bytes(_first(source, arguments.some))
    wanted = _digest(_first(whole, arguments.some))
    results["batch_sizes"] = {}
    for size in arguments.sizes:
        one = _measured(arguments, some, folder / f"size-{size}.jsonl", size)
        one["same"] = one["sha256"] == wanted
        results["batch_sizes"][str(size)] = one
        print(f"batches of {size}: the same output: {one['same']}", flush=True)
    results["killed"] = one = _killed(arguments, some, folder / "killed.jsonl", arguments.some)
    one["same"] = one["sha256"] == wanted
    kept = ", ".join(f"{count:,}" for count in one["documents_kept"])
    print(f"killed with {kept} of {arguments.some:,} documents: the same output: {one['same']}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=pathlib.Path, required=True)
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--some", type=int, default=5_000, help="for batch sizes and kills")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 777], help="of batches")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--index", default="auto")
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--source", help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.artifact = arguments.artifact.absolute()
    if arguments.worker:
        worker(arguments)
        return
    from xmc_jax.shipping import artifact

    opened = artifact.open(arguments.artifact)
    with tempfile.TemporaryDirectory() as folder:
        results = measure(arguments, pathlib.Path(folder))
    names = ("documents", "some", "sizes", "kills", "k", "index", "batch_size", "seed")
    content = {
        "benchmark": "predict",
        "settings": {
            **{name: getattr(arguments, name) for name in names},
            "dataset": opened.manifest["dataset"]["name"],
            "backbone": opened.manifest["config"]["encoder"]["backbone"],
            "labels": len(opened.labels),
            "ranking": "augmented" if opened.ranking.enabled else "plain",
        },
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)
    same = [one["same"] for one in (*results["batch_sizes"].values(), results["killed"])]
    if not all(same):
        raise SystemExit("expected the same output every time, got others")


if __name__ == "__main__":
    main()
