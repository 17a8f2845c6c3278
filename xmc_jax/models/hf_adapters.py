"""PEFT adapters to start from: the model that they were trained on, and what they add to it."""

import dataclasses
import pathlib
import re
from collections.abc import Collection

from xmc_jax.files import json_files
from xmc_jax.models import hf_files

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"(?:base_model\.model\.)?(.*)\.lora_([AB])(?:\.default)?\.weight")
# Values that mean another computation than W + scale B A.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "alpha_pattern": (None, {}),
    "rank_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
}
_MERGE = "merge the adapter with peft (merge_and_unload, save_pretrained) and give that folder"


@dataclasses.dataclass(frozen=True)
class LowRank:
    """What an adapter adds to a kernel W [out, in]: scale B A.

    Attributes:
        path: of the file.
        a: name of A [r, in].
        b: name of B [out, r].
        scale: lora_alpha / r, or / sqrt(r) with rank-stabilised scaling.
    """

    path: pathlib.Path
    a: str
    b: str
    scale: float


def is_adapter(folder: pathlib.Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    whole = any((folder / name).is_file() for name in (hf_files.WEIGHTS, hf_files.INDEX))
    return (folder / CONFIG).is_file() and not whole


def base_of(folder: pathlib.Path) -> tuple[str, str | None]:
    """The model that an adapter was trained on: a folder or a name on the hub, and its revision.

    A relative path counts from the working directory, as in peft, or else from the adapter's folder
    or the folder around it.

    Args:
        folder: of the adapter.

    Raises:
        ValueError: adapter_config.json is malformed or names no model.
    """
    config = json_files.read(folder / CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, str | None):
        raise ValueError(
            f"{folder / CONFIG}: expected base_model_name_or_path to name a model, and revision "
            f"a commit or null, found {name!r} and {revision!r}"
        )
    for start in (pathlib.Path(), folder, folder.absolute().parent):
        if (local := start / pathlib.Path(name).expanduser()).is_dir():
            return str(local), None
    return name, revision


def products(folder: pathlib.Path, kernels: Collection[str]) -> dict[str, LowRank]:
    """What an adapter adds to each of the kernels of a backbone.

    Args:
        folder: of the adapter.
        kernels: names of the backbone's kernels, without ".weight"; more than are used if only the
            first layers are.

    Returns:
        Name of a kernel -> product; kernels that are not adapted are absent.

    Raises:
        ValueError: a kind of adapter that is not computed here, or tensors that do not belong to
            the backbone.
    """
    config, path = json_files.read(folder / CONFIG), folder / WEIGHTS
    for name, plain in _PLAIN.items():
        if config.get(name) not in plain:
            raise ValueError(
                f"{folder / CONFIG}: expected {name} = {plain[-1]!r}, found "
                f"{config.get(name)!r:.80}; {_MERGE}"
            )
    alpha = config.get("lora_alpha")
    if type(alpha) not in (int, float):
        raise ValueError(f"{folder / CONFIG}: expected lora_alpha to be a number, got {alpha!r}")
    if not path.is_file():
        raise ValueError(
            f"{path}: expected the adapter's weights, found none; save the adapter as safetensors"
        )
    pairs: dict[str, dict[str, str]] = {}
    ranks: dict[str, int] = {}
    others, prefixes = [], set()
    with hf_files.opened(path) as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            match = _NAME.fullmatch(name)
            parts = match[1].split(".") if match else []
            suffixes = (i for i in range(len(parts)) if ".".join(parts[i:]) in kernels)
            at = next(suffixes, None)
            if at is None:
                others.append(name)
                continue
            prefixes.add(tuple(parts[:at]))
            kernel, shape = ".".join(parts[at:]), file.get_slice(name).get_shape()
            pairs.setdefault(kernel, {})[match[2]] = name
            ranks[kernel] = shape[0] if match[2] == "A" else shape[-1]
    odd = [kernel for kernel, pair in pairs.items() if len(pair) != 2]
    if others or odd or len(prefixes) != 1:
        raise ValueError(
            f"{path}: expected lora_A and lora_B of the backbone's projections, found also "
            f"{sorted(others)[:4] or sorted(odd)[:4] or sorted(prefixes)[:4]}; {_MERGE}"
        )
    stabilised = bool(config.get("use_rslora"))
    return {
        kernel: LowRank(
            path, pair["A"], pair["B"], alpha / ranks[kernel] ** (0.5 if stabilised else 1.0)
        )
        for kernel, pair in pairs.items()
    }
