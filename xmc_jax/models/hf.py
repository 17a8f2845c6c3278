"""Hugging Face models: found by name or folder, pinned by digest, and their config.json."""

import dataclasses
import functools
import hashlib
import pathlib
from typing import NamedTuple

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors

from xmc_jax.data import packaged
from xmc_jax.files import json_files
from xmc_jax.files.digests import sha256
from xmc_jax.models import backbone, hf_adapters, hf_files, pooled_dense
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.hf_files import INDEX, WEIGHTS
from xmc_jax.models.pooled_dense import DenseConfig
from xmc_jax.models.vision import VisionConfig

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "xmc_jax.json",  # of a folder that we exported
)
MODULES = "modules.json"
"""Of sentence-transformers: the backbone and what its output goes through."""
_MODULE_FILES = (
    MODULES,
    "*/config.json",
    "*_Dense/model.safetensors",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    hf_adapters.CONFIG,
)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where weights come from, pinned.

    Attributes:
        folder: local, with config.json and safetensors.
        name: as asked for.
        revision: the commit of a Hugging Face repository; None for a folder or a package.
        digest: SHA-256 of the weights (of the digests of the files, when there are several); ""
            where no weights were asked for.
        outer: folders whose files count before those of `folder`, the first one most: of an
            adapter, and of sentence-transformers' older layout with the model in 0_Transformer.
        adapter: the folder of an adapter whose products are added to the weights; None without.
    """

    folder: pathlib.Path
    name: str
    revision: str | None
    digest: str
    outer: tuple[pathlib.Path, ...] = ()
    adapter: pathlib.Path | None = None

    @property
    def public_name(self) -> str:
        """What others find it by: its name on the hub, or the absolute path of its folder."""
        if self.name == packaged.MINILM_NAME:
            return packaged.MINILM_HUB_NAME
        return self.name if self.revision else str(self.first_with().resolve())

    def first_with(self, *files: str) -> pathlib.Path:
        """The first folder that has one of some files; that of the weights if none has.

        Args:
            files: names; without any, the folder that the name stands for.
        """
        if not files:
            return (*self.outer, self.folder)[0]
        folders = (x for x in self.outer if any((x / file).is_file() for file in files))
        return next(folders, self.folder)

    @property
    def tokenizer(self) -> pathlib.Path:
        """The folder with the tokenizer files."""
        return self.first_with(*TOKENIZER_FILES)


def resolve(name: str, revision: str | None = None, *, weights: bool = True) -> ModelSource:
    """Finds a model: a local folder, a name of `packaged`, or one on the Hugging Face hub.

    Args:
        name: of the model. A name on the hub is `organisation/name`, downloaded on first use unless
            HF_HUB_OFFLINE is set.
        revision: branch, tag or commit on the hub.
        weights: whether there must be weights; without, for a tokenizer, the digest is "".

    Raises:
        ValueError: no such folder, nothing on the hub or no network, or no safetensors in it.
    """
    commit = None
    local = pathlib.Path(name).expanduser()
    if name == packaged.MINILM_NAME:
        given = packaged.minilm()
    elif name == packaged.TINY_DECODER_NAME:
        given = packaged.tiny_decoder()
    elif local.is_dir():
        given = local
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1:
        kind = "model" if weights else "tokenizer"
        raise ValueError(f"{name}: expected a folder with a {kind}, found none")
    else:
        given = _download(name, revision, weights)
        commit = given.name
    if revision is not None and commit is None:
        raise ValueError(
            f"{name}: expected no revision, got {revision!r}; only names on the hub have one"
        )
    if hf_adapters.is_adapter(given):
        return _with_adapter(given, name, commit, weights)
    folder = _transformer(given)
    outer = () if folder == given else (given,)
    if not weights:
        return ModelSource(folder, name, commit, "", outer)
    hf_files.check_not_quantised(folder)
    digest = _digest([_sha256(path) for path in hf_files.weight_files(folder)])
    if name == packaged.MINILM_NAME and digest != packaged.MINILM_SHA256:
        raise ValueError(
            f"{folder / WEIGHTS}: expected SHA-256 {packaged.MINILM_SHA256}, got {digest}; "
            f"reinstall {packaged.MINILM_DISTRIBUTION}=={packaged.MINILM_VERSION}"
        )
    return ModelSource(folder, name, commit, digest, outer)


def _with_adapter(
    adapter: pathlib.Path, name: str, commit: str | None, weights: bool
) -> ModelSource:
    base_name, base_revision = hf_adapters.base_of(adapter)
    try:
        base = resolve(base_name, base_revision, weights=weights)
    except ValueError as error:
        raise ValueError(
            f"{adapter / hf_adapters.CONFIG}: expected the model that the adapter was trained on, "
            f"{base_name}: {error}"
        ) from error
    if base.adapter is not None:
        raise ValueError(
            f"{adapter}: expected an adapter of a whole model, found one of the adapter {base_name}"
        )
    digest = ""
    if weights:
        files = (adapter / hf_adapters.CONFIG, adapter / hf_adapters.WEIGHTS)
        digest = _digest([base.digest, *(_sha256(path) for path in files if path.is_file())])
    return ModelSource(base.folder, name, commit, digest, (adapter, *base.outer), adapter)


def _transformer(folder: pathlib.Path) -> pathlib.Path:
    """Where the backbone is in a folder of sentence-transformers: there, or in a folder within."""
    if (folder / "config.json").is_file() or not (folder / MODULES).is_file():
        return folder
    for module in modules_of(folder):
        if module.kind == "Transformer":
            return folder / module.path
    return folder


class Module(NamedTuple):
    """An entry of modules.json.

    Attributes:
        kind: the last part of its type, such as "Pooling".
        path: of its folder within that of the model; "" for the model's own.
    """

    kind: str
    path: str


def modules_of(folder: pathlib.Path) -> list[Module]:
    """What modules.json lists, in order; nothing where there is none.

    Raises:
        ValueError: the file is malformed, or a path leads out of the folder.
    """
    path = folder / MODULES
    modules = []
    for entry in json_files.read(path, optional=True, kind=list):
        values = [entry.get(key) for key in ("type", "path")] if isinstance(entry, dict) else [None]
        inside = all(isinstance(value, str) for value in values) and not (
            values[1].startswith("/") or ".." in pathlib.PurePath(values[1]).parts
        )
        if not inside:
            raise ValueError(
                f"{path}: expected a list of modules, each with a type and a path within the "
                f"folder, found {entry!r:.100}"
            )
        modules.append(Module(values[0].rpartition(".")[2], values[1]))
    return modules


def load_config(source: ModelSource, layers: int | None = None) -> Sizes:
    """The sizes of a model, of its first layers only if asked.

    Args:
        source: see `resolve`.
        layers: how many of the first layers to keep; None keeps all.

    Raises:
        ValueError: config.json missing, malformed or of another architecture, or fewer layers.
    """
    path = source.folder / "config.json"
    raw = json_files.read(path)
    try:
        sizes = backbone.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error
    module = dense_module(source, sizes.hidden)
    if module is not None:
        sizes = dataclasses.replace(sizes, dense=module[1])
    if layers is None:
        return sizes
    if not 1 <= layers <= sizes.layers:
        raise ValueError(
            f"encoder.layers: expected 1 to {sizes.layers}, as {source.name} has, got {layers}"
        )
    return sizes.first(layers)


def dense_module(source: ModelSource, width: int) -> tuple[pathlib.Path, DenseConfig] | None:
    """The layer behind the pooling of a folder of sentence-transformers: its folder and its sizes.

    Args:
        source: see `resolve`.
        width: D.

    Returns:
        None where there is no such layer, or one that is not computed here.
    """
    modules = modules_of(folder := source.first_with(MODULES))
    kinds = [module.kind for module in modules]
    if kinds[:3] != ["Transformer", "Pooling", "Dense"] or kinds[3:] not in ([], ["Normalize"]):
        return None
    path = folder / modules[2].path
    config = pooled_dense.from_config(json_files.read(path / "config.json"), width)
    return None if config is None else (path, config)


def load_vision_config(source: ModelSource) -> VisionConfig:
    """The sizes of an image encoder.

    Args:
        source: see `resolve`.

    Raises:
        ValueError: config.json missing, malformed or of another architecture.
    """
    raw = json_files.read(source.folder / "config.json")
    try:
        return backbone.images_from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error


def _download(name: str, revision: str | None, weights: bool) -> pathlib.Path:
    patterns = ["config.json", *TOKENIZER_FILES]
    if weights:
        patterns += ["model*.safetensors", INDEX, "preprocessor_config.json", hf_adapters.WEIGHTS]
    patterns += [*(f"0_Transformer/{pattern}" for pattern in patterns), *_MODULE_FILES]
    try:
        folder = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            # Said, because some versions ask the hub for the files of a commit, offline or not.
            local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
        )
    except (OSError, huggingface_hub.errors.HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}: expected a local folder or a model on the Hugging Face hub"
            f"{f' at revision {revision}' if revision else ''}, got neither: {reason}. Download it "
            f"where there is a network (HF_HUB_OFFLINE unset) and give the folder"
        ) from error
    return pathlib.Path(folder)


def _sha256(path: pathlib.Path) -> str:
    stat = path.stat()
    return _sha256_of_version(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def _sha256_of_version(path: pathlib.Path, size: int, mtime_ns: int) -> str:
    # Gigabytes, and a process may resolve a model more than once: a file is read once per version.
    del size, mtime_ns
    return sha256(path)


def _digest(digests: list[str]) -> str:
    """One digest for several; that of one is itself."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
