"""Evaluation on a tiny GPT-2 of 3 layers, against a direct computation with whole passes and plain hooks."""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, log_softmax

from sae_core import (
    ROW_SUMS,
    ConfigError,
    SAETrainer,
    TopKBasis,
    TrainingSettings,
    calibrate,
    evaluate_rows,
    metrics_of,
    parse_settings,
)
from sae_core.evaluation import _Behaviour
from sae_core.hooked import Rerun

HOOK_POINTS = [
    "blocks.0.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.1.hook_resid_pre",
    "blocks.1.hook_resid_mid",
    "blocks.1.hook_resid_post",
    "blocks.2.hook_resid_post",
    "blocks.2.hook_mlp_out",
    "blocks.1.hook_attn_out",
    "blocks.1.attn.hook_z",
    "blocks.1.ln2.hook_normalized",
]
TRANSCODED = [
    ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"),
    ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"),
    ("blocks.0.hook_resid_mid", "blocks.2.hook_mlp_out"),
    ("blocks.1.attn.hook_z", "blocks.1.hook_resid_post"),
    ("hook_embed", "blocks.0.hook_resid_pre"),
]


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 50, (5, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def kept():
    keep = torch.rand(5, 16, generator=torch.Generator().manual_seed(2)) > 0.25
    keep[:, 0] = False
    return keep


def activations_of(model, hook_point, tokens):
    seen = []
    hook = (hook_point, lambda activation, hook: seen.append(activation.detach().reshape(*tokens.shape, -1)))
    with torch.no_grad():
        model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook])
    return seen[0]


def trained_sae(x):
    training = TrainingSettings(steps=30, batch_tokens=40, lr=3e-3, dead_after_tokens=400)
    trainer = SAETrainer(parse_settings({"architecture": "topk", "d_sae": 64, "k": 6}), training, calibrate(x))
    for _ in range(training.steps):
        trainer.train_step(x[:40])
    return trainer.export()


@torch.no_grad()
def run_replaced(model, hook_point, tokens, replaced):
    """A whole pass with `replaced` at the hook point. In the bridge the hook before the second norm is off the
    residual stream, so what enters both the norm and the sum is set at the block's parts by hand."""
    if "resid_mid" in hook_point:
        layer = int(hook_point.split(".")[1])
        stream = activations_of(model, f"blocks.{layer}.hook_resid_pre", tokens)
        hook_point, replaced = f"blocks.{layer}.hook_attn_out", replaced - stream
    hook = (hook_point, lambda activation, hook: replaced.reshape(activation.shape))
    return model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook])


@torch.no_grad()
def expected_metrics(model, sae, hook_point, tokens, kept, reads=None, ablation=0.0):
    x_all = activations_of(model, hook_point, tokens)
    read = x_all if reads is None else activations_of(model, reads, tokens)
    x = x_all[kept].double()
    f, x_hat = sae.encode(read[kept]), sae(read[kept]).double()
    replaced = x_all.clone()
    replaced[kept] = x_hat.float()
    logits = {
        "clean": model(tokens, return_type="logits"),
        "ablated": run_replaced(model, hook_point, tokens, torch.zeros_like(x_all) + ablation),
        "sae": run_replaced(model, hook_point, tokens, replaced),
    }
    ce = {
        name: cross_entropy(given[:, :-1][kept[:, :-1]], tokens[:, 1:][kept[:, :-1]]).item()
        for name, given in logits.items()
    }
    log_p = {name: log_softmax(given[kept].double(), -1) for name, given in logits.items()}
    kl = {
        name: (log_p["clean"].exp() * (log_p["clean"] - log_p[name])).sum(-1).mean().item()
        for name in ("ablated", "sae")
    }
    error = (x - x_hat).square().sum(1).mean()
    return {
        "ce_clean": ce["clean"],
        "ce_ablated": ce["ablated"],
        "ce_sae": ce["sae"],
        "ce_increase": ce["sae"] - ce["clean"],
        "ce_recovered": (ce["ablated"] - ce["sae"]) / (ce["ablated"] - ce["clean"]),
        "kl_ablated": kl["ablated"],
        "kl_sae": kl["sae"],
        "kl_recovered": (kl["ablated"] - kl["sae"]) / kl["ablated"],
        "l0": (f != 0).sum(1).double().mean().item(),
        "l1": f.abs().sum(1).double().mean().item(),
        "mse": error.item(),
        "explained_variance": (1 - error / x.var(0, correction=0).sum()).item(),
        "cosine": torch.cosine_similarity(x, x_hat).mean().item(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean().item(),
        "relative_reconstruction_bias": (x_hat.square().sum() / (x * x_hat).sum()).item(),
        "dead_fraction": ((f != 0).sum(0) == 0).double().mean().item(),
        "n_tokens": int(kept.sum()),
    }


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_metrics_equal_a_direct_computation(tiny_model, hook_point, tokens, kept):
    x = activations_of(tiny_model, hook_point, tokens)[kept]
    sae = trained_sae(x)
    saes = {"sae": sae, "neurons": TopKBasis.neurons(calibrate(x), 8)}
    results = evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=2)
    for name, module in saes.items():
        expected = expected_metrics(tiny_model, module, hook_point, tokens, kept)
        assert results[name].metrics() == pytest.approx(expected, rel=2e-3, abs=2e-5)


@pytest.mark.parametrize("hook_point", ["blocks.0.hook_resid_post", "blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"])
def test_activations_can_be_ablated_to_their_mean(tiny_model, hook_point, tokens, kept):
    x = activations_of(tiny_model, hook_point, tokens)[kept]
    saes = {"sae": trained_sae(x)}
    mean = x.double().mean(0)
    found, zero = (
        evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=2, ablation=given)["sae"].metrics()
        for given in (mean, None)
    )
    expected = expected_metrics(tiny_model, saes["sae"], hook_point, tokens, kept, ablation=mean.float())
    assert found == pytest.approx(expected, rel=2e-3, abs=2e-5)
    ablated = {name for name in found if found[name] != zero[name]}
    assert ablated == {"ce_ablated", "ce_recovered", "kl_ablated", "kl_recovered"}


def test_a_transcoders_ablation_has_the_width_of_what_it_writes(tiny_model, tokens, kept):
    reads, writes = "blocks.1.hook_mlp_out", "blocks.1.mlp.hook_post"
    x, y = (activations_of(tiny_model, name, tokens)[kept] for name in (reads, writes))
    saes = {"t": trained_transcoder(x, y)}
    found = evaluate_rows(
        tiny_model, saes, reads, tokens, kept, rows_per_forward=5, writes=writes, ablation=y.mean(0)
    )["t"]
    expected = expected_metrics(tiny_model, saes["t"], writes, tokens, kept, reads=reads, ablation=y.mean(0))
    assert found.metrics() == pytest.approx(expected, rel=2e-3, abs=2e-5)
    with pytest.raises(ConfigError, match=f"ablation has shape .32.; accepted: .128., as '{writes}' has it"):
        evaluate_rows(tiny_model, saes, reads, tokens, kept, rows_per_forward=5, writes=writes, ablation=x.mean(0))


def test_a_rows_sums_are_those_of_the_row_alone(tiny_model, tokens, kept):
    hook_point = "blocks.1.hook_resid_post"
    x_all = activations_of(tiny_model, hook_point, tokens)
    saes = {"sae": trained_sae(x_all[kept])}
    kept = kept.clone()
    kept[3] = False  # a row of which nothing is kept
    kept[4, :-1], kept[4, -1] = False, True  # and one whose only token has no next one
    together = evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=2)["sae"]
    rows = together.rows()
    assert tuple(rows) == ROW_SUMS
    assert all(sums.shape == (5,) and sums.dtype == np.float64 for sums in rows.values())
    assert rows["n_tokens"].tolist() == kept.sum(1).tolist()
    assert rows["n_predictions"].tolist() == kept[:, :-1].sum(1).tolist()
    assert all(sums[3] == 0 for sums in rows.values())
    mean = x_all[kept].double().mean(0)
    squares = (x_all.double() - mean).square().sum(-1) * kept
    assert rows["square_centred"] == pytest.approx(squares.sum(1).numpy())
    parts = [evaluate_rows(tiny_model, saes, hook_point, tokens[[row]], kept[[row]], rows_per_forward=1)["sae"]
             for row in range(5)]  # fmt: skip
    for row, part in enumerate(parts):
        for name, sums in part.rows().items():
            if name != "square_centred":  # about the row's own mean
                assert rows[name][row] == pytest.approx(sums[0], rel=1e-4, abs=1e-5), (name, row)
    merged = parts[0].merge(*parts[1:])
    assert merged.metrics() == pytest.approx(together.metrics(), rel=1e-4, abs=1e-6)
    assert (merged.fired == together.fired).all()
    totals = {name: sums.sum() for name, sums in rows.items()}
    assert {name: value for name, value in together.metrics().items() if name != "dead_fraction"} == metrics_of(totals)


def trained_transcoder(x, y, **settings):
    training = TrainingSettings(steps=30, batch_tokens=40, lr=3e-3, dead_after_tokens=400)
    trainer = SAETrainer(
        parse_settings({"architecture": "topk", "d_sae": 64, "k": 6, **settings}), training, calibrate(x),
        target_calibration=calibrate(y),
    )  # fmt: skip
    for _ in range(training.steps):
        trainer.train_step(x[:40], y[:40])
    return trainer.export()


@pytest.mark.parametrize(("reads", "writes"), TRANSCODED)
def test_a_transcoder_is_judged_where_it_writes(tiny_model, reads, writes, tokens, kept):
    x, y = (activations_of(tiny_model, name, tokens)[kept] for name in (reads, writes))
    saes = {"plain": trained_transcoder(x, y), "skipping": trained_transcoder(x, y, skip=True)}
    results = evaluate_rows(tiny_model, saes, reads, tokens, kept, rows_per_forward=2, writes=writes)
    for name, sae in saes.items():
        expected = expected_metrics(tiny_model, sae, writes, tokens, kept, reads=reads)
        assert results[name].metrics() == pytest.approx(expected, rel=2e-3, abs=2e-5)
    assert results["skipping"].metrics()["mse"] != results["plain"].metrics()["mse"]


def test_reading_and_writing_one_hook_point_is_an_saes_evaluation(tiny_model, tokens, kept):
    name = "blocks.1.hook_mlp_out"
    sae = trained_sae(activations_of(tiny_model, name, tokens)[kept])
    results = [evaluate_rows(tiny_model, {"s": sae}, name, tokens, kept, rows_per_forward=5, writes=writes)["s"]
               for writes in (None, name)]  # fmt: skip
    assert results[0].metrics() == results[1].metrics()


def test_a_reconstruction_of_another_width_is_refused(tiny_model, tokens, kept):
    reads, writes = "blocks.1.mlp.hook_in", "blocks.1.mlp.hook_post"
    sae = trained_sae(activations_of(tiny_model, reads, tokens)[kept])
    with pytest.raises(ConfigError, match=f"SAE 's' reconstructs 32 dimensions, and '{writes}' has 128"):
        evaluate_rows(tiny_model, {"s": sae}, reads, tokens, kept, rows_per_forward=5, writes=writes)
    with pytest.raises(ConfigError, match="'blocks.1.hook_nothing': the model has none"):
        evaluate_rows(tiny_model, {}, "blocks.1.hook_nothing", tokens, kept, rows_per_forward=5, writes=writes)


def test_hooked_transformer_gives_the_reference_for_every_hook_point(tokens, kept):
    """There the residual stream has true hooks, hook_resid_mid too: replacing is what it says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            n_layers=3, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", seed=1, device="cpu"
        )
        model = HookedTransformer(config)
        for parameter in model.parameters():
            parameter.data.mul_(4)
    for hook_point in HOOK_POINTS:
        x_all = activations_of(model, hook_point, tokens)
        basis = TopKBasis.pca(calibrate(x_all[kept]), 10)
        replaced = torch.where(kept[..., None], basis(x_all), x_all)
        hook = (hook_point, lambda activation, hook, value=replaced: value.reshape(activation.shape))
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook])
        ce = cross_entropy(logits[:, :-1][kept[:, :-1]], tokens[:, 1:][kept[:, :-1]]).item()
        result = evaluate_rows(model, {"b": basis}, hook_point, tokens, kept, rows_per_forward=5)["b"].metrics()
        assert result["ce_sae"] == pytest.approx(ce, rel=1e-4), hook_point
    with pytest.raises(ConfigError, match="none of this name"):
        evaluate_rows(model, {}, "blocks.1.hook_nothing", tokens, kept, rows_per_forward=5)
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    coder = trained_transcoder(*(activations_of(model, name, tokens)[kept] for name in (reads, writes)))
    metrics = evaluate_rows(model, {"t": coder}, reads, tokens, kept, rows_per_forward=5, writes=writes)["t"].metrics()
    expected = expected_metrics(model, coder, writes, tokens, kept, reads=reads)
    assert metrics == pytest.approx(expected, rel=2e-3, abs=2e-5)
    with pytest.raises(ConfigError, match="'blocks.1.hook_nothing': the model has none"):
        evaluate_rows(model, {}, "blocks.1.hook_nothing", tokens, kept, rows_per_forward=5, writes=writes)


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_a_perfect_reconstruction_recovers_everything(tiny_model, hook_point, tokens, kept):
    x = activations_of(tiny_model, hook_point, tokens)[kept]
    basis = TopKBasis.neurons(calibrate(x), x.shape[1])
    metrics = evaluate_rows(tiny_model, {"b": basis}, hook_point, tokens, kept, rows_per_forward=5)["b"].metrics()
    for name in ("ce_recovered", "kl_recovered", "explained_variance", "cosine", "l2_ratio"):
        assert metrics[name] == pytest.approx(1, abs=1e-3)


def test_the_number_of_rows_a_pass_does_not_matter(tiny_model, tokens, kept):
    hook_point = "blocks.1.hook_resid_post"
    basis = TopKBasis.neurons(calibrate(activations_of(tiny_model, hook_point, tokens)[kept]), 4)
    results = [
        evaluate_rows(tiny_model, {"b": basis}, hook_point, tokens, kept, rows_per_forward=rows)["b"].metrics()
        for rows in (1, 3, 5)
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert results[0] == pytest.approx(results[2], rel=1e-4)


def test_an_sae_gets_the_same_numbers_alone_and_beside_others(tiny_model, tokens, kept):
    hook_point = "blocks.1.hook_resid_post"
    calibration = calibrate(activations_of(tiny_model, hook_point, tokens)[kept])
    a, b = TopKBasis.neurons(calibration, 4), TopKBasis.pca(calibration, 9)
    alone = evaluate_rows(tiny_model, {"a": a}, hook_point, tokens, kept, rows_per_forward=5)
    beside = evaluate_rows(tiny_model, {"b": b, "a": a}, hook_point, tokens, kept, rows_per_forward=5)
    assert alone["a"].metrics() == beside["a"].metrics()
    assert beside["b"].metrics() != beside["a"].metrics()


def test_layers_below_are_left_out_and_the_model_is_as_before(tiny_model, tokens):
    calls = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, layer=layer: calls.append(layer))
        for layer, block in enumerate(tiny_model.blocks)
    ]
    before = tiny_model(tokens, return_type="logits")
    counts = {}
    for hook_point in ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"):
        rerun = Rerun(tiny_model, hook_point)
        _, activations = rerun.clean(tokens)
        calls.clear()
        rerun.replaced(activations)
        counts[hook_point] = calls.copy()
    for handle in handles:
        handle.remove()
    assert counts == {
        "blocks.1.hook_resid_pre": [1, 2],
        "blocks.1.hook_resid_post": [2],
        "blocks.2.hook_mlp_out": [2],
    }
    assert torch.equal(tiny_model(tokens, return_type="logits"), before)


def test_logits_are_made_of_kept_positions_alone(tiny_model, tokens, kept):
    hook_point = "blocks.1.hook_resid_post"
    saes = {"b": TopKBasis.neurons(calibrate(activations_of(tiny_model, hook_point, tokens)[kept]), 4)}
    expected = evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=5)["b"].metrics()
    positions = []
    handle = tiny_model.unembed.register_forward_hook(lambda module, given, logits: positions.append(len(logits)))
    found = evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=5)["b"].metrics()
    handle.remove()
    assert found == expected
    n_kept = int(kept.sum())
    assert [n for n in positions if n > 5] == [n_kept] * 3  # clean, ablated, SAE


def test_a_model_that_caps_its_logits_is_run_to_its_end(tokens, kept):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        config = HookedTransformerConfig(
            n_layers=2, d_model=32, n_ctx=16, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", seed=1, device="cpu",
            output_logits_soft_cap=1.5,
        )  # fmt: skip
        model = HookedTransformer(config)
        for parameter in model.parameters():
            parameter.data.mul_(4)
    hook_point = "blocks.0.hook_resid_post"
    sae = TopKBasis.pca(calibrate(activations_of(model, hook_point, tokens)[kept]), 10)
    found = evaluate_rows(model, {"b": sae}, hook_point, tokens, kept, rows_per_forward=2)["b"].metrics()
    assert found == pytest.approx(expected_metrics(model, sae, hook_point, tokens, kept), rel=2e-3, abs=2e-5)


def test_an_error_in_the_middle_leaves_the_model_as_before(tiny_model, tokens):
    before = tiny_model(tokens, return_type="logits")
    rerun = Rerun(tiny_model, "blocks.1.hook_resid_post")
    _, activations = rerun.clean(tokens)
    with pytest.raises(RuntimeError):
        rerun.replaced(activations[..., :7])
    assert torch.equal(tiny_model(tokens, return_type="logits"), before)


def test_evaluating_changes_no_weight(tiny_model, tokens, kept):
    sae = trained_sae(activations_of(tiny_model, "blocks.0.hook_resid_post", tokens)[kept])
    before = {name: tensor.clone() for name, tensor in sae.state_dict().items()}
    for _ in range(2):
        evaluate_rows(tiny_model, {"s": sae}, "blocks.0.hook_resid_post", tokens, kept, rows_per_forward=5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sae.state_dict().items())


def test_sums_can_be_sent_to_another_process_with_what_they_share_once(tiny_model, tokens, kept):
    hook_point = "blocks.0.hook_mlp_out"
    basis = TopKBasis.neurons(calibrate(activations_of(tiny_model, hook_point, tokens)[kept]), 4)
    saes = {name: basis for name in "abcde"}
    sums = evaluate_rows(tiny_model, saes, hook_point, tokens, kept, rows_per_forward=2)
    sent = pickle.loads(pickle.dumps(sums))
    assert {name: one.metrics() for name, one in sent.items()} == {name: one.metrics() for name, one in sums.items()}
    assert sent["a"].sum_x is sent["e"].sum_x and sums["a"].sum_x is sums["e"].sum_x


@pytest.mark.parametrize(
    ("hook_point", "message"),
    [
        ("blocks.7.hook_resid_post", "3 layers"),
        ("blocks.1.hook_nothing", "blocks.1.hook_nothing.*none of this name"),
        ("hook_embed", "blocks.N"),
    ],
)
def test_a_hook_point_the_model_lacks_is_refused(tiny_model, tokens, kept, hook_point, message):
    with pytest.raises(ConfigError, match=message):
        evaluate_rows(tiny_model, {}, hook_point, tokens, kept, rows_per_forward=5)


def test_tokens_and_kept_must_match(tiny_model, tokens, kept):
    with pytest.raises(ConfigError, match="both .rows, context"):
        evaluate_rows(tiny_model, {}, "blocks.1.hook_resid_post", tokens, kept[:2], rows_per_forward=5)


def test_cross_entropy_and_kl_of_two_tokens_by_hand():
    # one row of two tokens, two words; clean predicts [1/2, 1/2] twice, the other [1/4, 3/4] twice; the next word is 1
    clean, other = torch.zeros(1, 2, 2), torch.tensor([0.25, 0.75]).log().expand(1, 2, 2)
    logits = torch.nn.Identity()
    behaviour = _Behaviour(logits, clean, torch.tensor([[0, 1]]), torch.tensor([[True, True]]))
    assert behaviour.has_next.tolist() == [True, False]
    assert behaviour.ce_clean.tolist() == pytest.approx([math.log(2), 0])
    ce, kl = behaviour.compare(other)
    assert ce.tolist() == pytest.approx([-math.log(0.75), 0])
    assert kl.tolist() == pytest.approx([0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)] * 2)
