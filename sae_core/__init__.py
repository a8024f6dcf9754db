"""Sparse autoencoders: train, save, load, evaluate. Useful alone; knows no cluster and no tracker.

The names below are looked up on first use, so that importing the package, or only its errors, stays instant.
"""

from sae_core.lazy import names_on_first_use

_MODULES = {
    "architectures": [
        "ARCHITECTURES", "BatchTopKSAE", "BatchTopKSettings", "GatedSAE", "GatedSettings", "JumpReLUSAE",
        "JumpReLUSettings", "MatryoshkaSAE", "MatryoshkaSettings", "StandardSAE", "StandardSettings", "TopKSAE",
        "TopKSettings", "parse_settings",
    ],
    "baselines": ["TopKBasis"],
    "errors": ["CheckpointError", "ConfigError", "UserError"],
    "evaluation": ["ROW_SUMS", "EvaluationSums", "evaluate_rows", "metrics_of"],
    "normalization": ["Calibration", "calibrate"],
    "sae": ["SAE", "SAEConfig"],
    "settings": ["SAESettings", "TrainingSettings", "read_settings"],
    "training": ["SAETrainer"],
}  # fmt: skip

__all__, __getattr__ = names_on_first_use(__name__, _MODULES)
