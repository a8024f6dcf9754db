import json
import math
import re

import pandas as pd
import pytest
from matplotlib.image import imread

from penstock.errors import SweepError
from penstock.home import Home
from penstock.pareto import mark_front
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
        sae("late-topk", "blocks.4", "topk", 8, 0.9, k=8),
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


def figure_of(page: str) -> tuple[list[dict], dict]:
    """The traces and the layout that the page gives to plotly."""
    start = page.rindex("Plotly.newPlot(")
    decoder = json.JSONDecoder()
    traces, end = decoder.raw_decode(page, page.index("[{", start))
    layout, _ = decoder.raw_decode(page, page.index("{", end))
    return traces, layout


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
    assert len(page) > 3_000_000  # plotly itself is inside


def test_the_page_draws_every_evaluated_sae_the_front_and_the_baselines(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo", l0_band=(5.0, 20.0)).read_text()
    traces, layout = figure_of(page)
    hovers = " ".join(text for trace in traces for text in trace.get("text", []))
    assert all(sae_id in hovers for sae_id in ("late-topk", "late-gated", "early-topk", "early-new"))
    assert "lost" not in hovers
    assert "l1_coefficient 0.5" in hovers and "CE recovered 0.9000" in hovers and "mse 16" in hovers
    names = [trace["name"] for trace in traces if trace.get("showlegend", True)]
    assert sorted(names) == sorted(
        ["top-k neurons", "top-k PCA", "frozen random decoder", "front", "topk", "gated", "brand_new"]
    )
    assert [note["text"] for note in layout["annotations"]] == ["blocks.4", "blocks.1"]


def test_the_table_below_lists_all_saes_and_marks_the_front(tmp_path):
    page = write_html(table(), baselines(), tmp_path / "p.html", title="demo").read_text()
    rows = re.findall(r"<tr( class=front)?>(.*?)</tr>", page.split('id="saes"')[1].split("</table>")[0])[1:]
    assert len(rows) == 5
    front = {re.search(r'data-value="([^"]*)">[^<]*</td>$', cells)[1] for flag, cells in rows if flag}
    assert front == {"late-topk", "early-topk", "early-new"}


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
    assert "<td>seconds_total</td><td>61.2</td>" in page
    assert '<tr class=front><td class="name" data-value="blocks.0">' in page
    assert "<td>top-k neurons</td><td>blocks.4</td><td>8</td>" in page
