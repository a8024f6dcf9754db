"""SAEs that read one hook point and reconstruct another, with and without a skip connection."""

import pytest
import torch
from torch.nn.functional import normalize

from sae_cases import SETTINGS
from sae_core import (
    ARCHITECTURES,
    SAE,
    CheckpointError,
    ConfigError,
    SAETrainer,
    TrainingSettings,
    calibrate,
    parse_settings,
)
from sae_core.kernels import active
from sae_core.normalization import PER_TOKEN, Normalizer, Whitening
from sae_core.sae import Gradients, SAEConfig, StepContext

D_IN, D_OUT, D_SAE, TOKENS = 6, 5, 10, 16
TRANSCODING = [name for name in sorted(SETTINGS) if ARCHITECTURES[name].can_transcode]


def settings_of(architecture, **changes):
    return parse_settings({**SETTINGS[architecture], **changes})


def with_skip(architecture):
    return "skip" in ARCHITECTURES[architecture].settings_type.model_fields


def cases():
    return [(name, skip) for name in TRANSCODING for skip in (False, True) if not skip or with_skip(name)]


# ---- gradients ----


def make(architecture, d_out=D_OUT, skip=False, subtracts=False, **fields):
    """An SAE of float64 with random weights; thresholds are such that some pairs are near them."""
    generator = torch.Generator().manual_seed(5)
    cls = ARCHITECTURES[architecture]
    settings = settings_of(architecture, d_sae=D_SAE)
    cfg = SAEConfig(
        architecture=architecture, d_in=D_IN, d_sae=D_SAE, d_out=d_out, dtype="float64",
        apply_b_dec_to_input=subtracts, **{**settings.config_fields(), "skip": skip, **fields},
    )  # fmt: skip
    shapes = cls.shapes(cfg)
    return cls(cfg, {name: torch.randn(shape, generator=generator).double() * 0.5 for name, shape in shapes.items()})


def gradients_of(sae, x, target, dead=None):
    settings = settings_of(sae.cfg.architecture, d_sae=D_SAE)
    gradients = Gradients(frozenset(name for name, _ in sae.named_parameters()))
    with torch.no_grad():
        terms = sae.accumulate_gradients(x, target, gradients, StepContext(TOKENS, 0.7, dead, settings=settings))
    return terms, gradients


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(TOKENS, width, generator=generator).double() * 2 for width in (D_IN, D_OUT))


def plain_loss(architecture, w, x, target, dead):
    """Standard and top-k, with the transcoder's pre-activations: nothing is subtracted from x."""
    pre = x @ w["W_enc"] + w["b_enc"]
    skipped = x @ w["W_skip"].T if "W_skip" in w else 0
    norms = w["W_dec"].norm(dim=1)
    if architecture == "standard":
        x_hat = torch.relu(pre) @ w["W_dec"] + w["b_dec"] + skipped
        return ((x_hat - target).square().sum(1) + 0.7 * (torch.relu(pre) * norms).sum(1)).mean()

    def chosen(ranks, k):
        return torch.zeros_like(pre).scatter(1, ranks.topk(k, dim=1).indices, 1.0)

    x_hat = (torch.relu(pre) * chosen(pre * norms, 3)) @ w["W_dec"] + w["b_dec"] + skipped
    loss = (x_hat - target).square().sum(1).mean()
    if dead is not None:
        n_dead, most = int(dead.sum()), D_IN // 2
        z = torch.relu(pre) * chosen((pre * norms).masked_fill(~dead, -torch.inf), min(most, n_dead))
        aux = (z @ w["W_dec"] - (target - x_hat).detach()).square().sum(1).mean()
        loss = loss + 0.7 * min(n_dead / most, 1) * aux
    return loss


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("architecture", "n_dead"), [("standard", 0), ("topk", 0), ("topk", 2), ("topk", 7)])
def test_gradients_equal_autograd_of_the_plain_formula(architecture, n_dead, skip, path, batch, monkeypatch):
    monkeypatch.setitem(active.SPARSE_BELOW, "cpu", {"dense": 0.0, "sparse": 2.0}[path])
    k = {"k": 3} if architecture == "topk" else {}
    sae = make(architecture, skip=skip, **k)
    dead = torch.arange(D_SAE) < n_dead if n_dead else None
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in sae.named_parameters()}
    expected = plain_loss(architecture, weights, *batch, dead)
    expected.backward()
    terms, gradients = gradients_of(sae, *batch, dead)
    torch.testing.assert_close(terms.loss, expected.detach())
    assert gradients.keys() == weights.keys()
    for name, tensor in weights.items():
        gradient = gradients[name].T if name == "W_enc" else gradients[name]
        torch.testing.assert_close(gradient, tensor.grad, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(terms.error, sae(batch[0]) - batch[1])


@pytest.mark.parametrize("n_dead", [0, 4])
@pytest.mark.parametrize("architecture", TRANSCODING)
def test_without_b_dec_and_skip_a_transcoder_to_its_own_input_is_an_sae(architecture, n_dead, batch):
    """Every architecture's gradients as an SAE are tested elsewhere: where both are the same function, so must be the
    gradients, but for that of b_dec, which an SAE uses twice."""
    x, dead = batch[0], torch.arange(D_SAE) < n_dead if n_dead else None
    transcoder, sae = make(architecture, d_out=D_IN), make(architecture, d_out=None, subtracts=True)
    for each in (transcoder, sae):
        each.b_dec.zero_()
    terms, gradients = gradients_of(transcoder, x, x, dead)
    expected_terms, expected = gradients_of(sae, x, x, dead)
    torch.testing.assert_close(terms.loss, expected_terms.loss)
    assert torch.equal(terms.fired, expected_terms.fired)
    for name in expected.keys() - {"b_dec"}:
        torch.testing.assert_close(gradients[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(gradients["b_dec"], terms.error.sum(0) * (2 / TOKENS))


@pytest.mark.parametrize("architecture", [name for name in TRANSCODING if with_skip(name)])
def test_a_skip_connection_is_a_target_less_what_it_says(architecture, batch):
    x, target = batch
    dead = torch.arange(D_SAE) < 4
    skipping = make(architecture, skip=True)
    own = {name: tensor for name, tensor in skipping.named_parameters() if name != "W_skip"}
    plain = type(skipping)(skipping.cfg.model_copy(update={"skip": False}), own)
    terms, gradients = gradients_of(skipping, x, target, dead)
    expected_terms, expected = gradients_of(plain, x, target - x @ skipping.W_skip.T, dead)
    torch.testing.assert_close(terms.loss, expected_terms.loss)
    torch.testing.assert_close(gradients.pop("W_skip"), (2 / TOKENS) * expected_terms.error.T @ x)
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], msg=lambda m, name=name: f"{name}: {m}")


# ---- a trainer ----


@pytest.fixture(scope="module")
def pair(data):
    """What is read and what is written, of other width, scale and mean."""
    generator = torch.Generator().manual_seed(1)
    target = torch.relu(data.x @ torch.randn(16, 20, generator=generator)) @ torch.randn(20, 12, generator=generator)
    return data.x, target * 40 + 7


def trainer_of(architecture, pair, training, micro_batch_tokens=None, **changes):
    x, target = pair
    return SAETrainer(
        settings_of(architecture, **changes), training, calibrate(x), target_calibration=calibrate(target),
        micro_batch_tokens=micro_batch_tokens,
    )  # fmt: skip


def run(trainer, pair, steps):
    for _ in range(steps):
        here = slice(trainer.steps_done * 32, trainer.steps_done * 32 + 32)
        trainer.train_step(pair[0][here], pair[1][here])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("mode", ["none", "expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize(("architecture", "skip"), cases())
def test_both_normalisations_are_folded(architecture, skip, mode, pair, training, tmp_path):
    changes = {"skip": True} if skip else {}
    trainer = trainer_of(architecture, pair, training, normalize_activations=mode, **changes)
    run(trainer, pair, 15)
    trainer.export({"hook_name": "a", "hook_name_out": "b"}, tokens=pair[0][:2000]).save(tmp_path)
    sae = SAE.load(tmp_path)
    reads, writes = (Normalizer(mode, calibrate(side), torch.device("cpu")) for side in pair)
    state = {name[6:]: tensor for name, tensor in trainer.state().items() if name.startswith("state.")}
    trained = trainer.sae.for_use(state, reads(pair[0][:2000]))
    x = pair[0][2000:2300]
    f, z_hat = trained.reconstruct(reads(x))
    if mode == "covariance_whitening":
        whitening = Whitening.of(calibrate(pair[1]))
        expected = (z_hat.double() @ whitening.inverse + whitening.mean).float()
    else:
        expected = z_hat / writes.scale
    assert sae(x).shape == (300, 12) and sae.cfg.is_transcoder and not sae.cfg.apply_b_dec_to_input
    torch.testing.assert_close(sae(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(sae.encode(x) > 0, f > 0)
    if mode != "covariance_whitening":
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(48))
    assert sae.cfg.metadata["hook_name_out"] == "b"


@pytest.mark.parametrize("architecture", TRANSCODING)
def test_the_start(architecture, pair, training):
    sae = trainer_of(architecture, pair, training).sae
    scale, mean = calibrate(pair[1]).scale, calibrate(pair[1]).mean
    torch.testing.assert_close(sae.b_dec.data, mean * scale)
    assert sae.W_enc.shape == (16, 48) and sae.W_dec.shape == (48, 12)
    torch.testing.assert_close(sae.W_enc.norm(dim=0), sae.W_dec.norm(dim=1))


@pytest.mark.parametrize("architecture", TRANSCODING)
def test_metrics_are_of_the_target_in_its_own_units(architecture, pair, training):
    trainer = trainer_of(architecture, pair, training)
    run(trainer, pair, 10)
    x, target = (side[320:352] for side in pair)
    reads, writes = (calibrate(side).scale for side in pair)
    error = trainer.sae(x * reads) / writes - target
    metrics = trainer.train_step(x, target, want_metrics=True)
    mse, variance = error.square().sum(1).mean(), target.var(0, correction=0).sum()
    assert metrics["mse"] == pytest.approx(mse.item(), rel=1e-3)
    assert metrics["explained_variance"] == pytest.approx(1 - (mse / variance).item(), abs=1e-3)


@pytest.mark.parametrize(("architecture", "skip"), cases())
def test_resumed_training_is_uninterrupted_training(architecture, skip, pair, training):
    changes = {"skip": True} if skip else {}
    whole, first, second = (trainer_of(architecture, pair, training, **changes) for _ in range(3))
    run(whole, pair, 20)
    run(first, pair, 11)
    assert ("weights.W_skip" in first.state()) == ("adam.exp_avg.W_skip" in first.state()) == skip
    second.load_state(first.state())
    assert equal(second.state(), first.state())
    run(second, pair, 9)
    assert equal(second.state(), whole.state())
    with pytest.raises(CheckpointError):  # an SAE's state is none of a transcoder's
        second.load_state(SAETrainer(settings_of(architecture), training, calibrate(pair[0])).state())


@pytest.mark.parametrize(("architecture", "skip"), cases())
def test_micro_batches_are_the_same_maths(architecture, skip, pair, training):
    changes = {"skip": True} if skip else {}
    whole, parts = (trainer_of(architecture, pair, training, size, **changes) for size in (None, 7))
    for trainer in (whole, parts):
        run(trainer, pair, 8)
    in_parts = parts.state()
    for name, tensor in whole.state().items():
        torch.testing.assert_close(in_parts[name], tensor, rtol=1e-4, atol=1e-5)


def test_wrong_targets_are_refused(pair, training, data):
    trainer = trainer_of("topk", pair, training)
    x, target = (side[:32] for side in pair)
    cases = [
        ((x,), "a transcoder's batch has a target"),
        ((x, target[:, :11]), r"shape \[32, 11\]; accepted: \[tokens, d_out\], here \[32, 12\]"),
        ((x, target[:31]), r"shape \[31, 12\]"),
        ((x, x), r"shape \[32, 16\]"),
        ((target, target), "d_in 16"),
    ]
    before = trainer.state()
    for given, message in cases:
        with pytest.raises(ConfigError, match=message):
            trainer.train_step(*given)
    assert equal(trainer.state(), before)
    with pytest.raises(ConfigError, match="an SAE has no target"):
        SAETrainer(settings_of("topk"), training, data.calibration).train_step(x, x)


def test_what_cannot_be_a_transcoder_is_refused(pair, training, data):
    for mode in PER_TOKEN:
        with pytest.raises(ConfigError, match=f"{mode}.*says nothing of a transcoder's output; accepted: none, expec"):
            trainer_of("topk", pair, training, normalize_activations=mode)
    for name in sorted(set(SETTINGS) - set(TRANSCODING)):
        with pytest.raises(ConfigError, match=f"{name}.*cannot be a transcoder; accepted: standard"):
            trainer_of(name, pair, training)
    with pytest.raises(ConfigError, match="skip is true"):
        SAETrainer(settings_of("topk", skip=True), training, data.calibration)


def test_decoding_asks_for_the_input_where_it_is_skipped_over(pair, training):
    sae = trainer_of("topk", pair, training, skip=True).export()
    sae = sae.replaced({"W_skip": torch.randn(12, 16, generator=torch.Generator().manual_seed(0))})
    x = pair[0][:5]
    with pytest.raises(ConfigError, match=r"for its skip connection: decode\(f, x\)"):
        sae.decode(sae.encode(x))
    assert torch.equal(sae.decode(sae.encode(x), x), sae(x))


def test_a_transcoder_is_differentiable_in_its_input(pair, training):
    x = pair[0][:5].clone().requires_grad_()
    trainer_of("standard", pair, training, skip=True).export()(x).square().sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


LEARNT = {
    "standard": {"l1_coefficient": 0.5, "l1_warm_up_steps": 50},
    "topk": {"k": 2},
    "jumprelu": {"l0_coefficient": 0.2, "l0_warm_up_steps": 100, "threshold_at_start": 1.0},
}


@pytest.mark.parametrize("architecture", LEARNT)
def test_a_linear_map_and_sparse_features_are_told_apart(architecture):
    """The target is A x and what 8 thresholded directions of x add: W_skip learns A, latents learn the directions."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(12_000, 16, generator=generator)
    A = torch.randn(12, 16, generator=generator) / 4
    reads = normalize(torch.randn(8, 16, generator=generator), dim=1)
    writes = normalize(torch.randn(8, 12, generator=generator), dim=1) * 6
    target = x @ A.T + torch.relu(x @ reads.T - 1.2) @ writes + 0.5
    training = TrainingSettings(steps=500, batch_tokens=128, lr=5e-3, dead_after_tokens=10_000)
    seen, unseen = slice(11_000), slice(11_000, None)
    explained = {}
    for skip in (True, False):
        settings = parse_settings({"architecture": architecture, "d_sae": 24, "skip": skip, **LEARNT[architecture]})
        trainer = SAETrainer(settings, training, calibrate(x), target_calibration=calibrate(target))
        for step in range(training.steps):
            here = slice(step * 128 % 10_900, step * 128 % 10_900 + 128)
            trainer.train_step(x[here], target[here])
        sae = trainer.export(tokens=x[seen])
        error = (sae(x[unseen]) - target[unseen]).square().sum()
        explained[skip] = 1 - float(error / (target[unseen] - target[unseen].mean(0)).square().sum())
        if skip:
            assert (sae.W_skip - A).norm() < 0.2 * A.norm()
            assert ((reads @ normalize(sae.W_enc, dim=0)).max(dim=1).values > 0.95).all()
    assert explained[True] > max(0.85, explained[False] + 0.05)
