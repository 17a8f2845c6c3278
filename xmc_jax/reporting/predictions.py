"""Values of the sections on predictions: by frequency, by score, before and after."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup

from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.reporting import analysis, charts
from xmc_jax.reporting.analysis import DEPTH, Bins, Hits
from xmc_jax.reporting.charts import Ridge, Series, axis
from xmc_jax.reporting.overview import Figure
from xmc_jax.reporting.rendering import number, ordered_rows, percent, row_label
from xmc_jax.reporting.workdir_contents import RankedLabels
from xmc_jax.runtime.wording import counted


@dataclasses.dataclass(frozen=True, eq=False)
class MatchedPredictions:
    """Predictions of some test documents, matched with their positives once for all sections.

    Attributes:
        documents: i64[m], which of its test documents.
        positives: [m, L].
        rankings: by row of metrics.json, in the order of `ordered_rows`.
    """

    data: Store
    documents: np.ndarray
    positives: Csr
    bins: Bins
    rankings: Mapping[str, RankedLabels]
    hits: Mapping[str, Hits]

    @property
    def note(self) -> str:
        """How many documents these are, if they are not all."""
        if len(self.documents) == self.data.num_test:
            return ""
        return (
            f"From {len(self.documents):,} of the {counted(self.data.num_test, 'test document')}, "
            "evenly spread over the set. "
        )


def match(
    data: Store, documents: np.ndarray, rankings: Mapping[str, RankedLabels]
) -> MatchedPredictions:
    """Matches predictions with positives.

    Args:
        documents: i64[m], the test documents of the predictions.
    """
    positives = data.positives("test").take(documents)
    rankings = {row: rankings[row] for row in ordered_rows(rankings)}
    return MatchedPredictions(
        data=data,
        documents=documents,
        positives=positives,
        bins=analysis.frequency_bins(data.label_frequency),
        rankings=rankings,
        hits={row: analysis.find(ranking.ids, positives) for row, ranking in rankings.items()},
    )


def frequency(matched: MatchedPredictions) -> dict[str, Any]:
    """Precision and recall by how many training documents a label has."""
    bins = matched.bins
    rows = {
        row: analysis.by_frequency(hits, matched.positives, bins)
        for row, hits in matched.hits.items()
    }
    title = f"Contribution to P@{DEPTH}"
    note = f"points of P@{DEPTH} that come from these labels; they add up to P@{DEPTH}"
    panels = [(title, note, {row: split.contribution for row, split in rows.items()})]
    for k, first in ((1, "first"), (DEPTH, f"first {DEPTH}")):
        note = f"of the {first} predictions that are such labels, those that are right"
        panels.append((f"P@{k}", note, {row: split.precision[k] for row, split in rows.items()}))
    for k in (DEPTH, 100):
        note = f"of the positives that are such labels, those among the first {k}"
        panels.append((f"R@{k}", note, {row: split.recall[k] for row, split in rows.items()}))
    labels = bins.labels
    positives = np.bincount(bins.of_label[matched.positives.indices], minlength=len(labels))
    shares = labels / labels.sum(), positives / max(positives.sum(), 1)
    return {
        "legend": [(row_label(row).name, row_label(row).style) for row in rows],
        "counts": list(zip(bins.names, labels, shares[0], positives, shares[1])),
        "panels": [
            Figure(t, note, charts.dots(t, bins.names, values)) for t, note, values in panels
        ],
        "heads": [f"{t}, {row_label(row).short}" for t, _, values in panels for row in values],
        "numbers": [
            (name, [of_row[i] for _, _, values in panels for of_row in values.values()])
            for i, name in enumerate(bins.names)
        ],
    }


def scores(matched: MatchedPredictions) -> dict[str, Any]:
    """How scores of right and wrong predictions differ, and what a score is worth."""
    by_row = []
    for row, ranking in matched.rankings.items():
        if ranking.scores is None:
            continue
        groups = analysis.by_score(ranking.scores, matched.hits[row].right)
        if groups is None:
            continue
        tips = [
            f"score {number(low)} to {number(high)}: {percent(p)} of {counted(n, 'document')}, "
            f"interval {percent(least)} to {percent(most)}"
            for low, high, n, p, (least, most) in groups.rows
        ]
        label = row_label(row)
        values = groups.score, groups.precision, tips, groups.interval
        one = Series(label.name, label.style, *values)
        chart = charts.lines(
            f"P@1 of {row_label(row).name} by the first prediction's score: " + "; ".join(tips),
            [one],
            axis(groups.score, "cosine" if row == "plain" else "mixed score"),
            axis([1.0], zero=True, percent=True),
            height=230,
            named=False,
        )
        by_row.append((row, groups, chart))
    plain = matched.rankings["plain"].scores, matched.hits["plain"].right
    return {"ridges": _ridges(*plain), "by_row": by_row}


def _ridges(scores: np.ndarray, right: np.ndarray) -> Markup | None:
    """Histograms of scores at each of the first ranks; None without predictions."""
    histograms = analysis.score_histograms(scores, right)
    if histograms is None:
        return None
    rows = []
    for rank in range(min(DEPTH, scores.shape[1])):
        finite, hit = np.isfinite(scores[:, rank]), right[:, rank]
        some = [scores[finite & of_kind, rank] for of_kind in (hit, ~hit)]
        means = [number(x.mean(dtype=np.float64) if len(x) else None, 3) for x in some]
        tip = (
            f"rank {rank + 1}: {len(some[0]):,} right, mean {means[0]}; "
            f"{len(some[1]):,} wrong, mean {means[1]}"
        )
        share = percent(len(some[0]) / max(finite.sum(), 1), 0)
        above, below = histograms.right[rank], histograms.wrong[rank]
        rows.append(Ridge(f"rank {rank + 1}", above, below, share, tip))
    edges = histograms.edges
    description = "Histograms of scores: " + "; ".join(row.tip for row in rows)
    x = charts.within(edges[0], edges[-1], "cosine")
    return charts.ridges(description, rows, edges, x, ("right", "wrong"))


def changes(matched: MatchedPredictions) -> list[dict[str, Any]]:
    """What training changed per document, and what augmentation changed; [] with one row alone."""
    pairs = (("zero-shot", "plain"), ("plain", "augmented"))
    return [
        _change(matched, before, after)
        for before, after in pairs
        if before in matched.hits and after in matched.hits
    ]


def _change(matched: MatchedPredictions, before: str, after: str) -> dict[str, Any]:
    change = analysis.change(matched.hits[before].right, matched.hits[after].right)
    count = max(len(matched.documents), 1)
    first = [
        (name, n, style, [f"{n:,}", percent(n / count)])
        for name, n, style in (
            ("right in both", change.first[1, 1], "same"),
            ("wrong, now right", change.first[0, 1], "helped"),
            ("right, now wrong", change.first[1, 0], "hurt"),
            ("wrong in both", change.first[0, 0], "same"),
        )
    ]
    differences = range(-DEPTH, DEPTH + 1)
    steps = [f"{i:+d}".replace("-", "−") if i else "0" for i in differences]
    helped, unchanged, hurt = (
        percent(n / count) for n in (change.helped, change.unchanged, change.hurt)
    )
    shares = (change.difference / count).tolist()
    chart = charts.columns(
        "Documents by the change of right predictions among the first five: "
        f"{helped} more, {unchanged} as many, {hurt} fewer",
        steps,
        shares,
        "more or fewer than before",
        styles=["hurt"] * DEPTH + ["same"] + ["helped"] * DEPTH,
        tips=[f"{step}: {counted(n, 'document')}" for step, n in zip(steps, change.difference)],
    )
    return {
        "name": f"{row_label(before).name} → {row_label(after).name}",
        "helped": helped,
        "unchanged": unchanged,
        "hurt": hurt,
        "first": first,
        "chart": chart,
        "numbers": list(zip(differences, change.difference.tolist(), shares)),
    }
