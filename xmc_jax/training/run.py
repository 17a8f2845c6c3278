"""A program over its dataset: the first state, boundaries between epochs, embedding, evaluation."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from xmc_jax.config import EvalConfig, RunConfig
from xmc_jax.data import batches, priors, store
from xmc_jax.data.types import NO_PROMPTS, Batch, Prompts
from xmc_jax.files import array_files, atomic
from xmc_jax.models import backbone, hf
from xmc_jax.retrieval import encode, evaluate, exact, scann, tuning
from xmc_jax.retrieval.evaluate import Evaluation
from xmc_jax.runtime import rng, sharding
from xmc_jax.training import curriculum, memory, optimizer, tables
from xmc_jax.training.program import Program, shardings
from xmc_jax.training.state import Tables, TrainState

_NAMES = {
    "train": "training documents",
    "test": "test documents",
    "validation": "validation documents",
    "label": "labels",
}


class Run(Program):
    """A `Program` over an opened dataset. Every method is called by all processes together.

    Args:
        config: see `RunConfig`.
        data: the opened dataset folder, the same in all processes.
        prompts: what stands around every text of a decoder; none for encoders.
        devices: see `Program`.

    Attributes:
        data: see above.
        sampler: builds the batches.
        rows: i64[n], documents of a batch that this process builds.
        prior: f64[L], see `augmented.rank`; None without one.

    Raises:
        ValueError: weights, data and config do not fit; says which and how.
    """

    def __init__(
        self,
        config: RunConfig,
        data: store.Store,
        prompts: Prompts = NO_PROMPTS,
        devices: Sequence[jax.Device] | None = None,
    ):
        splits = (getattr(data, name) for name in ("train", "label"))
        lengths = [split.own_tokens(np.arange(len(split)), prompts) for split in splits]
        super().__init__(config, data.shape, prompts, devices, np.concatenate(lengths))
        memory.check(self)
        self.data = data
        config = self.config
        train = config.train
        self.sampler = batches.Sampler(
            data,
            train.batch_size,
            train.positives_per_document,
            train.sampling,
            train.seed,
            train.labels,
            self.layout,
            sharding.num_shards("batch", self.mesh),
            train.n_chunks,
        )
        self.rows = sharding.local_rows(train.batch_size, self.mesh)
        self._check_texts(prompts)
        if config.eval.index == "scann":
            scann.require()
        if config.encoder.init == "pretrained":
            self.source = hf.resolve(config.encoder.backbone, config.encoder.revision)
        source = config.eval.augmented.prior
        self.prior = None if source is None else priors.read(source, data)
        positives = data.positives("train")
        self._pairs = tables.label_pairs(positives.indptr, positives.indices, data.num_labels)

    def provenance(self) -> dict[str, Any]:
        """What the config only names, by digest: the backbone's weights, and the data."""
        source, images = self.source, self.data.images
        return {
            "backbone": {"revision": source.revision, "sha256": source.digest},
            "data": self.data.digest,
            **({} if images is None else {"images": images.digest}),
        }

    def put(self, local: Batch) -> Batch:
        """The whole batch on the devices, of this process's `rows` of it as numpy arrays."""
        return sharding.put_batch(local, self.config.train.batch_size, self.mesh)

    def initial_state(self) -> TrainState:
        """The state before the first step: weights read, tables filled by encoding everything once.

        Source: ViXML reference, utils.py, initialize_clusters and initialize_cnt_repr.
        """
        config = self.config
        params = self.initial_params(self.abstract.params)
        bank = self._table(params, "train")
        centroids = label_bank = free_vector_of = None
        if config.train.labels == "all":
            label_bank = self._table(params, "label", pooled=True)
        if self.model.prime is not None:
            label_unit = self._table(params, "label", dtype="float32")
            free_vector_of = tables.free_vector_map(
                label_unit,
                self.data.label_frequency,
                config.prime.free_vectors,
                config.prime.private_vectors,
                rng.key(config.train.seed, rng.Stream.KMEANS, 0),
            )
            if config.prime.free_vector_init == "cluster_mean":
                params["free_vectors"] = tables.cluster_means(
                    label_unit, free_vector_of, self.num_free_vectors
                )
            free_vector_of = sharding.put_whole(free_vector_of, self.mesh)
            centroids = tables.centroids_of(bank, self._pairs)
        init = jax.jit(self.step.transform.init, out_shardings=shardings(self.abstract.opt_state))
        # Two arrays: the step gives its state away, and nothing may be given away twice.
        step, boundaries = (sharding.put_whole(np.zeros((), np.int32), self.mesh) for _ in range(2))
        leaf_order = np.arange(self.data.num_documents, dtype=np.int32)
        return self._placed(
            TrainState(
                step=step,
                boundaries=boundaries,
                params=params,
                opt_state=init(params),
                tables=Tables(
                    document_bank=bank,
                    centroids=centroids,
                    label_bank=label_bank,
                    free_vector_of=free_vector_of,
                    leaf_order=sharding.put_whole(leaf_order, self.mesh),
                ),
            )
        )

    def boundary(self, state: TrainState, epoch: int) -> TrainState:
        """What happens between epochs: centroids anew, and new leaves if they are due.

        The boundary of the last epoch encodes all documents anew, so that the bank and what is made
        of it are those of the trained weights. It makes no leaves, as no epoch follows; `cluster`
        makes them if one does after all.

        Args:
            state: after the last step of `epoch`.
            epoch: the one that ended, from 0.

        Source: ViXML supp. A; reference utils.py, train.
        """
        config, t = self.config, state.tables
        last = epoch + 1 == config.train.epochs
        if last or config.tables.centroids == "exact":
            t = t.replace(document_bank=self._table(state.params, "train"))
        if t.centroids is not None and config.tables.centroids != "ema":
            t = t.replace(centroids=tables.centroids_of(t.document_bank, self._pairs))
        if t.label_bank is not None:
            t = t.replace(label_bank=self._table(state.params, "label", pooled=True))
        state = self._placed(state.replace(boundaries=state.boundaries + 1, tables=t))
        return state if last else self.cluster(state, epoch)

    def cluster(self, state: TrainState, epoch: int) -> TrainState:
        """The state with new leaves of its document bank, if they are due after an epoch.

        Args:
            state: see `TrainState`.
            epoch: the one that ended, from 0.
        """
        config, t = self.config, state.tables
        cluster_size = curriculum.plan(epoch, config.curriculum).new_cluster_size
        if cluster_size is None:
            return state
        leaf_order, _ = curriculum.balanced_kmeans(
            t.document_bank,
            curriculum.num_leaves(self.data.num_documents, cluster_size),
            rng.key(config.train.seed, rng.Stream.KMEANS, epoch + 1),
        )
        return self._placed(state.replace(tables=t.replace(leaf_order=leaf_order)))

    def embed(self, params: Any, split: str, pooled: bool = False) -> np.ndarray:
        """f32[n, D] on the host, the embeddings of the items of a split of the store.

        Args:
            params: trainable parameters.
            split: which items.
            pooled: before normalisation, instead of unit embeddings.
        """
        return encode.to_host(self._encoder(params, pooled), self._items(split))

    def embed_to(self, params: Any, split: str, out: epath.PathLike, pooled: bool = False) -> None:
        """Writes what `embed` gives as .npy; see `encode.to_file`."""
        encode.to_file(self._encoder(params, pooled), self._items(split), out)

    def embed_index(self, state: TrainState) -> exact.Database:
        """f32[L, D], what is searched: label prototypes with PRIME, label embeddings without."""
        block = self.config.eval.database_block
        return encode.to_database(self._index_encoder(state), self._items("label"), block)

    def embed_index_to(self, state: TrainState, out: epath.PathLike) -> None:
        """Writes what `embed_index` gives as .npy; see `encode.to_file`."""
        encode.to_file(self._index_encoder(state), self._items("label"), out)

    def index_to(self, state: TrainState, pooled: np.ndarray, out: epath.PathLike) -> None:
        """Writes what `embed_index` gives as .npy, of label texts that are encoded; in one process.

        Args:
            state: see `TrainState`.
            pooled: f32[L, D], what `embed` gives of the labels, pooled.
            out: local or remote.
        """
        size = self.config.train.encode_batch_size
        with atomic.replaced(out) as file:
            rows = array_files.create(file, np.float32, pooled.shape)
            for start in range(0, len(pooled), size):
                ids = np.arange(start, start + size, dtype=np.int32).clip(max=len(pooled) - 1)
                block = sharding.put_batch((ids, pooled[ids]), size, self.mesh)
                unit = self.prototype(state.params, self.frozen, state.tables, *block)
                rows[start : start + size] = sharding.fetch(unit)[: len(pooled) - start]
            rows.flush()

    def merged(self, state: TrainState) -> Any:
        """All parameters, trained and frozen ones together."""
        return optimizer.merge(state.params, self.frozen)

    def evaluate(
        self,
        state: TrainState,
        config: EvalConfig | None = None,
        labels: np.ndarray | None = None,
    ) -> Evaluation:
        """Evaluates on the test documents.

        Retrieval-augmented inference searches the document bank: exact after the last epoch, before
        that each document's embedding as of its last visit.

        Args:
            state: see `TrainState`.
            config: the run's own by default.
            labels: f32[L, D], what `embed_index` gives; encoded by default.
        """
        config = config or self.config.eval
        return evaluate.evaluate(
            self.embed(state.params, "test"),
            self.embed_index(state) if labels is None else labels,
            self.data,
            config,
            self._documents(state) if config.augmented.enabled else None,
            self.mesh,
            self.prior,
        )

    def tune(self, state: TrainState) -> tuning.Choice | None:
        """Chooses weights of retrieval-augmented inference on validation documents.

        See `tuning.tune`. None but in process 0.
        """
        return tuning.tune(
            self.embed(state.params, tuning.split_of(self.data)),
            self.embed_index(state),
            self._documents(state),
            self.data,
            self.config.eval,
            self.config.tune,
            self.mesh,
            self.prior,
        )

    def evaluate_zero_shot(self, state: TrainState) -> Evaluation:
        """Evaluates label texts alone, without prototypes or neighbours: for an untrained state."""
        config = dataclasses.replace(
            self.config.eval,
            augmented=dataclasses.replace(self.config.eval.augmented, enabled=False),
            compare_scann=False,
        )
        labels = encode.to_database(
            self._encoder(state.params), self._items("label"), config.database_block
        )
        return evaluate.evaluate(
            self.embed(state.params, "test"), labels, self.data, config, mesh=self.mesh
        )

    def _documents(self, state: TrainState) -> exact.Database:
        bank, block = state.tables.document_bank, self.config.eval.database_block
        return exact.from_table(bank, self.mesh, block)

    def _encoder(self, params: Any, pooled: bool = False) -> encode.Encode:
        def one(rows, _):
            output = self.encode(params, self.frozen, rows)
            return output.pooled if pooled else output.unit

        return one

    def _index_encoder(self, state: TrainState) -> encode.Encode:
        def one(rows, ids):
            pooled = self.encode(state.params, self.frozen, rows).pooled
            return self.prototype(state.params, self.frozen, state.tables, ids, pooled)

        return one

    def _items(self, split: str) -> encode.Items:
        size = self.config.train.encode_batch_size
        return encode.Items(getattr(self.data, split), size, self.mesh, self.layout, _NAMES[split])

    def _table(
        self, params: Any, split: str, pooled: bool = False, dtype: str | None = None
    ) -> jax.Array:
        """The embeddings of a split as a table that stays on the devices."""
        abstract = self.abstract_table(len(getattr(self.data, split)), dtype)
        return encode.to_table(self._encoder(params, pooled), self._items(split), abstract)

    def _placed(self, state: TrainState) -> TrainState:
        return jax.device_put(state, shardings(self.abstract))

    def _check_texts(self, prompts: Prompts) -> None:
        """Raises ValueError if the dataset's texts are not what the backbone takes."""
        data, decodes = self.data, backbone.is_decoder(self.sizes)
        # Tokenizers may have more entries than the table has rows: ids that occur count.
        largest_prompt = max(prompts.head + prompts.middle + prompts.tail, default=0)
        largest, where = max(data.largest_token(), (largest_prompt, "prompts"))
        if largest >= self.sizes.vocab_size:
            raise ValueError(
                f"{data.folder}: expected token ids below {self.sizes.vocab_size}, the rows of "
                f"{self.source.name}'s table, found {largest} in {where}; leave data.tokenizer to "
                "the backbone, or take the token out of the texts"
            )
        if data.special_tokens is decodes:
            expected = ("with", "without")[decodes]
            raise ValueError(
                f"{data.folder}: expected texts {expected} the tokenizer's special tokens, as "
                f"{self.source.name} ({self.sizes.family}) takes them; prepare it anew"
            )
        empty = [s for s in data.splits if not getattr(data, s).lengths.all()]
        if empty and not prompts.head + prompts.tail:
            raise ValueError(
                f"{data.folder}: {empty} have texts without any token; set --config.fusion.prefix "
                "or --config.fusion.suffix, so that there is something to encode"
            )
