"""Hugging Face folders in: find them, config.json and safetensors to our parameters. No pickles."""

import collections
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import jax
import numpy as np
import safetensors
from absl import logging
from flax import traverse_util

from xmc_jax.data import packaged
from xmc_jax.files import json_files
from xmc_jax.files.digests import sha256
from xmc_jax.models import backbone, hf_adapters, hf_files, hf_names, pooled_dense, vision
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.hf_files import INDEX, WEIGHTS
from xmc_jax.models.pooled_dense import DenseConfig
from xmc_jax.models.vision import VisionConfig

PROJECTION = "image_projection.safetensors"
"""Of an encoder exported with images; not a file of Hugging Face's."""
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
_BLOCK_BYTES = 1 << 25  # of a table read at a time


@dataclasses.dataclass(frozen=True)
class Source:
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


def resolve(name: str, revision: str | None = None, *, weights: bool = True) -> Source:
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
        return Source(folder, name, commit, "", outer)
    hf_files.check_not_quantised(folder)
    digest = _digest([_sha256(path) for path in hf_files.weight_files(folder)])
    if name == packaged.MINILM_NAME and digest != packaged.MINILM_SHA256:
        raise ValueError(
            f"{folder / WEIGHTS}: expected SHA-256 {packaged.MINILM_SHA256}, got {digest}; "
            f"reinstall {packaged.MINILM_DISTRIBUTION}=={packaged.MINILM_VERSION}"
        )
    return Source(folder, name, commit, digest, outer)


def _with_adapter(adapter: pathlib.Path, name: str, commit: str | None, weights: bool) -> Source:
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
    return Source(base.folder, name, commit, digest, (adapter, *base.outer), adapter)


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


def load_config(source: Source, layers: int | None = None) -> Sizes:
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


def dense_module(source: Source, width: int) -> tuple[pathlib.Path, DenseConfig] | None:
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


def load_vision_config(source: Source) -> VisionConfig:
    """The sizes of an image encoder.

    Args:
        source: see `resolve`.

    Raises:
        ValueError: config.json missing, malformed or of another architecture.
    """
    raw = json_files.read(source.folder / "config.json")
    try:
        return vision.from_hf(raw)
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error


def load_params(
    source: Source, sizes: Sizes | VisionConfig, abstract: Any = None
) -> dict[str, Any]:
    """The parameters of a backbone or image encoder, layers stacked; no head, no adapters.

    With `abstract`, what this process reads is what its devices hold, and beside the arrays made it
    holds one of them at a time, the largest first.

    Args:
        source: see `resolve`.
        sizes: of the model; layers past `sizes.layers` are left out.
        abstract: nested dicts of ShapeDtypeStructs with shardings, of the parameters wanted and as
            they are wanted; None is all, as numpy float32.

    Returns:
        The subtree "backbone" (or of an image encoder all), or the part of it that is asked for.

    Raises:
        ValueError: unreadable weights; or all tensors missing, not known or of another shape.
    """
    home = _homes(source, sizes)
    flat = dict(hf_names.shapes(sizes)) | _dense_shapes(sizes)
    if abstract is None:
        wanted = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in flat.items()}
    else:
        wanted = traverse_util.flatten_dict(abstract, sep="/")
    loaded = {}
    for path, leaf in sorted(
        wanted.items(), key=lambda item: -item[1].size * item[1].dtype.itemsize
    ):
        tensors = [home[name] for name in hf_names.of_path(path, sizes)]
        read = _reader(path, tensors, leaf)
        if abstract is None:
            loaded[path] = read((slice(None),) * len(leaf.shape))
        else:
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
            # Copied in the background: without waiting, the next is read beside what is copied.
            loaded[path] = jax.block_until_ready(array)
    return traverse_util.unflatten_dict(loaded, sep="/")


def check(source: Source, layers: int | None = None) -> None:
    """Reads no weights, only whether they are there and fit.

    Args:
        source: see `resolve`.
        layers: see `load_config`.

    Raises:
        ValueError: see `load_config` and `load_params`.
    """
    _homes(source, load_config(source, layers))


def load_projection(source: Source, width: int) -> dict[str, np.ndarray] | None:
    """The projection of images of an exported folder: "kernel" f32[E, D] and "bias" f32[D].

    Args:
        source: see `resolve`.
        width: E of the images at hand.

    Returns:
        None for a folder without one.

    Raises:
        ValueError: a damaged file, or one for images of another width.
    """
    path = source.first_with(PROJECTION) / PROJECTION
    if not path.is_file():
        return None
    with hf_files.opened(path) as file:
        try:
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: expected the tensors weight and bias: {error}") from error
    if weight.shape != (*bias.shape, width):
        raise ValueError(
            f"{path}: expected a projection of images {width} wide, found one of "
            f"{list(weight.shape)}; choose the images it was trained with (--config.data.images)"
        )
    return {"kernel": np.ascontiguousarray(weight.T, np.float32), "bias": np.float32(bias)}


def load_tree(path: pathlib.Path, abstract: Any) -> dict[str, Any]:
    """Parameters that `hf_export.tree` wrote, as numpy float32.

    Args:
        path: a safetensors file.
        abstract: nested dicts of leaves with a shape: what must be there.

    Raises:
        ValueError: a damaged file, or other parameters.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    with hf_files.opened(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        expected = {name: tuple(leaf.shape) for name, leaf in wanted.items()}
        if found != expected:
            raise ValueError(f"{path}: expected {expected}, found {found}; export the model again")
        flat = {name: np.float32(file.get_tensor(name)) for name in wanted}
    return traverse_util.unflatten_dict(flat, sep="/")


class _Stored(NamedTuple):
    """A tensor in a file, and what an adapter adds to it."""

    path: pathlib.Path
    name: str
    product: hf_adapters.LowRank | None = None


def _homes(source: Source, sizes: Sizes | VisionConfig) -> dict[str, _Stored]:
    # Name of our table -> where it is, after all are found to be there and to fit.
    home: dict[str, pathlib.Path] = {}
    found: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in hf_files.weight_files(source.folder):
        with hf_files.opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                home[name], found[name], dtypes[name] = (
                    path,
                    tuple(part.get_shape()),
                    part.get_dtype(),
                )
    images = isinstance(sizes, VisionConfig)
    whole = load_vision_config(source) if images else load_config(source)
    try:
        match = hf_names.match(found, sizes, range(sizes.layers, whole.layers))
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error
    expected = {
        name: hf_names.stored_shape(path, shape, sizes)
        for path, shape in hf_names.shapes(sizes).items()
        for name in hf_names.of_path(path, sizes)
    }
    stored = match.stored
    missing = sorted(match.prefix + name for name in set(expected) - set(stored))
    misshaped = [
        f"{stored[name]} expected {expected[name]} got {found[stored[name]]}"
        for name in sorted(stored)
        if expected[name] != found[stored[name]]
    ]
    hf_files.check_dtypes(source.folder, {dtypes[name] for name in stored.values()})
    if missing or match.unknown or misshaped:
        raise ValueError(
            f"{source.folder}: weights do not fit a {sizes.family} of {sizes.layers} layers. "
            f"Missing: {_some(missing)}. Not known: {_some(match.unknown)}. "
            f"Misshaped: {_some(misshaped)}"
        )
    if match.heads:
        counts = collections.Counter(name.partition(".")[0] for name in match.heads)
        parts = ", ".join(f"{name} ({count})" for name, count in counts.items())
        _say(f"{source.folder}: tensors left out, as no part of the backbone: {parts}")
    products: Mapping[str, hf_adapters.LowRank] = {}
    if source.adapter is not None:
        kernels = {
            name.removesuffix(".weight")
            for path in hf_names.shapes(whole)
            if hf_names.is_transposed(path)
            for name in hf_names.of_path(path, whole)
        }
        products = hf_adapters.products(source.adapter, kernels)
    return {
        name: _Stored(home[there], there, products.get(name.removesuffix(".weight")))
        for name, there in stored.items()
    } | _dense_homes(source, sizes)


def _dense_shapes(sizes: Sizes | VisionConfig) -> dict[str, tuple[int, ...]]:
    if getattr(sizes, "dense", None) is None:
        return {}
    return pooled_dense.shapes(sizes.dense, sizes.hidden)


def _dense_homes(source: Source, sizes: Sizes | VisionConfig) -> dict[str, _Stored]:
    """Where the layer behind the pooling is; nothing where there is none."""
    expected = {
        hf_names.of_path(path, sizes)[0]: hf_names.stored_shape(path, shape, sizes)
        for path, shape in _dense_shapes(sizes).items()
    }
    if not expected:
        return {}
    folder, _ = dense_module(source, sizes.hidden)
    (path,) = hf_files.weight_files(folder)
    with hf_files.opened(path) as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if found != expected:
        raise ValueError(f"{path}: expected {expected}, found {found}; download it again")
    return {name: _Stored(path, name) for name in expected}


@functools.lru_cache
def _say(line: str) -> None:
    """Once in a process."""
    logging.info("%s", line)


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _reader(path: str, tensors: list[_Stored], leaf: jax.ShapeDtypeStruct):
    # Of a part of a parameter; one that several devices hold is read once.
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
        if bounds not in parts:
            parts[bounds] = _read(path, tensors, leaf.dtype, bounds)
        return parts[bounds]

    return read


def _read(
    path: str,
    tensors: list[_Stored],
    dtype: np.dtype,
    bounds: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """The part of a parameter within `bounds`: its layers one after the other, a table by blocks.

    A file is open only while a layer is read from it: the pages that reading maps are then dropped.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    stacked, transposed = hf_names.is_stacked(path), hf_names.is_transposed(path)
    if stacked or transposed:
        within = [slice(*bound) for bound in (bounds[1:] if stacked else bounds)]
        rows = out if stacked else out[None]
        for row, layer in zip(rows, range(*bounds[0]) if stacked else (0,)):
            part = _slice(tensors[layer], tuple(within[::-1] if transposed else within))
            row[...] = part.T if transposed else part
        return out
    rows = max(1, _BLOCK_BYTES // max(1, out[:1].nbytes))
    for start in range(*bounds[0], rows):
        stop = min(start + rows, bounds[0][1])
        block = slice(start - bounds[0][0], stop - bounds[0][0])
        out[block] = _slice(tensors[0], (slice(start, stop), *(slice(*b) for b in bounds[1:])))
    return out


def _slice(tensor: _Stored, index: tuple[slice, ...]) -> np.ndarray:
    with hf_files.opened(tensor.path) as file:
        part = file.get_slice(tensor.name)
        if len(shape := part.get_shape()) > len(index):  # a convolution: its last axes are one
            return part[:].reshape(*shape[: len(index) - 1], -1)[index]
        part = part[index]
    if tensor.product is None:
        return part
    with hf_files.opened(tensor.product.path) as file:
        a = np.float32(file.get_slice(tensor.product.a)[:, index[1]])
        b = np.float32(file.get_slice(tensor.product.b)[index[0], :])
    return np.float32(part) + np.float32(tensor.product.scale) * (b @ a)


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
