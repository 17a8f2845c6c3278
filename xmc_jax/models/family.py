"""What a model family declares: its sizes in config.json, its tensors, and its module."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

MOST_LAYERS = 1024
"""Upper bound used to reject corrupt configs."""
_LARGEST = 2**31 - 1
ACTIVATIONS = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Hugging Face's name -> function; "gelu" is the exact one."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a parameter is in a checkpoint.

    Attributes:
        name: of the tensor; {} is the layer.
        fused: paths of the parameters that the tensor holds, by output features, one below the
            other; () if it holds this parameter alone.
        patches: the tensor is the kernel of a convolution over image patches.
    """

    name: str
    fused: tuple[str, ...] = ()
    patches: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One entry of `backbone.FAMILIES` or `backbone.IMAGE_FAMILIES`.

    Attributes:
        name: what `sizes.family` is.
        model_types: values of model_type in config.json.
        from_hf: the parsed config.json -> sizes; raises ValueError.
        to_hf: sizes -> a config.json that `from_hf` and transformers read.
        tensors: our path -> where it is in a checkpoint. The path of a module stands for its
            kernel, bias and scale. What is below "layers/" is stacked on our side. Hugging Face
            stores kernels transposed, [out, in].
        module: Flax module of (sizes, dtype, ...).
        projections: layers that may get adapters.
        causal: a token sees only itself and earlier tokens.
        renamed: ends of tensor names in old checkpoints -> the ends in `tensors`.
        inputs: sizes -> arguments to initialise the module with.
    """

    name: str
    model_types: tuple[str, ...]
    from_hf: Callable[[Mapping[str, Any]], Any]
    to_hf: Callable[[Any], dict[str, Any]]
    tensors: Mapping[str, Stored]
    module: type[nn.Module]
    projections: tuple[str, ...] = ()
    causal: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    inputs: Callable[[Any], tuple] = lambda sizes: (jnp.zeros((1, 1), jnp.int32),) * 3


def named(names: Mapping[str, str]) -> dict[str, Stored]:
    """Entries of parameters that have tensors of their own: path -> name of the tensor."""
    return {path: Stored(name) for path, name in names.items()}


def fused(name: str, *paths: str) -> dict[str, Stored]:
    """Entries of the parameters that one tensor holds, one below the other."""
    return {path: Stored(name, paths) for path in paths}


def read_fields(
    config: Mapping[str, Any],
    fields: Mapping[str, tuple[str, Any]],
    nullable: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Fields of sizes from a config.json.

    Args:
        config: the parsed file.
        fields: our field -> Hugging Face's name and the value that a file without it means. A value
            has the type of that default; where the default is None, int.
        nullable: our fields that may be null.

    Raises:
        ValueError: a value of another type.
    """
    values = {}
    for field, (name, default) in fields.items():
        value = values[field] = config.get(name, default)
        kind = int if default is None else type(default)
        kinds = (int, float) if kind is float else (kind,)
        if type(value) not in kinds and not (value is None and field in nullable):
            raise ValueError(f"config.json: expected {name} to be a {kind.__name__}, got {value!r}")
    return values


def refuse_others(config: Mapping[str, Any], expected: Mapping[str, tuple]) -> None:
    """Raises ValueError if a field means a computation that is not implemented.

    Args:
        config: the parsed config.json.
        expected: field -> values that are allowed, the one to name in the error last.
    """
    for name, allowed in expected.items():
        value = config.get(name, allowed[-1])
        if value not in allowed:
            raise ValueError(f"config.json: expected {name} = {allowed[-1]!r}, got {value!r}")


def check_sizes(sizes: Any, positive: tuple[str, ...]) -> None:
    """Raises ValueError unless a model may have such sizes.

    Args:
        sizes: a dataclass with `layers`, `eps` and `hidden_act`; all its integers are checked.
        positive: fields of at least 1.
    """
    for field in dataclasses.fields(sizes):
        value = getattr(sizes, field.name)
        most = MOST_LAYERS if field.name == "layers" else _LARGEST
        if type(value) is int and abs(value) > most:
            check(sizes, (field.name, False, f"at most {most}"))
    check(sizes, *((name, getattr(sizes, name) >= 1, "at least 1") for name in positive))
    check(
        sizes,
        ("eps", 0 < sizes.eps < 1, "a fraction in (0, 1)"),
        ("hidden_act", sizes.hidden_act in ACTIVATIONS, f"one of {tuple(ACTIVATIONS)}"),
    )


def check(sizes: Any, *rules: tuple[str, bool, str]) -> None:
    """Raises ValueError for the first rule that is broken: field, whether it holds, expectation."""
    for name, holds, expected in rules:
        if not holds:
            value = getattr(sizes, name)
            raise ValueError(
                f"{type(sizes).__name__}.{name}: expected {expected}, got {value!r:.60}"
            )
