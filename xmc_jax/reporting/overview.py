"""Values of the sections on the run itself: headline, training, time and config."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from xmc_jax.data.store import Store
from xmc_jax.reporting import charts
from xmc_jax.reporting.analysis import curve
from xmc_jax.reporting.charts import Series, axis
from xmc_jax.reporting.rendering import duration, number, ordered_rows, percent, row_label
from xmc_jax.reporting.workdir_contents import RunContents, metric_prefix
from xmc_jax.retrieval import evaluate
from xmc_jax.runtime.wording import counted
from xmc_jax.training import losses

_TILES = {
    "P@1": "first predictions that are right",
    "P@5": "of the first five, those that are right",
    "R@100": "of the positives, those among the first 100",
}
_FEW = 30  # test documents, below which a standard error says nothing
# Training records with a plot of their own, and records that need none.
_KNOWN = (
    "loss",
    "violators",
    "grad_norm",
    "skipped",
    "similarity_positive",
    "similarity_negative",
    "similarity_spread",
)
_SIMILARITIES = {
    "train/similarity_positive": ("positive", "right"),
    "train/similarity_negative": ("negative", "wrong"),
}

_TERMS = losses.TERMS | {"regularizer": "regularizer"}
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


class MetricsRow(NamedTuple):
    """A row of the tables of metrics: see `RowLabel`, and metric -> fraction."""

    name: str
    short: str
    style: str
    metrics: Mapping[str, float]

    @property
    def by_cut(self) -> dict[str, dict[str, float]]:
        """Metric -> cut-off, such as "@5" -> value. Metrics without cut-off have ""."""
        table: dict[str, dict[str, float]] = {}
        for key, value in self.metrics.items():
            name, _, cut = key.rpartition("@")
            name, cut = (name, f"@{cut}") if cut.isdecimal() else (key, "")
            table.setdefault(name, {})[cut] = value
        return table

    @property
    def cuts(self) -> list[str]:
        """Cut-offs of the metrics, ascending, "" last."""
        cuts = {cut for by_cut in self.by_cut.values() for cut in by_cut}
        return sorted(cuts, key=lambda cut: int(cut[1:]) if cut else math.inf)


def headline(run: RunContents, num_test: int) -> dict[str, Any]:
    """Three measures at a glance, and the rows of the tables; the baseline's rows are first."""
    rows = []
    for row in ordered_rows(run.baseline):
        if row != "zero-shot":
            of = run.config["baseline"]["name"]
            label = row_label(row)
            names = f"{of}: {label.name}", f"{of}: {label.short}"
            rows.append(MetricsRow(*names, "baseline", run.baseline[row]))
    rows += [MetricsRow(*row_label(row), run.metrics[row]) for row in ordered_rows(run.metrics)]
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
    precisions = [row.metrics["P@1"] for row in rows if "P@1" in row.metrics]
    if not precisions:
        return ""
    if documents < _FEW:
        return f"Too few test documents ({documents:,}) to tell one model from another."
    error = math.sqrt(max(p * (1 - p) for p in precisions) / documents)
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
    others = [name for name in names if name not in _KNOWN]
    terms = [name for name in others if name in _TERMS]
    loss = run.config.get("loss", {}).get("kind", "")
    known = losses.LOSSES.get(loss)
    # Zero-shot is last, below the others.
    rows = sorted(ordered_rows(run.evaluated_rows), key=lambda row: row == "zero-shot")
    figure = functools.partial(_figure, run, epochs)
    figures = [
        figure("Loss", {"train/loss": ("loss", "trained")}),
        *(
            figure(
                metric,
                {metric_prefix(row) + metric: row_label(row)[1:] for row in rows},
                "on test documents",
                zero=True,
                write=percent,
                named=True,
            )
            for metric in ("P@1", "R@100")
        ),
        figure(
            "Violators",
            {"train/violators": ("violators", "trained")},
            # A run may have been trained with a loss that this version does not know.
            known.violators if known else f"negatives that violate the loss {loss}",
            zero=True,
            write=percent,
        ),
        figure("Similarities", _SIMILARITIES, "mean cosine of documents and labels"),
        figure("Gradient norm", {"train/grad_norm": ("norm", "trained")}, zero=True),
    ]
    if len(terms) > 1:
        plotted = {f"train/{name}": (_TERMS[name], "plainly") for name in terms}
        note = "of documents to labels and back, before they are weighted"
        figures.append(figure("Terms of the loss", plotted, note))
    for name in others:
        if name not in _TERMS:
            title = name.replace("_", " ")
            figures.append(figure(title, {f"train/{name}": (title, "plainly")}))
    columns = {n: c for n in (*_KNOWN, *others) if (c := curve(run.records, f"train/{n}", 40))}
    return {
        "batch": min(run.config["train"]["batch_size"], data.num_documents),
        "figures": [one for one in figures if one],
        "curves": columns,
        **_evaluations(run),
    }


def _evaluations(run: RunContents) -> dict[str, Any]:
    """The headline's metrics of every row at every evaluation: column -> step -> fraction."""
    columns = {
        f"{metric}, {row_label(row).short}": dict(zip(line.steps.tolist(), line.values.tolist()))
        for row in ordered_rows(run.evaluated_rows)
        for metric in _TILES
        if (line := curve(run.records, metric_prefix(row) + metric, 60))
    }
    steps = sorted({step for column in columns.values() for step in column})
    return {"evaluated_steps": steps, "evaluations": columns}


def _figure(
    run: RunContents,
    epochs: Epochs,
    title: str,
    names: Mapping[str, tuple[str, str]],
    note: str = "",
    *,
    zero: bool = False,
    write: Callable[[float], str] = number,
    named: bool | None = None,
) -> Figure | None:
    """A plot of values in the records; None without values."""
    series, size = [], 1
    for record_name, (name, style) in names.items():
        line = curve(run.records, record_name)
        if line:
            at, size = epochs.at(line.steps), max(size, line.records)
            tips = [
                f"{name}, epoch {number(epoch, 3)}, step {step:,.0f}: {write(value)}"
                for epoch, step, value in zip(at, line.steps, line.values)
            ]
            series.append(Series(name, style, at, line.values, tips, level=style == "zero"))
    if not series:
        return None
    description = f"{title} over {counted(epochs.total, 'epoch')}: " + "; ".join(
        f"{one.name} from {write(one.y[0])} to {write(one.y[-1])}" for one in series
    )
    means = f"means of {counted(size, 'record')}" if size > 1 else ""
    y = axis(np.concatenate([one.y for one in series]), zero=zero, percent=write is percent)
    named = len(series) > 1 if named is None else named
    chart = charts.lines(description, series, epochs.axis(), y, named=named)
    return Figure(title, ", ".join(filter(None, [note, means])), chart)


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
    speeds = {"time/documents_per_second": ("documents/s", "trained")}
    note = "in training steps"
    speed = _figure(run, epochs, "Documents per second", speeds, note, zero=True)
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
