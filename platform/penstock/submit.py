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
    if dashboard.get("/api/authentication_mode").get("authentication_mode") == "disabled":
        warn_of_open_cluster(address)
    for name in ("dashboard.modules.dashboard_sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every package that is uploaded
    client = dashboard.jobs
    with tempfile.TemporaryDirectory() as folder:
        text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False)
        (Path(folder) / "spec.yaml").write_text(text, encoding="utf-8")
        job = _submit_when_ready(
            client,
            entrypoint="python -m penstock.cli run spec.yaml" + (" --allow-code-change" if allow_code_change else ""),
            runtime_env={"working_dir": folder, "py_modules": packages(), "env_vars": environment},
            metadata={"sweep": spec.name},
        )
    print(f"submitted {spec.name} as job {job}", flush=True)
    if not follow:
        print(f"follow it with  ray job logs --address {address} --follow {job}")
        return 0
    return _follow(client, job)


def _environment(home: Home) -> dict[str, str]:
    """What the job's processes have in their environment beside what their nodes give them. No secrets."""
    environment = {**ENVIRONMENT, SUBMITTED: "1", "PENSTOCK_HOME": str(home.path), "PYTHONUNBUFFERED": "1"}
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
