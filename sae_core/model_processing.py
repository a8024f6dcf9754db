"""How a language model's weights were processed, and which activations that changes.

TransformerLens can rewrite weights so that the model's predictions stay, and some activations become others: an SAE
that was trained on those reads nonsense on these.

    fold_ln                 the norms' weights go into what follows: changes what lies between a norm and the weights
                            that read it (ln1.hook_out, mlp.hook_in); the residual stream stays
    center_writing_weights  whatever writes to the residual stream has mean 0: changes the stream and all parts of it
    fold_value_biases       value biases go into the output's bias: changes hook_v and hook_z
    center_unembed          changes logits alone

Checkpoints say which they were made on: ours by `model_processing`, SAELens' by the arguments with which it loads a
`HookedTransformer` that is otherwise left as it is (`model_from_pretrained_kwargs`). Loads neither torch nor
TransformerLens.
"""

import re
from collections.abc import Mapping
from typing import Any

from sae_core.errors import CheckpointError

PROCESSING: dict[str, frozenset[str]] = {
    "none": frozenset(),
    "fold_ln": frozenset({"fold_ln"}),
    "center": frozenset({"center_writing_weights"}),
    "fold_ln_center": frozenset({"fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"}),
}
"""The names by which specs and our checkpoints call processings, and what each consists of."""

STEPS = ("fold_ln", "center_writing_weights", "fold_value_biases", "center_unembed", "refactor_factored_attn_matrices")
_NORMED = re.compile(r".*(hook_normalized|ln(\d|_final)\.hook_out|(mlp|attn|unembed)\.hook_in)")
_VALUES = re.compile(r".*(hook_v|hook_z|attn\.v\.hook_out|attn\.o\.hook_in)")
_UNCHANGED = re.compile(r".*(hook_q|hook_k|hook_pattern|hook_attn_scores|mlp\.hook_(pre|post|pre_linear))")


def steps_of(metadata: Mapping[str, Any]) -> frozenset[str] | None:
    """The steps with which the model's weights were processed that an SAE was trained on; None where its metadata do
    not say. Raises CheckpointError for what is no processing."""
    own = metadata.get("model_processing")
    if own is not None:
        if own not in PROCESSING:
            raise CheckpointError(f"metadata.model_processing is {own!r}; accepted: {', '.join(PROCESSING)}")
        return PROCESSING[own]
    arguments = metadata.get("model_from_pretrained_kwargs")
    if arguments is None:
        return None
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"metadata.model_from_pretrained_kwargs is {arguments!r}; accepted is an object")
    return frozenset(name for name in STEPS if arguments.get(name) is True)


def processing_of(metadata: Mapping[str, Any]) -> str | None:
    """The name in `PROCESSING` of what a checkpoint says of its model's weights; None where it says nothing. Raises
    CheckpointError for steps that have no name together."""
    steps = steps_of(metadata)
    if steps is None:
        return None
    for name, known in PROCESSING.items():
        if steps == known:
            return name
    raise CheckpointError(
        f"metadata.model_from_pretrained_kwargs has {', '.join(sorted(steps))}, together no processing that is known "
        f"here; accepted: {', '.join(PROCESSING)}, chosen by hand"
    )


def steps_that_matter(hook_point: str, normalize_activations: str = "none") -> tuple[str, ...]:
    """Which steps change what an SAE sees of the activations at a hook point. One that normalises each token by
    layer_norm takes the mean out itself, and puts it back."""
    if _UNCHANGED.fullmatch(hook_point):
        return ()
    if _VALUES.fullmatch(hook_point):
        return ("fold_value_biases",)
    if _NORMED.fullmatch(hook_point):
        return ("fold_ln",)
    return () if normalize_activations == "layer_norm" else ("center_writing_weights",)


def state_of(model: Any, step: str) -> bool | None:
    """Whether the weights of a TransformerBridge or HookedTransformer are as after `step`, which the weights
    themselves tell; None where they cannot tell, or where the step would change nothing."""
    cfg = model.cfg
    kind = str(getattr(cfg, "normalization_type", None) or "")
    rms = bool(getattr(cfg, "uses_rms_norm", False)) or kind.startswith("RMS")
    try:
        if step == "center_writing_weights" and not rms:
            rows = model.W_E[:1024].detach().float()
            # Of independent numbers the mean has 1 / sqrt(width) of their size, 0.25 of that in the demo model as
            # it was trained; of centred ones what rounding has left, 0.001 of it in bfloat16.
            return bool(rows.mean(-1).square().mean().sqrt() < 0.01 * rows.std() / rows.shape[-1] ** 0.5)
        if step == "fold_ln":
            if hasattr(model, "_weights_processed"):
                norm = model.blocks[0].ln1
                weight = norm.weight.detach()
                if getattr(cfg, "rmsnorm_uses_offset", False):
                    weight = weight + 1
                return bool((weight - 1).abs().max() == 0)
            return kind.endswith("Pre") if kind else None
        if step == "fold_value_biases":
            if bool((model.b_V != 0).any()):
                return False
            return True if bool((model.b_O != 0).any()) else None
    except (AttributeError, TypeError):  # an architecture without such weights
        pass
    return None
