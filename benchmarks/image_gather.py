"""Training batches gathered from an image folder on disk: items per second, and memory.

python -m benchmarks.image_gather

The real writer makes a folder of drawn vectors, 0 to 5 of each item, in a temporary folder or in
--folder, where it stays and is used again. Then batches of random documents and labels are gathered
as training does it, in a new process each: "cold", the files dropped from the page cache before, as
far as the system does so, and "warm", after the whole files were read once.

"rss_anon" is what the process holds beyond files, with a batch in its hands, Python and JAX
included; "gather_peak" what a gather takes at most, temporary arrays included. "anonymous_bytes" is
their sum, though both count the batch. "rss_file" is page cache that the process has mapped: the
system takes it back when it needs it. "major_faults" are reads that had to wait for the disk.

The results go to --out: "benchmark", "settings", environment ("processor", "cores", "python",
"versions", "date", "commit") and "results"; bytes, seconds. The commit is git's, else that in the
environment variable COMMIT.
"""

import argparse
import dataclasses
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from benchmarks.environment import environment, save
from xmc_jax.data import image_vectors, image_writer

PACKAGES = ("numpy",)
LABELS = 0.4  # of all items; the others are training documents
_CODES = 2048  # whole numbers that float16 keeps: a row's first number is its own, modulo these
_ITEMS = 4096  # written at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are the recipes with SigLIP 2's vectors.

    Attributes:
        rows: images in all.
        width: E.
        batch: B documents, and as many labels.
        images_per_item: K.
        batches: gathered.
        seed: of everything drawn.
    """

    rows: int = 1_000_000
    width: int = 1152
    batch: int = 2048
    images_per_item: int = 3
    batches: int = 100
    seed: int = 0


def write(folder: pathlib.Path, settings: Settings) -> None:
    """Makes the image folder, if it is not there.

    Args:
        folder: where.
        settings: what is measured.
    """
    s = settings
    generator = np.random.default_rng(s.seed)
    counts = generator.integers(0, 2 * s.images_per_item, 4 * s.rows)
    counts = counts[: int(np.searchsorted(np.cumsum(counts), s.rows)) + 1]
    counts[-1] -= counts.sum() - s.rows
    labels = round(LABELS * len(counts))
    of = {"train": counts[labels:], "test": counts[:0], "label": counts[:labels]}
    noise = generator.standard_normal((2 * s.images_per_item * _ITEMS, s.width)).astype(np.float16)
    encoder = {"name": "drawn", "revision": None, "digest": str(s.seed)}
    items = {split: len(of[split]) for split in of}
    source = {"rows": s.rows, "images_per_item": s.images_per_item}
    with image_writer.ImageWriter(folder, items, s.width, "Synthetic", encoder, source) as writer:
        for split in of:
            for start in range(writer.written[split], items[split], _ITEMS):
                block = of[split][start : start + _ITEMS]
                vectors = noise[: block.sum()]
                first = of[split][:start].sum()
                vectors[:, 0] = np.arange(first, first + len(vectors)) % _CODES
                writer.extend(split, start, block, vectors)
        writer.finish()


def measure(folder: pathlib.Path, settings: Settings, cold: bool) -> dict[str, Any]:
    """Gathers batches; to be called in a new process.

    Args:
        folder: of `write`.
        settings: what is measured.
        cold: the files are dropped from the page cache first, else read.

    Raises:
        RuntimeError: a vector is not the one that was written.
    """
    s = settings
    for file in sorted(folder.glob("*.npy")):
        _drop(file) if cold else _read(file)
    store = image_vectors.open(folder)
    generator = np.random.default_rng(s.seed + 1)
    seconds, anonymous, mapped = [], 0, 0
    faults = _major_faults()
    for _ in range(s.batches):
        ids = [
            (store.train, generator.choice(len(store.train), s.batch, replace=False)),
            (store.label, generator.integers(len(store.label), size=s.batch)),
        ]
        start = time.perf_counter()
        batch = [rows.gather(which, s.images_per_item) for rows, which in ids]
        seconds.append(time.perf_counter() - start)
        anonymous, mapped = max(anonymous, _rss("RssAnon")), max(mapped, _rss("RssFile"))
        for (rows, which), (found, count) in zip(ids, batch):
            expected = np.where(count, rows.indptr[which] % _CODES, 0)
            if not np.array_equal(found[:, 0, 0], expected):
                raise RuntimeError(f"{folder}: expected the rows of {which}, got others")
    faults = _major_faults() - faults
    tracemalloc.start()
    for rows, which in ids:
        rows.gather(which, s.images_per_item)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    items = 2 * s.batch * s.batches
    return {
        "items": items,
        "items_per_second": items / sum(seconds),
        "batch_seconds_median": float(np.median(seconds)),
        "batch_seconds_max": max(seconds),
        "anonymous_bytes": anonymous + peak,
        "rss_anon": anonymous,
        "gather_peak": peak,
        "rss_file": mapped,
        "major_faults": faults,
    }


def _drop(file: pathlib.Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())  # a page that is not written yet stays
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(file: pathlib.Path) -> None:
    with file.open("rb") as opened:
        while opened.read(1 << 22):
            pass


def _rss(kind: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith(kind)]
    return 1024 * int(line.split()[1])


def _major_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        default = field.default
        parser.add_argument(f"--{field.name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", type=pathlib.Path, help="of the vectors; by default a new one")
    out = pathlib.Path(__file__).parent / "results" / "image_gather.json"
    parser.add_argument("--out", type=pathlib.Path, default=out, help="JSON file of the results")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    fields = dataclasses.fields(Settings)
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields})
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or pathlib.Path(temporary)) / "images-rows"
        start = time.perf_counter()
        write(folder, settings)
        written = time.perf_counter() - start
        found = image_vectors.open(folder).manifest
        results: dict[str, Any] = {
            "items": found["counts"],
            "images": sum(found["images"].values()),
            "file_bytes": sum(facts["bytes"] for facts in found["files"].values()),
            "write_seconds": written,
        }
        spawn = multiprocessing.get_context("spawn")
        for name in ("cold", "warm"):
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                results[name] = process.submit(measure, folder, settings, name == "cold").result()
    for name in ("cold", "warm"):
        figures = results[name]
        print(
            f"{name}  {figures['items_per_second']:,.0f} items/s"
            f"  {figures['anonymous_bytes'] / 2**20:,.0f} MiB anonymous"
            f"  {figures['rss_file'] / 2**20:,.0f} MiB of page cache mapped"
            f"  {figures['major_faults']:,} major faults"
        )
    content = {
        "benchmark": "image_gather",
        "settings": dataclasses.asdict(settings),
        **environment(PACKAGES),
        "results": results,
    }
    save(arguments.out, content)
    return content


if __name__ == "__main__":
    main()
