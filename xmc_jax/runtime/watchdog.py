"""Ends a run that makes no headway, and writes the stack of each thread."""

import faulthandler
import os
import tempfile
import threading
import time

from etils import epath

from xmc_jax.files import atomic
from xmc_jax.runtime import distributed, metrics_log, peers

_SLOW = 8  # phases other than steps, and the first step, which is compiled, may take so much longer
_MULTIPLE = 4  # and a step so many times the slowest one
_WRITE = 10  # seconds that writing the stacks may take
_STEPS = ("step", "data_wait")


class Watchdog:
    """Within it, a run whose phases neither end nor begin for too long is ended, with its stacks.

    Time in which this process does not run, as when it is suspended, does not count. What it costs
    is a thread that wakes a few times within the limit.

    Args:
        limit: seconds that a step may take; four times the slowest step up to then, if that is
            more. Eight times as much for the first step of this process and for boundaries,
            evaluations, saves and the start. 0 is no limit.
        workdir: where stacks.PROCESS.txt goes.
    """

    def __init__(self, clock: metrics_log.Clock, limit: float, workdir: epath.PathLike):
        self._clock, self._limit = clock, limit
        self._path = epath.Path(workdir) / f"stacks.{distributed.number()}.txt"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def _watch(self) -> None:
        tick = min(self._limit / 8, 10)
        seen, phase, quiet, slowest, compiled = -1, "", 0.0, 0.0, False
        before = time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            passed, before = min(now - before, 2 * tick), now  # more, and we were suspended
            if self._clock.moves != seen or self._clock.phase != phase:
                if phase == "step" and compiled:
                    slowest = max(slowest, quiet)
                seen, phase, quiet = self._clock.moves, self._clock.phase, 0.0
                compiled = self._clock.steps > 0
                continue
            quiet += passed
            limit = max(self._limit, _MULTIPLE * slowest)
            if phase not in _STEPS or not compiled:
                limit *= _SLOW
            if quiet > limit:
                self._end(phase, quiet)

    def _end(self, phase: str, seconds: float) -> None:
        self.dump()
        said = f"stuck in {phase!r} for {seconds:.0f} s; where its threads stand: {self._path}"
        distributed.say_error(said)
        distributed.fail(said, peers.LOST)
        os._exit(peers.LOST)

    def dump(self) -> None:
        """Writes the stacks of all threads of this process."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        # In a thread: the file system may be what is stuck.
        writing = threading.Thread(target=atomic.write, args=(self._path, stacks), daemon=True)
        writing.start()
        writing.join(_WRITE)

    def __enter__(self) -> "Watchdog":
        if self._limit:
            distributed.when_stuck(self.dump)
            self._thread.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._over.set()
        distributed.when_stuck(None)
