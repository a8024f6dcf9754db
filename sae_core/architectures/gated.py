"""Gated SAE: which latents are active, and how strongly, are decided apart.

    u      = (x - b_dec) W_enc
    gate   = u + b_gate                      magnitude = u * exp(r_mag) + b_mag
    f      = [gate > 0] * ReLU(magnitude)    x_hat = f W_dec + b_dec
    loss   = mean over tokens of  ||x_hat - x||^2 + l1 * sum_i ReLU(gate_i) ||W_dec_i||
                                + ||ReLU(gate) W_dec + b_dec - x||^2       with W_dec and b_dec frozen in this line
                                + what revives dead latents, see dead.accumulate_revival

Source: Rajamanoharan et al., "Improving Dictionary Learning with Gated Sparse Autoencoders", arXiv 2404.16014, eq. 8.
The paper keeps decoder rows at unit norm. Here their norm stands in the penalty instead, frozen as in the auxiliary
term: otherwise the penalty would shrink the rows with nothing to hold them, as the gate sees a frozen decoder.
"""

from collections.abc import Mapping
from typing import Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sae_core.control import TOKENS_AT_ONCE, L0Controller, calibrated_bias, check_coefficient, settled_after
from sae_core.dead import accumulate_revival
from sae_core.kernels import Above, encode
from sae_core.sae import SAE, Gradients, StepContext, StepTerms, TrainableSAE
from sae_core.schedules import warm_up
from sae_core.settings import SAESettings

# Of `target_l0`, see control.py; as in standard.py.
CONTROL = L0Controller(at_start=0.5, gain=1.0, rate=30.0, descent=0.15)


class GatedSettings(SAESettings):
    """Exactly one of `l1_coefficient` and `target_l0`."""

    architecture: Literal["gated"] = "gated"
    l1_coefficient: float | None = Field(default=None, gt=0)
    l1_warm_up_steps: int = Field(default=0, ge=0)
    target_l0: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1.0, ge=0)
    pre_act_coefficient: float = Field(default=0.03, ge=0)

    def coefficient_at(self, step: int) -> float:
        if self.l1_coefficient is None:
            raise TypeError("with target_l0 the coefficient is part of the training state")
        return self.l1_coefficient * warm_up(step, self.l1_warm_up_steps)

    def settled_after(self, steps: int) -> int:
        return settled_after(self.target_l0, self.l1_warm_up_steps, steps)

    def named_coefficient(self, coefficient: float) -> dict[str, float]:
        return {"l1_coefficient": coefficient}

    @model_validator(mode="after")
    def check_sparsity(self) -> "GatedSettings":
        check_coefficient(self, "l1")
        return self


class GatedSAE(TrainableSAE):
    settings_type = GatedSettings
    # As in standard.py, but from 1.0 half of the latents died. On the same model, l1 1, 600 steps: L0 36 at explained
    # variance 0.984 and 6% dead; from 0.1 L0 45 at 0.984.
    decoder_norm_at_start = 0.3
    # Dead latents have both biases lifted: with the gate's alone, those of negative magnitude stayed dead. Measured on
    # blocks.1 of the demo model, 480k tokens, l1 4: 2.6% dead for 125k tokens at the end without the losses on dead
    # latents and 0.7% with them, at L0 5.5 and explained variance 0.877 either way. From unit rows without l1 warm-up,
    # dead after 25k tokens: 46% dead for 125k tokens, and none, with 0.001 more explained variance at equal L0.
    revives_dead = True
    encoder_biases = ("b_gate", "b_mag", "r_mag")
    latent_scaled = ("b_gate", "b_mag")
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def _pre_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Magnitudes, and whether the gate is open."""
        u = self.centre(x) @ self.W_enc
        return u * self.r_mag.exp() + self.b_mag, u + self.b_gate > 0

    def _activate(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        return torch.relu(pre) * gate

    def _shifted(self, shift: Tensor) -> dict[str, Tensor]:
        b_mag = self.b_mag.double() + shift * self.r_mag.double().exp()
        return {"b_gate": self.b_gate.double() + shift, "b_mag": b_mag}

    def accumulate_gradients(
        self, x: Tensor, target: Tensor, gradients: Gradients, context: StepContext
    ) -> StepTerms:
        x_centred = self.centre(x)
        active, gate = encode(x_centred, self.W_enc, self.b_gate, Above(), context.encoder_dtype)
        u = active.shift(gate, -self.b_gate)
        growth = self.r_mag.exp()
        f = torch.relu(active.shift(active.scale(u, growth), self.b_mag)) * (gate > 0)
        error = self.error(active, f, x, target)
        gate_error = self.error(active, gate, x, target)
        norms = self.W_dec.norm(dim=1)

        d_x_hat = error * (2 / context.batch_tokens)
        l1 = context.coefficient / context.batch_tokens
        d_gate = active.row_dots(gate_error * (2 / context.batch_tokens), self.W_dec, l1 * norms)
        d_magnitude = active.row_dots(d_x_hat, self.W_dec) * (f > 0)
        d_u = d_gate + active.scale(d_magnitude, growth)
        gradients.add("W_dec", active.latent_sums(f, d_x_hat))
        self.add_output_gradients(gradients, d_x_hat, x)
        self.add_encoder_gradients(gradients, active, d_u, x_centred)
        gradients.add("b_gate", active.per_latent(d_gate))
        gradients.add("b_mag", active.per_latent(d_magnitude))
        gradients.add("r_mag", active.per_latent(d_magnitude * u) * growth)

        penalty = l1 * (active.per_latent(gate) * norms).sum()
        loss = (error.square().sum() + gate_error.square().sum()) / context.batch_tokens + penalty
        if context.dead is not None:
            settings = cast(GatedSettings, context.settings)
            loss = loss + accumulate_revival(
                self, {"b_gate": torch.ones_like(growth), "b_mag": growth}, settings.aux_coefficient,
                settings.pre_act_coefficient, x_centred, error, gradients, context,
            )  # fmt: skip
        return StepTerms(loss, error, fired=active.per_latent(f.sign()))

    @classmethod
    def state_at_start(cls, settings: SAESettings) -> dict[str, Tensor]:
        return CONTROL.state_at_start(cast(GatedSettings, settings).target_l0)

    def next_state(
        self, state: Mapping[str, Tensor], extra: Mapping[str, Tensor], fired: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        return CONTROL.next_state(state, fired, context)

    @torch.no_grad()
    def for_use(self, state: Mapping[str, Tensor], tokens: Tensor | None) -> SAE:
        """With `target_l0`, b_gate is calibrated on training tokens when a checkpoint is saved. Magnitudes stay."""
        if "target_l0" not in state or tokens is None:
            return self
        x_centred, norms = self.centre(tokens), self.W_dec.norm(dim=1)
        n_open = n_active = state["target_l0"].new_zeros(())
        for part in x_centred.split(TOKENS_AT_ONCE):
            u = part @ self.W_enc
            gate, magnitude = u + self.b_gate > 0, u * self.r_mag.exp() + self.b_mag > 0
            n_open, n_active = n_open + gate.sum(), n_active + (gate & magnitude).sum()
        share = n_active.clamp_min(1) / n_open.clamp_min(1)
        b_gate = calibrated_bias(x_centred, self.W_enc, self.b_gate, norms, state["target_l0"], share)
        return self.replaced({"b_gate": b_gate})
