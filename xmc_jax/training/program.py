"""A config made runnable: the model, its compiled functions, and where every array lives."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import traverse_util
from flax.core import meta

from xmc_jax import rng, sharding
from xmc_jax.data import batches, store
from xmc_jax.models import backbone, dual, hf, layers
from xmc_jax.models.fusion import NO_PROMPTS
from xmc_jax.retrieval import encode, evaluate, scann
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.training import curriculum, optimizer, tables
from xmc_jax.training.config import RunConfig
from xmc_jax.training.step import Step
from xmc_jax.types import Prompts, Tables, TrainState


class Program:
    """The functions of one run over one dataset.

    Args:
        config: see `RunConfig`.
        data: the opened dataset folder.
        prompts: what stands around every text of a decoder; none for encoders.

    Attributes:
        source: where the backbone comes from.
        sizes: of the backbone.
        abstract: the TrainState as ShapeDtypeStructs with shardings.
        abstract_frozen: `frozen` likewise.
        sampler: builds the batches.
        steps_per_epoch: ceil(N / B); the last batch is completed with the epoch's first documents.
        train_step: jitted (state, frozen, batch) -> (state, metrics); the state is donated.

    Raises:
        ValueError: weights, data and config do not fit; says which and how.
    """

    def __init__(self, config: RunConfig, data: store.Store, prompts: Prompts = NO_PROMPTS):
        train = config.train
        self.config, self.data = config, data
        self.mesh = sharding.make_mesh(config.mesh)
        self.steps_per_epoch = -(-data.num_documents // train.batch_size)
        self.sampler = batches.Sampler(
            data,
            train.batch_size,
            train.positives_per_document,
            train.sampling,
            train.seed,
            train.labels,
        )
        if train.labels == "all" and config.tables.centroids == "ema":
            raise ValueError(
                "tables.centroids: expected 'stale' or 'exact' with train.labels='all', where no "
                "label is sampled whose centroid could move, got 'ema'"
            )
        positives = data.positives("train")
        self._pairs = self._replicate(
            tables.label_pairs(positives.indptr, positives.indices, data.num_labels)
        )
        if config.eval.index == "scann":
            scann.require()
        for name in ("batch_size", "encode_batch_size"):
            sharding.spec(("batch",), (getattr(train, name),), self.mesh, f"train.{name}")
        self.source = hf.resolve(
            config.encoder.backbone,
            config.encoder.revision,
            weights=config.encoder.init == "pretrained",
        )
        self.sizes = hf.load_config(self.source, config.encoder.layers)
        self._check_texts(prompts)
        if config.encoder.dropout is not None:
            self.sizes = self.sizes.with_dropout(config.encoder.dropout)
        prime = config.prime if config.prime.enabled else None
        if prime is not None:
            self._num_free_vectors = tables.num_free_vectors(
                data.num_labels, prime.free_vectors, prime.private_vectors
            )
        self.model = dual.DualEncoder(
            sizes=self.sizes,
            pooling=config.encoder.pooling,
            compute_dtype=config.encoder.compute_dtype,
            remat=config.encoder.remat,
            lora=config.encoder.lora,
            prompts=prompts,
            order=config.fusion.order,
            positions=config.fusion.positions,
            image_width=data.image_width,
            prime=prime,
            num_free_vectors=self._num_free_vectors if prime is not None else 0,
        )

        boxed = jax.eval_shape(lambda: dual.init_params(self.model, train.seed))
        params = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            meta.unbox(boxed),
            sharding.of_params(boxed, self.mesh),
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

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.train_step = jax.jit(
            sharding.under(self.mesh, self.step.train),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(self.mesh)),
        )
        self._encode = jax.jit(sharding.under(self.mesh, self.step.encode))
        self._prototype = jax.jit(sharding.under(self.mesh, self.step.prototype))

    @functools.cached_property
    def frozen(self) -> Any:
        """Parameters that get no gradient, on the devices; read or drawn when first asked for."""
        return self._initial_params(self.abstract_frozen)

    def provenance(self) -> dict[str, Any]:
        """What the config only names, by digest: the backbone's weights, and the data."""
        source, images = self.source, self.data.images
        return {
            "backbone": {"revision": source.revision, "sha256": source.digest},
            "data": self.data.digest,
            **({} if images is None else {"images": images.digest}),
        }

    def put(self, arrays: Any) -> Any:
        """Hands numpy arrays over to the devices, the first axis split over the batch axes."""
        return jax.device_put(arrays, sharding.of_batch(arrays, self.mesh))

    def initial_state(self) -> TrainState:
        """The state before the first step: weights read, tables filled by encoding everything once.

        Source: ViXML reference, utils.py, initialize_clusters and initialize_cnt_repr.
        """
        config, seed = self.config, self.config.train.seed
        params = self._initial_params(self.abstract.params)
        bank = self._as_table(self.embed(params, "train"))
        centroids = label_bank = free_vector_of = None
        label_pooled = self.embed(params, "label", pooled=True)
        if config.train.labels == "all":
            label_bank = self._as_table(label_pooled)
        if self.model.prime is not None:
            label_unit = layers.normalize(jax.device_put(label_pooled, self._whole))
            free_vector_of = tables.free_vector_map(
                label_unit,
                self.data.label_frequency,
                config.prime.free_vectors,
                config.prime.private_vectors,
                rng.key(seed, rng.Stream.KMEANS, 0),
            )
            if config.prime.free_vector_init == "cluster_mean":
                params["free_vectors"] = tables.cluster_means(
                    label_unit, free_vector_of, self._num_free_vectors
                )
            centroids = tables.centroids_of(bank, self._pairs)
        state = TrainState(
            step=jnp.zeros((), jnp.int32),
            boundaries=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=self.step.transform.init(params),
            tables=Tables(
                document_bank=bank,
                centroids=centroids,
                label_bank=label_bank,
                free_vector_of=free_vector_of,
                leaf_order=jnp.arange(self.data.num_documents, dtype=jnp.int32),
            ),
        )
        return self._placed(state)

    def boundary(self, state: TrainState, epoch: int) -> TrainState:
        """What happens between epochs: centroids anew, and new leaves if they are due.

        The boundary of the last epoch encodes all documents anew, so that the bank and what is made
        of it are those of the trained weights.

        Args:
            state: after the last step of `epoch`.
            epoch: the one that ended, from 0.

        Source: ViXML supp. A; reference utils.py, train.
        """
        config = self.config
        last = epoch + 1 == config.train.epochs
        bank, centroids = state.tables.document_bank, state.tables.centroids
        leaf_order = state.tables.leaf_order
        if last or config.tables.centroids == "exact":
            bank = self._as_table(self.embed(state.params, "train"))
        if centroids is not None and config.tables.centroids != "ema":
            centroids = tables.centroids_of(bank, self._pairs)
        label_bank = state.tables.label_bank
        if label_bank is not None:
            label_bank = self._as_table(self.embed(state.params, "label", pooled=True))
        cluster_size = curriculum.plan(epoch, config.curriculum).new_cluster_size
        if cluster_size is not None:
            leaf_order, _ = curriculum.balanced_kmeans(
                bank,
                curriculum.num_leaves(self.data.num_documents, cluster_size),
                rng.key(config.train.seed, rng.Stream.KMEANS, epoch + 1),
            )
        return self._placed(
            state.replace(
                boundaries=state.boundaries + 1,
                tables=state.tables.replace(
                    document_bank=bank,
                    centroids=centroids,
                    label_bank=label_bank,
                    leaf_order=leaf_order,
                ),
            )
        )

    def embed(
        self, params: Any, split: str, pooled: bool = False, out: epath.PathLike | None = None
    ) -> np.ndarray:
        """f32[n, D], the embeddings of "train", "test" or "label" items.

        Args:
            params: trainable parameters.
            split: which items.
            pooled: before normalisation, instead of unit embeddings.
            out: see `encode.encode_split`.
        """

        def one(inputs, _):
            output = self._encode(params, self.frozen, inputs)
            return output.pooled if pooled else output.unit

        return encode.encode_split(
            one,
            getattr(self.data, split),
            self.config.train.encode_batch_size,
            self.put,
            out=out,
        )

    def embed_index(self, state: TrainState, out: epath.PathLike | None = None) -> np.ndarray:
        """f32[L, D], what is searched: label prototypes with PRIME, label embeddings without."""

        def one(inputs, ids):
            pooled = self._encode(state.params, self.frozen, inputs).pooled
            return self._prototype(state.params, self.frozen, state.tables, ids, pooled)

        return encode.encode_split(
            one,
            self.data.label,
            self.config.train.encode_batch_size,
            self.put,
            out=out,
        )

    def merged(self, state: TrainState) -> Any:
        """All parameters, trained and frozen ones together."""
        return optimizer.merge(state.params, self.frozen)

    def evaluate(self, state: TrainState) -> Evaluation:
        """Evaluates on the test documents.

        Retrieval-augmented inference searches the document bank: exact after the last epoch, before
        that each document's embedding as of its last visit.
        """
        return evaluate.evaluate(
            self.embed(state.params, "test"),
            self.embed_index(state),
            self.data,
            self.config.eval,
            np.asarray(state.tables.document_bank, np.float32),
            self.mesh,
        )

    def evaluate_zero_shot(self, state: TrainState) -> Evaluation:
        """Evaluates label texts alone, without prototypes or neighbours: for an untrained state."""
        return evaluate.evaluate(
            self.embed(state.params, "test"),
            self.embed(state.params, "label"),
            self.data,
            dataclasses.replace(
                self.config.eval,
                augmented=dataclasses.replace(self.config.eval.augmented, enabled=False),
                compare_scann=False,
            ),
            mesh=self.mesh,
        )

    def _initial_params(self, abstract: Any) -> Any:
        """The part `abstract` of the parameters before the first step.

        The backbone is read, unless its weights are to be random; what else there is, is drawn from
        the seed, and only that.
        """
        wanted = traverse_util.flatten_dict(abstract, sep="/")
        stored = {}
        if self.config.encoder.init == "pretrained":
            stored = {
                path: leaf
                for path, leaf in wanted.items()
                if path.startswith("backbone/") and not path.endswith(("lora_a", "lora_b"))
            }
        projected = {}
        if self.config.encoder.init == "pretrained" and "projection" in abstract:
            projected = self._stored_projection(abstract["projection"])
        drawn = {path: leaf for path, leaf in wanted.items() if path not in stored | projected}

        def draw():
            params = meta.unbox(dual.init_params(self.model, self.config.train.seed))
            flat = traverse_util.flatten_dict(params, sep="/")
            return {path: flat[path].astype(leaf.dtype) for path, leaf in drawn.items()}

        flat = jax.jit(draw, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, drawn))()
        if stored:
            tree = traverse_util.unflatten_dict(stored, sep="/")["backbone"]
            loaded = {"backbone": hf.load_params(self.source, self.sizes, tree)}
            flat |= traverse_util.flatten_dict(loaded, sep="/")
        flat |= projected
        return traverse_util.unflatten_dict(flat, sep="/")

    def _stored_projection(self, abstract: Any) -> dict[str, jax.Array]:
        """That of an exported folder, path -> array; nothing where there is none."""
        stored = hf.load_projection(self.source, self.data.image_width)
        if stored is None:
            return {}
        return {
            f"projection/{name}": jax.device_put(stored[name], leaf.sharding)
            for name, leaf in abstract.items()
        }

    def _check_texts(self, prompts: Prompts) -> None:
        """Raises ValueError if the dataset's texts are not what the backbone takes."""
        data, decodes = self.data, backbone.is_decoder(self.sizes)
        if data.vocabulary_size > self.sizes.vocab_size:
            raise ValueError(
                f"{data.folder}: expected at most the encoder's {self.sizes.vocab_size} tokens, "
                f"got a tokenizer of {data.vocabulary_size}; leave data.tokenizer to the backbone"
            )
        if data.special_tokens is decodes:
            expected = ("with", "without")[decodes]
            raise ValueError(
                f"{data.folder}: expected texts {expected} the tokenizer's special tokens, as "
                f"{self.source.name} ({self.sizes.family}) takes them; prepare it anew"
            )
        empty = [s for s in store.SPLITS if not getattr(data, s).lengths.all()]
        if empty and not prompts.head + prompts.tail:
            raise ValueError(
                f"{data.folder}: {empty} have texts without any token; set --config.fusion.prefix "
                "or --config.fusion.suffix, so that there is something to encode"
            )

    def _abstract_state(self, trainable: Any) -> TrainState:
        def whole(leaf):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole)

        prime = self.model.prime is not None
        opt_state = optax.tree.map_params(
            self.step.transform,
            lambda leaf, param: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=param.sharding
            ),
            jax.eval_shape(self.step.transform.init, trainable),
            trainable,
            transform_non_params=whole,
        )

        def i32(*shape):
            return whole(jax.ShapeDtypeStruct(shape, jnp.int32))

        return TrainState(
            step=i32(),
            boundaries=i32(),
            params=trainable,
            opt_state=opt_state,
            tables=Tables(
                document_bank=self._abstract_table(self.data.num_documents),
                centroids=self._abstract_table(self.data.num_labels) if prime else None,
                label_bank=(
                    self._abstract_table(self.data.num_labels)
                    if self.config.train.labels == "all"
                    else None
                ),
                free_vector_of=i32(self.data.num_labels) if prime else None,
                leaf_order=i32(self.data.num_documents),
            ),
        )

    @property
    def _whole(self) -> jax.sharding.NamedSharding:
        return sharding.replicated(self.mesh)

    def _replicate(self, tree: Any) -> Any:
        return jax.device_put(tree, self._whole)

    def _abstract_table(self, rows: int) -> jax.ShapeDtypeStruct:
        shape = (rows, self.sizes.hidden)
        split = sharding.named((None, "table_width"), shape, self.mesh, "table")
        return jax.ShapeDtypeStruct(shape, self.config.tables.dtype, sharding=split)

    def _as_table(self, rows: np.ndarray) -> jax.Array:
        abstract = self._abstract_table(len(rows))
        return jax.device_put(rows.astype(abstract.dtype), abstract.sharding)

    def _placed(self, state: TrainState) -> TrainState:
        return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, self.abstract))
