"""Train one SAE with Penstock or with the released SAELens, on the same batches, for comparisons of quality.

    sae = train("ours", Recipe("topk", 1024, {"k": 16}, lr=4e-3, seed=0), schedule, x, calibration)

`x` [steps * batch_tokens, d_in] is read in order, one pass. Either way what comes back is a `sae_core.SAE` for raw
activations, read from the folder that the side itself saved. So both sides see the same batches in the same order, the
same normalisation scale and the same schedules of learning rate and coefficient; all else is each side's default.

Facts about sae_lens 6.54.12 that this file has to respect:
- `SAETrainer.fit` estimates the normalisation scale from batches that it then does not train on, unless its scaler has
  one already, as after resuming.
- It draws an SAE's start from torch's global generator, and counts the window of dead latents in steps.
- Batch top-k and Matryoshka SAEs are saved as JumpReLU, with the threshold that their training has tracked.
"""

import contextlib
import io
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from sae_core import SAE, Calibration, SAETrainer, TrainingSettings, parse_settings

Side = Literal["ours", "theirs"]
SIDES: tuple[Side, ...] = ("ours", "theirs")
EXPORT_TOKENS = 8192  # the last of the run, which our export calibrates thresholds on, as the platform has it


# Beside SAELens' defaults (0.05, 0.01): its gradient to thresholds reaches further.
WIDE = {"jumprelu_bandwidth": 0.5, "jumprelu_init_threshold": 0.1}


def variants(
    *, l1: Sequence[float], k: Sequence[int], l0: Sequence[float], widths: Sequence[int]
) -> dict[str, dict[Side, dict[str, list[dict[str, Any]]]]]:
    """Of each architecture, the ways to train it that a side may choose from, and the sparsities of each: `l1` and
    `l0` are coefficients, `k` is L0 or its target, `widths` are a Matryoshka SAE's."""
    alike = {
        "standard": [{"l1_coefficient": value} for value in l1],
        "gated": [{"l1_coefficient": value} for value in l1],
        "topk": [{"k": value} for value in k],
        "batch_topk": [{"k": value} for value in k],
        "matryoshka": [{"k": value, "widths": list(widths)} for value in k],
    }
    jumprelu: dict[Side, dict[str, list[dict[str, Any]]]] = {
        "ours": {"target": [{"target_l0": value} for value in k]},
        "theirs": {
            "step": [{"l0_coefficient": value} for value in l0],
            "step, wide": [{"l0_coefficient": value, **WIDE} for value in l0],
            "quadratic": [{"target_l0": value, "jumprelu_sparsity_loss_mode": "quadratic"} for value in k],
        },
    }
    return {name: {side: {"plain": points} for side in SIDES} for name, points in alike.items()} | {
        "jumprelu": jumprelu
    }


@dataclass(frozen=True)
class Recipe:
    """One SAE. `settings` in our names; `extra` is handed to one side's own configuration as it is."""

    architecture: str
    d_sae: int
    settings: Mapping[str, Any]
    lr: float
    seed: int
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Schedule:
    """What all SAEs of a comparison share. `coefficient_warm_up_steps` is for L1 and L0 coefficients."""

    steps: int
    batch_tokens: int
    lr_warm_up_steps: int
    lr_decay_steps: int
    dead_after_tokens: int
    coefficient_warm_up_steps: int = 0


def train(side: Side, recipe: Recipe, schedule: Schedule, x: np.ndarray, calibration: Calibration) -> SAE:
    """The trained SAE of one side, in this process and with its thread count."""
    with tempfile.TemporaryDirectory(prefix="penstock-side-") as folder:
        (_train_ours if side == "ours" else _train_theirs)(recipe, schedule, x, calibration, folder)
        return SAE.load(folder)


def _batches(x: np.ndarray, schedule: Schedule) -> Iterator[torch.Tensor]:
    size = schedule.batch_tokens
    for start in range(0, schedule.steps * size, size):
        yield torch.from_numpy(np.array(x[start : start + size], dtype=np.float32))


def _train_ours(recipe: Recipe, schedule: Schedule, x: np.ndarray, calibration: Calibration, folder: str) -> None:
    warm_up = {}
    if schedule.coefficient_warm_up_steps:
        for name in ("l1", "l0"):
            if f"{name}_coefficient" in recipe.settings:
                warm_up[f"{name}_warm_up_steps"] = schedule.coefficient_warm_up_steps
    settings = parse_settings(
        {"architecture": recipe.architecture, "d_sae": recipe.d_sae, "seed": recipe.seed}
        | {**recipe.settings, **warm_up, **recipe.extra}
    )
    training = TrainingSettings(
        steps=schedule.steps,
        batch_tokens=schedule.batch_tokens,
        lr=recipe.lr,
        lr_warm_up_steps=schedule.lr_warm_up_steps,
        lr_decay_steps=schedule.lr_decay_steps,
        dead_after_tokens=schedule.dead_after_tokens,
    )
    trainer = SAETrainer(settings, training, calibration)
    for batch in _batches(x, schedule):
        trainer.train_step(batch)
    stop = schedule.steps * schedule.batch_tokens
    latest = np.array(x[max(0, stop - EXPORT_TOKENS) : stop], dtype=np.float32)
    trainer.export(tokens=torch.from_numpy(latest)).save(folder)


# ---- SAELens --------------------------------------------------------------------------------------------------------

_THEIR_NAMES = {"batch_topk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "topk": "TopK",
                "standard": "Standard", "gated": "Gated", "jumprelu": "JumpReLU"}  # fmt: skip
_THEIR_SETTINGS = {"widths": "matryoshka_widths"}


def _train_theirs(recipe: Recipe, schedule: Schedule, x: np.ndarray, calibration: Calibration, folder: str) -> None:
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer as TheirTrainer

    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        sae = _their_sae(recipe, schedule, x.shape[1])
    config = SAETrainerConfig(
        total_training_samples=schedule.steps * schedule.batch_tokens,
        train_batch_size_samples=schedule.batch_tokens,
        lr=recipe.lr,
        lr_end=recipe.lr,
        lr_warm_up_steps=schedule.lr_warm_up_steps,
        lr_decay_steps=schedule.lr_decay_steps,
        dead_feature_window=max(1, schedule.dead_after_tokens // schedule.batch_tokens),
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = TheirTrainer(config, sae, _batches(x, schedule))
    trainer.activation_scaler.scaling_factor = calibration.scale
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        trainer.fit()
    sae.save_inference_model(folder)


def _their_sae(recipe: Recipe, schedule: Schedule, d_in: int) -> Any:
    import sae_lens

    name = _THEIR_NAMES[recipe.architecture]
    settings = {_THEIR_SETTINGS.get(key, key): value for key, value in recipe.settings.items()}
    if recipe.architecture == "jumprelu":
        settings["l0_warm_up_steps"] = schedule.coefficient_warm_up_steps
    elif "l1_coefficient" in settings:
        settings["l1_warm_up_steps"] = schedule.coefficient_warm_up_steps
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(
        d_in=d_in, d_sae=recipe.d_sae, normalize_activations="expected_average_only_in", **settings, **recipe.extra
    )
    return getattr(sae_lens, f"{name}TrainingSAE")(config)
