"""AdamW with groups of parameters, its schedule, and the split into trainable and frozen.

A parameter's name is its path, "backbone/layers/attention/query/kernel"; groups are ordered lists
of (regex, value) in which the first full match wins.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from xmc_jax.config import OptimizerConfig


def partition(params: Any, trainable: Sequence[tuple[str, bool]]) -> tuple[Any, Any]:
    """Splits a parameter tree into what is trained and what is not.

    Args:
        params: nested dicts of arrays (or of their shapes).
        trainable: (regex, bool) pairs, first full match wins.

    Returns:
        (trainable, frozen): nested dicts; `merge` puts them together again.

    Raises:
        ValueError: see `build`.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    choice = _assign(flat, trainable, "trainable")
    split = [
        {name: x for name, x in flat.items() if choice[name] is side} for side in (True, False)
    ]
    return tuple(flax.traverse_util.unflatten_dict(part, sep="/") for part in split)


def merge(trainable: Any, frozen: Any) -> Any:
    """The whole parameter tree, from the two parts of `partition`."""
    parts = [flax.traverse_util.flatten_dict(part, sep="/") for part in (trainable, frozen)]
    return flax.traverse_util.unflatten_dict(parts[0] | parts[1], sep="/")


def schedule(step: jax.Array | int, warmup_steps: int, total_steps: int) -> jax.Array:
    """The learning rate at a step as a fraction of its peak, f32[]: linear from 0 to 1, then to 0.

    Args:
        step: steps done before this one; the first step has a rate of 0 where there is a warm-up.
        warmup_steps: see `OptimizerConfig`.
        total_steps: of the whole run; the rate would reach 0 there.

    Source: transformers, get_linear_schedule_with_warmup.
    """
    step = jnp.asarray(step, jnp.float32)
    rise = step / max(warmup_steps, 1)
    fall = (total_steps - step) / max(total_steps - warmup_steps, 1)
    return jnp.where(step < warmup_steps, rise, jnp.maximum(fall, 0))


class AdamW(NamedTuple):
    """An `optax.GradientTransformation` that tells its learning rate.

    Attributes:
        init: as optax has it.
        update: likewise.
        learning_rate: state -> f32[], the rate of the next update, the largest of the groups'.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    learning_rate: Callable[[Any], jax.Array]


def build(cfg: OptimizerConfig, params: Any, total_steps: int) -> AdamW:
    """AdamW over the trainable parameters.

    Args:
        cfg: see `OptimizerConfig`.
        params: the trainable part of `partition`, arrays or their shapes: only names are read.
        total_steps: steps per epoch times epochs.

    Raises:
        ValueError: a parameter that no pattern matches, or a pattern that decides no parameter.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    rates, decays = (
        flax.traverse_util.unflatten_dict(_assign(flat, groups, name), sep="/")
        for groups, name in ((cfg.lr, "lr"), (cfg.weight_decay, "weight_decay"))
    )

    def scale(updates, params):
        return jax.tree.map(lambda u, p, lr, wd: lr * (u + wd * p), updates, params, rates, decays)

    def share(step: jax.Array) -> jax.Array:
        return schedule(step, cfg.warmup_steps, total_steps)

    transform = optax.chain(
        optax.identity() if cfg.clip_norm is None else optax.clip_by_global_norm(cfg.clip_norm),
        optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps),
        optax.stateless(scale),
        optax.scale_by_schedule(lambda step: -share(step)),
    )
    peak = max(jax.tree.leaves(rates), default=0.0)
    return AdamW(
        init=transform.init,
        update=jax.named_scope("optimizer")(transform.update),
        learning_rate=lambda state: peak * share(state[-1].count),
    )


def _assign(names: Sequence[str], groups: Sequence[tuple[str, Any]], what: str) -> dict[str, Any]:
    """The value of the first pattern that matches each name."""
    values, used = {}, set()
    for name in names:
        for i, (pattern, value) in enumerate(groups):
            if re.fullmatch(pattern, name):
                values[name] = value
                used.add(i)
                break
    patterns = [pattern for pattern, _ in groups]
    unmatched = [name for name in names if name not in values]
    if unmatched:
        raise ValueError(
            f"optimizer.{what}: no pattern of {patterns} matches {unmatched}; patterns match whole "
            "paths: end the list with ('.*', value)"
        )
    unused = [pattern for i, pattern in enumerate(patterns) if i not in used]
    if unused:
        raise ValueError(
            f"optimizer.{what}: {unused}: expected to be the first match of some parameter of "
            f"{list(names)}; correct them, move them up the list, or remove them"
        )
    return values
