"""Real processes over 127.0.0.1, as one run: `import processes` in any test, whatever its folder.

    done = processes.script(2, "print(jax.process_index(), jax.device_count())", devices=2)
    done = processes.command(2, "--config=...", "--workdir=...")
    with processes.started(2, ["-c", "..."]) as group: ...

Each process has `devices` virtual CPU devices. None outlives the call, whatever happens.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]

# What a script begins with: process I of N, at the coordinator's address.
_PROLOGUE = """\
import json, sys
import jax, numpy as np
from xmc_jax.runtime import distributed
address, count, own = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
distributed.initialize("auto", address, count, own, timeout=60, preemption=True)
"""
_EPILOGUE = "\ndistributed.finish()\n"


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS of so many virtual CPU devices; with them programs compile in half the time."""
    flags = [f"--xla_force_host_platform_device_count={devices}"]
    if importlib.metadata.version("jaxlib").startswith("0.10."):  # one unknown would end a process
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)


@dataclasses.dataclass(frozen=True)
class Done:
    """A process that has ended, and how many seconds after its group started."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float

    def json(self) -> Any:
        """What its last line of output says."""
        return json.loads(self.stdout.splitlines()[-1])

    def error(self) -> str:
        """The only error that it said, a line without a traceback."""
        assert "Traceback" not in self.stderr, self.stderr[-3000:]
        (line,) = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        return line


class Group:
    """Processes that were started together.

    Attributes:
        processes: in order of their number.
    """

    def __init__(self, folder: pathlib.Path):
        self.processes: list[subprocess.Popen] = []
        self._folder, self._started = folder, time.monotonic()

    def add(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Starts one more; its output goes to files, so that nothing waits for a reader."""
        number = len(self.processes)
        with (
            open(self._folder / f"{number}.out", "wb") as out,
            open(self._folder / f"{number}.err", "wb") as err,
        ):
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=ROOT,
                    env=environment,
                )
            )

    def output(self, number: int, name: str = "out") -> str:
        """What a process has written up to now; name "out" or "err"."""
        return (self._folder / f"{number}.{name}").read_text(errors="replace")

    def wait(self, timeout: float) -> list[Done]:
        """Waits for all, so many seconds from now.

        Raises:
            AssertionError: one does not end in time; with the end of what each said.
        """
        seconds: dict[int, float] = {}
        end = time.monotonic() + timeout
        while running := [i for i in range(len(self.processes)) if i not in seconds]:
            for number in running:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.processes[number].wait(0.02)
                    seconds[number] = time.monotonic() - self._started
            if time.monotonic() > end:
                said = "\n".join(f"[{i}] {self.said(i)}" for i in range(len(self.processes)))
                raise AssertionError(f"still running after {timeout} s: {running}\n{said}")
        return [
            Done(process.returncode, self.output(i), self.output(i, "err"), seconds[i])
            for i, process in enumerate(self.processes)
        ]

    def said(self, number: int) -> str:
        """The end of what a process has written."""
        return (self.output(number) + self.output(number, "err"))[-2000:]


@contextlib.contextmanager
def started(
    count: int,
    arguments: Sequence[str] | Sequence[Sequence[str]],
    devices: int = 1,
    environment: dict[str, str] | None = None,
) -> Iterator[Group]:
    """Python processes; those still running at the end of the block are killed.

    Args:
        count: of processes.
        arguments: of Python, the same for all, or a list of them for each process.
        devices: virtual CPU devices of each process.
        environment: further variables.
    """
    each = [arguments] * count if isinstance(arguments[0], str) else arguments
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        **(environment or {}),
    }
    with tempfile.TemporaryDirectory() as folder:
        group = Group(pathlib.Path(folder))
        try:
            for words in each:
                group.add([sys.executable, *words], variables)
            yield group
        finally:
            for process in group.processes:
                process.kill()
                process.wait()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Waits for what another process does.

    Raises:
        AssertionError: it does not do it in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing happened in {seconds} s"
        time.sleep(0.02)


def later(seconds: float) -> None:
    """Lets time pass for other processes, where its passing is what is tested."""
    time.sleep(seconds)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def script(
    count: int,
    source: str,
    *arguments: str,
    devices: int = 1,
    timeout: float = 300,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Done]:
    """Runs Python source in processes that are one run.

    Args:
        count: of processes.
        source: `jax`, `np`, `json`, `sys` and `distributed`, initialized, are there.
        *arguments: sys.argv[1:].
        devices: virtual CPU devices of each process.
        timeout: seconds for all.
        check: whether each is to end with 0.
        environment: further variables.

    Raises:
        AssertionError: one failed, or did not end.
    """
    words = scripted(count, source, *arguments)
    with started(count, words, devices, environment) as group:
        return _checked(group, timeout, check)


def scripted(count: int, source: str, *arguments: str) -> list[list[str]]:
    """The arguments of Python with which `script` starts each process."""
    address = f"127.0.0.1:{free_port()}"
    program = _PROLOGUE + source + _EPILOGUE
    return [["-c", program, address, str(count), str(own), *arguments] for own in range(count)]


def command(
    count: int,
    *flags: str,
    devices: int = 1,
    timeout: float = 300,
    check: bool = True,
    environment: dict[str, str] | None = None,
) -> list[Done]:
    """Runs `python -m xmc_jax.main` in processes that are one run; one process gets no flags more.

    Raises:
        AssertionError: one failed, or did not end.
    """
    with started(count, commanded(count, *flags), devices, environment) as group:
        return _checked(group, timeout, check)


def config(fields: Mapping[str, Any], folder: pathlib.Path) -> str:
    """The flag of a config that has these fields, in a file of a folder."""
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    return f"--config={path}"


def commanded(count: int, *flags: str) -> list[list[str]]:
    """The arguments of Python with which `command` starts each process."""
    if count == 1:
        return [["-m", "xmc_jax.main", *flags]]
    address = f"--coordinator_address=127.0.0.1:{free_port()}"
    return [
        ["-m", "xmc_jax.main", address, f"--num_processes={count}", f"--process_id={own}", *flags]
        for own in range(count)
    ]


# Arguments: what happens, in which function (module:name), at which call, and the command's own.
_STRUCK = """
import functools, importlib, os, signal, sys, threading

what, where, left = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
module, _, path = where.partition(":")
*outer, name = path.split(".")
holder = functools.reduce(getattr, outer, importlib.import_module(module))
function = getattr(holder, name)

def struck(*arguments, **options):
    global left
    left -= 1
    if left == 0 and what == "hang":
        threading.Event().wait()
    elif left == 0 and what == "say":
        os.write(2, (where + "\\n").encode())
    elif left == 0:
        os.kill(os.getpid(), signal.Signals[what])
    return function(*arguments, **options)

setattr(holder, name, struck)
from xmc_jax import main
sys.argv[0] = "main.py"
main.run()
"""


def struck(words: list[str], what: str, where: str, call: int) -> list[str]:
    """The words of a command to which something happens at a certain moment.

    Args:
        words: what `commanded` gave for this process.
        what: name of the signal that it gets, "hang" if the function never returns, or "say" if it
            says `where` on standard error.
        where: the function before which it happens, e.g. "xmc_jax.training.run:Run.boundary".
        call: at which of its calls, from 1.
    """
    assert words[:2] == ["-m", "xmc_jax.main"]
    return ["-c", _STRUCK, what, where, str(call), *words[2:]]


def is_suspended(process: subprocess.Popen) -> bool:
    state = pathlib.Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0]
    return state == "T"


def _checked(group: Group, timeout: float, check: bool) -> list[Done]:
    done = group.wait(timeout)
    failed = [i for i, one in enumerate(done) if one.returncode]
    assert not (check and failed), "\n".join(f"[{i}] {group.said(i)}" for i in failed)
    return done
