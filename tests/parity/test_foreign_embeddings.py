"""Folders of other tools: embeddings as sentence-transformers has them, from the folder itself and
from what we export of it."""

import jax
import model_cases
import numpy as np
import pytest

from tests.padded_rows import rows_of
from xmc_jax.config import RunConfig
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.models import dual, hf, hf_modules, hf_weights
from xmc_jax.shipping import exporting
from xmc_jax.training import build

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
sentence_transformers = pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.slow


def ours(folder, kind="document") -> np.ndarray:
    """Unit embeddings of `model_cases.TEXTS` by what a folder says of itself."""
    source = hf.resolve(str(folder))
    sizes, said = hf.load_config(source), hf_modules.read(source)
    texts = [said.prompt(kind) + text for text in model_cases.TEXTS]
    tokens, lengths, _ = tokenizers.encode_measured(tokenizers.load(source.tokenizer), texts, 24)
    model = dual.DualEncoder(sizes, pooling=said.pooling())
    params = {"params": {"backbone": hf_weights.load_params(source, sizes)}}
    return jax.jit(lambda: model.apply(params, rows_of(tokens, lengths), method="encode").unit)()


def opened(folder):
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize(
    "name",
    [
        *("bert_gamma_beta", "colbert_linear", "st_cls_pooling", "st_0_Transformer"),
        *("peft_adapter", "st_prompts", "st_dense", "vocab_txt_only"),
    ],
)
def test_a_folder_gives_the_embeddings_of_sentence_transformers(name, tmp_path, monkeypatch):
    folder = model_cases.make(name, tmp_path)
    monkeypatch.chdir(tmp_path)  # where peft looks for the base model of an adapter
    model = opened(folder)
    theirs = model.encode_query(model_cases.TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(ours(folder), theirs, rtol=0, atol=1e-5)
    theirs = model.encode_document(model_cases.TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(ours(folder, "label"), theirs, rtol=0, atol=1e-5)
    differ = np.abs(ours(folder) - ours(folder, "label")).max() > 0.01
    assert differ == (name == "st_prompts")


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("qwen3_seq_cls", transformers.AutoModelForSequenceClassification),
        ("tied_lm_head_only", transformers.AutoModelForCausalLM),
    ],
)
def test_a_decoder_gives_the_hidden_states_of_its_model_with_a_head(name, auto, tmp_path):
    folder = model_cases.make(name, tmp_path)
    tokens = np.random.default_rng(0).integers(1, 60, (3, 9), np.int32)
    with torch.no_grad():
        hidden = auto.from_pretrained(folder).eval().model(torch.tensor(tokens).long())
    expected = torch.nn.functional.normalize(hidden.last_hidden_state.mean(1), dim=-1)
    source = hf.resolve(str(folder))
    sizes = hf.load_config(source)
    params = {"params": {"backbone": hf_weights.load_params(source, sizes)}}
    inputs = rows_of(tokens, np.full(3, 9, np.int32))
    unit = dual.DualEncoder(sizes).apply(params, inputs, method="encode").unit
    np.testing.assert_allclose(unit, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        *("padding_side_left", "vocab_txt_only", "wordpiece_pre_tokenizer", "st_cls_pooling"),
        *("st_prompts", "st_dense", "st_0_Transformer", "peft_adapter"),
    ],
)
def test_an_exported_folder_gives_our_embeddings(name, fields, tmp_path):
    """With the folder's own pooling and prompts; texts of different lengths in a batch."""
    folder = model_cases.make(name, tmp_path)
    titles = model_cases.raw_files(tmp_path / "raw")
    fields = model_cases.fields_of(folder, fields, tmp_path)
    run = build.run(RunConfig.from_dict(fields))
    state = run.initial_state()
    assert run.data.train.lengths.min() < run.data.train.lengths.max() == 12
    out = exporting.encoder(run, state, tmp_path / "run")
    model = opened(out)
    theirs = model.encode(titles[:32], batch_size=8)
    np.testing.assert_allclose(run.embed(state.params, "train"), theirs, rtol=0, atol=1e-5)
    theirs = model.encode_document(titles[40:], batch_size=8)
    np.testing.assert_allclose(run.embed(state.params, "label"), theirs, rtol=0, atol=1e-5)
    # as a start, the export has the pooling and prompts that it was trained with
    before, after = (
        build.filled(RunConfig.from_dict(fields), hf_modules.read(hf.resolve(str(x))))
        for x in (folder, out)
    )
    assert before == after
