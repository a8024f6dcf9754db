"""`target_l0`: the controller, the calibration of what it leaves, and the settings, where they are the same for every
architecture with a coefficient. JumpReLU's own side is in test_jumprelu.py."""

import math

import pytest
import torch

from sae_core import ConfigError, SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.control import FREEZE, MOST_MOVED, L0Controller, calibrated_bias
from sae_core.sae import StepContext

L1 = ("standard", "gated")
BIAS = {"standard": "b_enc", "gated": "b_gate"}
CONTROLLER = L0Controller(at_start=0.5, gain=1.0, rate=10.0, descent=0.1)


def follow(controller, l0s, target=4.0):
    """Coefficients after steps of 2 tokens on which `l0s` latents a token were active, over a whole run."""
    state, coefficients = controller.state_at_start(target), []
    for step, l0 in enumerate(l0s):
        context = StepContext(2, state["coefficient"], state=state, progress=step / len(l0s))
        state = controller.next_state(state, torch.tensor([l0, l0]), context)
        coefficients.append(state["coefficient"].item())
    return coefficients, state


def test_the_controller_by_hand():
    # the first L0 is the running one, and on the line; then 0.9 * 8 + 0.1 * 18 = 9, above the line by log(9 / 4) at the
    # second step, where it has come down to the target, and the sum takes no more than 0.3
    coefficients, state = follow(CONTROLLER, [8.0, 18.0] + 8 * [0.0])
    error = math.log(9 / 4)
    assert coefficients[0] == pytest.approx(0.5)
    assert coefficients[1] == pytest.approx(0.5 * math.exp(10.0 * 0.1 * 0.3 + error))
    assert state["l0_at_start"] == 8


def test_on_the_way_down_nothing_between_target_and_line_is_corrected():
    slow = L0Controller(at_start=0.5, gain=1.0, rate=10.0, descent=1.0)
    between, _ = follow(slow, [64.0] + 59 * [6.0])  # the running L0 falls faster than the line, and to 6.1 only
    assert set(between) == {0.5}
    above, _ = follow(slow, 60 * [64.0])
    assert above == sorted(above) and above[-1] > 2
    below, _ = follow(slow, 60 * [2.0])  # corrected in proportion, and not by the sum
    assert below == pytest.approx(60 * [0.25])


def test_the_coefficient_moves_to_where_l0_is_the_target_and_stays_from_the_freeze_on():
    high, _ = follow(CONTROLLER, 100 * [8.0])
    low, _ = follow(CONTROLLER, 100 * [2.0])
    assert high[70] > high[40] > high[20] > 0.5 > low[20] > low[40] > low[70]
    frozen = round(FREEZE * 100)
    assert len(set(high[frozen:])) == len(set(low[frozen:])) == 1
    assert high[frozen - 1] == high[frozen] > high[frozen - 2]


def test_nothing_of_the_controller_waits_for_the_device():
    """On `meta` tensors there is no value to wait for."""
    state = {name: tensor.to("meta") for name, tensor in CONTROLLER.state_at_start(4.0).items()}
    after = CONTROLLER.next_state(state, torch.ones(3, device="meta"), StepContext(2, 0.5, state=state, progress=0.5))
    assert all(tensor.device.type == "meta" for tensor in after.values())


# ---- in training ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=L1)
def trained(request, data):
    """(trainer, metrics of every step) of a run with target_l0."""
    training = TrainingSettings(steps=500, batch_tokens=64, lr=3e-3, lr_warm_up_steps=20, dead_after_tokens=5000)
    settings = parse_settings({"architecture": request.param, "d_sae": 48, "target_l0": 3})
    trainer = SAETrainer(settings, training, data.calibration)
    metrics = [trainer.train_step(data.batch(step, 64), want_metrics=True) for step in range(training.steps)]
    return trainer, metrics


def l0_of(sae, x):
    return (sae.encode(x) > 0).sum(1).float().mean().item()


def test_the_controller_reaches_the_target(trained, data):
    trainer, metrics = trained
    settled = trainer.settings.settled_after(500)
    for first, last in ((settled, 400), (400, 500)):
        l0s = [one["l0"] for one in metrics[first:last]]
        assert sum(l0s) / len(l0s) == pytest.approx(3, rel=0.1)
    assert l0_of(trainer.export(), data.x) == pytest.approx(3, rel=0.12)


def test_the_coefficient_is_in_the_curves_and_stays_over_the_last_fifth(trained):
    _, metrics = trained
    coefficients = [one["l1_coefficient"] for one in metrics]
    assert len(set(coefficients[400:])) == 1
    assert len(set(coefficients[390:401])) == 11


def test_export_moves_all_biases_by_one_length_to_the_target(trained, data):
    trainer, _ = trained
    before, after = trainer.export(), trainer.export(tokens=data.x)
    assert l0_of(after, data.x) == pytest.approx(3, rel=2e-3)
    name = BIAS[trainer.settings.architecture]
    moved = getattr(after, name) - getattr(before, name)  # decoder rows have length 1 here
    torch.testing.assert_close(moved, moved[:1].expand(48), rtol=1e-3, atol=1e-5)
    others = [weight for weight in dict(before.named_parameters()) if weight != name]
    assert all(torch.equal(getattr(after, weight), getattr(before, weight)) for weight in others)


@pytest.mark.parametrize("architecture", L1)
def test_a_given_coefficient_leaves_the_biases(architecture, data, training):
    settings = parse_settings({"architecture": architecture, "d_sae": 48, "l1_coefficient": 0.5})
    trainer = SAETrainer(settings, training, data.calibration)
    trainer.train_step(data.batch(0))
    name = BIAS[architecture]
    assert torch.equal(getattr(trainer.export(tokens=data.x), name), getattr(trainer.export(), name))
    assert not [name for name in trainer.state() if name.startswith("state.")]


def test_a_transcoder_reaches_its_target(data):
    target = torch.relu(data.x @ torch.randn(16, 20, generator=torch.Generator().manual_seed(1)))
    training = TrainingSettings(steps=500, batch_tokens=64, lr=3e-3, dead_after_tokens=5000)
    settings = parse_settings({"architecture": "standard", "d_sae": 48, "target_l0": 6})
    trainer = SAETrainer(settings, training, data.calibration, target_calibration=calibrate(target))
    for step in range(training.steps):
        trainer.train_step(data.batch(step, 64), target[step * 64 % 4032 : step * 64 % 4032 + 64])
    assert l0_of(trainer.export(), data.x) == pytest.approx(6, rel=0.12)
    assert l0_of(trainer.export(tokens=data.x), data.x) == pytest.approx(6, rel=2e-3)


def test_biases_move_no_further_than_a_quarter_of_the_mean_length():
    x, W_enc, norms = torch.eye(2), torch.tensor([[2.0, -1.0], [-3.0, 4.0]]), torch.tensor([0.5, 2.0])
    bias = torch.zeros(2)  # lengths are 1, -2 and -1.5, 8: of the positive ones the mean is 4.5
    for target, sign in ((2.0, 1), (0.001, -1)):
        moved = calibrated_bias(x, W_enc, bias, norms, torch.tensor(target))
        torch.testing.assert_close(moved * norms, torch.full((2,), sign * MOST_MOVED * 4.5))
    # where the n-th of the lengths is within that, it becomes 0: 1 of token 0
    torch.testing.assert_close(calibrated_bias(x, W_enc, bias, norms, torch.tensor(1.0)) * norms, -torch.ones(2))


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", L1)
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "l1_coefficient is None and target_l0 is None: exactly one"),
        ({"l1_coefficient": 1, "target_l0": 1}, "l1_coefficient is 1.0 and target_l0 is 1.0: exactly one"),
        ({"target_l0": 9}, r"target_l0 is 9: accepted is at most d_sae \(8\)"),
        ({"target_l0": 0}, "target_l0 is 0"),
        ({"target_l0": 1, "l1_warm_up_steps": 5}, "l1_warm_up_steps is 5: accepted with l1_coefficient only"),
    ],
)
def test_wrong_settings_are_refused(architecture, fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings({"architecture": architecture, "d_sae": 8, **fields})


def test_settled_is_a_run_whose_coefficient_is_no_longer_on_its_way():
    warm_up = {"standard": "l1", "gated": "l1", "jumprelu": "l0"}
    for architecture, name in warm_up.items():
        given = {"architecture": architecture, "d_sae": 8}
        with_target = parse_settings({**given, "target_l0": 2})
        with_coefficient = parse_settings({**given, f"{name}_coefficient": 1, f"{name}_warm_up_steps": 30})
        assert with_coefficient.settled_after(1000) == 30
        assert 100 <= with_target.settled_after(1000) <= 500
    assert parse_settings({"architecture": "topk", "d_sae": 8, "k": 2}).settled_after(1000) == 0
