"""The front of L0 against CE recovered: SAEs trained by Penstock and by the released SAELens, one evaluation for both.

    python jobs/benchmarks/frontier.py [--cache DIR] [--plot FILE] [--json FILE] [--architectures a,b] [--jobs N] ...

On the activations of the demo model (`jobs/specs/demo.yaml`), harvested once, both sides train SAEs of one size on the
same tokens in the same order, in batches of one size, with the same schedules and seeds (`sides.py`). What a side saves
is evaluated in the model by `sae_core.evaluation.evaluate_rows` on the report split, with zero ablation.

Both sides are tuned alike. For every architecture and hook point each side tries every `--lr` and every variant in
`VARIANTS` with seed 0 on its whole grid of sparsities (top-k architectures: at k 16 only), and goes on with the one
that recovers the most CE at L0 16 on the *search* split. That one is trained with all seeds and all sparsities.

The table interpolates each seed's front (monotone cubic, in log L0) at fixed L0 and shows the mean over seeds with its
95% t-interval; the difference has Welch's. An L0 beyond a front by more than a tenth, or between SAEs whose L0 differ
more than fourfold, is not reached: no figure.

Whatever is trained is kept in `--cache` under a hash of all that it is made from (for our side with `sae_core`'s
source), so that an interrupted run goes on where it was, and only a side that has changed is trained again.
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import ROOT, machine, parser, print_machine, write_result
from fronts import REACH, difference_interval, holds, interpolate, mean_interval, per_seed, print_table, shown, verdict
from sides import SIDES, Recipe, Schedule, Side, train, variants

import sae_core
from penstock.batches import Schedule as Batches
from penstock.batches import batches
from penstock.identity import content_id
from penstock.model_host import ModelHost
from penstock.plan import read_sweep, training_settings
from penstock.splits import Split
from penstock.storage import Storage
from penstock.subjects import BASES
from penstock.tokens import TokenStore, build_token_store
from sae_core import SAE, Calibration, TopKBasis, calibrate

SPEC = ROOT / "jobs/specs/demo.yaml"
L0S = (4, 8, 16, 32)  # to a quarter of the demo model's d_in
TUNED_AT = 16
LRS = (2e-3, 4e-3, 8e-3, 1.6e-2)
D_SAE = 1024
WIDTHS = (64, 128, 256, 512, 1024)
KS = (3, 4, 8, 16, 32, 40)
VARIANTS = variants(l1=(0.5, 1, 2, 4, 8, 16), k=KS, l0=(0.1, 0.3, 1, 3, 10), widths=WIDTHS)
EVALUATOR = ("evaluation.py", "hooked.py", "functional.py", "baselines.py")
TOGETHER = 8  # SAEs that share the clean and the ablated passes of one evaluation
QUICK = {
    "hook_points": ["blocks.1.hook_resid_post"],
    "data": {"dataset": "demo", "context_size": 128, "search_tokens": 256, "report_tokens": 512, "block_tokens": 4096},
    "train": {"tokens": 3072, "batch_tokens": 256},
}
QUICK_ARCHITECTURES, QUICK_LRS, QUICK_SPARSITIES = ("standard", "topk"), (4e-3,), 2
VERSIONS = ("penstock", "sae-lens", "torch", "transformers", "transformer-lens")


# ---- the task -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What both sides are given. It travels to worker processes: all data is below `folder`."""

    folder: str  # the cache
    spec: str  # YAML
    store_id: str
    stream: str  # id of the batches
    schedule: Schedule

    def activations(self, hook_point: str) -> np.ndarray:
        return np.load(f"{self.folder}/activations/{self.stream}/{hook_point}.npy", mmap_mode="r")

    def calibration(self, hook_point: str) -> Calibration:
        with np.load(f"{self.folder}/activations/{self.stream}/{hook_point}.npz") as arrays:
            return Calibration.from_tensors({name: torch.from_numpy(arrays[name]) for name in arrays})


def prepare(spec_text: str, folder: Path) -> Task:
    """Tokenise, harvest every batch of the run in its order, and calibrate on block 0, unless that is there."""
    spec, model, store = _read(spec_text, str(folder))
    training = training_settings(spec.train)
    schedule = Schedule(
        training.steps, training.batch_tokens, training.lr_warm_up_steps, training.decay_steps,
        training.dead_after_tokens, coefficient_warm_up_steps=training.steps // 5,
    )  # fmt: skip
    order = Batches(tuple(map(int, store.kept_per_block)), schedule.batch_tokens, schedule.steps)
    harvested = [model.fingerprint, spec.model.model_dump(), store.train_id, schedule.batch_tokens, order.steps]
    stream = content_id(harvested)
    task = Task(str(folder), spec_text, store.id, stream, schedule)
    place = folder / "activations" / stream
    missing = [name for name in spec.hook_points if not (place / f"{name}.npz").exists()]
    if missing:
        place.mkdir(parents=True, exist_ok=True)
        _harvest(task, order, missing, model.hook_points, place)
    return task


@cache
def _read(spec_text: str, folder: str) -> tuple[Any, Any, TokenStore]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "spec.yaml")
        path.write_text(spec_text, encoding="utf-8")
        spec, model = read_sweep(path)
    return spec, model, build_token_store(spec.data, spec.model, spec.train, Storage(folder))


@cache
def _host(spec_text: str, folder: str) -> ModelHost:
    return ModelHost(_read(spec_text, folder)[0].model, device="cpu", threads=1)


def _harvest(task: Task, order: Batches, names: Sequence[str], d_in: Mapping[str, int], place: Path) -> None:
    spec, _, store = _read(task.spec, task.folder)
    host = _host(task.spec, task.folder)
    size = task.schedule.batch_tokens
    out = {
        name: np.lib.format.open_memmap(place / f"{name}.npy", "w+", np.float32, (order.steps * size, d_in[name]))
        for name in names
    }
    for block in range(order.n_blocks):
        arrays = host.harvest(store, spec.data, block, names)
        for name, array in arrays.items():
            for step, part in batches(order, block, len(array), 0):
                out[name][step * size : (step + 1) * size] = array[part]
            if block == 0:
                calibration = calibrate(array).to_tensors()
                np.savez(place / f"{name}.partial.npz", **{key: value.numpy() for key, value in calibration.items()})
    for name in names:
        out[name].flush()
        os.replace(place / f"{name}.partial.npz", place / f"{name}.npz")


# ---- training and evaluating, each thing once -----------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One SAE of one side at one hook point. `variant` is a name only: what it means is in the recipe."""

    side: Side
    hook_point: str
    variant: str
    recipe: Recipe

    def folder(self, task: Task) -> Path:
        code = _code_hash() if self.side == "ours" else version("sae-lens")
        made_from = [
            self.side, code, _file_hash(Path(__file__).with_name("sides.py")), self.hook_point, asdict(self.recipe),
            task.stream, asdict(task.schedule),
        ]  # fmt: skip
        return Path(task.folder, "saes", content_id(made_from, 16))

    def figures_file(self, task: Task, split: Split) -> Path:
        return self.folder(task) / f"{split}-{_protocol(task)}.json"

    def figures(self, task: Task, split: Split) -> dict[str, float]:
        return json.loads(self.figures_file(task, split).read_text(encoding="utf-8"))


@cache
def _code_hash() -> str:
    root = Path(sae_core.__file__).parent
    return content_id([[str(path.relative_to(root)), _file_hash(path)] for path in sorted(root.rglob("*.py"))])


@cache
def _file_hash(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def _protocol(task: Task) -> str:
    root = Path(sae_core.__file__).parent
    return content_id([task.store_id, *(_file_hash(root / name) for name in EVALUATOR)])


def _train_one(task: Task, run: Run) -> None:
    torch.set_num_threads(1)
    sae = train(run.side, run.recipe, task.schedule, task.activations(run.hook_point), task.calibration(run.hook_point))
    sae.save(run.folder(task))


def _evaluate_some(task: Task, runs: Sequence[Run], split: Split) -> None:
    """Figures of SAEs of one hook point."""
    torch.set_num_threads(1)
    saes = {str(index): SAE.load(run.folder(task)) for index, run in enumerate(runs)}
    sums = _sums(task, runs[0].hook_point, saes, split)
    for index, run in enumerate(runs):
        _write_json(run.figures_file(task, split), sums[str(index)])


def _sums(task: Task, hook_point: str, saes: Mapping[str, Any], split: Split) -> dict[str, dict[str, float]]:
    spec, _, store = _read(task.spec, task.folder)
    host = _host(task.spec, task.folder)
    sums = host.evaluate(store, spec.data, hook_point, saes, split, 0, store.n_rows(split))
    return {name: sums[name].metrics() for name in saes}


def _baselines_at(task: Task, hook_point: str) -> list[dict[str, Any]]:
    """Top k of the neurons and of the principal components: no training, so one figure each."""
    torch.set_num_threads(1)
    path = Path(task.folder, "bases", f"{content_id([task.stream, hook_point, _protocol(task)])}.json")
    if not path.exists():
        calibration = task.calibration(hook_point)
        saes = {f"{basis}-{k}": getattr(TopKBasis, basis)(calibration, k) for basis in BASES for k in L0S}
        figures = _sums(task, hook_point, saes, "report")
        kinds = [{"kind": name.rsplit("-", 1)[0], "hook_point": hook_point} | figures[name] for name in saes]
        _write_json(path, kinds)
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value), encoding="utf-8")
    os.replace(partial, path)


class Workers:
    """Processes of one thread each; with `jobs` 0 this process."""

    def __init__(self, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) if jobs else None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def each(self, what: str, calls: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The results of `function(*arguments)` for every call, in their order."""
        if self._pool is None:
            return [function(*arguments) for function, *arguments in calls]
        futures = [self._pool.submit(*call) for call in calls]
        started = shown = time.monotonic()
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            if time.monotonic() - shown > 20 or number == len(calls):
                shown = time.monotonic()
                print(f"[{time.strftime('%H:%M:%S')}] {what}: {number} of {len(calls)}, {shown - started:.0f} s",
                      flush=True)  # fmt: skip
        return [future.result() for future in futures]

    def figures(self, task: Task, runs: Sequence[Run], split: Split) -> list[dict[str, float]]:
        """Train what is not trained, evaluate what has no figures, and return the figures of each."""
        new = [run for run in runs if not (run.folder(task) / "cfg.json").exists()]
        self.each("SAEs trained", [(_train_one, task, run) for run in new])
        new = [run for run in runs if not run.figures_file(task, split).exists()]
        calls = []
        for hook_point in sorted({run.hook_point for run in new}):
            here = [run for run in new if run.hook_point == hook_point]
            calls += [(_evaluate_some, task, here[at : at + TOGETHER], split) for at in range(0, len(here), TOGETHER)]
        self.each(f"evaluations on the {split} split", calls)
        return [run.figures(task, split) for run in runs]


# ---- tuning and the final grid --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Front:
    """One side's SAEs of one architecture at one hook point, as it was tuned."""

    side: Side
    architecture: str
    hook_point: str
    variant: str
    lr: float
    tuning: dict[str, float]  # "variant lr" -> CE recovered at TUNED_AT on the search split
    points: list[dict[str, Any]]  # of the report split: settings, seed, l0, ce_recovered, explained_variance, ...

    def at(self, l0: float) -> list[float]:
        """The CE recovered that each seed's front has at `l0`; empty where one does not reach so far."""
        return per_seed(self.points, "ce_recovered", l0)


def trained_fronts(task: Task, workers: Workers, arguments: argparse.Namespace) -> list[Front]:
    """Tune every side of every architecture and hook point, then train the final grid."""
    cells = list(product(SIDES, arguments.architectures, arguments.hook_points))
    tried = _all_figures(task, workers, {cell: list(_tuning_runs(*cell, arguments)) for cell in cells}, "search")
    chosen: dict[Any, tuple[str, float]] = {}
    tuning: dict[Any, dict[str, float]] = {}
    for cell, runs in tried.items():
        points: dict[tuple[str, float], list[tuple[float, float]]] = {}
        for run, figures in runs:
            points.setdefault((run.variant, run.recipe.lr), []).append((figures["l0"], figures["ce_recovered"]))
        scores = {key: _score(of_key) for key, of_key in points.items()}
        chosen[cell] = max(scores, key=lambda key: scores[key])
        tuning[cell] = {f"{variant} {lr:g}": score for (variant, lr), score in scores.items()}
    final = {cell: list(_final_runs(*cell, *chosen[cell], arguments)) for cell in cells}
    return [
        Front(*cell, *chosen[cell], tuning[cell], [
            {**run.recipe.settings, "seed": run.recipe.seed, **figures} for run, figures in runs
        ])
        for cell, runs in _all_figures(task, workers, final, "report").items()
    ]  # fmt: skip


def _all_figures(task: Task, workers: Workers, runs: Mapping[Any, Sequence[Run]], split: Split) -> dict[Any, Any]:
    """Each cell's runs with their figures; all are trained together, so that no process waits for a cell's last."""
    figures = iter(workers.figures(task, [run for of_cell in runs.values() for run in of_cell], split))
    return {cell: [(run, next(figures)) for run in of_cell] for cell, of_cell in runs.items()}


def _score(points: Sequence[tuple[float, float]]) -> float:
    """CE recovered at the L0 that is tuned at. A front that does not come near it loses to all that do."""
    if len(points) == 1:
        return points[0][1]
    value = interpolate(points, TUNED_AT)
    return -min(abs(math.log(max(l0, 1e-9) / TUNED_AT)) for l0, _ in points) if value is None else value


def _tuning_runs(side: Side, architecture: str, hook_point: str, arguments: argparse.Namespace) -> Iterator[Run]:
    for (variant, grid), lr in product(_variants(architecture, side, arguments).items(), arguments.lr):
        exact = [settings for settings in grid if settings.get("k") == TUNED_AT]
        for settings in exact or grid:
            yield Run(side, hook_point, variant, Recipe(architecture, D_SAE, settings, lr, 0))


def _final_runs(
    side: Side, architecture: str, hook_point: str, variant: str, lr: float, arguments: argparse.Namespace
) -> Iterator[Run]:
    for settings, seed in product(_variants(architecture, side, arguments)[variant], range(arguments.seeds)):
        yield Run(side, hook_point, variant, Recipe(architecture, D_SAE, settings, lr, seed))


def _variants(architecture: str, side: Side, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    grids = VARIANTS[architecture][side]
    if not arguments.quick:
        return grids
    return {name: grid[-QUICK_SPARSITIES:] for name, grid in list(grids.items())[:1]}


def baselines(task: Task, workers: Workers, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The figures that an SAE has to beat: neurons, principal components, and a random decoder that stays as it is."""
    found = workers.each("bases", [(_baselines_at, task, name) for name in arguments.hook_points])
    ks = L0S if not arguments.quick else L0S[-1:]
    runs = [
        Run("ours", name, "frozen", Recipe("topk", D_SAE, {"k": k}, max(arguments.lr), 0, {"frozen_decoder": True}))
        for name, k in product(arguments.hook_points, ks)
    ]
    figures = workers.figures(task, runs, "report")
    frozen = [{"kind": "frozen_decoder", "hook_point": run.hook_point, **one}
              for run, one in zip(runs, figures, strict=True)]  # fmt: skip
    return [one for part in found for one in part] + frozen


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Both fronts at one L0. Half-widths are of 95% t-intervals over seeds, 0 for a single seed."""

    hook_point: str
    architecture: str
    l0: int
    ours: tuple[float, float] | None
    theirs: tuple[float, float] | None
    difference: tuple[float, float] | None
    baseline: float

    @property
    def verdict(self) -> str:
        return verdict(self.ours, self.theirs, self.difference)


def compare(fronts: Sequence[Front], baselines: Sequence[Mapping[str, Any]]) -> list[Row]:
    found = {(front.hook_point, front.architecture, front.side): front for front in fronts}
    rows = []
    for hook_point, architecture in dict.fromkeys(key[:2] for key in found):
        here = [one for one in baselines if one["hook_point"] == hook_point]
        for l0 in L0S:
            ours, theirs = (found[hook_point, architecture, side].at(l0) for side in SIDES)
            rows.append(Row(
                hook_point, architecture, l0, mean_interval(ours), mean_interval(theirs),
                difference_interval(ours, theirs),
                max(one["ce_recovered"] for one in here if one["l0"] <= l0 * 1.01),
            ))  # fmt: skip
    return rows


def print_tables(task: Task, fronts: Sequence[Front], rows: Sequence[Row], arguments: argparse.Namespace) -> None:
    print_table("What each side chose on the search split (seed 0): CE recovered at L0 16 of each",
                 ["hook point", "architecture", "side", "chosen", "tried"], [
        [front.hook_point, front.architecture, front.side, f"{front.variant} lr {front.lr:g}",
         ", ".join(f"{name}: {score:.4f}" if score >= 0 else f"{name}: none" for name, score in front.tuning.items())]
        for front in fronts
    ])  # fmt: skip
    table = []
    for front in fronts:
        for settings in {json.dumps(_asked(point)): _asked(point) for point in front.points}.values():
            points = [point for point in front.points if _asked(point) == settings]
            means = [statistics.mean(point[name] for point in points)
                     for name in ("l0", "ce_recovered", "explained_variance", "dead_fraction")]  # fmt: skip
            asked = ", ".join(f"{name} {value}" for name, value in settings.items() if name != "widths")
            table.append([front.hook_point, front.architecture, front.side, asked, f"{means[0]:.2f}",
                          *(f"{mean:.4f}" for mean in means[1:])])  # fmt: skip
    print_table(f"Each SAE on the report split, mean over {arguments.seeds} seeds",
                 ["hook point", "architecture", "side", "asked for", "L0", "CE rec.", "expl. var.", "dead"],
                 table)  # fmt: skip
    print_table(f"CE recovered at equal L0, mean and 95% t-interval over {arguments.seeds} seeds",
                 ["hook point", "architecture", "L0", "Penstock", "SAELens", "difference", "", "best baseline"], [
        [row.hook_point, row.architecture, str(row.l0), shown(row.ours), shown(row.theirs),
         shown(row.difference, "+"), row.verdict, f"{row.baseline:.4f}"]
        for row in rows
    ])  # fmt: skip


def _asked(point: Mapping[str, Any]) -> dict[str, Any]:
    return {name: point[name] for name in ("k", "widths", "l1_coefficient", "l0_coefficient", "target_l0")
            if name in point}  # fmt: skip


def figures_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The table as the JSON's figures. What must hold is that the difference is not below zero beyond the noise."""
    out = []
    for row in rows:
        name = f"{row.hook_point}, {row.architecture}, L0 {row.l0}, CE recovered"
        for side, value in (("ours", row.ours), ("opponent", row.theirs), ("difference", row.difference)):
            last = side == "difference"
            for part, number in zip(("", " (half-width)"), value or (None, None), strict=True):
                judged = last and not part
                out.append({"name": f"{name}, {side}{part}", "value": number, "unit": "", "goal": 0 if judged else None,
                            "holds": holds(row.verdict) if judged else None})  # fmt: skip
    return out


# ---- the plot -------------------------------------------------------------------------------------------------------


def plot(fronts: Sequence[Front], baselines: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """One panel an architecture (across) and hook point (down): each seed's SAEs, and the front through their means."""
    from matplotlib.figure import Figure

    from penstock_dashboards.marks import BASELINES

    architectures = list(dict.fromkeys(front.architecture for front in fronts))
    hook_points = list(dict.fromkeys(front.hook_point for front in fronts))
    looks = {"ours": ("#0b63ce", "o", "Penstock"), "theirs": ("#d1670a", "s", f"SAELens {version('sae-lens')}")}
    size = (max(3.1 * len(architectures) + 1, 8.0), 3.3 * len(hook_points) + 1)
    figure = Figure(figsize=size, dpi=140, facecolor="white")
    grid = figure.subplots(len(hook_points), len(architectures), sharex=True, sharey="row", squeeze=False)
    for (row, hook_point), (column, architecture) in product(enumerate(hook_points), enumerate(architectures)):
        axes = grid[row][column]
        axes.set_xscale("log", base=2)
        axes.grid(True, color="#e4e7ec", linewidth=0.8)
        for kind, style in BASELINES.items():
            points = sorted((one["l0"], one["ce_recovered"]) for one in baselines
                            if one["kind"] == kind and one["hook_point"] == hook_point)  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), color="#8a919e", linestyle=style[1], linewidth=1.2,
                          label=style[0])  # fmt: skip
        for front in fronts:
            if (front.architecture, front.hook_point) == (architecture, hook_point):
                colour, marker, label = looks[front.side]
                axes.plot([p["l0"] for p in front.points], [p["ce_recovered"] for p in front.points], linestyle="",
                          color=colour, marker=marker, markersize=3.5, alpha=0.6)  # fmt: skip
                line = np.geomspace(min(L0S) / REACH, max(L0S) * REACH, 60)
                means = [statistics.mean(values) if (values := front.at(l0)) else math.nan for l0 in line]
                axes.plot(line, means, color=colour, linewidth=1.6, label=label)
        axes.set_xlim(min(L0S) / 1.5, max(L0S) * 1.5)
        axes.set_title(f"{architecture}, {hook_point}", fontsize=9, loc="left")
        axes.set_xticks(L0S, [str(l0) for l0 in L0S])
        if row == len(hook_points) - 1:
            axes.set_xlabel("L0")
        if column == 0:
            axes.set_ylabel("CE recovered")
    for row in range(len(hook_points)):
        seen = [p["ce_recovered"] for front in fronts if front.hook_point == hook_points[row] for p in front.points
                if min(L0S) / REACH <= p["l0"] <= max(L0S) * 1.5]  # fmt: skip
        if seen:
            low = max(min(seen), 0.0)
            grid[row][0].set_ylim(low - 0.05 * (1 - low), 1.0)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    described = machine()
    with tempfile.TemporaryDirectory(prefix="penstock-frontier-") as scratch:
        folder = Path(scratch if arguments.cache is None else arguments.cache).absolute()
        spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
        spec |= QUICK if arguments.quick else {}
        if arguments.tokens:
            spec["train"]["tokens"] = arguments.tokens
        arguments.hook_points = arguments.hook_points or spec["hook_points"]
        spec["hook_points"] = arguments.hook_points
        task = prepare(yaml.safe_dump(spec), folder)
        with Workers(0 if arguments.quick else arguments.jobs) as workers:
            known = baselines(task, workers, arguments)
            found = trained_fronts(task, workers, arguments)
    rows = compare(found, known)
    print()
    print_machine(described, VERSIONS)
    print_tables(task, found, rows, arguments)
    if arguments.quick:
        print("QUICK: a few steps of two architectures. These figures mean nothing.")
    if arguments.plot:
        tokens = task.schedule.steps * task.schedule.batch_tokens
        plot(found, known, arguments.plot, f"Demo model, d_sae {D_SAE}, {tokens:,} tokens, {arguments.seeds} seeds")
    if arguments.json:
        figures = figures_of(rows) if not arguments.quick else [one | {"goal": None, "holds": None}
                                                                for one in figures_of(rows)]  # fmt: skip
        fronts = [asdict(front) for front in found]
        more = {"seeds": arguments.seeds, "fronts": fronts, "baselines": known}
        write_result(arguments, described, VERSIONS, figures=figures, **more)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, repeats=False)
    made.add_argument("--architectures", metavar="A,B", type=_names, default=tuple(VARIANTS),
                      help=f"of {', '.join(VARIANTS)}; all unless given")  # fmt: skip
    made.add_argument("--hook-points", metavar="H,H", type=lambda text: tuple(text.split(",")),
                      help="those of jobs/specs/demo.yaml unless given")  # fmt: skip
    made.add_argument("--seeds", metavar="N", type=int, default=3)
    made.add_argument("--lr", metavar="X,Y", type=lambda text: tuple(map(float, text.split(","))), default=LRS)
    made.add_argument("--tokens", metavar="N", type=int, help="to train on; the demo spec's 500k unless given")
    made.add_argument("--cache", metavar="DIR", type=Path, help="where what is trained is kept, to go on from")
    made.add_argument("--plot", metavar="FILE", type=Path, help="draw both fronts as a PNG")
    made.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="processes of one thread each")
    arguments = made.parse_args()
    if arguments.quick:
        arguments.architectures, arguments.lr, arguments.seeds = QUICK_ARCHITECTURES, QUICK_LRS, 1
    return arguments


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}")
    return names


if __name__ == "__main__":
    main()
