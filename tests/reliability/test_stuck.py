"""A run whose main thread hangs or whose process is suspended: ended with its stacks, or let be."""

import copy
import json
import pathlib
import signal

import processes
import pytest

from xmc_jax.runtime import peers

pytestmark = pytest.mark.slow
AT = "xmc_jax.training.loop:_Signals.at"  # called after each step


@pytest.fixture(scope="module")
def config(fields, tmp_path_factory) -> str:
    """--config=... of two epochs of five steps."""
    short = copy.deepcopy(fields)
    short["train"] |= {"epochs": 2, "checkpoint_every": 2, "log_every": 1, "zero_shot": False}
    short["train"] |= {"eval_every": 0}
    return processes.config(short, tmp_path_factory.mktemp("config"))


def steps(workdir: pathlib.Path) -> list[int]:
    """Those that metrics.jsonl has a loss of."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in found if "train/loss" in record]


def stuck(done: processes.Done, workdir: pathlib.Path, process: int = 0) -> str:
    """The stacks of a process that ended because the run was stuck."""
    assert done.returncode == peers.LOST, done.stderr[-2000:]
    assert "stuck in " in done.error()
    return (workdir / f"stacks.{process}.txt").read_text()


@pytest.mark.reliability
@pytest.mark.parametrize(
    "where, named",
    [
        (AT, "_steps"),
        ("xmc_jax.training.run:Run.put", "pipeline.py"),  # as a file system that is gone
        ("xmc_jax.training.checkpoint:Checkpoints.save", "in train\n"),
    ],
)
def test_a_run_that_hangs_ends_and_goes_on(config, tmp_path, where, named):
    workdir = tmp_path / "run"
    (words,) = processes.commanded(1, config, f"--workdir={workdir}")
    words.append("--config.train.stuck_after=2")
    with processes.started(1, [processes.struck(words, "hang", where, 3)]) as group:
        (done,) = group.wait(180)
    stacks = stuck(done, workdir)
    assert "in struck\n" in stacks and named in stacks
    processes.command(1, config, f"--workdir={workdir}")
    assert steps(workdir) == list(range(1, 11))


@pytest.mark.reliability
def test_a_run_suspended_for_longer_than_the_limit_goes_on(config, tmp_path):
    (words,) = processes.commanded(1, config, f"--workdir={tmp_path / 'run'}")
    words.append("--config.train.stuck_after=2")
    with processes.started(1, [processes.struck(words, "SIGSTOP", AT, 5)]) as group:
        processes.until(lambda: processes.is_suspended(group.processes[0]), 120)
        processes.later(10)
        group.processes[0].send_signal(signal.SIGCONT)
        (done,) = group.wait(120)
    assert done.returncode == 0 and "error" not in done.stderr
    assert steps(tmp_path / "run") == list(range(1, 11))


@pytest.mark.reliability
@pytest.mark.parametrize("suspended", [0, 1])
def test_one_of_two_suspended_for_a_while_is_not_missed(config, tmp_path, suspended):
    """Its kernel answers; the other waits for it."""
    words = processes.commanded(2, config, f"--workdir={tmp_path / 'run'}", "--peer_timeout=5")
    words[suspended] = processes.struck(words[suspended], "SIGSTOP", AT, 5)
    with processes.started(2, words) as group:
        processes.until(lambda: processes.is_suspended(group.processes[suspended]), 120)
        processes.later(15)
        group.processes[suspended].send_signal(signal.SIGCONT)
        done = group.wait(120)
    assert [one.returncode for one in done] == [0, 0]
    assert "error" not in done[0].stderr + done[1].stderr
    assert steps(tmp_path / "run") == list(range(1, 11))


@pytest.mark.reliability
@pytest.mark.parametrize("suspended", [0, 1])
def test_one_of_two_suspended_for_long_is_the_end_of_both(config, tmp_path, suspended):
    """The other finds itself stuck; the one that was suspended hears of it when it wakes."""
    workdir, other = tmp_path / "run", 1 - suspended
    flags = (config, f"--workdir={workdir}")
    words = processes.commanded(2, *flags, "--config.train.stuck_after=3")
    words[suspended] = processes.struck(words[suspended], "SIGSTOP", AT, 3)  # within an epoch
    with processes.started(2, words) as group:
        processes.until(lambda: group.processes[other].poll() is not None, 180)
        assert processes.is_suspended(group.processes[suspended]), group.said(other)
        group.processes[suspended].send_signal(signal.SIGCONT)
        done = group.wait(60)
    assert "block_until_ready" in stuck(done[other], workdir, other)
    assert f"ended with process {other} (" in done[suspended].stderr
    stuck(done[suspended], workdir, suspended)
    processes.command(2, *flags)
    assert steps(workdir) == list(range(1, 11))
