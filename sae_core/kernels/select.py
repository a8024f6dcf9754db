"""From a batch to its active pairs: the encoder's product, and the choice of what is active in it.

On a CPU the product is made a few hundred tokens at a time and searched while it is in the cache; only the pairs are
kept, so that no [B, F] matrix is ever whole in memory. A device makes it in one piece, and in a number of pairs that is
known beforehand (inactive ones fill it up), so that nothing waits for it; where none is known the dense form is taken.

Shapes: B tokens, D = d_in, F = d_sae, P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sae_core.kernels import active
from sae_core.kernels.active import Active, DenseActive, SparseActive

# Of the product at a time on a CPU: the fewest rows with which it is still fast, or as many entries as fit a cache
CHUNK_ROWS, CHUNK_ENTRIES = 512, 1 << 20
TINY = float(np.finfo(np.float32).tiny)


class Selection(Protocol):
    """Which entries of `pre` [B, F] are active."""

    density: float | None  # the share of active pairs, where it is known beforehand

    def pairs(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """Flat positions (token * F + latent, ascending, int64) of the pairs, and `pre` at them."""
        ...

    def dense(self, pre: Tensor) -> tuple[DenseActive, Tensor]:
        """The pairs in their dense form, and `pre` at them; `pre` may be overwritten."""
        ...


@dataclass(frozen=True)
class Above:
    """Entries above a threshold, a number or [F]."""

    threshold: Tensor | float = 0.0
    density = None

    def pairs(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        return _pairs_where(self._mask(pre), pre)

    def dense(self, pre: Tensor) -> tuple[DenseActive, Tensor]:
        if isinstance(self.threshold, float) and self.threshold == 0.0:
            f = pre.relu_()
            return DenseActive(f), f
        active = DenseActive(self._mask(pre).to(pre.dtype))
        return active, active.gather(pre)

    def _mask(self, pre: Tensor) -> Tensor:
        return pre > (self.threshold.to(pre.dtype) if isinstance(self.threshold, Tensor) else self.threshold)


@dataclass(frozen=True)
class TopK:
    """The k largest positive entries of each row; exactly k where more are tied, those of the lowest latents."""

    k: int
    n_latents: int

    @property
    def density(self) -> float:
        return min(self.k / self.n_latents, 1.0)

    def pairs(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        return top_k_pairs(pre, self.k)

    def dense(self, pre: Tensor) -> tuple[DenseActive, Tensor]:
        return _dense_where(top_k_mask(pre, self.k), pre)


@dataclass(frozen=True)
class AtLeast:
    """Positive entries at or above a threshold that holds for all of them ([] tensor)."""

    threshold: Tensor
    density: float

    def pairs(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        return _pairs_where(self._mask(pre), pre)

    def dense(self, pre: Tensor) -> tuple[DenseActive, Tensor]:
        return _dense_where(self._mask(pre), pre)

    def _mask(self, pre: Tensor) -> Tensor:
        return pre >= self.threshold.to(pre.dtype).clamp_min(TINY)


def _dense_where(mask: Tensor, pre: Tensor) -> tuple[DenseActive, Tensor]:
    f = torch.where(mask, pre, 0.0)
    return DenseActive(f), f


def encode(
    x_BD: Tensor, W_enc: Tensor, bias: Tensor, selection: Selection, dtype: torch.dtype = torch.float32
) -> tuple[Active, Tensor]:
    """The active pairs of x W_enc + bias, and its values there, in the type of x.

    The product is made in `dtype`. The form of the pairs follows their density: where it is not known beforehand, that
    of the first tokens decides.
    """
    n_tokens, n_latents = len(x_BD), W_enc.shape[1]
    product = _Product(x_BD, W_enc, bias, dtype if x_BD.dtype == torch.float32 else x_BD.dtype)
    limit = active.SPARSE_BELOW.get(x_BD.device.type, 0.0)
    if x_BD.device.type != "cpu":
        pre = product.rows(0, n_tokens).to(x_BD.dtype)
        if isinstance(selection, TopK) and selection.density < limit:
            return _fixed_pairs(*_top_k_fixed(pre, selection.k), n_tokens, n_latents)
        return selection.dense(pre)
    step = max(CHUNK_ROWS, CHUNK_ENTRIES // n_latents)
    if selection.density is None or selection.density < limit:
        positions, values = [], []
        for start in range(0, n_tokens, step):
            pre = product.rows(start, start + step)
            found, there = selection.pairs(pre)
            if start == 0 and selection.density is None and len(found) >= limit * pre.numel():
                break
            values.append(there.to(x_BD.dtype))
            positions.append(found.add_(start * n_latents))
        else:
            flat = torch.cat(positions) if positions else torch.empty(0, dtype=torch.int64)
            pairs = SparseActive(flat, n_tokens, n_latents)
            return pairs, torch.cat(values) if values else x_BD.new_empty(0)
    return selection.dense(product.rows(0, n_tokens).to(x_BD.dtype))


def encode_batch_top(
    x_BD: Tensor, W_enc: Tensor, bias: Tensor, n: int, dtype: torch.dtype = torch.float32
) -> tuple[Active, Tensor, Tensor]:
    """As `encode`, for the n largest positive entries of the whole batch; also returns the smallest of them ([] tensor;
    0 where fewer than n are positive). Entries tied with it are all active."""
    n_latents = W_enc.shape[1]
    density = min(n / max(len(x_BD) * n_latents, 1), 1.0)
    if x_BD.device.type != "cpu" and 0 < density < active.SPARSE_BELOW.get(x_BD.device.type, 0.0):
        pre = _Product(x_BD, W_enc, bias, dtype).rows(0, len(x_BD)).to(x_BD.dtype)
        flat, values = _batch_top_fixed(pre, n)
        return *_fixed_pairs(flat, values, len(x_BD), n_latents), values.amin()
    if x_BD.device.type != "cpu" or density >= active.SPARSE_BELOW["cpu"]:
        threshold = batch_top_threshold([x_BD], W_enc, bias, n, dtype)
        return *encode(x_BD, W_enc, bias, AtLeast(threshold, density), dtype), threshold
    product = _Product(x_BD, W_enc, bias, dtype if x_BD.dtype == torch.float32 else x_BD.dtype)
    step = max(CHUNK_ROWS, CHUNK_ENTRIES // n_latents)
    # A bound from the first tokens is met by about twice as many entries as are wanted; should the other tokens be so
    # different that fewer than n meet it, every positive entry is looked at.
    first = product.rows(0, step)
    bound = _bound_of_share(first, 2 * n / len(x_BD))
    flat, values = _entries_from(product, len(x_BD), step, bound, first)
    if len(flat) < n and float(bound) > TINY:
        flat, values = _entries_from(product, len(x_BD), step, torch.tensor(TINY))
    values = values.to(x_BD.dtype)
    threshold = _nth_largest(values, n)
    keep = values >= threshold
    return SparseActive(flat[keep], len(x_BD), n_latents), values[keep], threshold


def batch_top_threshold(
    parts: Sequence[Tensor], W_enc: Tensor, bias: Tensor, n: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The n-th largest positive entry of the product over all parts [B, D] of a batch, [] tensor; 0 if there are
    fewer. Memory grows with n and with one part's product, not with the batch's.

    Products are made in the pieces in which `encode` makes them, where another size could differ in the last digit.
    """
    n_latents = W_enc.shape[1]
    density = n / max(sum(len(part) for part in parts) * n_latents, 1)
    largest = parts[0].new_empty(0)
    bound = largest.new_tensor(TINY)
    for x_BD in parts:
        product = _Product(x_BD, W_enc, bias, dtype if x_BD.dtype == torch.float32 else x_BD.dtype)
        step = _tokens_at_once(x_BD, n_latents, density)
        for start in range(0, len(x_BD), step):
            pre = product.rows(start, start + step).to(x_BD.dtype).reshape(-1)
            largest = torch.cat([largest, pre[pre >= bound]])
            if len(largest) > n:
                bound = _nth_largest(largest, n).clamp_min(TINY)
                largest = largest[largest >= bound]
    return _nth_largest(largest, n)


def _tokens_at_once(x_BD: Tensor, n_latents: int, density: float | None) -> int:
    """How many tokens' product is made at a time: on a CPU, where pairs are kept, a few hundred."""
    few = x_BD.device.type == "cpu" and (density is None or density < active.SPARSE_BELOW["cpu"])
    return max(CHUNK_ROWS, CHUNK_ENTRIES // n_latents) if few else max(len(x_BD), 1)


def _nth_largest(values: Tensor, n: int) -> Tensor:
    if len(values) < n or n == 0:
        return values.new_zeros(())
    if values.device.type == "cpu":
        return torch.from_numpy(np.partition(_numpy(values), len(values) - n)[len(values) - n :][:1].copy())[0]
    return torch.topk(values, n, sorted=False).values.min()


def _bound_of_share(pre: Tensor, per_token: float) -> Tensor:
    """A value that at least `per_token` entries a token of pre [B, F] reach, [] tensor; the least positive number if
    there is none."""
    n = ceil(per_token * len(pre))
    groups = _n_groups(pre.shape[1], ceil(4 * per_token))
    if groups is not None:
        pre = pre.view(len(pre), pre.shape[1] // groups, groups).amax(1)
    return _nth_largest(pre.reshape(-1), n).clamp_min(TINY)


def _entries_from(
    product: "_Product", n_tokens: int, step: int, bound: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Flat positions and values of the entries at or above a bound; `first`: the first tokens' product, where it has
    just been made."""
    positions, values = [], []
    for start in range(0, n_tokens, step):
        pre = first if start == 0 and first is not None else product.rows(start, start + step)
        found, there = _pairs_where(pre >= bound.to(pre.dtype), pre)
        values.append(there)
        positions.append(found.add_(start * pre.shape[1]))
    return torch.cat(positions), torch.cat(values)


class _Product:
    """Rows of x W + bias in a given type; each call may overwrite what the one before returned."""

    def __init__(self, x_BD: Tensor, W_enc: Tensor, bias: Tensor, dtype: torch.dtype):
        self.x, self.W, self.bias = x_BD.to(dtype), W_enc.to(dtype), bias.to(dtype)
        self._buffer: Tensor | None = None

    def rows(self, start: int, stop: int) -> Tensor:
        x = self.x[start:stop]
        if self._buffer is None or len(self._buffer) < len(x):
            self._buffer = x.new_empty(len(x), self.W.shape[1])
        return torch.addmm(self.bias, x, self.W, out=self._buffer[: len(x)])


# ---- on a device ---------------------------------------------------------------------------------------------------


def _top_k_fixed(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Flat positions, ascending, of k entries of each row, its largest, and their values, 0 where not positive."""
    latents = torch.topk(pre, k, dim=1, sorted=False).indices.sort(dim=1).values
    flat = latents + torch.arange(len(pre), device=pre.device)[:, None] * pre.shape[1]
    return flat.view(-1), pre.gather(1, latents).relu_().view(-1)


def _batch_top_fixed(pre: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """As `_top_k_fixed`, for the n largest entries of all."""
    flat = torch.topk(pre.view(-1), n, sorted=False).indices.sort().values
    return flat, pre.view(-1)[flat].relu_()


def _fixed_pairs(flat: Tensor, values: Tensor, n_tokens: int, n_latents: int) -> tuple[SparseActive, Tensor]:
    return SparseActive(flat, n_tokens, n_latents, active=(values > 0).to(values.dtype)), values


# ---- top k ----------------------------------------------------------------------------------------------------------


def top_k_mask(ranks: Tensor, k: int) -> Tensor:
    """True at the k largest entries of each row [..., F] that are also positive; exactly k where more are tied."""
    if ranks.device.type != "cpu":
        return _top_k_mask_by_index(ranks, k)
    rows = ranks.detach().reshape(-1, ranks.shape[-1])
    mask = torch.zeros(rows.shape, dtype=torch.bool)
    mask.view(-1)[top_k_pairs(rows, k)[0]] = True
    return mask.view(ranks.shape)


def _top_k_mask_by_index(ranks: Tensor, k: int) -> Tensor:
    index = torch.topk(ranks, min(k, ranks.shape[-1]), dim=-1, sorted=False).indices
    return torch.zeros_like(ranks, dtype=torch.bool).scatter_(-1, index, True) & (ranks > 0)


def top_k_pairs(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Flat positions and values of the k largest positive entries of each row [B, F]; of tied ones those that come
    first. For tensors on a CPU.

    Each row is cut into groups, and the k-th largest of the groups' maxima is a lower bound of the row's k-th
    largest entry that few other entries reach. Only what reaches it is compared further: one pass over memory, where
    torch.topk or a partition of whole rows take many.
    """
    n_rows, n_latents = rows.shape
    if n_rows == 0 or k >= n_latents:
        return _pairs_where(rows > 0, rows)
    bound = _row_bounds(rows, k).clamp_min_(TINY).to(rows.dtype)
    flat, found = _pairs_where(rows >= bound[:, None], rows)
    counts = np.diff(np.searchsorted(flat.numpy(), np.arange(n_rows + 1) * n_latents))
    if counts.max() <= k:
        return flat, found
    values = _numpy(found)
    filled = np.arange(counts.max()) < counts[:, None]
    candidates = np.full(filled.shape, -np.inf, dtype=values.dtype)
    candidates[filled] = values
    kth = np.partition(candidates, candidates.shape[1] - k, axis=1)[:, -k, None]
    keep = filled & (candidates >= kth)
    for row in np.flatnonzero(np.count_nonzero(keep, axis=1) > k):  # tied with the k-th: the first ones stay
        tied = np.flatnonzero(candidates[row] == kth[row])
        keep[row, tied[k - np.count_nonzero(keep[row]) :]] = False
    kept = torch.from_numpy(keep[filled])
    return flat[kept], found[kept]


def _row_bounds(rows: Tensor, k: int) -> Tensor:
    """A lower bound of the k-th largest entry of each row: [B]."""
    n_latents = rows.shape[1]
    groups = _n_groups(n_latents, 4 * k)
    if groups is not None:
        rows = rows.reshape(len(rows), n_latents // groups, groups).amax(1)
    values = _numpy(rows)
    return torch.from_numpy(np.partition(values, values.shape[1] - k, axis=1)[:, -k].copy())


def _n_groups(n_latents: int, least: int) -> int | None:
    """The smallest number of equal groups, at least `least` and of 4 latents each or more; None if there is none."""
    for size in range(n_latents // least, 3, -1):
        if n_latents % size == 0:
            return n_latents // size
    return None


def _numpy(values: Tensor) -> np.ndarray:
    """As numpy has it: half precision, which it sorts slowly or not at all, as float32, which holds it exactly."""
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()


def _pairs_where(mask: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions at which a mask holds, and `pre` there; on a CPU."""
    flat = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return flat, pre.reshape(-1)[flat]
