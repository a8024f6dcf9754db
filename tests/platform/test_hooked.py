import warnings

import pytest
import torch

from penstock.errors import CheckpointError, ConfigError, ModelError
from penstock.hooked import load_model
from penstock.models import processing_of
from sae_core import SAE, SAEConfig, StandardSAE
from sae_core.analysis import Add, Features, steer, sweep_strengths
from tiny_models import VOCAB, write_model

STREAM, VALUES, HIDDEN = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


def make(hook_name: str = STREAM, d_in: int = 32, normalize: str = "none", **metadata) -> SAE:
    cfg = SAEConfig(
        architecture="standard", d_in=d_in, d_sae=48, normalize_activations=normalize,
        metadata={"hook_name": hook_name, **metadata},
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in StandardSAE.shapes(cfg).items()}
    return StandardSAE(cfg, weights)


def test_what_checkpoints_say_of_their_models_weights():
    assert processing_of({}) is None
    assert processing_of({"model_from_pretrained_kwargs": None, "model_class_name": "HookedTransformer"}) is None
    assert processing_of({"model_from_pretrained_kwargs": {}}) == "none"
    assert processing_of({"model_from_pretrained_kwargs": {"center_writing_weights": True}}) == "center"
    assert processing_of({"model_from_pretrained_kwargs": {"center_writing_weights": False, "n_devices": 2}}) == "none"
    assert processing_of({"model_processing": "fold_ln", "model_from_pretrained_kwargs": {}}) == "fold_ln"
    with pytest.raises(CheckpointError, match=r"center_unembed.*no processing.*none, fold_ln, center, fold_ln_center"):
        processing_of({"model_from_pretrained_kwargs": {"center_unembed": True}})
    with pytest.raises(CheckpointError, match="model_processing is 'folded'"):
        processing_of({"model_processing": "folded"})


def test_a_model_is_loaded_as_its_sae_asks(folder):
    asked = {"center_writing_weights": True}
    centred = load_model(sae=make(model_name=str(folder), model_from_pretrained_kwargs=asked))
    raw = load_model(str(folder))
    tokens = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (logits, cache), (wanted, other) = (model.run_with_cache(tokens) for model in (centred, raw))
    torch.testing.assert_close(logits.log_softmax(-1), wanted.log_softmax(-1), atol=1e-4, rtol=1e-4)
    assert cache[STREAM].mean(-1).abs().max() < 1e-5 < 1e-3 < other[STREAM].mean(-1).abs().max()
    assert not any(parameter.requires_grad for parameter in raw.parameters()) and not raw.training


def test_an_sae_of_other_weights_is_refused_where_that_matters(folder):
    raw, centred = load_model(str(folder)), load_model(str(folder), processing="center")
    whole, folded = load_model(str(folder), processing="fold_ln_center"), load_model(str(folder), processing="fold_ln")
    asks_centred = make(model_name="gpt2", model_from_pretrained_kwargs={"center_writing_weights": True})
    remedy = r"center_writing_weights.*load_model\(sae=sae\).*'gpt2', center_writing_weights=True"
    with pytest.raises(ConfigError, match=remedy):
        raw.add_sae(asks_centred)
    with pytest.raises(ConfigError, match=r"no processing, and this model's weights are as after center_writing"):
        centred.add_sae(make(model_from_pretrained_kwargs={}))
    for model, sae in (
        (centred, asks_centred),
        (whole, asks_centred),  # folding the norms does not change the stream
        (folded, make(model_processing="none")),
        (raw, make()),  # says nothing
        (whole, make()),
        (raw, make(HIDDEN, 128, model_processing="fold_ln_center")),  # no processing changes it
        (centred, make(VALUES, model_processing="none")),
        (centred, make(normalize="layer_norm", model_processing="none")),  # takes the mean out itself
    ):
        model.add_sae(sae)
        model.reset_saes()
    with pytest.raises(ConfigError, match="fold_value_biases"):
        whole.add_sae(make(VALUES, model_processing="none"))
    with pytest.raises(ConfigError, match="as after fold_ln"):
        folded.add_sae(make("blocks.1.mlp.hook_in", model_processing="none"))


def test_contradictions_are_refused_before_loading(folder):
    name = str(folder)
    asks_centred = make(model_name=name, model_processing="center")
    with pytest.raises(ConfigError, match=r"processing is 'none'.*blocks.1.hook_resid_post: center_writing_weights"):
        load_model(sae=asks_centred, processing="none")
    with pytest.raises(ConfigError, match="other activations than one model has"):
        load_model(sae=[asks_centred, make(model_name=name, model_processing="none")])
    with pytest.raises(ConfigError, match="several models"):
        load_model(sae=[make(model_name="gpt2"), make(model_name="pythia-70m")])
    with pytest.raises(ConfigError, match="no model_name"):
        load_model(sae=make())
    with pytest.raises(ConfigError, match="processing is 'folded'; accepted: none"):
        load_model(name, processing="folded")
    with pytest.raises(ConfigError, match="dtype is 'float8'"):
        load_model(name, dtype="float8")
    with pytest.raises(ConfigError, match="sae is a str"):
        load_model(sae="demo")
    with pytest.raises(ModelError, match="no such folder"):
        load_model("./nothing")
    # none and folded norms have one residual stream
    both = [make(model_name=name, model_processing=processing) for processing in ("fold_ln", "none")]
    model = load_model(sae=both)
    assert len(model.blocks) == 3


def test_an_sae_of_another_model_is_refused_by_width_and_hook_point(folder):
    with pytest.raises(ConfigError, match=r"d_in 64.*d_model 32"):
        load_model(str(folder), sae=make(d_in=64))
    with pytest.raises(ConfigError, match=r"'blocks.7.hook_resid_post'.*nearest.*blocks"):
        load_model(str(folder), sae=make("blocks.7.hook_resid_post"))


def test_another_name_on_the_hub_is_worth_a_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(folder), sae=make(model_name="gpt2"))  # a folder may hold the same model


def test_dtypes_follow_the_checkpoint(folder):
    sae = make(model_name=str(folder), model_dtype="bfloat16")
    assert load_model(sae=sae).W_E.dtype == torch.bfloat16
    assert load_model(sae=sae, dtype=torch.float32).W_E.dtype == torch.float32


# ---- the demo model and its SAEs ------------------------------------------------------------------------------------

PROMPT = "def area(width, height):\n    return"


@pytest.fixture(scope="module")
def demo(demo_saes):
    saes = [SAE.load(folder) for folder in demo_saes.values()]
    return load_model(sae=saes), saes


def test_sae_and_model_belong_together(demo):
    model, (first, second) = demo
    name = second.cfg.metadata["hook_name"]
    with torch.no_grad():
        clean = model.run_with_cache(PROMPT)[0]
        logits, cache = model.run_with_cache_with_saes(PROMPT, saes=[first, second], use_error_term=True)
    torch.testing.assert_close(logits, clean, atol=1e-3, rtol=1e-3)
    active = (cache[f"{name}.hook_sae_acts_post"][0, 1:] > 0).sum(-1)
    assert active.max() == second.cfg.k and (active > 0).all()
    assert cache[f"{name}.hook_sae_error"][0, 1:].norm() < 0.6 * cache[f"{name}.hook_sae_input"][0, 1:].norm()


@pytest.mark.parametrize("cached", [True, False])
def test_the_circulating_recipe_for_steering_steers(demo, cached):
    """A hook that adds a row of W_dec, given to `generate`: TransformerLens' own calls none."""
    model, (_, sae) = demo
    name, calls = sae.cfg.metadata["hook_name"], []

    def steering_hook(activations, hook):
        calls.append((activations.shape[1], hook.ctx["start"]))
        return activations + 40.0 * sae.W_dec[11]

    options = {"max_new_tokens": 12, "temperature": 0.0, "verbose": False, "use_past_kv_cache": cached}
    with torch.no_grad():
        steered = model.generate(PROMPT, fwd_hooks=[(name, steering_hook)], **options)
        plain = model.generate(PROMPT, **options)
    n = model.to_tokens(PROMPT).shape[1]
    # the model's own setting is to keep no cache, which a generation overrides
    assert calls == [(n, 0)] + [(1, at) if cached else (at + 1, 0) for at in range(n, n + 11)]
    assert steered.startswith(PROMPT) and plain.startswith(PROMPT) and steered != plain


def test_steering_towards_what_a_feature_promotes(demo):
    model, (_, sae) = demo
    with torch.no_grad():
        effects = (sae.W_dec @ model.W_U).amax(-1)
        latent = int(effects.argmax())
        promoted = int((sae.W_dec[latent] @ model.W_U).argmax())
    frame = sweep_strengths(model, sae, PROMPT, latent, [0, 10, 20, 40], max_new_tokens=10)
    assert frame.kl_prompt[0] < 1e-6 and frame.kl_prompt.is_monotonic_increasing
    assert frame.after.is_monotonic_increasing and frame.after.iloc[-1] > 20
    assert frame.text[0] == frame.attrs["unsteered_text"] and frame.text.iloc[-1] != frame.text[0]
    steered = steer(model, sae, PROMPT, Add(latent, 40.0, positions="generated"), max_new_tokens=10)
    assert (steered.kl[: steered.prompt_length] < 1e-6).all() and steered.kl_generated > 0.1
    tokens = torch.from_numpy(steered.tokens)[None]
    with torch.no_grad():
        clean = model(tokens)[0, :, promoted]
        changed = model.run_with_hooks(
            tokens, fwd_hooks=[(sae.cfg.metadata["hook_name"], lambda x, hook: x + 40.0 * sae.W_dec[latent])]
        )[0, :, promoted]
    assert (changed > clean).float().mean() > 0.8
    shown = steered.side_by_side()
    assert PROMPT in shown and "KL " in shown and f"feature {latent}: " in shown


def test_strengths_in_units_of_a_features_largest_activation(demo):
    import pyarrow as pa

    model, (_, sae) = demo
    table = pa.table({"latent": pa.array([3, 4], pa.int32()), "max_activation": pa.array([12.0, 0.0], pa.float32())})
    features = Features(folder=None, about={}, latents=table, vocabulary=None)
    frame = sweep_strengths(model, sae, PROMPT, 3, [0.5, 2], unit=features, max_new_tokens=1)
    assert frame.strength.tolist() == [0.5, 2] and frame.amount.tolist() == [6, 24]
    with pytest.raises(ConfigError, match="no activation of feature 4"):
        sweep_strengths(model, sae, PROMPT, 4, [1], unit=features, max_new_tokens=1)


def test_a_hook_point_that_an_sae_needs_is_switched_on(folder):
    model = load_model(sae=make("blocks.1.hook_mlp_in", model_name=str(folder)))
    tokens = torch.randint(0, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert "blocks.1.hook_mlp_in" in model.run_with_cache(tokens)[1]
