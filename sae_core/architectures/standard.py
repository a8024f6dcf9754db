"""Standard SAE with an L1 penalty scaled by decoder norms.

    f     = ReLU((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  ||x_hat - x||^2 + l1 * sum_i f_i ||W_dec_i||

Source: Bricken et al., "Towards Monosemanticity" (2023), with the decoder norm inside the penalty of Conerly et al.,
"Update on how we train SAEs" (Anthropic, April 2024): no constraint on the decoder's rows is needed.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from sae_core.kernels import select_active
from sae_core.sae import StepContext, StepTerms, TrainableSAE, add_affine_gradients
from sae_core.schedules import warm_up
from sae_core.settings import SAESettings


class StandardSettings(SAESettings):
    architecture: Literal["standard"] = "standard"
    l1_coefficient: float = Field(gt=0)
    l1_warm_up_steps: int = Field(default=0, ge=0)

    def coefficient_at(self, step: int) -> float:
        return self.l1_coefficient * warm_up(step, self.l1_warm_up_steps)


class StandardSAE(TrainableSAE):
    settings_type = StandardSettings
    # Unit rows, not the 0.1 of the source: latents that start weak stay weakly active for thousands of steps. On a
    # small GPT-2, l1 1, 2000 steps of 512 tokens: L0 30 at explained variance 0.965, where 0.1 gave L0 78 at 0.967.
    decoder_norm_at_start = 1.0
    b_enc: Tensor

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(self.centre(x) @ self.W_enc + self.b_enc)

    def accumulate_gradients(self, x: Tensor, gradients: Mapping[str, Tensor], context: StepContext) -> StepTerms:
        x_centred = x - self.b_dec
        f_BF = torch.relu_(torch.addmm(self.b_enc, x_centred, self.W_enc))
        active = select_active(f_BF)
        f = active.gather(f_BF)
        error = active.decode(f, self.W_dec).add_(self.b_dec).sub_(x)
        norms = self.W_dec.norm(dim=1)
        f_sums = active.per_latent(f)

        d_x_hat = error * (2 / context.batch_tokens)
        l1 = context.coefficient / context.batch_tokens
        d_pre = active.row_dots(d_x_hat, self.W_dec, l1 * norms)
        if "W_dec" in gradients:
            gradients["W_dec"].add_(active.latent_sums(f, d_x_hat))
            gradients["W_dec"].addcmul_(self.W_dec, (l1 * f_sums / norms.clamp_min(1e-12))[:, None])
        gradients["b_dec"].add_(d_x_hat.sum(0))
        gradients["b_enc"].add_(add_affine_gradients(gradients, active, d_pre, x_centred, self.W_enc))

        squared_error = error.square().sum()
        fired = active.per_latent(f.sign())
        return StepTerms(
            loss=squared_error / context.batch_tokens + l1 * (f_sums * norms).sum(),
            squared_error=squared_error,
            active=fired.sum(),
            fired=fired,
            x_hat=error.add_(x),
        )
