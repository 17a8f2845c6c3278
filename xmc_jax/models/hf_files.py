"""The weights of a Hugging Face folder on disk: which files they are in, and opened."""

import pathlib

import safetensors

from xmc_jax.files import json_files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")
_FORMATS = {
    "*.bin": "pickles, which are never read",
    "*.gguf": "GGUF, whose weights are quantised",
    "*.onnx": "ONNX",
    "*.h5": "TensorFlow's",
    "*.msgpack": "Flax's",
}


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that hold the weights of a model.

    Args:
        folder: local.

    Raises:
        ValueError: there are none, or some of the files that the index names are missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = json_files.read(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX}: expected a weight_map of names to files")
        paths = [folder / str(file) for file in sorted(set(map(str, weight_map.values())))]
        absent = [path.name for path in paths if path.parent != folder or not path.is_file()]
        if absent:
            raise ValueError(
                f"{folder}: expected the shards {absent} that {INDEX} names, found none of them; "
                "download the folder again"
            )
        return paths
    others = [
        f"{path.name} ({what})" for glob, what in _FORMATS.items() for path in folder.glob(glob)
    ]
    got = ", ".join(sorted(others)[:3]) or "none"
    raise ValueError(f"{folder}: expected {WEIGHTS}, found {got}; convert the model to safetensors")


def check_not_quantised(folder: pathlib.Path) -> None:
    """Raises ValueError if the config.json of a folder says that its weights are quantised."""
    quantised = json_files.read(folder / "config.json", optional=True).get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise _quantised(folder, f"those of {method or 'quantization_config'}")


def check_dtypes(folder: pathlib.Path, dtypes: set[str]) -> None:
    """Raises ValueError if a tensor is of another type than floating point of 16 bits or more.

    Args:
        folder: what the error begins with.
        dtypes: of the tensors, as safetensors names them.
    """
    if others := sorted(dtypes - set(_DTYPES)):
        raise _quantised(folder, ", ".join(others))


def _quantised(folder: pathlib.Path, got: str) -> ValueError:
    return ValueError(
        f"{folder}: expected weights in {', '.join(_DTYPES)}, found {got}, which are quantised; "
        "take the model that they were made from, or save it dequantised with transformers "
        "(model.dequantize())"
    )


def opened(path: pathlib.Path):
    """A safetensors file, to read names, shapes and parts of tensors as numpy.

    Raises:
        ValueError: it is none.
    """
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, found {path.stat().st_size} bytes that are not "
            f"one ({error}); download it again"
        ) from error


def check_shapes(path: pathlib.Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless a safetensors file has exactly these tensors.

    Args:
        path: of the file.
        expected: name -> shape.
    """
    with opened(path) as file:
        got = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if got != expected:
        raise ValueError(f"{path}: expected {expected}, got {got}; download or export it again")
