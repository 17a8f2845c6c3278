"""Ranking metrics of predictions against a test set's positives; the filter that precedes them."""

import numpy as np

from xmc_jax.config.retrieval_config import CUT_OFFS, parse_metric
from xmc_jax.runtime.wording import counted

NAMES = ("P", "nDCG", "PSP", "PSnDCG", "R", "Hit", "MAP", "MRR")
KS = CUT_OFFS

_BLOCK = 16_384  # positives compared with their documents' predictions at a time


def metrics(
    indices: np.ndarray,
    indptr: np.ndarray,
    positive_indices: np.ndarray,
    inverse_propensity: np.ndarray,
    ks: tuple[int, ...] = KS,
) -> dict[str, float]:
    """Means over all M test documents, as fractions in [0, 1].

    With hits h_r in {0, 1} at rank r, n positives, inverse propensities w, d_r = 1 / log2(r + 1):

        P@k       sum_{r<=k} h_r / k
        nDCG@k    sum_{r<=k} h_r d_r / sum_{r<=min(k,n)} d_r
        R@k       sum_{r<=k} h_r / n
        Hit@k     1 if any h_r with r <= k
        MAP@k     sum_{r<=k} h_r (h_1 + ... + h_r) / r  /  min(k, n)
        MRR@k     1 / rank of the first hit if that is <= k
        PSP@k     P@k with h_r w_r for h_r, divided by the same of the best k positives
        PSnDCG@k  nDCG@k with h_r w_r for h_r, divided by the same of the best k positives

    The two propensity-scored metrics are quotients of means, not means of quotients. A document
    without positives scores 0 in every metric and stays in the mean, as in pyxclib. Documents with
    fewer than k predictions (-1) are treated as if the rest were wrong.

    Args:
        indices: i32[M, K] distinct label ids, best first; -1 where there is no prediction.
        indptr: i64[M + 1], row i's positives are `positive_indices[indptr[i]:indptr[i + 1]]`.
        positive_indices: i32[nnz] label ids, distinct within a row.
        inverse_propensity: f64[L], see `data.propensity`.
        ks: cut-offs, each in [1, K].

    Returns:
        {"P@1": ..., "nDCG@1": ..., ...}: `NAMES` in order, each at every k.

    Raises:
        ValueError: shapes or ids do not fit, a label counts twice in a row, or there are no
            positives at all (the propensity-scored metrics are then 0/0).

    Source: pyxclib `xc_metrics` (P, nDCG, PSP, PSnDCG, R, Hit); Jain et al. 2016 (propensities).
    """
    truth = Truth(indptr, positive_indices, inverse_propensity)
    ranks = truth.ranks(np.asarray(indices), ks)
    return {f"{name}@{k}": truth.mean(name, k, ranks) for name in NAMES for k in ks}


class Truth:
    """The positives of documents, with which rankings are compared; see `metrics`.

    Args:
        indptr: i64[M + 1].
        positive_indices: i32[nnz].
        inverse_propensity: f64[L].

    Raises:
        ValueError: ids do not fit, a label counts twice in a row, or there are no positives at all.
    """

    def __init__(
        self, indptr: np.ndarray, positive_indices: np.ndarray, inverse_propensity: np.ndarray
    ):
        self._indptr = np.asarray(indptr, np.int64)
        self._positives = np.asarray(positive_indices)
        self._weight_of = np.asarray(inverse_propensity, np.float64)
        if not len(self._positives):
            raise ValueError(
                "metrics: expected at least one positive, got a ground truth without any"
            )
        self._check_range("positives", self._positives, 0)
        self._counts = np.diff(self._indptr)
        self._row_of = np.repeat(np.arange(len(self._counts)), self._counts)  # of each positive
        keys = np.sort(self._row_of * len(self._weight_of) + self._positives)
        _check_distinct(keys[1:] == keys[:-1], keys[1:] // len(self._weight_of), "positives")
        self._weight = self._weight_of[self._positives]
        # The best that can be had: a document's positives by descending inverse propensity.
        self._best_weight = self._weight[np.lexsort((-self._weight, self._row_of))]
        self._best_rank = np.arange(len(self._positives)) - self._indptr[self._row_of]

    def ranks(self, indices: np.ndarray, ks: tuple[int, ...]) -> np.ndarray:
        """i64[nnz], at which rank each positive is predicted, from 0; the last k where it is not.

        Args:
            indices: i32[M, K], distinct label ids in each row, best first; -1 for none.
            ks: cut-offs, each in [1, K].

        Raises:
            ValueError: shapes or ids do not fit, or a label counts twice in a row.
        """
        if indices.ndim != 2 or len(self._indptr) != len(indices) + 1:
            raise ValueError(
                "metrics: expected predictions [M, K] of the "
                f"{counted(len(self._indptr) - 1, 'document')} of "
                f"the ground truth, got shape {indices.shape}"
            )
        if not ks or min(ks) < 1 or max(ks) > indices.shape[1]:
            raise ValueError(
                "metrics: expected ks within the "
                f"{counted(indices.shape[1], 'prediction')} per document, got "
                f"{ks}; pad predictions with -1 or ask for fewer"
            )
        self._check_range("predictions", indices, -1)
        depth = max(ks)
        row, rank, positive = hits(indices[:, :depth], self._row_of, self._positives)
        _check_distinct(positive[1:] == positive[:-1], row[1:], "predictions")
        ranks = np.full(len(self._positives), depth)
        ranks[positive] = rank
        return ranks

    def mean(self, name: str, k: int, ranks: np.ndarray) -> float:
        """A metric; see `per_document`, whose mean it is."""
        return float(self.per_document(name, k, ranks).sum() / len(self._counts))

    def per_document(self, name: str, k: int, ranks: np.ndarray) -> np.ndarray:
        """f64[M], what each document adds to a metric, which is their mean.

        Of the propensity-scored metrics, too: their denominator is the same for all rankings.

        Args:
            name: one of `NAMES`.
            k: cut-off.
            ranks: i[nnz], from 0, of each positive; k or more where it is not among the first k.
        """
        hit = np.flatnonzero(ranks < k)
        row, rank = self._row_of[hit], ranks[hit]
        within = np.minimum(self._counts, k)  # hits that a perfect list of k would have
        discount = 1 / np.log2(np.arange(k) + 2)
        ideal = np.concatenate([[0.0], np.cumsum(discount)])[within]
        if name == "P":
            gain = np.full(len(hit), 1 / k)
        elif name == "nDCG":
            gain = discount[rank] / ideal[row]
        elif name == "R":
            gain = 1 / self._counts[row]
        elif name in ("PSP", "PSnDCG"):
            best = self._best_rank < k
            gain, best_gain = self._weight[hit], self._best_weight[best]
            if name == "PSnDCG":
                gain = gain * discount[rank] / ideal[row]
                best_gain = best_gain * discount[self._best_rank[best]] / ideal[self._row_of[best]]
            gain = gain * (len(self._counts) / best_gain.sum())
        else:
            ordinal = _ordinals(row, rank, len(self._counts))
            if name == "MAP":
                # Departs: the reference divides by the hits found, so missing a positive is free.
                gain = ordinal / (rank + 1) / within[row]
            elif name == "MRR":
                # Departs: the reference gives a document without a hit the score of one at rank 1.
                gain = (ordinal == 1) / (rank + 1)
            elif name == "Hit":
                gain = ordinal == 1
            else:
                raise ValueError(f"metrics: expected one of {', '.join(NAMES)}, got {name!r}")
        return np.bincount(row, gain, len(self._counts))

    def _check_range(self, what: str, ids: np.ndarray, low: int) -> None:
        if ids.min() < low or ids.max() >= len(self._weight_of):
            raise ValueError(
                f"metrics: expected {what} in [{low}, {len(self._weight_of)}), got {ids.min()} to "
                f"{ids.max()}; are predictions, positives and propensities of one dataset?"
            )


def parse(formula: str) -> tuple[tuple[str, int], ...]:
    """(name, k) of each metric of e.g. "P@1+nDCG@5".

    Raises:
        ValueError: there is no such metric.
    """
    parts = parse_metric(formula)
    for name, _ in parts:
        if name not in NAMES:
            raise ValueError(f"tune.metric: expected some of {', '.join(NAMES)}, got {name!r}")
    return parts


def filtered_per_document(pairs: np.ndarray) -> int:
    """The most labels that the filter takes from one document.

    Args:
        pairs: i32[p, 2] of (document, label).
    """
    return int(np.bincount(pairs[:, 0]).max()) if len(pairs) else 0


def drop_filtered(
    scores: np.ndarray, ids: np.ndarray, pairs: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Removes filtered labels from predictions, closes the gaps and cuts to k.

    Args:
        scores: f32[M, K], descending.
        ids: i32[M, K], -1 where there is no prediction.
        pairs: i32[p, 2] of (document, label) that must not be predicted.
        k: predictions to keep; rows that have fewer end in -1 and -inf.

    Returns:
        f32[M, k] scores and i32[M, k] ids.

    Raises:
        ValueError: a pair names a document that is not there.
    """
    if len(pairs) and not 0 <= pairs[:, 0].min() <= pairs[:, 0].max() < len(ids):
        raise ValueError(
            f"filter: expected documents in [0, {len(ids)}), got {pairs[:, 0].min()} to "
            f"{pairs[:, 0].max()}; the filter belongs to another split"
        )
    row, rank, _ = hits(ids, pairs[:, 0], pairs[:, 1])
    affected = np.unique(row)
    out_scores, out_ids = first(scores, ids, k)
    if len(affected):
        dropped = np.zeros(ids.shape, bool)
        dropped[row, rank] = True
        dropped = dropped[affected]
        order = np.argsort(dropped, axis=1, kind="stable")  # what is kept moves up, in order

        def close(x, missing):
            x = np.where(dropped, np.asarray(missing, x.dtype), x[affected])
            return _cut(np.take_along_axis(x, order, axis=1), k, missing)

        out_scores[affected], out_ids[affected] = close(scores, -np.inf), close(ids, -1)
    return out_scores, out_ids


def first(scores: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """f32[M, k] and i32[M, k]: the first k predictions; -inf and -1 where there are fewer.

    Args:
        scores: f32[M, K], descending.
        ids: i32[M, K].
        k: predictions to keep.
    """
    return _cut(scores, k, -np.inf), _cut(ids, k, -1)


def _cut(x: np.ndarray, k: int, missing: float) -> np.ndarray:
    out = np.full((len(x), k), missing, x.dtype)
    out[:, : x.shape[1]] = x[:, :k]
    return out


def hits(
    indices: np.ndarray, row_of: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which of some (row, label) pairs are among the predictions, and at which rank.

    Compares each pair with its row's predictions: fewer steps than looking up M * K predictions.

    Args:
        indices: i32[M, K] label ids, best first; -1 where there is no prediction.
        row_of: i[p], the row of each pair.
        labels: i[p], its label.

    Returns:
        i[h] each: row, rank from 0, and position in `labels` of the pairs that are; in their order.
    """
    parts = []
    for start in range(0, len(labels), _BLOCK):
        rows = row_of[start : start + _BLOCK]
        # Of one dimension, which is four times as fast as of two.
        there = np.flatnonzero(indices[rows] == labels[start : start + _BLOCK, None])
        pair, rank = np.divmod(there, indices.shape[1])
        parts.append((rows[pair], rank, pair + start))
    if not parts:
        return (np.zeros(0, np.int64),) * 3
    return tuple(np.concatenate(part) for part in zip(*parts))


def _ordinals(row: np.ndarray, rank: np.ndarray, count: int) -> np.ndarray:
    """Of each hit, 1 + the hits above it in its row."""
    order = np.lexsort((rank, row))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
    ordinal = np.empty(len(row), np.int64)
    ordinal[order] = np.arange(len(row)) - starts[row[order]] + 1
    return ordinal


def _check_distinct(repeated: np.ndarray, rows: np.ndarray, what: str):
    if repeated.any():
        raise ValueError(
            f"metrics: expected each label once in a row, got one twice among the {what} of "
            f"document {rows[repeated.argmax()]}"
        )
