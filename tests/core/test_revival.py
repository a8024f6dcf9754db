"""Dead latents of the architectures with an L1 penalty come alive again."""

import pytest
import torch

from sae_cases import SETTINGS
from sae_core import SAETrainer, TrainingSettings, parse_settings

SHUT = torch.tensor([3, 17, 40])
TRAINING = TrainingSettings(steps=400, batch_tokens=32, lr=2e-2, dead_after_tokens=320)
OFF = {"aux_coefficient": 0.0, "pre_act_coefficient": 0.0}


def train(architecture: str, data, steps: int, **fields) -> SAETrainer:
    """From a start at which some latents are shut by all their biases."""
    trainer = SAETrainer(parse_settings({**SETTINGS[architecture], **fields}), TRAINING, data.calibration)
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in dict(trainer.sae.named_parameters()):
            getattr(trainer.sae, name).data[SHUT] = -6.0
    for step in range(steps):
        trainer.train_step(data.batch(step))
    return trainer


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_shut_latents_fire_again(architecture, data):
    revived, left = train(architecture, data, 400), train(architecture, data, 400, **OFF)
    assert (left.state()["counters.tokens_since_fired"][SHUT] == 400 * 32).all()
    assert (revived.state()["counters.tokens_since_fired"][SHUT] < 400 * 32).all()


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_only_dead_latents_are_touched(architecture, data):
    before = train(architecture, data, 10)
    state = before.state()
    without = SAETrainer(parse_settings({**SETTINGS[architecture], **OFF}), TRAINING, data.calibration)
    without.load_state(state)
    dead = state["counters.tokens_since_fired"] >= 320
    for trainer in (before, without):
        trainer.training = TRAINING.model_copy(update={"max_grad_norm": None})
        trainer.train_step(data.batch(10))
    after, expected = before.state(), without.state()
    assert dead[SHUT].all() and not dead.all()
    for name, tensor in after.items():
        if name.startswith("weights."):
            moved, still = (one.T if name == "weights.W_enc" else one for one in (tensor, expected[name]))
            if name == "weights.b_dec":
                assert torch.equal(moved, still)
                continue
            assert torch.equal(moved[~dead], still[~dead]), name
            if name != "weights.r_mag":
                assert not torch.equal(moved[dead], still[dead]), name
