"""The names that SAELens' scripts import: change `from sae_lens import ...` to `from penstock.compat import ...`.

What each keyword of a training configuration becomes is in `KEYWORDS`; `python -m penstock.compat` prints it. Of
SAELens' other names, those that are not here say on import what there is instead.
"""

import importlib
from typing import Any

_MODULES = {
    "config": [
        "BatchTopKTrainingSAEConfig", "CompatibilityNotice", "GatedTrainingSAEConfig", "JumpReLUTrainingSAEConfig",
        "LanguageModelSAERunnerConfig", "LoggingConfig", "MatryoshkaBatchTopKTrainingSAEConfig",
        "StandardTrainingSAEConfig", "TopKTrainingSAEConfig", "TrainingSAEConfig",
    ],
    "evals": ["EvalConfig", "get_eval_everything_config", "run_evals"],
    "keywords": ["KEYWORDS"],
    "directory": ["get_pretrained_saes_directory"],
    "model": ["HookedSAETransformer", "SAETransformerBridge"],
    "runner": ["LanguageModelSAETrainingRunner", "SAETrainingRunner"],
    "store": ["ActivationsStore"],
}  # fmt: skip
_HOME = {name: f"penstock.compat.{module}" for module, names in _MODULES.items() for name in names}
_HOME |= dict.fromkeys(("SAE", "SAEConfig"), "sae_core")
_NEURONPEDIA = ("get_neuronpedia_quick_list", "open_neuronpedia_feature_dashboard")
_HOME |= dict.fromkeys(_NEURONPEDIA, "sae_core.analysis.neuronpedia")
_HOME |= dict.fromkeys(("StandardSAE", "GatedSAE", "TopKSAE", "JumpReLUSAE"), "sae_core")

_TRAINER = "training is SAETrainingRunner's, or penstock.train's; a step of your own is sae_core.SAETrainer's"
_HARVEST = "`penstock harvest SPEC` fills a spool, and data.spool does so while a sweep trains"
_TOKENS = "datasets of text are tokenised once, and kept, when a sweep first needs them"
_OTHER = "SAE.load reads transcoders, and penstock.train trains them (hook_point={'reads': A, 'writes': B})"
_LOADERS = "SAE.load, SAE.from_hub and SAE.from_pretrained know the formats themselves"
_NO_CONFIG = "an SAE's configuration is SAEConfig whatever its architecture"
NOT_HERE: dict[str, str] = {
    **dict.fromkeys(("TrainingSAE", "SAETrainer"), _TRAINER),
    **{f"{name}TrainingSAE": _TRAINER for name in ("Standard", "Gated", "TopK", "JumpReLU", "BatchTopK")},
    "MatryoshkaBatchTopKTrainingSAE": _TRAINER,
    **{f"{name}SAEConfig": _NO_CONFIG for name in ("Standard", "Gated", "TopK", "JumpReLU")},
    **dict.fromkeys(("CacheActivationsRunner", "CacheActivationsRunnerConfig"), _HARVEST),
    **dict.fromkeys(("PretokenizeRunner", "PretokenizeRunnerConfig", "pretokenize_runner"), _TOKENS),
    **{f"{name}{part}": _OTHER for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder",
                                            "JumpReLUSkipTranscoder") for part in ("", "Config")},
    **{f"{name}{part}": "there is no such architecture here" for name in ("AbsTopK", "MatchingPursuit")
       for part in ("SAE", "SAEConfig", "TrainingSAE", "TrainingSAEConfig")},
    **dict.fromkeys(("TemporalSAE", "TemporalSAEConfig"), "there is no such architecture here"),
    **dict.fromkeys(("PretrainedSaeHuggingfaceLoader", "PretrainedSaeDiskLoader"), _LOADERS),
    **dict.fromkeys(("register_sae_class", "register_sae_training_class"),
                    "an architecture is added in sae_core/architectures (see README)"),
    **dict.fromkeys(("MultiSAETrainingRunner", "MultiSAETrainingRunnerConfig", "MultiSAEEvaluator"),
                    "many SAEs on one stream are what penstock.train(saes=[...]) and `penstock run SPEC` train"),
    "upload_saes_to_huggingface": "huggingface_hub.upload_folder uploads a folder of sae.save or penstock.pull",
}  # fmt: skip

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in NOT_HERE:
        raise ImportError(f"penstock.compat has no {name}: {NOT_HERE[name]}", name=__name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
