"""benchmarks/clustering.py: the reference's algorithm in numpy, and ours beside it."""

import json

import numpy as np
import pytest

from benchmarks import clustering
from xmc_jax.training import curriculum


def blobs(n: int, seed: int = 0) -> np.ndarray:
    """Unit vectors around points of a hierarchy, as texts lie: topics within topics."""
    rng = np.random.default_rng(seed)
    x = sum(
        rng.standard_normal((count, 24), np.float32)[rng.integers(count, size=n)] * weight
        for count, weight in ((6, 1.0), (40, 0.7), (n, 0.5))
    )
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_cosine_is_that_of_points_to_their_leafs_mean():
    unit, order = blobs(11), np.random.default_rng(1).permutation(11)
    total = 0
    for leaf in np.split(order, np.cumsum(curriculum.leaf_sizes(11, 4))[:-1]):
        mean = unit[leaf].mean(0)
        total += (unit[leaf] @ mean / np.linalg.norm(mean)).sum()
    assert clustering.cosine(unit, order, 4) == pytest.approx(total / 11, rel=1e-5)


def test_the_reference_makes_balanced_leaves_of_likes():
    unit = blobs(203)
    order = clustering.reference(unit, 8, np.random.default_rng(0))
    assert sorted(order) == list(range(203))
    shuffled = np.random.default_rng(1).permutation(203)
    assert clustering.cosine(unit, order, 8) > clustering.cosine(unit, shuffled, 8) + 0.2


@pytest.mark.slow
def test_leaves_are_at_least_as_alike_as_the_references():
    found = clustering.compare(blobs(600), 32, seeds=4, reference_seeds=3)
    for name, seeds in (("ours", 4), ("reference", 3)):
        assert len(found[name]["cosine"]) == len(found[name]["seconds"]) == seeds
    assert np.mean(found["ours"]["cosine"]) >= np.mean(found["reference"]["cosine"])
    assert found["leaf_sizes"] == [18, 19]


@pytest.mark.slow
def test_the_command_writes_what_it_measured(topics, tmp_path):
    path = tmp_path / "clustering.json"
    found = clustering.main(
        [
            f"--raw={topics}",
            "--vectors=minilm",
            "--leaves",
            "4",
            "8",
            "--seeds=1",
            f"--output={path}",
        ]
    )
    assert json.loads(path.read_text(encoding="utf-8")) == found
    assert found["settings"]["shape"] == [300, 384]  # of documents, labels and test documents
    assert list(found["results"]) == ["4", "8"]
    for each in found["results"].values():
        assert np.ptp(each["leaf_sizes"]) <= 1
        assert 0 < each["reference"]["cosine"][0] < each["ours"]["cosine"][0] + 0.01 < 1
