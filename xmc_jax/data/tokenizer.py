"""Load, identify and export a tokenizer; texts to fixed-length token ids."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from xmc_jax.files import atomic, json_files

NAMED = (
    *("bos_token", "eos_token", "unk_token", "pad_token"),
    *("cls_token", "sep_token", "mask_token"),
)
"""Tokens with a role."""

_START = 32  # characters for each token of a long text that are looked at first

# With the vocabulary, these tell tokenizers apart: case, accents, scripts, numbers, punctuation.
PROBES = (
    "",
    "Hello, World! It's 3.14 o'clock -- e-mail: a_b@c.org",
    "Café naïve ÅNGSTRÖM ﬁn ½ 日本語 Привет \u200b\u00a0 🙂",
    "  two  spaces\tand\nlines ",
    "antidisestablishmentarianism " * 3,
)


def load(name_or_folder: str | pathlib.Path, revision: str | None = None) -> Any:
    """A fast Hugging Face tokenizer; code that comes with a model is never run.

    A tokenizer.json is taken as it stands: `AutoTokenizer` builds many classes anew from the
    vocabulary, with rules of its own for splitting words. Where there is none but a vocab.txt, say,
    one is made as `AutoTokenizer` does.

    Args:
        name_or_folder: a folder with tokenizer files, or a name on the hub.

    Raises:
        ValueError: nothing usable there.
    """
    # "PyTorch was not found" is no news here, and would stand before a one-line error.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes a second, and only preparing needs it

    try:
        tokenizer = _load_file(str(name_or_folder), revision)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(
                str(name_or_folder), revision=revision, trust_remote_code=False
            )
    except Exception as error:  # a damaged file raises a dozen types; all mean the same here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise ValueError(
            f"tokenizer {name_or_folder}: expected a folder with tokenizer files or a hub name, "
            f"got: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {name_or_folder}: expected a fast tokenizer (tokenizer.json), "
            f"got {type(tokenizer).__name__}"
        )
    return tokenizer


def encode_measured(
    tokenizer: Any, texts: Sequence[str], max_length: int, special_tokens: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts as token ids, cut and right-padded to T.

    Args:
        max_length: T, tokens, special ones included.
        special_tokens: whether the tokenizer puts its special tokens around a text.

    Returns:
        tokens: i32[n, T]; past each length the tokenizer's padding id, or 0, always so without
            special tokens (an exported tokenizer may pad with another than its original).
        lengths: i32[n], in [1, T]; 0 for an empty text without special tokens.
        whole: i32[n], what the lengths would be without the cut.

    Raises:
        ValueError: T has no room for the special tokens and one more, or a text has no tokens
            where it should have special ones.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False) if special_tokens else 0
    if max_length <= special:
        raise ValueError(
            f"tokenizer: expected max_length above its {special} special tokens, got {max_length}"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction="right")
    padding = (tokenizer.pad_token_id or 0) if special_tokens else 0
    tokens = np.full((len(texts), max_length), padding, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    whole = np.zeros(len(texts), np.int32)
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    for row, encoding in enumerate(encodings):
        ids = encoding.ids
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        whole[row] = len(ids) + sum(len(rest.ids) - special for rest in encoding.overflowing)
    if special_tokens and (lengths == 0).any():
        row = int(np.argmin(lengths))
        raise ValueError(
            f"tokenizer: expected at least one token per text, got none for text {row}, "
            f"{texts[row][:60]!r}"
        )
    return tokens, lengths, whole


def are_longer(
    tokenizer: Any, texts: Sequence[str], max_length: int, special_tokens: bool = True
) -> np.ndarray:
    """bool[n], whether each text has more than T tokens; cheap for texts that are far longer.

    Args:
        max_length: T, special tokens included.

    Raises:
        ValueError: see `encode_measured`.
    """
    # Up to a white space, the tokens of the beginning are the first ones of the whole text.
    starts = [text[: _START * max_length].rpartition(" ")[0] for text in texts]
    starts = [text if len(text) <= _START * max_length else s for text, s in zip(texts, starts)]

    def longer(of: Sequence[str]) -> np.ndarray:
        _, lengths, whole = encode_measured(tokenizer, of, max_length, special_tokens)
        return whole > lengths

    result = longer(starts)
    left = [i for i in np.flatnonzero(~result).tolist() if len(starts[i]) < len(texts[i])]
    if left:
        result[left] = longer([texts[i] for i in left])
    return result


def identity(tokenizer: Any, special_tokens: bool = True) -> dict[str, Any]:
    """What tells a tokenizer from others, the same in every version of the libraries.

    Args:
        special_tokens: whether what it puts around a text counts; without, a tokenizer that was
            exported with prompts is the one that it was made from.

    Returns:
        `vocab_size`, added tokens included, and `digest`: SHA-256 of the vocabulary and of the ids
        of some probe texts.
    """
    vocabulary = tokenizer.get_vocab()
    probes = encode(tokenizer, PROBES, special_tokens)
    content = json.dumps([sorted(vocabulary.items()), probes], ensure_ascii=True)
    return {
        "vocab_size": len(vocabulary),
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }


def export(
    source: pathlib.Path,
    folder: epath.PathLike,
    max_length: int,
    tokenizer: Any = None,
    **changes: Any,
) -> None:
    """Writes a tokenizer into a model folder.

    `AutoTokenizer.from_pretrained(folder)(text, truncation=True)` then gives the ids that the
    tokenizer gives here, cut and padded on the right, whatever class it chooses.

    Args:
        source: local.
        folder: exists; may be remote.
        max_length: tokens of the longest sequence.
        tokenizer: that of `source`, where it is loaded already.

    Raises:
        ValueError: as `load` does; no token to pad with.
    """
    tokenizer = load(source) if tokenizer is None else tokenizer
    config = json_files.read(source / "tokenizer_config.json", optional=True)
    kept = {
        key: value
        for key, value in config.items()
        if key == "clean_up_tokenization_spaces"
        # Not add_bos_token and the like: with them, some versions replace the post-processor.
        or (key.endswith(("_token", "_special_tokens")) and not isinstance(value, bool))
    }
    pad = tokenizer.pad_token or tokenizer.eos_token
    if pad is None:
        raise ValueError(f"tokenizer {source}: expected a pad_token or an eos_token, found neither")
    content = definition(source, tokenizer) | {"truncation": None, "padding": None} | changes
    text = json.dumps(content, ensure_ascii=False)  # megabytes: no indent
    atomic.write(epath.Path(folder) / "tokenizer.json", f"{text}\n")
    json_files.write(
        epath.Path(folder) / "tokenizer_config.json",
        {
            **kept,
            **{name: getattr(tokenizer, name) for name in NAMED},
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_length,
            "pad_token": pad,
            "padding_side": "right",
            # The class that takes tokenizer.json as it stands, in transformers 4 and 5.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "truncation_side": "right",
        },
    )


def definition(source: pathlib.Path, tokenizer: Any) -> dict[str, Any]:
    """The tokenizer.json of a folder; made of the tokenizer where the folder has none."""
    path = source / "tokenizer.json"
    if path.is_file():
        return json_files.read(path)
    return json_files.parse(path, tokenizer.backend_tokenizer.to_str())


def _load_file(name: str, revision: str | None) -> Any | None:
    """The tokenizer.json of a folder or a name on the hub; None if there is none."""
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import cached_file

    def find(file: str) -> pathlib.Path | None:
        result = cached_file(
            name,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if result is None else pathlib.Path(result)

    path = find("tokenizer.json")
    if path is None:
        return None
    json_files.read(path)  # the library's own errors do not say what is wrong with it
    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise ValueError(f"{path}: {error}") from error
    named = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := find(file)) is not None:
            named |= json_files.read(path)
    vocabulary = tokenizer.get_vocab()
    for key in NAMED:
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token in vocabulary:  # otherwise naming it would add it
            setattr(tokenizer, key, token)
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str], special_tokens: bool) -> list[list[int]]:
    """Texts as token ids, whole and of any length; with the tokenizer's special tokens or bare."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    return [encoding.ids for encoding in encodings]
