"""The hand-written gradients against autograd of the plain formulas, on the dense and on the sparse path."""

from functools import partial

import pytest
import torch

from sae_cases import SETTINGS
from sae_core import ARCHITECTURES, GatedSettings, JumpReLUSettings, SAETrainer, StandardSettings, parse_settings
from sae_core.kernels import Above, DenseActive, SparseActive, active, encode, select
from sae_core.sae import Gradients, SAEConfig, StepContext

D_IN, D_SAE, TOKENS = 6, 10, 16
REVIVAL = {
    "standard": StandardSettings(d_sae=D_SAE, l1_coefficient=0.7, aux_coefficient=0.6, pre_act_coefficient=0.3),
    "gated": GatedSettings(d_sae=D_SAE, l1_coefficient=0.7, aux_coefficient=0.6, pre_act_coefficient=0.3),
}
JUMPRELU = JumpReLUSettings(
    d_sae=D_SAE, l0_coefficient=0.7, sparsity="step", bandwidth=0.8, pre_act_coefficient=0.3
)


def make_sae(architecture: str, **fields):
    generator = torch.Generator().manual_seed(5)
    cls = ARCHITECTURES[architecture]
    config = SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, dtype="float64", **fields)
    weights = {
        name: torch.randn(shape, generator=generator).double() * 0.5 for name, shape in cls.shapes(config).items()
    }
    return cls(config, weights)


def plain_standard(w, x, coefficient, dead):
    f = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    x_hat = f @ w["W_dec"] + w["b_dec"]
    penalty = (f * w["W_dec"].norm(dim=1)).sum(1).mean()
    revival = plain_revival(w, x, x_hat, dead, lambda u: [u + w["b_enc"]], REVIVAL["standard"])
    return (x_hat - x).square().sum(1).mean() + coefficient * penalty + revival


def plain_gated(w, x, coefficient, dead):
    u = (x - w["b_dec"]) @ w["W_enc"]
    gate, magnitude = u + w["b_gate"], u * w["r_mag"].exp() + w["b_mag"]
    x_hat = ((gate > 0) * torch.relu(magnitude)) @ w["W_dec"] + w["b_dec"]
    via_gate = torch.relu(gate) @ w["W_dec"].detach() + w["b_dec"].detach()
    penalty = (torch.relu(gate) * w["W_dec"].detach().norm(dim=1)).sum(1).mean()
    r_mag = w["r_mag"].detach()
    revival = plain_revival(
        w, x, x_hat, dead, lambda u: [u + w["b_gate"], u * r_mag.exp() + w["b_mag"]], REVIVAL["gated"]
    )
    return ((x_hat - x).square() + (via_gate - x).square()).sum(1).mean() + coefficient * penalty + revival


def plain_revival(w, x, x_hat, dead, pre_activations, settings):
    if dead is None:
        return 0.0
    u = (x - w["b_dec"].detach()) @ w["W_enc"]
    n_dead, most = int(dead.sum()), D_IN // 2
    ranks = (u * w["W_dec"].norm(dim=1)).masked_fill(~dead, -torch.inf)
    z = torch.relu(u) * keep(ranks, min(most, n_dead))
    aux = (z @ w["W_dec"] - (x - x_hat).detach()).square().sum(1).mean()
    norms = w["W_dec"].norm(dim=1).detach()
    lift = sum((torch.relu(-pre) * norms)[:, dead].sum(1).mean() for pre in pre_activations(u.detach()))
    return settings.aux_coefficient * min(n_dead / most, 1) * aux + settings.pre_act_coefficient * lift


def plain_pre(w, x):
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    return pre, pre * w["W_dec"].norm(dim=1)


def keep(ranks, k):
    return torch.zeros_like(ranks).scatter(1, ranks.topk(k, dim=1).indices, 1.0)


def plain_aux_k(w, x, x_hat, coefficient, dead):
    if dead is None:
        return 0.0
    pre, ranks = plain_pre(w, x)
    n_dead, most = int(dead.sum()), D_IN // 2
    z = torch.relu(pre) * keep(ranks.masked_fill(~dead, -torch.inf), min(most, n_dead))
    aux = (z @ w["W_dec"] - (x - x_hat).detach()).square().sum(1).mean()
    return coefficient * min(n_dead / most, 1) * aux


def plain_topk(w, x, coefficient, dead):
    pre, ranks = plain_pre(w, x)
    x_hat = (torch.relu(pre) * keep(ranks, 3)) @ w["W_dec"] + w["b_dec"]
    return (x_hat - x).square().sum(1).mean() + plain_aux_k(w, x, x_hat, coefficient, dead)


def plain_batch_topk(w, x, coefficient, dead):
    pre, ranks = plain_pre(w, x)
    kept = keep(ranks.view(1, -1), int(2.3 * TOKENS)).view_as(ranks)
    x_hat = (torch.relu(pre) * kept) @ w["W_dec"] + w["b_dec"]
    return (x_hat - x).square().sum(1).mean() + plain_aux_k(w, x, x_hat, coefficient, dead)


def plain_matryoshka(w, x, coefficient, dead):
    pre, ranks = plain_pre(w, x)
    f = torch.relu(pre) * keep(ranks.view(1, -1), int(2.3 * TOKENS)).view_as(ranks)
    x_hats = [f[:, :width] @ w["W_dec"][:width] + w["b_dec"] for width in (2, 3, D_SAE)]
    errors = [(x_hat - x).square().sum(1).mean() for x_hat in x_hats]
    nested = 0.5 * errors[0] + 2.0 * errors[1] + 1.5 * errors[2]
    return nested + plain_aux_k(w, x, x_hats[-1], coefficient, dead)


class Jump(torch.autograd.Function):
    """H(pre - threshold), with the rectangle [F] as the derivative of H; ste_to_input: for pre as well."""

    @staticmethod
    def forward(ctx, pre, threshold, width, ste_to_input):
        ctx.save_for_backward(((pre - threshold).abs() < width / 2) / width)
        ctx.ste_to_input = ste_to_input
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(ctx, d):
        (kernel,) = ctx.saved_tensors
        return kernel * d if ctx.ste_to_input else None, -(kernel * d).sum(0), None, None


def plain_jumprelu(w, x, coefficient, dead, settings=JUMPRELU):
    pre, _ = plain_pre(w, x)
    norms = w["W_dec"].norm(dim=1)
    threshold = w["threshold"] + (w["threshold"].clamp_min(0) - w["threshold"]).detach()
    jump = Jump.apply(pre, threshold, settings.bandwidth / norms.detach(), settings.ste_to_input)
    # d f / d threshold is -threshold times the rectangle, where the plain product would say -pre
    f = pre * jump.detach() + threshold.detach() * (jump - jump.detach())
    x_hat = f @ w["W_dec"] + w["b_dec"]
    sparsity = jump.sum(1) if settings.sparsity == "step" else torch.tanh(settings.tanh_scale * f * norms).sum(1)
    loss = (x_hat - x).square().sum(1).mean() + coefficient * sparsity.mean()
    if dead is None:
        return loss
    lift = torch.relu(threshold - pre) * norms.detach()
    below_zero = torch.relu(threshold.detach() - pre) * norms.detach()  # such a threshold is not lowered further
    lift = torch.where(w["threshold"] > 0, lift, below_zero)
    return loss + settings.pre_act_coefficient * lift[:, dead].sum(1).mean()


PLAIN = {
    "standard": plain_standard,
    "gated": plain_gated,
    "topk": plain_topk,
    "batch_topk": plain_batch_topk,
    "matryoshka": plain_matryoshka,
    "jumprelu": plain_jumprelu,
}
FIELDS = {  # of the configuration
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "batch_topk": {"k": 2.3},
    "matryoshka": {
        "k": 2.3,
        "metadata": {"matryoshka": {"widths": [2, 3, D_SAE], "weights": [0.5, 2.0, 1.5]}},
    },
}


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("n_dead", [0, 2, 7])
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_gradients_equal_autograd_of_the_plain_formula(architecture, n_dead, path, monkeypatch):
    monkeypatch.setitem(active.SPARSE_BELOW, "cpu", {"dense": 0.0, "sparse": 2.0}[path])
    settings = {"jumprelu": JUMPRELU, **REVIVAL}.get(architecture)
    check_gradients(make_sae(architecture, **FIELDS.get(architecture, {})), PLAIN[architecture], n_dead, settings)


@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("n_dead", [0, 7])
@pytest.mark.parametrize(
    "changes",
    [{"ste_to_input": True}, {"sparsity": "tanh", "tanh_scale": 1.5}, {"sparsity": "tanh", "ste_to_input": True}],
)
def test_gradients_of_every_kind_of_jumprelu(changes, n_dead, path, monkeypatch):
    monkeypatch.setitem(active.SPARSE_BELOW, "cpu", {"dense": 0.0, "sparse": 2.0}[path])
    settings = JUMPRELU.model_copy(update=changes)
    check_gradients(make_sae("jumprelu"), partial(plain_jumprelu, settings=settings), n_dead, settings)


def check_gradients(sae, plain, n_dead, settings):
    x = torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(6)).double() * 2
    dead = torch.arange(D_SAE) < n_dead if n_dead else None

    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in sae.named_parameters()}
    expected_loss = plain(weights, x, 0.7, dead)
    expected_loss.backward()

    gradients = Gradients(frozenset(weights))
    with torch.no_grad():
        terms = sae.accumulate_gradients(x, x, gradients, StepContext(TOKENS, 0.7, dead, settings=settings))
    torch.testing.assert_close(terms.loss, expected_loss.detach())
    for name, tensor in weights.items():
        gradient = gradients[name].T if name == "W_enc" else gradients[name]
        torch.testing.assert_close(gradient, tensor.grad, msg=lambda m, name=name: f"{name}: {m}")
    f = sae.encode(x)
    torch.testing.assert_close(terms.error, sae.decode(f) - x)
    assert torch.equal(terms.fired, (f > 0).sum(0).double())


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_dense_and_sparse_steps_agree_in_training(architecture, data, training, monkeypatch):
    states = []
    for threshold in (0.0, 2.0):
        monkeypatch.setitem(active.SPARSE_BELOW, "cpu", threshold)
        trainer = SAETrainer(parse_settings(SETTINGS[architecture]), training, data.calibration)
        for step in range(15):
            trainer.train_step(data.batch(step))
        states.append(trainer.state())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-5)


def test_both_forms_of_active_pairs_do_the_same():
    generator = torch.Generator().manual_seed(8)
    support = torch.relu(torch.randn(5, 4, generator=generator))
    support[2] = 0  # a token and a latent with no pair at all
    support[:, 1] = 0
    g, W = torch.randn(5, 3, generator=generator), torch.randn(4, 3, generator=generator)
    plus, mask = torch.randn(4, generator=generator), support > 0
    dense, sparse = DenseActive(support), SparseActive.of_mask(mask)

    def spread(values):
        return torch.zeros(5, 4).masked_scatter(mask, values)

    values, pairs = dense.gather(g @ W.T), sparse.gather(g @ W.T)
    assert torch.equal(spread(pairs), values)
    torch.testing.assert_close(spread(sparse.row_dots(g, W)), dense.row_dots(g, W))
    torch.testing.assert_close(spread(sparse.row_dots(g, W, plus)), dense.row_dots(g, W, plus))
    torch.testing.assert_close(sparse.decode(pairs, W), dense.decode(values, W))
    torch.testing.assert_close(sparse.latent_sums(pairs, g), dense.latent_sums(values, g))
    torch.testing.assert_close(sparse.per_latent(pairs), dense.per_latent(values))
    torch.testing.assert_close(spread(sparse.scale(pairs, plus)), dense.scale(values, plus))
    torch.testing.assert_close(spread(sparse.shift(pairs, plus)), dense.shift(values, plus) * mask)
    for widths in ([4], [1, 4], [2, 3, 4]):
        by_level, dense_by_level = sparse.by_level(widths), dense.by_level(widths)
        decoded = dense_by_level.decode(values, W)
        torch.testing.assert_close(decoded.view(5, len(widths), 3).sum(1), dense.decode(values, W))
        torch.testing.assert_close(decoded.view(5, len(widths), 3)[:, 0], values[:, : widths[0]] @ W[: widths[0]])
        torch.testing.assert_close(by_level.decode(pairs, W), decoded)
        torch.testing.assert_close(spread(by_level.row_dots(decoded, W)), dense_by_level.row_dots(decoded, W))
        torch.testing.assert_close(by_level.latent_sums(pairs, decoded), dense_by_level.latent_sums(values, decoded))


def test_no_active_pair_at_all_is_no_special_case():
    nothing = SparseActive.of_mask(torch.zeros(3, 4, dtype=torch.bool))
    values = nothing.gather(torch.ones(3, 4))
    assert values.shape == (0,)
    assert torch.equal(nothing.decode(values, torch.ones(4, 2)), torch.zeros(3, 2))
    assert torch.equal(nothing.latent_sums(values, torch.ones(3, 2)), torch.zeros(4, 2))
    assert nothing.row_dots(torch.ones(3, 2), torch.ones(4, 2)).shape == (0,)


def test_the_form_follows_the_density():
    few = torch.full((10,), -1.0)
    few[0] = 1
    x, W_enc = torch.zeros(20, 4), torch.zeros(4, 10)
    assert isinstance(encode(x, W_enc, few, Above())[0], SparseActive)
    assert isinstance(encode(x, W_enc, -few, Above())[0], DenseActive)


def test_more_latents_than_sixteen_bits_hold():
    mask = torch.zeros(2, 70_000, dtype=torch.bool)
    mask[0, 69_999] = mask[1, 3] = mask[1, 69_999] = True
    sparse = SparseActive.of_mask(mask)
    sums = sparse.latent_sums(torch.tensor([1.0, 10.0, 100.0]), torch.ones(2, 1))
    assert sums[69_999] == 101 and sums[3] == 10 and sums.sum() == 111


def test_the_index_made_on_a_device_is_the_one_made_on_cpu():
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(9)) < 0.1
    mask[4] = False
    by_numpy, by_torch = SparseActive.of_mask(mask), SparseActive.of_mask(mask)
    by_torch._index_on_device(mask.view(-1).nonzero().squeeze(1))
    for name, tensor in vars(by_numpy).items():
        assert tensor is None or name.startswith("n_") or torch.equal(tensor, vars(by_torch)[name]), name


def test_pairs_of_a_number_fixed_beforehand_do_what_the_active_ones_do():
    """What a device does without waiting for it, run here: inactive pairs fill up the number and add nothing."""
    generator = torch.Generator().manual_seed(10)
    pre = torch.randn(12, 40, generator=generator) - 1.5  # many rows have fewer than k positive entries
    g, W = torch.randn(12, 3, generator=generator), torch.randn(40, 3, generator=generator)
    few = select.encode(torch.eye(12), pre, torch.zeros(40), select.TopK(6, 40), torch.float32)
    of_rows = select._fixed_pairs(*select._top_k_fixed(pre, 6), 12, 40)
    of_batch = select._fixed_pairs(*select._batch_top_fixed(pre, 72), 12, 40)
    batch, values, _ = select.encode_batch_top(torch.eye(12), pre, torch.zeros(40), 72)
    for (fixed, fixed_values), (plain, plain_values) in ((of_rows, few), (of_batch, (batch, values))):
        assert len(fixed_values) == 72 > len(plain_values[plain_values > 0])
        torch.testing.assert_close(fixed.decode(fixed_values, W), plain.decode(plain_values, W))
        dots = (fixed.row_dots(g, W, W[:, 0]), plain.row_dots(g, W, W[:, 0]))
        for one, other in ((fixed_values, plain_values), dots):
            torch.testing.assert_close(fixed.latent_sums(one, g), plain.latent_sums(other, g))
            torch.testing.assert_close(fixed.per_latent(one), plain.per_latent(other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_gpu_trains_the_same_sae(architecture, data, training):
    states = []
    for device in ("cpu", "cuda", "cuda"):
        trainer = SAETrainer(parse_settings(SETTINGS[architecture]), training, data.calibration, device=device)
        for step in range(10):
            trainer.train_step(data.batch(step), want_metrics=step == 9)
        states.append(trainer.state())
    for name, tensor in states[0].items():
        if not name.startswith("counters."):
            torch.testing.assert_close(states[1][name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(states[1][name], states[2][name]), name
