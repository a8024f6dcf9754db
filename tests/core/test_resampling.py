"""Resampling of dead latents, for every architecture."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sae_cases import SETTINGS
from sae_core import ConfigError, SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.dead import draw_inputs, resampled_rows
from sae_core.training import MOMENTS

DEAD = torch.tensor([3, 17, 40])
EVERY, DEAD_AFTER = 10, 256
TRAINING = TrainingSettings(steps=60, batch_tokens=32, lr=3e-3, dead_after_tokens=DEAD_AFTER)


def make(architecture: str, data, **fields) -> SAETrainer:
    micro_batch_tokens = fields.pop("micro_batch_tokens", None)
    settings = parse_settings({**SETTINGS[architecture], "resample_every_steps": EVERY, **fields})
    return SAETrainer(settings, TRAINING, data.calibration, micro_batch_tokens=micro_batch_tokens)


def run_with_dead(trainer: SAETrainer, data, steps: int) -> None:
    """Steps in which the latents `DEAD` cannot fire, until they have been resampled."""
    for _ in range(steps):
        if trainer.steps_done < EVERY:
            bias = "b_gate" if trainer.settings.architecture == "gated" else "b_enc"
            getattr(trainer.sae, bias).data[DEAD] = -100.0
        trainer.train_step(data.batch(trainer.steps_done))


def rows_of(state: dict, name: str) -> torch.Tensor:
    tensor = state[name]
    return tensor.T if name.endswith("W_enc") else tensor


@pytest.fixture(params=sorted(SETTINGS))
def architecture(request) -> str:
    return request.param


def test_dead_latents_start_anew_and_living_ones_go_on(architecture, data):
    trainer, without = make(architecture, data), make(architecture, data, resample_every_steps=None)
    for one in (trainer, without):
        run_with_dead(one, data, EVERY)
    after, expected = trainer.state(), without.state()
    dead = expected["counters.tokens_since_fired"] >= DEAD_AFTER
    assert dead[DEAD].all() and not dead.all()
    assert (after["counters.tokens_since_fired"][dead] == 0).all()
    start = type(trainer.sae).biases_at_start(trainer.settings, trainer._spread)
    alive_norm = expected["weights.W_enc"].norm(dim=0)[~dead].mean()  # those of the step before differ by little
    norms = {"W_enc": 0.2 * alive_norm, "W_dec": type(trainer.sae).decoder_norm_at_start}
    for name in ("W_enc", "W_dec", *trainer.sae.encoder_biases):
        for key in ("weights", *(f"adam.{moment}" for moment in MOMENTS)):
            now, before = (rows_of(state, f"{key}.{name}") for state in (after, expected))
            assert torch.equal(now[~dead], before[~dead])
            if key != "weights":
                assert not now[dead].any()
        new = rows_of(after, f"weights.{name}")[dead]
        if name in norms:
            torch.testing.assert_close(new.norm(dim=1), torch.full((len(new),), float(norms[name])), rtol=0.02, atol=0)
        else:
            assert (new == start.get(name, 0.0)).all()
    assert torch.equal(after["weights.b_dec"], expected["weights.b_dec"])
    # W_enc and W_dec point the same way, at tokens of the batch
    directions = normalize(after["weights.W_dec"][dead], dim=1)
    torch.testing.assert_close(normalize(after["weights.W_enc"].T[dead], dim=1), directions)


def test_resampled_latents_fire_again(architecture, data):
    fired = []
    for fields in ({}, {"resample_every_steps": None}):
        trainer = make(architecture, data, **fields)
        run_with_dead(trainer, data, EVERY)
        run_with_dead(trainer, data, 20)
        fired.append(trainer.state()["counters.tokens_since_fired"][DEAD] < 20 * TRAINING.batch_tokens)
    assert fired[0].any() and not fired[1].any()


def test_resumed_and_repeated_runs_are_equal_bit_for_bit(architecture, data):
    whole, again, first, second = (make(architecture, data) for _ in range(4))
    run_with_dead(whole, data, 25)
    run_with_dead(again, data, 25)
    run_with_dead(first, data, EVERY - 1)
    second.load_state(first.state())
    run_with_dead(second, data, 25 - (EVERY - 1))
    for other in (again, second):
        assert all(torch.equal(tensor, other.state()[name]) for name, tensor in whole.state().items())


def test_the_seed_decides_what_is_drawn(data):
    states = [draw_inputs(torch.ones(50), 5, key).tolist() for key in ((0, 9), (0, 9), (1, 9), (0, 19))]
    assert states[0] == states[1]
    assert states[0] != states[2] and states[0] != states[3]


def test_micro_batches_draw_the_same_tokens(architecture, data):
    whole, parts = make(architecture, data), make(architecture, data, micro_batch_tokens=7)
    for trainer in (whole, parts):
        run_with_dead(trainer, data, EVERY)
    for name in ("W_enc", "W_dec"):
        a, b = (trainer.state()[f"weights.{name}"] for trainer in (whole, parts))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_second_half_of_a_run_is_left_alone(data):
    trainer, without = make("topk", data), make("topk", data, resample_every_steps=None)
    run_with_dead(without, data, 39)
    trainer.load_state(without.state())
    for one in (trainer, without):
        one._counters.tokens_since_fired[DEAD] = DEAD_AFTER
        one.train_step(data.batch(39) * 0.0 + data.calibration.mean)
    assert torch.equal(trainer.state()["weights.W_enc"], without.state()["weights.W_enc"])


def test_tokens_are_drawn_by_the_square_of_their_error():
    errors = torch.tensor([0.0, 1.0, 2.0, 3.0])
    first = [int(draw_inputs(errors, 1, (0, step))[0]) for step in range(4000)]
    shares = np.bincount(first, minlength=4) / len(first)
    np.testing.assert_allclose(shares, np.array([0, 1, 4, 9]) / 14, atol=0.025)
    assert sorted(draw_inputs(errors, 9, (0, 0)).tolist()) == [1, 2, 3]  # none twice, none without an error


def test_a_transcoder_reads_its_input_and_writes_its_target(data):
    settings = parse_settings({**SETTINGS["topk"], "resample_every_steps": EVERY, "skip": True})
    targets = data.x[:, :9] @ torch.randn(9, 9, generator=torch.Generator().manual_seed(2))
    trainer = SAETrainer(settings, TRAINING, data.calibration, target_calibration=calibrate(targets))
    for step in range(EVERY):
        trainer.sae.b_enc.data[DEAD] = -100.0
        trainer.train_step(data.batch(step), targets[step * 32 : step * 32 + 32])
    assert (trainer.state()["counters.tokens_since_fired"][DEAD] == 0).all()
    sae = trainer.sae
    sae.W_skip.data.normal_(generator=torch.Generator().manual_seed(3))
    x, y = data.x[:2], targets[:2]
    rows = resampled_rows(sae, torch.arange(48) < 2, x, y)
    torch.testing.assert_close(normalize(rows["W_enc"], dim=1), normalize(x, dim=1))
    torch.testing.assert_close(normalize(rows["W_dec"], dim=1), normalize(y - sae.b_dec - x @ sae.W_skip.T, dim=1))


@pytest.mark.parametrize(
    ("change", "training", "message"),
    [
        ({"frozen_decoder": True}, {}, "frozen_decoder is true"),
        ({"resample_every_steps": 0}, {}, "resample_every_steps is 0"),
        ({"resample_every_steps": 31}, {}, "at most 30 steps"),
        ({}, {"dead_after_tokens": 1000}, "960 tokens"),
    ],
)
def test_resampling_that_cannot_be_is_refused(change, training, message, data):
    with pytest.raises(ConfigError, match=message):
        settings = parse_settings({**SETTINGS["topk"], "resample_every_steps": EVERY, **change})
        SAETrainer(settings, TRAINING.model_copy(update=training), data.calibration)
