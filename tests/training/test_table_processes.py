"""Clustering, centroids and exact search of global arrays: two processes against one."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from xmc_jax.retrieval import exact
from xmc_jax.training import curriculum, tables

ROOT = pathlib.Path(__file__).parents[2]
CODE = """
import sys
import jax
import numpy as np
port, process, data, out = sys.argv[1:]
jax.config.update("jax_enable_x64", True)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
from xmc_jax.runtime import sharding
from xmc_jax.retrieval import exact
from xmc_jax.training import curriculum, tables

assert jax.device_count() == 4 and jax.local_device_count() == 2
rows = np.load(data)
mesh = sharding.make_mesh(MeshConfig())
by_width = sharding.named((None, "table_width"), rows.shape, mesh, "table")
table = jax.make_array_from_callback(rows.shape, by_width, lambda index: rows[index])
assert not table.is_fully_addressable
key = jax.random.key(5)
order, leaf_of = jax.device_get(curriculum.balanced_kmeans(table, 8, key))
vector_of = tables.free_vector_map(table, np.arange(len(rows)), 4, 3, key)
indices = (np.arange(3 * len(rows)) % 7).astype(np.int32)
pairs = tables.label_pairs(np.arange(0, len(indices) + 1, 3), indices, 8, 64)
whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
centroids = jax.device_get(whole(tables.centroids_of(table, pairs)))
means = jax.device_get(whole(tables.cluster_means(table, vector_of, 7)))
rows = np.load(data, mmap_mode="r")
scores, ids = exact.search(rows[:5], exact.place(rows, mesh, 9), 20, query_block=4)
np.savez(out, order=order, leaf_of=leaf_of, vector_of=vector_of, centroids=centroids, means=means,
         scores=scores, ids=ids)
"""


@pytest.mark.scale
def test_two_processes_find_what_one_finds(tmp_path):
    rows = np.random.default_rng(0).normal(size=(203, 16))
    np.save(tmp_path / "rows.npy", rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": processes.xla_flags(2)}
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-c", CODE, str(port), str(process)),
                *(str(tmp_path / "rows.npy"), str(tmp_path / f"{process}.npz")),
            ],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)[-4000:]

    with jax.enable_x64(True):
        table, key = jnp.asarray(rows), jax.random.key(5)
        order, leaf_of = curriculum.balanced_kmeans(table, 8, key)
        vector_of = tables.free_vector_map(table, np.arange(len(rows)), 4, 3, key)
        indices = (np.arange(3 * len(rows)) % 7).astype(np.int32)
        pairs = tables.label_pairs(np.arange(0, len(indices) + 1, 3), indices, 8, 64)
        centroids = tables.centroids_of(table, pairs)
        means = tables.cluster_means(table, vector_of, 7)
    scores, ids = exact.search(rows[:5], rows, 20)
    for process in range(2):
        found = np.load(tmp_path / f"{process}.npz")
        for name, want in (
            ("order", order),
            ("leaf_of", leaf_of),
            ("vector_of", vector_of),
            ("ids", ids),
        ):
            np.testing.assert_array_equal(found[name], want)
        np.testing.assert_allclose(found["centroids"], centroids, atol=1e-14)
        np.testing.assert_allclose(found["means"], means, atol=1e-14)
        np.testing.assert_allclose(found["scores"], scores, rtol=1e-6)
