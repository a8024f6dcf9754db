"""Decode, weight gradients and bookkeeping on the active (token, latent) pairs, dense or sparse."""

from sae_core.kernels.active import Active, DenseActive, SparseActive, select_active

__all__ = ["Active", "DenseActive", "SparseActive", "select_active"]
