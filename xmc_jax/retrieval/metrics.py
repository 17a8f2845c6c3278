"""Ranking metrics of predictions against a test set's positives; the filter that precedes them."""

import numpy as np

NAMES = ("P", "nDCG", "PSP", "PSnDCG", "R", "Hit", "MAP", "MRR")
KS = (1, 3, 5, 10, 100)

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
    indices, positives = np.asarray(indices), np.asarray(positive_indices)
    indptr, weight_of = np.asarray(indptr, np.int64), np.asarray(inverse_propensity, np.float64)
    _check(indices, indptr, positives, len(weight_of), ks)
    count, depth = indices.shape[0], max(ks)
    counts = np.diff(indptr)
    row_of = np.repeat(np.arange(count), counts)  # i64[nnz], document of each positive
    discount = 1 / np.log2(np.arange(depth) + 2)
    ideal = np.concatenate([[0.0], np.cumsum(discount)])  # DCG of 0, 1, 2, ... leading hits

    keys = np.sort(row_of * len(weight_of) + positives)
    _check_distinct(keys[1:] == keys[:-1], keys[1:] // len(weight_of), "positives")
    row, rank, positive = hits(indices[:, :depth], row_of, positives)
    _check_distinct(positive[1:] == positive[:-1], row[1:], "predictions")
    weight = weight_of[positives[positive]]
    ordinal, first = _ordinals(row, rank, count, depth)
    # The best that can be had: a document's positives by descending inverse propensity.
    best_weight = weight_of[positives]
    best_weight = best_weight[np.lexsort((-best_weight, row_of))]
    best_rank = np.arange(len(positives)) - indptr[row_of]
    keep = best_rank < depth
    best_row, best_rank, best_weight = row_of[keep], best_rank[keep], best_weight[keep]

    def total(rank: np.ndarray, gain: np.ndarray, k: int) -> float:
        return gain[rank < k].sum()

    result = {name: {} for name in NAMES}
    for k in ks:
        within = np.minimum(counts, k)  # hits that a perfect list of k would have
        ndcg = discount[rank] / ideal[within[row]]
        best_ndcg = discount[best_rank] / ideal[within[best_row]]
        result["P"][k] = total(rank, np.ones(len(rank)), k) / (count * k)
        result["nDCG"][k] = total(rank, ndcg, k) / count
        result["PSP"][k] = total(rank, weight, k) / total(best_rank, best_weight, k)
        result["PSnDCG"][k] = total(rank, ndcg * weight, k) / total(
            best_rank, best_ndcg * best_weight, k
        )
        result["R"][k] = total(rank, 1 / counts[row], k) / count
        result["Hit"][k] = (first < k).sum() / count
        # Departs: the reference divides by the hits found, so missing a positive is free.
        result["MAP"][k] = total(rank, ordinal / (rank + 1) / within[row], k) / count
        # Departs: the reference gives a document without a hit the score of a hit at rank 1.
        result["MRR"][k] = (1 / (first[first < k] + 1)).sum() / count
    return {f"{name}@{k}": float(result[name][k]) for name in NAMES for k in ks}


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
    out_scores, out_ids = _cut(scores, k, -np.inf), _cut(ids, k, -1)
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
    found = []
    for start in range(0, len(labels), _BLOCK):
        rows = row_of[start : start + _BLOCK]
        pair, rank = np.nonzero(indices[rows] == labels[start : start + _BLOCK, None])
        found.append((rows[pair], rank, pair + start))
    if not found:
        return (np.zeros(0, np.int64),) * 3
    return tuple(np.concatenate(part) for part in zip(*found))


def _ordinals(row, rank, count, depth) -> tuple[np.ndarray, np.ndarray]:
    """Of each hit, 1 + the hits above it in its row; of each row, its first hit's rank or depth."""
    order = np.lexsort((rank, row))
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=count))])
    ordinal = np.empty(len(row), np.int64)
    ordinal[order] = np.arange(len(row)) - starts[row[order]] + 1
    first = np.full(count, depth)
    first[row[ordinal == 1]] = rank[ordinal == 1]
    return ordinal, first


def _check_distinct(repeated: np.ndarray, rows: np.ndarray, what: str):
    if repeated.any():
        raise ValueError(
            f"metrics: expected each label once in a row, got one twice among the {what} of "
            f"document {rows[repeated.argmax()]}"
        )


def _check(indices, indptr, positives, num_labels, ks):
    if indices.ndim != 2 or len(indptr) != len(indices) + 1:
        raise ValueError(
            f"metrics: expected predictions [M, K] of the {len(indptr) - 1} documents of the "
            f"ground truth, got shape {indices.shape}"
        )
    if not ks or min(ks) < 1 or max(ks) > indices.shape[1]:
        raise ValueError(
            f"metrics: expected ks within the {indices.shape[1]} predictions per document, got "
            f"{ks}; pad predictions with -1 or ask for fewer"
        )
    if not len(positives):
        raise ValueError("metrics: expected at least one positive, got a ground truth without any")
    for what, ids, low in (("predictions", indices, -1), ("positives", positives, 0)):
        if ids.min() < low or ids.max() >= num_labels:
            raise ValueError(
                f"metrics: expected {what} in [{low}, {num_labels}), got {ids.min()} to "
                f"{ids.max()}; are predictions, positives and propensities of one dataset?"
            )
