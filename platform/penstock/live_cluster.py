"""A running Ray cluster as it can be seen from outside: its nodes, what of them is free, what its autoscaler may add.

Ray's GCS and dashboard tell of nodes that are there, and not of the node types that an autoscaler knows. Those are
read where they stand: in a file that the user names (the YAML of `ray up`, or a manifest with a RayCluster or RayJob),
on a head node in the configuration that Ray's monitor was started with, on a KubeRay head in the RayCluster itself.
"""

import contextlib
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from penstock.errors import SweepError
from penstock.placement import Cluster, Node, NodeType, Request, Room, host_request, pack_request
from penstock.spec import ResourceSpec

# Ray puts a node's type here, where a launcher has told it.
GROUP_LABEL = "ray.io/node-group"
START_SECONDS = 30.0  # a dashboard answers before it knows of the first node
_USAGE = re.compile(r"\s*([0-9.]+)/([0-9.]+) ([^\s(]+)")
_SHAPES = "the YAML of `ray up` (available_node_types), or a manifest with a RayCluster or RayJob"


@dataclass(frozen=True)
class LiveCluster:
    """`cluster`: the nodes and what may be added; `free`: the nodes with what of them nobody uses. `may_grow`: whether
    an autoscaler seems to be there whose node types are not known here."""

    cluster: Cluster
    free: tuple[Node, ...]
    may_grow: bool = False


@dataclass(frozen=True)
class Placement:
    """One kind of request, and how it fares: `fits_now` of `wanted` fit into what is free, `fits_empty` into the
    nodes that are there when other work has ended, `fits` with what the autoscaler may add. `never`: why not even one
    ever will."""

    request: Request
    wanted: int
    fits_now: int
    fits_empty: int
    fits: int
    never: str | None


def look_at(address: str, config: str | Path | None = None) -> LiveCluster:
    """The cluster at an address: `http://HOST:8265` from any machine, which joins nothing, or `HOST:PORT` and `auto` on
    one of its nodes. `config` names a file with its autoscaler's node types.

    Raises `SweepError` when nothing answers there, or wants another token, when no node is up yet, or when the file
    holds no node types.
    """
    types, scales = None if config is None else read_types(config), False
    if address.startswith(("http://", "https://")):
        nodes, free, scales = _through_dashboard(address)
    else:
        nodes, free, known = _from_a_node(address)
        types = types or known
    if not nodes:
        raise SweepError(f"--address {address!r}: no node of the cluster is up yet; accepted: again in a few seconds")
    cluster = growing(nodes, types)
    return LiveCluster(cluster, tuple(free), may_grow=types is None and (scales or may_grow(cluster)))


def growing(nodes: Sequence[Node], types: tuple[tuple[NodeType, ...], int | None] | None) -> Cluster:
    """The cluster of these nodes and of what may still be added to them."""
    if types is None:
        return Cluster(tuple(nodes))
    kinds, at_most = types
    there = Counter(_kind_of(node, kinds) for node in nodes)
    left = tuple(replace(kind, at_most=max(0, kind.at_most - there[kind.name])) for kind in kinds)
    workers = sum(there[kind.name] for kind in kinds)
    return Cluster(tuple(nodes), left, None if at_most is None else max(0, at_most - workers))


def placements(live: LiveCluster, resources: ResourceSpec, packs: int) -> list[Placement]:
    """How the model hosts and the packs of a spec would be placed: hosts first, packs on what they leave."""
    host, pack = host_request(resources), pack_request(resources)
    cluster = live.cluster
    there = Cluster(cluster.nodes)
    rooms = [Room(there, available=live.free), Room(there), Room(cluster)]
    wanted = [(host, resources.model_hosts), (pack, packs)]
    fitting = [[_placed(room, request, number) for room in rooms] for request, number in wanted]
    return [
        Placement(request, number, *fits, never=cluster.never(request))
        for (request, number), fits in zip(wanted, fitting, strict=True)
    ]


def _placed(room: Room, request: Request, number: int) -> int:
    return next((index for index in range(number) if not room.take(request)), number)


# ---- saying it ----


def placement_table(live: LiveCluster, found: Iterable[Placement], address: str) -> str:
    """What `penstock plan --address` prints after the plan."""
    nodes, cluster = live.cluster.nodes, live.cluster
    lines = [f"cluster    {address}: {len(nodes)} node{'s' if len(nodes) != 1 else ''}: {Cluster(nodes)}"]
    lines += [f"  may add  up to {kind.at_most} of {kind.name}: {kind.node}" for kind in cluster.types if kind.at_most]
    if live.may_grow:
        lines.append("  may add  its nodes come from a launcher; what its autoscaler may add is not told here: "
                     f"--cluster FILE ({_SHAPES})")  # fmt: skip
    for one in found:
        noun = {"host": "hosts", "pack": "packs"}[one.request.noun]
        lines.append(f"{noun:<10} {one.wanted} x {one.request}: {_verdict(one, live)}")
    return "\n".join(lines)


def _verdict(one: Placement, live: LiveCluster) -> str:
    if one.never is not None:
        if live.may_grow:
            return f"met by no node that is there ({one.never}); an autoscaler may know of others"
        return f"NEVER: {one.never}"
    least = one.wanted if one.request.noun == "host" else 1
    if one.fits_now >= one.wanted:
        return "fit now" if one.wanted != 1 else "fits now"
    now = f"{one.fits_now} of {one.wanted} fit now"
    if one.fits_empty > one.fits_now:
        now += f", {one.fits_empty} when other work ends"
    if one.fits > one.fits_empty:
        now += f", {one.fits} with nodes that the autoscaler adds"
    if one.fits >= least:
        return now if one.fits >= one.wanted else f"{now}; the others take their turns"
    return f"{now}; NEVER as many as {least}" if not live.may_grow else f"{now}; more if the autoscaler adds nodes"


def is_impossible(live: LiveCluster, found: Iterable[Placement]) -> bool:
    """Whether something can never be placed, as far as is known here."""
    return not live.may_grow and any(
        one.never is not None or one.fits < (one.wanted if one.request.noun == "host" else min(1, one.wanted))
        for one in found
    )


# ---- nodes ----


def _through_dashboard(address: str) -> tuple[list[Node], list[Node], bool]:
    """(nodes, what is free of them, whether an autoscaler with node types of its own is at work)."""
    from penstock.dashboard import Dashboard

    dashboard = Dashboard(address)
    found, deadline = dashboard.nodes(), time.monotonic() + START_SECONDS
    while not found and time.monotonic() < deadline:
        time.sleep(1.0)
        found = dashboard.nodes()
    used = dashboard.get("/nodes", view="summary").get("data", {}).get("nodeLogicalResources", {})
    nodes = [Node(node["resources_total"], node.get("labels") or {}) for node in found]
    free = [
        Node(_less(node.resources, used.get(about["node_id"], "")), node.labels)
        for node, about in zip(nodes, found, strict=True)
    ]
    status = dashboard.get("/api/cluster_status").get("data", {}).get("clusterStatus") or {}
    kinds = ((status.get("autoscalerReport") or {}).get("nodeTypeMapping") or {}).values()
    return nodes, free, any(not kind.startswith("node_") for kind in kinds)  # by node where it has no types


def _less(total: Mapping[str, float], usage: str) -> dict[str, float]:
    """What is left by a dashboard's lines like `1.5/2.0 CPU (1.0 used of 1.0 reserved in placement groups)`."""
    left = dict(total)
    for line in usage.splitlines():
        if (match := _USAGE.match(line)) and match[3] in left:
            left[match[3]] = max(0.0, total[match[3]] - float(match[1]))
    return left


def _from_a_node(address: str) -> tuple[list[Node], list[Node], Any]:
    """(nodes, what is free of them, what `types_here` says)."""
    from penstock.cluster import connect, free_nodes, nodes

    connect(address)
    try:
        return nodes(), free_nodes(), types_here()
    finally:
        import ray

        ray.shutdown()


def may_grow(cluster: Cluster) -> bool:
    """Whether a launcher that knows node types has started the nodes: there may be an autoscaler that adds some."""
    return any(node.labels.get(GROUP_LABEL) for node in cluster.nodes)


def _kind_of(node: Node, kinds: Iterable[NodeType]) -> str:
    """The type that a node is of, by what its launcher has told it, else by what it is."""
    if group := node.labels.get(GROUP_LABEL):
        return group
    for kind in kinds:
        labels = {key: value for key, value in kind.node.labels.items() if key != GROUP_LABEL}
        same = all(node.resources.get(name, 0) == kind.node.resources.get(name, 0) for name in ("CPU", "GPU"))
        if same and labels.items() <= node.labels.items():
            return kind.name
    return ""


# ---- node types ----


def read_types(path: str | Path) -> tuple[tuple[NodeType, ...], int | None]:
    """The node types of a file, and how many workers there may be of all together."""
    try:
        documents = [one for one in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if isinstance(one, dict)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SweepError(f"--cluster {str(path)!r} cannot be read: {' '.join(str(error).split())}; accepted: {_SHAPES}"
                         ) from None  # fmt: skip
    for document in documents:
        try:
            if (types := types_of(document)) is not None:
                return types
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise SweepError(f"--cluster {str(path)!r}: its node types cannot be read ({type(error).__name__}: {error})"
                             ) from None  # fmt: skip
    raise SweepError(f"--cluster {str(path)!r} holds no node types; accepted: {_SHAPES}")


def types_of(config: Mapping[str, Any]) -> tuple[tuple[NodeType, ...], int | None] | None:
    """The worker types of an autoscaler's configuration or of a Kubernetes manifest; None of anything else."""
    if config.get("kind") in ("RayCluster", "RayJob"):
        from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

        spec = config["spec"] if config["kind"] == "RayCluster" else config["spec"]["rayClusterSpec"]
        types = _generate_available_node_types_from_ray_cr_spec(spec)
        if not spec.get("enableInTreeAutoscaling"):  # so many there will be, and no more
            replicas = {group["groupName"]: group.get("replicas", 0) for group in spec.get("workerGroupSpecs", ())}
            types = {name: {**about, "max_workers": replicas.get(name, 0)} for name, about in types.items()}
        config = {"available_node_types": types, "head_node_type": next(iter(types))}
    if not isinstance(config.get("available_node_types"), dict):
        return None
    at_most = config.get("max_workers")
    head = config.get("head_node_type")
    found = []
    for name, about in config["available_node_types"].items():
        workers = about.get("max_workers", 0 if name == head else at_most or 0)
        amounts = {key: float(value) for key, value in (about.get("resources") or {}).items()}
        labels = {**(about.get("labels") or {}), GROUP_LABEL: name}
        if name != head or workers:
            found.append(NodeType(name, Node(amounts, labels), int(workers)))
    return tuple(found), at_most


def types_here() -> tuple[tuple[NodeType, ...], int | None] | None:
    """What the autoscaler of the cluster that this process has joined may add, where that can be found out here: on its
    head node. It is looked up once a minute."""
    import ray

    return _types_in_minute(int(time.monotonic() // 60), ray.get_runtime_context().gcs_address)


@lru_cache(maxsize=1)
def _types_in_minute(_minute: int, gcs: str) -> tuple[tuple[NodeType, ...], int | None] | None:
    with contextlib.suppress(Exception):  # whatever is wrong with it, the nodes that are there are known all the same
        config = _of_monitor(gcs) or _of_kuberay()
        if config is not None:
            return types_of(config)
    return None


def _of_monitor(gcs: str) -> dict[str, Any] | None:
    """The configuration that Ray's monitor of the cluster at a GCS address was started with, where it runs on this
    machine, which may have several, and has one."""
    import psutil

    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        given = dict(part.removeprefix("--").split("=", 1) for part in command if part.startswith("--") and "=" in part)
        is_monitor = any(part.endswith("monitor.py") for part in command) and "autoscaling-config" in given
        if is_monitor and _is_same(gcs, given.get("gcs-address", "")):
            return yaml.safe_load(Path(given["autoscaling-config"]).expanduser().read_text(encoding="utf-8"))
    return None


def _is_same(gcs: str, of_monitor: str) -> bool:
    """Whether two addresses are of one GCS; a monitor of this machine may have it by another name."""
    import ray.util

    (host, _, port), (_, _, other_port) = gcs.rpartition(":"), of_monitor.rpartition(":")
    here = host in ("127.0.0.1", "localhost", ray.util.get_node_ip_address())
    return gcs == of_monitor or (here and port == other_port)


def _of_kuberay() -> dict[str, Any] | None:
    """The RayCluster that this pod is the head of, by Kubernetes' API, which KubeRay lets it read where it scales."""
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")
    if not name or not namespace or "KUBERNETES_SERVICE_HOST" not in os.environ:
        return None
    from ray.autoscaler._private.kuberay.node_provider import KubernetesHttpApiClient

    found = KubernetesHttpApiClient(namespace).get(f"rayclusters/{name}")
    return {**found, "kind": "RayCluster"}
