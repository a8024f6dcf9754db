"""JumpReLU by hand, its thresholds, and the controller that reaches a chosen L0."""

import pytest
import torch

from sae_core import ConfigError, JumpReLUSAE, JumpReLUSettings, SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.sae import Gradients, SAEConfig, StepContext

# Of two latents the first reads the first coordinate and writes it twice as long, the second one reads and writes the
# second: pre-activations are X.
X = torch.tensor([[3.0, 1.0], [-1.0, 2.0]])
W_DEC = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
JUMPRELU = {"architecture": "jumprelu", "d_sae": 2}


def make(threshold):
    weights = {"W_enc": torch.eye(2), "W_dec": W_DEC, "b_enc": torch.zeros(2), "b_dec": torch.zeros(2)}
    cfg = SAEConfig(architecture="jumprelu", d_in=2, d_sae=2)
    return JumpReLUSAE(cfg, {**weights, "threshold": torch.tensor(threshold)})


def step(sae, dead=None, sparsity="step", **settings):
    settings = JumpReLUSettings(d_sae=2, l0_coefficient=0.5, sparsity=sparsity, **settings)
    gradients = Gradients(frozenset(name for name, _ in sae.named_parameters()))
    with torch.no_grad():
        return sae.accumulate_gradients(X, X, gradients, StepContext(2, 0.5, dead, settings=settings)), gradients


def test_step_loss_and_the_estimators():
    # f = [[3, 0], [0, 2]]: errors (6 - 3)^2 + 1 and 1. In lengths, the thresholds are 5 and 1.5; nearer than 2 to them
    # are 6 of the first latent, 1 and 2 of the second
    sae = make([2.5, 1.5])
    terms, gradients = step(sae, bandwidth=4.0)
    assert terms.loss == pytest.approx((9 + 1 + 1) / 2 + 0.5 * 2 / 2)
    assert terms.fired.tolist() == [1, 1]
    # d loss / d f = 2 error . W_dec / 2: latent 0, token 0: 3 * 2 = 6; latent 1: -1 and 0, where its error is 0. The
    # kernels, norm / bandwidth, are 0.5 and 0.25, and each of their pairs gives threshold * d_f + 0.5 / 2
    jumps = [0.5 * (2.5 * 6 + 0.25), 0.25 * (-1.5 + 2 * 0.25)]
    torch.testing.assert_close(gradients["threshold"], -torch.tensor(jumps))
    assert gradients["b_enc"].tolist() == [6, 0]
    _, gradients = step(sae, bandwidth=4.0, ste_to_input=True)
    torch.testing.assert_close(gradients["b_enc"], torch.tensor([6 + jumps[0], jumps[1]]))


def test_tanh_loss():
    terms, _ = step(make([2.5, 1.5]), sparsity="tanh", tanh_scale=0.1)
    assert terms.loss == pytest.approx(11 / 2 + 0.5 * float(torch.tensor([0.6, 0.2]).tanh().sum()) / 2)


def test_the_loss_on_dead_latents():
    # of latent 0 the ways to the threshold 4 are 1 and 5, times its norm 2; errors 9 + 1 and 1, one pair active
    terms, _ = step(make([4.0, 1.5]), dead=torch.tensor([True, False]), pre_act_coefficient=0.25)
    plain, _ = step(make([4.0, 1.5]), dead=torch.tensor([True, False]), pre_act_coefficient=0)
    assert (terms.loss - plain.loss).item() == pytest.approx(0.25 * 2 * 6 / 2)


def test_a_threshold_below_zero_counts_as_zero():
    below, zero = make([-1.0, 1.5]), make([0.0, 1.5])
    assert torch.equal(below.encode(X), zero.encode(X))
    for settings in ({}, {"sparsity": "tanh"}):
        (terms, gradients), (expected, expected_gradients) = step(below, **settings), step(zero, **settings)
        assert torch.equal(terms.loss, expected.loss)
        assert all(torch.equal(gradients[name], expected_gradients[name]) for name in gradients)
    assert below.for_use({}, None).threshold.tolist() == [0.0, 1.5]


@pytest.mark.parametrize("share", [1.0, 0.01])
def test_no_gradient_depends_on_where_a_latents_strength_lies(share):
    """Rows times c, encoder and threshold by c: the same function, so the same gradients but for the factor."""
    sae = make([2.5, 1.5])
    moved = sae.replaced({
        "W_dec": sae.W_dec * share, "W_enc": sae.W_enc / share, "threshold": sae.threshold / share,
    })  # fmt: skip
    for settings in ({"ste_to_input": True}, {"sparsity": "tanh"}):
        (terms, gradients), (expected, expected_gradients) = step(moved, **settings), step(sae, **settings)
        torch.testing.assert_close(terms.loss, expected.loss)
        for name, factor in {"threshold": share, "W_enc": share, "W_dec": 1 / share, "b_dec": 1}.items():
            torch.testing.assert_close(gradients[name], expected_gradients[name] * factor, msg=name)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (JUMPRELU, "exactly one"),
        ({**JUMPRELU, "l0_coefficient": 1, "target_l0": 1}, "l0_coefficient is 1.0 and target_l0 is 1.0: exactly one"),
        ({**JUMPRELU, "target_l0": 3}, r"target_l0 is 3: accepted is at most d_sae \(2\)"),
        ({**JUMPRELU, "target_l0": 0}, "target_l0 is 0"),
        ({**JUMPRELU, "target_l0": 1, "l0_warm_up_steps": 5}, "l0_warm_up_steps is 5"),
        ({**JUMPRELU, "l0_coefficient": 1, "sparsity": "quadratic"}, "'tanh' or 'step'"),
    ],
)
def test_wrong_settings_are_refused(mapping, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings(mapping)


def test_thresholds_start_where_four_times_the_target_are_active():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1)) * 5 + 3
    for settings, l0 in (({"target_l0": 10}, 40), ({"l0_coefficient": 1}, 0.05 * 512), ({"target_l0": 500}, 256)):
        settings = parse_settings({"architecture": "jumprelu", "d_sae": 512, **settings})
        trainer = SAETrainer(settings, TrainingSettings(steps=1, batch_tokens=8, dead_after_tokens=9), calibrate(x))
        assert (trainer.export().encode(x) > 0).sum(1).float().mean().item() == pytest.approx(l0, rel=0.05)


def test_the_estimators_gradient_to_the_input_follows_the_source_unless_told():
    settings = {name: parse_settings({**JUMPRELU, "target_l0": 1, "sparsity": name}) for name in ("tanh", "step")}
    assert (settings["tanh"].ste_to_input, settings["step"].ste_to_input) == (True, False)
    assert parse_settings({**JUMPRELU, "target_l0": 1, "sparsity": "step", "ste_to_input": True}).ste_to_input


# ---- target_l0 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data):
    """(trainer, metrics of every step) of a run with target_l0."""
    training = TrainingSettings(steps=600, batch_tokens=64, lr=3e-3, dead_after_tokens=5000)
    settings = parse_settings({"architecture": "jumprelu", "d_sae": 48, "target_l0": 3})
    trainer = SAETrainer(settings, training, data.calibration)
    metrics = [trainer.train_step(data.batch(step, 64), want_metrics=True) for step in range(training.steps)]
    return trainer, metrics


def test_the_controller_reaches_the_target(trained, data):
    trainer, metrics = trained
    late = [one["l0"] for one in metrics[480:]]
    assert sum(late) / len(late) == pytest.approx(3, rel=0.1)
    l0 = (trainer.export().encode(data.x) > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(3, rel=0.15)


def test_the_coefficient_stays_over_the_last_fifth(trained):
    _, metrics = trained
    coefficients = [one["l0_coefficient"] for one in metrics]
    assert len(set(coefficients[480:])) == 1
    assert len(set(coefficients[470:481])) == 11


def test_export_calibrates_the_thresholds_on_tokens(trained, data):
    trainer, _ = trained
    sae = trainer.export(tokens=data.x)
    assert (sae.encode(data.x) > 0).sum().item() == pytest.approx(3 * len(data.x), rel=1e-3)
    factor = sae.threshold / trainer.export().threshold
    torch.testing.assert_close(factor, factor[:1].expand(48), rtol=1e-4, atol=0)


def test_export_leaves_the_thresholds_of_a_given_coefficient(data, training):
    settings = parse_settings({"architecture": "jumprelu", "d_sae": 48, "l0_coefficient": 0.5})
    trainer = SAETrainer(settings, training, data.calibration)
    trainer.train_step(data.batch(0))
    assert torch.equal(trainer.export(tokens=data.x).threshold, trainer.export().threshold)
