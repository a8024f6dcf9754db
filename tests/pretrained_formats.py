"""SAEs written as their authors write them: every format that is read, with the function by its authors' formula.

`CASES` are SAEs of real releases, at tiny widths. `in_cache` lays their files out as the cache of the Hugging Face hub,
so that whoever loads them by name, offline, reads what a download would have left there.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

D_IN, D_SAE, D_OUT = 16, 40, 12
COMMIT = "0123456789abcdef0123456789abcdef01234567"
Function = Callable[[Tensor], tuple[Tensor, Tensor]]  # activations -> latents, reconstruction


@dataclass
class Written:
    """The files of an SAE, by their path in the repository, and what it computes."""

    files: dict[str, Any]
    function: Function
    # what sae_lens takes from names that say a width of thousands, to be replaced to load one so small
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    release: str
    sae_id: str
    write: Callable[[str], Written]
    architecture: str = "standard"
    hook_name: str | None = None
    sae_lens_reads_it: bool = True


def activations(tokens: int = 200, width: int = D_IN) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(tokens, width, generator=generator) * 2 + 0.3


def tensors(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, "".join(shapes))))
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def plain(d_out: int = D_IN) -> dict[str, Tensor]:
    """In this library's layout."""
    made = tensors(W_enc=(D_IN, D_SAE), W_dec=(D_SAE, d_out), b_enc=(D_SAE,), b_dec=(d_out,))
    return {**made, "threshold": tensors(t=(D_SAE,))["t"].abs() + 0.05}


def linear(d_out: int = D_IN) -> dict[str, Tensor]:
    """Two linear layers of torch."""
    w = plain(d_out)
    return {
        "encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(), "decoder.bias": w["b_dec"],
    }  # fmt: skip


def top_k(pre: Tensor, k: int) -> Tensor:
    values, places = torch.relu(pre).topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, places, values)


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.relu(pre) * (pre > threshold)


def by(encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> Function:
    return lambda x: (f := encode(x), decode(f))


# ---- SAELens ----


def legacy(path: str, **config: Any) -> Written:
    """The flat configuration of SAELens before 6.0, as of 2024."""
    w = plain()
    weights = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    cfg = {
        "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8,
        "hook_point_head_index": None, "dataset_path": "Skylion007/openwebtext", "context_size": 128, "d_in": D_IN,
        "d_sae": D_SAE, "dtype": "torch.float32", "device": "cuda", "l1_coefficient": 8e-5, "lr": 4e-4, **config,
    }  # fmt: skip
    return Written(
        {
            f"{path}/cfg.json": cfg,
            f"{path}/sae_weights.safetensors": {**weights, "scaling_factor": torch.ones(D_SAE)},
            f"{path}/sparsity.safetensors": {"sparsity": torch.linspace(-8, -1, D_SAE)},
        },
        by(
            lambda x: torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
            lambda f: f @ w["W_dec"] + w["b_dec"],
        ),
    )


def legacy_of_scaled(path: str) -> Written:
    """Trained on activations times a factor that only the release states."""
    written, w = legacy(path, normalize_activations=True), plain()
    scale = 1.81673478700627

    def encode(x: Tensor) -> Tensor:
        return torch.relu((x * scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"])

    return Written(written.files, by(encode, lambda f: (f @ w["W_dec"] + w["b_dec"]) / scale))


def legacy_of_norms(path: str) -> Written:
    """Trained on tokens scaled to the norm sqrt(d_in), which only the release states."""
    written, w = legacy(path), plain()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.norm(dim=-1, keepdim=True) / D_IN**0.5
        f = torch.relu((x / scale - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        return f, (f @ w["W_dec"] + w["b_dec"]) * scale

    return Written(written.files, function)


def openai_function(w: dict[str, Tensor], k: int) -> Function:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        f = top_k(((x - mean) / (std + 1e-5) - w["b_dec"]) @ w["W_enc"] + w["b_enc"], k)
        return f, (f @ w["W_dec"] + w["b_dec"]) * std + mean

    return function


def legacy_of_openai(path: str) -> Written:
    """OpenAI's v5, as it was put into SAELens' format."""
    written = legacy(
        path, activation_fn_str="topk", activation_fn_kwargs={"k": 4}, normalize_activations="layer_norm",
        hook_name="blocks.8.hook_resid_post", apply_b_dec_to_input=True, architecture="standard",
    )  # fmt: skip
    del written.files[f"{path}/cfg.json"]["hook_point"]
    return Written(written.files, openai_function(plain(), 4))


def today(path: str) -> Written:
    w = plain()
    cfg = {
        "architecture": "jumprelu", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cuda",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.3.0", "hook_name": "blocks.3.hook_resid_post", "prepend_bos": True,
                     "model_name": "gemma-2-2b", "context_size": 1024},
    }  # fmt: skip
    return Written(
        {f"{path}/cfg.json": cfg, f"{path}/sae_weights.safetensors": w},
        by(
            lambda x: jump((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], w["threshold"]),
            lambda f: f @ w["W_dec"] + w["b_dec"],
        ),
    )


# ---- Gemma Scope ----


def gemma_scope(path: str, *, d_out: int = D_IN, embedding: bool = False, b_dec: float = 1.0) -> Written:
    w = plain(d_out)
    w["b_dec"] = w["b_dec"] * b_dec
    scale = D_IN**0.5 if embedding else 1.0
    return Written(
        {f"{path}/params.npz": {name: tensor.numpy() for name, tensor in w.items()}},
        by(
            lambda x: jump(x / scale @ w["W_enc"] + w["b_enc"], w["threshold"]),
            lambda f: (f @ w["W_dec"] + w["b_dec"]) * scale,
        ),
        {"d_in": D_IN, "d_sae": D_SAE, "d_out": d_out},
    )


def gemma_scope_2(path: str, *, transcoder: bool = False, affine: bool = False, config: bool = True) -> Written:
    w = plain(D_OUT if transcoder else D_IN)
    skip = tensors(skip=(D_IN, D_OUT))["skip"]
    files: dict[str, Any] = {
        f"{path}/params.safetensors": {
            **{name.lower(): tensor for name, tensor in w.items()},
            **({"affine_skip_connection": skip} if affine else {}),
        }
    }
    if config:
        files[f"{path}/config.json"] = {
            "architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "width": D_SAE,
            "hf_hook_point_in": "model.layers.17.output", "affine_connection": affine,
            **({"hf_hook_point_out": "model.layers.17.post_feedforward_layernorm.output"} if transcoder else {}),
        }  # fmt: skip

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = jump(x @ w["W_enc"] + w["b_enc"], w["threshold"])
        return f, f @ w["W_dec"] + w["b_dec"] + (x @ skip if affine else 0)

    return Written(files, function)


# ---- Llama Scope ----


def llama_scope(path: str, *, norm_in: float = D_IN**0.5 / 10.835978835978835, norm_out: float | None = None,
                unit_rows: bool = True, include_norms: bool = True, **config: Any) -> Written:  # fmt: skip
    """By the authors' own way: the scales folded in, then decoder rows made unit vectors, then the threshold."""
    state = linear()
    if unit_rows:
        state["decoder.weight"] = state["decoder.weight"] / state["decoder.weight"].norm(dim=0)
    norm_out, t = norm_out or norm_in, 0.1 * (norm_out or norm_in)
    raw = {
        "hook_point_in": "blocks.7.hook_resid_post", "d_model": D_IN, "d_sae": D_SAE, "expansion_factor": 2.5,
        "hook_point_out": "blocks.7.hook_mlp_out" if norm_out != norm_in else "blocks.7.hook_resid_post",
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "act_fn": "jumprelu",
        "jump_relu_threshold": t, "norm_activation": "dataset-wise", "use_glu_encoder": False, "top_k": 50,
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
        "sparsity_include_decoder_norm": include_norms, **config,
    }  # fmt: skip
    s_in, s_out = D_IN**0.5 / norm_in, D_IN**0.5 / norm_out
    encoder, decoder = state["encoder.weight"], state["decoder.weight"] * s_in / s_out
    bias, b_dec = state["encoder.bias"] / s_in, state["decoder.bias"] / s_out
    norms = decoder.norm(dim=0) if include_norms else torch.ones(D_SAE)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        folded = jump((x @ encoder.T + bias) * norms, t)
        # sae_lens' latents are of normalised inputs, and not of unit rows
        return folded / norms * s_in, folded @ (decoder / norms).T + b_dec

    return Written({f"{path}/hyperparams.json": raw, f"{path}/checkpoints/final.safetensors": state}, function)


def lm_saes(path: str, *, scale: float = 18.36547291092746, include_norms: bool = False) -> Written:
    state, threshold = linear(), plain()["threshold"]
    norms = state["decoder.weight"].norm(dim=0) if include_norms else 1.0
    raw = {"d_model": D_IN, "expansion_factor": D_SAE / D_IN, "hook_point_in": "blocks.0.hook_resid_post",
           "hook_point_out": "blocks.0.hook_resid_post", "act_fn": "jumprelu", "norm_activation": "dataset-wise",
           "sparsity_include_decoder_norm": include_norms}  # fmt: skip
    stored = {
        **state,
        "log_jumprelu_threshold": threshold.log(),
        "dataset_average_activation_norm.blocks.0.hook_resid_post": torch.tensor(D_IN**0.5 / scale),
    }

    def encode(x: Tensor) -> Tensor:
        return jump((x * scale @ state["encoder.weight"].T + state["encoder.bias"]) * norms, threshold) / norms

    return Written(
        {f"{path}/config.json": raw, f"{path}/sae_weights.safetensors": stored},
        by(encode, lambda f: (f @ state["decoder.weight"].T + state["decoder.bias"]) / scale),
        {"d_sae": D_SAE},
    )


def lm_saes_of_today(path: str, activation: str) -> Written:
    """Newer names, two hook points, a scale for each, latents ranked and compared by decoder norms."""
    w, s_in, s_out, k = plain(), 2.5, 0.8, 4
    norms = w["W_dec"].norm(dim=1)
    raw = {"sae_type": "sae", "d_model": D_IN, "expansion_factor": D_SAE / D_IN, "act_fn": activation, "top_k": k,
           "hook_point_in": "blocks.14.ln2.hook_normalized", "hook_point_out": "blocks.14.hook_mlp_out",
           "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}  # fmt: skip
    stored = {
        "W_E": w["W_enc"], "W_D": w["W_dec"], "b_E": w["b_enc"], "b_D": w["b_dec"],
        "dataset_average_activation_norm.blocks.14.ln2.hook_normalized": torch.tensor(D_IN**0.5 / s_in),
        "dataset_average_activation_norm.blocks.14.hook_mlp_out": torch.tensor(D_IN**0.5 / s_out),
    }  # fmt: skip
    if activation == "jumprelu":
        stored["activation_function.log_jumprelu_threshold"] = w["threshold"].log()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        weighted = (x * s_in @ w["W_enc"] + w["b_enc"]) * norms
        g = jump(weighted, w["threshold"]) if activation == "jumprelu" else top_k(weighted, k)
        # a top-k SAE's latents are as this library and sae_lens have them where norms rank: times those of its rows
        return g / s_out if activation == "topk" else g / norms, ((g / norms) @ w["W_dec"] + w["b_dec"]) / s_out

    return Written({f"{path}/config.json": raw, f"{path}/sae_weights.safetensors": stored}, function)


# ---- dictionary_learning ----


def dictionary(path: str, kind: str, **trainer: Any) -> Written:
    w, k, t = plain(), 4, 0.3
    E, D, bias, b_dec = w["W_enc"], w["W_dec"], w["b_enc"], w["b_dec"]
    layers = {"encoder.weight": E.T.contiguous(), "encoder.bias": bias, "decoder.weight": D.T.contiguous()}
    parameters = {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    gates = tensors(gate_bias=(D_SAE,), mag_bias=(D_SAE,), r_mag=(D_SAE,))
    scalars = {"k": torch.tensor(k, dtype=torch.int32), "threshold": torch.tensor(t)}

    def gated(x: Tensor) -> Tensor:
        u = (x - b_dec) @ E
        return (u + gates["gate_bias"] > 0) * torch.relu(gates["r_mag"].exp() * u + gates["mag_bias"])

    state, encode = {
        "AutoEncoder": ({**layers, "bias": b_dec}, lambda x: torch.relu((x - b_dec) @ E + bias)),
        "AutoEncoderNew": ({**layers, "decoder.bias": b_dec}, lambda x: torch.relu(x @ E + bias)),
        "GatedAutoEncoder": (
            {"encoder.weight": layers["encoder.weight"], "decoder.weight": layers["decoder.weight"],
             "decoder_bias": b_dec, **gates},
            gated,
        ),
        "AutoEncoderTopK": ({**layers, "b_dec": b_dec, **scalars}, lambda x: top_k((x - b_dec) @ E + bias, k)),
        "BatchTopKSAE": ({**layers, "b_dec": b_dec, **scalars}, lambda x: jump((x - b_dec) @ E + bias, t)),
        "MatryoshkaBatchTopKSAE": (
            {**parameters, **scalars, "group_sizes": torch.tensor([10, 10, 20])},
            lambda x: jump((x - b_dec) @ E + bias, t),
        ),
        "JumpReluAutoEncoder": ({**parameters, "threshold": w["threshold"]},
                                lambda x: jump(x @ E + bias, w["threshold"])),
    }[kind]  # fmt: skip
    config = {
        "trainer": {"dict_class": kind, "activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name":
                    "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3", "k": k, **trainer},
        "buffer": {"d_submodule": D_IN, "ctx_len": 128},
    }  # fmt: skip
    return Written({f"{path}/ae.pt": state, f"{path}/config.json": config}, by(encode, lambda f: f @ D + b_dec))


# ---- others ----


def sparsify(path: str, *, transcode: bool = False, skip: bool = False, **config: Any) -> Written:
    w, k = plain(), 4
    W_skip = tensors(W_skip=(D_IN, D_IN))["W_skip"]
    state = {
        "encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"], "W_dec": w["W_dec"],
        "b_dec": w["b_dec"], **({"W_skip": W_skip} if skip else {}),
    }  # fmt: skip
    cfg = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": D_SAE, "k": k,
           "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D_IN, **config}  # fmt: skip

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        f = top_k((x if transcode else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"], k)
        return f, f @ w["W_dec"] + w["b_dec"] + (x @ W_skip.T if skip else 0)

    return Written({f"{path}/cfg.json": cfg, f"{path}/sae.safetensors": state}, function)


def openai(path: str, *, activation: str = "TopK", tied: bool = False) -> Written:
    w = plain()
    w["W_dec"] = w["W_enc"].T.contiguous() if tied else w["W_dec"]
    state: dict[str, Any] = {
        "pre_bias": w["b_dec"], "latent_bias": w["b_enc"], "encoder.weight": w["W_enc"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.int64), "activation": activation,
        **({} if tied else {"decoder.weight": w["W_dec"].T.contiguous()}),
    }  # fmt: skip
    if activation == "TopK":
        state["activation_state_dict"] = {"k": 4, "postact_fn": "ReLU"}
        return Written({path: state}, openai_function(w, 4))
    return Written(
        {path: state},
        by(
            lambda x: torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
            lambda f: f @ w["W_dec"] + w["b_dec"],
        ),
    )


def relu_pair(path: str, encoder: str, decoder: str) -> Written:
    """Two linear layers, ReLU between them, nothing taken off the input."""
    w = plain()
    state = {
        f"{encoder}.weight": w["W_enc"].T.contiguous(), f"{encoder}.bias": w["b_enc"],
        f"{decoder}.weight": w["W_dec"].T.contiguous(), f"{decoder}.bias": w["b_dec"],
    }  # fmt: skip
    function = by(lambda x: torch.relu(x @ w["W_enc"] + w["b_enc"]), lambda f: f @ w["W_dec"] + w["b_dec"])
    return Written({path: state}, function, {"d_in": D_IN, "d_sae": D_SAE})


def qwen_scope(path: str) -> Written:
    w = plain()
    del w["threshold"]
    state = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in w.items()}
    # k 50 is more than the latents there are: every positive one is active
    function = by(lambda x: torch.relu(x @ w["W_enc"] + w["b_enc"]), lambda f: f @ w["W_dec"] + w["b_dec"])
    overrides = {"activation_fn_kwargs": {"k": D_SAE}}
    return Written({path: state}, function, {"d_in": D_IN, "d_sae": D_SAE, **overrides})  # type: ignore[dict-item]


def attention_kk(path: str) -> Written:
    w = plain()
    del w["threshold"]
    cfg = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z", "seed": 49}
    return Written(
        {path: w, path.removesuffix(".pt") + "_cfg.json": cfg},
        by(
            lambda x: torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]),
            lambda f: f @ w["W_dec"] + w["b_dec"],
        ),
    )


def circuit_tracer(path: str) -> Written:
    w = plain()
    del w["threshold"]
    function = by(lambda x: torch.relu(x @ w["W_enc"] + w["b_enc"]), lambda f: f @ w["W_dec"] + w["b_dec"])
    run = {"d_model": {"value": D_IN}, "d_feature": {"value": D_SAE}, "batch_size": {"value": 2048}}
    files = {path: {**w, "W_enc": w["W_enc"].T.contiguous()}, "wanb-config.yaml": run}
    return Written({**files, "config.yaml": {"model_name": "Qwen/Qwen3-4B"}}, function)


def circuit_tracer_clt(path: str) -> Written:
    w = plain()
    decoders = tensors(decoders=(D_SAE, 3, D_IN))["decoders"]
    function = by(
        lambda x: torch.relu(x @ w["W_enc"] + w["b_enc"]),
        lambda f: torch.einsum("tf,fld->td", f, decoders) + w["b_dec"],
    )
    named = {f"W_enc_{path}": w["W_enc"].T.contiguous(), f"b_enc_{path}": w["b_enc"], f"b_dec_{path}": w["b_dec"]}
    general = {"model_name": "google/gemma-2-2b", "feature_input_hook": "hook_resid_mid",
               "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    return Written(
        {
            f"W_enc_{path}.safetensors": named,
            f"W_dec_{path}.safetensors": {f"W_dec_{path}": decoders},
            "config.yaml": general,
        },
        function,
    )


PYTHIA = "sae_bench_pythia70m_sweep_{}_ctx128_0730"
CASES = {
    "SAELens of 2024": Case(
        "gpt2-small-res-jb", "blocks.8.hook_resid_pre", legacy, hook_name="blocks.8.hook_resid_pre"
    ),
    "SAELens of 2024, another release": Case(
        "gemma-2b-res-jb", "blocks.6.hook_resid_post",
        lambda path: legacy(path, model_name="gemma-2b", hook_point="blocks.6.hook_resid_post"),
        hook_name="blocks.6.hook_resid_post",
    ),
    "SAELens, scale in the release": Case("gpt2-small-mlp-tm", "blocks.4.hook_mlp_out", legacy_of_scaled),
    "SAELens, normalisation in the release": Case(
        "mistral-7b-res-wg", "blocks.16.hook_resid_pre", legacy_of_norms
    ),
    "OpenAI v5 in SAELens' format": Case(
        "gpt2-small-resid-post-v5-32k", "blocks.8.hook_resid_post", legacy_of_openai, "topk", "blocks.8.hook_resid_post"
    ),
    "SAELens today": Case(
        "gemma-2-2b-res-matryoshka-dc", "blocks.3.hook_resid_post", today, "jumprelu", "blocks.3.hook_resid_post"
    ),
    "Gemma Scope": Case(
        "gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", gemma_scope, "jumprelu",
        "blocks.20.hook_resid_post"
    ),
    "Gemma Scope, canonical": Case(
        "gemma-scope-9b-it-res-canonical", "layer_20/width_16k/canonical", gemma_scope, "jumprelu",
        "blocks.20.hook_resid_post",
    ),
    "Gemma Scope, MLP": Case(
        "gemma-scope-2b-pt-mlp-canonical", "layer_5/width_16k/canonical", gemma_scope, "jumprelu",
        "blocks.5.hook_mlp_out"
    ),
    "Gemma Scope, attention": Case(
        "gemma-scope-2b-pt-att-canonical", "layer_5/width_16k/canonical", gemma_scope, "jumprelu",
        "blocks.5.attn.hook_z"
    ),
    "Gemma Scope, embedding": Case(
        "gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6",
        # without b_dec, which sae_lens leaves unscaled
        lambda path: gemma_scope(path, embedding=True, b_dec=0.0), "jumprelu", "hook_embed",
    ),
    "Gemma Scope, transcoder": Case(
        "gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76",
        lambda path: gemma_scope(path, d_out=D_OUT), "jumprelu_transcoder", "blocks.0.ln2.hook_normalized",
    ),
    "Gemma Scope 2": Case(
        "gemma-scope-2-4b-pt-res", "layer_17_width_16k_l0_big", gemma_scope_2, "jumprelu", "blocks.17.hook_resid_post"
    ),
    "Gemma Scope 2, attention": Case(
        "gemma-scope-2-4b-pt-att", "layer_17_width_16k_l0_big", gemma_scope_2, "jumprelu", "blocks.17.attn.hook_z"
    ),
    "Gemma Scope 2 without configuration": Case(
        "gemma-scope-2-270m-pt-mlp-all", "layer_9_width_16k_l0_small", lambda path: gemma_scope_2(path, config=False),
        "jumprelu", "blocks.9.hook_mlp_out",
    ),
    "Gemma Scope 2, transcoder": Case(
        "gemma-scope-2-4b-pt-transcoders", "transcoder/layer_17_width_16k_l0_big",
        lambda path: gemma_scope_2(path, transcoder=True), "jumprelu_transcoder", "blocks.17.mlp.hook_in",
    ),
    "Gemma Scope 2, affine transcoder": Case(
        "gemma-scope-2-4b-pt-transcoders", "transcoder/layer_9_width_65k_l0_small_affine",
        lambda path: gemma_scope_2(path, transcoder=True, affine=True), "jumprelu_skip_transcoder",
        "blocks.9.mlp.hook_in",
    ),
    "Llama Scope": Case("llama_scope_lxr_8x", "l7r_8x", llama_scope, "jumprelu", "blocks.7.hook_resid_post"),
    "Llama Scope R1": Case(
        "llama_scope_r1_distill", "l0r_800m_slimpajama", lambda path: lm_saes(path, scale=53.52995401997436),
        "jumprelu", "blocks.0.hook_resid_post",
    ),
    **{
        f"dictionary_learning, {kind}": Case(
            release, sae_id, lambda path, kind=kind: dictionary(path, kind), architecture, "blocks.3.hook_resid_post",
            kind != "AutoEncoderNew",
        )
        for kind, architecture, release, sae_id in [
            ("AutoEncoder", "standard", PYTHIA.format("panneal"), "blocks.3.hook_resid_post__trainer_16"),
            ("AutoEncoderNew", "standard", PYTHIA.format("panneal"), "blocks.3.hook_resid_post__trainer_17"),
            ("GatedAutoEncoder", "gated", PYTHIA.format("gated"), "blocks.3.hook_resid_post__trainer_0"),
            ("AutoEncoderTopK", "topk", PYTHIA.format("topk"), "blocks.3.hook_resid_post__trainer_0"),
            ("BatchTopKSAE", "jumprelu", "gpt-oss-20b-andyrdt", "resid_post_layer_3_trainer_0"),
            ("MatryoshkaBatchTopKSAE", "jumprelu", "saebench_gemma-2-2b_width-2pow12_date-0108",
             "blocks.12.hook_resid_post__trainer_0"),
            ("JumpReluAutoEncoder", "jumprelu", "llama-3.1-8b-instruct-andyrdt", "resid_post_layer_3_trainer_1"),
        ]
    },
    "Kissane et al.": Case("gpt2-small-hook-z-kk", "blocks.0.hook_z", attention_kk, hook_name="blocks.0.attn.hook_z"),
    "Goodfire": Case(
        "goodfire-llama-3.1-8b-instruct", "layer_19",
        lambda path: relu_pair(path, "encoder_linear", "decoder_linear"), hook_name="blocks.19.hook_resid_post",
    ),
    "DeepSeek R1": Case(
        "deepseek-r1-distill-llama-8b-qresearch", "blocks.19.hook_resid_post",
        lambda path: relu_pair(path, "encoder", "decoder"), hook_name="blocks.19.hook_resid_post",
    ),
    "Qwen Scope": Case(
        "qwen-scope-3-1.7b-base-w32k-l50", "layer3", qwen_scope, "topk", "blocks.3.hook_resid_post"
    ),
    "circuit-tracer": Case(
        "mwhanna-qwen3-4b-transcoders", "layer_7", circuit_tracer, "transcoder", "blocks.7.mlp.hook_in"
    ),
    "circuit-tracer, cross-layer": Case(
        "mntss-gemma-2-2b-2.5m-clt-as-per-layer", "layer_7", circuit_tracer_clt, "transcoder",
        "blocks.7.hook_resid_mid",
    ),
}  # fmt: skip


# ---- files ----


def write_file(path: Path, content: Any) -> None:
    """`content` in the form that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(content))
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".safetensors":
        save_file({name: tensor.clone().contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)


def in_folder(folder: Path, written: Written) -> None:
    for name, content in written.files.items():
        write_file(folder / name, content)


def in_cache(cache: Path, repo_id: str, written: Written, commit: str = COMMIT) -> Path:
    """Lay the files out as the hub's cache: blobs by hash, a snapshot of links to them, the main branch's commit.
    Returns the snapshot's folder."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    for name, content in written.files.items():
        made = repo / "made" / name
        write_file(made, content)
        blob = repo / "blobs" / hashlib.sha256(made.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        made.rename(blob)
        link = repo / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return repo / "snapshots" / commit
