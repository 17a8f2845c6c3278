"""launch/tpu_pod.sh against a fake gcloud; its two workers are folders where commands really run.

The fake does what the cloud does (queue, provision, run by ssh) unless a plan for a verb says
otherwise, a line for each call: `fail MESSAGE`, `hang`, `made hang` (done, but not said), `usage`,
`preempt STATE`, `say TEXT`, or `go` for the usual.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess

import processes
import pytest

pytestmark = pytest.mark.slow  # fakes of commands, processes that wait
LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
HOSTILE = ["--a=x y", '--b=it\'s $HOME `id` $(id); touch "pwned"', "--c=first\nsecond", "--d=", "*"]
RUN = ["--config=configs/vixml.py:tiny", "--workdir=gs://bucket/run"]

GCLOUD = r"""#!/usr/bin/env bash
set -u
cd "$CLOUD"
printf '%s ' "${@@Q}" | tr '\n' ' ' >>calls; echo >>calls
case "$*" in
    *queued-resources\ *) verb=$4 ;;
    *tpu-vm\ describe*) verb=machines ;;
    *tpu-vm\ scp*) verb=scp ;;
    *storage*) verb=storage ;;
    *) remote=${!#}; remote=${remote#--command=}
        verb=${remote##*tpu_worker.sh }; verb=${verb%% *} ;;
esac
echo "$verb" >>verbs
plan=go
if [[ -s plan-$verb ]]; then plan=$(head -n 1 "plan-$verb"); sed -i 1d "plan-$verb"; fi
state=$(cat state 2>/dev/null || echo ABSENT)
wipe() {
    for w in w0 w1; do
        [[ ! -f $w/xmc_jax/pid ]] || kill -KILL -- "-$(<"$w/xmc_jax/pid")"
        rm -rf "$w"
    done
} 2>/dev/null
case $plan in
    hang*) exec sleep 60 ;;
    made*) mkdir -p w0 w1; echo PROVISIONING >state; exec sleep 60 ;;
    fail*) printf 'Some progress.\nERROR: (gcloud.x) %s\nmore\n' "${plan#fail }" >&2; exit 1 ;;
    usage*) printf 'ERROR: (gcloud.x) unrecognized arguments: --x\n' >&2; exit 2 ;;
    say*) printf '%s\n' "${plan#say }"; exit 0 ;;
    preempt*) wipe; rm -f codes-w?  # of the run that is gone, read or not
        echo "${plan#preempt }" >state; state=${plan#preempt } ;;
esac
case $verb in
    create)
        [[ $state == ABSENT ]] || { echo "ERROR: ALREADY_EXISTS: it is there" >&2; exit 1; }
        mkdir -p w0 w1; echo WAITING_FOR_RESOURCES >state ;;
    describe)
        [[ $state != ABSENT ]] || { echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1; }
        case $state in MACHINES-*) state=ACTIVE ;; esac
        printf '%s|%s|\n' "$state" SERVICE
        case $state in
            WAITING*) echo PROVISIONING >state ;;
            PROVISIONING) echo ACTIVE >state ;;
        esac ;;
    machines) case $state in ACTIVE) echo READY ;; MACHINES-*) echo "${state#*-}" ;;
        *) echo "ERROR: NOT_FOUND: Resource was not found" >&2; exit 1 ;; esac ;;
    delete) wipe; rm -f state ;;
    storage) mkdir -p "${!#}"; echo '{"P@1": 50}' >"${!#}/metrics.json" ;;
    scp)
        [[ $state == ACTIVE ]] || { echo "ERROR: unusable state $state" >&2; exit 1; }
        files=(); target=
        for word in "${@:5}"; do
            case $word in --*) ;; *:*) target=${word#*:} ;; *) files+=("$word") ;; esac
        done
        for w in w0 w1; do cp -p "${files[@]}" "$w/$target"; done ;;
    *)
        [[ $state == ACTIVE ]] || { echo "ERROR: unusable state $state" >&2; exit 1; }
        code=0
        for w in w0 w1; do (cd "$w" && HOME=$PWD bash -c "$remote") || code=$?; done
        exit "$code" ;;
esac
"""

# Installed in the place of the package: notes what it got, ends with the next of the exit codes.
PYTHON = r"""#!/usr/bin/env bash
echo "$PWD" >>"$CLOUD/runs"
printf '%s\0' "$@" >"$CLOUD/words"
env >"$CLOUD/environment"
worker=${PWD%/xmc_jax/*}; worker=${worker##*/}
code=$(head -n 1 "$CLOUD/codes-$worker" 2>/dev/null)
[[ ! $code ]] || sed -i 1d "$CLOUD/codes-$worker"
echo "a line of the log, to end with ${code:-0}"
if [[ $code == wait ]]; then trap 'exit 143' TERM; while :; do sleep 0.05; done; fi
if [[ $code == hang ]]; then trap '' TERM; while :; do sleep 0.05; done; fi
exit "${code:-0}"
"""

INSTALL = r"""#!/usr/bin/env bash
mkdir -p "$1/bin" && cp "$CLOUD/python" "$1/bin/python"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A commit of the launchers, with an installer that needs no network."""
    folder = tmp_path_factory.mktemp("check out")
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / "launch" / "install.sh").write_text(INSTALL)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=one"]):
        subprocess.run([*git, *words], check=True)
    return folder


class Cloud:
    """The fake's folder, and the script run against it."""

    def __init__(self, folder: pathlib.Path, checkout: pathlib.Path):
        self.folder, self.checkout, self.results = folder, checkout, folder / "results of a run"
        binaries = folder / "bin"
        binaries.mkdir()
        for path, text in ((binaries / "gcloud", GCLOUD), (folder / "python", PYTHON)):
            path.write_text(text)
            path.chmod(0o755)
        self.environment = {
            "PATH": f"{binaries}:{os.environ['PATH']}",
            "CLOUD": str(folder),
            "HOME": str(folder / "home"),
            "LC_ALL": "C.UTF-8",
        }

    def plan(self, **plans: str) -> None:
        for verb, lines in plans.items():
            (self.folder / f"plan-{verb}").write_text(lines + "\n")

    def codes(self, *codes: str) -> None:
        """Exit codes of the run on the workers: "1 0" is 1 the first time, 0 the second."""
        for worker, of_one in enumerate(codes):
            (self.folder / f"codes-w{worker}").write_text("\n".join(of_one.split()) + "\n")

    def command(self, action: str, *options: str, arguments=()) -> list[str]:
        script = self.checkout / "launch" / "tpu_pod.sh"
        fixed = ["--name=a-run", "--zone=us-west4-a", "--project=a-project"]
        if action == "up":
            fixed += ["--type=v5litepod-16", f"--to={self.results}"]
        quick = [f"--{name}=0" for name in ("poll", "backoff", "grace")]
        words = ["bash", str(script), action, *fixed, *quick, "--timeout=20", *options]
        return [*words, "--", *arguments] if arguments else words

    def __call__(self, action: str = "up", *options: str, arguments=RUN):
        command = self.command(action, *options, arguments=arguments if action == "up" else ())
        kwargs = {"capture_output": True, "text": True, "timeout": 50, "env": self.environment}
        return subprocess.run(command, **kwargs)

    def lines(self, name: str) -> list[str]:
        file = self.folder / name
        return file.read_text().splitlines() if file.exists() else []

    def count(self, verb: str) -> int:
        return self.lines("verbs").count(verb)


@pytest.fixture
def cloud(tmp_path, checkout):
    cloud = Cloud(tmp_path, checkout)
    yield cloud
    for pid in tmp_path.glob("w?/xmc_jax/pid"):
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def _error(done) -> str:
    """The message: the last line, and the only one that is an error."""
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("tpu_pod.sh: error: ")]
    assert done.stderr.splitlines()[-1] == line
    return line


def test_a_run_from_nothing_to_its_results(cloud):
    done = cloud(arguments=[*RUN, *HOSTILE])
    assert done.returncode == 0, done.stderr
    words = (cloud.folder / "words").read_text().split("\0")[:-1]
    assert words == [
        "-m",
        "xmc_jax.main",
        "--distributed=auto",
        "--compilation_cache=gs://bucket/run/compiled",
        *RUN,
        *HOSTILE,
    ]
    assert len(cloud.lines("runs")) == 2  # workers
    assert (cloud.results / "metrics.json").exists()
    assert "a line of the log" in (cloud.results / "workers.log").read_text()
    assert not list(cloud.folder.rglob("pwned"))
    assert cloud.count("create") == 1 and cloud.count("delete") == 0
    assert "is there still, and costs" in done.stderr
    (created,) = [line for line in cloud.lines("calls") if "'create'" in line]
    for word in ("--type=", "--spot"):
        assert word not in created
    for word in ("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"):
        assert f"'{word}'" in created
    assert all("'--project=a-project'" in x for x in cloud.lines("calls") if "'tpus'" in x)


def test_a_slice_that_is_there_is_used_and_a_run_that_has_ended_is_only_fetched(cloud):
    assert cloud().returncode == 0
    shutil.rmtree(cloud.results)
    assert cloud().returncode == 0
    assert cloud.count("create") == 1 and len(cloud.lines("runs")) == 2
    assert (cloud.results / "metrics.json").exists()


def test_other_arguments_are_another_run(cloud):
    assert cloud().returncode == 0
    assert cloud(arguments=[*RUN, "--config.train.epochs=2"]).returncode == 0
    assert cloud.count("create") == 1 and len(cloud.lines("runs")) == 4


def test_deletion_at_the_end_comes_after_the_results(cloud):
    assert cloud("up", "--delete").returncode == 0
    verbs = cloud.lines("verbs")
    assert verbs.index("storage") < verbs.index("delete")
    assert not (cloud.folder / "state").exists()


@pytest.mark.parametrize(
    ("verb", "state"),
    [("status", "MACHINES-PREEMPTED"), ("install", "SUSPENDED"), ("start", "MACHINES-TERMINATED")],
)
def test_after_a_preemption_all_is_done_again(cloud, verb, state):
    cloud.plan(**{verb: f"preempt {state}"})
    if verb == "status":  # not the first look, before there is a run
        cloud.codes("wait", "wait")
        cloud.plan(status=f"go\npreempt {state}")
    done = cloud("up", "--tries=2")
    assert done.returncode == 0, done.stderr
    assert cloud.count("create") == 2 and cloud.count("delete") == 1
    assert "restart 1 of 20" in done.stderr
    assert (cloud.results / "metrics.json").exists()


def test_workers_that_fail_because_of_a_preemption_are_not_a_failed_run(cloud):
    """The first sign may be an exit code; the state follows."""
    cloud.codes("134")
    cloud.plan(machines="go\ngo\npreempt SUSPENDED")
    done = cloud()
    assert done.returncode == 0, done.stderr
    assert cloud.count("create") == 2


def test_preemptions_are_followed_a_bounded_number_of_times(cloud):
    cloud.plan(start="\n".join(["preempt SUSPENDED"] * 5))
    done = cloud("up", "--restarts=2", "--tries=1")
    assert done.returncode == 4 and cloud.count("create") == 3
    assert "SUSPENDED; gave up after 2 restarts" in _error(done)


def test_calls_that_fail_or_hang_are_tried_again(cloud):
    cloud.plan(
        describe="fail internal error\nhang",
        create="fail backend error",
        scp="fail connection reset",
        storage="fail 503",
        status="fail ssh",
        log="fail ssh",
    )
    done = cloud("up", "--timeout=1")
    assert done.returncode == 0, done.stderr
    assert (
        "gcloud compute tpus queued-resources describe: no answer within 1 s, killed" in done.stderr
    )
    assert cloud.count("create") == 2 and len(cloud.lines("runs")) == 2


def test_a_creation_that_was_killed_but_done_is_found(cloud):
    cloud.plan(create="made hang")
    done = cloud("up", "--timeout=1")
    assert done.returncode == 0, done.stderr
    assert cloud.count("create") == 2 and "killed" in done.stderr


def test_what_goes_on_failing_ends_with_one_line(cloud):
    cloud.plan(create="\n".join(["fail (boom) twice"] * 9))
    done = cloud("up", "--tries=3")
    assert done.returncode == 4
    assert "boom" in _error(done) and cloud.count("create") == 3


@pytest.mark.parametrize(
    "message",
    [
        "Quota 'TPUV5sLitepodPerProjectPerZone' exhausted. Limit 16 in zone us-west4-a",
        "INVALID_ARGUMENT: accelerator type v5litepod-16 is not in us-west4-a",
    ],
)
def test_what_the_cloud_refuses_is_not_tried_again(cloud, message):
    cloud.plan(create=f"fail {message}")
    done = cloud()
    assert done.returncode == 3 and cloud.count("create") == 1
    assert message in _error(done)


def test_a_mistake_in_a_flag_of_gcloud_is_not_tried_again(cloud):
    cloud.plan(create="usage")
    done = cloud("up", "--create-flag=--x")
    assert done.returncode == 3 and "unrecognized arguments" in _error(done)
    assert "'--x'" in next(x for x in cloud.lines("calls") if "'create'" in x)


def test_a_request_that_fails_for_quota_says_so(cloud):
    cloud.plan(describe="go\nsay FAILED|SERVICE|Quota limit 'TPUS' has been exceeded")
    done = cloud()
    assert done.returncode == 3 and "Quota limit 'TPUS'" in _error(done)


def test_the_queue_is_waited_in_and_left_after_a_time(cloud):
    cloud.plan(describe="go\n" + "\n".join(["say WAITING_FOR_RESOURCES||"] * 400))
    done = cloud("up", "--queue-timeout=0")
    assert done.returncode == 4
    assert "WAITING_FOR_RESOURCES after 0 s; the same command waits on" in _error(done)


def test_a_run_that_fails_is_reported_with_its_log_and_not_repeated(cloud):
    cloud.codes("1", "wait")
    done = cloud()
    assert done.returncode == 1
    assert "the run ended with exit code 1; logs in" in _error(done)
    assert "a line of the log, to end with 1" in done.stderr
    assert (cloud.folder / "w1" / "xmc_jax" / "code").read_text() == "143\n"
    assert len(cloud.lines("runs")) == 2 and cloud.count("storage") == 0
    assert cloud.count("create") == 1 and (cloud.folder / "state").exists()


def test_a_run_that_the_machines_interrupted_goes_on(cloud):
    """Exit code 143 without our `stop`: SIGTERM from something else, and saved."""
    cloud.codes("143 0", "143 0")
    done = cloud()
    assert done.returncode == 0, done.stderr
    assert cloud.count("create") == 1 and len(cloud.lines("runs")) == 4


def test_a_run_that_lost_a_process_or_was_stuck_goes_on(cloud):
    cloud.codes("137 0", "75 0")
    done = cloud()
    assert done.returncode == 0, done.stderr
    assert cloud.count("create") == 1 and len(cloud.lines("runs")) == 4


def test_a_restarted_worker_is_noticed(cloud):
    cloud.codes("wait", "wait")
    process = subprocess.Popen(
        cloud.command("up", arguments=RUN), env=cloud.environment, stderr=subprocess.PIPE, text=True
    )
    processes.until(lambda: cloud.count("status") > 2)
    os.killpg(int((cloud.folder / "w0" / "xmc_jax" / "pid").read_text()), signal.SIGKILL)
    _, said = process.communicate(timeout=50)
    assert process.returncode == 0, said
    assert cloud.count("create") == 1 and "interrupted on a slice that is there" in said


def test_ctrl_c_leaves_the_run_which_is_followed_again_and_stopped(cloud):
    cloud.codes("wait", "wait")
    command = cloud.command("up", arguments=RUN)
    process = subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True)
    processes.until(lambda: cloud.count("status") > 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and "left alone" in said.splitlines()[-1]

    shown = cloud("status")
    assert shown.returncode == 0 and shown.stdout.count(" running\n") == 2
    assert cloud(arguments=[*RUN, "--other"]).returncode == 2  # not beside it

    process = subprocess.Popen(command, env=cloud.environment, stderr=subprocess.PIPE, text=True)
    before = cloud.count("status")
    processes.until(lambda: cloud.count("status") > before + 1)
    assert cloud("stop").returncode == 0
    _, said = process.communicate(timeout=50)
    assert process.returncode == 143 and len(cloud.lines("runs")) == 2
    assert "following run" in said and "the same command goes on" in said

    assert cloud().returncode == 0  # goes on
    assert len(cloud.lines("runs")) == 4


def test_a_slice_that_someone_deleted_is_not_created_again(cloud):
    cloud.codes("wait", "wait")
    cloud.plan(status="go\ngo\npreempt ABSENT")
    done = cloud("up", "--tries=1")
    assert done.returncode == 4 and cloud.count("create") == 1
    assert "deleted by someone" in _error(done)


def test_status_logs_fetch_and_delete(cloud, tmp_path):
    assert cloud("status").stdout == "a-run: ABSENT\n"
    assert cloud().returncode == 0
    shown = cloud("status")
    assert "a-run: ACTIVE" in shown.stdout and shown.stdout.count(" exit-0\n") == 2
    assert "a line of the log" in cloud("logs").stdout
    done = cloud("fetch", "--from=gs://bucket/run", f"--to={tmp_path / 'a folder'}")
    assert done.returncode == 0 and (tmp_path / "a folder" / "metrics.json").exists()
    assert cloud("delete").returncode == 0 and cloud("delete").returncode == 0
    assert cloud("status").stdout == "a-run: ABSENT\n"


def test_secrets_travel_as_a_file_of_mode_600(cloud, tmp_path):
    secrets = tmp_path / "my secrets"
    secrets.write_text("HF_TOKEN=sesame\n")
    secrets.chmod(0o600)
    done = cloud("up", f"--secrets={secrets}")
    assert done.returncode == 0, done.stderr
    assert "HF_TOKEN=sesame" in cloud.lines("environment")
    copies = list(cloud.folder.glob("w?/xmc_jax/secrets"))
    assert len(copies) == 2 and all(copy.stat().st_mode & 0o777 == 0o600 for copy in copies)
    assert all(copy.parent.stat().st_mode & 0o777 == 0o700 for copy in copies)
    dry = cloud("up", f"--secrets={secrets}", "--dry-run")
    shown = done.stdout + done.stderr + dry.stdout + dry.stderr + "\n".join(cloud.lines("calls"))
    assert "sesame" not in shown and "my secrets" in dry.stdout


def test_a_dry_run_calls_nothing_and_prints_what_would_be_done(cloud):
    options = ["--spot", "--delete", "--data=gs://bucket/data", "--service-account=a@b.c"]
    done = cloud("up", *options, "--dry-run", arguments=[*RUN, *HOSTILE])
    assert done.returncode == 0 and done.stderr == ""
    assert cloud.lines("calls") == [] and not (cloud.folder / "home").exists()
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    verbs = (
        "mkdir chmod git printf describe create describe machines mkdir scp install start status "
    )
    verbs += "delete describe log mkdir storage delete describe"
    assert len(lines) == len(verbs.split())
    for line, verb in zip(lines, verbs.split()):
        first = line.split()[0]
        if first == "timeout":
            verb = {"machines": "tpu-vm describe", "storage": "storage rsync"}.get(verb, verb)
            assert line.startswith("timeout --kill-after=10 ") and verb in line
        else:
            assert first == verb
    for flag in ("--spot", "--service-account=a@b.c"):
        assert flag in lines[5]
    # The arguments go through a file; the line that writes it reads back as what was given.
    written = lines[3].rpartition(" > ")[0]
    again = subprocess.run(["bash", "-c", written], capture_output=True, text=True).stdout
    assert again.split("\0")[:-1] == [*RUN, *HOSTILE]
    assert "gs://bucket/data" in lines[10]


def test_what_is_not_committed_is_said(cloud):
    readme = cloud.checkout / "launch" / "common.sh"
    before = readme.read_text()
    try:
        readme.write_text(before + "# a change\n")
        assert "not committed" in cloud("up", "--dry-run").stdout
    finally:
        readme.write_text(before)


@pytest.mark.parametrize(
    ("options", "arguments", "said"),
    [
        ([], ["--config=a"], "--workdir="),
        ([], ["--workdir=gs://b/$(id)"], "gs://BUCKET/RUN"),
        (["--name=A b"], RUN, "--name: expected lower-case"),
        (["--extras=tpu;id"], RUN, "--extras"),
        (["--poll=1.5"], RUN, "--poll: expected a whole number"),
        (["--secrets=/nowhere"], RUN, "--secrets"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(cloud, options, arguments, said):
    done = cloud("up", *options, arguments=arguments)
    assert done.returncode == 2 and cloud.lines("calls") == []
    assert said in _error(done)
