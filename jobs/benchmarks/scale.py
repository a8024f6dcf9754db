"""How a sweep's tokens a second grow with the nodes: measured on 1 to 8 emulated ones, simulated to 1,000.

    python jobs/benchmarks/scale.py [--quick] [--json FILE] [--repeats N] [--only measured,beside,simulated]

Measured. `ray.cluster_utils.Cluster` starts a head (driver and stream) and 8 nodes on this machine, each a raylet with
an object store of its own. All are there in every run; a run of N uses a model host and a pack on each of N. Stream
actor, client, objects and their transfers between the stores are the real ones. Time is a GPU's, bytes are not:

  harvest  a sleep as long as a block takes an A100 (below); what comes back is an array with the block's number in it
  step     a sleep as long as its SAEs' steps on a block take an A100, after every byte was read and compared

and a block has so many bytes that, at 8 nodes, what is written into all object stores (each block once by its host, and
once more on every other node, as every pack reads every block) is `RATE` MB/s: what two cores carry. At fewer nodes the
bytes and lengths are the same, so that the machine has less to do there, not more. Two regimes:

  harvest-bound   a pack holds 1 SAE and waits for blocks. Each node adds a host: tokens made, and tokens that every
                  SAE is trained on, should grow with the nodes
  training-bound  a pack holds 16 SAEs, and one host is enough for all. Each node adds SAEs: tokens/s of the stream
                  stay, and SAE-tokens/s should grow with the nodes

Efficiency is the rate at N over N times the rate at 1. Rates lie between the ends of two blocks, after a warm-up.

Simulated (`scale_simulation.py`). The same code of the stream on simulated time, with the measured cost of a call and a
real block's bytes on a network; whatever holds it up is lifted, one limit after the other. What does not stand in the
stream's way (MLflow, the driver's report, checkpoints) is a share of its capacity, from what one costs here.

The A100: 312 TFLOP/s in bf16 by its data sheet, of which 40% are assumed. The model is Gemma 2 2B up to the end of its
13th layer of 26 (d_model 2304, d_ff 9216 of three matrices, 8 heads of 256 of which 4 for keys and values, context
1024). An SAE has 16,384 latents; its step costs twice its encoder's product (`step.py` measures at most 1.8 times).
Blocks have 262,144 tokens, the most that a sweep chooses by itself.
"""

import argparse
import os
import secrets
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common import (
    SOURCES,
    Comparison,
    count,
    interleaved,
    machine,
    medians,
    parse_rows,
    parser,
    print_machine,
    table,
    write_result,
)

from penstock.cluster import ENVIRONMENT
from penstock.session import WINDOW_LIMITS, window_of

NAMES = ("measured", "beside", "simulated")
VERSIONS = ("penstock", "ray", "mlflow", "numpy")
FLOOD = "as fast as it goes"
CALL_MS = 1.5
REPEATS = 3
GOAL = 0.9
BUSY = 0.5

# ---- the GPU, the model, the SAEs -----------------------------------------------------------------------------------

GPU_FLOPS = 0.4 * 312e12
D_MODEL, D_FF, D_HEADS, D_KEY_VALUE, LAYERS, CONTEXT = 2304, 9216, 2048, 1024, 13, 1024
BLOCK_TOKENS, BATCH_TOKENS = 262_144, 4096
D_SAE, SAES_TRAINING_BOUND = 16_384, 16

LAYER_WEIGHTS = 3 * D_MODEL * D_FF + 2 * D_MODEL * D_HEADS + 2 * D_MODEL * D_KEY_VALUE
HARVEST_FLOPS = LAYERS * (2 * LAYER_WEIGHTS + 2 * CONTEXT * D_HEADS)  # a token; it attends to half the context
STEP_FLOPS = 2 * 2 * D_MODEL * D_SAE  # a token and SAE
HARVEST_SECONDS = BLOCK_TOKENS * HARVEST_FLOPS / GPU_FLOPS
STEP_SECONDS = BLOCK_TOKENS * STEP_FLOPS / GPU_FLOPS
REAL_BLOCK_BYTES = BLOCK_TOKENS * D_MODEL * 2

# ---- the emulated nodes ---------------------------------------------------------------------------------------------

RATE = 120e6  # bytes a second, written into all object stores at the most nodes
STORE_BYTES = 1_000_000_000

# ---- the simulated cluster ------------------------------------------------------------------------------------------

SIMULATED = (1, 8, 16, 32, 64, 125, 250, 500, 1000)
SIMULATED_HARVEST_BOUND = (1, 2, 4, 8, 10, 12, 14, 16)
NIC_BYTES = 25e9 / 8  # of a node with one or two GPUs; what Ray's own broadcast test comes to
NIC_BYTES_OF_EIGHT = 400e9 / 8  # of one with eight
STORE_OF_NODE = 50e9
CHECKPOINT_BYTES = 12 * 2 * D_MODEL * D_SAE  # weights and two moments of Adam in fp32
CHECKPOINTS, RUN_TOKENS = 5, 500e6
STORAGE_BYTES = 10e9  # a second, of a shared file system
ROWS_A_RUN, METRICS_A_ROW = 100, 8  # what a pack reports of an SAE


@dataclass(frozen=True)
class Size:
    """Of a run: nodes that are measured, by how much time is shortened, blocks of warm-up and measured (a node, where
    the run is harvest-bound)."""

    nodes: tuple[int, ...]
    shortened: float
    warm_up: int
    measured: int
    simulated: tuple[int, ...]
    simulated_harvest_bound: tuple[int, ...]
    simulated_blocks: tuple[int, int]
    flood_blocks: int


FULL = Size((1, 2, 4, 8), 1.0, 2, 6, SIMULATED, SIMULATED_HARVEST_BOUND, (14, 8), 400)
QUICK = Size((1, 2), 20.0, 1, 2, (1, 20), (1, 2), (3, 3), 20)


def regimes(size: Size) -> list[Any]:
    """The two regimes at the most nodes' data rate; the window is what a sweep would choose with these stores."""
    from scale_on_ray import Regime

    n = max(size.nodes)
    made = []
    for name, saes, per_node in (("harvest-bound", 1, True), ("training-bound", SAES_TRAINING_BOUND, False)):
        harvest, step = HARVEST_SECONDS / size.shortened, saes * STEP_SECONDS / size.shortened
        blocks_a_second = n / harvest if per_node else 1 / step
        block_bytes = int(RATE / blocks_a_second / n) if size is FULL else 200_000
        window = window_of(STORE_BYTES, block_bytes, n)
        made.append(Regime(name, harvest, step, block_bytes, window, size.warm_up, size.measured, per_node))
    return made


# ---- measured -------------------------------------------------------------------------------------------------------


def measure(size: Size, repeats: int) -> dict[str, Any]:
    """Medians of every run, by regime and nodes, and what the stream's actor costs when it has nothing else to do."""
    # Ray reads its settings as it is imported. Every process of the cluster has this token: it listens on the network.
    here = str(Path(__file__).parent)
    os.environ |= {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_maximum_startup_concurrency": "8", **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([*SOURCES, here]),
    }  # fmt: skip
    from scale_on_ray import EmulatedCluster

    nodes = max(size.nodes)
    cluster = EmulatedCluster(nodes, STORE_BYTES)
    try:
        print(f"{nodes} nodes and a head, started in {cluster.start_seconds:.0f} s", flush=True)
        sides = {
            (regime.name, n): partial(cluster.run, regime, n) for regime in regimes(size) for n in size.nodes
        }  # fmt: skip
        found = interleaved(sides, repeats)
        copied = cluster.copy_rate(regimes(size)[-1].block_bytes, 5)
        flood = interleaved({(FLOOD, nodes): partial(cluster.run, flooded(size), nodes)}, repeats)
    finally:
        cluster.close()
    runs = {key: medians(run.figures() for run in of_key) for key, of_key in (found | flood).items()}
    ranges = {
        key: [min(run.trained for run in of_key), max(run.trained for run in of_key)] for key, of_key in found.items()
    }
    about = {"nodes": nodes, "start_seconds": cluster.start_seconds, "copied": copied}
    return {"runs": runs, "ranges": ranges, **about}


def flooded(size: Size) -> Any:
    """Blocks that take no time: the actor is all that is left. They are too large to travel in a reply."""
    from scale_on_ray import Regime

    return Regime(FLOOD, 0.0, 0.0, 200_000, WINDOW_LIMITS[1], size.flood_blocks // 4, size.flood_blocks, False)


def measured_rows(size: Size, found: Mapping[str, Any], quick: bool) -> list[Comparison]:
    runs, goal = found["runs"], None if quick else GOAL
    rows = []
    for name, what, unit, scale in (
        ("harvest-bound", "made", "tokens/s", 1.0),
        ("harvest-bound", "trained", "tokens/s", 1.0),
        ("training-bound", "trained", "SAE-tokens/s", SAES_TRAINING_BOUND),
    ):
        # In the training-bound regime every node brings SAEs of its own.
        rates = {
            n: runs[name, n][what] * tokens_of_block(size) * scale * (n if name == "training-bound" else 1)
            for n in size.nodes
        }
        for n, rate in rates.items():
            beside = rates[min(rates)] * n / min(rates)
            rows.append(Comparison(
                f"{name}, {what} on {n} node(s)", unit, rate, None if n == min(rates) else beside,
                None if n == min(rates) else goal, lower_is_better=False,
            ))  # fmt: skip
    for name, n in ((one, max(size.nodes)) for one in ("harvest-bound", "training-bound")):
        run = runs[name, n]
        for figure, unit, value in (
            ("written into the object stores", "MB/s", run["moved_mb"]),
            ("a pack's wait for a block's bytes", "s", run["wait_seconds"]),
            ("the stream's actor", "cores", run["actor_cores"]),
            ("the stream's actor, memory", "MB", run["actor_mb"]),
            ("hand-outs", "1/s", run["hand_outs"]),
        ):
            rows.append(Comparison(f"{name}, {n} nodes: {figure}", unit, value, lower_is_better=None))
    rows.append(Comparison("a block from one store to another", "MB/s", found["copied"] / 1e6, lower_is_better=None))
    flood = runs[FLOOD, max(size.nodes)]
    for figure, unit, value in (
        ("hand-outs", "1/s", flood["hand_outs"]),
        ("the actor's CPU a hand-out", "ms", 1e3 * flood["actor_cores"] / flood["hand_outs"]),
        ("its busiest thread's", "ms", 1e3 * flood["busiest_thread"] / flood["hand_outs"]),
        ("a call of the actor", "ms", 1e3 * call_seconds(found)),
    ):
        rows.append(Comparison(f"{FLOOD}, {max(size.nodes)} packs: {figure}", unit, value, lower_is_better=None))
    return rows


def tokens_of_block(size: Size) -> float:
    """Where time is shortened, so is a block: rates stay a GPU's."""
    return BLOCK_TOKENS / size.shortened


def call_seconds(found: Mapping[str, Any]) -> float:
    """CPU of the actor for a call, of which a hand-out takes two, and a harvest one: the stream's own code included,
    which the simulation counts once more."""
    n, flood = found["nodes"], found["runs"][FLOOD, found["nodes"]]
    return flood["actor_cores"] / flood["hand_outs"] / (2 + 1 / n)


# ---- simulated ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of cluster. Every node has a GPU for a model host, and so many for packs."""

    name: str
    saes: int
    packs_per_node: int
    nic_bytes: float
    nodes: tuple[int, ...]

    @property
    def step_seconds(self) -> float:
        return self.saes * STEP_SECONDS

    def most(self, n: int) -> float:
        """Blocks a second that hosts can make and packs take."""
        return min(n / HARVEST_SECONDS, 1 / self.step_seconds)


def kinds(size: Size) -> list[Kind]:
    eight = tuple(n for n in size.simulated if n <= 125)
    return [
        Kind("harvest-bound, 2 GPUs a node", 1, 1, NIC_BYTES, size.simulated_harvest_bound),
        Kind("training-bound, 2 GPUs a node", SAES_TRAINING_BOUND, 1, NIC_BYTES, size.simulated),
        Kind("training-bound, 8 GPUs a node", SAES_TRAINING_BOUND, 7, NIC_BYTES_OF_EIGHT, eight),
    ]


def simulate_all(size: Size, seconds_a_call: float) -> list[dict[str, Any]]:
    """A row for each kind and number of nodes: efficiency as it is, and with one limit after the other lifted."""
    from scale_simulation import Setting, bottlenecks

    rows = []
    for kind in kinds(size):
        for n in kind.nodes:
            setting = Setting(
                nodes=n, harvest_seconds=HARVEST_SECONDS, step_seconds=kind.step_seconds, block_bytes=REAL_BLOCK_BYTES,
                window=window_of(STORE_OF_NODE, REAL_BLOCK_BYTES, n), nic_bytes=kind.nic_bytes,
                call_seconds=seconds_a_call, packs_per_node=kind.packs_per_node,
            )  # fmt: skip
            warm_up, measured = (4 * n, 8 * n) if kind.saes == 1 else size.simulated_blocks
            begun = time.perf_counter()
            chain = bottlenecks(setting, warm_up, measured, GOAL * kind.most(n))
            first = chain[0][1]
            row = {
                "kind": kind.name, "nodes": n, "packs": n * kind.packs_per_node, "window": setting.window,
                "tokens_per_second": first.rate * BLOCK_TOKENS,
                "sae_tokens_per_second": first.rate * BLOCK_TOKENS * kind.saes * n * kind.packs_per_node,
                "efficiency": first.rate / kind.most(n),
                "lifted": [{"limit": limit, "efficiency": one.rate / kind.most(n)} for limit, one in chain[1:]],
                "actor_busy": first.actor_busy, "network_busy": first.network_busy,
                "code_ms": 1e3 * first.code_seconds, "reply_bytes": first.reply_bytes,
                "leases_lost": first.leases_lost,
            }  # fmt: skip
            rows.append(row)
            print(f"[{time.strftime('%H:%M:%S')}] {kind.name}, {n} node(s): {row['efficiency']:.2f} "
                  f"({time.perf_counter() - begun:.0f} s)", flush=True)  # fmt: skip
    return rows


def simulated_table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [["cluster", "nodes", "packs", "SAE-tokens/s", "efficiency", "actor", "network", "held up by"]]
    for row in rows:
        held = " -> ".join(f"{one['limit']} ({one['efficiency']:.2f} without)" for one in row["lifted"])
        cells.append([
            row["kind"], str(row["nodes"]), str(row["packs"]), f"{row['sae_tokens_per_second']:,.0f}",
            f"{row['efficiency']:.2f}", f"{row['actor_busy']:.0%}", f"{row['network_busy']:.0%}", held,
        ])  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in cells)  # fmt: skip


# ---- beside the stream ----------------------------------------------------------------------------------------------


def measure_mlflow(rows: int) -> float:
    """Seconds that the driver takes to log a row of one SAE, as `ROWS_A_RUN` of each reach it, into SQLite."""
    from penstock.home import Home
    from penstock.tracking import TrackedSAE, Tracker

    with tempfile.TemporaryDirectory(prefix="penstock-scale-") as folder:
        saes = [TrackedSAE(f"sae-{index}", "hook", {"architecture": "topk", "k": index}) for index in range(4)]
        tracker = Tracker(Home(Path(folder)), "scale", "scale")
        tracker.open("name: scale\n", {}, saes)
        seconds = []
        for row in range(rows):
            for sae in saes:
                metrics = {f"metric_{index}": float(row) for index in range(METRICS_A_ROW)}
                begun = time.perf_counter()
                tracker.log_rows(sae.sae_id, [{"tokens": (row + 1) * 1000, "metrics": metrics}])
                seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def beside_rows(simulated: Sequence[Mapping[str, Any]], seconds_a_row: float) -> list[dict[str, Any]]:
    """What else is used at each number of nodes of the training-bound sweeps where the stream holds nobody up, as a
    share of what there is: MLflow's rows, and the checkpoints' mean bandwidth. Above 1 it is the bottleneck."""
    rows, run_seconds = [], RUN_TOKENS / BLOCK_TOKENS * SAES_TRAINING_BOUND * STEP_SECONDS
    for row in simulated:
        if row["kind"].startswith("harvest"):
            continue
        saes = row["packs"] * SAES_TRAINING_BOUND
        rows.append({
            "kind": row["kind"], "nodes": row["nodes"], "saes": saes,
            "mlflow": saes * ROWS_A_RUN * seconds_a_row / run_seconds,
            "checkpoints": saes * CHECKPOINTS * CHECKPOINT_BYTES / STORAGE_BYTES / run_seconds,
            "reply_bytes": row["reply_bytes"],
        })  # fmt: skip
    return rows


def beside_table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"{'cluster':30}  nodes    SAEs  MLflow writer  checkpoints  driver's reply"]
    lines += [
        f"{row['kind']:30}  {row['nodes']:5}  {row['saes']:6}  {row['mlflow']:13.2f}  {row['checkpoints']:11.2f}  "
        f"{row['reply_bytes']:10} B"
        for row in rows
    ]
    return "\n".join(lines)


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    described, size = machine(), QUICK if arguments.quick else FULL
    figures: list[dict[str, Any]] = []
    more: dict[str, Any] = {"constants": constants()}
    print_machine(described, VERSIONS)
    if "measured" in arguments.only:
        found = measure(size, arguments.repeats)
        rows = measured_rows(size, found, arguments.quick)
        figures += [figure for row in rows for figure in row.figures()]
        more["measured"] = [
            {"regime": name, "nodes": n, **run, "trained_range": found["ranges"].get((name, n))}
            for (name, n), run in found["runs"].items()
        ]
        more["regimes"] = [vars(one) for one in regimes(size)]
        more["constants"] |= {"call_ms": 1e3 * call_seconds(found), "start_seconds": found["start_seconds"]}
        print("\n" + table(rows))
    if "beside" in arguments.only:
        more["constants"]["mlflow_row_ms"] = 1e3 * measure_mlflow(2 if arguments.quick else 25)
        print(f"\nMLflow on SQLite: {more['constants']['mlflow_row_ms']:.1f} ms a row of one SAE")
    if "simulated" in arguments.only:
        call = more["constants"].setdefault("call_ms", arguments.call_ms)
        more["simulated"] = simulate_all(size, call / 1e3)
        print(f"\nsimulated with {call:.2f} ms a call\n{simulated_table(more['simulated'])}")
        if "mlflow_row_ms" in more["constants"]:
            more["beside"] = beside_rows(more["simulated"], more["constants"]["mlflow_row_ms"] / 1e3)
            print(f"\nshares of what there is\n{beside_table(more['beside'])}")
        figures += [
            {"name": f"simulated, {row['kind']}, {row['nodes']} node(s), efficiency", "value": row["efficiency"],
             "unit": "x", "goal": None, "holds": None} for row in more["simulated"]
        ]  # fmt: skip
    print(f"\nMedians of {arguments.repeats}.")
    if arguments.quick:
        print("QUICK: next to no time. These figures mean nothing.")
    if described["load_average"] > BUSY:
        print(f"Something else was running (load average {described['load_average']}).")
    if arguments.json:
        write_result(arguments, described, VERSIONS, repeats=arguments.repeats, figures=figures, **more)


def constants() -> dict[str, float]:
    """What the lengths, bytes and shares follow from, and these."""
    return {
        "gpu_flops": GPU_FLOPS, "harvest_flops_a_token": HARVEST_FLOPS, "step_flops_a_token": STEP_FLOPS,
        "block_tokens": BLOCK_TOKENS, "harvest_seconds": HARVEST_SECONDS, "step_seconds_an_sae": STEP_SECONDS,
        "real_block_bytes": REAL_BLOCK_BYTES, "nic_bytes_a_second": NIC_BYTES,
        "nic_bytes_a_second_of_8_gpus": NIC_BYTES_OF_EIGHT, "store_of_node": STORE_OF_NODE,
        "checkpoint_bytes": CHECKPOINT_BYTES, "storage_bytes_a_second": STORAGE_BYTES, "run_tokens": RUN_TOKENS,
    }  # fmt: skip


def _arguments() -> argparse.Namespace:
    options = parser(__doc__, repeats=False)
    options.add_argument("--repeats", metavar="N", type=count, help=f"runs of each side; {REPEATS} unless given")
    options.add_argument("--call-ms", metavar="MS", type=float, default=CALL_MS,
                         help=f"a call of the actor, where it is not measured; {CALL_MS} unless given")  # fmt: skip
    return parse_rows(options, NAMES, REPEATS)


if __name__ == "__main__":
    main()
