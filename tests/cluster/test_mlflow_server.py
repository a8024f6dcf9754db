"""The team's MLflow server: `serve.sh` for real, on a PostgreSQL and an S3 of the test's own, and the files that run it
elsewhere."""

import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

sys.path.append(str(Path(__file__).resolve().parents[1] / "platform"))
from eight_sweeps import check_everything_is_there, run_sweeps
from mlflow_servers import free_port, postgres, postgres_programs, served
from one_tracked_sweep import EARLY
from penstock import cli
from penstock.errors import SweepError
from penstock.home import Home
from penstock.registry import fetch_version, find_version
from penstock.tracking import Tracker, fetch_artifact, find_sweep, list_sweeps

FOLDER = Path(__file__).resolve().parents[2] / "cluster/mlflow"
BUCKET = "team"
MAX_CONNECTIONS = 300
PASSWORDS = {"alice": "alice-has-a-password", "bob": "bob-has-another-one"}
ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "the-password-of-admin"}
SECRETS = {
    "PGPASSWORD": "100% of: the/data@base",
    "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "what-signs-the-forms-of-the-server",
}
OF_USERS = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Server:
    address: str
    folder: Path
    database: str
    s3: str
    environment: dict[str, str]

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text()


def clean_environment() -> dict[str, str]:
    ours = ("MLFLOW_", "AWS_", "PG")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """serve.sh as a group would start it, with two users beside the administrator."""
    if postgres_programs() is None:
        pytest.skip("PostgreSQL's initdb is not installed")
    for needed in ("psycopg2", "moto", "flask_wtf"):
        pytest.importorskip(needed, reason=f"{needed} is not installed: pip install 'penstock[test]'")
    from s3_server import KEYS, s3_server

    folder, port = tmp_path_factory.mktemp("server"), free_port()
    files = {name: folder / name.lower() for name in SECRETS}
    for name, file in files.items():
        file.write_text(SECRETS[name] + "\n")
    with (
        postgres(SECRETS["PGPASSWORD"], max_connections=MAX_CONNECTIONS) as database,
        s3_server(BUCKET) as s3,
    ):
        environment = clean_environment() | {f"{name}_FILE": str(file) for name, file in files.items()} | KEYS | {
            "PYTHON": sys.executable,
            "HOME": str(folder / "nowhere"),  # the pod's and the container's cannot be written to
            "TMPDIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "MLFLOW_BACKEND_STORE_URI": database.replace("postgresql+psycopg2://", "postgresql://"),
            "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
            "MLFLOW_S3_ENDPOINT_URL": s3,
            "MLFLOW_PORT": str(port),
        }  # fmt: skip
        with served([str(FOLDER / "serve.sh")], port, environment, folder / "server.log") as address:
            running = Server(address, folder, database, s3, environment)
            for user in PASSWORDS:
                assert add_user(running, user, password=PASSWORDS[user]).returncode == 0
            yield running


def add_user(server: Server, *arguments: str, password: str = "", **who: str) -> "subprocess.CompletedProcess[str]":
    environment = clean_environment() | {"MLFLOW_TRACKING_URI": server.address} | ADMIN | who
    command = [sys.executable, str(FOLDER / "add_user.py"), *arguments]
    return subprocess.run(command, env=environment, input=password, capture_output=True, text=True, timeout=60)


def credentials(user: str) -> dict[str, str]:
    return {"MLFLOW_TRACKING_USERNAME": user, "MLFLOW_TRACKING_PASSWORD": PASSWORDS[user]}


@pytest.fixture
def as_user(server, monkeypatch):
    """Makes this process one of the server's users."""

    def become(user: str | None, password: str | None = None) -> None:
        for name in OF_USERS:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        if user is not None:
            monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", user)
            monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password or PASSWORDS[user])

    return become


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Home:
    return Home(tmp_path_factory.mktemp("home") / "home")


@pytest.fixture(scope="module")
def sweeps(server, home, tmp_path_factory) -> list[str]:
    """Eight at once: those of even number are alice's, the others bob's."""
    folder = tmp_path_factory.mktemp("sweeps")
    users = [{"MLFLOW_TRACKING_URI": server.address} | credentials(user) for user in ("alice", "bob")]
    return run_sweeps(home, folder, *users)


# ---- what a group works with ----------------------------------------------------------------------------------------


def test_eight_sweeps_of_two_users_at_once_lose_nothing(server, home, sweeps, as_user):
    from s3_server import keys

    as_user("alice")
    check_everything_is_there(home, sweeps)
    kept = [key for key in keys(server.s3, BUCKET) if key.endswith("artifacts/sae/sae_weights.safetensors")]
    assert len(kept) == 8 * 3 and all(key.startswith("mlflow/") for key in kept)
    assert "QueuePool" not in server.log and "Traceback" not in server.log


def test_a_user_reads_what_is_anothers_and_may_not_write_it(server, home, sweeps, as_user, tmp_path):
    as_user("bob")
    others = find_sweep(home, "sweep-0")  # alice's
    version = find_version(home, f"models:/sweep-0.{EARLY}@best")
    assert (fetch_version(home, version, tmp_path) / "sae_weights.safetensors").is_file()
    with pytest.raises(SweepError, match=r"user 'bob' may not do this to the sweep 'sweep-0'.*another name.*EDIT"):
        Tracker(home, "sweep-0", "a-sweep-of-bob").open("name: sweep-0\n", {}, [])
    with pytest.raises(SweepError, match="user 'bob' may not"):
        Tracker(home, "sweep-0", "id-of-sweep-0").open("name: sweep-0\n", {}, [])

    client = MlflowClient(server.address, server.address)
    mine = find_sweep(home, "sweep-1")
    logged = client.create_logged_model(mine.experiment_id, name="mine")
    for forbidden in (
        lambda: client.log_metric(others.run_id, "l0", 1.0),
        lambda: client.set_tag(others.run_id, "status", "mine"),
        lambda: client.delete_run(others.run_id),
        lambda: client.delete_experiment(others.experiment_id),
        lambda: client.log_text(others.run_id, "mine", "spec.yaml"),
        lambda: client.create_logged_model(others.experiment_id, name="theirs"),
        lambda: client.set_registered_model_alias(version.name, "best", version.version),
        lambda: client.set_model_version_tag(version.name, version.version, "penstock.sae", "mine"),
        lambda: client.delete_registered_model(version.name),
    ):
        with pytest.raises((MlflowException, OSError), match="403"):
            forbidden()
    as_user("alice")
    assert client.get_logged_model(logged.model_id).name == "mine"
    with pytest.raises(MlflowException, match="403"):
        client.set_logged_model_tags(logged.model_id, {"whose": "alice"})

    # The owner lets him.
    granted = add_user(server, "bob", "--may", "EDIT", "--experiment", "sweep-0", **credentials("alice"))
    assert granted.returncode == 0, granted.stderr
    as_user("bob")
    Tracker(home, "sweep-0", "a-sweep-of-bob").open("name: sweep-0\n", {}, [])
    assert find_sweep(home, "sweep-0").sweep_id == "a-sweep-of-bob"


def test_commands_and_reports_go_through_the_server(server, home, sweeps, as_user, tmp_path, capsys):
    from s3_server import keys

    as_user("alice")
    where = ["--home", str(home.path)]
    assert cli.main(["report", "sweep-2", "--to", str(tmp_path / "report.html"), *where]) == 0
    runs = find_sweep(home, "sweep-2")
    MlflowClient(server.address).log_artifact(runs.run_id, str(tmp_path / "report.html"))
    assert any(key.endswith(f"{runs.run_id}/artifacts/report.html") for key in keys(server.s3, BUCKET))

    as_user("bob")
    fetched = fetch_artifact(home, runs.run_id, "report.html", tmp_path / "fetched")
    assert fetched is not None and fetched.read_bytes() == (tmp_path / "report.html").read_bytes()
    capsys.readouterr()
    for command, shown in (
        (["list"], "sweep-2"),
        (["front", "sweep-2"], "0.9"),
        (["pull", "sweep-2", "--hook-point", EARLY, "--to", str(tmp_path / "pulled")], "L0"),
        (["ui"], server.address),
    ):
        assert cli.main([*command, *where]) == 0
        assert shown in capsys.readouterr().out
    assert (tmp_path / "pulled" / "sae_weights.safetensors").is_file()
    assert "mlflow-artifacts/presigned" not in server.log  # nobody but the server has to reach the S3


# ---- what it refuses ------------------------------------------------------------------------------------------------


def test_no_password_or_a_wrong_one_is_refused_by_what_to_set(server, home, as_user, capsys):
    wanted = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    as_user(None)
    for read in (home.check_tracking, lambda: list_sweeps(home), lambda: Tracker(home, "x", "y").open("", {}, [])):
        with pytest.raises(SweepError, match=wanted):
            read()
    assert cli.main(["list", "--home", str(home.path)]) == 2
    assert wanted in capsys.readouterr().err
    for user, password in (("alice", "not-the-password-of-hers"), ("eve", "whatever-eve-has")):
        as_user(user, password)
        with pytest.raises(SweepError, match=f"refuses the user '{user}'.*MLFLOW_TRACKING_PASSWORD is wrong") as error:
            home.check_tracking()
        assert password not in str(error.value)


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ({"Host": "evil.example"}, "/", 403),
        ({"Host": "evil.example"}, "/api/2.0/mlflow/experiments/search", 403),
        ({"Host": "evil.example"}, "/health", 200),  # a probe's host is a pod's address
        ({"Origin": "https://evil.example"}, "/api/2.0/mlflow/experiments/create", 403),
        ({}, "/", 401),
        ({}, "/api/2.0/mlflow/users/create", 401),
        ({}, "/api/2.0/mlflow-artifacts/artifacts", 401),
    ],
)
def test_a_foreign_name_a_foreign_page_and_strangers_are_turned_away(server, headers, path, status):
    data = b"{}" if path.endswith("create") else None
    request = urllib.request.Request(server.address + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == status
    except urllib.error.HTTPError as error:
        with error:
            assert error.code == status


def test_no_secret_is_on_a_command_line_in_the_log_or_in_a_file(server):
    lines = [" ".join(process.cmdline()) for process in psutil.process_iter() if _is_ours(process, server)]
    assert any("uvicorn" in line for line in lines)
    files = [path.read_text(errors="replace") for path in server.folder.glob("mlflow-auth.*")]
    assert len(files) == 1
    for secret in [*SECRETS.values(), *PASSWORDS.values(), server.environment["AWS_SECRET_ACCESS_KEY"]]:
        for text in (*lines, *files, server.log):
            assert secret not in text


def _is_ours(process: psutil.Process, server: Server) -> bool:
    try:
        return process.environ().get("MLFLOW_PORT") == server.environment["MLFLOW_PORT"]
    except psutil.Error:
        return False


def test_users_are_made_by_administrators_alone(server):
    for arguments, who, complaint in (
        (["carol"], credentials("alice"), "403.*alice is no administrator"),
        (["carol"], {"MLFLOW_TRACKING_PASSWORD": "wrong"}, "401.*MLFLOW_TRACKING_PASSWORD is wrong"),
        (["carol"], {"MLFLOW_TRACKING_PASSWORD": ""}, "have to be set"),
        (["alice"], {}, "already exists.*--reset"),
        (["alice", "--may", "EDIT"], {}, "--may and --experiment go together"),
    ):
        done = add_user(server, *arguments, **who)
        assert done.returncode != 0 and re.search(complaint, done.stderr), done.stderr
        assert "scrypt" not in done.stderr  # MLflow's own answer shows the hash of a password
    made = add_user(server, "carol")
    password = re.fullmatch(r"carol: password (\S{20,})\n", made.stdout)[1]
    changed = add_user(server, "carol", "--reset", password="carol-chose-another", **{
        "MLFLOW_TRACKING_USERNAME": "carol", "MLFLOW_TRACKING_PASSWORD": password})  # fmt: skip
    assert changed.stdout == "carol: the password is set\n", changed.stderr


FINE = {
    "MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow@127.0.0.1:1/mlflow", "MLFLOW_ARTIFACTS_DESTINATION": "/nowhere",
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "x" * 32, "MLFLOW_DATABASE_WAIT_SECONDS": "0", "PYTHON": sys.executable,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://mlflow:secret-0@db/mlflow"}, "holds a password.*PGPASSWORD"),
        ({"MLFLOW_BACKEND_STORE_URI": "postgresql://db/mlflow?user=x&password=secret-0"}, "holds a password"),
        ({"MLFLOW_BACKEND_STORE_URI": "sqlite:///x.db"}, "'sqlite:///x.db': accepted is postgresql://"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": ""}, "MLFLOW_ARTIFACTS_DESTINATION is not set"),
        ({"MLFLOW_FLASK_SERVER_SECRET_KEY": "short"}, "MLFLOW_FLASK_SERVER_SECRET_KEY.*openssl rand"),
        ({"PGPASSWORD_FILE": "/nowhere/file"}, "PGPASSWORD_FILE '/nowhere/file' cannot be read"),
        ({"MLFLOW_HOST": "0.0.0.0"}, "MLFLOW_HOST is 0.0.0.0.*MLFLOW_SERVER_ALLOWED_HOSTS"),
        ({"MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "0"}, "MAX_OVERFLOW '0': accepted is a whole number from 1"),
        ({"MLFLOW_WORKERS": "many"}, "MLFLOW_WORKERS 'many'"),
        ({}, "the database does not answer.*refused"),
    ],
)
def test_serve_says_what_is_wrong_with_its_environment(given, complaint, tmp_path):
    environment = clean_environment() | {"TMPDIR": str(tmp_path)} | FINE | given
    done = subprocess.run([FOLDER / "serve.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and re.search(f"serve.sh: .*{complaint}", done.stderr), done.stderr
    assert "secret-0" not in done.stderr


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"MLFLOW_WORKERS": "3"}, r"3 stores x \(MLFLOW_WORKERS=3 x .* = 368 connections.* has 297 .*"
                                  "raise its max_connections to 371"),
        ({"PGPASSWORD_FILE": "", "PGPASSWORD": "wrong-0"}, "refuses: .*password.*PGPASSWORD_FILE"),
        ({"MLFLOW_ARTIFACTS_DESTINATION": "s3://no-bucket"}, "MLFLOW_ARTIFACTS_DESTINATION 's3://no-bucket' cannot be"),
    ],
)  # fmt: skip
def test_serve_holds_its_settings_against_the_database_and_the_bucket(server, given, complaint, tmp_path):
    environment = server.environment | {"TMPDIR": str(tmp_path)} | given
    done = subprocess.run([FOLDER / "serve.sh"], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and re.search(f"serve.sh: .*{complaint}", done.stderr), done.stderr
    assert "wrong-0" not in done.stderr
