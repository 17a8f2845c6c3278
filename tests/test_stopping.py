"""Signals looked at between batches; encoding has its test in test_resume."""

import os
import signal

import jax
import numpy as np
import pytest

from xmc_jax.retrieval import exact
from xmc_jax.runtime import stopping
from xmc_jax.training import curriculum

ROWS = np.eye(8, dtype=np.float32)


@pytest.mark.parametrize(
    "work",
    [
        lambda: exact.search(ROWS, ROWS, k=1, query_block=2),
        lambda: curriculum.balanced_kmeans(ROWS, 2, jax.random.key(0)),
    ],
    ids=["search", "clustering"],
)
def test_long_work_ends_at_a_signal(work):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Stopped, match="SIGTERM"), stopping.Signals():
        os.kill(os.getpid(), signal.SIGTERM)
        work()
    assert signal.getsignal(signal.SIGTERM) == before
    work()  # nobody asks
