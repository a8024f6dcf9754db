"""Reading and writing SAELens' folder format: cfg.json, sae_weights.safetensors, sparsity.safetensors.

Only safetensors and JSON are ever read. Whatever is wrong with a folder is a CheckpointError that names it.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.architectures import ARCHITECTURES
from sae_core.architectures.jumprelu import JumpReLUSAE
from sae_core.errors import CheckpointError
from sae_core.sae import SAE, SAEConfig
from sae_core.settings import nearest

LOADABLE: dict[str, type[SAE]] = {**ARCHITECTURES, "jumprelu": JumpReLUSAE}
CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The revision of the format that is written. SAELens drops nested metadata that claims a format before 6.0.0.
FORMAT_VERSION = "6.54.12"
# Keys of the flat configuration that SAELens wrote before 6.0.0 and that describe the weights; the rest is metadata.
FLAT_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
FLAT_WEIGHT_KEYS = {
    *("architecture", "d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations"),
    *("activation_fn_str", "activation_fn", "activation_fn_kwargs", "reshape_activations", "finetuning_scaling_factor"),
}


def save_sae(sae: SAE, folder: str | Path, *, sparsity: Tensor | None = None) -> None:
    """Write `sae` to `folder` (made if needed; an SAE that lies there is replaced). cfg.json appears last: a folder
    without it was not written to the end, and `load_sae` says so."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    _save_tensors(dict(sae.named_parameters()), folder / WEIGHTS)
    if sparsity is None:
        (folder / SPARSITY).unlink(missing_ok=True)
    else:
        _save_tensors({"sparsity": sparsity.float()}, folder / SPARSITY)
    partial = folder / (CONFIG + ".partial")
    partial.write_text(json.dumps(_written_config(sae), indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def load_sae(
    folder: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None
) -> SAE:
    """The SAE in `folder`, in `dtype` or in the one that it was saved in."""
    folder = Path(folder)
    cfg = read_config(folder)
    sae_class = LOADABLE[cfg.architecture]
    tensors = _load_tensors(folder / WEIGHTS)
    _absorb_scaling_factor(tensors)
    _check_tensors(tensors, sae_class.shapes(cfg), folder / WEIGHTS)
    target = _dtype(cfg.dtype if dtype is None else dtype, "dtype")
    cfg = cfg.model_copy(update={"dtype": str(target).removeprefix("torch.")})
    weights = {name: tensors[name].to(device, target) for name in sae_class.shapes(cfg)}
    return sae_class(cfg, weights)


def load_sparsity(folder: str | Path) -> Tensor | None:
    """log10 firing rates [d_sae] of the SAE in `folder`, or None if none were saved."""
    path = Path(folder) / SPARSITY
    if not path.exists():
        return None
    tensors = _load_tensors(path)
    if "sparsity" not in tensors:
        raise CheckpointError(f"{path}: no tensor 'sparsity'; it has {sorted(tensors)}")
    return tensors["sparsity"]


def read_config(folder: str | Path) -> SAEConfig:
    """The configuration in `folder`, of today's format or of the flat one before SAELens 6.0.0."""
    folder = Path(folder)
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not path.is_file():
        raise CheckpointError(f"{folder}: {CONFIG} is missing; expected are {CONFIG} and {WEIGHTS}")
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # no JSON, or no text
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return _config(raw if isinstance(raw.get("metadata"), dict) else _from_flat(raw), path)


def _from_flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Today's form of a flat configuration."""
    activation = raw.get("activation_fn_str", raw.get("activation_fn", "relu"))
    new = {key: value for key, value in raw.items() if key in FLAT_WEIGHT_KEYS}
    new.setdefault("architecture", "standard")
    if isinstance(activation, str) and activation.startswith("topk"):
        new |= {"architecture": "topk", "k": (raw.get("activation_fn_kwargs") or {}).get("k", raw.get("k"))}
    elif activation != "relu":
        new["architecture"] = f"{new['architecture']} with activation {activation}"
    normalize = new.get("normalize_activations", "none")
    if isinstance(normalize, bool):  # older still
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    metadata = {FLAT_NAMES.get(key, key): value for key, value in raw.items() if key not in FLAT_WEIGHT_KEYS}
    return {**new, "metadata": metadata}


def _config(raw: Mapping[str, Any], path: Path) -> SAEConfig:
    architecture = raw.get("architecture")
    if not isinstance(architecture, str) or architecture not in LOADABLE:
        close = nearest(architecture, list(LOADABLE))
        raise CheckpointError(f"{path}: unknown architecture {architecture!r}{close}; known: {', '.join(LOADABLE)}")
    normalize = raw.get("normalize_activations") or "none"
    if normalize != "none":
        raise CheckpointError(
            f"{path}: normalize_activations is {normalize!r}; accepted is 'none'. The folder does not hold the scale "
            "that the activations must have: save it folded (in SAELens, fold_activation_norm_scaling_factor)"
        )
    for name in ("d_in", "d_sae", *(["k"] if architecture == "topk" else [])):
        value = raw.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{path}: {name} is {value!r}; accepted is a whole number above 0")
    return SAEConfig(
        architecture=architecture,
        d_in=raw["d_in"],
        d_sae=raw["d_sae"],
        dtype=str(_dtype(raw.get("dtype", "float32"), f"{path}: dtype")).removeprefix("torch."),
        apply_b_dec_to_input=bool(raw.get("apply_b_dec_to_input", True)),
        k=min(raw["k"], raw["d_sae"]) if architecture == "topk" else None,
        rescale_acts_by_decoder_norm=bool(raw.get("rescale_acts_by_decoder_norm", False)),
        metadata=raw["metadata"],
    )


def _dtype(given: object, field: str) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{field} is {given!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def _written_config(sae: SAE) -> dict[str, Any]:
    topk = ("k", "rescale_acts_by_decoder_norm") if sae.cfg.architecture == "topk" else ()
    return {
        "architecture": sae.cfg.architecture,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **{name: getattr(sae.cfg, name) for name in topk},
        "metadata": {"sae_lens_training_version": None, **sae.cfg.metadata, "sae_lens_version": FORMAT_VERSION},
    }


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def _load_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: {path.name} is missing")
    try:
        return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file, truncated or damaged ({error})") from None


def _absorb_scaling_factor(tensors: dict[str, Tensor]) -> None:
    """Old folders carry a factor on each latent's output, nearly always 1: it belongs into the decoder's rows."""
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and "W_dec" in tensors and factor.shape == tensors["W_dec"].shape[:1]:
        tensors["W_dec"] = tensors["W_dec"] * factor[:, None]


def _check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: the tensors {missing} are missing; it has {sorted(tensors)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{path}: unknown tensors {unknown}; expected are {sorted(shapes)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensors[name].shape)}; expected is {list(shape)}")
