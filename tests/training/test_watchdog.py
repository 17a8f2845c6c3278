"""A run without headway is ended with its stacks; a slow, compiling or suspended one is not."""

import types

import processes
import pytest

from xmc_jax.runtime import peers, watchdog
from xmc_jax.runtime.watchdog import Watchdog

LIMIT = 8.0  # seconds; the thread wakes every second


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """A function that plays what the thread sees, and gives where and when the run is ended."""

    def play(*seen: tuple[float, str, bool]) -> list[tuple[str, float]]:
        """Of each time it wakes: seconds since the last, the phase, whether the run moved."""
        clock = types.SimpleNamespace(moves=0, phase="other", steps=0)
        left, now, ended = list(seen), [0.0], []

        def wait(tick: float) -> bool:
            if not left or ended:
                return True
            before = clock.phase
            seconds, clock.phase, moved = left.pop(0)
            now[0] += seconds
            clock.moves += moved
            clock.steps += moved and before == clock.phase == "step"
            return False

        monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
        dog = Watchdog(clock, LIMIT, tmp_path)
        dog._over = types.SimpleNamespace(wait=wait)
        dog._end = lambda phase, seconds: ended.append((phase, seconds))
        dog._watch()
        return ended

    return play


STEPS = [(1.0, "step", True)] * 3


def test_a_step_that_does_not_end_is_ended_after_the_limit(watch):
    assert watch(*STEPS, *[(1.0, "step", False)] * 8) == []
    assert watch(*STEPS, *[(1.0, "step", False)] * 20) == [("step", 9.0)]
    assert watch(*STEPS, *[(1.0, "data_wait", False)] * 20) == [("data_wait", 9.0)]


def test_the_first_step_and_other_phases_have_more_time(watch):
    for phase in ("step", "boundary", "eval", "save", "start"):
        first = [(1.0, phase, False)] * 64
        assert watch((1.0, "data_wait", True), (1.0, phase, True), *first) == []
    # What a run enters before it has a batch is no step.
    entered = [(1.0, "step", False), (1.0, "data_wait", True)]
    assert watch(*entered, (1.0, "step", True), *[(1.0, "step", False)] * 64) == []
    assert watch(*STEPS, (1.0, "boundary", True), *[(1.0, "boundary", False)] * 70) == [
        ("boundary", 65.0)
    ]


def test_a_run_of_slow_steps_has_four_times_the_slowest(watch):
    slow = [(1.0, "step", False)] * 7 + [(1.0, "step", True)]
    assert watch(*STEPS, *slow, *[(1.0, "step", False)] * 28) == []
    assert watch(*STEPS, *slow, *[(1.0, "step", False)] * 40) == [("step", 29.0)]


def test_time_in_which_the_process_was_suspended_does_not_count(watch):
    assert watch(*STEPS, (1e6, "step", False), *[(1.0, "step", False)] * 6) == []


STUCK = """
import threading, time
from xmc_jax.runtime import metrics_log
from xmc_jax.runtime.watchdog import Watchdog

def never_comes():
    threading.Event().wait()

with metrics_log.Clock() as clock, Watchdog(clock, 1, sys.argv[1]):
    end = time.monotonic() + 1
    with clock.within("step"):
        for _ in clock.awaiting(iter(lambda: time.monotonic() < end, False)):
            clock.steps += 1
        never_comes() if jax.process_index() else distributed.barrier("never")
"""


@pytest.mark.slow
def test_all_processes_end_and_write_where_their_threads_stand(tmp_path):
    done = processes.script(2, STUCK, str(tmp_path), check=False, timeout=120)
    assert [one.returncode for one in done] == [peers.LOST] * 2
    for own, name in enumerate(("barrier", "never_comes")):
        assert f"in {name}\n" in (tmp_path / f"stacks.{own}.txt").read_text()
        assert "stuck in 'step' for " in done[own].stderr.splitlines()[-1]


ALONE = STUCK.replace("sys.argv[1]", "'{}'").replace("jax.process_index()", "True")


@pytest.mark.slow
def test_a_process_alone_ends_too(tmp_path):
    with processes.started(1, ["-c", ALONE.format(tmp_path)]) as group:
        (done,) = group.wait(120)
    assert done.returncode == peers.LOST
    assert done.stderr.splitlines()[-1].startswith("error: stuck in 'step' for ")
    assert "in never_comes\n" in (tmp_path / "stacks.0.txt").read_text()
