"""Signals that end a run in an orderly way: noted when they come, looked at between batches."""

import signal

import jax

from xmc_jax.runtime import distributed


class Stopped(Exception):
    """A signal came, and the work under way is given up. `signum` is the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Signals:
    """Within it, SIGTERM and SIGINT are noted; a second one acts as usual.

    With several processes JAX notes SIGTERM, and they agree on where they stop.
    """

    def __init__(self):
        self._number: int | None = None
        alone = jax.process_count() == 1
        self._noted = (signal.SIGTERM, signal.SIGINT) if alone else ()

    def requested(self) -> int | None:
        """The number of the signal to stop for, from the call on at which it is first given.

        All processes get it at the same call, so each asks as often as the others.
        """
        if self._number is None and distributed.stop_requested():
            self._number = signal.SIGTERM
        return self._number

    def __enter__(self) -> "Signals":
        global _active
        self._previous = {number: signal.signal(number, self._note) for number in self._noted}
        self._outer, _active = _active, self
        return self

    def _note(self, number: int, _) -> None:
        self._number = number
        self._restore()

    def _restore(self) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def __exit__(self, *exc_info) -> None:
        global _active
        _active = self._outer
        self._restore()


_active: Signals | None = None


def check() -> None:
    """Ends long work here if a signal has come; does nothing outside of `Signals`.

    To be called between batches, by all processes equally often.

    Raises:
        Stopped: a signal has come.
    """
    if _active is not None and (number := _active.requested()):
        raise Stopped(number)
