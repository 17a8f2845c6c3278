"""What grows with documents and labels, at the size of LF-AmazonTitles-1.3M, on one host.

python -m benchmarks.scale

Raw files of drawn titles and labels, the dataset folder that `prepare` makes of them, training
batches from it; and, of drawn embeddings, the document clusters of the 1.3M-label recipe's first
clustering, its 65,536 clusters of labels, centroids, exact search, and a ScaNN index. Each stage is
a process of its own. Files go to a temporary folder, or to --folder, where they stay; there, a
stage whose result is on file is not repeated (--again does).

"total_seconds" is a stage as a whole, "processor_seconds" what its threads took of all cores; "rss"
is the most memory that its process held at a time, mapped files included (VmHWM).

The results go to --out: "benchmark", "settings", environment ("processor", "cores", "python",
"versions", "date", "commit") and "results", by stage; bytes, seconds. The commit is git's, else
that in the environment variable COMMIT.
"""

import argparse
import dataclasses
import json
import multiprocessing
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from benchmarks.environment import environment, save
from xmc_jax.config import MeshConfig, ScannConfig

PACKAGES = ("jax", "numpy", "scann", "tokenizers")
_LINES = 1 << 14  # written at a time
_TOPICS = 4096  # that embeddings lie around
_SKEW = 3  # a label's number is L u^3, u uniform: the 1 % most frequent have 22 % of the pairs


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured; the defaults are LF-AmazonTitles-1.3M, but for the embeddings' width.

    Attributes:
        documents: N.
        labels: L.
        tests: M, documents that labels are searched for.
        labels_per_document: the mean; at least 1 each, geometric beyond.
        width: D.
        max_length: T.
        batch: B.
        batches: how many are built.
        cluster_size: documents per leaf.
        free_vectors: clusters of labels.
        k: labels searched for.
        seed: of everything drawn.
    """

    documents: int = 2_250_000
    labels: int = 1_300_000
    tests: int = 10_000
    labels_per_document: int = 22
    width: int = 64
    max_length: int = 16
    batch: int = 2048
    batches: int = 50
    cluster_size: int = 16
    free_vectors: int = 65_536
    k: int = 100
    seed: int = 0


def write_raw(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """The raw files: titles of drawn words, and which labels each document has."""
    from xmc_jax.data import bundled, raw

    titles = raw.read_items(bundled.path("LF-DebianTitles-3K") / "lbl.json.gz").titles
    words = np.array(sorted({word for title in titles for word in title.split()}))
    generator = np.random.default_rng(s.seed)
    (folder / "raw").mkdir(parents=True, exist_ok=True)
    counts = {"trn": s.documents, "tst": s.tests, "lbl": s.labels}
    start = time.perf_counter()
    for name, count in counts.items():
        with (folder / "raw" / f"{name}.raw.txt").open("w", encoding="utf-8") as file:
            for first in range(0, count, _LINES):
                drawn = words[generator.integers(len(words), size=(min(_LINES, count - first), 8))]
                lengths = generator.integers(2, 9, len(drawn))
                rows = zip(drawn.tolist(), lengths.tolist())
                file.writelines(" ".join(row[:length]) + "\n" for row, length in rows)
    names = generator.permutation(s.labels)  # a frequent label may have any number
    pairs = 0
    for name in ("trn", "tst"):
        with (folder / "raw" / f"{name}_X_Y.txt").open("w", encoding="utf-8") as file:
            file.write(f"{counts[name]} {s.labels}\n")
            for first in range(0, counts[name], _LINES):
                size = min(_LINES, counts[name] - first)
                each = generator.geometric(1 / s.labels_per_document, size)
                ranks = s.labels * generator.random(each.sum()) ** _SKEW
                drawn = list(map(str, names[ranks.astype(np.int64)].tolist()))
                ends = np.cumsum(each).tolist()
                rows = zip([0, *ends[:-1]], ends)
                file.writelines(":1 ".join(drawn[a:b]) + ":1\n" for a, b in rows)
                pairs += len(drawn) if name == "trn" else 0
    for name in ("train", "test"):
        (folder / "raw" / f"filter_labels_{name}.txt").write_text("")
    sizes = [path.stat().st_size for path in (folder / "raw").iterdir()]
    return {"seconds": time.perf_counter() - start, "pairs": pairs, "bytes": sum(sizes)}


def make_folder(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """The dataset folder, by `prepare`."""
    from xmc_jax.data import packaged, prepare

    start = time.perf_counter()
    made = prepare.prepare(_config(folder, s))
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in made.iterdir())
    return {"seconds": seconds, "bytes": size, "tokenizer": packaged.MINILM_NAME}


def build_batches(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """Batches in the order of an epoch, as the readers of the pipeline build them."""
    from xmc_jax.data import batches
    from xmc_jax.training import curriculum

    start = time.perf_counter()
    sampler = batches.Sampler(_open(folder, s), s.batch, seed=s.seed)
    opened = time.perf_counter() - start
    start = time.perf_counter()
    plan = curriculum.EpochPlan(s.cluster_size, None)
    order = curriculum.order(plan, np.arange(s.documents, dtype=np.int32), s.seed, 0)
    order = batches.complete(order, s.batch)
    ordered = time.perf_counter() - start
    seconds = []
    for step in range(min(s.batches, len(order) // s.batch)):
        start = time.perf_counter()
        sampler.build(order, step, step)
        seconds.append(time.perf_counter() - start)
    return {
        "open_seconds": opened,
        "order_seconds": ordered,
        "batch_seconds_median": float(np.median(seconds)),
        "batch_seconds_max": max(seconds),
        "documents_per_second": s.batch * len(seconds) / sum(seconds),
    }


def draw_embeddings(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """Unit vectors around common topics, as files."""
    generator = np.random.default_rng(s.seed)
    topics = generator.standard_normal((_TOPICS, s.width), np.float32)
    start = time.perf_counter()
    for name, count in (("train", s.documents), ("test", s.tests), ("label", s.labels)):
        rows = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (count, s.width))
        for first in range(0, count, _LINES):
            part = rows[first : first + _LINES]
            part[:] = topics[generator.integers(_TOPICS, size=len(part))]
            part += generator.standard_normal(part.shape, np.float32)
            part /= np.linalg.norm(part, axis=1, keepdims=True)
        rows.flush()
    return {"seconds": time.perf_counter() - start}


def cluster_documents(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """The leaves of the curriculum's first clustering."""
    import jax

    from xmc_jax.runtime import rng
    from xmc_jax.training import curriculum

    table = jax.device_put(np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False))
    leaves = curriculum.num_leaves(s.documents, s.cluster_size)
    start = time.perf_counter()
    key = rng.key(s.seed, rng.Stream.KMEANS, 1)
    order, leaf_of = curriculum.balanced_kmeans(table, leaves, key)
    order.block_until_ready()
    seconds = time.perf_counter() - start
    sizes = np.bincount(leaf_of, minlength=leaves)
    return {"seconds": seconds, **_leaves(np.asarray(table), np.asarray(leaf_of), sizes)}


def cluster_labels(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """Which free vector each label uses, and their first values."""
    import jax

    from xmc_jax.runtime import rng
    from xmc_jax.training import tables

    table = jax.device_put(np.load(folder / "label.npy", mmap_mode="r", allow_pickle=False))
    start = time.perf_counter()
    key = rng.key(s.seed, rng.Stream.KMEANS, 0)
    vector_of = tables.free_vector_map(table, np.ones(s.labels), s.free_vectors, 0, key)
    clustered = time.perf_counter() - start
    start = time.perf_counter()
    tables.cluster_means(table, vector_of, s.free_vectors).block_until_ready()
    seconds = time.perf_counter() - start
    sizes = np.bincount(vector_of, minlength=s.free_vectors)
    return {
        "seconds": clustered,
        "means_seconds": seconds,
        **_leaves(np.asarray(table), vector_of, sizes),
    }


def make_centroids(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """Mean embeddings of labels over the training pairs."""
    import jax

    from xmc_jax.training import tables

    data = _open(folder, s)
    positives = data.positives("train")
    start = time.perf_counter()
    pairs = tables.label_pairs(positives.indptr, positives.indices, data.num_labels)
    paired = time.perf_counter() - start
    bank = jax.device_put(np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False))
    start = time.perf_counter()
    found = tables.centroids_of(bank, pairs).block_until_ready()
    seconds = time.perf_counter() - start
    few = np.flatnonzero(data.label_frequency <= 50)[: s.k]  # rare ones are soon looked up
    members = np.isin(positives.indices, few)
    documents, labels = positives.row_ids()[members], positives.indices[members]
    for label in few:
        rows = np.asarray(bank)[documents[labels == label]]
        np.testing.assert_allclose(found[label], rows.sum(0) / max(len(rows), 1), atol=1e-5)
    return {
        "pairs": len(positives.indices),
        "pairs_seconds": paired,
        "seconds": seconds,
    }


def search_exact(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """The best labels of the test documents, from a memory-mapped file of labels."""
    import jax

    from xmc_jax.retrieval import exact
    from xmc_jax.runtime import sharding

    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    labels, queries = (
        np.load(folder / f"{x}.npy", mmap_mode="r", allow_pickle=False) for x in ("label", "test")
    )
    start = time.perf_counter()
    database = exact.place(labels, mesh)
    placed = time.perf_counter() - start
    start = time.perf_counter()
    _, ids = exact.search(queries, database, s.k)
    seconds = time.perf_counter() - start
    some = queries[:: -(-len(queries) // 20)]
    scores = some @ labels.T
    best = np.sort(np.partition(scores, -s.k, axis=1)[:, -s.k :], axis=1)
    found = np.take_along_axis(scores, ids[:: -(-len(queries) // 20)], axis=1)
    np.testing.assert_allclose(found, best[:, ::-1], atol=1e-5)
    np.save(folder / "nearest.npy", ids)
    return {
        "place_seconds": placed,
        "seconds": seconds,
        "queries_per_second": len(queries) / seconds,
    }


def search_scann(folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """A ScaNN index of the labels, and its recall of what exact search found."""
    from xmc_jax.retrieval import scann

    labels, queries = (
        np.load(folder / "label.npy", allow_pickle=False),
        np.load(folder / "test.npy", allow_pickle=False),
    )
    start = time.perf_counter()
    index = scann.ScannIndex.build(labels, ScannConfig(), queries[::10], s.k)
    built = time.perf_counter() - start
    start = time.perf_counter()
    _, ids = index.search(queries, s.k)
    seconds = time.perf_counter() - start
    nearest = np.load(folder / "nearest.npy", allow_pickle=False)
    hits = sum(len(np.intersect1d(a, b)) for a, b in zip(ids, nearest))
    return {
        "build_seconds": built,
        "seconds": seconds,
        "queries_per_second": len(queries) / seconds,
        "recall": hits / nearest.size,
    }


STAGES = {
    "raw": write_raw,
    "prepare": make_folder,
    "batches": build_batches,
    "embeddings": draw_embeddings,
    "cluster_documents": cluster_documents,
    "cluster_labels": cluster_labels,
    "centroids": make_centroids,
    "exact": search_exact,
    "scann": search_scann,
}
"""Name -> what it does, in a folder with the files of those before it."""


def run_stage(name: str, folder: pathlib.Path, s: Settings) -> dict[str, Any]:
    """What a stage finds, its whole time and its memory; to be called in a new process."""
    start = time.perf_counter(), time.process_time()
    found = STAGES[name](folder, s)
    total = time.perf_counter() - start[0]
    processor = time.process_time() - start[1]
    [line] = [x for x in pathlib.Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
    return {
        **found,
        "total_seconds": total,
        "processor_seconds": processor,
        "rss": 1024 * int(line.split()[1]),
    }


def _config(folder: pathlib.Path, s: Settings):
    from xmc_jax.data import packaged
    from xmc_jax.data.prepare import PrepareConfig

    return PrepareConfig(
        dataset="Scale-Titles",
        data_dir=folder / "data",
        tokenizer=str(packaged.minilm()),
        tokenizer_name=packaged.MINILM_NAME,
        max_length=s.max_length,
        raw=folder / "raw",
    )


def _open(folder: pathlib.Path, s: Settings):
    from xmc_jax.data import store

    return store.open(_config(folder, s).folder)


def _leaves(table: np.ndarray, leaf_of: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """How many leaves, how large, and the mean cosine of rows to their leaf's mean direction."""
    if np.ptp(sizes) > 1:
        raise RuntimeError(
            f"expected leaves that differ by one, got {sizes.min()} to {sizes.max()}"
        )
    order = np.argsort(leaf_of, kind="stable")
    sums = np.add.reduceat(table[order], np.cumsum(sizes) - sizes, axis=0)
    return {
        "leaves": len(sizes),
        "leaf_sizes": [int(sizes.min()), int(sizes.max())],
        "cosine": float(np.linalg.norm(sums, axis=1).sum() / len(table)),
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        default = field.default
        parser.add_argument(f"--{field.name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--folder", type=pathlib.Path, help="of the files; by default a new one")
    parser.add_argument("--again", nargs="*", choices=STAGES, default=(), help="stages to repeat")
    out = pathlib.Path(__file__).parent / "results" / "scale.json"
    parser.add_argument("--out", type=pathlib.Path, default=out, help="JSON file of the results")
    arguments = parser.parse_args(sys.argv[1:] if argv is None else argv)
    fields = dataclasses.fields(Settings)
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields})
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in STAGES:
            record = folder / f"{name}.json"
            if not record.exists() or name in arguments.again:
                with ProcessPoolExecutor(1, mp_context=spawn) as process:
                    found = process.submit(run_stage, name, folder, settings).result()
                record.write_text(json.dumps({"settings": dataclasses.asdict(settings)} | found))
            found = json.loads(record.read_text())
            if found.pop("settings") != dataclasses.asdict(settings):
                parser.error(
                    f"{record}: expected these settings, found others; name a new --folder"
                )
            results[name] = found
            figures = "  ".join(_shown(*item) for item in found.items())
            print(f"{name:18}{figures}", flush=True)
    seconds = sum(found["total_seconds"] for found in results.values())
    peak = max(found["rss"] for found in results.values())
    print(f"{'all':18}{seconds:,.0f} s  rss {peak / 2**30:.1f} GiB")
    content = {
        "benchmark": "scale",
        "settings": dataclasses.asdict(settings),
        **environment(PACKAGES),
        "results": results | {"all": {"total_seconds": seconds, "rss": peak}},
    }
    save(arguments.out, content)
    return content


def _shown(name: str, value: Any) -> str:
    if name in ("rss", "bytes"):
        return f"{name} {value / 2**30:.2f} GiB"
    if isinstance(value, float):
        return f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value}"


if __name__ == "__main__":
    main()
