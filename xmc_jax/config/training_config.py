"""Sections about training: loss, optimizer, curriculum, tables, batches and checkpoints, export."""

import re
from typing import Annotated, Literal

from pydantic import Field

from xmc_jax.config.declare import (
    Count,
    NotNegative,
    Positive,
    Seed,
    ShareBelowOne,
    Whole,
    checked,
    section,
)
from xmc_jax.config.model_config import Dtype


@section("loss")
class LossConfig:
    """The training objective. The defaults are those of the ViXML run scripts for 131K labels."""

    kind: str = Field(
        "margin", description="margin (NGAME, PRIME, ViXML) or decoupled_softmax (DEXML)."
    )
    num_negatives: Count = Field(
        10, description="Hardest negatives per row, at most as many as columns. [script]"
    )
    weighted: bool = Field(
        True,
        description="Weigh the negatives of a row by a softmax; False takes their mean. [script]",
    )
    margin_min: NotNegative = Field(
        0.1, description="Lower bound of the dynamic margin, a cosine. [script]"
    )
    margin_max: NotNegative = Field(
        0.3, description="Upper bound of the margin; margin_min makes it constant. [script]"
    )
    weight_temperature: Positive = Field(
        0.1, description="Temperature of the negatives' weights. [script]"
    )
    softmax_temperature: Positive = Field(
        0.05, description="Temperature of the decoupled softmax, from DEXML's 131K recipe."
    )
    document_to_label: NotNegative = Field(
        1.0, description="Weight of the term from documents to label texts. [script]"
    )
    document_to_prototype: NotNegative = Field(
        1.0, description="Weight of the term from documents to label prototypes. [script]"
    )
    label_to_document: NotNegative = Field(
        1.0, description="Weight of the term from label texts to documents. [script]"
    )
    prototype_to_document: NotNegative = Field(
        0.0, description="Weight of the term from label prototypes to documents. [ours]"
    )
    regularizer: NotNegative = Field(
        0.1, description="Weight of the regularizer that prototypes gain over texts. [script]"
    )
    regularizer_margin: float = Field(
        0.1, description="Required gain of prototypes over label texts, a cosine. [script]"
    )
    block: Count | None = Field(
        None,
        description="Documents compared at a time on all devices, a divisor of the batch; none: "
        "all up to 2^26 similarities on a device, else as many as have 2^24.",
    )

    def __post_init__(self):
        if self.margin_max < self.margin_min:
            raise ValueError(
                f"margin_max: expected at least margin_min, {self.margin_min}, got "
                f"{self.margin_max}"
            )


def _compiles(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"expected a regular expression such as '.*', got {pattern!r:.60} ({error})"
        ) from None


Pattern = Annotated[str, checked(_compiles)]


@section("optimizer")
class OptimizerConfig:
    """AdamW and its groups of parameters. The first pattern that matches a whole path counts."""

    lr: tuple[tuple[Pattern, NotNegative], ...] = Field(
        (
            ("backbone/.*", 5e-4),
            ("combiner/.*", 5e-4),
            ("free_vectors", 5e-4),
            ("projection/.*", 5e-4),
        ),
        description="Peak learning rates, as pairs of a pattern and a rate. [V]",
    )
    weight_decay: tuple[tuple[Pattern, NotNegative], ...] = Field(
        (
            (".*bias", 0.0),
            ("backbone/.*norm.*", 0.0),
            ("free_vectors", 0.0),
            (".*", 0.01),
        ),
        description="Decoupled decay times the learning rate, as pairs; no norm of a backbone "
        "decays, where the reference misses some of DistilBERT. [script]",
    )
    trainable: tuple[tuple[Pattern, bool], ...] = Field(
        ((".*", True),), description="Whether parameters are trained, as pairs."
    )
    warmup_steps: Whole = Field(
        100, description="Steps of linear warm-up; the rate then falls to 0 linearly. [script]"
    )
    b1: ShareBelowOne = Field(0.9, description="Decay of the first moment.")
    b2: ShareBelowOne = Field(0.999, description="Decay of the second moment.")
    eps: Positive = Field(1e-6, description="Added to the root of the second moment. [script]")
    clip_norm: Positive | None = Field(
        None, description="Bound on the norm of the gradient; none for encoders. [script]"
    )


def _increase(epochs: tuple[int, ...]) -> None:
    if list(epochs) != sorted(set(epochs)):
        raise ValueError(f"expected increasing epochs, got {epochs}")


@section("curriculum")
class CurriculumConfig:
    """When documents are clustered into batches, and how finely."""

    start: Whole | None = Field(
        10, description="First epoch whose end clusters the documents; none never does. [script]"
    )
    update_every: Count = Field(5, description="Epochs between clusterings. [script]")
    cluster_size: Annotated[int, Field(ge=2)] = Field(
        16, description="Documents per cluster at first. [script]"
    )
    double_at: Annotated[tuple[int, ...], checked(_increase)] = Field(
        (20, 40, 60, 80, 100, 120),
        description="Epochs at whose end cluster_size doubles. [script]",
    )


@section("tables")
class TablesConfig:
    """How the document bank and the centroids of labels are kept."""

    centroids: Literal["stale", "exact", "ema"] = Field(
        "stale",
        description="stale: recomputed after each epoch from the bank; exact: from documents "
        "encoded anew; ema: moved at every step. [V]",
    )
    ema_decay: ShareBelowOne = Field(
        0.95, description="Share of itself that a centroid keeps at a step of ema. [script]"
    )
    dtype: Dtype = Field("float32", description="Type of the bank and the centroids.")


@section("train")
class TrainConfig:
    """How long, in which batches, and how often records and checkpoints are written."""

    batch_size: Count = Field(
        2048, description="Documents per step over all devices, at most all documents. [V]"
    )
    epochs: Count = Field(300, description="Passes over the training documents. [V]")
    seed: Seed = Field(0, description="Seed of every random stream.")
    n_chunks: Count = Field(
        1, description="Parts in which a batch is encoded, one after the other; divides the batch."
    )
    positives_per_document: Count = Field(1, description="Labels sampled per document. [script]")
    sampling: Literal["inverse_propensity", "uniform"] = Field(
        "inverse_propensity", description="Weights by which labels are sampled. [script]"
    )
    labels: Literal["sampled", "all"] = Field(
        "sampled",
        description="Labels that a document is compared with: those sampled for the batch, or all, "
        "encoded once an epoch without gradients. [script]",
    )
    packed: bool = Field(
        True,
        description="Lay texts out in rows without padding; False gives each text its row. [ours]",
    )
    encode_batch_size: Count = Field(
        512, description="Items per call where nothing is differentiated."
    )
    checkpoint_every: Count = Field(
        1000, description="Steps between checkpoints within an epoch; every epoch ends with one."
    )
    checkpoint_minutes: NotNegative = Field(
        15.0, description="Minutes between checkpoints within an epoch; 0 means no such limit."
    )
    log_every: Count = Field(10, description="Steps per record of metrics.jsonl.")
    eval_every: Whole = Field(
        25, description="Epochs between evaluations; 0 evaluates at the end only. [script]"
    )
    zero_shot: bool = Field(True, description="Evaluate the initial weights, too.")
    keep: Annotated[int, Field(ge=2)] = Field(
        2, description="Latest checkpoints that are kept beside the best."
    )
    prefetch: Count = Field(2, description="Batches prepared ahead.")
    non_finite: Literal["stop", "skip"] = Field(
        "stop",
        description="At a step whose numbers are not finite: stop the run, or skip the batch. "
        "Such a step is never applied.",
    )
    non_finite_limit: Count = Field(
        10, description="Number of such steps in a row that ends a run with skip."
    )
    stuck_after: NotNegative = Field(
        1800.0, description="Seconds after which an unfinished step ends the run; 0 means never."
    )

    def __post_init__(self):
        if self.batch_size % self.n_chunks:
            raise ValueError(
                f"batch_size: expected a multiple of n_chunks, {self.n_chunks}, got "
                f"{self.batch_size}"
            )


@section("export")
class ExportConfig:
    """What the mode export writes; see docs/predict.md."""

    format: Literal["merged", "adapter"] = Field(
        "merged",
        description="merged: a complete model with its labels; adapter: the adapters alone, for "
        "peft.",
    )
    dtype: Dtype = Field(
        "float32", description="Type of the merged weights; bfloat16 rounds the embeddings."
    )
    documents: bool = Field(
        True, description="Include the training documents, for augmented ranking and neighbours."
    )
    prototypes: bool = Field(
        True, description="Include the parts of label prototypes, for changing labels later."
    )
    index: Literal["auto", "scann", "none"] = Field(
        "auto",
        description="ScaNN index: auto if there are eval.scann.brute_force_below labels and scann "
        "is installed.",
    )
    thumbnails: Literal["auto", "always", "none"] = Field(
        "auto",
        description="Small pictures of labels and training documents: auto where image files "
        "exist, up to 200,000 of each.",
    )
    vision: Literal["named", "carried"] = Field(
        "named",
        description="Image encoder: by name and digest, or its files; one from a folder is always "
        "carried.",
    )
