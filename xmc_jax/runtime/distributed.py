"""Several processes as one run: their start, waiting, small values, and one end for all.

Values travel over the key-value store of JAX's coordinator, not over devices: a collective that one
process comes to late is an error on CPU after half a minute, and these may wait for hours. Every
process calls the functions here in the same order. With one process they are trivial and free.

Who is gone, and how the run ended, travels over connections of our own (`peers`): JAX notices a
lost process late, and says so with a stack trace.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

from xmc_jax.runtime import peers, process_flags, relay

Result = TypeVar("Result")

# Seconds without a heartbeat of JAX's own: `peers` sees who is gone, and who is stuck is not.
_HEARTBEAT_TIMEOUT = 24 * 3600
# Seconds that an error of JAX waits to be said, as it may be the consequence of a lost process.
_GRACE = 3
# Steps from a decision to what follows from it; more than hosts are apart.
_STEPS_AHEAD = 4
_COUNT, _PEERS = "xmc_jax/count", "xmc_jax/peers"  # keys of the store
_calls = itertools.count()  # keys of the store are written once, so each call has a number
_requests = itertools.count(1)  # calls of `stop_requested`


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    peer_timeout: int = 10,
    preemption: bool = False,
) -> None:
    """Makes this process one of a run's; to be called before anything asks JAX for devices.

    From here on a failure of one process is the end of all, see `fail`.

    Args:
        mode: "auto" takes the three that follow or else lets JAX look for a cluster: TPU slices
            (also on GKE), SLURM and Open MPI, known by what they put into the environment. Without
            any this is one process, with nothing to wait for. "off" is one process anywhere.
        coordinator_address: host and port of process 0.
        process_id: 0 to num_processes - 1.
        timeout: seconds until all processes must be there.
        peer_timeout: seconds after which a host that no longer answers has failed, and all end; a
            process that is killed is missed at once, one that is busy or suspended never.
        preemption: SIGTERM is noted for `stop_requested` and ends nothing by itself.

    Raises:
        ValueError: the three contradict each other, or not all processes came.
    """
    process_flags.check(mode, coordinator_address, num_processes, process_id)
    explicit = coordinator_address is not None
    if mode == "off" or num_processes == 1 or (not explicit and process_flags.is_lone_task()):
        return
    jax.config.update("jax_enable_preemption_service", preemption)
    flags = process_flags.flags_of(coordinator_address, num_processes, process_id)
    # JAX aborts with a stack trace when its own time is over, so it gets more.
    clock = threading.Timer(timeout, _give_up, (flags, timeout))
    clock.daemon = True
    clock.start()
    try:
        with warnings.catch_warnings(), _relayed():
            # JAX says that it could ask Kubernetes if it had a package for it.
            warnings.filterwarnings("ignore", "Kubernetes environment detected")
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                cluster_detection_method="deactivate" if explicit else None,
                initialization_timeout=timeout + 60,
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
    except (ValueError, RuntimeError) as error:
        if str(error).startswith("coordinator_address should be defined"):
            return  # no cluster
        said = " ".join(str(error).split())
        raise ValueError(f"distributed: {said[:300]} ({process_flags.described(flags)})") from error
    finally:
        clock.cancel()
    if not _alone():
        sys.excepthook = _fail_by
        _meet(peer_timeout, timeout)
        _check_count()


def is_first() -> bool:
    """Whether this is process 0, the one that reports."""
    return _alone() or jax.process_index() == 0


def number() -> int:
    """This process's number, for messages; unlike `is_first` it waits for no devices."""
    return jax_distributed.global_state.process_id


def gather(name: str, value: Any) -> list[Any]:
    """The JSON values of all processes, in their order; each waits for all.

    Raises:
        ValueError: the processes are not at the same call.
    """
    text = json.dumps([name, value])
    if _alone():
        return [json.loads(text)[1]]
    key = f"xmc_jax/{next(_calls)}"
    _store().key_value_set(f"{key}/{jax.process_index()}", text)
    if is_first():
        texts = [_wait_for(f"{key}/{i}") for i in range(jax.process_count())]
        _store().key_value_set(f"{key}/all", f"[{','.join(texts)}]")
    everyone = json.loads(_wait_for(f"{key}/all"))
    names = [there for there, _ in everyone]
    if len(set(names)) > 1:
        raise ValueError(f"distributed: expected all processes at the same call, found {names}")
    return [value for _, value in everyone]


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    gather(name, None)


def broadcast(name: str, value: Any) -> Any:
    """The JSON value of process 0, on all; what the others give is not looked at."""
    return gather(name, value if is_first() else None)[0]


def agree(name: str, value: Any) -> None:
    """Checks that all processes have the same value.

    Args:
        value: any JSON value, e.g. a digest; of mappings the fields are compared.

    Raises:
        ValueError: on every process, naming the fields and the processes that differ.
    """
    if _alone():
        return
    everywhere = gather(name, {"host": socket.gethostname(), "fields": _fields(name, value)})
    differ = []
    for field in sorted(set().union(*(one["fields"] for one in everywhere))):
        values = [json.dumps(one["fields"].get(field)) for one in everywhere]
        usual = collections.Counter(values).most_common(1)[0][0]
        others = [
            f"{value} on process {i} ({everywhere[i]['host']})"
            for i, value in enumerate(values)
            if value != usual
        ]
        if others:
            listed = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            differ.append(f"{field}: {usual} on process {values.index(usual)}, but {listed}")
    if differ:
        raise ValueError(
            f"{name}: expected the same on all {len(everywhere)} processes, got "
            + "; ".join(differ[:5])
            + "; ..." * (len(differ) > 5)
        )


def first_then_others(name: str, function: Callable[[], Result]) -> Result:
    """Calls a function that makes files on this host the first time and finds them afterwards.

    Process 0 comes first, since hosts may share a file system; then one process of each other host,
    since they may not; then the rest.

    Args:
        function: called once by every process.
    """
    if _alone():
        return function()
    hosts, number_here = gather(f"{name}: hosts", _host()), jax.process_index()
    leads = hosts.index(hosts[number_here]) == number_here
    turn = 0 if number_here == 0 else 1 if leads else 2
    for current in range(3):
        if turn == current:
            result = function()
        barrier(f"{name}: turn {current}")
    return result


def stop_requested() -> bool:
    """Whether a process got SIGTERM and all are to stop; True at the same call on all processes.

    Every process calls it equally often; it is True once. Always False with one process, where a
    signal handler is all it takes.
    """
    return not _alone() and multihost_utils.reached_preemption_sync_point(next(_requests))


class Decision:
    """What process 0 decides by its clock, and all processes do after the same step.

    Process 0 names the step some steps ahead, in the store. The others look there, and find it:
    they are never more steps ahead of process 0 than the loop lets hosts be ahead of devices, as
    each step takes the devices of all processes. With one process a decision holds at once.
    """

    def __init__(self, name: str):
        self._key = f"xmc_jax/{next(_calls)}/{name}"

    def after(self, step: int, wanted: bool) -> bool:
        """Whether it is done after this step; the same on all processes.

        Args:
            step: optimizer steps done; to be asked after each.
            wanted: what process 0 decides; not looked at on the others.
        """
        if _alone():
            return wanted
        if step % _STEPS_AHEAD:
            return False
        if is_first() and wanted:
            _store().key_value_set(f"{self._key}/{step + _STEPS_AHEAD}", "")
        try:
            _store().key_value_try_get(f"{self._key}/{step}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return False
        return True


def finish() -> None:
    """Waits for all processes at the end of a run that went well, and says so to each."""
    if _alone():
        return
    barrier("end")
    jax.distributed.shutdown()  # waits for all once more; who is lost meanwhile is still missed
    _link.say("")
    sys.excepthook = sys.__excepthook__


def fail(reason: str, code: int) -> None:
    """Ends this process and tells the others, which then end, too; returns if it is alone.

    Leaving the usual way, JAX would wait for the others, which wait for this one.

    Args:
        reason: one line, for the others to show.
        code: exit code of this process, not 0; the others end with 1, or `peers.LOST` as this one.
    """
    if _alone():
        return
    if _link is not None:
        line = f"ended with process {_self()}: {' '.join(reason.split())}"
        _link.say(line, code if code == peers.LOST else 1)
    _leave(code)


def _check_count() -> None:
    """Raises a ValueError if process 0 counts otherwise: JAX would go on, and hang some time."""
    count = jax_distributed.global_state.num_processes
    if number() == 0:
        _store().key_value_set(_COUNT, str(count))
    elif (first := int(_wait_for(_COUNT))) != count:
        raise ValueError(f"--num_processes: expected {first} as on process 0, got {count}")


def _give_up(flags: Mapping[str, Any], timeout: int) -> None:
    """In a thread: ends a process that waits for others within JAX."""
    print(
        f"error: distributed: expected all processes within {timeout} s, not all came "
        f"({process_flags.described(flags)}); see that every one runs and reaches the address of "
        "process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _fields(name: str, value: Any) -> dict[str, Any]:
    """{dotted name: value} of nested mappings."""
    if not isinstance(value, Mapping):
        return {name: value}
    fields = {}
    for key, inner in value.items():
        fields |= _fields(f"{name}.{key}", inner)
    return fields


def _host() -> str:
    """What processes with the same files have in common: name and boot of a machine."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"


def _alone() -> bool:
    return _store() is None or jax_distributed.global_state.num_processes == 1


def _store() -> Any:
    """The coordinator's key-value store; JAX has no public name for it, Orbax takes it here too."""
    return jax_distributed.global_state.client


def _wait_for(key: str) -> str:
    """The value of a key, once it is there. In slices, so that Python sees signals."""
    while True:
        try:
            return _store().blocking_key_value_get(key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


@contextlib.contextmanager
def _relayed() -> Iterator[None]:
    """Within it, JAX's client is made to connect by `relay`, but for process 0's own."""
    library = jax_distributed._jax
    make = library.get_distributed_runtime_client

    def by_relay(address: str, process: int, **options: Any) -> Any:
        return make(address if process == 0 else _start_relay(address), process, **options)

    library.get_distributed_runtime_client = by_relay
    try:
        yield
    finally:
        library.get_distributed_runtime_client = make


def _start_relay(address: str) -> str:
    """The address to connect to instead; the relay ends with this process."""
    global _relay
    _relay = subprocess.Popen(
        [sys.executable, "-I", "-S", relay.__file__, *_host_and_port(address)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # no signal of a terminal or to our group is for it
    )
    return f"127.0.0.1:{int(_relay.stdout.readline())}"


_relay: subprocess.Popen | None = None  # held: its standard input is open as long as we live
_link: peers.Hub | peers.Spoke | None = None


def _meet(silence: int, timeout: int) -> None:
    """Connects process 0 with each of the others."""
    global _link
    if number() == 0:
        _link = peers.Hub(jax_distributed.global_state.num_processes, silence, _told)
        _store().key_value_set(_PEERS, _link.address)
        if missing := _link.wait(timeout):
            raise ValueError(
                f"distributed: expected all processes to connect to process 0 within {timeout} s, "
                f"{', '.join(map(str, missing))} did not; let hosts reach each other's ports"
            )
        return
    address = _wait_for(_PEERS)
    host, _ = _host_and_port(jax_distributed.global_state.coordinator_address)
    try:
        _link = peers.Spoke(host, address, number(), silence, _told, timeout)
    except OSError as error:
        raise ValueError(
            f"distributed: expected process 0 at {host}:{address.split()[0]}, got {error}; let "
            "hosts reach each other's ports"
        ) from None


def _host_and_port(address: str) -> tuple[str, str]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), port


def _told(line: str, code: int) -> None:
    """In a thread: ends this process when another one failed or is gone."""
    if code == peers.LOST and line.startswith("ended with") and _dump is not None:
        _dump()
    say_error(line)
    _leave(code)


def say_error(line: str) -> None:
    """Prints the last line of a process that ends while its main thread is somewhere else."""
    start = "\n" if number() == 0 else ""  # a progress bar may stand there
    print(f"{start}error: {line}", file=sys.stderr, flush=True)


def when_stuck(dump: Callable[[], Any] | None) -> None:
    """Sets what is called before this process ends because another one found itself stuck."""
    global _dump
    _dump = dump


_dump: Callable[[], Any] | None = None


def _self() -> str:
    return f"{number()} ({socket.gethostname()})"


def _fail_by(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """`sys.excepthook` with several processes."""
    if _is_of_jax(error):
        time.sleep(_GRACE)  # if a process is lost, this one ends meanwhile, and says so
    traceback.print_exception(kind, error, trace)
    fail(f"{kind.__name__}: {error}", 1)


def _is_of_jax(error: BaseException | None) -> bool:
    """Whether JAX raised it, or what it was raised from."""
    while error is not None and not isinstance(error, jax.errors.JaxRuntimeError):
        error = error.__cause__ or error.__context__
    return error is not None


def _leave(code: int) -> None:
    """Ends this process at once."""
    with contextlib.suppress(ValueError, OSError):  # a closed stream, or nobody to read it
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
