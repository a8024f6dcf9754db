"""Looking into a model through its SAEs: splicing them in, steering, attribution, feature dashboards.

The names below are looked up on first use; TransformerLens is imported by what needs it, not by this package.
"""

from sae_core.lazy import names_on_first_use

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

__all__, __getattr__ = names_on_first_use(__name__, _MODULES)
