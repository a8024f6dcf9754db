"""Sweeps of a tiny model from spec to pulled folder, with everything but Ray."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import penstock
from penstock.cli import format_front
from penstock.errors import SweepError
from penstock.evaluation import evaluation_of
from penstock.home import Home
from penstock.resolved import ResolvedSweep
from penstock.results import baseline_table, end_stopped, sae_table
from penstock.storage import Storage
from penstock.sweep import Driver
from penstock.tracking import TrackedSAE, Tracker, find_sweep
from sae_core import SAE
from whole_sweeps import run_sweep, write_inputs, write_spec

READS, WRITES = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module", autouse=True)
def _no_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a sweep, and returns it: `run(name, hook points, entry of saes, excluded)`."""
    folder = tmp_path_factory.mktemp("sweeps")
    inputs = write_inputs(folder)

    def run(name: str, hooks: str, entry: str, exclude: str = "") -> ResolvedSweep:
        path = write_spec(folder / f"{name}.yaml", inputs, name, hooks, entry, exclude=exclude)
        return run_sweep(path, Home(folder / "home"))

    return run


@pytest.fixture(scope="module")
def nested(run):
    return run("nested", "blocks.1.hook_resid_post", "{architecture: matryoshka, d_sae: 2x, k: 6, widths: [8, 16, 2x]}")


@pytest.fixture(scope="module")
def transcoders(run):
    entry = "{architecture: topk, d_sae: 2x, k: 6, skip: [false, true]}"
    return run("transcoders", f"{{reads: {READS}, writes: {WRITES}}}", entry, ", exclude: {norm_over_median: 1.2}")


def test_every_prefix_is_a_row_beside_the_whole(nested):
    table = penstock.front("nested", home=nested.home)
    [sae] = [sae for sae in nested.saes if sae.baseline is None]
    assert list(table["sae_id"]) == [sae.sae_id] * 3
    rows = {None if pd.isna(row["prefix"]) else int(row["prefix"]): row for row in table.to_dict("records")}
    assert set(rows) == {None, 8, 16}
    assert rows[8]["l0"] < rows[16]["l0"] < rows[None]["l0"]
    assert rows[8]["explained_variance"] < rows[None]["explained_variance"]
    columns = ["prefix", "l0", "ce_recovered", "dead_fraction", "on_front", "on_overall_front", "status"]
    made = sae_table(nested)[columns].sort_values("l0", ignore_index=True)
    pd.testing.assert_frame_equal(table[columns].sort_values("l0", ignore_index=True), made, check_dtype=False)
    assert "matryoshka[8]  " in format_front(table) and f"{sae.sae_id}[8]" in format_front(table)


def test_figures_of_prefixes_are_metrics_of_the_whole_saes_run(nested):
    runs = {run.data.tags["sae_id"]: run for run in find_sweep(nested.home, "nested").children()}
    assert len(runs) == 2  # with the frozen decoder
    [sae] = [sae for sae in nested.saes if sae.baseline is None]
    metrics = runs[sae.sae_id].data.metrics
    table = sae_table(nested).set_index("prefix")
    assert metrics["prefix_8.l0"] == pytest.approx(table.loc[8.0, "l0"])
    assert metrics["prefix_16.ce_recovered"] == pytest.approx(table.loc[16.0, "ce_recovered"])


def test_a_prefix_is_pulled_as_an_sae_of_its_own(nested, tmp_path):
    [sae] = [sae for sae in nested.saes if sae.baseline is None]
    folder = penstock.pull("nested", sae=f"{sae.sae_id[:5]}[8]", to=tmp_path / "prefix", home=nested.home)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json", "penstock.json", "sae_weights.safetensors", "sparsity.safetensors",
    ]  # fmt: skip
    pulled, whole = SAE.load(folder), penstock.load_sae("nested", sae=sae.sae_id, home=nested.home)
    assert (pulled.d_sae, whole.d_sae) == (8, 64)
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0)) * 3
    torch.testing.assert_close(pulled(x), whole.prefix(8)(x))
    about = json.loads((folder / "penstock.json").read_text())
    assert (about["sae_id"], about["prefix"], about["architecture"]) == (sae.sae_id, 8, "matryoshka")
    narrow = penstock.load_sae("nested", hook_point="blocks.1.hook_resid_post", l0=(0, about["l0"]), home=nested.home)
    assert narrow.d_sae == 8


def test_transcoders_are_shown_and_picked_by_their_site(transcoders, tmp_path):
    label, home = f"{READS} -> {WRITES}", transcoders.home
    table = penstock.front("transcoders", home=home)
    assert set(table["hook_point"]) == {label} and set(table["skip"]) == {True, False} and set(table["d_out"]) == {32}
    assert table["l0"].between(1, 6).all() and table["explained_variance"].between(0.1, 1).all()
    for hook_point in (label, READS):
        assert len(penstock.front("transcoders", hook_point=hook_point, home=home)) == 2
    with pytest.raises(SweepError, match=f"no hook point '{WRITES}' in this sweep; it has {label}"):
        penstock.front("transcoders", hook_point=WRITES, home=home)
    skipping = table.loc[table["skip"], "sae_id"].item()
    sae = SAE.load(penstock.pull("transcoders", sae=skipping, to=tmp_path / "t", home=home))
    assert sae.cfg.skip and (sae.cfg.metadata["hook_name"], sae.cfg.metadata["hook_name_out"]) == (READS, WRITES)


def test_baselines_of_transcoders_say_what_they_see(transcoders, nested):
    assert sorted(baseline_table(nested)["kind"]) == ["frozen_decoder", "neurons", "pca"]
    of_transcoders = baseline_table(transcoders).set_index("kind")
    assert sorted(of_transcoders.index) == ["frozen_decoder", "target_neurons", "target_pca"]
    assert len(set(of_transcoders["n_tokens"])) == 1
    assert of_transcoders.loc["target_neurons", "l0"] == pytest.approx(4)


def test_what_has_its_figures_is_not_evaluated_again(transcoders, nested):
    assert evaluation_of(transcoders).left() == [] and evaluation_of(nested).left() == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sae": "x"}, "no SAE 'x' in this sweep"),
        ({"sae": "ID[9]"}, r"SAE 'ID\[9\]': there is ID, ID\[8\], ID\[16\]"),
        ({"sae": "ID", "l0": (0, 5)}, r"l0 \(0, 5\) cannot go with sae 'ID'"),
        ({}, "give a hook point to pick the best of"),
        ({"sae": "ID", "hook_point": "a"}, "hook_point 'a' cannot go with sae 'ID'"),
    ],
)
def test_an_sae_that_is_not_there_or_asked_for_in_two_ways_is_refused(asked, message, nested, tmp_path):
    [sae] = [sae for sae in nested.saes if sae.baseline is None]
    asked = {key: value.replace("ID", sae.sae_id) if key == "sae" else value for key, value in asked.items()}
    with pytest.raises(SweepError, match=message.replace("ID", sae.sae_id)):
        penstock.pull("nested", to=tmp_path / "sae", home=nested.home, **asked)


def test_a_driver_that_goes_on_begins_at_what_is_in_storage_and_counts_none_of_it_as_its_own(nested, tmp_path):
    storage = Storage(tmp_path)
    storage.commit_folder("saes/begun/checkpoints/step-000000010", {"about.json": b"{}"})
    saes = [SimpleNamespace(sae_id=name) for name in ("begun", "fresh")]
    driver = SimpleNamespace(
        spec=nested.spec, sweep=nested, storage=storage, left=saes, _tokens_at={}, _tokens_before={}, _stopped={}
    )
    Driver._note_reached(driver)
    assert driver._tokens_at == {"begun": 500} and Driver._made(driver, driver._tokens_at) == 0
    assert Driver._made(driver, {"begun": 750, "fresh": 50}) == 300
    assert Driver._made(driver, {"begun": 50, "fresh": 50}) == 50  # its checkpoint could not be read


def test_an_sae_that_diverged_stays_so_when_its_sweep_is_stopped(nested, tmp_path):
    sweep = replace(nested, home=Home(tmp_path / "home"), storage=Storage(tmp_path / "storage"))
    diverged, begun = sweep.saes
    stopped = {"status": "diverged", "reason": "the loss left every bound", "step": 7, "history": []}
    sweep.storage.write_json(f"saes/{diverged.sae_id}/stopped.json", stopped)
    driver = SimpleNamespace(
        spec=sweep.spec, sweep=sweep, storage=sweep.storage, left=[begun], _tokens_at={}, _tokens_before={}, _stopped={}
    )
    Driver._note_reached(driver)
    assert driver._stopped == {diverged.sae_id: "diverged"}
    assert Driver._what_is_left(driver) == "of 2 SAEs 0 done, 1 diverged, 1 not begun"

    tracker = Tracker(sweep.home, "nested", sweep.sweep_id)
    tracker.open(sweep.yaml, {}, [TrackedSAE(one.sae_id, one.hook_point, one.params) for one in sweep.saes])
    end_stopped(sweep, tracker)
    tracker.interrupt("penstock stop", "stopped")
    runs = {run.data.tags["sae_id"]: run for run in find_sweep(sweep.home, "nested").children()}
    found = {sae_id: (run.info.status, run.data.tags["status"]) for sae_id, run in runs.items()}
    assert found == {diverged.sae_id: ("FAILED", "diverged"), begun.sae_id: ("KILLED", "stopped")}


def test_ctrl_c_says_how_the_sweep_goes_on(nested, capsys):
    class Interrupted(Driver):
        def _prepare(self, address):
            self.sweep = nested

        def _is_complete(self):
            return False

        def _begin(self):
            pass

        def _train(self):
            raise KeyboardInterrupt

    driver = Interrupted(nested.spec, nested.home, False)
    with pytest.raises(KeyboardInterrupt):
        driver.run(None)
    driver.close()
    assert f"go on with: penstock resume nested --home {nested.home.path}\n" in capsys.readouterr().out
