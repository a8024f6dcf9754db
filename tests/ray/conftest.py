"""One Ray head for all tests in this folder: a process of its own, as a user starts it."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from ray_head import SPEC, Head, free_port, penstock, read_authentication_again, wait_for_dashboard


@pytest.fixture(scope="session")
def token():
    """Ray asks for this token, in this process and in all that it starts, as on a cluster of penstock's launchers."""
    fresh = secrets.token_hex(32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", fresh)
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        read_authentication_again()
        yield fresh
    read_authentication_again()


@pytest.fixture(scope="session")
def head(token, tmp_path_factory):
    """`ray start --head` with two CPUs on the loopback, stopped by its process group at the end."""
    port = free_port(6400)
    dashboard = free_port(port + 1)
    agent = free_port(dashboard + 1)  # the default one belongs to whichever Ray came first on this machine
    temporary = tempfile.mkdtemp(prefix="pst-")  # Ray's sockets need a short path
    log = tmp_path_factory.mktemp("head") / "log"
    binaries = str(Path(sys.executable).parent)  # an activated environment, for `python` in a job's entry point
    environment = {
        **os.environ, "RAY_worker_maximum_startup_concurrency": "8", "PATH": f"{binaries}:{os.environ['PATH']}",
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={agent}",
             "--object-store-memory=400000000", f"--temp-dir={temporary}", "--disable-usage-stats"],
            stdout=output, stderr=output, env=environment, start_new_session=True, cwd=temporary,
        )  # fmt: skip
    try:
        jobs = f"http://127.0.0.1:{dashboard}"
        wait_for_dashboard(jobs, process, log)
        yield Head(f"127.0.0.1:{port}", jobs, process.pid)
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(children, timeout=5)
        for child in alive:
            child.kill()
        process.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def write_spec(tmp_path):
    """Write the small spec, with replacements, and return its path."""

    def write(tokens="16k", checkpoints="1", replace=()):
        text = SPEC.replace("TOKENS", tokens).replace("CHECKPOINTS", checkpoints)
        for old, new in replace:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def submitted(head, tmp_path_factory):
    """A finished sweep, submitted with `penstock submit --follow`, its blocks in a spool beside its home: (home, spec,
    what was printed)."""
    folder = tmp_path_factory.mktemp("submitted")
    spec = folder / "small.yaml"
    text = SPEC.replace("TOKENS", "16k").replace("CHECKPOINTS", "1")
    spec.write_text(text.replace("block_tokens", f"spool: {folder / 'spool'}, block_tokens"))
    home = folder / "home"
    done = penstock("submit", spec, "--address", head.jobs, "--follow", home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home, spec, done.stdout
