"""Instruments of training: a trace of some steps, and what metrics.jsonl says of each step."""

import copy
import json
import logging

import jax
import numpy as np
import optax
import pytest
from jax.profiler import ProfileData

from xmc_jax.config import RunConfig
from xmc_jax.training import build, flops, loop, optimizer
from xmc_jax.training.profiling import Profile

SCOPES = ("tower", "prototypes", "loss", "optimizer", "tables")
STEPS = 5


@pytest.fixture(scope="module")
def run(fields):
    fields = copy.deepcopy(fields)
    fields["train"] |= {"epochs": 1, "log_every": 1, "eval_every": 0, "zero_shot": False}
    fields["train"] |= {"packed": False}
    fields["optimizer"] |= {"warmup_steps": 2}
    return build.run(RunConfig.from_dict(fields), jax.devices()[:1])


def traces(workdir) -> list[ProfileData]:
    return [ProfileData.from_file(str(path)) for path in workdir.rglob("*.xplane.pb")]


def numbers(trace: ProfileData) -> list[int]:
    """The steps of a trace."""
    events = [e for plane in trace.planes for line in plane.lines for e in line.events]
    return [dict(event.stats)["step_num"] for event in events if event.name == "train"]


@pytest.mark.slow
def test_a_trace_of_some_steps_and_the_records_of_all(run, tmp_path):
    loop.train(run, tmp_path, (2, 4))
    (trace,) = traces(tmp_path / "profile")
    assert numbers(trace) == [2, 3, 4]
    (path,) = tmp_path.rglob("*.xplane.pb")
    content = path.read_bytes()
    assert all(scope.encode() in content for scope in SCOPES)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "train/loss" in r]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    order = np.arange(run.data.num_documents, dtype=np.int32)
    shapes = run.abstract, run.abstract_frozen, run.abstract_batch()
    counted = flops.count(run.train_step.trace(*shapes).jaxpr).total
    for step, record in enumerate(records):
        rate = 2e-3 * float(optimizer.schedule(step, 2, STEPS))
        assert record["train/learning_rate"] == pytest.approx(rate)
        assert (record["train/update_norm"] > 0) == (rate > 0)
        assert record["train/flops"] == counted > 1e6
        for name in ("tokens", "flops"):
            per_second = record[f"train/{name}"] / record["time/step"]
            assert record[f"time/{name}_per_second"] == pytest.approx(per_second)
    # Every document is in the epoch once, and as many labels at most.
    least = run.data.train.lengths.sum() + run.data.label.lengths.min() * STEPS
    assert least <= sum(record["train/tokens"] for record in records) < 2 * 16 * len(order)


@pytest.mark.slow
def test_the_update_norm_is_of_what_a_step_changes(run):
    order = np.arange(run.data.num_documents, dtype=np.int32)
    state, batch = run.initial_state(), run.put(run.sampler.build(order, 0, 0, run.rows))
    labels = np.unique(np.asarray(batch.label_ids)[np.asarray(batch.columns)])
    tokens = run.data.train.lengths[np.asarray(batch.document_ids)].sum()
    tokens += run.data.label.lengths[labels].sum()
    for _ in range(2):  # the first step's rate is 0
        before = jax.device_get(state.params)
        state, metrics = run.train_step(state, run.frozen, batch)
        assert metrics["tokens"] == tokens
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), before)
    assert metrics["update_norm"] == pytest.approx(float(optax.tree.norm(moved)), rel=1e-3)
    assert metrics["learning_rate"] == pytest.approx(1e-3)


def test_scopes_name_the_parts_of_a_step(run):
    text = run.train_step.lower(run.abstract, run.abstract_frozen, run.abstract_batch())
    text = text.as_text(debug_info=True)
    for scope in SCOPES:
        assert f"/{scope}/" in text or f"({scope})/" in text, scope


def test_a_trace_is_written_when_the_run_ends_early(tmp_path):
    finished = []
    with pytest.raises(KeyboardInterrupt), Profile((2, 9), tmp_path, 0, 9) as profile:
        for step in (1, 2, 3):
            profile.before(step, lambda step=step: finished.append(step))
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                pass
            profile.after(step, lambda: finished.append(-1))
        raise KeyboardInterrupt
    (trace,) = traces(tmp_path)
    assert finished == [2] and numbers(trace) == [2, 3]


def test_steps_that_a_run_does_not_have(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"^--profile: expected steps .* 5 steps, got 4:6$"):
        Profile((4, 6), tmp_path, 0, STEPS)
    caplog.set_level(logging.WARNING, logger="absl")
    with Profile((2, 4), tmp_path, 4, STEPS) as profile:  # of a run that goes on behind them
        profile.before(5, lambda: pytest.fail("nothing to wait for"))
        profile.after(5, lambda: pytest.fail("nothing to wait for"))
    assert "--profile=2:4: no trace, as step 4 is done" in caplog.text
    assert not list(tmp_path.iterdir())
