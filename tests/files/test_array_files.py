"""Arrays are written as NumPy writes them, whole or row by row."""

import os
import pathlib

import numpy as np
import pytest

from xmc_jax.files import array_files


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.uint16),
        np.arange(12, dtype=np.float32).reshape(3, 4).T,
        np.zeros((0, 2), np.int32),
        np.array(7, np.int64),
    ],
    ids=["1d", "transposed", "no rows", "0d"],
)
def test_the_bytes_are_those_of_numpy(tmp_path, array):
    array_files.save(tmp_path / "ours.npy", array)
    np.save(tmp_path / "numpy.npy", np.ascontiguousarray(array).reshape(array.shape))
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()
    np.testing.assert_array_equal(array_files.mapped(tmp_path / "ours.npy"), array)


@pytest.mark.parametrize("counts", [(), (0,), (3, 0, 70_000, 2)])
def test_appended_rows_are_one_array(tmp_path, counts):
    parts = [np.full((n, 5), n, np.int64) for n in counts]
    with array_files.appended(tmp_path / "ours.npy", np.int32, 5) as append:
        for part in parts:
            append(part)
    whole = np.concatenate([np.zeros((0, 5)), *parts]).astype(np.int32)
    np.save(tmp_path / "numpy.npy", whole)
    assert (tmp_path / "ours.npy").read_bytes() == (tmp_path / "numpy.npy").read_bytes()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is full")
def test_a_full_disk_is_named():
    with pytest.raises(OSError, match="No space left on device"):
        array_files.save(pathlib.Path("/dev/full"), np.zeros(100_000))
