"""The command in several real processes: who prints, what must be the same, how it ends."""

import copy
import signal

import processes
import pytest


@pytest.fixture(scope="module")
def config(fields, tmp_path_factory) -> str:
    """--config of a run over the small dataset."""
    file = tmp_path_factory.mktemp("distributed main") / "config.py"
    fields = copy.deepcopy(fields) | {"name": "topics"}
    file.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict({fields!r})\n"
    )
    return f"--config={file}"


@pytest.mark.slow
def test_process_0_prints_and_the_others_log_with_their_number(config):
    first, second = processes.command(2, config, "--mode=prepare", timeout=100)
    assert "train" in first.stdout
    assert second.stdout == ""
    lines = [line for line in second.stderr.splitlines() if line]
    assert all(line.startswith("[process 1]") for line in lines), second.stderr


@pytest.mark.slow
def test_another_config_is_named_by_all(config, tmp_path):
    words = processes.commanded(2, config, f"--workdir={tmp_path}")
    words[1] += ["--config.train.seed=7"]
    with processes.started(2, words) as group:
        done = group.wait(100)
    for one in done:
        assert one.returncode == 1
        # Its own error, or that of the one that was first.
        assert "config: expected the same on all 2 processes" in one.stderr
        assert "config.train.seed: 0 on process 0, but 7 on process 1" in one.stderr
        assert "Traceback" not in one.stderr


# As a damaged folder on one host would.
BREAKS = """
import sys
from xmc_jax.training import build
from xmc_jax import main

def damaged(*_, **__):
    raise ValueError("data: this copy is damaged")

if "--process_id=1" in sys.argv:
    build.run = damaged
sys.argv[0] = "main.py"
main.run()
"""


@pytest.mark.slow
def test_an_error_of_one_ends_all_with_its_line(config, tmp_path):
    words = [
        ["-c", BREAKS, *one[2:]] for one in processes.commanded(2, config, f"--workdir={tmp_path}")
    ]
    with processes.started(2, words) as group:
        first, second = group.wait(100)
    assert (first.returncode, second.returncode) == (1, 1)
    assert second.stderr.splitlines()[-1] == "error: data: this copy is damaged"
    assert first.stderr.splitlines()[-1].startswith("error: ended with process 1 (")
    assert first.stderr.splitlines()[-1].endswith("): data: this copy is damaged")
    assert first.seconds - second.seconds < 5


@pytest.mark.reliability
def test_sigterm_ends_all_between_two_batches(config, tmp_path):
    """While the first tables are encoded, before there is a step to agree after."""
    words = processes.commanded(2, config, f"--workdir={tmp_path / 'run'}")
    where = "xmc_jax.training.run:Run.initial_state"
    words[1] = processes.struck(words[1], "SIGTERM", where, 1)
    with processes.started(2, words) as group:
        done = group.wait(100)
    for one in done:
        assert one.returncode == 128 + signal.SIGTERM, one.stderr[-2000:]
        assert "SIGTERM: nothing is saved before the first step" in one.stderr


@pytest.mark.slow
def test_half_the_flags_are_a_usage_error():
    words = ["-m", "xmc_jax.main", "--config=configs/vixml.py:tiny", "--num_processes=2"]
    with processes.started(1, words) as group:
        (done,) = group.wait(60)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --num_processes: expected --coordinator_address and --process_id with it, or none "
        "of the three where JAX finds the processes by itself\n"
    )
