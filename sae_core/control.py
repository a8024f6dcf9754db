"""`target_l0` in place of a coefficient, shared by every architecture whose sparsity one sets.

While training runs, a controller follows the L0 of the batches:

    e           = log(L0 / reference)       within +-1, L0 smoothed over about ten steps
    integral'   = rate * e                  a share of the run; e within +-0.3
    coefficient = exp(integral + gain * e)

The reference falls along a line of log(L0), from the first batch's L0 to the target; while it falls, no L0 between the
target and the line is corrected, and one below the target not by the sum, which would overshoot later. Times are shares
of the run's steps, so that a longer run is controlled in proportion. From `FREEZE` on the coefficient stays.

A run can move its coefficient about a thousandfold, up or down. A target that is not reached by that (one above what is
active without a penalty, say) is not reached: the SAE is saved with the L0 that it has, which its figures show.

All of it is arithmetic on tensors of the training state, so that no step waits for a device, and a resumed run goes on
bit for bit.

What is left is corrected when a checkpoint is saved, on training tokens. L0 moves by up to a tenth while the learning
rate decays (up where it was high, down where it was low), and a run cannot know that before. `calibrated_bias` moves
the encoder's biases of all latents by one length, as JumpReLU SAEs have all thresholds multiplied by one factor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

from sae_core.kernels import batch_top_threshold
from sae_core.sae import StepContext

FREEZE = 0.8  # share after which the coefficient stays
SETTLED = 0.4  # share after which L0 is near the target, and the coefficient changes slowly
SMOOTHING = 0.1  # weight of a new batch in the running L0
MOST, MOST_SUMMED = 1.0, 0.3  # of e, either way, that counts for the one and for the other

TOKENS_AT_ONCE = 1024
# Biases move at most by this share of the length that an active latent adds on average: an SAE that the controller did
# not bring near the target is not forced there, at the cost of what it reconstructs.
MOST_MOVED = 0.25


@dataclass(frozen=True)
class L0Controller:
    """The gains that suit an architecture's loss. at_start: the coefficient of the first step. descent: the share of
    the run over which the reference falls."""

    at_start: float
    gain: float
    rate: float
    descent: float

    def state_at_start(self, target_l0: float | None) -> dict[str, Tensor]:
        """What is kept from step to step; nothing without a target."""
        if target_l0 is None:
            return {}
        values = {"coefficient": self.at_start, "integral": log(self.at_start), "l0": 0.0, "l0_at_start": 0.0,
                  "progress": 0.0, "target_l0": target_l0}  # fmt: skip
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def next_state(self, state: Mapping[str, Tensor], fired: Tensor, context: StepContext) -> dict[str, Tensor]:
        """The state after a step on which each latent fired on `fired` [d_sae] tokens of the batch."""
        if not state or context.progress >= FREEZE:
            return dict(state)
        l0 = (fired.double().sum() / context.batch_tokens).clamp_min(1e-3)
        first = state["l0"] == 0
        running = torch.where(first, l0, state["l0"] + SMOOTHING * (l0 - state["l0"]))
        at_start = torch.where(first, l0, state["l0_at_start"])
        target = state["target_l0"].log()
        share = min(context.progress / self.descent, 1.0)
        highest = target + (1 - share) * (at_start.log() - target).clamp_min(0)
        surplus = (running.log() - highest).clamp(0, MOST) + (running.log() - target).clamp(-MOST, 0)
        summed = surplus.clamp(-MOST_SUMMED if share == 1 else 0.0, MOST_SUMMED)
        integral = state["integral"] + self.rate * (context.progress - state["progress"]) * summed
        return {
            **state,
            "coefficient": (integral + self.gain * surplus).exp(),
            "integral": integral,
            "l0": running,
            "l0_at_start": at_start,
            "progress": torch.full_like(l0, context.progress),
        }


def settled_after(target_l0: float | None, warm_up_steps: int, steps: int) -> int:
    """The step of a run of `steps` from which on its coefficient is no longer on its way."""
    return warm_up_steps if target_l0 is None else ceil(SETTLED * steps)


def check_coefficient(settings: Any, name: str) -> None:
    """ValueError unless exactly one of `NAME_coefficient` and `target_l0` is set, and the target can be reached."""
    coefficient, warm_up_steps = (getattr(settings, f"{name}_{what}") for what in ("coefficient", "warm_up_steps"))
    target = settings.target_l0
    if (coefficient is None) == (target is None):
        given = f"{name}_coefficient is {coefficient} and target_l0 is {target}"
        raise ValueError(f"{given}: exactly one of the two is accepted")
    if target is not None and target > settings.d_sae:
        raise ValueError(f"target_l0 is {target:g}: accepted is at most d_sae ({settings.d_sae})")
    if target is not None and warm_up_steps:
        raise ValueError(f"{name}_warm_up_steps is {warm_up_steps}: accepted with {name}_coefficient only")


def calibrated_bias(
    x_centred: Tensor, W_enc: Tensor, bias: Tensor, norms: Tensor, target_l0: Tensor, active_share: Tensor | float = 1.0
) -> Tensor:
    """`bias` [d_sae] moved by one length, so that the mean L0 on x_centred [tokens, d_in] is the target, or as near to
    it as `MOST_MOVED` lets it come.

    norms [d_sae]: of the decoder's rows. active_share: of the positive pre-activations, those of active latents.
    """
    W_enc, in_lengths = W_enc * norms, bias * norms
    n_positive = total = in_lengths.new_zeros(())
    for part in x_centred.split(TOKENS_AT_ONCE):
        positive = torch.addmm(in_lengths, part, W_enc).relu_()
        n_positive, total = n_positive + (positive > 0).sum(), total + positive.sum()
    most = MOST_MOVED * total / n_positive.clamp_min(1)
    n_wanted = max(1, round(float(target_l0 / active_share) * len(x_centred)))
    # Above `most` are the pairs that are active now, and below it down to 0 those that can be made so.
    threshold = batch_top_threshold(x_centred.split(TOKENS_AT_ONCE), W_enc, in_lengths + most, n_wanted) - most
    moved = threshold.clamp(-most, most)
    return torch.where(norms > 0, bias - moved / norms.clamp_min(1e-12), bias)
