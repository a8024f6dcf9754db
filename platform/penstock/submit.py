"""Submitting a sweep as a Ray job: the code and the resolved spec travel with it, and no secret does.

The job's processes have the environment of the nodes' `ray start`: the cluster's token, keys of storage and hub, and
MLflow's password stand there. What a job brings along itself, Ray's dashboard shows.
"""

import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from penstock.cluster import ENVIRONMENT, SUBMITTED, packages, warn_of_open_cluster
from penstock.dashboard import Dashboard
from penstock.errors import SweepError
from penstock.home import Home
from penstock.plan import read_sweep
from penstock.redaction import redacted, secret_in
from penstock.stopping import JOB_STOP_SECONDS, LEAVE_SECONDS, SAVE_SECONDS

AGENT_SECONDS = 60.0
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


def submit(
    spec_path: str | Path, home: Home, address: str, follow: bool = False, *, allow_code_change: bool = False
) -> int:
    """Submit the sweep to the cluster whose job server is at `address` (http://HOST:8265).

    With `follow`, its logs stream here and the exit status is the job's; otherwise 0 once it is accepted. What is wrong
    with the spec is found before anything is sent. Raises `SweepError` when the server does not answer, when it wants
    a token that is not there or another one, and for an MLFLOW_TRACKING_URI with a password in it.
    """
    spec, _ = read_sweep(spec_path)
    spec = spec.model_copy(update={"storage": home.storage_uri(spec.storage)})
    environment = _environment(home)
    dashboard = Dashboard(address)
    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
        (Path(folder) / "spec.yaml").write_text(text, encoding="utf-8")
        entrypoint = "python -m penstock.cli run spec.yaml" + (" --allow-code-change" if allow_code_change else "")
        job = _launch(dashboard, entrypoint, {"working_dir": folder, "env_vars": environment}, {"sweep": spec.name})
    return _said(dashboard, job, spec.name, follow)


def submit_again(
    home: Home, dashboard: Dashboard, sweep_id: str, name: str, follow: bool = False, *, allow_code_change: bool = False
) -> int:
    """Have a job go on with a sweep that has stopped, from the spec that is kept with it. Returns as `submit` does."""
    entrypoint = f"python -m penstock.cli resume {sweep_id}" + (" --allow-code-change" if allow_code_change else "")
    job = _launch(dashboard, entrypoint, {"env_vars": _environment(home)}, {"sweep": name})
    return _said(dashboard, job, name, follow)


def run_there(dashboard: Dashboard, entrypoint: str) -> tuple[bool, str]:
    """Run a short command on the cluster, with our packages: whether it has succeeded, and what it printed."""
    job = _launch(dashboard, entrypoint, {"env_vars": {"PYTHONUNBUFFERED": "1"}}, {"penstock": "command"})
    while str(status := dashboard.jobs.get_job_status(job)) not in _ENDED:
        time.sleep(0.5)
    return str(status) == "SUCCEEDED", dashboard.jobs.get_job_logs(job)


def _launch(
    dashboard: Dashboard, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]
) -> str:
    """Submit a job that brings our packages along; its id."""
    if dashboard.get("/api/authentication_mode").get("authentication_mode") == "disabled":
        warn_of_open_cluster(dashboard.address)
    jobs = dashboard.jobs  # imports what sets its own levels
    for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every package that is uploaded
    environment = {"py_modules": packages(), **runtime_env}
    return _submit_when_ready(jobs, entrypoint=entrypoint, runtime_env=environment, metadata=metadata)


def _said(dashboard: Dashboard, job: str, name: str, follow: bool) -> int:
    print(f"submitted {name} as job {job}", flush=True)
    if not follow:
        print(f"watch it with  penstock status {name} --watch --address {dashboard.address}")
        print(f"its log:       penstock logs {name} --follow --address {dashboard.address}")
        return 0
    return _follow(dashboard.jobs, job)


def _environment(home: Home) -> dict[str, str]:
    """What the job's processes have in their environment beside what their nodes give them. No secrets."""
    environment = {**ENVIRONMENT, SUBMITTED: "1", "PENSTOCK_HOME": str(home.path), "PYTHONUNBUFFERED": "1"}
    environment[JOB_STOP_SECONDS] = str(int(SAVE_SECONDS + LEAVE_SECONDS))  # Ray kills a job 3 s after SIGTERM
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        if what := secret_in(uri):
            raise SweepError(
                f"MLFLOW_TRACKING_URI holds {what}, and what a job is given Ray's dashboard shows; accepted: one "
                "without, and in the environment of the cluster's `ray start` the user and the password, as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (of a server) or PGPASSWORD (of PostgreSQL)"
            )
        environment["MLFLOW_TRACKING_URI"] = uri
    return environment


def _submit_when_ready(client: Any, **job: Any) -> str:
    """Submit; a head that has just started takes a while until it can run jobs."""
    deadline = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise SweepError(f"the cluster did not take the job: {redacted(str(error))}") from None
            time.sleep(1.0)


def _follow(client: Any, job: str) -> int:
    """Print the job's logs as they come; its exit status."""
    printed = 0
    while True:
        ended = str(client.get_job_status(job)) in _ENDED
        logs = client.get_job_logs(job)
        print(logs[printed:], end="", flush=True)
        printed = len(logs)
        if ended:
            break
        time.sleep(1.0)
    info = client.get_job_info(job)
    print(f"job {job}: {info.status}" + ("" if str(info.status) == "SUCCEEDED" else f": {info.message}"), flush=True)
    return info.driver_exit_code if info.driver_exit_code is not None else int(str(info.status) != "SUCCEEDED")
