"""Save and restore of the whole training state with Orbax; which checkpoints are whole.

A checkpoint holds the state as a flat mapping from path to array, so that no Python type is stored,
the run's metric records, so that a resumed run ends with the records of the straight one, and the
digests of its files, see `proof`.
"""

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from xmc_jax.files import atomic, workdirs
from xmc_jax.runtime import distributed
from xmc_jax.training import proof

# Seconds that processes wait for the first one, which reads what it hashes before the commit.
_TIMEOUT = 3600


class Checkpoints:
    """The checkpoints of one workdir: the latest ones and the best by P@1, written asynchronously.

    With several processes all of them call every method, in the same order: each writes and reads
    what its devices hold, the first one alone commits and deletes, and the rest waits for it.

    A run that goes on compares all checkpoints with their digests first and moves those that are
    not whole out of the way: to <step>.damaged, or on gs://, where nothing can be renamed, away.

    Args:
        workdir: a folder that all processes see, or gs://...
        keep: how many of the latest checkpoints stay, at least 2: while the newest is being written
            the one before it is the only whole one.
        read_only: leave the workdir as it is, for a run that may be in progress elsewhere; a
            checkpoint is compared with its digests when it is asked for.
        hashed: False for who only wants a step's number: of files, sizes alone are compared.

    Raises:
        ValueError: `keep` is below 2, checkpoints cannot be there, or there are some and none is
            whole.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        keep: int = 2,
        read_only: bool = False,
        hashed: bool = True,
    ):
        if keep < 2:
            raise ValueError(f"train.keep: expected at least 2 checkpoints, got {keep}")
        workdir = workdirs.absolute(workdir)
        self._folder, self._read_only, self._hashed = workdir / "checkpoints", read_only, hashed
        self._findings: dict[int, proof.Finding] = {}
        self._precision: dict[int, float | None] = {}  # P@1 by step, as far as it is known
        self._pending: int | None = None  # the step that is being written
        if not read_only and distributed.is_first():
            _recover(self._folder)
        self._listed = distributed.broadcast("checkpoints", workdirs.steps(workdir))
        if not read_only:
            self._clear(workdirs.strays(workdir))
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "history": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_LatestAndBest(keep, self._best_of),
                single_host_load_and_broadcast=True,  # the same steps in every process
                cleanup_tmp_directories=not read_only,  # what a killed save left behind
                create=not read_only,
                read_only=read_only,
                lightweight_initialize=read_only,  # reads nothing that may be damaged
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(
                    timeout_secs=_TIMEOUT,
                    post_finalization_callback=self._prove,
                    # Otherwise a folder that cannot be made is noticed after five minutes.
                    create_directories_asynchronously=False,
                ),
            ),
        )

    def steps(self) -> list[int]:
        """The steps there is a committed checkpoint of, ascending; of a run that goes on, whole."""
        # Of several processes, the manager's are NumPy numbers.
        return self._listed if self._read_only else sorted(map(int, self._manager.all_steps()))

    def latest(self) -> int | None:
        """The newest step whose checkpoint is whole, or None where there is no checkpoint.

        Raises:
            ValueError: there are checkpoints and none is whole.
        """
        steps = self.steps()
        if not self._read_only:
            return steps[-1] if steps else None
        for step in reversed(steps):
            if self._is_usable(step):
                return step
        self._check_some(steps)
        return None

    def best(self) -> int | None:
        """The whole step with the highest P@1 among those kept, or None if none was evaluated."""
        steps = self.steps()
        if self._read_only:
            steps = [step for step in steps if self._is_usable(step)]
        return self._best_of(steps)

    def _best_of(self, steps: Sequence[int]) -> int | None:
        evaluated = {step: x for step in steps if (x := self.precision(step)) is not None}
        return max(evaluated, key=lambda step: (evaluated[step], step), default=None)

    def precision(self, step: int) -> float | None:
        """P@1 of a checkpoint, the same in all processes; None if it was not evaluated.

        Args:
            step: one of `steps()`, whole.
        """
        if step not in self._precision:
            precision = None
            if distributed.is_first():
                evaluation = proof.read_evaluation(self._folder / str(step))
                precision = evaluation and evaluation["metrics"].get("P@1")
            self._precision[step] = distributed.broadcast(f"evaluation {step}", precision)
        return self._precision[step]

    def save(self, step: int, state: Any, history: Mapping[str, Any]) -> None:
        """Starts writing the state; returns once it is copied off the devices.

        Args:
            step: optimizer steps done. A checkpoint of this step that exists already is replaced:
                a signal asked for it just before an epoch boundary. In a local workdir it is set
                aside, and removed when the new one is whole.
            state: pytree of arrays.
            history: what `metrics_log.Reporter.history` gave; stored as JSON.

        Raises:
            OSError: this checkpoint or the one before it could not be written; in one line.
        """
        self.wait()
        self._pending = step
        self._findings.pop(step, None)
        self._precision[step] = None
        with self._writing(step):
            if step in self._manager.all_steps():
                if distributed.is_first() and not atomic.is_remote(self._folder):
                    atomic.set_aside(pathlib.Path(self._folder / str(step)))
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_flatten(state)),
                    history=ocp.args.JsonSave(dict(history)),
                ),
                custom_metadata=proof.MARK,
                force=True,
            )

    def add_evaluation(
        self, step: int, metrics: Mapping[str, float], history: Mapping[str, Any]
    ) -> None:
        """Adds what an evaluation found to a checkpoint, once that is written.

        Args:
            step: of a state that was saved.
            metrics: of the evaluation; "P@1" decides which checkpoint is the best.
            history: what `metrics_log.Reporter.history` gives after the evaluation.

        Raises:
            OSError: the checkpoint, or this, could not be written; in one line.
        """
        self.wait()
        with self._writing(step):
            if distributed.is_first():
                proof.write_evaluation(self._folder / str(step), metrics, history)
        self._precision[step] = metrics["P@1"]

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices, from any mesh onto any mesh.

        Args:
            step: one of `steps()`.
            abstract: pytree of ShapeDtypeStructs with shardings, of the state expected.

        Returns:
            The state and the history stored with it, that of its evaluation included.

        Raises:
            ValueError: it is not whole, or an array is missing, unknown, or has another shape or
                dtype.
        """
        expected = _flatten(abstract)
        with self._reading(step):
            stored = self._manager.item_metadata(step)["state"]
        problems = [
            f"{name}: expected {_describe(expected.get(name))}, got {_describe(stored.get(name))}"
            for name in sorted(expected.keys() | stored.keys())
            if _describe(expected.get(name)) != _describe(stored.get(name))
        ]
        if problems:
            raise ValueError(
                f"checkpoint {self._folder}/{step}: does not hold the state of this config: "
                + "; ".join(problems)
            )
        with self._reading(step):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(expected), history=ocp.args.JsonRestore()
                ),
            )
            leaves = [restored["state"][name] for name in expected]
            evaluation = proof.read_evaluation(self._folder / str(step)) or {}
        history = evaluation.get("history") or restored["history"]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), history

    def arrays(self, step: int) -> Iterator[tuple[str, np.ndarray]]:
        """The name and the values of each array of a checkpoint's state, one at a time.

        Args:
            step: one of `steps()`.

        Raises:
            ValueError: it is not whole.
        """
        folder = self._folder / str(step) / "state"
        with self._reading(step):
            names = sorted(self._manager.item_metadata(step)["state"])
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                for name in names:
                    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray)}
                    wanted = ocp.args.PyTreeRestore(
                        item={name: 0}, restore_args=as_numpy, partial_restore=True
                    )
                    yield name, reader.restore(folder, args=wanted)[name]

    def finding(self, step: int) -> proof.Finding:
        """What is known of a checkpoint; its files are read the first time.

        Args:
            step: one of `steps()`.

        Raises:
            OSError: a file cannot be read for a reason that says nothing about what is in it.
        """
        if step not in self._findings:
            folder = self._folder / str(step)
            local = proof.examine(
                folder, step, jax.process_index(), jax.process_count(), self._hashed
            )
            everyone = distributed.gather(f"checkpoint {step}", [local.kind, local.reason])
            worst = next((x for x in everyone if x[0] != "whole"), everyone[0])
            self._findings[step] = proof.Finding(*worst)
        return self._findings[step]

    def wait(self) -> None:
        """Waits until what is being written is committed.

        Raises:
            OSError: it could not be written; in one line.
        """
        step = self._pending
        with self._writing(step):
            self._manager.wait_until_finished()
            if step is not None and distributed.is_first():
                proof.seal(self._folder / str(step))
                _drop_set_aside(self._folder / str(step))
        self._pending = None

    def close(self) -> None:
        """Waits for the writes and releases the threads.

        Raises:
            OSError: what was being written could not be; in one line.
        """
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _prove(self) -> None:
        """In Orbax's thread, on the first process: all files are there, and not committed yet."""
        step = self._pending
        partial = f"{step}{ocp.utils.TMP_DIR_SUFFIX}"
        folders = [path for path in self._folder.iterdir() if path.name.startswith(partial)]
        proof.write(folders[0] if folders else self._folder / str(step), step)

    def _clear(self, strays: list[epath.Path]) -> None:
        """Moves what is not whole out of the way of a run that goes on."""
        usable = [step for step in self._listed if self._is_usable(step)]
        if not usable:
            self._check_some(self._listed)
        distributed.barrier("checkpoints compared")
        if distributed.is_first():
            for path in strays:
                logging.warning("%s: an empty folder named as a checkpoint; removed", path)
                path.rmtree()
            for step in set(self._listed) - set(usable):
                _move_away(self._folder / str(step))
        distributed.barrier("checkpoints cleared")
        self._listed = usable
        for step in usable:  # so that what Orbax asks for later waits for no other process
            self.precision(step)

    def _is_usable(self, step: int) -> bool:
        """Whether a checkpoint may be read; says so in one line if it is not known to be whole."""
        known = step in self._findings
        finding = self.finding(step)
        if finding.kind == "newer":
            raise ValueError(f"checkpoint {self._folder}/{step}: {finding.reason}")
        usable = finding.kind in ("whole", "unproven")
        if finding.reason and not known and distributed.is_first():
            action = "read as it is" if usable else "skipped"
            logging.warning("checkpoint %s/%d: %s: %s", self._folder, step, action, finding.reason)
        return usable

    def _check_some(self, steps: list[int]) -> None:
        """Raises a ValueError if there are checkpoints, none of which is whole."""
        if steps:
            raise ValueError(
                f"{self._folder}: expected a checkpoint that is whole, found none among "
                f"{steps} (of step {steps[-1]}, {self._findings[steps[-1]].reason}); put back a "
                "copy, or remove the folder to start anew"
            )

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Within it a checkpoint is read; if it may be damaged, errors are said in one line."""
        finding = proof.Finding("whole")  # as all are that this run has written
        if self._read_only or step in self._findings:
            finding = self.finding(step)
        if finding.kind not in ("whole", "unproven"):
            raise ValueError(
                f"checkpoint {self._folder}/{step}: expected a whole one, found {finding.kind}: "
                f"{finding.reason}; ask for another of {self.steps()}"
            )
        try:
            yield
        except Exception as error:
            if finding.kind == "whole":
                raise
            raise ValueError(
                f"checkpoint {self._folder}/{step}: expected one that can be read, found "
                f"{_one_line(error)} ({finding.reason})"
            ) from error

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        """Within it, whatever the disk or the store refuses is an OSError of one line."""
        try:
            yield
        except Exception as error:
            self._pending = None
            raise OSError(
                f"checkpoint {self._folder}/{step}: could not be written: {_one_line(error)}; "
                "those before it are kept: run the same command again to go on from the newest"
            ) from error


def _recover(folder: epath.Path) -> None:
    """Gives a checkpoint its name back that was to be replaced by one that is not there or whole.

    Args:
        folder: of all checkpoints.
    """
    if atomic.is_remote(folder):
        return
    for old in pathlib.Path(folder).glob(".*.old"):
        step = old.name.removeprefix(".").removesuffix(".old")
        if not step.isdecimal():
            continue
        target = folder / step
        if target.exists() and proof.examine(target, int(step)).kind == "damaged":
            _move_away(target)
        if target.exists():
            _drop_set_aside(target)
        else:
            atomic.recover_folder(pathlib.Path(target))


def _drop_set_aside(folder: epath.Path) -> None:
    if not atomic.is_remote(folder):
        shutil.rmtree(atomic.set_aside_path(pathlib.Path(folder)), ignore_errors=True)


def _move_away(folder: epath.Path) -> None:
    if atomic.is_remote(folder):
        (folder / "commit_success.txt").unlink()  # Orbax clears away what was never committed
        return
    source = pathlib.Path(folder)
    atomic.move_folder(source, source.with_name(f"{source.name}.damaged"))


def _one_line(error: Exception) -> str:
    text = " ".join(f"{error}".split()) or type(error).__name__
    return text if len(text) < 300 else f"{text[:80]} ... {text[-200:]}"  # the reason comes last


class _LatestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the latest checkpoints, and the best one.

    Args:
        latest: how many.
        best: gives the best of some steps, None if none was evaluated.
    """

    def __init__(self, latest: int, best: Callable[[Sequence[int]], int | None]):
        self._latest, self._best = latest, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        del context
        steps = [int(one.step) for one in checkpoints]
        kept = {*sorted(steps)[-self._latest :], self._best(steps)}
        return [step in kept for step in steps]


def _flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}; None is an empty subtree, so absent tables leave no trace."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
