"""Standard SAE with an L1 penalty scaled by decoder norms.

    f     = ReLU((x - b_dec) W_enc + b_enc)
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  ||x_hat - x||^2 + l1 * sum_i f_i ||W_dec_i||
            + what revives dead latents, see dead.accumulate_revival

Source: Bricken et al., "Towards Monosemanticity" (2023), with the decoder norm inside the penalty of Conerly et al.,
"Update on how we train SAEs" (Anthropic, April 2024): no constraint on the decoder's rows is needed.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sae_core.control import L0Controller, calibrated_bias, check_coefficient, settled_after
from sae_core.dead import accumulate_revival
from sae_core.kernels import Above, encode
from sae_core.sae import SAE, Gradients, StepContext, StepTerms, TrainableSAE
from sae_core.schedules import warm_up
from sae_core.settings import SAESettings

# Of `target_l0`, see control.py. A descent of 0.15 explained more than one of 0.3: on blocks.4 of the demo model, 500k
# tokens, targets of 8 and 64, about 0.005 and 0.001 more at equal L0 and lr 8e-3, 0.009 and 0.002 at 1e-3. Less was
# explained where the reference went on falling until the freeze, as L0 does at a coefficient that stays.
CONTROL = L0Controller(at_start=0.5, gain=1.0, rate=30.0, descent=0.15)


class StandardSettings(SAESettings):
    """Exactly one of `l1_coefficient` and `target_l0`."""

    architecture: Literal["standard"] = "standard"
    l1_coefficient: float | None = Field(default=None, gt=0)
    l1_warm_up_steps: int = Field(default=0, ge=0)
    target_l0: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1.0, ge=0)
    pre_act_coefficient: float = Field(default=0.03, ge=0)
    skip: bool = False

    def coefficient_at(self, step: int) -> float:
        if self.l1_coefficient is None:
            raise TypeError("with target_l0 the coefficient is part of the training state")
        return self.l1_coefficient * warm_up(step, self.l1_warm_up_steps)

    def settled_after(self, steps: int) -> int:
        return settled_after(self.target_l0, self.l1_warm_up_steps, steps)

    def named_coefficient(self, coefficient: float) -> dict[str, float]:
        return {"l1_coefficient": coefficient}

    def config_fields(self) -> dict[str, Any]:
        return {"skip": self.skip}

    @model_validator(mode="after")
    def check_sparsity(self) -> "StandardSettings":
        check_coefficient(self, "l1")
        return self


class StandardSAE(TrainableSAE):
    settings_type = StandardSettings
    # Unit rows, not the 0.1 of the source: latents that start weak stay weakly active for thousands of steps. On a
    # small GPT-2, l1 1, 2000 steps of 512 tokens: L0 30 at explained variance 0.965, where 0.1 gave L0 78 at 0.967.
    decoder_norm_at_start = 1.0
    # Measured on blocks.1 of the demo model, 480k tokens, l1 4, with biases that start at 0 (more die then). With an l1
    # warm-up of 200 steps, 2.2% of the latents were dead for 125k tokens at the end without the losses on dead latents
    # and 0.9% with them, at L0 4.8 and an explained variance of 0.757 either way. Without warm-up, dead after 25k
    # tokens: 41% and 15%, with 0.010 more explained variance at equal L0; with a pre_act_coefficient of 0.1 it was
    # 0.007 more, of 1 without AuxK 0.011 less, and where rows of W_enc were lifted, too, as in the source, 0.012 less.
    revives_dead = True
    can_transcode = True
    b_enc: Tensor

    def _pre_activations(self, x: Tensor) -> tuple[Tensor, None]:
        return self.centre(x) @ self.W_enc + self.b_enc, None

    def _activate(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        return torch.relu(pre)

    @classmethod
    def biases_at_start(cls, settings: SAESettings, spread: float) -> dict[str, float]:
        """Below 0 by the spread of a latent's pre-activations, its row having unit length: it starts active on a sixth
        of the tokens, where from 0 it is on half of them, and takes thousands of steps to close.

        On blocks.4 of the demo model, 500k tokens, lr 8e-3, l1 1, 2 and 4: CE recovered 0.947, 0.899 and 0.817 at L0
        35, 14.5 and 5.4; from 0 it was 0.945, 0.896 and 0.815 at like L0. From -2.5 spreads more variance was explained
        at equal L0 and fewer latents died, but CE recovered was lower (0.885 against 0.894 at L0 14)."""
        return {"b_enc": -spread}

    def accumulate_gradients(
        self, x: Tensor, target: Tensor, gradients: Gradients, context: StepContext
    ) -> StepTerms:
        x_centred = self.centre(x)
        active, f = encode(x_centred, self.W_enc, self.b_enc, Above(), context.encoder_dtype)
        error = self.error(active, f, x, target)
        norms = self.W_dec.norm(dim=1)
        f_sums = active.per_latent(f)

        d_x_hat = error * (2 / context.batch_tokens)
        l1 = context.coefficient / context.batch_tokens
        d_pre = active.row_dots(d_x_hat, self.W_dec, l1 * norms)
        d_norms = (l1 * f_sums / norms.clamp_min(1e-12))[:, None]
        gradients.add("W_dec", active.latent_sums(f, d_x_hat).addcmul_(self.W_dec, d_norms))
        self.add_output_gradients(gradients, d_x_hat, x)
        gradients.add("b_enc", self.add_encoder_gradients(gradients, active, d_pre, x_centred))

        loss = error.square().sum() / context.batch_tokens + l1 * (f_sums * norms).sum()
        if context.dead is not None:
            settings = cast(StandardSettings, context.settings)
            loss = loss + accumulate_revival(
                self, {"b_enc": torch.ones_like(self.b_enc)}, settings.aux_coefficient, settings.pre_act_coefficient,
                x_centred, error, gradients, context,
            )  # fmt: skip
        return StepTerms(loss, error, fired=active.per_latent(f.sign()))

    @classmethod
    def state_at_start(cls, settings: SAESettings) -> dict[str, Tensor]:
        return CONTROL.state_at_start(cast(StandardSettings, settings).target_l0)

    def next_state(
        self, state: Mapping[str, Tensor], extra: Mapping[str, Tensor], fired: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        return CONTROL.next_state(state, fired, context)

    @torch.no_grad()
    def for_use(self, state: Mapping[str, Tensor], tokens: Tensor | None) -> SAE:
        """With `target_l0`, b_enc is calibrated on training tokens when a checkpoint is saved."""
        if "target_l0" not in state or tokens is None:
            return self
        x_centred, norms = self.centre(tokens), self.W_dec.norm(dim=1)
        return self.replaced({"b_enc": calibrated_bias(x_centred, self.W_enc, self.b_enc, norms, state["target_l0"])})
