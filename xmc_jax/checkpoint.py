"""Save and restore of the whole training state with Orbax; the config a workdir belongs to.

A checkpoint holds the state as a flat mapping from path to array, so that no Python type is stored,
and the run's metric records, so that a resumed run ends with the records of the straight one.
"""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

# Fields that may differ between the run that wrote a workdir and the one that goes on with it.
RESUMABLE = (
    "data.data_dir",
    "data.raw_dir",
    "data.records",  # what they are made to is compared by its digest
    "data.records_options",
    "eval",
    "export",
    "mesh",
    "train.checkpoint_every",
    "train.eval_every",
    "train.keep",
    "train.prefetch",
    "tune",
)
_CONFIG = "config.json"


class Checkpoints:
    """The checkpoints of one workdir: the latest ones and the best by P@1, written asynchronously.

    With several processes all of them call every method, in the same order: each writes and reads
    what its devices hold, the first one alone commits and deletes, and the rest waits for it.

    Args:
        workdir: a folder that all processes see, or gs://...
        keep: how many of the latest checkpoints stay, at least 2: while the newest is being written
            the one before it is the only whole one.
        read_only: leave the workdir as it is, for a run that may be in progress elsewhere.

    Raises:
        ValueError: `keep` is below 2, or checkpoints cannot be there.
    """

    def __init__(self, workdir: epath.PathLike, keep: int = 2, read_only: bool = False):
        if keep < 2:
            raise ValueError(f"train.keep: expected at least 2 checkpoints, got {keep}")
        policies = ocp.checkpoint_managers
        best = policies.BestN(get_metric_fn=_precision, n=1, keep_checkpoints_without_metrics=False)
        self._manager = ocp.CheckpointManager(
            _absolute(workdir) / "checkpoints",
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "history": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
                best_fn=_precision,  # without it, metrics are not stored
                single_host_load_and_broadcast=True,  # the same steps in every process
                cleanup_tmp_directories=not read_only,  # what a killed save left behind
                create=not read_only,
                read_only=read_only,
                enable_async_checkpointing=True,
            ),
        )

    def steps(self) -> Sequence[int]:
        """The steps there is a committed checkpoint of, ascending."""
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        step = self._manager.latest_step()  # of several processes, a NumPy number
        return None if step is None else int(step)

    def best(self) -> int | None:
        """The step with the highest P@1 among those kept, or None if none was evaluated."""
        self.wait()
        best = self._manager.best_step()
        return best if best is not None and self._manager.metrics(best) else None

    def save(
        self,
        step: int,
        state: Any,
        history: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing the state; returns once it is copied off the devices.

        Args:
            step: optimizer steps done. A checkpoint of this step that is there already is replaced:
                it is one that a signal asked for just before an epoch boundary.
            state: pytree of arrays.
            history: what `report.Reporter.history` gave; stored as JSON.
            metrics: evaluation metrics of this step, if it was evaluated; needs "P@1".
        """
        if step in self._manager.all_steps():
            self.wait()
            self._manager.delete(step)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_flatten(state)),
                history=ocp.args.JsonSave(dict(history)),
            ),
            metrics={} if metrics is None else {"P@1": metrics["P@1"]},
            force=True,
        )

    def restore(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint onto the devices, from any mesh onto any mesh.

        Args:
            step: one of `steps()`.
            abstract: pytree of ShapeDtypeStructs with shardings, of the state expected.

        Returns:
            The state and the history stored with it.

        Raises:
            ValueError: an array is missing, unknown, or has another shape or dtype.
        """
        expected = _flatten(abstract)
        stored = self._manager.item_metadata(step)["state"]
        problems = [
            f"{name}: expected {_describe(expected.get(name))}, got {_describe(stored.get(name))}"
            for name in sorted(expected.keys() | stored.keys())
            if _describe(expected.get(name)) != _describe(stored.get(name))
        ]
        if problems:
            raise ValueError(
                f"checkpoint {self._manager.directory}/{step}: does not hold the state of this "
                f"config: " + "; ".join(problems)
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(expected), history=ocp.args.JsonRestore()
            ),
        )
        leaves = [restored["state"][name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), restored["history"]

    def wait(self) -> None:
        """Waits until what is being written is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the writes and releases the threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


def _precision(metrics: Mapping[str, float]) -> float:
    """P@1, lowest where a checkpoint was not evaluated."""
    return metrics.get("P@1", -math.inf)


def check_config(workdir: epath.PathLike, config: Mapping[str, Any], new: bool = True) -> None:
    """Compares a workdir's config with this run's; writes nothing.

    A workdir without a checkpoint takes any config: nothing has been made with the one before.

    Args:
        workdir: see `Checkpoints`.
        config: nested mapping of JSON values.
        new: whether the workdir may be a new one.

    Raises:
        ValueError: a field differs that may not (see `RESUMABLE`; `train.epochs` may grow), there
            is no config where there should be, or a run cannot be there.
    """
    workdir = _absolute(workdir)
    if new and not ocp.utils.checkpoint_steps(workdir / "checkpoints"):
        return
    config = json.loads(json.dumps(config))  # tuples are lists there
    then, now = flat(read_config(workdir)), flat(config)
    differ = [
        f"{name}: {then.get(name)!r} there, {now.get(name)!r} here"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and not _may_differ(name, then, now)
    ]
    if differ:
        raise ValueError(
            f"{workdir / _CONFIG}: this workdir was made by another config ({'; '.join(differ)}); "
            f"choose another --workdir or give the same config"
        )


def write_config(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Makes a config the workdir's; the first process writes it, others do nothing.

    Several processes need a barrier before, so that all have compared, and one behind; those that
    then find no config do not see the first one's workdir.

    Args:
        workdir: see `Checkpoints`.
        config: see `check_config`, which comes first.
    """
    if jax.process_index() == 0:
        path = epath.Path(workdir) / _CONFIG
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def _absolute(workdir: epath.PathLike) -> epath.Path:
    """The path of a workdir from any working directory, as Orbax wants it.

    Raises:
        ValueError: Orbax cannot write there, the client would take the name for a pattern, or it is
            not installed.
    """
    workdir = epath.Path(workdir)
    scheme, remote, name = str(workdir).partition("://")
    if not remote:
        return workdir.resolve()  # of gs://... it would make a relative path
    if scheme != "gs":
        raise ValueError(f"{workdir}: expected a folder or gs://bucket/..., got {scheme}://")
    if set(name) & set("*?[]"):
        raise ValueError(f"{workdir}: expected a name without any of * ? [ ] on gs://")
    if importlib.util.find_spec("gcsfs") is None:
        raise ValueError(
            f"{workdir}: expected the package gcsfs, found none; pip install 'xmc_jax[gcs]'"
        )
    return workdir


def _may_differ(name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if name == "train.epochs":
        return now[name] > then[name]
    return any(name == field or name.startswith(field + ".") for field in RESUMABLE)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The config a workdir was made with.

    Raises:
        ValueError: there is none, it is not JSON, or a run cannot be there.
    """
    path = _absolute(workdir) / _CONFIG
    if not path.exists():
        raise ValueError(f"{path}: expected the config of a run, found no such file")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of nested mappings by their dotted names."""
    fields = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            fields |= flat(value, f"{prefix}{name}.")
        else:
            fields[prefix + name] = value
    return fields


def _flatten(tree: Any) -> dict[str, Any]:
    """{path: leaf}; None is an empty subtree, so absent tables leave no trace."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _describe(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"
