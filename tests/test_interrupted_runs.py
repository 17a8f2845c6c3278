"""A kill or a full disk at each write of training and of a report: the same command goes on.

Writes of Orbax, in its own threads, have their tests in test_checkpoint_damage and in reliability.
"""

import copy
import json
import math
import pathlib
import shutil
import signal
import types

import jax
import numpy as np
import pytest
import write_faults
from etils import epath

from xmc_jax import modes
from xmc_jax.config import RunConfig
from xmc_jax.data.store import Store
from xmc_jax.reporting import workdir_contents
from xmc_jax.retrieval import saved_predictions
from xmc_jax.runtime import metrics_log
from xmc_jax.training import build, loop
from xmc_jax.training.run import Run

pytestmark = pytest.mark.slow
APART = ("checkpoints", "tensorboard")  # written by other packages


@pytest.fixture(scope="module")
def training(fields, tmp_path_factory) -> types.SimpleNamespace:
    """A function that trains in a workdir, as the command does, and what an undisturbed run gave.

    `before` is the workdir of half a run, with other settings of the evaluation.
    """
    fields = copy.deepcopy(fields)
    fields["name"] = "topics"
    fields["train"] |= {"epochs": 2, "checkpoint_every": 100, "log_every": 5}
    half = copy.deepcopy(fields)
    half["eval"]["k"] = 110
    run = Run(
        RunConfig.from_dict(fields),
        build.data(RunConfig.from_dict(fields)),
        devices=jax.devices()[:1],
    )
    folder = tmp_path_factory.mktemp("interrupted")

    def train(workdir: pathlib.Path, of=fields, code=0) -> None:
        config = RunConfig.from_dict(of)
        asked = modes.Invocation(config, epath.Path(workdir), config)
        assert modes.run("train", asked) == code

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "run", lambda config, workdir: run)
        # So that the number of writes does not depend on how fast the machine is.
        patch.setattr(metrics_log, "_FLUSH_SECONDS", math.inf)
        with pytest.MonkeyPatch.context() as stopped:
            told = {5: loop.Interrupted(signal.SIGTERM, 5)}
            stopped.setattr(loop._Signals, "at", lambda self, step: told.get(step))
            train(folder / "before", half, code=128 + signal.SIGTERM)
        train(folder / "straight")
        yield types.SimpleNamespace(
            train=train,
            before=folder / "before",
            straight=folder / "straight",
            run=run,
            fields=fields,
        )


def whole(workdir: pathlib.Path, data: Store) -> None:
    """Asserts that each file that is there is whole."""
    for name in ("config.json", "metrics.json", "run.json"):
        if (workdir / name).exists():
            assert json.loads((workdir / name).read_text())
    if (workdir / "metrics.jsonl").exists():
        assert all(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))
        assert (workdir / "config.json").exists() and workdir_contents.read(workdir)
    for path in workdir.glob("predictions/*.npz"):
        assert saved_predictions.read(path, np.arange(2), data.num_test)
    if (workdir / "report.html").exists():
        assert (workdir / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.reliability
@pytest.mark.parametrize("kind", write_faults.KINDS)
@pytest.mark.parametrize("resumes", [False, True])
def test_training(training, tmp_path, kind, resumes):
    workdir = tmp_path / "run"

    def restart():
        shutil.rmtree(workdir, ignore_errors=True)
        if resumes:
            shutil.copytree(training.before, workdir)

    restart()
    writes = write_faults.count(workdir, lambda: training.train(workdir), APART)
    assert writes > 25
    expected = loop.restore(training.run, training.straight)[1]
    for number in range(writes):
        restart()
        with write_faults.at(workdir, number, kind, APART):
            training.train(workdir)
        whole(workdir, training.run.data)
        if resumes:
            then = json.loads((workdir / "config.json").read_text())["eval"]["k"]
            assert then in (100, 110) and list(workdir.glob("checkpoints/5"))
        training.train(workdir)
        whole(workdir, training.run.data)
        found = loop.restore(training.run, workdir)[1]
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        for name in ("predictions/0.npz", "predictions/10.npz"):
            assert (workdir / name).read_bytes() == (training.straight / name).read_bytes()
        metrics = [
            json.loads((x / "metrics.json").read_text()) for x in (workdir, training.straight)
        ]
        assert metrics[0] == metrics[1]
        assert not list(workdir.rglob("*.partial")) and not (workdir / ".lock").exists()


@pytest.mark.reliability
@pytest.mark.parametrize("kind", write_faults.KINDS)
def test_report(training, tmp_path, kind):
    workdir = shutil.copytree(training.straight, tmp_path / "run")
    page = workdir / "report.html"
    asked = modes.Invocation(RunConfig.from_dict(training.fields), epath.Path(workdir))

    def report() -> None:
        assert modes.run("report", asked) == 0

    writes = write_faults.count(workdir, report)
    new = page.read_bytes()
    for number in range(writes):
        page.write_text("old")
        with write_faults.at(workdir, number, kind):
            report()
        assert page.read_bytes() in (b"old", new)
        report()
        assert page.read_bytes() == new and not list(workdir.glob(".*"))
