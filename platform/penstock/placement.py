"""Where model hosts and packs can run: requests, the nodes of a cluster, and how many requests fit.

Pure: a cluster is a list of nodes, and what its autoscaler may add to them. `live_cluster.py` asks a real one.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.errors import SweepError
from penstock.labels import matches, meets
from penstock.spec import ResourceSpec

MOST_SLOTS = 10_000
_EPSILON = 1e-6
# What every Ray node has and nobody places by.
_UNSHOWN_RESOURCES = ("memory", "object_store_memory", "node:")
_UNSHOWN_LABELS = ("ray.io/node-id", "ray.io/node-group")


@dataclass(frozen=True)
class Request:
    """What one model host, or one pack, takes of one node. `noun` is `host` or `pack`, as in the spec's fields."""

    noun: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return _shown(self.resources, self.labels)

    @property
    def what(self) -> str:
        return "model host" if self.noun == "host" else self.noun

    @property
    def bundle(self) -> dict[str, float]:
        """The resources as Ray Train takes them, what is 0 left out but for CPU."""
        return {name: amount for name, amount in self.resources.items() if amount or name == "CPU"}

    def field_of(self, name: str) -> str:
        """The spec's field that asks for a resource."""
        known = {"CPU": f"cpus_per_{self.noun}", "GPU": f"gpus_per_{self.noun}"}
        return f"resources.{known.get(name, f'{self.noun}_resources')}"


def host_request(resources: ResourceSpec) -> Request:
    """What a model host of the spec takes."""
    amounts = {"CPU": resources.cpus_per_host, "GPU": resources.gpus_per_host, **resources.host_resources}
    return Request("host", amounts, resources.host_labels)


def pack_request(resources: ResourceSpec) -> Request:
    """What a pack of the spec takes."""
    amounts = {"CPU": resources.cpus_per_pack, "GPU": resources.gpus_per_pack, **resources.pack_resources}
    return Request("pack", amounts, resources.pack_labels)


@dataclass(frozen=True)
class Node:
    """A node of a Ray cluster: what it has (CPU, GPU, custom resources) and its labels."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        amounts = {name: value for name, value in self.resources.items() if not name.startswith(_UNSHOWN_RESOURCES)}
        return _shown(amounts, {key: value for key, value in self.labels.items() if key not in _UNSHOWN_LABELS})

    def why_not(self, request: Request) -> str | None:
        """What of a request the node, were it empty, does not meet; None where it meets all of it."""
        for key, value in request.labels.items():
            if not meets(self.labels, key, value):
                return key
        return next((name for name, amount in request.resources.items() if not _Free(self).has(name, amount)), None)


@dataclass(frozen=True)
class NodeType:
    """Nodes that an autoscaler may still add: at most so many of them."""

    name: str
    node: Node
    at_most: int


@dataclass(frozen=True)
class Cluster:
    """The nodes that are there, and those that the autoscaler may add: of each type so many, and of all types together
    no more than `at_most_more`."""

    nodes: tuple[Node, ...]
    types: tuple[NodeType, ...] = ()
    at_most_more: int | None = None

    def __str__(self) -> str:
        counted = Counter(map(str, self.nodes))
        shown = "; ".join(f"{count} x ({node})" if count > 1 else node for node, count in counted.items())
        more = [f"up to {kind.at_most} more of {kind.name} ({kind.node})" for kind in self.types if kind.at_most > 0]
        return "; ".join([*([shown] if shown else []), *more]) or "no nodes"

    def pack_slots(self, resources: ResourceSpec) -> int:
        """How many packs run at once beside the model hosts, once the autoscaler has added what it may. Raises
        `SweepError` when not even one does."""
        host, pack = host_request(resources), pack_request(resources)
        self.check(host, pack)
        room = Room(self)
        for index in range(resources.model_hosts):
            if not room.take(host, sparing=pack):
                raise SweepError(
                    f"resources.model_hosts {resources.model_hosts}: the cluster has room for {index} of {host} each; "
                    f"it has {self}"
                )
        slots = room.count(pack)
        if not slots:
            raise SweepError(
                f"resources.cpus_per_pack / gpus_per_pack: no node has {pack} left for a pack beside the "
                f"model hosts; the cluster has {self}"
            )
        return slots

    def check(self, *requests: Request) -> None:
        """Raise `SweepError` for a request that no node of the cluster could ever meet, alone and empty."""
        for request in requests:
            if (reason := self.never(request)) is not None:
                raise SweepError(f"{reason}; the cluster has {self}")

    def never(self, request: Request) -> str | None:
        """Which part of a request no node meets, nor any that may be added, by the spec's field; None where one does.

        Raises nothing: `check` does.
        """
        nodes = self.kinds
        for name, amount in request.resources.items():
            if not any(_Free(node).has(name, amount) for node in nodes):
                most = max((node.resources.get(name, 0.0) for node in nodes), default=0.0)
                has = f"the most that a node has is {most:g}" if most else "no node has any"
                inside = f"{name} " if name not in ("CPU", "GPU") else ""
                return f"{request.field_of(name)}: {inside}{amount:g} for a {request.what}: {has}"
        for key, value in request.labels.items():
            if not any(meets(node.labels, key, value) for node in nodes):
                there = sorted({node.labels[key] for node in nodes if key in node.labels})
                has = f"nodes have {key}: {', '.join(there)}" if there else f"no node has a label {key}"
                return f"resources.{request.noun}_labels: {key}: {value} for a {request.what}: {has}"
        if any(node.why_not(request) is None for node in nodes):
            return None
        if request.labels:
            chosen = [node for node in nodes if matches(node.labels, request.labels)]
            if not chosen:
                return (f"resources.{request.noun}_labels: {_labels(request.labels)} for a {request.what}: no node has "
                        "all of these labels")  # fmt: skip
            for name, amount in request.resources.items():
                if not any(_Free(node).has(name, amount) for node in chosen):
                    most = max(node.resources.get(name, 0.0) for node in chosen)
                    inside = f"{name} " if name not in ("CPU", "GPU") else ""
                    return (f"{request.field_of(name)}: {inside}{amount:g} for a {request.what}: the most that a node "
                            f"with {_labels(request.labels)} has is {most:g}")  # fmt: skip
        names = [name for name, amount in request.resources.items() if amount]
        fields = " / ".join(dict.fromkeys(request.field_of(name) for name in names))
        return f"{fields}: {request} for a {request.what}: no one node has all of it"

    @property
    def kinds(self) -> list[Node]:
        """The nodes that are there and one of each type that may be added."""
        return [*self.nodes, *(kind.node for kind in self.types if kind.at_most > 0 and self.at_most_more != 0)]


class _Free:
    """What is left of a node. GPUs are devices: a part is a part of one of them, and whole ones are wholly free."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.left = {name: amount for name, amount in node.resources.items() if name != "GPU"}
        gpus = node.resources.get("GPU", 0.0)
        part = gpus - int(gpus)  # of what is left of a busy node
        self.devices = [1.0] * int(gpus) + ([part] if part > _EPSILON else [])

    def has(self, name: str, amount: float) -> bool:
        return amount <= 0 or self._times(name, amount) > 0

    def times(self, request: Request) -> int:
        """How often a request fits."""
        if not matches(self.node.labels, request.labels):
            return 0
        return min((self._times(name, value) for name, value in request.resources.items() if value > 0),
                   default=MOST_SLOTS)  # fmt: skip

    def take(self, request: Request) -> bool:
        if not self.times(request):
            return False
        for name, amount in request.resources.items():
            if name == "GPU":
                self._take_devices(amount)
            elif amount > 0:
                self.left[name] -= amount
        return True

    def _times(self, name: str, amount: float) -> int:
        if name != "GPU":
            return int((self.left.get(name, 0.0) + _EPSILON) / amount)
        if amount > 1:
            return int(sum(device >= 1 - _EPSILON for device in self.devices) / amount)
        return sum(int((device + _EPSILON) / amount) for device in self.devices)

    def _take_devices(self, amount: float) -> None:
        if amount <= 0:
            return
        each = min(1.0, amount)
        fullest = sorted(range(len(self.devices)), key=lambda index: self.devices[index])
        for index in [index for index in fullest if self.devices[index] >= each - _EPSILON][: max(1, round(amount))]:
            self.devices[index] -= each


@dataclass
class Room:
    """What is left of a cluster while requests are placed on it, first come first served; nodes are added as they are
    needed and as far as the autoscaler may."""

    cluster: Cluster
    available: Sequence[Node] | None = None  # what is left of the nodes, where some of it is in use
    added: list[str] = field(default_factory=list)  # the types of the nodes that were added

    def __post_init__(self) -> None:
        self.free = [_Free(node) for node in (self.cluster.nodes if self.available is None else self.available)]

    def take_all(self, *requests: Request) -> bool:
        """Place all of the requests, or none."""
        before = [(one, dict(one.left), list(one.devices)) for one in self.free]
        others = [*requests[1:], None]
        if all(self.take(request, other) for request, other in zip(requests, others, strict=False)):
            return True
        for one, left, devices in before:
            one.left, one.devices = left, devices
        del self.added[len(self.added) - (len(self.free) - len(before)) :], self.free[len(before) :]
        return False

    def take(self, request: Request, sparing: Request | None = None) -> bool:
        """Place a request; where there is a choice, on a node where another request does not fit anyway."""
        def rank(one: _Free) -> tuple[bool, bool]:
            return bool(sparing and one.times(sparing)), bool(one.devices) and not request.resources.get("GPU")

        fitting = [one for one in self.free if one.times(request)]
        for one in sorted(fitting, key=rank):  # Ray too keeps what needs no GPU off nodes that have some
            if one.take(request):
                return True
        kinds = [kind for kind in self._addable() if _Free(kind.node).times(request)]
        if not kinds:
            return False
        kind = min(kinds, key=lambda kind: rank(_Free(kind.node)))
        return self._add(kind).take(request)

    def has_room(self, request: Request) -> bool:
        """Whether a request could be placed."""
        return any(one.times(request) for one in self.free) or any(
            _Free(kind.node).times(request) for kind in self._addable()
        )

    def count(self, request: Request) -> int:
        """How often a request fits into what is left, at most `MOST_SLOTS` times; nothing is taken of nodes that are
        there, and what is added for it stays."""
        total = sum(one.times(request) for one in self.free)
        while total < MOST_SLOTS:
            kinds = [(times, kind) for kind in self._addable() if (times := _Free(kind.node).times(request))]
            if not kinds:
                break
            times, kind = max(kinds, key=lambda found: found[0])
            self._add(kind)
            total += times
        return min(total, MOST_SLOTS)

    def _addable(self) -> Iterable[NodeType]:
        limit = self.cluster.at_most_more
        if limit is not None and len(self.added) >= limit:
            return []
        counted = Counter(self.added)
        return [kind for kind in self.cluster.types if counted[kind.name] < kind.at_most]

    def _add(self, kind: NodeType) -> _Free:
        self.added.append(kind.name)
        self.free.append(_Free(kind.node))
        return self.free[-1]


def _shown(resources: Mapping[str, float], labels: Mapping[str, str]) -> str:
    amounts = {"CPU": 0.0, "GPU": 0.0, **resources}
    parts = [f"{amount:g} {name}" for name, amount in amounts.items()]
    return ", ".join([*parts, *([_labels(labels)] if labels else [])])


def _labels(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items())
