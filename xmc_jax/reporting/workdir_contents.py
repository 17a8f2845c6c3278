"""What a run has left in its workdir, read again; and what it ran on, which it leaves there."""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from xmc_jax.files import atomic, json_files, workdirs
from xmc_jax.retrieval import saved_predictions
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.retrieval.saved_predictions import RankedLabels

_FACTS = "run.json"
_PACKAGES = ("xmc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scann")
_EVALUATION = re.compile(r"eval(?:_(\w+))?/(.+)")  # row and metric, of a name in metrics.jsonl


@dataclasses.dataclass(frozen=True, eq=False)
class RunContents:
    """What is known of a run; of one under way, what is known by now.

    Attributes:
        config: as nested mappings, with `provenance`: digests of weights and data.
        records: of metrics.jsonl, in their order.
        step: of the newest evaluation; None where there is none.
        evaluated_rows: rows of metrics.json that the records have.
        metrics: row -> metric -> fraction, of that evaluation and of zero-shot.
        facts: what `write_facts` has written; empty where it has not.
        baseline: row -> metric -> fraction of the baseline's run; empty without.
    """

    config: Mapping[str, Any]
    records: tuple[Mapping[str, float], ...]
    step: int | None
    evaluated_rows: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, float]]
    index: Mapping[str, Mapping[str, float]]
    facts: Mapping[str, Any]
    baseline: Mapping[str, Mapping[str, float]]


def write_facts(workdir: epath.PathLike, seconds: Mapping[str, float]) -> None:
    """Writes run.json: when a run ended, how long it took, on what and with which versions."""
    devices = jax.devices()
    facts = {
        "ended": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "seconds": dict(seconds),
        "hardware": {
            "devices": f"{len(devices)} × {devices[0].device_kind}",
            "platform": devices[0].platform,
            "processes": jax.process_count(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {"python": platform.python_version(), **_versions()},
    }
    atomic.write(epath.Path(workdir) / _FACTS, json.dumps(facts, indent=1) + "\n")


def read(workdir: epath.PathLike) -> RunContents:
    """What a workdir holds of its run.

    Raises:
        ValueError: there is no run, or a file of it is damaged.
    """
    workdir = epath.Path(workdir)
    config = workdirs.read_config(workdir)
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise ValueError(f"{path}: expected the records of a run, found no such file; train first")
    # A last line without its end is one that a killed or a running writer has not finished.
    lines = path.read_text().split("\n")[:-1]
    records = tuple(json_files.parse(path, line) for line in lines)
    step, metrics = None, {}
    for record in records:
        of_record: dict[str, dict[str, float]] = {}
        for name, value in record.items():
            if match := _EVALUATION.fullmatch(name):
                row = match[1].replace("_", "-") if match[1] else "plain"
                of_record.setdefault(row, {})[match[2]] = value
        metrics |= of_record
        step = record["step"] if "plain" in of_record else step
    evaluated_rows = tuple(metrics)
    index: Mapping[str, Any] = {}
    if step is not None and saved_predictions.path(workdir, step).exists():
        # Of that step; a run that goes on has those of an earlier end.
        metrics = json_files.read(workdir / "metrics.json")
        index = metrics.pop("index", {})
    baseline: dict[str, Any] = {}
    if config.get("baseline") and (workdir / "baseline" / "metrics.json").exists():
        baseline = json_files.read(workdir / "baseline" / "metrics.json")
        baseline.pop("index", None)
    facts = json_files.read(workdir / _FACTS) if (workdir / _FACTS).exists() else {}
    return RunContents(config, records, step, evaluated_rows, metrics, index, facts, baseline)


def metric_prefix(row: str) -> str:
    """What precedes the metrics of a row of metrics.json in the names of metrics.jsonl."""
    return "eval/" if row == "plain" else f"eval_{row.replace('-', '_')}/"


def rankings(
    workdir: epath.PathLike,
    step: int | None,
    documents: np.ndarray,
    count: int,
    evaluation: Evaluation | None = None,
) -> dict[str, RankedLabels]:
    """Predictions of some documents, by row of metrics.json; of what there is.

    Args:
        documents: i64[m], ascending.
        evaluation: that evaluation, where it is at hand; it is read else.
    """
    ranked: dict[str, RankedLabels] = {}
    zero_shot = saved_predictions.path(workdir, 0)
    if zero_shot.exists():
        of_zero_shot = saved_predictions.read(zero_shot, documents, count, scores=False)
        ranked["zero-shot"] = of_zero_shot["plain"]
    if evaluation is not None:
        for row, ids in evaluation.ids.items():
            ranked[row] = RankedLabels(ids[documents], evaluation.scores[row][documents])
    elif step is not None and saved_predictions.path(workdir, step).exists():
        ranked |= saved_predictions.read(saved_predictions.path(workdir, step), documents, count)
    return ranked


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")  # of Linux, where `platform` knows no model
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _versions() -> dict[str, str]:
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: there[name] for name in _PACKAGES if name in there}
