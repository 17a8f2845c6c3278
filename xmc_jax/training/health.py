"""What is said of a step whose numbers are not finite: which, of what, and what to do about it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from xmc_jax.data.store import Store
from xmc_jax.training.state import Health

_MOST_NAMES = 5
_WHOLE = ("loss", "grad_norm")  # of all parts, and of all parameters


def is_finite(health: Health) -> bool:
    """Whether a step that is done was applied; fetches one value."""
    return bool(jax.device_get(health.finite))


def describe(
    step: int,
    metrics: Mapping[str, jax.Array],
    health: Health,
    documents: np.ndarray,
    data: Store,
) -> str:
    """One line on a step that was not applied; the same on all processes.

    Args:
        step: its number, from 1.
        metrics: of `objective.objective`.
        health: of the step.
        documents: i32[B], of its batch.
        data: where they are from.
    """
    metrics, health = jax.device_get((metrics, health))
    gradients = traverse_util.flatten_dict(health.gradients, sep="/")
    wrong = [name for name, finite in gradients.items() if not finite]
    parts = [n for n, x in metrics.items() if n not in _WHOLE and not np.isfinite(x)]
    said = [f"loss {float(metrics['loss']):g}" + (f" ({', '.join(parts)})" if parts else "")]
    if wrong:
        which = "all parameters" if len(wrong) == len(gradients) else _some(wrong)
        said.append(f"gradient of {which}")
    elif not np.isfinite(metrics["grad_norm"]):
        said.append("norm of the whole gradient")
    rows = np.flatnonzero(~health.documents)
    if len(rows):
        uids = data.uids("train")
        said.append(f"embedding of document {_some([uids[documents[i]] for i in rows])}")
    if health.label >= 0:
        said.append(f"embedding of label {data.uids('label')[health.label]}")
    return f"step {step} is not applied: not finite: " + "; ".join(said)


def _some(names: Sequence[Any]) -> str:
    listed = ", ".join(map(str, names[:_MOST_NAMES]))
    return listed + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
