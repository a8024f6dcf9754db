import copy
import io
import warnings

import pytest
import torch

from hooked_models import random_hooked_transformer
from sae_core import ARCHITECTURES, SAE, ConfigError, SAEConfig
from sae_core.analysis import with_saes
from sae_core.analysis.splicing import HOOKS
from sae_core.functional import explained_variance

pytestmark = pytest.mark.filterwarnings("ignore:.*native-autograd path")
D, HEADS, VOCAB = 32, 4, 50
TOKENS = torch.randint(1, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
STREAM = "blocks.1.hook_resid_post"
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def hooked():
    return with_saes(random_hooked_transformer())


@pytest.fixture(scope="module")
def bridge(tiny_model):
    return with_saes(copy.deepcopy(tiny_model))


@pytest.fixture(params=["bridge", "hooked"])
def model(request):
    model = request.getfixturevalue(request.param)
    yield model
    model.reset_saes()
    assert not [name for name in model.hook_dict if "hook_sae" in name]
    assert not any("forward" in vars(point) for point in model.hook_dict.values())


def make(reads: str = STREAM, writes: str | None = None, *, seed=0, d_in=D, metadata=None, **cfg) -> SAE:
    cls, generator = ARCHITECTURES["standard"], torch.Generator().manual_seed(seed)
    about = {"hook_name": reads} | ({"hook_name_out": writes} if writes else {}) | (metadata or {})
    cfg |= {"d_out": cfg.get("d_out", D), "apply_b_dec_to_input": False} if writes else {}
    config = SAEConfig(architecture="standard", d_in=d_in, d_sae=40, metadata=about, **cfg)
    shapes = cls.shapes(config).items()
    return cls(config, {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes})


@torch.no_grad()
def test_the_reconstruction_takes_the_place_of_the_activations(model):
    sae = make()
    clean, cache = model.run_with_cache(TOKENS)
    wanted = model.run_with_hooks(TOKENS, fwd_hooks=[(STREAM, lambda x, hook: sae(x))])
    model.add_sae(sae)
    torch.testing.assert_close(model(TOKENS), wanted, **CLOSE)
    _, spliced = model.run_with_cache(TOKENS)
    torch.testing.assert_close(spliced[STREAM], sae(cache[STREAM]), **CLOSE)  # what the model goes on with
    torch.testing.assert_close(spliced[f"{STREAM}.hook_sae_acts_post"], sae.encode(cache[STREAM]), **CLOSE)
    model.reset_saes()
    assert torch.equal(model(TOKENS), clean)


@torch.no_grad()
def test_an_intervention_is_not_hidden_by_the_error_term(model):
    sae = make()
    x = model.run_with_cache(TOKENS)[1][STREAM]
    f = sae.encode(x)
    latent = int(f.sum((0, 1)).argmax())

    def ablate(activations, hook):
        activations[..., latent] = 0

    wanted = x - f[..., latent, None] * sae.W_dec[latent]
    for hook in (ablate, lambda activations, hook: torch.where(torch.arange(40) == latent, 0.0, activations)):
        seen = {}
        hooks = [(f"{STREAM}.hook_sae_acts_post", hook), (STREAM, lambda x, hook, seen=seen: seen.update(x=x))]
        logits = model.run_with_hooks_with_saes(TOKENS, saes=sae, use_error_term=True, fwd_hooks=hooks)
        torch.testing.assert_close(seen["x"], wanted, **CLOSE)
        other = model.run_with_hooks(TOKENS, fwd_hooks=[(STREAM, lambda x, hook: wanted)])
        torch.testing.assert_close(logits, other, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", [
    "blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_post", "blocks.1.hook_attn_out",
    "blocks.1.hook_mlp_out", "blocks.1.ln2.hook_normalized", "blocks.1.attn.hook_z",
])  # fmt: skip
def test_every_hook_point_is_really_written(model, name):
    """With the error term nothing changes; without it, what the model then has is what the SAE made."""
    sae = make(name, reshape_activations="hook_z" if name.endswith("_z") else "none")
    clean, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), clean, **CLOSE)
    logits, spliced = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    assert not torch.allclose(logits, clean, atol=0.05)
    torch.testing.assert_close(spliced[name].flatten(2), sae(cache[name].flatten(2)), **CLOSE)
    assert {f"{name}.{hook}" for hook in HOOKS if hook != "hook_sae_error"} <= set(spliced)


@torch.no_grad()
def test_the_middle_of_a_layer_is_written_to_the_residual_stream(bridge, hooked):
    """On a bridge the hook point of this name lies on the way into the second norm alone."""
    name = "blocks.1.hook_resid_mid"
    for model in (bridge, hooked):
        _, cache = model.run_with_cache_with_saes(TOKENS, saes=[make(name)])
        added = cache["blocks.1.hook_mlp_out"]
        torch.testing.assert_close(cache["blocks.1.hook_resid_post"], cache[name] + added, **CLOSE)


@torch.no_grad()
def test_several_saes_each_read_what_the_one_before_has_left(model):
    first, second = make("blocks.0.hook_resid_post", seed=1), make("blocks.2.hook_resid_pre", seed=2)
    replaced = {"blocks.0.hook_resid_post": first, "blocks.2.hook_resid_pre": second}
    hooks = [(name, lambda x, hook, sae=sae: sae(x)) for name, sae in replaced.items()]
    wanted = model.run_with_hooks(TOKENS, fwd_hooks=hooks)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[second, first]), wanted, **CLOSE)
    with model.saes([first]):
        assert model.acts_to_saes == {"blocks.0.hook_resid_post": first}
        with model.saes(second):
            assert set(model.acts_to_saes.values()) == {first, second}
            torch.testing.assert_close(model(TOKENS), wanted, **CLOSE)
        with model.saes(make("blocks.0.hook_resid_post", seed=9)):
            assert len(model.acts_to_saes) == 1
        assert model.acts_to_saes == {"blocks.0.hook_resid_post": first}
    assert model.acts_to_saes == {}


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_stand_in_for_what_lies_between_two_hook_points(model, skip):
    reads, writes = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"
    sae = make(reads, writes, skip=skip)
    clean, cache = model.run_with_cache(TOKENS)
    wanted = model.run_with_hooks(TOKENS, fwd_hooks=[(writes, lambda x, hook: sae(cache[reads]))])
    logits, spliced = model.run_with_cache_with_saes(TOKENS, saes=[sae])
    torch.testing.assert_close(logits, wanted, **CLOSE)
    torch.testing.assert_close(spliced[f"{writes}.hook_sae_input"], cache[reads], **CLOSE)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), clean, **CLOSE)
    # one that reads where another SAE writes sees what that has made
    before = make(reads, seed=3)
    _, spliced = model.run_with_cache_with_saes(TOKENS, saes=[sae, before])
    torch.testing.assert_close(spliced[f"{writes}.hook_sae_input"], before(cache[reads]), **CLOSE)
    with model.saes([sae]), pytest.raises(ConfigError, match="blocks.1.hook_mlp_out' is written by the SAE that"):
        model.add_sae(make(writes))


@torch.no_grad()
def test_one_head_of_several(model):
    sae = make("blocks.1.attn.hook_z", d_in=D // HEADS, metadata={"hook_head_index": 2})
    _, cache = model.run_with_cache(TOKENS)
    z = cache["blocks.1.attn.hook_z"].reshape(2, 12, HEADS, -1)
    z[:, :, 2] = sae(z[:, :, 2])
    _, spliced = model.run_with_cache_with_saes(TOKENS, saes=[sae], use_error_term=False)
    torch.testing.assert_close(spliced["blocks.1.attn.hook_z"].reshape(z.shape), z, **CLOSE)
    clean = model(TOKENS)
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), clean, **CLOSE)


@torch.no_grad()
def test_excluded_tokens_keep_their_activations(model):
    sae, tokens = make(), TOKENS.clone()
    tokens[:, 4] = 9
    clean = model.run_with_cache(tokens)[1]
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae], exclude_special_tokens=[9], use_error_term=True)
    assert torch.equal(cache[STREAM][:, 4], clean[STREAM][:, 4])
    error = cache[f"{STREAM}.hook_sae_error"]
    assert (error[:, 4] == 0).all() and (error[:, 3] != 0).any()
    model.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer; accepted: token ids"):
        model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=True)


def test_gradients_reach_activations_below_and_latents(model):
    sae = make("blocks.1.ln2.hook_normalized")
    seen = {}

    def keep(activation, hook):
        seen[hook.name] = activation if activation.requires_grad else activation.requires_grad_()

    names = ["blocks.1.hook_resid_pre", "blocks.1.ln2.hook_normalized.hook_sae_acts_post"]
    with model.saes([sae]):
        logits = model.run_with_hooks(TOKENS, fwd_hooks=[(name, keep) for name in names])
    gradients = torch.autograd.grad(logits[:, -1, 3].sum(), list(seen.values()))
    assert len(gradients) == 2 and all(gradient.abs().max() > 0 for gradient in gradients)


def test_hooks_by_every_interface_of_the_library(model):
    sae = make()
    model.add_sae(sae)
    name, seen = model.get_sae_hook_name(sae), []
    assert name == f"{STREAM}.hook_sae_acts_post"

    def note(activation, hook):
        seen.append(tuple(activation.shape))

    with torch.no_grad():
        model.add_hook(name, note)
        model(TOKENS)
        model.reset_hooks()
        model(TOKENS)
        with model.hooks(fwd_hooks=[(lambda point: point == name, note)]):
            model(TOKENS)
        model.run_with_hooks(TOKENS, fwd_hooks=[(name, note)])
        model(TOKENS)
        assert seen == [(2, 12, 40)] * 3
        cache = model.run_with_cache(TOKENS, names_filter=[name])[1]
        assert name in cache
        cache = model.run_with_cache(TOKENS, names_filter=lambda point: point.endswith("hook_sae_recons"))[1]
        assert f"{STREAM}.hook_sae_recons" in cache
        model.reset_hooks(including_permanent=True)
        assert STREAM in model.acts_to_saes and "hook_sae_acts_post" in vars(model.hook_dict[STREAM])


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ConfigError, match=r"'blocks.9.hook_resid_post'.*nearest it has: blocks\.\d.hook_resid_post"):
        model.add_sae(make("blocks.9.hook_resid_post"))
    with pytest.raises(ConfigError, match="d_in 16.*d_model 32"):
        model.add_sae(make(d_in=16))
    with pytest.raises(ConfigError, match=r"'blocks.1.mlp.hook_post': activations have shape .*d_in 32"):
        model.run_with_saes(TOKENS, saes=[make("blocks.1.mlp.hook_post")])
    with pytest.raises(ConfigError, match="sae is a torch.nn.modules.linear.Linear; accepted"):
        model.add_sae(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="no hook_name"):
        model.add_sae(make(metadata={"hook_name": None}))
    with pytest.raises(ConfigError, match="no SAE at 'blocks.0.hook_resid_pre'; attached: none"):
        model.reset_saes("blocks.0.hook_resid_pre")
    with pytest.raises(ConfigError, match=r"fwd_hooks: the model has no hook point 'blocks.1.hook_resid_pots'.*post"):
        model.run_with_hooks_with_saes(TOKENS, saes=[make()], fwd_hooks=[("blocks.1.hook_resid_pots", print)])
    with pytest.raises(ConfigError, match="lets no hook point"):
        model.run_with_hooks_with_saes(TOKENS, fwd_hooks=[(lambda name: False, print)])
    with pytest.raises(ConfigError, match="model is a Linear; accepted"):
        with_saes(torch.nn.Linear(2, 2))
    assert model.acts_to_saes == {} and with_saes(model) is model


def test_a_failed_pass_leaves_nothing_behind(model):
    def fail(activation, hook):
        raise RuntimeError("on purpose")

    clean = model(TOKENS)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.run_with_hooks_with_saes(TOKENS, saes=[make()], fwd_hooks=[(f"{STREAM}.hook_sae_acts_post", fail)])
    with pytest.raises(ConfigError), model.saes([make(), make("nowhere")]):
        pass
    assert model.acts_to_saes == {} and torch.equal(model(TOKENS), clean)


@torch.no_grad()
def test_the_error_term_may_be_asked_for_on_the_sae(model):
    """As scripts of SAELens' do; what the call says goes first."""
    sae, clean = make(), model(TOKENS)
    sae.use_error_term = True
    torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae]), clean, **CLOSE)
    assert not torch.allclose(model.run_with_saes(TOKENS, saes=[sae], use_error_term=False), clean, atol=0.05)
    sae.use_error_term = False
    assert not torch.allclose(model.run_with_saes(TOKENS, saes=[sae]), clean, atol=0.05)


def test_an_sae_from_elsewhere_is_not_tried_on_first_positions(model):
    """It has every other position's activations as its latents' directions, and the opposite of the first's."""
    x = model.run_with_cache(TOKENS)[1][STREAM].reshape(-1, D)
    about = {"hook_name": STREAM, "source": {"repo_id": "someone/saes"}}
    config = SAEConfig(architecture="topk", k=1, d_in=D, d_sae=len(x), apply_b_dec_to_input=False, metadata=about)
    units = x / x.norm(dim=1, keepdim=True)
    written = units.clone()
    written[:: TOKENS.shape[1]] *= -3
    zeros = {"b_enc": torch.zeros(len(x)), "b_dec": torch.zeros(D)}
    sae = ARCHITECTURES["topk"](config, {"W_enc": units.T.contiguous(), "W_dec": written, **zeros})
    assert explained_variance(x, sae(x)) < 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.run_with_saes(TOKENS, saes=[sae])


def test_an_sae_from_elsewhere_is_tried_on_the_first_activations(model):
    from sae_core.pretrained import AbsurdReconstruction

    sae = make(metadata={"source": {"repo_id": "someone/saes"}})
    with pytest.warns(AbsurdReconstruction, match="someone/saes explains"):
        model.run_with_saes(TOKENS, saes=[sae])
    model.run_with_saes(TOKENS, saes=[sae])  # once is enough
    model.run_with_saes(TOKENS, saes=[make()])


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", [STREAM, f"{STREAM}.hook_sae_acts_post"])
def test_generate_honours_hooks(model, name, cached):
    sae = make()
    if name != STREAM:
        model.add_sae(sae, use_error_term=True)
    seen = []
    direction = 20 * torch.randn(D if name == STREAM else 40, generator=torch.Generator().manual_seed(1))

    def steer(activations, hook):
        seen.append((activations.shape[1], hook.ctx["start"], hook.ctx["prompt_length"]))
        return activations + direction

    prompt = TOKENS[:1, :5]
    options = {
        "max_new_tokens": 6, "do_sample": False, "stop_at_eos": False, "verbose": False, "use_past_kv_cache": cached,
        "return_type": "tokens",
    }  # fmt: skip
    plain = model.generate(prompt, **options)
    steered = model.generate(prompt, fwd_hooks=[(name, steer)], **options)
    wanted = [(5, 0, 5)] + [(1, start, 5) if cached else (start + 1, 0, 5) for start in range(5, 10)]
    assert seen == wanted
    assert steered.shape == plain.shape == (1, 11) and not torch.equal(steered, plain)
    tokens = prompt  # what comes of running the hook over all tokens again and again
    for _ in range(6):
        logits = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda activations, hook: activations + direction)])
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(steered, tokens)
    assert torch.equal(model.generate(prompt, **options), plain)  # the hooks are gone
    assert not model.hook_dict[name].fwd_hooks and "start" not in model.hook_dict[name].ctx


@torch.no_grad()
def test_hooks_of_a_generation_are_removed_after_an_error(model):
    def fail(activation, hook):
        raise RuntimeError("on purpose")

    options = {"max_new_tokens": 2, "verbose": False, "stop_at_eos": False}
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(TOKENS[:1, :3], fwd_hooks=[(STREAM, fail)], **options)
    assert not model.hook_dict[STREAM].fwd_hooks
    assert model.generate(TOKENS[:1, :3], **options).shape == (1, 5)
    with pytest.raises(ConfigError, match="no hook point 'blocks.1.resid'"):
        model.generate(TOKENS[:1, :3], fwd_hooks=[("blocks.1.resid", fail)], **options)
    for wrong in (None, (STREAM, fail), {STREAM: fail}, [STREAM], [(STREAM, None)]):
        with pytest.raises(ConfigError, match="fwd_hooks is .*accepted: a list of"):
            model.generate(TOKENS[:1, :3], fwd_hooks=wrong, **options)


def test_a_hooked_transformers_processing_is_read_off_its_weights(hooked):
    own = copy.deepcopy(hooked)
    own.add_sae(make(metadata={"model_from_pretrained_kwargs": {}}))
    with pytest.raises(ConfigError, match="with center_writing_weights, and this model.s weights are not"):
        own.add_sae(make(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}))
    own.reset_saes()
    own.process_weights_()  # as HookedTransformer.from_pretrained does
    own.add_sae(make(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}))
    own.setup()  # collects hook points anew
    assert f"{STREAM}.hook_sae_acts_post" in own.run_with_cache(TOKENS)[1]
    with pytest.raises(ConfigError, match="no processing, and this model.s weights are as after center_writing"):
        own.add_sae(make(metadata={"model_from_pretrained_kwargs": {}}))
    with pytest.raises(ConfigError, match="as after fold_value_biases"):
        own.add_sae(make("blocks.1.attn.hook_z", metadata={"model_processing": "center"}))
    with pytest.raises(ConfigError, match="as after fold_ln"):
        own.add_sae(make("blocks.1.ln2.hook_normalized", metadata={"model_processing": "none"}))
    with pytest.raises(ConfigError, match=r"'blocks.1.hook_resid_post': metadata.model_processing is 'folded'"):
        own.add_sae(make(metadata={"model_processing": "folded"}))


@torch.no_grad()
def test_a_copy_of_a_model_has_its_own_saes(model):
    model.add_sae(make())
    spliced, other = model(TOKENS), copy.deepcopy(model)
    model.reset_saes()
    torch.testing.assert_close(other(TOKENS), spliced, **CLOSE)
    other.reset_saes()
    torch.testing.assert_close(other(TOKENS), model(TOKENS), **CLOSE)
    assert not torch.allclose(spliced, model(TOKENS), atol=0.05)


@torch.no_grad()
def test_a_model_can_be_pickled_where_it_could_before(hooked):
    """A bridge never can: TransformerLens makes classes within functions for it."""
    buffer = io.BytesIO()
    with hooked.saes([make()]):
        spliced = hooked(TOKENS)
        torch.save(hooked, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    torch.testing.assert_close(other(TOKENS), spliced, **CLOSE)
    other.reset_saes()
    torch.testing.assert_close(other(TOKENS), hooked(TOKENS), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_term_of_a_coarser_sae_gives_the_models_own_activations(model, dtype):
    logits = model.run_with_saes(TOKENS, saes=[make().to(dtype)], use_error_term=True)
    torch.testing.assert_close(logits, model(TOKENS), **CLOSE)


@pytest.mark.parametrize("head", [HEADS, -1, "1"])
def test_a_head_that_the_model_lacks(model, head):
    sae = make("blocks.1.attn.hook_z", d_in=D // HEADS, metadata={"hook_head_index": head})
    with pytest.raises(ConfigError, match=f"'blocks.1.attn.hook_z': metadata.hook_head_index is {head!r}; .* 0 to 3"):
        model.run_with_saes(TOKENS, saes=[sae])


@pytest.mark.parametrize("excluded", [1, "bos", None])
def test_tokens_to_exclude_are_a_list(model, excluded):
    with pytest.raises(ConfigError, match="exclude_special_tokens is .*accepted: true, false, or a list"):
        model.run_with_saes(TOKENS, saes=[make()], exclude_special_tokens=excluded)


@torch.no_grad()
@pytest.mark.parametrize("name", ["hook_mlp_in", "hook_attn_in", "attn.hook_result", "hook_q_input"])
def test_a_hook_point_that_is_switched_off_is_refused(model, name):
    with pytest.raises(ConfigError, match=rf"'blocks.1.{name}': the model passes it by.*model.set_use_\w+\(True\)"):
        model.run_with_saes(TOKENS, saes=[make(f"blocks.1.{name}")])
    with pytest.raises(ConfigError, match=r"model.set_use_hook_mlp_in\(True\)"):
        model.add_sae(make("blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out"))


@torch.no_grad()
def test_a_hook_point_that_is_switched_on_is_written(model):
    sae = make("blocks.1.hook_mlp_in")
    model.set_use_hook_mlp_in(True)
    try:
        torch.testing.assert_close(model.run_with_saes(TOKENS, saes=[sae], use_error_term=True), model(TOKENS), **CLOSE)
        assert not torch.allclose(model.run_with_saes(TOKENS, saes=[sae]), model(TOKENS), atol=0.05)
    finally:
        model.set_use_hook_mlp_in(False)


@torch.no_grad()
def test_a_hook_point_that_the_model_passes_by_is_said(bridge):
    """GPT-2's three projections in one, which a bridge splits."""
    with bridge.saes([make("blocks.1.attn.qkv.hook_out", d_in=3 * D)]):
        bridge(TOKENS, stop_at_layer=1)  # not as far as that
        with pytest.raises(ConfigError, match="'blocks.1.attn.qkv.hook_out': the model has passed it by"):
            bridge(TOKENS)


@torch.no_grad()
def test_compatibility_mode_with_an_sae_attached(tiny_model):
    model = with_saes(copy.deepcopy(tiny_model))
    model.add_sae(make())
    spliced = model(TOKENS)
    model.enable_compatibility_mode(no_processing=True)
    torch.testing.assert_close(model(TOKENS), spliced, **CLOSE)
    model.reset_saes()
    torch.testing.assert_close(model(TOKENS), tiny_model(TOKENS), **CLOSE)
    assert not [name for name in model.hook_dict if "hook_sae" in name]
