"""Memory and time of the in-batch loss and its gradient, whole and in blocks of rows.

python -m benchmarks.loss_blocks

Documents, label texts and prototypes are drawn unit vectors, --width wide, a label for each of
--batches documents; a pair is relevant if the label was drawn for the document, and one other pair
of a row on average. The objective is that of the recipes with PRIME: three terms and the
regulariser, with ten negatives ("margin") or by the decoupled softmax.

"memory" is what the compiled program holds at most beside arguments and results, "matrices" the
same in float32 matrices of batch x batch, "products" its matrix products of that size, "seconds"
the runs that count. Whole and blocks run in turn, so that all see the same machine; "time" is the
median of the ratios of neighbours, blocks / whole. Of --only_memory programs are compiled only:
whole, and as `loss.block=None` has it.

The results go to --output: "benchmark", "settings", environment and "results".
"""

import argparse
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.environment import environment, save
from xmc_jax.config import LossConfig
from xmc_jax.training import flops, objective
from xmc_jax.training.state import Pairs

PACKAGES = ("jax", "jaxlib", "numpy")


class Objective:
    """Loss, metrics and gradients of a batch, compiled."""

    def __init__(self, batch: int, width: int, cfg: LossConfig):
        def loss_of(units, relevance, key):
            document, label, prototype = units
            pairs = Pairs(document, label, prototype, relevance=relevance)
            return objective.objective(pairs, key, cfg)

        unit = jax.ShapeDtypeStruct((batch, width), jnp.float32)
        relevance = jax.ShapeDtypeStruct((batch, batch), bool)
        key = jax.eval_shape(lambda: jax.random.key(0))
        function = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
        traced = function.trace((unit, unit, unit), relevance, key)
        self.compiled = traced.lower().compile()
        memory = self.compiled.memory_analysis().temp_size_in_bytes
        self.costs = {
            "blocks": objective.num_blocks(batch, batch, cfg),
            "memory": memory,
            "matrices": memory / (4 * batch**2),
            "products": flops.count(traced.jaxpr).total / (2 * batch**2 * width),
        }


def draw(batch: int, width: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Unit vectors, three times f32[batch, width], and bool[batch, batch]."""
    generator = np.random.default_rng(0)
    units = generator.standard_normal((3, batch, width), np.float32)
    units /= np.linalg.norm(units, axis=-1, keepdims=True)
    relevance = generator.random((batch, batch), np.float32) < 1 / batch
    return tuple(map(jnp.asarray, units)), jnp.asarray(relevance | np.eye(batch, dtype=bool))


def measure(
    batch: int, width: int, kind: str, blocks: Sequence[int], steps: int
) -> list[dict[str, Any]]:
    """The loss whole, and in each of some numbers of blocks.

    Args:
        batch: B, and U.
        width: D.
        kind: of the loss.
        blocks: how many; each divides the batch.
        steps: runs that count.

    Raises:
        RuntimeError: the losses differ by more than rounding.
    """
    cfgs = [LossConfig(kind=kind, block=batch // count) for count in (1, *blocks)]
    objectives = [Objective(batch, width, cfg) for cfg in cfgs]
    units, relevance = draw(batch, width)
    seconds: list[list[float]] = [[] for _ in objectives]
    for step in range(-1, steps):  # the first warms up
        found = []
        for compared, taken in zip(objectives, seconds):
            start = time.perf_counter()
            result = compared.compiled(units, relevance, jax.random.key(max(step, 0)))
            found.append(float(result[0][0]))
            jax.block_until_ready(result)
            if step >= 0:
                taken.append(time.perf_counter() - start)
        if not np.allclose(found, found[0], rtol=1e-5):
            raise RuntimeError(f"batch {batch}, {kind}: expected one loss, got {found}")
    rows = []
    for compared, taken in zip(objectives, seconds):
        ratios = [ours / whole for ours, whole in zip(taken, seconds[0])]
        timed = {"seconds": taken, "time": statistics.median(ratios)}
        rows.append({"kind": kind, "batch": batch, **compared.costs, **timed})
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    line = (
        f"{row['kind']:17}  B {row['batch']:6,}  blocks {row['blocks']:3}  "
        f"{row['memory'] / 1e6:9,.0f} MB = {row['matrices']:5.2f} matrices  "
        f"{row['products']:4.1f} products"
    )
    if "seconds" in row:
        line += f"  {statistics.median(row['seconds']):7.3f} s, x {row['time']:.2f}"
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs a command line; returns what it writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--only_memory", type=int, nargs="*", default=[16384])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--width", type=int, default=384, help="default 384")
    parser.add_argument("--steps", type=int, default=5, help="that count; default 5")
    parser.add_argument("--output", type=pathlib.Path)
    arguments = parser.parse_args(argv)
    results: list[dict[str, Any]] = []
    for kind in ("margin", "decoupled_softmax"):
        for batch in arguments.batches:
            found = measure(batch, arguments.width, kind, arguments.blocks, arguments.steps)
            for row in found:
                show(row)
            results += found
        for batch in arguments.only_memory:
            for block in (batch, None):
                cfg = LossConfig(kind=kind, block=block)
                row = {"kind": kind, "batch": batch}
                row |= Objective(batch, arguments.width, cfg).costs
                show(row)
                results.append(row)
    names = ("batches", "only_memory", "blocks", "width", "steps")
    content = {
        "benchmark": "loss_blocks",
        "settings": {name: getattr(arguments, name) for name in names},
        **environment(PACKAGES),
        "results": results,
    }
    if arguments.output is not None:
        save(arguments.output, content)
    return content


if __name__ == "__main__":
    main()
