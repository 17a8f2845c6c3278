"""The config of a run: all its sections in one object, read from files of any version."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import pydantic
from pydantic import Field

from xmc_jax.config.data_config import DataConfig
from xmc_jax.config.declare import explain, nested, section
from xmc_jax.config.model_config import EncoderConfig, FusionConfig, MeshConfig, PrimeConfig
from xmc_jax.config.retrieval_config import EvalConfig, TuneConfig
from xmc_jax.config.training_config import (
    CurriculumConfig,
    ExportConfig,
    LossConfig,
    OptimizerConfig,
    TablesConfig,
    TrainConfig,
)

# Fields of earlier versions that have no effect any more. A field that an earlier version lacks
# has its default.
RETIRED = ("eval.augmented.filter_first",)


@section("")
class RunConfig:
    """The config of a run."""

    name: str = Field("", description="Name of the run; runs/<name> is its default workdir.")
    data: DataConfig = nested(DataConfig, "The data.")
    encoder: EncoderConfig = nested(EncoderConfig, "The backbone.")
    fusion: FusionConfig = nested(FusionConfig, "The sequence of an item.")
    prime: PrimeConfig = nested(PrimeConfig, "Label prototypes.")
    loss: LossConfig = nested(LossConfig, "The training objective.")
    optimizer: OptimizerConfig = nested(OptimizerConfig, "AdamW.")
    curriculum: CurriculumConfig = nested(CurriculumConfig, "Clustered batches.")
    tables: TablesConfig = nested(TablesConfig, "Tables of embeddings.")
    mesh: MeshConfig = nested(MeshConfig, "Devices.")
    train: TrainConfig = nested(TrainConfig, "Batches and checkpoints.")
    eval: EvalConfig = nested(EvalConfig, "Evaluation.")
    tune: TuneConfig = nested(TuneConfig, "The mode tune.")
    export: ExportConfig = nested(ExportConfig, "The mode export.")
    baseline: dict[str, Any] = Field(
        default_factory=dict,
        description="Another run, trained first for comparison: its name and differing fields.",
    )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RunConfig":
        """The config of nested mappings, as from a config file or from config.json, whose
        `provenance` is left out.

        Raises:
            ValueError: a field is unknown, or has a value it cannot have.
        """
        try:
            known = {name: value for name, value in fields.items() if name != "provenance"}
            return _ADAPTER.validate_python(_without_retired(known))
        except pydantic.ValidationError as error:
            raise ValueError(explain(error, cls)) from None

    def replace(self, **sections: Mapping[str, Any]) -> "RunConfig":
        """The config with some fields of its sections replaced.

        Args:
            **sections: new values by field, of each section that changes.
        """
        changed = {
            name: dataclasses.replace(getattr(self, name), **fields)
            for name, fields in sections.items()
        }
        return dataclasses.replace(self, **changed)

    def override(self, fields: Mapping[str, Any]) -> "RunConfig":
        """The config with some fields replaced, given as nested mappings.

        Raises:
            ValueError: see `from_dict`.
        """
        return RunConfig.from_dict(override(dataclasses.asdict(self), fields))

    def compared(self) -> "RunConfig":
        """The config of the run that `baseline` describes."""
        differing = {name: value for name, value in self.baseline.items() if name != "name"}
        return dataclasses.replace(self.override(differing), baseline={})


_ADAPTER = pydantic.TypeAdapter(RunConfig)


def completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json of any version with the fields of this version.

    Retired fields are left out, missing fields have their defaults; `provenance` stays.
    """
    return override(dataclasses.asdict(RunConfig()), _without_retired(fields))


def _without_retired(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return {
        name: _without_retired(value, f"{prefix}{name}.") if isinstance(value, Mapping) else value
        for name, value in fields.items()
        if prefix + name not in RETIRED
    }


def override(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings with some values replaced."""
    merged = dict(fields)
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(fields.get(key), Mapping)
        merged[key] = override(fields[key], value) if both else value
    return merged
