"""What a run has left in its workdir, read again; and what it ran on, which it leaves there."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import zipfile
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
from etils import epath

from xmc_jax import workdirs
from xmc_jax.files import atomic, json_files
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.wording import counted

_FACTS = "run.json"
_PACKAGES = ("xmc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "scann")
_BLOCK_BYTES = 1 << 24  # of predictions read at a time
_EVALUATION = re.compile(r"eval(?:_(\w+))?/(.+)")  # row and metric, of a name in metrics.jsonl


@dataclasses.dataclass(frozen=True, eq=False)
class RankedLabels:
    """Predictions of m documents.

    Attributes:
        ids: i32[m, k] label ids, best first; -1 where there is no prediction.
        scores: f32[m, k], -inf where there is no prediction; None where they were not asked for.
    """

    ids: np.ndarray
    scores: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class RunContents:
    """What is known of a run; of one under way, what is known by now.

    Attributes:
        config: as nested mappings, with `provenance`: digests of weights and data.
        records: of metrics.jsonl, in their order.
        step: of the newest evaluation; None where there is none.
        evaluated_rows: rows of metrics.json that the records have.
        metrics: row -> metric -> fraction, of that evaluation and of zero-shot.
        index: of metrics.json, see `Evaluation.index`.
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
    """Writes run.json: when a run ended, how long it took, on what and with which versions.

    Args:
        workdir: of the run.
        seconds: by phase, see `xmc_jax.report.Clock`.
    """
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
    if step is not None and predictions(workdir, step).exists():
        # Of that step; a run that goes on has those of an earlier end.
        metrics = _content(workdir / "metrics.json")
        index = metrics.pop("index", {})
    baseline: dict[str, Any] = {}
    if config.get("baseline") and (workdir / "baseline" / "metrics.json").exists():
        baseline = _content(workdir / "baseline" / "metrics.json")
        baseline.pop("index", None)
    facts = _content(workdir / _FACTS) if (workdir / _FACTS).exists() else {}
    return RunContents(config, records, step, evaluated_rows, metrics, index, facts, baseline)


def metric_prefix(row: str) -> str:
    """What precedes the metrics of a row of metrics.json in the names of metrics.jsonl."""
    return "eval/" if row == "plain" else f"eval_{row.replace('-', '_')}/"


def predictions(workdir: epath.PathLike, step: int) -> epath.Path:
    """Where the predictions of an evaluation are; those of zero-shot are of step 0."""
    return epath.Path(workdir) / "predictions" / f"{step}.npz"


def rankings(
    workdir: epath.PathLike,
    step: int | None,
    documents: np.ndarray,
    count: int,
    evaluation: Evaluation | None = None,
) -> dict[str, RankedLabels]:
    """Predictions of some documents, by row of metrics.json; of what there is.

    Args:
        workdir: of the run.
        step: of its newest evaluation.
        documents: i64[m], ascending.
        count: M.
        evaluation: that evaluation, where it is at hand; it is read else.
    """
    found: dict[str, RankedLabels] = {}
    if predictions(workdir, 0).exists():
        found |= {
            "zero-shot": read_predictions(predictions(workdir, 0), documents, count, False)["plain"]
        }
    if evaluation is not None:
        for row, ids in evaluation.ids.items():
            found[row] = RankedLabels(ids[documents], evaluation.scores[row][documents])
    elif step is not None and predictions(workdir, step).exists():
        found |= read_predictions(predictions(workdir, step), documents, count)
    return found


def read_predictions(
    path: epath.PathLike, documents: np.ndarray, count: int, scores: bool = True
) -> dict[str, RankedLabels]:
    """Rows of predictions of some documents; of the others no more than a block is held.

    Args:
        path: what `evaluate.write_predictions` wrote, local or remote.
        documents: i64[m], ascending, among those that the file has.
        count: M, how many test documents there are.
        scores: whether they are read, too.

    Raises:
        ValueError: it is no such file, or of other data.
    """
    path = epath.Path(path)
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
            rows = [match[1] for name in names if (match := re.match(r"(.+)_ids\.npy", name))]
            if "documents.npy" in names:
                documents, count = _places(archive, documents)
            return {
                row: RankedLabels(
                    _rows(archive, f"{row}_ids.npy", np.int32, documents, count),
                    _rows(archive, f"{row}_scores.npy", np.float32, documents, count)
                    if scores
                    else None,
                )
                for row in rows
            }
    except (zipfile.BadZipFile, KeyError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path}: expected the predictions of an evaluation, found another or a damaged file: "
            f"{error}; evaluate again"
        ) from error


def _places(archive: zipfile.ZipFile, documents: np.ndarray) -> tuple[np.ndarray, int]:
    """i64[m], where documents are in a file of some, and how many these are."""
    with archive.open("documents.npy") as file:
        held = np.lib.format.read_array(file, allow_pickle=False)
    places = np.searchsorted(held, documents)
    if not np.array_equal(held[np.minimum(places, len(held) - 1)], documents):
        said = counted(len(held), "document")
        raise ValueError(f"it holds {said}, and not all {len(documents)} asked for")
    return places, len(held)


def _rows(
    archive: zipfile.ZipFile, name: str, dtype: Any, documents: np.ndarray, count: int
) -> np.ndarray:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise ValueError(f"{name} has version {version}")
        shape, by_column, found = np.lib.format.read_array_header_1_0(file)
        if found != dtype or by_column or len(shape) != 2:
            raise ValueError(f"{name} holds {found}{list(shape)}")
        if shape[0] != count:
            raise ValueError(f"{name} has {counted(shape[0], 'document')}, not {count}")
        size = file.tell() + math.prod(shape) * np.dtype(dtype).itemsize
        if archive.getinfo(name).file_size != size:
            raise ValueError(f"{name} says it has shape {list(shape)}, and has another size")
        taken = np.empty((len(documents), shape[1]), dtype)
        width = taken.itemsize * shape[1]
        block = max(_BLOCK_BYTES // max(width, 1), 1)
        for start in range(0, count, block):
            size = min(block, count - start)
            rows = np.frombuffer(_exactly(file, size * width), dtype).reshape(size, -1)
            first, last = np.searchsorted(documents, (start, start + size))
            taken[first:last] = rows[documents[first:last] - start]
    return taken


def _exactly(file: BinaryIO, count: int) -> bytes:
    found = file.read(count)
    if len(found) != count:
        raise EOFError("it ends early")
    return found


def _content(path: epath.Path) -> dict[str, Any]:
    return json_files.read(path)


def _processor() -> str:
    information = pathlib.Path("/proc/cpuinfo")  # of Linux, where `platform` knows no model
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor()


def _versions() -> dict[str, str]:
    there = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {name: there[name] for name in _PACKAGES if name in there}
