"""Prompts of an encoder, one for documents and one for labels, from a folder to predictions."""

import json

import model_cases
import numpy as np
import pytest
from etils import epath

from xmc_jax.config import RunConfig
from xmc_jax.shipping import artifact, contents, exporting
from xmc_jax.shipping.predictor import Predictor
from xmc_jax.shipping.query_encoder import Item
from xmc_jax.training import build

pytestmark = pytest.mark.slow


def test_an_exported_model_puts_them_before_texts(fields, tmp_path):
    folder = model_cases.make("st_prompts", tmp_path)
    titles = model_cases.raw_files(tmp_path / "raw")
    fields = model_cases.fields_of(folder, fields, tmp_path)
    run = build.run(RunConfig.from_dict(fields))
    assert run.data.prompts == ("query: ", "tools: ")
    state = run.initial_state()
    out = exporting.whole(run, 0, state, epath.Path(tmp_path / "run"))
    predictor = Predictor.open(out)
    embedded = predictor.embed(titles[:32])
    np.testing.assert_allclose(
        getattr(embedded, "vectors", embedded), run.embed(state.params, "train"), rtol=0, atol=1e-5
    )
    items = [Item(title) for title in titles[40:]]
    labels = predictor._encoder.encode(items, kind="label")
    np.testing.assert_allclose(labels, run.embed(state.params, "label"), rtol=0, atol=1e-5)
    assert np.abs(labels - predictor._encoder.encode(items)).max() > 0.01
    assert "begin with 'query: ', those of labels with 'tools: '" in (out / "README.md").read_text()

    # a folder that an earlier version exported has none
    path = out / contents.MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["model"]["document_prompt"], manifest["model"]["label_prompt"]
    path.write_text(json.dumps(manifest))
    model = artifact.open(out).model
    assert (model.document_prompt, model.label_prompt) == ("", "")


def test_a_prompt_has_to_fit_beside_a_text(fields, tmp_path):
    folder = model_cases.make("st_prompts", tmp_path)
    model_cases.raw_files(tmp_path / "raw")
    fields = model_cases.fields_of(folder, fields, tmp_path)
    fields["data"]["max_length"] = 4  # as many as [CLS], "query", ":" and [SEP]
    with pytest.raises(
        ValueError, match=r"max_length: expected more than the \d+ tokens that the "
    ):
        build.run(RunConfig.from_dict(fields))
