"""A loaded SAE that does not reconstruct real activations says so."""

import inspect
import json
import math
import warnings
from pathlib import Path

import pytest
import torch

from sae_core import ARCHITECTURES, SAE, ConfigError, SAEConfig
from sae_core.pretrained import AbsurdReconstruction, warn_if_absurd

DEMO = Path(__file__).parents[2] / "platform" / "penstock" / "demo"


@pytest.fixture(scope="module")
def residuals():
    """Real activations of the demo model [512, 128] after each layer, first tokens included."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = inspect.getsource(json.decoder) + inspect.getsource(inspect)[:10_000]
    ids = AutoTokenizer.from_pretrained(DEMO)(text, return_tensors="pt").input_ids[:, :512].view(4, 128)
    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(DEMO)(ids, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in states[1:]]


@pytest.fixture(scope="module")
def trained(demo_saes):
    return SAE.load(demo_saes["blocks.4.hook_resid_post"])


def quiet(sae, x, target=None) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return warn_if_absurd(sae, x, target)


def test_a_good_sae_is_silent_on_its_own_hook_point(trained, residuals):
    assert quiet(trained, residuals[4]) > 0.5


@pytest.mark.parametrize("scales", [(1.0, 0.125), (10.0, 1.0), (0.09, 0.09)])
def test_a_scale_that_was_misread_warns(scales, trained, residuals):
    with pytest.warns(AbsurdReconstruction, match=r"explains -[\d.e+]+ of the variance of \d+ tokens"):
        assert warn_if_absurd(trained.folded(*scales), residuals[4]) < 0.1


def test_the_warning_says_what_to_check(trained, residuals):
    source = {"release": "gpt2-small-res-jb", "sae_id": "blocks.8.hook_resid_pre"}
    about = {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "prepend_bos": False}
    metadata = {"hook_name": "blocks.8.hook_resid_pre", "source": source, **about}
    sae = trained.folded(10.0, 1.0).replaced(metadata=metadata)
    with pytest.warns(AbsurdReconstruction) as caught:
        warn_if_absurd(sae, residuals[4])
    message = str(caught[0].message)
    for part in ("gpt2-small-res-jb blocks.8", "hook point 'blocks.8.hook_resid_pre'", "center_writing_weights",
                 "BOS not first"):  # fmt: skip
        assert part in message


def identity(d: int = 4, **fields) -> SAE:
    """Reconstructs everything, exactly."""
    cfg = SAEConfig(architecture="standard", d_in=d, d_sae=2 * d, apply_b_dec_to_input=False, **fields)
    eye = torch.cat([torch.eye(d), -torch.eye(d)], dim=1)
    zeros = {"b_enc": torch.zeros(2 * d), "b_dec": torch.zeros(d)}
    return ARCHITECTURES["standard"](cfg, {"W_enc": eye, "W_dec": eye.T.contiguous(), **zeros})


def test_outliers_are_left_out():
    """By hand: of 12 tokens one has a norm far above the median, which a decoder of zeros would explain none of."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    x[0] *= 1000
    assert quiet(identity(), x) == pytest.approx(1.0)
    halved = identity().folded(1.0, 2.0)  # the error is x / 2, the variance that of all but the first
    kept = x[1:].double()
    variance = kept.square().sum(1).mean() - kept.mean(0).square().sum()
    explained = 1 - float((kept / 2).square().sum(1).mean() / variance)
    assert quiet(halved, x) == pytest.approx(explained)


def test_tokens_may_have_more_dimensions():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    assert quiet(identity(reshape_activations="hook_z"), x.view(3, 5, 2, 2)) == pytest.approx(1.0)
    assert quiet(identity(), x) == pytest.approx(1.0)


def test_too_little_to_judge_by_is_no_absurdity():
    x = torch.randn(7, 4)
    assert math.isnan(quiet(identity().folded(1.0, 50.0), x))
    assert math.isnan(quiet(identity().folded(1.0, 50.0), torch.ones(20, 4)))
    assert math.isnan(quiet(identity(), torch.zeros(0, 4)))


def test_values_that_are_no_numbers_are_absurd():
    sae = identity().replaced({"b_dec": torch.full((4,), math.nan)})
    with pytest.warns(AbsurdReconstruction, match="explains nan"):
        assert math.isnan(warn_if_absurd(sae, torch.randn(20, 4)))


def test_a_transcoder_is_judged_by_what_it_writes():
    sae, x = identity(d_out=4), torch.randn(20, 4)
    assert quiet(sae, x, target=x) == pytest.approx(1.0)
    with pytest.warns(AbsurdReconstruction):
        warn_if_absurd(sae, x, target=-x)
    with pytest.raises(ConfigError, match="target is missing"):
        warn_if_absurd(sae, x)
    with pytest.raises(ConfigError, match="20 tokens and target 19"):
        warn_if_absurd(sae, x, target=x[1:])
    with pytest.raises(ConfigError, match=r"x has shape \[20, 3\]; accepted: \[n, 4\]"):
        warn_if_absurd(sae, x[:, :3], target=x)
