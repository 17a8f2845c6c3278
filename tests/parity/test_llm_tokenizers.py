"""Tokenizers of decoders against `transformers` and the reference's way of joining pieces."""

import json

import llm_tokenizers
import pytest

from xmc_jax.data import prompts
from xmc_jax.data import tokenizer as tokenizers

TEXTS = ["LaTeX fonts, version 12.34", "", "  Größe e\u0301 日本語 🙂\n", "isn't <b>bold</b> " * 9]
MODEL_TYPES = {
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_embedding": "qwen3",
    "llama": "llama",
    "gemma3": "gemma3_text",
}


@pytest.fixture(scope="module", params=llm_tokenizers.FAMILIES)
def model(request, tmp_path_factory):
    """A folder as published, and what AutoTokenizer makes of it."""
    from transformers import AutoTokenizer

    folder = llm_tokenizers.build(request.param, tmp_path_factory.mktemp("llm") / request.param)
    (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[request.param]}))
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special_tokens", [True, False])
def test_published_files_give_the_ids_of_transformers(model, special_tokens):
    folder, theirs = model
    ours = tokenizers.load(folder)
    assert ours.get_vocab() == theirs.get_vocab()
    expected = theirs(TEXTS, add_special_tokens=special_tokens)["input_ids"]
    assert ours(TEXTS, add_special_tokens=special_tokens)["input_ids"] == expected


def test_a_sequence_is_the_pieces_of_the_reference_with_one_bos(model):
    """The reference tokenises prefix, text and suffix each by itself and joins their embeddings."""
    folder, theirs = model
    end = theirs.convert_ids_to_tokens(theirs.pad_token_id or theirs.eos_token_id)
    around = prompts.tokenize(tokenizers.load(folder), folder, "This product text", "", end)
    pieces = [theirs(text).input_ids for text in ("This product text", TEXTS[0], end)]
    own = theirs("").input_ids
    begins, ends = (own, []) if own == [theirs.bos_token_id] else ([], own)
    if begins:
        assert all(ids[0] == theirs.bos_token_id for ids in pieces)
    if ends:
        assert pieces[2] == 2 * ends  # doubled there, and at the end of every piece
    bare = [ids[len(begins) : len(ids) - len(ends)] for ids in pieces]
    tokens, lengths, _ = tokenizers.encode_measured(theirs, TEXTS[:1], 64, False)
    found = [*around.head, *tokens[0, : lengths[0]].tolist(), *around.tail]
    assert found == begins + bare[0] + bare[1] + bare[2]


def test_sentence_transformers_tokenises_an_export_alike(model, tmp_path):
    """The module that it tokenises with, without a model behind it."""
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("sentence_transformers.models")
    from transformers import AutoConfig, AutoModel

    folder, _ = model
    asked = {"prefix": "This product text", "image_prefix": "", "suffix": ""}
    source = tokenizers.load(folder)
    around = prompts.tokenize(source, folder, **asked)
    S = len(around.head) + 8 + len(around.tail)
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    sizes |= {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4, "vocab_size": 400}
    config = AutoConfig.for_model(MODEL_TYPES[folder.name], **sizes, pad_token_id=0)
    AutoModel.from_config(config).save_pretrained(tmp_path)
    prompts.export(folder, tmp_path, **asked, pooling="mean", max_length=8)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": S}))
    found = models.Transformer.load(str(tmp_path)).tokenize(TEXTS)
    tokens, lengths, _ = tokenizers.encode_measured(source, TEXTS, 8, False)
    for row, text in enumerate(TEXTS):
        ids = found["input_ids"][row][found["attention_mask"][row].to(torch.bool)].tolist()
        assert ids == [*around.head, *tokens[row, : lengths[row]].tolist(), *around.tail], text
