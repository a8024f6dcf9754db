"""Eight sweeps at once into one MLflow, a process each, and whether everything they have written is there."""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from mlflow import MlflowClient

import penstock
from one_tracked_sweep import EARLY, LATE, N_ROWS, SAES, figures
from penstock.home import Home
from penstock.tracking import find_sweep, list_sweeps, sweep_table
from tracked_sweep import write_sae

N_SWEEPS = 8
_SWEEP_SECONDS = 400


def run_sweeps(home: Home, folder: Path, *environments: Mapping[str, str]) -> list[str]:
    """Track `N_SWEEPS` sweeps at once, a process each. Returns their names. The processes have these variables on
    top of their own, in turn."""
    names = [f"sweep-{number}" for number in range(N_SWEEPS)]
    checkpoint = folder / "checkpoint"
    write_sae(checkpoint, EARLY)
    script = str(Path(__file__).with_name("one_tracked_sweep.py"))
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    of_each = itertools.cycle([inherited | dict(environment) for environment in environments or [{}]])
    drivers = [
        subprocess.Popen(
            [sys.executable, script, str(home.path), str(checkpoint), name], env=environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for name, environment in zip(names, of_each, strict=False)
    ]  # fmt: skip
    try:
        complaints = [driver.communicate(timeout=_SWEEP_SECONDS)[1] for driver in drivers]
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait()
    assert [driver.returncode for driver in drivers] == [0] * N_SWEEPS, "\n".join(complaints)
    return names


def check_everything_is_there(home: Home, names: list[str]) -> None:
    """Every row, figure, artifact and alias, none twice."""
    client = MlflowClient(tracking_uri=home.tracking_uri, registry_uri=home.tracking_uri)
    assert sorted(list_sweeps(home)["name"]) == names
    assert set(list_sweeps(home)["status"]) == {"finished"}
    for name in names:
        runs = find_sweep(home, name)
        children = {run.data.tags["sae_id"]: run for run in runs.children()}
        assert list(children) == list(SAES) and len(runs.children()) == len(SAES)
        for sae, (_, l0, recovered) in SAES.items():
            run = children[sae]
            for key in ("loss", "l0", "explained_variance", "dead_fraction"):
                history = client.get_metric_history(run.info.run_id, f"train/{key}")
                points = sorted((metric.step, metric.value) for metric in history)
                assert points == [(512 * at, at + 0.5) for at in range(1, N_ROWS + 1)]
            assert {key: run.data.metrics[key] for key in figures(l0, recovered)} == figures(l0, recovered)
            files = {item.path for item in client.list_artifacts(run.info.run_id, "sae")}
            assert files == {"sae/cfg.json", "sae/sae_weights.safetensors", "sae/sparsity.safetensors"}
            assert "penstock pull" in run.data.tags["mlflow.note.content"]
        assert sweep_table(home, runs)["on_front"].tolist() == [True] * len(SAES)
    models = {model.name: model for model in client.search_registered_models()}
    assert sorted(models) == sorted(f"{name}.{site}" for name in names for site in (EARLY, LATE))
    for name in names:
        assert set(models[f"{name}.{EARLY}"].aliases) == {"best", "l0-4", "l0-8"}
        assert set(models[f"{name}.{LATE}"].aliases) == {"best", "l0-8"}
        assert len(client.search_model_versions(f"name = '{name}.{EARLY}'")) == 2
    sae = penstock.load_sae(f"models:/{names[-1]}.{EARLY}@best", home=home)
    assert sae.cfg.d_sae == 6
