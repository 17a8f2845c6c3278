"""Balanced clustering beside a plain numpy version of the reference's: how alike leaves are.

python -m benchmarks.clustering --raw=xmc_jax/data/bundled/LF-DebianTitles-3K

The training titles of a raw dataset folder become TF-IDF vectors of words, reduced to --width
numbers by SVD. Both clusterings make the same leaves, as many as the curriculum makes of
--cluster_size, once per seed. "cosine" is the mean over titles of the cosine to the mean direction
of their leaf. Both times are of one process; ours leaves out compilation.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from xmc_jax import rng
from xmc_jax.data import raw
from xmc_jax.training import curriculum


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


def vectors(titles: list[str], width: int) -> np.ndarray:
    """f32[n, width], of length 1: TF-IDF, then SVD."""
    matrix = TfidfVectorizer(sublinear_tf=True).fit_transform(titles)
    found = TruncatedSVD(width, random_state=0).fit_transform(matrix).astype(np.float32)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


def compare(unit: np.ndarray, leaves: int, seeds: int) -> dict[str, np.ndarray]:
    """Both clusterings, once per seed.

    Args:
        unit: f32[n, D], of length 1.
        leaves: a power of two, at most n.
        seeds: how many.

    Returns:
        "ours" and "reference", each f64[seeds, 2]: cosine, and seconds.
    """
    table = jnp.asarray(unit)

    def ours(seed):
        key = rng.key(seed, rng.Stream.KMEANS, 0)
        return np.asarray(curriculum.balanced_kmeans(table, leaves, key)[0])

    found = {
        "ours": ours,
        "reference": lambda seed: reference(unit, leaves, np.random.default_rng(seed)),
    }
    ours(seeds)  # compiles
    results = {name: [] for name in found}
    for seed in range(seeds):
        for name, cluster in found.items():
            start = time.perf_counter()
            order = cluster(seed)
            results[name].append((cosine(unit, order, leaves), time.perf_counter() - start))
    return {name: np.array(rows) for name, rows in results.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=pathlib.Path, required=True, help="raw dataset folder")
    parser.add_argument("--cluster_size", type=int, default=16, help="default 16")
    parser.add_argument("--width", type=int, default=128, help="of the vectors, default 128")
    parser.add_argument("--seeds", type=int, default=5, help="default 5")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    unit = vectors(raw.read_items(arguments.raw / "trn.json.gz").titles, arguments.width)
    leaves = curriculum.num_leaves(len(unit), arguments.cluster_size)
    print(f"{len(unit):,} titles, {leaves:,} leaves, {arguments.seeds} seeds")
    for name, rows in compare(unit, leaves, arguments.seeds).items():
        mean, low, high = rows[:, 0].mean(), rows[:, 0].min(), rows[:, 0].max()
        print(
            f"{name:9}  cosine {mean:.4f} ({low:.4f} to {high:.4f})  {rows[:, 1].mean():.2f} s each"
        )


if __name__ == "__main__":
    main()
