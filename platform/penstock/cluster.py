"""Starting a local Ray, or joining a cluster, with what Penstock needs set on both."""

import contextlib
import importlib
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.dashboard import TOKEN_SOURCES, use_token
from penstock.errors import SweepError
from penstock.placement import Cluster, Node

# Read by Ray Train's controller and by libraries of the workers as they start.
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",  # Tune's own tables: the driver shows progress itself
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # hosts and packs may share cores: a waiting thread must not spin
    "TOKENIZERS_PARALLELISM": "false",
}
# What our actors and workers have to say comes through the stream; the rest stays in Ray's session logs.
_QUIET: dict[str, Any] = {"logging_level": "WARNING", "log_to_driver": False, "namespace": "penstock"}

SUBMITTED = "PENSTOCK_SUBMITTED"  # in the environment of a job of `penstock submit`
_ASK_SECONDS = 5.0
_WANTS_TOKEN = (
    f"the cluster wants its token, and there is none; accepted: the token in {TOKEN_SOURCES}, with RAY_AUTH_MODE=token "
    "or unset"
)


def packages() -> list[str]:
    """The folders of our packages as this process imports them: every job ships its own."""
    names = ("penstock", "sae_core", "penstock_dashboards")
    return [str(Path(importlib.import_module(name).__file__ or "").parent) for name in names]


def connect(address: str | None) -> bool:
    """Join the cluster at `address` (or the one whose job this is), else start a local Ray. True when it was started.

    Raises `SweepError` when nothing answers at the address, or the cluster wants a token that is not there or another
    one. Of a cluster that wants none it warns.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise SweepError("Ray runs in this process already, and a sweep starts it, or joins a cluster, with settings "
                         "of its own; accepted: ray.shutdown() before")  # fmt: skip
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None or address == "local":
        _start_local()
        return True
    use_token()
    import ray

    _check_authentication(address)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray Train's clean-up asks the State API, which would guess between the clusters of a machine.
    variables = {"RAY_ADDRESS": address} if address != "auto" else {}
    environment: dict[str, Any] = {"env_vars": variables}
    if SUBMITTED not in os.environ:  # a job of `penstock submit` brings all of this along
        environment = {"env_vars": {**ENVIRONMENT, **variables}, "py_modules": packages()}
    try:
        ray.init(address=address, runtime_env=environment, **_QUIET)
    except ray.exceptions.AuthenticationError:
        raise SweepError(f"--address {address!r}: {_WANTS_TOKEN}") from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SweepError(f"--address {address!r}: no Ray cluster answers there: {error}") from None
    return False


def warn_of_open_cluster(address: str) -> None:
    """Say aloud that a cluster asks nobody for a token."""
    print(
        f"warning: the cluster at {address} asks for no token: anybody who reaches its ports can run code on it and "
        "read all that it holds; RAY_AUTH_MODE=token where its nodes start turns the token on (cluster/SECURITY.md)",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def _check_authentication(address: str) -> None:
    """Raise `SweepError` for a token that the cluster refuses; Ray itself tries for 20 s and then names another reason.

    Asks what every Ray process asks first, without the token and with it. What else may be wrong is Ray's to say.
    """
    import ray
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray._private.services import canonicalize_bootstrap_address

    if "://" in address:  # Ray's client (ray://), which has a port of its own and asks by itself
        return
    try:
        place = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError, RuntimeError):
        return
    if place is None or (wants_token := _is_refused(place, {})) is None:
        return
    if not wants_token:
        if SUBMITTED not in os.environ:  # `penstock submit` has said so
            warn_of_open_cluster(address)
        return
    try:
        headers = get_auth_headers_if_auth_enabled({})
    except ray.exceptions.AuthenticationError:
        headers = {}
    if not headers:
        raise SweepError(f"--address {address!r}: {_WANTS_TOKEN}")
    if _is_refused(place, headers):
        raise SweepError(
            f"--address {address!r}: the cluster refuses this token; accepted: its own, in {TOKEN_SOURCES} (the first "
            "that is set counts)"
        )


def _is_refused(place: str, headers: Mapping[str, str]) -> bool | None:
    """Whether the GCS at HOST:PORT sends a caller with these headers away; None where it cannot be asked."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        try:
            certificate, key, authority = load_certs_from_env()
        except (OSError, RuntimeError):
            return None
        channel = grpc.secure_channel(place, grpc.ssl_channel_credentials(authority, key, certificate))
    else:
        channel = grpc.insecure_channel(place)
    with channel:
        ask = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId
        metadata = [(name.lower(), value) for name, value in headers.items()]
        try:
            ask(gcs_service_pb2.GetClusterIdRequest(), timeout=_ASK_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            return True if error.code() == grpc.StatusCode.UNAUTHENTICATED else None
        return False


def _start_local() -> None:
    # Whatever address it is given, Ray listens on all of the machine's: only its token keeps others out. It reads that
    # variable when it is imported.
    if "ray" in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        raise SweepError("Ray was imported before a sweep could ask it for a token, without which anybody on this "
                         "network could run code here; accepted: RAY_AUTH_MODE=token in the environment, or `import "
                         "ray` after the sweep has begun")  # fmt: skip
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        _keep_token_private()
    # A pack needs a handful of processes; on few cores Ray would start them one after another.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # It watches for nodes that a cloud is about to take back, at the price of a process a pack.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    ray.init(
        address="local",
        include_dashboard=True,  # Ray Train's clean-up after a stopped trial goes through it
        dashboard_host="127.0.0.1",
        _node_ip_address="127.0.0.1",
        **_QUIET,
    )


def _keep_token_private() -> None:
    """See that ~/.ray/auth_token, where it is the token, can be read by this user alone. Ray makes that file readable
    for everybody on the machine, and whoever reads it can run code here."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    with contextlib.suppress(OSError):  # Ray says what is wrong with it
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if path.stat().st_mode & 0o077:
                path.chmod(0o600)
            return
        descriptor, temporary = tempfile.mkstemp(dir=path.parent)  # of mode 600
        try:
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            os.link(temporary, path)  # whole at once; not where another process was first
        finally:
            os.unlink(temporary)


def describe_cluster() -> tuple[Cluster, int]:
    """The alive nodes and what the autoscaler may add, as far as that is known here, and the bytes of the smallest
    object store."""
    from penstock.live_cluster import growing, types_here

    there = nodes()
    stores = [node.resources.get("object_store_memory", 0.0) for node in there]
    return growing(there, types_here()), int(min((size for size in stores if size), default=2**30))


def nodes() -> list[Node]:
    """The alive nodes."""
    import ray

    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def free_nodes() -> list[Node]:
    """The alive nodes with what of them nobody uses."""
    import ray
    from ray._private.state import available_resources_per_node

    available = available_resources_per_node()
    return [Node(available.get(node["NodeID"], {}), node["Labels"]) for node in ray.nodes() if node["Alive"]]


def free_what_dead_jobs_hold() -> int:
    """Remove the placement groups of jobs that are dead; how many there were.

    Ray removes a job's groups when its driver dies, but a controller of Ray Train that is just then starting a worker
    again makes another one a moment later, which nothing would ever free.
    """
    import ray
    from ray._private.state import jobs
    from ray.util.placement_group import PlacementGroup, remove_placement_group
    from ray.util.state import list_placement_groups

    dead = {job["JobID"] for job in jobs() if job["IsDead"]}
    here = ray.get_runtime_context().gcs_address  # the State API would guess between the clusters of a machine
    left = [
        group.placement_group_id
        for group in list_placement_groups(here, detail=True, limit=10_000, raise_on_missing_output=False)
        if group.state != "REMOVED" and not group.is_detached and group.creator_job_id in dead
    ]
    for group_id in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group_id))))
    return len(left)


def map_on_cluster(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results in order, made by Ray tasks; so many in flight as the cluster has CPUs. Where other work has taken all of
    these there are two, which wait for none: what they read is what a sweep begins with, and before it has begun nobody
    knows that it waits."""
    import ray

    there, free = ray.cluster_resources().get("CPU", 0.0), ray.available_resources()
    crowded = there >= 1 and bool(free) and free.get("CPU", 0.0) < 1
    task = ray.remote(num_cpus=0 if crowded else 1, max_retries=3)(lambda item: function(item))  # any callable
    limit = 2 if crowded else max(2, int(there))
    waiting: list[Any] = []
    for item in items:
        waiting.append(task.remote(item))
        if len(waiting) >= limit:
            yield ray.get(waiting.pop(0))
    for reference in waiting:
        yield ray.get(reference)
