"""Looking into a model through its SAEs: splicing them in, steering, attribution, feature dashboards.

The names below are looked up on first use; TransformerLens is imported by what needs it, not by this package.
"""

import importlib
from typing import Any

_MODULES: dict[str, list[str]] = {
    "attribution": ["ERROR", "Attribution", "Effects", "ablate", "attribute", "recall"],
    "metrics": ["log_prob", "logit", "logit_difference"],
    "feature_edges": ["Edges", "edges"],
    "feature_files": ["Features", "read_features"],
    "features": [
        "FeaturePass",
        "FeatureSettings",
        "MergedFeatures",
        "decoder_neighbours",
        "latent_groups",
        "latent_logits",
    ],
    "generation": [],
    "neuronpedia": [
        "feature_url",
        "get_neuronpedia_quick_list",
        "neuronpedia_id",
        "open_neuronpedia_feature_dashboard",
        "quick_list_url",
    ],
    "splicing": ["SplicedModel", "with_saes"],
    "steering": ["Ablate", "Add", "Clamp", "Scale", "Steered", "steer", "sweep_strengths"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
