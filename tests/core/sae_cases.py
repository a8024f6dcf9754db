"""Settings of every architecture and activations made of a known dictionary, for the tests of this folder."""

from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from sae_core import Calibration, calibrate

SETTINGS = {
    "standard": {"architecture": "standard", "d_sae": 48, "l1_coefficient": 0.4, "l1_warm_up_steps": 5},
    "gated": {"architecture": "gated", "d_sae": 48, "l1_coefficient": 0.4, "l1_warm_up_steps": 5},
    "topk": {"architecture": "topk", "d_sae": 48, "k": 5},
    "batch_topk": {"architecture": "batch_topk", "d_sae": 48, "k": 4.5},
    "matryoshka": {"architecture": "matryoshka", "d_sae": 48, "k": 4.5},
    "jumprelu": {"architecture": "jumprelu", "d_sae": 48, "target_l0": 5, "threshold_at_start": 1.0},
}
# Other ways to train an architecture, which must do all that the contract asks for, too.
VARIANTS = {
    "standard, target_l0": {"architecture": "standard", "d_sae": 48, "target_l0": 5},
    "gated, target_l0": {"architecture": "gated", "d_sae": 48, "target_l0": 5},
    "jumprelu, step": {**SETTINGS["jumprelu"], "sparsity": "step"},
}
CASES = SETTINGS | VARIANTS


@dataclass
class Data:
    """Activations made of a known sparse dictionary, with a mean and a scale of their own."""

    dictionary: torch.Tensor  # [n, d_in], unit rows
    x: torch.Tensor  # [tokens, d_in]
    calibration: Calibration

    def batch(self, step: int, tokens: int = 32) -> torch.Tensor:
        start = step * tokens % (len(self.x) - tokens)
        return self.x[start : start + tokens]


def make_data(n: int, d_in: int, tokens: int, active: float) -> Data:
    generator = torch.Generator().manual_seed(7)
    dictionary = normalize(torch.randn(n, d_in, generator=generator), dim=1)
    strength = 1 + torch.rand(tokens, n, generator=generator)
    x = (strength * (torch.rand(tokens, n, generator=generator) < active)) @ dictionary * 3 + 0.3
    return Data(dictionary, x, calibrate(x))
