"""`penstock.train(...)`: keywords as a spec. That it runs is in tests/ray."""

import math
import sys
import types

import numpy as np
import pandas as pd
import pytest

import penstock
from penstock.errors import SpecError, SweepError, UserError
from penstock.train_one import Trained, spec_of

ONE = {"hook_point": "blocks.4.hook_resid_post", "architecture": "topk", "d_sae": "8x", "k": 32, "tokens": "2M"}


def test_keywords_are_a_spec():
    spec = spec_of(
        {**ONE, "model": "gpt2", "context_size": 64, "lr": 1e-3, "data": {"dataset": "x.parquet", "seed": 3},
         "resources": {"model_hosts": 2}, "dtype": "bfloat16", "keep": 4, "name": "mine"}
    )  # fmt: skip
    assert spec.name == "mine" and spec.model.name == "gpt2" and spec.model.dtype == "bfloat16"
    assert spec.data.dataset == "x.parquet" and spec.data.context_size == 64 and spec.data.seed == 3
    assert spec.train.tokens == 2_000_000 and spec.train.lr == 1e-3 and spec.train.keep == 4
    assert spec.resources.model_hosts == 2 and spec.baselines.k == []
    assert spec.saes == [{"architecture": "topk", "d_sae": "8x", "k": 32}]
    assert spec.hook_points == ["blocks.4.hook_resid_post"]


def test_lists_are_axes_and_seeds_are_the_saes():
    spec = spec_of({**ONE, "k": (16, np.int64(32)), "seed": [0, 1]})
    assert spec.sae_settings(10) == [
        {"architecture": "topk", "d_sae": 80, "k": k, "seed": seed} for k in (16, 32) for seed in (0, 1)
    ]
    assert spec.data.seed == 0


def test_several_kinds_of_saes_at_several_hook_points():
    kinds = {"topk": "k", "standard": "target_l0"}
    saes = [{"architecture": name, "d_sae": "8x", setting: 8} for name, setting in kinds.items()]
    spec = spec_of({"hook_points": ["a", {"reads": "b", "writes": "c"}], "saes": saes, "tokens": 1_000_000})
    assert [site.label for site in spec.sites] == ["a", "b -> c"] and len(spec.saes) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokns": "1M"}, r"unknown keyword `tokns`; did you mean `tokens`\?"),
        ({"l1_coefficient": 3}, r"unknown keyword `l1_coefficient`.*of the SAE \(topk\)"),
        ({"architecture": "topq"}, r"architecture is 'topq': did you mean 'topk'\?"),
        ({"k": -1}, "k is -1"),
        ({"tokens": "many"}, r"`train.tokens` is 'many'"),
        ({"data": {"contxt_size": 64}}, r"unknown key `data.contxt_size`; did you mean `context_size`\?"),
        ({"context_size": 64, "data": {"context_size": 32}}, "context_size is given twice, alone and in data"),
        ({"hook_points": ["a"]}, "hook_point and hook_points are both given"),
        ({"train": 5}, "`train` is 5: accepted is a mapping"),
        ({"resources": 5}, "`resources` is 5: accepted is a mapping"),
        ({"saes": [{}]}, "architecture and saes are both given"),
        ({"tracking": {"wandb_entity": "me"}}, "wandb_entity 'me' is given, and no wandb_project"),
        ({"adam_betas": [0.9, 1.0]}, r"`train.adam_betas` is \[0.9, 1.0\]: accepted are two numbers"),
    ],
)
def test_what_is_wrong_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        spec_of({**ONE, **change})


@pytest.mark.parametrize(("missing", "named"), [("hook_point", "hook_point"), ("architecture", "d_sae"),
                                                ("tokens", "tokens")])  # fmt: skip
def test_what_is_missing_is_named(missing, named):
    with pytest.raises(SpecError, match=named):
        spec_of({name: value for name, value in ONE.items() if name != missing})


def test_the_model_is_asked_before_anything_is_started(tmp_path):
    with pytest.raises(UserError, match=r"has no 'blocks.9.hook_resid_post'"):
        penstock.train(**{**ONE, "hook_point": "blocks.9.hook_resid_post"}, home=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("running", "message"), [(True, r"ray\.shutdown\(\)"), (False, "RAY_AUTH_MODE=token")])
def test_a_ray_that_is_there_already_is_left_alone(monkeypatch, running, message):
    from penstock.cluster import connect

    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(is_initialized=lambda: running))
    with pytest.raises(SweepError, match=message):
        connect(None)


def test_what_came_of_it(finished_home, tmp_path):
    trained = Trained("demo", "demo", finished_home)
    assert list(trained.saes) == ["early-4", "early-8", "early-9", "early-32", "late-8"]
    assert trained.saes["early-9"].cfg.d_sae == 6
    with pytest.raises(SweepError, match=r"SAEs at 2 hook points.*\.best\(hook_point=\.\.\.\)"):
        _ = trained.sae
    best = trained.best("blocks.1.hook_resid_post")
    assert best.cfg.hook_name == "blocks.1.hook_resid_post"
    assert trained.metrics_of("early-8")["ce_loss_score"] == trained.metrics_of("early-8")["ce_recovered"] == 0.9
    assert not any(math.isnan(value) for value in trained.metrics_of("early-8").values())
    assert isinstance(trained.front, pd.DataFrame)
    folder = trained.pull(tmp_path / "out", hook_point="blocks.4.hook_resid_post")
    assert (folder / "cfg.json").is_file()
