"""Sparse autoencoders: train, save, load, evaluate. Useful alone; knows no cluster and no tracker."""

from sae_core.architectures import (
    ARCHITECTURES,
    GatedSAE,
    GatedSettings,
    StandardSAE,
    StandardSettings,
    TopKSAE,
    TopKSettings,
    parse_settings,
)
from sae_core.baselines import TopKBasis
from sae_core.errors import CheckpointError, ConfigError, UserError
from sae_core.evaluation import EvaluationSums, evaluate_rows
from sae_core.normalization import Calibration, calibrate
from sae_core.sae import SAE, SAEConfig
from sae_core.settings import SAESettings, TrainingSettings, read_settings
from sae_core.training import SAETrainer

__all__ = [
    "ARCHITECTURES",
    "SAE",
    "Calibration",
    "CheckpointError",
    "ConfigError",
    "EvaluationSums",
    "GatedSAE",
    "GatedSettings",
    "SAEConfig",
    "SAESettings",
    "SAETrainer",
    "StandardSAE",
    "StandardSettings",
    "TopKBasis",
    "TopKSAE",
    "TopKSettings",
    "TrainingSettings",
    "UserError",
    "calibrate",
    "evaluate_rows",
    "parse_settings",
    "read_settings",
]
