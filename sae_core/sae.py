"""The sparse autoencoder as a module: what every architecture shares.

Names and layout: `W_enc [d_in, d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`, and the biases of an architecture's
encoder. The same modules train (in normalised units, see training.py) and serve (in the activations' units).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from sae_core.kernels import Active
from sae_core.settings import SAESettings


class SAEConfig(BaseModel):
    """What identifies a saved SAE. `metadata` is free: model, hook point, settings it was trained with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    dtype: str = "float32"
    apply_b_dec_to_input: bool = True
    k: int | None = None
    rescale_acts_by_decoder_norm: bool = False
    metadata: dict[str, Any] = Field(default_factory=dict)


@dataclass
class StepContext:
    """What a training step tells an architecture. `batch_tokens` is the whole batch's, also for a micro-batch."""

    batch_tokens: int
    coefficient: float  # of the sparsity or auxiliary loss, warm-up applied
    dead: Tensor | None  # [d_sae] bool, None if no latent is dead


@dataclass
class StepTerms:
    """Sums over the tokens of a micro-batch, in normalised units; all tensors, so that no step waits for a device."""

    loss: Tensor  # already divided by the batch's tokens
    squared_error: Tensor
    active: Tensor  # number of active (token, latent) pairs
    fired: Tensor  # [d_sae] number of tokens on which each latent fired
    x_hat: Tensor  # [tokens, d_in]


class SAE(nn.Module, ABC):
    """Base of all architectures. `encode` takes [..., d_in] to [..., d_sae], `decode` takes it back.

    Weights do not require gradients; `encode` and `decode` are differentiable in their input.
    """

    W_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    encoder_biases: ClassVar[tuple[str, ...]] = ("b_enc",)

    def __init__(self, cfg: SAEConfig, weights: Mapping[str, Tensor]):
        super().__init__()
        self.cfg = cfg
        for name in self.shapes(cfg.d_in, cfg.d_sae):
            self.register_parameter(name, nn.Parameter(weights[name], requires_grad=False))

    @classmethod
    def shapes(cls, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        biases = {name: (d_sae,) for name in cls.encoder_biases}
        return {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), **biases, "b_dec": (d_in,)}

    @property
    def d_in(self) -> int:
        return self.cfg.d_in

    @property
    def d_sae(self) -> int:
        return self.cfg.d_sae

    def centre(self, x: Tensor) -> Tensor:
        """`x` in the weights' dtype, less b_dec where this SAE subtracts it."""
        x = x.to(self.W_enc.dtype)
        return x - self.b_dec if self.cfg.apply_b_dec_to_input else x

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_sae]."""

    def decode(self, f: Tensor) -> Tensor:
        """[..., d_sae] -> [..., d_in]."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self, scale: float, metadata: Mapping[str, Any]) -> "SAE":
        """A copy for activations that are not normalised, with unit decoder rows: the same function of x as this
        SAE has of x * scale, up to the factor by which a latent's decoder row was long.

        A row of zeros (it decodes to nothing) is left as it is.
        """
        norms = self.W_dec.norm(dim=1) / scale
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        weights = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        weights["W_enc"] = (self.W_enc * (norms * scale)).contiguous()
        weights["W_dec"] = self.W_dec / (norms * scale)[:, None]
        weights["b_dec"] = self.b_dec / scale
        for name in self.latent_scaled:
            weights[name] = weights[name] * norms
        return type(self)(self.cfg.model_copy(update={"metadata": dict(metadata)}), weights)

    @property
    def latent_scaled(self) -> tuple[str, ...]:
        """The weights [d_sae] that grow with a latent's activation."""
        return self.encoder_biases

    @staticmethod
    def load(folder: str | Path, device: str | torch.device = "cpu", dtype: str | torch.dtype | None = None) -> "SAE":
        """Load a folder that `save` or SAELens wrote. Raises CheckpointError, never reads a pickle."""
        from sae_core.checkpoint import load_sae

        return load_sae(folder, device=device, dtype=dtype)

    def save(self, folder: str | Path, *, sparsity: Tensor | None = None) -> None:
        """Write SAELens' format: cfg.json (last, so that an interrupted save is seen), sae_weights.safetensors and,
        if given, sparsity.safetensors (log10 firing rates [d_sae])."""
        from sae_core.checkpoint import save_sae

        save_sae(self, folder, sparsity=sparsity)


class TrainableSAE(SAE):
    """An architecture that can be trained: adds its settings, its start, and its loss."""

    settings_type: ClassVar[type[SAESettings]]
    decoder_norm_at_start: ClassVar[float]
    revives_dead: ClassVar[bool] = False  # whether the loss treats dead latents apart

    @abstractmethod
    def accumulate_gradients(self, x: Tensor, gradients: Mapping[str, Tensor], context: StepContext) -> StepTerms:
        """Add the gradient of the loss on x [tokens, d_in], in normalised units, to `gradients`.

        `W_dec` is missing from `gradients` if the decoder is frozen. `x` is only read.
        """


def add_affine_gradients(
    gradients: Mapping[str, Tensor], active: Active, d_pre: Tensor, x_centred: Tensor, W_enc: Tensor
) -> Tensor:
    """Add the gradients of pre = (x - b_dec) W_enc + bias, given d_pre (values), for W_enc and b_dec; return the
    bias's."""
    gradients["W_enc"].T.add_(active.latent_sums(d_pre, x_centred))
    d_bias = active.per_latent(d_pre)
    gradients["b_dec"].sub_(W_enc @ d_bias)
    return d_bias
