"""Who has no token is sent away, and no secret of anybody's environment comes to light: on a real cluster."""

import base64
import contextlib
import http.client
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import grpc
import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from penstock import cluster
from penstock.cli import main
from penstock.errors import SweepError
from ray_head import free_port, read_authentication_again

pytestmark = pytest.mark.ray

# What Ray's dashboard tells of a cluster and of its jobs.
PAGES = (
    "/api/jobs/", "/api/v0/jobs", "/api/v0/actors?detail=1", "/api/v0/tasks?detail=1", "/api/v0/workers?detail=1",
    "/api/v0/nodes?detail=1", "/api/v0/runtime_envs?detail=1", "/api/v0/objects?detail=1", "/api/cluster_status",
    "/nodes?view=summary", "/logical/actors", "/api/v0/placement_groups?detail=1",
)  # fmt: skip


def written(secret: str) -> tuple[bytes, ...]:
    """A secret as it may stand in a file: as it is, in an address, and in base64 at each of its three alignments."""
    raw = secret.encode()
    encoded = [base64.b64encode(b"\0" * shift + raw)[4:-4] for shift in range(3)]
    return raw, urllib.parse.quote(secret, safe="").encode(), *encoded


def leaks(content: bytes, planted: dict[str, str]) -> set[str]:
    """The names of the secrets that stand in it."""
    return {name for name, secret in planted.items() if any(form in content for form in written(secret))}


def ask(url: str, token: str | None = None, method: str = "GET") -> tuple[int, bytes]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, method=method, headers=headers, data=b"{}" if method == "POST" else None)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.fixture
def secrets(planted, token):
    """Every secret by where it was planted."""
    named = {f"{name} of the {where}": value for where, values in planted.items() for name, value in values.items()}
    return {**named, "the cluster's token": token}


@pytest.fixture
def authentication(monkeypatch, tmp_path):
    """Set or clear variables of authentication for this process's Ray; there is no token in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def change(**variables: str) -> None:
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        read_authentication_again()

    yield change
    monkeypatch.undo()
    read_authentication_again()


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_no_file_that_a_sweep_leaves_holds_a_secret(submitted, head, secrets):
    """The home (MLflow's database, artifacts, report, status, checkpoints), the spool, and Ray's sessions with all
    their logs and what jobs were unpacked into."""
    home, _, printed = submitted
    found, looked_at = {}, []
    for folder in (home.parent, head.folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                looked_at.append(path)
                if names := leaks(path.read_bytes(), secrets):
                    found[str(path)] = names
    assert not found
    assert not leaks(printed.encode(), secrets)
    names = {path.name for path in looked_at}
    assert {"mlflow.db", "report.html", "status.json", "spec.yaml", "front.json", "result.json"} <= names
    assert any(path.suffix == ".arrow" for path in looked_at) and any("job-driver" in name for name in names)


def test_no_page_of_the_dashboard_shows_a_secret(submitted, head, secrets, token):
    shown = {page: ask(f"{head.jobs}{page}", token) for page in PAGES}
    jobs = json.loads(shown["/api/jobs/"][1])
    for job in jobs:
        page = f"/api/jobs/{job['submission_id']}"
        shown |= {each: ask(f"{head.jobs}{each}", token) for each in (page, f"{page}/logs") if job["submission_id"]}
    assert {page: status for page, (status, _) in shown.items() if status != 200} == {}
    assert {page: leaks(content, secrets) for page, (_, content) in shown.items() if leaks(content, secrets)} == {}
    mine = next(job for job in jobs if job["metadata"].get("sweep") == "small")
    assert set(mine["runtime_env"]["env_vars"]) == {
        *cluster.ENVIRONMENT, cluster.SUBMITTED, "PENSTOCK_HOME", "PYTHONUNBUFFERED", "RAY_JOB_STOP_WAIT_TIME_S",
    }  # fmt: skip


def test_no_command_line_holds_a_secret_and_the_jobs_processes_have_them_in_their_environment(submitted, head, secrets):
    processes = psutil.Process(head.pid).children(recursive=True)
    lines = {" ".join(process.cmdline()) for process in processes if process.status() != psutil.STATUS_ZOMBIE}
    assert {line: leaks(line.encode(), secrets) for line in lines if leaks(line.encode(), secrets)} == {}
    raylet = next(process for process in processes if process.name() == "raylet").environ()
    assert raylet["RAY_AUTH_MODE"] == "token" and raylet["HF_TOKEN"] == secrets["HF_TOKEN of the head"]


# ---- the token ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "wants its token, and"),
        ({"RAY_AUTH_MODE": "token"}, "wants its token, and"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "refuses this token"),
    ],
    ids=["no token", "token mode without one", "another token"],
)
def test_who_has_not_the_token_is_sent_away_within_seconds(
    submitted, head, authentication, variables, message, capsys
):
    home, spec, _ = submitted
    authentication(**variables)
    for command in (["submit", str(spec)], ["status", "small"], ["logs", "small"]):
        assert main([*command, "--address", head.jobs, "--home", str(home)]) == 2, command
        complaint = capsys.readouterr().err
        assert message in complaint and "RAY_AUTH_TOKEN_PATH" in complaint and "~/.ray/auth_token" in complaint
    begun = time.monotonic()
    with pytest.raises(SweepError, match=message):
        cluster.connect(head.address)
    assert time.monotonic() - begun < 10


def test_the_dashboard_asks_for_the_token(submitted, head):
    """For all that it tells and takes; what needs none says nothing of the cluster."""
    for page in (*PAGES, "/api/version", "/metrics"):
        assert ask(f"{head.jobs}{page}")[0] == 401, page
    for page in ("/api/jobs/", "/api/jobs/x/stop"):
        assert ask(f"{head.jobs}{page}", method="POST")[0] == 401, page
    assert ask(f"{head.jobs}/api/jobs/", token="0" * 64)[0] == 403
    assert ask(f"{head.jobs}/api/authentication_mode") == (200, b'{"authentication_mode": "token"}')


# A harmless call of each service of Ray's, by the kind of process that has it.
CALLS = {
    "/ray.rpc.NodeInfoGcsService/GetClusterId": "gcs_server",
    "/ray.rpc.NodeManagerService/GetSystemConfig": "raylet",
    "/ray.rpc.ObjectManagerService/Pull": "raylet",
    "/ray.rpc.CoreWorkerService/NumPendingTasks": "ray::",
    "/ray.rpc.ReporterService/GetTraceback": "ray::DashboardAgent",
    "/ray.rpc.RayletDriver/ClusterInfo": "ray.util.client.server",
}


def listening(head) -> dict[tuple[str, int], str]:
    """Where the head's processes listen: (address, port) -> command line. A port that was inherited is its parent's."""
    found = {}
    for process in psutil.Process(head.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            for socket in process.net_connections(kind="tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    name = socket.laddr.ip.removeprefix("::ffff:")
                    place = "127.0.0.1" if name in ("::", "0.0.0.0") else name
                    found.setdefault((place, socket.laddr.port), " ".join(process.cmdline()))
    return found


def call(place: str, method: str, headers: tuple[tuple[str, str], ...] = ()) -> str:
    """How a gRPC call without a request is answered."""
    with grpc.insecure_channel(place) as channel:
        try:
            channel.unary_unary(method)(b"", timeout=5, metadata=headers)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"


def answers_without_token(head) -> tuple[set[str], dict[int, tuple[str, bytes]]]:
    """(the calls that some port refuses, what HTTP ports give: port -> (command line, body)). Fails where a call is
    answered."""
    refused, open_to_all = set(), {}
    for (host, port), command in listening(head).items():
        try:
            status, body = ask(f"http://{host}:{port}/")
        except (urllib.error.URLError, http.client.HTTPException, OSError):  # gRPC
            answers = {method: call(f"{host}:{port}", method) for method in CALLS}
            assert "OK" not in answers.values(), (command, answers)
            refused |= {method for method, answer in answers.items() if answer == "UNAUTHENTICATED"}
        else:
            if status != 401 and port != int(head.jobs.rpartition(":")[2]):
                open_to_all[port] = (command, body)
    return refused, open_to_all


def test_every_port_of_a_node_asks_for_the_token_but_those_of_metrics(submitted, head, token):
    """The GCS, raylet, object manager, workers, agents and Ray's client, each by a call that it has."""

    class Worker:
        def is_up(self) -> bool:
            return True

    ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
    try:
        worker = ray.remote(num_cpus=0)(Worker).remote()
        assert ray.get(worker.is_up.remote())
        refused, open_to_all = answers_without_token(head)
    finally:
        ray.shutdown()
    assert refused == set(CALLS), listening(head)
    assert open_to_all and all(body.startswith(b"# HELP") for _, body in open_to_all.values()), open_to_all
    # And with the token the same calls are answered: it is the token that was missing.
    headers = (("authorization", f"Bearer {token}"),)
    assert call(head.address, "/ray.rpc.NodeInfoGcsService/GetClusterId", headers) == "OK"


def test_a_cluster_that_asks_for_no_token_is_warned_of(submitted, authentication, capsys):
    home, spec, _ = submitted
    authentication(RAY_AUTH_MODE="disabled")
    ports = {"dashboard_port": free_port(9400), "dashboard_agent_listen_port": 0}
    open_cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": True, **ports},
    )
    try:
        cluster._check_authentication(open_cluster.address)
        assert "anybody who reaches its ports can run code" in capsys.readouterr().err
        address = f"http://{open_cluster.webui_url}"
        assert main(["submit", str(spec), "--address", address, "--home", str(home)]) == 0
        assert "anybody who reaches its ports can run code" in capsys.readouterr().err
    finally:
        open_cluster.shutdown()


LOCAL = """
import json, urllib.error, urllib.request
from penstock import cluster
assert cluster.connect(None)
import ray
from ray._private.worker import _global_node as node
def status(path):
    try:
        return urllib.request.urlopen(f"http://{node.webui_url}{path}", timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code
print(json.dumps([node.webui_url, status("/api/jobs/"), cluster._is_refused(node.gcs_address, {})]))
ray.shutdown()
"""


def test_the_ray_of_a_run_on_this_machine_asks_for_a_token_too(tmp_path):
    left = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in left} | {"HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    place, status, refused = json.loads(done.stdout.splitlines()[-1])
    assert place.startswith("127.0.0.1:") and status == 401 and refused is True
    made = tmp_path / ".ray" / "auth_token"
    assert made.stat().st_mode & 0o777 == 0o600 and len(made.read_text()) == 64  # Ray would make it for all to read
