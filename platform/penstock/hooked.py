"""Language models for looking into: loaded as an SAE's checkpoint asks for them, with SAEs to be spliced in.

    sae = penstock.load_sae("demo", hook_point="blocks.4.hook_resid_post")
    model = penstock.load_model(sae=sae)
    logits, cache = model.run_with_cache_with_saes("def area(width):", saes=[sae])
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from penstock import models
from penstock.errors import ConfigError
from penstock.models import location
from penstock.spec import ModelSpec
from sae_core.model_processing import PROCESSING, steps_of, steps_that_matter

if TYPE_CHECKING:
    from sae_core import SAE


def load_model(
    model: str | None = None,
    *,
    sae: "SAE | Sequence[SAE] | None" = None,
    processing: str | None = None,
    dtype: Any = None,
    device: Any = "cpu",
    revision: str | None = None,
) -> Any:
    """A TransformerBridge with the surface of SAELens' HookedSAETransformer (`sae_core.analysis.SplicedModel`), in
    evaluation mode, its weights not to be trained.

    model: `demo`, a Hugging Face folder, or a name (TransformerLens' short ones, too). May be left out with `sae`, one
    SAE or several: then it is the model that their metadata name. A model of another name than that is taken (a folder
    that holds the same model, say); of two different names on the hub it warns.
    processing: how TransformerLens is to process the weights: none, fold_ln, center, fold_ln_center. If None, as the
    checkpoints ask; none where they say nothing. What contradicts a checkpoint, at the hook points that it reads and
    writes, is refused.
    dtype: float32, bfloat16 or float16, also torch's; if None, what the checkpoints were trained on, or float32.

    Raises ConfigError for such contradictions, and a `UserError` for a model that cannot be loaded or that the SAE
    cannot be of (its hook points, its widths).
    """
    from sae_core import SAE
    from sae_core.analysis import with_saes
    from sae_core.analysis.splicing import check_fits, hook_point_of, switch_of

    saes: list[SAE] = [] if sae is None else [sae] if isinstance(sae, SAE) else list(sae)
    for one in saes:
        if not isinstance(one, SAE):
            raise ConfigError(f"sae is a {type(one).__name__}; accepted: an SAE of sae_core, or several")
    name = _name(model, saes)
    try:
        spec = ModelSpec(
            name=name, revision=revision, processing=_processing(processing, saes), dtype=_dtype(dtype, saes)
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(f"{first['loc'][0]} is {first['input']!r}: {first['msg'].lower()}") from None
    loaded = with_saes(models.load_model(spec, str(device)))
    points = loaded.hook_dict
    for one in saes:
        for hook_point in _hook_points(one):
            hook_point_of(points, hook_point)
            if (switch := switch_of(hook_point)) is not None:
                getattr(loaded, f"set_{switch}")(True)
        check_fits(loaded, one)
    return loaded


def _name(model: str | None, saes: "Sequence[SAE]") -> str:
    said = (one.cfg.metadata.get("model_name") for one in saes)
    named = list(dict.fromkeys(str(name) for name in said if name))
    if model is None:
        if not named:
            raise ConfigError(
                "model is not given, and "
                + ("no sae either" if not saes else "the metadata of the SAE have no model_name")
                + "; accepted: `demo`, a folder in Hugging Face format, or the name of a model on the hub"
            )
        if len({location(ModelSpec(name=name)).name for name in named}) > 1:
            raise ConfigError(f"sae: they are of several models ({', '.join(named)}); accepted: those of one, or model")
        return named[0]
    place = location(ModelSpec(name=model))
    for name in named:
        other = None if place.is_local else location(ModelSpec(name=name))
        if other is not None and not other.is_local and other.name != place.name:
            warnings.warn(f"model {model!r}: the SAE was trained on {name!r}", stacklevel=3)
    return model


def _processing(wanted: str | None, saes: "Sequence[SAE]") -> str:
    """The processing that suits every SAE at the hook points that it reads and writes."""
    asked = [(one, steps) for one in saes if (steps := steps_of(one.cfg.metadata)) is not None]
    if wanted is not None and wanted not in PROCESSING:
        raise ConfigError(f"processing is {wanted!r}; accepted: {', '.join(PROCESSING)}")
    # as a checkpoint says it, before what comes to the same
    exact = [name for name, steps in PROCESSING.items() if any(own == steps for _, own in asked)]
    candidates = [wanted] if wanted is not None else list(dict.fromkeys([*exact, *PROCESSING]))
    for candidate in candidates:
        if all(_suits(PROCESSING[candidate], one, steps) for one, steps in asked):
            return candidate
    said = "; ".join(f"{_hook_points(one)[0]}: {', '.join(sorted(steps)) or 'none'}" for one, steps in asked)
    given = f"processing is {wanted!r}, and the" if wanted is not None else "the"
    raise ConfigError(
        f"{given} checkpoints ask for other activations than one model has ({said}); accepted: "
        + ("processing left out" if wanted is not None else "one SAE after the other, each with its model")
        + ", or sae.cfg.metadata['model_processing'] set where a checkpoint is wrong"
    )


def _suits(steps: frozenset[str], sae: "SAE", asked: frozenset[str]) -> bool:
    return all(
        (step in steps) == (step in asked)
        for name in _hook_points(sae)
        for step in steps_that_matter(name, sae.cfg.normalize_activations)
    )


def _hook_points(sae: "SAE") -> list[str]:
    about = sae.cfg.metadata
    if not about.get("hook_name"):
        raise ConfigError("sae.cfg.metadata has no hook_name: where the SAE belongs; accepted: a hook point's name")
    return list(dict.fromkeys(str(name) for name in (about["hook_name"], about.get("hook_name_out")) if name))


def _dtype(wanted: Any, saes: "Sequence[SAE]") -> str:
    if wanted is not None:
        return str(wanted).removeprefix("torch.")
    said = {one.cfg.metadata["model_dtype"] for one in saes if one.cfg.metadata.get("model_dtype")}
    return str(said.pop()) if len(said) == 1 else "float32"
