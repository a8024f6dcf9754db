"""The model hosts and the stream of one sweep, as its driver holds them. Nobody else creates or ends them."""

import contextlib
import uuid
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from penstock.errors import SweepError
from penstock.identity import code_hash
from penstock.spec import SweepSpec
from penstock.storage import Storage

if TYPE_CHECKING:
    from penstock.actors import StreamConfig

CALL_SECONDS = 60.0


class Fleet:
    """Model hosts, from the start; a stream, once there is something to harvest."""

    def __init__(self, spec: SweepSpec, storage: Storage, say: Callable[[str], None]) -> None:
        self.hosts: dict[str, Any] = {}
        self.stream: Any = None
        self.cost: dict[str, float] = {}
        self._spec, self._storage, self._say = spec, storage, say
        self._leaving: dict[str, Any] = {}
        self._at_most: int | None = None
        self.wanted = 0
        self._told = False  # whether the stream knows of the hosts as they are
        self.incarnation: int | None = None  # of the stream, as far as it has been heard of
        self.restarts = 0  # of the stream
        self._before_restart: dict[str, float] = {}
        self._states: dict[str, str] = {}  # of the hosts, as the stream has told
        self._collecting: Any = None  # a call that is not answered yet: the stream gives what it has only once

    @property
    def hosts_up(self) -> list[Any]:
        """The hosts that answer, by what the stream has told. Others still load the model, wait for room (for ever,
        maybe), or could not be built."""
        up = ("idle", "block")
        return [host for name, host in self.hosts.items() if self._states.get(name, "starting").startswith(up)]

    def scale(self, n_hosts: int) -> None:
        """Have so many model hosts: new ones join when they have loaded the model, others leave after the block at
        hand. There are fewer where they are limited."""
        self.wanted = n_hosts
        self._fit()

    def limit(self, at_most: int | None) -> None:
        """Have no more model hosts than this, however many are wanted; None: as many as are wanted."""
        if at_most != self._at_most:
            self._at_most = at_most
            self._fit()

    def _fit(self) -> None:
        from penstock.actors import NAMESPACE, HostActor, HostConfig

        n_hosts = self.wanted if self._at_most is None else min(self.wanted, self._at_most)
        resources = self._spec.resources
        config = HostConfig(self._spec.model, self._spec.data, self._storage, resources.host_threads, code_hash())
        options = {
            "num_cpus": resources.cpus_per_host,
            "num_gpus": resources.gpus_per_host,
            "resources": dict(resources.host_resources),
            "label_selector": dict(resources.host_labels),
        }
        while len(self.hosts) < n_hosts:
            name = f"host-{uuid.uuid4().hex[:8]}"
            self.hosts[name] = HostActor.options(name=name, namespace=NAMESPACE, **options).remote(config)
        for name in list(self.hosts)[n_hosts:]:
            self._leaving[name] = self.hosts.pop(name)
        self._told = False

    def start_stream(self, config: "StreamConfig") -> None:
        """Raises `SweepError` when this cluster has a stream of that name already."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from penstock.actors import NAMESPACE, StreamActor

        # On the driver's node: another one may be taken away, and without its driver a stream is of no use.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": f"stream-{config.name}", "namespace": NAMESPACE, "scheduling_strategy": here}
        try:
            self.stream = StreamActor.options(**options).remote(config)
        except ValueError:
            raise SweepError(
                f"sweep {config.name} is running on this cluster already; accepted: wait for it, or stop its job first"
            ) from None
        self._tell_hosts()

    def collect(self) -> dict[str, Any] | None:
        """What the stream has for the driver (see `Stream.collect`); None while it is being restarted, or slow: what a
        restart loses of the packs' reports stands in their checkpoints."""
        import ray

        try:
            self._collecting = self._collecting or self.stream.collect.remote()
            found = ray.get(self._collecting, timeout=CALL_SECONDS)
            self._collecting = None
            if found["incarnation"] != self.incarnation:
                if self.incarnation is not None:
                    self._say("the stream was restarted; packs attach again and go on where they stand")
                    self._before_restart = dict(self.cost)
                    self.restarts += 1
                self.incarnation, self._told = found["incarnation"], False
        except ray.exceptions.GetTimeoutError:
            return None
        except ray.exceptions.RayActorError:
            self._collecting = None
            return None
        if self._leaving or not self._told:
            with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
                self._tell_hosts()
        self._states = found["status"]["hosts"]
        self.cost = {name: value + self._before_restart.get(name, 0.0) for name, value in found["cost"].items()}
        return found

    def stop_saes(self, stops: Mapping[str, str]) -> bool:
        """Have SAEs stopped, and why; whether the stream has taken note."""
        import ray

        try:
            ray.get(self.stream.stop_saes.remote(dict(stops)), timeout=CALL_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return False
        return True

    def halt_packs(self, packs: Collection[str] | None, why: str) -> bool:
        """Have packs save and end as they stand, all there are and all to come where None is given; whether the stream
        has taken note. A stream that is restarted has to be told again."""
        import ray

        try:
            ray.get(self.stream.halt.remote(None if packs is None else list(packs), why), timeout=CALL_SECONDS)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return False
        return True

    def close(self) -> None:
        """End them all; calling it again does nothing."""
        import ray

        actors = [*self.hosts.values(), *self._leaving.values(), *([self.stream] if self.stream else [])]
        self.hosts, self._leaving, self.stream = {}, {}, None
        for actor in actors:
            ray.kill(actor)

    def _tell_hosts(self) -> None:
        """Tell the stream which hosts there are, and end those that have left it."""
        import ray

        busy = ray.get(self.stream.set_hosts.remote(list(self.hosts)), timeout=CALL_SECONDS)
        self._told = True
        for name in [name for name in self._leaving if name not in busy]:
            ray.kill(self._leaving.pop(name))
            self._say(f"model host {name} has left")
