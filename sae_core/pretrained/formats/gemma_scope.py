"""Gemma Scope: SAEs and transcoders of Gemma 2 (`params.npz`) and Gemma 3 (`params.safetensors`), all JumpReLU.

    f     = pre where pre > threshold, 0 elsewhere      pre = x W_enc + b_enc
    x_hat = f W_dec + b_dec  (+ x affine_skip_connection, for a transcoder of Gemma Scope 2 that has one)

The matrices lie as they do here, but for the skip connection [d_in, d_out]. Only the path says what an SAE is of. SAEs
of embeddings were trained on rows of the embedding matrix; the model multiplies them by sqrt(d_model), which is folded
in here, b_dec included (sae_lens 6.54.12 leaves that one out). Transcoders of Gemma Scope read the second norm before
its gain, those of Gemma Scope 2 behind it (sae_lens 6.54.12 names hook_mlp_in, which lies before the norm).

Sources: Lieberum et al., "Gemma Scope", arXiv 2408.05147; Gemma Scope 2 (Google DeepMind, 2025).
"""

import re
from math import sqrt
from typing import Any

from sae_core.errors import CheckpointError
from sae_core.files import flag
from sae_core.pretrained.reading import Place, Weights, matrix, per_latent, take, text

PARAMS, PARAMS_2, CONFIG_2 = "params.npz", "params.safetensors", "config.json"
_DATA = {"prepend_bos": True, "dataset_path": "monology/pile-uncopyrighted", "context_size": 1024}
_JUMPRELU = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
# What the path of an SAE of Gemma Scope 2 names: TransformerLens' hook point, and the module of Hugging Face's model.
_SITES_2 = {
    "transcoder": ("mlp.hook_in", "pre_feedforward_layernorm.output"),
    "resid_post": ("hook_resid_post", "output"),
    "attn_out": ("attn.hook_z", "self_attn.o_proj.input"),
    "mlp_out": ("hook_mlp_out", "post_feedforward_layernorm.output"),
}
_JUMPRELU_2 = {**_JUMPRELU, "W_enc": "w_enc", "W_dec": "w_dec"}


def read_gemma_scope(place: Place) -> Weights:
    path = place.near(PARAMS)
    tensors = {
        ("W_" + name[2:] if name.startswith("w_") else name): tensor for name, tensor in place.npz(path).items()
    }
    taken = take(tensors, _JUMPRELU, place.name)
    taken["threshold"] = per_latent(taken["threshold"], taken, place.name)
    d_in, _ = matrix(taken, "W_enc", place.name)
    repository = re.search(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)\b", place.words)
    size, tuning, kind = repository.groups() if repository else (None, None, None)
    layer, embedding = place.layer(), re.search(r"/embedding/width_", place.words) is not None
    transcoder = kind == "transcoders"
    model = None if size is None else f"gemma-2-{size}{'-it' if tuning == 'it' else ''}"
    metadata: dict[str, Any] = {**_DATA, "model_name": model}
    if transcoder:
        metadata |= {
            "hook_name": f"blocks.{layer}.ln2.hook_normalized",
            "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        }
    elif embedding:
        metadata["hook_name"] = "hook_embed"
    else:
        hook = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}.get(kind or "")
        metadata["hook_name"] = hook and f"blocks.{layer}.{hook}"
    if layer is None and not embedding:
        metadata = {name: value for name, value in metadata.items() if not name.startswith("hook_name")}
    return Weights(
        architecture="jumprelu",
        tensors=taken,
        config={"apply_b_dec_to_input": False, **_heads(metadata)},
        metadata=metadata,
        scales=(1 / sqrt(d_in),) * 2 if embedding else (1.0, 1.0),
        transcoder=transcoder,
    )


def read_gemma_scope_2(place: Place) -> Weights:
    config = place.json(place.near(CONFIG_2)) if place.has(place.near(CONFIG_2)) else {}
    kind = config.get("architecture", "jump_relu")
    if kind != "jump_relu":
        raise CheckpointError(f"{place.name}: architecture is {kind!r} in {CONFIG_2}; accepted is 'jump_relu'")
    path = place.near(PARAMS_2)
    tensors = place.safetensors(path)
    if "w_dec" in tensors and tensors["w_dec"].ndim == 3:
        raise CheckpointError(
            f"{place.name}: w_dec has shape {list(tensors['w_dec'].shape)}: a cross-layer transcoder, which writes to "
            "every later layer; accepted are SAEs and transcoders of one layer"
        )
    skip = "affine_skip_connection" in tensors
    if flag(config.get("affine_connection", skip), "affine_connection", place.name) != skip:
        raise CheckpointError(
            f"{place.name}: affine_connection is {not skip} in {CONFIG_2}, and the weights have "
            f"{'one' if skip else 'none'} (affine_skip_connection)"
        )
    names = {**_JUMPRELU_2, "W_skip": "affine_skip_connection.T"} if skip else _JUMPRELU_2
    taken = take(tensors, names, place.name)
    taken["threshold"] = per_latent(taken["threshold"], taken, place.name)
    metadata: dict[str, Any] = {**_DATA, "model_name": _gemma_3(config, place)}
    found = re.search(rf"/({'|'.join(_SITES_2)})(?:_all)?/", place.words)
    of_transcoders = found is not None and found[1] == "transcoder"
    transcoder = skip or of_transcoders or text(config.get("hf_hook_point_out")) is not None
    if (layer := place.layer()) is not None and found is not None:
        hook, module = _SITES_2[found[1]]
        metadata |= {"hook_name": f"blocks.{layer}.{hook}", "hf_hook_name": f"model.layers.{layer}.{module}"}
        if transcoder:
            hook, module = _SITES_2["mlp_out"]
            metadata |= {"hook_name_out": f"blocks.{layer}.{hook}"}
            metadata |= {"hf_hook_name_out": f"model.layers.{layer}.{module}"}
    stated = {"hf_hook_name": "hf_hook_point_in", "hf_hook_name_out": "hf_hook_point_out"}
    metadata |= {name: text(config[field]) for name, field in stated.items() if text(config.get(field))}
    return Weights(
        architecture="jumprelu",
        tensors=taken,
        config={"apply_b_dec_to_input": False, "skip": skip, **_heads(metadata)},
        metadata=metadata,
        transcoder=transcoder,
    )


def _heads(metadata: dict[str, Any]) -> dict[str, str]:
    return {"reshape_activations": "hook_z"} if str(metadata.get("hook_name")).endswith("hook_z") else {}


def _gemma_3(config: dict[str, Any], place: Place) -> str | None:
    size = re.search(r"gemma-scope-2-(\w+-(?:pt|it))", place.words)
    name = text(config.get("model_name")) or (f"gemma-3-{size[1]}" if size else None)
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    name = name if "google" in name else f"google/{name}"
    return name.replace("-pt", "") if "270m" in name else name  # the one model whose name says nothing of pretraining
