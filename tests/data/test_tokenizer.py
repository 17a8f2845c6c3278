"""Tokenising texts to fixed lengths."""

import numpy as np
import pytest

from xmc_jax.data import tokenizer as tokenizers

TEXTS = ["red lamp", "", "Red GREEN blue small large", "unheard of", "red"]


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
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    with pytest.raises(ValueError, match=r"at least one token per text, got none for text 1, ''"):
        tokenizers.encode_measured(tokenizer, TEXTS, 4)
