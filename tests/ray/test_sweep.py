"""The whole job on a running cluster, as a user submits it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import penstock as platform_api
import sae_core
from penstock.home import Home
from penstock.tracking import find_sweep
from ray_head import ROOT, assert_same, cost, penstock, wait_for

pytestmark = pytest.mark.ray

HOOKS = ["blocks.1.hook_resid_post", "blocks.4.hook_resid_post"]


def table(home, sweep="small"):
    return json.loads(penstock("front", sweep, "--json", home=home).stdout)


def test_the_submitted_sweep_shows_its_progress_and_its_front(submitted):
    _, _, printed = submitted
    for part in ("the plan", "at its first step", "evaluating", "on the Pareto front", "penstock pull small"):
        assert part in printed


def test_every_sae_is_listed_with_its_figures_and_the_diverged_one_is_marked(submitted):
    rows = table(submitted[0])
    assert len(rows) == 2 * 5
    by_status = {status: [row for row in rows if row["status"] == status] for status in ("finished", "diverged")}
    assert len(by_status["finished"]) == 8 and len(by_status["diverged"]) == 2
    for row in by_status["finished"]:
        assert row["ce_recovered"] > 0.3 and 0 < row["explained_variance"] < 1 and 0 <= row["dead_fraction"] < 1
        assert row["d_sae"] == 256 and row["run_id"]
    for row in by_status["diverged"]:
        assert row["l0"] is None and not row["on_front"]
    for hook_point in HOOKS:
        topk = {row["l0"]: row for row in rows if row["hook_point"] == hook_point and row["architecture"] == "topk"}
        assert max(topk) <= 16.0 and max(topk) > 15.5 > 4.0 >= min(topk)
        assert any(row["on_front"] for row in topk.values())


def test_mlflow_has_the_sweep_its_saes_curves_checkpoints_and_cost(submitted):
    import mlflow

    home = Home.resolve(str(submitted[0]))
    client = mlflow.MlflowClient(home.tracking_uri)
    experiment = client.get_experiment_by_name("small")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(parents) == 1
    artifacts = {entry.path for entry in client.list_artifacts(parents[0].info.run_id)}
    assert {"spec.yaml", "front.json", "pareto.png", "report.html", "details.json"} <= artifacts
    cost = {name.removeprefix("cost/") for name in parents[0].data.metrics}
    assert {"seconds_train", "seconds_evaluate", "forward_passes", "sae_tokens_per_second"} <= cost
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 2 * 6  # five SAEs and a frozen decoder a hook point
    child = next(run for run in children if run.data.params.get("k") == "16" and "baseline" not in run.data.tags)
    assert child.data.tags["hook_point"] in HOOKS and child.data.tags["on_front"] in ("true", "false")
    curve = client.get_metric_history(child.info.run_id, "train/loss")
    assert [point.step for point in curve] == sorted({point.step for point in curve})
    assert curve[-1].step == 62 * 256 and curve[-1].value < curve[0].value
    assert {entry.path for entry in client.list_artifacts(child.info.run_id, "sae")} >= {
        "sae/cfg.json", "sae/sae_weights.safetensors",
    }  # fmt: skip


def test_the_best_sae_is_pulled_and_encodes(submitted, tmp_path):
    home = submitted[0]
    done = penstock("pull", "small", "--hook-point", HOOKS[1], "--architecture", "topk", "--to", tmp_path / "best",
                    home=home)  # fmt: skip
    assert done.returncode == 0, done.stderr
    pulled = sae_core.SAE.load(tmp_path / "best")
    loaded = platform_api.load_sae("small", hook_point=HOOKS[1], architecture="topk", home=home)
    for name, tensor in pulled.state_dict().items():
        assert (tensor == loaded.state_dict()[name]).all(), name
    assert pulled.cfg.metadata["hook_name"] == HOOKS[1]
    frame = platform_api.front("small", home=home)
    assert set(frame["hook_point"]) == set(HOOKS)


def test_a_sweep_is_evaluated_again_on_the_cluster_by_another_protocol(submitted, head):
    home, _, _ = submitted
    command = ["evaluate", "small", "--tokens", "3k", "--ablation", "mean", "--address", head.address, "--json"]
    done = penstock(*command, home=home)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["protocol"]["report_tokens"], found["protocol"]["ablation"]) == (3000, "mean")
    assert len(found["saes"]) == 8 and {one["hook_point"] for one in found["saes"]} == set(HOOKS)
    for one in found["saes"]:
        assert one["n_tokens"] >= 3000 and one["l0_low"] <= one["l0"] <= one["l0_high"]
    again = penstock(*command, home=home)
    assert again.returncode == 0 and again.stdout == done.stdout and "there already" in again.stderr
    assert "joining the Ray cluster" in done.stderr and "joining" not in again.stderr
    runs = find_sweep(Home.resolve(str(home)), "small")
    assert len(list(runs.artifact("evaluations").iterdir())) == 2


def test_the_same_spec_again_does_nothing_and_one_more_k_trains_one_sae(submitted, head):
    home, spec, _ = submitted
    before = {path: path.stat().st_mtime_ns for path in home.glob("saes/*/final/*")}
    again = penstock("run", spec, "--address", head.address, home=home)
    assert again.returncode == 0, again.stderr
    assert "is done already" in again.stdout and "first step" not in again.stdout
    more = spec.with_name("more.yaml")
    text = spec.read_text().replace("k: [4, 16]", "k: [4, 16, 8]")
    more.write_text(text.replace("cpus_per_pack: 0.75", "cpus_per_pack: 1.5"))  # room for one pack: two waves
    done = penstock("run", more, "--address", head.address, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "in 2 waves" in done.stdout
    after = {path: path.stat().st_mtime_ns for path in home.glob("saes/*/final/*")}
    assert before.items() <= after.items()  # nothing that was there is made again
    assert cost(home)["forward_passes"] == 0  # the blocks lie in the spool
    new = {path.parent.parent.name for path in after.keys() - before.keys()}
    assert len(new) == len(HOOKS)
    rows = table(home)
    assert len(rows) == 2 * 6
    assert {row["sae_id"] for row in rows if row["sae_id"] in new} == new


def test_killed_workers_hosts_and_drivers_leave_the_same_weights(submitted, head, write_spec, tmp_path):
    """A second driver is sent away; a Train worker, a model host and the driver are killed; then the same again."""
    home, _, _ = submitted
    broken = tmp_path / "home"
    # How often a run is saved and how many hosts there are changes nothing of its identity.
    hosts = ("model_hosts: 1, cpus_per_host: 0.5", "model_hosts: 2, cpus_per_host: 0.25")
    spec = write_spec(checkpoints="6", replace=[hosts])
    command = [sys.executable, "-m", "penstock.cli", "run", str(spec), "--address", head.address, "--home", str(broken)]
    log = tmp_path / "log"
    with log.open("w") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path, env={**os.environ})
        try:
            wait_for(lambda: "starting" in log.read_text() and "sweep id" in log.read_text(), driver, log)
            second = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
            wait_for(lambda: "first step" in log.read_text() and head.processes("ray::RayTrainWorker"), driver, log)
            workers = head.processes("ray::RayTrainWorker")
            for worker in workers:  # on a busy machine the sweep would be over before the second driver asks for it
                worker.suspend()
            _, complaint = second.communicate(timeout=50)
            workers[0].kill()
            host = head.processes("ray::HostActor")[0]
            host.kill()
            for worker in workers[1:]:
                worker.resume()
            wait_for(lambda: len(list(broken.glob("saes/*/checkpoints/*/manifest.json"))) > 2, driver, log)
        finally:
            driver.kill()
            driver.wait()
    assert second.returncode == 2 and "is running on this cluster already" in complaint, complaint
    wait_for(lambda: not head.processes("ray::HostActor"), None, log)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False)
    assert done.returncode == 0, log.read_text() + done.stdout + done.stderr
    assert assert_same(broken, home) == 2 * 5
    history = json.loads(next(broken.glob("saes/*/final/summary.json")).read_text())["history"]
    tokens = [row["tokens"] for row in history]
    assert tokens == sorted(set(tokens))


def test_ray_job_submit_streams_the_log_and_tells_the_truth(submitted, head, tmp_path):
    """`ray job submit -- python jobs/sweep.py`, on a sweep that is done and on a spec that is wrong."""
    home, spec, _ = submitted
    (tmp_path / "wrong.yaml").write_text(spec.read_text().replace("blocks.4.", "blocks.9."))
    environment = json.dumps({"env_vars": {"PENSTOCK_HOME": str(home)}})

    def submit(path):
        return subprocess.run(
            [Path(sys.executable).parent / "ray", "job", "submit", "--address", head.jobs, "--working-dir", str(ROOT),
             "--runtime-env-json", environment, "--", "python", "jobs/sweep.py", str(path)],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    right = submit(spec)
    assert right.returncode == 0, right.stdout + right.stderr
    assert "is done already" in right.stdout
    wrong = submit(tmp_path / "wrong.yaml")
    assert wrong.returncode != 0
    assert "blocks.9.hook_resid_post" in wrong.stdout and "blocks.5.hook_resid_post" in wrong.stdout
    assert "penstock/sweep.py" not in wrong.stdout  # a message, no traceback


def test_a_sweep_that_does_not_fit_says_so_at_once(head, write_spec, tmp_path):
    spec = write_spec(replace=[("cpus_per_pack: 0.75", "cpus_per_pack: 64")])
    done = penstock("run", spec, "--address", head.address, home=tmp_path / "home")
    assert done.returncode == 2
    assert "resources.cpus_per_pack: 64 for a pack" in done.stderr and "Traceback" not in done.stderr


def test_no_cluster_at_the_address_is_one_clear_error(write_spec, tmp_path):
    done = penstock("submit", write_spec(), "--address", "http://127.0.0.1:9", home=tmp_path / "home")
    assert done.returncode == 2
    assert "no Ray dashboard answers" in done.stderr and "Traceback" not in done.stderr
