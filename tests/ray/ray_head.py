"""A Ray head for tests, and the command line as a process of its own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
SPEC = """\
name: small
model: {name: demo}
data: {dataset: demo, context_size: 64, search_tokens: 1k, report_tokens: 2k, block_tokens: 4096}
hook_points: [blocks.1.hook_resid_post, blocks.4.hook_resid_post]
train: {tokens: TOKENS, batch_tokens: 256, lr: 1.0e-3, checkpoints: CHECKPOINTS}
saes:
  - {architecture: topk, d_sae: 2x, k: [4, 16]}
  - {architecture: standard, d_sae: 2x, l1_coefficient: 1}
  - {architecture: gated, d_sae: 2x, l1_coefficient: 1}
  - {architecture: standard, d_sae: 2x, l1_coefficient: 2, lr: 1.0e+6}  # this one diverges
baselines: {k: [8]}
resources: {model_hosts: 1, cpus_per_host: 0.5, cpus_per_pack: 0.75}
"""

SECRETS = ("AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "WANDB_API_KEY", "PGPASSWORD")


@dataclass(frozen=True)
class Head:
    """A running Ray head: `address` for `penstock run`, `jobs` for `penstock submit`."""

    address: str
    jobs: str
    pid: int
    folder: Path  # of its sessions: logs, and what jobs are unpacked into

    def processes(self, title: str) -> list[psutil.Process]:
        """The head's processes whose title begins so (`ray::RayTrainWorker`, `ray::HostActor`, ...)."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@contextlib.contextmanager
def running_head(log: Path, *options: str, **environment: str) -> Iterator[Head]:
    """`ray start --head` with two CPUs on the loopback, stopped by its process group at the end."""
    port = free_port(6400 + 10 * (os.getpid() % 300))  # runs of the tests side by side do not look for the same
    dashboard = free_port(port + 1)
    agent = free_port(dashboard + 1)  # the default one belongs to whichever Ray came first on this machine
    temporary = tempfile.mkdtemp(prefix="pst-")  # Ray's sockets need a short path
    binaries = str(Path(sys.executable).parent)  # an activated environment, for `python` in a job's entry point
    environment = {
        **os.environ, "RAY_worker_maximum_startup_concurrency": "8", "PATH": f"{binaries}:{os.environ['PATH']}",
        **environment,
    }  # fmt: skip
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "ray", "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
             "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
             f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={free_port(agent + 1)}",
             "--object-store-memory=400000000", f"--temp-dir={temporary}", "--disable-usage-stats", *options],
            stdout=output, stderr=output, env=environment, start_new_session=True, cwd=temporary,
        )  # fmt: skip
    try:
        jobs = f"http://127.0.0.1:{dashboard}"
        wait_for_dashboard(jobs, process, log)
        yield Head(f"127.0.0.1:{port}", jobs, process.pid, Path(temporary))
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs(children, timeout=5)
        for child in alive:
            child.kill()
        process.kill()
        process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def free_port(start: int) -> int:
    """A free port from `start` on, below those that Ray gives its workers."""
    for port in range(start, 10_000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def read_authentication_again() -> None:
    """Have the Ray of this process heed RAY_AUTH_MODE and RAY_AUTH_TOKEN as they are now: it reads them when it is
    imported, and other tests may have imported it before."""
    from ray._raylet import AuthenticationTokenLoader, Config

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def wait_for_dashboard(url: str, process: subprocess.Popen, log: Path) -> None:
    """Return once the head's job server answers, and takes its token: it is no other head's."""
    deadline = time.time() + 120
    request = urllib.request.Request(
        f"{url}/api/version", headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    )
    while time.time() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the Ray head did not come up:\n{log.read_text()}")


def penstock(*arguments, home, timeout=300, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "penstock.cli", *map(str, arguments), "--home", str(home)],
        capture_output=True, text=True, timeout=timeout, cwd=home.parent, check=False, **options,
    )  # fmt: skip


def wait_for(condition, process, log, seconds=200.0):
    """Return once a condition holds; fail with the log when the process has ended, or after so long."""
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline, log.read_text()
        assert process is None or process.poll() is None, log.read_text()
        time.sleep(0.2)


def weights(home: Path) -> dict[str, dict[str, np.ndarray]]:
    """The trained weights of every SAE of the home, by id."""
    return {path.parent.name: load_file(path / "sae_weights.safetensors") for path in home.glob("saes/*/final")}


def assert_same(home: Path, reference: Path) -> int:
    """Fail unless every SAE of the home has the bits that it has in the reference; how many there are."""
    found, expected = weights(home), weights(reference)
    for sae_id, tensors in found.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[sae_id][name], err_msg=f"{sae_id}.{name}")
    return len(found)


def cost(home: Path) -> dict[str, float]:
    """What the sweep of the home that ended last has cost."""
    latest = max(home.glob("sweeps/*/result.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(latest.read_text())["cost"]
