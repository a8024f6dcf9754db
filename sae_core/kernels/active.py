"""The active (token, latent) pairs of a batch, and the few operations a training step needs on them.

An architecture writes its gradient once, against `Active`. `DenseActive` keeps [B, F] matrices with zeros and is the
reference; `SparseActive` keeps one entry a pair, so that everything after the encoder costs in proportion to the
number of active pairs. Both are exact. "Values" are [B, F] for the one and [P] for the other.

Shapes: B tokens, D = d_in or d_out, F = d_sae, P pairs.
"""

import warnings
from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

# Below this share of active pairs the sparse form is taken. On CPU both take equally long at about 0.15 to 0.2; at
# 0.01 sparse is 5 times faster. On a GPU not measured yet; there it is taken only where the number of pairs is known
# beforehand, since counting them would wait for the device.
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

    def restricted(self, keep: Tensor) -> "tuple[Active, Callable[[Tensor], Tensor]]":
        """The pairs at which `keep` (bool values) holds, and what takes values to theirs; values must be 0 elsewhere,
        since the dense form keeps all it has."""

    def by_level(self, widths: Sequence[int]) -> "Levels":
        """The same pairs and values, with a row for each token and level instead of one for each token: row
        token * len(widths) + l has the pairs of latents from widths[l - 1] (or 0) on and below widths[l]."""


class Levels(Protocol):
    """What is done by token and level, see `Active.by_level`; matrices of such rows are [B L, D]."""

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor: ...

    def row_dots(self, g: Tensor, W_FD: Tensor) -> Tensor: ...

    def latent_sums(self, values: Tensor, x: Tensor) -> Tensor: ...


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

    def restricted(self, keep: Tensor) -> "tuple[Active, Callable[[Tensor], Tensor]]":
        return self, lambda values: values

    def by_level(self, widths: Sequence[int]) -> "Levels":
        return _DenseLevels(self.support_BF, widths)


class _DenseLevels:
    """Level l is a slice of the columns."""

    def __init__(self, support_BF: Tensor, widths: Sequence[int]):
        self.active = DenseActive(support_BF)
        self.levels = [slice(start, stop) for start, stop in zip([0, *widths], widths, strict=False)]

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor:
        return torch.stack([values[:, level] @ W_FD[level] for level in self.levels], 1).flatten(0, 1)

    def row_dots(self, g: Tensor, W_FD: Tensor) -> Tensor:
        dots = [g[i :: len(self.levels)] @ W_FD[level].T for i, level in enumerate(self.levels)]
        return self.active.gather(torch.cat(dots, 1))

    def latent_sums(self, values: Tensor, x: Tensor) -> Tensor:
        return torch.cat([values[:, level].T @ x[i :: len(self.levels)] for i, level in enumerate(self.levels)])


class SparseActive:
    """Pairs in the order of tokens, with a second order by latents for the sums over tokens.

    `flat` [P] int64: token * n_latents + latent of each pair, ascending. `active` [P]: 0 at pairs that only fill up a
    number fixed beforehand and are not active, 1 elsewhere; None where all are.
    """

    def __init__(self, flat: Tensor, n_tokens: int, n_latents: int, active: Tensor | None = None):
        self.n_tokens, self.n_latents = n_tokens, n_latents
        self.active = active
        if flat.device.type == "cpu":
            self._index_on_cpu(flat.numpy())
        else:
            self._index_on_device(flat)

    @classmethod
    def of_mask(cls, mask_BF: Tensor) -> "SparseActive":
        """The pairs at which `mask` holds."""
        return cls(mask_BF.reshape(-1).nonzero().squeeze(1), *mask_BF.shape)

    def _index_on_cpu(self, flat: np.ndarray) -> None:
        bounds = np.searchsorted(flat, np.arange(self.n_tokens + 1) * self.n_latents)
        tokens = np.repeat(np.arange(self.n_tokens), np.diff(bounds))
        latents = flat - tokens * self.n_latents
        # numpy sorts 16-bit keys by radix: an order of magnitude faster than a comparison sort
        keys = latents.astype(np.uint16 if self.n_latents <= 2**16 else np.uint32)
        order = np.argsort(keys, kind="stable")
        per_latent = np.bincount(latents, minlength=self.n_latents)
        self.latents = torch.from_numpy(latents)
        self.bounds = torch.from_numpy(bounds)
        self.order = torch.from_numpy(order)
        self.tokens_by_latent = torch.from_numpy(tokens[order])
        self.starts_by_latent = torch.from_numpy(np.cumsum(per_latent) - per_latent)

    def _index_on_device(self, flat: Tensor) -> None:
        tokens = torch.div(flat, self.n_latents, rounding_mode="floor")
        self.latents = flat - tokens * self.n_latents
        self.bounds = torch.searchsorted(flat, torch.arange(self.n_tokens + 1, device=flat.device) * self.n_latents)
        by_latent, self.order = torch.sort(self.latents, stable=True)
        self.tokens_by_latent = tokens[self.order]
        self.starts_by_latent = torch.searchsorted(by_latent, torch.arange(self.n_latents, device=flat.device))

    @cached_property
    def _pattern(self) -> Tensor:
        """A sparse [B, F] of zeros at the pairs."""
        zeros = torch.zeros(len(self.latents), device=self.latents.device)
        return _sparse_rows(self.bounds, self.latents, zeros, (self.n_tokens, self.n_latents))

    def gather(self, values_BF: Tensor) -> Tensor:
        flat = torch.repeat_interleave(self.bounds.diff(), output_size=len(self.latents)) * self.n_latents
        return self._where_active(values_BF.reshape(-1)[flat.add_(self.latents)])

    def decode(self, values: Tensor, W_FD: Tensor) -> Tensor:
        return embedding_bag(self.latents, W_FD, self.bounds[:-1], mode="sum", per_sample_weights=values)

    def row_dots(self, g_BD: Tensor, W_FD: Tensor, plus_F: Tensor | None = None) -> Tensor:
        pattern = self._pattern.to(g_BD.dtype)
        dots = torch.sparse.sampled_addmm(pattern, g_BD, W_FD.T, beta=0.0).values()
        return self._where_active(dots if plus_F is None else dots.add_(plus_F[self.latents]))

    def _where_active(self, values: Tensor) -> Tensor:
        return values if self.active is None else values * self.active

    def latent_sums(self, values: Tensor, x_BD: Tensor) -> Tensor:
        by_latent = values[self.order]
        return embedding_bag(
            self.tokens_by_latent, x_BD, self.starts_by_latent, mode="sum", per_sample_weights=by_latent
        )

    def per_latent(self, values: Tensor) -> Tensor:
        if values.device.type == "cpu":
            sums = np.bincount(self.latents.numpy(), values.numpy(), minlength=self.n_latents)
            return torch.from_numpy(sums).to(values.dtype)
        # not index_add: its order of summation is not fixed on a GPU
        return self.latent_sums(values, values.new_ones(self.n_tokens, 1)).squeeze(1)

    def scale(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values * by_F[self.latents]

    def shift(self, values: Tensor, by_F: Tensor) -> Tensor:
        return values + by_F[self.latents]

    def restricted(self, keep: Tensor) -> "tuple[Active, Callable[[Tensor], Tensor]]":
        before = nn.functional.pad(keep.cumsum(0), (1, 0))  # pairs kept before each
        kept_by_latent = keep[self.order]
        before_by_latent = nn.functional.pad(kept_by_latent.cumsum(0), (1, 0))
        kept = copy(self)
        kept.__dict__.pop("_pattern", None)
        kept.latents = self.latents[keep]
        kept.bounds = before[self.bounds]
        kept.order = before[self.order[kept_by_latent]]
        kept.tokens_by_latent = self.tokens_by_latent[kept_by_latent]
        kept.starts_by_latent = before_by_latent[self.starts_by_latent]
        kept.active = None if self.active is None else self.active[keep]
        return kept, lambda values: values[keep]

    def by_level(self, widths: Sequence[int]) -> "SparseActive":
        """Pairs lie in the order of tokens, and of latents for each token: by token and level as well."""
        device, n_levels = self.latents.device, len(widths)
        level_of_latent = torch.searchsorted(
            torch.tensor(widths, device=device), torch.arange(self.n_latents, device=device), right=True
        )
        token = torch.repeat_interleave(self.bounds.diff(), output_size=len(self.latents))
        rows = torch.arange(self.n_tokens * n_levels + 1, device=device)
        levels = copy(self)
        levels.__dict__.pop("_pattern", None)
        levels.n_tokens = self.n_tokens * n_levels
        levels.bounds = torch.searchsorted(token * n_levels + level_of_latent[self.latents], rows)
        levels.tokens_by_latent = self.tokens_by_latent * n_levels + level_of_latent[self.latents[self.order]]
        return levels


def decode(f: Tensor, W_FD: Tensor) -> Tensor:
    """f [..., F] times W, from the entries that are not 0 where they are few: on a CPU, and without gradients."""
    with_gradients = torch.is_grad_enabled() and (f.requires_grad or W_FD.requires_grad)
    if f.device.type != "cpu" or f.dtype != torch.float32 or W_FD.dtype != torch.float32 or with_gradients:
        return f @ W_FD
    f_BF = f.detach().reshape(-1, len(W_FD))
    active = f_BF.bool().numpy()  # in a fraction of the time of a comparison with 0
    if np.count_nonzero(active) >= SPARSE_BELOW["cpu"] * f_BF.numel():
        return f @ W_FD
    flat = np.flatnonzero(active)
    bounds = torch.from_numpy(np.searchsorted(flat, np.arange(len(f_BF)) * len(W_FD)))
    values = f_BF.view(-1)[torch.from_numpy(flat)]
    latents = torch.from_numpy(flat % len(W_FD))
    x_BD = embedding_bag(latents, W_FD, bounds, mode="sum", per_sample_weights=values)
    return x_BD.view(*f.shape[:-1], W_FD.shape[1])


def _sparse_rows(bounds: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(bounds, columns, values, shape, check_invariants=False)


with warnings.catch_warnings():  # torch says once a process that its sparse rows are "in beta"
    warnings.simplefilter("ignore")
    _sparse_rows(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0), (1, 1))
