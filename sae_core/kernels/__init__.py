"""The encoder's product, its active (token, latent) pairs, and what a training step does with them."""

from sae_core.kernels.active import Active, DenseActive, SparseActive, decode
from sae_core.kernels.select import Above, AtLeast, TopK, batch_top_threshold, encode, encode_batch_top, top_k_mask

__all__ = [
    "Above",
    "Active",
    "AtLeast",
    "DenseActive",
    "SparseActive",
    "TopK",
    "batch_top_threshold",
    "decode",
    "encode",
    "encode_batch_top",
    "top_k_mask",
]
