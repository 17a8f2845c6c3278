"""The quickstart at length and without a network: no growth, nothing left behind or asked for."""

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import pytest

pytestmark = pytest.mark.usefixtures("optimized")
ROOT = pathlib.Path(__file__).parents[2]

# An attempt of Python's to reach a network ends the process. Those of native code are counted by
# the kernel, which has no route for them; the first argument is the file that gets their number.
GUARDED = """
import atexit, os, pathlib, runpy, sys

def forbid(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.gethostbyname"):
        os.write(2, f"connection attempt: {event} {arguments[1:]}\\n".encode())
        os._exit(99)

def count():
    names, numbers = [line.split() for line in open("/proc/net/snmp") if line.startswith("Ip:")]
    kept.write_text(dict(zip(names, numbers))["OutNoRoutes"])

kept, module = pathlib.Path(sys.argv.pop(1)), sys.argv.pop(1)
atexit.register(count)
if not sys.flags.optimize:  # -O leaves it to the kernel
    sys.addaudithook(forbid)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
ALONE = ["unshare", "--map-root-user", "--net"]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A function that starts a module of Python where there is no network, and a file.

    The file has the attempts that the kernel counted. Where namespaces cannot be had, the network
    is there, only Python's attempts are seen, and instead of the file there is None.
    """
    alone = ALONE if shutil.which("unshare") and not subprocess.call([*ALONE, "true"]) else []

    def start(module: str, *flags: str, python=()) -> tuple[subprocess.Popen, pathlib.Path | None]:
        kept = tmp_path_factory.mktemp("attempts") / "counted"
        process = subprocess.Popen(
            [*alone, sys.executable, *python, "-c", GUARDED, str(kept), module, *flags],
            env={k: x for k, x in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"XLA_FLAGS": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        return process, kept if alone else None

    return start


def resident(pid: int) -> int | None:
    """KiB of a process that are its own; None if it has ended."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return found and int(found[1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def flags(workdir) -> list[str]:
    """The quickstart's, for ten epochs."""
    flags = ["--config=configs/vixml.py", f"--workdir={workdir}"]
    flags += [f"--config.data.data_dir={workdir / 'data'}"]
    return [*flags, "--config.train.epochs=10", "--config.train.eval_every=1"]


@pytest.fixture(scope="module")
def ten_epochs(guarded, flags, workdir):
    """That run without a network: KiB that it held between epochs, what it left, attempts.

    Between epochs is where it holds least, from one evaluation to the next.
    """
    before = set(pathlib.Path("/dev/shm").iterdir())
    process, kept = guarded("xmc_jax.main", *flags)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()), daemon=True)
    reader.start()
    metrics, least, most, read = workdir / "metrics.jsonl", [], [], 0
    while process.poll() is None:
        if metrics.exists() and (changed := metrics.stat().st_mtime_ns) != read:
            read = changed
            if metrics.read_text().count('"eval/P@1"') > len(least):
                least.append(sys.maxsize)
                most.append(0)
        if least and (held := resident(process.pid)):
            least[-1], most[-1] = min(least[-1], held), max(most[-1], held)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    reader.join()
    assert process.returncode == 0, errors[0][-2000:]
    return least, most, set(pathlib.Path("/dev/shm").iterdir()) - before, kept


@pytest.mark.reliability
def test_ten_epochs_of_the_quickstart_grow_by_nothing(ten_epochs, figures):
    """What is held after the second epoch and later; nothing is left in shared memory."""
    least, most, left, _ = ten_epochs
    assert len(least) == 10
    growth = max(least[2:-1]) / least[1] - 1  # after the last one nothing is trained
    memory = {"held_mib": [x >> 10 for x in least], "peak_mib": [x >> 10 for x in most]}
    figures(epochs=len(least), growth=growth, **memory)
    assert not left
    assert growth < 0.01, memory


@pytest.mark.reliability
def test_nothing_is_asked_of_a_network(ten_epochs, guarded, flags, workdir, figures):
    """The quickstart, to its table, then an export and its predictions."""
    queries, found = workdir / "queries.jsonl", workdir / "out.jsonl"
    queries.write_text('{"id": "1", "text": "a package manager"}\n')
    predict = ["--mode=predict", f"--input={queries}", f"--output={found}"]
    attempts = [ten_epochs[-1]]
    for module, *given in (
        ["benchmarks.quickstart", "--workdir", str(workdir)],
        ["xmc_jax.main", *flags, "--mode=export"],
        ["xmc_jax.main", *predict, f"--artifact={workdir / 'export'}"],
    ):
        process, kept = guarded(module, *given)
        errors = process.communicate()[1]
        assert process.returncode == 0, (module, given, errors[-2000:])
        attempts.append(kept)
    assert '"1"' in found.read_text()
    counted = [int(kept.read_text()) for kept in attempts if kept is not None]
    figures(commands=len(attempts), without_a_network=len(counted), attempts=sum(counted))
    assert not any(counted)


@pytest.mark.parametrize("watched", ["by Python", "by the kernel"])
def test_the_guard_sees_an_attempt(guarded, watched, tmp_path, monkeypatch):
    (tmp_path / "tries.py").write_text(
        "import socket\n"
        "try:\n    socket.create_connection(('127.0.0.1', 9))\n"
        "except OSError:\n    pass\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process, kept = guarded("tries", python=["-O"] if watched == "by the kernel" else [])
    errors = process.communicate()[1]
    if watched == "by Python":
        assert process.returncode == 99 and "connection attempt" in errors
    else:
        if kept is None:
            pytest.skip("no namespaces here")
        assert process.returncode == 0 and int(kept.read_text()) == 1
