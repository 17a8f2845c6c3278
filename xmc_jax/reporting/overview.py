"""Sections of a report on the run itself: headline, training, time, config."""

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from xmc_jax.data.store import Store
from xmc_jax.report import PHASES
from xmc_jax.reporting import charts, parts
from xmc_jax.reporting.analysis import Curve, curve
from xmc_jax.reporting.charts import Series, axis
from xmc_jax.reporting.files import Run
from xmc_jax.reporting.markup import element, quoted
from xmc_jax.reporting.parts import KINDS, NAMES, SHORT, number, percent
from xmc_jax.retrieval import evaluate
from xmc_jax.wording import counted

_TILES = (
    ("P@1", "first predictions that are right"),
    ("P@5", "of the first five, those that are right"),
    ("R@100", "of the positives, those among the first 100"),
)
_PREFIXES = {"plain": "eval/", "augmented": "eval_augmented/"}
# Names of training records that have plots of their own, or say nothing beside these.
_FEW = 30  # test documents, below which a standard error says nothing
_PLOTTED = ("loss", "violators", "grad_norm", "skipped")
_SIMILARITIES = {
    "similarity_positive": ("positive", "right"),
    "similarity_negative": ("negative", "wrong"),
}
_TERMS = {
    "document_to_label": "to label",
    "document_to_prototype": "to prototype",
    "label_to_document": "from label",
    "prototype_to_document": "from prototype",
}
_VIOLATORS = {
    "margin": "hard negatives within the margin",
    "decoupled_softmax": "negatives above the mean positive of their document",
}
_PHASES = {
    "step": "training steps",
    "data_wait": "waiting for data",
    "compile": "compilation",
    "boundary": "epoch boundaries",
    "eval": "evaluation",
    "save": "saving",
    "start": "start",
    "other": "other",
}


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Steps as epochs.

    Attributes:
        steps: of an epoch.
        total: epochs of the whole run.
    """

    steps: int
    total: int

    def at(self, steps: np.ndarray) -> np.ndarray:
        """f64[n], epochs done after so many steps."""
        return np.asarray(steps, np.float64) / self.steps

    def axis(self) -> charts.Axis:
        """From the beginning of the run to its end."""
        return axis([0, self.total], "epochs", whole=self.total >= 4)


def epochs(run: Run, data: Store) -> Epochs:
    """The epochs of a run over a dataset."""
    train = run.config["train"]
    return Epochs(-(-data.num_documents // train["batch_size"]), train["epochs"])


def dataset(data: Store) -> Element:
    """A line on the dataset."""
    positives = data.positives("train")
    return element(
        "p",
        {"class": "facts"},
        *_bold(data.num_documents, "training document"),
        " with ",
        element("b", None, f"{len(positives.indices) / max(data.num_documents, 1):.1f}"),
        " labels on average, ",
        *_bold(data.num_labels, "label"),
        ", ",
        *_bold(data.num_test, "test document"),
        " (held-out training documents)" if data.manifest["validation"] is not None else "",
    )


def _bold(count: int, noun: str) -> tuple[Element, str]:
    digits, _, nouns = counted(count, noun).partition(" ")
    return element("b", None, digits), f" {nouns}"


def headline(run: Run, data: Store) -> list[Element]:
    """How well it did: three measures at a glance, and the usual table."""
    rows = list(_rows(run))
    if not rows:
        return [element("p", None, "Nothing has been evaluated yet.")]
    shown = [_tile(metric, said, rows) for metric, said in _TILES]
    error = _standard_error(rows, data.num_test)
    lines = [
        f"ScaNN over {name}: {percent(found['recall'], 2)} of what exact search finds, "
        f"{found['queries_per_second']:,.0f} queries/s (exact: "
        f"{found['exact_queries_per_second']:,.0f})."
        for name, found in run.index.items()
    ]
    return [
        parts.grid(shown),
        _metrics_table(rows, evaluate.COLUMNS),
        element("p", {"class": "quiet"}, " ".join([error, *lines])),
        parts.folded("All metrics", *_all_metrics(rows)),
    ]


def training(run: Run, data: Store) -> Element:
    """Curves over epochs, from the records."""
    when = epochs(run, data)
    batch = min(run.config["train"]["batch_size"], data.num_documents)
    lead = (
        f"{counted(when.total, 'epoch')} of {counted(when.steps, 'step')}, "
        f"{counted(batch, 'document')} a step."
    )
    figures = [
        _curves(run, when, "Loss", [("train/loss", "loss", "trained")]),
        _metric_curves(run, when, "P@1"),
        _metric_curves(run, when, "R@100"),
        _curves(
            run,
            when,
            "Violators",
            [("train/violators", "violators", "trained")],
            _VIOLATORS[run.config["loss"]["kind"]],
            percent_of=True,
        ),
        _curves(
            run,
            when,
            "Similarities",
            [(f"train/{name}", *shown) for name, shown in _SIMILARITIES.items()],
            "mean cosine of documents and labels",
        ),
        _curves(run, when, "Gradient norm", [("train/grad_norm", "norm", "trained")], zero=True),
    ]
    terms = _terms(run)
    if len(terms) > 1:
        figures.append(
            _curves(
                run,
                when,
                "Terms of the loss",
                [(f"train/{name}", _TERMS.get(name, name), "plainly") for name in terms],
                "of documents to labels and back, before they are weighted",
            )
        )
    return parts.section(
        "training",
        "Training",
        lead,
        parts.grid(figures),
        parts.folded("Numbers", *_training_tables(run, when)),
    )


def time(run: Run, data: Store) -> Element:
    """Where the time went, and how fast steps were."""
    when = epochs(run, data)
    seconds, shares = run.facts.get("seconds"), _shares(run)
    total = sum(seconds.values()) if seconds else None
    lead = "Where the wall time went, as the host spent or waited for it."
    if total:
        lead = f"{_duration(total)} in all. {lead}"
        shares = {phase: value / total for phase, value in seconds.items()}
    rows = [
        parts.Bar(
            _PHASES.get(phase, phase),
            share,
            "trained",
            (*((_duration(share * total),) if total else ()), percent(share)),
        )
        for phase, share in sorted(shares.items(), key=lambda item: -item[1])
    ]
    figures = [
        parts.figure("Share of the time", "", parts.bars(rows, "Wall time by phase")),
        _curves(
            run,
            when,
            "Documents per second",
            [("time/documents_per_second", "documents/s", "trained")],
            "in training steps",
            zero=True,
        ),
    ]
    return parts.section("time", "Time", lead, parts.grid(figures, wide=True))


def config(run: Run, recipe: Mapping[str, Any] | None) -> Element:
    """Every field of the config, versions, hardware and digests."""
    own = dict(run.config)
    provenance = own.pop("provenance", {})
    fields = _plain(own)
    changes: list[Element] = []
    if recipe is not None:
        base = _plain(recipe)
        differing = [
            (element("code", None, name), _code(base.get(name)), _code(fields.get(name)))
            for name in sorted(fields.keys() | base.keys())
            if fields.get(name) != base.get(name)
        ]
        heads = ("field", "recipe", "this run")
        changes = (
            [parts.table(heads, differing, "Fields that differ from the recipe", texts=3)]
            if differing
            else [element("p", None, "No field differs from the recipe's.")]
        )
    facts = run.facts
    on = [(name, _text(value)) for name, value in facts.get("hardware", {}).items()]
    versions = list(facts.get("versions", {}).items())
    digests = [(name, _code(value)) for name, value in _leaves(provenance)]
    everything = [(element("code", None, name), _code(value)) for name, value in fields.items()]
    tables = [
        parts.table(("hardware", ""), on, texts=2) if on else None,
        parts.table(("package", "version"), versions, texts=2) if versions else None,
    ]
    return parts.section(
        "config",
        "Config",
        None if facts else "What it ran on is not recorded; that is done when a run has ended.",
        *changes,
        parts.grid([table for table in tables if table is not None]) if facts else None,
        element(
            "div",
            {"class": "config"},
            parts.folded("All fields", parts.table(("field", "value"), everything, texts=2)),
            parts.folded(
                "Weights and data it began with",
                parts.table(("digest", "value"), digests, texts=2),
            )
            if digests
            else None,
        ),
    )


# The headline


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of the tables: its name, a shorter one, a class of the style, and its metrics."""

    name: str
    short: str
    kind: str
    metrics: Mapping[str, float]


def _rows(run: Run) -> Iterator[_Row]:
    """The baseline's first; its zero-shot is left out."""
    name = run.config["baseline"]["name"] if run.baseline else ""
    for row in NAMES:
        if row in run.baseline and row != "zero-shot":
            said = f"{name}: {NAMES[row]}", f"{name}: {SHORT[row]}"
            yield _Row(*said, "baseline", run.baseline[row])
    for row in NAMES:
        if row in run.metrics:
            yield _Row(NAMES[row], SHORT[row], KINDS[row], run.metrics[row])


def _tile(metric: str, said: str, rows: Sequence[_Row]) -> Element:
    found = [(row, row.metrics.get(metric, math.nan)) for row in rows]
    bars = [
        parts.Bar(row.short, value if math.isfinite(value) else 0.0, row.kind, (percent(value, 2),))
        for row, value in found
    ]
    # Of equal ones the last, which has the most to it.
    best, lead = max(reversed(found), key=lambda one: (math.isfinite(one[1]), one[1]))
    caption = element(
        "figcaption",
        None,
        element("h3", None, metric),
        element("span", None, said),
        element(
            "strong", {"class": "lead"}, percent(lead), element("small", None, f" {best.name}")
        ),
    )
    return element("figure", None, caption, parts.bars(bars, metric))


def _metrics_table(rows: Sequence[_Row], columns: Sequence[str]) -> Element:
    best = {
        column: max((row.metrics[column] for row in rows if column in row.metrics), default=0.0)
        for column in columns
    }

    def cell(row: _Row, column: str) -> str | Element:
        value = row.metrics.get(column, math.nan)
        text = _points(value)
        return element("strong", None, text) if value == best[column] else text

    return parts.table(
        ("percent", *columns),
        ((row.name, *(cell(row, column) for column in columns)) for row in rows),
        "Test set, percent; the best of each column is bold",
    )


def _all_metrics(rows: Sequence[_Row]) -> Iterator[Element]:
    for row in rows:
        cuts = sorted({int(key.partition("@")[2]) for key in row.metrics})
        names = dict.fromkeys(key.partition("@")[0] for key in row.metrics)
        yield parts.table(
            (row.name, *(f"@{k}" for k in cuts)),
            (
                (name, *(_points(row.metrics.get(f"{name}@{k}", math.nan)) for k in cuts))
                for name in names
            ),
        )


def _points(fraction: float) -> str:
    return f"{100 * fraction:.2f}" if math.isfinite(fraction) else "–"


def _standard_error(rows: Sequence[_Row], documents: int) -> str:
    found = [row.metrics["P@1"] for row in rows if "P@1" in row.metrics]
    if not found:
        return ""
    if documents < _FEW:
        return f"Too few test documents ({documents:,}) to tell one model from another."
    error = math.sqrt(max(p * (1 - p) for p in found) / documents)
    return (
        f"With {counted(documents, 'test document')} one standard error of P@1 is up to "
        f"{100 * error:.2f} points."
    )


# Training


def _terms(run: Run) -> list[str]:
    """Parts of the loss that records name."""
    names = dict.fromkeys(
        name.removeprefix("train/")
        for record in run.records
        for name in record
        if name.startswith("train/")
    )
    return [n for n in names if n not in _PLOTTED and not n.startswith("similarity")]


def _series(found: Curve, when: Epochs, name: str, kind: str, written) -> Series:
    at = when.at(found.steps)
    tips = [
        f"{name}, epoch {number(epoch, 3)}, step {step:,.0f}: {written(value)}"
        for epoch, step, value in zip(at, found.steps, found.values)
    ]
    return Series(name, kind, at, found.values, tips)


def _curves(
    run: Run,
    when: Epochs,
    title: str,
    wanted: Sequence[tuple[str, str, str]],
    note: str = "",
    *,
    zero: bool = False,
    percent_of: bool = False,
) -> Element | None:
    """A plot of values in the records: (name there, name here, class); None if there are none."""
    curves = [(found, *shown) for name, *shown in wanted if (found := curve(run.records, name))]
    if not curves:
        return None
    written = percent if percent_of else number
    series = [_series(found, when, name, kind, written) for found, name, kind in curves]
    values = np.concatenate([one.y for one in series])
    said = f"{title} over {counted(when.total, 'epoch')}: " + "; ".join(
        f"{one.name} from {written(one.y[0])} to {written(one.y[-1])}" for one in series
    )
    size = max(found.records for found, *_ in curves)
    notes = [note, f"means of {counted(size, 'record')}" if size > 1 else ""]
    return parts.figure(
        title,
        ", ".join(filter(None, notes)),
        charts.lines(
            said,
            series,
            when.axis(),
            axis(values, zero=zero or percent_of, percent=percent_of),
            named=len(series) > 1,
        ),
    )


def _metric_curves(run: Run, when: Epochs, metric: str) -> Element | None:
    series = []
    for row, prefix in _PREFIXES.items():
        found = curve(run.records, prefix + metric)
        if found:
            series.append(_series(found, when, SHORT[row], KINDS[row], percent))
    before = curve(run.records, f"eval_zero_shot/{metric}")
    if before:
        one = _series(before, when, SHORT["zero-shot"], KINDS["zero-shot"], percent)
        series.append(dataclasses.replace(one, level=True))
    if not series:
        return None
    said = f"{metric} over {counted(when.total, 'epoch')}: " + "; ".join(
        f"{one.name} {percent(one.y[-1])} at epoch {number(one.x[-1], 3)}" for one in series
    )
    values = np.concatenate([one.y for one in series])
    return parts.figure(
        metric,
        "on test documents",
        charts.lines(said, series, when.axis(), axis(values, zero=True, percent=True)),
    )


def _training_tables(run: Run, when: Epochs) -> Iterator[Element]:
    names = [*_PLOTTED, "similarity_positive", "similarity_negative", "similarity_spread"]
    columns = {name: curve(run.records, f"train/{name}", 40) for name in names + _terms(run)}
    columns = {name: found for name, found in columns.items() if found}
    if columns:
        steps = next(iter(columns.values())).steps
        yield parts.table(
            ("epoch", "step", *(name.replace("_", " ") for name in columns)),
            (
                (
                    number(float(when.at(step)), 3),
                    f"{step:,.0f}",
                    *(number(c.values[i]) if i < len(c.values) else "–" for c in columns.values()),
                )
                for i, step in enumerate(steps)
            ),
            f"Training, means of {counted(next(iter(columns.values())).records, 'record')}",
            texts=0,
        )
    evaluated = {
        (row, metric): found
        for row, prefix in ({"zero-shot": "eval_zero_shot/"} | _PREFIXES).items()
        for metric, _ in _TILES
        if (found := curve(run.records, prefix + metric, 60))
    }
    if evaluated:
        steps = sorted({step for found in evaluated.values() for step in found.steps.tolist()})
        at = {key: dict(zip(f.steps.tolist(), f.values.tolist())) for key, f in evaluated.items()}
        yield parts.table(
            ("epoch", "step", *(f"{metric}, {SHORT[row]}" for row, metric in evaluated)),
            (
                (
                    number(float(when.at(step)), 3),
                    f"{step:,.0f}",
                    *(percent(at[key].get(step, math.nan), 2) for key in evaluated),
                )
                for step in steps
            ),
            "Evaluations",
            texts=0,
        )


# Time


def _shares(run: Run) -> dict[str, float]:
    """Phase -> share, of the newest record that has it."""
    for record in reversed(run.records):
        found = {p: record[f"time/share/{p}"] for p in PHASES if f"time/share/{p}" in record}
        if found:
            return found
    return {}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


# The config


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted name: JSON value}; tuples are lists, as in config.json."""
    return dict(sorted(_leaves(json.loads(json.dumps(fields)))))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _code(value: Any) -> Element:
    return element("code", None, json.dumps(value, ensure_ascii=False))


def _text(value: Any) -> str | Element:
    return quoted(value) if isinstance(value, str) else str(value)
