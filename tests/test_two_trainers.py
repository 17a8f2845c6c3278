"""One command trains in a workdir at a time; a second one is told who does."""

import copy
import json
import platform
import re
import signal
import time

import processes
import pytest

from xmc_jax.files import workdirs

pytestmark = pytest.mark.slow
SECONDS = 60  # until the second one is refused; it takes about as long as to import JAX


@pytest.mark.reliability
@pytest.mark.parametrize("mode", ["train", "tune"])
def test_the_second_is_refused_in_one_line_and_the_first_goes_on(fields, tmp_path, mode):
    fields = copy.deepcopy(fields)
    fields["train"] |= {"epochs": 1}
    workdir = tmp_path / "run"
    folder = workdir / "tune" if mode == "tune" else workdir
    flags = [processes.config(fields, tmp_path), f"--workdir={workdir}", f"--mode={mode}"]
    with processes.started(1, processes.commanded(1, *flags)) as first:
        (process,) = first.processes
        lock = folder / ".lock"
        processes.until(lambda: lock.exists() and bool(lock.read_text()), 120)
        process.send_signal(signal.SIGSTOP)  # so that it holds the lock as long as needed
        before = sorted(path.relative_to(workdir) for path in workdir.rglob("*"))
        started = time.monotonic()
        (second,) = processes.command(1, *flags, check=False)
        seconds = time.monotonic() - started
        assert second.returncode == 1
        assert re.fullmatch(
            rf"error: {folder}: expected no other process, found process {process.pid} on "
            rf"{platform.node()} since [-\d]+ [:\d]+ \(main\.py --config=\S+ --workdir={workdir} "
            rf"--mode={mode}\); wait for it, stop it, or choose another --workdir",
            second.error(),
        )
        assert seconds < SECONDS
        assert sorted(path.relative_to(workdir) for path in workdir.rglob("*")) == before
        process.send_signal(signal.SIGCONT)
        (done,) = first.wait(300)
        assert done.returncode == 0, done.stderr
    assert not lock.exists() and json.loads((folder / "config.json").read_text())


def test_nothing_is_left_of_a_run_that_never_began(tmp_path):
    with pytest.raises(RuntimeError), workdirs.locked(tmp_path / "run"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
