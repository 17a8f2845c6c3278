"""A lock names its holder and ends with it."""

import os
import subprocess
import sys
import textwrap

import pytest

from xmc_jax.files import locks

_HOLD = """
    import pathlib, sys
    from xmc_jax.files import locks
    with locks.locked(pathlib.Path({path!r}), "folder"):
        print("held", flush=True)
        sys.stdin.read()
"""


def _holder(path) -> subprocess.Popen:
    script = textwrap.dedent(_HOLD.format(path=str(path)))
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path):
    path = tmp_path / "lock"
    with _holder(path) as process:
        named = f"folder: .*process {process.pid} on "
        with pytest.raises(ValueError, match=named), locks.locked(path, "folder"):
            pass
        process.kill()
    with locks.locked(path, "folder"):  # a killed holder holds nothing
        assert str(os.getpid()) in path.read_text()
    assert path.read_text() == ""


def test_a_lock_that_waits(tmp_path):
    path = tmp_path / "lock"
    with _holder(path) as process:
        process.stdin.close()
        with locks.locked(path, "folder", wait=True, remove=True):
            assert process.wait() == 0
    assert not path.exists()
