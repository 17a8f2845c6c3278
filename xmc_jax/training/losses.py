"""Losses of rows of similarities. A loss is one entry of `LOSSES`: a config names it by its key.

Pure functions of arrays. A row without a positive or without a negative has loss 0.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from xmc_jax.config import LossConfig
from xmc_jax.runtime import sharding

# What blocks of rows keep for their gradient: little, and from it no row is searched again.
KEPT = "hardest"

# The similarity a softmax weight is made of where the hinge is zero: no weight beside any violator.
# ViXML reference, loss.py.
_NO_VIOLATOR = -50.0

# A run counts as collapsed once, on average, similarities differ by no more than this ...
_SPREAD = 0.01
# ... this share of the negatives violates ...
_VIOLATORS = 0.95
# ... and each margin term lies within this fraction of the minimum margin.
_AT_MINIMUM = 0.1


class RowLosses(NamedTuple):
    """A loss by row.

    Attributes:
        loss: f32[rows].
        violators: f32[rows], negatives that violate the loss; see `Loss.violators`.
        negatives: f32[rows], negatives that were looked at.
    """

    loss: jax.Array
    violators: jax.Array
    negatives: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss: all that the objective, the check for a collapse and the report know of it.

    Attributes:
        rows: from f32[rows, columns] cosines, bool[rows, columns] relevance, i32[rows] columns of
            one positive per row, and the config, to the losses by row.
        violators: what a violator is, as a report puts it.
        is_sound: whether equal similarities are no collapse, from the means of the objective's
            metrics, the config, and the spread of similarities in the run's first steps.
        remedies: what to change after a collapse, from the config; first the likeliest.
    """

    rows: Callable[[jax.Array, jax.Array, jax.Array, LossConfig], RowLosses]
    violators: str
    is_sound: Callable[[Mapping[str, float], LossConfig, float], bool]
    remedies: Callable[[LossConfig], list[str]]


def margin(
    similarity: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> RowLosses:
    """Hinge between one positive and the hardest negatives of each row, with a dynamic margin.

    With d_k = s_p - s_k: margin m_k = clip(|d_k|, margin_min, margin_max) without gradient, hinge
    t_k = max(0, m_k - d_k). A row's loss is sum_k w_k t_k with w = softmax(s_k / temperature) over
    its violators (gradient flows through w), or, unweighted, the mean of its t_k. A violator is a
    negative whose hinge is positive.

    The hinge is 0 from d_k = margin_min on, but its gradient is not: up to margin_max the margin
    equals d_k, so max(0, x) is taken at x = 0 exactly, where its derivative is 1/2 in JAX as in
    PyTorch. The reference trains with that half gradient, and so do we.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        positive: i32[rows], the column of each row's positive, of `draw_positive`.
        cfg: see `LossConfig`.

    Source: ViXML reference, loss.py, with `reduction` "custom" when weighted and "mean" when not;
    ViXML eq. 2 is its plain form.
    """
    # Departs: where a row has fewer than num_negatives negatives, the reference fills up with its
    # positives; here it has fewer terms, and the plain mean is over those.
    columns, valid = hardest(similarity, relevance, cfg.num_negatives)
    s_p = take(similarity, positive[:, None])
    s_n = take(similarity, columns)
    gap = s_p - s_n
    dynamic = jax.lax.stop_gradient(jnp.clip(jnp.abs(gap), cfg.margin_min, cfg.margin_max))
    hinge = jnp.where(valid, jnp.maximum(dynamic - gap, 0), 0)
    negatives = jnp.sum(valid, axis=1)
    if cfg.weighted:
        logits = jnp.where(hinge > 0, s_n, _NO_VIOLATOR) / cfg.weight_temperature
        loss = jnp.sum(jax.nn.softmax(logits, axis=1) * hinge, axis=1)
    else:
        loss = jnp.sum(hinge, axis=1) / jnp.maximum(negatives, 1)
    return _counted(loss, jnp.sum(hinge > 0, axis=1), negatives)


def decoupled_softmax(
    similarity: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> RowLosses:
    """Softmax in which the positives of a row do not compete with each other.

    For each positive j: -log(e^{s_j/t} / (e^{s_j/t} + sum over the row's negatives of e^{s_n/t}));
    a row's loss is the mean over its positives. A violator is a negative above the mean of its
    row's positives.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        positive: not used.
        cfg: see `LossConfig`; t is its `softmax_temperature`.

    Source: DEXML (Gupta et al., 2024), decoupled softmax.
    """
    logits = similarity / cfg.softmax_temperature
    negatives = jax.nn.logsumexp(jnp.where(relevance, -jnp.inf, logits), axis=1, keepdims=True)
    losses = jnp.where(relevance, jax.nn.softplus(negatives - logits), 0)
    positives = jnp.maximum(jnp.sum(relevance, axis=1), 1)
    fixed = jax.lax.stop_gradient(similarity)
    mean = jnp.sum(jnp.where(relevance, fixed, 0), axis=1) / positives
    violators = jnp.sum((fixed > mean[:, None]) & ~relevance, axis=1)
    return _counted(jnp.sum(losses, axis=1) / positives, violators, jnp.sum(~relevance, axis=1))


def _counted(loss: jax.Array, violators: jax.Array, negatives: jax.Array) -> RowLosses:
    """Counts as floats: their sum over a batch may be too large for integers."""
    return RowLosses(loss, violators.astype(loss.dtype), negatives.astype(loss.dtype))


def _margin_is_sound(metrics: Mapping[str, float], cfg: LossConfig, first_spread: float) -> bool:
    # Embeddings of an untrained decoder are as close together, but their hinges are not minimal.
    terms = [metrics[name] for name in TERMS if name in metrics]
    limit = _AT_MINIMUM * cfg.margin_min
    at_minimum = all(abs(term - cfg.margin_min) <= limit for term in terms)
    return metrics["violators"] < _VIOLATORS or not at_minimum


def _margin_remedies(cfg: LossConfig) -> list[str]:
    if not cfg.weighted and cfg.num_negatives >= 200:
        return []
    flags = "--config.loss.num_negatives=200 --config.loss.weighted=False"
    return [f"more negatives and their plain mean ({flags})"]


LOSSES = {
    "margin": Loss(margin, "hard negatives within the margin", _margin_is_sound, _margin_remedies),
    "decoupled_softmax": Loss(
        decoupled_softmax,
        "negatives above the mean positive of their document",
        lambda metrics, cfg, first_spread: metrics["similarity_spread"] >= first_spread,
        lambda cfg: [],
    ),
}

# What is compared in which direction, and what a report calls it. In order of importance: a run's
# violators are of the first term in use.
TERMS = {
    "document_to_prototype": "to prototype",
    "document_to_label": "to label",
    "label_to_document": "from label",
    "prototype_to_document": "from prototype",
}


def find(kind: str) -> Loss:
    """The loss of a name.

    Raises:
        ValueError: there is no such loss.
    """
    if kind not in LOSSES:
        raise ValueError(f"loss.kind: expected one of {', '.join(LOSSES)}, got {kind!r}")
    return LOSSES[kind]


def collapse(
    metrics: Mapping[str, float], cfg: LossConfig, first_spread: float = math.inf
) -> str | None:
    """Whether a run has collapsed: every text has the same embedding, and the loss cannot undo it.

    Args:
        metrics: means of the objective's metrics over the latest steps: an epoch, or its last
            quarter, which sees a collapse that began within the epoch.
        cfg: the objective in use.
        first_spread: "similarity_spread" of the run's first steps. Embeddings of an untrained tower
            may be as close together as collapsed ones; training moves them apart.

    Returns:
        What is seen and what to do about it, one line; None for a sound run.
    """
    loss = find(cfg.kind)
    if metrics["similarity_spread"] > _SPREAD or loss.is_sound(metrics, cfg, first_spread):
        return None
    remedies = [*loss.remedies(cfg), "a larger batch", "a smaller learning rate"]
    return (
        f"training has collapsed: all similarities are {metrics['similarity_negative']:.3f} or "
        f"nearly so, and {100 * metrics['violators']:.0f} % of the negatives violate; start again "
        f"with {', '.join(remedies)}"
    )


def draw_positive(relevance: jax.Array, key: jax.Array, rows: jax.Array | None = None) -> jax.Array:
    """One positive of each row, uniform among them.

    Args:
        relevance: bool[rows, columns].
        key: device key.
        rows: i32[rows], which rows of a matrix these are, for what is drawn with it whole; None for
            all of it.

    Returns:
        i32[rows], columns; 0 for a row without a positive.
    """
    height, width = relevance.shape
    rows = jnp.arange(height) if rows is None else rows
    # The bits that `jax.random.bits` gives to a place of the matrix, as many as its floats have.
    place = rows.astype(jnp.uint32)[:, None] * jnp.uint32(width) + jnp.arange(width, dtype="uint32")
    halves = jax.random.key_data(jax.vmap(jax.vmap(lambda i: jax.random.fold_in(key, i)))(place))
    bits = (halves[..., 0] ^ halves[..., 1]) >> 9
    scores = jnp.where(relevance, bits.astype(jnp.int32), -1)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def hardest(similarity: jax.Array, relevance: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` most similar negatives of each row, ties to the lower column, and which exist."""
    has_positive = jnp.any(relevance, axis=1, keepdims=True)
    usable = ~relevance & has_positive
    width = similarity.shape[1]
    if count >= width:  # all of them: nothing to sort
        return jnp.broadcast_to(jnp.arange(width), similarity.shape), usable
    masked = jnp.where(usable, jax.lax.stop_gradient(similarity), -jnp.inf)
    values, columns = sharding.by_row(lambda rows: jax.lax.top_k(rows, count), masked)
    # True for NaN, so that a broken run shows in its loss.
    return keep(columns), keep(values != -jnp.inf)


def take(similarity: jax.Array, columns: jax.Array) -> jax.Array:
    """f32[rows, n], the similarities of columns i32[rows, n]."""
    taken = jnp.take_along_axis(similarity, columns, axis=1)
    return keep(taken) if taken.shape[1] < similarity.shape[1] else taken


def keep(x: jax.Array) -> jax.Array:
    """Marks what a block of rows keeps for its gradient."""
    return checkpoint_name(x, KEPT)
