"""Every form of SAE that the released sae_lens saves or loads, both ways, and its training checkpoints."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file

from sae_core import ARCHITECTURES, SAE, CheckpointError, SAEConfig, calibrate
from sae_core.normalization import PER_TOKEN, Normalizer, Whitening

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

D_IN, D_SAE, D_OUT = 16, 40, 12
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SAES = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": 5},
    "topk, ranked by decoder norms": {"k": 5, "rescale_acts_by_decoder_norm": True},
}
TRANSCODERS = {
    "transcoder": (sae_lens.Transcoder, sae_lens.TranscoderConfig),
    "skip_transcoder": (sae_lens.SkipTranscoder, sae_lens.SkipTranscoderConfig),
    "jumprelu_transcoder": (sae_lens.JumpReLUTranscoder, sae_lens.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (sae_lens.JumpReLUSkipTranscoder, sae_lens.JumpReLUSkipTranscoderConfig),
}
CLASSES_THERE = {
    "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig),
    "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig),
    "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig),
    "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig),
    **TRANSCODERS,
}


def activations(tokens: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, D_IN, generator=generator) @ torch.randn(D_IN, D_IN, generator=generator) + 0.5


def random_theirs(name: str, **config):
    cls, config_cls = CLASSES_THERE[name]
    theirs = cls(config_cls(d_in=D_IN, d_sae=D_SAE, **config))
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return theirs


def random_ours(architecture: str, **fields):
    cls, generator = ARCHITECTURES[architecture], torch.Generator().manual_seed(2)
    cfg = SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, **fields)
    return cls(cfg, {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in cls.shapes(cfg).items()})


@torch.no_grad()
def assert_alike(ours, theirs, x):
    f = ours.encode(x)
    assert (f > 0).any()
    torch.testing.assert_close(f, theirs.encode(x), **CLOSE)
    torch.testing.assert_close(ours(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("reshape", ["none", "hook_z"])
@pytest.mark.parametrize("normalize", ["none", *PER_TOKEN])
@pytest.mark.parametrize("case", SAES)
def test_saes_both_ways(case, normalize, reshape, tmp_path):
    config = {**SAES[case], "normalize_activations": normalize, "reshape_activations": reshape}
    theirs = random_theirs(case.split(",")[0], **config)
    theirs.cfg.metadata.hook_name = "blocks.0.attn.hook_z"
    x = activations().view(300, 4, 4) if reshape == "hook_z" else activations()
    assert theirs(x).shape == x.shape
    theirs.save_model(tmp_path / "theirs")
    ours = SAE.load(tmp_path / "theirs")
    assert (ours.cfg.normalize_activations, ours.cfg.reshape_activations) == (normalize, reshape)
    assert_alike(ours, theirs, x)
    with torch.no_grad():
        theirs_of_latents = (theirs.encode(x), theirs.decode(ours.encode(x)))[1]
        torch.testing.assert_close(ours.decode(ours.encode(x), x), theirs_of_latents, **CLOSE)
    ours.save(tmp_path / "ours")
    assert_alike(ours, sae_lens.SAE.load_from_disk(tmp_path / "ours"), x)


@pytest.mark.parametrize("d_out", [D_IN, D_OUT])
@pytest.mark.parametrize("name", TRANSCODERS)
def test_transcoders_both_ways(name, d_out, tmp_path):
    theirs = random_theirs(name, d_out=d_out, apply_b_dec_to_input=False)
    theirs.cfg.metadata.hook_name = "blocks.1.ln2.hook_normalized"
    theirs.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    theirs.save_model(tmp_path / "theirs")
    ours = SAE.load(tmp_path / "theirs")
    assert ours.cfg.is_transcoder and ours.d_out == d_out and ours.cfg.skip == ("skip" in name)
    assert ours.cfg.metadata["hook_name_out"] == "blocks.1.hook_mlp_out"
    x = activations()
    assert_alike(ours, theirs, x)
    ours.save(tmp_path / "ours")
    again = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert type(again) is type(theirs) and again.cfg.metadata.hook_name_out == "blocks.1.hook_mlp_out"
    assert_alike(ours, again, x)
    before = again(x)
    again.fold_W_dec_norm()
    torch.testing.assert_close(again(x), before, **CLOSE)


def test_their_decode_leaves_the_skip_connection_out_and_ours_asks_for_the_input(tmp_path):
    theirs = random_theirs("skip_transcoder", d_out=D_OUT, apply_b_dec_to_input=False)
    theirs.save_model(tmp_path)
    ours, x = SAE.load(tmp_path), activations()
    with torch.no_grad():
        f = theirs.encode(x)
        torch.testing.assert_close(ours.decode(f, x), theirs.decode(f) + x @ theirs.W_skip.T, **CLOSE)
        torch.testing.assert_close(ours.decode(f, x), theirs(x), **CLOSE)


def test_a_topk_transcoder_is_read_by_this_library_alone(tmp_path):
    ours = random_ours("topk", d_out=D_OUT, skip=True, k=5, apply_b_dec_to_input=False)
    ours.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path)(activations()), ours(activations()))
    with pytest.raises(KeyError, match="topk_skip_transcoder"):
        sae_lens.SAE.load_from_disk(tmp_path)


@pytest.mark.parametrize("architecture", ["abstopk", "matching_pursuit"])
def test_other_saes_of_theirs_are_refused_by_name(architecture, tmp_path):
    cls, config_cls = sae_lens.registry.get_sae_class(architecture)
    extra = {"k": 5} if architecture == "abstopk" else {}
    cls(config_cls(d_in=D_IN, d_sae=D_SAE, **extra)).save_model(tmp_path)
    with pytest.raises(CheckpointError, match=f"unknown architecture '{architecture}'.*accepted: standard, gated, "):
        SAE.load(tmp_path)


TRAINED = {
    "standard": ("standard", {"l1_coefficient": 0.3}),
    "gated": ("gated", {"l1_coefficient": 0.3}),
    "jumprelu": ("jumprelu", {"l0_coefficient": 0.1}),
    "topk": ("topk", {"k": 5}),
    "topk, ranked by pre-activations": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
    "batchtopk": ("batchtopk", {"k": 4.5, "topk_threshold_lr": 0.2}),
    "batchtopk, ranked by pre-activations": (
        "batchtopk", {"k": 4.5, "topk_threshold_lr": 0.2, "rescale_acts_by_decoder_norm": False}
    ),
    "matryoshka_batchtopk": (
        "matryoshka_batchtopk", {"k": 5, "topk_threshold_lr": 0.2, "matryoshka_widths": [10, 40]}
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("case", "normalize"),
    [
        (case, normalize)
        for case in TRAINED
        for normalize in ("none", "expected_average_only_in", "covariance_whitening", *PER_TOKEN)
        if not (case == "matryoshka_batchtopk" and normalize in PER_TOKEN)  # their first step raises
    ],
)
@pytest.mark.parametrize("subtracts", [True, False])
def test_their_training_checkpoints_load_as_what_they_export(case, subtracts, normalize, tmp_path):
    """The checkpoint in the middle holds the weights of normalised activations; SAELens itself loads it as if they
    were of raw ones."""
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    architecture, settings = TRAINED[case]
    cls, config_cls = sae_lens.registry.get_sae_training_class(architecture)
    torch.manual_seed(0)
    sae = cls(
        config_cls(
            d_in=D_IN, d_sae=D_SAE, normalize_activations=normalize, apply_b_dec_to_input=subtracts, **settings
        )
    )
    x = activations(2048)
    cfg = SAETrainerConfig(
        total_training_samples=30 * 64, train_batch_size_samples=64, lr=3e-3, lr_end=3e-3,
        n_batches_for_norm_estimate=32, logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    trainer = SAETrainer(cfg, sae, iter(x.repeat(3, 1).split(64)))
    scaler = trainer.activation_scaler
    if normalize == "expected_average_only_in":
        scaler.estimate_scaling_factor(D_IN, trainer.data_provider, 32)
    if normalize == "covariance_whitening":
        scaler.estimate_whitening(D_IN, trainer.data_provider, 32)
    for _ in range(30):
        trainer.step(next(trainer.data_provider))
        trainer.n_training_steps += 1
    trainer.save_checkpoint("middle", tmp_path)
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    scaler.scaling_factor = scaler.whitening = None
    trainer.save_checkpoint("final", tmp_path)
    sae.save_inference_model(tmp_path / "exported")

    theirs = sae_lens.SAE.load_from_disk(tmp_path / "exported")
    x = x[:300]
    exported = SAE.load(tmp_path / "exported")
    assert_alike(exported, theirs, x)
    for name in ("middle", "final"):
        ours = SAE.load(tmp_path / name)
        assert ours.cfg.architecture == theirs.cfg.architecture()
        assert ours.cfg.normalize_activations == (normalize if normalize in PER_TOKEN else "none")
        assert_alike(ours, theirs, x)
        if architecture == "matryoshka_batchtopk":
            assert ours.prefix_widths == exported.prefix_widths == (10,)
            f = theirs.encode(x)[:, :10]
            torch.testing.assert_close(ours.prefix(10)(x), f @ theirs.W_dec[:10] + theirs.b_dec, **CLOSE)


def test_scale_and_whitening_are_theirs_on_the_same_activations():
    from sae_lens.training.activation_scaler import ActivationScaler

    x = activations(2048)
    scaler, calibration = ActivationScaler(), calibrate(x)
    scaler.estimate_scaling_factor(D_IN, iter(x.split(64)), 32)
    assert calibration.scale == pytest.approx(scaler.scaling_factor, rel=1e-6)
    scaler = ActivationScaler()
    scaler.estimate_whitening(D_IN, iter(x.split(64)), 32)
    ours, theirs = Whitening.of(calibration), scaler.whitening
    torch.testing.assert_close(ours.mean, theirs.mean, rtol=1e-6, atol=1e-6)
    # directions may be mirrored, and they divide by n - 1 where this library divides by n
    covariance = ours.inverse.T @ ours.inverse - 1e-3 * torch.eye(D_IN)
    their_covariance = theirs.inverse_matrix.T @ theirs.inverse_matrix - 1e-3 * torch.eye(D_IN)
    torch.testing.assert_close(covariance * (2048 / 2047), their_covariance, rtol=1e-5, atol=1e-5)
    z = Normalizer("covariance_whitening", calibration, torch.device("cpu"))(x).double()
    theirs_z = scaler(x.double())
    torch.testing.assert_close(z.abs(), theirs_z.abs(), rtol=1e-3, atol=1e-3)


def test_a_checkpoint_whose_scale_is_wrong_is_refused(tmp_path):
    sae = random_theirs("standard", normalize_activations="expected_average_only_in")
    sae.save_model(tmp_path)
    for content, message in [
        ({"scaling_factor": None, "has_whitening": False}, "activation_scaler.json: scaling_factor is None"),
        ({"scaling_factor": 0}, "scaling_factor is 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor is nan"),
        ({"scaling_factor": True}, "scaling_factor is True"),
        ([], "expected a JSON object"),
    ]:
        (tmp_path / "activation_scaler.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=message):
            SAE.load(tmp_path)


def test_whitening_of_another_size_is_refused(tmp_path):
    from sae_lens.training.activation_scaler import ActivationScaler

    random_theirs("standard", normalize_activations="covariance_whitening").save_model(tmp_path)
    with pytest.raises(CheckpointError, match="activation_scaler.json is missing"):
        SAE.load(tmp_path)
    scaler = ActivationScaler()
    scaler.estimate_whitening(8, iter(torch.randn(4, 32, 8)), 4)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    with pytest.raises(CheckpointError, match=r"activation_whitening.safetensors: mean has shape \[8\]"):
        SAE.load(tmp_path)
    (tmp_path / "activation_whitening.safetensors").unlink()
    with pytest.raises(CheckpointError, match="activation_whitening.safetensors is missing"):
        SAE.load(tmp_path)


def test_older_jumprelu_checkpoints_keep_the_logarithm_of_the_threshold(tmp_path):
    from safetensors.torch import save_file

    theirs = random_theirs("jumprelu")
    theirs.threshold.data = theirs.threshold.data.abs() + 0.01
    theirs.save_model(tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["log_threshold"] = tensors.pop("threshold").log()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    assert_alike(SAE.load(tmp_path), theirs, activations())
