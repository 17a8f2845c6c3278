"""Sections about retrieval: evaluation, augmented ranking, ScaNN, tuning, new labels."""

from typing import Annotated, Literal

from pydantic import Field

from xmc_jax.config.declare import (
    Count,
    InnerShare,
    NotNegative,
    Positive,
    Share,
    Whole,
    checked,
    nested,
    section,
)

CUT_OFFS = (1, 3, 5, 10, 100)
_FEWEST_ROWS = 16  # ScaNN quantises with 16 centers, and needs a row for each


@section("eval.augmented")
class AugmentedConfig:
    """Retrieval-augmented ranking: labels mixed with the labels of near training documents."""

    enabled: bool = Field(True, description="Whether evaluation ranks so, too.")
    mode: Literal["split", "joint"] = Field(
        "split", description="Search labels and documents apart (split) or together (joint)."
    )
    labels: Count = Field(
        100,
        description="Nearest labels that are mixed in split mode; joint mode mixes the nearest "
        "labels + documents items. [V]",
    )
    documents: Count = Field(
        100, description="Nearest training documents that are mixed in split mode. [V]"
    )
    temperature: Positive = Field(0.05, description="Temperature of the softmax. [V]")
    label_weight: Share = Field(
        0.9, description="Weight of the label side; the document side has the rest. [V]"
    )
    separate_softmax: bool = Field(False, description="One softmax per side instead of one.")
    normalize_rows: bool = Field(
        False,
        description="A document divides its weight among its labels instead of giving all of it "
        "to each.",
    )
    prior: str | None = Field(
        None, description="Prior of labels: a file, or frequency; none for no prior."
    )
    prior_weight: float = Field(
        1.0,
        description="Exponent of the prior; a label whose prior is 0 is not ranked.",
    )
    weights: Literal["config", "tuned"] = Field(
        "config", description="These values, or those that --mode=tune left in the workdir."
    )


@section("eval.scann")
class ScannConfig:
    """How a ScaNN index is built and searched. Fields left as none are derived from the database;
    leaves_searched and reorder are tuned to reach recall_target. [ours]"""

    brute_force_below: int = Field(
        20_000, description="A database of fewer rows is searched exhaustively. [ours]"
    )
    recall_target: InnerShare = Field(
        0.98,
        description="Share of the exact k to find; eval.index=exact finds all. [ours]",
    )
    leaves: Count | None = Field(None, description="Leaves of the tree; none is 3 sqrt(rows).")
    dimensions_per_block: Count | None = Field(
        None, description="Dimensions quantised together; none is 2, or what makes 256 blocks."
    )
    leaves_searched: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Share of the leaves that a query visits."
    )
    reorder: Annotated[float, Field(ge=1)] | None = Field(
        None, description="Candidates scored exactly, in multiples of k."
    )

    def builds_tree(self, rows: int) -> bool:
        """Whether an index of so many rows is a tree."""
        return rows >= max(self.brute_force_below, _FEWEST_ROWS)


@section("eval")
class EvalConfig:
    """How test documents are evaluated."""

    ks: tuple[Count, ...] = Field(
        CUT_OFFS, description="Cut-offs of the metrics; those above k are left out."
    )
    k: Count = Field(100, description="Predictions kept per document.")
    index: Literal["exact", "scann"] = Field("exact", description="How labels are searched.")
    augmented: AugmentedConfig = nested(AugmentedConfig, "Retrieval-augmented ranking.")
    scann: ScannConfig = nested(ScannConfig, "The ScaNN index.")
    compare_scann: bool = Field(
        False,
        description="With index=exact, also measure recall and speed of a ScaNN index of the "
        "labels, if it would be a tree.",
    )
    query_block: Count = Field(256, description="Documents per block of exact search.")
    database_block: Count = Field(
        262_144, description="Rows per block of exact search, on each device."
    )
    recall_target: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Recall of exact search; TPUs search faster below 1."
    )

    @property
    def cut_offs(self) -> tuple[int, ...]:
        """Cut-offs of the metrics, ascending: 1, and those of `ks` up to `k`."""
        return tuple(sorted({1, *(k for k in self.ks if k <= self.k)}))


def parse_metric(metric: str) -> tuple[tuple[str, int], ...]:
    """(name, k) of each part of e.g. "P@1+nDCG@5".

    Raises:
        ValueError: it is not one.
    """
    parts = [part.strip().partition("@") for part in metric.split("+")]
    if not all(name and k.isdecimal() and int(k) >= 1 for name, _, k in parts):
        raise ValueError(
            f"expected metrics joined by +, each a name and a cut-off, as P@1+nDCG@5, got "
            f"{metric!r}"
        )
    return tuple((name, int(k)) for name, _, k in parts)


@section("tune")
class TuneConfig:
    """Values that --mode=tune tries beside the config's own, and when the best of them counts."""

    metric: Annotated[str, checked(parse_metric)] = Field(
        "P@1+P@5+nDCG@5",
        description="Metrics joined by +, whose mean is maximised; P@1 alone changes with few "
        "documents. [ours]",
    )
    validation_fraction: InnerShare = Field(
        0.14, description="Share of training documents held out if none are yet. [ours]"
    )
    max_documents: Annotated[int, Field(ge=2)] = Field(
        5000, description="Held-out documents used, in whole sources. [ours]"
    )
    folds: Annotated[int, Field(ge=2)] = Field(
        5, description="Parts of the cross-validation that estimates the gain. [ours]"
    )
    standard_errors: NotNegative = Field(
        2.0, description="Standard errors that the gain must exceed to change settings. [ours]"
    )
    seed: Whole = Field(0, description="Seed of parts and documents. [ours]")
    labels: tuple[Count, ...] = Field(
        (50, 100, 200, 400), description="Values tried in split mode. [ours]"
    )
    documents: tuple[Count, ...] = Field(
        (25, 50, 100, 200), description="Values tried in split mode. [ours]"
    )
    temperature: tuple[Positive, ...] = Field(
        (0.02, 0.03, 0.04, 0.05, 0.07, 0.1), description="Values tried. [ours]"
    )
    label_weight: tuple[Share, ...] = Field(
        (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        description="Values tried in split mode. [ours]",
    )
    separate_softmax: tuple[bool, ...] = Field(
        (False, True), description="Values tried in split mode. [ours]"
    )
    normalize_rows: tuple[bool, ...] = Field((False, True), description="Values tried. [ours]")
    prior_weight: tuple[float, ...] = Field(
        (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.5, 1.0),
        description="Values tried if there is a prior. [ours]",
    )


@section("new_labels")
class NewLabelsConfig:
    """The prototype of a label that was never trained."""

    how: Literal["text", "nearest"] = Field(
        "nearest",
        description="From its text embedding alone, or with the vectors of near trained labels.",
    )
    neighbours: Count = Field(5, description="Most trained labels that a new one borrows from.")
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        -1.0, description="Least cosine of two texts that makes them neighbours."
    )
    temperature: Positive = Field(
        1.0, description="Temperature of the softmax that weighs neighbours."
    )
    scale: Positive = Field(
        0.95, description="Length of the new prototypes; that of trained labels is 1."
    )
