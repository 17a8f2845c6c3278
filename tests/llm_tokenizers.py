"""Small tokenizers in the published file formats of the decoder families, trained on the spot.

`python -m tests.llm_tokenizers` writes the bundled decoder anew.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from xmc_jax.data import bundled, raw_folder

FAMILIES = ("qwen2", "qwen3", "qwen3_embedding", "llama", "gemma3")
BUNDLED = pathlib.Path(bundled.__file__).parent / "tiny-qwen2"

# Published names, in their order; True: special.
_QWEN2 = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|image_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
}
_QWEN3 = _QWEN2 | {"<think>": False, "</think>": False}
_LLAMA = dict.fromkeys(
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|finetune_right_pad_id|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    True,
)
_GEMMA3 = dict.fromkeys(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<unused0>"), True)
_GEMMA3 |= {"<start_of_turn>": True, "<end_of_turn>": True, "\n\n": False, "▁▁": False}
_GEMMA3_LAST = "<image_soft_token>"

# Qwen takes digits one by one, Llama up to three at a time.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def titles() -> list[str]:
    """The bundled titles of training documents and labels."""
    files = raw_folder.find(bundled.path("LF-DebianTitles-3K"))
    splits = raw_folder.read(files, "LF-DebianTitles-3K", "utf-8").splits
    return splits["train"].titles + splits["label"].titles


def build(
    family: str,
    folder: pathlib.Path,
    texts: Sequence[str] | None = None,
    vocab_size: int = 400,
    published: bool = True,
) -> pathlib.Path:
    """Writes tokenizer files as a published model of the family has them; the same every time.

    Args:
        family: one of `FAMILIES`.
        folder: made if need be.
        texts: to train on; None for `titles`.
        vocab_size: tokens, special ones included.
        published: also the files that tokenizer.json makes needless (vocab.json, merges.txt).

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = titles() if texts is None else texts
    make = _gemma3 if family == "gemma3" else _byte_level
    tokenizer = make(family, texts, vocab_size)
    _dump(folder / "tokenizer.json", tokenizer)
    _dump(folder / "tokenizer_config.json", _config(family, tokenizer["added_tokens"]))
    if published and family.startswith("qwen"):
        model = tokenizer["model"]
        _dump(folder / "vocab.json", model["vocab"])
        merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
        (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    return folder


def build_bundled(folder: pathlib.Path) -> None:
    """Writes what `BUNDLED` holds: a tokenizer of 2,048 tokens and the sizes of a small Qwen2."""
    build("qwen2", folder, vocab_size=2048, published=False)
    config = {
        "architectures": ["Qwen2Model"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 128,
        "max_position_embeddings": 256,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "tie_word_embeddings": True,
        "vocab_size": 2048,
    }
    _dump(folder / "config.json", config)


def _byte_level(family: str, texts: Sequence[str], vocab_size: int) -> dict[str, Any]:
    llama = family == "llama"
    added = _LLAMA if llama else _QWEN2 if family == "qwen2" else _QWEN3
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=llama))
    backend.normalizer = None if llama else normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % ("{1,3}" if llama else "")), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(added),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([_added(token, special) for token, special in added.items()])
    tokenizer = json.loads(backend.to_str())
    flags = {"add_prefix_space": llama, "trim_offsets": False, "use_regex": llama}
    post = {"type": "ByteLevel", **flags}
    if llama:
        post = _sequence(post, _template(tokenizer, "<|begin_of_text|>", "$A"))
    elif family == "qwen3_embedding":
        post = _sequence(post, _template(tokenizer, "$A", "<|endoftext|>"))
    return tokenizer | {"post_processor": post}


def _gemma3(family: str, texts: Sequence[str], vocab_size: int) -> dict[str, Any]:
    # Its words are learnt apart, as SentencePiece does; the published file then joins without.
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    first = [*_GEMMA3, *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = (vocab_size - len(first) - 1) // 2
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(first) - 1, limit_alphabet=letters, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    learnt = json.loads(backend.to_str())["model"]
    pieces = [piece for piece in learnt["vocab"] if piece not in _GEMMA3]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: row for row, piece in enumerate([*first, *pieces])},
            merges=[tuple(pair) for pair in learnt["merges"] if "".join(pair) not in _GEMMA3],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    added = _GEMMA3 | {_GEMMA3_LAST: True}
    backend.add_tokens([_added(token, special) for token, special in added.items()])
    tokenizer = json.loads(backend.to_str())
    return tokenizer | {"post_processor": _template(tokenizer, "<bos>", "$A")}


def _config(family: str, added: list[dict[str, Any]]) -> dict[str, Any]:
    rows = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in added}
    if family == "llama":
        return {
            "added_tokens_decoder": rows,
            "bos_token": "<|begin_of_text|>",
            "clean_up_tokenization_spaces": True,
            "eos_token": "<|end_of_text|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 131072,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    if family == "gemma3":
        return {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": rows,
            "bos_token": "<bos>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<eos>",
            "extra_special_tokens": {"image_token": _GEMMA3_LAST},
            "image_token": _GEMMA3_LAST,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": "<pad>",
            "processor_class": "Gemma3Processor",
            "sp_model_kwargs": None,
            "spaces_between_special_tokens": False,
            "tokenizer_class": "GemmaTokenizer",
            "unk_token": "<unk>",
            "use_default_system_prompt": False,
        }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": rows,
        "additional_special_tokens": [e["content"] for e in added if e["special"]][1:],
        "bos_token": None,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>" if family == "qwen2" else "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    return config | ({"padding_side": "left"} if family == "qwen3_embedding" else {})


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _sequence(*processors: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "processors": list(processors)}


def _template(tokenizer: dict[str, Any], *parts: str) -> dict[str, Any]:
    def piece(part: str, sequence: str, row: int) -> dict[str, Any]:
        if part == "$A":
            return {"Sequence": {"id": sequence, "type_id": row}}
        return {"SpecialToken": {"id": part, "type_id": row}}

    ids = {entry["content"]: entry["id"] for entry in tokenizer["added_tokens"]}
    single = [piece(part, "A", 0) for part in parts]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single + [piece(part, "B", 1) for part in parts],
        "special_tokens": {
            part: {"id": part, "ids": [ids[part]], "tokens": [part]}
            for part in parts
            if part != "$A"
        },
    }


def _dump(path: pathlib.Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    build_bundled(BUNDLED)
