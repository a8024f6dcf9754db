"""What a BatchTopK SAE is once there is no batch: a JumpReLU SAE whose L0 is the k that it was trained with."""

import pytest
import torch

from sae_cases import Data, make_data
from sae_core import SAETrainer, TrainingSettings, parse_settings

K = 4


@pytest.fixture(scope="module")
def wide() -> Data:
    return make_data(n=128, d_in=64, tokens=60_000, active=0.03)


@pytest.fixture(scope="module")
def trained(wide) -> SAETrainer:
    """After 200 steps, all tokens but the last 8192 seen once."""
    training = TrainingSettings(steps=200, batch_tokens=256, lr=3e-3, lr_warm_up_steps=10, dead_after_tokens=10_000)
    settings = parse_settings({"architecture": "batch_topk", "d_sae": 256, "k": K})
    trainer = SAETrainer(settings, training, wide.calibration)
    for step in range(training.steps):
        trainer.train_step(wide.batch(step, 256))
    return trainer


def l0_and_explained_variance(sae, x) -> tuple[float, float]:
    f, x_hat = sae.reconstruct(x)
    explained = 1 - (x_hat - x).square().sum() / (x - x.mean(0)).square().sum()
    return (f > 0).sum(1).double().mean().item(), explained.item()


@pytest.mark.parametrize("calibrated", [True, False])
def test_l0_and_explained_variance_in_use_are_those_of_training(trained, wide, calibrated):
    seen, held_out = wide.x[:8192], wide.x[-8192:]
    sae = trained.export(tokens=seen if calibrated else None)
    l0, explained_variance = l0_and_explained_variance(sae, held_out)
    assert l0 == pytest.approx(K, rel=0.03 if calibrated else 0.1)
    scale = wide.calibration.scale
    as_trained = torch.cat([trained.sae(x * scale) / scale for x in held_out.split(256)])
    error, expected_error = ((x_hat - held_out).square().sum() for x_hat in (sae(held_out), as_trained))
    assert error == pytest.approx(expected_error.item(), rel=0.03)
    assert explained_variance > 0.6


def test_calibration_gives_k_on_its_own_tokens(trained, wide):
    for k_tokens in (wide.x[:1000], wide.x[:10_000], wide.x[:1000] * 3):
        l0, _ = l0_and_explained_variance(trained.export(tokens=k_tokens), k_tokens)
        assert l0 == pytest.approx(K, rel=2e-3)


def test_a_batch_of_another_size_has_the_same_density(trained, wide):
    for n_tokens in (64, 1024):
        f = trained.sae.encode(wide.x[:n_tokens] * wide.calibration.scale)
        assert (f > 0).sum() == K * n_tokens


@pytest.mark.parametrize("micro_batch_tokens", [None, 700, 1100])
@pytest.mark.parametrize("d_sae", [20, 3000])  # dense pairs, sparse pairs
def test_exactly_k_are_active_also_where_products_are_made_in_pieces(wide, d_sae, micro_batch_tokens):
    training = TrainingSettings(steps=2, batch_tokens=2000, dead_after_tokens=10_000)
    settings = parse_settings({"architecture": "batch_topk", "d_sae": d_sae, "k": K})
    trainer = SAETrainer(settings, training, wide.calibration, micro_batch_tokens=micro_batch_tokens)
    for step in range(2):
        assert trainer.train_step(wide.batch(step, 2000), want_metrics=True)["l0"] == K
