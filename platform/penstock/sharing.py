"""A driver's part in sharing a cluster: it tells its stream what the sweep wants, asks the other sweeps' streams, and
keeps to its share. `shares.py` works out the shares."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from penstock.fleet import Fleet
from penstock.placement import Cluster, Room, host_request, pack_request
from penstock.shares import Demand, Generosity, Share, fair_shares
from penstock.spec import SweepSpec

if TYPE_CHECKING:
    from penstock.trial import Trials

LOOK_SECONDS = 3.0
ANSWER_SECONDS = 5.0
STREAM = "stream-"


class Sharing:
    """Of one sweep with the others of its cluster, none of which may be there."""

    def __init__(self, spec: SweepSpec, since: float, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._spec, self._since, self._fleet, self._say = spec, since, fleet, say
        self._sweep_id = ""
        self._looked = float("-inf")
        self._short_since: float | None = None
        self._generosity = Generosity(spec.resources.yield_after_seconds)
        self._share: Share | None = None
        self._names: tuple[str, ...] = ()
        self._said = ""
        self._last: dict[str, Demand] = {}  # what each other stream has said

    @property
    def report(self) -> dict[str, Any]:
        """For the driver's report: packs at once, None where nobody shares, and the other sweeps' names."""
        share = self._share
        return {"slots": None if share is None else share.packs, "sweeps": list(self._names)}

    def begin(self, slots: int) -> int:
        """How many packs the sweep starts with, of `slots` that it could run alone. Where other sweeps are at work, no
        model host is asked for that they have not made room for: a cluster full of hosts runs no pack."""
        others = self._others()
        if not others:
            return slots
        self._fleet.limit(0)
        share = self._share = self._shares(self._mine(packs=slots, live=0), others)[self._sweep_id]
        self._say(f"other sweeps are at work on this cluster: {', '.join(self._names)}; it is shared with them")
        return max(1, min(slots, share.packs))

    def demand(self, sweep_id: str, packs: int) -> dict[str, Any]:
        """What the sweep's stream is to tell the others from its start."""
        self._sweep_id = sweep_id
        return self._mine(packs, live=0).to_json()

    def look(self, trials: "Trials | None", status: Mapping[str, Any], now: bool = False) -> None:
        """See what the others want, keep to the share, and tell them what is wanted here; every few seconds, or `now`.
        `trials` is None where no packs are run."""
        if not now and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        at_work = [pack for pack, about in status.get("packs", {}).items() if about["status"] == "live"]
        packs = trials.left if trials is not None else 0
        others = self._others()
        mine = self._mine(packs, len(at_work))
        if others:
            shares = self._shares(mine, others)
            self._keep_to(shares[self._sweep_id], trials, at_work)
            self._give_back(shares, others, trials, at_work)
            mine = self._mine(packs, len(at_work))
        else:
            self._fleet.limit(None)
            if trials is not None:
                trials.at_most = math.inf
            if self._share is not None:
                self._tell("the cluster is no longer shared with other sweeps")
            self._share, self._short_since = None, None
        self._fleet.stream.set_demand.remote(mine.to_json())

    def _keep_to(self, share: Share, trials: "Trials | None", at_work: list[str]) -> None:
        self._share = share
        lacks = len(at_work) < share.packs or len(self._fleet.hosts_up) < share.hosts
        self._short_since = (self._short_since or time.time()) if lacks else None
        working = bool(at_work) or trials is None
        self._fleet.limit(max(share.hosts, 1) if working else share.hosts)
        if trials is None:
            return
        trials.at_most = share.packs
        if trials.is_full and trials.waiting:  # nobody waits for packs that do not start now
            self._fleet.stream.postpone.remote(trials.waiting)
        names, resources = ", ".join(self._names), self._spec.resources
        if share.packs:
            many = f"{share.packs} of {trials.left} packs at once" if share.packs < trials.left else "all packs at once"
            self._tell(f"sharing the cluster with sweep {names}: {many}")
        elif trials.left:
            self._tell(f"waiting for sweep {names}: beside the least of these, the cluster has no room for a model "
                       f"host ({host_request(resources)}) and a pack ({pack_request(resources)})")  # fmt: skip

    def _give_back(
        self, shares: Mapping[str, Share], others: list[Demand], trials: "Trials | None", at_work: list[str]
    ) -> None:
        # It imports Ray, which may only be done once it is known whose token Ray asks for.
        from penstock.trial import YIELD

        if trials is None:
            return
        room = Room(*self._free()) if len(at_work) > max(1, shares[self._sweep_id].packs) else Room(Cluster(()))
        packs, whom = self._generosity.to_yield(time.time(), shares[self._sweep_id], at_work, others, shares, room)
        if packs and self._fleet.halt_packs(packs, YIELD):
            self._say(f"sweep {whom} waits for its share: {len(packs)} pack(s) are saved, end, and go on when there is "
                      f"room again: {', '.join(packs)}")  # fmt: skip

    def _mine(self, packs: int, live: int) -> Demand:
        resources = self._spec.resources
        return Demand(
            sweep_id=self._sweep_id, name=self._spec.name, since=self._since,
            hosts=self._fleet.wanted or resources.model_hosts, host=host_request(resources),
            packs=packs, pack=pack_request(resources),
            running=live, hosts_up=len(self._fleet.hosts_up), short_since=self._short_since,
        )  # fmt: skip

    def _others(self) -> list[Demand]:
        """What the other sweeps want, by their streams; of one that does not answer now, what it said last."""
        import ray
        from ray.util import list_named_actors

        from penstock.actors import NAMESPACE

        mine = f"{STREAM}{self._sweep_id}"
        asked: dict[Any, str] = {}
        for actor in list_named_actors(all_namespaces=True):
            if actor["namespace"] == NAMESPACE and actor["name"].startswith(STREAM) and actor["name"] != mine:
                try:
                    asked[ray.get_actor(actor["name"], namespace=NAMESPACE).demand.remote()] = actor["name"]
                except (ValueError, AttributeError):  # it has just ended, or is of another release
                    continue
        ready = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_SECONDS)[0] if asked else []
        last, self._last = self._last, {}
        for reference, name in asked.items():
            try:
                record = ray.get(reference) if reference in ready else None
                demand = last.get(name) if record is None else Demand.from_json(record)
            except (ray.exceptions.RayError, KeyError, TypeError):
                continue
            if demand is not None:
                self._last[name] = demand
        found = list(self._last.values())
        found.sort(key=lambda one: (one.since, one.sweep_id))
        self._names = tuple(one.name for one in found)
        return found

    def _shares(self, mine: Demand, others: list[Demand]) -> dict[str, Share]:
        from penstock.cluster import describe_cluster

        return fair_shares(describe_cluster()[0], [mine, *others])

    def _free(self) -> tuple[Cluster, list[Any]]:
        """The cluster, and what of its nodes is in use by nobody."""
        from penstock.cluster import free_nodes, nodes

        return Cluster(tuple(nodes())), free_nodes()

    def _tell(self, message: str) -> None:
        if message and message != self._said:
            self._said = message
            self._say(message)

