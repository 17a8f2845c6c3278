"""Encoders and combiner against torch, on fresh random weights and on the real MiniLM."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.golden_models import ENCODERS
from tests.padded_rows import places_of, rows_of
from xmc_jax.data import packaged, tokenizer
from xmc_jax.models import bert, dual, hf, hf_export, hf_weights
from xmc_jax.models.combiner import TransformerCombiner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
make = pytest.importorskip("tests.golden.make")


@functools.partial(jax.jit, static_argnums=0)
def states_of(config, params, tokens, lengths):
    return bert.Bert(config).apply(
        {"params": params}, *places_of(tokens, lengths), hidden_states=True
    )[1]


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("seed", [1, 2])
def test_hidden_states_layer_by_layer(family, seed, tmp_path):
    model = make.tiny(family, seed)
    model.save_pretrained(tmp_path)
    tokens, lengths = make.texts(seed, n=8, T=20)
    expected = make.torch_hidden_states(model, tokens, lengths)
    source = hf.resolve(str(tmp_path))
    config = hf.load_config(source)
    params = hf_weights.load_params(source, config)
    states = states_of(config, params, tokens, lengths)
    real = (np.arange(20) < lengths[:, None])[..., None]
    assert len(states) == len(expected) == config.layers + 1
    for layer, (ours, theirs) in enumerate(zip(states, expected)):
        np.testing.assert_allclose(
            ours * real, theirs * real, rtol=0, atol=1e-5, err_msg=f"after layer {layer}"
        )


@pytest.mark.parametrize("family", ENCODERS)
def test_exported_folder_is_the_torch_model(family, tmp_path):
    """Export, reload with transformers: every tensor identical."""
    make.tiny(family, 3).save_pretrained(tmp_path)
    source = hf.resolve(str(tmp_path))
    config = hf.load_config(source)
    params = hf_weights.load_params(source, config)
    hf_export.merged(tmp_path / "out", params, config, pooling="mean", max_length=8)
    load = make.transformers.AutoModel.from_pretrained
    theirs, ours = load(tmp_path).state_dict(), load(tmp_path / "out").state_dict()
    assert set(theirs) == set(ours)
    for name in theirs:
        if not name.startswith("pooler."):
            assert torch.equal(theirs[name], ours[name]), name


@pytest.fixture(scope="module")
def minilm():
    source = hf.resolve(packaged.MINILM_NAME)
    config = hf.load_config(source)
    return config, hf_weights.load_params(source, config)


def embed(config, params, texts, T):
    tokens, lengths = make.tokenized(texts, T)
    model = dual.DualEncoder(config)
    encode = jax.jit(lambda p, x: model.apply({"params": {"backbone": p}}, x, method="encode").unit)
    return encode(params, rows_of(tokens, lengths)), tokens, lengths


@pytest.mark.slow
def test_minilm_embeddings_of_100_titles(minilm):
    ours, tokens, lengths = embed(*minilm, make.titles(100), T=32)
    model = make.transformers.BertModel.from_pretrained(packaged.minilm()).eval()
    expected = make.torch_embeddings(model, tokens, lengths)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layers", [3, 6])
def test_exported_minilm_in_sentence_transformers(minilm, layers, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    config = dataclasses.replace(minilm[0], layers=layers)
    params = minilm[1] | {"layers": jax.tree.map(lambda x: x[:layers], minilm[1]["layers"])}
    texts = make.titles(100)
    ours, *_ = embed(config, params, texts, T=16)
    hf_export.merged(tmp_path, params, config, pooling="mean", max_length=16)
    tokenizer.export(packaged.minilm(), tmp_path, 16)
    model = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert model.max_seq_length == 16
    np.testing.assert_allclose(ours, model.encode(texts), rtol=0, atol=1e-5)


def torch_combiner(width, heads, ff_dim):
    return torch.nn.TransformerEncoderLayer(
        width, heads, ff_dim, dropout=0.1, activation="gelu", batch_first=True
    )


def from_torch(layer):
    """The parameters of a torch.nn.TransformerEncoderLayer in our tree."""
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    weights = np.split(state["self_attn.in_proj_weight"], 3)
    biases = np.split(state["self_attn.in_proj_bias"], 3)
    tree = {
        name: {"kernel": weight.T, "bias": bias}
        for name, weight, bias in zip(("query", "key", "value"), weights, biases)
    }
    for ours, theirs in (("out", "self_attn.out_proj"), ("up", "linear1"), ("down", "linear2")):
        tree[ours] = {"kernel": state[f"{theirs}.weight"].T, "bias": state[f"{theirs}.bias"]}
    for norm in ("norm1", "norm2"):
        tree[norm] = {"scale": state[f"{norm}.weight"], "bias": state[f"{norm}.bias"]}
    return tree


@pytest.mark.parametrize(
    ("width", "heads", "ff_dim"), [(16, 4, 40), pytest.param(384, 8, 1024, marks=pytest.mark.slow)]
)
def test_combiner(width, heads, ff_dim):
    torch.manual_seed(0)
    layer = torch_combiner(width, heads, ff_dim).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
        sequence = torch.randn(7, 3, width)
        expected = torch.nn.functional.normalize(layer(sequence).mean(1), dim=-1).numpy()
    combiner = TransformerCombiner(heads, ff_dim, 0.1)
    ours = jax.jit(combiner.apply)({"params": from_torch(layer)}, *sequence.numpy().swapaxes(0, 1))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_combiner_starts_from_the_distribution_of_torch():
    width, ff_dim = 64, 96
    torch.manual_seed(0)
    theirs = [from_torch(torch_combiner(width, 8, ff_dim)) for _ in range(20)]
    combiner, x = TransformerCombiner(8, ff_dim, 0.1), np.zeros((1, width), np.float32)
    init = jax.jit(lambda seed: nn.unbox(combiner.init(jax.random.key(seed), x, x, x))["params"])
    ours = [init(seed) for seed in range(20)]
    assert jax.tree.map(np.shape, ours[0]) == jax.tree.map(np.shape, theirs[0])

    def compare(path, ours, theirs):
        name = jax.tree_util.keystr(path)
        ours, theirs = np.stack(ours).ravel(), np.stack(theirs).ravel()
        low, high = theirs.min(), theirs.max()
        np.testing.assert_allclose([ours.min(), ours.max()], [low, high], rtol=0.02, err_msg=name)
        np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.05, err_msg=name)

    jax.tree_util.tree_map_with_path(
        lambda path, *leaves: compare(path, leaves[:20], leaves[20:]), ours[0], *ours[1:], *theirs
    )
