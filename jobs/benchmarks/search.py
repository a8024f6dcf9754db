"""What deciding on the way saves: a full grid of SAEs against a coarse one that is pruned and then filled.

    python jobs/benchmarks/search.py [--quick] [--json FILE] [--repeats N]

The grid is five architectures x six or seven sparsity values at two hook points of the demo model. The other side is
the same spec with every third sparsity value and `search: {prune: true, fill: 14}`. Compared is the hypervolume of (log
L0, CE recovered) inside the L0 band on the report split (1 would be an SAE that recovers everything at the band's lower
end; see `pareto.hypervolume`), and what it took in SAE-tokens.

A third run is the whole grid with `search: {prune: true}` alone, to judge its decisions: an SAE was stopped wrongly
when the full grid, where it was trained to its end, has it on the front of its hook point, not dominated by a paired
difference. Each run is `penstock run` in a home of its own, so that nothing is shared.

`--quick` makes the same decisions without Ray on a few thousand tokens. It only shows that the benchmark still works.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from common import Comparison, interleaved, machine, parser, report, timed

from penstock.batches import Schedule, batches
from penstock.model_host import ModelHost
from penstock.pack import Pack
from penstock.pareto import hypervolume
from penstock.plan import PlannedSAE, members, plan_packs, plan_sae, plan_saes, read_sweep, training_settings
from penstock.search import Figures, Point, Pruning, propose, rung_steps
from penstock.storage import Storage
from penstock.subjects import Subject, load_subject
from penstock.tokens import build_token_store
from sae_core import calibrate, parse_settings

GRID = """\
model: {name: demo}
data: {dataset: demo, context_size: 128, search_tokens: 30k, report_tokens: 30k, block_tokens: 64k}
hook_points: [blocks.1.hook_resid_post, blocks.4.hook_resid_post]
train: {tokens: 500k, batch_tokens: 512, lr: 4.0e-3, lr_warm_up_steps: 50, checkpoints: 2}
saes:
  - {architecture: standard, d_sae: 8x, lr: 8.0e-3, l1_coefficient: [0.7, 1, 1.4, 2, 2.8, 4], l1_warm_up_steps: 200}
  - {architecture: gated, d_sae: 8x, lr: 8.0e-3, l1_coefficient: [0.7, 1, 1.4, 2, 2.8, 4], l1_warm_up_steps: 200}
  - {architecture: topk, d_sae: 8x, k: [4, 6, 8, 12, 16, 24, 32]}
  - {architecture: batch_topk, d_sae: 8x, k: [4, 6, 8, 12, 16, 24, 32]}
  - {architecture: jumprelu, d_sae: 8x, target_l0: [4, 6, 8, 12, 16, 24, 32]}
baselines: {k: []}
resources: {model_hosts: 1, cpus_per_host: 0.5, host_threads: 2, cpus_per_pack: 0.75}
"""
BAND = (3.5, 35.0)
AXES = ("l1_coefficient", "k", "target_l0")
GRID_SIDE, PRUNED_SIDE, SEARCHED_SIDE = "full grid", "the grid, pruned", "prune and fill"
FILL, QUICK_FILL = 14, 3
VERSIONS = ("penstock", "torch", "ray")
TOKENS_GOAL, HYPERVOLUME_GOAL, WRONG_GOAL = 0.6, 1.0, 0.05
QUICK = {
    "hook_points": ["blocks.1.hook_resid_post"],
    "data": {"dataset": "demo", "context_size": 128, "search_tokens": 512, "report_tokens": 512, "block_tokens": 8192},
    "train": {"tokens": 4096, "batch_tokens": 256, "lr": 4.0e-3},
    "saes": [
        {"architecture": "standard", "d_sae": "2x", "l1_coefficient": [1, 8]},
        {"architecture": "topk", "d_sae": "2x", "k": [4, 8, 12, 32]},
        {"architecture": "topk", "d_sae": "2x", "k": [33], "lr": 1e-6},  # learns nothing, and is stopped
    ],
}


@dataclass(frozen=True)
class Side:
    """One run: the table of its SAEs on the report split, and what it took."""

    table: pd.DataFrame
    sae_tokens: float
    seconds: float


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as folder:
        (_quick if arguments.quick else _full)(arguments, Path(folder))


def _full(arguments: argparse.Namespace, folder: Path) -> None:
    described = machine()
    grid = yaml.safe_load(GRID)
    specs = _specs(folder, grid, FILL)
    runs = interleaved({name: partial(_run, spec, folder) for name, spec in specs.items()}, arguments.repeats)
    rows, notes = _compare(runs, grid["hook_points"], quick=False)
    report("prune and fill against the full grid", rows, arguments, described, VERSIONS, notes)


def _quick(arguments: argparse.Namespace, folder: Path) -> None:
    described = machine()
    grid = yaml.safe_load(GRID) | QUICK
    specs = _specs(folder, grid, QUICK_FILL)
    runs = interleaved({name: partial(_here, spec, folder) for name, spec in specs.items()}, arguments.repeats)
    rows, notes = _compare(runs, grid["hook_points"], quick=True)
    notes.append("QUICK: without Ray, on a few thousand tokens. These figures mean nothing.")
    report("quick check of the search benchmark", rows, arguments, described, VERSIONS, notes)


def _specs(folder: Path, grid: Mapping[str, Any], fill: int) -> dict[str, Path]:
    """The spec of each side: the last one with every third sparsity value, to be pruned and filled."""
    saes = [{name: value[::3] if name in AXES else value for name, value in entry.items()} for entry in grid["saes"]]
    return {
        GRID_SIDE: _write(folder, "grid", grid),
        PRUNED_SIDE: _write(folder, "pruned", {**grid, "search": {"prune": True}}),
        SEARCHED_SIDE: _write(folder, "searched", {**grid, "saes": saes, "search": {"prune": True, "fill": fill}}),
    }


def _write(folder: Path, name: str, spec: Mapping[str, Any]) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, **spec, "select": {"l0_band": list(BAND)}}), encoding="utf-8")
    return path


# ---- whole runs -----------------------------------------------------------------------------------------------------


def _run(spec_path: Path, folder: Path) -> Side:
    with tempfile.TemporaryDirectory(dir=folder) as home:
        command = [sys.executable, "-m", "penstock.cli"]
        _, seconds = timed([*command, "run", str(spec_path), "--home", home], folder / f"{spec_path.stem}.log")
        timed([*command, "front", spec_path.stem, "--json", "--home", home], folder / "front.json")
        [result] = Path(home).glob("sweeps/*/result.json")
        cost = json.loads(result.read_text(encoding="utf-8"))["cost"]
    table = pd.DataFrame(json.loads((folder / "front.json").read_text(encoding="utf-8")))
    return Side(table, cost["sae_tokens"], seconds)


# ---- quick ----------------------------------------------------------------------------------------------------------


def _here(spec_path: Path, folder: Path) -> Side:
    """The decisions of a sweep on one block, without Ray."""
    spec, model = read_sweep(spec_path)
    training = training_settings(spec.train)
    with tempfile.TemporaryDirectory(dir=folder) as home:
        storage = Storage(home)
        store = build_token_store(spec.data, spec.model, spec.train, storage)
        schedule = Schedule(tuple(map(int, store.kept_per_block)), spec.train.batch_tokens, spec.train.steps)
        host = ModelHost(spec.model, device="cpu")
        [hook_point] = spec.hook_points
        x = torch.from_numpy(host.harvest(store, spec.data, 0, [hook_point])[hook_point])
        probe = host.sample(store, spec.data, "search", spec.data.search_tokens, [hook_point])
        saes = plan_saes(spec, model, store.train_id)
        pruned: dict[str, int] = {}  # SAE -> tokens

        def train(saes: Sequence[PlannedSAE]) -> None:
            [planned] = plan_packs(spec, saes)
            pack = Pack(members(planned, {}), training, {hook_point: calibrate(x)}, storage, log=lambda message: None)
            pruning = Pruning({sae.sae_id: sae.as_peer(spec.train) for sae in saes}, spec.search.margin)
            for sae in saes:
                pruning.begin(sae.sae_id)
            for step, batch in batches(schedule, 0, len(x), 0):
                pack.step(step, {hook_point: x[batch]})
                if spec.search.prune and step + 1 in rung_steps(training.steps):
                    for sae_id, figures in pack.measure(step + 1, probe, {hook_point: x[batch]}).items():
                        pruning.reach(sae_id, step + 1, Figures(**figures))
                    reasons = {stop.sae_id: stop.reason for stop in pruning.decide()}
                    pack.prune(reasons, lambda sae_id, run: None)
                    pruned.update({sae_id: (step + 1) * training.batch_tokens for sae_id in reasons})
            pack.finish()

        def figures(saes: Sequence[PlannedSAE], split: Any) -> dict[str, dict[str, float]]:
            there = {sae.sae_id: load_subject(Subject(sae.sae_id, f"saes/{sae.sae_id}/final"), storage)
                     for sae in saes if sae.sae_id not in pruned}  # fmt: skip
            sums = host.evaluate(store, spec.data, hook_point, there, split, 0, store.n_rows(split))
            return {sae_id: one.metrics() for sae_id, one in sums.items()}

        train(saes)
        if spec.search.fill:
            found = figures(saes, "search")
            points = [Point(sae.sae_id, sae.site, sae.settings.model_dump(exclude_none=True), one["l0"],
                            one["ce_recovered"])
                      for sae in saes if (one := found.get(sae.sae_id)) is not None]  # fmt: skip
            more = [plan_sae(spec, model, store.train_id, one.site, parse_settings(one.settings))
                    for one in propose(points, spec.select.l0_band, spec.search.fill)]  # fmt: skip
            more = [sae for sae in more if sae.sae_id not in {known.sae_id for known in saes}]
            if more:
                train(more)
                saes = [*saes, *more]
        found = figures(saes, "report")
    rows = [
        {"sae_id": sae.sae_id, "hook_point": sae.hook_point, "status": "pruned" if sae.sae_id in pruned else "finished",
         "l0": one.get("l0"), "ce_recovered": one.get("ce_recovered"), "on_front": True}
        for sae in saes for one in [found.get(sae.sae_id, {})]
    ]  # fmt: skip
    whole = training.steps * training.batch_tokens
    return Side(pd.DataFrame(rows), sum(pruned.get(sae.sae_id, whole) for sae in saes), 0.0)


# ---- the figures ----------------------------------------------------------------------------------------------------


def _compare(
    runs: Mapping[str, Sequence[Side]], hook_points: Sequence[str], quick: bool
) -> tuple[list[Comparison], list[str]]:
    """The last run of each side counts: training is deterministic but for when a decision arrives."""
    grid, pruned, searched = (runs[name][-1] for name in (GRID_SIDE, PRUNED_SIDE, SEARCHED_SIDE))
    goals = [None] * 3 if quick else [HYPERVOLUME_GOAL, TOKENS_GOAL, WRONG_GOAL]
    rows = []
    for hook_point in hook_points:
        volumes = [hypervolume(one.table[one.table["hook_point"] == hook_point], BAND) for one in (searched, grid)]
        rows.append(Comparison(f"hypervolume, {hook_point}", "", *volumes, goals[0], lower_is_better=False))
    tokens = [one.sae_tokens / 1e6 for one in (searched, grid, pruned)]
    rows.append(Comparison("SAE-tokens", "M", *tokens[:2], goals[1], at_most=True))
    finished = [float((one.table["status"] == "finished").sum()) for one in (searched, grid)]
    rows.append(Comparison("SAEs trained to the end", "", *finished, lower_is_better=None))
    rows.append(Comparison("wall", "s", searched.seconds, grid.seconds, lower_is_better=None))
    stopped = set(pruned.table.loc[pruned.table["status"] == "pruned", "sae_id"])
    fronts = grid.table[grid.table["on_front"].astype(bool)]
    wrongly = fronts[fronts["sae_id"].isin(stopped)]
    rows.append(Comparison("the grid, pruned: SAE-tokens", "M", tokens[2], tokens[1], at_most=True))
    rows.append(Comparison("the grid, pruned: stopped wrongly, of those stopped", "", float(len(wrongly)),
                           float(len(stopped)), goals[2] if stopped else None, at_most=True))  # fmt: skip
    notes = [f"Hypervolume inside L0 {BAND[0]:g} to {BAND[1]:g}, reference point (L0 {BAND[1]:g}, CE recovered 0), "
             "report split."]  # fmt: skip
    shown = ("architecture", "hook_point", "sparsity", "l0", "ce_recovered")
    notes += [f"stopped wrongly: {', '.join(str(row[name]) for name in shown if name in row)}"
              for row in wrongly.to_dict("records")]  # fmt: skip
    return rows, notes


if __name__ == "__main__":
    main()
