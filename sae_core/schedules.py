"""Schedules as pure functions of the step (0-based): nothing to save, nothing to restore."""

from sae_core.settings import TrainingSettings


def warm_up(step: int, warm_up_steps: int) -> float:
    """(step + 1) / warm_up_steps, at most 1: the factor of a linear warm-up at `step`."""
    return min(1.0, (step + 1) / warm_up_steps) if warm_up_steps > 0 else 1.0


def lr_factor(step: int, training: TrainingSettings) -> float:
    """Linear warm-up, 1, then linear decay that would reach 0 at the step after the last."""
    decay = (training.steps - step) / training.decay_steps if training.decay_steps > 0 else 1.0
    return max(0.0, min(warm_up(step, training.lr_warm_up_steps), decay))
