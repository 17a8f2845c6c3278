"""The pipeline: order, hand-over to devices, errors, and threads that end."""

import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest

from xmc_jax.data import batches, pipeline, store


def threads():
    return {t for t in threading.enumerate() if "grain" in t.name}


def wait_for_no_threads(before):
    for thread in threads() - before:
        thread.join(timeout=20)
        assert not thread.is_alive(), thread


def test_order_and_slice():
    assert list(pipeline.open(lambda s: s * 10, 2, 6, lambda b: b + 1)) == [21, 31, 41, 51]
    assert list(pipeline.open(lambda s: s, 0, 100, lambda b: b, prefetch=8, threads=4)) == list(
        range(100)
    )
    assert list(pipeline.open(lambda s: s, 3, 3, lambda b: b)) == []
    assert list(pipeline.open(lambda s: s, 4, 3, lambda b: b)) == []


def test_device_batches_equal_host_batches(prepared):
    data = store.open(prepared)
    sampler = batches.Sampler(data, 8, seed=3)
    order = batches.complete(np.arange(20, dtype=np.int32), 8)

    def build(step):
        return sampler.build(order, step, 40 + step)

    with jax.transfer_guard("disallow"):
        found = list(pipeline.open(build, 1, 3, jax.device_put, prefetch=2))
    assert len(found) == 2
    for step, batch in zip((1, 2), found):
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(batch), build(step))


def test_stopping_early_ends_the_threads():
    before = threads()
    built = []
    iterator = pipeline.open(lambda s: built.append(s) or s, 0, 10_000, lambda b: b, prefetch=4)
    assert [next(iterator), next(iterator)] == [0, 1]
    assert threads() - before
    iterator.close()
    wait_for_no_threads(before)
    assert len(built) < 20
    for step in pipeline.open(lambda s: s, 0, 10_000, lambda b: b):
        if step == 3:
            break
    wait_for_no_threads(before)


def test_exhausting_ends_the_threads():
    before = threads()
    assert len(list(pipeline.open(lambda s: s, 0, 5, lambda b: b))) == 5
    wait_for_no_threads(before)


def test_errors_reach_the_consumer():
    before = threads()

    def build(step):
        if step == 2:
            raise ValueError("no step 2")
        return step

    iterator = pipeline.open(build, 0, 5, lambda b: b)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(ValueError, match="no step 2"):
        next(iterator)
    wait_for_no_threads(before)


def test_an_unfinished_pipeline_does_not_keep_the_program_alive():
    code = """
        from xmc_jax.data import pipeline
        iterator = pipeline.open(lambda s: s, 0, 10**9, lambda b: b, prefetch=16)
        next(iterator)
        print("done")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("fields", [{"first": -1}, {"prefetch": 0}, {"threads": 0}])
def test_refusals(fields):
    arguments = {"first": 0, "steps": 3} | fields
    with pytest.raises(ValueError, match="pipeline: expected first >= 0, prefetch >= 1"):
        pipeline.open(lambda s: s, put=lambda b: b, **arguments)
