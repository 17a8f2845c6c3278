"""Analyses of predictions for the report: by frequency, by score, before and after."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.retrieval import metrics

DEPTH = 5
"""First predictions of a document that are looked at one by one."""

_BASES = (2, 3, 4, 5, 10, 20, 50, 100)
_Z = 1.959964  # of a 95 % interval


@dataclasses.dataclass(frozen=True, eq=False)
class Hits:
    """Which positives are among the predictions of m documents.

    Attributes:
        ids: i32[m, k] label ids, best first; -1 where there is no prediction.
        rank: i64[nnz], from 0, of each positive in the predictions of its document; k where it is
            not there.
        right: bool[m, DEPTH], whether the first predictions are positives.
    """

    ids: np.ndarray
    rank: np.ndarray
    right: np.ndarray


def find(ids: np.ndarray, positives: Csr) -> Hits:
    """Looks for the positives among predictions.

    Args:
        ids: i32[m, k]; -1 where there is no prediction.
        positives: [m, L].
    """
    row, rank, position = metrics.hits(ids, positives.row_ids(), positives.indices)
    ranks = np.full(len(positives.indices), ids.shape[1])
    ranks[position] = rank
    right = np.zeros((len(ids), DEPTH), bool)
    first = rank < DEPTH
    right[row[first], rank[first]] = True
    return Hits(ids, ranks, right)


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """Labels by training documents, head first.

    Attributes:
        low: i64[b], fewest documents of a label in the bin, descending.
        high: i64[b], most.
        of_label: i64[L], the bin of each label.
    """

    low: np.ndarray
    high: np.ndarray
    of_label: np.ndarray

    @property
    def names(self) -> list[str]:
        """Such as "9-27", "1", "0"; with thousands separated, and an en dash."""
        return [
            f"{low:,}" if low == high else f"{low:,}–{high:,}"
            for low, high in zip(self.low.tolist(), self.high.tolist())
        ]

    @property
    def labels(self) -> np.ndarray:
        """i64[b], labels in each bin."""
        return np.bincount(self.of_label, minlength=len(self.low))


def frequency_bins(frequency: np.ndarray, limit: int = 9) -> Bins:
    """Bins on a logarithmic scale: 0, 1, 2 to c, c + 1 to c^2, ...; empty ones are left out.

    Args:
        frequency: i64[L], training documents of each label.
        limit: most bins; c is the least of 2, 3, 4, 5, 10, ... that needs no more.
    """
    top = int(frequency.max())
    for base in _BASES:
        starts = [0, 1]
        power = 1
        while power < top:
            starts.append(power + 1)
            power *= base
        number = np.searchsorted(starts, frequency, side="right") - 1
        used = np.unique(number)
        if len(used) <= limit:
            break
    ends = [*(start - 1 for start in starts[1:]), top]
    place = np.full(len(starts), -1)
    place[used[::-1]] = np.arange(len(used))
    return Bins(
        low=np.array(starts)[used[::-1]],
        high=np.minimum(np.array(ends)[used[::-1]], top),
        of_label=place[number],
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ByFrequency:
    """Predictions of one kind by the frequency of labels; see `by_frequency`.

    Attributes:
        contribution: f64[b], its part of P@DEPTH; their sum is P@DEPTH.
        precision: cut-off -> f64[b], of the first predictions that are labels of the bin, the share
            that is right; NaN where there are none.
        recall: cut-off -> f64[b], of the positives that are labels of the bin, the share that is
            among the first predictions; NaN where there are none.
        predicted: cut-off -> i64[b], first predictions that are labels of the bin.
    """

    contribution: np.ndarray
    precision: Mapping[int, np.ndarray]
    recall: Mapping[int, np.ndarray]
    predicted: Mapping[int, np.ndarray]


def by_frequency(hits: Hits, positives: Csr, bins: Bins) -> ByFrequency:
    """Splits precision and recall by the frequency of labels.

    Args:
        positives: [m, L].
    """
    count = len(bins.low)
    of_positive = bins.of_label[positives.indices]
    total = np.bincount(of_positive, minlength=count)

    def right(k: int) -> np.ndarray:
        there = hits.rank < min(k, hits.ids.shape[1])
        return np.bincount(of_positive[there], minlength=count)

    def predicted(k: int) -> np.ndarray:
        first = hits.ids[:, :k]
        return np.bincount(bins.of_label[first[first >= 0]], minlength=count)

    every = {k: predicted(k) for k in (1, DEPTH)}
    return ByFrequency(
        contribution=right(DEPTH) / (DEPTH * max(len(hits.ids), 1)),
        precision={k: _ratio(right(k), every[k]) for k in (1, DEPTH)},
        recall={k: _ratio(right(k), total) for k in (DEPTH, 100)},
        predicted=every,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """Histograms of scores, of right and of wrong predictions at each of the first ranks.

    Attributes:
        edges: f64[bins + 1].
        right: i64[DEPTH, bins].
        wrong: i64[DEPTH, bins].
    """

    edges: np.ndarray
    right: np.ndarray
    wrong: np.ndarray


def score_histograms(scores: np.ndarray, right: np.ndarray, bins: int = 48) -> Scores | None:
    """Counts scores in bins of one width, from the least to the largest; None if there are none.

    Args:
        scores: f32[m, >= DEPTH], -inf where there is no prediction.
        right: bool[m, DEPTH].
    """
    scores = scores[:, :DEPTH].astype(np.float64)
    right = right[:, : scores.shape[1]]
    there = np.isfinite(scores)
    if not there.any():
        return None
    low, high = scores[there].min(), scores[there].max()
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts = [
        np.stack(
            [
                np.histogram(column[which], edges)[0]
                for column, which in zip(scores.T, (there & kind).T)
            ]
        )
        for kind in (right, ~right)
    ]
    return Scores(edges, *counts)


@dataclasses.dataclass(frozen=True, eq=False)
class ByScore:
    """P@1 of documents in groups of about one size, by the score of their first prediction.

    Attributes:
        score: f64[g], mean of each group, ascending.
        low: f64[g], least score.
        high: f64[g], largest.
        documents: i64[g].
        precision: f64[g], share of first predictions that are right.
        interval: f64[2, g], Wilson's 95 % interval of it.
    """

    score: np.ndarray
    low: np.ndarray
    high: np.ndarray
    documents: np.ndarray
    precision: np.ndarray
    interval: np.ndarray

    @property
    def rows(self) -> list[tuple]:
        """(low, high, documents, precision, interval) of each group."""
        return list(
            zip(self.low, self.high, self.documents, self.precision, self.interval.T.tolist())
        )


def by_score(scores: np.ndarray, right: np.ndarray, groups: int = 10) -> ByScore | None:
    """Sorts documents by the score of their first prediction and cuts them into groups.

    Args:
        scores: f32[m, k], -inf where there is no prediction; documents without any are left out.
        right: bool[m, DEPTH].
        groups: at most so many, of at least 10 documents each.

    Returns:
        See `ByScore`; None if there is no document.
    """
    there = np.isfinite(scores[:, 0])
    first, right = scores[there, 0].astype(np.float64), right[there, 0]
    if not len(first):
        return None
    order = np.argsort(first, kind="stable")
    parts = np.array_split(order, min(groups, max(len(first) // 10, 1)))
    documents = np.array([len(part) for part in parts])
    precision = np.array([right[part].mean() for part in parts])
    return ByScore(
        score=np.array([first[part].mean() for part in parts]),
        low=np.array([first[part[0]] for part in parts]),
        high=np.array([first[part[-1]] for part in parts]),
        documents=documents,
        precision=precision,
        interval=wilson(precision, documents),
    )


def wilson(share: np.ndarray, count: np.ndarray) -> np.ndarray:
    """f64[2, ...]: the 95 % score interval of a share of `count` trials.

    Source: Wilson 1927.
    """
    z2 = _Z**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * np.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return np.clip(np.stack([middle - half, middle + half]), 0, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Change:
    """What changed per document between two rankings, in right ones among the first DEPTH.

    Attributes:
        difference: i64[2 * DEPTH + 1], documents by right predictions after minus before, from
            -DEPTH to DEPTH.
        first: i64[2, 2], documents by whether their first prediction was right before, and after.
    """

    difference: np.ndarray
    first: np.ndarray

    @property
    def helped(self) -> int:
        """Documents with more right predictions than before."""
        return int(self.difference[DEPTH + 1 :].sum())

    @property
    def unchanged(self) -> int:
        """Documents with as many."""
        return int(self.difference[DEPTH])

    @property
    def hurt(self) -> int:
        """Documents with fewer."""
        return int(self.difference[:DEPTH].sum())


def change(before: np.ndarray, after: np.ndarray) -> Change:
    """Compares two rankings of the same documents.

    Args:
        before: bool[m, DEPTH], right predictions.
        after: bool[m, DEPTH].
    """
    difference = after.sum(axis=1) - before.sum(axis=1) + DEPTH
    first = 2 * before[:, 0].astype(np.int64) + after[:, 0]
    return Change(
        difference=np.bincount(difference, minlength=2 * DEPTH + 1),
        first=np.bincount(first, minlength=4).reshape(2, 2),
    )


def examples(
    scores: np.ndarray, right: np.ndarray, positives: Csr, count: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Documents worth reading; of those without positives none.

    Args:
        scores: f32[m, k], -inf where there is no prediction.
        right: bool[m, DEPTH].
        positives: [m, L].
        count: of each kind, at most.

    Returns:
        "best": most of what could be right among the first DEPTH is, then most right ones, then the
        highest first score. "worst": nothing is right among them, the highest first score first.
        "random": drawn evenly, in their order. i64[<= count] each.
    """
    reachable = np.minimum(positives.counts(), DEPTH)
    some = np.flatnonzero(reachable)
    hits, first = right.sum(axis=1), scores[:, 0]
    share = hits / np.maximum(reachable, 1)
    best = some[np.lexsort((-first[some], -hits[some], -share[some]))]
    missed = some[hits[some] == 0]
    drawn = np.random.default_rng(seed).choice(some, min(count, len(some)), replace=False)
    return {
        "best": best[hits[best] > 0][:count],
        "worst": missed[np.argsort(-first[missed], kind="stable")][:count],
        "random": np.sort(drawn),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class ConfusedPairs:
    """Pairs of labels that are taken for each other, the most frequent first.

    Attributes:
        missed: i64[p], a positive that is not among the first DEPTH predictions.
        predicted: i64[p], the first prediction of the same document, which is wrong.
        documents: i64[p], how many.
        example: i64[p], the first of them.
    """

    missed: np.ndarray
    predicted: np.ndarray
    documents: np.ndarray
    example: np.ndarray


def confused(hits: Hits, positives: Csr, count: int) -> ConfusedPairs:
    """Counts pairs of a missed positive and a wrong first prediction.

    Args:
        positives: [m, L].
        count: pairs to keep; ties go to lower labels.
    """
    rows, first = positives.row_ids(), hits.ids[:, 0]
    wrong = (first >= 0) & ~hits.right[:, 0]
    taken = np.flatnonzero((hits.rank >= DEPTH) & wrong[rows])
    keys = positives.indices[taken].astype(np.int64) * positives.columns + first[rows[taken]]
    pairs, where, counts = np.unique(keys, return_index=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]
    missed, predicted = np.divmod(pairs[order], max(positives.columns, 1))
    return ConfusedPairs(missed, predicted, counts[order], rows[taken][where[order]])


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """A value over steps.

    Attributes:
        steps: f64[n], optimizer steps, ascending.
        values: f64[n].
        records: how many were averaged into each; 1 for the records themselves.
    """

    steps: np.ndarray
    values: np.ndarray
    records: int = 1


def curve(records: Sequence[Mapping[str, float]], name: str, limit: int = 120) -> Curve | None:
    """A value from the records of a run; None where no record has it.

    Args:
        limit: most points; more records are averaged in groups of one size, the last one smaller.
    """
    pairs = [(record["step"], record[name]) for record in records if name in record]
    if not pairs:
        return None
    steps, values = np.array(pairs, np.float64).T
    size = -(-len(pairs) // limit)
    starts = np.arange(0, len(pairs), size)
    counts = np.diff([*starts, len(pairs)])
    return Curve(
        np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts, size
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
