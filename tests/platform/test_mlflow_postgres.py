"""Eight sweeps at once into one MLflow: an SQLite database, and a real server on a real PostgreSQL."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from mlflow import MlflowClient

import penstock
from mlflow_servers import mlflow_server
from one_tracked_sweep import EARLY, LATE, N_ROWS, SAES, figures
from penstock.home import Home
from penstock.tracking import Tracker, find_sweep, list_sweeps, sweep_table
from tracked_sweep import write_sae

N_SWEEPS = 8
_START_SECONDS, _SWEEP_SECONDS = 120, 400
# What MLflow's server holds open by default is too little for eight drivers, and what it cannot serve it may lose.
POOL = {"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "40", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "60"}


def programs() -> Path | None:
    """The folder with `initdb` and `postgres`: on PATH, or where Debian keeps them."""
    found = shutil.which("initdb")
    there = [Path(found).resolve()] if found else [Path(path) for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")]
    folders = sorted((path.parent for path in there), key=lambda folder: folder.parent.name)
    return folders[-1] if folders and (folders[-1] / "postgres").exists() else None


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL of its own that listens on a socket in `folder` only; its address for SQLAlchemy. It refuses to run
    as root, which hands it to an unprivileged user."""
    bin_folder = programs()
    assert bin_folder is not None
    user = next(name for name in ("postgres", "nobody", "daemon") if _is_user(name)) if os.geteuid() == 0 else None
    data, socket_folder = folder / "data", folder / "s"
    for made in (data, socket_folder):
        made.mkdir(parents=True)
        if user is not None:
            shutil.chown(made, user)
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(data)}
    as_user = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user is not None else {}
    common = {"env": environment, "cwd": data, **as_user}
    create = [bin_folder / "initdb", "-D", data, "-U", "mlflow", "-A", "trust", "--no-sync", "-E", "UTF8"]
    subprocess.run(create, check=True, stdout=subprocess.DEVNULL, **common)
    settings = {"listen_addresses": "", "unix_socket_directories": socket_folder, "max_connections": 150}
    start = [bin_folder / "postgres", "-D", data, "-F", *(f"--{name}={value}" for name, value in settings.items())]
    with (folder / "postgres.log").open("wb") as log:
        server = subprocess.Popen(start, stdout=log, stderr=log, **common)
        try:
            address = f"postgresql+psycopg2://mlflow@/postgres?host={socket_folder}"
            _wait_for(server, address, folder / "postgres.log")
            yield address
        finally:
            server.send_signal(signal.SIGINT)  # ends open connections and leaves nothing behind
            server.wait(_START_SECONDS)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _wait_for(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        assert server.poll() is None, log.read_text()
        try:
            return engine.connect().close()
        except sqlalchemy.exc.OperationalError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


@pytest.fixture
def short_folder(tmp_path_factory) -> Iterator[Path]:
    """A folder that other users can reach and whose path leaves room for a socket's name (107 characters)."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def run_sweeps(home: Home, folder: Path, **environment: str) -> list[str]:
    """Track `N_SWEEPS` sweeps at once, a process each. Returns their names."""
    names = [f"sweep-{number}" for number in range(N_SWEEPS)]
    checkpoint = folder / "checkpoint"
    write_sae(checkpoint, EARLY)
    script = str(Path(__file__).with_name("one_tracked_sweep.py"))
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    drivers = [
        subprocess.Popen(
            [sys.executable, script, str(home.path), str(checkpoint), name], env=inherited | environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for name in names
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


def test_eight_sweeps_at_once_into_one_sqlite_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path / "home")
    Tracker(home, "sweep-0", "id-of-sweep-0").open("name: small\n", {}, [])  # makes the database
    check_everything_is_there(home, run_sweeps(home, tmp_path))


@pytest.mark.skipif(programs() is None, reason="PostgreSQL's initdb is not installed")
def test_eight_sweeps_at_once_into_a_server_on_postgresql(tmp_path, short_folder, monkeypatch):
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed")
    home = Home(tmp_path / "home")
    with postgres(short_folder) as database, mlflow_server(tmp_path, database, **POOL) as address:
        names = run_sweeps(home, tmp_path, MLFLOW_TRACKING_URI=address)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        check_everything_is_there(home, names)
