"""The kinds of hook points that an SAE is trained at: one that it reads and writes, or one each, with or without a skip
connection between them."""

from dataclasses import dataclass
from typing import Any

import torch

from sae_cases import CASES, Data
from sae_core import ARCHITECTURES, Calibration, SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.settings import SAESettings

D_OUT = 12


def kinds(case: str) -> list[str]:
    cls = ARCHITECTURES[CASES[case]["architecture"]]
    kinds = ["sae"] + ["transcoder"] * cls.can_transcode
    return kinds + ["skip"] * (cls.can_transcode and "skip" in cls.settings_type.model_fields)


ALL = [(case, kind) for case in sorted(CASES) for kind in kinds(case)]


@dataclass(frozen=True)
class Site:
    """What trainers of one architecture are made of at one kind of site, and what they are fed."""

    settings: SAESettings
    data: Data
    target: torch.Tensor | None  # [tokens, d_out], of a transcoder
    target_calibration: Calibration | None

    @classmethod
    def make(cls, case: str, kind: str, data: Data) -> "Site":
        settings = parse_settings(CASES[case] | ({"skip": True} if kind == "skip" else {}))
        if kind == "sae":
            return cls(settings, data, None, None)
        generator = torch.Generator().manual_seed(1)
        inner = torch.relu(data.x @ torch.randn(data.x.shape[1], 20, generator=generator))
        target = inner @ torch.randn(20, D_OUT, generator=generator) * 40 + 7
        return cls(settings, data, target, calibrate(target))

    def trainer(
        self, training: TrainingSettings, micro_batch_tokens: int | None = None, **settings: Any
    ) -> SAETrainer:
        return SAETrainer(
            self.settings.model_copy(update=settings), training, self.data.calibration,
            target_calibration=self.target_calibration, micro_batch_tokens=micro_batch_tokens,
        )  # fmt: skip

    def batch(self, step: int, tokens: int = 32) -> tuple[torch.Tensor, ...]:
        """What `train_step` takes."""
        start = step * tokens % (len(self.data.x) - tokens)
        sides = (self.data.x,) if self.target is None else (self.data.x, self.target)
        return tuple(side[start : start + tokens] for side in sides)

    def run(self, trainer: SAETrainer, steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(*self.batch(trainer.steps_done))
