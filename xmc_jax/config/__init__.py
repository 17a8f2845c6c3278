"""The one declaration of every config: fields, types, limits, defaults and what they mean."""

from xmc_jax.config.data_config import (
    DataConfig,
    ImagesOptions,
    RecordsOptions,
    SyntheticOptions,
)
from xmc_jax.config.declare import choices
from xmc_jax.config.model_config import (
    EncoderConfig,
    FusionConfig,
    LoraConfig,
    MeshConfig,
    PrimeConfig,
)
from xmc_jax.config.retrieval_config import (
    AugmentedConfig,
    EvalConfig,
    NewLabelsConfig,
    ScannConfig,
    TuneConfig,
)
from xmc_jax.config.run_config import RunConfig
from xmc_jax.config.shipping_config import LabelsConfig, PredictConfig, ServeConfig
from xmc_jax.config.training_config import (
    CurriculumConfig,
    ExportConfig,
    LossConfig,
    OptimizerConfig,
    TablesConfig,
    TrainConfig,
)

__all__ = [
    "AugmentedConfig",
    "CurriculumConfig",
    "DataConfig",
    "EncoderConfig",
    "EvalConfig",
    "ExportConfig",
    "FusionConfig",
    "ImagesOptions",
    "LabelsConfig",
    "LoraConfig",
    "LossConfig",
    "MeshConfig",
    "NewLabelsConfig",
    "OptimizerConfig",
    "PredictConfig",
    "PrimeConfig",
    "RecordsOptions",
    "RunConfig",
    "ScannConfig",
    "ServeConfig",
    "SyntheticOptions",
    "TablesConfig",
    "TrainConfig",
    "TuneConfig",
    "choices",
]
