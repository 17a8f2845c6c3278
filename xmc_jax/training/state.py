"""The arrays of a training step, and all that persists from step to step."""

from typing import Any

import flax.struct

from xmc_jax.data.types import Array


@flax.struct.dataclass
class Pairs:
    """Embeddings of a batch's documents and of the labels they are compared with: unit vectors.

    Attributes:
        document: f32[B, D].
        label: f32[U, D], of label texts.
        prototype: f32[U, D], label prototypes; None without PRIME.
        relevance: bool[B, U]; None for all labels.
        positives: i32[m], all labels: the positives of all documents, and U as padding. Labels are
            then split over the devices, and similarities by column.
        owners: i32[m], which document has each of `positives`.
        positive_cosines: f32[m], all labels and PRIME: cosines of documents and prototypes that
            stand in the place of those of `positives`.
    """

    document: Array
    label: Array
    prototype: Array | None = None
    relevance: Array | None = None
    positives: Array | None = None
    owners: Array | None = None
    positive_cosines: Array | None = None


@flax.struct.dataclass
class Health:
    """Whether the numbers of a step are finite. If not, it changed nothing but its own number.

    Attributes:
        finite: bool[], all that follows and the loss.
        documents: bool[B], the embedding of each document.
        label: i32[], a label with an embedding or prototype that is not, -1 if there is none; not
            looked for where documents are compared with all labels.
        gradients: bool[] for each trainable parameter, in their tree.
    """

    finite: Array
    documents: Array
    label: Array
    gradients: Any


@flax.struct.dataclass
class Tables:
    """Per-document and per-label arrays kept across steps (not trained by gradient).

    Attributes:
        document_bank: [N, D], the unit embedding of each document as of its last visit.
        centroids: [L, D], mean unit embedding of the training documents of each label; None
            without PRIME.
        label_bank: [L, D], the pooled embedding of each label's text as of the last boundary; None
            where labels are sampled.
        free_vector_of: i32[L], the row of the free vectors that a label uses; None without PRIME.
        leaf_order: i32[N], documents in the order of the leaves of the last balanced clustering.
    """

    document_bank: Array
    centroids: Array | None
    label_bank: Array | None
    free_vector_of: Array | None
    leaf_order: Array


@flax.struct.dataclass
class TrainState:
    """Everything that persists. A training run is a pure function of (config, data, step).

    Attributes:
        step: i32[], optimizer steps done.
        boundaries: i32[], epoch boundaries done.
        params: trainable parameters.
        opt_state: state of the optimizer for `params`.
        tables: see `Tables`.
    """

    step: Array
    boundaries: Array
    params: Any
    opt_state: Any
    tables: Tables
