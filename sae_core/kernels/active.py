"""The active (token, latent) pairs of a batch, and the few operations a training step needs on them.

An architecture writes its gradient once, against `Active`. `DenseActive` keeps [B, F] matrices with zeros and is the
reference; `SparseActive` keeps one entry a pair, so that everything after the encoder costs in proportion to the
number of active pairs. Both are exact. "Values" are [B, F] for the one and [P] for the other.

Shapes: B tokens, D = d_in, F = d_sae, P pairs.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

# Below this share of active pairs the sparse path is taken. On CPU both take equally long at 0.2 (d_in 128, d_sae 1024)
# and at 0.13 (d_in 512, d_sae 8192), one thread; at 0.02 sparse is 3 to 5 times faster. On a GPU not measured yet.
SPARSE_BELOW = {"cpu": 0.13, "cuda": 0.02}


class Active(Protocol):
    def gather(self, values_BF: Tensor) -> Tensor:
        """The entries of a matrix [B, F] at the active pairs."""

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor:
        """sum over a token's pairs of value * W[latent]: [B, D]."""

    def row_dots(self, g_BD: Tensor, W_FD: Tensor, plus_F: Tensor | None = None) -> Tensor:
        """g[token] . W[latent] + plus[latent] at each pair: values."""

    def latent_sums(self, values: Tensor, x_BD: Tensor) -> Tensor:
        """sum over a latent's pairs of value * x[token]: [F, D]."""

    def per_latent(self, values: Tensor) -> Tensor:
        """sum over a latent's pairs of value: [F]."""

    def scale(self, values: Tensor, by_F: Tensor) -> Tensor:
        """value * by[latent]."""

    def shift(self, values: Tensor, by_F: Tensor) -> Tensor:
        """value + by[latent]; entries off the active pairs are not defined afterwards."""


class DenseActive:
    """Pairs are active where `support` [B, F] is positive."""

    def __init__(self, support_BF: Tensor):
        self.support_BF = support_BF

    def gather(self, values_BF: Tensor) -> Tensor:
        # the backward of a threshold is "keep where positive, else 0" in one pass over memory
        return torch.ops.aten.threshold_backward(values_BF, self.support_BF, 0.0)

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor:
        return values @ W_FD

    def row_dots(self, g_BD: Tensor, W_FD: Tensor, plus_F: Tensor | None = None) -> Tensor:
        return self.gather(g_BD @ W_FD.T if plus_F is None else torch.addmm(plus_F, g_BD, W_FD.T))

    def latent_sums(self, values: Tensor, x_BD: Tensor) -> Tensor:
        return values.T @ x_BD

    def per_latent(self, values: Tensor) -> Tensor:
        return values.sum(0)

    def scale(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values * by_F

    def shift(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values + by_F


class SparseActive:
    """Pairs in the order of tokens, with a second order by latents for the sums over tokens."""

    def __init__(self, mask_BF: Tensor):
        self.n_tokens, self.n_latents = mask_BF.shape
        if mask_BF.device.type == "cpu":
            self._index_on_cpu(mask_BF.numpy())
        else:
            self._index_on_device(mask_BF)

    def _index_on_cpu(self, mask: np.ndarray) -> None:
        flat = np.flatnonzero(mask)
        bounds = np.searchsorted(flat, np.arange(self.n_tokens + 1) * self.n_latents)
        tokens = np.repeat(np.arange(self.n_tokens), np.diff(bounds))
        latents = flat - tokens * self.n_latents
        # numpy sorts 16-bit keys by radix: an order of magnitude faster than a comparison sort
        keys = latents.astype(np.uint16 if self.n_latents <= 2**16 else np.uint32)
        order = np.argsort(keys, kind="stable")
        per_latent = np.bincount(latents, minlength=self.n_latents)
        self.flat = torch.from_numpy(flat)
        self.latents = torch.from_numpy(latents)
        self.starts = torch.from_numpy(bounds[:-1])
        self.order = torch.from_numpy(order)
        self.tokens_by_latent = torch.from_numpy(tokens[order])
        self.starts_by_latent = torch.from_numpy(np.cumsum(per_latent) - per_latent)

    def _index_on_device(self, mask: Tensor) -> None:
        self.flat = mask.reshape(-1).nonzero().squeeze(1)
        tokens = torch.div(self.flat, self.n_latents, rounding_mode="floor")
        self.latents = self.flat - tokens * self.n_latents
        counts, per_latent = mask.sum(1), mask.sum(0)
        self.starts = counts.cumsum(0) - counts
        self.order = torch.sort(self.latents, stable=True).indices
        self.tokens_by_latent = tokens[self.order]
        self.starts_by_latent = per_latent.cumsum(0) - per_latent

    def gather(self, values_BF: Tensor) -> Tensor:
        return values_BF.reshape(-1)[self.flat]

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor:
        return embedding_bag(self.latents, W_FD, self.starts, mode="sum", per_sample_weights=values)

    def row_dots(self, g_BD: Tensor, W_FD: Tensor, plus_F: Tensor | None = None) -> Tensor:
        # the gradient of a weighted bag with respect to its weights is this dot product, without gathering rows
        with torch.enable_grad():
            weights = torch.zeros(len(self.latents), device=g_BD.device, dtype=g_BD.dtype, requires_grad=True)
            bags = embedding_bag(self.latents, W_FD.detach(), self.starts, mode="sum", per_sample_weights=weights)
        (dots,) = torch.autograd.grad(bags, weights, g_BD)
        return dots if plus_F is None else dots + plus_F[self.latents]

    def latent_sums(self, values: Tensor, x_BD: Tensor) -> Tensor:
        by_latent = values[self.order]
        return embedding_bag(
            self.tokens_by_latent, x_BD, self.starts_by_latent, mode="sum", per_sample_weights=by_latent
        )

    def per_latent(self, values: Tensor) -> Tensor:
        # not index_add: its order of summation is not fixed on a GPU
        return self.latent_sums(values, values.new_ones(self.n_tokens, 1)).squeeze(1)

    def scale(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values * by_F[self.latents]

    def shift(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values + by_F[self.latents]


def select_active(support_BF: Tensor, mask_BF: Tensor | None = None, density: float | None = None) -> Active:
    """The pairs at which `support` is positive (and `mask` holds), in the form that is faster at their density.

    `density`, where the caller knows it, saves counting (on a GPU counting waits for the device).
    """
    active_BF = support_BF > 0 if mask_BF is None else mask_BF
    if density is None:
        count = np.count_nonzero(active_BF.numpy()) if active_BF.device.type == "cpu" else int(active_BF.sum())
        density = count / active_BF.numel()
    if density < SPARSE_BELOW.get(active_BF.device.type, 0.02):
        return SparseActive(active_BF)
    return DenseActive(support_BF if mask_BF is None else support_BF * mask_BF)
