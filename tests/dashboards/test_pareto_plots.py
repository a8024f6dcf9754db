import json
import math
import re
import shlex

import pandas as pd
import pytest
from matplotlib.image import imread

from penstock.cli import _parser
from penstock.errors import SweepError
from penstock.home import Home
from penstock.pareto import find_sae, mark_front
from penstock.tracking import TrackedSAE, Tracker, sweep_table
from penstock_dashboards.pareto import report, write_html, write_png


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def sae(sae_id: str, hook_point: str, architecture: str, l0: float, recovered: float, **more) -> dict:
    return {"sae_id": sae_id, "hook_point": hook_point, "architecture": architecture, "d_sae": 64, **more,
            "l0": l0, "ce_recovered": recovered, "kl_recovered": recovered, "explained_variance": 0.5,
            "dead_fraction": 0.1, "mse": l0, "status": "finished"}  # fmt: skip


def table() -> pd.DataFrame:
    return mark_front(pd.DataFrame([
        sae("late-topk", "blocks.4", "topk", 8, 0.9, k=8, l1_coefficient=math.nan),
        sae("late-gated", "blocks.4", "gated", 9, 0.8, l1_coefficient=0.5),
        sae("early-topk", "blocks.1", "topk", 16, 0.95, k=16),
        sae("early-new", "blocks.1", "brand_new", 0, 0.2),
        {**sae("lost", "blocks.1", "topk", math.nan, math.nan, k=4), "status": "diverged"},
    ]))  # fmt: skip


def baselines() -> pd.DataFrame:
    return pd.DataFrame([
        {"kind": kind, "hook_point": "blocks.4", "k": k, "l0": float(k), "ce_recovered": k / 64}
        for kind in ("neurons", "pca", "frozen_decoder") for k in (8, 32)
    ])  # fmt: skip


def data_of(page: str) -> dict:
    """What the page gives to its script: the panels, and what is known of every mark."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_the_png_is_a_picture_with_a_panel_a_hook_point(tmp_path):
    path = write_png(table(), baselines(), tmp_path / "new" / "p.png", title="demo", l0_band=(5.0, 20.0))
    height, width, _ = imread(path).shape
    assert width == 1600 and 700 < height < 1000
    one = write_png(table().query("hook_point == 'blocks.4'"), baselines(), tmp_path / "one.png", title="one")
    assert imread(one).shape[1] < width


def test_the_png_needs_neither_baselines_nor_a_finite_band(tmp_path):
    nothing = pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered"])
    assert write_png(table(), nothing, tmp_path / "p.png", title="x", l0_band=(5.0, math.inf)).stat().st_size > 10_000
    assert write_html(table(), pd.DataFrame(), tmp_path / "p.html", title="x", l0_band=(0.0, 20.0)).exists()


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo").read_text()
    assert not re.search(r"""<(?:script|link|img)[^>]*(?:src|href)=""", page)
    assert "default-src 'none'" in page
    assert len(page) > 3_000_000  # plotly itself is inside


def test_the_page_draws_every_evaluated_sae_the_front_and_the_baselines(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo", l0_band=(5.0, 20.0)).read_text()
    data = data_of(page)
    assert [panel["hook_point"] for panel in data["panels"]] == ["blocks.1", "blocks.4"]
    early, late = ({trace["name"]: trace for trace in panel["data"]} for panel in data["panels"])
    assert list(early) == ["front", "topk", "brand_new"]
    assert list(late) == ["top-k neurons", "top-k PCA", "frozen random decoder", "front", "gated", "topk"]
    assert late["topk"]["customdata"] == ["late-topk"] and early["topk"]["x"] == [16.0]
    assert "lost" not in json.dumps(data["panels"]) and "lost" in data["marks"]
    assert [shape["x0"] for shape in data["panels"][0]["layout"]["shapes"]] == [5.0]


def test_a_mark_has_all_settings_and_figures(tmp_path):
    marks = data_of(write_html(table(), baselines(), tmp_path / "p.html", title="demo").read_text())["marks"]
    gated = marks["late-gated"]
    assert gated["settings"] == [["d_sae", "64"], ["l1_coefficient", "0.5"]]
    assert gated["figures"][:2] == [["L0", "9.00"], ["CE recovered", "0.8000"]]
    assert gated["measured"] == [["mse", "9"]] and gated["note"] == "not on the front, finished"
    assert marks["lost"]["note"] == "diverged" and marks["lost"]["commands"] == []
    assert marks["baseline pca 8 blocks.4"]["figures"] == [["L0", "8.00"], ["CE recovered", "0.1250"]]


def test_the_command_of_an_sae_pulls_that_sae_and_no_other(tmp_path):
    crowd = mark_front(pd.DataFrame([
        sae("twin", "blocks.0", "topk", 8, 0.9, k=8), sae("twin-worse", "blocks.0", "topk", 8, 0.8, k=8),
    ]))  # fmt: skip
    marks = data_of(write_html(crowd, baselines(), tmp_path / "p.html", title="two words").read_text())["marks"]
    for sae_id in crowd["sae_id"]:
        (_, command), (_, code) = marks[sae_id]["commands"]
        asked = _parser().parse_args(shlex.split(command)[1:])
        assert asked.sweep == "two words" and asked.to in code
        assert find_sae(crowd, asked.sae)["sae_id"] == sae_id


def test_a_prefix_is_a_mark_and_a_row_of_its_own(tmp_path):
    nested = mark_front(pd.DataFrame([
        sae("nested", "blocks.0", "matryoshka", 16, 0.9, prefix=math.nan),
        sae("nested", "blocks.0", "matryoshka", 4, 0.7, prefix=16.0),
    ]))  # fmt: skip
    page = write_html(nested, baselines(), tmp_path / "p.html", title="demo").read_text()
    data = data_of(page)
    prefix = data["marks"]["nested[16]"]
    assert (prefix["title"], prefix["architecture"]) == ("matryoshka[16]", "matryoshka")
    assert prefix["commands"][0][1] == "penstock pull demo --sae 'nested[16]' --to sae-nested-16"
    trace = next(trace for trace in data["panels"][0]["data"] if trace["name"] == "matryoshka")
    assert trace["customdata"] == ["nested[16]", "nested"]
    assert re.findall(r'data-sae="([^"]*)">', page.split('id="saes"')[1]) == ["nested[16]", "nested"]
    assert "1 SAE and 1 prefix, 2 on the front" in page
    assert write_png(nested, baselines(), tmp_path / "p.png", title="demo").exists()


def test_a_basis_of_the_target_is_drawn_and_is_no_rival(tmp_path):
    site = "blocks.0.mlp.hook_in -> blocks.0.hook_mlp_out"
    saes = mark_front(pd.DataFrame([sae("coder", site, "topk", 8, 0.5, k=8)]))
    rows = pd.DataFrame([
        {"kind": kind, "hook_point": site, "k": 8, "l0": 8.0, "ce_recovered": recovered}
        for kind, recovered in (("target_pca", 0.9), ("frozen_decoder", 0.3))
    ])  # fmt: skip
    page = write_html(saes, rows, tmp_path / "p.html", title="demo").read_text()
    assert "in 1 of 1 comparisons" in page and "<td>it sees the target</td>" in page
    assert [trace["name"] for trace in data_of(page)["panels"][0]["data"]][:2] == [
        "frozen random decoder", "top-k PCA of the target",
    ]  # fmt: skip
    assert write_png(saes, rows, tmp_path / "p.png", title="demo").exists()


def test_the_best_sae_stands_beside_each_baseline(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo").read_text()
    assert "recovers more of the CE in 6 of 6 comparisons" in page
    assert '<td>topk at L0 8: 0.9000</td><td class="number better">+0.7750</td>' in page  # 0.9 - 8/64
    weak = table().assign(ce_recovered=0.1)
    worse = write_html(weak, baselines(), tmp_path / "w.html", title="demo").read_text()
    assert "in 0 of 6 comparisons" in worse and '<td class="number worse">-0.0250</td>' in worse


def test_columns_that_only_follow_the_architecture_wait_to_be_asked_for(tmp_path):
    rows = [sae(f"{name}{l0}", "blocks.0", name, l0, 0.9, **more)
            for name, more in (("topk", {"aux": 1.0}), ("gated", {"warm_up": 9})) for l0 in (4, 8)]  # fmt: skip
    page = write_html(mark_front(pd.DataFrame(rows)), baselines(), tmp_path / "p.html", title="demo").read_text()
    columns = {name: classes for classes, name in re.findall(r'<th scope="col"([^>]*) data-column="(\w+)">', page)}
    assert all("more" in columns[name] for name in ("aux", "warm_up", "mse", "d_sae", "status"))
    assert not any("more" in columns[name] for name in ("hook_point", "architecture", "l0", "ce_recovered", "sae_id"))


def test_the_table_below_lists_all_saes_and_marks_the_front(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo").read_text()
    rows = re.findall(r'<tr( class="front")? data-sae="([^"]*)">', page.split('id="saes"')[1].split("</table>")[0])
    assert [sae_id for _, sae_id in rows] == ["early-new", "early-topk", "lost", "late-topk", "late-gated"]
    assert {sae_id for flag, sae_id in rows if flag} == {"late-topk", "early-topk", "early-new"}


def test_what_a_user_named_is_text_and_never_markup(tmp_path):
    nasty = "</script><b>&"
    marked = mark_front(pd.DataFrame([sae(nasty, nasty, nasty, 8, 0.9, note=nasty), sae("b", nasty, nasty, 9, 0.95)]))
    page = write_html(marked, baselines(), tmp_path / "p.html", title=nasty).read_text()
    assert nasty not in page and "&lt;/script&gt;&lt;b&gt;&amp;" in page


def test_nothing_evaluated_is_said(tmp_path):
    lost = table().query("sae_id == 'lost'")
    for write in (write_png, write_html):
        with pytest.raises(SweepError, match="no SAE of this sweep has been evaluated"):
            write(lost, baselines(), tmp_path / "x", title="x")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="cannot be written"):
        write_html(table(), baselines(), tmp_path / "file" / "p.html", title="x")


def test_the_report_has_the_summary_the_cost_the_spec_and_the_front(tmp_path):
    home = Home(tmp_path / "home")
    tracker = Tracker(home, "small", "id-1")
    tracker.open("name: small\n# <spec>\n", {}, [TrackedSAE("s1", "blocks.0", {"architecture": "topk", "k": 4})])
    tracker.finish_sae("s1", status="finished", metrics={"l0": 4.0, "ce_recovered": 0.9}, folder=None)
    tracker.finish_sweep(
        status="finished", front=sweep_table(home, "small"), baselines=baselines(), files=[],
        cost={"seconds_total": 61.2, "sae_tokens_per_second": 123456.0},
    )  # fmt: skip
    page = report(home, "small", tmp_path / "out" / "report.html").read_text()
    assert "<b>123,456</b><span>SAE-tokens a second</span>" in page and "<b>61</b><span>seconds</span>" in page
    assert "# &lt;spec&gt;" in page
    assert '<td class="name">seconds_total</td><td class="number">61.2</td><td>s</td>' in page
    assert '<tr class="front" data-sae="s1"><td class="name" data-value="blocks.0">' in page
    assert '<td class="name">blocks.4</td><td>top-k neurons</td><td class="number">8</td>' in page
    command = data_of(page)["marks"]["s1"]["commands"][0][1]
    assert command.startswith("penstock pull id-1 ") and command.endswith(f"--home {home.path}")
