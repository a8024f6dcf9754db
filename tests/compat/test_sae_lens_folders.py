"""Against the released sae_lens package: folders in both directions."""

import warnings

import pytest
import torch

from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, parse_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

D_IN, D_SAE = 16, 40
SETTINGS = {
    "standard": {"architecture": "standard", "d_sae": D_SAE, "l1_coefficient": 0.3},
    "gated": {"architecture": "gated", "d_sae": D_SAE, "l1_coefficient": 0.3},
    "topk": {"architecture": "topk", "d_sae": D_SAE, "k": 5},
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def activations(tokens: int = 600, d_in: int = D_IN) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator) + 0.5


def train(settings: dict, x: torch.Tensor) -> SAETrainer:
    training = TrainingSettings(steps=60, batch_tokens=64, lr=3e-3, dead_after_tokens=500)
    trainer = SAETrainer(parse_settings(settings), training, calibrate(x))
    for step in range(training.steps):
        start = step * 64 % (len(x) - 64)
        trainer.train_step(x[start : start + 64])
    return trainer


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("architecture", sorted(SETTINGS))
def test_our_folders_load_in_sae_lens(architecture, frozen, tmp_path):
    x = activations()
    trainer = train({**SETTINGS[architecture], "frozen_decoder": frozen}, x)
    metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post", "context_size": 128, "prepend_bos": True}
    ours = trainer.export(metadata)
    ours.save(tmp_path, sparsity=trainer.sparsity())
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == architecture
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.context_size == 128
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
        before = theirs(x)
        theirs.fold_W_dec_norm()
        torch.testing.assert_close(theirs(x), before, **CLOSE)


@pytest.mark.parametrize("normalize", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("architecture", ["batch_topk", "matryoshka"])
def test_an_sae_trained_by_batches_loads_in_sae_lens_as_a_jumprelu_sae(architecture, normalize, tmp_path):
    x = activations()
    settings = {"architecture": architecture, "d_sae": D_SAE, "k": 4.5, "normalize_activations": normalize}
    trainer = train(settings, x)
    for name, tokens in (("calibrated", x), ("remembered", None)):
        ours = trainer.export({"hook_name": "blocks.3.hook_resid_post"}, tokens=tokens)
        ours.save(tmp_path / name, sparsity=trainer.sparsity())
        theirs = sae_lens.SAE.load_from_disk(tmp_path / name)
        assert theirs.cfg.architecture() == "jumprelu"
        with torch.no_grad():
            torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
            torch.testing.assert_close(ours(x), theirs(x), **CLOSE)
            assert (theirs.encode(x) > 0).sum(1).float().mean().item() == pytest.approx(4.5, rel=0.1)
        for width in ours.prefix_widths:
            prefix = SAE.load(tmp_path / name).prefix(width)
            prefix.save(tmp_path / f"{name}-{width}")
            their_prefix = sae_lens.SAE.load_from_disk(tmp_path / f"{name}-{width}")
            with torch.no_grad():
                torch.testing.assert_close(prefix(x), their_prefix(x), **CLOSE)
                torch.testing.assert_close(their_prefix.encode(x), theirs.encode(x)[:, :width], **CLOSE)


def random_theirs(name: str, **config):
    cls, config_cls = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    }[name]
    theirs = cls(config_cls(d_in=D_IN, d_sae=D_SAE, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    theirs.cfg.metadata.hook_name = "blocks.0.hook_mlp_out"
    return theirs


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("gated", {}),
        ("topk", {"k": 7}),
        ("topk", {"k": 7, "rescale_acts_by_decoder_norm": True}),
        ("jumprelu", {}),
    ],
)
def test_their_folders_load_in_ours(name, config, tmp_path):
    theirs = random_theirs(name, **config)
    theirs.save_model(tmp_path)
    ours = SAE.load(tmp_path)
    assert ours.cfg.architecture == name
    assert ours.cfg.metadata["hook_name"] == "blocks.0.hook_mlp_out"
    x = activations()
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(x), theirs.encode(x), **CLOSE)
        torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


def test_a_rescaled_topk_sae_survives_the_way_there_and_back(tmp_path):
    random_theirs("topk", k=7, rescale_acts_by_decoder_norm=True).save_model(tmp_path / "theirs")
    ours = SAE.load(tmp_path / "theirs")
    ours.save(tmp_path / "ours")
    x = activations()
    with torch.no_grad():
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
        torch.testing.assert_close(theirs.encode(x), ours.encode(x), **CLOSE)
