"""A run goes on with other devices than it began with; other threads give the same batches."""

import copy
import json

import jax
import numpy as np
import pytest

from xmc_jax.config import RunConfig
from xmc_jax.data import batches, pipeline
from xmc_jax.training import build, curriculum, loop
from xmc_jax.training.run import Run

SAVED, MORE = 7, 5  # steps; five an epoch, so that the next clustering is in between


@pytest.fixture(scope="module")
def still(full) -> dict:
    """Without dropout, whose masks are those of a device."""
    still = copy.deepcopy(full)
    still["encoder"]["dropout"] = still["prime"]["dropout"] = 0.0
    still["train"] |= {"eval_every": 0, "zero_shot": False, "checkpoint_every": 100}
    return still


@pytest.fixture(scope="module")
def data(still):
    return build.run(RunConfig.from_dict(still)).data


def on(still: dict, data, devices: int) -> Run:
    return Run(RunConfig.from_dict(still), data, devices=jax.devices()[:devices])


def until(run: Run, workdir, terminated_after, step: int):
    terminated_after(step)
    with pytest.raises(loop.Interrupted, match=f"saved at step {step}"):
        loop.train(run, workdir)


def losses(workdir) -> dict[int, float]:
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["train/loss"] for record in found if "train/loss" in record}


@pytest.fixture(scope="module")
def straight(still, data, tmp_path_factory):
    """Losses of the run on four devices."""
    workdir = tmp_path_factory.mktemp("straight")
    loop.train(on(still, data, 4), workdir)
    return losses(workdir)


@pytest.mark.reliability
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_saved_on_four_devices(still, data, straight, tmp_path, terminated_after, devices, figures):
    four, other = on(still, data, 4), on(still, data, devices)
    until(four, tmp_path, terminated_after, SAVED)
    (_, saved), (_, found) = (loop.restore(run, tmp_path) for run in (four, other))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(saved), jax.tree.leaves(found)):
        assert len(b.sharding.device_set) == devices, path
        np.testing.assert_array_equal(jax.device_get(a), jax.device_get(b), err_msg=str(path))
    (epoch,) = {int(state.boundaries) for state in (saved, found)}
    orders = [_order(run, state, epoch) for run, state in ((four, saved), (other, found))]
    np.testing.assert_array_equal(*orders)
    until(other, tmp_path, terminated_after, SAVED + MORE)
    worst = max(
        abs(losses(tmp_path)[step] / straight[step] - 1)
        for step in range(SAVED + 1, SAVED + MORE + 1)
    )
    assert worst < 1e-5
    figures(devices=devices, steps=MORE, worst_relative_difference=worst)


def _order(run: Run, state, epoch: int) -> np.ndarray:
    plan = curriculum.plan(epoch, run.config.curriculum)
    leaf_order = jax.device_get(state.tables.leaf_order)
    return curriculum.order(plan, leaf_order, run.config.train.seed, epoch)


def test_threads_and_prefetch_do_not_change_a_batch(still, data):
    run = on(still, data, 1)
    order = batches.complete(np.arange(data.num_documents, dtype=np.int32), 24)

    def made(step: int):
        return run.sampler.build(order, step, 3 + step, run.rows)

    def stream(prefetch: int, threads: int) -> list:
        return list(pipeline.open(made, 0, 5, lambda batch: batch, prefetch, threads))

    expected = stream(1, 1)
    assert len(expected) == 5
    for prefetch, threads in ((2, 2), (8, 1), (5, 7)):
        for one, other in zip(expected, stream(prefetch, threads), strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, other)
