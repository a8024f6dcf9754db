"""What the stream costs: making blocks of activations, handing them out, spooling them, and its own bookkeeping.

    python jobs/benchmarks/stream.py [--quick] [--json FILE] [--repeats N] [--only NAME,...]

The two sides of a figure run one after the other, in turn, `--repeats` times; medians are shown. Every process uses one
thread of torch.

Rows (`--only` takes their names):
  harvest   `ModelHost.harvest` of a block (token rows, exclusion, permutation) at blocks.4.hook_resid_post of the demo
            model, against TransformerLens' `run_with_cache` of the same model and rows, stopped behind that layer; and
            four hook points, blocks.1 to blocks.4, against blocks.4 alone: the pass is equally deep
  rate      blocks of 16 MB through the stream to one consumer, against the same actor's arrays asked for by the
            consumer itself, with as many calls under way as the stream has blocks in its window; on both sides the
            consumer reads a value of each page
  waiting   how long a consumer waits for blocks that only need to be handed out, while it trains two TopK SAEs on them
  store     what is written to the object store while four consumers on one node read the same blocks, by the store's
            own counter, against the activations that were made
  resume    batches that are trained on twice when a pack's worker is killed by SIGKILL between two checkpoints,
            against those that it had trained on since the last one
  spool     reading blocks of 64 MB with their checksums, against reading the files, all in the page cache
  state     memory and time of the stream's state at 10^6 blocks and 64 consumers, against limits: 10 MB and 0.2 ms

For rate, waiting, store and resume a Ray is started on this machine: the stream's actor, a host with prepared arrays
in place of a model, and each consumer are processes of their own. The clocks of rate and waiting start when the first
block is there.
"""

import argparse
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from common import ROOT, SOURCES, Comparison, count, interleaved, machine, medians, parse_rows, parser, report

from penstock.cluster import ENVIRONMENT
from penstock.model_host import ModelHost
from penstock.spec import parse_spec
from penstock.spool import Spool
from penstock.storage import Storage
from penstock.stream_state import BlockSet, StreamState
from penstock.tokens import build_token_store

REPEATS = 7
ARRAY = "blocks.4.hook_resid_post"
LAYER = 4
D_IN = 128
STORE_BYTES = 2_000_000_000
MEMORY_LIMIT_MB, HAND_OUT_LIMIT_MS = 10.0, 0.2
ON_RAY = ("rate", "waiting", "store", "resume")
NAMES = ("harvest", *ON_RAY, "spool", "state")
VERSIONS = ("penstock", "torch", "ray", "transformer-lens", "pyarrow")


@dataclass(frozen=True)
class Size:
    """`block_tokens` of a block on Ray; `trained_blocks` of them for the consumer that trains."""

    harvest_tokens: int
    block_tokens: int
    n_blocks: int
    trained_blocks: int
    n_readers: int
    spool_tokens: int
    spool_blocks: int
    state_blocks: int


FULL = Size(16_384, 32_768, 96, 10, 4, 131_072, 4, 1_000_000)
QUICK = Size(1024, 2048, 12, 3, 2, 2048, 2, 10_000)


# ---- harvest --------------------------------------------------------------------------------------------------------


def measure_harvest(size: Size, repeats: int) -> list[Comparison]:
    spec = yaml.safe_load((ROOT / "jobs/specs/demo.yaml").read_text(encoding="utf-8"))
    spec["data"] |= {"block_tokens": size.harvest_tokens, "search_tokens": 256, "report_tokens": 256}
    spec["train"] |= {"tokens": size.harvest_tokens // 2, "lr_warm_up_steps": 0}
    parsed = parse_spec(yaml.safe_dump(spec), "demo")
    host = ModelHost(parsed.model, device="cpu", threads=1)
    layers = [f"blocks.{layer}.hook_resid_post" for layer in range(1, LAYER + 1)]
    with tempfile.TemporaryDirectory(prefix="penstock-stream-") as folder:
        store = build_token_store(parsed.data, parsed.model, parsed.train, Storage(folder))
        rows = store.rows("train", 0, store.block_rows)

        def bare() -> None:
            with torch.inference_mode():
                for start in range(0, len(rows), host.rows_per_forward):
                    ids = torch.from_numpy(rows[start : start + host.rows_per_forward].astype(np.int64))
                    host.model.run_with_cache(ids, names_filter=[ARRAY], stop_at_layer=LAYER + 1)

        rates = _rates(
            {
                "bare": bare,
                "one": lambda: host.harvest(store, parsed.data, 0, [ARRAY]),
                "four": lambda: host.harvest(store, parsed.data, 0, layers),
            },
            rows.size,
            repeats,
        )
    return [
        Comparison("harvest against the bare forward pass", "tokens/s", rates["one"], rates["bare"], 0.9, False),
        Comparison("harvest of 4 hook points against 1", "tokens/s", rates["four"], rates["one"], 0.85, False),
    ]


def _rates(sides: Mapping[str, Callable[[], object]], amount: float, repeats: int) -> dict[str, float]:
    """What every side gets through in a second, where one run is `amount`."""
    for warm_up in sides.values():
        warm_up()
    found = interleaved({name: lambda run=run: _seconds(run) for name, run in sides.items()}, repeats)
    return {name: amount / statistics.median(seconds) for name, seconds in found.items()}


def _seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


# ---- on Ray ---------------------------------------------------------------------------------------------------------


def measure_on_ray(size: Size, repeats: int, names: Sequence[str]) -> list[Comparison]:
    # As `penstock.cluster` starts one, without the dashboard: there is no Ray Train here that needs it. Ray reads its
    # settings as it is imported.
    here = str(Path(__file__).parent)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_worker_maximum_startup_concurrency": "8", **ENVIRONMENT,
                   "PYTHONPATH": os.pathsep.join([*SOURCES, here])}  # fmt: skip
    import ray
    from stream_on_ray import Benchmark

    with tempfile.TemporaryDirectory(prefix="pst-") as folder:  # Ray's sockets need a short path
        ray.init(
            address="local", num_cpus=2, object_store_memory=STORE_BYTES, include_dashboard=False,
            _node_ip_address="127.0.0.1", _temp_dir=f"{folder}/ray", namespace="penstock", log_to_driver=False,
            logging_level="WARNING",
        )  # fmt: skip
        try:
            benchmark = Benchmark(size.block_tokens, size.n_blocks, size.n_readers, repeats)
            measures = {
                "rate": benchmark.rate,
                "waiting": lambda: benchmark.waiting(size.trained_blocks),
                "store": benchmark.store,
                "resume": lambda: benchmark.resume(folder),
            }
            return [row for name, measure in measures.items() if name in names for row in measure()]
        finally:
            ray.shutdown()


# ---- the spool ------------------------------------------------------------------------------------------------------


def measure_spool(size: Size, repeats: int) -> list[Comparison]:
    with tempfile.TemporaryDirectory(prefix="penstock-stream-") as folder:
        stream = Spool(Storage(folder)).stream("0" * 12)
        values = np.random.default_rng(0).standard_normal((size.spool_tokens, D_IN), np.float32)
        for block in range(size.spool_blocks):
            if not stream.write(ARRAY, block, values, "float32"):
                raise SystemExit(stream.full)
        files = sorted(Path(folder).glob("**/*.arrow"))
        buffer = bytearray(files[0].stat().st_size)  # there already: no page of it has to be made

        def plain() -> None:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    file.readinto(buffer)

        def read() -> None:
            for block in range(size.spool_blocks):
                stream.read(ARRAY, block)

        rates = _rates({"plain": plain, "spool": read}, size.spool_blocks * values.nbytes / 1e6, repeats)
    name = f"spool, read with checksums against plain, blocks of {values.nbytes / 1e6:.1f} MB"
    return [Comparison(name, "MB/s", rates["spool"], rates["plain"], 0.5, False)]


# ---- the state ------------------------------------------------------------------------------------------------------


def state_rows(size: Size, repeats: int) -> list[Comparison]:
    def run() -> dict[str, float]:
        return measure_state(size.state_blocks)

    found = medians(interleaved({"state": run}, repeats)["state"])
    return [
        Comparison("memory of the state against its limit", "MB", found["memory_mb"], MEMORY_LIMIT_MB, 1.0,
                   at_most=True),
        Comparison("time to hand a block out against its limit", "ms", found["hand_out_ms"], HAND_OUT_LIMIT_MS, 1.0,
                   at_most=True),
    ]  # fmt: skip


def measure_state(
    n_blocks: int = 1_000_000, n_packs: int = 64, n_arrays: int = 8, window: int = 8, cycles: int = 2000
) -> dict[str, float]:
    """A run of `n_blocks` whose packs read one array each, where every array has a set of spooled blocks.

    `memory_mb`: what the state takes, 10^6 bytes, once every pack has handed in blocks. `hand_out_ms`: median time of
    take, acknowledge, next_work and, where there was something to make, produced, of one pack; the packs take turns, so
    that each cycle but every `n_packs`-th leaves the window where it is.
    """
    arrays = [f"blocks.{index}.hook_resid_post" for index in range(n_arrays)]
    packs = {f"pack-{index}": (arrays[index % n_arrays],) for index in range(n_packs)}
    tracemalloc.start()
    try:
        spooled = {name: BlockSet(n_blocks, range(0, n_blocks // 2, 2)) for name in arrays}
        state = StreamState(n_blocks, window, spooled=spooled)
        state.host_up("host")
        first = n_blocks // 2  # what lies before is in the spool in parts, what follows is made
        for pack, names in packs.items():
            state.attach(pack, names, first, 0.0)
        _cycles(state, packs, first, 2 * window * n_packs)
        memory_mb = tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()
    return {"memory_mb": memory_mb, "hand_out_ms": 1e3 * statistics.median(_cycles(state, packs, None, cycles))}


def _cycles(state: StreamState, packs: dict[str, tuple[str, ...]], first: int | None, cycles: int) -> list[float]:
    """Seconds of each of so many hand-outs, from block `first` on or where the packs stand."""
    names = list(packs)
    block = state.members[names[0]].cursor if first is None else first
    _produce(state)
    seconds = []
    for cycle in range(cycles):
        pack = names[cycle % len(names)]
        begun = time.perf_counter()
        assert state.take(pack, block, 0.0) is not None
        state.acknowledge(pack, block, 0.0)
        _produce(state)
        seconds.append(time.perf_counter() - begun)
        if pack == names[-1]:
            block += 1
    return seconds


def _produce(state: StreamState) -> None:
    while (work := state.next_work()) is not None:
        state.produced(work, dict.fromkeys(work.arrays, object()), work.arrays)


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    described = machine()
    size = QUICK if arguments.quick else FULL
    rows: list[Comparison] = []
    if "harvest" in arguments.only:
        rows += measure_harvest(size, arguments.repeats)
    if on_ray := [name for name in ON_RAY if name in arguments.only]:
        rows += measure_on_ray(size, arguments.repeats, on_ray)
    if "spool" in arguments.only:
        rows += measure_spool(size, arguments.repeats)
    if "state" in arguments.only:
        rows += state_rows(size, arguments.repeats)
    notes = [f"Medians of {arguments.repeats}; one thread of torch a process."]
    if arguments.quick:
        rows = [replace(row, goal=None) for row in rows]
        notes.append("QUICK: next to no data. These figures mean nothing.")
    report("The stream against what it is made of", rows, arguments, described, VERSIONS, notes)


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=False)
    options.add_argument("--repeats", metavar="N", type=count, help=f"runs of each side; {REPEATS} unless given")
    return parse_rows(options, NAMES, REPEATS)


if __name__ == "__main__":
    main()
