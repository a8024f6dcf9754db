"""Baselines without training: the k largest coefficients in a fixed orthonormal basis.

An SAE that does not beat them at equal L0 is worth nothing: with the neurons as basis, a few tens of coefficients
already restore most of a small model's cross-entropy.
"""

import torch
from torch import Tensor, nn

from sae_core.errors import ConfigError
from sae_core.kernels import top_k_mask
from sae_core.normalization import Calibration


class TopKBasis(nn.Module):
    """x -> the k coefficients of x - mean in `basis` (columns, [d_in, d_in]) of largest magnitude, others 0."""

    def __init__(self, mean: Tensor, basis: Tensor, k: int):
        super().__init__()
        if not 0 < k <= basis.shape[1]:
            raise ConfigError(f"k is {k}: accepted are 1 to {basis.shape[1]}")
        self.k = k
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)

    @classmethod
    def neurons(cls, calibration: Calibration, k: int) -> "TopKBasis":
        """The coordinates themselves."""
        return cls(calibration.mean, torch.eye(calibration.d_in), k)

    @classmethod
    def pca(cls, calibration: Calibration, k: int) -> "TopKBasis":
        """The eigenvectors of the covariance, largest variance first."""
        _, vectors = torch.linalg.eigh(calibration.covariance.double())
        return cls(calibration.mean, vectors.flip(1).float().contiguous(), k)

    @property
    def d_in(self) -> int:
        return self.basis.shape[0]

    @property
    def d_sae(self) -> int:
        return self.basis.shape[1]

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] -> signed coefficients [..., d_in], at most k of them not 0."""
        coefficients = (x.to(self.basis.dtype) - self.mean) @ self.basis
        return coefficients * top_k_mask(coefficients.abs(), self.k)

    def decode(self, f: Tensor) -> Tensor:
        return f @ self.basis.T + self.mean

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))
