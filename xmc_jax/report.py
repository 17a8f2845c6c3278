"""What a run says of itself: metrics.jsonl, TensorBoard events and a progress bar; process 0 only.

Records are a function of the training state and its data, except those named `time/...`: a resumed
run writes what the straight run would have written. Values are fetched from the devices only when a
record is due, never in the step.
"""

import json
import math
import pathlib
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

_FLUSH_SECONDS = 10  # between two writes of metrics.jsonl, which is written whole


class _Events:
    """TensorBoard events; those of a remote folder are written locally and copied whole.

    Object stores cannot append, and tensorboardX would ask for another client than `epath`'s.

    Args:
        folder: for the file of events.
        first_step: events of this step and later ones that are there already are void.
    """

    def __init__(self, folder: epath.Path, first_step: int):
        self._folder, self._local = folder, None
        if "://" in str(folder):
            self._local = tempfile.TemporaryDirectory()
        where = self._local.name if self._local else str(folder)
        self._writer = SummaryWriter(where, purge_step=first_step)

    def add(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Brings what has been written to the folder; a thread may still be writing the newest."""
        self._writer.flush()
        if self._local:
            for path in pathlib.Path(self._local.name).iterdir():
                (self._folder / path.name).write_bytes(path.read_bytes())

    def close(self) -> None:
        self._writer.close()
        self.flush()
        if self._local:
            self._local.cleanup()


class Reporter:
    """Collects the metrics of steps and writes them.

    Args:
        workdir: where metrics.jsonl and tensorboard/ go.
        every: steps per training record.
        steps_per_epoch: the last step of an epoch is recorded too, whatever `every`.
        total_steps: of the whole run, for the progress bar.
        history: of a restored checkpoint; records after it are forgotten.

    Attributes:
        steps: reported up to now, those of a restored run with them.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        every: int,
        steps_per_epoch: int,
        total_steps: int,
        history: Mapping[str, Any] | None = None,
    ):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._every, self._steps_per_epoch = every, steps_per_epoch
        self._records: list[dict[str, Any]] = list(history["records"]) if history else []
        self._pending: list[Any] = list(history["pending"]) if history else []
        self.steps = self._records_step() + len(self._pending)
        self._writes = jax.process_index() == 0
        self._last = (time.perf_counter(), self.steps)
        self._lines = [json.dumps(record) + "\n" for record in self._records]
        self._warned: set[str] = set()
        if self._writes:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._events = _Events(self._path.parent / "tensorboard", self.steps + 1)
            self._bar = tqdm(
                total=total_steps, initial=self.steps, unit="step", desc="train", leave=False
            )
            self._flush()

    def step(self, metrics: Mapping[str, jax.Array], documents: int) -> dict[str, float] | None:
        """Takes the metrics of one step without waiting for it.

        Args:
            metrics: f32[] arrays, still being computed.
            documents: in the batch.

        Returns:
            The means since the last record when a record is due, else None.

        Raises:
            FloatingPointError: a loss since the last record is not finite.
        """
        self._pending.append(metrics)
        self.steps += 1
        if self._writes:
            self._bar.update()
        if self.steps % self._every and self.steps % self._steps_per_epoch:
            return None
        self._fetch()
        means = {
            name: float(np.mean([m[name] for m in self._pending], dtype=np.float64))
            for name in self._pending[0]
        }
        self._pending = []
        now = time.perf_counter()
        seconds = (now - self._last[0]) / max(self.steps - self._last[1], 1)
        self._last = (now, self.steps)
        record = {f"train/{name}": value for name, value in means.items()}
        record |= {"time/step": seconds, "time/documents_per_second": documents / seconds}
        self.record(self.steps, record)
        if self._writes:
            self._bar.set_postfix_str(
                f"loss {means['loss']:.4f}, violators {means['violators']:.1%}, "
                f"{documents / seconds:,.0f} documents/s"
            )
        return means

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one record to metrics.jsonl and to the TensorBoard events."""
        record = {"step": step, **values}
        self._records.append(record)
        self._lines.append(json.dumps(record) + "\n")
        if self._writes:
            for name, value in values.items():
                self._events.add(name, value, step)
            if time.perf_counter() - self._flushed > _FLUSH_SECONDS:
                self._flush()

    def history(self) -> dict[str, Any]:
        """Everything reported up to now as JSON values, for a checkpoint; waits for the devices.

        Raises:
            FloatingPointError: a loss since the last record is not finite: the state is not worth
                keeping.
        """
        self._fetch()
        if self._writes:
            self._flush()
        return {"records": list(self._records), "pending": list(self._pending)}

    def resume_clock(self) -> None:
        """Leaves the time since the last record (evaluation, re-clustering) out of `time/step`."""
        self._last = (time.perf_counter(), self.steps)

    def warn(self, text: str) -> None:
        """Logs a warning above the progress bar, once for all that begin alike up to a colon."""
        subject = text.partition(":")[0]
        if self._writes and subject not in self._warned:
            self._warned.add(subject)
            self._bar.clear()
            logging.warning("%s", text)
            self._bar.refresh()

    def latest(self, prefix: str) -> dict[str, float]:
        """The values of the newest record with names of this prefix, the prefix taken off."""
        for record in reversed(self._records):
            found = {
                name.removeprefix(prefix): value
                for name, value in record.items()
                if name.startswith(prefix)
            }
            if found:
                return found
        return {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info) -> None:
        """Writes what is left, ends the progress bar and the event file."""
        if self._writes:
            self._flush()
            self._bar.close()
            self._events.close()

    def _fetch(self) -> None:
        """Turns the metrics of the steps since the last record into numbers, and checks them."""
        self._pending = [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self._pending)
        ]
        for step, metrics in enumerate(self._pending, self.steps - len(self._pending) + 1):
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(
                    f"train: the loss of step {step} is {metrics['loss']}; nothing after the last "
                    f"checkpoint is kept; lower optimizer.lr or set optimizer.clip_norm"
                )

    def _records_step(self) -> int:
        steps = [r["step"] for r in self._records if any(k.startswith("train/") for k in r)]
        return max(steps, default=0)

    def _flush(self) -> None:
        # Written whole: object stores can neither append nor rename. The checkpoint's copy is the
        # one that counts, so a run killed in here loses nothing.
        self._path.write_text("".join(self._lines))
        self._events.flush()
        self._flushed = time.perf_counter()
