"""The recipes as they are, over a handful of documents and labels: a table, a model, an index."""

import pathlib

import jax
import numpy as np
import pytest

from configs import vixml
from xmc_jax import build
from xmc_jax.export import write
from xmc_jax.inference.predictor import Predictor
from xmc_jax.training import loop

CASES = pathlib.Path(__file__).parents[1] / "cases" / "records"


def written(folder: pathlib.Path, documents: int, labels: int, most: int) -> pathlib.Path:
    """Records of so many training documents and labels; a document has up to `most` labels."""
    generator, words = np.random.default_rng(0), ["tea", "pot", "dog", "toy", "red", "blue", "card"]
    folder.mkdir()

    def text() -> str:
        return " ".join(generator.choice(words, 3))

    def document(name: str) -> str:
        count = generator.integers(1, min(most, labels) + 1)
        chosen = generator.choice(labels, count, replace=False)
        return f"{name},{text()} {name},{'|'.join(f'l{label}' for label in chosen)}\n"

    lines = "".join(f"l{label},{text()}\n" for label in range(labels))
    (folder / "labels.csv").write_text(f"id,text\n{lines}")
    for split, count in (("train", documents), ("test", 3)):
        lines = "".join(document(f"{split}{number}") for number in range(count))
        (folder / f"{split}.csv").write_text(f"id,text,labels\n{lines}")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "records", "k", "devices"),
    [
        ("minilm_l6/own", CASES / "f01_readme_shop", 100, 1),
        ("minilm_l6/own,margin", CASES / "few_labels", 3, 8),
        ("tiny,ngame", (1, 1, 1), 2, 8),
        ("tiny,ema", (19, 17, 17), 20, 2),
    ],
)
def test_a_recipe_ends_in_a_table_and_a_model(backbone, tmp_path, variant, records, k, devices):
    if isinstance(records, tuple):
        records = written(tmp_path / "records", *records)
    fields = vixml.get_config(variant).to_dict()
    fields["data"] |= {"dataset": "Few", "records": str(records), "data_dir": str(tmp_path)}
    fields["encoder"] |= {"backbone": str(backbone), "layers": None}
    fields["train"] |= {"encode_batch_size": 64}  # of random weights, nothing but speed
    fields["eval"] |= {"k": k, "index": "scann"}
    fields["eval"]["scann"]["brute_force_below"] = 0
    run = build.run(fields, jax.devices()[:devices])
    trained = loop.train(run, tmp_path / "run")
    found = min(k, run.data.num_labels)
    for row, ids in trained.evaluation.ids.items():
        assert ids.shape == (run.data.num_test, k), row
        assert ((ids >= 0).sum(axis=1) == found).all(), row
        assert 0 <= trained.evaluation.metrics[row]["P@1"] <= 1
    folder = write.whole(fields, run, trained.step, trained.state, tmp_path)
    ranked = Predictor.open(folder, index="exact").predict(["red tea pot", "dog"], k)
    assert [len(one) for one in ranked] == [found] * 2
