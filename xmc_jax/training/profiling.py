"""A trace of some steps of a run, which TensorBoard's profile plugin and XProf open."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from xmc_jax.files import atomic
from xmc_jax.runtime import distributed
from xmc_jax.runtime.wording import counted

FOLDER = "profile"
"""Name of the traces' folder in a workdir."""


class Profile:
    """Traces some steps of a run and writes the trace to `profile/` in its workdir.

    Only the first process writes a trace. A trace that is under way when the run ends is written,
    too.

    Args:
        steps: the first and the last step, both included, counted from 1; None for no trace.
        workdir: local or remote.
        step: steps that the run has behind it.
        total: steps of the whole run.

    Raises:
        ValueError: the run has no such steps.
    """

    def __init__(
        self, steps: tuple[int, int] | None, workdir: epath.PathLike, step: int, total: int
    ):
        self._folder = epath.Path(workdir) / FOLDER
        self._steps = range(0)
        self._open: contextlib.ExitStack | None = None
        if steps is None:
            return
        first, last = steps
        if last > total:
            raise ValueError(
                f"--profile: expected steps of the run, which has {counted(total, 'step')}, got "
                f"{first}:{last}"
            )
        if last <= step:
            logging.warning("--profile=%d:%d: no trace, as step %d is done", first, last, step)
        elif distributed.is_first():
            self._steps = range(max(first, step + 1), last + 1)

    def before(self, step: int, finish: Callable[[], None]) -> None:
        """Begins the trace if this step is its first.

        Args:
            step: about to be dispatched.
            finish: waits for the steps before it.
        """
        if self._open is None and step in self._steps:
            finish()
            self._open = contextlib.ExitStack()
            folder = self._open.enter_context(self._local())
            self._open.callback(jax.profiler.stop_trace)
            jax.profiler.start_trace(folder)

    def after(self, step: int, finish: Callable[[], None]) -> None:
        """Ends the trace if this step is its last.

        Args:
            step: dispatched.
            finish: waits for it.
        """
        if self._open is not None and step == self._steps[-1]:
            finish()
            self._write()

    @contextlib.contextmanager
    def _local(self):
        """A local folder for the trace, which is copied to a remote workdir."""
        if not atomic.is_remote(self._folder):
            yield str(self._folder)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield folder
            for path in pathlib.Path(folder).rglob("*"):
                if path.is_file():
                    target = self._folder / str(path.relative_to(folder))
                    atomic.write(target, path.read_bytes())

    def _write(self) -> None:
        opened, self._open, self._steps = self._open, None, range(0)
        opened.close()
        logging.info("wrote a trace to %s", self._folder)

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exc_info) -> None:
        if self._open is not None:
            self._write()
