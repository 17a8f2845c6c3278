"""The folder that is shipped: a model, what it ranks, and how good it was; it opens offline.

    artifact.json            what is in it: see `Artifact`; digests of all files it names
    config.json, model*.safetensors, tokenizer.json, modules.json, ...
                             the encoder, as transformers and sentence-transformers open it
    image_projection.safetensors of images
    labels/                  embeddings.npy f32[L, D], what is searched; frequency.npy i64[L];
                             ids and texts, see `xmc_jax.data.texts`; perhaps prior.npy f64[L]
    prototypes/              what prototypes of changed labels are made of: text.npy f32[L, D],
                             centroids.npy f32[L, D], free_vector_of.npy i32[L], free_vectors.npy
                             f32[C, D], combiner.safetensors
    documents/               embeddings.npy f32[N, D]; their labels: positives.indptr.npy,
                             positives.indices.npy; ids and texts
    index/                   of ScaNN, over the labels
    thumbnails/              small pictures of labels and documents, see `inference.thumbnails`
    vision/                  the image encoder, where it is carried
    README.md, DATA_CARD.md, LICENSE.md for people, who can add to them: artifact.json has their
                             digests as they were written, so that an edit is known

`artifact.json` is written last and names the folders of the parts, so that a part can be replaced
as a whole: the new one is written beside the old one, and the manifest decides.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from xmc_jax.config import AugmentedConfig, EncoderConfig, PrimeConfig, choices
from xmc_jax.data import texts
from xmc_jax.data.csr import Csr
from xmc_jax.data.types import ORDERS, Prompts
from xmc_jax.files import array_files, atomic, digests, locks, manifests
from xmc_jax.models import hf_weights
from xmc_jax.retrieval.augmented import RETIRED
from xmc_jax.runtime.wording import counted
from xmc_jax.shipping.packed_thumbnails import KINDS, Thumbnails

FORMAT = 1
"""Version of the folder's layout."""
MANIFEST = "artifact.json"
_LOCK = ".lock"
TEXTS = ("title", "title_content")
"""What an item's text may be made of."""
PARTS = ("labels", "prototypes", "documents", "index", "thumbnails", "vision")
"""Folders of the artifact, or what their names begin with: `labels`, `labels-2`, ..."""

_UNFINISHED = re.compile(r"(^|/)\.[^/]*\.(partial|old)(/|$)")  # what a killed command left
_READ = (".bin", ".json", ".model", ".npy", ".safetensors", ".txt")  # suffixes of what is opened
_MODEL_FILE = re.compile(
    rf"config\.json|(2_Dense/)?model.*\.safetensors|{re.escape(hf_weights.PROJECTION)}|tokenizer\.json"
)


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """What makes the vectors of an item's images, and how.

    Attributes:
        encoder: its name.
        revision: on the hub; None for a folder or what has no revisions.
        digest: of its weights; another encoder is refused.
        width: E.
        per_item: K, images taken of an item.
        dtype: of the encoder's products.
        folder: within the artifact; None where it is only named.
    """

    encoder: str
    revision: str | None
    digest: str
    width: int
    per_item: int
    layout: str
    alpha: str
    dtype: str
    folder: str | None

    def __post_init__(self):
        for name in ("width", "per_item"):
            if not 1 <= getattr(self, name) < 1 << 16:
                raise ValueError(f"{name}: expected 1 to 65535, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """How the encoder takes an item.

    Attributes:
        digest: of the encoder's files; parts that name another were made by another model.
        width: D.
        max_length: T, tokens of a text.
        special_tokens: whether texts get the tokenizer's; without, `prompts` stand around them.
        prompts: token ids around every text of a decoder.
        document_prompt: what is put before the text of a document before both are tokenised, for
            encoders.
        label_prompt: the same of a label.
        text: what an item's text is, "title" or "title_content", the title and then the content.
        images: None for text only.
    """

    digest: str
    width: int
    max_length: int
    special_tokens: bool
    prompts: Prompts
    pooling: str
    compute_dtype: str
    order: str
    positions: str
    text: str
    images: ImageInput | None
    document_prompt: str = ""
    label_prompt: str = ""

    def __post_init__(self):
        for name, known in (
            ("pooling", choices(EncoderConfig, "pooling")),
            ("compute_dtype", choices(EncoderConfig, "compute_dtype")),
            ("order", ORDERS),
            ("text", TEXTS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")
        for name in ("width", "max_length"):
            if not 1 <= getattr(self, name) < 1 << 16:
                raise ValueError(f"{name}: expected 1 to 65535, got {getattr(self, name)}")
        prompts = (*self.prompts.head, *self.prompts.middle, *self.prompts.tail)
        if not all(0 <= token < 1 << 31 for token in prompts):
            raise ValueError(f"prompts: expected token ids of at least 0, got {prompts!r:.60}")


@dataclasses.dataclass(frozen=True)
class Part:
    """A folder of the artifact.

    Attributes:
        folder: its name.
        count: of labels or documents.
        model: `ModelInput.digest` of the model that embedded them.
    """

    folder: str
    count: int
    model: str


@dataclasses.dataclass(frozen=True, eq=False)
class Labels:
    """The L labels.

    Attributes:
        ids: identifiers, all different.
        texts: what they say.
        embeddings: f32[L, D], prototypes with PRIME, else of their texts: unit vectors, but for
            labels added later, see `NewLabelsConfig.scale`.
        frequency: i64[L], training documents of each; 0 for those added later.
        prior: f64[L], see `augmented.rank`; None without.
    """

    ids: texts.Texts
    texts: texts.Texts
    embeddings: np.ndarray
    frequency: np.ndarray
    prior: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The N training documents, for retrieval-augmented ranking.

    Attributes:
        ids: identifiers.
        texts: what they say.
        embeddings: f32[N, D], unit vectors.
        positives: [N, L].
    """

    ids: texts.Texts
    texts: texts.Texts
    embeddings: np.ndarray
    positives: Csr

    def __len__(self) -> int:
        return len(self.embeddings)


@dataclasses.dataclass(frozen=True, eq=False)
class Prototypes:
    """What prototypes are made of; see the module and `dual.DualEncoder.prototype`.

    Attributes:
        config: of the combiner.
        text: f32[L, D], pooled embeddings of the labels' texts.
        centroids: f32[L, D].
        free_vector_of: i32[L].
        free_vectors: f32[C, D].
        combiner: file of its parameters; one without any has none.
    """

    config: PrimeConfig
    text: np.ndarray
    centroids: np.ndarray
    free_vector_of: np.ndarray
    free_vectors: np.ndarray
    combiner: pathlib.Path


@dataclasses.dataclass(frozen=True, eq=False)
class Artifact:
    """An opened artifact; arrays are memory-mapped.

    Attributes:
        folder: where it lies.
        manifest: artifact.json.
        digest: SHA-256 of artifact.json: two with the same are the same.
        ranking: weights of the score, see `AugmentedConfig`; not enabled without documents.
        documents: None where they were left out.
        index: folder of the labels' ScaNN index; None without.
        thumbnails: pictures of "labels" and "documents", where some have one.
    """

    folder: pathlib.Path
    manifest: Mapping[str, Any]
    digest: str
    model: ModelInput
    ranking: AugmentedConfig
    labels: Labels
    documents: Documents | None
    index: pathlib.Path | None
    thumbnails: Mapping[str, Thumbnails]

    @property
    def name(self) -> str:
        """What the config called the run."""
        return self.manifest["name"]

    @property
    def step(self) -> int:
        """Of the checkpoint that was exported."""
        return self.manifest["step"]

    def prototypes(self) -> Prototypes | None:
        """What prototypes are made of; None without PRIME, or where it was left out.

        Raises:
            ValueError: damaged files.
        """
        section, where = self.manifest.get("prototypes"), self.folder / MANIFEST
        if section is None:
            return None
        folder = self.folder / section["folder"]
        shape = self.labels.embeddings.shape
        free_vectors = _array(folder / "free_vectors.npy", np.float32, (None, shape[1]))
        return Prototypes(
            config=parse(PrimeConfig, section.get("config"), f"{where}: prototypes: config"),
            text=_array(folder / "text.npy", np.float32, shape),
            centroids=_array(folder / "centroids.npy", np.float32, shape),
            free_vector_of=_ids(
                folder / "free_vector_of.npy", np.int32, shape[:1], len(free_vectors)
            ),
            free_vectors=free_vectors,
            combiner=folder / "combiner.safetensors",
        )


def open(folder, verify: bool = True) -> Artifact:
    """Opens an artifact after checking it against its manifest.

    Args:
        folder: local.
        verify: also hash every file (2 GB a second, about); sizes are always checked.

    Raises:
        ValueError: no artifact, one of another format, a file that is missing or not the recorded
            one, or labels, documents or an index of another model.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"artifact: expected a folder, got {folder!r:.60}")
    folder = pathlib.Path(folder)
    where = folder / MANIFEST
    try:
        if where.exists() and not where.is_file():  # a pipe would be waited for
            raise ValueError("no file")
        content = where.read_bytes()
        manifest = json.loads(content)
        files = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        absent = not where.exists()
        missing = folder if absent and not folder.exists() else where
        raise ValueError(
            f"{missing}: expected {MANIFEST} of an exported model, found "
            + ("none; " if absent else "a damaged file; copy the folder again, or ")
            + "make one with python -m xmc_jax.main --mode=export --workdir=FOLDER of the run"
        ) from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{where}: expected format {FORMAT}, found {manifest.get('format')!r}; export the "
            "model again with this version"
        )
    kinds = {"name": str, "created": str, "step": int}
    kinds |= {"config": dict, "dataset": dict, "metrics": dict}
    for name, kind in kinds.items():
        if type(manifest.get(name)) is not kind:
            raise ValueError(
                f"{where}: {name}: expected {kind.__name__}, found {manifest.get(name)!r:.60}"
            )
    _check_shown(where, manifest)
    check_files(folder, files, verify)
    recorded_model = manifest.get("model")
    if isinstance(recorded_model, dict):  # exports of earlier versions have no such fields
        recorded_model = {"document_prompt": "", "label_prompt": ""} | recorded_model
    model = parse(ModelInput, recorded_model, f"{where}: model")
    recorded = {name: str(facts.get("sha256")) for name, facts in files.items()}
    if (digest := digest_of_model(recorded)) != model.digest:
        raise ValueError(
            f"{folder}: expected the model {model.digest[:12]}, found {digest[:12]}; its labels "
            "are of another model: export both together"
        )
    if model.images is not None and model.images.folder is not None:
        _check_inside(where, model.images.folder)
    sections = {}
    for name in ("labels", "prototypes", "documents", "index"):
        section = manifest.get(name)
        if section is None and name != "labels":
            sections[name] = None
            continue
        sections[name] = part = parse(Part, section, f"{where}: {name}", partly=True)
        _check_part(folder, name, part, model.digest)
    shape = sections["labels"].count, model.width
    ranking = manifest.get("ranking")
    if isinstance(ranking, dict):
        ranking = {name: value for name, value in ranking.items() if name not in RETIRED}
    ranking = parse(AugmentedConfig, ranking, f"{where}: ranking")
    labels = _labels(folder / sections["labels"].folder, shape, ranking.prior is not None)
    documents = None
    if sections["documents"] is not None:
        part = sections["documents"]
        documents = _documents(folder / part.folder, (part.count, model.width), shape[0])
    index = sections["index"]
    if index is not None and index.count != len(labels):
        raise ValueError(
            f"{folder / index.folder}: expected an index of the {counted(len(labels), 'label')}, "
            "found one of "
            f"{index.count}; build it again"
        )
    for name, path in _files(folder, manifest):
        if name not in files and path.suffix.lower() in _READ:
            raise ValueError(
                f"{path}: expected only files that {MANIFEST} names, found another; remove it, or "
                "copy or export the folder again"
            )
    return Artifact(
        folder=folder,
        manifest=manifest,
        digest=hashlib.sha256(content).hexdigest(),
        model=model,
        ranking=ranking,
        labels=labels,
        documents=documents,
        index=None if index is None else folder / index.folder,
        thumbnails=_thumbnails(folder, manifest),
    )


def check_files(folder: pathlib.Path, files: Any, verify: bool) -> None:
    """Raises ValueError unless the recorded files, and only such within the folder, are there."""
    where = folder / MANIFEST
    if not isinstance(files, dict) or not all(isinstance(f, dict) for f in files.values()):
        raise ValueError(f"{where}: files: expected names with bytes and sha256, found others")
    for name in files:
        _check_inside(where, name)
    if found := manifests.damage(folder, files, verify):
        raise ValueError(
            f"{found}: a damaged file, or one of another model; copy or export the folder again"
        )


def write_manifest(folder: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes artifact.json, with the digests of all files of the parts that it names.

    In one move: who opens the folder meanwhile sees what was there before, or this. Texts for
    people (*.md) are left out, since who ships the folder has to write in them.

    Args:
        folder: local.
        content: all but "format" and "files".
    """
    files = manifests.files(folder, [name for name, _ in _files(folder, content)])
    text = json.dumps({"format": FORMAT, **content, "files": files}, indent=1, allow_nan=False)
    atomic.write(folder / MANIFEST, text + "\n")


def locked(folder: pathlib.Path) -> contextlib.AbstractContextManager[None]:
    """Keeps other commands from changing an artifact; see `locks.locked`."""
    return locks.locked(folder / _LOCK, str(folder), remove=True)


def folders(content: Mapping[str, Any]) -> set[str]:
    """The folders of the parts that a manifest names."""
    images = content["model"]["images"]
    carried = {images["folder"]} if images and images["folder"] else set()
    return {content[name]["folder"] for name in PARTS[:-1] if content.get(name)} | carried


def _files(folder: pathlib.Path, content: Mapping[str, Any]) -> Iterator[tuple[str, pathlib.Path]]:
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


def parse(kind: type, tree: Any, where: str, partly: bool = False) -> Any:
    """A dataclass from JSON, every field there and of its type.

    Args:
        kind: the dataclass; fields may be dataclasses and tuples.
        tree: what was read.
        where: what an error begins with.
        partly: whether other fields may be there.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"{where}: expected an object, found {tree!r}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(tree) - set(hints))
    if unknown and not partly:
        raise ValueError(f"{where}: {unknown[0]}: no such field in this version")
    values = {}
    for name, hint in hints.items():
        if name not in tree:
            raise ValueError(f"{where}: {name}: expected a value, found none")
        values[name] = _value(hint, tree[name], f"{where}: {name}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if several else (hint,)
    if typing.get_origin(hint) is typing.Literal:
        options = (str,)
    if value is None and type(None) in options:
        return None
    for option in options:
        if dataclasses.is_dataclass(option):
            return parse(option, value, where)
        if typing.get_origin(option) is tuple and isinstance(value, list):
            each = typing.get_args(option)[0]
            return tuple(_value(each, one, where) for one in value)
        if option is float and type(value) is int:
            return float(value)
        if type(value) is option:
            return value
    expected = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"{where}: expected {expected}, found {value!r}")


def _check_shown(where: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """What a server says of the model."""
    if type(name := manifest["dataset"].get("name")) is not str:
        raise ValueError(f"{where}: dataset: name: expected str, found {name!r:.60}")
    for row, metrics in manifest["metrics"].items():
        numbers = metrics.values() if isinstance(metrics, dict) else (None,)
        if not all(type(one) in (int, float) and math.isfinite(one) for one in numbers):
            raise ValueError(f"{where}: metrics: {row}: expected numbers, found {metrics!r:.60}")


def _labels(folder: pathlib.Path, shape: tuple[int, int], prior: bool) -> Labels:
    return Labels(
        ids=_texts(folder, "ids", shape[0]),
        texts=_texts(folder, "texts", shape[0]),
        embeddings=_array(folder / "embeddings.npy", np.float32, shape),
        frequency=_array(folder / "frequency.npy", np.int64, shape[:1]),
        prior=_array(folder / "prior.npy", np.float64, shape[:1]) if prior else None,
    )


def _documents(folder: pathlib.Path, shape: tuple[int, int], num_labels: int) -> Documents:
    indptr = _array(folder / "positives.indptr.npy", np.int64, (shape[0] + 1,))
    if indptr[0] != 0 or (np.diff(indptr) < 0).any():
        raise ValueError(f"{folder}/positives.indptr.npy: expected ascending offsets from 0")
    path = folder / "positives.indices.npy"
    indices = _ids(path, np.int32, (int(indptr[-1]),), num_labels)
    return Documents(
        ids=_texts(folder, "ids", shape[0]),
        texts=_texts(folder, "texts", shape[0]),
        embeddings=_array(folder / "embeddings.npy", np.float32, shape),
        positives=Csr(indptr, indices, None, num_labels),
    )


def _thumbnails(folder: pathlib.Path, manifest: Mapping[str, Any]) -> dict[str, Thumbnails]:
    section, where = manifest.get("thumbnails"), folder / MANIFEST
    if section is None:
        return {}
    counts = {kind: section.get(kind) for kind in KINDS} if isinstance(section, dict) else {}
    if not counts or not all(type(count) is int for count in counts.values()):
        raise ValueError(f"{where}: thumbnails: expected a folder and counts, found {section!r}")
    _check_inside(where, section.get("folder"))
    opened = {}
    for kind in (kind for kind in KINDS if counts[kind]):
        opened[kind] = found = Thumbnails(folder / section["folder"], kind)
        if len(found) != counts[kind]:
            raise ValueError(
                f"{folder / section['folder']}: expected {counted(counts[kind], 'picture')} of "
                f"{kind}, found {len(found)}; copy or export the folder again"
            )
    return opened


def _texts(folder: pathlib.Path, name: str, count: int) -> texts.Texts:
    opened = texts.open(folder, name)
    if len(opened) != count:
        raise ValueError(f"{folder / name}: expected {counted(count, 'text')}, found {len(opened)}")
    return opened


def _ids(path: pathlib.Path, dtype: type, shape: tuple[int, ...], limit: int) -> np.ndarray:
    ids = _array(path, dtype, shape)
    if len(ids) and (ids.min() < 0 or ids.max() >= limit):
        raise ValueError(f"{path}: expected numbers in [0, {limit}), found others")
    return ids


def _array(path: pathlib.Path, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    try:
        array = array_files.mapped(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected an array, found: {error}") from error
    fits = len(array.shape) == len(shape) and all(
        size in (None, found) for size, found in zip(shape, array.shape)
    )
    if array.dtype != dtype or not fits:
        raise ValueError(
            f"{path}: expected {np.dtype(dtype)}{list(shape)}, found "
            f"{array.dtype}{list(array.shape)}"
        )
    return array


def _check_part(folder: pathlib.Path, name: str, part: Part, digest: str) -> None:
    _check_inside(folder / MANIFEST, part.folder)
    if part.model != digest:
        raise ValueError(
            f"{folder / part.folder}: expected {name} of the model {digest[:12]}, found those of "
            f"{part.model[:12]}; export labels and model together"
        )


def _check_inside(where: pathlib.Path, name: Any) -> None:
    parts = pathlib.PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or pathlib.PurePosixPath(name).is_absolute() or "\0" in name:
        raise ValueError(f"{where}: expected a name within the folder, found {name!r}")
