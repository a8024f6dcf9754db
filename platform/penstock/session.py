"""What every driver begins with: a Ray, the token store, and model hosts."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from penstock.errors import SweepError
from penstock.fleet import Fleet
from penstock.home import Home
from penstock.live_cluster import may_grow
from penstock.models import describe_model
from penstock.placement import MOST_SLOTS, Cluster, Node
from penstock.plan import PlannedPack, memory_of_block, read_sweep
from penstock.redaction import redacted
from penstock.resolved import ResolvedSweep
from penstock.spec import SweepSpec
from penstock.storage import Storage
from penstock.text import last_line
from penstock.tokens import TokenStore, build_token_store

WINDOW_SHARE = 0.3  # of the smallest object store
WINDOW_LIMITS = (2, 8)  # blocks


def this_machine() -> Cluster:
    import torch

    return Cluster((Node({"CPU": os.cpu_count() or 1, "GPU": torch.cuda.device_count()}),))


def window_of(store_bytes: float, block_bytes: float, model_hosts: int) -> int:
    """Blocks of a window: as many as a share of an object store holds, within limits, and for more hosts than a few two
    each: one that it makes, one that still waits for its readers."""
    least, most = WINDOW_LIMITS
    return int(min(max(store_bytes * WINDOW_SHARE // block_bytes, least), max(most, 2 * model_hosts)))


class Session:
    """A spec (a file's path, or one that has been read), and the cluster it runs on. `sweep` and `slots` (how many
    packs run at once) are there once `join` is done; alone on the cluster it would run `most_slots`."""

    sweep: ResolvedSweep
    slots: int
    most_slots: int

    def __init__(self, spec: str | Path | SweepSpec, home: Home) -> None:
        self._started = time.time()
        self.spec, self.model = (
            (spec, describe_model(spec.model)) if isinstance(spec, SweepSpec) else read_sweep(spec)
        )
        self.home = home
        self.storage = Storage(home.storage_uri(self.spec.storage))
        self.fleet = Fleet(self.spec, self.storage, self.say)
        self._own_ray = self._joined = False
        self._store_bytes = 0

    def say(self, message: str) -> None:
        print(redacted(f"[{time.time() - self._started:6.1f} s] {message}"), flush=True)

    def join(self, address: str | None) -> None:
        """Join the cluster, or start a local Ray, boot the model hosts and fill the token store."""
        from penstock.cluster import connect, describe_cluster, map_on_cluster

        local = address is None and "RAY_ADDRESS" not in os.environ
        if local:
            this_machine().pack_slots(self.spec.resources)  # refused before Ray is started for nothing
        self.say(f"sweep {self.spec.name}: " + ("starting Ray" if local else "joining the Ray cluster"))
        with ThreadPoolExecutor(1) as beside:
            # A local Ray takes seconds to start in processes of its own; the tokens are read meanwhile.
            store = beside.submit(self._build_store) if local else None
            self._own_ray = connect(address)
            self._joined = True
            self._connected()
            if not local:
                self._free_what_is_left_behind()
            cluster, self._store_bytes = describe_cluster()
            if not local and (len(cluster.nodes) > 1 or cluster.types or may_grow(cluster)):
                self._refuse_local_paths()
            self.most_slots = self.slots = self._count_slots(cluster)
            self._make_room()
            self.fleet.scale(self.spec.resources.model_hosts)
            self.say(f"{len(self.fleet.hosts)} model host(s) booting")
            built = store.result() if store else self._build_store(parallel_map=map_on_cluster)
        self.sweep = ResolvedSweep(self.spec, self.model, built, self.storage, self.home)

    def window(self, packs: list[PlannedPack]) -> int:
        """How many blocks may stand in the object store beyond the slowest consumer."""
        block = max(1, memory_of_block(self.spec, self.model, packs))
        return window_of(self._store_bytes, block, self.spec.resources.model_hosts)

    def close(self) -> None:
        """Stop what was started."""
        if self._joined:
            import ray

            self.fleet.close()
            ray.shutdown()

    def _connected(self) -> None:
        """As soon as Ray is there."""

    def _free_what_is_left_behind(self) -> None:
        from penstock.cluster import free_what_dead_jobs_hold

        try:
            freed = free_what_dead_jobs_hold()
        except Exception as error:  # it is Ray's to know; without an answer the sweep starts all the same
            self.say(f"what dead jobs may hold of the cluster cannot be looked at ({last_line(error)})")
        else:
            if freed:
                self.say(f"{freed} placement group(s) of jobs that are dead are freed")

    def _make_room(self) -> None:
        """Before the first model host is asked for."""

    def _count_slots(self, cluster: Cluster) -> int:
        """How many packs run at once, with nodes that the autoscaler adds. Raises `SweepError` when not even one ever
        does; where it is not known what may be added that is for Ray to find out."""
        resources = self.spec.resources
        there = Cluster(cluster.nodes)
        try:
            there.pack_slots(resources)
        except SweepError as error:
            unknown = may_grow(cluster) and not cluster.types
            slots = MOST_SLOTS if unknown else cluster.pack_slots(resources)
            self.say(f"waiting for the autoscaler: {error}" + ("; what may be added is not known here" * unknown))
            return slots
        return MOST_SLOTS if may_grow(cluster) and not cluster.types else cluster.pack_slots(resources)

    def _build_store(self, **parallel: Any) -> TokenStore:
        return build_token_store(
            self.spec.data, self.spec.model, self.spec.train, self.storage, progress=self.say, **parallel
        )

    def _refuse_local_paths(self) -> None:
        data = self.spec.data
        places = {"storage": self.storage.uri, "data.spool": data.spool, "data.activations": data.activations}
        for field, place in places.items():
            if place not in (None, "off") and "://" not in place:
                raise SweepError(
                    f"{field} {place!r} is a path of one machine, and this cluster has several nodes; accepted: a URI "
                    "that every node reaches (s3://..., gs://...), file:///... for a file system that all nodes mount"
                )
