"""Several processes as one run: their start, waiting, small values, and one end for all.

Values travel over the key-value store of JAX's coordinator, not over devices: a collective that one
process comes to late is an error on CPU after half a minute, and these may wait for hours. Every
process calls the functions here in the same order. With one process they are trivial and free.
"""

import collections
import contextlib
import itertools
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed as jax_distributed
from jax.experimental import multihost_utils

Result = TypeVar("Result")

# Seconds until a process that is gone without a word (SIGKILL, a host that fails) ends the others.
_HEARTBEAT_TIMEOUT = 60
_GOODBYE = 5  # seconds that process 0, which holds the store, waits for others to see a failure
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds
_COUNT = "xmc_jax/count"
_END = "xmc_jax/end"  # "" or what failed; written once
_calls = itertools.count()  # keys of the store are written once, so each call has a number


def initialize(
    mode: str = "auto",
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 300,
    preemption: bool = False,
) -> None:
    """Makes this process one of a run's; to be called before anything asks JAX for devices.

    From here on a failure of one process is the end of all, see `fail`.

    Args:
        mode: "auto" takes the three that follow or else lets JAX look for a cluster: TPU slices
            (also on GKE), SLURM and Open MPI, known by what they put into the environment. Without
            any this is one process, with nothing to wait for. "off" is one process anywhere.
        coordinator_address: host and port of process 0.
        num_processes: of the run.
        process_id: 0 to num_processes - 1.
        timeout: seconds until all processes must be there.
        preemption: SIGTERM is noted for `stop_requested` and ends nothing by itself.

    Raises:
        ValueError: the three contradict each other, or not all processes came.
    """
    check(mode, coordinator_address, num_processes, process_id)
    explicit = coordinator_address is not None
    if mode == "off" or num_processes == 1 or (not explicit and _is_lone_task()):
        return
    jax.config.update("jax_enable_preemption_service", preemption)
    flags = _flags(coordinator_address, num_processes, process_id)
    # JAX aborts with a stack trace when its own time is over, so it gets more.
    clock = threading.Timer(timeout, _give_up, (flags, timeout))
    clock.daemon = True
    clock.start()
    try:
        with warnings.catch_warnings():
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
        raise ValueError(f"distributed: {said[:300]} ({_shown(flags)})") from error
    finally:
        clock.cancel()
    if not _alone():
        sys.excepthook = _fail_by
        _watcher.start()
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
    found = json.loads(_wait_for(f"{key}/all"))
    names = [there for there, _ in found]
    if len(set(names)) > 1:
        raise ValueError(f"distributed: expected all processes at the same call, found {names}")
    return [value for _, value in found]


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    gather(name, None)


def broadcast(name: str, value: Any) -> Any:
    """The JSON value of process 0, on all; what the others give is not looked at."""
    return gather(name, value if is_first() else None)[0]


def agree(name: str, value: Any) -> None:
    """Checks that all processes have the same value.

    Args:
        name: what it is.
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
            shown = ", ".join(others[:3]) + ", ..." * (len(others) > 3)
            differ.append(f"{field}: {usual} on process {values.index(usual)}, but {shown}")
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
        name: what it makes.
        function: called once by every process.
    """
    if _alone():
        return function()
    hosts, own = gather(f"{name}: hosts", _host()), jax.process_index()
    leads = hosts.index(hosts[own]) == own
    turn = 0 if own == 0 else 1 if leads else 2
    for current in range(3):
        if turn == current:
            result = function()
        barrier(f"{name}: turn {current}")
    return result


def stop_requested(step: int) -> bool:
    """Whether a process got SIGTERM and all are to save after this step; the same on all processes.

    Always False with one process, where a signal handler is all it takes.

    Args:
        step: optimizer steps done, the same everywhere; to be asked after each.
    """
    return not _alone() and multihost_utils.reached_preemption_sync_point(step)


def finish() -> None:
    """Waits for all processes at the end of a run that went well, and says so to each."""
    if _alone():
        return
    barrier("end")
    if is_first():
        _store().key_value_set(_END, "")
    # A thread that comes back from C++ while Python shuts down aborts the process.
    _watcher.join()
    sys.excepthook = sys.__excepthook__


def fail(reason: str, code: int) -> None:
    """Ends this process and tells the others, which then end with 1; returns if it is alone.

    Leaving the usual way, JAX would wait for the others, which wait for this one.

    Args:
        reason: one line, for the others to show.
        code: exit code of this process, not 0.
    """
    if _alone():
        return
    text = f"{_self()}: {' '.join(reason.split())}"
    # Refused if another one was first, or the store is gone: all are ending already.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _store().key_value_set(_END, text)
    _leave(code)


def check(
    mode: str,
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> None:
    """Checks what `initialize` takes, without starting anything.

    Raises:
        ValueError: one contradicts another.
    """
    given = _flags(coordinator_address, num_processes, process_id)
    present = [flag for flag, value in given.items() if value is not None]
    if mode == "off" and present:
        raise ValueError(f"{present[0]}: expected none with --distributed=off, got one")
    if present and len(present) < len(given):
        missing = [flag for flag in given if flag not in present]
        raise ValueError(
            f"{present[0]}: expected {' and '.join(missing)} with it, or none of the three where "
            f"JAX finds the processes by itself"
        )
    if not present:
        return
    if not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator_address):
        raise ValueError(f"--coordinator_address: expected HOST:PORT, got {coordinator_address!r}")
    if num_processes < 1:
        raise ValueError(f"--num_processes: expected at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id: expected 0 to {num_processes - 1}, one less than --num_processes, got "
            f"{process_id}"
        )


def _check_count() -> None:
    """Raises a ValueError if process 0 counts otherwise: JAX would go on, and hang some time."""
    count = jax_distributed.global_state.num_processes
    if number() == 0:
        _store().key_value_set(_COUNT, str(count))
    elif (first := int(_wait_for(_COUNT))) != count:
        raise ValueError(f"--num_processes: expected {first} as on process 0, got {count}")


def _flags(address: str | None, count: int | None, own: int | None) -> dict[str, Any]:
    return {"--coordinator_address": address, "--num_processes": count, "--process_id": own}


def _is_lone_task() -> bool:
    """Whether SLURM started one task, as in an interactive job.

    JAX would make it one of one, and take all GPUs but the first from it.
    """
    return os.environ.get("SLURM_NTASKS") == "1" and "OMPI_MCA_orte_hnp_uri" not in os.environ


def _give_up(flags: Mapping[str, Any], timeout: int) -> None:
    """In a thread: ends a process that waits for others within JAX."""
    print(
        f"error: distributed: expected all processes within {timeout} s, not all came "
        f"({_shown(flags)}); see that every one runs and reaches the address of process 0",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)


def _shown(flags: Mapping[str, Any]) -> str:
    given = [f"{flag}={value}" for flag, value in flags.items() if value is not None]
    return " ".join(given) or "as JAX found them"


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


def _watch() -> None:
    """In a thread: ends this process when another one failed."""
    try:
        reason = _store().blocking_key_value_get(_END, _FOREVER)
    except jax.errors.JaxRuntimeError:
        return
    if reason and not reason.startswith(_self()):
        print(f"error: ended with {reason}", file=sys.stderr, flush=True)
        _leave(1)


_watcher = threading.Thread(target=_watch, name="end of the run", daemon=True)


def _self() -> str:
    return f"process {number()} ({socket.gethostname()})"


def _fail_by(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """`sys.excepthook` with several processes."""
    traceback.print_exception(kind, error, trace)
    fail(f"{kind.__name__}: {error}", 1)


def _leave(code: int) -> None:
    """Ends this process at once, process 0 when the others know."""
    try:
        if number():
            _store().key_value_set(f"{_END}/{number()}", "")
        else:
            until = time.monotonic() + _GOODBYE
            for other in range(1, jax_distributed.global_state.num_processes):
                left = max(until - time.monotonic(), 0)
                _store().blocking_key_value_get(f"{_END}/{other}", int(1000 * left))
            time.sleep(0.5)  # they are about to go
    except jax.errors.JaxRuntimeError:
        pass  # they are gone already
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
