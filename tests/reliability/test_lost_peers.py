"""Any process of several killed at any moment: the rest ends, says who, and the run goes on later.

pytest -n0 -m reliability tests/reliability/test_lost_peers.py
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import shutil
import signal
import socket
import time
from collections.abc import Iterator

import jax
import numpy as np
import processes
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.runtime import peers
from xmc_jax.training import build, loop
from xmc_jax.training.run import Run

pytestmark = pytest.mark.reliability
ENDS_WITHIN = 15  # seconds after a process is killed


@dataclasses.dataclass(frozen=True)
class Straight:
    """An uninterrupted run: its flags but for the workdir, and its end."""

    program: Run
    flags: tuple[str, ...]
    state: dict[str, np.ndarray]
    records: list[dict]


def ends_with(program: Run, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """The state of the newest checkpoint, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(loop.restore(program, workdir)[1])
    return {jax.tree_util.keystr(path): jax.device_get(leaf) for path, leaf in leaves}


def records(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


@pytest.fixture(scope="module", params=[2, 4])
def count(request) -> int:
    return request.param


@pytest.fixture(scope="module")
def straight(count, fields, tmp_path_factory) -> Straight:
    folder = tmp_path_factory.mktemp("lost")
    small = copy.deepcopy(fields) | {"name": "topics"}
    small["curriculum"]["start"] = 0
    small["train"] |= {"checkpoint_every": 2, "log_every": 1, "eval_every": 1}
    small["train"] |= {"epochs": 2, "zero_shot": False}
    flags = (processes.config(small, folder),)
    workdir = folder / "run"
    processes.command(count, *flags, f"--workdir={workdir}", timeout=600)
    program = Run(RunConfig.from_dict(small), build.data(RunConfig.from_dict(small)))
    return Straight(program, flags, ends_with(program, workdir), records(workdir))


def assert_ended(done: list[processes.Done], killed: int) -> float:
    """All others ended in time and said why; seconds that the last one took."""
    gone = f"error: process {killed} ({socket.gethostname()}) is gone: its connection is closed"
    for own, one in enumerate(done):
        if own != killed:
            assert one.returncode == peers.LOST, one.stderr[-2000:]
            assert one.stderr.splitlines()[-1] == gone, one.stderr[-2000:]
            assert "stack trace" not in one.stderr
    took = max(one.seconds for one in done) - done[killed].seconds
    assert took < ENDS_WITHIN
    return took


def assert_finished(straight: Straight, workdir: pathlib.Path) -> None:
    """A run has ended as the uninterrupted one."""
    found = ends_with(straight.program, workdir)
    assert found.keys() == straight.state.keys()
    for name, expected in straight.state.items():
        np.testing.assert_array_equal(found[name], expected, err_msg=name)
    assert records(workdir) == straight.records


MOMENTS = {
    "step": ("xmc_jax.training.loop:_Signals.at", 7),
    "boundary": ("xmc_jax.training.run:Run.boundary", 2),
    "evaluation": ("xmc_jax.training.run:Run.evaluate", 1),
}


@pytest.mark.parametrize("count", [2], indirect=True)
@pytest.mark.parametrize("moment, killed", [("step", 0), ("boundary", 1), ("evaluation", 0)])
def test_killed_in_a_step_a_boundary_or_an_evaluation(count, straight, tmp_path, moment, killed):
    flags = *straight.flags, f"--workdir={tmp_path / 'run'}"
    words = processes.commanded(count, *flags)
    words[killed] = processes.struck(words[killed], "SIGKILL", *MOMENTS[moment])
    with processes.started(count, words) as group:
        done = group.wait(600)
    assert done[killed].returncode == -signal.SIGKILL
    assert_ended(done, killed)
    processes.command(count, *flags, timeout=600)
    assert_finished(straight, tmp_path / "run")


@contextlib.contextmanager
def met(count: int, *flags: str) -> Iterator[processes.Group]:
    """The processes of a command that have met; before, there is no one to tell."""
    words, where = processes.commanded(count, *flags), "xmc_jax.main:main"
    words[0] = processes.struck(words[0], "say", where, 1)
    with processes.started(count, words) as group:
        processes.until(lambda: where in group.output(0, "err"), 300)
        yield group


def test_any_process_killed_at_any_moment(count, straight, tmp_path, figures):
    """Again and again, a finished run followed by a new one, until ten have been missed."""
    flags = *straight.flags, f"--workdir={tmp_path / 'run'}"
    with met(count, *straight.flags, f"--workdir={tmp_path / 'whole'}") as group:
        started = time.monotonic()
        assert not any(one.returncode for one in group.wait(600))
        seconds = time.monotonic() - started
    generator, took, finished, over = np.random.default_rng(count), [], 0, False
    while len(took) < 10 or not over:
        killed, share = int(generator.integers(count)), float(generator.uniform())
        with met(count, *flags) as group:
            if len(took) < 10:
                processes.later(share * seconds)
                group.processes[killed].kill()
            done = group.wait(600)
        over = all(one.returncode == 0 for own, one in enumerate(done) if own != killed)
        if not over:
            took.append(assert_ended(done, killed))
            continue
        assert_finished(straight, tmp_path / "run")
        shutil.rmtree(tmp_path / "run")
        finished += 1
    figures(
        processes=count,
        killed=10,
        ended_within_seconds=max(took),
        runs=finished,
        identical=finished,
    )
