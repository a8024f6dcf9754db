import math

import pandas as pd
import pytest

from penstock.spec import TargetSpec
from penstock.targets import missed

TARGETS = TargetSpec(l0=(50, 200), ce_recovered=0.8, explained_variance=0.9, dead_fraction=0.05)
GOOD = {"l0": 100.0, "ce_recovered": 0.9, "explained_variance": 0.95, "dead_fraction": 0.01, "d_sae": 1024,
        "status": "finished"}  # fmt: skip


def judged(targets=TARGETS, **given):
    row = missed(pd.DataFrame([GOOD | given]), targets).iloc[0]
    return row["missed"], row["remedy"]


def test_an_sae_that_reaches_all_targets_misses_none():
    assert judged() == ("", "")
    assert judged(l0=50.0, ce_recovered=0.8, explained_variance=0.9, dead_fraction=0.05) == ("", "")  # ends included
    assert judged(l0=200.0) == ("", "")


def test_without_targets_or_figures_there_is_no_verdict():
    assert judged(TargetSpec()) == (None, None)
    assert judged(l0=math.nan) == (None, None)
    assert judged(status="diverged", l0=300.0) == (None, None)
    assert list(missed(pd.DataFrame([GOOD]).iloc[:0], TARGETS).columns[-2:]) == ["missed", "remedy"]


@pytest.mark.parametrize(("settings", "remedy"), [
    ({"k": 250}, "sparser: try k 182 (is 250)"),  # 250 * (200 / 1.1) / 250
    ({"target_l0": 256.0}, "sparser: try target_l0 182 (is 256)"),
    ({"l1_coefficient": 1.0}, "sparser: try l1_coefficient 1.4 (is 1)"),
    ({"l0_coefficient": 0.02}, "sparser: try l0_coefficient 0.028 (is 0.02)"),
    ({}, "sparser: more sparsity"),
])  # fmt: skip
def test_too_dense_names_the_setting_that_decides_l0(settings, remedy):
    assert judged(l0=250.0, **settings) == ("l0 250 > 200", remedy)


@pytest.mark.parametrize(("settings", "remedy"), [
    ({"k": 16}, "denser: try k 55 (is 16)"),
    ({"k": 1000, "d_sae": 1024}, "denser: a larger d_sae, as k 1000 is nearly all of it"),
    ({"l1_coefficient": 8.0, "k": math.nan}, "denser: try l1_coefficient 2.3 (is 8)"),
])  # fmt: skip
def test_too_sparse_is_mended_by_l0_alone(settings, remedy):
    assert judged(l0=16.0, ce_recovered=0.7, **settings) == ("l0 16 < 50; ce_recovered 0.7 < 0.8", remedy)


def test_a_reconstruction_that_is_too_far_off_needs_latents_or_width_or_tokens():
    assert judged(ce_recovered=0.7, k=100) == (
        "ce_recovered 0.7 < 0.8", "closer: try k 182 (is 100), as the band leaves room",
    )  # fmt: skip
    wider = "closer: try d_sae 2048 (is 1024), or more train.tokens"
    assert judged(l0=190.0, explained_variance=0.85, k=190)[1] == wider
    assert judged(l0=190.0, explained_variance=0.85, prefix=256.0)[1] == (
        "closer: a wider prefix (is 256), or more train.tokens"
    )
    both = judged(l0=400.0, ce_recovered=0.7, k=400)
    assert both[1] == f"sparser: try k 182 (is 400); {wider}"
    no_band = TargetSpec(ce_recovered=0.95)
    assert judged(no_band, k=32, l0=32.0)[1] == (
        "closer: try k 48 (is 32), or try d_sae 2048 (is 1024), or more train.tokens"
    )


def test_dead_latents_have_the_remedies_of_their_architecture():
    standard = judged(dead_fraction=0.25, l1_coefficient=1.0, l1_warm_up_steps=200, lr=8e-3)
    assert standard == (
        "dead_fraction 0.25 > 0.05",
        "fewer dead: try l1_warm_up_steps 400 (is 200), or try lr 0.004 (is 0.008), or resample_every_steps, or a "
        "width of 768, what is alive (is 1024)",
    )
    assert "l0_warm_up_steps of a tenth of the run (is 0)" in judged(
        dead_fraction=0.25, l0_coefficient=1.0, l0_warm_up_steps=0
    )[1]
    topk = judged(dead_fraction=0.25, k=100, aux_coefficient=0.0, resample_every_steps=500.0)[1]
    assert topk == (
        "fewer dead: aux_coefficient above 0, which revives latents, or half of train.lr, or a width of 768, what is "
        "alive (is 1024)"
    )
    assert judged(dead_fraction=0.25, ce_recovered=0.7, l0=190.0)[1].startswith(
        "closer: fewer dead latents, before any more width, or more train.tokens; fewer dead: "
    )


def test_a_miss_says_where_it_is_within_the_interval_and_never_that_a_number_is_below_itself():
    assert judged(ce_recovered=0.79, ce_recovered_low=0.77, ce_recovered_high=0.81)[0] == (
        "ce_recovered 0.79 < 0.8 (within its interval)"
    )
    assert judged(ce_recovered=0.79, ce_recovered_low=0.785, ce_recovered_high=0.795)[0] == "ce_recovered 0.79 < 0.8"
    assert judged(ce_recovered=0.79996)[0] == "ce_recovered 0.79996 < 0.8"
