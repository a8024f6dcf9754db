"""What is done to activations before training and undone after, for every mode and architecture."""

from math import sqrt

import pytest
import torch

from sae_cases import SETTINGS
from sae_core import (
    ARCHITECTURES,
    SAE,
    ConfigError,
    SAEConfig,
    SAETrainer,
    StandardSAE,
    TopKSAE,
    calibrate,
    parse_settings,
)
from sae_core.normalization import PER_TOKEN, Normalizer, Whitening, scale_tokens

MODES = ("none", "expected_average_only_in", "covariance_whitening", *PER_TOKEN)


@pytest.fixture(scope="module")
def x(data):
    """Activations whose directions differ much in variance."""
    stretch = torch.logspace(-1, 1, data.x.shape[1])
    return (data.x - 0.3) * stretch + torch.linspace(-1, 2, data.x.shape[1])


def undone(mode, z_hat, x, calibration):
    """The module's docstring, read backwards."""
    if mode == "covariance_whitening":
        whitening = Whitening.of(calibration)
        return (z_hat.double() @ whitening.inverse + whitening.mean).float()
    if mode == "constant_norm_rescale":
        return z_hat * x.norm(dim=1, keepdim=True) / sqrt(x.shape[1])
    if mode == "layer_norm":
        return z_hat * x.std(dim=1, keepdim=True) + x.mean(dim=1, keepdim=True)
    return z_hat / (calibration.scale if mode == "expected_average_only_in" else 1)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", sorted(SETTINGS))
def test_what_is_exported_is_what_was_trained(architecture, mode, x, training, tmp_path):
    calibration = calibrate(x)
    settings = parse_settings({**SETTINGS[architecture], "normalize_activations": mode})
    trainer = SAETrainer(settings, training, calibration)
    for step in range(15):
        trainer.train_step(x[step * 32 : step * 32 + 32])
    assert not trainer.diverged
    trainer.export({"hook_name": "blocks.0.hook_resid_post"}, tokens=x[:2000]).save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert loaded.cfg.normalize_activations == (mode if mode in PER_TOKEN else "none")
    assert loaded.cfg.metadata["normalization"] == mode

    normalize = Normalizer(mode, calibration, torch.device("cpu"))
    state = {name[6:]: tensor for name, tensor in trainer.state().items() if name.startswith("state.")}
    trained = trainer.sae.for_use(state, normalize(x[:2000]))
    tokens = x[2000:2300]
    f, z_hat = trained.reconstruct(normalize(tokens))
    expected = undone(mode, z_hat, tokens, calibration)
    close(loaded(tokens), expected)
    assert torch.equal(loaded.encode(tokens) > 0, f > 0)
    assert 0 < (f > 0).float().mean() < 1

    # and what a step says of itself is said of that function
    if trained is trainer.sae:
        mse = (expected - tokens).square().sum(1).mean()
        metrics = trainer.train_step(tokens, want_metrics=True)
        assert metrics["mse"] == pytest.approx(mse.item(), rel=1e-3)
        assert metrics["explained_variance"] == pytest.approx(
            1 - (mse / tokens.var(0, correction=0).sum()).item(), abs=1e-3
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_start_reconstructs_the_mean(mode, x):
    """b_dec is the mean of what an SAE sees; of a mode that works token by token nearly so."""
    normalizer = Normalizer(mode, calibrate(x), torch.device("cpu"))
    z = normalizer(x)
    if mode in PER_TOKEN:
        assert (normalizer.mean - z.mean(0)).norm() < 0.5 * z.mean(0).norm()
    else:
        torch.testing.assert_close(normalizer.mean, z.mean(0), rtol=1e-4, atol=1e-4)
    assert normalizer.mean_square_norm == pytest.approx(z.square().sum(1).mean().item(), rel=0.1)


def test_by_hand():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    z, scaling = scale_tokens(x, "constant_norm_rescale")
    torch.testing.assert_close(z, torch.tensor([[0.6, 0.8], [0.0, 0.0]]) * sqrt(2))
    torch.testing.assert_close(scaling.undo(z), x)
    z, scaling = scale_tokens(x, "layer_norm")  # mean 3.5, deviation sqrt((0.25 + 0.25) / 1)
    torch.testing.assert_close(z, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]) * sqrt(0.5))
    torch.testing.assert_close(scaling.undo(z), x)
    assert scale_tokens(x, "none")[1] is None
    # the covariance of (1, 1), (-1, -1), (2, -2), (-2, 2) is [[2.5, -1.5], [-1.5, 2.5]]: 1 and 4 along the diagonals
    x = torch.tensor([[1.0, 1], [-1, -1], [2, -2], [-2, 2]]) + 5
    z = Normalizer("covariance_whitening", calibrate(x), torch.device("cpu"))(x)
    lengths = torch.tensor([2 / 1.001, 2 / 1.001, 8 / 4.001, 8 / 4.001]).sqrt()
    torch.testing.assert_close(z.norm(dim=1), lengths)
    torch.testing.assert_close(z.T @ z / 4, torch.eye(2), rtol=1e-3, atol=1e-3)


def test_directions_without_variance_are_not_blown_up(data, training):
    """Whitening divides by the deviation of each direction; one that never varies has none."""
    flat = data.x.clone()
    flat[:, :4] = 0.7
    settings = parse_settings({**SETTINGS["topk"], "normalize_activations": "covariance_whitening"})
    trainer = SAETrainer(settings, training, calibrate(flat))
    for step in range(20):
        trainer.train_step(flat[step * 32 : step * 32 + 32])
    sae = trainer.export()
    assert not trainer.diverged
    assert (sae(flat)[:, :4] - flat[:, :4]).abs().mean() < 0.05 < 0.1 * flat[:, 4:].std(0).mean()


@pytest.mark.parametrize("mode", PER_TOKEN)
def test_a_token_of_zeros_is_survived(mode, data, training):
    x = data.batch(0).clone()
    x[3] = 0
    trainer = SAETrainer(
        parse_settings({**SETTINGS["topk"], "normalize_activations": mode}), training, data.calibration
    )
    metrics = trainer.train_step(x, want_metrics=True)
    assert not trainer.diverged and metrics["mse"] > 0
    assert torch.isfinite(trainer.export()(x)).all()


def test_ranks_of_topk_are_those_of_the_whitened_activations(x, training):
    """Unwhitening changes the decoder's norms, by which a top-k SAE is trained to rank."""
    calibration = calibrate(x)
    settings = parse_settings({**SETTINGS["topk"], "normalize_activations": "covariance_whitening"})
    trainer = SAETrainer(settings, training, calibration)
    for step in range(30):
        trainer.train_step(x[step * 32 : step * 32 + 32])
    sae = trainer.export()
    normalize = Normalizer("covariance_whitening", calibration, torch.device("cpu"))
    f, ranks = sae.encode(x[:500]), trainer.sae.encode(normalize(x[:500]))
    assert torch.equal(f > 0, ranks > 0) and not sae.cfg.rescale_acts_by_decoder_norm
    # the check can fail: by the norms in raw units others are chosen
    assert not torch.equal(sae.replaced(rescale_acts_by_decoder_norm=True).encode(x[:500]) > 0, ranks > 0)
    with pytest.raises(ValueError, match="before unwhitening"):
        trainer.sae.unwhitened(Whitening.of(calibration), Whitening.of(calibration))


@pytest.mark.parametrize("architecture", ["standard", "gated", "topk", "jumprelu"])
@pytest.mark.parametrize("subtracts", [True, False])
def test_unwhitening_is_exact_with_and_without_b_dec_on_the_input(architecture, subtracts, x):
    generator = torch.Generator().manual_seed(1)
    k = {"k": 5} if architecture == "topk" else {}
    cfg = SAEConfig(architecture=architecture, d_in=16, d_sae=24, apply_b_dec_to_input=subtracts, **k)
    cls = ARCHITECTURES[architecture]
    weights = {name: torch.randn(s, generator=generator).double() * 0.5 for name, s in cls.shapes(cfg).items()}
    sae, whitening = cls(cfg, weights), Whitening.of(calibrate(x))
    tokens = x[:200].double()
    z = (tokens - whitening.mean) @ whitening.matrix
    raw = sae.unwhitened(whitening, whitening)
    torch.testing.assert_close(raw.encode(tokens), sae.encode(z))
    torch.testing.assert_close(raw(tokens), sae(z) @ whitening.inverse + whitening.mean)


def make_hook_z(**fields):
    cfg = SAEConfig(architecture="standard", d_in=12, d_sae=20, reshape_activations="hook_z", **fields)
    generator = torch.Generator().manual_seed(0)
    shapes = StandardSAE.shapes(cfg)
    return StandardSAE(cfg, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


@pytest.mark.parametrize("mode", ["none", *PER_TOKEN])
def test_heads_come_back_as_they_came(mode, tmp_path):
    sae = make_hook_z(normalize_activations=mode, metadata={"hook_name": "blocks.1.attn.hook_z"})
    sae.save(tmp_path)
    sae = SAE.load(tmp_path)
    heads = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(1))
    flat = heads.flatten(-2)
    assert sae.encode(heads).shape == (2, 5, 20) and sae(heads).shape == heads.shape
    assert torch.equal(sae.encode(heads), sae.encode(flat))
    assert torch.equal(sae(heads).flatten(-2), sae(flat))
    assert torch.equal(sae.decode(sae.encode(heads), heads), sae(heads))


def test_heads_are_accepted_only_where_the_configuration_says_so():
    sae = make_hook_z()
    with pytest.raises(ConfigError, match=r"shape \[5, 3, 5\]; accepted: \[..., d_in\] or \[..., n_heads, d_head\]"):
        sae.encode(torch.zeros(5, 3, 5))
    plain = sae.replaced(reshape_activations="none")
    with pytest.raises(ConfigError, match=r"shape \[2, 3, 4\]; accepted: \[..., d_in\] with d_in 12"):
        plain.encode(torch.zeros(2, 3, 4))
    with pytest.raises(ConfigError, match=r"shape \[\]"):
        plain.encode(torch.zeros(()))


@pytest.mark.parametrize("mode", PER_TOKEN)
def test_decoding_asks_for_the_activations_where_they_set_the_scale(mode, data):
    cfg = SAEConfig(architecture="topk", d_in=16, d_sae=24, k=3, normalize_activations=mode)
    generator = torch.Generator().manual_seed(0)
    sae = TopKSAE(cfg, {name: torch.randn(s, generator=generator) for name, s in TopKSAE.shapes(cfg).items()})
    f = sae.encode(data.x[:3])
    with pytest.raises(ConfigError, match=f"normalize_activations {mode}: decode"):
        sae.decode(f)
    assert torch.equal(sae.decode(f, data.x[:3]), sae(data.x[:3]))
