"""Published models: our text tower has the size and the config.json that transformers gives it."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from xmc_jax.models import backbone, decoder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FILES = sorted((pathlib.Path(__file__).parents[1] / "models" / "published").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_tower_is_as_large_as_that_of_torch(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    with torch.device("meta"):
        theirs = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**raw))
    if raw["model_type"] == "gemma3":
        theirs = theirs.language_model
    zeros = jnp.zeros((1, 1), jnp.int32)
    model = decoder.Decoder(backbone.from_hf(raw))
    ours = jax.eval_shape(lambda: model.init(jax.random.key(0), zeros, zeros, zeros))
    count = sum(leaf.size for leaf in jax.tree.leaves(ours))
    assert count == sum(parameter.numel() for parameter in theirs.parameters())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_as_transformers_writes_it_is_as_published(path):
    raw = json.loads(path.read_text(encoding="utf-8"))
    expected = backbone.from_hf(raw)
    for config in (raw, backbone.to_hf(expected)):
        written = transformers.AutoConfig.for_model(**config).to_json_string()
        assert "rope_parameters" in written
        assert backbone.from_hf(json.loads(written)) == expected
