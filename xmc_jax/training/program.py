"""A config made runnable: the model, its compiled functions, and where every array lives.

Nothing here needs a dataset or weights, only their sizes: what a `Program` compiles can be compiled
ahead of time, for devices that are not there.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from flax.core import meta

from xmc_jax.config import RunConfig
from xmc_jax.data import batches
from xmc_jax.data import rows as row_layout
from xmc_jax.data.types import NO_PROMPTS, Batch, DataShape, Prompts, Rows
from xmc_jax.models import backbone, dual, fusion, hf, hf_modules, hf_weights
from xmc_jax.retrieval import metrics
from xmc_jax.runtime import sharding
from xmc_jax.runtime.wording import counted
from xmc_jax.training import flops, losses, objective, optimizer, tables
from xmc_jax.training.state import Tables, TrainState
from xmc_jax.training.step import Step

_MAX_STEPS = 2**31 - 1  # `TrainState.step` is an int32


class Program:
    """The functions of a run over data of some shape.

    Args:
        config: see `RunConfig`.
        shape: counts of the dataset.
        prompts: what stands around every text of a decoder; none for encoders.
        devices: what it runs on, or would; all devices of all processes by default.
        lengths: i[n], own tokens of items, which rows are made to suit; None is not known.

    Attributes:
        config: as given, but with a `train.batch_size` of no more than there are documents.
        wanted_batch_size: `train.batch_size` as given.
        shape: see above.
        mesh: of the devices.
        source: where the backbone comes from.
        sizes: of the backbone.
        model: the Siamese tower.
        num_free_vectors: C; 0 without PRIME.
        layout: how texts and images become rows.
        abstract: the TrainState as ShapeDtypeStructs with shardings.
        abstract_frozen: `frozen` likewise.
        steps_per_epoch: ceil(N / B); the last batch is completed with the epoch's first documents.
        train_step: jitted (state, frozen, batch) -> (state, metrics); the state is donated.
        encode: jitted `Step.encode`.
        prototype: jitted `Step.prototype`.

    Raises:
        ValueError: sizes, data and config do not fit; says which and how.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: DataShape,
        prompts: Prompts = NO_PROMPTS,
        devices: Sequence[jax.Device] | None = None,
        lengths: np.ndarray | None = None,
    ):
        self.mesh = sharding.make_mesh(config.mesh, devices)
        shards = sharding.num_shards("batch", self.mesh)
        self.wanted_batch_size = config.train.batch_size
        config = _fitting(config, shape.documents, shards)
        train = config.train
        self.config, self.shape = config, shape
        self.steps_per_epoch = -(-shape.documents // train.batch_size)
        if train.epochs * self.steps_per_epoch > _MAX_STEPS:
            raise ValueError(
                f"train.epochs: expected at most {_MAX_STEPS // self.steps_per_epoch:,} epochs of "
                f"{counted(self.steps_per_epoch, 'step')}, since steps are counted as int32, got "
                f"{train.epochs:,}"
            )
        if train.labels == "all" and config.tables.centroids == "ema":
            raise ValueError(
                "tables.centroids: expected 'stale' or 'exact' with train.labels='all', where no "
                "label is sampled whose centroid could move, got 'ema'"
            )
        for name in ("batch_size", "encode_batch_size"):
            sharding.spec(("batch",), (getattr(train, name),), self.mesh, f"train.{name}")
        labels = shape.labels
        if train.labels == "sampled":
            labels = train.batch_size * train.positives_per_document
        losses.find(config.loss.kind)  # or refused
        metrics.parse(config.tune.metric)  # or refused
        objective.num_blocks(train.batch_size, labels, config.loss, shards)  # or refused
        self.source = hf.resolve(
            config.encoder.backbone,
            config.encoder.revision,
            weights=False,
        )
        self.sizes = hf.load_config(self.source, config.encoder.layers)
        if config.encoder.dropout is not None:
            self.sizes = self.sizes.with_dropout(config.encoder.dropout)
        prime, self.num_free_vectors = config.prime if config.prime.enabled else None, 0
        if prime is not None:
            self.num_free_vectors = tables.num_free_vectors(
                shape.labels, prime.free_vectors, prime.private_vectors
            )
        self.model = dual.DualEncoder(
            sizes=self.sizes,
            pooling=config.encoder.pooling or hf_modules.read(self.source).pooling(),
            compute_dtype=config.encoder.compute_dtype,
            precision=config.encoder.precision,
            remat=config.encoder.remat,
            lora=config.encoder.lora,
            image_width=shape.image_width,
            prime=prime,
            num_free_vectors=self.num_free_vectors,
        )

        of_row = sharding.row_multiple(self.mesh) if train.packed else None
        order, positions = config.fusion.order, config.fusion.positions
        self.layout = row_layout.layout(
            *(prompts, order, positions, shape.length, shape.images_per_item, of_row)
        )
        if of_row is not None and lengths is not None:
            least = sharding.row_multiple(self.mesh, least=True)
            self.layout = row_layout.suited(self.layout, lengths, least, self.sizes.hidden)
        fusion.check(
            backbone.is_decoder(self.sizes),
            len(prompts.head) + self.layout.longest,
            self.sizes.max_positions,
            prompts,
            order,
        )
        boxed = jax.eval_shape(lambda: dual.init_params(self.model, train.seed))
        params = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            meta.unbox(boxed),
            sharding.of_params(boxed, self.mesh, config.mesh.replicate),
        )
        trainable, frozen = optimizer.partition(params, config.optimizer.trainable)
        self.abstract_frozen = jax.tree.map(
            lambda leaf: leaf.update(dtype=config.encoder.frozen_dtype), frozen
        )
        self.step = Step(
            model=self.model,
            transform=optimizer.build(
                config.optimizer, trainable, self.steps_per_epoch * train.epochs
            ),
            loss=config.loss,
            tables=config.tables,
            n_chunks=train.n_chunks,
            seed=train.seed,
        )
        self.abstract = self._abstract_state(trainable)
        self._flops: dict[Any, int] = {}

        whole = sharding.replicated(self.mesh)
        rows = sharding.named(("batch", None), (train.encode_batch_size, 1), self.mesh, "rows")
        self.train_step = jax.jit(
            sharding.under(self.mesh, self.step.train),
            donate_argnums=0,
            out_shardings=(shardings(self.abstract), whole),
        )
        self.encode = jax.jit(sharding.under(self.mesh, self.step.encode), out_shardings=rows)
        self.prototype = jax.jit(sharding.under(self.mesh, self.step.prototype), out_shardings=rows)

    def flops(self, state: TrainState, frozen: Any, batch: Batch) -> int:
        """Operations of a step's matrix products, see `flops.count`; counted once for each shape.

        Args:
            state: arrays or their shapes, as all below.
            frozen: likewise.
            batch: likewise.
        """
        leaves, structure = jax.tree.flatten(batch)
        shape = structure, tuple(leaf.shape for leaf in leaves)
        if shape not in self._flops:
            self._flops[shape] = flops.count(
                self.train_step.trace(state, frozen, batch).jaxpr
            ).total
        return self._flops[shape]

    @functools.cached_property
    def frozen(self) -> Any:
        """Parameters that get no gradient, on the devices; read or drawn when first asked for."""
        return self.initial_params(self.abstract_frozen)

    def initial_params(self, abstract: Any) -> Any:
        """A part of the parameters before the first step.

        The backbone is read, unless its weights are to be random; what else there is, is drawn from
        the seed, and only that.

        Args:
            abstract: the part wanted, of `abstract.params` or `abstract_frozen`.
        """
        wanted = traverse_util.flatten_dict(abstract, sep="/")
        stored, projected = {}, {}
        if self.config.encoder.init == "pretrained":
            stored = {
                path: leaf
                for path, leaf in wanted.items()
                if path.startswith("backbone/") and not path.endswith(("lora_a", "lora_b"))
            }
            if "projection" in abstract:
                projected = self._stored_projection(abstract["projection"])
        drawn = {path: leaf for path, leaf in wanted.items() if path not in stored | projected}

        def draw():
            params = meta.unbox(dual.init_params(self.model, self.config.train.seed))
            flat = traverse_util.flatten_dict(params, sep="/")
            return {path: flat[path].astype(leaf.dtype) for path, leaf in drawn.items()}

        flat = jax.jit(draw, out_shardings=shardings(drawn))()
        if stored:
            tree = traverse_util.unflatten_dict(stored, sep="/")["backbone"]
            loaded = {"backbone": hf_weights.load_params(self.source, self.sizes, tree)}
            flat |= traverse_util.flatten_dict(loaded, sep="/")
        flat |= projected
        return traverse_util.unflatten_dict(flat, sep="/")

    def abstract_items(self, *slots: int, parts: int) -> Rows:
        """Items as ShapeDtypeStructs with shardings, in as many rows as any of them need.

        Args:
            *slots: shape of the slots.
            parts: groups of items that are laid out each by itself.
        """
        shape, layout, i32 = self.shape, self.layout, jnp.int32
        rows = parts * layout.most_rows(math.prod(slots) // parts)
        of_places = jax.ShapeDtypeStruct((rows, layout.width), i32)
        items = Rows(
            tokens=of_places,
            segments=of_places,
            positions=of_places,
            slots=jax.ShapeDtypeStruct(slots, i32),
            per_row=layout.per_row,
            head=layout.head,
            longest=layout.head + layout.longest,
        )
        if shape.image_width:
            per_item = (*slots, shape.images_per_item)
            items = items.replace(
                images=jax.ShapeDtypeStruct((*per_item, shape.image_width), jnp.float16),
                image_places=jax.ShapeDtypeStruct(per_item, i32),
            )
        return self._as_batch(items)

    def abstract_batch(self) -> Batch:
        """What `train_step` takes at most, as ShapeDtypeStructs with shardings."""
        train, shape, i32 = self.config.train, self.shape, jnp.int32
        size, every = train.batch_size, train.labels == "all"
        slots = 1 if every else 1 + train.positives_per_document
        parts = sharding.num_shards("batch", self.mesh) * train.n_chunks
        batch = Batch(
            items=self.abstract_items(size, slots, parts=parts),
            document_ids=jax.ShapeDtypeStruct((size,), i32),
        )
        if every:
            shards = sharding.num_shards("batch", self.mesh)
            of_positives = (shards * shape.most_positives(size // shards),)
            return self._as_batch(
                batch.replace(
                    positives=jax.ShapeDtypeStruct(of_positives, i32),
                    owners=jax.ShapeDtypeStruct(of_positives, i32),
                    frequency=jax.ShapeDtypeStruct(of_positives, jnp.float32),
                )
            )
        columns = size * train.positives_per_document
        return self._as_batch(
            batch.replace(
                label_ids=jax.ShapeDtypeStruct((columns,), i32),
                columns=jax.ShapeDtypeStruct((columns,), i32),
                relevance=jax.ShapeDtypeStruct((size, columns), jnp.bool_),
            )
        )

    def abstract_table(self, rows: int, dtype: str | None = None) -> jax.ShapeDtypeStruct:
        """A table [rows, D], split by width, in `tables.dtype` by default."""
        shape = (rows, self.sizes.width)
        split = sharding.named((None, "table_width"), shape, self.mesh, "table")
        return jax.ShapeDtypeStruct(shape, dtype or self.config.tables.dtype, sharding=split)

    def _as_batch(self, tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf, split: leaf.update(sharding=split),
            tree,
            sharding.of_batch(tree, self.mesh),
        )

    def _stored_projection(self, abstract: Any) -> dict[str, jax.Array]:
        """That of an exported folder, path -> array; nothing where there is none."""
        stored = hf_weights.load_projection(self.source, self.shape.image_width)
        if stored is None:
            return {}
        return {
            f"projection/{name}": sharding.put(stored[name], leaf.sharding)
            for name, leaf in abstract.items()
        }

    def _abstract_state(self, trainable: Any) -> TrainState:
        whole = sharding.replicated(self.mesh)
        opt_state = optax.tree.map_params(
            self.step.transform,
            lambda leaf, param: leaf.update(sharding=param.sharding),
            jax.eval_shape(self.step.transform.init, trainable),
            trainable,
            transform_non_params=lambda leaf: leaf.update(sharding=whole),
        )

        def i32(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=whole)

        documents, labels = self.shape.documents, self.shape.labels
        prime, every = self.model.prime is not None, self.config.train.labels == "all"
        return TrainState(
            step=i32(),
            boundaries=i32(),
            params=trainable,
            opt_state=opt_state,
            tables=Tables(
                document_bank=self.abstract_table(documents),
                centroids=self.abstract_table(labels) if prime else None,
                label_bank=self.abstract_table(labels) if every else None,
                free_vector_of=i32(labels) if prime else None,
                leaf_order=i32(documents),
            ),
        )


def _fitting(config: RunConfig, documents: int, shards: int) -> RunConfig:
    """The config with smaller batches if there are fewer training documents than in one."""
    train, loss = config.train, config.loss
    size = batches.fitting_batch_size(documents, train.batch_size, shards * train.n_chunks)
    if size == train.batch_size:
        return config
    return dataclasses.replace(
        config,
        train=dataclasses.replace(train, batch_size=size),
        loss=dataclasses.replace(loss, block=None),  # it was a divisor of the larger batch
    )


def shardings(abstract: Any) -> Any:
    """The shardings of a tree of arrays, abstract or not."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)
