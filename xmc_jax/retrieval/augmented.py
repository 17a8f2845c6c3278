"""Retrieval-augmented inference: nearest labels and the labels of nearest train documents."""

import dataclasses
import math
from typing import Literal

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.retrieval.metrics import drop_filtered, filtered_per_document

_BLOCK = 1_024  # documents whose (label, weight) entries are summed at a time


@dataclasses.dataclass(frozen=True)
class AugmentedConfig:
    """How labels and documents are searched and mixed.

    Attributes:
        enabled: whether it is done at all.
        mode: "split" searches labels and documents apart, "joint" searches their union once.
        labels: labels retrieved in split mode; joint mode retrieves `labels + documents` items.
        documents: train documents retrieved in split mode.
        temperature: of the softmax over the inner products of what was retrieved.
        label_weight: weight of the label side; the document side has `1 - label_weight`.
        separate_softmax: one softmax per side instead of one over both.
        normalize_rows: a document passes on its weight in equal parts to its labels, instead of
            giving all of it to each.
        filter_first: drop filtered labels before the softmax and not only after it, so that they
            (a document's own entry among the labels, say) take no weight from the others.
        prior: where each label's prior comes from, see `data.priors`; None for none.
        prior_weight: exponent of the prior; 0 leaves it out, negative ones favour labels of low
            prior.
        weights: "config" takes the values here; "tuned" those that `tuned.write` left in the
            workdir, which whoever opens a run puts in their place.
    """

    enabled: bool = True
    mode: Literal["split", "joint"] = "split"
    labels: int = 100
    documents: int = 100
    temperature: float = 0.05
    label_weight: float = 0.9
    separate_softmax: bool = False
    normalize_rows: bool = False
    filter_first: bool = False
    prior: str | None = None
    prior_weight: float = 1.0
    weights: Literal["config", "tuned"] = "config"

    def __post_init__(self):
        if self.mode not in ("split", "joint"):
            raise ValueError(f"eval.augmented.mode: expected split or joint, got {self.mode!r}")
        if min(self.labels, self.documents) < 1:
            raise ValueError(
                f"eval.augmented: expected labels and documents of at least 1, got {self.labels} "
                f"and {self.documents}"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"eval.augmented.temperature: expected a positive number, got {self.temperature}"
            )
        if not 0 <= self.label_weight <= 1:
            raise ValueError(
                f"eval.augmented.label_weight: expected a fraction, got {self.label_weight}"
            )
        if not math.isfinite(self.prior_weight):
            raise ValueError(
                f"eval.augmented.prior_weight: expected a finite number, got {self.prior_weight}"
            )
        if self.weights not in ("config", "tuned"):
            raise ValueError(
                f"eval.augmented.weights: expected config or tuned, got {self.weights!r}"
            )


def union(
    label_scores: np.ndarray,
    label_ids: np.ndarray,
    document_scores: np.ndarray,
    document_ids: np.ndarray,
    num_labels: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The results of two searches as those of one over labels followed by documents.

    Args:
        label_scores: f32[M, K], label_ids: i32[M, K]; -1 and -inf where nothing was found.
        document_scores: f32[M, J], document_ids: i32[M, J], likewise.
        num_labels: L.

    Returns:
        f32[M, K + J] scores and i32[M, K + J] ids; document d has the id `L + d`.
    """
    document_ids = np.where(document_ids < 0, -1, document_ids + num_labels)
    scores = np.concatenate([label_scores, document_scores], axis=1)
    return scores, np.concatenate([label_ids, document_ids], axis=1).astype(np.int32)


def to_mix(
    config: AugmentedConfig,
    nearest: tuple[np.ndarray, np.ndarray],
    retrieved: tuple[np.ndarray, np.ndarray],
    pairs: np.ndarray,
    num_labels: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids of the items that `augment` mixes, of what was found.

    Args:
        config: see `AugmentedConfig`.
        nearest: of labels, at least as many as the config asks for, and, if filtered labels are
            dropped first, as many more as the filter takes from any one document.
        retrieved: of documents; in joint mode of both, with the same margin.
        pairs: i32[p, 2], the filter.
        num_labels: L.
    """
    if config.mode == "joint":
        wanted = config.labels + config.documents
        return drop_filtered(*retrieved, pairs, wanted) if config.filter_first else retrieved
    margin = filtered_per_document(pairs) if config.filter_first else 0
    scores, ids = (x[:, : config.labels + margin] for x in nearest)
    if config.filter_first:
        scores, ids = drop_filtered(scores, ids, pairs, config.labels)
    return union(scores, ids, *retrieved, num_labels)


def merge(
    labels: tuple[np.ndarray, np.ndarray],
    documents: tuple[np.ndarray, np.ndarray],
    num_labels: int,
    k: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of labels and documents together: of two searches what one would find.

    Args:
        labels: f32[M, K] scores and i32[M, K] ids of labels, K at least k or all there are.
        documents: likewise of documents.
        num_labels: L.
        k: items to keep.

    Returns:
        Scores, descending, and ids, as of `union`; labels come before documents of the same score.
    """
    both = union(*labels, *documents, num_labels)
    best = np.argsort(-both[0], axis=1, kind="stable")[:, :k]
    return tuple(np.take_along_axis(x, best, axis=1) for x in both)


def augment(
    scores: np.ndarray,
    ids: np.ndarray,
    positives: Csr,
    config: AugmentedConfig,
    k: int,
    prior: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k best labels by `(w sum_labels p_l e_l + (1 - w) sum_documents p_d Y_d) * prior^g`.

    p is the softmax over the retrieved items' scores, e_l the indicator of a label, Y_d the row of
    positives of a train document, g the prior's weight. A prior orders anew what was retrieved; it
    adds no labels, and a label whose prior is 0 goes.

    Args:
        scores: f32[M, K], inner products of M documents with retrieved items, in any order.
        ids: i32[M, K], label ids, or L + train document; -1 where nothing was found.
        positives: [N, L] of the train documents.
        config: see `AugmentedConfig`.
        k: labels to return.
        prior: f[L], finite, at least 0; None for 1 throughout.

    Returns:
        f32[M, k] mixed probabilities times powers of the prior, descending, and i32[M, k] label
        ids; ties go to the lower id, rows with fewer labels end in -inf and -1.

    Raises:
        ValueError: the config asks for a prior or for tuned weights and there are none here, or a
            prior is not of these labels, or too large with this exponent.

    Source: ViXML supp. E and `eval_mm.py::predict`; RAE-XMC (joint search). The prior is not in
    them; as the exponent of a prior, Menon et al. 2021, "Long-tail learning via logit adjustment".
    """
    if config.weights == "tuned":
        raise ValueError(
            "eval.augmented.weights: expected the tuned weights themselves, got only their name; "
            "read them with retrieval.tuned.read"
        )
    if prior is None and config.prior is not None:
        raise ValueError(f"augment: expected the prior {config.prior!r}, got none")
    if prior is not None and prior.shape != (positives.columns,):
        raise ValueError(
            f"augment: expected a prior of {positives.columns} labels, got shape {prior.shape}"
        )
    out_scores = np.full((len(ids), k), -np.inf, np.float32)
    out_ids = np.full((len(ids), k), -1, np.int32)
    for start in range(0, len(ids), _BLOCK):
        part = slice(start, start + _BLOCK)
        row, label, value = _entries(scores[part], ids[part], positives, config)
        row, label, value = _sum_by_label(row, label, value, positives.columns)
        if prior is not None and config.prior_weight:
            value = value * powers(prior[label], config.prior_weight)
            kept = prior[label] > 0
            row, label, value = row[kept], label[kept], value[kept]
        order = np.lexsort((label, -value, row))
        row, label, value = row[order], label[order], value[order]
        rank = np.arange(len(row)) - np.searchsorted(row, row)
        kept = rank < k
        out_scores[start + row[kept], rank[kept]] = value[kept]
        out_ids[start + row[kept], rank[kept]] = label[kept]
    return out_scores, out_ids


def powers(prior: np.ndarray, weight: float) -> np.ndarray:
    """f64: `prior ** weight`, which mixed probabilities are multiplied with.

    Args:
        prior: f, finite, at least 0.
        weight: `AugmentedConfig.prior_weight`.

    Raises:
        ValueError: it is beyond float32, as 0 with a negative weight is.
    """
    with np.errstate(divide="ignore", over="ignore"):
        found = np.power(prior, weight, dtype=np.float64)
    if not (found <= np.finfo(np.float32).max).all():
        worst = prior[np.argmax(np.where(np.isnan(found), np.inf, found))]
        raise ValueError(
            f"eval.augmented.prior: expected numbers whose power {weight:g} is below 3e38, got "
            f"{worst:g}; scale them, or set --config.eval.augmented.prior_weight nearer to 0"
        )
    return found


def _entries(scores, ids, positives, config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(row, label, weight) of everything that the retrieved items add."""
    is_label = (ids >= 0) & (ids < positives.columns)
    is_document = ids >= positives.columns
    sides = [is_label, is_document] if config.separate_softmax else [is_label | is_document]
    weight = sum(_softmax(scores, side, config.temperature) for side in sides)

    row_l, item_l = np.nonzero(is_label)
    row_d, item_d = np.nonzero(is_document)
    found = positives.take(ids[row_d, item_d] - positives.columns)
    passed = (1 - config.label_weight) * weight[row_d, item_d]
    if config.normalize_rows:
        passed = passed / np.maximum(found.counts(), 1)
    return (
        np.concatenate([row_l, np.repeat(row_d, found.counts())]),
        np.concatenate([ids[row_l, item_l], found.indices]),
        np.concatenate(
            [config.label_weight * weight[row_l, item_l], np.repeat(passed, found.counts())]
        ),
    )


def _softmax(scores: np.ndarray, kept: np.ndarray, temperature: float) -> np.ndarray:
    """f64[m, K]: softmax over the kept items of each row, 0 elsewhere."""
    logits = np.where(kept, scores.astype(np.float64) / temperature, -np.inf)
    top = logits.max(axis=1, keepdims=True)
    weight = np.exp(logits - np.where(np.isfinite(top), top, 0))  # a row may have nothing kept
    return weight / np.maximum(weight.sum(axis=1, keepdims=True), 1)  # the best item alone adds 1


def _sum_by_label(row, label, value, num_labels):
    keys = row * num_labels + label
    order = np.argsort(keys, kind="stable")
    keys, value = keys[order], value[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    total = np.add.reduceat(value, first) if len(first) else value
    return keys[first] // num_labels, keys[first] % num_labels, total
