"""What `--mode=export` writes, opened by sentence-transformers: the embeddings are ours."""

import copy
import gzip
import json

import jax
import llm_tokenizers
import numpy as np
import pytest
from etils import epath

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import packaged
from xmc_jax.shipping import exporting
from xmc_jax.shipping.predictor import Predictor
from xmc_jax.training import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
CONFIGS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3_embedding": transformers.Qwen3Config,
    "llama": transformers.LlamaConfig,
    "gemma3": transformers.Gemma3TextConfig,
}
SUFFIX = {"qwen2": "<|endoftext|>", "qwen3_embedding": "", "llama": "", "gemma3": "<eos>"}


def pretrained(family: str, folder):
    """A tiny random model of a family with a tokenizer in that family's files."""
    llm_tokenizers.build(family, folder)
    vocabulary = max(
        token["id"] for token in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    )
    # As published: the last entry of these has no row in the table, and occurs in no text.
    rows = vocabulary if family in ("gemma3", "qwen3_embedding") else vocabulary + 1
    config = CONFIGS[family](**SIZES, vocab_size=rows)
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


def run_of(backbone, suffix, pooling, topics, tmp_path):
    """A run over the topics, with random adapters on the backbone."""
    fields = vixml.get_config("tiny_decoder").to_dict()
    data = {"dataset": "Topics-40", "raw_dir": str(topics), "data_dir": str(tmp_path / "data")}
    fields["data"] |= data | {"max_length": 12}
    fields["encoder"] |= {"backbone": str(backbone), "init": "pretrained", "pooling": pooling}
    fields["encoder"]["frozen_dtype"] = "float32"  # as sentence-transformers reads the base
    fields["fusion"]["suffix"] = suffix
    fields["prime"]["free_vectors"] = 16
    fields["train"] |= {"batch_size": 40, "n_chunks": 1}
    run = build.run(RunConfig.from_dict(fields))
    state = run.initial_state()
    noise = np.random.default_rng(0)

    def perturbed(path, leaf):
        drawn = noise.normal(0, 0.1, leaf.shape).astype(leaf.dtype)
        return drawn if path[-1].key == "lora_b" else np.asarray(leaf)

    params = jax.tree_util.tree_map_with_path(perturbed, state.params)
    return fields, run, state.replace(params=params)


def titles(topics) -> list[str]:
    """The first 100 of the training set."""
    with gzip.open(topics / "trn.json.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["title"] for line in file][:100]


@pytest.mark.parametrize(
    ("family", "pooling"),
    [("qwen2", "mean"), ("qwen3_embedding", "last"), ("llama", "mean"), ("gemma3", "mean")],
)
def test_decoders(family, pooling, topics, tmp_path):
    """Merged and adapter folders; 100 titles, cut ones among them."""
    backbone = pretrained(family, tmp_path / "pretrained")
    fields, run, state = run_of(backbone, SUFFIX[family], pooling, topics, tmp_path)
    lengths = run.data.train.lengths[:100]
    assert lengths.min() < lengths.max() == 12
    ours = run.embed(state.params, "train")[:100]
    assert np.abs(ours - run.embed(run.initial_state().params, "train")[:100]).max() > 1e-2
    for kind in ("merged", "adapter"):
        asked = copy.deepcopy(fields) | {"export": {"format": kind, "dtype": "float32"}}
        run = build.run(RunConfig.from_dict(asked))
        folder = exporting.encoder(run, state, tmp_path / "run")
        model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        theirs = model.encode(titles(topics), batch_size=16)
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-5, err_msg=kind)


def test_an_encoder(fields, topics, tmp_path):
    fields = copy.deepcopy(fields)
    fields["encoder"] |= {"backbone": packaged.MINILM_NAME, "layers": 3}
    fields["data"]["max_length"] = 8
    run = build.run(RunConfig.from_dict(fields))
    state = run.initial_state()
    folder = exporting.encoder(run, state, tmp_path)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    ours = run.embed(state.params, "train")[:100]
    np.testing.assert_allclose(model.encode(titles(topics)), ours, rtol=0, atol=1e-5)


def test_an_artifact_opens_in_sentence_transformers_and_predicts_the_same(fields, topics, tmp_path):
    """Their embeddings against the labels in the folder: the ranking of `Predictor`."""
    run = build.run(RunConfig.from_dict(fields))
    folder = exporting.whole(run, 0, run.initial_state(), epath.Path(tmp_path))
    texts = titles(topics)
    model = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    predictor = Predictor.open(folder)
    scores = model.encode(texts) @ predictor.artifact.labels.embeddings.T
    theirs = -np.sort(-scores, axis=1)
    ours, rows, _ = predictor.rank(texts, scores.shape[1], "plain")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, rows, axis=1), ours, rtol=0, atol=1e-5)
