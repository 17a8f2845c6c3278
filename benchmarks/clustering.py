"""Balanced clustering beside a plain numpy version of the reference's: how alike leaves are, time.

python -m benchmarks.clustering --raw=xmc_jax/data/bundled/LF-DebianTitles-3K
python -m benchmarks.clustering --raw=.../LF-DebianTitles-26K --vectors=minilm --leaves 4096 32768

The vectors are of a raw dataset folder:

    tfidf     the training texts, as TF-IDF vectors of words, reduced to --width numbers by SVD
    minilm    the texts of training documents, labels and test documents, in this order, as the
              packaged MiniLM embeds them; 384 numbers

Both clusterings make the same leaves, as many as --leaves says, by default as the curriculum makes
of --cluster_size. "cosine" is the mean over titles of the cosine to the mean direction of their
leaf; "seconds" are of one process, in turn where both cluster with a seed, and leave out
compilation, which is in "first_seconds". "leaf_sizes" are of the smallest and the largest leaf of
all seeds.

The results go to --output: "benchmark", "settings", environment and "results", by leaves.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from benchmarks import raw_data
from benchmarks.environment import environment, save
from benchmarks.raw_data import RawData
from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.runtime import rng
from xmc_jax.training import build, curriculum

PACKAGES = ("jax", "jaxlib", "numpy", "scikit-learn")
_NAMES = ("ours", "reference")


def reference(unit: np.ndarray, leaves: int, generator: np.random.Generator) -> np.ndarray:
    """Recursive balanced 2-means as pyxclib defines it, cluster by cluster.

    A cluster starts from two of its points, is cut at the median of the difference of similarities,
    and is done when its mean similarity to its half's centre gains less than 1e-4.

    Args:
        unit: f32[n, D], of length 1.
        leaves: a power of two, at most n.
        generator: of the points that clusters start from.

    Returns:
        i32[n], points leaf by leaf.

    Source: NGAME; pyxclib, b_kmeans_dense.
    """
    clusters = [np.arange(len(unit), dtype=np.int32)]
    while len(clusters) < leaves:
        clusters = [half for members in clusters for half in _halve(unit, members, generator)]
    return np.concatenate(clusters)


def _halve(unit: np.ndarray, members: np.ndarray, generator) -> list[np.ndarray]:
    points = unit[members]
    centers = points[generator.choice(len(points), 2, replace=False)]
    before, now = -np.inf, -2.0
    while now - before >= 1e-4:
        similarity = points @ centers.T
        halves = np.array_split(np.argsort(similarity[:, 1] - similarity[:, 0]), 2)
        centers = np.stack([points[half].mean(axis=0) for half in halves])
        centers /= np.maximum(np.linalg.norm(centers, axis=1, keepdims=True), 1e-12)
        sums = [(points[half] @ center).sum() for half, center in zip(halves, centers)]
        before, now = now, sum(sums) / len(points)
    return [members[half] for half in halves]


def cosine(unit: np.ndarray, order: np.ndarray, leaves: int) -> float:
    """The mean cosine of points to the mean direction of their leaf.

    Args:
        unit: f32[n, D], of length 1.
        order: i32[n], points leaf by leaf.
        leaves: how many.
    """
    sizes = curriculum.leaf_sizes(len(unit), leaves)
    sums = np.add.reduceat(unit[order], np.cumsum(sizes) - sizes, axis=0, dtype=np.float64)
    # The cosines of a leaf's points add up to the length of their sum.
    return float(np.linalg.norm(sums, axis=1).sum() / len(unit))


def tfidf_vectors(data: RawData, width: int) -> np.ndarray:
    """f32[N, width], of length 1: training texts as TF-IDF vectors, reduced by SVD.

    Args:
        data: the raw folder.
        width: numbers of a vector.
    """
    texts = data.read().splits["train"].texts(data.text)
    matrix = TfidfVectorizer(sublinear_tf=True).fit_transform(texts)
    found = TruncatedSVD(width, random_state=0).fit_transform(matrix).astype(np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def minilm_vectors(data: RawData) -> np.ndarray:
    """f32[N + L + M, 384], of length 1: all texts by the packaged MiniLM, untrained.

    Args:
        data: the raw folder.
    """
    fields = vixml.get_config("minilm_l6/debian_26k,ngame").to_dict()
    with tempfile.TemporaryDirectory() as made:
        fields["data"] |= data.fields() | {"data_dir": made}
        fields["train"]["batch_size"] = jax.device_count()  # no step is taken
        run = build.run(RunConfig.from_dict(fields))
        params = run.initial_params(run.abstract.params)
        return np.concatenate([run.embed(params, split) for split in ("train", "label", "test")])


def compare(
    unit: np.ndarray, leaves: int, seeds: int, reference_seeds: int | None = None
) -> dict[str, Any]:
    """Both clusterings, once per seed.

    Args:
        unit: f32[n, D], of length 1.
        leaves: a power of two, at most n.
        seeds: how many.
        reference_seeds: how many of them, the first, the reference clusters with too; all of them
            by default.

    Returns:
        "ours" and "reference", each with "cosine" and "seconds", a number per seed; "leaf_sizes",
        our smallest and largest; "first_seconds", of our first clustering, compilation included.
    """
    table = jnp.asarray(unit)

    def ours(seed: int) -> tuple[np.ndarray, np.ndarray]:
        key = rng.key(seed, rng.Stream.KMEANS, 0)
        return jax.device_get(curriculum.balanced_kmeans(table, leaves, key))

    first_seconds, _ = _timed(ours, seeds)
    results: dict[str, Any] = {name: {"cosine": [], "seconds": []} for name in _NAMES}
    sizes = []
    for seed in range(seeds):
        seconds, (order, leaf_of) = _timed(ours, seed)
        _add(results["ours"], unit, order, leaves, seconds)
        sizes += np.bincount(leaf_of, minlength=leaves).tolist()
        if reference_seeds is None or seed < reference_seeds:
            generator = np.random.default_rng(seed)
            seconds, order = _timed(reference, unit, leaves, generator)
            _add(results["reference"], unit, order, leaves, seconds)
    return results | {"leaf_sizes": [min(sizes), max(sizes)], "first_seconds": first_seconds}


def _timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def _add(results: dict[str, list], unit: np.ndarray, order, leaves: int, seconds: float) -> None:
    results["cosine"].append(cosine(unit, order, leaves))
    results["seconds"].append(seconds)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; what it printed, as it is written to --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    raw_data.add_flags(parser)
    parser.add_argument("--vectors", choices=("tfidf", "minilm"), default="tfidf")
    parser.add_argument("--leaves", type=int, nargs="+", help="powers of two")
    parser.add_argument("--cluster_size", type=int, default=16, help="without --leaves; default 16")
    parser.add_argument("--width", type=int, default=128, help="of TF-IDF vectors, default 128")
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    parser.add_argument("--reference_seeds", type=int, help="by default as many")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    arguments = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    data = raw_data.of(arguments)
    if arguments.vectors == "minilm":
        unit = minilm_vectors(data)
    else:
        unit = tfidf_vectors(data, arguments.width)
    results = {}
    for leaves in arguments.leaves or [curriculum.num_leaves(len(unit), arguments.cluster_size)]:
        found = compare(unit, leaves, arguments.seeds, arguments.reference_seeds)
        results[str(leaves)] = found
        low, high = found["leaf_sizes"]
        print(f"{len(unit):,} titles, {leaves:,} leaves of {low} to {high}", flush=True)
        for name in _NAMES:
            cosines, seconds = found[name]["cosine"], found[name]["seconds"]
            print(
                f"{name:9}  cosine {statistics.mean(cosines):.4f} ({min(cosines):.4f} to "
                f"{max(cosines):.4f})  {statistics.median(seconds):.2f} s each, of {len(seconds)}",
                flush=True,
            )
    content = {
        "benchmark": "clustering",
        "settings": {
            "dataset": data.dataset,
            "vectors": arguments.vectors,
            "shape": list(unit.shape),
            "seeds": arguments.seeds,
        },
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)
    return content


if __name__ == "__main__":
    main()
