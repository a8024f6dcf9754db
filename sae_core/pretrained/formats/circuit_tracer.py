"""Transcoders of the circuit-tracing repositories: one safetensors file a layer, ReLU; YAML files at the repository's
root say what they are of.

    circuit_tracer      layer_7.safetensors: W_enc [d_sae, d_in], W_dec [d_sae, d_out], b_enc, b_dec (+ W_skip)
    circuit_tracer_clt  W_enc_7.safetensors + W_dec_7.safetensors: one layer of a cross-layer transcoder, whose decoder
                        [d_sae, layers from 7 on, d_out] writes to all later layers

Of the latter a transcoder of one layer is made by summing its decoders over the layers, as sae_lens does: its latents
are right, its reconstruction is of no one hook point.
"""

import re
from typing import Any

from torch import Tensor

from sae_core.errors import CheckpointError
from sae_core.pretrained.reading import Place, Weights, count, take, text

CONFIG = "config.yaml"
RUN_CONFIGS = ("wandb-config.yaml", "wanb-config.yaml")  # misspelt in some of the repositories
SUMMED = (
    "this is one layer of a cross-layer transcoder, its decoders to all later layers added up: its latents are right, "
    "what it reconstructs is of no single hook point"
)
_RAW_WEIGHTS = {"model_from_pretrained_kwargs": {"fold_ln": False}}


def clt_files(path: str) -> tuple[str, str]:
    """The two files of a layer: of '7', or of the path of one of them."""
    found = re.search(r"(\d+)(?:\.safetensors)?$", path)
    if found is None:
        raise CheckpointError(f"{path}: no layer; accepted is its number, such as '7'")
    above = path.rpartition("/")[0]
    start = f"{above}/" if above else ""
    return f"{start}W_enc_{found[1]}.safetensors", f"{start}W_dec_{found[1]}.safetensors"


def read_transcoder(place: Place) -> Weights:
    tensors = place.safetensors(place.path)
    names = {"W_enc": "W_enc.T", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
    skip = "W_skip" in tensors
    taken = take(tensors, {**names, **({"W_skip": "W_skip"} if skip else {})}, place.name)
    if taken["W_enc"].shape[1:] != taken["W_dec"].shape[:1]:
        raise CheckpointError(
            f"{place.name}: W_enc {list(tensors['W_enc'].shape)} and W_dec {list(tensors['W_dec'].shape)}; expected "
            "are [d_sae, d_in] and [d_sae, d_out]"
        )
    layer = place.layer(r"layer_(\d+)")
    run: dict[str, Any] = next((place.yaml(name) for name in RUN_CONFIGS if place.has(name)), {})
    size = run.get("batch_size")
    general = place.yaml(CONFIG) if place.has(CONFIG) else {}
    qwen = re.search(r"qwen3-(\d+(?:\.\d+)?)b", place.words)
    metadata = {
        "model_name": text(general.get("model_name")) or (f"Qwen/Qwen3-{qwen[1]}B" if qwen else None),
        "hook_name": None if layer is None else f"blocks.{layer}.mlp.hook_in",
        "hook_name_out": None if layer is None else f"blocks.{layer}.hook_mlp_out",
        "dataset_path": "monology/pile-uncopyrighted",
        "context_size": count(size.get("value")) if isinstance(size, dict) else None,
        "prepend_bos": True,
        **_RAW_WEIGHTS,
    }
    return Weights("standard", taken, {"skip": skip}, metadata, transcoder=True)


def read_clt_layer(place: Place) -> Weights:
    encoder, decoder = clt_files(place.path)
    layer = encoder.rpartition("_")[2].removesuffix(".safetensors")
    names = {name: f"{name}_{layer}" for name in ("b_enc", "b_dec")}
    taken = take(place.safetensors(encoder), {"W_enc": f"W_enc_{layer}.T", **names}, place.name)
    decoders: Tensor = take(place.safetensors(decoder), {"W_dec": f"W_dec_{layer}"}, place.name)["W_dec"]
    if decoders.ndim != 3:
        raise CheckpointError(
            f"{place.name}: W_dec_{layer} has shape {list(decoders.shape)}; expected is [d_sae, layers, d_out]"
        )
    general = place.yaml(CONFIG) if place.has(CONFIG) else {}
    hooks = {name: text(general.get(f"feature_{name}_hook")) for name in ("input", "output")}
    metadata = {
        "model_name": text(general.get("model_name")),
        "hook_name": hooks["input"] and f"blocks.{layer}.{hooks['input']}",
        "hook_name_out": hooks["output"] and f"blocks.{layer}.{hooks['output']}",
        "prepend_bos": True,
        "decoders_summed_over_layers": True,
        **_RAW_WEIGHTS,
    }
    summed = decoders.float().sum(dim=1)
    return Weights("standard", {**taken, "W_dec": summed}, {}, metadata, transcoder=True, notice=SUMMED)
