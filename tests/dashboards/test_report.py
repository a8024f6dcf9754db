import json
import math
import re
import shlex

import numpy as np
import pandas as pd
import pytest

from penstock.cli import _parser
from penstock.errors import SweepError
from penstock.home import Home
from penstock.pareto import find_sae, key_of, mark_front, select
from penstock.tracking import TrackedSAE, Tracker, sweep_table
from penstock_dashboards.details import CURVES, curves, details, firing_rates
from penstock_dashboards.page import json_in_html
from penstock_dashboards.report import Source, page_data, report, write_report
from sae_core.evaluation import ROW_SUMS
from sample_sweep import BAND, HOOK_POINTS, SPEC, sample_sweep, source

NO_BASELINES = pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered"])


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def sample():
    return sample_sweep()


@pytest.fixture(scope="module")
def data(sample):
    return page_data(sample.table, sample.baselines, source(sample))


def sae(sae_id: str, hook_point: str, architecture: str, l0: float, recovered: float, **more) -> dict:
    return {"sae_id": sae_id, "hook_point": hook_point, "architecture": architecture, "d_sae": 64, **more,
            "l0": l0, "ce_recovered": recovered, "kl_recovered": recovered, "explained_variance": 0.5,
            "dead_fraction": 0.1, "status": "finished"}  # fmt: skip


def data_of(page: str) -> dict:
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def by_key(data: dict) -> dict:
    return {one["key"]: one for one in data["saes"]}


# ---- the answer -----------------------------------------------------------------------------------------------------


def test_the_answer_is_what_pull_fetches(sample, data):
    assert [data["hooks"][answer["hook"]] for answer in data["answers"]] == list(HOOK_POINTS)
    for answer in data["answers"]:
        picked = select(sample.table, data["hooks"][answer["hook"]], l0_band=BAND, rows=sample.rows)
        assert answer["key"] == key_of(picked.to_dict())
        figures = by_key(data)[answer["key"]]["figures"]
        assert f"{figures['ce_recovered']:.4f}" in answer["why"][0] and BAND[0] <= figures["l0"] <= BAND[1]


def test_the_answer_counts_those_that_cannot_be_told_apart_by_the_paired_difference():
    """Two SAEs cost every document the same but for noise, a third costs every document a little more: figures and
    intervals of all three overlap, and only the third can be told apart."""
    generator = np.random.default_rng(0)
    documents = 40
    hard = generator.lognormal(0, 0.6, documents)
    noise = generator.normal(0, 0.01, documents)
    frames = []
    for name, cost in (("best", hard), ("twin", hard * (1 + noise + 0.001)), ("worse", hard * 1.05)):
        row = {"sae": name, "hook_point": "blocks.0", "row": np.arange(documents), "document": np.arange(documents)}
        sums = dict.fromkeys(ROW_SUMS, 1.0)
        losses = {"ce_clean": 2.0, "ce_ablated": 2.0 + 10 * hard, "ce_sae": 2.0 + cost, "l0": 8.0}
        frames.append(pd.DataFrame(row | sums | losses))
    rows = pd.concat(frames, ignore_index=True)
    recovered = {name: 1 - (group["ce_sae"] - 2).sum() / (10 * hard.sum()) for name, group in rows.groupby("sae")}
    saes = pd.DataFrame([sae(name, "blocks.0", "topk", 8.0, value) for name, value in recovered.items()])
    marked = mark_front(saes, None, rows)
    found = page_data(marked, NO_BASELINES, Source("x", "x", rows=rows))["answers"][0]
    assert (found["key"], found["ties"]) == ("best", ["twin"])
    assert "Not distinguishable in CE recovered from 1 other (paired over documents, 95%)." in found["why"]
    without = page_data(marked, NO_BASELINES, Source("x", "x"))["answers"][0]
    assert without["ties"] is None and not any("distinguishable" in said for said in without["why"])


def test_targets_are_met_or_missed_by_name(data):
    chips = data["answers"][0]["targets"]
    assert [(chip["name"], chip["met"]) for chip in chips] == [("l0", True), ("ce_recovered", True),
                                                              ("dead_fraction", True)]  # fmt: skip
    missed = next(one for one in data["saes"] if one["missed"])
    assert {chip["name"]: chip["met"] for chip in missed["targets"]}["ce_recovered"] is False and missed["remedy"]


def test_what_is_said_of_an_sae_follows_its_row(sample, data):
    saes, rows = by_key(data), {key_of(row): row for row in sample.table.to_dict("records")}
    for key, row in rows.items():
        said = " ".join(sentence for sentence, _ in saes[key]["why"])
        assert ("On the front" in said) == bool(row["on_front"])
        if isinstance(row["dominated_by"], str):
            assert [named for _, named in saes[key]["why"] if named] == [row["dominated_by"]]
        if row["status"] == "pruned":
            assert "Stopped by search before its end: at 12.5M tokens" in said and saes[key]["command"] is None
        if row["l0"] > BAND[1] or row["l0"] < BAND[0]:
            assert "outside the band" in said
    seeds = {one["called"]: one["seeds"] for one in data["saes"] if one["hook"] == 0 and "k=16" in one["called"]}
    assert len({seeds[f"topk k=16 seed={seed}"] for seed in range(3)}) == 1 and seeds["batch_topk k=16"] is None


def test_the_command_of_an_sae_pulls_that_sae_and_no_other():
    crowd = mark_front(pd.DataFrame([
        sae("twin", "blocks.0", "topk", 8, 0.9, k=8), sae("twin-worse", "blocks.0", "topk", 8, 0.8, k=8),
        sae("nested", "blocks.0", "matryoshka", 16, 0.9), sae("nested", "blocks.0", "matryoshka", 4, 0.7, prefix=16.0),
    ]))  # fmt: skip
    saes = page_data(crowd, NO_BASELINES, Source("x", "two words"))["saes"]
    assert len(saes) == 4
    for one in saes:
        asked = _parser().parse_args(shlex.split(one["command"])[1:])
        assert (asked.sweep, asked.to) == ("two words", one["folder"])
        assert key_of(find_sae(crowd, asked.sae).to_dict()) == one["key"]


# ---- what there may be ----------------------------------------------------------------------------------------------


def test_a_sweep_without_a_finished_sae_says_so(tmp_path):
    lost = pd.DataFrame([{**sae("lost", "blocks.0", "topk", math.nan, math.nan, k=4), "status": "diverged",
                          "reason": "the loss was nan"}])  # fmt: skip
    data = data_of(write_report(mark_front(lost), NO_BASELINES, tmp_path / "r.html", Source("x", "x")).read_text())
    assert data["answers"][0]["key"] is None and "1 diverged" in data["answers"][0]["why"][0]
    assert data["saes"][0]["why"] == [["Diverged: the loss was nan.", ""]]


def test_an_older_sweep_without_intervals_details_and_verdicts_has_a_report():
    two = [sae("a", "blocks.0", "topk", 8, 0.9, k=8), sae("b", "blocks.0", "topk", 9, 0.8, k=9)]
    old = mark_front(pd.DataFrame(two))
    old = old.drop(columns=["dominated_by", "certain", "on_overall_front"])
    data = page_data(old, NO_BASELINES, Source("x", "x"))
    assert data["answers"][0]["key"] == "a" and data["details"] == {} and by_key(data)["b"]["intervals"] == {}


def test_infinite_bands_and_figures_that_are_not_finite_are_json(tmp_path):
    odd = mark_front(pd.DataFrame([sae("a", "blocks.0", "topk", 8, 0.9, mse=math.inf, k=8)]))
    source = Source("x", "x", l0_band=(5.0, math.inf), cost={"seconds_train": math.nan, "seconds_total": 3.0})
    data = data_of(write_report(odd, NO_BASELINES, tmp_path / "r.html", source).read_text())
    assert data["band"] == [5, None] and data["cost"]["figures"] == [["seconds_total", 3]]


def test_curves_get_thinner_where_there_are_many_saes(tmp_path):
    history = [{"tokens": 1000 * step, "metrics": dict.fromkeys(CURVES, 1 / step)} for step in range(1, 1001)]
    many = pd.DataFrame([sae(f"s{i}", f"blocks.{i % 8}", "topk", 4 + i % 60, 0.9 + i / 6000, k=i) for i in range(500)])
    known = details({f"s{i}": history for i in range(500)}, {f"s{i}": np.linspace(-5, 0, 4096) for i in range(500)})
    path = write_report(mark_front(many), NO_BASELINES, tmp_path / "r.html", Source("x", "x", details=known))
    found = data_of(path.read_text())["details"]
    assert len(found) == 500 and path.stat().st_size < 3_000_000
    for curve in found["s7"]["curves"].values():
        assert len(curve) == 60
    assert found["s7"]["curves"]["tokens"][::59] == [1000, 1_000_000]


def test_a_page_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    table = mark_front(pd.DataFrame([sae("a", "blocks.0", "topk", 8, 0.9, k=8)]))
    with pytest.raises(SweepError, match="cannot be written"):
        write_report(table, NO_BASELINES, tmp_path / "file" / "r.html", Source("x", "x"))


# ---- baselines ------------------------------------------------------------------------------------------------------


def test_the_best_sae_stands_beside_each_baseline():
    two = [sae("good", "blocks.0", "topk", 8, 0.9, k=8), sae("big", "blocks.0", "topk", 20, 0.95, k=20)]
    saes = mark_front(pd.DataFrame(two))
    rows = pd.DataFrame([{"kind": "pca", "hook_point": "blocks.0", "k": k, "l0": float(k), "ce_recovered": recovered}
                         for k, recovered in ((4, 0.1), (8, 0.5), (32, 0.97))])  # fmt: skip
    beaten = page_data(saes, rows, Source("x", "x"))["beaten"]
    assert [row["key"] for row in beaten] == [None, "good", "big"]
    assert beaten[0]["ahead"] is None and beaten[1]["ahead"] == 0.4 and beaten[2]["ahead"] == pytest.approx(-0.02)


def test_a_basis_of_the_target_is_no_rival():
    site = "blocks.0.mlp.hook_in -> blocks.0.hook_mlp_out"
    saes = mark_front(pd.DataFrame([sae("coder", site, "topk", 8, 0.5, k=8)]))
    rows = pd.DataFrame([{"kind": kind, "hook_point": site, "k": 8, "l0": 8.0, "ce_recovered": recovered}
                         for kind, recovered in (("target_pca", 0.9), ("frozen_decoder", 0.3))])  # fmt: skip
    data = page_data(saes, rows, Source("x", "x"))
    assert [(row["reference"], row["ahead"]) for row in data["beaten"]] == [(False, 0.2), (True, None)]
    assert any("frozen random decoder recovers 0.3000" in said for said in data["answers"][0]["why"])


# ---- details.json ---------------------------------------------------------------------------------------------------


def test_curves_keep_their_ends_and_leave_out_what_is_not_finite():
    losses = {30: math.nan, 10: 1, 20: 2}
    history = [{"tokens": tokens, "metrics": {"loss": loss, "lr": 1.0}} for tokens, loss in losses.items()]
    assert curves(history) == {"tokens": [10, 20, 30], "loss": [1, 2, None]}
    long = [{"tokens": step, "metrics": {"l0": step}} for step in range(1000)]
    kept = curves(long, points=11)["tokens"]
    assert kept[0] == 0 and kept[-1] == 999 and len(kept) == 11


def test_firing_rates_are_counted_in_quarters_of_a_decade():
    found = firing_rates(np.array([-10.0, -10.0, -0.99, -0.76, -0.1, 0.0], dtype=np.float32))
    assert found == {"edges": [-1, -0.75, -0.5, -0.25, 0], "counts": [2, 0, 0, 2], "never": 2}
    assert firing_rates(np.full(3, -10.0)) == {"edges": [], "counts": [], "never": 3}


def test_a_prefix_has_the_firing_rates_of_its_latents():
    found = details({"a": []}, {"a": np.array([-1.0, -1.0, -2.0])}, {"a": (2,)})
    assert found["a[2]"]["firing_rates"]["counts"] == [2, 0, 0, 0] and sum(found["a"]["firing_rates"]["counts"]) == 3
    assert "curves" not in found["a[2]"]


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_from_elsewhere(sample, tmp_path):
    page = write_report(sample.table, sample.baselines, tmp_path / "r.html", source(sample)).read_text()
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=["'](?!data:,)""", page)
    assert "default-src 'none'; script-src 'sha256-" in page and "unsafe-inline" not in page
    assert not re.search(r"""\sstyle=|\son[a-z]+=|@import|url\(|innerHTML|eval\(""", page.split('id="data"')[0])
    assert len(page) < 600_000


def test_text_in_the_data_cannot_end_its_element():
    nasty = "</script><!--<script>&\u2028\u2029'\"\\ \ud800"
    text = json_in_html({nasty: nasty})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {nasty.replace("\ud800", "?"): nasty.replace("\ud800", "?")}


def test_the_report_of_a_tracked_sweep_has_its_cost_its_spec_and_its_details(tmp_path):
    home = Home(tmp_path / "home")
    tracker = Tracker(home, "small", "id-1")
    tracked = [TrackedSAE("s1", "blocks.0", {"architecture": "topk", "k": 4})]
    tracker.open("name: small\n# <spec>\n", {"code": "abc"}, tracked)
    tracker.finish_sae("s1", status="finished", metrics={"l0": 4.0, "ce_recovered": 0.9}, folder=None)
    written = tmp_path / "details.json"
    written.write_text(json.dumps(details({"s1": [{"tokens": 5, "metrics": {"loss": 2.0}}]})))
    baselines = pd.DataFrame([{"kind": "pca", "hook_point": "blocks.0", "k": 4, "l0": 4.0, "ce_recovered": 0.5}])
    tracker.finish_sweep(
        status="finished", front=sweep_table(home, "small"), baselines=baselines, files=[written],
        cost={"seconds_total": 61.2, "seconds_train": 50.0, "sae_tokens_per_second": 123456.0},
    )  # fmt: skip
    data = data_of(report(home, "small", tmp_path / "out" / "report.html").read_text())
    assert data["spec"] == "name: small\n# <spec>\n" and ["code", "abc"] in data["provenance"]
    assert data["cost"]["phases"] == [["train", 50], ["other", pytest.approx(11.2)]]
    assert data["details"]["s1"]["curves"] == {"tokens": [5], "loss": [2]}
    command = by_key(data)["s1"]["command"]
    assert command.startswith("penstock pull id-1 ") and command.endswith(f"--home {home.path}")
    assert data["beaten"][0]["key"] == "s1"


def test_the_protocol_says_what_the_figures_were_measured_on(sample):
    facts = dict(page_data(sample.table, sample.baselines, source(sample))["protocol"])
    assert facts["evaluated on"].startswith("499,712 tokens") and facts["context"] == "128 tokens; each begins with BOS"
    assert facts["left out"] == "special tokens, the first position" and facts["intervals"].startswith("95%")
    mean = Source("x", "x", spec=SPEC, protocol={"ablation": "mean"})
    assert "set to its mean" in dict(page_data(sample.table, sample.baselines, mean)["protocol"])["CE recovered"]
