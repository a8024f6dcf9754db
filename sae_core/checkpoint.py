"""Reading and writing SAELens' folder format: cfg.json, sae_weights.safetensors, sparsity.safetensors.

Only safetensors and JSON are ever read, and only from the folder itself (see files.py). Whatever is wrong with a folder
is a CheckpointError that names file and field. Beside the SAEs that SAELens uses, two kinds of its training checkpoints
are read: those of batch top-k SAEs, as the JumpReLU SAE that they are used as, and unfolded ones, if the normalisation
that they were trained with lies beside them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.architectures import ARCHITECTURES
from sae_core.errors import CheckpointError, ConfigError
from sae_core.files import DTYPES, check_tensors, dtype_of, flag, load_tensors, read_json, whole
from sae_core.normalization import PER_TOKEN, Whitening
from sae_core.sae import SAE, SAEConfig
from sae_core.settings import nearest

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
# What SAELens' trainer lays beside a checkpoint whose weights still expect normalised activations.
SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"
UNFOLDED = ("expected_average_only_in", "covariance_whitening")
# The revision of the format that is written. SAELens drops nested metadata that claims a format before 6.0.0.
FORMAT_VERSION = "6.54.12"
# Keys of the flat configuration that SAELens wrote before 6.0.0 and that describe the weights; the rest is metadata.
FLAT_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
FLAT_WEIGHT_KEYS = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("activation_fn_str", "activation_fn", "activation_fn_kwargs", "reshape_activations", "finetuning_scaling_factor"),
}


@dataclass(frozen=True)
class Form:
    """What an `architecture` of cfg.json is here."""

    architecture: str
    transcoder: bool = False
    skip: bool = False
    batch_top_k: bool = False  # a training checkpoint with one threshold for all latents


# SAELens has no top-k transcoder: it refuses the last two names, which are this library's own.
FORMS = {
    **{name: Form(name) for name in ("standard", "gated", "topk", "jumprelu")},
    "transcoder": Form("standard", transcoder=True),
    "skip_transcoder": Form("standard", transcoder=True, skip=True),
    "jumprelu_transcoder": Form("jumprelu", transcoder=True),
    "jumprelu_skip_transcoder": Form("jumprelu", transcoder=True, skip=True),
    "topk_transcoder": Form("topk", transcoder=True),
    "topk_skip_transcoder": Form("topk", transcoder=True, skip=True),
}
TRAINING_FORMS = {name: Form("jumprelu", batch_top_k=True) for name in ("batchtopk", "matryoshka_batchtopk")}


def save_sae(sae: SAE, folder: str | Path, *, sparsity: Tensor | None = None) -> None:
    """Write `sae` to `folder` (made if needed; an SAE that lies there is replaced). cfg.json appears last: a folder
    without it was not written to the end, and `load_sae` says so. ConfigError, and nothing is touched, for what has no
    form on disk."""
    folder = Path(folder)
    config = _written_config(sae)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    _save_tensors(dict(sae.named_parameters()), folder / WEIGHTS)
    if sparsity is None:
        (folder / SPARSITY).unlink(missing_ok=True)
    else:
        _save_tensors({"sparsity": sparsity.float()}, folder / SPARSITY)
    partial = _fresh(folder / (CONFIG + ".partial"))
    partial.write_text(config, encoding="utf-8")
    os.replace(partial, folder / CONFIG)


def load_sae(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    overrides: Mapping[str, Any] | None = None,
    norm_scaling_factor: float | None = None,
) -> SAE:
    """The SAE in `folder`, in `dtype` or in the one that it was saved in.

    overrides: fields that replace those of its cfg.json, and norm_scaling_factor: what activations are multiplied by
    that it was trained on, where they are normalised by their mean norm: for a folder that does not say it itself.
    """
    folder = Path(folder)
    raw, form = _read_config(folder, overrides or {})
    path = folder / CONFIG
    target = dtype_of(raw.get("dtype", "float32"), f"{path}: dtype") if dtype is None else dtype_of(dtype, "dtype")
    cfg = _config(raw, form, path)
    cfg = cfg.model_copy(update={"dtype": str(target).removeprefix("torch.")})
    sae_class = ARCHITECTURES[form.architecture]
    shapes = sae_class.shapes(cfg)
    if form.batch_top_k:
        shapes = {name: shape for name, shape in shapes.items() if name != "threshold"} | {"topk_threshold": ()}
    tensors = load_tensors(folder, WEIGHTS)
    if "log_threshold" in tensors:  # of SAELens' older training checkpoints
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    factor = tensors.pop("scaling_factor", None)
    check_tensors(tensors, shapes, folder / WEIGHTS)
    if factor is not None:  # old: of each latent's output, nearly always 1
        check_tensors({"scaling_factor": factor}, {"scaling_factor": (cfg.d_sae,)}, folder / WEIGHTS)
        if raw.get("finetuning_scaling_factor") is False and not torch.allclose(factor, torch.ones_like(factor)):
            raise CheckpointError(
                f"{folder / WEIGHTS}: scaling_factor is not 1, and finetuning_scaling_factor of {CONFIG} is false: "
                "whether latents are multiplied by it is not known; accepted: finetuning_scaling_factor true, or 1"
            )
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]
    unfolded = raw["normalize_activations"] in UNFOLDED
    if unfolded or form.batch_top_k:
        tensors = {name: tensor.double() for name, tensor in tensors.items()}
        ranked = form.batch_top_k and cfg.rescale_acts_by_decoder_norm
        sae = sae_class(cfg, _with_threshold_per_latent(tensors, ranked) if form.batch_top_k else tensors)
        sae = sae.replaced(rescale_acts_by_decoder_norm=False).unit_rows() if ranked else sae
        if unfolded:
            sae = _folded(sae, raw["normalize_activations"], folder, norm_scaling_factor)
            sae = sae.unit_rows() if ranked and raw["normalize_activations"] == "expected_average_only_in" else sae
        cfg, tensors = sae.cfg, dict(sae.named_parameters())
    return sae_class(cfg, {name: tensors[name].detach().to(device, target) for name in sae_class.shapes(cfg)})


def load_sparsity(folder: str | Path) -> Tensor | None:
    """log10 firing rates [d_sae] of the SAE in `folder`, or None if none were saved."""
    path = Path(folder) / SPARSITY
    if not os.path.lexists(path):
        return None
    tensors = load_tensors(Path(folder), SPARSITY)
    if "sparsity" not in tensors:
        raise CheckpointError(f"{path}: no tensor 'sparsity'; it has {sorted(tensors)}")
    sparsity = tensors["sparsity"]
    if sparsity.ndim != 1 or sparsity.dtype not in DTYPES.values():
        raise CheckpointError(
            f"{path}: sparsity is {sparsity.dtype} of shape {list(sparsity.shape)}; expected are floats [d_sae]"
        )
    return sparsity


# ---- the configuration ----


def _read_config(folder: Path, overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Form]:
    """The configuration in `folder` in today's form, and what its architecture is here."""
    raw = {**read_json(folder, CONFIG), **overrides}
    path = folder / CONFIG
    if not isinstance(raw.get("metadata"), dict | None):
        raise CheckpointError(f"{path}: metadata is {raw['metadata']!r}; accepted is an object")
    raw = _from_flat(raw, path) if raw.get("metadata") is None else raw
    known = FORMS | TRAINING_FORMS
    name = raw.get("architecture")
    if not isinstance(name, str) or name not in known:
        close = nearest(name, list(known))
        raise CheckpointError(f"{path}: unknown architecture {name!r}{close}; accepted: {', '.join(known)}")
    form = known[name]
    modes = ("none",) if form.transcoder else ("none", *PER_TOKEN, *UNFOLDED)
    return {**raw, "normalize_activations": _one_of(raw, "normalize_activations", modes, path)}, form


def _from_flat(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Today's form of a flat configuration."""
    activation = raw.get("activation_fn_str", raw.get("activation_fn", "relu"))
    new = {key: value for key, value in raw.items() if key in FLAT_WEIGHT_KEYS}
    new.setdefault("architecture", "standard")
    if isinstance(activation, str) and activation.startswith("topk"):
        kwargs = raw.get("activation_fn_kwargs") or {}
        if not isinstance(kwargs, dict):
            raise CheckpointError(f"{path}: activation_fn_kwargs is {kwargs!r}; accepted is an object")
        new |= {"architecture": "topk", "k": kwargs.get("k", raw.get("k"))}
    elif activation != "relu":
        new["architecture"] = f"{new['architecture']} with activation {activation}"
    normalize = new.get("normalize_activations", "none")
    if isinstance(normalize, bool):  # older still
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    metadata = {FLAT_NAMES.get(key, key): value for key, value in raw.items() if key not in FLAT_WEIGHT_KEYS}
    metadata.setdefault("prepend_bos", True)  # which the oldest did without saying so
    new.setdefault("reshape_activations", "hook_z" if "hook_z" in str(metadata.get("hook_name")) else "none")
    return {**new, "metadata": metadata}


def _config(raw: Mapping[str, Any], form: Form, path: Path) -> SAEConfig:
    topk = form.architecture == "topk"
    subtracts = _flag(raw, "apply_b_dec_to_input", not form.transcoder, path)
    if form.transcoder and subtracts:
        raise CheckpointError(f"{path}: apply_b_dec_to_input is True; a transcoder's is false, its b_dec is an output")
    mode = raw["normalize_activations"]
    d_in, d_sae = whole(raw.get("d_in"), "d_in", path), whole(raw.get("d_sae"), "d_sae", path)
    return SAEConfig(
        architecture=form.architecture,
        d_in=d_in,
        d_sae=d_sae,
        d_out=whole(raw.get("d_out"), "d_out", path) if form.transcoder else None,
        skip=form.skip,
        apply_b_dec_to_input=subtracts,
        normalize_activations=mode if mode in PER_TOKEN else "none",
        reshape_activations=_one_of(raw, "reshape_activations", ("none", "hook_z"), path),
        k=min(whole(raw.get("k"), "k", path), d_sae) if topk else None,
        # SAELens' trainer takes it for true unless told otherwise, and always writes it
        rescale_acts_by_decoder_norm=(topk or form.batch_top_k)
        and _flag(raw, "rescale_acts_by_decoder_norm", form.batch_top_k, path),
        metadata=_with_nesting(raw["metadata"], d_sae),
    )


def _with_nesting(metadata: dict[str, Any], d_sae: int) -> dict[str, Any]:
    """The metadata, in which an SAE that SAELens trained as a Matryoshka SAE has its widths where ours have them."""
    details = metadata.get("training_architecture_details")
    widths = details.get("matryoshka_widths") if isinstance(details, dict) else None
    if "matryoshka" in metadata or not isinstance(widths, list) or widths[-1:] != [d_sae]:
        return metadata
    return {**metadata, "matryoshka": {"widths": widths}}


def _flag(raw: Mapping[str, Any], name: str, default: bool, path: Path) -> bool:
    return default if raw.get(name) is None else flag(raw[name], name, path)


def _one_of(raw: Mapping[str, Any], name: str, accepted: tuple[str, ...], path: Path) -> str:
    """The value of a field that may be missing or null: then the first of what is accepted."""
    value = raw.get(name)
    if value is not None and value not in accepted:
        raise CheckpointError(f"{path}: {name} is {value!r}; accepted: {', '.join(accepted)}")
    return accepted[0] if value is None else value


def _written_config(sae: SAE) -> str:
    cfg = sae.cfg
    form = Form(cfg.architecture, transcoder=cfg.is_transcoder, skip=cfg.skip)
    name = next((name for name, known in FORMS.items() if known == form), None)
    if name is None:
        raise ConfigError(
            f"architecture {cfg.architecture!r} has no form on disk; accepted are {', '.join(FORMS)}: what is trained "
            "in another form is saved as SAETrainer.export gives it"
        )
    hook_name = cfg.metadata.get("hook_name")
    if cfg.reshape_activations == "hook_z" and hook_name is not None and not str(hook_name).endswith("_z"):
        raise ConfigError(
            f"reshape_activations is 'hook_z' at hook_name {hook_name!r}: SAELens accepts it where the name ends in _z"
        )
    raw = {
        "architecture": name,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        **({"d_out": sae.d_out} if cfg.is_transcoder else {}),
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": cfg.normalize_activations,
        "reshape_activations": cfg.reshape_activations,
        **({"k": cfg.k, "rescale_acts_by_decoder_norm": cfg.rescale_acts_by_decoder_norm} if cfg.k else {}),
        "metadata": {"sae_lens_training_version": None, **cfg.metadata, "sae_lens_version": FORMAT_VERSION},
    }
    try:
        return json.dumps(raw, indent=2) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata cannot be written as JSON: {error}") from None


# ---- training checkpoints of SAELens ----


def _with_threshold_per_latent(tensors: Mapping[str, Tensor], ranked: bool) -> dict[str, Tensor]:
    """The weights of the JumpReLU SAE that SAELens makes of a batch top-k SAE: a latent fires above the one threshold
    of all, of its pre-activation or, if `ranked`, of that times its decoder row's norm."""
    weights = {name: tensor for name, tensor in tensors.items() if name != "topk_threshold"}
    norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-8) if ranked else torch.ones_like(tensors["b_enc"])
    return {**weights, "threshold": tensors["topk_threshold"] / norms}


def _folded(sae: SAE, mode: str, folder: Path, known_scale: float | None) -> SAE:
    """The function of raw activations that `sae` is of activations normalised as the folder's scaler files say."""
    path = folder / SCALER
    if mode == "expected_average_only_in" and known_scale is not None and not os.path.lexists(path):
        return sae.folded(known_scale, known_scale)
    if not os.path.lexists(path):
        raise CheckpointError(
            f"{folder / CONFIG}: normalize_activations is {mode!r} and {SCALER} is missing: the folder does not hold "
            "the scale that the activations must have. Accepted: a checkpoint of SAELens' trainer with all its files, "
            "or one saved folded (fold_activation_norm_scaling_factor)"
        )
    if mode == "expected_average_only_in":
        scale = read_json(folder, SCALER).get("scaling_factor")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise CheckpointError(f"{path}: scaling_factor is {scale!r}; accepted is a number above 0")
        return sae.folded(float(scale), float(scale))
    tensors = load_tensors(folder, WHITENING)
    square = (sae.d_in, sae.d_in)
    check_tensors(tensors, {"mean": square[:1], "matrix": square, "inverse_matrix": square}, folder / WHITENING)
    whitening = Whitening(*(tensors[name].double() for name in ("mean", "matrix", "inverse_matrix")))
    if sae.cfg.rescale_acts_by_decoder_norm:
        sae = sae.unit_rows().replaced(rescale_acts_by_decoder_norm=False)
    return sae.unwhitened(whitening, whitening)


# ---- files ----


def _fresh(path: Path) -> Path:
    """`path`, with nothing there: writing to a link would write to where it leads."""
    path.unlink(missing_ok=True)
    return path


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    partial = _fresh(path.with_name(path.name + ".partial"))
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)
