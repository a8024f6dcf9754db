"""The formulas, as free functions.

Shapes: B tokens, D = d_in, F = d_sae. `_BD`, `_BF` and so on name a tensor's shape.
"""

import torch
from torch import Tensor

from sae_core.kernels import top_k_mask


def topk(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest entries of each row [..., F] where they are positive, 0 elsewhere."""
    return torch.relu(pre_acts) * top_k_mask(pre_acts, k)


def batch_topk(pre_acts: Tensor, n: int) -> Tensor:
    """The n largest of all entries [..., F] where they are positive, 0 elsewhere; with those tied with the smallest."""
    kept = torch.relu(pre_acts)
    least = kept.detach().flatten().topk(min(n, kept.numel()), sorted=False).values.min()
    return kept * (kept >= least)


def jumprelu(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    """ReLU of the entries above their latent's threshold [F], 0 elsewhere (arXiv 2407.14435, eq. 3)."""
    return torch.relu(pre_acts) * (pre_acts > threshold)


def aux_k_scale(n_dead: int, d_in: int, coefficient: float) -> tuple[int, float]:
    """(k_aux, weight of the AuxK loss): k_aux = min(d_in // 2, n_dead), weight = coefficient * min(2 n_dead / d_in, 1).

    Source: arXiv 2406.04093, appendix A.2, with the scaling by the number of dead latents that SAELens uses.
    """
    most = max(d_in // 2, 1)
    return min(most, n_dead), coefficient * min(n_dead / most, 1.0)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x - x_hat||^2 of each row: [..., D] -> [...]."""
    return (x - x_hat).square().sum(-1)


def explained_variance(x: Tensor, x_hat: Tensor) -> Tensor:
    """1 - E||x - x_hat||^2 / (E||x||^2 - ||E x||^2) over the rows of [B, D], in float64."""
    x, x_hat = x.double(), x_hat.double()
    variance = x.square().sum(-1).mean() - x.mean(0).square().sum()
    return 1 - squared_error(x, x_hat).mean() / variance


def cosine(x: Tensor, x_hat: Tensor) -> Tensor:
    """Cosine between the rows: [..., D] -> [...]; 0 where a row is all zeros."""
    return (x * x_hat).sum(-1) / (x.norm(dim=-1) * x_hat.norm(dim=-1)).clamp_min(1e-30)


def l2_ratio(x: Tensor, x_hat: Tensor) -> Tensor:
    """||x_hat|| / ||x|| of each row: [..., D] -> [...]; ||x_hat|| where ||x|| is below 1e-4, as SAELens has it."""
    norms = x.norm(dim=-1)
    return x_hat.norm(dim=-1) / torch.where(norms < 1e-4, torch.ones_like(norms), norms)
