"""Prompts as token ids, and in exported tokenizers."""

import itertools
import json
import shutil

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from xmc_jax.data import prompts
from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.types import ORDERS, Prompts

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


def exported(source, folder, **settings):
    """A model folder with the tokenizer of `source`."""
    folder.mkdir(parents=True)
    settings = {**PROMPTS, "suffix": "", "pooling": "mean", "max_length": T} | settings
    prompts.export(source, folder, **settings)
    return folder


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_prompts_have_what_the_tokenizer_itself_adds_once(family, llm_folder):
    _, head, tail, _ = LLM[family]
    tokenizer = tokenizers.load(llm_folder)
    found = prompts.tokenize(tokenizer, llm_folder, "", "", "")
    assert found == Prompts(*(tuple(map(tokenizer.get_vocab().get, t)) for t in (head, [], tail)))
    plain = Tokenizer.from_file(str(llm_folder / "tokenizer.json"))
    pieces = [plain.encode(text, add_special_tokens=False).ids for text in PROMPTS.values()]
    of_text, of_images = map(tuple, pieces)
    for order, middle in ((None, ()), ("text_image", of_images)):
        assert prompts.tokenize(
            tokenizer, llm_folder, *PROMPTS.values(), "", order=order
        ) == Prompts((*found.head, *of_text), middle, found.tail)
    assert prompts.tokenize(
        tokenizer, llm_folder, *PROMPTS.values(), "", order="image_text"
    ) == Prompts((*found.head, *of_images), of_text, found.tail)


@pytest.mark.parametrize("order", [None, *ORDERS])
def test_a_prefix_that_spells_out_bos_does_not_double_it(family, llm_folder, order):
    tokenizer, bos = tokenizers.load(llm_folder), "".join(LLM[family][1])
    pieces = ("This product", "its image")
    spelled = [bos + piece for piece in pieces]
    found = prompts.tokenize(tokenizer, llm_folder, *spelled, "", order=order)
    assert found == prompts.tokenize(tokenizer, llm_folder, *pieces, "", order=order)
    assert found.head.count(tokenizer.bos_token_id) == len(LLM[family][1])
    assert tokenizer.bos_token_id not in found.middle


@pytest.mark.parametrize(
    ("order", "before", "behind"),
    [(None, (1, 2), (4,)), ("text_image", (1, 2), (3, 4)), ("image_text", (1, 2, 3), (4,))],
)
def test_around_the_text_of_an_item_without_images(order, before, behind):
    three = Prompts((1, 2), () if order is None else (3,), (4,))
    assert prompts.around_text(three, order) == Prompts(head=before, tail=behind)


def test_a_suffix_stands_in_for_what_the_tokenizer_ends_texts_with(family, llm_folder):
    tokenizer, end = tokenizers.load(llm_folder), LLM[family][3]
    found = prompts.tokenize(tokenizer, llm_folder, "", "", end)
    assert found.tail == (tokenizer.get_vocab()[end],)
    plain = prompts.tokenize(tokenizer, llm_folder, "", "", " in one word:").tail
    assert plain and not set(plain) & set(tokenizer.added_tokens_decoder)


@pytest.mark.parametrize(
    ("family", "asked", "message"),
    [
        (
            "llama",
            {"suffix": "<|endoftext|>"},
            r"fusion\.suffix: expected special tokens .* got <\|endoftext\|>, which is \d+ "
            r"tokens; it has <\|begin_of_text\|>, <\|end_of_text\|>, <\|finetune_right_pad_id\|>, "
            r".*; set --config\.fusion\.suffix",
        ),
        ("qwen2", {"prefix": "<bos>This product"}, r"fusion\.prefix: .* got <bos>, which is "),
        ("gemma3", {"suffix": "<|endoftext|>"}, r"it has <pad>, <eos>, <bos>, <unk>, <mask>, "),
        ("qwen3", {"image_prefix": "its <image>"}, r"fusion\.image_prefix: .* got <image>, "),
    ],
)
def test_special_tokens_of_another_tokenizer_are_refused(llm_folders, family, asked, message):
    tokenizer = tokenizers.load(llm_folders[family])
    asked = {"prefix": "", "image_prefix": "", "suffix": ""} | asked
    with pytest.raises(ValueError, match=message) as e:
        prompts.tokenize(tokenizer, llm_folders[family], **asked)
    assert "\n" not in str(e.value) and "reserved" not in str(e.value)


def test_a_tokenizer_that_drops_texts_has_no_prompts(llm_folders):
    tokenizer = tokenizers.load(llm_folders["qwen2"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|>", special_tokens=[("<|endoftext|>", 389)]
    )
    with pytest.raises(ValueError, match="the same tokens around every text, got one that"):
        prompts.tokenize(tokenizer, llm_folders["qwen2"], "", "", "")


@pytest.mark.parametrize(
    ("prefix", "ending", "with_config", "order"),
    [
        *itertools.product(["", "This product text"], [False, True], [False, True], [None]),
        *itertools.product(["This product text"], [True], [False, True], ORDERS),
        *itertools.product([""], [False], [True], ORDERS),
    ],
)
def test_exported_tokenizer_is_head_text_tail(
    family, llm_folder, tmp_path, prefix, ending, with_config, order
):
    """With images it is the sequence of an item that has none."""
    from transformers import AutoTokenizer

    model_type, _, _, end = LLM[family]
    suffix = end if ending else ""
    folder = exported(llm_folder, tmp_path / "out", prefix=prefix, suffix=suffix, order=order)
    if with_config:  # AutoTokenizer chooses its class by it
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    source = tokenizers.load(llm_folder)
    asked = (prefix, PROMPTS["image_prefix"], suffix)
    around = prompts.tokenize(source, llm_folder, *asked, order=order)
    assert bool(around.middle) == (order == "text_image" or (order is not None and bool(prefix)))
    before, behind = around.head, around.middle + around.tail
    if order == "image_text":
        before, behind = around.head + around.middle, around.tail
    tokens, lengths, _ = tokenizers.encode_measured(source, LLM_TEXTS, T, False)
    assert lengths.tolist()[:3] == [T, 0, T]
    expected = [[*before, *row[:n].tolist(), *behind] for row, n in zip(tokens, lengths)]
    S = len(before) + T + len(behind)
    auto = AutoTokenizer.from_pretrained(folder)
    assert auto.model_max_length == S and auto.padding_side == auto.truncation_side == "right"
    assert auto(LLM_TEXTS, truncation=True, max_length=S)["input_ids"] == expected
    padded = auto(LLM_TEXTS, truncation=True, padding=True)
    assert [n for n in np.sum(padded["attention_mask"], 1)] == [len(ids) for ids in expected]
    assert padded["input_ids"][1][: len(expected[1])] == expected[1]
    assert auto.pad_token == (source.pad_token or source.eos_token)
    assert (auto.bos_token, auto.eos_token) == (source.bos_token, source.eos_token)
    assert auto.get_vocab() == source.get_vocab()
    added = auto.added_tokens_decoder
    assert added == source.added_tokens_decoder
    assert sum(token.special for token in added.values()) >= 7


def test_exported_tokenizer_is_known_as_the_original(family, llm_folder, tmp_path):
    folder = exported(llm_folder, tmp_path / "out", suffix=LLM[family][3])
    one, other = tokenizers.load(llm_folder), tokenizers.load(folder)
    assert tokenizers.identity(one, False) == tokenizers.identity(other, False)
    assert tokenizers.identity(one)["digest"] != tokenizers.identity(other)["digest"]
    for length in (1, 5, 40):
        found = [tokenizers.encode_measured(t, LLM_TEXTS, length, False) for t in (one, other)]
        for a, b in zip(*found):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("ending", "order"), [(False, None), (True, None), *zip((0, 1), ORDERS)])
def test_an_export_of_an_export_is_the_same(family, llm_folder, tmp_path, ending, order):
    asked = PROMPTS | {"suffix": LLM[family][3] if ending else "", "order": order}
    first = exported(llm_folder, tmp_path / "first", **asked)
    second = exported(first, tmp_path / "second", **asked)
    for name in ("tokenizer.json", "tokenizer_config.json", "xmc_jax.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    source = tokenizers.load(llm_folder)
    expected = prompts.tokenize(source, llm_folder, **asked)
    assert prompts.tokenize(tokenizers.load(first), first, **asked) == expected


def test_settings_of_an_export(llm_folders, tmp_path):
    source = llm_folders["gemma3"]
    assert prompts.read_settings(source) is None
    folder = exported(source, tmp_path / "out", suffix="<eos>", pooling="last", max_length=9)
    settings = prompts.read_settings(folder)
    assert (settings.pooling, settings.max_length, settings.order) == ("last", 9, None)
    assert settings.pieces.own_head == (2,) and settings.pieces.own_tail == ()
    assert settings.pieces.suffix == prompts.Piece(text="<eos>", ids=(1,))
    assert settings.pieces.prefix.text == "This product text"
    tokenizer = tokenizers.load(source)
    for order in (None, *ORDERS):
        assert settings.pieces.prompts(order) == prompts.tokenize(
            tokenizer, source, *PROMPTS.values(), "<eos>", order
        )


@pytest.mark.parametrize("order", [None, *ORDERS])
def test_settings_keep_the_order(llm_folders, tmp_path, order):
    folder = exported(llm_folders["llama"], tmp_path / "out", order=order)
    assert prompts.read_settings(folder).order == order
    edit_json(folder / "xmc_jax.json", lambda settings: settings.pop("order"))
    assert prompts.read_settings(folder).order is None  # as exported before there were images


def test_other_prompts_than_an_exported_model_has_are_refused(llm_folders, tmp_path):
    folder = exported(llm_folders["qwen2"], tmp_path / "out", suffix="<|endoftext|>")
    tokenizer = tokenizers.load(folder)
    with pytest.raises(
        ValueError,
        match=r"out/xmc_jax\.json: expected the prompts that the model was trained with; prefix "
        r"there 'This product text', here 'Title: ' \(--config\.fusion\.prefix\); suffix there "
        r"'<\|endoftext\|>', here '' \(--config\.fusion\.suffix\)$",
    ):
        prompts.tokenize(tokenizer, folder, "Title: ", "and its image", "")
    edit_json(folder / "xmc_jax.json", lambda s: s["prompts"]["suffix"].update(ids=[7]))
    with pytest.raises(
        ValueError, match=r"suffix '<\|endoftext\|>' there \[7\], here \[389\] \(tok"
    ):
        prompts.tokenize(tokenizer, folder, *PROMPTS.values(), "<|endoftext|>")
    (folder / "xmc_jax.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"nothing but special tokens around a text, .*its xmc_jax\.json is missing",
    ):
        prompts.tokenize(tokenizer, folder, "", "", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=2), "format: expected 1, found 2"),
        (lambda s: s.pop("pooling"), "pooling: expected a value, found none"),
        (lambda s: s.update(max_length=True), "max_length: expected a valid integer, found True"),
        (lambda s: s.update(order="images"), "order: expected 'text_image' or 'image_text', found"),
        (lambda s: s.update(own_head=3), "own_head: expected a valid tuple, found 3"),
        (lambda s: s.update(own_tail=["a"]), r"own_tail\.0: expected a valid integer, found 'a'"),
        (lambda s: s["prompts"].pop("suffix"), r"prompts\.suffix: expected a value, found none"),
        (lambda s: s["prompts"]["prefix"].update(ids=[-1]), r"prefix\.ids\.0: expected greater"),
        (lambda s: s.update(padding_side="left"), "padding_side: expected 'right', found 'left'"),
    ],
)
def test_damaged_settings_are_named(llm_folders, tmp_path, change, message):
    folder = exported(llm_folders["qwen2"], tmp_path / "out")
    edit_json(folder / "xmc_jax.json", change)
    with pytest.raises(ValueError, match=rf"out/xmc_jax\.json: .*{message}.*; export the") as e:
        prompts.read_settings(folder)
    assert "\n" not in str(e.value)
    (folder / "xmc_jax.json").write_text("{")
    with pytest.raises(ValueError, match=r"xmc_jax\.json: expected JSON, found "):
        prompts.read_settings(folder)


def test_export_needs_a_token_to_pad_with(llm_folders, tmp_path):
    folder = shutil.copytree(llm_folders["llama"], tmp_path / "llama")
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("eos_token"))
    with pytest.raises(ValueError, match="expected a pad_token or an eos_token, found neither"):
        exported(folder, tmp_path / "out")
