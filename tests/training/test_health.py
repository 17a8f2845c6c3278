"""Numbers that are not finite: found in their step, named, and in nothing that is kept."""

import copy
import dataclasses

import jax
import numpy as np
import processes
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.data import batches
from xmc_jax.training import build, checkpoint, health, loop
from xmc_jax.training.run import Run

pytestmark = pytest.mark.slow


class Poisoned(Run):
    """A run over images of which those of one document may be infinite."""

    bad, poison = -1, False  # the document, whether it is

    def put(self, local):
        if self.poison:
            images = local.items.images.copy()
            images[local.document_ids == self.bad, 0] = np.inf
            local = local.replace(items=local.items.replace(images=images))
        return super().put(local)


@pytest.fixture(scope="module")
def program(fields, with_random_images, tmp_path_factory) -> Poisoned:
    fields = copy.deepcopy(fields)
    fields["tables"]["centroids"] = "ema"
    fields["train"] |= {"n_chunks": 2, "epochs": 2, "zero_shot": False, "eval_every": 0}
    fields["train"] |= {"checkpoint_every": 2, "log_every": 1}
    data = with_random_images(
        build.data(RunConfig.from_dict(fields)), tmp_path_factory.mktemp("images")
    )
    made = Poisoned(RunConfig.from_dict(fields), data, devices=jax.devices()[:2])
    order = np.arange(data.num_documents, dtype=np.int32)
    built = made.sampler.build(order, 0, 0, made.rows)
    made.bad = int(
        built.document_ids[np.flatnonzero(data.train.inputs(built.document_ids).image_count)[0]]
    )
    return made


def with_policy(program: Poisoned, policy: str) -> Poisoned:
    """The same compiled functions, another policy; poisoned."""
    other = copy.copy(program)
    train = dataclasses.replace(program.config.train, non_finite=policy)
    other.config, other.poison = dataclasses.replace(program.config, train=train), True
    return other


def batch_with(program: Poisoned, step: int):
    """A batch that has the bad document, and the order it is from."""
    order = np.roll(np.arange(program.data.num_documents, dtype=np.int32), -program.bad)
    order = batches.complete(order, program.config.train.batch_size)
    return program.put(program.sampler.build(order, 0, step, program.rows)), order


def test_a_bad_step_changes_nothing_but_its_number(program):
    poisoned = with_policy(program, "stop")
    state = program.initial_state()
    good, order = batch_with(program, 0)
    state, metrics = program.train_step(state, program.frozen, good)
    assert health.is_finite(metrics["health"])
    before = jax.device_get(state)
    bad, _ = batch_with(poisoned, 1)
    state, metrics = program.train_step(state, program.frozen, bad)
    seen = metrics.pop("health")
    assert not health.is_finite(seen)
    after = jax.device_get(state)
    assert after.step == before.step + 1
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(after.replace(step=before.step)),
        jax.tree.leaves(before),
    ):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
    size = program.config.train.batch_size
    np.testing.assert_array_equal(np.flatnonzero(~jax.device_get(seen.documents)), [0])
    said = health.describe(2, metrics, seen, order[:size], program.data)
    assert said.startswith("step 2 is not applied: not finite: loss nan (")
    assert "document_to_label" in said
    assert said.endswith(f"; gradient of all parameters; embedding of document train{program.bad}")
    # The step after it is the one that would have followed the good one.
    state, metrics = program.train_step(state, program.frozen, good)
    assert health.is_finite(metrics["health"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))


def test_a_run_stops_at_it_and_what_is_saved_is_of_before(program, tmp_path):
    with pytest.raises(
        FloatingPointError, match=f"embedding of document train{program.bad};"
    ) as raised:
        loop.train(with_policy(program, "stop"), tmp_path)
    assert "\n" not in str(raised.value)
    bad = int(str(raised.value).split()[2])
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        saved = checkpoints.steps()
    assert saved == [step for step in (2, 4) if step < bad]
    for step in saved:
        _, state = loop.restore(program, tmp_path, str(step))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(state.params)))


def test_a_run_that_skips_goes_on_with_finite_parameters(program, tmp_path):
    trained = loop.train(with_policy(program, "skip"), tmp_path)
    assert trained.step == 2 * program.steps_per_epoch
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(trained.state)))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert text.count('"train/skipped": 1') == 2  # each epoch visits the document once


@pytest.mark.reliability
@pytest.mark.parametrize("policy, ending", [("stop", ""), ("skip", "; 3 in a row, more than ")])
def test_processes_stop_at_the_same_step_and_name_the_same(fields, tmp_path, policy, ending):
    """A learning rate at which parameters leave the range of their dtype."""
    fields = copy.deepcopy(fields)
    fields["optimizer"] |= {"lr": ((".*", 1e38),), "clip_norm": None}
    fields["train"] |= {"non_finite": policy, "non_finite_limit": 2, "checkpoint_every": 1}
    fields["train"] |= {"zero_shot": False, "log_every": 1}
    flags = (processes.config(fields, tmp_path), f"--workdir={tmp_path / 'run'}")
    done = processes.command(2, *flags, check=False)
    assert [one.returncode for one in done] == [1, 1]
    first, second = (one.error().partition("train: ")[2] for one in done)
    assert first == second and "is not applied: not finite: loss" in first and ending in first
    with checkpoint.Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        steps = checkpoints.steps()
        assert steps
        if policy == "stop":  # what skipping has left as it was is saved
            assert max(steps) < int(first.split()[1])
        for step in steps:
            for name, array in checkpoints.arrays(step):
                assert np.isfinite(np.asarray(array, np.float32)).all(), name
