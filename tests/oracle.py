"""Rankings and metrics by their definitions, one document at a time: `import oracle` in any test.

Written from the formulas alone. It shares no code with the package.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np


def plain(
    document: np.ndarray, labels: np.ndarray, allowed: Collection[int]
) -> dict[int, tuple[int, float]]:
    """Label -> (0, cosine): what sorts the allowed labels of a document, the best highest."""
    return {label: (0, float(document @ labels[label])) for label in allowed}


def augmented(
    document: np.ndarray,
    labels: np.ndarray,
    train: np.ndarray,
    positives: Sequence[Collection[int]],
    allowed: Collection[int],
    mix: Mapping[str, Any],
    prior: np.ndarray | None = None,
) -> dict[int, tuple[int, float]]:
    """Label -> (1, score) if it is mixed, else (0, cosine), of the labels that may be predicted.

    Args:
        document: f64[D].
        labels: f64[L, D].
        train: f64[N, D].
        positives: labels of each train document.
        allowed: labels that may be predicted.
        mix: fields of `eval.augmented`.
        prior: f64[L], or None.
    """
    allowed = [label for label in allowed if prior is None or prior[label] > 0]
    near_labels = sorted((-float(document @ labels[i]), 0, i) for i in allowed)
    near_train = sorted(((-float(document @ x), 1, d) for d, x in enumerate(train)))
    if mix["mode"] == "split":
        mixed = near_labels[: mix["labels"]] + near_train[: mix["documents"]]
    else:
        mixed = sorted(near_labels + near_train)[: mix["labels"] + mix["documents"]]
    weight = {item: math.exp(-item[0] / mix["temperature"]) for item in mixed}
    sides = [[x for x in mixed if x[1] == side] for side in (0, 1)]
    for side in sides if mix["separate_softmax"] else [mixed]:
        total = sum(weight[item] for item in side)
        for item in side:
            weight[item] /= total
    score: dict[int, float] = {}
    for item in mixed:
        _, side, number = item
        if side == 0:
            score[number] = score.get(number, 0.0) + mix["label_weight"] * weight[item]
            continue
        share = 1 / len(positives[number]) if mix["normalize_rows"] and positives[number] else 1
        for label in set(positives[number]) & set(allowed):
            passed = (1 - mix["label_weight"]) * weight[item] * share
            score[label] = score.get(label, 0.0) + passed
    if prior is not None:
        score = {i: s * prior[i] ** mix["prior_weight"] for i, s in score.items()}
    follow = {i: (0, -cosine) for cosine, _, i in near_labels}
    return follow | {i: (1, s) for i, s in score.items()}


def check(
    ranked: Sequence[int], key: Mapping[int, tuple[int, float]], k: int, near: float = 1e-5
) -> None:
    """A list holds the k best labels by a key, each once, in their order.

    Args:
        ranked: labels, best first.
        key: see `plain` and `augmented`.
        k: how many were asked for.
        near: scores as near as this may change places: embeddings are float32.
    """
    assert len(ranked) == len(set(ranked)) == min(k, len(key)), (ranked, key)
    assert set(ranked) <= set(key)
    found = [key[label] for label in ranked]
    left = [value for label, value in key.items() if label not in set(ranked)]
    for worse, better in zip([*found[1:], *([max(left)] if left and found else [])], found):
        assert worse[0] <= better[0]
        assert worse[0] < better[0] or worse[1] <= better[1] + near, (ranked, key)


def metrics(
    ranked: Sequence[Sequence[int]],
    truth: Sequence[Collection[int]],
    inverse_propensity: np.ndarray,
    ks: Sequence[int],
) -> dict[str, float]:
    """Means over documents; those of propensity-scored metrics are quotients of means.

    Args:
        ranked: labels of each document, best first.
        truth: positives of each document.
        inverse_propensity: f64[L].
        ks: cut-offs.
    """
    found: dict[str, float] = {}
    for k in ks:
        sums = dict.fromkeys(("P", "nDCG", "R", "Hit", "MAP", "MRR"), 0.0)
        got = dict.fromkeys(("PSP", "PSnDCG"), 0.0)
        best = dict.fromkeys(("PSP", "PSnDCG"), 0.0)
        for labels, positives in zip(ranked, truth):
            if not positives:
                continue  # scores 0 in every metric, and stays in the mean
            gain = [1 / math.log2(rank + 2) for rank in range(k)]
            ideal = sum(gain[: min(k, len(positives))])
            hits = [rank for rank, label in enumerate(labels[:k]) if label in positives]
            sums["P"] += len(hits) / k
            sums["R"] += len(hits) / len(positives)
            sums["Hit"] += bool(hits)
            sums["MRR"] += 1 / (hits[0] + 1) if hits else 0
            sums["nDCG"] += sum(gain[rank] for rank in hits) / ideal
            precisions = [(number + 1) / (rank + 1) for number, rank in enumerate(hits)]
            sums["MAP"] += sum(precisions) / min(k, len(positives))
            weights = sorted((inverse_propensity[label] for label in positives), reverse=True)[:k]
            got["PSP"] += sum(inverse_propensity[labels[rank]] for rank in hits) / k
            best["PSP"] += sum(weights) / k
            weighted = [gain[rank] * inverse_propensity[labels[rank]] for rank in hits]
            got["PSnDCG"] += sum(weighted) / ideal
            best["PSnDCG"] += sum(g * w for g, w in zip(gain, weights)) / ideal
        found |= {f"{name}@{k}": total / len(truth) for name, total in sums.items()}
        found |= {f"{name}@{k}": got[name] / best[name] for name in got}
    return found
