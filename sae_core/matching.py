"""Which features of two SAEs are the same: their decoder directions compared.

    cosine[i, j] = <a_i, b_j> / (|a_i| |b_j|)                 a [n_a, d], b [n_b, d]: rows of W_dec

Two latents are mutual nearest neighbours where neither has a closer one in the other SAE; a feature counts as found
again, or shared, where its mutual nearest neighbour has a cosine above a threshold, 0.7 unless given (Paulo and
Belrose, Sparse Autoencoders Trained on the Same Data Learn Different Features, 2025, use it with the Hungarian method).
Each latent is in one pair at most, so that a feature that one SAE splits into three counts once. The mean of the
greatest cosines (mean max cosine: Sharkey et al., Taking features out of superposition with sparse autoencoders, 2022)
lets several latents point at the same one. The Hungarian method pairs all latents of the smaller SAE one to one such
that the cosines' sum is greatest; its time goes with the cube of the width.

Random directions in d dimensions have greatest cosines of about sqrt(2 log(n) / d) among n.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_core.errors import ConfigError

THRESHOLD = 0.7
NEVER_FIRED = -9.5
"""Firing rates are kept as log10(rate + 1e-10): what lies below has never fired."""
HUNGARIAN_LATENTS = 4096
"""The most latents of the wider SAE for the Hungarian method: 17 million cosines and some seconds."""
_TILE = 16_000_000


@dataclass(frozen=True)
class Matching:
    """Latents of SAE a, each with its counterpart in b.

    nearest [n_a] int64: the latent of b with the greatest cosine; cosine [n_a]: that cosine; mutual [n_a] bool: whether
    it is the nearest from both sides.
    """

    nearest: Tensor
    cosine: Tensor
    mutual: Tensor

    def found(self, threshold: float = THRESHOLD) -> Tensor:
        """Which latents of a are found again in b: [n_a] bool."""
        return self.mutual & (self.cosine > threshold)


def directions(W_dec: Tensor) -> Tensor:
    """Rows [d_sae, d] of unit length in float32; a row of zeros stays one, of cosine 0 with everything."""
    return torch.nn.functional.normalize(W_dec.detach().float(), dim=1, eps=1e-12)


def live(d_sae: int, sparsity: Tensor | None) -> Tensor:
    """Which latents [d_sae] have ever fired, by the log10 firing rates of a folder; all where there are none."""
    return torch.ones(d_sae, dtype=torch.bool) if sparsity is None else sparsity > NEVER_FIRED


@torch.no_grad()
def match(a: Tensor, b: Tensor) -> tuple[Matching, Matching]:
    """The matching of directions a [n_a, d] with b [n_b, d], and of b with a.

    The cosines are made in tiles: memory is that of 16 million of them, however wide the SAEs are. Raises ConfigError
    for directions of another d, or none.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ConfigError(
            f"directions have shapes {list(a.shape)} and {list(b.shape)}; accepted: [n, d] of one d, n at least 1"
        )
    to_b, cosine_a = torch.empty(len(a), dtype=torch.int64), torch.empty(len(a))
    to_a, cosine_b = torch.zeros(len(b), dtype=torch.int64), torch.full((len(b),), -2.0)
    rows = max(1, _TILE // len(b))
    for start in range(0, len(a), rows):
        cosines = a[start : start + rows] @ b.T
        cosine_a[start : start + rows], to_b[start : start + rows] = cosines.max(dim=1)
        best, at = cosines.max(dim=0)
        closer = best > cosine_b
        cosine_b[closer], to_a[closer] = best[closer], at[closer] + start
    of_a, of_b = torch.arange(len(a)), torch.arange(len(b))
    return (
        Matching(to_b, cosine_a.clamp(-1, 1), to_a[to_b] == of_a),
        Matching(to_a, cosine_b.clamp(-1, 1), to_b[to_a] == of_b),
    )


@torch.no_grad()
def found_again(a: Tensor, b: Tensor, threshold: float = THRESHOLD, most: int | None = None) -> Tensor:
    """`match(a, b)[0].found(threshold)`, or of `most` rows of a, spread evenly, where it has more: [n] bool. The sample
    is of the latents that are asked about; their counterparts are still sought among all."""
    if most is None or len(a) <= most:
        return match(a, b)[0].found(threshold)
    asked = torch.linspace(0, len(a) - 1, most).round().long()
    nearest, cosine = _nearest(a[asked], b)
    back, _ = _nearest(b[nearest], a)
    return (back == asked) & (cosine > threshold)


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of a the row of b with the greatest cosine, and that cosine: [n_a] each."""
    tiles = [(tile @ b.T).max(dim=1) for tile in a.split(max(1, _TILE // len(b)))]
    return torch.cat([tile.indices for tile in tiles]), torch.cat([tile.values for tile in tiles])


@torch.no_grad()
def hungarian(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(latents of a, their counterparts in b, cosines), min(n_a, n_b) each: the pairs, one to one, whose cosines have
    the greatest sum (Kuhn, The Hungarian method for the assignment problem, 1955; scipy's is Jonker and Volgenant's).
    Raises ConfigError where the wider one has more than `HUNGARIAN_LATENTS`."""
    from scipy.optimize import linear_sum_assignment

    if max(len(a), len(b)) > HUNGARIAN_LATENTS:
        raise ConfigError(
            f"the Hungarian method on {len(a)} and {len(b)} latents; accepted: at most {HUNGARIAN_LATENTS} each"
        )
    cosines = (a @ b.T).numpy()
    of_a, of_b = (torch.from_numpy(np.asarray(indices)) for indices in linear_sum_assignment(cosines, maximize=True))
    return of_a, of_b, torch.from_numpy(cosines)[of_a, of_b].clamp(-1, 1)
