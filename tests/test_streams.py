"""Standard streams that are closed, full, or have nobody at their other end: one line."""

import os
import subprocess
import sys

import processes
import pytest

PRINTS = """
import sys
from xmc_jax.runtime import command
def act(_):
    with open(sys.argv[1], "w") as file:
        print("a line")
        file.write("whole")
    print("another " * int(sys.argv[2]))
sys.exit(command.run("prints", lambda: None, act))
"""


def run(words: list[str], redirected: str) -> subprocess.CompletedProcess:
    """Runs Python; `redirected` is what a shell knows, or "| true" for a reader that has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    shell = f'exec "$@" {redirected.removeprefix("| true")}'
    with os.fdopen(writer, "wb") as gone:
        return subprocess.run(
            ["bash", "-c", shell, "bash", sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=gone if redirected == "| true" else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(processes.ROOT), "PYTHONUNBUFFERED": ""},
        )


@pytest.mark.parametrize("words", [1, 100_000])  # within a buffer, and more
@pytest.mark.parametrize(
    ("redirected", "said", "code"),
    [
        ("| true", "prints: standard output: Broken pipe\n", 141),
        (">/dev/full", "prints: standard output: No space left on device\n", 1),
        ("<&- >&-", "", 0),
        (">&- 2>&-", "", 0),
    ],
)
def test_what_is_printed_goes_nowhere_and_into_no_file(redirected, said, code, words, tmp_path):
    done = run(["-c", PRINTS, str(tmp_path / "file"), str(words)], redirected)
    assert (done.stderr, done.returncode) == (said, code)
    assert (tmp_path / "file").read_text() == "whole"


@pytest.mark.parametrize(
    ("redirected", "said"),
    [
        ("<&-", "error: --input=-: expected an open stdin, found it closed\n"),
        (">&-", "error: --output=-: expected an open stdout, found it closed\n"),
    ],
)
def test_a_stream_that_is_to_be_read_or_written_is_open(redirected, said, tmp_path):
    flags = ["--mode=predict", f"--artifact={tmp_path}", "--input=-", "--output=-"]
    done = run(["-m", "xmc_jax.main", *flags], redirected)
    assert (done.stderr, done.returncode) == (said, 2)


@pytest.mark.slow
def test_the_main_command():
    """It prints a plan, as all modes print."""
    flags = ["--mode=plan", f"--config={processes.ROOT}/configs/vixml.py:tiny"]
    done = run(["-m", "xmc_jax.main", *flags], "| true")
    assert done.returncode == 141 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: standard output: Broken pipe"
