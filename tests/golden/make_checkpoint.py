"""Writes checkpoints as a version of the code makes them: `python tests/golden/make_checkpoint.py`.

checkpoint/format<N>/: the workdir of one checkpoint, of step 7; N is 1 before digests, then what
`xmc_jax.training.proof.FORMAT` says. To be run once, with the code of that format; older ones stay.
"""

import pathlib
import shutil
import tempfile

import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent
STEP = 7
HISTORY = {"records": [{"step": 5, "loss": 0.25}], "pending": [{"loss": 0.125}]}
METRICS = {"P@1": 0.75}


def state() -> dict:
    """A state with the dtypes that training has, from plain arithmetic."""
    count = np.arange(48)
    return {
        "step": jnp.int32(STEP),
        "params": {"kernel": jnp.asarray(np.sin(count).reshape(6, 8), jnp.float32)},
        "opt_state": [{"mu": jnp.asarray(count / 8, jnp.bfloat16)}, {"nu": None}],
        "tables": {"leaf_order": jnp.asarray(count[::-1], jnp.int32), "seen": count % 3 == 0},
    }


def main() -> None:
    from xmc_jax.training import checkpoint

    try:
        from xmc_jax.training.proof import FORMAT
    except ImportError:
        FORMAT = 1
    target = HERE / "checkpoint" / f"format{FORMAT}"
    with tempfile.TemporaryDirectory() as folder:
        with checkpoint.Checkpoints(folder) as checkpoints:
            checkpoints.save(STEP, state(), HISTORY)
            checkpoints.add_evaluation(STEP, METRICS, HISTORY)
        shutil.copytree(folder, target)


if __name__ == "__main__":
    main()
