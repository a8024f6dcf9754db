"""Every Ray actor of Penstock: thin shells around plain classes.

Each builds everything in `__init__`, so that a restart is a fresh start, and each refuses to run on other source code
than its driver's.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from penstock.calibrations import store_calibrations
from penstock.feature_work import FeatureWork
from penstock.identity import check_code
from penstock.meters import Meters
from penstock.model_host import ModelHost
from penstock.probe import PROBE_TOKENS, Probe
from penstock.sites import Site
from penstock.spec import DataSpec, ModelSpec
from penstock.splits import Split
from penstock.spool import SpooledStream
from penstock.storage import Storage
from penstock.stream import BlockInfo, HostGoneError, Stream
from penstock.stream_state import BlockSet, StreamState
from penstock.subjects import Subject, evaluate_subjects, load_mean, load_subject
from penstock.tokens import TokenStore
from sae_core.evaluation import EvaluationSums

NAMESPACE = "penstock"


@dataclass(frozen=True)
class HostConfig:
    """What a model host needs to build itself."""

    model: ModelSpec
    data: DataSpec
    storage: Storage
    threads: int
    code: str


@ray.remote(max_restarts=-1, max_task_retries=0)
class HostActor:
    """A model host: makes blocks, and evaluates SAEs between them."""

    def __init__(self, config: HostConfig) -> None:
        check_code(config.code)
        self._config = config
        self._host = ModelHost(config.model, threads=config.threads)
        self._stores: dict[str, TokenStore] = {}
        self._subjects: dict[Subject, Any] = {}
        self._saes: dict[str, Any] = {}

    def ping(self) -> bool:
        return True

    def harvest(self, source: "Source", block: int, arrays: Sequence[str]) -> Any:
        """The arrays of the block by these names, one return value each, and a `BlockInfo` last."""
        started, passes = time.perf_counter(), self._host.forward_passes
        spool = source.spool
        if spool is not None and all(spool.has(name, block) for name in arrays):
            # Another sweep over the same activations has put it there meanwhile.
            return *(None for _ in arrays), BlockInfo(0, 0, time.perf_counter() - started, from_spool=True)
        made = self._host.harvest(self._store(source.tokens_id), self._config.data, block, arrays)
        if block == 0:
            store_calibrations(self._config.storage, source.calibration_folder, made, self._config.model.dtype)
        spooled, notice = self._spool(spool, block, made)
        info = BlockInfo(
            tokens=len(next(iter(made.values()))),
            forward_passes=self._host.forward_passes - passes,
            seconds=time.perf_counter() - started,
            spooled=spooled,
            notice=notice,
            spool_bytes=spool.held_bytes if spool is not None else None,
        )
        return *(made[name] for name in arrays), info

    def _spool(
        self, spool: SpooledStream | None, block: int, made: Mapping[str, np.ndarray]
    ) -> tuple[tuple[str, ...], str | None]:
        """Put a block's arrays into the spool: (which of them lie there now, what the user should know)."""
        if spool is None:
            return (), None
        for name, array in made.items():
            spool.write(name, block, array, self._config.model.dtype)
        there = tuple(name for name in made if spool.has(name, block))
        full = len(there) < len(made)
        return there, f"the spool takes no more blocks: {spool.full}; training goes on" if full else None

    def make_probe(self, tokens_id: str, probe: Probe, arrays: Sequence[str]) -> None:
        """Put the search activations that SAEs are compared on into storage."""
        missing = [array for array in arrays if not probe.is_there(self._config.storage, [array])]
        found = self._host.sample(self._store(tokens_id), self._config.data, "search", PROBE_TOKENS, missing)
        for array, activations in found.items():
            probe.store(self._config.storage, array, activations)

    def evaluate(
        self, tokens_id: str, site: Site, subjects: Sequence[Subject], split: Split, start_row: int, stop_row: int,
        mean: str | None = None,
    ) -> dict[str, EvaluationSums]:  # fmt: skip
        """Sums over a slice of a split, for SAEs and baselines of one site. `mean` names the calibration whose mean
        stands for an ablated activation, in place of zeros."""
        for subject in subjects:
            if subject not in self._subjects:
                self._subjects[subject] = load_subject(subject, self._config.storage)
        loaded = {subject: self._subjects[subject] for subject in subjects}
        ablation = None if mean is None else load_mean(self._config.storage, mean)
        return evaluate_subjects(
            self._host, self._store(tokens_id), self._config.data, site, loaded, split, start_row, stop_row, ablation
        )

    def features(self, work: FeatureWork, saes: Mapping[str, Any], limits: Any = None) -> Any:
        """A piece of work for feature dashboards; `saes` are references to SAEs by name, fetched when first needed."""
        for name in work.names:
            if name not in self._saes:
                self._saes[name] = ray.get(saes[name]).to(self._host.device)
        return work.run(self._host, self._store(work.tokens_id), self._config.data, self._saes, limits)

    def _store(self, tokens_id: str) -> TokenStore:
        if tokens_id not in self._stores:
            self._stores[tokens_id] = TokenStore.open(self._config.storage, tokens_id)
        return self._stores[tokens_id]


@dataclass(frozen=True)
class Source:
    """Where a stream's blocks come from, and where else they lie."""

    tokens_id: str
    calibration_folder: str
    spool: SpooledStream | None = None


@dataclass(frozen=True)
class StreamConfig:
    """What the stream needs to build itself, at its start and after a restart."""

    name: str
    source: Source
    n_blocks: int
    window: int
    waves: tuple[Mapping[str, tuple[str, ...]], ...]  # pack id -> arrays
    cursors: Mapping[str, int]
    lease_seconds: float
    code: str
    demand: Mapping[str, Any] | None = None  # what the sweep wants of the cluster, see `shares.Demand`


class _RayHost:
    """A host as the stream sees it."""

    def __init__(self, name: str, source: Source) -> None:
        # By name: a handle would be lost with the driver's object store when the actor restarts.
        self._name = name
        self._handle: Any = None
        self._source = source

    async def harvest(self, block: int, arrays: Sequence[str]) -> tuple[dict[str, Any], BlockInfo]:
        method = self._handle.harvest.options(num_returns=len(arrays) + 1)
        *objects, info = method.remote(self._source, block, arrays)
        return dict(zip(arrays, objects, strict=True)), await info

    async def wait_until_up(self) -> None:
        while True:
            try:
                self._handle = self._handle or ray.get_actor(self._name, namespace=NAMESPACE)
                await self._handle.ping.remote()
                return
            except (ray.exceptions.ActorDiedError, ValueError) as error:
                # A killed host is restarted; this one failed to build, perhaps before this stream began.
                raise HostGoneError(str(error)) from None
            except ray.exceptions.RayError:
                await asyncio.sleep(1.0)

    def kill(self) -> None:
        ray.kill(self._handle, no_restart=False)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class StreamActor:
    """The stream of a sweep: owns the blocks, hands them out. Its name is the lock on the sweep."""

    def __init__(self, config: StreamConfig) -> None:
        check_code(config.code)
        self._config = config
        self._demand = config.demand
        self._incarnation = time.time_ns()
        arrays = sorted({name for wave in config.waves for names in wave.values() for name in names})
        spool, blocks = config.source.spool, config.n_blocks
        spooled = {
            name: BlockSet(blocks, (block for block in spool.blocks(name) if block < blocks)) for name in arrays
        } if spool else None  # fmt: skip
        state = StreamState(blocks, config.window, spooled=spooled, lease_seconds=config.lease_seconds)
        self._stream = Stream(state)
        restarted = ray.get_runtime_context().was_current_actor_reconstructed
        limit = spool.spool.limit_bytes if spool else None
        self._meters = Meters(config.name, spool_limit_bytes=limit, restarted=restarted)
        self._tasks: list[asyncio.Task[None]] = []
        if restarted:
            # Who is still there attaches again, and where each stands only it knows.
            print("the stream has been restarted; packs attach again, blocks are made again", flush=True)
            return
        for cohort, packs in enumerate(config.waves):
            state.expect(packs, cohort, config.cursors)
        if config.waves:
            state.open_cohort(0, time.monotonic())

    async def set_hosts(self, names: Sequence[str]) -> list[str]:
        """From now on these hosts make the blocks; the names of others that are still at one. Calling it again changes
        nothing."""
        if not self._tasks:
            self._tasks = [asyncio.ensure_future(self._stream.pump()), asyncio.ensure_future(self._measure())]
        known = self._stream.hosts
        return await self._stream.set_hosts(
            {name: known.get(name) or _RayHost(name, self._config.source) for name in names}
        )

    async def attach(self, pack_id: str, arrays: Sequence[str], cursor: int, run: int) -> None:
        await self._stream.attach(pack_id, arrays, cursor, run)

    async def detach(self, pack_id: str, run: int) -> None:
        await self._stream.detach(pack_id, run)

    async def next_block(self, pack_id: str, block: int, run: int) -> dict[str, Any] | None:
        return await self._stream.next_block(pack_id, block, run)

    async def acknowledge(self, pack_id: str, block: int, run: int) -> None:
        await self._stream.acknowledge(pack_id, block, run)

    async def forget(self, pack_id: str, block: int, arrays: Sequence[str], reason: str) -> None:
        await self._stream.forget(pack_id, block, arrays, reason)

    async def report(
        self, pack_id: str, events: Sequence[dict[str, Any]], about: Mapping[str, float], pause_seconds: float, run: int
    ) -> dict[str, Any]:
        return await self._stream.report(pack_id, events, about, pause_seconds, run)

    async def stop_saes(self, stops: Mapping[str, str]) -> None:
        """Have these SAEs stopped, and why; calling it again adds to them."""
        self._stream.stops |= stops

    async def halt(self, packs: Sequence[str] | None, why: str) -> None:
        """Have packs save and end, all where None is given; calling it again changes nothing."""
        await self._stream.halt(packs, why)

    async def halted(self, pack_id: str, run: int) -> str | None:
        return self._stream.halted(pack_id, run)

    async def postpone(self, packs: Sequence[str]) -> None:
        await self._stream.postpone(packs)

    async def set_demand(self, demand: Mapping[str, Any]) -> None:
        self._demand = demand

    async def demand(self) -> Mapping[str, Any] | None:
        """What the sweep wants of the cluster: for the drivers of other sweeps."""
        return self._demand

    async def collect(self) -> dict[str, Any]:
        return {"incarnation": self._incarnation, **await self._stream.collect()}

    async def _measure(self) -> None:
        """Show Ray's metrics agent how things stand, about once a second."""
        while True:
            self._meters.update(self._stream)
            await asyncio.sleep(1.0)
