import json
import logging
import math
import os
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow import MlflowClient

import penstock
from mlflow_servers import mlflow_server
from penstock.cli import main
from penstock.errors import CheckpointError, SweepError
from penstock.home import Home
from penstock.notes import NOTE, VIEW_TAG, views
from penstock.registry import aliases_of, hand_over, model_name
from penstock.tracking import TrackedSAE, Tracker, find_sweep, sweep_table
from sae_core import JumpReLUSAE, SAEConfig
from tracked_sweep import EARLY, LATE, SPEC, figures, make_sweep, write_sae

EARLY_MODEL, LATE_MODEL = f"demo.{EARLY}", f"demo.{LATE}"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    """A home with sweeps that were handed over, each with a name of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(tmp_path_factory.mktemp("registry") / "home")
        make_sweep(home, tmp_path_factory.mktemp("saes"))
        hand_over(home, "demo")
        return home


def client(home: Home) -> MlflowClient:
    return MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)


def versions(home: Home, name: str) -> dict[str, str]:
    """{SAE: version} of a registered model."""
    found = client(home).search_model_versions(f"name = '{name}'")
    assert len(found) == len({version.tags["penstock.sae"] for version in found})
    return {version.tags["penstock.sae"]: str(version.version) for version in found}


def aliases(home: Home, name: str) -> dict[str, str]:
    """{alias: SAE} of a registered model."""
    by_version = {version: sae for sae, version in versions(home, name).items()}
    model = client(home).get_registered_model(name)
    return {alias: by_version[str(version)] for alias, version in model.aliases.items()}


def finish(
    home: Home, folder: Path, name: str, results: dict[str, tuple[float, float]], hook_point: str = EARLY,
    sweep_id: str = "",
) -> str:  # fmt: skip
    """A sweep of SAEs with the (L0, CE recovered) given, handed over. Returns its id."""
    sweep_id = sweep_id or f"id-{name}"
    tracker = Tracker(home, name, sweep_id)
    params = {"architecture": "topk", "d_sae": 6}
    tracker.open(SPEC, {"protocol": "p" * 12}, [TrackedSAE(sae, hook_point, params) for sae in results])
    for sae, (l0, recovered) in results.items():
        write_sae(folder / sae, hook_point)
        tracker.finish_sae(sae, status="finished", metrics=figures(l0, recovered), folder=folder / sae)
    tracker.finish_sweep(
        status="finished", front=sweep_table(home, sweep_id), baselines=sweep_table(home, sweep_id)[:0], cost={},
        files=[],
    )  # fmt: skip
    hand_over(home, sweep_id)
    return sweep_id


def note(home: Home, sweep: str, sae_id: str | None = None) -> str:
    runs = find_sweep(home, sweep)
    if sae_id is None:
        return client(home).get_run(runs.run_id).data.tags[NOTE]
    return next(run for run in runs.children() if run.data.tags["sae_id"] == sae_id).data.tags[NOTE]


# ---- what is registered ----


def test_the_saes_on_the_front_are_versions_and_have_aliases(home):
    names = {model.name for model in client(home).search_registered_models()}
    assert {EARLY_MODEL, LATE_MODEL} <= names
    assert aliases(home, EARLY_MODEL) == {"best": "early-8", "l0-4": "early-4", "l0-8": "early-8"}
    assert aliases(home, LATE_MODEL) == {"best": "late-8", "l0-8": "late-8"}


def test_a_version_says_what_it_is_and_how_to_load_it(home):
    version = client(home).get_model_version_by_alias(EARLY_MODEL, "best")
    tags = {name: version.tags[name] for name in ("l0", "ce_recovered", "dead_fraction", "architecture", "d_sae")}
    assert tags == {"l0": "8", "ce_recovered": "0.9", "dead_fraction": "0.25", "architecture": "topk", "d_sae": "6"}
    assert f'load_sae("models:/{EARLY_MODEL}/{version.version}")' in version.description
    assert f'load_sae("models:/{EARLY_MODEL}@best")' in client(home).get_registered_model(EARLY_MODEL).description


def test_a_checkpoint_is_stored_once(home):
    version = client(home).get_model_version_by_alias(EARLY_MODEL, "best")
    run = client(home).get_run(version.run_id)
    assert version.source == f"{run.info.artifact_uri}/sae" and run.data.tags["sae_id"] == "early-8"
    weights = list((home.path / "artifacts").rglob("sae_weights.safetensors"))
    assert len(weights) == 5 and not list((home.path / "artifacts").rglob("models"))


def test_handing_over_again_registers_nothing_twice(home):
    before = versions(home, EARLY_MODEL), aliases(home, EARLY_MODEL)
    hand_over(home, "demo")
    assert (versions(home, EARLY_MODEL), aliases(home, EARLY_MODEL)) == before


def test_a_better_sae_moves_the_aliases_and_leaves_those_of_users(home, tmp_path):
    first = {"a": (4.0, 0.8), "b": (8.0, 0.85)}
    finish(home, tmp_path, "moves", first)
    name = f"moves.{EARLY}"
    client(home).set_registered_model_alias(name, "in-my-paper", versions(home, name)["b"])
    finish(home, tmp_path, "moves", first | {"c": (7.0, 0.9)}, sweep_id="with-one-more")
    assert versions(home, name) == {"a": "1", "b": "2", "c": "3"}
    assert aliases(home, name) == {"best": "c", "l0-4": "a", "l0-7": "c", "in-my-paper": "b"}


def test_what_a_user_deletes_does_no_harm(home, tmp_path):
    sweep = finish(home, tmp_path, "deletes", {"a": (4.0, 0.8), "b": (8.0, 0.85)})
    name = f"deletes.{EARLY}"
    client(home).delete_model_version(name, versions(home, name)["b"])
    hand_over(home, sweep)
    assert aliases(home, name) == {"best": "b", "l0-4": "a", "l0-8": "b"}
    client(home).delete_registered_model(name)
    hand_over(home, sweep)
    assert aliases(home, name) == {"best": "b", "l0-4": "a", "l0-8": "b"}


def test_an_sae_whose_run_was_deleted_is_registered_from_its_new_one(home, tmp_path):
    finish(home, tmp_path, "reruns", {"a": (4.0, 0.8)})
    client(home).delete_run(find_sweep(home, "reruns").children()[0].info.run_id)
    finish(home, tmp_path, "reruns", {"a": (4.0, 0.8)}, sweep_id="reruns-again")
    version = client(home).get_model_version_by_alias(f"reruns.{EARLY}", "best")
    assert version.run_id == find_sweep(home, "reruns").children()[0].info.run_id


def test_somebody_elses_model_of_that_name_is_left_alone(home, tmp_path):
    name = f"taken.{EARLY}"
    client(home).create_registered_model(name, {"owner": "somebody"}, "mine")
    finish(home, tmp_path, "taken", {"a": (4.0, 0.8)})
    theirs = client(home).get_registered_model(name)
    assert (theirs.tags, theirs.description, theirs.aliases) == ({"owner": "somebody"}, "mine", {})
    (ours,) = [model.name for model in client(home).search_registered_models(f"name LIKE '{name}-%'")]
    assert aliases(home, ours) == {"best": "a", "l0-4": "a"}
    assert f"models:/{ours}@best" in note(home, "taken", "a")


def test_a_registry_that_refuses_costs_the_sweep_its_models_only(home, tmp_path, caplog):
    for name in (f"refused.{EARLY}", f"refused.{EARLY}-x"):
        client(home).create_registered_model(name)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "penstock"):
        patch.setattr("penstock.registry.content_id", lambda value: "x")  # the second name is taken, too
        finish(home, tmp_path, "refused", {"a": (4.0, 0.8)})
    assert "on the front of refused are not registered as models: the names" in caplog.text
    assert 'load_sae("refused", sae="a")' in note(home, "refused", "a") and "models:/" not in note(home, "refused", "a")


def test_a_transcoders_model_has_a_legal_name(home, tmp_path):
    finish(home, tmp_path, "cross", {"a": (4.0, 0.8)}, hook_point=f"{EARLY} -> {LATE}")
    assert aliases(home, f"cross.{EARLY}-to-{LATE}") == {"best": "a", "l0-4": "a"}
    assert model_name("s", "a/b:c d -> é") == "s.a_b_c_d-to-_"


def test_a_prefix_on_the_front_is_a_version_with_files_of_its_own(home, tmp_path):
    generator = torch.Generator().manual_seed(0)
    metadata = {"hook_name": EARLY, "matryoshka": {"widths": [3, 6]}}
    cfg = SAEConfig(architecture="jumprelu", d_in=4, d_sae=6, metadata=metadata)
    shapes = JumpReLUSAE.shapes(cfg)
    whole = JumpReLUSAE(cfg, {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()})
    whole.save(tmp_path / "sae", sparsity=torch.full((6,), -1.0))
    tracker = Tracker(home, "nested", "nested")
    tracker.open(SPEC, {}, [TrackedSAE("m", EARLY, {"architecture": "matryoshka", "d_sae": 6})])
    of_prefix = {f"prefix_3.{name}": value for name, value in figures(3.0, 0.7).items()}
    tracker.finish_sae("m", status="finished", metrics=figures(6.0, 0.9) | of_prefix, folder=tmp_path / "sae")
    for _ in range(2):
        hand_over(home, "nested")
        assert aliases(home, f"nested.{EARLY}") == {"best": "m", "l0-6": "m", "l0-3": "m[3]"}
    prefix = penstock.load_sae(f"models:/nested.{EARLY}@l0-3", home=home)
    x = torch.rand(5, 4, generator=generator)
    torch.testing.assert_close(prefix(x), whole.prefix(3)(x))
    assert "Its first 3 latents alone: `m[3]` has L0 3, CE recovered 0.7000 and is on the front." in note(
        home, "nested", "m"
    )


def test_each_sae_of_a_front_has_an_alias_of_its_own():
    figures_of = {"a": (49.6, 0.8), "b": (50.4, 0.9), "c": (50.2, 0.7), "d": (0.3, 0.1)}
    front = [{"sae_id": name, "prefix": math.nan, "l0": l0, "ce_recovered": recovered}
             for name, (l0, recovered) in figures_of.items()]  # fmt: skip
    assert aliases_of(front, "b") == {"best": "b", "l0-50": "b", "l0-50-2": "a", "l0-50-3": "c", "l0-0": "d"}


# ---- reading it back ----


def test_a_registered_sae_loads_by_alias_version_and_latest(home, tmp_path):
    trained = write_sae(tmp_path / "trained", EARLY)
    number = versions(home, EARLY_MODEL)["early-8"]
    client(home).set_registered_model_alias(EARLY_MODEL, "für_das-Papier", number)
    try:
        for uri in ("@best", "@für_das-Papier", f"/{number}", "/latest"):
            sae = penstock.load_sae(f"models:/{EARLY_MODEL}{uri}", home=home)
            assert torch.equal(sae.W_dec, trained.W_dec)
    finally:
        client(home).delete_registered_model_alias(EARLY_MODEL, "für_das-Papier")


def test_a_registered_sae_is_pulled_with_its_provenance(home, tmp_path, capsys):
    folder = penstock.pull(f"models:/{EARLY_MODEL}@best", to=tmp_path / "sae", home=home)
    assert sorted(path.name for path in folder.iterdir()) == [
        "cfg.json", "penstock.json", "sae_weights.safetensors", "sparsity.safetensors",
    ]  # fmt: skip
    provenance = json.loads((folder / "penstock.json").read_text())
    assert (provenance["model"], provenance["name"]) == (f"models:/{EARLY_MODEL}@best", EARLY_MODEL)
    assert (provenance["penstock.sae"], provenance["ce_recovered"]) == ("early-8", "0.9")
    penstock.pull("demo", hook_point=EARLY, to=folder, home=home)  # it is known as a pulled one
    pull = ["pull", f"models:/{LATE_MODEL}@l0-8", "--to", str(folder), "--home", str(home.path)]
    assert main(pull) == 0
    assert f"models:/{LATE_MODEL}@l0-8, version 1\nload it with: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/nothing@best", r"no registered model 'nothing'; there is .*demo\.blocks\.1"),
        (f"models:/{EARLY_MODEL}@l0-5", r"has no alias 'l0-5'; it has best, l0-4, l0-8$"),
        (f"models:/{EARLY_MODEL}/17", r"has no version 17; it has 1, 2$"),
        ("models:/", r"model 'models:/': accepted is models:/NAME@ALIAS, models:/NAME/VERSION"),
        ("models:nothing@best", "accepted is models:/NAME@ALIAS"),
        (f"models:/{EARLY_MODEL}", "accepted is models:/NAME@ALIAS"),
        (f"models:/{EARLY_MODEL}/Production", "accepted is models:/NAME@ALIAS"),
        ("models:/it's; drop table@best", "no registered model \"it's; drop table\""),
    ],
)
def test_an_address_of_nothing_is_one_message(home, uri, message):
    with pytest.raises(SweepError, match=message) as refused:
        penstock.load_sae(uri, home=home)
    assert "\n" not in str(refused.value)


def test_an_address_goes_with_no_choice_of_sae(home, tmp_path):
    with pytest.raises(SweepError, match="is one SAE: hook_point, sae, architecture, l0 and at go with a sweep's name"):
        penstock.pull(f"models:/{EARLY_MODEL}@best", hook_point=EARLY, to=tmp_path / "sae", home=home)


def test_a_model_that_holds_no_sae_is_refused(home, tmp_path):
    run = find_sweep(home, "demo").run_id
    client(home).create_registered_model("no-sae")
    client(home).create_model_version("no-sae", client(home).get_run(run).info.artifact_uri, run)
    with pytest.raises(CheckpointError, match=r"model no-sae version 1 lacks cfg\.json, sae_weights\.safetensors"):
        penstock.load_sae("models:/no-sae/1", home=home)


# ---- what runs say of themselves ----


def test_the_run_of_an_sae_says_how_to_fetch_it_and_why_it_is_on_the_front_or_not(home):
    best = note(home, "demo", "early-8")
    assert best.startswith(f"**On the Pareto front** of `{EARLY}`.\n`penstock pull demo --sae early-8 --to DIR` f")
    assert 'load_sae("demo", sae="early-8")' in best and f'load_sae("models:/{EARLY_MODEL}@best")' in best
    assert "| CE recovered | 0.9000 |" in best
    assert f"**Not on the front** of `{EARLY}`: `early-8` recovers more CE" in note(home, "demo", "early-9")
    assert "its L0 lies outside 2 to 16" in note(home, "demo", "early-32")
    assert note(home, "demo", "late-16") == "**Diverged**: loss was nan at step 3. There is nothing to fetch.\n"


def test_the_sweeps_run_shows_the_front_of_each_hook_point(home):
    about = note(home, "demo")
    assert about.startswith("**5 finished, 1 diverged.** On the Pareto front of their hook points with an L0 of 2 to")
    assert "| `early-8` | topk | k=8 | 8 | 0.9000 | 0.250 | `@best` |" in about and "early-9" not in about
    assert f"**`{LATE}`**: model `models:/{LATE_MODEL}`\n" in about


def test_a_view_of_the_runs_shows_the_saes_with_their_figures(home):
    address = views(home)["demo"]
    experiment = client(home).get_experiment_by_name("demo")
    assert address == f"/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey=penstock"
    view = json.loads(experiment.tags[VIEW_TAG])
    runs = client(home).search_runs([experiment.experiment_id], view["searchFilter"])
    assert {run.data.tags["sae_id"] for run in runs} >= set(sweep_table(home, "demo")["sae_id"])
    finished = next(run.data for run in runs if run.data.tags["sae_id"] == "early-8")
    for column in view["selectedColumns"]:
        kind, _, name = column.partition(".")
        assert name.strip("`") in getattr(finished, kind), column


def test_a_description_that_a_user_has_changed_stays(home, tmp_path):
    sweep = finish(home, tmp_path, "notes", {"a": (4.0, 0.8), "b": (8.0, 0.85)})
    runs = {run.data.tags["sae_id"]: run.info.run_id for run in find_sweep(home, sweep).children()}
    client(home).set_tag(runs["a"], NOTE, "the one of figure 3")
    client(home).log_metric(runs["a"], "ce_recovered", 0.81)
    client(home).log_metric(runs["b"], "ce_recovered", 0.86)
    hand_over(home, sweep)
    assert note(home, sweep, "a") == "the one of figure 3"
    assert "| CE recovered | 0.8600 |" in note(home, sweep, "b")


# ---- over HTTP ----


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Home:
    """A home whose runs are on a server that serves the artifacts; MLFLOW_TRACKING_URI is set meanwhile."""
    folder = tmp_path_factory.mktemp("server")
    with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", address)
        finish(Home(folder / "home"), folder / "saes", "served", {"a": (4.0, 0.8), "b": (8.0, 0.9)})
        yield address


def test_a_bare_client_that_knows_the_address_only_fetches_an_sae(served, tmp_path):
    code = (
        "import json, mlflow, os, sys\n"
        "client = mlflow.MlflowClient()\n"
        f"names = {[f'models:/served.{EARLY}@best', f'models:/served.{EARLY}@l0-4', f'models:/served.{EARLY}/2']!r}\n"
        "files = [sorted(os.listdir(mlflow.artifacts.download_artifacts(name, dst_path=str(at)))) for at, name in "
        "enumerate(names)]\n"
        f"source = client.get_model_version_by_alias('served.{EARLY}', 'best').source\n"
        "print(json.dumps([files, source, [name for name in sys.modules if name.startswith(('penstock', 'sae'))]]))"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MLFLOW_TRACKING_URI": served}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    files, source, ours = json.loads(done.stdout.splitlines()[-1])
    assert files == [["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"]] * 3
    assert source.startswith("mlflow-artifacts:/") and not ours


def test_a_registered_sae_loads_over_http_and_its_files_show_in_the_ui(served, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", served)
    home = Home(tmp_path / "home")
    trained = write_sae(tmp_path / "trained", EARLY)
    assert torch.equal(penstock.load_sae(f"models:/served.{EARLY}@best", home=home).W_dec, trained.W_dec)
    path = f"{served}/model-versions/get-artifact?name=served.{EARLY}&version=1&path=cfg.json"
    with urllib.request.urlopen(path) as answer:
        assert json.load(answer)["architecture"] == "topk"
    with pytest.raises(SweepError, match=r"has no alias 'worst'; it has best, l0-4, l0-8$"):
        penstock.load_sae(f"models:/served.{EARLY}@worst", home=home)


@pytest.mark.compat
@pytest.mark.filterwarnings("ignore")
def test_what_mlflow_downloads_loads_in_sae_lens(served, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(served)
    try:
        folder = mlflow.artifacts.download_artifacts(f"models:/served.{EARLY}@best", dst_path=str(tmp_path))
    finally:
        mlflow.set_tracking_uri(before)
    theirs, x = sae_lens.SAE.load_from_disk(folder), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(theirs(x), write_sae(tmp_path / "trained", EARLY)(x))
