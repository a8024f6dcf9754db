"""Llama Scope, of OpenMOSS' lm-saes: `hyperparams.json` + `checkpoints/final.safetensors`, and, newer, `config.json` +
`sae_weights.safetensors`.

In training x * s_in is read and y * s_out reconstructed, s = sqrt(d_model) / mean norm of the dataset's activations.

    pre   = s_in x W_enc + b_enc          n_i: norm of latent i's decoder row
    x_hat = (f W_dec + b_dec) / s_out

The older form has one threshold t for all latents, which holds where the authors use an SAE: after the scales have been
folded into the weights and decoder rows have been made unit vectors. In the units of pre that is t * s_out / n_i (where
decoder norms do not count: t * s_in). sae_lens 6.54.12 takes t * s_in for all: the same for unit rows. The newer form
has the logarithm of each latent's threshold, of pre or, where decoder norms count, of pre * n_i; by them a top-k SAE
ranks, too. Its matrices are those of linear layers, or, newer still, W_E [d_in, d_sae] and W_D [d_sae, d_out].

Sources: He et al., "Llama Scope", arXiv 2410.20526; OpenMOSS/Language-Model-SAEs.
"""

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from sae_core.errors import CheckpointError
from sae_core.files import flag, whole
from sae_core.pretrained.reading import Place, Weights, matrix, part, per_latent, positive, same_sizes, take, text

HYPERPARAMS, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
_DATA = {"prepend_bos": True, "dataset_path": "cerebras/SlimPajama-627B", "context_size": 1024}
_LINEAR = {"W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_enc": "encoder.bias"}

_LOG_THRESHOLD = ("log_jumprelu_threshold", "activation_function.log_jumprelu_threshold")


def read_llama_scope(place: Place) -> Weights:
    raw = place.json(place.near(HYPERPARAMS))
    where = f"{place.name}/{HYPERPARAMS}"
    tensors = place.safetensors(place.near(FINAL))
    taken = _linear(raw, tensors, place)
    same_sizes(raw, taken, "d_model", "d_sae", where)
    activation, threshold = raw.get("act_fn"), raw.get("jump_relu_threshold")
    if activation == "topk" and isinstance(threshold, float) and threshold > 0:
        activation = "jumprelu"  # as lm-saes does to use it
    scales = _scales(raw, place, where)
    weighted = flag(raw.get("sparsity_include_decoder_norm", True), "sparsity_include_decoder_norm", where)
    config: dict[str, Any] = {}
    if activation == "jumprelu":
        threshold = positive(threshold, "jump_relu_threshold", where)
        taken["threshold"] = (
            threshold * scales[1] / _norms(taken["W_dec"])
            if weighted
            else torch.full((len(taken["W_dec"]),), threshold * scales[0])
        )
    elif activation == "topk":
        config = {"k": whole(raw.get("top_k"), "top_k", where), "rescale_acts_by_decoder_norm": weighted}
    return _weights(raw, activation, taken, config, scales, place, where, text(raw.get("hook_point_out")))


def read_lm_saes(place: Place) -> Weights:
    raw = place.json(place.near(CONFIG))
    where = f"{place.name}/{CONFIG}"
    tensors = place.safetensors(place.near(WEIGHTS))
    norms = {name: tensors.pop(name) for name in list(tensors) if name.startswith("dataset_average_activation_norm")}
    logarithm = next((tensors.pop(name) for name in _LOG_THRESHOLD if name in tensors), None)
    taken = _linear(raw, tensors, place)
    d_in, _ = matrix(taken, "W_enc", place.name)
    same_sizes(raw, taken, "d_model", "d_sae", where)
    activation, weighted = raw.get("act_fn", "jumprelu"), raw.get("sparsity_include_decoder_norm") is True
    config: dict[str, Any] = {}
    if activation == "jumprelu":
        if logarithm is None:
            raise CheckpointError(f"{place.name}: act_fn is 'jumprelu', and {WEIGHTS} has no {_LOG_THRESHOLD[0]}")
        taken["threshold"] = per_latent(logarithm, taken, place.name).float().exp()
        if weighted:
            taken["threshold"] = taken["threshold"] / _norms(taken["W_dec"])
    elif activation == "topk":
        config = {"k": whole(raw.get("top_k"), "top_k", where), "rescale_acts_by_decoder_norm": weighted}
    hook, hook_out = text(raw.get("hook_point_in")), text(raw.get("hook_point_out"))
    if raw.get("norm_activation") == "inference":
        scales = (1.0, 1.0)
    elif place.norm_scaling_factor is not None:
        scales = (place.norm_scaling_factor,) * 2
    else:
        found = [norms.get(f"dataset_average_activation_norm.{name}") for name in (hook, hook_out or hook)]
        if any(norm is None or norm.numel() != 1 for norm in found):
            raise CheckpointError(
                f"{place.name}: the mean norm of the activations is missing (tensors dataset_average_activation_norm.* "
                f"of {WEIGHTS}; it has {sorted(norms)}), without which the scale of the input is not known"
            )
        means = [positive(float(norm), "dataset_average_activation_norm", where) for norm in found if norm is not None]
        scales = (sqrt(d_in) / means[0], sqrt(d_in) / means[1])
    return _weights(raw, activation, taken, config, scales, place, where, hook_out)


def _linear(raw: dict[str, Any], tensors: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    if raw.get("use_glu_encoder"):
        raise CheckpointError(f"{place.name}: use_glu_encoder is true; accepted are encoders without a gate (false)")
    if "W_E" in tensors:
        return take(tensors, {"W_enc": "W_E", "W_dec": "W_D", "b_enc": "b_E", "b_dec": "b_D"}, place.name)
    if "decoder.bias" in tensors:
        return take(tensors, {**_LINEAR, "b_dec": "decoder.bias"}, place.name)
    taken = take(tensors, _LINEAR, place.name)
    return {**taken, "b_dec": torch.zeros(matrix(taken, "W_dec", place.name)[1])}


def _norms(W_dec: Tensor) -> Tensor:
    """The decoder rows' norms; 1 for a row of zeros, which decodes to nothing whenever it fires."""
    norms = W_dec.float().norm(dim=1)
    return torch.where(norms > 0, norms, torch.ones_like(norms))


def _scales(raw: dict[str, Any], place: Place, where: str) -> tuple[float, float]:
    mode = raw.get("norm_activation", "dataset-wise")
    if mode in ("inference", "token-wise"):
        return 1.0, 1.0
    if mode != "dataset-wise":
        raise CheckpointError(f"{where}: norm_activation is {mode!r}; accepted: dataset-wise, token-wise, inference")
    means = part(raw, "dataset_average_activation_norm", where)
    root = sqrt(whole(raw.get("d_model"), "d_model", where))
    name = "dataset_average_activation_norm"
    factors = [root / positive(means.get(end), f"{name}.{end}", where) for end in ("in", "out")]
    given = place.norm_scaling_factor
    if given is not None and abs(given / factors[0] - 1) > 0.01:
        raise CheckpointError(
            f"{where}: dataset_average_activation_norm gives the scale {factors[0]:.6g}, the release states {given:.6g}"
        )
    return factors[0], factors[1]


def _weights(
    raw: dict[str, Any], activation: object, taken: dict[str, Tensor], config: dict[str, Any],
    scales: tuple[float, float], place: Place, where: str, hook_out: str | None,
) -> Weights:  # fmt: skip
    kinds = {"jumprelu": "jumprelu", "topk": "topk", "relu": "standard"}
    if not isinstance(activation, str) or activation not in kinds:
        raise CheckpointError(f"{where}: act_fn is {activation!r}; accepted: {', '.join(kinds)}")
    hook = text(raw.get("hook_point_in"))
    transcoder = hook_out is not None and hook_out != hook
    subtracts = flag(raw.get("apply_decoder_bias_to_pre_encoder", False), "apply_decoder_bias_to_pre_encoder", where)
    if transcoder and subtracts:
        raise CheckpointError(f"{where}: apply_decoder_bias_to_pre_encoder is true; a transcoder's bias is an output")
    if raw.get("norm_activation") == "token-wise":
        if transcoder:
            raise CheckpointError(f"{where}: norm_activation is 'token-wise' for a transcoder; accepted: dataset-wise")
        config = {**config, "normalize_activations": "constant_norm_rescale"}
    distilled = "R1-Distill" in place.words
    model = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if distilled else "meta-llama/Llama-3.1-8B"
    known = distilled or "Llama3_1-8B" in place.words
    return Weights(
        architecture=kinds[activation],
        tensors=taken,
        config={"apply_b_dec_to_input": subtracts, **config},
        metadata={
            **(_DATA if known else {}),
            "model_name": model if known else None,
            "hook_name": hook,
            "hook_name_out": hook_out if transcoder else None,
        },
        scales=scales,
        transcoder=transcoder,
    )
