"""Schedules as pure functions of the step (0-based): nothing to save, nothing to restore."""

import math

from sae_core.settings import TrainingSettings


def warm_up(step: int, warm_up_steps: int) -> float:
    """(step + 1) / warm_up_steps, at most 1: the factor of a linear warm-up at `step`."""
    return min(1.0, (step + 1) / warm_up_steps) if warm_up_steps > 0 else 1.0


def lr_factor(step: int, training: TrainingSettings) -> float:
    """Linear warm-up, 1, then the decay, which would reach 0 at the step after the last: in a line, or along half a
    cosine (1 + cos(pi t)) / 2, t from 0 to 1 (Loshchilov and Hutter, arXiv 1608.03983, eq. 5, without restarts)."""
    if training.decay_steps == 0:
        return warm_up(step, training.lr_warm_up_steps)
    left = min(1.0, max(0.0, (training.steps - step) / training.decay_steps))
    decay = (1 - math.cos(math.pi * left)) / 2 if training.lr_decay == "cosine" else left
    return min(warm_up(step, training.lr_warm_up_steps), decay)
