import warnings
from dataclasses import dataclass

import pytest
import torch
from torch.nn.functional import normalize

from sae_core import Calibration, SAETrainer, TrainingSettings, calibrate, parse_settings

SETTINGS = {
    "standard": {"architecture": "standard", "d_sae": 48, "l1_coefficient": 0.4, "l1_warm_up_steps": 5},
    "gated": {"architecture": "gated", "d_sae": 48, "l1_coefficient": 0.4, "l1_warm_up_steps": 5},
    "topk": {"architecture": "topk", "d_sae": 48, "k": 5},
}


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


@pytest.fixture(scope="session")
def data() -> Data:
    return make_data(n=24, d_in=16, tokens=4096, active=0.1)


@pytest.fixture(params=sorted(SETTINGS))
def settings(request):
    return parse_settings(SETTINGS[request.param])


@pytest.fixture
def training() -> TrainingSettings:
    return TrainingSettings(steps=60, batch_tokens=32, lr=3e-3, lr_warm_up_steps=3, dead_after_tokens=200)


@pytest.fixture
def trainer(settings, training, data) -> SAETrainer:
    return SAETrainer(settings, training, data.calibration)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random GPT-2 of 3 layers, loaded from a Hugging Face folder as users load theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge import TransformerBridge
        from transformers import GPT2Config, GPT2LMHeadModel

        folder = tmp_path_factory.mktemp("tiny-gpt2")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            config = GPT2Config(
                n_layer=3, n_embd=32, n_head=4, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
            )
            network = GPT2LMHeadModel(config)
            for parameter in network.parameters():  # the usual start is too small for layers to matter
                parameter.data.mul_(4) if parameter.ndim == 2 else None
            network.save_pretrained(folder)
        return TransformerBridge.boot_transformers(str(folder), device="cpu")
