"""The typed sections of a config; each is defined beside its consumer, but for the last two."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from xmc_jax.data import batches
from xmc_jax.models import dual, fusion, hf_export
from xmc_jax.retrieval import evaluate, tuning
from xmc_jax.runtime import sharding
from xmc_jax.training import curriculum, health, losses, optimizer, tables


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long, in which batches, and how often what is written.

    Attributes:
        batch_size: documents per step over all devices (B); all of them where there are fewer.
        epochs: passes over the training documents.
        seed: of every random stream.
        n_chunks: see `step.Step`.
        positives_per_document: labels sampled per document; a batch has B times as many.
        sampling: of those labels, "inverse_propensity" (reference) or "uniform".
        labels: what a document is compared with: "sampled", the labels of the batch, encoded with
            it (reference); or "all", whose texts are encoded at each boundary and get no gradient.
            A step of "all" costs O(L D B) on the devices, half the encoding, and needs no luck with
            negatives; the two fields before have no meaning then.
        packed: lay texts out in rows without padding; False, for comparisons, gives each text a row
            with room for the longest.
        encode_batch_size: about as many items per call where nothing is differentiated.
        checkpoint_every: steps between checkpoints within an epoch; every epoch ends with one.
        checkpoint_minutes: minutes after which another one is due within an epoch; 0 is never.
        log_every: steps per record of metrics.jsonl.
        eval_every: epochs between evaluations; 0 evaluates after the last epoch only.
        zero_shot: evaluate the weights that training starts from, too.
        keep: latest checkpoints kept beside the best.
        prefetch: batches prepared ahead.
        non_finite: a step of which loss, gradient or embeddings are not finite is never applied;
            "stop" ends the run there, "skip" goes on with the next batch.
        stuck_after: seconds after which a step that does not end ends the run; see `Watchdog`.
        non_finite_limit: so many of them in a row end the run with "skip", too.
    """

    batch_size: int
    epochs: int
    seed: int = 0
    n_chunks: int = 1
    positives_per_document: int = 1
    sampling: str = "inverse_propensity"
    labels: str = "sampled"
    packed: bool = True
    encode_batch_size: int = 512
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 15.0
    log_every: int = 10
    eval_every: int = 0
    zero_shot: bool = True
    keep: int = 2
    prefetch: int = 2
    non_finite: str = "stop"
    non_finite_limit: int = 10
    stuck_after: float = 1800.0

    def __post_init__(self):
        for name in (
            *("batch_size", "epochs", "n_chunks", "positives_per_document", "encode_batch_size"),
            *("checkpoint_every", "log_every", "prefetch", "non_finite_limit"),
        ):
            self._expect(name, getattr(self, name) >= 1, "at least 1")
        self._expect("keep", self.keep >= 2, "at least 2 checkpoints")
        self._expect("seed", 0 <= self.seed < 2**32, "a number in [0, 2^32)")
        self._expect(
            "sampling", self.sampling in batches.WEIGHTINGS, f"one of {batches.WEIGHTINGS}"
        )
        minutes = self.checkpoint_minutes
        self._expect("checkpoint_minutes", minutes >= 0, "minutes, or 0 for never")
        self._expect("stuck_after", self.stuck_after >= 0, "seconds, or 0 for no limit")
        policies = health.POLICIES
        self._expect("non_finite", self.non_finite in policies, f"one of {policies}")
        self._expect("labels", self.labels in batches.LABELS, f"one of {batches.LABELS}")
        self._expect("eval_every", self.eval_every >= 0, "epochs, or 0 for the end only")
        self._expect("batch_size", self.batch_size % self.n_chunks == 0, "a multiple of n_chunks")

    def _expect(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"train.{name}: expected {what}, got {getattr(self, name)!r}")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What the mode export writes; see `inference.artifact`.

    Attributes:
        format: "merged", a model by itself, adapters added to its weights, with all that it ranks;
            or "adapter", a folder for `peft`, which needs the model that training began with.
        dtype: of the merged weights; in bfloat16 embeddings differ from ours by its rounding.
        documents: with the training documents' embeddings, for augmented ranking and neighbours.
        prototypes: with what label prototypes are made of, for adding and changing labels.
        index: "auto", a ScaNN index where there are `eval.scann.brute_force_below` labels or more
            and scann is installed; "scann", always; "none".
        thumbnails: small pictures of labels and training documents, to be shown: "auto", where
            image files are at hand, up to 200,000 of each; "always"; "none".
        vision: "named", the image encoder by name, revision and digest; or "carried", its files. An
            encoder that comes from a folder is always carried.
    """

    format: str = "merged"
    dtype: str = "float32"
    documents: bool = True
    prototypes: bool = True
    index: str = "auto"
    thumbnails: str = "auto"
    vision: str = "named"

    def __post_init__(self):
        for name, known in (
            ("format", hf_export.FORMATS),
            ("dtype", hf_export.DTYPES),
            ("index", ("auto", "scann", "none")),
            ("thumbnails", ("auto", "always", "none")),
            ("vision", ("named", "carried")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"export.{name}: expected one of {known}, got {getattr(self, name)!r}"
                )


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The typed sections of a config."""

    encoder: dual.EncoderConfig
    fusion: fusion.FusionConfig
    prime: dual.PrimeConfig
    loss: losses.LossConfig
    optimizer: optimizer.OptimizerConfig
    curriculum: curriculum.CurriculumConfig
    tables: tables.TablesConfig
    mesh: sharding.MeshConfig
    train: TrainConfig
    eval: evaluate.EvalConfig
    tune: tuning.TuneConfig
    export: ExportConfig

    @classmethod
    def from_dict(cls, config: Mapping[str, Mapping[str, Any]]) -> "RunConfig":
        """Builds every section; the ones that are not a RunConfig's are left out.

        Raises:
            ValueError: a field is unknown, missing, or has a value it cannot have.
        """
        return cls(**{f.name: section(f.type, f.name, config) for f in dataclasses.fields(cls)})


def section(kind: type, name: str, config: Mapping[str, Mapping[str, Any]]) -> Any:
    """One section of a config as the dataclass `kind`; sections within it likewise.

    Raises:
        ValueError: names the field that is unknown or missing.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(config.get(name), Mapping):
        raise ValueError(f"config: expected a section {name!r}, got {config.get(name)!r}")
    values = {}
    for key, value in config[name].items():
        if key not in fields:
            raise ValueError(f"config: {name}.{key}: no such field; known: {', '.join(fields)}")
        nested = dataclasses.is_dataclass(fields[key].type)
        values[key] = section(fields[key].type, key, config[name]) if nested else value
    absent = dataclasses.MISSING
    missing = [
        field.name
        for field in fields.values()
        if (field.default, field.default_factory) == (absent, absent) and field.name not in values
    ]
    if missing:
        raise ValueError(f"config: {name}: expected the fields {', '.join(missing)}, got none")
    try:
        return kind(**values)
    except TypeError as error:  # of a comparison, say
        raise ValueError(
            f"config: {name}: expected values of the fields' types, see configs/vixml.py, got "
            f"others ({error})"
        ) from None
