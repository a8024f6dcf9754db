import copy

import numpy as np
import pytest
import torch

from hooked_models import random_hooked_transformer
from sae_core import ARCHITECTURES, SAE, ConfigError, SAEConfig
from sae_core.analysis import Ablate, Add, Clamp, Scale, steer, sweep_strengths, with_saes
from sae_core.analysis.steering import edited_positions

D, HEADS, VOCAB, D_SAE = 32, 4, 50, 40
STREAM = "blocks.1.hook_resid_post"
PROMPT = torch.randint(1, VOCAB, (6,), generator=torch.Generator().manual_seed(0))
CLOSE = {"rtol": 1e-4, "atol": 2e-4}
KINDS = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 12}),
    "topk, by decoder norms": ("topk", {"k": 12, "rescale_acts_by_decoder_norm": True}),
    "layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "constant_norm_rescale": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
}


@pytest.fixture(scope="module")
def bridge(tiny_model):
    model = with_saes(copy.deepcopy(tiny_model))
    model.tokenizer = None
    return model


@pytest.fixture(scope="module")
def hooked():
    return with_saes(random_hooked_transformer())


@pytest.fixture(params=["bridge", "hooked"])
def model(request):
    model = request.getfixturevalue(request.param)
    yield model
    model.reset_saes()
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def make(reads: str = STREAM, writes: str | None = None, kind: str = "standard", seed: int = 0, d_in: int = D, **more):
    architecture, config = KINDS[kind]
    cls, generator = ARCHITECTURES[architecture], torch.Generator().manual_seed(seed)
    about = {"hook_name": reads} | ({"hook_name_out": writes} if writes else {}) | more.pop("metadata", {})
    transcoder = {"d_out": D, "apply_b_dec_to_input": False} if writes else {}
    cfg = SAEConfig(
        architecture=architecture, d_in=d_in, d_sae=D_SAE, metadata=about, **config, **transcoder, **more
    )
    return cls(cfg, {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in cls.shapes(cfg).items()})


def orthogonal(reads: str = STREAM, seed: int = 0) -> SAE:
    """Of which every latent is an axis of its own: what is decoded is encoded again exactly."""
    axes = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)))[0]
    cfg = SAEConfig(architecture="standard", d_in=D, d_sae=D, metadata={"hook_name": reads})
    weights = {"W_enc": axes.T.contiguous(), "W_dec": axes, "b_enc": torch.zeros(D), "b_dec": torch.zeros(D)}
    return ARCHITECTURES["standard"](cfg, weights)


def text_of(model, name, edited, n=3, prompt=PROMPT):
    """Generated step by step over the whole text, the activations at `name` made by `edited` each time."""
    tokens = prompt[None]
    for _ in range(n):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: edited(x))])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0]


@torch.no_grad()
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_is_the_difference_that_decoding_makes(model, kind, attached):
    """Ablate: x + decode(f without the latent) - decode(f), and so for the others; SAEs of every form."""
    sae = make(kind=kind)
    if attached:
        model.add_sae(sae, use_error_term=True)
    latent = int(sae.encode(model.run_with_cache(PROMPT[None])[1][STREAM]).sum((0, 1)).argmax())
    changes = {
        Ablate(latent): lambda f: 0 * f, Clamp(latent, 5.0): lambda f: 0 * f + 5.0,
        Scale(latent, -2.0): lambda f: -2.0 * f, Add(latent, 6.0): lambda f: f + 6.0,
    }  # fmt: skip
    for edit, change in changes.items():

        def edited(x, change=change):
            f = sae.encode(x)
            wanted = f.clone()
            wanted[..., latent] = change(f[..., latent])
            return x + sae.decode(wanted, x) - sae.decode(f, x)

        steered = steer(model, sae, PROMPT, edit, max_new_tokens=3, stop_at_eos=False)
        with model.saes([]):
            model.reset_saes()
            assert torch.equal(torch.from_numpy(steered.tokens), text_of(model, STREAM, edited))
            clean = model(torch.from_numpy(steered.tokens)[None])[0].log_softmax(-1)
            logits = model.run_with_hooks(
                torch.from_numpy(steered.tokens)[None], fwd_hooks=[(STREAM, lambda x, hook: edited(x))]
            )
            _, cache = model.run_with_cache(torch.from_numpy(steered.tokens)[None])
        kl = (clean.exp() * (clean - logits[0].log_softmax(-1))).sum(-1)
        torch.testing.assert_close(torch.from_numpy(steered.kl).float(), kl, rtol=1e-2, atol=2e-4)
        (feature,) = steered.features
        own = sae.encode(cache[STREAM])[0]
        torch.testing.assert_close(torch.from_numpy(feature.unsteered), own[:, latent], **CLOSE)
        torch.testing.assert_close(torch.from_numpy(feature.before), own[:, latent], **CLOSE)
        torch.testing.assert_close(torch.from_numpy(feature.wanted), change(own[:, latent]), **CLOSE)
        after = sae.encode(edited(cache[STREAM]))[0, :, latent]
        torch.testing.assert_close(torch.from_numpy(feature.after), after, **CLOSE)
        assert feature.edited.all() and steered.kl.max() > 1e-3


@torch.no_grad()
def test_clamping_sets_the_feature_where_decoder_rows_do_not_overlap(model):
    sae = orthogonal()
    x = model.run_with_cache(PROMPT[None])[1][STREAM]
    latent, *others = (sae.encode(x)[0] > 0).sum(0).sub(3).abs().argsort()[:3].tolist()  # active on half of the tokens
    steered = steer(model, sae, PROMPT, [Clamp(latent, 7.5), Ablate(others)], max_new_tokens=4, stop_at_eos=False)
    features = {one.feature: one for one in steered.features}
    clamped, ablated = features[latent], [features[other] for other in others]
    was_active = clamped.before > 0
    assert 0 < was_active.sum() < len(was_active)
    np.testing.assert_allclose(clamped.after[was_active], 7.5, rtol=1e-4)
    assert (clamped.after[~was_active] < 7.5).all()  # from where the stream pointed the other way
    for one in ablated:
        # what was active is taken away; where the stream points the other way, there was nothing to take
        np.testing.assert_allclose(one.after, 0, atol=1e-4)
    assert (clamped.unsteered != 7.5).all() and any(one.before.max() > 0.1 for one in ablated)


@torch.no_grad()
def test_nothing_changes_at_strength_0_and_more_the_more_is_added(model):
    frame = sweep_strengths(model, orthogonal(), PROMPT, 3, [0, 1, 2, 4, 8], max_new_tokens=6, stop_at_eos=False)
    assert frame.strength.tolist() == frame.amount.tolist() == [0, 1, 2, 4, 8]
    assert frame.kl_prompt[0] < 1e-9 and frame.kl_generated[0] < 1e-9
    assert frame.text[0] == frame.attrs["unsteered_text"]
    assert frame.perplexity[0] == pytest.approx(frame.attrs["unsteered_perplexity"], rel=1e-4)
    assert frame.kl_prompt.is_monotonic_increasing and frame.after.is_monotonic_increasing
    assert (frame.kl_prompt.diff()[1:] > 0).all() and (frame.after.diff()[1:] > 0.5).all()


def test_a_row_of_a_sweep_is_what_steering_once_gives(model):
    frame = sweep_strengths(model, make(), PROMPT, [3, 8], [2, 12], max_new_tokens=5, edit=Clamp, unit=0.5)
    assert frame.amount.tolist() == [1, 6]
    for row, amount in zip(frame.itertuples(), (1, 6), strict=True):
        alone = steer(model, make(), PROMPT, Clamp([3, 8], amount), max_new_tokens=5)
        assert row.text == alone.text and frame.attrs["unsteered_text"] == alone.unsteered_text
        assert row.kl_prompt == pytest.approx(alone.kl_prompt, rel=1e-3)
        assert row.perplexity == pytest.approx(alone.perplexity, rel=1e-3)


@torch.no_grad()
def test_positions(model):
    sae = make()
    for positions, wanted in (
        ("prompt", [*range(6)]), ("generated", [6, 7, 8, 9]), ([0, -1], [0, 5]), (slice(4, 8), [4, 5, 6, 7]),
        (slice(-2, None), [4, 5, 6, 7, 8, 9]), ([7], [7]), (None, [*range(10)]),
    ):  # fmt: skip
        steered = steer(model, sae, PROMPT, Add(2, 30.0, positions=positions), max_new_tokens=4, stop_at_eos=False)
        assert np.flatnonzero(steered.features[0].edited).tolist() == wanted
        first = wanted[0]
        np.testing.assert_allclose(steered.kl[:first], 0, atol=1e-6)  # what lies before knows nothing of it
        assert steered.kl[first] > 1e-3
        assert (steered.unsteered_tokens[: first + 1] == steered.tokens[: first + 1]).all()
    for wrong in ("last", [1.5], [-7], 3):
        with pytest.raises(ConfigError, match="positions is .*accepted: None, 'prompt', 'generated', a slice"):
            edited_positions(wrong, 10, 6)
    for wrong in (slice(None, None, -2), slice(None, None, 0), slice("a", None)):
        with pytest.raises(ConfigError, match="positions is slice.*accepted: a slice of whole numbers"):
            edited_positions(wrong, 10, 6)


def test_a_slice_from_ahead_of_the_prompt_begins_at_its_start():
    assert edited_positions(slice(-8, None), 10, 6).all()
    assert not edited_positions(slice(None, -8), 10, 6).any()
    assert np.flatnonzero(edited_positions(slice(-8, -4), 10, 6)).tolist() == [0, 1]


def test_features_and_positions_may_come_as_arrays_or_tensors():
    latents = torch.tensor([3, 7, 5])
    assert Add(latents.argmax(), 1.0).features == Add(np.int64(1), 1.0).features == (1,)
    assert Clamp(latents, 1.0).features == Clamp(latents.numpy(), 1.0).features == (3, 7, 5)
    for positions in (np.array([1, -1]), torch.tensor([1, -1])):
        assert np.flatnonzero(edited_positions(positions, 10, 6)).tolist() == [1, 5]


@pytest.mark.parametrize("feature", [1.0, True, [], "1", None, torch.tensor([1.0])])
def test_what_is_no_latent_is_refused(feature):
    with pytest.raises(ConfigError, match="feature is .*accepted: the index of a latent"):
        Ablate(feature)


@pytest.mark.parametrize("amount", [float("nan"), float("inf"), "5", None])
def test_a_strength_is_a_finite_number(amount):
    for edit, name in ((Add, "strength"), (Clamp, "value"), (Scale, "factor")):
        with pytest.raises(ConfigError, match=f"{name} is .*accepted: a finite number"):
            edit(1, amount)


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out",
    "blocks.1.attn.hook_z",
])  # fmt: skip
def test_hook_points_other_than_the_stream_behind_a_layer(model, name):
    """By what the model then has at the next place that everything passes through."""
    sae = make(name, reshape_activations="hook_z" if name.endswith("_z") else "none")
    steered = steer(model, sae, PROMPT, Add(2, 9.0), max_new_tokens=0)
    assert steered.text == steered.unsteered_text and np.isnan(steered.perplexity)
    _, cache = model.run_with_cache(PROMPT[None])
    x = cache[name].flatten(2)
    moved = x + 9.0 * sae.W_dec[2]
    if name.endswith("resid_mid"):  # on a bridge the stream is moved by what attention adds
        name, moved = "blocks.1.hook_attn_out", cache["blocks.1.hook_attn_out"] + 9.0 * sae.W_dec[2]
    logits = model.run_with_hooks(PROMPT[None], fwd_hooks=[(name, lambda x, hook: moved.reshape(x.shape))])
    clean = model(PROMPT[None])[0].log_softmax(-1)
    kl = (clean.exp() * (clean - logits[0].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(torch.from_numpy(steered.kl).float(), kl, rtol=1e-2, atol=2e-4)
    assert kl.max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_features_of_a_transcoder_are_edited_in_what_it_writes(model, attached, skip):
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    sae = make(reads, writes, skip=skip)
    _, cache = model.run_with_cache(PROMPT[None])
    f = sae.encode(cache[reads])
    latent = int(f.sum((0, 1)).argmax())
    if attached:
        model.add_sae(sae, use_error_term=True)
    steered = steer(model, sae, PROMPT, Ablate(latent), max_new_tokens=0)
    model.reset_saes()
    wanted = cache[writes] - f[..., latent, None] * sae.W_dec[latent]
    logits = model.run_with_hooks(PROMPT[None], fwd_hooks=[(writes, lambda x, hook: wanted)])
    clean = model(PROMPT[None])[0].log_softmax(-1)
    kl = (clean.exp() * (clean - logits[0].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(torch.from_numpy(steered.kl).float(), kl, rtol=1e-2, atol=2e-4)
    (feature,) = steered.features
    assert np.isnan(feature.after).all() and (feature.wanted == 0).all() and feature.before.max() > 0


@torch.no_grad()
def test_one_head_of_several(model):
    sae = make("blocks.1.attn.hook_z", d_in=D // HEADS, metadata={"hook_head_index": 2})
    steered = steer(model, sae, PROMPT, Add(1, 8.0), max_new_tokens=0)

    def edited(z, hook):
        heads = z.reshape(1, 6, HEADS, -1).clone()
        heads[:, :, 2] += 8.0 * sae.W_dec[1]
        return heads.reshape(z.shape)

    logits = model.run_with_hooks(PROMPT[None], fwd_hooks=[("blocks.1.attn.hook_z", edited)])
    clean = model(PROMPT[None])[0].log_softmax(-1)
    kl = (clean.exp() * (clean - logits[0].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(torch.from_numpy(steered.kl).float(), kl, rtol=1e-2, atol=2e-4)


@torch.no_grad()
def test_features_of_several_saes(model):
    first, second = make("blocks.0.hook_resid_post", seed=1), make("blocks.2.hook_resid_pre", seed=2)
    edits = [Add(2, 5.0, sae="blocks.0.hook_resid_post"), Add([3, 4], -6.0, sae=second)]
    model.add_sae(second, use_error_term=True)
    steered = steer(model, [first, second], PROMPT, edits, max_new_tokens=0)
    model.reset_saes()
    moves = {"blocks.0.hook_resid_post": 5 * first.W_dec[2], "blocks.2.hook_resid_pre": -6 * second.W_dec[3:5].sum(0)}
    hooks = [(name, lambda x, hook, move=move: x + move) for name, move in moves.items()]
    logits = model.run_with_hooks(PROMPT[None], fwd_hooks=hooks)
    clean = model(PROMPT[None])[0].log_softmax(-1)
    kl = (clean.exp() * (clean - logits[0].log_softmax(-1))).sum(-1)
    torch.testing.assert_close(torch.from_numpy(steered.kl).float(), kl, rtol=1e-2, atol=2e-4)
    assert [(one.hook_point, one.feature) for one in steered.features] == [
        ("blocks.0.hook_resid_post", 2), ("blocks.2.hook_resid_pre", 3), ("blocks.2.hook_resid_pre", 4),
    ]  # fmt: skip
    table = steered.table()
    assert list(table.columns[:4]) == ["position", "token", "part", "kl"] and len(table) == 6
    assert {"blocks.0.hook_resid_post 2 after", "blocks.2.hook_resid_pre 3 unsteered"} <= set(table.columns)
    assert (table.part == "prompt").all() and "unsteered" in steered.side_by_side()
    # a later layer's edit sees what an earlier one has done
    later = steered.features[1]
    assert not np.allclose(later.before, later.unsteered)


def test_drawn_texts_are_the_same_for_the_same_seed(model):
    options = {"max_new_tokens": 8, "temperature": 1.0, "stop_at_eos": False}
    state = torch.get_rng_state()
    first = steer(model, make(), PROMPT, Add(2, 3.0), seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)
    again = steer(model, make(), PROMPT, Add(2, 3.0), seed=1, **options)
    other = steer(model, make(), PROMPT, Add(2, 3.0), seed=2, **options)
    assert (first.text, first.unsteered_text) == (again.text, again.unsteered_text)
    assert first.unsteered_text != other.unsteered_text
    nothing = steer(model, make(), PROMPT, Add(2, 0.0), seed=1, **options)
    assert nothing.text == nothing.unsteered_text == first.unsteered_text  # drawn from the same random numbers


def test_a_batch_training_sae_and_impossible_edits_are_refused(model):
    sae = make()
    cfg = SAEConfig(architecture="batch_topk", d_in=D, d_sae=D_SAE, k=4, metadata={"hook_name": STREAM})
    cls = ARCHITECTURES["batch_topk"]
    training = cls(cfg, {name: torch.zeros(shape) for name, shape in cls.shapes(cfg).items()})
    for saes, edits, message in (
        (training, Add(1, 1.0), "batch_topk as in training.*jumprelu"),
        (sae, Add(D_SAE, 1.0), "feature is 40; accepted: 0 to 39"),
        (sae, Add(-1, 1.0), "feature is -1"),
        (sae, [], "edits is empty"),
        (sae, ["more"], "edits has a str; accepted: Add, Clamp, Ablate, Scale"),
        ([], Add(1, 1.0), "saes is empty"),
        ([sae, make("blocks.0.hook_resid_post")], Add(1, 1.0), "sae is not given, and there are 2"),
        (sae, Add(1, 1.0, sae="blocks.0.hook_resid_post"), "none of those given; .*'blocks.1.hook_resid_post'"),
        (make("blocks.7.hook_resid_post"), Add(1, 1.0), "'blocks.7.hook_resid_post'.*nearest"),
        (make(d_in=16), Add(1, 1.0), "d_in 16.*d_model 32"),
        (sae, Add(1, 1.0, positions="end"), "positions is 'end'"),
    ):
        with pytest.raises(ConfigError, match=message):
            steer(model, saes, PROMPT, edits, max_new_tokens=2)
    for arguments, message in (
        ({"max_new_tokens": 40}, "max_new_tokens 40: with the prompt's 6 tokens more than the 32"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 2.0}, "top_p is 2.0"),
        ({"seed": "x"}, "seed is 'x'"),
    ):
        with pytest.raises(ConfigError, match=message):
            steer(model, sae, PROMPT, Add(1, 1.0), **arguments)
    with pytest.raises(ConfigError, match="no tokenizer"):
        steer(model, sae, "text", Add(1, 1.0))
    with pytest.raises(ConfigError, match=r"tokens of shape \[2, 3\]"):
        steer(model, sae, torch.ones(2, 3, dtype=torch.long), Add(1, 1.0))
    for prompt in ([3, VOCAB], [3, -1]):
        with pytest.raises(ConfigError, match=rf"prompt has token ids from .*; accepted: 0 to {VOCAB - 1}"):
            steer(model, sae, prompt, Add(1, 1.0))
    with pytest.raises(ConfigError, match="prompt is .*accepted: one text"):
        steer(model, sae, ["one", "two"], Add(1, 1.0))
    for strengths, message in (
        ([], r"strengths is \[\]"), (5.0, "strengths is 5.0"), ([1, float("inf")], "strengths is inf"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=message):
            sweep_strengths(model, sae, PROMPT, 1, strengths)
    with pytest.raises(ConfigError, match="edit is Ablate"):
        sweep_strengths(model, sae, PROMPT, 1, [1], edit=Ablate)
    with pytest.raises(ConfigError, match="unit is 0"):
        sweep_strengths(model, sae, PROMPT, 1, [1], unit=0)
