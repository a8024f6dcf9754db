"""SAEs that are one file of torch.save, told apart by their tensors.

    openai        openai/sparse_autoencoder, the original files of the GPT-2 SAEs (v1, v4: ReLU; v5: TopK)
    goodfire      linear layers with biases: ReLU(x W_enc + b_enc)
    linear_pair   the same under other names (qresearch, DeepSeek R1)
    qwen_scope    top-k, matrices transposed; only the repository's name says k
    attention_kk  of attention outputs [n_heads * d_head] (Kissane et al., arXiv 2406.17759); a _cfg.json beside it

OpenAI's TopK SAEs read tokens with their mean taken off, divided by their standard deviation (plus 1e-5), and what they
reconstruct is scaled back, as normalize_activations "layer_norm" does. Their ReLU SAEs read activations as they are.
"""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from sae_core.errors import CheckpointError
from sae_core.files import whole
from sae_core.pretrained.reading import Place, Weights, matrix, same_sizes, take, tensors_only, text

_OPENAI_HOOKS = {
    "mlp_post_act": "mlp.hook_post", "resid_delta_mlp": "hook_mlp_out", "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid", "resid_post_mlp": "hook_resid_post",
}  # fmt: skip
_OPENAI_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def config_beside(path: str) -> str:
    """The file beside an SAE of attention outputs that says what it is of."""
    return f"{path.removesuffix('.pt')}_cfg.json"


def read_single_file(place: Place) -> Weights:
    content = place.pickle(place.path)
    state = content.get("state_dict", content)
    state = content if not isinstance(state, dict) else dict(state)
    tensors = tensors_only(state, place.name)
    for marks, read in _READERS:
        if marks <= tensors.keys():
            return read(place, state, tensors)
    raise CheckpointError(
        f"{place.name}: the tensors {sorted(tensors)[:12]} are those of no known format; accepted are files with "
        + ", or with ".join("/".join(sorted(marks)) for marks, _ in _READERS)
    )


def _openai(place: Place, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weights:
    tied = "decoder.weight" not in tensors
    names = {"W_enc": "encoder.weight.T", "b_enc": "latent_bias", "b_dec": "pre_bias"}
    names |= {} if tied else {"W_dec": "decoder.weight.T"}
    taken = take(tensors, names, place.name, left=(*_OPENAI_STATISTICS, "decoder.linear.weight"))
    if tied:
        taken["W_dec"] = tensors["encoder.weight"]
    activation = state.get("activation", "ReLU")
    config: dict[str, Any] = {}
    if activation == "TopK":
        of_k = state.get("activation_state_dict")
        of_k = of_k if isinstance(of_k, dict) else {}
        if of_k.get("postact_fn", "ReLU") != "ReLU":
            raise CheckpointError(f"{place.name}: postact_fn is {of_k['postact_fn']!r}; accepted is 'ReLU'")
        k = of_k.get("k")
        k = int(k) if isinstance(k, Tensor) and k.numel() == 1 else k
        config = {"k": whole(k, "activation_state_dict.k", place.name), "normalize_activations": "layer_norm"}
    elif activation != "ReLU":
        raise CheckpointError(f"{place.name}: activation is {activation!r}; accepted: ReLU, TopK")
    layer = place.layer(r"(?:/|layer_)(\d+)\.pt$")
    hook = next((hook for name, hook in _OPENAI_HOOKS.items() if name in place.words), None)
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": f"blocks.{layer}.{hook}" if hook is not None and layer is not None else None,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 64,
    }
    architecture = "topk" if activation == "TopK" else "standard"
    return Weights(architecture, taken, config, metadata, format="openai")


def _goodfire(place: Place, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weights:
    names = {
        "W_enc": "encoder_linear.weight.T", "b_enc": "encoder_linear.bias",
        "W_dec": "decoder_linear.weight.T", "b_dec": "decoder_linear.bias",
    }  # fmt: skip
    found = re.search(r"(Llama-[\w.]+-\w+-Instruct)-SAE-l(\d+)", place.words)
    metadata = {
        "model_name": f"meta-llama/{found[1]}" if found else None,
        "hook_name": f"blocks.{found[2]}.hook_resid_post" if found else None,
        "dataset_path": "lmsys/lmsys-chat-1m" if found else None,
        "prepend_bos": True,
    }
    taken = take(tensors, names, place.name)
    return Weights("standard", taken, {"apply_b_dec_to_input": False}, metadata, format="goodfire")


def _linear_pair(place: Place, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weights:
    names = {
        "W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T", "b_dec": "decoder.bias",
    }  # fmt: skip
    metadata: dict[str, Any] = {"prepend_bos": True}
    if "DeepSeek-R1-Distill-Llama-8B" in place.words:
        layer = place.layer(r"l(\d+)\.pt$")
        metadata |= {
            "model_name": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
            "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "dataset_path": "lmsys/lmsys-chat-1m",
            "context_size": 1024,
        }
    taken = take(tensors, names, place.name)
    return Weights("standard", taken, {"apply_b_dec_to_input": False}, metadata, format="linear_pair")


def _plain(place: Place, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Weights:
    if place.has(config_beside(place.path)):
        return _attention_kk(place, tensors)
    k = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", place.words)
    if k is None:
        raise CheckpointError(
            f"{place.name}: W_enc, W_dec, b_enc and b_dec alone do not say what is done with them; accepted with a "
            f"{PurePosixPath(config_beside(place.path)).name} beside it, or from a repository ...-W32K-L0_50 (k 50)"
        )
    names = {"W_enc": "W_enc.T", "W_dec": "W_dec.T", "b_enc": "b_enc", "b_dec": "b_dec"}
    taken, layer = take(tensors, names, place.name), place.layer(r"layer(\d+)")
    metadata = {
        "model_name": f"Qwen/{k[1]}",
        "hook_name": None if layer is None else f"blocks.{layer}.hook_resid_post",
        "hf_hook_name": None if layer is None else f"model.layers.{layer}",
        "context_size": 1024,
        "prepend_bos": True,
    }
    config = {"apply_b_dec_to_input": False, "k": whole(int(k[2]), "k", place.name)}
    return Weights("topk", taken, config, metadata, format="qwen_scope")


def _attention_kk(place: Place, tensors: Mapping[str, Tensor]) -> Weights:
    names = {name: name for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    taken = take(tensors, names, place.name)
    raw = place.json(config_beside(place.path))
    matrix(taken, "W_enc", place.name)
    same_sizes(raw, taken, "act_size", "dict_size", place.name)
    metadata = {
        "model_name": "gpt2-small",
        "hook_name": text(raw.get("act_name")),
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "prepend_bos": True,
    }
    return Weights("standard", taken, {"reshape_activations": "hook_z"}, metadata, format="attention_kk")


_READERS = [
    (frozenset({"pre_bias", "latent_bias", "encoder.weight"}), _openai),
    (frozenset({"encoder_linear.weight", "decoder_linear.weight"}), _goodfire),
    (frozenset({"W_enc", "W_dec", "b_enc", "b_dec"}), _plain),
    (frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}), _linear_pair),
]
