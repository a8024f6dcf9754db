"""Sparse autoencoders: train, save, load, evaluate. Useful alone; knows no cluster and no tracker.

The names below are looked up on first use, so that importing the package, or only its errors, stays instant.
"""

import importlib
from typing import Any

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
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
