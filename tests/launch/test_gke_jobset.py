"""launch/gke.sh and gke_jobset.yaml: what is rendered, read as Kubernetes does; kubectl's part."""

import os
import pathlib
import re
import subprocess

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
HOSTILE = [
    "--a=x y",
    '--b=it\'s $HOME `id` $(HOME) $$(HOME) ${IMAGE} $$; "z" & \\n \\',
    "--c=first\nsecond\ttab\r",
    "--d=",
    "- [a]: {b}",
    "é 漢",
]
RUN = ["--config=configs/vixml.py:tiny", "--workdir=gs://bucket/run"]
OPTIONS = [
    "--name=a-run",
    "--image=us-docker.pkg.dev/p/r/xmc_jax:1",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x4",
]


@pytest.fixture
def cluster(tmp_path):
    """Where the fake kubectl notes its words, and a function that runs the script with it."""
    fake = tmp_path / "bin" / "kubectl"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'printf "%s " "${@@Q}" >>"$CLUSTER/calls"; echo >>"$CLUSTER/calls"\n'
        "if [[ -f $CLUSTER/hang ]]; then exec sleep 60; fi\n"
        'if [[ -f $CLUSTER/fail ]]; then cat "$CLUSTER/fail" >&2; exit 1; fi\n'
    )
    fake.chmod(0o755)
    environment = {
        "PATH": f"{fake.parent}:{os.environ['PATH']}",
        "CLUSTER": str(tmp_path),
        "HOME": str(tmp_path / "home"),
        "LC_ALL": "C.UTF-8",
    }

    def run(action: str, *options: str, arguments=None):
        command = ["bash", str(LAUNCH / "gke.sh"), action, *options]
        command += ["--", *arguments] if arguments else []
        kwargs = {"capture_output": True, "text": True, "timeout": 20, "env": environment}
        return subprocess.run(command, **kwargs)

    return tmp_path, run


def _calls(folder: pathlib.Path) -> list[str]:
    file = folder / "calls"
    return file.read_text().splitlines() if file.exists() else []


def _expanded(argument: str) -> str:
    """What Kubernetes makes of an argument, after its own rules: $$ is $, $(NAME) a variable."""
    return re.sub(r"\$\$|\$\((\w+)\)", lambda m: f"<{m[1]}>" if m[1] else "$", argument)


def _pod(rendered: str) -> dict:
    jobset = yaml.safe_load(rendered)
    (jobs,) = jobset["spec"]["replicatedJobs"]
    return jobs["template"]["spec"]["template"]["spec"]


def test_arguments_arrive_unharmed(cluster):
    _, run = cluster
    done = run("render", *OPTIONS, arguments=[*RUN, *HOSTILE])
    assert done.returncode == 0, done.stderr
    (container,) = _pod(done.stdout)["containers"]
    arguments = [_expanded(argument) for argument in container["args"]]
    assert arguments == [
        "--distributed=auto",
        "--compilation_cache=gs://bucket/run/compiled",
        *RUN,
        *HOSTILE,
    ]


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"),
    [("4x4", 4, 4), ("2x4", 8, 1), ("2x2x4", 4, 4), ("16x16", 4, 64)],
)
def test_every_host_of_the_slice_gets_a_pod(cluster, topology, chips, hosts):
    _, run = cluster
    options = [*OPTIONS, f"--topology={topology}", f"--chips={chips}"]
    rendered = run("render", *options, arguments=RUN).stdout
    jobset = yaml.safe_load(rendered)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == hosts
    pod = _pod(rendered)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert pod["containers"][0]["resources"] == {"limits": {"google.com/tpu": chips}}


def test_usage_errors_fail_at_once_and_the_rest_is_restarted(cluster):
    _, run = cluster
    jobset = yaml.safe_load(run("render", *OPTIONS, "--restarts=7", arguments=RUN).stdout)
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = {"containerName": "train", "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # such policies need it


def test_service_account_data_and_secret_are_named(cluster):
    _, run = cluster
    options = [*OPTIONS, "--service-account=trainer", "--data=gs://bucket/data"]
    pod = _pod(run("render", *options, arguments=RUN).stdout)
    assert pod["serviceAccountName"] == "trainer"
    (copies,) = pod["initContainers"]
    assert copies["env"] == [{"name": "DATA", "value": "gs://bucket/data"}]
    assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "a-run", "optional": True}}]


def test_up_creates_what_render_prints(cluster):
    folder, run = cluster
    done = run("up", *OPTIONS, "--context=there", arguments=[*RUN, *HOSTILE])
    assert done.returncode == 0, done.stderr
    file = folder / "home" / ".cache" / "xmc_jax" / "a-run" / "jobset.yaml"
    assert file.read_text() == run("render", *OPTIONS, arguments=[*RUN, *HOSTILE]).stdout
    assert _calls(folder) == [
        f"'--namespace=default' '--context=there' 'create' '--filename={file}' "
    ]


def test_secrets_go_by_file(cluster):
    folder, run = cluster
    secrets = folder / "my secrets"
    secrets.write_text("HF_TOKEN=sesame\n")
    secrets.chmod(0o600)
    done = run("up", *OPTIONS, f"--secrets={secrets}", arguments=RUN)
    dry = run("up", *OPTIONS, f"--secrets={secrets}", "--dry-run", arguments=RUN)
    assert done.returncode == 0 and len(_calls(folder)) == 3
    assert f"'--from-env-file={secrets}'" in _calls(folder)[1]
    shown = "".join([done.stdout, done.stderr, dry.stdout, dry.stderr, *_calls(folder)])
    written = (folder / "home" / ".cache" / "xmc_jax" / "a-run" / "jobset.yaml").read_text()
    assert "sesame" not in shown + written


def test_a_dry_run_prints_manifest_and_commands_and_does_nothing(cluster):
    folder, run = cluster
    done = run("up", *OPTIONS, "--dry-run", arguments=[*RUN, *HOSTILE])
    assert done.returncode == 0 and done.stderr == ""
    assert _calls(folder) == [] and not (folder / "home").exists()
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("#")] == ["mkdir", "timeout"]
    shown = "\n".join(line.removeprefix("#   ") for line in lines if line.startswith("#   "))
    assert shown + "\n" == run("render", *OPTIONS, arguments=[*RUN, *HOSTILE]).stdout


def test_status_logs_and_delete_ask_for_the_run(cluster):
    folder, run = cluster
    for action in ("status", "logs", "delete"):
        assert run(action, "--name=a-run").returncode == 0
    words = [call.split()[1:4] for call in _calls(folder)]
    assert [" ".join(w).replace("'", "") for w in words] == [
        "get jobset a-run",
        "get pods --selector=jobset.sigs.k8s.io/jobset-name=a-run",
        "logs --selector=jobset.sigs.k8s.io/jobset-name=a-run --container=train",
        "delete jobset a-run",
        "delete secret a-run",
    ]


def test_a_kubectl_that_fails_or_hangs_is_reported(cluster):
    folder, run = cluster
    (folder / "fail").write_text('Error from server (AlreadyExists): jobsets "a-run" exists\n')
    done = run("up", *OPTIONS, arguments=RUN)
    assert done.returncode == 4 and "AlreadyExists" in done.stderr
    assert done.stderr.splitlines()[-1] == "gke.sh: error: kubectl create failed; see above"
    (folder / "hang").touch()
    assert run("up", *OPTIONS, "--timeout=1", arguments=RUN).returncode == 4


def test_a_template_with_an_unknown_name_is_refused(cluster, tmp_path):
    _, run = cluster
    template = tmp_path / "mine.yaml"
    template.write_text("a: ${NAME}\nb: ${NO_SUCH}\n")
    done = run("render", *OPTIONS, f"--template={template}", arguments=RUN)
    assert done.returncode == 2 and "no value for NO_SUCH" in done.stderr


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--image=a b", "--image"),
        ("--chips=3", "not a multiple of --chips 3"),
        ("--name=A", "--name"),
        ("--service-account=a;b", "--service-account"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(cluster, option, said):
    folder, run = cluster
    done = run("up", *OPTIONS, option, arguments=RUN)
    assert done.returncode == 2 and said in done.stderr and _calls(folder) == []
    assert run("up", *OPTIONS, arguments=["--workdir=/local"]).returncode == 2


def test_control_characters_are_refused(cluster):
    _, run = cluster
    done = run("render", *OPTIONS, arguments=[*RUN, "--a=\x07"])
    assert done.returncode == 2 and "control character" in done.stderr
