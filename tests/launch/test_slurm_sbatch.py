"""launch/slurm.sbatch with a fake srun, whose tasks run here, and a fake scontrol."""

import os
import pathlib
import shutil
import signal
import subprocess

import processes
import pytest

pytestmark = pytest.mark.slow  # fakes of commands, processes that wait
LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
HOSTILE = ["--a=x y", '--b=it\'s $HOME `id` $(id); rm -rf "z"', "--c=first\nsecond", "--d=", "*"]

# Drops its own options and runs the task twice, as on two nodes. Tasks get signals as from SLURM.
SRUN = r"""
printf '%s\n' "$@" >"$JOB/step"
while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_PROCID=$node SLURM_GPUS_ON_NODE=4 "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    code=0; wait "$pid" || code=$?
    while kill -0 "$pid" 2>/dev/null; do code=0; wait "$pid" || code=$?; done
    code=0; wait "$pid" || code=$?
    ((code <= worst)) || worst=$code
done
exit "$worst"
"""
PYTHON = r"""
printf '%s\0' "$@" >"$JOB/words"; env >"$JOB/env-$SLURM_PROCID"
code=$(cat "$JOB/code")
if [[ $code == wait ]]; then trap 'exit 143' TERM; echo >"$JOB/ready-$SLURM_PROCID"
    while :; do sleep 0.05; done; fi
exit "$code"
"""
SCONTROL = r"""
echo "$*" >>"$JOB/scontrol"
if [[ $1 == requeue ]]; then exit "$(cat "$JOB/requeue")"; fi
echo "JobId=$SLURM_JOB_ID JobName=x JobState=$(cat "$JOB/state") Reason=None"
"""


@pytest.fixture
def job(tmp_path):
    """A job's folder, and a function that runs the script as SLURM does: a copy, from its spool."""
    checkout = tmp_path / "check out"
    shutil.copytree(LAUNCH, checkout / "launch")
    (checkout / "launch" / "install.sh").write_text(
        '#!/usr/bin/env bash\necho "$*" >>"$JOB/installed"\nmkdir -p "$1/bin"\n'
        'cp "$JOB/bin/python" "$1/bin/python"\n'
    )
    spool = tmp_path / "slurm_script"
    shutil.copy(LAUNCH / "slurm.sbatch", spool)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, body in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL)):
        (binaries / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (binaries / name).chmod(0o755)
    for name, text in (("code", "0"), ("state", "RUNNING"), ("requeue", "0")):
        (tmp_path / name).write_text(text)
    environment = {
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "JOB": str(tmp_path),
        "LC_ALL": "C.UTF-8",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(checkout),
    }

    def run(*options: str, arguments=("--config=a",), popen=False, **more: str):
        command = ["bash", str(spool), *options, "--", *arguments]
        kwargs = {"text": True, "env": environment | more, "stderr": subprocess.PIPE}
        kwargs |= {"stdout": subprocess.PIPE, "cwd": tmp_path}
        if popen:
            return subprocess.Popen(command, **kwargs)
        return subprocess.run(command, timeout=20, **kwargs)

    return tmp_path, run


def _requeued(folder: pathlib.Path) -> bool:
    file = folder / "scontrol"
    return file.exists() and "requeue 77" in file.read_text().splitlines()


def test_a_process_per_node_sees_all_gpus_and_gets_the_arguments_unharmed(job):
    folder, run = job
    done = run(arguments=HOSTILE, SLURM_CPUS_PER_TASK="12")
    assert done.returncode == 0, done.stderr
    words = (folder / "words").read_text().split("\0")[:-1]
    assert words == ["-m", "xmc_jax.main", "--distributed=auto", *HOSTILE]
    for node in range(2):
        environment = (folder / f"env-{node}").read_text().splitlines()
        assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3" in environment
    step = (folder / "step").read_text().splitlines()
    assert "--ntasks-per-node=1" in step and "--cpus-per-task=12" in step
    assert not _requeued(folder)
    (installed,) = (folder / "installed").read_text().splitlines()  # once for all nodes
    assert installed.endswith(".venv-slurm cuda12")


def test_a_run_that_was_told_to_stop_is_requeued(job):
    folder, run = job
    (folder / "code").write_text("143")
    done = run(SLURM_RESTART_COUNT="2")
    assert done.returncode == 0 and _requeued(folder)
    assert "saved; requeued (3 of 100)" in done.stderr


def test_sigterm_from_slurm_reaches_python_and_the_job_outlives_it(job):
    folder, run = job
    (folder / "code").write_text("wait")
    process = run(popen=True)
    processes.until(lambda: all((folder / f"ready-{node}").exists() for node in range(2)))
    # SLURM signals the steps; where it preempts, the batch script too.
    process.send_signal(signal.SIGTERM)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 0 and _requeued(folder)


@pytest.mark.parametrize("state", ["CANCELLED", "PREEMPTED"])
def test_a_job_that_slurm_cancelled_or_preempted_is_not_requeued_by_the_script(job, state):
    folder, run = job
    (folder / "code").write_text("143")
    (folder / "state").write_text(state)
    done = run()
    assert done.returncode == 143 and not _requeued(folder)
    assert f"JobState={state}" in done.stderr


def test_a_run_that_lost_a_process_or_was_stuck_is_requeued(job):
    folder, run = job
    (folder / "code").write_text("137")
    done = run()
    assert done.returncode == 0 and _requeued(folder)
    assert "a process was lost or stuck; requeued (1 of 100)" in done.stderr


def test_failures_end_the_job(job):
    folder, run = job
    (folder / "code").write_text("139")
    done = run()
    assert done.returncode == 139 and not _requeued(folder)
    assert done.stderr.startswith("slurm.sbatch: error: ") and done.stderr.count("\n") == 1


def test_requeues_are_bounded(job):
    folder, run = job
    (folder / "code").write_text("143")
    done = run("--restarts", "3", SLURM_RESTART_COUNT="3")
    assert done.returncode == 4 and not _requeued(folder)
    assert "requeued 3 times already" in done.stderr


def test_a_refused_requeue_is_said(job):
    folder, run = job
    (folder / "code").write_text("143")
    (folder / "requeue").write_text("1")
    done = run()
    assert done.returncode == 4 and "scontrol requeue failed" in done.stderr


def test_secrets_reach_python_and_no_command_line(job):
    folder, run = job
    secrets = folder / "my secrets"
    secrets.write_text("HF_TOKEN=sesame\n")
    secrets.chmod(0o600)
    assert run("--secrets", str(secrets)).returncode == 0
    assert "HF_TOKEN=sesame" in (folder / "env-1").read_text().splitlines()
    dry = run("--secrets", str(secrets), "--dry-run")
    assert "sesame" not in (folder / "step").read_text() + dry.stdout + dry.stderr


def test_a_dry_run_prints_the_commands_and_does_nothing(job):
    folder, run = job
    done = run("--extras", "cuda13,vision", "--dry-run", arguments=HOSTILE)
    assert done.returncode == 0 and done.stderr == ""
    assert not (folder / "step").exists() and not (folder / "installed").exists()
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["cd", "bash", "srun", "scontrol"]
    assert lines[1].endswith(" cuda13,vision")
    again = subprocess.run(
        ["bash", "-c", f'set -- {lines[2]}; printf "%s\\0" "$@"'], capture_output=True, text=True
    )
    assert again.stdout.split("\0")[-len(HOSTILE) - 1 : -1] == HOSTILE


def test_outside_of_a_job_or_a_checkout_it_says_so(job, tmp_path):
    _, run = job
    done = run(SLURM_JOB_ID="")
    assert done.returncode == 2 and "submit with sbatch" in done.stderr
    done = run(SLURM_SUBMIT_DIR=str(tmp_path))
    assert done.returncode == 2 and "submit from the checkout" in done.stderr


def test_slurm_is_asked_to_signal_processes_in_time_and_to_requeue():
    head = (LAUNCH / "slurm.sbatch").read_text().partition("set -euo")[0].splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")}
    # Without "B:": the processes, not the batch script.
    assert {"--signal=TERM@300", "--requeue", "--ntasks-per-node=1", "--open-mode=append"} <= asked
