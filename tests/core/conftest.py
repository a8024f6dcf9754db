import warnings

import pytest
import torch

from sae_cases import CASES, Data, make_data
from sae_core import SAETrainer, TrainingSettings, parse_settings
from sae_sites import ALL, Site


@pytest.fixture(scope="session")
def data() -> Data:
    return make_data(n=24, d_in=16, tokens=4096, active=0.1)


@pytest.fixture(params=sorted(CASES))
def settings(request):
    return parse_settings(CASES[request.param])


@pytest.fixture
def training() -> TrainingSettings:
    return TrainingSettings(steps=60, batch_tokens=32, lr=3e-3, lr_warm_up_steps=3, dead_after_tokens=200)


@pytest.fixture
def trainer(settings, training, data) -> SAETrainer:
    return SAETrainer(settings, training, data.calibration)


@pytest.fixture(params=ALL, ids="-".join)
def site(request, data) -> Site:
    return Site.make(*request.param, data)


@pytest.fixture(scope="module")  # a model keeps tensors of its last pass, and what a test file has done to it
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
