"""Attribution on tiny random models against plain hooks and formulas, and on the demo model against the truth."""

import warnings

import numpy as np
import pytest
import torch
from demo_saes import PROMPTS
from torch import nn

from sae_core import ConfigError
from sae_core.analysis.attribution import (
    ERROR,
    Attribution,
    Effects,
    ablate,
    attribute,
    log_prob,
    logit,
    logit_difference,
    recall,
)
from sae_core.analysis.feature_edges import edges
from sae_core.analysis.final_norm import FinalNorm
from sae_core.architectures import ARCHITECTURES
from sae_core.sae import SAEConfig

CASES = {
    "topk": ("topk", "blocks.1.hook_resid_post", {}),
    "jumprelu": ("jumprelu", "blocks.0.hook_resid_pre", {}),
    "gated": ("gated", "blocks.2.hook_mlp_out", {}),
    "scaled by decoder norms": ("topk", "blocks.1.hook_attn_out", {"rescale_acts_by_decoder_norm": True}),
    "layer_norm": ("topk", "blocks.1.hook_resid_post", {"normalize_activations": "layer_norm"}),
    "resid_mid": ("topk", "blocks.1.hook_resid_mid", {}),
    "hook_z": ("topk", "blocks.1.attn.hook_z", {"reshape_activations": "hook_z"}),
    "mlp_post": ("topk", "blocks.1.mlp.hook_post", {"d_in": 128}),
    "last": ("topk", "blocks.2.hook_resid_post", {}),
    "transcoder": ("topk", "blocks.1.mlp.hook_in", {"writes": "blocks.1.hook_mlp_out"}),
    "skip transcoder": ("topk", "blocks.1.ln2.hook_normalized", {"writes": "blocks.1.hook_mlp_out", "skip": True}),
}


def make_sae(architecture, hook_point, options, width=32, seed=0):
    """Random weights; 40 latents, 5 active where the architecture counts them."""
    generator = torch.Generator().manual_seed(seed)
    options = dict(options)
    writes = options.pop("writes", None)
    d_in = options.pop("d_in", width)
    metadata = {"hook_name": hook_point} | ({"hook_name_out": writes} if writes else {})
    fields = {"d_out": d_in, "apply_b_dec_to_input": False} if writes else {}
    cfg = SAEConfig(
        architecture=architecture, d_in=d_in, d_sae=40, metadata=metadata, k=5 if architecture == "topk" else None,
        **fields, **options,
    )  # fmt: skip
    cls = ARCHITECTURES[architecture]
    weights = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 2 else 0.1)
        for name, shape in cls.shapes(cfg).items()
    }
    if "threshold" in weights:
        weights["threshold"] = weights["threshold"].abs() + 0.5
    return cls(cfg, weights)


@pytest.fixture(scope="module")
def hooked():
    """A HookedTransformer with RMS norms, and weights that require gradients."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens import HookedTransformer, HookedTransformerConfig

        cfg = HookedTransformerConfig(
            n_layers=3, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_vocab=50, act_fn="gelu", normalization_type="RMS",
            seed=1, device="cpu",
        )  # fmt: skip
        model = HookedTransformer(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
            if name.endswith(".w"):
                parameter.add_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(4)))
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(5))


def by_hand(model, sae, tokens, metric, kept=None):
    """metric(as is), and {(row, position, latent): effect}: whole passes, one a node, with the latent's entry set to 0,
    the rest decoded and the error added."""
    reads = sae.cfg.metadata["hook_name"]
    writes = sae.cfg.metadata.get("hook_name_out", reads)
    seen = {}
    watch = [(name, lambda activation, hook, name=name: seen.update({name: activation})) for name in (reads, writes)]
    value = metric(model.run_with_hooks(tokens, return_type="logits", fwd_hooks=watch))
    x, y = (seen[name].reshape(*tokens.shape, -1) for name in (reads, writes))
    f = sae.encode(x)
    error = y - sae.decode(f, x).reshape(y.shape)

    def run(f, error):
        new = sae.decode(f, x).reshape(y.shape) + error
        at, value = writes, new
        if writes.endswith("resid_mid"):  # set by what attention adds to the stream
            at, value = writes.replace("resid_mid", "attn_out"), seen["attn"] + new - y
        shape = seen[writes].shape
        hook = (at, lambda activation, hook: value.reshape(shape))
        return metric(model.run_with_hooks(tokens, return_type="logits", fwd_hooks=[hook]))

    if writes.endswith("resid_mid"):
        name = writes.replace("resid_mid", "attn_out")
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: seen.update(attn=activation))])
    effects = {}
    for row, position, latent in torch.nonzero(f).tolist():
        changed = f.clone()
        changed[row, position, latent] = 0
        effects[row, position, latent] = float(value - run(changed, error))
    for row in range(tokens.shape[0]):
        for position in range(tokens.shape[1]):
            changed = error.clone()
            changed[row, position] = 0
            effects[row, position, ERROR] = float(value - run(f, changed))
    return float(value), effects


def product(logits):
    """Not a sum over rows."""
    return logits[:, -1, 3].mean() * logits[:, 2, 7].mean()


METRICS = {"difference": logit_difference(3, [4, 9]), "log_prob": log_prob([1, 2], position=[-1, 5]), "own": product}


@pytest.mark.parametrize("case", CASES)
def test_an_ablation_sets_one_node_to_zero_and_leaves_the_rest(tiny_model, tokens, case):
    sae = make_sae(*CASES[case])
    for name in ("difference", "own") if case == "topk" else ("log_prob",):
        with torch.no_grad():
            value, expected = by_hand(tiny_model, sae, tokens, METRICS[name])
        found = ablate(tiny_model, sae, tokens, METRICS[name], at_once=7)
        (effects,) = found.effects.values()
        assert found.value == pytest.approx(value, abs=1e-4) and found.method == "ablation"
        assert effects.nodes() == sorted(expected, key=lambda node: (node[2] == ERROR, *node))
        assert max(abs(effect) for effect in expected.values()) > 0.02  # a hundred times the tolerance
        np.testing.assert_allclose(effects.effect, [expected[node] for node in effects.nodes()], atol=2e-4)


def test_an_sae_of_one_head(tiny_model, tokens):
    """It reads and changes that head alone."""
    name = "blocks.1.attn.hook_z"
    sae = make_sae("topk", name, {"d_in": 8})
    sae.cfg.metadata["hook_head_index"] = 2
    true = ablate(tiny_model, sae, tokens, logit(3))[name]
    node = int(true.order()[0])
    seen = []
    with torch.no_grad():
        before = logit(3)(tiny_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda z, hook: seen.append(z))]))
        z = seen[0].reshape(2, 9, 4, 8)[:, :, 2]
        f = sae.encode(z)
        assert (len(true), true.is_error.sum()) == (int((f != 0).sum()) + 18, 18)
        row, position, latent = true.nodes()[node]
        vector = (z - sae.decode(f))[row, position]
        if latent != ERROR:
            vector = f[row, position, latent] * sae.W_dec[latent]
        changed = seen[0].clone()
        changed.view(2, 9, 4, 8)[row, position, 2] -= vector
        after = logit(3)(tiny_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda z, hook: changed)]))
    assert true.effect[node] == pytest.approx(float(before - after), abs=1e-4)
    exact = attribute(
        tiny_model, sae, tokens, logit(3), method="integrated_gradients", paths=1000, steps=20, positions=8
    )[name]
    at = true.position == 8
    np.testing.assert_allclose(exact.effect, true.effect[at], atol=1e-3)


def test_a_hooked_transformer_with_rms_norms(hooked, tokens):
    sae = make_sae(*CASES["topk"])
    with torch.no_grad():
        _, expected = by_hand(hooked, sae, tokens, METRICS["difference"])
    found = ablate(hooked, sae, tokens, METRICS["difference"], positions=8)["blocks.1.hook_resid_post"]
    np.testing.assert_allclose(found.effect, [expected[node] for node in found.nodes()], atol=2e-4)
    exact = attribute(
        hooked, sae, tokens, METRICS["difference"], method="integrated_gradients", paths=1000, steps=200, positions=8
    )
    np.testing.assert_allclose(exact["blocks.1.hook_resid_post"].effect, found.effect, rtol=0.01, atol=5e-3)
    assert all(parameter.grad is None for parameter in hooked.parameters())


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_the_activation_times_its_derivative(tiny_model, tokens, case):
    """Against a central difference: of a node scaled by 1 +- h."""
    sae = make_sae(*CASES[case])
    (found,) = attribute(tiny_model, sae, tokens, METRICS["difference"]).effects.values()
    h = 0.004
    reads = sae.cfg.metadata["hook_name"]
    writes = sae.cfg.metadata.get("hook_name_out", reads)
    at = writes.replace("resid_mid", "attn_out")
    seen = {}
    watch = [(name, lambda a, hook, name=name: seen.update({name: a})) for name in {reads, writes, at}]
    with torch.no_grad():
        tiny_model.run_with_hooks(tokens, fwd_hooks=watch)
        x, y = (seen[name].reshape(*tokens.shape, -1) for name in (reads, writes))
        f = sae.encode(x)
        error = y - sae.decode(f, x).reshape(y.shape)
        strongest = found.chosen(found.order()[:12])
        for (row, position, latent), effect in zip(strongest.nodes(), strongest.effect, strict=True):
            if latent == ERROR:
                vector = error[row, position]
            else:
                alone = torch.zeros_like(f)
                alone[row, position, latent] = f[row, position, latent]
                vector = (sae.decode(alone, x) - sae.decode(torch.zeros_like(f), x)).reshape(y.shape)[row, position]
            values = []
            for sign in (1, -1):
                new = seen[at].clone()
                new.view(*tokens.shape, -1)[row, position] += sign * h * vector
                hook = (at, lambda a, hook, new=new: new)
                values.append(METRICS["difference"](tiny_model.run_with_hooks(tokens, fwd_hooks=[hook])))
            assert effect == pytest.approx(float(values[0] - values[1]) / (2 * h), rel=0.02, abs=2e-3)


def test_hook_points_together_are_each_judged_alone(tiny_model, tokens):
    saes = [make_sae(*CASES[case]) for case in ("topk", "jumprelu", "transcoder", "resid_mid")]
    for method in ("gradient", "direct", "integrated_gradients"):
        together = attribute(tiny_model, saes, tokens, METRICS["difference"], method=method)
        for sae in saes:
            (alone,) = attribute(tiny_model, sae, tokens, METRICS["difference"], method=method).effects.values()
            np.testing.assert_allclose(together[alone.hook_point].effect, alone.effect, atol=1e-4)


def test_direct_attribution_by_hand(tiny_model, tokens):
    """At the end of the last layer, the norm's scale held: (f W_dec[i] - its mean) * gain / scale . (u_a - u_b)."""
    sae = make_sae(*CASES["last"])
    found = attribute(tiny_model, sae, tokens, logit_difference(3, 4), method="direct")
    effects = found["blocks.2.hook_resid_post"]
    network = tiny_model.original_model
    with torch.no_grad():
        seen = []
        tiny_model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.2.hook_resid_post", lambda activation, hook: seen.append(activation))]
        )
        x = seen[0]
        scale = (x.var(-1, unbiased=False) + 1e-5).sqrt()
        head = network.lm_head.weight[3] - network.lm_head.weight[4]
        gain = dict(network.named_parameters())
        gain = next(value for name, value in gain.items() if "ln_f" in name and name.endswith("weight"))
        f = sae.encode(x)
        error = x - sae.decode(f)
        for (row, position, latent), effect in zip(effects.nodes(), effects.effect, strict=True):
            vector = error[row, position] if latent == ERROR else f[row, position, latent] * sae.W_dec[latent]
            expected = ((vector - vector.mean()) * gain / scale[row, position]) @ head
            assert effect == pytest.approx(float(expected) if position == 8 else 0.0, abs=1e-4)
        # what they add up to: all but b_dec, with the scale held
        left = (sae.b_dec - sae.b_dec.mean()) * gain / scale[:, -1:] @ head
        bias = next(v for n, v in network.named_parameters() if "ln_f" in n and n.endswith("bias")) @ head
        assert effects.total == pytest.approx(found.value - float(left.sum()) - 2 * float(bias), abs=1e-3)
    true = ablate(tiny_model, sae, tokens, logit_difference(3, 4), freeze_norm=True)
    np.testing.assert_allclose(true["blocks.2.hook_resid_post"].effect, effects.effect, atol=1e-4)


def test_direct_attribution_passes_through_the_matrices_behind_heads_and_neurons(tiny_model, tokens):
    sae = make_sae(*CASES["mlp_post"])
    (found,) = attribute(tiny_model, sae, tokens, logit(3), method="direct").effects.values()
    network = tiny_model.original_model
    by_name = dict(network.named_parameters())
    W_out = next(value for name, value in by_name.items() if ".h.1." in name and ".mlp." in name and "c_proj" in name
                 and name.endswith("weight"))  # fmt: skip
    gain = next(value for name, value in by_name.items() if "ln_f" in name and name.endswith("weight"))
    seen = []
    with torch.no_grad():
        tiny_model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_post", lambda a, hook: seen.append(a))])
        for (row, position, latent), activation, effect in zip(
            found.nodes(), found.activation, found.effect, strict=True
        ):
            if latent == ERROR or position != 8:
                continue
            scale = (seen[0][row, 8].var(unbiased=False) + 1e-5).sqrt()
            vector = (activation * sae.W_dec[latent]) @ W_out
            expected = ((vector - vector.mean()) * gain / scale) @ network.lm_head.weight[3]
            assert effect == pytest.approx(float(expected), abs=1e-4)
    heads = make_sae(*CASES["hook_z"])
    (found,) = attribute(tiny_model, heads, tokens, logit(3), method="direct").effects.values()
    assert np.abs(found.effect[found.position == 8]).min() > 0 and not found.effect[found.position != 8].any()
    with pytest.raises(ConfigError, match="nonlinearity"):
        attribute(tiny_model, make_sae("topk", "blocks.1.mlp.hook_in", {}), tokens, logit(3), method="direct")


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_integrated_gradients_add_up(tiny_model, tokens, freeze_norm):
    sae = make_sae(*CASES["layer_norm"])
    options = {"method": "integrated_gradients", "freeze_norm": freeze_norm}
    for paths, steps in ((1, 60), (7, 20)):
        found = attribute(tiny_model, sae, tokens, METRICS["log_prob"], paths=paths, steps=steps, **options)
        effects = found["blocks.1.hook_resid_post"]
        assert effects.total == pytest.approx(effects.expected_total, abs=1e-3)
        assert abs(effects.total) > 0.02
    # one line a node: the truth
    options["positions"] = [5, 8]
    true = ablate(
        tiny_model, sae, tokens, METRICS["log_prob"], freeze_norm=freeze_norm, positions=[5, 8]
    )["blocks.1.hook_resid_post"]  # fmt: skip
    found = attribute(tiny_model, sae, tokens, METRICS["log_prob"], paths=len(true), steps=30, **options)
    np.testing.assert_allclose(found["blocks.1.hook_resid_post"].effect, true.effect, atol=1e-3)


def test_one_line_of_integrated_gradients_ends_where_only_what_is_no_node_is_left(tiny_model, tokens):
    sae = make_sae(*CASES["layer_norm"])
    name, seen = "blocks.1.hook_resid_post", []
    found = attribute(tiny_model, sae, tokens, METRICS["log_prob"], method="integrated_gradients", paths=1)
    with torch.no_grad():
        tiny_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: seen.append(activation))])
        nothing = sae.decode(torch.zeros(*tokens.shape, sae.d_sae), seen[0])
        left = tiny_model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activation, hook: nothing)])
    assert found[name].expected_total == pytest.approx(found.value - float(METRICS["log_prob"](left)), abs=1e-3)


def test_any_function_of_the_logits_is_a_metric(tiny_model, tokens):
    sae = make_sae(*CASES["topk"])
    own = lambda logits: (logits[:, -1, 3] - logits[:, -1, 4]).sum()  # noqa: E731
    for method in ("gradient", "direct", "integrated_gradients"):
        a, b = (attribute(tiny_model, sae, tokens, metric, method=method) for metric in (own, logit_difference(3, 4)))
        assert a.value == pytest.approx(b.value, abs=1e-4)
        (one,), (other,) = a.effects.values(), b.effects.values()
        np.testing.assert_allclose(one.effect, other.effect, atol=1e-4)
    with torch.no_grad():
        logits = tiny_model(tokens)
    assert float(logit_difference(3, 4)(logits)) == pytest.approx(b.value, abs=1e-4)
    assert float(log_prob(3)(logits)) == pytest.approx(float(logits[:, -1].log_softmax(-1)[:, 3].sum()), abs=1e-4)
    with pytest.raises(ConfigError, match=r"metric returned \[2\].*one number"):
        attribute(tiny_model, sae, tokens, lambda logits: logits[:, -1, 3])


@pytest.mark.parametrize("model", ["tiny_model", "hooked"])
def test_the_final_norm_with_its_scale_held(model, tokens, request):
    model = request.getfixturevalue(model)
    norm = FinalNorm(model)
    with torch.no_grad():
        with norm.watched() as seen:
            logits = model(tokens)
        scale = norm.scales(seen[0])
        centred = seen[0] - seen[0].mean(-1, keepdim=True) if norm.centres else seen[0]
        by_hand = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(scale, by_hand, rtol=1e-4, atol=0)
        with norm.frozen(scale):
            torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
        with norm.frozen(scale / 2):
            doubled = model(tokens)
        bias = model.unembed(norm.bias.expand_as(seen[0]))
        torch.testing.assert_close(doubled - bias, 2 * (logits - bias), rtol=1e-3, atol=1e-3)
    assert norm.centres == (model is not request.getfixturevalue("hooked"))


def test_a_final_layer_that_is_no_norm_cannot_be_held():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_final = nn.Sequential(nn.LayerNorm(8), nn.Tanh())

    with pytest.raises(ConfigError, match="freeze_norm"):
        FinalNorm(Odd()).scales(torch.randn(2, 3, 8))
    odd_width = nn.Module()
    odd_width.ln_final = nn.LayerNorm(7)
    nn.init.uniform_(odd_width.ln_final.weight, 0.5, 2)
    x = torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)) + 1
    norm = FinalNorm(odd_width)
    torch.testing.assert_close(norm.scales(x)[..., 0], (x.var(-1, unbiased=False) + 1e-5).sqrt(), rtol=1e-4, atol=0)
    torch.testing.assert_close(norm.gain.flatten(), odd_width.ln_final.weight.detach(), rtol=1e-4, atol=1e-5)


def test_weights_made_in_inference_mode_and_callers_without_gradients(tiny_model, tokens):
    expected = attribute(tiny_model, make_sae(*CASES["topk"]), tokens, logit(3))["blocks.1.hook_resid_post"]
    with torch.inference_mode():
        sae = make_sae(*CASES["topk"])
        found = attribute(tiny_model, sae, tokens, logit(3))["blocks.1.hook_resid_post"]
    np.testing.assert_array_equal(found.effect, expected.effect)
    assert ablate(tiny_model, sae, tokens, logit(3), nodes=[("blocks.1.hook_resid_post", 1, 8, "error")])


def test_positions_that_training_left_out_have_no_nodes(tiny_model, tokens):
    sae = make_sae(*CASES["topk"])
    sae.cfg.metadata["exclude"] = {"first_positions": 1, "special_tokens": True}
    name = "blocks.1.hook_resid_post"
    for method in ("gradient", "integrated_gradients"):
        found = attribute(tiny_model, sae, tokens, logit(3), method=method)[name]
        assert set(found.position) == set(range(1, 9))
        everywhere = attribute(tiny_model, sae, tokens, logit(3), method=method, positions=slice(None))[name]
        assert set(everywhere.position) == set(range(9))
        assert set(attribute(tiny_model, sae, tokens, logit(3), positions=[2, -1])[name].position) == {2, 8}
    true = ablate(tiny_model, sae, tokens, logit(3), positions=8)[name]
    assert set(true.position) == {8} and set(true.row) == {0, 1}
    with pytest.raises(ConfigError, match="positions 9"):
        attribute(tiny_model, sae, tokens, logit(3), positions=9)


def test_chosen_nodes_and_tables(tiny_model, tokens):
    sae = make_sae(*CASES["topk"])
    name = "blocks.1.hook_resid_post"
    all_nodes = ablate(tiny_model, {"mine": sae}, tokens, logit(3))
    strongest = attribute(tiny_model, {"mine": sae}, tokens, logit(3)).strongest(6)
    some = ablate(tiny_model, {"mine": sae}, tokens, logit(3), nodes=strongest)
    assert some["mine"].nodes() == strongest["mine"].nodes()
    truth = dict(zip(all_nodes["mine"].nodes(), all_nodes["mine"].effect, strict=True))
    np.testing.assert_allclose(some["mine"].effect, [truth[node] for node in some["mine"].nodes()], atol=1e-4)
    table = all_nodes.table(10)
    assert list(table.columns) == [
        "hook_point", "row", "position", "token", "kind", "latent", "activation", "effect"
    ]  # fmt: skip
    assert len(table) == 10 and table.effect.abs().is_monotonic_decreasing
    first = table.iloc[0]
    assert first.effect == pytest.approx(max(truth.values(), key=abs))
    summed = all_nodes.by_latent()
    assert summed.effect.sum() == pytest.approx(all_nodes["mine"].total)
    (errors,) = summed[summed.kind == "error"].itertuples()
    assert (errors.latent, errors.positions) == (ERROR, 18)
    with pytest.raises(ConfigError, match="not active at position 3"):
        inactive = next(i for i in range(40) if (0, 3, i) not in truth)
        ablate(tiny_model, sae, tokens, logit(3), nodes=[(name, 3, inactive)])
    with pytest.raises(ConfigError, match="accepted: .hook point, position, latent"):
        ablate(tiny_model, sae, tokens, logit(3), nodes=[("blocks.0.hook_resid_post", 3, 1)])


def test_what_is_given_wrongly_is_named(tiny_model, hooked, tokens):
    sae = make_sae(*CASES["topk"])
    elsewhere = make_sae("topk", "blocks.1.hook_nowhere", {})
    for model in (tiny_model, hooked):
        for call in (attribute, ablate):
            with pytest.raises(ConfigError, match="hook_nowhere.*none of this name"):
                call(model, elsewhere, tokens, logit(3))
    wrong = [
        ({"method": "shapley"}, "method 'shapley'; accepted: gradient"),
        ({"steps": 0}, "steps 0"),
        ({"metric": logit(50)}, "token 50; accepted: 0 to 49"),
        ({"metric": logit(3, position=9)}, "position 9; accepted: -9 to 8"),
        ({"metric": logit([1, 2, 3])}, "3 values of token for 2 rows"),
        ({"metric": logit("cat")}, "token 'cat'"),
        ({"saes": {"blocks.0.hook_resid_post": sae}}, "belongs to 'blocks.1.hook_resid_post'"),
        ({"saes": [sae, sae]}, "two of them"),
        ({"saes": []}, "none are given"),
        ({"saes": [make_sae("topk", "blocks.1.hook_resid_post", {"d_in": 31})]}, "31 dimensions"),
        ({"saes": [make_sae("topk", "blocks.7.hook_resid_post", {})]}, "3 layers"),
        ({"tokens": [[1, 2], [3]]}, "tokens"),
        ({"tokens": torch.rand(2, 3)}, "tokens have shape"),
    ]
    for options, message in wrong:
        given = {"saes": sae, "tokens": tokens, "metric": logit(3)} | options
        with pytest.raises(ConfigError, match=message):
            attribute(tiny_model, **given)


def ranked(effects, activations=None):
    n = len(effects)
    zeros = np.zeros(n, dtype=np.int64)
    one = Effects("here", zeros, np.arange(n), zeros, np.ones(n), np.array(effects, dtype=np.float64))
    return Attribution("made", False, 0.0, zeros[None], None, {"here": one})


def test_recall_by_hand():
    true = ranked([5, -4, 3, 0.1, 0, 0])
    assert recall(ranked([1, -9, 0, 2, -3, 0]), true, top=3) == {"here": pytest.approx(1 / 3)}
    assert recall(ranked([1, -9, 8, 0.5, 0, 0]), true, top=3) == {"here": 1.0}
    with pytest.raises(ConfigError, match="6 nodes"):
        recall(true, true, top=6)


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("down", ["blocks.2.hook_resid_post", "blocks.2.mlp.hook_in"])
def test_edges_by_ablation_and_by_gradient(tiny_model, tokens, down):
    up = make_sae(*CASES["topk"])
    down = make_sae("jumprelu", down, {"writes": "blocks.2.hook_mlp_out"} if "mlp" in down else {}, seed=1)
    row = tokens[:1]
    true = edges(tiny_model, up, down, row[0], method="ablation", top=6, at_once=5)
    reads = down.cfg.metadata["hook_name"]
    seen = {}
    names = ("blocks.1.hook_resid_post", reads)
    watch = [(name, lambda a, hook, name=name: seen.update({name: a})) for name in names]
    with torch.no_grad():
        tiny_model.run_with_hooks(row, fwd_hooks=watch)
        x, z = (seen[name].clone() for name in names)
        f, g = up.encode(x), down.encode(z)
        error = x - up.decode(f)
        most_active = g.flatten().topk(6).values.tolist()
        assert sorted(true.down_activation, reverse=True) == pytest.approx(most_active, abs=1e-5)
        assert len(true.up_latent) == int((f != 0).sum()) + 9 and (true.up_latent[-9:] == ERROR).all()

        def latents(vector, position, share):
            new = x.clone()
            new[0, position] -= share * vector
            hook = ("blocks.1.hook_resid_post", lambda a, hook: new)
            tiny_model.run_with_hooks(row, fwd_hooks=[hook, (reads, lambda a, hook: seen.update({reads: a}))])
            return down.encode(seen[reads])[0, true.down_position, true.down_latent]

        estimated = edges(tiny_model, up, down, row, top=6)
        np.testing.assert_array_equal(estimated.down_latent, true.down_latent)
        scale = np.abs(true.effect).max()
        for node, (position, latent) in enumerate(zip(true.up_position, true.up_latent, strict=True)):
            vector = error[0, position] if latent == ERROR else f[0, position, latent] * up.W_dec[latent]
            whole = g[0, true.down_position, true.down_latent] - latents(vector, position, 1.0)
            np.testing.assert_allclose(true.effect[:, node], whole, atol=1e-4 * scale + 1e-4)
            slope = (latents(vector, position, -0.01) - latents(vector, position, 0.01)) / 0.02
            np.testing.assert_allclose(estimated.effect[:, node], slope, rtol=0.05, atol=5e-3 * scale)
    # what comes later has no effect
    later = true.up_position[None] > true.down_position[:, None]
    assert np.abs(true.effect[later]).max() < 1e-4 * scale and np.abs(estimated.effect[later]).max() < 1e-6 * scale
    table = estimated.table(5)
    assert table.effect.abs().is_monotonic_decreasing and len(table) == 5


def test_edges_between_hook_points_that_do_not_meet_are_refused(tiny_model, hooked, tokens):
    up, down = make_sae(*CASES["topk"]), make_sae(*CASES["jumprelu"])
    for model in (tiny_model, hooked):
        for method in ("gradient", "ablation"):
            with pytest.raises(ConfigError, match="not behind"):
                edges(model, up, down, tokens[0], method=method)
    with pytest.raises(ConfigError, match="2 rows"):
        edges(tiny_model, down, up, tokens)
    with pytest.raises(ConfigError, match="no active feature"):
        edges(tiny_model, down, up, tokens[0], targets=[(3, 40)])
    chosen = attribute(tiny_model, up, tokens[:1], logit(3))
    found = edges(tiny_model, down, up, tokens[0], targets=chosen, top=3)
    features = chosen["blocks.1.hook_resid_post"]
    features = features.chosen(~features.is_error)
    strongest = features.chosen(features.order()[:3])
    np.testing.assert_array_equal(found.down_latent, strongest.latent)
    np.testing.assert_array_equal(found.down_position, strongest.position)


# ---- the demo model -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(demo_saes):
    from penstock.models import load_model
    from penstock.spec import ModelSpec
    from sae_core import SAE

    return load_model(ModelSpec(name="demo"), "cpu"), [SAE.load(folder) for folder in demo_saes.values()]


@pytest.mark.parametrize("freeze_norm", [False, True])
def test_gradient_methods_find_the_50_largest_true_effects(demo, freeze_norm):
    """Mean over prompts, by layer; features at their positions and errors, one node each."""
    model, saes = demo
    found = {"gradient": [], "integrated_gradients": []}
    for prompt in PROMPTS:
        ids = model.to_tokens(prompt)
        best, second = model(ids)[0, -1].topk(2).indices.tolist()
        metric = logit_difference(best, second)
        true = ablate(model, saes, ids, metric, freeze_norm=freeze_norm)
        assert all(len(effects) > 4 * 50 for effects in true.effects.values())
        assert all(effects.is_error.sum() == ids.shape[1] - 1 for effects in true.effects.values())
        for method, recalls in found.items():
            estimated = attribute(model, saes, prompt, metric, method=method, freeze_norm=freeze_norm)
            assert estimated.value == pytest.approx(true.value, abs=1e-4)
            recalls.append(list(recall(estimated, true, top=50).values()))
    by_layer = {method: np.mean(recalls, axis=0) for method, recalls in found.items()}
    assert (by_layer["gradient"] >= 0.7).all(), by_layer
    assert (by_layer["integrated_gradients"] >= 0.8).all(), by_layer


def test_edges_on_the_demo_find_the_largest_true_ones(demo):
    """But for upstream features that fire at nearly every position, whose effect is not near its first order."""
    model, (up, down) = demo
    found = []
    for prompt in PROMPTS[:4]:
        true, estimated = (edges(model, up, down, prompt, top=10, method=method) for method in ("ablation", "gradient"))
        latents, counts = np.unique(true.up_latent, return_counts=True)
        dense = latents[(counts > 0.9 * (len(true.texts) - 1)) & (latents != ERROR)]
        kept = ~np.isin(true.up_latent, dense)
        assert kept.sum() > 100
        largest = [set(np.argsort(-np.abs(one.effect[:, kept]), axis=None)[:50].tolist()) for one in (true, estimated)]
        found.append(len(largest[0] & largest[1]) / 50)
    assert np.mean(found) >= 0.7, found
    table = true.table(1)
    assert table.up_token[0] in true.texts and table.kind[0] in ("feature", "error")


def test_tokens_as_text(demo):
    model, saes = demo
    found = attribute(model, saes, PROMPTS[0], log_prob("read"))
    assert found.texts[0][0] == "<|endoftext|>" and "".join(found.texts[0][1:]) == PROMPTS[0]
    assert set(found.table(5).token) <= set(found.texts[0])
    shown = repr(found).splitlines()
    assert len(shown) == 12 and max(map(len, shown)) < 120 and f"on a metric of {found.value:.4g}" in shown[0]
    assert str(found.table(1).latent[0]) in shown[2].split()
    with pytest.raises(ConfigError, match=r"'readline write' is \d tokens"):
        attribute(model, saes, PROMPTS[0], log_prob("readline write"))
