"""saprmarks/dictionary_learning: `ae.pt` + `config.json`, as in the SAEBench suites.

    AutoEncoder                       f = ReLU((x - bias) W_enc + b_enc)
    AutoEncoderNew                    f = ReLU(x W_enc + b_enc)
    GatedAutoEncoder                  as in architectures/gated.py
    AutoEncoderTopK                   f = the k largest of ReLU((x - b_dec) W_enc + b_enc)
    BatchTopKSAE, Matryoshka...       f = pre where pre > threshold, one for all latents: (x - b_dec) W_enc + b_enc
    JumpReluAutoEncoder               f = pre where pre > threshold, one for each:        x W_enc + b_enc

Weights of linear layers are transposed there. A gated or JumpReLU SAE's latents are multiplied by their decoder rows'
norms there, and divided again before they are decoded; here, as in sae_lens, they are not: the same reconstruction, and
the same latents where rows have unit norm. A top-k SAE's own threshold is of another way to use it, and left out.
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from torch import Tensor

from sae_core.errors import CheckpointError
from sae_core.files import whole
from sae_core.pretrained.reading import (
    Place,
    Weights,
    count,
    matrix,
    part,
    per_latent,
    same_sizes,
    take,
    tensors_only,
    text,
)
from sae_core.settings import nearest

WEIGHTS, CONFIG = "ae.pt", "config.json"
_ENCODER = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
_PARAMETERS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
# By dict_class: architecture, the names of its tensors, others that the file may hold, and whether b_dec is subtracted.
_CLASSES: dict[str, tuple[str, dict[str, str], tuple[str, ...], bool]] = {
    "AutoEncoder": ("standard", {**_ENCODER, "b_dec": "bias"}, (), True),
    "AutoEncoderNew": ("standard", {**_ENCODER, "b_dec": "decoder.bias"}, (), False),
    "GatedAutoEncoder": (
        "gated",
        {
            "W_enc": "encoder.weight.T", "W_dec": "decoder.weight.T", "b_dec": "decoder_bias",
            "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag",
        },
        (),
        True,
    ),
    "AutoEncoderTopK": ("topk", {**_ENCODER, "b_dec": "b_dec"}, ("k", "threshold"), True),
    "BatchTopKSAE": ("jumprelu", {**_ENCODER, "b_dec": "b_dec", "threshold": "threshold"}, ("k",), True),
    "MatryoshkaBatchTopKSAE": ("jumprelu", {**_PARAMETERS, "threshold": "threshold"}, ("k", "group_sizes"), True),
    "JumpReluAutoEncoder": ("jumprelu", {**_PARAMETERS, "threshold": "threshold"}, (), False),
}  # fmt: skip
_HOOKS = {
    "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attention_out": "hook_attn_out",
    "attn_out": "hook_attn_out", "resid_pre": "hook_resid_pre",
}  # fmt: skip


def read_dictionary_learning(place: Place) -> Weights:
    where = f"{place.name}/{CONFIG}"
    raw = place.json(place.near(CONFIG))
    trainer = part(raw, "trainer", where)
    kind = trainer.get("dict_class")
    if not isinstance(kind, str) or kind not in _CLASSES:
        close = nearest(kind, list(_CLASSES))
        raise CheckpointError(f"{where}: trainer.dict_class is {kind!r}{close}; accepted: {', '.join(_CLASSES)}")
    architecture, names, left, subtracts = _CLASSES[kind]
    path = f"{place.name}/{WEIGHTS}"
    tensors = tensors_only(place.pickle(place.near(WEIGHTS)), path)
    taken = take(tensors, names, path, left=left)
    same_sizes(trainer, taken, "activation_dim", "dict_size", where)
    if "threshold" in taken:
        taken["threshold"] = per_latent(taken["threshold"], taken, path)
    config: dict[str, Any] = {"apply_b_dec_to_input": subtracts}
    if architecture == "topk":
        config["k"] = _k(trainer, tensors, where)
    return Weights(architecture, taken, config, _metadata(raw, trainer, tensors, taken, place))


def _k(trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> int:
    k = whole(trainer.get("k"), "trainer.k", where)
    stored = tensors.get("k")
    if stored is not None and (stored.numel() != 1 or int(stored) != k):
        raise CheckpointError(f"{where}: trainer.k is {k}, and {WEIGHTS} has {stored.tolist()}")
    return k


def _metadata(
    raw: Mapping[str, Any], trainer: Mapping[str, Any], tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor],
    place: Place,
) -> dict[str, Any]:  # fmt: skip
    buffer = raw["buffer"] if isinstance(raw.get("buffer"), dict) else {}
    module = text(trainer.get("submodule_name")) or place.path
    hook = next((hook for name, hook in _HOOKS.items() if name in module), "hook_resid_post")
    layer = count(trainer.get("layer"))
    metadata: dict[str, Any] = {
        "model_name": text(trainer.get("lm_name")),
        "hook_name": None if layer is None else f"blocks.{layer}.{hook}",
        "context_size": count(buffer.get("ctx_len")),
        "prepend_bos": True,
        "dataset_path": "monology/pile-uncopyrighted",
    }
    if "group_sizes" in tensors:
        d_sae, _ = matrix(taken, "W_dec", place.name)
        sizes = tensors["group_sizes"].flatten().tolist()
        widths = list(accumulate(sizes)) if all(count(size) for size in sizes) else []
        if widths[-1:] != [d_sae]:
            raise CheckpointError(
                f"{place.name}: group_sizes is {sizes[:10]}; expected are whole numbers above 0 that sum up to d_sae, "
                f"{d_sae}"
            )
        metadata["matryoshka"] = {"widths": widths}
    return metadata
