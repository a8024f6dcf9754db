"""EleutherAI/sparsify: `sae.safetensors` + `cfg.json`: top-k SAEs, and transcoders with or without a skip connection.

    f     = the k largest of ReLU((x - b_dec) W_enc + b_enc)        a transcoder does not subtract b_dec
    x_hat = f W_dec + b_dec (+ x W_skip^T)

encoder.weight is [d_sae, d_in]; W_dec [d_sae, d_out] lies as it does here (some files have decoder.weight, transposed).
sae_lens 6.54.12 transposes W_dec, which then does not fit, and takes normalize_decoder, which says how an SAE was
trained, for whether b_dec is subtracted.
"""

import re
from typing import Any

import torch

from sae_core.errors import CheckpointError
from sae_core.files import flag, whole
from sae_core.pretrained.reading import Place, Weights, count, matrix, same_sizes, take, text

WEIGHTS, CONFIG, REPOSITORY_CONFIG = "sae.safetensors", "cfg.json", "config.json"
# Options that change the function, and that only their being off is read.
_OFF = {"signed": False, "embed_skip": False, "gram_lookup": False, "activation": "topk"}


def read_sparsify(place: Place) -> Weights:
    where = f"{place.name}/{CONFIG}"
    raw = place.json(place.near(CONFIG))
    for name, off in _OFF.items():
        if raw.get(name, off) != off:
            raise CheckpointError(f"{where}: {name} is {raw[name]!r}; accepted is {off!r}")
    transcoder = flag(raw.get("transcode", False), "transcode", where)
    skip = flag(raw.get("skip_connection", False), "skip_connection", where)
    path = f"{place.name}/{WEIGHTS}"
    tensors = place.safetensors(place.near(WEIGHTS))
    names = {
        "W_enc": "W_enc" if "W_enc" in tensors else "encoder.weight.T",
        "W_dec": "decoder.weight.T" if "decoder.weight" in tensors else "W_dec",
    }
    for ours, theirs in (("b_enc", "encoder.bias"), ("b_dec", "decoder.bias")):
        if ours in tensors or theirs in tensors:
            names[ours] = ours if ours in tensors else theirs
    taken = take(tensors, {**names, **({"W_skip": "W_skip"} if skip else {})}, path)
    _, d_sae = matrix(taken, "W_enc", path)
    _, d_out = matrix(taken, "W_dec", path)
    taken = {"b_enc": torch.zeros(d_sae), "b_dec": torch.zeros(d_out), **taken}
    raw = {**raw, "num_latents": raw.get("num_latents") or None}  # 0: by the expansion factor
    same_sizes(raw, taken, "d_in", "num_latents", where)
    if skip and not transcoder:
        raise CheckpointError(f"{where}: skip_connection is true and transcode is false; accepted: both, or neither")
    return Weights(
        architecture="topk",
        tensors=taken,
        config={"apply_b_dec_to_input": not transcoder, "skip": skip, "k": whole(raw.get("k"), "k", where)},
        metadata=_metadata(place, transcoder),
        transcoder=transcoder,
    )


def run_config(path: str) -> str | None:
    """The configuration of the run beside the SAEs' folders, of which `path` is one."""
    above, _, name = path.rpartition("/")
    return None if not name else f"{above}/{REPOSITORY_CONFIG}".lstrip("/")


def _metadata(place: Place, transcoder: bool) -> dict[str, Any]:
    """Of the module that the folder is named after, and of the configuration of the run, beside the SAEs' folders."""
    metadata: dict[str, Any] = {}
    run = run_config(place.path)
    if run is not None and place.has(run):
        raw = place.json(run)
        metadata |= {
            "model_name": text(raw.get("model")),
            "dataset_path": text(raw.get("dataset")),
            "context_size": count(raw.get("ctx_len")),
        }
    module = re.search(r"(?:layers|h)[._](\d+)(?:[._](mlp|attn|self_attn|attention))?$", place.words)
    if place.words.endswith(("embed_tokens", "wte", "embed_in")):
        metadata["hook_name"] = "hook_embed"
    elif module is not None:
        layer, kind = module[1], module[2]
        out = {None: "hook_resid_post", "mlp": "hook_mlp_out"}.get(kind, "hook_attn_out")
        reads = {None: "hook_resid_pre", "mlp": "mlp.hook_in"}.get(kind, "attn.hook_in") if transcoder else out
        metadata["hook_name"] = f"blocks.{layer}.{reads}"
        metadata["hook_name_out"] = f"blocks.{layer}.{out}" if transcoder else None
    return metadata
