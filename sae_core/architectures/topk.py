"""TopK SAE with an auxiliary loss that revives dead latents.

    pre   = (x - b_dec) W_enc + b_enc
    f     = ReLU(pre) at the k latents with the largest pre_i * ||W_dec_i||, 0 elsewhere
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  ||x_hat - x||^2 + AuxK,      n_dead latents are dead, k_aux = min(d_in // 2, n_dead)
    AuxK  = aux * min(n_dead / (d_in // 2), 1) * ||z W_dec - (x - x_hat)||^2      z: the same with k_aux, dead ones only

Source: Gao et al., "Scaling and evaluating sparse autoencoders", arXiv 2406.04093, sections 2.3 and A.2. The residual
x - x_hat is a constant in AuxK. Ranking by pre_i * ||W_dec_i|| makes the function independent of how a latent's
strength is shared between encoder and decoder, so that the norms can be folded on export.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import normalize

from sae_core.functional import aux_k_scale, top_k_mask, topk
from sae_core.kernels import DenseActive, select_active
from sae_core.sae import StepContext, StepTerms, TrainableSAE, add_affine_gradients
from sae_core.settings import SAESettings


class TopKSettings(SAESettings):
    architecture: Literal["topk"] = "topk"
    k: int = Field(gt=0)
    aux_coefficient: float = Field(default=1.0, ge=0)

    def coefficient_at(self, step: int) -> float:
        return self.aux_coefficient

    def config_fields(self) -> dict[str, Any]:
        return {"k": self.k, "rescale_acts_by_decoder_norm": True}

    @model_validator(mode="after")
    def check_k(self) -> "TopKSettings":
        if self.k > self.d_sae:
            raise ValueError(f"k is {self.k}: accepted are 1 to d_sae ({self.d_sae})")
        return self


class TopKSAE(TrainableSAE):
    settings_type = TopKSettings
    # Unit rows as in the paper. On a small GPT-2, k 16, 400 steps of 512 tokens, 1% of the latents were dead; from 0.1
    # 71% were.
    decoder_norm_at_start = 1.0
    revives_dead = True
    b_enc: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """[..., d_in] -> [..., d_sae]; times the decoder norms where they decide the ranking, as SAELens has it."""
        pre = self.centre(x) @ self.W_enc + self.b_enc
        return topk(pre * self.W_dec.norm(dim=1) if self.cfg.rescale_acts_by_decoder_norm else pre, self.cfg.k)

    def decode(self, f: Tensor) -> Tensor:
        return f @ (normalize(self.W_dec, dim=1) if self.cfg.rescale_acts_by_decoder_norm else self.W_dec) + self.b_dec

    def accumulate_gradients(self, x: Tensor, gradients: Mapping[str, Tensor], context: StepContext) -> StepTerms:
        x_centred = x - self.b_dec
        pre_BF = torch.addmm(self.b_enc, x_centred, self.W_enc)
        ranks_BF = pre_BF * self.W_dec.norm(dim=1)
        active = select_active(pre_BF, top_k_mask(ranks_BF, self.cfg.k), density=self.cfg.k / self.d_sae)
        f = active.gather(pre_BF)
        error = active.decode(f, self.W_dec).add_(self.b_dec).sub_(x)

        d_x_hat = error * (2 / context.batch_tokens)
        d_pre = active.row_dots(d_x_hat, self.W_dec)
        if "W_dec" in gradients:
            gradients["W_dec"].add_(active.latent_sums(f, d_x_hat))
        gradients["b_dec"].add_(d_x_hat.sum(0))
        gradients["b_enc"].add_(add_affine_gradients(gradients, active, d_pre, x_centred, self.W_enc))

        squared_error = error.square().sum()
        loss = squared_error / context.batch_tokens
        if context.dead is not None:
            loss = loss + self._accumulate_aux(pre_BF, ranks_BF, x_centred, error, gradients, context)
        fired = active.per_latent(f.sign())
        return StepTerms(loss, squared_error, fired.sum(), fired, x_hat=error.add_(x))

    def _accumulate_aux(
        self,
        pre_BF: Tensor,
        ranks_BF: Tensor,
        x_centred: Tensor,
        error: Tensor,
        gradients: Mapping[str, Tensor],
        context: StepContext,
    ) -> Tensor:
        dead = context.dead.nonzero().squeeze(1)
        k_aux, weight = aux_k_scale(len(dead), self.d_in, context.coefficient)
        W_dec, W_enc = self.W_dec[dead], self.W_enc.T[dead]
        pre = pre_BF[:, dead]
        # dense on the dead latents alone: they are few, or many with k_aux of them active
        active = DenseActive(torch.relu(pre) * top_k_mask(ranks_BF[:, dead], k_aux))
        z = active.support_BF
        aux_error = (z @ W_dec).add_(error)
        d_out = aux_error * (2 * weight / context.batch_tokens)
        d_pre = active.row_dots(d_out, W_dec)
        if "W_dec" in gradients:
            gradients["W_dec"].index_add_(0, dead, active.latent_sums(z, d_out))
        d_bias = d_pre.sum(0)
        gradients["W_enc"].T.index_add_(0, dead, active.latent_sums(d_pre, x_centred))
        gradients["b_enc"].index_add_(0, dead, d_bias)
        gradients["b_dec"].sub_(d_bias @ W_enc)
        return aux_error.square().sum() * (weight / context.batch_tokens)
