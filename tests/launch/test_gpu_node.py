"""launch/gpu_node.sh with fake nvidia-smi and Python: choice of extras, restarts, signals."""

import os
import pathlib
import signal
import subprocess

import processes
import pytest

pytestmark = pytest.mark.slow  # fakes of commands, processes that wait
SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "gpu_node.sh"
HOSTILE = ["--a=x y", '--b=it\'s $HOME `id` $(id); rm -rf "z"', "--c=first\nsecond", "--d=", "*"]
H100 = "{0}, NVIDIA H100 80GB HBM3, 81559 MiB, {1}, 9.0"


@pytest.fixture
def node(tmp_path):
    """A machine: its folder, and a function that runs the script on it."""
    binaries, venv = tmp_path / "bin", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    binaries.mkdir()
    _script(
        binaries / "nvidia-smi",
        'if [[ -f $NODE/hang ]]; then exec sleep 60; fi; cat "$NODE/gpus"; exit "$(<"$NODE/smi")"',
    )
    # Notes its words and environment; ends with the next code of the list, or waits for SIGTERM.
    _script(
        venv / "bin" / "python",
        'echo run >>"$NODE/runs"; printf "%s\\0" "$@" >"$NODE/words"; env >"$NODE/env"; '
        'code=$(sed -n "$(wc -l <"$NODE/runs")p" "$NODE/codes"); '
        'if [[ $code == wait ]]; then trap "exit 143" TERM; echo >"$NODE/ready"; '
        "while :; do sleep 0.05; done; fi; "
        'exit "${code:-0}"',
    )
    (tmp_path / "gpus").write_text("\n".join(H100.format(i, "550.54.15") for i in range(2)) + "\n")
    (tmp_path / "smi").write_text("0")
    (tmp_path / "codes").write_text("")
    environment = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "NODE": str(tmp_path),
        "HOME": str(tmp_path),
        "LC_ALL": "C.UTF-8",
    }

    def run(*options: str, arguments=("--config=a",), popen=False, **more: str):
        command = ["bash", str(SCRIPT), "--venv", str(venv), "--no-install", "--backoff", "0"]
        command += [*options, "--", *arguments]
        kwargs = {"text": True, "env": environment | more, "stderr": subprocess.PIPE}
        kwargs |= {"stdout": subprocess.PIPE}
        if popen:
            return subprocess.Popen(command, **kwargs)
        return subprocess.run(command, timeout=20, **kwargs)

    return tmp_path, run


def _script(path: pathlib.Path, body: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def _runs(folder: pathlib.Path) -> int:
    file = folder / "runs"
    return len(file.read_text().splitlines()) if file.exists() else 0


def test_one_process_gets_the_arguments_unharmed(node):
    folder, run = node
    done = run(arguments=HOSTILE)
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().split("\0")[:-1]
    assert words == ["-m", "xmc_jax.main", "--distributed=off", *HOSTILE]
    assert _runs(folder) == 1
    assert "GPU 1, NVIDIA H100" in done.stderr
    assert not [x for x in (folder / "env").read_text().splitlines() if x.startswith("XLA_")]


def test_a_crash_is_restarted_until_it_goes_well(node):
    folder, run = node
    (folder / "codes").write_text("75\n139\n0\n")
    done = run()
    assert done.returncode == 0 and _runs(folder) == 3
    assert "exit code 139; restart 2 of 3" in done.stderr


def test_restarts_are_bounded_and_the_last_code_is_passed_on(node):
    folder, run = node
    (folder / "codes").write_text("1\n" * 9)
    done = run("--restarts", "2")
    assert done.returncode == 1 and _runs(folder) == 3
    assert "gave up after 2 restarts" in done.stderr


@pytest.mark.parametrize("code", [2, 143])
def test_usage_errors_and_runs_told_to_stop_are_not_restarted(node, code):
    folder, run = node
    (folder / "codes").write_text(f"{code}\n0\n")
    assert run().returncode == code
    assert _runs(folder) == 1


def test_a_signal_reaches_python_whose_exit_code_is_passed_on(node):
    folder, run = node
    (folder / "codes").write_text("wait\n")
    process = run(popen=True)
    processes.until((folder / "ready").exists)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 143 and _runs(folder) == 1
    assert "the same command goes on" in said


@pytest.mark.parametrize(
    ("gpus", "extra"),
    [
        ([H100.format(0, "580.65.06")], "cuda13"),
        ([H100.format(0, "550.54.15")], "cuda12"),
        ([H100.format(0, "580.65"), "1, Tesla V100, 16384 MiB, 580.65, 7.0"], "cuda12"),
    ],
)
def test_the_extra_follows_from_driver_and_gpu(node, gpus, extra):
    folder, run = node
    (folder / "gpus").write_text("\n".join(gpus) + "\n")
    done = run()
    assert done.returncode == 0 and f": {extra}\n" in done.stderr


@pytest.mark.parametrize(
    ("gpus", "code", "said"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate\nwith the driver\n", 9, "failed"),
        ("", 0, "expected a line per GPU"),
        (H100.format(0, "470.82") + "\n", 0, "expected 525 or later"),
        (H100.format(0, "[N/A]") + "\n", 0, "expected a driver's version"),
    ],
)
def test_without_a_usable_gpu_nothing_is_started(node, gpus, code, said):
    folder, run = node
    (folder / "gpus").write_text(gpus)
    (folder / "smi").write_text(str(code))
    done = run()
    assert done.returncode == 3 and _runs(folder) == 0
    assert said in done.stderr.splitlines()[-1]


def test_a_hanging_nvidia_smi_is_killed(node):
    folder, run = node
    (folder / "hang").touch()
    done = run("--timeout", "1")
    assert done.returncode == 3 and "no answer within 1 s" in done.stderr


def test_secrets_are_in_the_environment_and_not_on_a_command_line(node):
    folder, run = node
    secrets = folder / "my secrets"
    secrets.write_text("HF_TOKEN=sesame\n")
    secrets.chmod(0o600)
    dry = run("--secrets", str(secrets), "--dry-run")
    assert "sesame" not in dry.stdout + dry.stderr and "my secrets" in dry.stdout
    assert run("--secrets", str(secrets)).returncode == 0
    assert "HF_TOKEN=sesame" in (folder / "env").read_text().splitlines()
    assert "sesame" not in (folder / "words").read_text()


def test_determinism_adds_to_the_flags_of_xla(node):
    folder, run = node
    run("--deterministic", XLA_FLAGS="--xla_a=1")
    flags = "XLA_FLAGS=--xla_a=1 --xla_gpu_deterministic_ops=true"
    assert flags in (folder / "env").read_text().splitlines()


def test_a_dry_run_prints_commands_that_read_back_and_does_nothing(node):
    folder, run = node
    done = run("--deterministic", "--dry-run", arguments=HOSTILE)
    assert done.returncode == 0 and done.stderr == "" and _runs(folder) == 0
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert lines[0].startswith("timeout ") and lines[1].startswith("cd ")
    assert lines[2] == "export XLA_FLAGS=--xla_gpu_deterministic_ops=true"
    assert len(lines) == 4
    again = subprocess.run(
        ["bash", "-c", f'set -- {lines[3]}; printf "%s\\0" "$@"'], capture_output=True, text=True
    )
    assert again.stdout.split("\0")[-len(HOSTILE) - 1 : -1] == HOSTILE
