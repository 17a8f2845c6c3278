"""Weights of Hugging Face folders to our parameters, read in parts. No pickles."""

import collections
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors
from absl import logging
from flax import traverse_util

from xmc_jax.models import hf, hf_adapters, hf_files, hf_tensors
from xmc_jax.models.backbone import Sizes
from xmc_jax.models.hf import ModelSource
from xmc_jax.models.hf_tensors import Parameter
from xmc_jax.models.vision import VisionConfig

PROJECTION = "image_projection.safetensors"
"""Of an encoder exported with images; not a file of Hugging Face's."""
_BLOCK_BYTES = 1 << 25  # of a table read at a time


class _Tensor(NamedTuple):
    """A tensor in a file, and what an adapter adds to it."""

    path: pathlib.Path
    name: str
    product: hf_adapters.LowRank | None = None


def load_params(
    source: ModelSource, sizes: Sizes | VisionConfig, abstract: Any = None
) -> dict[str, Any]:
    """The parameters of a backbone or image encoder, layers stacked; no head, no adapters.

    With `abstract`, this process reads what its devices hold. Beside the arrays that are made, it
    holds one parameter at a time, the largest first.

    Args:
        source: see `hf.resolve`.
        sizes: of the model; layers past `sizes.layers` are left out.
        abstract: nested dicts of ShapeDtypeStructs with shardings, of the parameters to load; None
            is all, as numpy float32.

    Returns:
        The subtree "backbone" (or of an image encoder all), or the part of it in `abstract`.

    Raises:
        ValueError: unreadable weights; or all tensors missing, not known or of another shape.
    """
    stored = _locate(source, sizes)
    parameters = _parameters(sizes)
    if abstract is None:
        wanted = {
            path: jax.ShapeDtypeStruct(parameter.shape, np.float32)
            for path, parameter in parameters.items()
        }
    else:
        wanted = traverse_util.flatten_dict(abstract, sep="/")
    loaded = {}
    for path, leaf in sorted(
        wanted.items(), key=lambda item: -item[1].size * item[1].dtype.itemsize
    ):
        of_layers = [stored[name] for name in parameters[path].names]
        read = _reader(parameters[path], of_layers, leaf)
        if abstract is None:
            loaded[path] = read((slice(None),) * len(leaf.shape))
        else:
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, read)
            # The copy runs in the background: without waiting, two parameters are held at a time.
            loaded[path] = jax.block_until_ready(array)
    return traverse_util.unflatten_dict(loaded, sep="/")


def check(source: ModelSource, layers: int | None = None) -> None:
    """Raises ValueError, see `load_params`, unless the weights fit; reads names and shapes only.

    Args:
        source: see `hf.resolve`.
        layers: see `hf.load_config`.
    """
    _locate(source, hf.load_config(source, layers))


def load_projection(source: ModelSource, width: int) -> dict[str, np.ndarray] | None:
    """The projection of images of an exported folder: "kernel" f32[E, D] and "bias" f32[D].

    Args:
        source: see `hf.resolve`.
        width: E of the image vectors.

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
            f"{path}: expected a projection of images {width} wide, got one of "
            f"{list(weight.shape)}; choose the images it was trained with (--config.data.images)"
        )
    return {"kernel": np.ascontiguousarray(weight.T, np.float32), "bias": np.float32(bias)}


def load_tree(path: pathlib.Path, abstract: Any) -> dict[str, Any]:
    """Parameters that `hf_export.tree` wrote, as numpy float32.

    Args:
        path: a safetensors file.
        abstract: nested dicts of leaves with a shape: the expected parameters.

    Raises:
        ValueError: a damaged file, or other parameters.
    """
    wanted = traverse_util.flatten_dict(abstract, sep="/")
    hf_files.check_shapes(path, {name: tuple(leaf.shape) for name, leaf in wanted.items()})
    with hf_files.opened(path) as file:
        flat = {name: np.float32(file.get_tensor(name)) for name in wanted}
    return traverse_util.unflatten_dict(flat, sep="/")


def _parameters(sizes: Sizes | VisionConfig) -> dict[str, Parameter]:
    return {**hf_tensors.layout(sizes), **hf_tensors.dense_layout(sizes)}


def _locate(source: ModelSource, sizes: Sizes | VisionConfig) -> dict[str, _Tensor]:
    """Name in the family's table -> tensor, once all are known to be there and to fit."""
    files: dict[str, pathlib.Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    for path in hf_files.weight_files(source.folder):
        with hf_files.opened(path) as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                part = file.get_slice(name)
                files[name], shapes[name] = path, tuple(part.get_shape())
                dtypes[name] = part.get_dtype()
    images = isinstance(sizes, VisionConfig)
    whole = hf.load_vision_config(source) if images else hf.load_config(source)
    try:
        match = hf_tensors.match(shapes, sizes, range(sizes.layers, whole.layers))
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from error
    expected = {
        name: parameter.stored
        for parameter in hf_tensors.layout(sizes).values()
        for name in parameter.names
    }
    stored = match.stored
    hf_files.check_dtypes(source.folder, {dtypes[name] for name in stored.values()})
    missing = sorted(match.prefix + name for name in expected.keys() - stored.keys())
    misshaped = [
        f"{stored[name]} expected {expected[name]} got {shapes[stored[name]]}"
        for name in sorted(stored)
        if expected[name] != shapes[stored[name]]
    ]
    if missing or match.unknown or misshaped:
        raise ValueError(
            f"{source.folder}: weights do not fit a {sizes.family} of {sizes.layers} layers. "
            f"Missing: {_some(missing)}. Not known: {_some(match.unknown)}. "
            f"Misshaped: {_some(misshaped)}"
        )
    if match.heads:
        counts = collections.Counter(name.partition(".")[0] for name in match.heads)
        parts = ", ".join(f"{name} ({count})" for name, count in counts.items())
        _log_once(f"{source.folder}: tensors left out, as no part of the backbone: {parts}")
    products: Mapping[str, hf_adapters.LowRank] = {}
    if source.adapter is not None:
        kernels = {
            name.removesuffix(".weight")
            for parameter in hf_tensors.layout(whole).values()
            if parameter.transposed
            for name in parameter.names
        }
        products = hf_adapters.products(source.adapter, kernels)
    located = {
        name: _Tensor(files[there], there, products.get(name.removesuffix(".weight")))
        for name, there in stored.items()
    }
    if dense := hf_tensors.dense_layout(sizes):
        folder, _ = hf.dense_module(source, sizes.hidden)
        (path,) = hf_files.weight_files(folder)
        wanted = {parameter.names[0]: parameter.stored for parameter in dense.values()}
        hf_files.check_shapes(path, wanted)
        located |= {name: _Tensor(path, name) for name in wanted}
    return located


@functools.lru_cache
def _log_once(line: str) -> None:
    logging.info("%s", line)


def _some(names: Sequence[str]) -> str:
    return f"{list(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _reader(parameter: Parameter, of_layers: list[_Tensor], leaf: jax.ShapeDtypeStruct):
    """Reads parts of a parameter; a part that several devices hold is read once."""
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, leaf.shape))
        if bounds not in parts:
            parts[bounds] = _read(parameter, of_layers, leaf.dtype, bounds)
        return parts[bounds]

    return read


def _read(
    parameter: Parameter,
    of_layers: list[_Tensor],
    dtype: np.dtype,
    bounds: tuple[tuple[int, int], ...],
) -> np.ndarray:
    """The part of a parameter within `bounds`: its layers one after the other, a table by blocks.

    A file is open only while a layer is read from it: the pages that reading maps are then dropped.
    """
    out = np.empty([stop - start for start, stop in bounds], dtype)
    within = tuple(slice(*bound) for bound in bounds)
    if parameter.stacked:
        for row, layer in zip(out, range(*bounds[0])):
            row[...] = _part(parameter, of_layers[layer], within[1:])
        return out
    rows = max(1, _BLOCK_BYTES // max(1, out[:1].nbytes))
    if parameter.transposed:  # by rows of ours, each block would be strided in the file
        rows = len(out)
    first, end = bounds[0]
    for start in range(first, end, max(rows, 1)):
        block = slice(start, min(start + rows, end))
        out[start - first : block.stop - first] = _part(
            parameter, of_layers[0], (block, *within[1:])
        )
    return out


def _part(parameter: Parameter, tensor: _Tensor, within: tuple[slice, ...]) -> np.ndarray:
    index = parameter.index(within)
    with hf_files.opened(tensor.path) as file:
        part = file.get_slice(tensor.name)
        if len(parameter.stored) > len(index):
            return parameter.from_stored(part[:].reshape(parameter.stored[0], -1)[index])
        part = part[index]
    if tensor.product is not None:
        with hf_files.opened(tensor.product.path) as file:
            a = np.float32(file.get_slice(tensor.product.a)[:, index[1]])
            b = np.float32(file.get_slice(tensor.product.b)[index[0], :])
        part = np.float32(part) + np.float32(tensor.product.scale) * (b @ a)
    return parameter.from_stored(part)
