"""Records of a run: metrics.jsonl, TensorBoard events and progress; process 0 only.

Records are a function of the training state and its data, except for values named `time/...`: a
resumed run writes what the straight run would have written. Metrics are fetched from the devices
only when a record is due, and only those of steps that are done.
"""

import contextlib
import json
import pathlib
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from xmc_jax.files import atomic
from xmc_jax.runtime.wording import counted

_FLUSH_SECONDS = 10  # between two writes of metrics.jsonl, which is written whole
_PROGRESS_SECONDS = 20  # between two lines on the same progress in a log
PHASES = ("step", "data_wait", "compile", "boundary", "eval", "save", "start", "other")
_COMPILE_EVENTS = "/jax/core/compile/"  # tracing, lowering, and XLA or the kept program


class Clock:
    """Wall time by phase: each second belongs to the innermost phase that it lies within.

    What JAX compiles is heard from JAX itself, on the thread that made the clock, and taken off the
    phase it falls in. Devices work asynchronously: a phase is what the host did or waited for. So
    "step" has the waiting for steps in flight, and "data_wait" is an upper bound of what the
    devices lacked, since they may have had steps in hand meanwhile.

    Args:
        now: seconds from any origin.

    Attributes:
        moves: how often a phase began or ended; a run that makes headway moves.
        steps: that the devices have done in this process.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now, self._thread = now, threading.get_ident()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self._since, self.moves = "other", now(), 0
        self.steps = 0
        self._compiled: list[tuple[float, float]] = []  # (middle, seconds), of this phase

    def seconds(self) -> dict[str, float]:
        """Phase -> seconds up to now."""
        self._enter(self.phase)
        return dict(self._seconds)

    def shares(self) -> dict[str, float]:
        """Phase -> its share of all seconds; their sum is 1."""
        seconds = self.seconds()
        return {phase: value / sum(seconds.values()) for phase, value in seconds.items()}

    def add(self, seconds: Mapping[str, float]) -> None:
        """Goes on from what `seconds` gave in the process before."""
        for phase, value in seconds.items():
            self._seconds[phase] += value

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Counts the time of its block as that of a phase, one of `PHASES`."""
        outer = self.phase
        self._enter(phase)
        try:
            yield
        finally:
            self._enter(outer)

    def awaiting(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time until each is there is "data_wait"."""
        iterator = iter(batches)
        while True:
            with self.within("data_wait"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def _enter(self, phase: str) -> None:
        now = self._now()
        self._seconds[self.phase] += now - self._since
        self.phase, self._since = phase, now
        self.moves += 1
        self._compiled = []

    def _hear(self, event: str, seconds: float, **_: Any) -> None:
        if not event.startswith(_COMPILE_EVENTS) or threading.get_ident() != self._thread:
            return
        # Tracing a function that calls others is heard after theirs, and has their time in it.
        now, alone = self._now(), seconds
        while self._compiled and self._compiled[-1][0] > now - seconds:
            alone -= self._compiled.pop()[1]
        self._compiled.append((now - seconds / 2, seconds))
        self._seconds["compile"] += alone
        self._seconds[self.phase] -= alone

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *exc_info) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)


def format_seconds(seconds: Mapping[str, float]) -> str:
    """One line: the wall time and each phase's share of it, the largest first."""
    total = sum(seconds.values())
    shares = sorted(seconds.items(), key=lambda item: -item[1])
    return f"wall time {total / 60:,.1f} min: " + ", ".join(
        f"{name} {value / total:.1%}" for name, value in shares
    )


class Progress:
    """How far something has come: a bar on a terminal, elsewhere a line in the log now and then.

    Nothing is shown for what ends within seconds, nor by any process but the first.

    Args:
        unit: the name of one, such as "item".
    """

    def __init__(self, what: str, total: int, unit: str):
        first = jax.process_index() == 0
        self._what, self._total, self._unit = what, total, unit
        self._count, self._said = 0, time.monotonic()
        self._in_log = first and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=what,
            unit=unit,
            leave=False,
            delay=_PROGRESS_SECONDS / 10,
            disable=not first or self._in_log,
        )

    def update(self, count: int) -> None:
        """Counts so many more that are done."""
        self._bar.update(count)
        self._count += count
        now = time.monotonic()
        if self._in_log and now - self._said >= _PROGRESS_SECONDS:
            self._said = now
            logging.info(
                "%s: %s of %s", self._what, f"{self._count:,}", counted(self._total, self._unit)
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.close()


class _Events:
    """TensorBoard events; those of a remote folder are written locally and copied whole."""

    def __init__(self, folder: epath.Path, first_step: int):
        self._folder, self._local = folder, None
        if atomic.is_remote(folder):
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
                atomic.write(self._folder / path.name, path.read_bytes())

    def close(self) -> None:
        try:
            self._writer.close()
            self.flush()
        finally:
            if self._local:
                self._local.cleanup()


class Reporter:
    """Collects the metrics of steps and writes them.

    Args:
        workdir: where metrics.jsonl and tensorboard/ go.
        steps_per_epoch: the last step of an epoch is recorded too, whatever `every`.
        total_steps: of the whole run. On a terminal a bar shows the progress, elsewhere a line for
            each training record.
        clock: of the run; steps are reported while it is within "step".
        history: of a restored checkpoint; records after it are forgotten.

    Attributes:
        steps: reported up to now, those of a restored run with them.
        skipped_in_a_row: how many of the latest changed nothing.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        every: int,
        steps_per_epoch: int,
        total_steps: int,
        clock: Clock,
        history: Mapping[str, Any] | None = None,
    ):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._every, self._steps_per_epoch = every, steps_per_epoch
        self._total_steps = total_steps
        self._records: list[dict[str, Any]] = list(history["records"]) if history else []
        self._pending: list[Any] = list(history["pending"]) if history else []
        self.steps = self._records_step() + len(self._pending)
        self.skipped_in_a_row = 0
        self.clock = clock
        self._last = (clock.seconds(), self.steps)
        self._writes = jax.process_index() == 0
        self._lines = [json.dumps(record) + "\n" for record in self._records]
        self._warned: set[str] = set()
        if self._writes:
            self._events = _Events(self._path.parent / "tensorboard", self.steps + 1)
            self._bar = tqdm(
                total=total_steps,
                initial=self.steps,
                unit="step",
                desc="train",
                leave=False,
                disable=not sys.stderr.isatty(),
            )
            self._flush()

    def step(
        self, metrics: Mapping[str, jax.Array], documents: int, skipped: bool = False
    ) -> dict[str, float] | None:
        """Takes the metrics of the next step, which is done: fetching them waits for no other.

        Args:
            metrics: f32[] arrays.
            skipped: the step changed nothing, as numbers of it are not finite; it is counted, and
                its metrics are in no mean.

        Returns:
            The means since the last record when a record is due, else None; None, too, if all steps
            since then were skipped.
        """
        self._pending.append({} if skipped else metrics)
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        self.steps += 1
        self.clock.steps += 1
        if self._writes:
            self._bar.update()
        if self.steps % self._every and self.steps % self._steps_per_epoch:
            return None
        self._fetch()
        applied = [metrics for metrics in self._pending if metrics]
        means = {
            name: float(np.mean([m[name] for m in applied], dtype=np.float64))
            for name in (applied[0] if applied else ())
        }
        skipped = len(self._pending) - len(applied)
        self._pending = []
        now, (before, steps) = self.clock.seconds(), self._last
        self._last = (now, self.steps)
        waiting, seconds = (
            sum(now[phase] - before[phase] for phase in phases) / (self.steps - steps)
            for phases in (("data_wait",), ("data_wait", "step"))
        )
        record = {f"train/{name}": value for name, value in means.items()}
        record |= {
            "train/skipped": skipped,
            "time/step": seconds,
            "time/data_wait": waiting,
            "time/documents_per_second": documents / seconds,
        }
        for name in ("tokens", "flops"):  # earlier versions' checkpoints may hold steps without
            if name in means:
                record[f"time/{name}_per_second"] = means[name] / seconds
        self.record(self.steps, record)
        if self._writes and means:
            told = (
                f"loss {means['loss']:.4f}, violators {means['violators']:.1%}, "
                f"{documents / seconds:,.0f} documents/s"
            )
            self._bar.set_postfix_str(told)
            if self._bar.disable:
                logging.info("step %d of %d: %s", self.steps, self._total_steps, told)
        return means or None

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
        """Everything reported up to now as JSON values, for a checkpoint."""
        self._fetch()
        if self._writes:
            self._flush()
        return {
            "records": list(self._records),
            "pending": list(self._pending),
            "seconds": self.clock.seconds(),
        }

    def warn(self, text: str) -> None:
        """Logs a warning above the progress bar, once for all that begin alike up to a colon."""
        subject = text.partition(":")[0]
        if self._writes and subject not in self._warned:
            self._warned.add(subject)
            self._bar.clear()
            logging.warning("%s", text)
            self._bar.refresh()

    def first(self, name: str) -> float:
        """The oldest value of this name that was recorded.

        Raises:
            KeyError: there is none.
        """
        for record in self._records:
            if name in record:
                return record[name]
        raise KeyError(name)

    def latest(self, prefix: str) -> dict[str, float]:
        """The values of the newest record with names of this prefix, the prefix taken off."""
        for record in reversed(self._records):
            values = {
                name.removeprefix(prefix): value
                for name, value in record.items()
                if name.startswith(prefix)
            }
            if values:
                return values
        return {}

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *exc_info) -> None:
        """Writes the last records, ends the progress bar and the event file."""
        if self._writes:
            self._bar.close()
            try:
                self._flush(durable=True)
            finally:
                self._events.close()

    def _fetch(self) -> None:
        """Turns the metrics of the steps since the last record into numbers."""
        self._pending = [
            {name: float(value) for name, value in metrics.items()}
            for metrics in jax.device_get(self._pending)
        ]

    def _records_step(self) -> int:
        steps = [r["step"] for r in self._records if any(k.startswith("train/") for k in r)]
        return max(steps, default=0)

    def _flush(self, durable: bool = False) -> None:
        # Written whole: object stores can neither append nor rename. Until the end the checkpoint's
        # copy is the one that counts, so that training need not wait for the disk.
        atomic.write(self._path, "".join(self._lines), durable)
        self._events.flush()
        self._flushed = time.perf_counter()
