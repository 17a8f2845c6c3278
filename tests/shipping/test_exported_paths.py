"""No path of the machine that exports is in what it exports."""

import pathlib
import types

import numpy as np
import safetensors.numpy

from xmc_jax.config import RunConfig
from xmc_jax.data import rows
from xmc_jax.data.types import NO_PROMPTS
from xmc_jax.models import hf
from xmc_jax.shipping import cards, exporting


def test_paths_are_reduced_to_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw" / "Own").mkdir(parents=True)
    config = {
        "data": {"raw_dir": "raw/Own", "records": str(tmp_path / "new.csv"), "data_dir": "data"},
        "encoder": {"backbone": "sentence-transformers/all-MiniLM-L6-v2", "revision": None},
        "prior": "gs://bucket/folder/prior.csv",
        "tokenizer": "~/models/own",
        "lr": (("backbone/.*", 0.5),),
    }
    assert cards.public(config) == {
        "data": {"raw_dir": "Own", "records": "new.csv", "data_dir": "data"},
        "encoder": {"backbone": "sentence-transformers/all-MiniLM-L6-v2", "revision": None},
        "prior": "prior.csv",
        "tokenizer": "own",
        "lr": [["backbone/.*", 0.5]],
    }


def test_an_image_encoder_in_a_folder_is_carried(tmp_path):
    """It has no name by which others could find it."""
    encoder, folder = tmp_path / "encoder", tmp_path / "export"
    encoder.mkdir()
    folder.mkdir()
    (encoder / "config.json").write_text("{}")
    safetensors.numpy.save_file({"x": np.zeros(2, np.float32)}, encoder / hf.WEIGHTS)
    source = hf.resolve(str(encoder))
    made_by = {"name": str(encoder), "revision": None, "digest": source.digest, "E": 8}
    images = types.SimpleNamespace(manifest={"encoder": made_by, "source": {}})
    run = types.SimpleNamespace(
        data=types.SimpleNamespace(
            images=images,
            train=types.SimpleNamespace(per_item=2),
            special_tokens=True,
            prompts=("", ""),
            manifest={"text": "title"},
        ),
        config=RunConfig(),
        model=types.SimpleNamespace(pooling="mean", compute_dtype="float32"),
        layout=rows.layout(NO_PROMPTS, "image_text", "contiguous", 16, 2, 64),
        sizes=types.SimpleNamespace(width=32),
    )
    found = exporting._model(folder, run).images
    assert (found.encoder, found.folder) == ("encoder", "vision")
    assert pathlib.Path(folder, "vision", hf.WEIGHTS).exists()
