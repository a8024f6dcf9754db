"""JumpReLU SAE: each latent learns the threshold above which it fires. Batch top-k and Matryoshka SAEs are used in
this form too.

    pre   = (x - b_dec) W_enc + b_enc        n_i = ||W_dec_i||
    f     = pre where pre > max(threshold, 0), 0 elsewhere
    x_hat = f W_dec + b_dec
    loss  = mean over tokens of  ||x_hat - x||^2 + l0 * sparsity + pre_act * dead
    sparsity = sum_i H(pre_i - threshold_i)    "step", the number of active latents
             = sum_i tanh(c f_i n_i)           "tanh"
    dead     = sum over dead i of ReLU(threshold_i - pre_i) n_i

H and f jump at the threshold. Their derivatives there are estimated from the pairs within a rectangle around it
(straight-through), of width `bandwidth` in the length n_i pre_i that a latent adds:

    dH / d threshold_i = -K_i      df / d threshold_i = -threshold_i K_i
    K_i = (n_i / bandwidth) [n_i |pre_i - threshold_i| < bandwidth / 2]

and, with `ste_to_input`, the same with the other sign for pre_i, on top of df / d pre_i = H. Norms are constants in K
and in the loss on dead latents: they only say how wide a rectangle or how long a way is. So no gradient depends on how
a latent's strength is shared between encoder and decoder, nothing drives decoder norms, and they fold exactly.

With `target_l0` a controller sets the coefficient l0 while training runs, see control.py.

Sources: Rajamanoharan et al., "Jumping Ahead", arXiv 2407.14435, eqs. 3, 9 and 11 to 13 (step, the estimators);
Anthropic, "Circuits Updates - January 2025" (tanh, the loss on dead latents, the estimator's gradient to all weights).
Gemma Scope 2 reaches an L0 with the penalty (2 / T) (L0 - T)^2; its strength there still has to be tuned.
"""

from collections.abc import Mapping
from itertools import pairwise
from statistics import NormalDist
from typing import Any, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sae_core.control import L0Controller, check_coefficient, settled_after
from sae_core.dead import accumulate_pre_act
from sae_core.errors import CheckpointError, ConfigError
from sae_core.functional import jumprelu
from sae_core.kernels import Above, batch_top_threshold, encode
from sae_core.sae import SAE, Gradients, StepContext, StepTerms, TrainableSAE
from sae_core.schedules import warm_up
from sae_core.settings import SAESettings

# Thresholds start where this share of the latents is active on a token, or this many times the target, were
# pre-activations Gaussian. Training soon takes L0 to a quarter of that; from below the target it rises slowly.
SHARE_AT_START = 0.05
L0_AT_START = 4

# Of `target_l0`, see control.py.
CONTROL = L0Controller(at_start=0.1, gain=4.0, rate=40.0, descent=0.3)

TOKENS_AT_ONCE = 4096
# The factor on thresholds is set this share below the last active pair, which rounding could move below it otherwise.
BELOW = 1e-5


class JumpReLUSettings(SAESettings):
    """Exactly one of `l0_coefficient` and `target_l0`.

    bandwidth, threshold_at_start: in normalised units, those of activations of mean norm sqrt(d_in). Without the
    latter, thresholds start where four times target_l0 latents would be active, or 5% of them.
    pre_act_coefficient: of the loss on dead latents; 0 for none. ste_to_input: as in their sources, true for `tanh`
    and false for `step`, unless given.
    """

    architecture: Literal["jumprelu"] = "jumprelu"
    l0_coefficient: float | None = Field(default=None, gt=0)
    l0_warm_up_steps: int = Field(default=0, ge=0)
    target_l0: float | None = Field(default=None, gt=0)
    sparsity: Literal["tanh", "step"] = "tanh"
    bandwidth: float = Field(default=1.0, gt=0)
    threshold_at_start: float | None = Field(default=None, ge=0)
    tanh_scale: float = Field(default=4.0, gt=0)
    pre_act_coefficient: float = Field(default=1e-3, ge=0)
    ste_to_input: bool = Field(default_factory=lambda settings: settings.get("sparsity") == "tanh")
    skip: bool = False

    def coefficient_at(self, step: int) -> float:
        if self.l0_coefficient is None:
            raise TypeError("with target_l0 the coefficient is part of the training state")
        return self.l0_coefficient * warm_up(step, self.l0_warm_up_steps)

    def settled_after(self, steps: int) -> int:
        return settled_after(self.target_l0, self.l0_warm_up_steps, steps)

    def named_coefficient(self, coefficient: float) -> dict[str, float]:
        return {"l0_coefficient": coefficient}

    def config_fields(self) -> dict[str, Any]:
        return {"skip": self.skip}

    @model_validator(mode="after")
    def check_sparsity(self) -> "JumpReLUSettings":
        check_coefficient(self, "l0")
        return self


class JumpReLUSAE(TrainableSAE):
    """Trained, and the form in which batch top-k and Matryoshka SAEs are used.

    The threshold is trained as it is, not as its logarithm: Adam's steps are of one length, whatever the threshold, so
    that a small one could hardly grow as a logarithm. Below 0 it counts as 0, with the gradient of 0, so that a latent
    comes back from there; what is exported is never below 0.

    On a small GPT-2 (the demo model, d_sae 1024, 976 steps of 512 tokens, one seed, report split), targets of 8, 16 and
    32, explained variance after blocks.4, and the share of latents that did not fire on 30k tokens after blocks.1:

        tanh      0.793, 0.858, 0.914 at L0 7.6, 15.3, 30.9     3%, 1%, 0%
        step      0.793, 0.859, 0.914 at L0 7.8, 15.5, 31.2    17%, 11%, 7%
        topk      0.786, 0.852, 0.909 at L0 8, 16, 32          18%, 6%, 1%

    `step` with ste_to_input lost 0.01. With `tanh`, a bandwidth of 2 lost 0.01 at target 16 at both places; one of 0.3
    is faster, having fewer pairs to work on, but lost 0.008 and 0.01 at target 8, 0.003 and 0.005 at 16, and won 0.001
    at 32. The loss on dead latents took the share that the last 125k tokens of training left dead after blocks.1
    (step, target 16) from 9% to 1%; its gradient counts from 1e-3 on, and from 1 on it disturbs the others.
    """

    settings_type = JumpReLUSettings
    decoder_norm_at_start = 1.0
    revives_dead = True
    can_transcode = True
    encoder_biases = ("b_enc", "threshold")
    b_enc: Tensor
    threshold: Tensor

    def _pre_activations(self, x: Tensor) -> tuple[Tensor, None]:
        return self.centre(x) @ self.W_enc + self.b_enc, None

    def _activate(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        return jumprelu(pre, self.threshold)

    @classmethod
    def biases_at_start(cls, settings: SAESettings, spread: float) -> dict[str, float]:
        settings = cast(JumpReLUSettings, settings)
        if settings.threshold_at_start is not None:
            return {"threshold": settings.threshold_at_start}
        l0 = SHARE_AT_START * settings.d_sae if settings.target_l0 is None else L0_AT_START * settings.target_l0
        return {"threshold": spread * NormalDist().inv_cdf(1 - min(l0 / settings.d_sae, 0.5))}

    def accumulate_gradients(
        self, x: Tensor, target: Tensor, gradients: Gradients, context: StepContext
    ) -> StepTerms:
        settings = cast(JumpReLUSettings, context.settings)
        x_centred = self.centre(x)
        norms = self.W_dec.norm(dim=1)
        # Pairs are needed from the lower edge of the rectangle on; what is kept of each is its height above that edge.
        half = settings.bandwidth / 2 / norms.clamp_min(1e-12)
        threshold = self.threshold.clamp_min(0)
        bias = self.b_enc - threshold + half
        active, height = encode(x_centred, self.W_enc, bias, Above(), context.encoder_dtype)
        excess = active.shift(height, -half)  # of pre over the threshold
        on = excess > 0
        f = active.shift(excess, threshold) * on
        in_band = (height > 0) & (active.shift(excess, -half) < 0)
        firing, at_firing = active.restricted(on)
        f_firing = at_firing(f)
        error = self.error(firing, f_firing, x, target)

        d_x_hat = error * (2 / context.batch_tokens)
        l0 = context.coefficient / context.batch_tokens
        kernel = 0.5 / half
        fired = active.per_latent(on.to(f.dtype))
        d_f = active.row_dots(d_x_hat, self.W_dec)
        d_W_dec = firing.latent_sums(f_firing, d_x_hat)
        if settings.sparsity == "step":
            sparsity = fired.sum()
            d_jump = active.shift(active.scale(d_f, threshold * kernel), l0 * kernel)
        else:
            squashed = torch.tanh(active.scale(f, settings.tanh_scale * norms))
            slope = (1 - squashed.square()) * (settings.tanh_scale * l0)
            sparsity = squashed.sum()
            d_f = d_f + active.scale(slope, norms)
            d_jump = active.scale(d_f, threshold * kernel)
            d_norms = active.per_latent(slope * f) / norms.clamp_min(1e-12)
            d_W_dec.addcmul_(self.W_dec, d_norms[:, None])
        d_jump = d_jump * in_band
        gradients.add("W_dec", d_W_dec)
        self.add_output_gradients(gradients, d_x_hat, x)
        moving, d_pre = (active, d_f * on + d_jump) if settings.ste_to_input else (firing, at_firing(d_f * on))
        gradients.add("b_enc", self.add_encoder_gradients(gradients, moving, d_pre, x_centred))
        gradients.add("threshold", -active.per_latent(d_jump))

        loss = error.square().sum() / context.batch_tokens + l0 * sparsity
        if context.dead is not None and (pre_act := settings.pre_act_coefficient) > 0:
            loss = loss + accumulate_pre_act(self, x_centred, threshold, pre_act, gradients, context)
        return StepTerms(loss, error, fired)

    # ---- target_l0 ----

    @classmethod
    def state_at_start(cls, settings: SAESettings) -> dict[str, Tensor]:
        return CONTROL.state_at_start(cast(JumpReLUSettings, settings).target_l0)

    def next_state(
        self, state: Mapping[str, Tensor], extra: Mapping[str, Tensor], fired: Tensor, context: StepContext
    ) -> dict[str, Tensor]:
        return CONTROL.next_state(state, fired, context)

    @torch.no_grad()
    def for_use(self, state: Mapping[str, Tensor], tokens: Tensor | None) -> SAE:
        """With `target_l0`, thresholds are calibrated on training tokens when a checkpoint is saved: all are multiplied
        by the one factor at which the mean L0 over `tokens` is the target. Else, and without tokens, they stay."""
        threshold = self.threshold.clamp_min(0)
        if "target_l0" in state and tokens is not None:
            # a pair is active where pre / threshold is above the factor
            inverse = 1 / threshold.clamp_min(1e-12)
            parts = [self.centre(part) for part in tokens.split(TOKENS_AT_ONCE)]
            n_active = round(float(state["target_l0"]) * len(tokens))
            factor = batch_top_threshold(parts, self.W_enc * inverse, self.b_enc * inverse, n_active)
            threshold = threshold * factor * (1 - BELOW)
        return self.replaced({"threshold": threshold})

    # ---- prefixes of what was trained as a Matryoshka SAE ----

    @property
    def prefix_widths(self) -> tuple[int, ...]:
        """Widths below d_sae, as the metadata have them; CheckpointError if those cannot be."""
        if "matryoshka" not in self.cfg.metadata:
            return ()
        match self.cfg.metadata["matryoshka"]:
            case {"widths": [*widths]} if (
                all(type(width) is int and width > 0 for width in widths)
                and all(narrow < wide for narrow, wide in pairwise(widths))
                and widths[-1:] == [self.d_sae]
            ):
                return tuple(widths[:-1])
            case given:
                raise CheckpointError(
                    f"metadata.matryoshka is {given!r}; accepted is an object whose widths increase up to d_sae "
                    f"({self.d_sae})"
                )

    def prefix(self, width: int) -> "JumpReLUSAE":
        """The first `width` latents as an SAE of its own, which its metadata say it is of (`prefix_of`: d_sae of the
        whole). ConfigError for a width that is none of `prefix_widths`.

        Thresholds stay: the prefix was trained with those of its latents active that reach the one threshold of all.
        """
        if width not in self.prefix_widths:
            raise ConfigError(f"no prefix has width {width}; accepted: {', '.join(map(str, self.prefix_widths))}")
        nested, n = self.cfg.metadata["matryoshka"], self.prefix_widths.index(width) + 1
        nested = {name: values[:n] for name, values in nested.items() if isinstance(values, list)}
        weights = {name: getattr(self, name)[:width].clone() for name in ("W_dec", "b_enc", "threshold")}
        weights["W_enc"] = self.W_enc[:, :width].contiguous()
        metadata = {"prefix_of": self.d_sae, **self.cfg.metadata, "matryoshka": nested}
        return cast(JumpReLUSAE, self.replaced(weights, d_sae=width, metadata=metadata))
