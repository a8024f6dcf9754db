"""Calibration: one pass over a block of activations, in float64, from which scale, b_dec and the PCA baseline come."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from sae_core.errors import CheckpointError, ConfigError

CHUNK_TOKENS = 8192


@dataclass(frozen=True)
class Calibration:
    """What the activations of one hook point look like.

    scale: sqrt(d_in) / mean ||x||, so that x * scale has a mean norm of sqrt(d_in)
    mean [d_in], covariance [d_in, d_in]: float32, in the units of the activations
    """

    scale: float
    mean: Tensor
    covariance: Tensor
    n_tokens: int

    @property
    def d_in(self) -> int:
        return self.mean.shape[0]

    @property
    def mean_square_norm(self) -> float:
        """E||x||^2, in the units of the activations."""
        return float(self.covariance.double().trace() + self.mean.double().square().sum())

    def to_tensors(self) -> dict[str, Tensor]:
        """Flat tensors, as safetensors keeps them; `from_tensors` gives back an equal calibration."""
        return {
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "mean": self.mean,
            "covariance": self.covariance,
            "n_tokens": torch.tensor(self.n_tokens, dtype=torch.int64),
        }

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> "Calibration":
        missing = {"scale", "mean", "covariance", "n_tokens"} - tensors.keys()
        if missing:
            raise CheckpointError(f"calibration lacks the tensors {sorted(missing)}; it has {sorted(tensors)}")
        return Calibration(
            float(tensors["scale"]), tensors["mean"], tensors["covariance"], int(tensors["n_tokens"])
        )


def calibrate(x: np.ndarray | Tensor) -> Calibration:
    """Scale, mean and covariance of activations [tokens, d_in] of any float type; `x` is only read.

    Raises ConfigError if there are no tokens, or the activations are all zero or not finite.
    """
    if x.ndim != 2 or x.shape[0] == 0:
        raise ConfigError(f"calibration needs activations [tokens, d_in] of one token or more, got {list(x.shape)}")
    n_tokens, d_in = x.shape
    total = torch.zeros(d_in, dtype=torch.float64)
    norms = 0.0
    for chunk in _chunks(x):
        total += chunk.sum(0)
        norms += float(chunk.norm(dim=1).sum())
    if not np.isfinite(norms) or norms == 0:
        raise ConfigError("the activations are all zero or not finite: nothing can be calibrated on them")
    mean = total / n_tokens
    # a second pass, centred: E[x x^T] - mean mean^T loses its digits where the mean is large
    covariance = torch.zeros(d_in, d_in, dtype=torch.float64)
    for chunk in _chunks(x):
        centred = chunk - mean
        covariance += centred.T @ centred
    scale = sqrt(d_in) / (norms / n_tokens)
    return Calibration(scale, mean.float(), (covariance / n_tokens).float(), n_tokens)


def _chunks(x: np.ndarray | Tensor) -> Iterator[Tensor]:
    for start in range(0, x.shape[0], CHUNK_TOKENS):
        part = x[start : start + CHUNK_TOKENS]
        if isinstance(part, np.ndarray):  # astype copies, so that a read-only array never becomes a writable tensor
            yield torch.from_numpy(part.astype(np.float64))
        else:
            yield part.detach().cpu().double()
