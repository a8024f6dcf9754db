"""How several sweeps share one cluster: pure functions, no Ray, no clock.

Every driver knows the others' demands (their streams tell them) and works out the same shares from them; nobody has to
agree with anybody. A sweep keeps to its share when it starts packs, and gives packs back when another waits for them.

The rule: in the order of their beginning every sweep is given room for one model host and one pack; then the other
model hosts, one each in turns; then packs, one each in turns, until nothing fits or nobody wants more. So nobody has
two packs more than a sweep that wants one more and could place it (max-min fairness), and a sweep for which there is no
room beside the earlier ones' least waits its turn.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from penstock.placement import Cluster, Request, Room

WAITED_SECONDS = 30.0  # that a sweep has been short of its share, until others give packs back for it


@dataclass(frozen=True)
class Demand:
    """What a sweep wants of the cluster, and what it has.

    Args:
        since: when it began, seconds since the epoch.
        hosts, packs: that it could use now; packs that run are among them.
        running: packs that are at work.
        hosts_up: model hosts that answer.
        short_since: since when it has had less than its share; None where it has that.
    """

    sweep_id: str
    name: str
    since: float
    hosts: int
    host: Request
    packs: int
    pack: Request
    running: int = 0
    hosts_up: int = 0
    short_since: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "host": _plain(self.host), "pack": _plain(self.pack)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Demand":
        """What another driver has said, which may know more of demands than this one. Raises `KeyError`,
        `TypeError`."""
        known = {one.name for one in fields(cls)} & record.keys()
        requests = {noun: Request(noun, **record[noun]) for noun in ("host", "pack")}
        return cls(**{**{name: record[name] for name in known}, **requests})


@dataclass(frozen=True)
class Share:
    """Model hosts and packs that a sweep may have at once. With none of either it waits its turn."""

    hosts: int = 0
    packs: int = 0


def fair_shares(cluster: Cluster, demands: Iterable[Demand]) -> dict[str, Share]:
    """The share of every sweep, by its id: the same whoever asks, in whatever order the demands come."""
    order = sorted(demands, key=lambda one: (one.since, one.sweep_id))
    room = Room(cluster)
    hosts, packs = dict.fromkeys((one.sweep_id for one in order), 0), dict.fromkeys((one.sweep_id for one in order), 0)
    admitted = []
    for one in order:
        least = [*([one.host] if one.hosts else []), *([one.pack] if one.packs else [])]
        if room.take_all(*least):
            hosts[one.sweep_id], packs[one.sweep_id] = min(1, one.hosts), min(1, one.packs)
            admitted.append(one)
    _in_turns(room, hosts, [(one.sweep_id, one.host, one.hosts) for one in admitted])
    _in_turns(room, packs, [(one.sweep_id, one.pack, one.packs) for one in admitted])
    return {sweep_id: Share(hosts[sweep_id], packs[sweep_id]) for sweep_id in hosts}


def _in_turns(room: Room, given: dict[str, int], wanted: Sequence[tuple[str, Request, int]]) -> None:
    """Give one more to whoever has least and can place it, the first of those that have equally many."""
    left = [one for one in wanted if given[one[0]] < one[2]]  # in the order of their beginning
    while left:
        one = min(left, key=lambda one: given[one[0]])  # the first of equals
        sweep_id, request, most = one
        if room.take(request):
            given[sweep_id] += 1
        if given[sweep_id] >= most or not room.has_room(request):
            left.remove(one)


@dataclass
class Generosity:
    """When a sweep gives packs back that are beyond its share: state of one driver. `seconds` pass between two times
    that it does, and from a pack's start until it may have to go."""

    seconds: float
    since: dict[str, float] = field(default_factory=dict)  # packs at work -> when they were first seen so
    last: float = float("-inf")

    def to_yield(
        self,
        now: float,
        share: Share,
        at_work: Sequence[str],
        others: Iterable[Demand],
        shares: Mapping[str, Share],
        room: Room,
    ) -> tuple[list[str], str]:
        """(the packs to give back now, for which sweep). Those that began last go first, the last one never.

        A sweep is given to only if it has been short of its share for a while (`WAITED_SECONDS`) and what it lacks does
        not fit into `room`, what is free now.
        """
        self.since = {pack: self.since.get(pack, now) for pack in at_work}
        excess = len(at_work) - max(1, share.packs)
        if excess <= 0 or now - self.last < self.seconds:
            return [], ""
        patience = min(WAITED_SECONDS, self.seconds)
        waiting = [one for one in others if _waits(one, shares[one.sweep_id], now, patience, room)]
        if not waiting:
            return [], ""
        old_enough = [pack for pack in at_work if now - self.since[pack] >= self.seconds]
        youngest = sorted(old_enough, key=lambda pack: (self.since[pack], pack), reverse=True)[:excess]
        if youngest:
            self.last = now
        return youngest, min(waiting, key=lambda one: (one.since, one.sweep_id)).name


def _waits(one: Demand, share: Share, now: float, patience: float, room: Room) -> bool:
    """Whether a sweep really waits for somebody: it is short of its share, has been for a while, and nothing is free
    that it could take."""
    if one.short_since is None or now - one.short_since < patience:
        return False
    lacks_host, lacks_pack = one.hosts_up < share.hosts, one.running < share.packs
    fits = [room.has_room(request) for request, lacks in ((one.host, lacks_host), (one.pack, lacks_pack)) if lacks]
    return bool(fits) and not all(fits)


def _plain(request: Request) -> dict[str, Any]:
    return {"resources": dict(request.resources), "labels": dict(request.labels)}
