"""The loop: restore or build, then epochs of steps, boundary, save, evaluation."""

import collections
import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from xmc_jax.config import TrainConfig
from xmc_jax.data import batches, pipeline
from xmc_jax.retrieval import evaluate
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.runtime import command, distributed, metrics_log, stopping
from xmc_jax.runtime.watchdog import Watchdog
from xmc_jax.runtime.wording import counted
from xmc_jax.training import checkpoint, curriculum, health, losses, optimizer
from xmc_jax.training.profiling import Profile
from xmc_jax.training.run import Run
from xmc_jax.training.state import Health, TrainState

_IN_FLIGHT = 2  # steps the host may be ahead of the devices; more would delay a signal's save
# Rows of an evaluation -> prefix of their names in metrics.jsonl.
_PREFIX = {"zero-shot": "eval_zero_shot/", "plain": "eval/", "augmented": "eval_augmented/"}


class Interrupted(Exception):
    """A signal ended the run, which is saved.

    Args:
        signum: the signal's number.
        step: of the newest checkpoint; 0 before there is one.
    """

    def __init__(self, signum: int, step: int):
        saved = f"saved at step {step}; rerun to go on"
        if not step:
            saved = "nothing is saved before the first step; rerun to begin again"
        super().__init__(f"{signal.Signals(signum).name}: {saved}")
        self.signum = signum


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run came to.

    Attributes:
        step: optimizer steps done.
        state: the trained state.
        evaluation: of that state.
        zero_shot: metrics of the weights that training began with, as fractions; empty if
            `train.zero_shot` is off.
        seconds: by phase, see `metrics_log.Clock`; those before a resumption included.
    """

    step: int
    state: TrainState
    evaluation: Evaluation
    zero_shot: Mapping[str, float]
    seconds: Mapping[str, float]


def train(run: Run, workdir: epath.PathLike, profile: tuple[int, int] | None = None) -> Trained:
    """Trains a run to its end, or goes on with the one that is in `workdir`.

    Args:
        run: see `Run`.
        workdir: local folder or any path that `epath` knows.
        profile: the first and the last step of a trace, see `profiling.Profile`; None for none.

    Raises:
        ValueError: the checkpoint in `workdir` is of another config, or there are checkpoints and
            none is whole; or the run has no such steps to trace.
        OSError: a checkpoint could not be written.
        FloatingPointError: numbers of a step are not finite; see `TrainConfig.non_finite`. What is
            saved is of before.
        Interrupted: on SIGTERM or SIGINT, after the step under way and a checkpoint, or after the
            batch under way of what is encoded, searched or clustered.
    """
    config = run.config.train
    with (
        metrics_log.Clock() as clock,
        Watchdog(clock, config.stuck_after, workdir),
        _Signals() as signals,
    ):
        with checkpoint.Checkpoints(workdir, config.keep) as checkpoints:
            with clock.within("start"), _interruptible(0):
                step = checkpoints.latest()
                if step is None:
                    state, history, step = run.initial_state(), None, 0
                else:
                    state, history = checkpoints.restore(step, run.abstract)
                    clock.add(history["seconds"])
                    logging.info("%s: going on from step %d", workdir, step)
                    _tell_of_schedule(run, step, history)
            epoch, total = int(state.boundaries), config.epochs * run.steps_per_epoch
            if history is not None and epoch == history.get("epochs") < config.epochs:
                # A run that had ended, which is given more epochs.
                with clock.within("boundary"), _interruptible(step):
                    state = run.cluster(state, epoch - 1)
            if epoch < config.epochs and config.batch_size != run.wanted_batch_size:
                have = counted(
                    run.data.num_documents, "training document is", "training documents are"
                )
                message = "train.batch_size: %s fewer than %d: each step has all of them"
                logging.info(message, have, run.wanted_batch_size)
            if epoch < config.epochs:
                logging.info(
                    "%s: to train: %s, %s an epoch",
                    workdir,
                    counted(config.epochs - epoch, "epoch"),
                    counted(run.steps_per_epoch, "step"),
                )
            evaluation = None
            timer = _SaveTimer(config.checkpoint_minutes)
            with (
                metrics_log.Reporter(
                    workdir, config.log_every, run.steps_per_epoch, total, clock, history
                ) as reporter,
                Profile(profile, workdir, step, total) as traced,
            ):
                if step == 0 and config.zero_shot and not reporter.latest(_PREFIX["zero-shot"]):
                    _evaluate_zero_shot(run, state, reporter, workdir)
                while True:
                    at_end = epoch > 0 and step == epoch * run.steps_per_epoch
                    if at_end and _is_due(config, epoch) and checkpoints.precision(step) is None:
                        evaluation = _evaluate(run, state, step, reporter, checkpoints)
                        if stop := signals.at(step):
                            raise stop
                    if epoch == config.epochs:
                        break
                    state, step = _steps(
                        run, state, epoch, step, reporter, checkpoints, signals, timer, traced
                    )
                    state = _boundary(run, state, epoch, step, reporter, checkpoints)
                    epoch += 1
                    with clock.within("save"):
                        checkpoints.save(step, state, _history(reporter, config))
                    timer.restart()
                    if stop := signals.at(step):
                        raise stop
                zero_shot = reporter.latest(_PREFIX["zero-shot"])
            with clock.within("save"):
                checkpoints.wait()
        if evaluation is None:
            logging.info("%s: the run is complete; evaluating it again", workdir)
            with clock.within("eval"), _interruptible(step):
                evaluation = run.evaluate(state)
        if stop := signals.at(step):
            raise stop
        return Trained(step, state, evaluation, zero_shot, clock.seconds())


def is_finished(run: Run, workdir: epath.PathLike) -> bool:
    """Whether the newest checkpoint in `workdir` is of the end of the run; see `restore`."""
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step, epochs = checkpoints.latest(), run.config.train.epochs
        if step is None or step < epochs * run.steps_per_epoch:
            return False
        # One that a signal asked for may lack what follows the last step.
        return int(checkpoints.restore(step, run.abstract)[0].boundaries) == epochs


def restore(run: Run, workdir: epath.PathLike, which: str = "latest") -> tuple[int, TrainState]:
    """A checkpoint of a run: its step and its state.

    Args:
        run: see `Run`.
        workdir: where it lives; nothing is written there.
        which: "latest", "best" by P@1 of those evaluated, or a step's number.

    Raises:
        ValueError: there is no such checkpoint, it is not whole, or the config differs.
    """
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        step = _named(checkpoints, workdir, which)
        return step, checkpoints.restore(step, run.abstract)[0]


def find(workdir: epath.PathLike, which: str = "latest") -> int:
    """The step of a checkpoint of a run; see `restore`. Its files are not read."""
    with checkpoint.Checkpoints(workdir, read_only=True, hashed=False) as checkpoints:
        return _named(checkpoints, workdir, which)


def _named(checkpoints: checkpoint.Checkpoints, workdir: epath.PathLike, which: str) -> int:
    steps = checkpoints.steps()
    if which == "latest":
        step = checkpoints.latest()
    elif which == "best":
        step = checkpoints.best()
    else:
        step = next((s for s in steps if str(s) == which), None)
    if step is None:
        raise ValueError(
            f"{workdir}: expected the checkpoint {which!r}, found those of steps {list(steps)}"
        )
    return step


def _steps(
    run: Run,
    state: TrainState,
    epoch: int,
    step: int,
    reporter: metrics_log.Reporter,
    checkpoints: checkpoint.Checkpoints,
    signals: "_Signals",
    timer: "_SaveTimer",
    profile: Profile,
) -> tuple[TrainState, int]:
    """The steps that are left of an epoch, none if only its boundary is."""
    config, before, clock = run.config.train, epoch * run.steps_per_epoch, reporter.clock
    plan = curriculum.plan(epoch, run.config.curriculum)
    leaf_order = jax.device_get(state.tables.leaf_order)
    order = batches.complete(
        curriculum.order(plan, leaf_order, config.seed, epoch), config.batch_size
    )
    stream = pipeline.open(
        lambda i: run.sampler.build(order, i, before + i, run.rows),
        first=step - before,
        steps=run.steps_per_epoch,
        put=run.put,
        prefetch=config.prefetch,
    )
    with clock.within("start"):
        frozen = run.frozen  # read here, not within the guard
    in_flight: collections.deque[tuple[Mapping[str, jax.Array], Health]] = collections.deque()
    most = _most_in_flight()

    def report_done(ahead: int) -> None:
        """Waits until the devices are at most so many steps behind, and reports the others."""
        while len(in_flight) > ahead:
            metrics, seen = jax.block_until_ready(in_flight.popleft())
            skipped = not health.is_finite(seen)
            if skipped:
                first = (reporter.steps - before) * config.batch_size
                ids = order[first : first + config.batch_size]
                _not_applied(run, reporter, metrics, seen, ids)
            means = reporter.step(metrics, config.batch_size, skipped)
            if means is not None:
                first_spread = reporter.first("train/similarity_spread")
                if collapsed := losses.collapse(means, run.config.loss, first_spread):
                    reporter.warn(collapsed)

    with clock.within("step"):
        for batch in clock.awaiting(stream):
            with clock.within("compile"):
                flops = run.flops(state, frozen, batch)
            profile.before(step + 1, lambda: report_done(0))
            with (
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=step + 1),
            ):
                state, metrics = run.train_step(state, frozen, batch)
            metrics["flops"] = flops
            step += 1
            in_flight.append((metrics, metrics.pop("health")))
            report_done(most)
            profile.after(step, lambda: report_done(0))
            # The last step of an epoch is saved after the boundary, unless there is no time for it.
            within = step < before + run.steps_per_epoch
            stop = signals.at(step)
            due = step % config.checkpoint_every == 0 or timer.is_due(step)
            if stop or (within and due):
                report_done(0)
                with clock.within("save"):
                    checkpoints.save(step, state, _history(reporter, config))
                timer.restart()
            if stop:
                raise stop
        report_done(0)
    return state, step


def _most_in_flight() -> int:
    """Steps that may be dispatched and not done, beside the last; none on CPU.

    There the cores are the device, and a step takes its memory when it is dispatched.
    """
    return 0 if jax.default_backend() == "cpu" else _IN_FLIGHT


def _not_applied(
    run: Run,
    reporter: metrics_log.Reporter,
    metrics: Mapping[str, jax.Array],
    seen: Health,
    documents: np.ndarray,
) -> None:
    """Says what is wrong with the step after those reported.

    Raises:
        FloatingPointError: the run is to end.
    """
    config, step = run.config.train, reporter.steps + 1
    said = health.describe(step, metrics, seen, documents, run.data)
    in_a_row = reporter.skipped_in_a_row + 1
    if config.non_finite == "skip" and in_a_row <= config.non_finite_limit:
        reporter.warn(said)
        return
    if config.non_finite == "skip":
        said += f"; {in_a_row} in a row, more than train.non_finite_limit"
    raise FloatingPointError(
        f"train: {said}; lower optimizer.lr or set optimizer.clip_norm, look at what is named, or "
        "leave such batches out with --config.train.non_finite=skip"
    )


def _boundary(
    run: Run,
    state: TrainState,
    epoch: int,
    step: int,
    reporter: metrics_log.Reporter,
    checkpoints: checkpoint.Checkpoints,
) -> TrainState:
    """The state after the boundary that follows an epoch's steps; saves that before if stopped."""
    clock = reporter.clock
    before = clock.seconds()["boundary"]  # compilation, in the first ones, is another phase
    try:
        with clock.within("boundary"):
            state = jax.block_until_ready(run.boundary(state, epoch))
    except stopping.Stopped as stopped:
        if checkpoints.latest() != step:  # else the run went on from here
            with clock.within("save"):
                checkpoints.save(step, state, _history(reporter, run.config.train))
        raise Interrupted(stopped.signum, step) from None
    reporter.record(step, {"time/boundary": clock.seconds()["boundary"] - before})
    if not _is_due(run.config.train, epoch + 1):
        _record_shares(step, reporter)
    command.return_freed_memory()
    return state


def _is_due(config: TrainConfig, epochs: int) -> bool:
    """Whether an evaluation follows so many epochs."""
    every = config.eval_every
    return epochs == config.epochs or bool(every and epochs % every == 0)


def _evaluate(
    run: Run,
    state: TrainState,
    step: int,
    reporter: metrics_log.Reporter,
    checkpoints: checkpoint.Checkpoints,
) -> Evaluation:
    """Evaluates a state that is saved, and adds the result to its checkpoint."""
    clock, started = reporter.clock, time.perf_counter()
    with clock.within("eval"), _interruptible(step):
        evaluation = run.evaluate(state)
    record = {"time/eval": time.perf_counter() - started}
    for row, metrics in evaluation.metrics.items():
        record |= _prefixed(row, metrics)
    reporter.record(step, record)
    _record_shares(step, reporter)
    with clock.within("save"):
        history = _history(reporter, run.config.train)
        checkpoints.add_evaluation(step, evaluation.metrics["plain"], history)
    command.return_freed_memory()
    return evaluation


def _evaluate_zero_shot(
    run: Run, state: TrainState, reporter: metrics_log.Reporter, workdir: epath.PathLike
) -> None:
    with reporter.clock.within("eval"), _interruptible(0):
        evaluation = run.evaluate_zero_shot(state)
    if distributed.is_first():
        with reporter.clock.within("save"):
            path = epath.Path(workdir) / "predictions" / "0.npz"
            evaluate.write_predictions(evaluation, path, evaluate.sample(run.data.num_test))
    reporter.record(0, _prefixed("zero-shot", evaluation.metrics["plain"]))


def _record_shares(step: int, reporter: metrics_log.Reporter) -> None:
    shares = reporter.clock.shares()
    reporter.record(step, {f"time/share/{name}": share for name, share in shares.items()})


def _history(reporter: metrics_log.Reporter, config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint holds beside the state; the epochs are those of the learning rate."""
    return reporter.history() | {"epochs": config.epochs}


def _tell_of_schedule(run: Run, step: int, history: Mapping[str, Any]) -> None:
    """Says so where more epochs than before have raised the learning rate of the next step."""
    before, now = history.get("epochs"), run.config.train.epochs
    if before is None or before == now:
        return
    warmup = run.config.optimizer.warmup_steps
    then, rate = (
        float(optimizer.schedule(step, warmup, epochs * run.steps_per_epoch))
        for epochs in (before, now)
    )
    logging.warning(
        "train.epochs: %d before, %d now: the learning rate goes on from step %d at %.2f of its "
        "peak, where it was %.2f, and falls to 0 at the new end",
        before,
        now,
        step,
        rate,
        then,
    )


def _prefixed(row: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {_PREFIX[row] + name: value for name, value in metrics.items()}


class _SaveTimer:
    """Says when a checkpoint is due by time, after the same step in all processes; 0 is never."""

    def __init__(self, minutes: float):
        self._seconds, self._decision = 60 * minutes, distributed.Decision("save")
        self.restart()

    def restart(self) -> None:
        """Counts from now on."""
        self._since = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step; to be asked after each."""
        late = 0 < self._seconds <= time.monotonic() - self._since
        return self._decision.after(step, late)


@contextlib.contextmanager
def _interruptible(step: int) -> Iterator[None]:
    """Within it, work that a signal stops ends the run, whose newest checkpoint is of this step."""
    try:
        yield
    except stopping.Stopped as stopped:
        raise Interrupted(stopped.signum, step) from None


class _Signals(stopping.Signals):
    """Signals that end the run; see `stopping.Signals`."""

    def at(self, step: int) -> Interrupted | None:
        """What ends the run after this step, which is saved or about to be; None to go on."""
        number = self.requested()
        return Interrupted(number, step) if number else None
