"""What `stream.py` measures on Ray: a host with prepared arrays, consumers, and the stream between them.

Importing this imports Ray, which reads its settings then.
"""

import os
import pickle
import signal
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from common import Comparison, interleaved, medians
from ray._private import internal_api

from penstock import worker
from penstock.actors import NAMESPACE, Source, StreamActor, StreamConfig
from penstock.batches import Schedule, checkpoint_steps
from penstock.consumer import StreamClient
from penstock.fence import Fence, claim
from penstock.identity import code_hash
from penstock.journal import Journal
from penstock.pack import Pack, PackMember
from penstock.storage import Storage
from penstock.stream import BlockInfo
from sae_core import SAETrainer, TrainingSettings, calibrate, parse_settings

ARRAY = "blocks.4.hook_resid_post"
D_IN = 128
BATCH_TOKENS = 512
SAES = tuple({"architecture": "topk", "d_sae": 1024, "k": k} for k in (16, 32))
N_PREPARED = 4  # arrays that the host hands out in turn
WINDOW = 8  # what a sweep has where the store holds more than it
PAGE = 4096


class PreparedHost:
    """A host whose blocks were made beforehand: float32 [block_tokens, D_IN], `N_PREPARED` of them in turn."""

    def __init__(self, block_tokens: int) -> None:
        draw = np.random.default_rng(0)
        self._arrays = [draw.standard_normal((block_tokens, D_IN), np.float32) for _ in range(N_PREPARED)]

    def ping(self) -> bool:
        return True

    def harvest(self, source: Any, block: int, arrays: Sequence[str]) -> Any:
        array = self._arrays[block % N_PREPARED]
        return *(array for _ in arrays), BlockInfo(len(array), 0, 0.0)


class Consumer:
    """A pack's place, in a process of its own."""

    def __init__(self) -> None:
        torch.set_num_threads(1)

    def ready(self) -> bool:
        return True

    def read(self, stream: Any, pack_id: str, n_blocks: int) -> float:
        """Blocks a second that come through the stream, from the first one on."""
        client = StreamClient(stream, pack_id, [ARRAY], 1)
        begun = 0.0
        for _, arrays in client.blocks(0, n_blocks):
            begun = begun or time.perf_counter()
            _touch(arrays.pop(ARRAY))
        seconds = time.perf_counter() - begun
        client.close()
        return n_blocks / seconds

    def read_bare(self, host: Any, n_blocks: int) -> float:
        """The same, asking the host itself."""

        def ask(block: int) -> Any:
            return host.harvest.options(num_returns=2).remote(None, block, [ARRAY])[0]

        asked = deque(ask(block) for block in range(min(WINDOW, n_blocks)))
        begun = 0.0
        for block in range(n_blocks):
            array = ray.get(asked[0])
            begun = begun or time.perf_counter()
            _touch(array)
            del array
            asked.popleft()
            if block + WINDOW < n_blocks:
                asked.append(ask(block + WINDOW))
        return n_blocks / (time.perf_counter() - begun)

    def train_on(self, stream: Any, pack_id: str, first: int, stop: int) -> dict[str, float]:
        """Seconds in all, and of these spent waiting, once the first block is there."""
        client = StreamClient(stream, pack_id, [ARRAY], 1)
        begun = waited = 0.0
        for block, arrays in client.blocks(first, stop):
            x = torch.from_numpy(arrays.pop(ARRAY))
            if block == first:
                settings = [parse_settings(one) for one in SAES]
                trainers = [SAETrainer(one, _training(10_000), calibrate(x)) for one in settings]
                begun, waited = time.perf_counter(), client.about["wait_seconds"]
            for start in range(0, len(x), BATCH_TOKENS):
                batch = x[start : start + BATCH_TOKENS].clone()
                for trainer in trainers:
                    trainer.train_step(batch)
                client.keep_alive()
            del x
        found = {"waiting": client.about["wait_seconds"] - waited, "all": time.perf_counter() - begun}
        client.close()
        return found

    def train_pack(self, job: bytes, stream: Any, fence: Fence, log: str, killed_at: int) -> None:
        """What Ray Train runs on a pack's worker. Every step made is a line of `log`; before step `killed_at` this
        process is killed."""

        class Counted(Pack):
            def step(self, step: int, inputs: Mapping[str, torch.Tensor]) -> None:
                if step == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                super().step(step, inputs)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(f"{step}\n")

        worker.Pack = Counted  # type: ignore[misc]
        fence.close_to_others()
        worker.train_pack(pickle.loads(job), stream, fence)


def _training(steps: int) -> TrainingSettings:
    return TrainingSettings(steps=steps, batch_tokens=BATCH_TOKENS, lr=1e-3, dead_after_tokens=1_000_000)


def _touch(array: np.ndarray) -> float:
    """Read a value of every page."""
    return float(array.reshape(-1)[:: PAGE // array.itemsize].sum())


class Benchmark:
    """A host, consumers, and one stream for all their runs, on the Ray that this process has joined."""

    def __init__(self, block_tokens: int, n_blocks: int, n_readers: int, repeats: int) -> None:
        # Announced, so that the readers of a run wait for each other; the others join as latecomers do. The stream
        # makes blocks for its first wave at once: an empty one.
        readers = [{_reader(run, index): (ARRAY,) for index in range(n_readers)} for run in range(repeats)]
        config = StreamConfig(
            name="benchmark", source=Source("", ""), n_blocks=n_blocks, window=WINDOW, waves=({}, *readers),
            cursors={}, lease_seconds=60.0, code=code_hash(),
        )  # fmt: skip
        named = {"namespace": NAMESPACE}
        host, consumer = ray.remote(num_cpus=0)(PreparedHost), ray.remote(num_cpus=0)(Consumer)
        self.block_tokens, self.n_blocks = block_tokens, n_blocks
        self.repeats = repeats
        self.block_mb = block_tokens * D_IN * 4 / 1e6
        self.host = host.options(name="prepared-host", **named).remote(block_tokens)
        self.stream = StreamActor.options(name=f"stream-{config.name}", **named).remote(config)
        self.consumers = [consumer.remote() for _ in range(n_readers)]
        ray.get([self.host.ping.remote(), *(consumer.ready.remote() for consumer in self.consumers)])
        ray.get(self.stream.set_hosts.remote(["prepared-host"]))
        self._runs = 0

    def pack_id(self) -> str:
        """Of a pack that there was not before."""
        self._runs += 1
        return f"pack-{self._runs}"

    # ---- the rows ----

    def rate(self) -> list[Comparison]:
        consumer, n_blocks = self.consumers[0], self.n_blocks
        sides = {
            "bare Ray": lambda: ray.get(consumer.read_bare.remote(self.host, n_blocks)),
            "stream": lambda: ray.get(consumer.read.remote(self.stream, self.pack_id(), n_blocks)),
        }
        sides["bare Ray"]()  # the store's memory is made by whoever writes to it first
        found = interleaved(sides, self.repeats)
        ours, bare = (self.block_mb * statistics.median(found[name]) for name in ("stream", "bare Ray"))
        name = f"rate to one consumer against bare Ray, blocks of {self.block_mb:.1f} MB"
        return [Comparison(name, "MB/s", ours, bare, 0.8, lower_is_better=False)]

    def waiting(self, n_blocks: int) -> list[Comparison]:
        consumer, stop = self.consumers[0], self.n_blocks
        first = stop - n_blocks

        def run() -> dict[str, float]:
            return ray.get(consumer.train_on.remote(self.stream, self.pack_id(), first, stop))

        found = medians(interleaved({"consumer that trains": run}, self.repeats)["consumer that trains"])
        per_block = found["all"] / n_blocks
        return [
            Comparison("consumer waiting against all its time", "s", found["waiting"], found["all"], 0.03,
                       at_most=True),
            Comparison("consumer, time a block", "s", per_block, lower_is_better=None),
        ]  # fmt: skip

    def store(self) -> list[Comparison]:
        runs = iter(range(self.repeats))

        def run() -> float:
            number, before = next(runs), _bytes_written()
            reads = [
                consumer.read.remote(self.stream, _reader(number, index), self.n_blocks)
                for index, consumer in enumerate(self.consumers)
            ]
            ray.get(reads)
            return (_bytes_written() - before) / 1e6

        readers = f"{len(self.consumers)} consumers"
        (written,) = map(statistics.median, interleaved({readers: run}, self.repeats).values())
        made = self.n_blocks * self.block_mb
        name = f"written to the store for {readers} against activations"
        return [Comparison(name, "MB", written, made, 1.05, at_most=True)]

    def resume(self, folder: str) -> list[Comparison]:
        n_blocks, checkpoints = 6, 3
        kept = (self.block_tokens,) * n_blocks
        steps = sum(kept) // BATCH_TOKENS
        saved_at = checkpoint_steps(steps, checkpoints)
        killed_at = (saved_at[1] + saved_at[2]) // 2
        storage, log, pack_id = Storage(f"{folder}/storage"), Path(folder) / "steps", self.pack_id()
        job = worker.PackJob(
            pack_id=pack_id, members=(PackMember("sae", ARRAY, ARRAY, parse_settings(SAES[0])),), hook_points=(ARRAY,),
            training=_training(steps),
            schedule=Schedule(kept, BATCH_TOKENS, steps), storage=storage, calibration_folder="calibration",
            dtype="float32", checkpoints=checkpoints, micro_batch_tokens=None, threads=1, saes_at_once=1, on_gpu=False,
            spool=None, journal=Journal(storage, "resume"), allow_code_change=False, code=code_hash(),
        )  # fmt: skip
        driver = claim(storage, "driver.json", "beat.json", print)
        first, second = (
            (pickle.dumps(job), self.stream, driver.of(pack_id, run), str(log)) for run in (1, 2)
        )
        killed, other = self.consumers[-2:]
        print(f"[{time.strftime('%H:%M:%S')}] a worker is killed, as Ray will say", flush=True)
        try:
            ray.get(killed.train_pack.remote(*first, killed_at))
        except ray.exceptions.RayActorError:
            before = _lines(log)
        else:
            raise SystemExit("the worker was to be killed, and was not")
        ray.get(other.train_pack.remote(*second, -1))
        after = _lines(log)[len(before) :]
        if before != list(range(killed_at)) or after[-1] != steps - 1 or not storage.is_committed("saes/sae/final"):
            raise SystemExit(f"{steps} steps, killed at {killed_at}: made {before} and then {after}")
        name = "batches trained on twice after a kill against those since the checkpoint"
        return [Comparison(name, "", len(set(before) & set(after)), killed_at - saved_at[1], 1.0, at_most=True)]


def _reader(run: int, index: int) -> str:
    return f"reader-{run}-{index}"


def _lines(log: Path) -> list[int]:
    return [int(line) for line in log.read_text(encoding="utf-8").splitlines()]


def _bytes_written() -> int:
    """All that was ever created in this node's object store, by its own count."""
    (node,) = ray.nodes()
    stats = internal_api.node_stats(node["NodeManagerAddress"], node["NodeManagerPort"], include_memory_info=False)
    return stats.store_stats.cumulative_created_bytes
