"""BatchTopK SAE: k latents a token on average over a batch, instead of k for each token.

    pre   = (x - b_dec) W_enc + b_enc
    f     = ReLU(pre) at the k N pairs (token, latent) of the batch of N tokens with the largest pre_i * ||W_dec_i||
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  ||x_hat - x||^2 + AuxK, as in topk.py

    In use, where there is no batch, it is a JumpReLU SAE: f = pre where pre_i * ||W_dec_i|| >= t, 0 elsewhere.

Source: Bussmann, Leask, Nanda, "BatchTopK Sparse Autoencoders", arXiv 2412.06410, section 3. The paper ranks by pre_i
alone, and takes for t the mean of every batch's smallest active value. Here t is the value that leaves k active latents
a token on training activations, with the weights as they are in the end; where there are none to calibrate on, the
mean over the latest batches alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sae_core.architectures.jumprelu import TOKENS_AT_ONCE, JumpReLUSAE
from sae_core.architectures.topk import top_k_step
from sae_core.functional import batch_topk
from sae_core.kernels import Active, AtLeast, batch_top_threshold, encode, encode_batch_top
from sae_core.sae import Gradients, StepContext, StepTerms, TrainableSAE
from sae_core.settings import SAESettings

# Batches in the running mean of their thresholds. While a small GPT-2's SAEs learn fast (k 4 and 16, lr 4e-3, batches
# of 512), L0 in use was 3% below k after 200 steps and 1% after 400; with 20 batches 5 to 7%, with 50 9 to 21%.
HORIZON = 10
# A threshold is set this share below the smallest active value, which rounding could move below it otherwise.
BELOW = 1e-6


class BatchTopKSettings(SAESettings):
    architecture: Literal["batch_topk"] = "batch_topk"
    k: float = Field(gt=0)
    aux_coefficient: float = Field(default=1.0, ge=0)
    skip: bool = False

    def coefficient_at(self, step: int) -> float:
        return self.aux_coefficient

    def config_fields(self) -> dict[str, Any]:
        return {"k": self.k, "skip": self.skip}

    @model_validator(mode="after")
    def check_k(self) -> "BatchTopKSettings":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k:g}: accepted is above 0, up to d_sae ({self.d_sae})")
        return self


class BatchTopKSAE(TrainableSAE):
    """State: the mean of the latest batches' thresholds, and of how many it is."""

    settings_type: ClassVar[type[SAESettings]] = BatchTopKSettings
    # Unit rows as in topk.py. On a small GPT-2, 1500 steps of 512 tokens, explained variance was 0.848 with k 8 (topk
    # 0.844), from 0.1 0.846; with k 32 0.930 (topk 0.922), from 0.1 0.935. No latent was dead.
    decoder_norm_at_start = 1.0
    revives_dead = True
    can_transcode = True
    b_enc: Tensor

    def _pre_activations(self, x: Tensor) -> tuple[Tensor, None]:
        """Times the decoder norms: what latents are ranked by."""
        norms = self._norms()
        return self.centre(x) @ (self.W_enc * norms) + self.b_enc * norms, None

    def _activate(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        """All given tokens are one batch: what is active on one depends on the others, as in training."""
        return batch_topk(pre, self._n_active(pre.numel() // self.d_sae)) / self._norms()

    def accumulate_gradients(
        self, x: Tensor, target: Tensor, gradients: Gradients, context: StepContext
    ) -> StepTerms:
        x_centred = self.centre(x)
        active, f, threshold = self.batch_top(x_centred, context)
        terms = top_k_step(self, active, f, x, target, x_centred, gradients, context)
        return replace(terms, extra={"threshold": threshold})

    # ---- the threshold ----

    def batch_top(self, x_centred: Tensor, context: StepContext) -> tuple[Active, Tensor, Tensor]:
        """The active pairs of a batch, their f, and the batch's threshold, [] float64; of a micro-batch the pairs that
        reach the whole batch's threshold, and the micro-batch's share of it: the shares' sum is the threshold."""
        norms = self._norms()
        scaled, bias, n = self.W_enc * norms, self.b_enc * norms, self._n_active(context.batch_tokens)
        if "batch_threshold" in context.state:
            threshold = context.state["batch_threshold"]
            selection = AtLeast(threshold, n / (context.batch_tokens * self.d_sae))
            active, ranks = encode(x_centred, scaled, bias, selection, context.encoder_dtype)
        else:
            active, ranks, threshold = encode_batch_top(x_centred, scaled, bias, n, context.encoder_dtype)
        return active, active.scale(ranks, 1 / norms), threshold.double() * (len(x_centred) / context.batch_tokens)

    def whole_batch(self, parts: list[Tensor], context: StepContext) -> Mapping[str, Tensor]:
        return {"batch_threshold": self._threshold(parts, context.encoder_dtype)}

    @classmethod
    def state_at_start(cls, settings: SAESettings) -> dict[str, Tensor]:
        return {name: torch.zeros((), dtype=torch.float64) for name in ("threshold", "n_batches")}

    def next_state(
        self, state: Mapping[str, Tensor], extra: Mapping[str, Tensor], fired: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        """Of the first batches the plain mean, so that it is right from the first on; then one that forgets."""
        n_batches = (state["n_batches"] + 1).clamp_max(HORIZON)
        return {
            "threshold": state["threshold"] + (extra["threshold"] - state["threshold"]) / n_batches,
            "n_batches": n_batches,
        }

    def for_use(self, state: Mapping[str, Tensor], tokens: Tensor | None) -> JumpReLUSAE:
        """The JumpReLU SAE that has k active latents a token, on average over `tokens`; without them, the one with the
        mean threshold of the latest batches (before the first: 0, every positive latent is active)."""
        if tokens is None:
            threshold = state["threshold"]
        else:
            threshold = self._threshold(tokens.split(TOKENS_AT_ONCE), torch.float32)
        per_latent = (threshold * (1 - BELOW)).to(self.W_enc.dtype) / self._norms()
        cfg = self.cfg.model_copy(update={"architecture": "jumprelu", "k": None})
        return JumpReLUSAE(cfg, {**dict(self.named_parameters()), "threshold": per_latent})

    def _threshold(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The smallest pre_i * ||W_dec_i|| that is active where all parts [tokens, d_in] are one batch; 0 where fewer
        are positive than could be active."""
        norms, n = self._norms(), self._n_active(sum(len(part) for part in parts))
        centred = [self.centre(part) for part in parts]
        return batch_top_threshold(centred, self.W_enc * norms, self.b_enc * norms, n, dtype)

    def _norms(self) -> Tensor:
        return self.W_dec.norm(dim=1).clamp_min(1e-12)

    def _n_active(self, n_tokens: int) -> int:
        """Active pairs in a batch: one at least."""
        return max(int(self.cfg.k * n_tokens), 1)
