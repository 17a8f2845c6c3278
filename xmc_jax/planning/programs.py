"""The programs of a run, ready to be compiled for devices that need not be there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from xmc_jax.retrieval import augmented, exact
from xmc_jax.runtime import sharding
from xmc_jax.training import curriculum, tables
from xmc_jax.training.program import Program

TRAIN_STEP = "train_step"


@dataclasses.dataclass(frozen=True)
class Compilable:
    """A jitted function and what it is called with.

    Attributes:
        name: of the program.
        arguments: what it is called with, as ShapeDtypeStructs with shardings.
        trace: traces it, for its devices.
        per_epoch: calls of it in an epoch, on average over the run.
    """

    name: str
    arguments: Any
    trace: Callable[[], jax.stages.Traced]
    per_epoch: float


def of(program: Program) -> list[Compilable]:
    """Every program of a run that takes memory or time."""
    config, shape, mesh = program.config, program.shape, program.mesh
    train, search, epochs = config.train, config.eval, config.train.epochs
    state, frozen = program.abstract, program.abstract_frozen
    rows = train.encode_batch_size

    def whole(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    def one(name: str, per_epoch: float, function: Any, *arguments: Any, **static: Any):
        return Compilable(name, arguments, lambda: function.trace(*arguments, **static), per_epoch)

    # Before the first step, at each boundary and at the end of the run, per epoch.
    evaluations = (epochs // train.eval_every if train.eval_every else 1) + train.zero_shot
    every, prime = train.labels == "all", program.model.prime is not None
    documents = shape.documents * (epochs if config.tables.centroids == "exact" else 1)
    encoded = (
        shape.documents
        + documents
        + shape.labels * (1 + every * epochs)
        + evaluations * (shape.test + shape.labels)
    )
    items = program.abstract_items(rows, parts=sharding.num_shards("batch", mesh))
    compilables = [
        one(
            TRAIN_STEP,
            program.steps_per_epoch,
            program.train_step,
            *(state, frozen, program.abstract_batch()),
        ),
        one("encode", encoded / rows / epochs, program.encode, state.params, frozen, items),
    ]
    width = program.sizes.width
    if prime:
        by_rows = sharding.named(("batch", None), (rows, width), mesh, "pooled")
        compilables.append(
            one(
                "prototype",
                evaluations * shape.labels / rows / epochs,
                program.prototype,
                *(state.params, frozen, state.tables),
                jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=items.slots.sharding),
                jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=by_rows),
            )
        )
        if config.tables.centroids != "ema":
            compilables.append(
                one(
                    "centroids",
                    shape.pairs / tables.PAIRS,
                    tables.add_pairs,
                    program.abstract_table(shape.labels, "float32"),
                    state.tables.document_bank,
                    *(whole(tables.PAIRS), whole(tables.PAIRS)),
                    mesh=mesh,
                )
            )
    clusterings = [
        size
        for epoch in range(epochs)
        if (size := curriculum.plan(epoch, config.curriculum).new_cluster_size) is not None
    ]
    levels = sum(
        curriculum.num_leaves(shape.documents, size).bit_length() - 1 for size in clusterings
    )
    if clusterings:  # every level moves as much as the first
        compilables.append(
            one(
                "cluster",
                levels / epochs,
                curriculum.split,
                state.tables.document_bank,
                whole(shape.documents + 1, dtype=jnp.float32),
                whole(1, shape.documents),
                whole(1, dtype=jnp.float32),
                iterations=curriculum.ITERATIONS,
                tolerance=None,  # how many a cluster needs is not known: all that it may take
                block=curriculum.BLOCK,
                mesh=mesh,
            )
        )
    searched = {"search labels": (shape.labels, search.k)}
    if search.augmented.enabled:
        depths = augmented.depths(search.augmented, search.k)
        searched["search labels"] = shape.labels, depths[0]
        searched["search documents"] = shape.documents, depths[1]
    for name, (count, k) in searched.items() if search.index == "exact" else ():
        size, block, by_rows = exact.layout(count, width, mesh, search.database_block)
        compilables.append(
            one(
                name,
                evaluations * shape.test / search.query_block / epochs,
                exact.search_block,
                whole(search.query_block, width, dtype=jnp.float32),
                jax.ShapeDtypeStruct(size, jnp.float32, sharding=by_rows),
                whole(),
                k=min(k, count),
                block=block,
                mesh=mesh,
                recall_target=search.recall_target,
            )
        )
    return compilables
