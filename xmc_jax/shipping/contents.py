"""artifact.json, the manifest of an exported folder: its fields, and the files that it names."""

import contextlib
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

import pydantic
from etils import epath
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, FiniteFloat

from xmc_jax.config import AugmentedConfig, PrimeConfig
from xmc_jax.config.model_config import Dtype, Order, Pooling
from xmc_jax.data.types import Prompts
from xmc_jax.files import atomic, digests, locks, manifests
from xmc_jax.files.array_folders import FileFacts
from xmc_jax.models import hf_weights
from xmc_jax.retrieval.augmented import RETIRED

FORMAT = 1
"""Version of the folder's layout."""
MANIFEST = "artifact.json"
PARTS = ("labels", "prototypes", "documents", "index", "thumbnails", "vision")
"""Folders of the artifact, or what their names begin with: `labels`, `labels-2`, ..."""

_LOCK = ".lock"
_UNFINISHED = re.compile(r"(^|/)\.[^/]*\.(partial|old)(/|$)")  # what a killed command left
READ = (".bin", ".json", ".model", ".npy", ".safetensors", ".txt")  # suffixes of what is opened
_MODEL_FILE = re.compile(
    rf"config\.json|(2_Dense/)?model.*\.safetensors|{re.escape(hf_weights.PROJECTION)}|tokenizer\.json"
)


def _inside(name: str) -> str:
    """A name of a file or folder within the artifact."""
    parts = pathlib.PurePosixPath(name).parts
    if not parts or ".." in parts or pathlib.PurePosixPath(name).is_absolute() or "\0" in name:
        raise ValueError(f"expected a name within the folder, found {name!r:.100}")
    return name


_Inside = Annotated[str, AfterValidator(_inside)]
_Size = Annotated[int, Field(ge=1, lt=1 << 16)]
_Count = Annotated[int, Field(ge=0)]


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """The image encoder, and how it takes images.

    Attributes:
        encoder: its name.
        revision: on the hub; None for a folder or an encoder without revisions.
        digest: of its weights; another encoder is refused.
        width: E.
        per_item: K, images taken of an item.
        layout: see `images.encoders`.
        alpha: see `images.decoding.decode`.
        dtype: of the encoder's products.
        folder: within the artifact; None where it is only named.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    encoder: str
    revision: str | None
    digest: str
    width: _Size
    per_item: _Size
    layout: str
    alpha: str
    dtype: str
    folder: _Inside | None


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """How the encoder takes an item.

    Attributes:
        digest: of the encoder's files; parts that name another were made by another model.
        width: D.
        max_length: T, tokens of a text.
        special_tokens: whether texts get the tokenizer's; without, `prompts` stand around them.
        prompts: token ids around every text of a decoder.
        text: what an item's text is: its title, or its title and then its content.
        images: None for text only.
        document_prompt: put before the text of a document before both are tokenised, for encoders.
        label_prompt: the same of a label.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    digest: str
    width: _Size
    max_length: _Size
    special_tokens: bool
    prompts: Prompts
    pooling: Pooling
    compute_dtype: Dtype
    order: Order
    positions: str
    text: Literal["title", "title_content"]
    images: ImageInput | None
    document_prompt: str = ""
    label_prompt: str = ""

    def __post_init__(self):
        tokens = (*self.prompts.head, *self.prompts.middle, *self.prompts.tail)
        if not all(0 <= token < 1 << 31 for token in tokens):
            raise ValueError(f"prompts: expected token ids of at least 0, got {tokens!r:.60}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder of the artifact.

    Attributes:
        folder: its name.
        count: of labels or documents.
        model: `ModelInput.digest` of the model that embedded them.
    """

    folder: _Inside
    count: _Count
    model: str


@dataclasses.dataclass(frozen=True)
class PrototypesPart(Part):
    config: PrimeConfig


@dataclasses.dataclass(frozen=True)
class IndexPart(Part):
    k: Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class ThumbnailsPart:
    folder: _Inside
    labels: _Count
    documents: _Count


@dataclasses.dataclass(frozen=True)
class DatasetFacts:
    name: str


def _without_retired(ranking: Any) -> Any:
    if not isinstance(ranking, dict):
        return ranking
    return {name: value for name, value in ranking.items() if name not in RETIRED}


@dataclasses.dataclass(frozen=True)
class ArtifactManifest:
    """The fields of artifact.json that are read."""

    name: str
    created: str
    step: int
    config: dict[str, Any]
    dataset: DatasetFacts
    metrics: dict[str, dict[str, FiniteFloat]]
    files: dict[_Inside, FileFacts]
    model: ModelInput
    ranking: Annotated[AugmentedConfig, BeforeValidator(_without_retired)]
    labels: Part
    prototypes: PrototypesPart | None = None
    documents: Part | None = None
    index: IndexPart | None = None
    thumbnails: ThumbnailsPart | None = None


_ADAPTER = pydantic.TypeAdapter(ArtifactManifest)


def read(folder: pathlib.Path) -> tuple[bytes, ArtifactManifest]:
    """The content of artifact.json, and its fields.

    Raises:
        ValueError: there is none, it is of another format, or a field is missing or wrong.
    """
    where = folder / MANIFEST
    try:
        if where.exists() and not where.is_file():  # a pipe would be waited for
            raise ValueError("no file")
        content = where.read_bytes()
        version = json.loads(content).get("format")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        absent = not where.exists()
        missing = folder if absent and not folder.exists() else where
        raise ValueError(
            f"{missing}: expected {MANIFEST} of an exported model, found "
            + ("none; " if absent else "a damaged file; copy the folder again, or ")
            + "make one with python -m xmc_jax.main --mode=export --workdir=FOLDER of the run"
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{where}: expected format {FORMAT}, found {version!r:.60}; export the model again "
            "with this version"
        )
    try:
        return content, _ADAPTER.validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        raise ValueError(f"{where}: {_explained(error)}") from error


def _explained(error: pydantic.ValidationError) -> str:
    """The first of pydantic's errors in one line."""
    first = error.errors(include_url=False)[0]
    where = ": ".join(" ".join(str(part).split())[:100] for part in first["loc"])
    if first["type"] == "missing":
        return f"{where}: expected a value, found none"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{where}: no such field in this version"
    if first["type"] == "value_error":
        return f"{where}: {first['ctx']['error']}"
    expected = first["msg"].replace("Input should be", "expected")
    return f"{where}: {expected}, found {first['input']!r:.60}"


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes artifact.json, with the digests of all files of the parts that it names.

    In one move: who opens the folder meanwhile sees what was there before, or this. Texts for
    people (*.md) are left out, since who ships the folder has to write in them.

    Args:
        folder: local.
        content: all but "format" and "files".
    """
    recorded = manifests.files(folder, [name for name, _ in files(folder, content)])
    text = json.dumps({"format": FORMAT, **content, "files": recorded}, indent=1, allow_nan=False)
    atomic.write(folder / MANIFEST, text + "\n")


def locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other commands from changing an artifact; see `locks.locked`."""
    return locks.locked(folder / _LOCK, str(folder), remove=True)


def folders(content: Mapping[str, Any]) -> set[str]:
    """The folders of the parts that a manifest names."""
    images = content["model"]["images"]
    carried = {images["folder"]} if images and images["folder"] else set()
    return {content[name]["folder"] for name in PARTS[:-1] if content.get(name)} | carried


def files(folder: pathlib.Path, content: Mapping[str, Any]) -> Iterator[tuple[str, pathlib.Path]]:
    """Files that a manifest has to name: not itself, texts for people, and replaced parts."""
    used = folders(content)
    for name in manifests.names(folder):
        hidden = any(part.startswith(".") for part in name.split("/"))
        for_people = name == MANIFEST or name.endswith(".md")
        if not (hidden or for_people or _is_replaced(name, used)):
            yield name, folder / name


def others(folder: epath.PathLike, content: Mapping[str, Any]) -> list[str]:
    """The files that a manifest does not name: texts for people, and what people put beside them.

    Args:
        folder: local or remote.
        content: of artifact.json, with "files".
    """
    used, recorded = folders(content), {MANIFEST, *content["files"]}
    names = settled(manifests.names(folder))
    return [name for name in names if not (name in recorded or _is_replaced(name, used))]


def settled(names: Iterable[str]) -> list[str]:
    """Names of files without those of commands that are under way or were killed."""
    return [name for name in names if name != _LOCK and not _UNFINISHED.search(name)]


def _is_replaced(name: str, used: set[str]) -> bool:
    """Whether a file is of a part that has been replaced."""
    top, _, rest = name.partition("/")
    return rest != "" and top.partition("-")[0] in PARTS and top not in used


def digest_of_model(files: Mapping[str, str]) -> str:
    """SHA-256 of what an encoder's embeddings follow from: weights, sizes, projection, tokenizer.

    Args:
        files: name -> SHA-256 of the files of an encoder's folder.
    """
    return digests.combined({n: x for n, x in files.items() if _MODEL_FILE.fullmatch(n)})
