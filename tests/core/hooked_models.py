"""TransformerLens models of the other kind: HookedTransformers with random weights."""

import warnings
from typing import Any

import torch


def random_hooked_transformer() -> Any:
    """3 layers with LayerNorm, d_model 32, 4 heads, a vocabulary of 50; the same at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=64, d_vocab=50, act_fn="gelu_new",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model
