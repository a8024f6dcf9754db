"""Normalisation of activations, by SAELens' names, and the calibration that it takes.

    none                        z = x
    expected_average_only_in    z = x * sqrt(d_in) / E||x||                         (Anthropic, April 2024; the default)
    covariance_whitening        z = (x - E x) E diag(v + 1e-3)^(-1/2)    E, v: eigenvectors and -values of cov(x)
                                                                                    (arXiv 2511.13981)
    constant_norm_rescale       z = x * sqrt(d_in) / ||x||                          token by token
    layer_norm                  z = (x - mean(x)) / (std(x) + 1e-5)                 token by token, over d_in

The first three are the same for all tokens and are folded into an SAE's weights when training ends. The others stay a
part of the SAE; what it reconstructs is scaled back by the same token's own figures.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from sae_core.errors import CheckpointError, ConfigError

CHUNK_TOKENS = 8192
PER_TOKEN = ("constant_norm_rescale", "layer_norm")
WHITENING_EPSILON = 1e-3


@dataclass(frozen=True)
class TokenScaling:
    """How each token was normalised: z = (x - shift) / scale, both [..., 1]."""

    scale: Tensor
    shift: Tensor | None

    def undo(self, z: Tensor) -> Tensor:
        return z * self.scale if self.shift is None else z * self.scale + self.shift


def scale_tokens(x: Tensor, mode: str) -> tuple[Tensor, TokenScaling | None]:
    """Activations [..., d_in] normalised token by token; as they are, and None, for a mode that does not do so.

    As in SAELens, layer_norm divides by the unbiased standard deviation plus 1e-5 and multiplies by the standard
    deviation alone. A token of zeros stays zeros, where SAELens' constant_norm_rescale gives NaN.
    """
    if mode == "constant_norm_rescale":
        scale = (x.norm(dim=-1, keepdim=True) / sqrt(x.shape[-1])).clamp_min(torch.finfo(x.dtype).tiny)
        return x / scale, TokenScaling(scale, None)
    if mode == "layer_norm":
        mean = x.mean(dim=-1, keepdim=True)
        centred = x - mean
        std = centred.std(dim=-1, keepdim=True)
        return centred / (std + 1e-5), TokenScaling(std, mean)
    return x, None


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


class Normalizer:
    """Normalises the activations of one hook point for training, by a mode of `normalize_activations`."""

    def __init__(self, mode: str, calibration: Calibration, device: torch.device):
        self.mode = mode
        self.device = device
        self.scale = calibration.scale if mode == "expected_average_only_in" else 1.0
        self.whitening = Whitening.of(calibration) if mode == "covariance_whitening" else None
        mean, d_in = calibration.mean.double(), calibration.d_in
        if self.whitening is not None:
            self._mean, self._matrix, self._inverse = (
                tensor.float().to(device)
                for tensor in (self.whitening.mean, self.whitening.matrix, self.whitening.inverse)
            )
            mean = torch.zeros_like(mean)
        elif mode == "layer_norm":
            mean = (mean - mean.mean()) * calibration.scale
        else:
            mean = mean * (self.scale if mode == "none" else calibration.scale)
        self.mean = mean.float()  # [d_in], of normalised activations: exact unless a mode works token by token
        self.mean_square_norm = (  # E||z||^2
            calibration.mean_square_norm * self.scale**2
            if mode in ("none", "expected_average_only_in")
            else float(d_in)
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Raw activations [tokens, d_in] of any float type, normalised: float32, on the device, a new tensor or x."""
        x = x.to(self.device, torch.float32)
        if self.whitening is not None:
            return (x - self._mean) @ self._matrix
        if self.mode in PER_TOKEN:
            return scale_tokens(x, self.mode)[0]
        return x if self.scale == 1.0 else x * self.scale

    def raw_error(self, error: Tensor, x: Tensor) -> Tensor:
        """A normalised reconstruction's error [tokens, d_in] in the units of the activations x."""
        if self.whitening is not None:
            return error @ self._inverse
        if self.mode in PER_TOKEN:
            _, scaling = scale_tokens(x.to(self.device, torch.float32), self.mode)
            return error * scaling.scale
        return error / self.scale


@dataclass(frozen=True)
class Whitening:
    """z = (x - mean) matrix, x = z inverse + mean; all float64."""

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, calibration: Calibration) -> "Whitening":
        """PCA whitening: the covariance of z is the identity, but for the 1e-3 added to each eigenvalue."""
        values, vectors = torch.linalg.eigh(calibration.covariance.double())
        deviations = (values.clamp_min(0) + WHITENING_EPSILON).sqrt()
        return cls(calibration.mean.double(), vectors / deviations, deviations[:, None] * vectors.T)
