"""Sections of a report on predictions: by frequency, by score, before and after."""

import dataclasses
from collections.abc import Mapping
from xml.etree.ElementTree import Element

import numpy as np

from xmc_jax.data.csr import Csr
from xmc_jax.data.store import Store
from xmc_jax.reporting import analysis, charts, parts
from xmc_jax.reporting.analysis import DEPTH, Bins, Change, Found
from xmc_jax.reporting.charts import Ridge, Series, axis
from xmc_jax.reporting.files import Ranking
from xmc_jax.reporting.markup import element
from xmc_jax.reporting.parts import KINDS, NAMES, SHORT, number, percent
from xmc_jax.wording import counted


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of some test documents, looked at once for all sections.

    Attributes:
        data: the dataset.
        documents: i64[m], which of its test documents.
        positives: [m, L].
        bins: of the labels.
        rankings: by row of metrics.json, in the order of `NAMES`.
        found: likewise.
    """

    data: Store
    documents: np.ndarray
    positives: Csr
    bins: Bins
    rankings: Mapping[str, Ranking]
    found: Mapping[str, Found]

    @property
    def note(self) -> str:
        """Which documents these are, if they are not all."""
        if len(self.documents) == self.data.num_test:
            return ""
        return (
            f"From {len(self.documents):,} of the {counted(self.data.num_test, 'test document')}, "
            "evenly spread over the set. "
        )


def look(data: Store, documents: np.ndarray, rankings: Mapping[str, Ranking]) -> Predictions:
    """Finds what is right among predictions.

    Args:
        data: the dataset.
        documents: i64[m], the test documents that the predictions are of.
        rankings: by row of metrics.json.
    """
    positives = data.positives("test").take(documents)
    rankings = {row: rankings[row] for row in NAMES if row in rankings}
    return Predictions(
        data=data,
        documents=documents,
        positives=positives,
        bins=analysis.frequency_bins(data.label_frequency),
        rankings=rankings,
        found={row: analysis.find(ranking.ids, positives) for row, ranking in rankings.items()},
    )


def frequency(seen: Predictions) -> Element:
    """Precision and recall by how many training documents a label has."""
    rows = {
        row: analysis.by_frequency(found, seen.positives, seen.bins)
        for row, found in seen.found.items()
    }
    names = seen.bins.names
    # P@1 and P@5 of predictions in a bin, then recall of positives in it.
    panels = [
        (
            "Contribution to P@5",
            "points of P@5 that come from these labels; they add up to P@5",
            {row: found.contribution for row, found in rows.items()},
        ),
        *(
            (
                f"P@{k}",
                f"of the first {k if k > 1 else ''} predictions that are such labels, those "
                "that are right".replace("  ", " "),
                {row: found.precision[k] for row, found in rows.items()},
            )
            for k in (1, DEPTH)
        ),
        *(
            (
                f"R@{k}",
                f"of the positives that are such labels, those among the first {k}",
                {row: found.recall[k] for row, found in rows.items()},
            )
            for k in (DEPTH, 100)
        ),
    ]
    figures = [_counts(seen)]
    for title, note, values in panels:
        series = [
            Series(
                SHORT[row],
                KINDS[row],
                of_row,
                np.arange(len(names), dtype=np.float64),
                [f"{SHORT[row]}, {name} documents: {percent(v)}" for name, v in zip(names, of_row)],
            )
            for row, of_row in values.items()
        ]
        every = np.concatenate(list(values.values()))
        said = f"{title} by training documents of a label, from head to tail: " + "; ".join(
            f"{SHORT[row]} {', '.join(percent(v, 0) for v in of_row)}"
            for row, of_row in values.items()
        )
        x = axis(every, zero=True, percent=True, most=4)
        figures.append(parts.figure(title, note, charts.dots(said, names, "documents", series, x)))
    heads = ["training documents", *(f"{t}, {SHORT[row]}" for t, _, of in panels for row in of)]
    cells = (
        (name, *(percent(of_row[i], 2) for _, _, values in panels for of_row in values.values()))
        for i, name in enumerate(names)
    )
    lead = element(
        "div",
        None,
        element(
            "p",
            {"class": "quiet"},
            f"{seen.note}Labels by the number of training documents they have, the head above and "
            "the tail below.",
        ),
        parts.keys((NAMES[row], KINDS[row]) for row in rows),
    )
    table = parts.folded("Numbers", parts.table(heads, cells))
    return parts.section("frequency", "Head to tail", lead, parts.grid(figures), table)


def scores(seen: Predictions) -> Element:
    """How scores of right and wrong predictions differ, and what a score is worth."""
    figures, tables = [], []
    plain = seen.rankings["plain"]
    found = analysis.score_histograms(plain.scores, seen.found["plain"].right)
    if found:
        figures.append(_ridges(found, plain.scores, seen.found["plain"].right))
    for row in ("plain", "augmented"):
        if row not in seen.rankings:
            continue
        groups = analysis.by_score(seen.rankings[row].scores, seen.found[row].right)
        if not groups:
            continue
        tips = [
            f"score {number(low)} to {number(high)}: {percent(p)} of {counted(n, 'document')}, "
            f"interval {percent(a)} to {percent(b)}"
            for low, high, p, n, (a, b) in zip(
                groups.low, groups.high, groups.precision, groups.documents, groups.interval.T
            )
        ]
        one = Series(NAMES[row], KINDS[row], groups.score, groups.precision, tips, groups.interval)
        said = f"P@1 of {NAMES[row]} by the first prediction's score: " + "; ".join(tips)
        figures.append(
            parts.figure(
                f"P@1 by score, {NAMES[row]}",
                f"{counted(len(groups.score), 'group')} of about "
                f"{counted(groups.documents[0], 'document')} by the score of their first "
                f"prediction, with 95{charts.PERCENT} intervals",
                charts.lines(
                    said,
                    [one],
                    axis(groups.score, "cosine" if row == "plain" else "mixed score"),
                    axis([1.0], zero=True, percent=True),
                    height=230,
                    named=False,
                ),
            )
        )
        tables.append(
            parts.table(
                ("score from", "to", "documents", "P@1", "at least", "at most"),
                (
                    (number(a), number(b), f"{n:,}", percent(p, 2), percent(lo, 2), percent(hi, 2))
                    for a, b, n, p, (lo, hi) in zip(
                        groups.low,
                        groups.high,
                        groups.documents,
                        groups.precision,
                        groups.interval.T,
                    )
                ),
                f"P@1 by score, {NAMES[row]}",
                texts=0,
            )
        )
    return parts.section(
        "scores",
        "Scores",
        f"{seen.note}Whether a score tells a right prediction from a wrong one.",
        parts.grid(figures),
        parts.folded("Numbers", *tables),
    )


def changes(seen: Predictions) -> Element | None:
    """What training changed per document, and what augmentation did; None with one row alone."""
    pairs = [
        (before, after)
        for before, after in (("zero-shot", "plain"), ("plain", "augmented"))
        if before in seen.found and after in seen.found
    ]
    if not pairs:
        return None
    blocks, tables = [], []
    for before, after in pairs:
        found = analysis.change(seen.found[before].right, seen.found[after].right)
        name = f"{NAMES[before]} → {NAMES[after]}"
        blocks.append(_change(found, name, len(seen.documents)))
        tables.append(
            parts.table(
                ("right ones among the first five", "documents", "share"),
                (
                    (f"{i - DEPTH:+d}", f"{n:,}", percent(n / max(len(seen.documents), 1), 2))
                    for i, n in enumerate(found.difference.tolist())
                ),
                name,
            )
        )
    return parts.section(
        "changes",
        "Before and after",
        f"{seen.note}The same documents in two rankings: which have more right predictions than "
        "before, and which have fewer.",
        parts.grid(blocks, wide=True),
        parts.folded("Numbers", *tables),
    )


def _counts(seen: Predictions) -> Element:
    """How many labels and how many positives of test documents each bin has."""
    labels = seen.bins.labels
    positives = np.bincount(
        seen.bins.of_label[seen.positives.indices], minlength=len(seen.bins.low)
    )
    return parts.figure(
        "How many there are",
        "labels of each frequency, and positives of the test documents",
        parts.table(
            ("documents", "labels", "", "positives", ""),
            (
                (name, f"{n:,}", percent(n / labels.sum(), 0), f"{p:,}", percent(share, 0))
                for name, n, p, share in zip(
                    seen.bins.names, labels, positives, positives / max(positives.sum(), 1)
                )
            ),
        ),
    )


def _ridges(found: analysis.Scores, scores: np.ndarray, right: np.ndarray) -> Element:
    rows = []
    for rank in range(min(DEPTH, scores.shape[1])):
        there, hit = np.isfinite(scores[:, rank]), right[:, rank]
        some = [scores[there & kind, rank] for kind in (hit, ~hit)]
        means = [number(x.mean(dtype=np.float64), 3) if len(x) else "–" for x in some]
        share = len(some[0]) / max(there.sum(), 1)
        tip = (
            f"rank {rank + 1}: {len(some[0]):,} right, mean {means[0]}; "
            f"{len(some[1]):,} wrong, mean {means[1]}"
        )
        above, below = found.right[rank], found.wrong[rank]
        rows.append(Ridge(f"rank {rank + 1}", above, below, percent(share, 0), tip))
    return parts.figure(
        f"Scores of the first five, {NAMES['plain']}",
        "right predictions above each line, wrong ones below; at the right the share that is right",
        parts.keys((("right", "right"), ("wrong", "wrong"))),
        charts.ridges(
            "Histograms of scores: " + "; ".join(row.tip for row in rows),
            rows,
            found.edges,
            charts.within(found.edges[0], found.edges[-1], "cosine"),
            ("right", "wrong"),
        ),
    )


def _change(found: Change, name: str, count: int) -> Element:
    """A figure: the first predictions, and the first five."""
    first = found.first.tolist()
    rows = [
        parts.Bar(said, n, kind, (f"{n:,}", percent(n / max(count, 1))))
        for said, n, kind in (
            ("right in both", first[1][1], "same"),
            ("wrong, now right", first[0][1], "helped"),
            ("right, now wrong", first[1][0], "hurt"),
            ("wrong in both", first[0][0], "same"),
        )
    ]
    kinds = ["hurt"] * DEPTH + ["same"] + ["helped"] * DEPTH
    steps = [f"{i:+d}".replace("-", "−") if i else "0" for i in range(-DEPTH, DEPTH + 1)]
    helped, unchanged, hurt = (
        percent(n / max(count, 1)) for n in (found.helped, found.unchanged, found.hurt)
    )
    said = "Documents by the change of right predictions among the first five"
    return parts.figure(
        name,
        f"{helped} of the documents have more right ones among the first five, {unchanged} as "
        f"many, {hurt} fewer",
        element("h4", None, "First prediction"),
        parts.bars(rows, f"{name}, first predictions"),
        element("h4", None, "Right ones among the first five"),
        charts.columns(
            f"{said}: {helped} more, {unchanged} as many, {hurt} fewer",
            steps,
            (found.difference / max(count, 1)).tolist(),
            kinds,
            [f"{step}: {counted(n, 'document')}" for step, n in zip(steps, found.difference)],
            "more or fewer than before",
            lambda share: percent(share, 0) if share > 0.005 else "",
        ),
    )
