"""What stands around the texts of decoders: prompts as token ids, and in exported tokenizers.

Texts of encoders carry the tokenizer's special tokens. Texts of decoders are bare: what stands
around them, `Prompts`, is the same for all. In an exported decoder the tokenizer itself puts the
prompts around a text, and `xmc_jax.json` beside it says which they are.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from xmc_jax.data import tokenizer as tokenizers
from xmc_jax.data.types import ORDERS, Prompts
from xmc_jax.files import json_files

SETTINGS = "xmc_jax.json"
"""Of an exported decoder; see `Settings`."""

_FORMAT = 1
_PIECES = ("prefix", "image_prefix", "suffix")
_SPECIAL_LOOKING = re.compile(r"<[^<>\s]+>")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A prompt as it was written, and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What stands around texts, piece by piece.

    Attributes:
        own_head: what the tokenizer itself puts before a text (BOS), prompts apart.
        own_tail: what it puts behind a text (EOS), where there is no suffix.
        prefix: before texts.
        image_prefix: before images.
        suffix: at the end.
    """

    own_head: tuple[int, ...]
    own_tail: tuple[int, ...]
    prefix: Piece
    image_prefix: Piece
    suffix: Piece

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


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a decoder was exported with: the contents of `xmc_jax.json`.

    Attributes:
        pooling: as trained.
        max_length: T, tokens per text, prompts not counted.
        order: as trained with images; None without.
        pieces: the prompts.
    """

    pooling: str
    max_length: int
    order: str | None
    pieces: Pieces


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
        tokenizer: see `tokenizer.load`.
        folder: where it came from; if that was exported, the prompts must be those recorded there.
        prefix: before texts; "" for none.
        image_prefix: before images; "" for none.
        suffix: at the end; "" for what the tokenizer itself ends texts with, if anything.
        order: see `Pieces.prompts`.

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
        prefix: see `tokenize`; like the next two, as trained.
        image_prefix: see `tokenize`.
        suffix: see `tokenize`.
        pooling: as trained.
        max_length: T, as trained.
        order: see `Settings`.

    Raises:
        ValueError: as `tokenizer.export` and `tokenize` do.
    """
    tokenizer = tokenizers.load(source)
    pieces = _pieces(tokenizer, source, (prefix, image_prefix, suffix))
    around = around_text(pieces.prompts(order), order)
    original = tokenizers.definition(source, tokenizer).get("post_processor")
    tokenizers.export(
        source,
        folder,
        len(around.head) + max_length + len(around.tail),
        tokenizer,
        post_processor=_post_processor(tokenizer, original, around),
    )
    settings = Settings(pooling, max_length, order, pieces)
    json_files.write(epath.Path(folder) / SETTINGS, _settings_to_json(settings))


def around_text(prompts: Prompts, order: str | None) -> Prompts:
    """What stands before and behind the text of an item without images: head and tail alone."""
    head, middle, tail = prompts.head, prompts.middle, prompts.tail
    if order == "image_text":
        return Prompts(head=head + middle, tail=tail)
    return Prompts(head=head, tail=middle + tail)


def read_settings(folder: epath.PathLike) -> Settings | None:
    """What a decoder was exported with; None for a folder that is no export of one.

    Args:
        folder: of a model or a tokenizer.

    Raises:
        ValueError: the file is damaged; names the field.
    """
    path = epath.Path(folder) / SETTINGS
    if not path.is_file():
        return None
    tree = json_files.read(path)

    def take(field: str, fits, expected: str) -> Any:
        node: Any = tree
        for key in field.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        if not fits(node):
            raise ValueError(
                f"{path}: {field}: expected {expected}, got {node!r}; export the model again"
            )
        return node

    def ids(field: str) -> tuple[int, ...]:
        def fits(value):
            return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)

        return tuple(take(field, fits, "a list of token ids"))

    def text(field: str) -> str:
        return take(field, lambda value: isinstance(value, str), "a text")

    take("format", lambda value: value == _FORMAT, str(_FORMAT))
    take("padding_side", lambda value: value == "right", "right")
    return Settings(
        pooling=text("pooling"),
        max_length=take("max_length", lambda v: type(v) is int and v >= 1, "1 or more"),
        order=take("order", lambda v: v in (None, *ORDERS), f"one of {(None, *ORDERS)}"),
        pieces=Pieces(
            own_head=ids("own_head"),
            own_tail=ids("own_tail"),
            **{
                name: Piece(text(f"prompts.{name}.text"), ids(f"prompts.{name}.ids"))
                for name in _PIECES
            },
        ),
    )


def _pieces(tokenizer: Any, folder: epath.PathLike, texts: Sequence[str]) -> Pieces:
    """See `tokenize`; `texts` are those of `_PIECES`."""
    recorded = read_settings(folder)
    if recorded is None:
        head, tail = _own(tokenizer, folder)
    else:
        head, tail = recorded.pieces.own_head, recorded.pieces.own_tail
    asked = {}
    for name, text in zip(_PIECES, texts):
        ids = _piece_ids(tokenizer, name, text)
        if head and name != "suffix" and ids[: len(head)] == head:
            ids = ids[len(head) :]
        asked[name] = Piece(text, ids)
    differences = []
    for name, here in asked.items():
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
    return Pieces(head, tail, **asked)


def _own(tokenizer: Any, folder: epath.PathLike) -> tuple[tuple[int, ...], tuple[int, ...]]:
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


def _post_processor(tokenizer: Any, original: Any, around: Prompts) -> dict[str, Any]:
    """As tokenizer.json has it: puts the prompts around a text."""
    # ids of several tokens may go by one name; an empty one is not allowed.
    pieces = {name: list(ids) for name in ("head", "tail") if (ids := getattr(around, name))}

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


def _settings_to_json(settings: Settings) -> dict[str, Any]:
    pieces = settings.pieces
    return {
        "format": _FORMAT,
        "pooling": settings.pooling,
        "max_length": settings.max_length,
        "order": settings.order,
        "own_head": list(pieces.own_head),
        "own_tail": list(pieces.own_tail),
        "prompts": {
            name: {"text": getattr(pieces, name).text, "ids": list(getattr(pieces, name).ids)}
            for name in _PIECES
        },
        "padding_side": "right",
    }
