"""A run interrupted by a signal or inside a save ends with the bits of one that is not."""

import copy
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.files import workdirs
from xmc_jax.retrieval import encode
from xmc_jax.training import build, checkpoint, loop
from xmc_jax.training.run import Run

STEPS_PER_EPOCH, STEPS = 5, 15


@pytest.fixture(scope="module")
def program(fields) -> Run:
    return Run(RunConfig.from_dict(fields), build.data(RunConfig.from_dict(fields)))


@pytest.fixture(scope="module")
def straight(program, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("straight")
    return loop.train(program, workdir), records(workdir), workdir


def records(workdir: pathlib.Path) -> list[dict]:
    """metrics.jsonl without the times."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def assert_identical(ours, theirs):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)):
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b), err_msg=str(path))


# In an epoch; before a boundary; after one; in the last epoch and before its boundary.
@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [
        pytest.param((3,), marks=pytest.mark.reliability),
        pytest.param((5,), marks=pytest.mark.reliability),
        pytest.param((6, 8), marks=pytest.mark.reliability),
        (10, 14, 15),
    ],
)
def test_signals(program, straight, tmp_path, terminated_after, stops):
    terminated_after(*stops)
    for stop in stops:
        with pytest.raises(loop.Interrupted, match=f"SIGTERM: saved at step {stop}") as stopped:
            loop.train(program, tmp_path)
        assert stopped.value.signum == signal.SIGTERM
        with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert checkpoints.latest() == stop
    trained = loop.train(program, tmp_path)
    assert trained.step == straight[0].step == STEPS
    assert_identical(trained.state, straight[0].state)
    assert records(tmp_path) == straight[1]
    assert trained.zero_shot == straight[0].zero_shot
    step, restored = loop.restore(program, tmp_path)
    assert step == STEPS
    assert_identical(restored, straight[0].state)


@pytest.mark.slow
def test_signals_within_encoding(program, straight, tmp_path, monkeypatch):
    """After the batch under way no other is encoded, and no step is lost."""
    blocks = encode._encoded
    for items, time, saved in (
        ("training documents", 1, "nothing is saved before the first step"),  # first tables
        ("test documents", 1, "nothing is saved before the first step"),  # zero-shot
        ("test documents", 2, "saved at step 5"),
        ("training documents", 1, "saved at step 15"),  # the last boundary
        ("training documents", 1, "saved at step 15"),  # again, in a run that went on from there
    ):
        begun, after = [], []

        def signalled(encoder, what, *arguments, items=items, time=time, begun=begun, after=after):
            begun.append(what.name)
            for block in blocks(encoder, what, *arguments):
                if begun.count(items) == time:
                    after.append(block)
                    os.kill(os.getpid(), signal.SIGTERM)
                yield block

        with monkeypatch.context() as patch:
            patch.setattr(encode, "_encoded", signalled)
            with pytest.raises(loop.Interrupted, match=f"SIGTERM: {saved}"):
                loop.train(program, tmp_path)
        assert len(after) == 1
    trained = loop.train(program, tmp_path)
    assert_identical(trained.state, straight[0].state)
    assert records(tmp_path) == straight[1]


@pytest.mark.slow
def test_a_failed_evaluation_costs_no_step(program, straight, tmp_path, monkeypatch):
    """One fails in the middle of the run, and that of its end."""
    evaluate, step, evaluations, steps = program.evaluate, program.train_step, [], []

    def failing(state):
        evaluations.append(state)
        if len(evaluations) in (2, 4):
            raise MemoryError("the index does not fit")
        return evaluate(state)

    def counted(*arguments):
        steps.append(arguments)
        return step(*arguments)

    monkeypatch.setattr(program, "evaluate", failing)
    monkeypatch.setattr(program, "train_step", counted)
    for done in (2 * STEPS_PER_EPOCH, STEPS):
        with pytest.raises(MemoryError, match="the index does not fit"):
            loop.train(program, tmp_path)
        assert len(steps) == done
        with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
            assert checkpoints.latest() == done
            assert checkpoints.precision(done) is None
    trained = loop.train(program, tmp_path)
    assert len(steps) == STEPS and len(evaluations) == 5
    assert_identical(trained.state, straight[0].state)
    assert trained.evaluation.metrics == straight[0].evaluation.metrics
    assert records(tmp_path) == straight[1]


@pytest.mark.slow
def test_a_finished_run_is_evaluated_again_and_not_trained(program, straight, tmp_path):
    trained, lines, workdir = straight
    copied = shutil.copytree(workdir, tmp_path / "run")
    again = loop.train(program, copied)
    assert again.step == trained.step
    assert again.evaluation.metrics == trained.evaluation.metrics
    # The seconds go on from those of the last checkpoint.
    assert again.seconds["step"] == trained.seconds["step"] > 0
    assert again.seconds["eval"] > trained.seconds["eval"] > 0
    assert records(copied) == lines
    with checkpoint.Checkpoints(copied, read_only=True) as checkpoints:
        assert checkpoints.best() in checkpoints.steps()


@pytest.mark.reliability
@pytest.mark.slow
def test_our_own_recipe_and_another_mesh(fields, tmp_path, terminated_after):
    """Documents against all labels, resumed bit for bit; and its checkpoint read by one device."""
    fields = copy.deepcopy(fields)
    fields["train"] |= {"labels": "all", "epochs": 2}
    fields["prime"] |= {"combiner": "sum", "free_vector_init": "zero"}
    fields["loss"] |= {"kind": "decoupled_softmax", "label_to_document": 0.0}
    program = Run(RunConfig.from_dict(fields), build.data(RunConfig.from_dict(fields)))
    straight = loop.train(program, tmp_path / "straight")
    terminated_after(7)
    with pytest.raises(loop.Interrupted):
        loop.train(program, tmp_path / "stopped")
    resumed = loop.train(program, tmp_path / "stopped")
    assert_identical(resumed.state, straight.state)
    assert records(tmp_path / "stopped") == records(tmp_path / "straight")
    alone = Run(RunConfig.from_dict(fields), program.data, devices=jax.devices()[:1])
    _, restored = loop.restore(alone, tmp_path / "straight")
    assert restored.params["free_vectors"].sharding.device_set == {jax.devices()[0]}
    assert_identical(restored, straight.state)


CHILD = """
import os, signal, sys
from orbax.checkpoint._src.path import atomicity
saves, kill_in = [], int(sys.argv.pop(1))
for kind in (atomicity.AtomicRenameTemporaryPath, atomicity.CommitFileTemporaryPath):
    finalize = kind.finalize
    async def killed(self, *arguments, finalize=finalize, **options):
        saves.append(self)
        if len(saves) == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        return await finalize(self, *arguments, **options)
    kind.finalize = killed
from xmc_jax import main
sys.argv[0] = "main"
main.run()
"""


@pytest.mark.reliability
@pytest.mark.parametrize("kill_in", [1, 4])
def test_killed_inside_a_save(fields, straight, program, tmp_path, kill_in):
    """SIGKILL when the files are written and the checkpoint is not committed yet."""
    fields = copy.deepcopy(fields)
    (tmp_path / "config.py").write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    workdir = tmp_path / "run"
    command = [sys.executable, "-c", CHILD, str(kill_in), f"--config={tmp_path / 'config.py'}"]
    child = subprocess.run([*command, f"--workdir={workdir}"], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
        assert len(checkpoints.steps()) < kill_in
    trained = loop.train(program, workdir)
    assert_identical(trained.state, straight[0].state)
    assert records(workdir) == straight[1]


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1, 2]", b"{", b"\xff\xfe"])
def test_what_is_no_config_is_said(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: expected") as error:
        workdirs.read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_another_config_is_refused(fields, tmp_path):
    workdirs.write_config(tmp_path, fields | {"name": "nothing made with this one yet"})
    workdirs.check_config(tmp_path, fields)
    workdirs.write_config(tmp_path, fields)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    workdirs.check_config(tmp_path, fields | {"name": "an empty folder is no checkpoint"})
    (tmp_path / "checkpoints" / "4" / "file").touch()
    workdirs.check_config(tmp_path, fields)
    changed = copy.deepcopy(fields)
    changed["train"]["batch_size"] = 64
    changed["eval"]["k"] = 120
    changed["train"]["epochs"] += 1
    with pytest.raises(ValueError, match=r"train\.batch_size: 40 there, 64 here\);") as refused:
        workdirs.check_config(tmp_path, changed)
    assert "eval" not in str(refused.value) and "epochs" not in str(refused.value)
    changed = copy.deepcopy(fields)
    changed["train"]["epochs"] -= 1
    with pytest.raises(ValueError, match=r"train\.epochs: 3 there, 2 here"):
        workdirs.check_config(tmp_path, changed)


def test_a_full_disk_leaves_the_config_of_before(fields, tmp_path, monkeypatch):
    workdirs.write_config(tmp_path, fields)
    before = (tmp_path / "config.json").read_bytes()

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    workdirs.write_config(tmp_path, fields)  # the same: nothing to write
    with pytest.raises(OSError, match="No space left"):
        workdirs.write_config(tmp_path, fields | {"eval": {"k": 1}})
    assert (tmp_path / "config.json").read_bytes() == before


@pytest.mark.slow
def test_more_epochs_change_the_learning_rate_and_that_is_said(program, straight, caplog):
    with checkpoint.Checkpoints(straight[2], read_only=True) as checkpoints:
        _, history = checkpoints.restore(STEPS, program.abstract)
    train = dataclasses.replace(program.config.train, epochs=6)
    longer = types.SimpleNamespace(
        config=dataclasses.replace(program.config, train=train), steps_per_epoch=STEPS_PER_EPOCH
    )
    loop._tell_of_schedule(program, STEPS, history)
    loop._tell_of_schedule(longer, STEPS, history)
    (said,) = [x.getMessage() for x in caplog.records if "train.epochs" in x.getMessage()]
    assert "3 before, 6 now: the learning rate goes on from step 15 at 0.54 of its peak" in said
    assert "where it was 0.00" in said


@pytest.mark.slow
def test_a_run_that_is_given_more_epochs_makes_the_leaves_of_the_next(
    program, straight, fields, tmp_path, monkeypatch
):
    """The last boundary made none."""
    epochs, made = program.config.train.epochs, []
    workdir = shutil.copytree(straight[2], tmp_path / "run")
    changed = copy.deepcopy(fields)
    changed["train"]["epochs"] = epochs + 1
    longer = Run(RunConfig.from_dict(changed), program.data)
    monkeypatch.setattr(longer, "cluster", lambda state, epoch: made.append((state, epoch)))
    with pytest.raises(AttributeError):  # what the loop gets is no state
        loop.train(longer, workdir)
    ((state, epoch),) = made
    assert epoch == epochs - 1
    assert_identical(state, straight[0].state)


@pytest.mark.slow
def test_a_checkpoint_of_another_shape_is_refused(program, straight, fields):
    workdir = straight[2]
    changed = copy.deepcopy(fields)
    changed["prime"]["free_vectors"] = 8
    other = Run(RunConfig.from_dict(changed), program.data)
    with pytest.raises(
        ValueError, match=r"free_vectors: expected float32\[8, 32\], got float32\[16"
    ):
        loop.restore(other, workdir)
    with pytest.raises(ValueError, match=r"expected the checkpoint '7', found those of .*15\]"):
        loop.restore(program, workdir, "7")
    assert loop.restore(program, workdir, "14")[0] == 14
    assert loop.restore(program, workdir, "best")[0] in (5, 10, 15)
