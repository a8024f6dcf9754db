import json
import math
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace

import pandas as pd
import pytest
from mlflow import MlflowClient

from penstock.errors import SweepError
from penstock.home import Home
from penstock.tracking import (
    LOGGED_TOKENS,
    TrackedSAE,
    Tracker,
    baseline_table,
    find_sweep,
    list_sweeps,
    sweep_table,
)
from tracked_sweep import (
    EARLY,
    FROZEN,
    LATE,
    SAES,
    SPEC,
    evaluation_rows,
    figures,
    make_sweep,
    tracked,
    write_sae,
)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("tracking") / "home")


def client(home: Home) -> MlflowClient:
    return MlflowClient(tracking_uri=home.tracking_uri)


def child(home: Home, name: str, sae_id: str):
    return next(run for run in find_sweep(home, name).children() if run.data.tags["sae_id"] == sae_id)


def curve(home: Home, name: str, sae_id: str, key: str = "train/loss") -> list[tuple[int, float]]:
    history = client(home).get_metric_history(child(home, name, sae_id).info.run_id, key)
    return sorted((metric.step, metric.value) for metric in history)


def opened(home: Home, name: str, *sae_ids: str, sweep_id: str = "") -> Tracker:
    tracker = Tracker(home, name, sweep_id or f"id-of-{name}")
    tracker.open(SPEC, {}, [tracked(sae_id) for sae_id in sae_ids])
    return tracker


def rows(*tokens: int) -> list[dict]:
    return [{"tokens": at, "metrics": {"loss": float(at)}} for at in tokens]


# ---- what MLflow shows ----


def test_a_sweep_is_an_experiment_a_parent_run_and_a_run_an_sae(finished_home):
    runs = find_sweep(finished_home, "demo")
    parent = client(finished_home).get_run(runs.run_id)
    assert client(finished_home).get_experiment(runs.experiment_id).name == "demo"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"train_tokens": "1000"}
    assert parent.data.metrics == {"cost/seconds_total": 12.5, "cost/sae_tokens_per_second": 4096.0}
    assert {run.data.tags["sae_id"] for run in runs.children()} == {*SAES, "frozen"}
    assert all(run.data.tags["mlflow.parentRunId"] == runs.run_id for run in runs.children())


def test_the_parent_holds_the_spec_the_tables_and_the_plot(finished_home):
    runs = find_sweep(finished_home, "demo")
    assert runs.spec == SPEC
    assert runs.artifact("pareto.png").read_bytes() == b"a picture"
    assert runs.artifact("absent.txt") is None
    shown = json.loads(client(finished_home).get_run(runs.run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "front.json", "type": "table"}, {"path": "baselines.json", "type": "table"}]
    front = pd.read_json(runs.artifact("front.json"), orient="split")
    assert list(front["sae_id"]) == list(SAES)


def test_a_child_has_its_parameters_tags_figures_and_checkpoint(finished_home):
    run = child(finished_home, "demo", "early-8")
    assert run.info.status == "FINISHED"
    assert run.data.params == {
        "hook_point": EARLY, "architecture": "topk", "d_sae": "6", "k": "8", "lr": "0.0004", "seed": "0",
        "sparsity_value": "8", "sparsity_by": "k",
    }  # fmt: skip
    tags = {key: run.data.tags[key] for key in ("hook_point", "architecture", "status", "on_front", "sae_id")}
    assert tags == {"hook_point": EARLY, "architecture": "topk", "status": "finished", "on_front": "true",
                    "sae_id": "early-8"}  # fmt: skip
    assert run.data.metrics == {"train/loss": 1.0, **figures(8.0, 0.9)}
    files = {item.path for item in client(finished_home).list_artifacts(run.info.run_id, "sae")}
    assert files == {"sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors"}
    assert child(finished_home, "demo", "early-9").data.tags["on_front"] == "false"


def test_a_diverged_sae_ends_as_failed_and_says_why(finished_home):
    run = child(finished_home, "demo", "late-16")
    assert run.info.status == "FAILED"
    assert run.data.tags["status"] == "diverged" and run.data.tags["reason"] == "loss was nan at step 3"


def test_a_trained_baseline_is_a_run_with_a_tag(finished_home):
    assert child(finished_home, "demo", "frozen").data.tags["baseline"] == "frozen_decoder"


# ---- the tables ----


def test_the_table_has_one_row_an_sae_with_typed_settings_and_the_front_in_the_specs_band(finished_home):
    table = sweep_table(finished_home, "demo").set_index("sae_id")
    assert list(table.index) == list(SAES)
    assert list(table.reset_index().columns) == [
        "sae_id", "hook_point", "architecture", "d_sae", "prefix", "k", "lr", "seed", "l0", "ce_recovered",
        "kl_recovered", "explained_variance", "dead_fraction", "ce_increase", "mse", "seed_stability", "on_front",
        "on_overall_front", "dominated_by", "certain", "missed", "remedy", "status", "reason", "proposed", "run_id",
    ]  # fmt: skip
    assert table.loc["early-8", "k"] == 8 and table.loc["early-8", "lr"] == 4e-4
    assert math.isnan(table.loc["late-16", "l0"])
    # early-9 is beaten, early-32 is outside the band 2:16 and late-16 diverged
    assert set(table.index[table["on_front"]]) == {"early-4", "early-8", "late-8"}
    assert set(table.index[table["on_overall_front"]]) == {"early-4", "early-8"}


def test_baselines_are_in_the_table_only_when_asked_for(finished_home):
    table = sweep_table(finished_home, "demo", with_baselines=True).set_index("sae_id")
    assert table.loc["frozen", "baseline"] == "frozen_decoder" and not table.loc["frozen", "on_front"]


def test_the_baseline_table_joins_what_was_computed_and_what_was_trained(finished_home):
    table = baseline_table(finished_home, "demo").set_index("kind")
    assert table.loc["pca", "ce_recovered"] == 0.5
    assert table.loc["frozen_decoder", ["hook_point", "k", "l0", "ce_recovered"]].tolist() == [EARLY, 8, 8.0, 0.4]


def test_a_sweep_that_has_just_begun_has_a_table_and_no_baselines(home):
    opened(home, "begun", "early-4", "late-8")
    table = sweep_table(home, "begun")
    assert list(table["status"]) == ["queued", "queued"]
    assert table["l0"].isna().all() and not table["on_front"].any()
    assert baseline_table(home, "begun").empty


def test_a_sweep_is_found_by_name_and_by_id_and_otherwise_the_nearest_are_listed(finished_home, home):
    assert find_sweep(finished_home, "demo") == find_sweep(finished_home, "0123456789ab")
    assert find_sweep(finished_home, "demo").l0_band == (2.0, 16.0)
    opened(home, "gpt2-front", "early-4")
    opened(home, "llama", "early-4")
    with pytest.raises(SweepError, match=r"no sweep 'gpt2-frnt' in .*; there is gpt2-front, "):
        find_sweep(home, "gpt2-frnt")


def test_a_name_means_the_run_opened_last(home):
    opened(home, "twice", "early-4", sweep_id="one")
    opened(home, "twice", "early-4", "early-8", sweep_id="two")
    assert find_sweep(home, "twice").sweep_id == "two"
    opened(home, "twice", "early-4", sweep_id="one")
    assert find_sweep(home, "twice").sweep_id == "one"
    assert find_sweep(home, "two").saes == 2


def test_sweeps_are_listed_and_an_unused_home_is_left_untouched(finished_home, tmp_path):
    sweeps = list_sweeps(finished_home)
    assert list(sweeps.columns) == ["name", "sweep_id", "status", "saes", "started", "run_id"]
    assert sweeps.iloc[0][["name", "status", "saes"]].tolist() == ["demo", "finished", 6]
    unused = Home(tmp_path / "unused")
    assert list_sweeps(unused).empty
    with pytest.raises(SweepError, match="holds no sweeps yet"):
        find_sweep(unused, "demo")
    assert not unused.path.exists()


def test_the_rows_of_the_evaluation_and_the_details_are_read_back(home, tmp_path):
    tracker = opened(home, "details", "early-4")
    assert find_sweep(home, "details").evaluation_rows() is None and find_sweep(home, "details").details() == {}
    rows_frame = evaluation_rows("early-4", EARLY)
    rows_frame.to_parquet(tmp_path / "evaluation.parquet")
    details = {"early-4": {"curves": {"tokens": [1, 2], "loss": [2.0, 1.0]}}}
    (tmp_path / "details.json").write_text(json.dumps(details))
    tracker.finish_sae("early-4", status="finished", metrics=figures(4.0, 0.8), folder=None)
    tracker.finish_sweep(
        status="finished", front=sweep_table(home, "details"), baselines=pd.DataFrame(), cost={},
        files=[tmp_path / "evaluation.parquet", tmp_path / "details.json"],
    )  # fmt: skip
    runs = find_sweep(home, "details")
    pd.testing.assert_frame_equal(runs.evaluation_rows(), rows_frame)
    assert runs.details() == details
    assert sweep_table(home, "details")["on_front"].tolist() == [True]


def test_targets_and_stability_that_the_whole_table_gives_are_kept_with_each_sae_and_prefix(home):
    tracker = opened(home, "verdicts", "early-4", "early-8")
    of_prefix = {f"prefix_3.{name}": value for name, value in figures(3.0, 0.5).items()}
    tracker.finish_sae("early-4", status="finished", metrics=figures(4.0, 0.8) | of_prefix, folder=None)
    tracker.finish_sae("early-8", status="finished", metrics=figures(8.0, 0.9), folder=None)
    table = sweep_table(home, "verdicts")
    assert table["missed"].isna().all() and table["seed_stability"].isna().all()
    front = table.assign(missed=["l0 4 < 5", "l0 3 < 5", None], remedy=["a larger k", "", None],
                         seed_stability=[0.75, 0.5, math.nan])  # fmt: skip
    tracker.finish_sweep(status="finished", front=front, baselines=pd.DataFrame(), cost={}, files=[])
    table = sweep_table(home, "verdicts")
    assert table["prefix"].isna().tolist() == [True, False, True]
    assert table["missed"].tolist()[:2] == ["l0 4 < 5", "l0 3 < 5"] and pd.isna(table["missed"][2])
    assert table["remedy"].tolist()[:2] == ["a larger k", ""]
    assert table["seed_stability"].tolist()[:2] == [0.75, 0.5] and math.isnan(table["seed_stability"][2])


# ---- what search decides ----


def test_a_pruned_sae_is_killed_settled_and_says_why(home):
    tracker = opened(home, "prunes", "early-4", "early-8")
    tracker.finish_sae("early-4", status="pruned", metrics={}, folder=None, reason="dominated by early-8 at 2M tokens")
    opened(home, "prunes", "early-4", "early-8")
    run = child(home, "prunes", "early-4")
    assert run.info.status == "KILLED" and run.data.tags["status"] == "pruned"
    row = sweep_table(home, "prunes").set_index("sae_id").loc["early-4"]
    assert row["status"] == "pruned" and row["reason"] == "dominated by early-8 at 2M tokens"


def test_what_search_proposes_is_added_once_with_its_round(home):
    tracker = opened(home, "fills", "early-4")
    proposed = replace(tracked("early-8"), proposed=1)
    for _ in range(2):
        tracker.add([tracked("early-4"), proposed])
    tracker.log_rows("early-8", rows(10))
    again = opened(home, "fills", "early-4")  # a driver that knows of the first round only
    again.add([proposed])
    again.log_rows("early-8", rows(10, 20))
    assert [step for step, _ in curve(home, "fills", "early-8")] == [10, 20]
    assert find_sweep(home, "fills").saes == 2
    table = sweep_table(home, "fills").set_index("sae_id")
    assert math.isnan(table.loc["early-4", "proposed"]) and table.loc["early-8", "proposed"] == 1
    assert table.loc["early-8", "status"] == "running"


# ---- replays and dead drivers ----


def test_a_replay_logs_no_row_twice(home):
    tracker = opened(home, "replay", "early-4")
    tracker.log_rows("early-4", rows(10, 20))
    tracker.log_rows("early-4", rows(20, 30, 10))
    tracker.log_rows("early-4", [])
    assert curve(home, "replay", "early-4") == [(10, 10.0), (20, 20.0), (30, 30.0)]
    again = opened(home, "replay", "early-4")
    again.log_rows("early-4", rows(10, 20, 30, 40))
    assert [step for step, _ in curve(home, "replay", "early-4")] == [10, 20, 30, 40]
    assert child(home, "replay", "early-4").data.tags["status"] == "running"


def test_a_driver_that_died_between_rows_and_mark_repeats_nothing(home):
    opened(home, "torn", "early-4").log_rows("early-4", rows(10, 20))
    client(home).set_tag(child(home, "torn", "early-4").info.run_id, LOGGED_TOKENS, "10")
    opened(home, "torn", "early-4").log_rows("early-4", rows(10, 20, 30))
    assert [step for step, _ in curve(home, "torn", "early-4")] == [10, 20, 30]


def test_more_rows_than_a_batch_holds_all_arrive(home):
    tracker = opened(home, "long", "early-4")
    metrics = {"loss": 1.0, "eval/x": 2.0, "l0": 3.0}
    tracker.log_rows("early-4", [{"tokens": at, "metrics": metrics} for at in range(700)])
    assert len(curve(home, "long", "early-4")) == 700
    assert len(curve(home, "long", "early-4", "eval/x")) == 700


def test_values_that_are_not_finite_leave_a_gap_and_a_note(home):
    tracker = opened(home, "nan", "early-4")
    broken = {"tokens": 20, "metrics": {"loss": math.nan, "l0": 3.0}}
    tracker.log_rows("early-4", [*rows(10), broken, {"tokens": 30, "metrics": {"loss": math.inf}}])
    tracker.finish_sae("early-4", status="diverged", metrics={"l0": math.nan, "mse": 2.0}, folder=None)
    run = child(home, "nan", "early-4")
    assert curve(home, "nan", "early-4") == [(10, 10.0)]
    assert curve(home, "nan", "early-4", "train/l0") == [(20, 3.0)]
    assert run.data.tags["penstock.not_finite"] == "train/loss was nan at 20 tokens"
    assert run.data.tags[LOGGED_TOKENS] == "30"
    assert "l0" not in run.data.metrics and run.data.metrics["mse"] == 2.0


def test_a_new_driver_finds_the_runs_again(home, tmp_path):
    tracker = opened(home, "again", "early-4", "early-8")
    write_sae(tmp_path / "sae", EARLY)
    tracker.finish_sae("early-4", status="finished", metrics=figures(4, 0.8), folder=tmp_path / "sae")
    tracker.finish_sae("early-8", status="failed", metrics={}, folder=None, reason="its worker died")
    before = {run.info.run_id for run in find_sweep(home, "again").children()}
    opened(home, "again", "early-4", "early-8")
    runs = {run.data.tags["sae_id"]: run for run in find_sweep(home, "again").children()}
    assert {run.info.run_id for run in runs.values()} == before
    assert runs["early-4"].info.status == "FINISHED"
    assert runs["early-8"].info.status == "RUNNING" and runs["early-8"].data.tags["status"] == "queued"


def test_runs_that_a_dead_driver_left_behind_are_settled(home):
    opened(home, "settle", "early-4", "early-8")
    died_ending = child(home, "settle", "early-8")  # the status stands, the run was not ended
    client(home).set_tag(died_ending.info.run_id, "status", "finished")
    opened(home, "settle", "early-8")
    assert child(home, "settle", "early-8").info.status == "FINISHED"
    dropped = child(home, "settle", "early-4")  # not part of the sweep any more
    assert dropped.info.status == "KILLED" and dropped.data.tags["status"] == "stopped"


def test_finishing_twice_changes_nothing(home, tmp_path):
    tracker = make_sweep(home, tmp_path, "finish-twice", "finish-twice-id")
    before = sweep_table(home, "finish-twice")
    ended = child(home, "finish-twice", "early-8").info.end_time
    again = make_sweep(home, tmp_path, "finish-twice", "finish-twice-id")
    pd.testing.assert_frame_equal(sweep_table(home, "finish-twice"), before)
    assert child(home, "finish-twice", "early-8").info.end_time == ended
    front = pd.read_json(find_sweep(home, "finish-twice").artifact("front.json"), orient="split")
    assert len(front) == len(SAES)
    for driver in (tracker, again):
        driver.finish_sae("early-8", status="finished", metrics=figures(1.0, 1.0), folder=None)
    assert sweep_table(home, "finish-twice").set_index("sae_id").loc["early-8", "l0"] == 8.0


def test_one_more_sae_is_one_more_run(home):
    opened(home, "grows", "early-4")
    opened(home, "grows", "early-4", "early-8")
    assert len(find_sweep(home, "grows").children()) == 2


def test_parameters_keep_their_first_value_and_the_spec_is_the_latest(home):
    saes = [tracked("early-4")]
    Tracker(home, "params", "params").open("name: a\n", {"tokens": 1}, saes)
    Tracker(home, "params", "params").open("name: b\n", {"tokens": 2, "code": "x"}, saes)
    runs = find_sweep(home, "params")
    assert client(home).get_run(runs.run_id).data.params == {"tokens": "1", "code": "x"}
    assert runs.spec == "name: b\n"


def test_every_run_has_every_axis_of_the_sweep_so_that_plots_of_many_runs_leave_none_out(home):
    topk = [TrackedSAE(f"k{k}", EARLY, {"architecture": "topk", "d_sae": 6, "k": k}) for k in (4, 8)]
    l1 = [TrackedSAE(f"l1-{l1}", EARLY, {"architecture": "standard", "d_sae": 6, "l1_coefficient": l1, "warm": name})
          for l1, name in ((1.0, "a"), (2.5, "b"))]  # fmt: skip
    tracker = Tracker(home, "axes", "axes")
    tracker.open("name: axes\n", {}, [*topk, *l1])
    common = {"hook_point": EARLY, "d_sae": "6"}
    # A text among numbers would make names of an axis; an empty one is drawn at 0. `d_sae` is the same everywhere.
    assert child(home, "axes", "k8").data.params == common | {
        "architecture": "topk", "k": "8", "sparsity_value": "8", "sparsity_by": "k",
        "l1_coefficient": "", "warm": "n/a",
    }  # fmt: skip
    assert child(home, "axes", "l1-2.5").data.params == common | {
        "architecture": "standard", "k": "", "sparsity_value": "2.5", "sparsity_by": "l1_coefficient",
        "l1_coefficient": "2.5", "warm": "b",
    }  # fmt: skip
    table = sweep_table(home, "axes").set_index("sae_id")
    assert math.isnan(table.loc["k8", "l1_coefficient"]) and math.isnan(table.loc["l1-2.5", "k"])
    assert not {"sparsity_value", "sparsity_by"} & set(table)
    wider = TrackedSAE("wide", EARLY, {"architecture": "jumprelu", "d_sae": 12, "target_l0": 16}, proposed=2)
    second = TrackedSAE("wide-8", EARLY, {"architecture": "jumprelu", "d_sae": 12, "target_l0": 8}, proposed=2)
    tracker.add([wider, second])
    assert child(home, "axes", "k8").data.params["target_l0"] == ""
    assert child(home, "axes", "wide").data.params == {
        "hook_point": EARLY, "d_sae": "12", "architecture": "jumprelu", "target_l0": "16", "sparsity_value": "16",
        "sparsity_by": "target_l0", "k": "", "l1_coefficient": "", "warm": "n/a", "proposed": "2",
    }  # fmt: skip


def test_jumprelus_setting_of_the_penaltys_form_is_a_column_of_its_own(home):
    penalties = [TrackedSAE(form, EARLY, {"architecture": "jumprelu", "d_sae": 6, "target_l0": 4, "sparsity": form})
                 for form in ("tanh", "step")]  # fmt: skip
    Tracker(home, "forms", "forms").open("name: forms\n", {}, penalties)
    params = child(home, "forms", "step").data.params
    assert (params["sparsity"], params["sparsity_value"], params["sparsity_by"]) == ("step", "4", "target_l0")
    assert sorted(sweep_table(home, "forms")["sparsity"]) == ["step", "tanh"]


def test_more_parameters_than_a_batch_holds_all_arrive(home):
    many = {f"p{index:03d}": index for index in range(230)}
    Tracker(home, "many", "many").open("name: many\n", many, [TrackedSAE("x", LATE, {"architecture": "topk"})])
    assert len(client(home).get_run(find_sweep(home, "many").run_id).data.params) == 230


def test_an_experiment_that_was_deleted_comes_back(home):
    opened(home, "deleted", "early-4")
    client(home).delete_experiment(find_sweep(home, "deleted").experiment_id)
    opened(home, "deleted", "early-4")
    assert find_sweep(home, "deleted").status == "running"


# ---- the database ----


def test_drivers_that_start_at_once_share_one_database(tmp_path):
    home = Home(tmp_path / "home")
    code = (
        "import sys; from pathlib import Path; from penstock.home import Home; from penstock.tracking import Tracker\n"
        "Tracker(Home(Path(sys.argv[1])), sys.argv[2], sys.argv[2]).open('name: x', {}, [])"
    )
    drivers = [subprocess.Popen([sys.executable, "-c", code, str(home.path), name]) for name in ("one", "two")]
    assert [driver.wait() for driver in drivers] == [0, 0]
    assert set(list_sweeps(home)["name"]) == {"one", "two"}
    assert sorted(path.name for path in home.path.iterdir()) == ["artifacts", "mlflow.db"]


def test_readers_read_while_the_driver_writes(home):
    tracker = opened(home, "busy", "early-4")
    writer = threading.Thread(
        target=lambda: [tracker.log_rows("early-4", rows(*range(at, at + 20))) for at in range(0, 400, 20)]
    )
    writer.start()
    while writer.is_alive():
        assert len(sweep_table(home, "busy")) == 1
    writer.join()
    assert len(curve(home, "busy", "early-4")) == 400


def test_the_database_is_what_mlflow_makes_itself(home, tmp_path):
    def schema(path) -> dict:
        connection = sqlite3.connect(path)
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        columns = {name: connection.execute(f"pragma table_info('{name}')").fetchall() for name in tables}
        version = connection.execute("select * from alembic_version").fetchall()
        connection.close()
        return {**columns, "version": version}

    opened(home, "schema", "early-4")
    MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/plain.db").search_experiments()
    assert schema(home.path / "mlflow.db") == schema(tmp_path / "plain.db")


def test_a_home_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="cannot be written to"):
        opened(Home(tmp_path / "file" / "home"), "x", "early-4")


def test_mlflows_refusal_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    with pytest.raises(SweepError, match=r"MLflow at file:.* cannot be used"):
        opened(Home(tmp_path), "x", "early-4")


def test_the_title_tells_saes_apart():
    assert tracked("early-8").title == f"topk k=8 · {EARLY} · d_sae=6 seed=0"
    assert FROZEN.title == f"frozen_decoder k=8 · {EARLY} · d_sae=6"
    controlled = TrackedSAE("x", EARLY, {"architecture": "jumprelu", "target_l0": 32.0, "l0_coefficient": None})
    assert controlled.title == f"jumprelu target_l0=32 · {EARLY}"
