"""Values of the sections on the run itself: headline, training, time and config."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from xmc_jax.data.store import Store
from xmc_jax.reporting import charts
from xmc_jax.reporting.analysis import Curve, curve
from xmc_jax.reporting.charts import Series, axis
from xmc_jax.reporting.rendering import (
    duration,
    number,
    ordered_rows,
    percent,
    row_name,
    row_style,
    short_name,
)
from xmc_jax.reporting.workdir_contents import RunContents, metric_prefix
from xmc_jax.retrieval import evaluate
from xmc_jax.wording import counted

_TILES = {
    "P@1": "first predictions that are right",
    "P@5": "of the first five, those that are right",
    "R@100": "of the positives, those among the first 100",
}
_FEW = 30  # test documents, below which a standard error says nothing
# Training records with plots of their own, and records that need none.
_PLOTTED = ("loss", "violators", "grad_norm", "skipped")
_SIMILARITIES = {
    "similarity_positive": ("positive", "right"),
    "similarity_negative": ("negative", "wrong"),
}
_TABLED = (*_PLOTTED, *_SIMILARITIES, "similarity_spread")
_TERMS = {
    "document_to_label": "to label",
    "document_to_prototype": "to prototype",
    "label_to_document": "from label",
    "prototype_to_document": "from prototype",
    "regularizer": "regularizer",
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
}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot with its title and a note on what it shows."""

    title: str
    note: str
    chart: Markup


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
        """f64[n], epochs completed after so many steps."""
        return np.asarray(steps, np.float64) / self.steps

    def axis(self) -> charts.Axis:
        """From the beginning of the run to its end."""
        return axis([0, self.total], "epochs", whole=self.total >= 4)


def epochs(run: RunContents, data: Store) -> Epochs:
    """The epochs of a run over a dataset."""
    train = run.config["train"]
    return Epochs(-(-data.num_documents // train["batch_size"]), train["epochs"])


@dataclasses.dataclass(frozen=True)
class MetricsRow:
    """A row of the tables of metrics.

    Attributes:
        name: in tables.
        short: in charts.
        style: a class of style.css.
        metrics: metric -> fraction.
    """

    name: str
    short: str
    style: str
    metrics: Mapping[str, float]

    @property
    def cuts(self) -> list[int]:
        """Cut-offs of the metrics, ascending."""
        return sorted({int(cut) for _, cut in self._split() if cut.isdecimal()})

    @property
    def cut_names(self) -> list[str]:
        return [f"@{cut}" for cut in self.cuts]

    @property
    def names(self) -> list[str]:
        """Metrics with cut-offs, without these."""
        return list(dict.fromkeys(name for name, cut in self._split() if cut.isdecimal()))

    @property
    def uncut(self) -> dict[str, float]:
        """Metrics without cut-offs."""
        return {k: v for k, v in self.metrics.items() if not k.rpartition("@")[2].isdecimal()}

    def _split(self) -> Iterable[Sequence[str]]:
        return (key.rpartition("@")[::2] for key in self.metrics)


def headline(run: RunContents, num_test: int) -> dict[str, Any]:
    """Three measures at a glance, and the rows of the tables; the baseline's rows are first."""
    rows = []
    for row in ordered_rows(run.baseline):
        if row != "zero-shot":
            of = run.config["baseline"]["name"]
            names = f"{of}: {row_name(row)}", f"{of}: {short_name(row)}"
            rows.append(MetricsRow(*names, "baseline", run.baseline[row]))
    for row in ordered_rows(run.metrics):
        rows.append(MetricsRow(row_name(row), short_name(row), row_style(row), run.metrics[row]))
    columns = list(evaluate.COLUMNS)
    return {
        "rows": rows,
        "tiles": [_tile(metric, rows) for metric in _TILES] if rows else [],
        "columns": columns,
        "best": {
            c: max((r.metrics[c] for r in rows if c in r.metrics), default=0.0) for c in columns
        },
        "standard_error": _standard_error(rows, num_test),
    }


def _tile(metric: str, rows: Sequence[MetricsRow]) -> dict[str, Any]:
    values = [row.metrics.get(metric, math.nan) for row in rows]
    lengths = [value if math.isfinite(value) else 0.0 for value in values]
    # Of equal rows the last one, which uses the most.
    best = max(range(len(rows)), key=lambda i: (math.isfinite(values[i]), lengths[i], i))
    return {
        "metric": metric,
        "description": _TILES[metric],
        "value": values[best],
        "best": rows[best].name,
        "bars": [
            (row.short, length, row.style, [percent(value, 2)])
            for row, length, value in zip(rows, lengths, values)
        ],
    }


def _standard_error(rows: Sequence[MetricsRow], documents: int) -> str:
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


def training(run: RunContents, data: Store, epochs: Epochs) -> dict[str, Any]:
    """Curves over epochs and tables of their values."""
    names = dict.fromkeys(
        name.removeprefix("train/")
        for record in run.records
        for name in record
        if name.startswith("train/")
    )
    others = [name for name in names if name not in _TABLED]
    terms = [name for name in others if name in _TERMS]
    loss = run.config.get("loss", {}).get("kind", "")
    shares = {"write": percent, "zero": True}
    figures = [
        _figure(run, epochs, "Loss", {"loss": ("loss", "trained")}),
        _metric_figure(run, epochs, "P@1"),
        _metric_figure(run, epochs, "R@100"),
        _figure(
            run,
            epochs,
            "Violators",
            {"violators": ("violators", "trained")},
            # An unknown loss is shown under its own name.
            _VIOLATORS.get(loss, f"negatives that violate the loss {loss}"),
            **shares,
        ),
        _figure(run, epochs, "Similarities", _SIMILARITIES, "mean cosine of documents and labels"),
        _figure(run, epochs, "Gradient norm", {"grad_norm": ("norm", "trained")}, zero=True),
    ]
    if len(terms) > 1:
        note = "of documents to labels and back, before they are weighted"
        plotted = {name: (_TERMS[name], "plainly") for name in terms}
        figures.append(_figure(run, epochs, "Terms of the loss", plotted, note))
    figures += [
        _figure(run, epochs, name.replace("_", " "), {name: (name, "plainly")})
        for name in others
        if name not in _TERMS
    ]
    columns = {n: c for n in (*_TABLED, *others) if (c := curve(run.records, f"train/{n}", 40))}
    # Every column has the steps of the first one.
    first = next(iter(columns.values()), None)
    return {
        "batch": min(run.config["train"]["batch_size"], data.num_documents),
        "figures": [figure for figure in figures if figure],
        "record_names": [name.replace("_", " ") for name in columns],
        "records_caption": f"Training, means of {counted(first.records, 'record')}"
        if first
        else "",
        "records": [
            (
                float(epochs.at(step)),
                step,
                [c.values[i] if i < len(c.values) else None for c in columns.values()],
            )
            for i, step in enumerate(first.steps if first else ())
        ],
        **_evaluations(run, epochs),
    }


def _evaluations(run: RunContents, epochs: Epochs) -> dict[str, Any]:
    """A table of the headline's metrics at every evaluation."""
    columns = {
        f"{metric}, {short_name(row)}": dict(zip(found.steps.tolist(), found.values.tolist()))
        for row in ordered_rows(run.evaluated_rows)
        for metric in _TILES
        if (found := curve(run.records, metric_prefix(row) + metric, 60))
    }
    steps = sorted({step for column in columns.values() for step in column})
    return {
        "evaluation_names": list(columns),
        "evaluations": [
            (float(epochs.at(step)), step, [column.get(step) for column in columns.values()])
            for step in steps
        ],
    }


def _series(
    found: Curve, epochs: Epochs, name: str, style: str, write: Callable[[float], str]
) -> Series:
    at = epochs.at(found.steps)
    tips = [
        f"{name}, epoch {number(epoch, 3)}, step {step:,.0f}: {write(value)}"
        for epoch, step, value in zip(at, found.steps, found.values)
    ]
    return Series(name, style, at, found.values, tips)


def _figure(
    run: RunContents,
    epochs: Epochs,
    title: str,
    names: Mapping[str, tuple[str, str]],
    note: str = "",
    *,
    source: str = "train/",
    zero: bool = False,
    write: Callable[[float], str] = number,
) -> Figure | None:
    """A plot of values in the records: name there -> name here and style; None without values."""
    curves = [(c, *shown) for n, shown in names.items() if (c := curve(run.records, source + n))]
    if not curves:
        return None
    series = [_series(found, epochs, name, style, write) for found, name, style in curves]
    description = f"{title} over {counted(epochs.total, 'epoch')}: " + "; ".join(
        f"{one.name} from {write(one.y[0])} to {write(one.y[-1])}" for one in series
    )
    size = max(found.records for found, *_ in curves)
    means = f"means of {counted(size, 'record')}" if size > 1 else ""
    y = axis(np.concatenate([one.y for one in series]), zero=zero, percent=write is percent)
    chart = charts.lines(description, series, epochs.axis(), y, named=len(series) > 1)
    return Figure(title, ", ".join(filter(None, [note, means])), chart)


def _metric_figure(run: RunContents, epochs: Epochs, metric: str) -> Figure | None:
    series = []
    # Zero-shot is last, as a level to compare the others with.
    for row in sorted(ordered_rows(run.evaluated_rows), key=lambda row: row == "zero-shot"):
        found = curve(run.records, metric_prefix(row) + metric)
        if found:
            one = _series(found, epochs, short_name(row), row_style(row), percent)
            series.append(dataclasses.replace(one, level=row == "zero-shot"))
    if not series:
        return None
    description = f"{metric} over {counted(epochs.total, 'epoch')}: " + "; ".join(
        f"{one.name} {percent(one.y[-1])} at epoch {number(one.x[-1], 3)}" for one in series
    )
    y = axis(np.concatenate([one.y for one in series]), zero=True, percent=True)
    chart = charts.lines(description, series, epochs.axis(), y)
    return Figure(metric, "on test documents", chart)


def time(run: RunContents, epochs: Epochs) -> dict[str, Any]:
    """Wall time by phase, and the speed of steps."""
    seconds, total = run.facts.get("seconds") or {}, 0.0
    shares: dict[str, float] = {}
    if seconds:
        total = sum(seconds.values())
        shares = {phase: value / total for phase, value in seconds.items()}
    else:  # those of the newest record that has them
        prefix = "time/share/"
        for record in run.records:
            of = {k.removeprefix(prefix): v for k, v in record.items() if k.startswith(prefix)}
            shares = of or shares
    bars = []
    for phase, share in sorted(shares.items(), key=lambda item: -item[1]):
        texts = [duration(share * total)] if total else []
        bars.append((_PHASES.get(phase, phase), share, "trained", [*texts, percent(share)]))
    name = "documents_per_second"
    speed = _figure(
        run,
        epochs,
        "Documents per second",
        {name: ("documents/s", "trained")},
        "in training steps",
        source="time/",
        zero=True,
    )
    return {"total": total, "bars": bars, "figures": [speed] if speed else []}


def fields(run: RunContents, recipe: Mapping[str, Any] | None) -> dict[str, Any]:
    """Fields of the config as JSON: all, those changed from the recipe (None without), digests."""
    now = _flat({name: value for name, value in run.config.items() if name != "provenance"})
    changed = None
    if recipe is not None:
        before = _flat(recipe)
        changed = [
            (name, before.get(name, "null"), now.get(name, "null"))
            for name in sorted(now.keys() | before.keys())
            if now.get(name, "null") != before.get(name, "null")
        ]
    digests = dict(_leaves(run.config.get("provenance", {})))
    return {"all": now, "changed": changed, "digests": digests}


def _flat(config: Mapping[str, Any]) -> dict[str, str]:
    """{dotted name: JSON}, sorted. Tuples are lists, as in config.json."""
    return dict(sorted(_leaves(json.loads(json.dumps(config)))))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value, ensure_ascii=False)
