"""What stands around the texts of decoders: prompts as token ids, and in exported tokenizers.

Texts of encoders carry the tokenizer's special tokens. Texts of decoders are bare: what stands
around them, `Prompts`, is the same for all. In an exported decoder the tokenizer itself puts the
prompts around a text, and `xmc_jax.json` beside it says which they are.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from etils import epath
from pydantic import BaseModel, Field, StrictStr

from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.types import Prompts
from xmc_jax.files import json_files

SETTINGS = "xmc_jax.json"
"""Of an exported decoder; see `Settings`."""

_PIECES = ("prefix", "image_prefix", "suffix")
TokenIds = tuple[Annotated[int, Field(ge=0, strict=True)], ...]

_SPECIAL_LOOKING = re.compile(r"<[^<>\s]+>")


class Piece(BaseModel, frozen=True):
    """A prompt as it was written, and its token ids."""

    text: StrictStr
    ids: TokenIds


class Pieces(BaseModel, frozen=True):
    """What stands around texts, piece by piece."""

    own_head: TokenIds  # what the tokenizer itself puts before a text (BOS), prompts apart
    own_tail: TokenIds  # what it puts behind a text (EOS), where there is no suffix
    prefix: Piece  # before texts
    image_prefix: Piece  # before images
    suffix: Piece  # at the end

    def prompts(self, order: str | None = None) -> Prompts:
        """The same as the model takes them.

        Args:
            order: of text and images, "text_image" or "image_text"; None without images.
        """
        first, second = self.prefix.ids, self.image_prefix.ids
        if order == "image_text":
            first, second = second, first
        return Prompts(
            head=self.own_head + first,
            middle=() if order is None else second,
            tail=self.suffix.ids if self.suffix.text else self.own_tail,
        )


class _PromptTexts(BaseModel, frozen=True):
    prefix: Piece
    image_prefix: Piece
    suffix: Piece


class Settings(BaseModel, frozen=True):
    """What a decoder was exported with: the contents of `xmc_jax.json`."""

    format: Literal[1]
    pooling: StrictStr
    max_length: Annotated[int, Field(ge=1, strict=True)]  # T, tokens per text without prompts
    order: Literal["text_image", "image_text"] | None = None  # as trained with images
    own_head: TokenIds
    own_tail: TokenIds
    prompts: _PromptTexts
    padding_side: Literal["right"]

    @property
    def pieces(self) -> Pieces:
        """The prompts, with what the tokenizer itself puts around a text."""
        prompts = {name: getattr(self.prompts, name) for name in _PIECES}
        return Pieces(own_head=self.own_head, own_tail=self.own_tail, **prompts)


def tokenize(
    tokenizer: Any,
    folder: epath.PathLike,
    prefix: str,
    image_prefix: str,
    suffix: str,
    order: str | None = None,
) -> Prompts:
    """The token ids that stand around every text of a decoder.

    Each piece is tokenised by itself, as the reference does, so that text and prompts never merge.
    The tokenizer's own first tokens come once, also where the prefix spells them out.

    Args:
        folder: where it came from; if that was exported, the prompts must be those recorded there.
        suffix: at the end; "" for what the tokenizer itself ends texts with, if anything.

    Raises:
        ValueError: other prompts than those of an exported folder, a `<token>` that the tokenizer
            does not have, or a tokenizer with prompts of unknown origin.

    Source: ViXML eq. 1, 4. Departs: see `Prompts`.
    """
    return _pieces(tokenizer, folder, (prefix, image_prefix, suffix)).prompts(order)


def export(
    source: pathlib.Path,
    folder: epath.PathLike,
    *,
    prefix: str,
    image_prefix: str,
    suffix: str,
    pooling: str,
    max_length: int,
    order: str | None = None,
) -> None:
    """Writes the tokenizer of a decoder into a model folder, with the prompts in it.

    `AutoTokenizer.from_pretrained(folder)(text, truncation=True)` is then the sequence of an item
    without images, its text cut at T, whatever class it chooses.

    Args:
        source: local; may itself be an exported folder.
        folder: exists; may be remote.

    Raises:
        ValueError: as `tokenizer.export` and `tokenize` do.
    """
    tokenizer = tokenizers.load(source)
    pieces = _pieces(tokenizer, source, (prefix, image_prefix, suffix))
    outer = around_text(pieces.prompts(order), order)
    original = tokenizers.definition(source, tokenizer).get("post_processor")
    tokenizers.export(
        source,
        folder,
        len(outer.head) + max_length + len(outer.tail),
        tokenizer,
        post_processor=_post_processor(tokenizer, original, outer),
    )
    settings = Settings(
        format=1,
        padding_side="right",
        pooling=pooling,
        max_length=max_length,
        order=order,
        own_head=pieces.own_head,
        own_tail=pieces.own_tail,
        prompts=_PromptTexts(**{name: getattr(pieces, name) for name in _PIECES}),
    )
    json_files.write(epath.Path(folder) / SETTINGS, settings.model_dump(mode="json"))


def around_text(prompts: Prompts, order: str | None) -> Prompts:
    """What stands before and behind the text of an item without images: head and tail alone."""
    head, middle, tail = prompts.head, prompts.middle, prompts.tail
    if order == "image_text":
        return Prompts(head=head + middle, tail=tail)
    return Prompts(head=head, tail=middle + tail)


def read_settings(folder: epath.PathLike) -> Settings | None:
    """What a decoder was exported with; None for a folder that is no export of one.

    Raises:
        ValueError: the file is damaged; names the field.
    """
    path = epath.Path(folder) / SETTINGS
    if not path.is_file():
        return None
    return json_files.validate(path, Settings, json_files.read(path), "export the model again")


def _pieces(tokenizer: Any, folder: epath.PathLike, texts: Sequence[str]) -> Pieces:
    """See `tokenize`; `texts` are those of `_PIECES`."""
    recorded = read_settings(folder)
    if recorded is None:
        head, tail = _special_ends(tokenizer, folder)
    else:
        head, tail = recorded.pieces.own_head, recorded.pieces.own_tail
    given = {}
    for name, text in zip(_PIECES, texts):
        ids = _piece_ids(tokenizer, name, text)
        if head and name != "suffix" and ids[: len(head)] == head:
            ids = ids[len(head) :]
        given[name] = Piece(text=text, ids=ids)
    differences = []
    for name, here in given.items():
        there = here if recorded is None else getattr(recorded.pieces, name)
        if there.text != here.text:
            differences.append(
                f"{name} there {there.text!r}, here {here.text!r} (--config.fusion.{name})"
            )
        elif there.ids != here.ids:
            differences.append(
                f"{name} {here.text!r} there {list(there.ids)}, here {list(here.ids)} "
                "(tokenizer.json is not the one exported)"
            )
    if differences:
        raise ValueError(
            f"{epath.Path(folder) / SETTINGS}: expected the prompts that the model was trained "
            f"with; {'; '.join(differences)}"
        )
    return Pieces(own_head=head, own_tail=tail, **given)


def _special_ends(
    tokenizer: Any, folder: epath.PathLike
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What a tokenizer puts before and behind every text."""
    probes = [text for text in tokenizers.PROBES if text]
    splits = []
    for bare, whole in zip(
        tokenizers.encode(tokenizer, probes, False), tokenizers.encode(tokenizer, probes, True)
    ):
        starts = range(len(whole) - len(bare) + 1)
        splits.append(
            {
                (tuple(whole[:at]), tuple(whole[at + len(bare) :]))
                for at in starts
                if whole[at : at + len(bare)] == bare
            }
        )
    common = set.intersection(*splits)
    if len(common) != 1:
        raise ValueError(
            f"tokenizer {folder}: expected one that puts the same tokens around every text, got "
            "one that does not (post_processor in tokenizer.json)"
        )
    ((head, tail),) = common
    added = tokenizer.added_tokens_decoder
    plain = [i for i in head + tail if i not in added or not added[i].special]
    if plain:
        words = tokenizer.convert_ids_to_tokens(plain)
        raise ValueError(
            f"tokenizer {folder}: expected nothing but special tokens around a text, got {words}; "
            f"if the folder was exported, its {SETTINGS} is missing"
        )
    return head, tail


def _piece_ids(tokenizer: Any, name: str, text: str) -> tuple[int, ...]:
    for token in _SPECIAL_LOOKING.findall(text):
        count = len(tokenizers.encode(tokenizer, [token], False)[0])
        if count != 1:
            special = [
                str(entry)
                for entry in tokenizer.added_tokens_decoder.values()
                if entry.special and not re.search("reserved|unused", str(entry))
            ]
            raise ValueError(
                f"fusion.{name}: expected special tokens of this tokenizer in {text!r}, got "
                f"{token}, which is {count} tokens; it has {', '.join(special) or 'none'}; set "
                f"--config.fusion.{name}"
            )
    return tuple(tokenizers.encode(tokenizer, [text], False)[0])


def _post_processor(tokenizer: Any, original: Any, outer: Prompts) -> dict[str, Any]:
    """As tokenizer.json has it: puts the prompts around a text."""
    # ids of several tokens may go by one name; an empty one is not allowed.
    pieces = {name: list(ids) for name in ("head", "tail") if (ids := getattr(outer, name))}

    def template(*sequences: str) -> list[dict[str, Any]]:
        parts = [{"Sequence": {"id": name, "type_id": 0}} for name in sequences]
        special = {name: {"SpecialToken": {"id": name, "type_id": 0}} for name in pieces}
        head = [special["head"]] if "head" in special else []
        return head + parts + ([special["tail"]] if "tail" in special else [])

    made = {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("A", "B"),
        "special_tokens": {
            name: {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in pieces.items()
        },
    }
    original = original or {}
    # Byte-level ones stay: they say how to count offsets, and leave ids alone.
    kept = [p for p in original.get("processors", [original]) if p.get("type") == "ByteLevel"]
    return {"type": "Sequence", "processors": [*kept, made]} if kept else made
