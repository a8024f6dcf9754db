"""The report that a sweep publishes, and the one that `penstock report` writes of it."""

import json
import re
import shlex
from pathlib import Path

import pytest

from penstock.cli import main
from penstock.home import Home
from penstock.pareto import key_of
from penstock.tracking import find_sweep, sweep_table
from whole_sweeps import run_sweep, write_inputs, write_spec

SAES = (
    "{architecture: topk, d_sae: 32, k: [2, 4], seed: [0, 1]}, "
    "{architecture: matryoshka, d_sae: 32, widths: [8, 32], k: 4}"
)
TARGETS = "targets: {ce_recovered: 0.99}\nselect: {l0_band: '1:3'}\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    folder = tmp_path_factory.mktemp("published")
    inputs = write_inputs(folder)
    home = Home(folder / "home")
    spec = write_spec(folder / "spec.yaml", inputs, "small", "blocks.0.hook_resid_post", SAES, rest=TARGETS)
    run_sweep(spec, home)
    return home


def data_of(page: Path) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(found[1])


def test_curves_and_firing_rates_of_every_sae_are_published(home):
    runs = find_sweep(home, "small")
    details = runs.details()
    table = sweep_table(home, runs)
    assert set(details) == {key_of(row) for row in table.to_dict("records")}
    for row in table.to_dict("records"):
        found = details[key_of(row)]
        rates, width = found["firing_rates"], 32 if row["prefix"] != 8 else 8
        assert sum(rates["counts"]) + rates["never"] == width and len(rates["edges"]) == len(rates["counts"]) + 1
        if row["prefix"] != 8:
            assert found["curves"]["tokens"][-1] == 1500 and found["curves"]["explained_variance"][-1] is not None


def test_the_published_report_says_what_the_one_written_later_says(home, tmp_path):
    runs = find_sweep(home, "small")
    assert main(["report", "small", "--to", str(tmp_path / "r.html"), "--home", str(home.path)]) == 0
    published, later = data_of(runs.artifact("report.html")), data_of(tmp_path / "r.html")
    assert set(published) == set(later)
    for part in set(later) - {"saes", "settings", "figures", "facts", "provenance"}:
        assert published[part] == later[part], part
    for one, other in zip(published["saes"], later["saes"], strict=True):
        assert one == other
    assert all("ce_recovered" in sae["intervals"] for sae in later["saes"])
    assert {sae["seeds"] is not None for sae in later["saes"] if sae["kind"] == "topk"} == {True}


def test_the_answers_command_fetches_the_answer(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = data_of(find_sweep(home, "small").artifact("report.html"))
    answer = next(sae for sae in data["saes"] if sae["key"] == data["answers"][0]["key"])
    assert main(shlex.split(answer["command"])[1:]) == 0
    assert json.loads((tmp_path / answer["folder"] / "penstock.json").read_text())["sae_id"] == answer["whole"]
    chips = {chip["name"]: chip["met"] for chip in data["answers"][0]["targets"]}
    assert chips == {"ce_recovered": answer["figures"]["ce_recovered"] >= 0.99}
