"""What the loop waits for, and when it asks: a run of fakes, and a clock that they move."""

import json
import pathlib
import types

import jax
import numpy as np
import pytest

from configs import vixml
from xmc_jax.config import RunConfig
from xmc_jax.data import pipeline
from xmc_jax.runtime import metrics_log
from xmc_jax.training import loop
from xmc_jax.training.profiling import Profile
from xmc_jax.training.state import Health

STEPS, EVERY, SAVED, BATCH = 7, 3, 5, 8
TOKENS, FLOPS = 60, 1e9  # of a step
BUILD, DISPATCH, COMPUTE, SAVE = 0.5, 0.25, 2.0, 4.0  # seconds


class Time:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Metric:
    """A value that can be had once it has been waited for."""

    def __init__(self, value: float, time: Time, seconds: float = COMPUTE):
        self.value, self.time, self.seconds, self.done = value, time, seconds, False

    def block_until_ready(self) -> "Metric":
        if not self.done:
            self.time.passes(self.seconds)
        self.done = True
        return self

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        assert self.done, "fetched before it was there"
        return np.asarray(self.value, dtype)


class Fakes:
    """A run, its pipeline and its checkpoints: an epoch of seven steps with given losses."""

    def __init__(self, config: RunConfig, workdir: pathlib.Path, losses: list[float]):
        self.config, self.steps_per_epoch = config, STEPS
        uids = [f"document {i}" for i in range(STEPS * BATCH)]
        self.data = types.SimpleNamespace(uids=lambda split: uids)
        self.frozen = self.rows = self.put = None
        self.time, self.workdir, self.losses = Time(), workdir, losses
        self.clock = metrics_log.Clock(self.time)
        self.dispatched: list[Metric] = []
        self.saved: list[tuple[int, dict]] = []
        self.most = 1 + loop._IN_FLIGHT

    def batches(self, build, first, steps, put, prefetch):
        for step in range(first, steps):
            self.time.passes(BUILD)
            yield step

    def train_step(self, state, frozen, batch):
        self.time.passes(DISPATCH)
        loss = Metric(self.losses[batch], self.time)
        self.dispatched.append(loss)
        assert sum(not metric.done for metric in self.dispatched) <= self.most
        metrics = {"loss": loss, "grad_norm": 1.0, "violators": 0.5, "similarity_spread": 1.0}
        metrics["tokens"] = TOKENS
        fine = Metric(np.isfinite(self.losses[batch]), self.time, seconds=0.0)
        seen = Health(fine, np.array([True, False]), np.array(-1), {"a": np.array(False)})
        return state, metrics | {"health": seen}

    def flops(self, state, frozen, batch) -> int:
        return FLOPS

    def save(self, step, state, history):
        self.time.passes(SAVE)
        self.saved.append((step, history))

    def train(self) -> list[dict]:
        """The records of the epoch."""
        tables = types.SimpleNamespace(leaf_order=np.arange(STEPS * BATCH, dtype=np.int32))
        state = types.SimpleNamespace(tables=tables)
        with (
            metrics_log.Reporter(self.workdir, EVERY, STEPS, STEPS, self.clock) as reporter,
            loop._Signals() as signals,
        ):
            timer = loop._SaveTimer(self.config.train.checkpoint_minutes)
            profile = Profile(None, self.workdir, 0, STEPS)
            loop._steps(self, state, 0, 0, reporter, self, signals, timer, profile)
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    fields = vixml.get_config("tiny").to_dict()
    fields["train"] |= {"log_every": EVERY, "checkpoint_every": SAVED, "batch_size": BATCH}

    def make(
        losses: list[float],
        non_finite: str = "stop",
        non_finite_limit: int = 3,
        backend: str = "gpu",
        checkpoint_minutes: float = 0.0,
    ) -> Fakes:
        policy = {"non_finite": non_finite, "non_finite_limit": non_finite_limit}
        policy["checkpoint_minutes"] = checkpoint_minutes
        config = RunConfig.from_dict(fields | {"train": fields["train"] | policy})
        made = Fakes(config, tmp_path, losses)
        monkeypatch.setattr(pipeline, "open", made.batches)
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        monkeypatch.setattr(loop, "time", types.SimpleNamespace(monotonic=made.time))
        return made

    return make


def test_each_second_has_its_phase(fakes):
    run = fakes([1.0] * STEPS)
    records, seconds = run.train(), run.clock.seconds()
    assert {phase: x for phase, x in seconds.items() if x} == {
        "data_wait": BUILD * STEPS,
        "step": (DISPATCH + COMPUTE) * STEPS,
        "save": SAVE,
    }
    assert run.time.now == sum(seconds.values())
    assert sum(run.clock.shares().values()) == pytest.approx(1)
    # Of step 3 it is known that it is done when two more are dispatched; no save is in a step.
    assert [record["step"] for record in records] == [3, 6, 7]
    assert records[0]["time/data_wait"] == pytest.approx(5 * BUILD / 3)
    assert records[0]["time/step"] == pytest.approx((5 * (BUILD + DISPATCH) + 3 * COMPUTE) / 3)
    for record in records:
        assert record["time/tokens_per_second"] == pytest.approx(TOKENS / record["time/step"])
        assert record["time/flops_per_second"] == pytest.approx(FLOPS / record["time/step"])
    total = sum(record["time/step"] * steps for record, steps in zip(records, (3, 3, 1)))
    assert total == pytest.approx((BUILD + DISPATCH + COMPUTE) * STEPS)


def test_on_cpu_no_step_waits_for_another(fakes):
    """Each holds its temporary memory from when it is dispatched."""
    run = fakes([1.0] * STEPS, backend="cpu")
    run.most = 1
    records = run.train()
    each = BUILD + DISPATCH + COMPUTE
    assert [record["time/step"] for record in records] == pytest.approx([each] * 3)


def test_metrics_are_fetched_of_steps_that_are_done_and_all_of_them_saved(fakes):
    run = fakes([float(step) for step in range(STEPS)])
    records = run.train()
    assert [record["train/loss"] for record in records] == [1.0, 4.0, 6.0]
    ((step, history),) = run.saved
    assert step == SAVED
    assert [record["step"] for record in history["records"]] == [3]
    assert [metrics["loss"] for metrics in history["pending"]] == [3.0, 4.0]


def test_a_checkpoint_is_saved_after_so_many_minutes(fakes):
    """A step takes 2.75 s; the count begins anew at each checkpoint."""
    run = fakes([1.0] * STEPS, backend="cpu", checkpoint_minutes=8 / 60)
    run.train()
    assert [step for step, _ in run.saved] == [3, SAVED]


@pytest.mark.parametrize("bad", [1, 3, 5, 7])
def test_a_loss_that_is_not_finite_ends_the_run_before_anything_is_saved(fakes, bad):
    run = fakes([np.nan if step == bad else 1.0 for step in range(1, STEPS + 1)])
    with pytest.raises(FloatingPointError) as raised:
        run.train()
    said = str(raised.value)
    assert said.startswith(f"train: step {bad} is not applied: not finite: loss nan; ")
    assert "gradient of all parameters; embedding of document document " in said
    assert [step for step, _ in run.saved] == [SAVED] * (bad > SAVED)
    assert len(run.dispatched) <= bad + loop._IN_FLIGHT


def test_steps_that_are_skipped_are_counted_and_in_no_mean(fakes):
    run = fakes([1.0, np.nan, 3.0, np.inf, np.nan, np.nan, 5.0], non_finite="skip")
    records = run.train()
    assert [record["train/skipped"] for record in records] == [1, 3, 0]
    assert [record.get("train/loss") for record in records] == [2.0, None, 5.0]
    assert [metrics for metrics in run.saved[0][1]["pending"]] == [{}, {}]


def test_too_many_skipped_in_a_row_end_the_run(fakes):
    run = fakes([1.0, np.nan, 3.0, np.nan, np.nan, 1.0, 1.0], "skip", non_finite_limit=1)
    with pytest.raises(FloatingPointError, match=r"step 5 .*; 2 in a row, more than train\."):
        run.train()
    assert run.saved == []


def test_what_is_compiled_is_taken_off_the_phase_once():
    time = Time()
    with metrics_log.Clock(time) as clock:
        with clock.within("eval"):
            time.passes(1)
            for seconds in (1, 2, 4):  # tracing: the last called the one before; then, lowering
                time.passes(1 if seconds < 4 else 4)
                jax.monitoring.record_event_duration_secs("/jax/core/compile/any", seconds)
            jax.monitoring.record_event_duration_secs("/of/something/else", 1)
            time.passes(3)
        with clock.within("step"):
            time.passes(2)
            jax.monitoring.record_event_duration_secs("/jax/core/compile/any", 2)
    jax.monitoring.record_event_duration_secs("/jax/core/compile/any", 2)
    seconds = clock.seconds()
    assert {phase: x for phase, x in seconds.items() if x} == {"compile": 8, "eval": 4}
    clock.add(seconds)
    time.passes(8)
    assert clock.shares() == dict.fromkeys(metrics_log.PHASES, 0.0) | {
        "compile": 0.5,
        "eval": 0.25,
        "other": 0.25,
    }
    assert metrics_log.format_seconds(clock.seconds()).startswith(
        "wall time 0.5 min: compile 50.0%, eval 25.0%, other 25.0%, step 0.0%"
    )
