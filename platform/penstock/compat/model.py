"""SAELens' model class by its name: what it gives is a TransformerBridge with the same surface."""

from typing import Any

from penstock import models
from penstock.compat.keywords import shown
from penstock.errors import ConfigError
from penstock.spec import ModelSpec

# Arguments of TransformerLens' that have no counterpart, the values that ask for nothing, and what to do instead.
_LIMITED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hf_model": ((None,), "save it (hf_model.save_pretrained(DIR), with its tokenizer) and load the folder"),
    "tokenizer": ((None,), "save it into the model's folder (tokenizer.save_pretrained(DIR)) and load that"),
    "checkpoint_index": ((None,), "name a checkpoint's branch on the hub by `revision`"),
    "checkpoint_value": ((None,), "name a checkpoint's branch on the hub by `revision`"),
    "checkpoint_label": ((None,), "name a checkpoint's branch on the hub by `revision`"),
    "first_n_layers": ((None,), "the whole model is loaded; a hook point ends a forward pass where it lies"),
    "n_ctx": ((None,), "the model keeps its own context"),
    "n_devices": ((None, 1), "the model is on one device"),
    "move_to_device": ((True,), "give the device"),
    "default_padding_side": ((None, "right"), "set model.tokenizer.padding_side"),
    "refactor_factored_attn_matrices": ((False,), "attention is left factored as it is"),
    "trust_remote_code": ((False, None), "code that comes with a model is not run"),
    "center_weights": ((False, None), "the name is center_writing_weights"),
    "local_files_only": ((False, None), "set HF_HUB_OFFLINE=1"),
}


class _AnySpliced(type):
    def __instancecheck__(cls, instance: object) -> bool:
        from sae_core.analysis.splicing import SplicedModel

        return isinstance(instance, SplicedModel)


class HookedSAETransformer(metaclass=_AnySpliced):
    """`from_pretrained` and `from_pretrained_no_processing` load a model as TransformerLens does by these names: the
    first folds the norms' weights in and centres what writes to the residual stream, unless told otherwise, the second
    leaves the weights as they are. What comes back is a TransformerBridge with `run_with_saes`, `add_sae` and the rest
    (`sae_core.analysis.SplicedModel`); `isinstance(model, HookedSAETransformer)` is true of it.

    An SAE that was trained on other weights than the model has is refused when it is spliced in.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise ConfigError("HookedSAETransformer is not made from a configuration; accepted: "
                          "HookedSAETransformer.from_pretrained(NAME), and sae_core.analysis.with_saes(model) for a "
                          "TransformerBridge or HookedTransformer that is loaded already")  # fmt: skip

    @staticmethod
    def from_pretrained(
        model_name: str,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        *,
        fold_value_biases: bool = True,
        device: Any = None,
        dtype: Any = "float32",
        revision: str | None = None,
        default_prepend_bos: bool | None = None,
        **limited: Any,
    ) -> Any:
        """The model, its weights processed as asked. Those of a model with RMS norms are never centred, as in
        TransformerLens: its norms do not take out a mean. `device`: a GPU where there is one unless given. Gradients
        are recorded, also as there, unless the script says `torch.no_grad()`.

        Raises ConfigError for an argument that has no counterpart here, and `ModelError` for a model that cannot be
        loaded.
        """
        import torch

        from sae_core.analysis import with_saes

        for name, value in limited.items():
            if name not in _LIMITED:
                raise ConfigError(f"HookedSAETransformer: unknown argument {name!r}; accepted: model_name, fold_ln, "
                                  "center_writing_weights, center_unembed, fold_value_biases, device, dtype, revision, "
                                  "default_prepend_bos")  # fmt: skip
            accepted, instead = _LIMITED[name]
            if not any(value is one or value == one for one in accepted):
                raise ConfigError(f"HookedSAETransformer: {name} is {value!r}; accepted: {shown(accepted)}; {instead}")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        spec = ModelSpec.model_validate(
            {"name": model_name, "dtype": str(dtype).removeprefix("torch."), "revision": revision}
        )
        bridge = models.load_model(spec, str(device))
        center_writing_weights = center_writing_weights and not bridge.cfg.uses_rms_norm
        if fold_ln or center_writing_weights or center_unembed or fold_value_biases:
            bridge.process_weights(
                fold_ln=fold_ln,
                center_writing_weights=center_writing_weights,
                center_unembed=center_unembed,
                fold_value_biases=fold_value_biases,
            )
        bridge.eval().requires_grad_(True)  # for the gradients that scripts take at hooks
        if default_prepend_bos is not None:
            bridge.cfg.default_prepend_bos = default_prepend_bos
        return with_saes(bridge)

    @staticmethod
    def from_pretrained_no_processing(
        model_name: str,
        fold_ln: bool = False,
        center_writing_weights: bool = False,
        center_unembed: bool = False,
        *,
        fold_value_biases: bool = False,
        **options: Any,
    ) -> Any:
        """As `from_pretrained`, the weights left as they are but for what is asked for."""
        return HookedSAETransformer.from_pretrained(
            model_name, fold_ln, center_writing_weights, center_unembed, fold_value_biases=fold_value_biases, **options
        )

    @staticmethod
    def boot_transformers(model_name: str, **options: Any) -> Any:
        """As TransformerBridge has it: the weights left as they are."""
        return HookedSAETransformer.from_pretrained_no_processing(model_name, **options)


SAETransformerBridge = HookedSAETransformer
