"""Small checkpoints and ways to damage their files: `import damage` in any test."""

import logging
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from xmc_jax.training import checkpoint

HISTORY = {"records": [{"step": 0}], "pending": [], "seconds": {"step": 1.5}}


def state(step: int) -> dict:
    """Arrays as a training state has them, seeded by the step."""
    generator = np.random.default_rng(step)
    return {
        "step": jnp.int32(step),
        "tables": {"bank": jnp.asarray(generator.standard_normal((64, 16)), jnp.float32)},
        "moments": jnp.asarray(generator.standard_normal((32, 8)), jnp.bfloat16),
        "seen": jnp.asarray(generator.integers(0, 2, 50), bool),
    }


def abstract(tree, sharding=None):
    """ShapeDtypeStructs of a tree, on one device if no sharding is given."""
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def save(workdir: pathlib.Path, *steps: int, keep: int = 2) -> None:
    """Checkpoints of these steps, by a run that begins or goes on; later ones are better."""
    with checkpoint.Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), HISTORY)
            checkpoints.add_evaluation(step, {"P@1": step / 100}, HISTORY)


def newest(workdir: pathlib.Path, read_only: bool = True) -> int | None:
    """The step that is gone on from; its state must be the one saved, bit for bit."""
    with checkpoint.Checkpoints(workdir, read_only=read_only) as checkpoints:
        step = checkpoints.latest()
        if step is not None:
            assert_restored(checkpoints, step)
        return step


def assert_restored(checkpoints: checkpoint.Checkpoints, step: int, sharding=None) -> None:
    restored, history = checkpoints.restore(step, abstract(state(step), sharding))
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(state(step)), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    assert history == HISTORY


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    """All files under a folder, relative to it, sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(name): (folder / name).read_bytes() for name in files(folder)}


def flip(path: pathlib.Path, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: pathlib.Path) -> None:
    """Leaves the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def said(caplog) -> list[str]:
    """Warnings of the package since the last call, each of one line."""
    lines = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and "/xmc_jax/" in record.pathname
    ]
    caplog.clear()
    assert not any("\n" in line for line in lines)
    return lines
