"""benchmarks/scale.py: every stage, on little."""

import json

import pytest

from benchmarks import scale
from xmc_jax.retrieval import scann

pytestmark = pytest.mark.usefixtures("optimized")
SMALL = scale.Settings(
    documents=400,
    labels=150,
    tests=30,
    labels_per_document=4,
    width=8,
    batch=64,
    batches=3,
    cluster_size=16,
    free_vectors=16,
    k=10,
)


@pytest.mark.slow
def test_stages_follow_one_another(tmp_path):
    found = {}
    for name in scale.STAGES:
        if name != "scann" or scann.available():
            found[name] = scale.run_stage(name, tmp_path, SMALL)
    assert json.loads(json.dumps(found)) == found
    assert all(stage["rss"] > 0 and stage["total_seconds"] > 0 for stage in found.values())
    assert 400 * 3 < found["raw"]["pairs"] < 400 * 5
    assert found["centroids"]["pairs"] <= found["raw"]["pairs"]  # a label drawn twice counts once
    assert found["cluster_documents"]["leaves"] == 32
    assert found["cluster_documents"]["leaf_sizes"] == [12, 13]
    assert found["cluster_labels"]["leaf_sizes"] == [9, 10]
    assert found.get("scann", {"recall": 1})["recall"] == 1  # so few are searched exhaustively
