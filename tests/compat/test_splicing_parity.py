"""SAEs spliced into a model do what they do in SAELens' HookedSAETransformer and SAETransformerBridge."""

import copy
import warnings

import pytest
import torch

from sae_core import ARCHITECTURES, SAE, SAEConfig
from sae_core.analysis import with_saes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")
    from sae_lens.analysis.hooked_sae_transformer import HookedSAETransformer
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.model_bridge import TransformerBridge

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

D, D_SAE, HEADS = 32, 48, 4
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RESIDUAL, ATTENTION, MLP = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"
TOKENS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
KINDS = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 5}),
    "topk, by decoder norms": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "constant_norm_rescale": ("jumprelu", {"normalize_activations": "constant_norm_rescale"}),
}


@pytest.fixture(scope="module")
def networks():
    """(ours, theirs) of one model: HookedTransformers, and bridges."""
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=32, d_head=D // HEADS, n_heads=HEADS, d_mlp=64, d_vocab=50, act_fn="gelu_new",
        normalization_type="LN", seed=0,
    )  # fmt: skip
    theirs = HookedSAETransformer(cfg)
    generator = torch.Generator().manual_seed(4)
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    ours = HookedTransformer(copy.deepcopy(cfg))
    ours.load_state_dict(theirs.state_dict())
    return with_saes(ours), theirs


@pytest.fixture(scope="module")
def bridges(tiny_model):
    theirs = copy.deepcopy(tiny_model)
    theirs.__class__ = SAETransformerBridge
    theirs._acts_to_saes, theirs._transcoder_output_hooks = {}, {}
    assert type(tiny_model) is TransformerBridge
    return with_saes(copy.deepcopy(tiny_model)), theirs


def make(folder, kind: str, reads: str, writes: str | None = None, seed: int = 0):
    """The same SAE, ours and theirs."""
    architecture, config = KINDS[kind]
    cls, generator = ARCHITECTURES[architecture], torch.Generator().manual_seed(seed)
    transcoder = {"d_out": D, "apply_b_dec_to_input": False} if writes else {}
    metadata = {"hook_name": reads} | ({"hook_name_out": writes} if writes else {})
    if reads.endswith("hook_z"):
        config = {**config, "reshape_activations": "hook_z"}
    cfg = SAEConfig(architecture=architecture, d_in=D, d_sae=D_SAE, metadata=metadata, **config, **transcoder)
    sae = cls(cfg, {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in cls.shapes(cfg).items()})
    sae.save(folder)
    return SAE.load(folder), sae_lens.SAE.load_from_disk(folder)


def sae_names(cache):
    return {name for name in cache if "hook_sae" in name}


def assert_same_caches(ours, theirs, *, rename=lambda name: name):
    wanted = sae_names(theirs)
    assert wanted and {rename(name) for name in wanted} <= sae_names(ours)
    for name in wanted:
        assert ours[rename(name)].shape == theirs[name].shape, name
        torch.testing.assert_close(ours[rename(name)], theirs[name], **CLOSE)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_caches_of_a_hooked_transformer(networks, kind, error_term, tmp_path):
    model, reference = networks
    ours, theirs = make(tmp_path, kind, RESIDUAL)
    before = model(TOKENS)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[ours], use_error_term=error_term)
    wanted, wanted_cache = reference.run_with_cache_with_saes(TOKENS, saes=[theirs], use_error_term=error_term)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert_same_caches(cache, wanted_cache)
    assert torch.allclose(logits, before, atol=1e-4) is error_term
    assert (f"{RESIDUAL}.hook_sae_error" in cache) is error_term and not model.acts_to_saes
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hook_name", [RESIDUAL, MLP])
def test_logits_and_caches_of_a_bridge(bridges, hook_name, kind, error_term, tmp_path):
    model, reference = bridges
    ours, theirs = make(tmp_path, kind, hook_name)
    logits, cache = model.run_with_cache_with_saes(TOKENS, saes=ours, use_error_term=error_term)
    wanted, wanted_cache = reference.run_with_cache_with_saes(TOKENS, saes=theirs, use_error_term=error_term)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert_same_caches(cache, wanted_cache)  # under the names that the bridge itself uses
    actual = model.hook_dict[hook_name].name
    assert actual != hook_name
    assert_same_caches(cache, wanted_cache, rename=lambda name: name.replace(actual, hook_name))


@pytest.mark.parametrize("kind", ["standard", "topk"])
def test_several_at_once_and_heads_side_by_side(networks, bridges, kind, tmp_path):
    for model, reference in (networks, bridges):
        pairs = [make(tmp_path / name, kind, name, seed=seed) for seed, name in enumerate((RESIDUAL, ATTENTION, MLP))]
        ours, theirs = zip(*pairs, strict=True)
        with torch.no_grad():
            logits, cache = model.run_with_cache_with_saes(TOKENS, saes=ours, use_error_term=True)
            wanted, wanted_cache = reference.run_with_cache_with_saes(TOKENS, saes=list(theirs), use_error_term=True)
        torch.testing.assert_close(logits, wanted, **CLOSE)
        assert_same_caches(cache, wanted_cache)
        wanted = reference.run_with_saes(TOKENS, saes=list(theirs))
        torch.testing.assert_close(model.run_with_saes(TOKENS, saes=ours), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
@pytest.mark.parametrize("error_term", [False, True])
def test_transcoders(networks, bridges, kind, error_term, tmp_path):
    reads = "blocks.1.ln2.hook_normalized"
    for model, reference in (networks, bridges):
        ours, theirs = make(tmp_path, kind, reads, "blocks.1.hook_mlp_out")
        logits, cache = model.run_with_cache_with_saes(TOKENS, saes=[ours], use_error_term=error_term)
        wanted, wanted_cache = reference.run_with_cache_with_saes(TOKENS, saes=[theirs], use_error_term=error_term)
        torch.testing.assert_close(logits, wanted, **CLOSE)
        assert_same_caches(cache, wanted_cache)
        assert list(model.acts_to_saes) == []


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("point", ["hook_sae_acts_post", "hook_sae_acts_pre", "hook_sae_input", "hook_sae_output"])
def test_interventions(networks, bridges, point, error_term, tmp_path):
    def double(activations, hook):
        return activations * 2

    def change(activations, hook):
        activations[:, 3] = 1.5
        return activations

    for model, reference in (networks, bridges):
        ours, theirs = make(tmp_path, "standard", MLP)
        for hook in (double, change):
            results = []
            for one, sae in ((model, ours), (reference, theirs)):
                with one.saes(saes=[sae], use_error_term=error_term), torch.no_grad():
                    name = one.get_sae_hook_name(sae, point) if one is bridges[1] else f"{MLP}.{point}"
                    results.append(one.run_with_hooks(TOKENS, fwd_hooks=[(name, hook)]))
            if point == "hook_sae_input" and hook is change and error_term:
                # theirs changes the model's own activations too, of which the error is made
                continue
            torch.testing.assert_close(*results, **CLOSE)
            assert not torch.allclose(results[0], model(TOKENS), atol=1e-3)


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", ["standard", "gated", "topk, by decoder norms"])
def test_gradients(networks, bridges, kind, error_term, tmp_path):
    for model, reference in (networks, bridges):
        found = []
        for one, sae in zip((model, reference), make(tmp_path, kind, "blocks.0.hook_resid_post"), strict=True):
            seen = {}

            def keep(activation, hook, seen=seen):
                seen["stream"] = activation.requires_grad_()

            def latents(activation, hook, seen=seen):
                seen["latents"] = activation

            with one.saes(saes=[sae], use_error_term=error_term):
                name, stream = "blocks.0.hook_resid_post.hook_sae_acts_post", "blocks.0.hook_resid_pre"
                if one is bridges[1]:  # which calls no hook under its other names
                    name, stream = one.get_sae_hook_name(sae), "blocks.0.hook_in"
                logits = one.run_with_hooks(TOKENS, fwd_hooks=[(stream, keep), (name, latents)])
            gradients = torch.autograd.grad(logits[:, -1].square().sum(), [seen["stream"], seen["latents"]])
            found.append(gradients)
        for ours, theirs in zip(*found, strict=True):
            assert theirs.abs().max() > 0
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("error_term", [False, True])
def test_excluded_tokens(networks, error_term, tmp_path):
    model, reference = networks
    ours, theirs = make(tmp_path, "standard", RESIDUAL)
    tokens = TOKENS.clone()
    tokens[:, 2] = 11
    options = {"exclude_special_tokens": [11], "use_error_term": error_term}
    logits, cache = model.run_with_cache_with_saes(tokens, saes=[ours], **options)
    wanted, wanted_cache = reference.run_with_cache_with_saes(tokens, saes=[theirs], **options)
    torch.testing.assert_close(logits, wanted, **CLOSE)
    assert_same_caches(cache, wanted_cache)
