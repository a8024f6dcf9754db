"""What every architecture must do. A new one gets its settings in sae_cases.SETTINGS and must pass all of this.

Tests that take `site` are made at every kind of site that the architecture can be trained at (see sae_sites.py), the
others of the SAE alone.
"""

import pytest
import torch
from torch.nn.functional import normalize

from sae_cases import SETTINGS, make_data
from sae_core import ARCHITECTURES, SAE, CheckpointError, ConfigError, SAETrainer, TrainingSettings, parse_settings


def run(trainer: SAETrainer, data, steps: int) -> None:
    for _ in range(steps):
        trainer.train_step(data.batch(trainer.steps_done))


def equal_states(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_architecture_is_covered():
    assert SETTINGS.keys() == ARCHITECTURES.keys() == {settings["architecture"] for settings in RECOVERY.values()}


def test_settings_survive_a_round_trip(settings):
    assert parse_settings(settings.model_dump(mode="json")) == settings


def test_shapes(trainer, data):
    sae = trainer.export()
    x = data.x[:6].view(2, 3, 16)
    f = sae.encode(x)
    assert f.shape == (2, 3, 48)
    assert sae.decode(f).shape == sae(x).shape == x.shape
    assert (f >= 0).all()
    assert (sae.d_in, sae.d_sae) == (16, 48)


def test_start_is_the_mean_and_a_tied_decoder(trainer, data):
    sae = trainer.sae
    torch.testing.assert_close(sae.b_dec.data, data.calibration.mean * data.calibration.scale)
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    norm = torch.full((48,), type(sae).decoder_norm_at_start)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), norm)


def test_start_depends_on_the_seed_alone(site, training):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = site.trainer(training).state()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert equal_states(site.trainer(training).state(), first)
    other = site.trainer(training, seed=1).state()
    assert not torch.equal(other["weights.W_dec"], first["weights.W_dec"])


def test_metrics_are_finite_and_named(trainer, data):
    metrics = trainer.train_step(data.batch(0), want_metrics=True)
    names = {"loss", "mse", "l0", "explained_variance", "dead_fraction", "grad_norm", "lr"}
    extra = {name for name in ("l1_coefficient", "l0_coefficient") if hasattr(trainer.settings, name)}
    assert metrics.keys() == names | extra
    assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
    assert metrics["grad_norm"] > 0
    assert (trainer.steps_done, trainer.tokens_seen, trainer.diverged) == (1, 32, False)
    assert trainer.train_step(data.batch(1)) is None


def test_metrics_are_those_of_the_weights_before_the_step(trainer, data):
    run(trainer, data, 10)
    x = data.batch(10)
    scale = data.calibration.scale
    f = trainer.sae.encode(x * scale)
    x_hat = trainer.sae.decode(f) / scale
    metrics = trainer.train_step(x, want_metrics=True)
    mse = (x_hat - x).square().sum(1).mean()
    assert metrics["mse"] == pytest.approx(mse.item(), rel=1e-4)
    assert metrics["l0"] == (f > 0).sum(1).float().mean().item()
    variance = x.var(0, correction=0).sum()
    assert metrics["explained_variance"] == pytest.approx((1 - mse / variance).item(), abs=1e-4)


def test_asking_for_metrics_changes_nothing(site, training):
    quiet, talking = (site.trainer(training) for _ in range(2))
    for step in range(4):
        quiet.train_step(*site.batch(step))
        talking.train_step(*site.batch(step), want_metrics=True)
    assert equal_states(quiet.state(), talking.state())


def test_two_runs_are_equal_bit_for_bit(site, training):
    trainers = [site.trainer(training) for _ in range(2)]
    for trainer in trainers:
        site.run(trainer, 20)
    assert equal_states(trainers[0].state(), trainers[1].state())


def test_a_neighbour_changes_nothing(site, training):
    alone, beside, neighbour = (site.trainer(training) for _ in range(3))
    site.run(alone, 6)
    for step in range(6):
        neighbour.train_step(*(side * 1.5 for side in site.batch(step)))
        beside.train_step(*site.batch(step))
    assert equal_states(alone.state(), beside.state())


def test_the_batch_is_only_read(site, training):
    trainer = site.trainer(training)
    batch = [side.clone() for side in site.batch(0)]
    trainer.train_step(*batch, want_metrics=True)
    assert all(torch.equal(side, kept) for side, kept in zip(batch, site.batch(0), strict=True))


def test_resumed_training_is_uninterrupted_training(site, training):
    whole, first, second = (site.trainer(training) for _ in range(3))
    site.run(whole, 20)
    site.run(first, 11)
    second.load_state(first.state())
    assert equal_states(second.state(), first.state())
    assert (second.steps_done, second.tokens_seen) == (11, 352)
    site.run(second, 9)
    assert equal_states(second.state(), whole.state())


def test_state_is_a_copy(site, training):
    trainer = site.trainer(training)
    state = trainer.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    site.run(trainer, 2)
    assert equal_states(state, kept)


def test_wrong_states_are_refused_and_change_nothing(site, training):
    trainer = site.trainer(training)
    site.run(trainer, 2)
    state = trainer.state()
    lacking = {name: tensor for name, tensor in state.items() if name != "adam.exp_avg.W_dec"}
    misshapen = {**state, "weights.W_enc": state["weights.W_enc"].T.contiguous()}
    superfluous = {**state, "x": state["weights.b_dec"]}
    cases = [(lacking, "exp_avg.W_dec"), (misshapen, "W_enc of shape"), (superfluous, "unknown")]
    for broken, message in cases:
        with pytest.raises(CheckpointError, match=message):
            trainer.load_state(broken)
    assert equal_states(trainer.state(), state)


@pytest.mark.parametrize("micro_batch_tokens", [32, 8, 7])
def test_micro_batches_are_the_same_maths(site, training, micro_batch_tokens):
    whole = site.trainer(training)
    parts = site.trainer(training, micro_batch_tokens)
    for step in range(8):
        a = whole.train_step(*site.batch(step), want_metrics=True)
        b = parts.train_step(*site.batch(step), want_metrics=True)
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, tensor in whole.state().items():
        torch.testing.assert_close(parts.state()[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_step_that_fails_can_be_repeated(site, training, monkeypatch):
    smooth, bumpy = (site.trainer(training, micro_batch_tokens=8) for _ in range(2))
    site.run(smooth, 5)
    site.run(bumpy, 4)
    before = bumpy.state()
    real, calls = bumpy.sae.accumulate_gradients, []

    def out_of_memory_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(bumpy.sae, "accumulate_gradients", out_of_memory_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        bumpy.train_step(*site.batch(4))
    assert equal_states(bumpy.state(), before)
    bumpy.train_step(*site.batch(4))
    assert equal_states(bumpy.state(), smooth.state())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_divergence_is_seen_and_stays(site, training, bad):
    trainer = site.trainer(training)
    site.run(trainer, 1)
    assert not trainer.diverged
    trainer.train_step(*(torch.full_like(side, bad) for side in site.batch(1)))
    assert trainer.diverged
    trainer.train_step(*site.batch(2))
    assert trainer.diverged


def test_a_wrong_batch_is_refused(trainer):
    with pytest.raises(ConfigError, match="d_in 16"):
        trainer.train_step(torch.zeros(4, 15))


def test_export_is_the_trained_function_on_raw_activations(trainer, data):
    run(trainer, data, 40)
    scale = data.calibration.scale
    x = data.x[:500]
    # with thresholds calibrated on x, where the trained SAE takes x for one batch; without, where that would move L0
    tokens = None if hasattr(trainer.settings, "target_l0") else x
    sae = trainer.export({"hook_name": "blocks.0.hook_resid_post"}, tokens=tokens)
    torch.testing.assert_close(sae(x), trainer.sae(x * scale) / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    # a latent's activation is the length it adds, in raw units; ranked by decoder norms it is that already
    norms = 1 if trainer.sae.cfg.rescale_acts_by_decoder_norm else trainer.sae.W_dec.norm(dim=1)
    strength = norms / scale
    torch.testing.assert_close(sae.encode(x), trainer.sae.encode(x * scale) * strength, rtol=1e-4, atol=1e-5)
    assert sae.cfg.metadata["hook_name"] == "blocks.0.hook_resid_post"
    assert sae.cfg.metadata["sae_settings"] == trainer.settings.model_dump(mode="json")


def test_saved_and_loaded_is_the_same_function(site, training, tmp_path):
    trainer = site.trainer(training)
    site.run(trainer, 5)
    sae = trainer.export({"hook_name": "blocks.1.hook_resid_pre"})
    sae.save(tmp_path / "sae", sparsity=trainer.sparsity())
    loaded = SAE.load(tmp_path / "sae")
    assert type(loaded) is type(sae)
    assert torch.equal(loaded.encode(site.data.x), sae.encode(site.data.x))
    assert torch.equal(loaded(site.data.x), sae(site.data.x))
    assert loaded.cfg.metadata.items() >= sae.cfg.metadata.items()


def test_encoding_and_exporting_change_nothing(site, training):
    trainer = site.trainer(training)
    site.run(trainer, 3)
    before = trainer.state()
    trainer.sae(site.data.x)
    trainer.export().encode(site.data.x)
    trainer.sparsity()
    assert equal_states(trainer.state(), before)


def test_encode_is_differentiable_in_its_input(site, training):
    trainer = site.trainer(training)
    x = site.data.x[:8].clone().requires_grad_()
    trainer.export()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_a_frozen_decoder_stays(site, training):
    trainer = site.trainer(training, frozen_decoder=True)
    before = trainer.state()
    torch.testing.assert_close(before["weights.W_dec"].norm(dim=1), torch.ones(48))
    site.run(trainer, 10)
    after = trainer.state()
    assert torch.equal(after["weights.W_dec"], before["weights.W_dec"])
    assert "adam.exp_avg.W_dec" not in after
    for name in ("W_enc", "b_dec"):
        assert not torch.equal(after[f"weights.{name}"], before[f"weights.{name}"])
    resumed = site.trainer(training, frozen_decoder=True)
    resumed.load_state(after)
    assert equal_states(resumed.state(), after)


def test_lr_of_the_settings_overrides_the_trainings(settings, training, data):
    fast = SAETrainer(settings.model_copy(update={"lr": 1.0}), training, data.calibration)
    assert fast.train_step(data.batch(0), want_metrics=True)["lr"] == pytest.approx(1 / 3)


def test_half_precision_activations_are_accepted(site, training):
    trainer = site.trainer(training)
    metrics = trainer.train_step(*(side.bfloat16() for side in site.batch(0)), want_metrics=True)
    assert metrics["explained_variance"] < 1


RECOVERY = {
    "standard, target_l0": {"architecture": "standard", "d_sae": 40, "target_l0": 2},
    "gated, target_l0": {"architecture": "gated", "d_sae": 40, "target_l0": 2},
    "standard": {"architecture": "standard", "d_sae": 40, "l1_coefficient": 1.0, "l1_warm_up_steps": 300},
    "gated": {"architecture": "gated", "d_sae": 40, "l1_coefficient": 4.0, "l1_warm_up_steps": 300},
    "topk": {"architecture": "topk", "d_sae": 40, "k": 3},
    "batch_topk": {"architecture": "batch_topk", "d_sae": 40, "k": 2},
    "matryoshka": {"architecture": "matryoshka", "d_sae": 40, "k": 2, "prefix_weights": (0.2, 0.2, 0.2, 1)},
    "jumprelu": {"architecture": "jumprelu", "d_sae": 40, "target_l0": 2},
}


@pytest.mark.parametrize("case", sorted(RECOVERY))
def test_a_known_dictionary_is_recovered(case):
    data = make_data(n=32, d_in=24, tokens=40_000, active=0.06)
    training = TrainingSettings(steps=600, batch_tokens=128, lr=5e-3, dead_after_tokens=20_000)
    trainer = SAETrainer(parse_settings(RECOVERY[case]), training, data.calibration)
    for step in range(training.steps):
        trainer.train_step(data.batch(step, 128))
    sae = trainer.export()
    similarity = data.dictionary @ normalize(sae.W_dec, dim=1).T
    assert similarity.max(dim=1).values.mean() > 0.95
    assert (similarity.max(dim=1).values > 0.9).double().mean() > 0.9
