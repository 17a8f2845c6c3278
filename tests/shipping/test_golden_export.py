"""A folder that version 0.1.0 exported, before the package was redrawn, opens and ranks as it did.

`tests/golden/export/folder` is of an untrained model of width 8 over the topics of conftest, and
`predictions.json` has what its own version predicted.
"""

import json
import pathlib
import shutil

import numpy as np
import pytest

from xmc_jax.config import NewLabelsConfig, PredictConfig
from xmc_jax.shipping import artifact, labels, predict_files
from xmc_jax.shipping.predictor import Predictor

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "export"


@pytest.mark.parametrize("ranking", ["plain", "augmented"])
def test_it_ranks_as_its_own_version_did(ranking):
    expected = json.loads((GOLDEN / "predictions.json").read_text())
    ranked = Predictor.open(GOLDEN / "folder").predict(expected["texts"], 5, ranking)
    for row, wanted in zip(ranked, expected[ranking], strict=True):
        assert [label.id for label in row] == [name for name, _ in wanted]
        scores = [score for _, score in wanted]
        np.testing.assert_allclose([label.score for label in row], scores, atol=1e-5)


def test_labels_may_be_added_and_files_predicted(tmp_path):
    folder = shutil.copytree(GOLDEN / "folder", tmp_path / "export")
    new = labels.LabelChanges(add=[labels.Label("ckhtts xblmal", id="new")])
    labels.change(folder, new, NewLabelsConfig())
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "1", "text": "ckhtts xblmal"}\n')
    predict_files.predict(artifact.open(folder), PredictConfig(k=41), str(source), str(target))
    (line,) = target.read_text().splitlines()
    assert "new" in [label["id"] for label in json.loads(line)["labels"]]
