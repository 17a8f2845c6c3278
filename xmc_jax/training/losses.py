"""Losses on cosine similarities: the margin loss with online hard negatives, PRIME's objective and
regulariser, DEXML's decoupled softmax, and the test for a collapsed run. Pure functions of arrays.

Rows without a positive or without a negative contribute 0, and stay in the mean over rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from xmc_jax import sharding

# In order of importance: `violators` is of the first one in use.
_TERMS = (
    "document_to_prototype",
    "document_to_label",
    "label_to_document",
    "prototype_to_document",
)

# The similarity a softmax weight is made of where the hinge is zero: no weight beside any violator.
# ViXML reference, loss.py.
_NO_VIOLATOR = -50.0

# A run counts as collapsed once, on average, similarities differ by no more than this ...
_SPREAD = 0.01
# ... this share of the negatives violates ...
_VIOLATORS = 0.95
# ... and each margin term lies within this fraction of the minimum margin.
_AT_MINIMUM = 0.1


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The training objective. The defaults are those of the ViXML run scripts for 131K labels.

    Attributes:
        kind: "margin" (NGAME, PRIME, ViXML) or "decoupled_softmax" (DEXML).
        num_negatives: hardest negatives per row; clipped to the columns there are.
        weighted: softmax-weighted sum over a row's negatives; False takes their plain mean.
        margin_min: the dynamic margin's lower bound, in cosine.
        margin_max: its upper bound; equal to `margin_min` for a constant margin.
        weight_temperature: of the softmax weights.
        softmax_temperature: of the decoupled softmax (DEXML's tau).
        document_to_label: weight of the term documents -> label texts; the only one without PRIME.
        document_to_prototype: weight of the term documents -> label prototypes.
        label_to_document: weight of the term label texts -> documents.
        prototype_to_document: weight of the term label prototypes -> documents; not in the paper.
        regularizer: weight of `regularizer`.
        regularizer_margin: what prototypes must gain over label texts, in cosine.
    """

    kind: Literal["margin", "decoupled_softmax"] = "margin"
    num_negatives: int = 10
    weighted: bool = True
    margin_min: float = 0.1
    margin_max: float = 0.3
    weight_temperature: float = 0.1
    softmax_temperature: float = 0.05
    document_to_label: float = 1.0
    document_to_prototype: float = 1.0
    label_to_document: float = 1.0
    prototype_to_document: float = 0.0
    regularizer: float = 0.1
    regularizer_margin: float = 0.1

    def __post_init__(self):
        if self.kind not in ("margin", "decoupled_softmax"):
            raise ValueError(
                f"loss.kind: expected 'margin' or 'decoupled_softmax', got {self.kind!r}"
            )
        if self.num_negatives < 1:
            raise ValueError(f"loss.num_negatives: expected at least 1, got {self.num_negatives}")
        if not 0 <= self.margin_min <= self.margin_max:
            raise ValueError(
                "loss.margin_min, loss.margin_max: expected 0 <= margin_min <= margin_max, got "
                f"{self.margin_min}, {self.margin_max}"
            )
        for name in ("weight_temperature", "softmax_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"loss.{name}: expected more than 0, got {getattr(self, name)}")
        for name in (*_TERMS, "regularizer"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name}: expected at least 0, got {getattr(self, name)}")


def draw_positive(relevance: jax.Array, key: jax.Array) -> jax.Array:
    """One positive of each row, uniform among them.

    Args:
        relevance: bool[rows, columns].
        key: device key.

    Returns:
        i32[rows], columns; 0 for a row without a positive.
    """
    scores = jnp.where(relevance, jax.random.uniform(key, relevance.shape), -1.0)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


def margin_loss(
    similarity: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> tuple[jax.Array, jax.Array]:
    """Hinge between one positive and the hardest negatives of each row, with a dynamic margin.

    With d_k = s_p - s_k: margin m_k = clip(|d_k|, margin_min, margin_max) without gradient, hinge
    t_k = max(0, m_k - d_k). A row's loss is sum_k w_k t_k with w = softmax(s_k / temperature) over
    its violators (gradient flows through w), or, unweighted, the mean of its t_k. The loss is the
    mean over rows.

    The hinge is 0 from d_k = margin_min on, but its gradient is not: up to margin_max the margin
    equals d_k, so max(0, x) is taken at x = 0 exactly, where its derivative is 1/2 in JAX as in
    PyTorch. The reference trains with that half gradient, and so do we.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        positive: i32[rows], the column of each row's positive, of `draw_positive`.
        cfg: see `LossConfig`.

    Returns:
        loss: f32[].
        violators: f32[], share of the chosen negatives whose hinge is positive, in [0, 1].

    Source: ViXML reference, loss.py, with `reduction` "custom" when weighted and "mean" when not;
    ViXML eq. 2 is its plain form.
    """
    # Departs: where a row has fewer than num_negatives negatives, the reference fills up with its
    # positives; here it has fewer terms, and the plain mean is over those.
    columns, valid = _hardest(similarity, relevance, cfg.num_negatives)
    s_p = _take(similarity, positive[:, None])
    s_n = _take(similarity, columns)
    gap = s_p - s_n
    margin = jax.lax.stop_gradient(jnp.clip(jnp.abs(gap), cfg.margin_min, cfg.margin_max))
    hinge = jnp.where(valid, jnp.maximum(margin - gap, 0), 0)
    if cfg.weighted:
        logits = jnp.where(hinge > 0, s_n, _NO_VIOLATOR) / cfg.weight_temperature
        rows = jnp.sum(jax.nn.softmax(logits, axis=1) * hinge, axis=1)
    else:
        rows = jnp.sum(hinge, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1)
    violators = jnp.sum(hinge > 0) / jnp.maximum(jnp.sum(valid), 1)
    return jnp.mean(rows), violators.astype(similarity.dtype)


def decoupled_softmax(similarity: jax.Array, relevance: jax.Array, temperature: float) -> jax.Array:
    """Softmax in which the positives of a row do not compete with each other.

    For each positive j: -log(e^{s_j/t} / (e^{s_j/t} + sum over the row's negatives of e^{s_n/t}));
    the mean over a row's positives, then over rows.

    Args:
        similarity: f32[rows, columns], cosines.
        relevance: bool[rows, columns].
        temperature: t.

    Returns:
        f32[].

    Source: DEXML (Gupta et al., 2024), decoupled softmax.
    """
    logits = similarity / temperature
    negatives = jax.nn.logsumexp(jnp.where(relevance, -jnp.inf, logits), axis=1, keepdims=True)
    losses = jnp.where(relevance, jax.nn.softplus(negatives - logits), 0)
    return jnp.mean(jnp.sum(losses, axis=1) / jnp.maximum(jnp.sum(relevance, axis=1), 1))


def regularizer(
    raw: jax.Array, prototype: jax.Array, relevance: jax.Array, positive: jax.Array, cfg: LossConfig
) -> jax.Array:
    """Asks prototypes to be closer to positives, and farther from negatives, than label texts are.

    With margin m, one positive p and the hardest negatives n by prototype similarity of each row:
    a = max(0, raw_p - prototype_p + m), b = max(0, prototype_n - raw_n + m); each averaged over its
    non-zero entries in the whole batch (0 if there are none); (a + b) / 2.

    Args:
        raw: f32[B, U], cosines of documents and label texts.
        prototype: f32[B, U], cosines of documents and label prototypes.
        relevance: bool[B, U].
        positive: i32[B], of `draw_positive`.
        cfg: see `LossConfig`.

    Returns:
        f32[].

    Source: PRIME; ViXML reference, loss.py, RegLoss.
    """
    columns, valid = _hardest(prototype, relevance, cfg.num_negatives)
    gain_p = _take(prototype - raw, positive[:, None])
    gain_n = _take(prototype - raw, columns)
    has_positive = jnp.any(relevance, axis=1, keepdims=True)
    a = jnp.where(has_positive, jnp.maximum(cfg.regularizer_margin - gain_p, 0), 0)
    b = jnp.where(valid, jnp.maximum(cfg.regularizer_margin + gain_n, 0), 0)
    return (_mean_of_nonzero(a) + _mean_of_nonzero(b)) / 2


def cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """f32[m, n], inner products of unit vectors [m, D] and [n, D], at full precision."""
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    return jnp.matmul(rows.astype(dtype), columns.astype(dtype).T, precision="highest")


def objective(
    raw: jax.Array,
    prototype: jax.Array | None,
    relevance: jax.Array,
    key: jax.Array,
    cfg: LossConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The training objective of a batch.

    With PRIME: the weighted sum of up to four losses and the regulariser, each with positives of
    its own. Without: the term documents -> label texts alone (NGAME), whatever the other weights.

    Args:
        raw: f32[B, U], cosines of documents and label texts.
        prototype: f32[B, U], cosines of documents and label prototypes; None without PRIME.
        relevance: bool[B, U].
        key: device key, of the POSITIVE stream.
        cfg: see `LossConfig`.

    Returns:
        loss: f32[].
        metrics: f32[] each. `loss` and its parts before weighting; `violators`; the means over
            relevant and other pairs, `similarity_positive` and `similarity_negative`, and the
            standard deviation over all pairs, `similarity_spread`. The last four are of the
            similarities that retrieval uses: to prototypes with PRIME, to label texts without.
            With the decoupled softmax, `violators` is the share of negatives above their row's
            mean positive.

    Raises:
        ValueError: shapes do not fit, or every weight in use is 0.

    Source: PRIME; ViXML reference, utils.py, train.
    """
    judged = raw if prototype is None else prototype
    if not raw.shape == judged.shape == relevance.shape:
        raise ValueError(
            "objective: expected raw, prototype and relevance of one shape [B, U], got "
            f"{raw.shape}, {judged.shape} and {relevance.shape}"
        )
    terms = {"document_to_label": (raw, relevance)}
    if prototype is not None:
        terms |= {
            "document_to_prototype": (prototype, relevance),
            "label_to_document": (_transposed(raw), _transposed(relevance)),
            "prototype_to_document": (_transposed(prototype), _transposed(relevance)),
        }
    names = [name for name in _TERMS if name in terms and getattr(cfg, name) > 0]
    if not names:
        raise ValueError(
            "objective: every loss weight in use is 0; set --config.loss.document_to_label=1.0"
        )

    loss, metrics = jnp.zeros((), raw.dtype), {}
    for name in names:
        similarity, target = terms[name]
        if cfg.kind == "margin":
            positive = draw_positive(target, jax.random.fold_in(key, _TERMS.index(name)))
            value, violators = margin_loss(similarity, target, positive, cfg)
            metrics.setdefault("violators", violators)
        else:
            value = decoupled_softmax(similarity, target, cfg.softmax_temperature)
        metrics[name] = value
        loss += getattr(cfg, name) * value
    if prototype is not None and cfg.regularizer > 0:
        positive = draw_positive(relevance, jax.random.fold_in(key, len(_TERMS)))
        metrics["regularizer"] = regularizer(raw, judged, relevance, positive, cfg)
        loss += cfg.regularizer * metrics["regularizer"]

    judged = jax.lax.stop_gradient(judged)
    if cfg.kind == "decoupled_softmax":
        mean_positive = _masked_mean(judged, relevance, axis=1, keepdims=True)
        metrics["violators"] = _masked_mean((judged > mean_positive) * 1.0, ~relevance)
    metrics["loss"] = loss
    metrics["similarity_positive"] = _masked_mean(judged, relevance)
    metrics["similarity_negative"] = _masked_mean(judged, ~relevance)
    metrics["similarity_spread"] = jnp.std(judged)
    return loss, metrics


def collapse(metrics: Mapping[str, float], cfg: LossConfig) -> str | None:
    """Whether a run has collapsed: every text has the same embedding, and the loss cannot undo it.

    Args:
        metrics: means of `objective`'s metrics over the latest steps: an epoch, or its last
            quarter, which sees a collapse that began within the epoch.
        cfg: the objective in use.

    Returns:
        What is seen and what to do about it, one line; None for a sound run.
    """
    if metrics["similarity_spread"] > _SPREAD:
        return None
    seen = f"all similarities are {metrics['similarity_negative']:.3f} or nearly so"
    if cfg.kind == "margin":
        terms = [metrics[name] for name in _TERMS if name in metrics]
        limit = _AT_MINIMUM * cfg.margin_min
        # Embeddings of an untrained decoder are as close together, but their hinges are not
        # minimal.
        at_minimum = all(abs(term - cfg.margin_min) <= limit for term in terms)
        if metrics["violators"] < _VIOLATORS or not at_minimum:
            return None
        seen += (
            f", every loss term is at the minimum margin {cfg.margin_min:g}, and "
            f"{100 * metrics['violators']:.0f} % of the negatives violate"
        )
    remedies = ["a larger batch", "a smaller learning rate"]
    if cfg.kind == "margin" and (cfg.weighted or cfg.num_negatives < 200):
        flags = "--config.loss.num_negatives=200 --config.loss.weighted=False"
        remedies.insert(0, f"more negatives and their plain mean ({flags})")
    return f"training has collapsed: {seen}; start again with {', '.join(remedies)}"


def _hardest(
    similarity: jax.Array, relevance: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The `count` most similar negatives of each row, ties to the lower column, and which exist."""
    has_positive = jnp.any(relevance, axis=1, keepdims=True)
    usable = ~relevance & has_positive
    width = similarity.shape[1]
    if count >= width:  # all of them: nothing to sort
        return jnp.broadcast_to(jnp.arange(width), similarity.shape), usable
    masked = jnp.where(usable, jax.lax.stop_gradient(similarity), -jnp.inf)
    values, columns = sharding.by_row(lambda rows: jax.lax.top_k(rows, count), masked)
    return columns, values != -jnp.inf  # true for NaN, so that a broken run shows in its loss


def _transposed(x: jax.Array) -> jax.Array:
    # Its rows over the devices again: the hardest of a row are found where the row is.
    return sharding.constrain(x.T, "batch")


def _take(similarity: jax.Array, columns: jax.Array) -> jax.Array:
    return jnp.take_along_axis(similarity, columns, axis=1)


def _mean_of_nonzero(x: jax.Array) -> jax.Array:
    return jnp.sum(x) / jnp.maximum(jnp.sum(x > 0), 1)


def _masked_mean(x: jax.Array, mask: jax.Array, **axis) -> jax.Array:
    return jnp.sum(jnp.where(mask, x, 0), **axis) / jnp.maximum(jnp.sum(mask, **axis), 1)
