import importlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch

import penstock
from penstock.errors import CheckpointError, SweepError
from penstock.tracking import find_sweep
from sae_core import SAE
from tracked_sweep import EARLY, LATE, write_sae


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_front_gives_every_sae_by_hook_point_and_l0(finished_home):
    table = penstock.front("demo", home=finished_home)
    assert list(table["sae_id"]) == ["early-4", "early-8", "early-9", "early-32", "late-8", "late-16"]
    late = penstock.front("demo", hook_point=LATE, home=str(finished_home.path))
    assert list(late["sae_id"]) == ["late-8", "late-16"]


def test_front_in_a_band_is_the_front_of_what_lies_inside(finished_home):
    table = penstock.front("demo", hook_point=EARLY, l0=(9, 40), home=finished_home)
    assert list(table["sae_id"]) == ["early-9", "early-32"]
    assert list(table["on_front"]) == [True, True]  # early-8, which beats early-9, lies outside


@pytest.mark.parametrize("l0", ["4:40", "48", (40, 4), (1,), 5, (math.nan, 4), ("a", "b")])
def test_a_band_is_a_pair(finished_home, l0):
    with pytest.raises(SweepError, match=r"l0 .*: accepted is a pair \(LO, HI\)"):
        penstock.front("demo", l0=l0, home=finished_home)


def test_front_of_an_unknown_hook_point_says_which_there_are(finished_home):
    with pytest.raises(SweepError, match=f"no hook point 'x' in this sweep; it has {EARLY}, {LATE}"):
        penstock.front("demo", hook_point="x", home=finished_home)


def test_a_pulled_folder_loads_as_the_sae_that_was_trained(finished_home, tmp_path):
    folder = penstock.pull("demo", hook_point=EARLY, to=tmp_path / "new" / "best", home=finished_home)
    assert {path.name for path in folder.iterdir()} == {
        "cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "penstock.json",
    }  # fmt: skip
    trained, x = write_sae(tmp_path / "trained", EARLY), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(SAE.load(folder)(x), trained(x))


def test_pull_takes_the_best_in_the_specs_band_or_in_the_one_asked_for(finished_home, tmp_path):
    def pulled(**options) -> str:
        folder = penstock.pull("demo", hook_point=EARLY, to=tmp_path / "sae", home=finished_home, **options)
        return json.loads((folder / "penstock.json").read_text())["sae_id"]

    assert pulled() == "early-8"
    assert pulled(l0=(0, 100)) == "early-32"
    assert pulled(l0=(0, 5), architecture="topk") == "early-4"


def test_the_provenance_says_where_it_comes_from(finished_home, tmp_path):
    folder = penstock.pull("demo", hook_point=EARLY, to=tmp_path / "sae", home=finished_home)
    provenance = json.loads((folder / "penstock.json").read_text())
    runs = find_sweep(finished_home, "demo")
    assert (provenance["sweep"], provenance["sweep_id"]) == ("demo", runs.sweep_id)
    assert provenance["run_id"] in {run.info.run_id for run in runs.children()}
    assert (provenance["k"], provenance["l0"], provenance["ce_recovered"]) == (8, 8.0, 0.9)


def test_a_folder_with_other_files_is_refused_and_left_alone(finished_home, tmp_path):
    (tmp_path / "cfg.json").write_text("somebody else's")
    with pytest.raises(SweepError, match=r"it holds cfg\.json; name a new or an empty folder"):
        penstock.pull("demo", hook_point=EARLY, to=tmp_path, home=finished_home)
    assert (tmp_path / "cfg.json").read_text() == "somebody else's"
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="it is a file"):
        penstock.pull("demo", hook_point=EARLY, to=tmp_path / "file", home=finished_home)


def test_links_in_the_folder_are_replaced_and_not_written_through(finished_home, tmp_path):
    """A folder that somebody else has made ready, to have files of whoever pulls into it overwritten."""
    folder, precious = tmp_path / "shared", tmp_path / "precious"
    folder.mkdir()
    precious.write_text("as it was")
    for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors", "penstock.json"):
        (folder / name).symlink_to(precious)
    penstock.pull("demo", hook_point=EARLY, to=folder, home=finished_home)
    assert precious.read_text() == "as it was" and not any(path.is_symlink() for path in folder.iterdir())
    SAE.load(folder)


def test_nothing_is_written_where_nothing_fits(finished_home, tmp_path):
    with pytest.raises(SweepError, match=r"no SAE at .* has an L0 in 50:60; there are 4, 8, 9, 32"):
        penstock.pull("demo", hook_point=EARLY, l0=(50, 60), to=tmp_path / "sae", home=finished_home)
    assert not (tmp_path / "sae").exists()


def test_an_sae_loads_straight_from_the_sweep(finished_home, tmp_path):
    trained = write_sae(tmp_path / "trained", EARLY)
    sae = penstock.load_sae("demo", hook_point=EARLY, l0=(0, 10), home=finished_home)
    assert torch.equal(sae.W_dec, trained.W_dec)
    shutil.rmtree(tmp_path / "trained")
    x = torch.ones(4)
    assert sae.decode(sae.encode(x)).shape == (4,)


def test_a_checkpoint_with_a_missing_file_is_refused(finished_home, tmp_path):
    copy = tmp_path / "home"
    runs = find_sweep(finished_home, "demo")
    run = next(run for run in runs.children() if run.data.tags["sae_id"] == "late-8")
    weights = finished_home.path / "artifacts" / run.info.run_id / "artifacts" / "sae" / "sae_weights.safetensors"
    weights.rename(tmp_path / "hidden")
    try:
        with pytest.raises(CheckpointError, match=r"SAE late-8 .* lacks sae_weights\.safetensors"):
            penstock.pull("demo", hook_point=LATE, to=copy, home=finished_home)
    finally:
        (tmp_path / "hidden").rename(weights)


def test_the_function_stays_reachable_when_the_module_of_its_name_is_imported(finished_home, tmp_path):
    module = importlib.import_module("penstock.pull")
    assert module(sweep="demo", hook_point=EARLY, to=tmp_path / "a", home=finished_home) == tmp_path / "a"
    assert callable(penstock.pull)


def test_importing_the_package_imports_nothing_else():
    code = "import sys, penstock; penstock.__version__; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlflow", "torch", "ray", "pandas", "sae_core"} & set(modules)


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'fornt'"):
        penstock.fornt  # noqa: B018
