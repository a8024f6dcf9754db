"""Matryoshka SAEs: their widths, and what their prefixes are."""

import pytest
import torch

from sae_cases import make_data
from sae_core import SAE, CheckpointError, ConfigError, MatryoshkaSettings, SAETrainer, TrainingSettings, parse_settings

SETTINGS = {"architecture": "matryoshka", "d_sae": 64, "k": 4, "widths": (8, 24, 64)}


@pytest.fixture(scope="module")
def wide():
    return make_data(n=48, d_in=32, tokens=20_000, active=0.08)


def trained(data, **settings) -> SAETrainer:
    training = TrainingSettings(steps=300, batch_tokens=128, lr=3e-3, dead_after_tokens=10_000)
    trainer = SAETrainer(parse_settings({**SETTINGS, **settings}), training, data.calibration)
    for step in range(training.steps):
        trainer.train_step(data.batch(step, 128))
    return trainer


@pytest.mark.parametrize(
    ("d_sae", "widths"),
    [(64, (4, 8, 16, 32, 64)), (40, (5, 10, 20, 40)), (12, (3, 6, 12)), (7, (7,))],
)
def test_widths_are_halves_unless_told(d_sae, widths):
    settings = MatryoshkaSettings(d_sae=d_sae, k=1)
    assert settings.all_widths == widths
    assert settings.prefix_widths == widths[:-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 24)}, r"widths is \[8, 24\]: the last must be d_sae \(64\)"),
        ({"widths": (24, 8, 64)}, "above the one before"),
        ({"widths": (8, 8, 64)}, "above the one before"),
        ({"widths": (0, 64)}, "above 0"),
        ({"widths": ()}, r"widths is \[\]: each must"),
        ({"widths": (8, 80)}, "the last must be d_sae"),
        ({"widths": (8.5, 64)}, "widths.0 is 8.5"),
        ({"prefix_weights": (1, 1)}, r"prefix_weights is \[1.0, 1.0\]: accepted are 3 numbers above 0"),
        ({"prefix_weights": (1, 0, 1)}, "3 numbers above 0"),
        ({"k": 65}, r"k is 65.*d_sae \(64\)"),
    ],
)
def test_wrong_widths_and_weights_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        parse_settings({**SETTINGS, **change})


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening", "layer_norm"])
def test_a_prefix_is_the_first_latents_as_an_sae_of_its_own(wide, normalize, tmp_path):
    exported = trained(wide, normalize_activations=normalize).export({"hook_name": "h"}, tokens=wide.x)
    exported.save(tmp_path / "whole")
    sae, x = SAE.load(tmp_path / "whole"), wide.x[:300]
    assert exported.prefix_widths == sae.prefix_widths == (8, 24)
    f = sae.encode(x)
    for width in sae.prefix_widths:
        prefix = sae.prefix(width)
        assert prefix.d_sae == width and prefix.cfg.metadata["prefix_of"] == 64
        torch.testing.assert_close(prefix.encode(x), f[:, :width])
        cut = torch.cat([f[:, :width], torch.zeros(300, 64 - width)], 1)
        torch.testing.assert_close(prefix(x), sae.decode(cut, x))
        prefix.save(tmp_path / str(width))
        loaded = SAE.load(tmp_path / str(width))
        assert torch.equal(loaded(x), prefix(x))
        assert loaded.cfg.metadata["hook_name"] == "h"
    narrow = sae.prefix(24).prefix(8)
    assert narrow.prefix_widths == () and narrow.cfg.metadata["prefix_of"] == 64
    assert torch.equal(narrow(x), sae.prefix(8)(x))


def test_a_width_that_is_none_is_refused(wide):
    training = TrainingSettings(steps=1, batch_tokens=8, dead_after_tokens=8)
    sae = SAETrainer(parse_settings(SETTINGS), training, wide.calibration).export()
    for width in (64, 9):
        with pytest.raises(ConfigError, match=f"no prefix has width {width}; accepted: 8, 24"):
            sae.prefix(width)
    for widths in ([8, 24], [24, 8, 64], ["8", 64], 8, []):
        damaged = sae.replaced(metadata={"matryoshka": {"widths": widths}})
        with pytest.raises(CheckpointError, match="metadata.matryoshka is"):
            _ = damaged.prefix_widths


def test_prefixes_explain_more_than_the_first_latents_of_another_sae(wide):
    x = wide.x[-4000:]
    variance = (x - x.mean(0)).square().sum()

    def explained(settings: dict) -> list[float]:
        sae = trained(wide, **settings).export(tokens=wide.x[:4000])
        f = sae.encode(x)
        x_hats = (f[:, :width] @ sae.W_dec[:width] + sae.b_dec for width in (8, 24, 64))
        return [1 - ((x_hat - x).square().sum() / variance).item() for x_hat in x_hats]

    nested, plain = explained({}), explained({"prefix_weights": (1e-9, 1e-9, 1)})
    assert nested[0] > plain[0] + 0.1 and nested[1] > plain[1] + 0.1
    assert 0.3 < nested[0] < nested[1] < nested[2]
