"""Hugging Face folders out: a model, or its adapters alone, as sentence-transformers opens them.

They hold the backbone, all that documents need: label prototypes are rows of an index. Tokenizer
files are `data.tokenizer.export`'s.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import jax
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util

from xmc_jax.config import LoraConfig
from xmc_jax.files import json_files
from xmc_jax.models import backbone, hf, hf_modules, hf_names, pooled_dense
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.layers import NO_LORA

_SHARD = "2GB"  # a shard is in memory twice while it is written
_ADAPTER = "adapter_model.safetensors"


def merged(
    folder: epath.PathLike,
    params: dict[str, Any],
    sizes: Sizes,
    *,
    lora: LoraConfig = NO_LORA,
    pooling: str,
    max_length: int,
    prompts: tuple[str, str] = ("", ""),
    dtype: str = "float32",
) -> None:
    """Writes a folder that `transformers` and `SentenceTransformer(folder)` load.

    Args:
        folder: empty, or made; may be remote.
        params: the subtree "backbone", unboxed, adapters included.
        sizes: of the model.
        lora: of the adapters.
        pooling: as trained.
        max_length: S, tokens of the longest sequence, prompts included.
        prompts: see `hf_modules.write`.
        dtype: of the weights.
    """
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    stored = {}
    for path, shape in hf_names.shapes(sizes).items():
        shape = shape[1:] if hf_names.is_stacked(path) else shape
        for layer, name in enumerate(hf_names.of_path(path, sizes)):
            stored[name] = (path, layer, jax.ShapeDtypeStruct(shape, np.dtype(dtype)))
    split = huggingface_hub.split_state_dict_into_shards_factory(
        {name: leaf for name, (_, _, leaf) in stored.items()},
        get_storage_size=lambda leaf: leaf.size * leaf.dtype.itemsize,
        filename_pattern=hf.WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=_SHARD,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            path, layer, leaf = stored[name]
            tensor = _merged(flat, path, layer, lora)
            tensor = tensor.T if hf_names.is_transposed(path) else tensor
            tensors[name] = np.ascontiguousarray(tensor.astype(leaf.dtype))
        (folder / file).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        json_files.write(folder / hf.INDEX, index)
    json_files.write(folder / "config.json", backbone.to_hf(sizes) | {"dtype": dtype})
    _write_modules(folder, flat, sizes, pooling, max_length, prompts)


def adapter(
    folder: epath.PathLike,
    params: dict[str, Any],
    sizes: Sizes,
    *,
    lora: LoraConfig,
    source: hf.Source,
    pooling: str,
    max_length: int,
    prompts: tuple[str, str] = ("", ""),
) -> None:
    """Writes a folder that `peft` and `SentenceTransformer(folder)` load onto the pretrained model.

    Args:
        folder: see `merged`.
        params: see `merged`; only adapters are read.
        sizes: see `merged`.
        lora: see `merged`.
        source: of the pretrained model, whose name, revision or folder is recorded.
        pooling: see `merged`.
        max_length: see `merged`.
        prompts: see `merged`.

    Raises:
        ValueError: there are no adapters, layers of the model were left out, or it had adapters
            before, which are merged into its weights.
    """
    if not lora.rank:
        raise ValueError(
            "export.format: expected 'merged' for a model without adapters (encoder.lora.rank=0), "
            "got 'adapter'"
        )
    if (whole := hf.load_config(source).layers) != sizes.layers:
        raise ValueError(
            f"export.format: expected 'merged' for the first {sizes.layers} of the {whole} layers "
            f"of {source.name}, got 'adapter'"
        )
    if source.adapter is not None:
        raise ValueError(
            f"export.format: expected 'merged' for training that began with the adapter "
            f"{source.name}, which is merged into the weights, got 'adapter'"
        )
    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = traverse_util.flatten_dict(params, sep="/")
    prefix = "base_model.model." + _inner_prefix(source)
    tensors, modules = {}, set()
    for path, leaf in flat.items():
        module, _, kind = path.rpartition("/")
        if kind not in ("lora_a", "lora_b"):
            continue
        for layer, name in enumerate(hf_names.of_path(module + "/kernel", sizes)):
            name = name.removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            tensor = np.asarray(jax.device_get(leaf[layer]), np.float32).T
            tensors[f"{prefix}{name}.{kind.replace('_a', '_A').replace('_b', '_B')}.weight"] = (
                np.ascontiguousarray(tensor)
            )
    (folder / _ADAPTER).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
    # In a model with images, those of the vision tower have the same names.
    inner = _inner_prefix(source).replace(".", r"\.")
    targets = rf".*{inner}layers\..*\.({'|'.join(sorted(modules))})" if inner else sorted(modules)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": source.public_name,
        "revision": source.revision,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.scaling == "rslora",
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    json_files.write(folder / "adapter_config.json", config)
    _write_modules(folder, flat, sizes, pooling, max_length, prompts)


def projection(folder: epath.PathLike, params: dict[str, Any], encoder: Mapping[str, Any]) -> None:
    """Writes the projection of images beside a model: `weight` [D, E] and `bias` [D].

    Args:
        folder: exists.
        params: the subtree "projection".
        encoder: of the images, as their folder records it; goes into the file's metadata.
    """
    values = {name: np.asarray(jax.device_get(leaf), np.float32) for name, leaf in params.items()}
    tensors = {"weight": np.ascontiguousarray(values["kernel"].T), "bias": values["bias"]}
    metadata = {"format": "pt", **{f"encoder.{key}": str(v) for key, v in encoder.items()}}
    content = safetensors.numpy.save(tensors, metadata=metadata)
    (epath.Path(folder) / hf.PROJECTION).write_bytes(content)


def tree(path: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Writes parameters by their paths, float32; `hf.load_tree` reads them."""
    flat = traverse_util.flatten_dict(params, sep="/")
    tensors = {
        name: np.ascontiguousarray(jax.device_get(leaf), np.float32) for name, leaf in flat.items()
    }
    path.write_bytes(safetensors.numpy.save(tensors))


def _merged(flat: dict[str, Any], path: str, layer: int, lora: LoraConfig) -> np.ndarray:
    """float32 of one tensor, in our orientation, with its adapters if it has some."""

    def one(path: str) -> np.ndarray:
        leaf = flat[path][layer] if hf_names.is_stacked(path) else flat[path]
        return np.asarray(jax.device_get(leaf)).astype(np.float32)

    module, _, kind = path.rpartition("/")
    if kind == "kernel" and f"{module}/lora_a" in flat:
        product = one(f"{module}/lora_a") @ one(f"{module}/lora_b")
        return one(path) + np.float32(lora.scale) * product
    return one(path)


def _write_modules(
    folder: epath.Path,
    flat: Mapping[str, Any],
    sizes: Sizes,
    pooling: str,
    max_length: int,
    prompts: tuple[str, str],
) -> None:
    dense = hf_modules.write(folder, sizes, pooling, max_length, prompts)
    if dense is not None:
        tensors = {}
        for path in pooled_dense.shapes(sizes.dense, sizes.hidden):
            value = np.asarray(jax.device_get(flat[path]), np.float32)
            value = value.T if hf_names.is_transposed(path) else value
            tensors[hf_names.of_path(path, sizes)[0]] = np.ascontiguousarray(value)
        content = safetensors.numpy.save(tensors, metadata={"format": "pt"})
        (dense / hf.WEIGHTS).write_bytes(content)


def _inner_prefix(source: hf.Source) -> str:
    # Where the text tower is in the model that transformers makes of the pretrained folder.
    kind = json_files.read(source.folder / "config.json").get("model_type")
    return "language_model." if kind == "gemma3" else ""
