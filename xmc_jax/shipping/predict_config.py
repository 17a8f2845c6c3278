"""Settings of predictions and of changes of labels: flags, made before anything is loaded."""

import dataclasses

INDEXES = ("auto", "exact", "scann")
RANKINGS = ("auto", "plain", "augmented")
ON_ERROR = ("stop", "skip")
HOWS = ("auto", "text", "nearest")


@dataclasses.dataclass(frozen=True)
class PredictConfig:
    """How labels are ranked for new documents.

    Attributes:
        k: labels per document.
        index: "exact", "scann", or "auto": ScaNN where the artifact has an index and scann is
            installed.
        ranking: "plain" is labels by inner product; "augmented" mixes them with the labels of near
            training documents; "auto" is augmented where the artifact says so.
        only: file of label ids, one per line: no others are predicted. Searched exactly.
        exclude: file of label ids, one per line, that are never predicted. The others are searched
            exactly.
        columns: field=column,... for columns of other names, "field=" to leave one out; fields are
            id, text, content, images, only, exclude.
        delimiter: what separates the cells of CSV, one character or "tab"; "" if the header is to
            tell it.
        allow_paths: whether paths of images may lead out of the folder of the file that has them.
        on_error: at a document that cannot be ranked "stop", or "skip" it: what is wrong is written
            in place of its labels.
        batch_size: documents at a time; results do not depend on it.
    """

    k: int = 10
    index: str = "auto"
    ranking: str = "auto"
    only: str = ""
    exclude: str = ""
    columns: tuple[str, ...] = ()
    delimiter: str = ""
    allow_paths: bool = False
    on_error: str = "stop"
    batch_size: int = 2048

    def __post_init__(self):
        for name, known in (
            ("index", INDEXES),
            ("ranking", RANKINGS),
            ("on_error", ON_ERROR),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"predict.{name}: expected one of {known}, got {getattr(self, name)!r}"
                )
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"predict.{name}: expected at least 1, got {getattr(self, name)}")


@dataclasses.dataclass(frozen=True)
class LabelsConfig:
    """How the labels of an exported model change; see `labels`.

    Attributes:
        add: file of labels, .jsonl, .csv or .parquet, with id and text, perhaps images; their ids
            must be new.
        update: likewise, of ids that are there.
        remove: file of label ids, one per line.
        out: folder for the changed model; changed where it is by default.
        how: prototypes of new labels: "text", "nearest", or "auto", the default of
            `new_labels.NewLabelsConfig`.
        columns: as of --predict.columns; fields are id, text, content, images.
        delimiter: as of --predict.delimiter.
        allow_paths: as of --predict.allow_paths.
    """

    add: str = ""
    update: str = ""
    remove: str = ""
    out: str = ""
    how: str = "auto"
    columns: tuple[str, ...] = ()
    delimiter: str = ""
    allow_paths: bool = False

    def __post_init__(self):
        if self.how not in HOWS:
            raise ValueError(f"labels.how: expected one of {HOWS}, got {self.how!r}")
