"""Exact search beside the bare product, and ScaNN beside exact search, in one run.

python -m benchmarks.search --raw=.../LF-DebianTitles-26K --output benchmarks/results/search.json

Rows are embeddings, by the packaged MiniLM, of the raw folder's label titles and of variants of
them up to --rows: one to three words dropped, put in or replaced, as names of products differ.
Queries are embeddings of --queries documents, indexes are tuned on others.

    product    queries x rows by blocks of queries, all scores materialised, nothing looked for
    exact      `exact.search` with the same blocks, end to end: from queries on the host to the best
               --k on the host; the rows are on the device
    scann      `ScannIndex.search` of all queries, end to end, on all cores

They take turns; figures are medians over turns, ratios medians of the ratios within a turn. The
curve is of indexes of the label titles alone, tuned to each of --curve; --plot draws it
(matplotlib). --cache is a folder in which the embeddings stay.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment, save
from configs import vixml
from xmc_jax.config import MeshConfig, RunConfig, ScannConfig
from xmc_jax.data import raw, raw_folder
from xmc_jax.retrieval import exact, scann
from xmc_jax.runtime import command, sharding
from xmc_jax.training import build

PACKAGES = ("jax", "jaxlib", "numpy", "scann")
FLOOR = ScannConfig(brute_force_below=0, leaves_searched=1e-6, reorder=1.0)


def varied(titles: list[str], count: int, generator: np.random.Generator) -> list[str]:
    """The titles, and variants of them up to `count`.

    Args:
        titles: what is varied, each about as often.
        count: at least as many as titles.
        generator: of what is changed.
    """
    words = [title.split() for title in titles]
    known = np.array([word for title in words for word in title])

    def variant(title: list[str]) -> str:
        title = list(title)
        for _ in range(generator.integers(1, 4)):
            at, kind = int(generator.integers(len(title))), generator.integers(3)
            if kind == 0 and len(title) > 3:
                title.pop(at)
            elif kind == 1:
                title[at] = str(generator.choice(known))
            else:
                title.insert(at, str(generator.choice(known)))
        return " ".join(title)

    chosen = generator.integers(0, len(titles), count - len(titles))
    return titles + [variant(words[i]) for i in chosen]


def label_titles(folder: pathlib.Path) -> list[str]:
    """The titles of a raw folder's labels."""
    return raw.read_items(raw_folder.find(folder)["label"]).titles


def embeddings(source: pathlib.Path, rows: int) -> dict[str, np.ndarray]:
    """f32[n, 384] of "label" titles and their variants, and of "train" and "test" titles."""
    titles = varied(label_titles(source), rows, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder, "raw")
        shutil.copytree(source, copy)
        with (copy / "lbl.json").open("w", encoding="utf-8") as file:  # read before all others
            for number, title in enumerate(titles):
                file.write(json.dumps({"uid": str(number), "title": title}) + "\n")
        fields = vixml.get_config("minilm_l6/debian_26k,ngame").to_dict()
        fields["data"] |= {
            "raw_dir": str(copy),
            "dataset": "variants",
            "data_dir": folder,
            "max_length": 32,
        }
        run = build.run(RunConfig.from_dict(fields))
        params = run.initial_params(run.abstract.params)
        return {split: run.embed(params, split) for split in ("label", "train", "test")}


def cached(source: pathlib.Path, rows: int, cache: pathlib.Path | None) -> dict[str, np.ndarray]:
    """`embeddings`, of the folder `cache` if they are there."""
    names = ("label", "train", "test")
    if cache is not None and all((cache / f"{name}.npy").exists() for name in names):
        found = {name: np.load(cache / f"{name}.npy", allow_pickle=False) for name in names}
        if len(found["label"]) == rows:
            return found
    found = embeddings(source, rows)
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        for name in names:
            np.save(cache / f"{name}.npy", found[name])
    return found


def in_turn(calls: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each call in each turn, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, turns):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def recall(ids: np.ndarray, exactly: np.ndarray) -> float:
    """Mean share of the exact rows that were found; i32[Q, k] each."""
    return float(np.mean([np.isin(a, b).mean() for a, b in zip(exactly, ids)]))


def describe(index: scann.ScannIndex) -> dict[str, Any]:
    """What an index was tuned to."""
    names = ("leaves", "dimensions_per_block", "leaves_searched", "reorder")
    return {name: getattr(index.config, name) for name in names}


def measure(
    rows: np.ndarray, queries: np.ndarray, others: np.ndarray, settings: argparse.Namespace
) -> dict[str, Any]:
    """Product, exact search and an index tuned to --recall_target."""
    mesh, k = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1]), settings.k
    database = exact.place(rows, mesh)
    multiply = jax.jit(lambda q, d: jnp.einsum("qd,ld->ql", q, d, precision="highest"))
    blocks = np.array_split(queries, -(-len(queries) // exact.QUERY_BLOCK))
    start = time.perf_counter()
    config = ScannConfig(brute_force_below=0, recall_target=settings.recall_target)
    index = scann.ScannIndex.build(rows, config, others, k)
    built = time.perf_counter() - start
    floor = scann.ScannIndex.build(rows, FLOOR, others, k)

    def product() -> None:
        for block in blocks:
            multiply(jnp.asarray(block), database.rows).block_until_ready()

    seconds = in_turn(
        {
            "product": product,
            "exact": lambda: exact.search(queries, database, k),
            "scann": lambda: index.search(queries, k),
            "scann, least work": lambda: floor.search(queries, k),
        },
        settings.turns,
    )
    found = index.search(queries, k)[1]
    return {
        "seconds": seconds,
        "queries_per_second": {
            name: len(queries) / statistics.median(taken) for name, taken in seconds.items()
        },
        "exact_share_of_product": ratio(seconds["product"], seconds["exact"]),
        "scann_times_exact": ratio(seconds["exact"], seconds["scann"]),
        "least_work_times_exact": ratio(seconds["exact"], seconds["scann, least work"]),
        "recall": recall(found, exact.search(queries, database, k)[1]),
        "index": describe(index) | {"build_seconds": built},
    }


def curve(
    rows: np.ndarray, queries: np.ndarray, others: np.ndarray, settings: argparse.Namespace
) -> dict[str, Any]:
    """Recall and speed of an index tuned to each of --curve, and the speed of exact search."""
    mesh = sharding.make_mesh(MeshConfig(data=1), jax.devices()[:1])
    database, points = exact.place(rows, mesh), []
    exactly = exact.search(queries, database, settings.k)[1]
    for target in settings.curve:
        config = ScannConfig(brute_force_below=0, recall_target=target)
        index = scann.ScannIndex.build(rows, config, others, settings.k)
        seconds = in_turn(
            {
                "exact": lambda: exact.search(queries, database, settings.k),
                "scann": lambda index=index: index.search(queries, settings.k),
            },
            settings.turns,
        )
        points.append(
            {
                "target": target,
                "recall": recall(index.search(queries, settings.k)[1], exactly),
                "queries_per_second": len(queries) / statistics.median(seconds["scann"]),
                "exact_queries_per_second": len(queries) / statistics.median(seconds["exact"]),
                "times_exact": ratio(seconds["exact"], seconds["scann"]),
                **describe(index),
            }
        )
    return {"rows": len(rows), "points": points}


def plot(content: dict[str, Any], path: pathlib.Path) -> None:
    """Draws speed over recall of the curve, beside exact search."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = content["results"]["curve"]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    recalls = [point["recall"] for point in found["points"]]
    rates = [point["queries_per_second"] for point in found["points"]]
    axes.plot(recalls, rates, "o-", label="ScaNN, tuned to a target")
    for point in found["points"]:
        place = point["recall"], point["queries_per_second"]
        axes.annotate(f"{point['target']:g}", place, (4, 4), textcoords="offset points")
    exactly = statistics.median(point["exact_queries_per_second"] for point in found["points"])
    axes.axhline(exactly, color="black", linestyle="--", label="exact search")
    axes.set(
        xlabel=f"share of the exact {content['settings']['k']} that is found",
        ylabel="queries/s",
        title=f"{found['rows']:,} labels, {content['cores']} cores of an {content['processor']}",
        ylim=(0, 1.1 * max(rates)),
    )
    axes.margins(x=0.1)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")


def show(results: dict[str, Any]) -> None:
    """Prints what was measured."""
    for name, rate in results["queries_per_second"].items():
        print(f"{name:18} {rate:9,.0f} queries/s")
    print(f"exact search runs at {results['exact_share_of_product']:.2f} of the product's rate")
    print(
        f"ScaNN finds {100 * results['recall']:.2f} % at {results['scann_times_exact']:.2f} times "
        f"the speed of exact search; with one leaf and k candidates it does "
        f"{results['least_work_times_exact']:.2f} times, at any recall"
    )
    print(f"{results['curve']['rows']:,} rows:")
    for point in results["curve"]["points"]:
        print(
            f"  target {point['target']:.3f}  recall {point['recall']:.4f}  "
            f"{point['queries_per_second']:9,.0f} queries/s, {point['times_exact']:.2f} times exact"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=pathlib.Path, required=True, help="raw dataset folder")
    parser.add_argument("--rows", type=int, default=131_073, help="default 131,073")
    parser.add_argument("--queries", type=int, default=10_000, help="default 10,000")
    parser.add_argument("--k", type=int, default=100, help="default 100")
    parser.add_argument("--recall_target", type=float, default=0.98, help="default 0.98")
    parser.add_argument("--curve", type=float, nargs="*", default=[0.8, 0.9, 0.95, 0.98, 0.99])
    parser.add_argument("--turns", type=int, default=5, help="default 5")
    parser.add_argument("--cache", type=pathlib.Path, help="folder of the embeddings")
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--plot", type=pathlib.Path, help="draw the curve there")
    arguments = parser.parse_args()
    command.keep_freed_memory()
    jax.config.update("jax_platforms", "cpu")
    found = cached(arguments.raw, arguments.rows, arguments.cache)
    documents = np.concatenate([found["test"], found["train"]])
    queries, others = documents[: arguments.queries], documents[arguments.queries :]
    if len(others) < arguments.k or len(found["label"]) < arguments.k:
        parser.error(f"--queries: expected documents and rows left over, got {len(others)} left")
    results = measure(found["label"], queries, others, arguments)
    titles = len(label_titles(arguments.raw))
    results["curve"] = curve(found["label"][:titles], queries, others, arguments)
    show(results)
    names = ("rows", "queries", "k", "recall_target", "turns")
    content = {
        "benchmark": "search",
        "settings": {"raw": arguments.raw.name} | {n: getattr(arguments, n) for n in names},
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)
    if arguments.plot is not None:
        plot(content, arguments.plot)


if __name__ == "__main__":
    main()
