"""Several real processes over 127.0.0.1: values, order, one end for all; one process for free."""

import signal
import socket

import processes
import pytest

from xmc_jax.runtime import distributed, peers, process_flags

# Of three processes the last has another config, and the last two share a host.
VALUES = """
own = jax.process_index()
out = {"first": distributed.is_first(), "devices": jax.device_count()}
out["gathered"] = distributed.gather("own", {"number": own, "pair": (1, 2)})
out["broadcast"] = distributed.broadcast("own", {"number": own})
try:
    distributed.agree("config", {"train": {"seed": 0, "epochs": 3 if own == 2 else 2}})
except ValueError as error:
    out["differ"] = str(error)
distributed.agree("data", "a digest")
try:
    distributed.barrier("left" if own else "right")
except ValueError as error:
    out["elsewhere"] = str(error)
distributed._host = lambda: "one" if own == 0 else "two"

def make():
    with open(sys.argv[1], "a") as file:
        file.write(f"{own}\\n")
    return own

out["made"] = distributed.first_then_others("folder", make)
out["stop"] = distributed.stop_requested()
out["decided"], decision = [], distributed.Decision("save")
for step in range(1, 17):
    distributed.barrier("step")  # as collectives do, keeps the processes together
    if decision.after(step, own == 0 and 5 <= step <= 8):
        out["decided"].append(step)

from xmc_jax.config import MeshConfig
from xmc_jax.runtime import sharding
mesh, compiled = sharding.make_mesh(MeshConfig()), []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
for number in range(3):
    rows = sharding.put_batch(np.full((2, 3), number, np.float32), 6, mesh)
    out["fetched"] = sharding.fetch(rows).tolist()
out["compiled"] = len(compiled)
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """What three processes say of `VALUES`, and the file they made."""
    made = tmp_path_factory.mktemp("distributed") / "made"
    done = processes.script(3, VALUES, str(made), devices=2)
    return [one.json() for one in done], made.read_text()


@pytest.mark.slow
def test_values_reach_all_processes(three):
    said, _ = three
    for own, one in enumerate(said):
        assert one["first"] == (own == 0)
        assert one["devices"] == 6
        assert one["gathered"] == [{"number": i, "pair": [1, 2]} for i in range(3)]
        assert one["broadcast"] == {"number": 0}
        assert one["made"] == own
        assert one["stop"] is False
        assert one["decided"] == [12]


@pytest.mark.slow
def test_what_is_fetched_again_is_not_compiled_again(three):
    for one in three[0]:
        assert one["fetched"] == [[2.0] * 3] * 6
        assert one["compiled"] == 1


@pytest.mark.slow
def test_who_differs_is_named_on_all_processes(three):
    said, _ = three
    for one in said:
        assert "config.train.epochs: 2 on process 0, but 3 on process 2 (" in one["differ"]
        assert "seed" not in one["differ"]
        assert "['right', 'left', 'left']" in one["elsewhere"]


@pytest.mark.slow
def test_process_0_then_one_of_each_host_then_the_others(three):
    _, order = three
    assert order.split() == ["0", "1", "2"]


def test_one_process_needs_nobody():
    assert distributed.is_first()
    assert distributed.gather("a", {"b": (1, 2)}) == [{"b": [1, 2]}]
    assert distributed.broadcast("a", 3) == 3
    assert distributed.first_then_others("a", lambda: 4) == 4
    assert not distributed.stop_requested()
    assert [distributed.Decision("a").after(1, wanted) for wanted in (False, True)] == [False, True]
    distributed.agree("a", "b")
    distributed.barrier("a")
    distributed.finish()
    distributed.fail("nothing is told, and this returns", 1)


@pytest.mark.parametrize(
    "given, said",
    [
        (("off", "a:1", 2, 0), "--coordinator_address: expected none with --distributed=off"),
        (("auto", "a:1", None, None), "expected --num_processes and --process_id with it"),
        (("auto", None, 2, 0), "--num_processes: expected --coordinator_address with it"),
        (("auto", "a", 2, 0), "--coordinator_address: expected HOST:PORT, got 'a'"),
        (("auto", "a:1", 0, 0), "--num_processes: expected at least 1, got 0"),
        (("auto", "a:1", 2, 2), "--process_id: expected 0 to 1, "),
    ],
)
def test_flags_that_contradict_each_other_are_named(given, said):
    with pytest.raises(ValueError, match=r"^--") as raised:
        process_flags.check(*given)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


ALONE = "from xmc_jax.runtime import distributed; distributed.initialize(); import jax; "
SLURM = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {f"SLURM_{name}": value for name, value in zip(SLURM, ("7", "nowhere", "1", "0", "0"))},
    ],
    ids=["plain", "kubernetes", "interactive slurm"],
)
def test_a_single_machine_is_one_process_without_waiting(environment):
    source = ALONE + "print(jax.distributed.is_initialized(), jax.process_count())"
    with processes.started(1, ["-c", source], environment=environment) as group:
        (done,) = group.wait(60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False 1\n", "")


@pytest.mark.slow
def test_slurm_tasks_find_each_other():
    job = processes.free_port() % 2**12
    source = ALONE + "print(jax.process_index(), jax.process_count()); distributed.finish()"
    words, told = [], dict(zip(SLURM, (str(job), "127.0.0.1", "2", "", "")))
    for own in "01":
        variables = {f"SLURM_{k}": v or own for k, v in told.items()}
        words.append(["-c", f"import os; os.environ.update({variables}); {source}"])
    with processes.started(2, words) as group:
        done = group.wait(60)
    assert [one.stdout for one in done] == ["0 2\n", "1 2\n"], done


@pytest.mark.slow
@pytest.mark.parametrize("own", [0, 1])
def test_processes_that_never_come_are_an_error_of_one_line(own, tmp_path):
    flags = (f"--workdir={tmp_path}", "--config=configs/vixml.py:tiny", "--distributed_timeout=3")
    words = processes.commanded(2, *flags)[own]
    with processes.started(1, words) as group:
        (done,) = group.wait(60)
    assert done.returncode == 1
    assert "error: distributed: expected all processes within 3 s" in done.stderr
    assert "Traceback" not in done.stderr


FAILS = """
if jax.process_index() == int(sys.argv[1]):
    raise ValueError("no such thing")
distributed.barrier("never")
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_the_failure_of_one_ends_all(failing):
    done = processes.script(2, FAILS, str(failing), check=False, timeout=60)
    assert [one.returncode for one in done] == [1, 1]
    assert "ValueError: no such thing" in done[failing].stderr
    other = done[1 - failing]
    assert f"error: ended with process {failing} (" in other.stderr
    assert "ValueError: no such thing" in other.stderr
    assert "Traceback" not in other.stderr
    assert other.seconds - done[failing].seconds < 5


KILLED = """
import os, signal
distributed.barrier("up")
if jax.process_index() == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
distributed.barrier("never")
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_all(killed):
    done = processes.script(2, KILLED, str(killed), check=False, timeout=60)
    other = done[1 - killed]
    assert other.returncode == peers.LOST
    assert other.seconds - done[killed].seconds < 12
    gone = f"error: process {killed} ({socket.gethostname()}) is gone: its connection is closed\n"
    assert other.stderr.endswith(gone)
    assert "trace" not in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 3), (3, 2)])
def test_another_number_of_processes_is_an_error(counts):
    source = (
        "import sys; from xmc_jax.runtime import distributed; "
        "distributed.initialize('auto', sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), timeout=5)"
    )
    address = f"127.0.0.1:{processes.free_port()}"
    words = [["-c", source, address, str(count), str(own)] for own, count in enumerate(counts)]
    with processes.started(2, words) as group:
        done = group.wait(60)
    assert all(one.returncode for one in done)
    said = "not all came" if counts == (3, 2) else "expected 2 as on process 0, got 3"
    assert said in done[1].stderr


STOPS = """
import os, signal
from xmc_jax.runtime import stopping
batch = 0
try:
    with stopping.Signals():
        while True:
            batch += 1
            if batch == 3 and jax.process_index() == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            distributed.barrier("batch")  # as collectives do, keeps the processes together
            stopping.check()
except stopping.Stopped as stopped:
    print(json.dumps([batch, stopped.signum]))
"""


@pytest.mark.slow
def test_sigterm_to_one_stops_all_after_the_same_batch():
    first, second = processes.script(2, STOPS, timeout=60)
    assert first.json() == second.json() >= [3, signal.SIGTERM]
