"""Every formula on cases small enough to work out by hand."""

import math

import numpy as np
import pytest
import torch

from sae_core import (
    ROW_SUMS,
    ConfigError,
    EvaluationSums,
    GatedSettings,
    SAETrainer,
    StandardSettings,
    TrainingSettings,
    metrics_of,
    parse_settings,
)
from sae_core.architectures import BatchTopKSAE, GatedSAE, MatryoshkaSAE, StandardSAE, TopKSAE
from sae_core.architectures.jumprelu import JumpReLUSAE
from sae_core.functional import (
    aux_k_scale,
    cosine,
    explained_variance,
    jumprelu,
    l2_ratio,
    squared_error,
    top_k_mask,
    topk,
)
from sae_core.kernels import decode
from sae_core.kernels.select import _top_k_mask_by_index
from sae_core.sae import Gradients, SAEConfig, StepContext
from sae_core.schedules import lr_factor, warm_up

# Encoder and decoder of two latents: the first reads and writes the first coordinate (written twice as long), the
# second the second one.
W_ENC = torch.eye(2)
W_DEC = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
ZERO = torch.zeros(2)
X = torch.tensor([[3.0, 1.0], [-1.0, 2.0]])


def make(cls, architecture, **given):
    fields = {name: given.pop(name) for name in ("k", "rescale_acts_by_decoder_norm", "metadata") if name in given}
    cfg = SAEConfig(architecture=architecture, d_in=2, d_sae=2, **fields)
    weights = {name: torch.zeros(shape) for name, shape in cls.shapes(cfg).items()}
    return cls(cfg, {**weights, "W_enc": W_ENC, "W_dec": W_DEC, **given})


def step(sae, coefficient, dead=None, x=X, settings=None):
    gradients = Gradients(frozenset(name for name, _ in sae.named_parameters()))
    with torch.no_grad():
        context = StepContext(len(x), coefficient, dead, settings=settings)
        return sae.accumulate_gradients(x, x, gradients, context), gradients


def test_standard_loss():
    # f = [[3, 1], [0, 2]], x_hat = [[6, 1], [0, 2]], errors 9 and 1; penalties 3*2 + 1 and 2
    terms, gradients = step(make(StandardSAE, "standard"), coefficient=0.5)
    assert terms.error.square().sum() == 10
    assert terms.loss == pytest.approx(10 / 2 + 0.5 * (7 + 2) / 2)
    assert terms.fired.tolist() == [1, 2]
    # d loss / d b_dec through the decoder: mean of 2 (x_hat - x) = [(6 + 2) / 2, 0] = [4, 0]; through the encoder
    # minus the sum of d_pre: latent 0, token 0: 2 * 3 * 2 / 2 + 0.5 * 2 / 2 = 6.5; latent 1: 0.25 + 0.25
    assert gradients["b_enc"].tolist() == [6.5, 0.5]
    assert gradients["b_dec"].tolist() == [4 - 6.5, -0.5]


def test_standard_loss_with_a_dead_latent():
    # Latent 1 never fires: f = [[3, 0], [0, 0]], x_hat = [[6, 0], [0, 0]], residuals [[-3, 1], [-1, 2]], errors 10 and
    # 5; penalties 6 and 0. AuxK without its bias: u = [1, 2], z W_dec = [[0, 1], [0, 2]], errors 9 and 1; k_aux = 1,
    # weight 2 * min(1 / 1, 1). Lift: the pre-activations are 1 - 4 and 2 - 4, so the mean gap is 2.5.
    given = dict(d_sae=2, l1_coefficient=0.5)
    sae, dead = make(StandardSAE, "standard", b_enc=torch.tensor([0.0, -4.0])), torch.tensor([False, True])
    settings = StandardSettings(**given, aux_coefficient=2.0, pre_act_coefficient=0.1)
    terms, gradients = step(sae, 0.5, dead, settings=settings)
    alive = 15 / 2 + 0.5 * 6 / 2
    assert terms.loss.item() == pytest.approx(alive + 2 * 10 / 2 + 0.1 * 2.5)
    assert gradients["b_enc"][1].item() == pytest.approx(-0.1)
    # through AuxK alone: z * 2 * weight * (z W_dec - residual) / 2, where that is left in the first coordinate
    assert gradients["W_dec"][1].tolist() == pytest.approx([2 * 2 * (1 * 3 + 2 * 1) / 2, 0])
    off = StandardSettings(**given, aux_coefficient=0.0, pre_act_coefficient=0.0)
    assert step(sae, 0.5, dead, settings=off)[0].loss.item() == pytest.approx(alive)


def test_gated_lifts_the_gate_and_the_magnitude():
    # u = [[3, 1], [-1, 2]]; latent 1 is shut by both biases: gates 1 - 4, 2 - 4; magnitudes 2 - 3 and 4 - 3 (r_mag =
    # log 2), of which one is open
    sae = make(
        GatedSAE, "gated", b_gate=torch.tensor([0.0, -4.0]), b_mag=torch.tensor([0.0, -3.0]),
        r_mag=torch.full((2,), math.log(2)),
    )  # fmt: skip
    dead = torch.tensor([False, True])
    settings = GatedSettings(d_sae=2, l1_coefficient=0.5, aux_coefficient=0.0, pre_act_coefficient=0.1)
    terms, gradients = step(sae, 0.5, dead, settings=settings)
    expected = step(sae, 0.5)[0].loss.item() + 0.1 * (3 + 2) / 2 + 0.1 * (1 + 0) / 2
    assert terms.loss.item() == pytest.approx(expected)
    assert gradients["b_gate"][1].item() == pytest.approx(-0.1)
    assert gradients["b_mag"][1].item() == pytest.approx(-0.05)


def test_standard_encode_subtracts_the_decoder_bias():
    sae = make(StandardSAE, "standard", b_dec=torch.tensor([1.0, 1.0]), b_enc=torch.tensor([0.5, 0.0]))
    assert sae.encode(X).tolist() == [[2.5, 0.0], [0.0, 1.0]]
    assert sae.decode(torch.tensor([1.0, 1.0])).tolist() == [3.0, 2.0]


def test_gated_loss():
    # gate = x, magnitude = 2x - 1 (r_mag = log 2, b_mag = -1): f = [[5, 1], [0, 3]], x_hat = [[10, 1], [0, 3]],
    # errors 49 and 1 + 1; via the gate [[6, 1], [0, 2]], errors 9 and 1; penalties 7 and 2
    sae = make(GatedSAE, "gated", r_mag=torch.full((2,), math.log(2)), b_mag=torch.tensor([-1.0, -1.0]))
    torch.testing.assert_close(sae.encode(X), torch.tensor([[5.0, 1.0], [0.0, 3.0]]))
    terms, _ = step(sae, coefficient=0.5)
    assert terms.error.square().sum().item() == pytest.approx(51, rel=1e-5)
    assert terms.loss.item() == pytest.approx((51 + 10) / 2 + 0.5 * 9 / 2, rel=1e-5)


def test_a_closed_gate_wins_over_a_positive_magnitude():
    sae = make(GatedSAE, "gated", b_gate=torch.tensor([-4.0, 0.0]), b_mag=torch.tensor([1.0, 1.0]))
    assert sae.encode(X).tolist() == [[0.0, 2.0], [0.0, 3.0]]


def test_topk_ranks_by_decoder_norm():
    # pre-activations 3 and 4: with norms 2 and 1 the first wins (6 > 4), without norms the second
    x = torch.tensor([[3.0, 4.0]])
    assert make(TopKSAE, "topk", k=1, rescale_acts_by_decoder_norm=True).encode(x).tolist() == [[6.0, 0.0]]
    assert make(TopKSAE, "topk", k=1, rescale_acts_by_decoder_norm=True)(x).tolist() == [[6.0, 0.0]]
    assert make(TopKSAE, "topk", k=1).encode(x).tolist() == [[0.0, 4.0]]


def test_topk_loss_with_a_dead_latent():
    # k = 1, ranks [[6, 1], [-2, 2]]: f = [[3, 0], [0, 2]], x_hat = [[6, 0], [0, 2]], residuals [[-3, 1], [-1, 0]],
    # errors 10 and 1. Latent 1 is dead: k_aux = 1, weight 1 * min(1 / 1, 1); z W_dec = [[0, 1], [0, 2]], errors 9 + 0
    # and 1 + 4
    sae = make(TopKSAE, "topk", k=1, rescale_acts_by_decoder_norm=True)
    terms, _ = step(sae, coefficient=0.5, dead=torch.tensor([False, True]))
    assert terms.error.square().sum() == 11
    assert terms.loss.item() == pytest.approx(11 / 2 + 0.5 * 14 / 2)
    alive, _ = step(sae, coefficient=0.5)
    assert alive.loss.item() == pytest.approx(11 / 2)


# ranks of X are [[6, 1], [-2, 2]]
@pytest.mark.parametrize(
    ("k", "f", "errors", "threshold"),
    [
        (0.5, [[3, 0], [0, 0]], [9 + 1, 1 + 4], 6),
        (1, [[3, 0], [0, 2]], [9 + 1, 1], 2),
        (1.5, [[3, 1], [0, 2]], [9, 1], 1),
        (2, [[3, 1], [0, 2]], [9, 1], 0),  # only three pairs are positive
    ],
)
def test_batch_topk_takes_the_largest_of_the_batch(k, f, errors, threshold):
    sae = make(BatchTopKSAE, "batch_topk", k=k)
    assert sae.encode(X).tolist() == f
    terms, _ = step(sae, coefficient=0.5)
    assert terms.error.square().sum(1).tolist() == errors
    assert terms.loss == sum(errors) / 2
    assert terms.extra["threshold"] == threshold
    used = sae.for_use({}, X)
    assert used.encode(X).tolist() == f
    torch.testing.assert_close(used.threshold, torch.tensor([threshold / 2, threshold]), rtol=1e-4, atol=0)


def test_batch_topk_with_a_dead_latent():
    # k = 1: errors 10 and 1, residuals [[-3, 1], [-1, 0]]; the dead latent 1 alone, of each token: 9 and 1 + 4
    terms, _ = step(make(BatchTopKSAE, "batch_topk", k=1), coefficient=0.5, dead=torch.tensor([False, True]))
    assert terms.loss.item() == pytest.approx(11 / 2 + 0.5 * 14 / 2)


def test_matryoshka_loss():
    # k = 1.5: f = [[3, 1], [0, 2]]. Width 1: x_hat = [[6, 0], [0, 0]], errors [[3, -1], [1, -2]], squared 10 and 5;
    # width 2: errors [[3, 0], [1, 0]], squared 9 and 1
    nesting = {"matryoshka": {"widths": [1, 2], "weights": [0.5, 2.0]}}
    sae = make(MatryoshkaSAE, "matryoshka", k=1.5, metadata=nesting)
    terms, gradients = step(sae, coefficient=0.5)
    assert terms.loss == (0.5 * 15 + 2 * 10) / 2
    assert terms.error.tolist() == [[3, 0], [1, 0]]
    # latent 0 sees 0.5 times the first errors and 2 times the second, its row being [2, 0]: 2 * (1.5 + 6) and not
    # active; latent 1, of the second level, sees errors of 0. b_dec: the same sums, [7.5, -0.5] and [2.5, -1]
    assert gradients["b_enc"].tolist() == [15, 0]
    assert gradients["b_dec"].tolist() == [10 - 15, -1.5]
    assert gradients["W_dec"].tolist() == [[3 * 7.5, 3 * -0.5], [1 * 6 + 2 * 2, 0]]
    # the auxiliary loss is of the whole SAE's error: residuals [[-3, 0], [-1, 0]], z W_dec = [[0, 1], [0, 2]]
    with_dead, _ = step(sae, coefficient=0.5, dead=torch.tensor([False, True]))
    assert with_dead.loss == terms.loss + 0.5 * (9 + 1 + 1 + 4) / 2


def test_the_mean_threshold_is_right_from_the_first_batch_and_forgets():
    state = BatchTopKSAE.state_at_start(None)
    sae, means = make(BatchTopKSAE, "batch_topk", k=1), []
    for threshold in [4.0, 2.0, 3.0, *[5.0] * 100]:
        state = sae.next_state(state, {"threshold": torch.tensor(threshold).double()}, None, None)
        means.append(state["threshold"].item())
    assert means[:3] == [4.0, 3.0, 3.0]
    assert means[-1] == pytest.approx(5.0, abs=1e-3)
    assert sae.for_use(state, None).threshold.tolist() == pytest.approx([2.5, 5.0], abs=1e-3)


def test_jumprelu_encode():
    sae = make(JumpReLUSAE, "jumprelu", threshold=torch.tensor([3.0, 1.5]))
    assert sae.encode(X).tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert jumprelu(torch.tensor([1.0, -1.0]), torch.tensor([0.5, -2.0])).tolist() == [1.0, 0.0]


def test_fold_moves_norms_and_scale_and_keeps_the_function():
    sae = make(StandardSAE, "standard", b_enc=torch.tensor([1.0, 0.0]), b_dec=torch.tensor([0.0, 4.0]))
    folded = sae.folded(2.0, 2.0).unit_rows()
    assert folded.W_dec.tolist() == [[1, 0], [0, 1]]
    assert folded.W_enc.tolist() == [[2, 0], [0, 1]]  # times norm
    assert folded.b_enc.tolist() == [1.0, 0.0]  # times norm / scale
    assert folded.b_dec.tolist() == [0.0, 2.0]
    assert torch.equal(folded(X), sae(X * 2) / 2)


def test_topk_takes_positive_values_only():
    x = torch.tensor([[1.0, 5.0, 3.0, -1.0], [-1.0, -2.0, 4.0, -3.0], [0.0, 0.0, 0.0, 0.0]])
    assert topk(x, 2).tolist() == [[0, 5, 3, 0], [0, 0, 4, 0], [0, 0, 0, 0]]
    assert topk(x, 9).tolist() == [[1, 5, 3, 0], [0, 0, 4, 0], [0, 0, 0, 0]]


def test_topk_keeps_exactly_k_of_tied_values():
    ties = torch.tensor([[2.0, 2.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.0], [5.0, -1.0, -1.0, -1.0]])
    assert top_k_mask(ties, 2).sum(1).tolist() == [2, 2, 1]
    assert top_k_mask(ties, 1).sum(1).tolist() == [1, 1, 1]


def test_the_two_ways_to_the_top_k_agree():
    x = torch.randn(64, 160, generator=torch.Generator().manual_seed(0))
    for k in (1, 7, 32, 159, 160):
        for values in (x, x.bfloat16(), x - 2):  # few ties, many, and rows with fewer than k positive entries
            ours, by_index = top_k_mask(values, k), _top_k_mask_by_index(values, k)
            assert torch.equal(ours.sum(1), by_index.sum(1))
            kept, others = torch.where(ours, values, torch.inf), torch.where(ours, -torch.inf, values)
            if k < 160:
                assert (kept.amin(1) >= others.amax(1)).all() or not (values > 0).all()
            if values.dtype == torch.float32:
                assert torch.equal(ours, by_index)


def test_aux_k_scale():
    assert aux_k_scale(3, 16, 1.0) == (3, 3 / 8)
    assert aux_k_scale(100, 16, 0.5) == (8, 0.5)


def test_errors_and_ratios():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    x_hat = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    assert squared_error(x, x_hat).tolist() == [16.0, 4.0]
    assert cosine(x, x_hat).tolist() == pytest.approx([0.6, 0.0])
    assert l2_ratio(x, x_hat).tolist() == pytest.approx([0.6, 2.0])
    # E||x||^2 = 12.5, ||E x||^2 = 6.25, E||x - x_hat||^2 = 10
    assert explained_variance(x, x_hat).item() == pytest.approx(1 - 10 / 6.25)


def test_warm_up():
    assert [warm_up(step, 4) for step in (0, 1, 3, 9)] == [0.25, 0.5, 1.0, 1.0]
    assert warm_up(0, 0) == 1.0


def test_lr_rises_holds_and_falls():
    training = TrainingSettings(steps=10, batch_tokens=1, dead_after_tokens=1, lr_warm_up_steps=2, lr_decay_steps=4)
    factors = [lr_factor(step, training) for step in range(11)]
    assert factors == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_lr_falls_over_the_last_fifth_unless_told():
    training = TrainingSettings(steps=10, batch_tokens=1, dead_after_tokens=1)
    assert [lr_factor(step, training) for step in (7, 8, 9)] == [1, 1, 0.5]


def test_a_cosine_falls_slowly_at_both_ends():
    training = TrainingSettings(
        steps=10, batch_tokens=1, dead_after_tokens=1, lr_warm_up_steps=2, lr_decay="cosine", lr_decay_steps=4
    )
    # (1 + cos(pi t)) / 2 at t = 0, 1/4, 1/2, 3/4, 1
    a_quarter = (1 + math.sqrt(0.5)) / 2
    factors = [lr_factor(step, training) for step in (0, 1, 5, 6, 7, 8, 9, 10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, a_quarter, 0.5, 1 - a_quarter, 0])


def test_a_constant_lr_does_not_fall():
    training = TrainingSettings(steps=10, batch_tokens=1, dead_after_tokens=1, lr_warm_up_steps=2, lr_decay="constant")
    assert [lr_factor(step, training) for step in (0, 1, 5, 9)] == [0.5, 1, 1, 1]


def sums(**changes) -> EvaluationSums:
    """Of two rows of one token each: x is (3, 0) and (-1, 0), so that it is 2 from its mean in both."""
    given = dict(
        n_tokens=[1, 1], n_predictions=[1, 1], ce_clean=[0.5, 1.5], ce_ablated=[4, 6], ce_sae=[3, 1],
        kl_ablated=[2, 6], kl_sae=[1, 1], l0=[4, 2], l1=[4, 5], squared_error=[3, 0], square_x=[9, 1],
        square_x_hat=[6, 2], x_dot_x_hat=[12, 4], cosine=[0.5, 1], l2_ratio=[0.25, 0.75], sum_x=[[3, 0], [-1, 0]],
    )  # fmt: skip
    arrays = {name: np.array(values, dtype=np.float64) for name, values in {**given, **changes}.items()}
    return EvaluationSums(**{"fired": np.array([1, 0, 2, 0]), **arrays})


METRICS = {
    "l0": 3.0, "l1": 4.5, "ce_recovered": 0.75, "ce_increase": 1.0, "ce_clean": 1.0, "ce_ablated": 5.0, "ce_sae": 2.0,
    "kl_recovered": 0.75, "kl_sae": 1.0, "kl_ablated": 4.0, "explained_variance": 1 - 3 / 8, "mse": 1.5,
    "cosine": 0.75, "l2_ratio": 0.5, "relative_reconstruction_bias": 0.5, "n_tokens": 2,
}  # fmt: skip


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5])
def test_decoding_from_few_active_latents_is_the_product(density):
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(3, 4, 60, generator=generator) * (torch.rand(3, 4, 60, generator=generator) < density)
    W = torch.randn(60, 7, generator=generator)
    for given in (f, f[0], f[0, 0], f[:0]):
        torch.testing.assert_close(decode(given, W), given @ W)
    f.requires_grad_()
    decode(f, W).sum().backward()
    torch.testing.assert_close(f.grad, W.sum(1).expand(3, 4, 60))


def test_evaluation_metrics_from_sums():
    assert sums().metrics() == {**METRICS, "dead_fraction": 0.5}
    assert sums().metrics(dead=torch.tensor([False, True, False, False]))["dead_fraction"] == 0.25
    assert sums().feature_density.tolist() == [0.5, 0, 1, 0]


def test_metrics_of_any_choice_of_rows_come_from_their_sums():
    rows = sums().rows()
    assert tuple(rows) == ROW_SUMS
    assert rows["square_centred"].tolist() == [4, 4]
    choices = np.array([[1, 1], [2, 0], [0, 0]])  # how often each row is drawn: each once, the first twice, none
    found = metrics_of({name: choices @ values for name, values in rows.items()})
    assert {name: values[0] for name, values in found.items()} == METRICS
    first = {name: values[1] for name, values in found.items()}
    assert (first["l0"], first["ce_increase"], first["ce_recovered"]) == (4, 2.5, 1 / 3.5)
    assert first["explained_variance"] == 1 - 3 / 4  # about the mean of all rows
    assert all(np.isnan(values[2]) for name, values in found.items() if name != "n_tokens")
    assert metrics_of({name: float(values.sum()) for name, values in rows.items()}) == METRICS


def test_merged_sums_have_the_rows_of_both():
    merged = sums().merge(sums(n_tokens=[3, 3], l0=[0, 2], fired=[0, 1, 0, 0]), sums())
    assert merged.n_tokens.tolist() == [1, 1, 3, 3, 1, 1]
    assert merged.sum_x.shape == (6, 2)
    assert merged.metrics()["l0"] == 1.4
    assert merged.fired.tolist() == [2, 1, 4, 0]
    with pytest.raises(ConfigError, match="d_sae"):
        sums().merge(sums(fired=[1]))


def test_no_kept_token_is_an_error():
    with pytest.raises(ConfigError, match="0 tokens"):
        sums(n_tokens=[0, 0]).metrics()


def test_sparsity_is_the_log_of_the_firing_rate(data):
    settings = parse_settings({"architecture": "standard", "d_sae": 8, "l1_coefficient": 1.0, "seed": 4})
    training = TrainingSettings(steps=9, batch_tokens=32, lr=1e-9, dead_after_tokens=64)
    trainer = SAETrainer(settings, training, data.calibration)
    fired = []
    for step in range(5):  # windows of 64 tokens: after 160 tokens, one full and half of the next
        fired.append((trainer.sae.encode(data.batch(step) * data.calibration.scale) > 0).sum(0))
        trainer.train_step(data.batch(step))
    expected = torch.log10(sum(fired[2:]).double() / 96 + 1e-10).float()
    torch.testing.assert_close(trainer.sparsity(), expected, rtol=0.02, atol=0.02)


def test_dead_is_counted_in_tokens(data):
    settings = parse_settings({"architecture": "topk", "d_sae": 8, "k": 1, "lr": 1e-9})
    trainer = SAETrainer(settings, TrainingSettings(steps=9, batch_tokens=4, dead_after_tokens=8), data.calibration)
    x = data.x[:1].expand(4, -1)  # one token over and over: one latent fires
    fractions = [trainer.train_step(x, want_metrics=True)["dead_fraction"] for _ in range(3)]
    assert fractions == [0.0, 7 / 8, 7 / 8]
    assert sorted(trainer.state()["counters.tokens_since_fired"].tolist()) == [0, *[12] * 7]
