"""Whether a run against all labels has the memory that it cannot do without, before it starts."""

import math
import os
from typing import Any

import jax

from xmc_jax.runtime import sharding
from xmc_jax.training.program import Program

# Arrays as large as the label bank that a step holds in float32: unit texts and prototypes of all
# labels, and the gradient of each. What XLA takes in all is about half as much again.
_LABEL_ARRAYS = 4


def check(program: Program) -> None:
    """Refuses labels for which a step against all of them has no room.

    What is counted is the least that a step takes, so that no run is refused that would fit.
    `--mode=plan` says what it takes in all.

    Args:
        program: on devices that are here.

    Raises:
        ValueError: names the recipe that compares with sampled labels instead.
    """
    memory = of_device(program.mesh.local_devices[0])
    if program.config.train.labels != "all" or memory is None:
        return
    labels, width = program.shape.labels, program.sizes.hidden
    shards = sharding.num_shards("batch", program.mesh)
    each = _LABEL_ARRAYS * width * 4 / shards  # bytes for a label
    needed = per_device((program.abstract, program.abstract.params)) + labels * each
    if needed > memory:
        raise ValueError(
            f"train.labels: expected labels that a step against all of them has memory for, got "
            f"{labels:,}: it takes {needed / 1e9:,.1f} GB or more of a device that has "
            f"{memory / 1e9:,.1f} GB; compare with the labels of a batch: "
            "--config.train.labels=sampled"
        )


def of_device(device: jax.Device) -> int | None:
    """Bytes of a device that a run may use; None if they are not known.

    Processors share the memory of this machine.
    """
    if device.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return memory // jax.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")


def per_device(tree: Any) -> int:
    """Bytes of one device that arrays with shardings take.

    Args:
        tree: of ShapeDtypeStructs.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
