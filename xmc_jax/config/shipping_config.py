"""Flags of the modes predict, labels and serve."""

from typing import Annotated, Literal

from pydantic import Field

from xmc_jax.config.declare import Count, Positive, Whole, section

Index = Literal["auto", "exact", "scann"]
Ranking = Literal["auto", "plain", "augmented"]
_COLUMNS = "field=column,... for columns of other names; field= leaves one out. Fields: "
_DELIMITER = "Delimiter of CSV cells, one character or tab; if empty, the header tells it."
_ALLOW_PATHS = "Allow image paths that lead out of the folder of the file that names them."


@section("predict")
class PredictConfig:
    """How labels are ranked for new documents."""

    k: Count = Field(10, description="Labels per document.")
    index: Index = Field(
        "auto", description="auto is ScaNN if the model has an index and scann is installed."
    )
    ranking: Ranking = Field(
        "auto",
        description="Labels by inner product (plain), or mixed with the labels of near training "
        "documents (augmented); auto is what the model says.",
    )
    only: str = Field(
        "", description="File of label ids, one a line: predict no others. Searches exactly."
    )
    exclude: str = Field(
        "", description="File of label ids, one a line: never predict these. Searches exactly."
    )
    columns: tuple[str, ...] = Field(
        (), description=f"{_COLUMNS}id, text, content, images, only, exclude."
    )
    delimiter: str = Field("", description=_DELIMITER)
    allow_paths: bool = Field(False, description=_ALLOW_PATHS)
    on_error: Literal["stop", "skip"] = Field(
        "stop",
        description="At a document that cannot be ranked: stop, or write the error in place of "
        "its labels (skip).",
    )
    batch_size: Count = Field(2048, description="Documents at a time; results do not depend on it.")


@section("labels")
class LabelsConfig:
    """Changes to the labels of an exported model."""

    add: str = Field(
        "", description="File of new labels (.jsonl, .csv, .parquet): id, text, perhaps images."
    )
    update: str = Field("", description="The same for labels whose ids exist.")
    remove: str = Field("", description="File of label ids, one a line.")
    out: str = Field("", description="Folder of the changed model; if empty, change it in place.")
    how: Literal["auto", "text", "nearest"] = Field(
        "auto", description="Prototypes of new labels; auto is nearest."
    )
    columns: tuple[str, ...] = Field((), description=f"{_COLUMNS}id, text, content, images.")
    delimiter: str = Field("", description=_DELIMITER)
    allow_paths: bool = Field(False, description=_ALLOW_PATHS)


@section("serve")
class ServeConfig:
    """Where the server listens, how it batches requests, and what it refuses."""

    host: str = Field(
        "127.0.0.1", description="Address to listen at; 0.0.0.0 is all of the machine's."
    )
    port: Annotated[int, Field(ge=0, le=2**16 - 1)] = Field(
        8000, description="Port to listen at; 0 is any free one."
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        description="Further host names that requests may name, besides host and this machine; * "
        "is any. Others are refused, against DNS rebinding.",
    )
    index: Index = Field(
        "auto", description="auto is ScaNN if the model has an index and scann is installed."
    )
    max_batch: Count = Field(32, description="Queries ranked in one call.")
    max_wait_ms: Annotated[float, Field(ge=0, le=1000)] = Field(
        20.0,
        description="Milliseconds that a batch waits to fill, at most a quarter of the last "
        "batch's time.",
    )
    queue: Count = Field(
        512, description="Queries and images that may wait; more are refused with 503."
    )
    max_queries: Count = Field(32, description="Queries of a request.")
    max_k: Count = Field(100, description="Labels or documents per query.")
    max_text: Count = Field(10_000, description="Characters of a text.")
    max_only: Whole = Field(4096, description="Label ids that a query may be restricted to.")
    max_exclude: Whole = Field(4096, description="Label ids that a query may exclude.")
    max_body: Count = Field(2**24, description="Bytes of a request.")
    max_held: Count = Field(
        2**28, description="Bytes of all requests in progress; more are refused with 503."
    )
    max_image_bytes: Count = Field(2**23, description="Bytes of an image file.")
    max_image_pixels: Count = Field(2**24, description="Pixels of an image.")
    max_connections: Count = Field(1000, description="Open connections; more are refused with 503.")
    timeout: Positive = Field(
        30.0, description="Seconds after which a request that is not yet ranked gets 503."
    )
    read_timeout: Positive = Field(
        20.0, description="Seconds in which a request must arrive and its answer be taken."
    )
    keep_alive: Count = Field(30, description="Seconds that a connection may be idle.")
    drain: Count = Field(
        30, description="Seconds that requests in progress have when the server ends."
    )
    stuck_after: Positive = Field(
        60.0, description="Seconds of one call of the model after which /healthz answers 503."
    )
    show_documents: bool | None = Field(
        None,
        description="Allow texts and pictures of training documents in answers; if not given, only "
        "while the server listens to this machine alone.",
    )

    def __post_init__(self):
        for name, least in (("queue", "max_queries"), ("max_held", "max_body")):
            if getattr(self, name) < getattr(self, least):
                raise ValueError(
                    f"{name}: expected at least {least}, {getattr(self, least)}, got "
                    f"{getattr(self, name)}"
                )

    @property
    def rows(self) -> tuple[int, ...]:
        """Numbers of queries that the model's programs are compiled for."""
        return tuple(size for size in (1, 8) if size < self.max_batch) + (self.max_batch,)
