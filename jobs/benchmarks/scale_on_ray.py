"""What `scale.py` measures: emulated nodes, hosts that only take their time, packs that only read and take theirs, and
between them the stream's own actor, client and objects.

Importing this imports Ray, which reads its settings then. Light otherwise: every host and pack is a process.
"""

import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
from ray._private import internal_api
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from penstock.consumer import StreamClient
from penstock.stream import BlockInfo

ARRAY = "blocks.12.hook_resid_post"
WIDTH = 2304  # of a row of a block, 2 bytes each: bfloat16 travels so
POLL_SECONDS = 0.5  # as often as a sweep's driver asks
TURN_SECONDS = 0.05  # a pack says that it lives as often as it makes a step or so


@dataclass(frozen=True)
class Regime:
    """What a run is like. `warm_up` and `measured` are blocks a node; `per_node` False: blocks of the whole sweep."""

    name: str
    harvest_seconds: float
    step_seconds: float
    block_bytes: int
    window: int
    warm_up: int
    measured: int
    per_node: bool

    def blocks(self, n_nodes: int) -> tuple[int, int]:
        """The first block whose end is counted, and the last."""
        times = n_nodes if self.per_node else 1
        return self.warm_up * times - 1, (self.warm_up + self.measured) * times - 1


@dataclass(frozen=True)
class Run:
    """Figures of a run. Rates are blocks a second, between the ends of two blocks. The stream's actor: `actor_cores`,
    its CPU seconds a second, `busiest_thread` that of one thread of it, and its resident memory. `wait_seconds`: of a
    pack, a block, from when it asks for the bytes until it has them. `moved_mb`: a second, what is written to all
    object stores, blocks and their copies; `written_mb_a_block`: that of a block and all its copies."""

    made: float
    trained: float
    hand_outs: float
    actor_cores: float
    busiest_thread: float
    actor_mb: float
    wait_seconds: float
    moved_mb: float
    written_mb_a_block: float

    def figures(self) -> dict[str, float]:
        return vars(self)


class TimedHost:
    """A model host whose harvest takes as long as it is told, and whose block is one array with the block's number in
    its first row."""

    def __init__(self) -> None:
        self._seconds, self._array = 0.0, np.zeros((2, WIDTH), np.uint16)
        self._ended: dict[int, float] = {}

    def ping(self) -> bool:
        return True

    def set_up(self, seconds: float, n_bytes: int) -> None:
        self._seconds, self._array, self._ended = seconds, content(n_bytes), {}

    def ended(self) -> dict[int, float]:
        """When each block was made."""
        return self._ended

    def harvest(self, source: Any, block: int, arrays: Sequence[str]) -> Any:
        begun = time.monotonic()
        self._array[0] = block
        time.sleep(max(0.0, self._seconds - (time.monotonic() - begun)))
        self._ended[block] = time.monotonic()
        return *(self._array for _ in arrays), BlockInfo(len(self._array), 1, self._seconds)


class TimedPack:
    """A pack whose training on a block takes as long as it is told; it reads every byte of it first."""

    def ping(self) -> bool:
        return True

    def read(
        self, stream: Any, pack_id: str, n_blocks: int, seconds: float, n_bytes: int
    ) -> tuple[list[float], list[float]]:
        """When each block was used up, and how long it was waited for."""
        client = StreamClient(stream, pack_id, [ARRAY], 1)
        expected, ended, waited = _checksum(content(n_bytes)), [], []
        for block, arrays in client.blocks(0, n_blocks):
            begun = time.monotonic()
            waited.append(client.about["wait_seconds"])
            array = arrays.pop(ARRAY)
            if array[0, 0] != block % 2**16 or _checksum(array) != expected:
                raise SystemExit(f"block {block} is not what was made")
            del array
            while (left := begun + seconds - time.monotonic()) > 0:
                time.sleep(min(left, TURN_SECONDS))
                client.keep_alive()
            ended.append(time.monotonic())
        client.close()
        return ended, [after - before for before, after in zip([0.0, *waited], waited, strict=False)]

    def copy(self, reference: list[Any]) -> float:
        """Seconds until an object of another node is on this one."""
        begun = time.monotonic()
        ray.get(reference[0])
        return time.monotonic() - begun


def content(n_bytes: int) -> np.ndarray:
    """uint16 [rows, WIDTH], the same in every process."""
    rows = max(2, round(n_bytes / (2 * WIDTH)))
    return np.random.default_rng(0).integers(0, 2**16, (rows, WIDTH), np.uint16)


def _checksum(array: np.ndarray) -> int:
    """Of all rows but the first, which holds the number."""
    return int(np.bitwise_xor.reduce(array[1:].reshape(-1).view(np.uint64)))


class EmulatedCluster:
    """A head, where the driver and the stream are, and nodes with a host and a pack each, all on this machine. Every
    node is there in every run: what they cost when idle is the same in all of them."""

    def __init__(self, n_nodes: int, store_bytes: int) -> None:
        self.store_bytes = store_bytes
        begun = time.monotonic()
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False,
                            "dashboard_port": _free_port()},  # its server is started all the same
        )  # fmt: skip
        nodes = [
            self._cluster.add_node(wait=False, num_cpus=1, object_store_memory=store_bytes, include_dashboard=False)
            for _ in range(n_nodes)
        ]
        self._cluster.wait_for_nodes()
        ray.init(address=self._cluster.address, namespace="penstock", log_to_driver=False, logging_level="ERROR")
        self.start_seconds = time.monotonic() - begun
        # Importing this imports torch, and needs Ray's settings in the environment.
        from penstock.actors import StreamActor

        self._stream_actor = StreamActor
        self._runs = 0
        self.hosts, self.packs = [], []
        for index, node in enumerate(nodes):
            here = {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node.node_id, soft=False)}
            named = {"name": f"host-{index}", "namespace": "penstock"}
            self.hosts.append(ray.remote(TimedHost).options(**here, **named).remote())
            self.packs.append(ray.remote(TimedPack).options(**here).remote())
        ray.get([actor.ping.remote() for actor in [*self.hosts, *self.packs]])

    def copy_rate(self, n_bytes: int, repeats: int) -> float:
        """Bytes a second of one object from one node's store to another's, nothing else going on; the median."""
        host, pack, seconds = self.hosts[0], self.packs[1], []
        ray.get(host.set_up.remote(0.0, n_bytes))
        for _ in range(repeats + 1):  # a store's memory is made by whoever writes to it first
            reference, about = host.harvest.options(num_returns=2).remote(None, 0, [ARRAY])
            ray.get(about)
            seconds.append(ray.get(pack.copy.remote([reference])))
        return n_bytes / statistics.median(seconds[1:])

    def close(self) -> None:
        ray.shutdown()
        self._cluster.shutdown()

    def run(self, regime: Regime, n_nodes: int) -> Run:
        from penstock.actors import Source, StreamConfig
        from penstock.identity import code_hash

        self._runs += 1
        first, last = regime.blocks(n_nodes)
        pack_ids = [f"pack-{index}" for index in range(n_nodes)]
        config = StreamConfig(
            name=f"scale-{self._runs}", source=Source("", ""), n_blocks=last + 1, window=regime.window,
            waves=({pack_id: (ARRAY,) for pack_id in pack_ids},), cursors={}, lease_seconds=60.0, code=code_hash(),
        )  # fmt: skip
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        stream = self._stream_actor.options(
            name=f"stream-{config.name}", namespace="penstock", scheduling_strategy=here
        ).remote(config)
        try:
            ray.get([host.set_up.remote(regime.harvest_seconds, regime.block_bytes) for host in self.hosts])
            ray.get(stream.collect.remote())
            process, samples = _actor_process(), []
            stores = [_bytes_written()]
            ray.get(stream.set_hosts.remote([f"host-{index}" for index in range(n_nodes)]))
            reads = [
                pack.read.remote(stream, pack_id, last + 1, regime.step_seconds, regime.block_bytes)
                for pack, pack_id in zip(self.packs, pack_ids, strict=False)
            ]
            left = reads
            while left:
                samples.append(_sample(process))
                _, left = ray.wait(left, num_returns=len(left), timeout=POLL_SECONDS)
                ray.get(stream.collect.remote())
            samples.append(_sample(process))
            stores.append(_bytes_written())
            read = ray.get(reads)
            made = sorted(end for host in self.hosts[:n_nodes] for end in ray.get(host.ended.remote()).values())
        finally:
            ray.kill(stream)
        ends = [max(of_pack[block] for of_pack, _ in read) for block in range(last + 1)]  # of the slowest pack
        begun, ended = ends[first], ends[last]
        rate = (last - first) / (ended - begun)
        before = [one for one in samples if one["time"] <= begun][-1]
        after = next(one for one in samples if one["time"] >= ended)
        passed = after["time"] - before["time"]
        written_mb = (stores[1] - stores[0]) / (last + 1) / 1e6
        threads = [cpu - before["threads"].get(thread, 0.0) for thread, cpu in after["threads"].items()]
        return Run(
            made=(last - first) / (made[last] - made[first]),
            trained=rate,
            hand_outs=rate * n_nodes,
            actor_cores=(after["cpu"] - before["cpu"]) / passed,
            busiest_thread=max(threads) / passed,
            actor_mb=max(one["rss"] for one in samples) / 1e6,
            wait_seconds=statistics.mean(wait for _, waited in read for wait in waited[first + 1 : last + 1]),
            moved_mb=rate * written_mb,
            written_mb_a_block=written_mb,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _actor_process() -> psutil.Process:
    """The stream's actor: of those of earlier runs none is left, or it is older."""
    found = []
    for process in psutil.Process(os.getpid()).children(recursive=True):
        try:
            if " ".join(process.cmdline()).startswith("ray::StreamActor"):
                found.append((process.create_time(), process.pid, process))
        except psutil.Error:
            continue
    return max(found)[2]


def _sample(process: psutil.Process) -> dict[str, Any]:
    with process.oneshot():
        cpu = process.cpu_times()
        return {
            "time": time.monotonic(), "cpu": cpu.user + cpu.system, "rss": process.memory_info().rss,
            "threads": {one.id: one.user_time + one.system_time for one in process.threads()},
        }  # fmt: skip


def _bytes_written() -> int:
    """All that was ever created in the nodes' object stores, by their own count."""
    written = 0
    for node in ray.nodes():
        address = node["NodeManagerAddress"], node["NodeManagerPort"]
        written += internal_api.node_stats(*address, include_memory_info=False).store_stats.cumulative_created_bytes
    return written
