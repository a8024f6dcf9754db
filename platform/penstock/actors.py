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
from safetensors.torch import save as save_tensors

from penstock.activations import from_wire
from penstock.identity import check_code
from penstock.model_host import ModelHost
from penstock.sites import Site
from penstock.spec import DataSpec, ModelSpec
from penstock.splits import Split
from penstock.storage import Storage
from penstock.stream import BlockInfo, HostGoneError, Stream, StreamState
from penstock.subjects import Subject, load_subject
from penstock.tokens import TokenStore
from sae_core import calibrate
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

    def ping(self) -> bool:
        return True

    def harvest(self, tokens_id: str, calibration_folder: str, block: int, hook_points: Sequence[str]) -> Any:
        """The arrays of the block by these names, one return value each, and a `BlockInfo` last."""
        started, passes = time.perf_counter(), self._host.forward_passes
        arrays = self._host.harvest(self._store(tokens_id), self._config.data, block, hook_points)
        if block == 0:
            self._calibrate(arrays, calibration_folder)
        tokens = len(next(iter(arrays.values())))
        info = BlockInfo(tokens, self._host.forward_passes - passes, time.perf_counter() - started)
        return *(arrays[name] for name in hook_points), info

    def evaluate(
        self, tokens_id: str, site: Site, subjects: Sequence[Subject], split: Split, start_row: int, stop_row: int
    ) -> dict[str, EvaluationSums]:
        """Sums over a slice of a split, for SAEs and baselines of one site."""
        for subject in subjects:
            if subject not in self._subjects:
                self._subjects[subject] = load_subject(subject, self._config.storage)
        saes, bases = (
            {subject.name: self._subjects[subject] for subject in subjects if (subject.basis is not None) == is_basis}
            for is_basis in (False, True)
        )
        return self._host.evaluate_site(
            self._store(tokens_id), self._config.data, site, saes, bases, split, start_row, stop_row
        )

    def _store(self, tokens_id: str) -> TokenStore:
        if tokens_id not in self._stores:
            self._stores[tokens_id] = TokenStore.open(self._config.storage, tokens_id)
        return self._stores[tokens_id]

    def _calibrate(self, arrays: Mapping[str, np.ndarray], folder: str) -> None:
        """Once an array, from block 0, stored by content: every pack uses the same numbers, early or late."""
        for name, array in arrays.items():
            file = f"{folder}/{name}.safetensors"
            if not self._config.storage.exists(file):
                calibration = calibrate(from_wire(array, self._config.model.dtype))
                self._config.storage.write(file, save_tensors(calibration.to_tensors()))


@dataclass(frozen=True)
class StreamConfig:
    """What the stream needs to build itself, at its start and after a restart."""

    tokens_id: str
    calibration_folder: str
    n_blocks: int
    window: int
    waves: tuple[Mapping[str, tuple[str, ...]], ...]  # pack id -> hook points
    cursors: Mapping[str, int]
    hosts: tuple[str, ...]  # names: a handle would be lost with the driver's object store when the actor restarts
    code: str


class _RayHost:
    """A host as the stream sees it."""

    def __init__(self, name: str, config: StreamConfig) -> None:
        self._handle = ray.get_actor(name, namespace=NAMESPACE)
        self._config = config

    async def harvest(self, block: int, hook_points: Sequence[str]) -> tuple[dict[str, Any], BlockInfo]:
        method = self._handle.harvest.options(num_returns=len(hook_points) + 1)
        *objects, info = method.remote(self._config.tokens_id, self._config.calibration_folder, block, hook_points)
        return dict(zip(hook_points, objects, strict=True)), await info

    async def wait_until_up(self) -> None:
        while True:
            try:
                await self._handle.ping.remote()
                return
            except ray.exceptions.ActorDiedError as error:  # a killed host is restarted; this one failed to build
                raise HostGoneError(str(error)) from None
            except ray.exceptions.RayError:
                await asyncio.sleep(1.0)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0, max_concurrency=1000)
class StreamActor:
    """The stream of a sweep: owns the blocks, hands them out. Its name is the lock on the sweep."""

    def __init__(self, config: StreamConfig) -> None:
        check_code(config.code)
        state = StreamState(config.n_blocks, config.window, len(config.hosts))
        for cohort, packs in enumerate(config.waves):
            state.expect(packs, cohort, config.cursors)
        if config.waves:
            state.open_cohort(0, time.monotonic())
        self._stream = Stream(state, [_RayHost(name, config) for name in config.hosts])
        self._pump: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to make blocks; every call of a consumer does so as well, in case the actor was restarted."""
        if self._pump is None or self._pump.done():
            self._pump = asyncio.ensure_future(self._stream.pump())

    async def attach(self, pack_id: str, cursor: int) -> None:
        await self.start()
        await self._stream.attach(pack_id, cursor)

    async def detach(self, pack_id: str) -> None:
        await self._stream.detach(pack_id)

    async def next_block(self, pack_id: str, block: int) -> dict[str, Any] | None:
        return await self._stream.next_block(pack_id, block)

    async def acknowledge(self, pack_id: str, block: int) -> None:
        await self._stream.acknowledge(pack_id, block)

    async def forget(self, pack_id: str, block: int) -> None:
        await self._stream.forget(pack_id, block)

    async def report(self, pack_id: str, events: Sequence[dict[str, Any]], pause_seconds: float = 0.0) -> None:
        await self._stream.report(pack_id, events, pause_seconds)

    async def collect(self) -> tuple[list[dict[str, Any]], dict[str, float], str | None]:
        return await self._stream.collect()
