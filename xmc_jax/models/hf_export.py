"""Hugging Face folders out: a model, or its adapters alone, as sentence-transformers opens them.

They hold the backbone, all that documents need: label prototypes are rows of an index. Tokenizer
files are `data.tokenizer.export`'s.
"""

import collections
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
from xmc_jax.models import backbone, hf, hf_adapters, hf_modules, hf_tensors, hf_weights
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.layers import NO_LORA

_SHARD = "2GB"  # a shard is in memory twice while it is written


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
    parts = collections.defaultdict(list)  # of each tensor: parameter and layer
    for parameter in hf_tensors.layout(sizes).values():
        for layer, name in enumerate(parameter.names):
            parts[name].append((parameter, layer))
    split = huggingface_hub.split_state_dict_into_shards_factory(
        {
            name: jax.ShapeDtypeStruct(parameter.stored, np.dtype(dtype))
            for name, ((parameter, _), *_) in parts.items()
        },
        get_storage_size=lambda leaf: leaf.size * leaf.dtype.itemsize,
        filename_pattern=hf.WEIGHTS.replace(".", "{suffix}."),
        max_shard_size=_SHARD,
    )
    for file, names in split.filename_to_tensors.items():
        content = {}
        for name in names:
            rows = [
                parameter.to_stored(_merged(flat, parameter.path, layer, lora))
                for parameter, layer in sorted(parts[name], key=lambda part: part[0].row)
            ]
            content[name] = np.concatenate(rows).astype(np.dtype(dtype))
        _save(folder / file, content)
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
    source: hf.ModelSource,
    pooling: str,
    max_length: int,
    prompts: tuple[str, str] = ("", ""),
) -> None:
    """Writes a folder that `peft` and `SentenceTransformer(folder)` load onto the pretrained model.

    Args are those of `merged`, and `source` of the pretrained model, whose name, revision or folder
    is recorded. Of `params`, only adapters are read.

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
    layout, content, modules = hf_tensors.layout(sizes), {}, set()
    for path, leaf in flat.items():
        module, _, kind = path.rpartition("/")
        if kind not in ("lora_a", "lora_b"):
            continue
        for layer, name in enumerate(layout[module + "/kernel"].names):
            name = name.removesuffix(".weight")
            modules.add(name.rpartition(".")[2])
            kind = kind.replace("_a", "_A").replace("_b", "_B")
            content[f"{prefix}{name}.{kind}.weight"] = _host(leaf[layer]).T
    _save(folder / hf_adapters.WEIGHTS, content)
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
    json_files.write(folder / hf_adapters.CONFIG, config)
    _write_modules(folder, flat, sizes, pooling, max_length, prompts)


def projection(folder: epath.PathLike, params: dict[str, Any], encoder: Mapping[str, Any]) -> None:
    """Writes the projection of images beside a model: `weight` [D, E] and `bias` [D].

    Args:
        folder: exists.
        params: the subtree "projection".
        encoder: of the images, as their folder records it; goes into the file's metadata.
    """
    content = {"weight": _host(params["kernel"]).T, "bias": _host(params["bias"])}
    metadata = {f"encoder.{key}": str(value) for key, value in encoder.items()}
    _save(epath.Path(folder) / hf_weights.PROJECTION, content, metadata)


def tree(path: pathlib.Path, params: Mapping[str, Any]) -> None:
    """Writes parameters by their paths, float32; `hf_weights.load_tree` reads them."""
    flat = traverse_util.flatten_dict(params, sep="/")
    _save(path, {name: _host(leaf) for name, leaf in flat.items()})


def _host(leaf: Any) -> np.ndarray:
    """float32 on the host."""
    return np.asarray(jax.device_get(leaf)).astype(np.float32)


def _save(
    path: epath.PathLike, content: Mapping[str, np.ndarray], metadata: Mapping[str, str] = {}
) -> None:
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in content.items()}
    data = safetensors.numpy.save(whole, metadata={"format": "pt", **metadata})
    epath.Path(path).write_bytes(data)


def _merged(flat: dict[str, Any], path: str, layer: int, lora: LoraConfig) -> np.ndarray:
    """float32 of one tensor, in our orientation, with its adapters if it has some."""

    def one(path: str) -> np.ndarray:
        return _host(flat[path][layer] if path.startswith("layers/") else flat[path])

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
        content = {
            parameter.names[0]: parameter.to_stored(_host(flat[path]))
            for path, parameter in hf_tensors.dense_layout(sizes).items()
        }
        _save(dense / hf.WEIGHTS, content)


def _inner_prefix(source: hf.ModelSource) -> str:
    # Where the text tower is in the model that transformers makes of the pretrained folder.
    kind = json_files.read(source.folder / "config.json").get("model_type")
    return "language_model." if kind == "gemma3" else ""
