"""A real `mlflow server` and a real PostgreSQL on this machine, for the tests of what is read and written over HTTP."""

import contextlib
import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy

_START_SECONDS, _STOP_SECONDS = 300, 20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---- MLflow ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mlflow_server(folder: Path, backend: str, **environment: str) -> Iterator[str]:
    """The address of a server that keeps its runs in `backend` and its artifacts, which it serves, below `folder`."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", backend, "--artifacts-destination", str(folder / "artifacts"), "--serve-artifacts",
    ]  # fmt: skip
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    inherited = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with served(command, port, inherited | quiet | environment, folder / "server.log") as address:
        yield address


@contextlib.contextmanager
def served(command: list[str], port: int, environment: dict[str, str], log_file: Path) -> Iterator[str]:
    """The address that `command`, which starts a server of MLflow on `port`, answers at while the block runs."""
    address = f"http://127.0.0.1:{port}"
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(server, address, log_file)
            yield address
        finally:
            for stop in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(server.pid, stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    server.wait(_STOP_SECONDS)


def _wait_for(server: "subprocess.Popen[bytes]", address: str, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return
        time.sleep(0.2)
    raise AssertionError(f"the server did not answer: {log.read_text()}")


# ---- PostgreSQL -----------------------------------------------------------------------------------------------------


def postgres_programs() -> Path | None:
    """The folder with `initdb` and `postgres`: on PATH, or where Debian keeps them."""
    found = shutil.which("initdb")
    there = [Path(found).resolve()] if found else [Path(path) for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")]
    folders = sorted((path.parent for path in there), key=lambda folder: folder.parent.name)
    return folders[-1] if folders and (folders[-1] / "postgres").exists() else None


@contextlib.contextmanager
def postgres(password: str | None = None, **settings: object) -> Iterator[str]:
    """A PostgreSQL of its own that listens on a socket only; its address for SQLAlchemy, without the password.

    `password` is the one that it asks for (none, unless given), `settings` are its own. It refuses to run as root,
    which hands it to an unprivileged user.
    """
    bin_folder = postgres_programs()
    assert bin_folder is not None
    user = next(name for name in ("postgres", "nobody", "daemon") if _is_user(name)) if os.geteuid() == 0 else None
    # A folder that other users can reach and whose path leaves room for a socket's name (107 characters).
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as temporary:
        folder = Path(temporary)
        folder.chmod(0o755)
        data, socket_folder, secret = folder / "data", folder / "s", folder / "password"
        for made in (data, socket_folder):
            made.mkdir()
        secret.write_text(password or "")
        if user is not None:
            for given in (data, socket_folder, secret):
                shutil.chown(given, user)
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": str(data)}
        as_user = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user is not None else {}
        common = {"env": environment, "cwd": data, **as_user}
        access = ["-A", "scram-sha-256", "--pwfile", secret] if password else ["-A", "trust"]
        create = [bin_folder / "initdb", "-D", data, "-U", "mlflow", *access, "--no-sync", "-E", "UTF8"]
        subprocess.run(create, check=True, stdout=subprocess.DEVNULL, **common)
        fixed = {"listen_addresses": "", "unix_socket_directories": socket_folder}
        options = [f"--{name}={value}" for name, value in (fixed | settings).items()]
        log_file = folder / "postgres.log"
        with log_file.open("wb") as log:
            server = subprocess.Popen([bin_folder / "postgres", "-D", data, "-F", *options],
                                      stdout=log, stderr=log, **common)  # fmt: skip
            try:
                address = f"postgresql+psycopg2://mlflow@/postgres?host={socket_folder}"
                _wait_for_database(server, address, password, log_file)
                yield address
            finally:
                server.send_signal(signal.SIGINT)  # ends open connections and leaves nothing behind
                server.wait(_START_SECONDS)


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _wait_for_database(server: "subprocess.Popen[bytes]", address: str, password: str | None, log: Path) -> None:
    secret = {"password": password} if password else {}
    engine = sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool, connect_args=secret)
    deadline = time.monotonic() + _START_SECONDS
    while True:
        assert server.poll() is None, log.read_text()
        try:
            return engine.connect().close()
        except sqlalchemy.exc.OperationalError:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
