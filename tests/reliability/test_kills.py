"""Kill it anywhere, run the same command again: the same bits."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import processes
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.training import build, loop

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 20  # of the run


def leaves(full: dict, workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint: parameters, moments, tables, counters."""
    step, state = loop.restore(build.run(RunConfig.from_dict(full)), workdir)
    assert step == STEPS
    return {
        jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def records(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl but for times."""
    return [
        {name: x for name, x in json.loads(line).items() if not name.startswith("time/")}
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same(full: dict, workdir: pathlib.Path, straight: tuple[dict, list]) -> None:
    expected, recorded = straight
    found = leaves(full, workdir)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name
    assert records(workdir) == recorded


def shared_memory() -> set[str]:
    return {path.name for path in pathlib.Path("/dev/shm").iterdir()}


def running(workdir: pathlib.Path) -> list[str]:
    """Command lines of processes that have something to do with a run."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it has ended
            if str(workdir) in words:
                found.append(words)
    return found


@pytest.fixture(scope="module")
def straight(full, config, start, tmp_path_factory):
    """The run that nothing interrupts, its records, and how many seconds it takes."""
    folder = tmp_path_factory.mktemp("straight")
    for name in ("first", "second"):  # what the first one compiled is on disk for all others
        started = time.monotonic()
        process = start(config, f"--workdir={folder / name}")
        said, _ = process.communicate()
        assert process.returncode == 0, said
    seconds = time.monotonic() - started
    whole = leaves(full, folder / "second"), records(folder / "second")
    assert {"train/loss", "eval/P@1"} <= set().union(*whole[1])
    assert_same(full, folder / "first", whole)
    return whole, seconds, folder


@pytest.mark.reliability
def test_the_same_command_twice_has_the_same_digests(straight):
    """By name, dtype, shape and value of each array; files differ, whose names are random."""
    _, _, folder = straight
    said = []
    for name in ("first", "second"):
        words = [sys.executable, "-m", "xmc_jax.training.verify", str(folder / name), "--arrays"]
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.splitlines())
    assert said[0] == said[1]
    assert any(line.startswith(f"step {STEPS}: whole, content ") for line in said[0])
    assert sum(" params/" in line for line in said[0]) > 20


def killed(
    start, config: str, workdir: pathlib.Path, number: int, after: float | None
) -> tuple[int, float]:
    """The exit code of a run that gets a signal after some seconds, 0 if it has ended before.

    SIGKILL comes so many seconds after the start, SIGTERM after training has begun: before, it ends
    a process as any other. Also how many seconds the run took.
    """
    started, before = time.monotonic(), written(workdir)
    process = start(config, f"--workdir={workdir}")
    if number == signal.SIGTERM and after is not None:
        processes.until(lambda: written(workdir) != before or process.poll() is not None, 300)
    try:
        said, _ = process.communicate(timeout=after)
        assert process.returncode == 0, said
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        said, _ = process.communicate()
        assert "Traceback" not in said, said
    return process.returncode, time.monotonic() - started


def written(workdir: pathlib.Path) -> int:
    """When metrics.jsonl was written, as it is where training begins; 0 if never."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


CAMPAIGNS = [
    pytest.param(signal.SIGKILL, 50, id="50 SIGKILL", marks=pytest.mark.reliability),
    pytest.param(signal.SIGTERM, 20, id="20 SIGTERM", marks=pytest.mark.reliability),
]


@pytest.mark.parametrize("number, kills", CAMPAIGNS)
def test_killed_at_random_moments(full, config, start, straight, tmp_path, figures, number, kills):
    """Again and again, a finished run followed by a new one, until so many kills have hit."""
    (whole, seconds, _), generator = straight, np.random.default_rng(kills)
    before, finished, codes, lost, fresh = shared_memory(), 0, [], [], True
    while len(codes) < kills or not fresh:
        workdir = tmp_path / str(finished)
        # Enough to get somewhere, so that a run ends at some time; at last it is left alone.
        earliest, latest = (0.3, 1.0) if number == signal.SIGKILL else (0.0, 0.5)
        after = generator.uniform(earliest, latest) * seconds if len(codes) < kills else None
        code, took = killed(start, config, workdir, number, after)
        assert not running(workdir)
        if code:
            codes.append(code)
            fresh = False
            if number == signal.SIGTERM:
                lost.append(lost_steps(workdir))
            continue
        assert_same(full, workdir, whole)
        shutil.rmtree(workdir)
        finished += not fresh
        seconds = min(seconds, took) if fresh else seconds  # the machine may have other work less
        fresh = True
    if number == signal.SIGKILL:
        assert set(codes) == {-signal.SIGKILL}
        assert shared_memory() <= before
    else:
        # When training is over, SIGTERM ends a process as any other.
        assert set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM}
        assert codes.count(128 + signal.SIGTERM) > kills // 2 and max(lost) <= 1
    figures(kills=kills, runs=finished, identical=finished, steps_lost=max(lost, default=0))


def lost_steps(workdir: pathlib.Path) -> int:
    """Steps that were trained and are not in the newest checkpoint."""
    if not (workdir / "metrics.jsonl").exists():
        return 0
    trained = max((record["step"] for record in records(workdir)), default=0)
    return trained - loop.find(workdir) if trained else 0
