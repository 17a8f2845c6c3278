"""Load and identify a tokenizer; texts to fixed-length token ids."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

# With the vocabulary, these tell tokenizers apart: case, accents, scripts, numbers, punctuation.
_PROBES = (
    "",
    "Hello, World! It's 3.14 o'clock -- e-mail: a_b@c.org",
    "Café naïve ÅNGSTRÖM ﬁn ½ 日本語 Привет \u200b\u00a0 🙂",
    "  two  spaces\tand\nlines ",
    "antidisestablishmentarianism " * 3,
)


def load(name_or_folder: str | pathlib.Path, revision: str | None = None) -> Any:
    """A fast Hugging Face tokenizer; code that comes with a model is never run.

    Args:
        name_or_folder: a folder with tokenizer files, or a name on the hub.
        revision: branch, tag or commit on the hub.

    Raises:
        ValueError: nothing usable there.
    """
    # "PyTorch was not found" is no news here, and would stand before a one-line error.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # takes a second, and only preparing needs it

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name_or_folder), revision=revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
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
    tokenizer: Any, texts: Sequence[str], max_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts as token ids with the tokenizer's special tokens, cut and right-padded to T.

    Args:
        tokenizer: see `load`.
        texts: n texts.
        max_length: T, tokens, special ones included.

    Returns:
        tokens: i32[n, T]; the tokenizer's padding id, or 0, past each length.
        lengths: i32[n], in [1, T].
        whole: i32[n], what the lengths would be without the cut.

    Raises:
        ValueError: T has no room for the special tokens and one more, or a text has no tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise ValueError(
            f"tokenizer: expected max_length above its {special} special tokens, got {max_length}"
        )
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.enable_truncation(max_length, direction="right")
    tokens = np.full((len(texts), max_length), tokenizer.pad_token_id or 0, np.int32)
    lengths = np.zeros(len(texts), np.int32)
    whole = np.zeros(len(texts), np.int32)
    for row, encoding in enumerate(backend.encode_batch_fast(list(texts))):
        ids = encoding.ids
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        whole[row] = len(ids) + sum(len(rest.ids) - special for rest in encoding.overflowing)
    if (lengths == 0).any():
        row = int(np.argmin(lengths))
        raise ValueError(
            f"tokenizer: expected at least one token per text, got none for text {row}, "
            f"{texts[row][:60]!r}"
        )
    return tokens, lengths, whole


def identity(tokenizer: Any) -> dict[str, Any]:
    """What tells a tokenizer from others, the same in every version of the libraries.

    Returns:
        `vocab_size`, added tokens included, and `digest`: SHA-256 of the vocabulary and of the ids
        of some probe texts.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    vocabulary = tokenizer.get_vocab()
    probes = [encoding.ids for encoding in backend.encode_batch_fast(list(_PROBES))]
    content = json.dumps([sorted(vocabulary.items()), probes], ensure_ascii=True)
    return {
        "vocab_size": len(vocabulary),
        "digest": hashlib.sha256(content.encode()).hexdigest(),
    }
