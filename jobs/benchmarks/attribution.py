"""Attribution of logits to features: how many of the largest true effects an estimate finds, and in what time.

    python jobs/benchmarks/attribution.py [--quick] [--json FILE] [--only NAME,...] [--threads N]
    python jobs/benchmarks/attribution.py --sweep NAME [--home DIR] ...

The true effect of a node, a feature at a position or the error term there, is the metric less the metric with the node,
and it alone, set to 0: `ablate` measures it, one pass a node. `attribute` estimates all of them in a few passes. Of
both, the 50 largest at a hook point are taken, features and errors alike; the recall is the share of the former that is
among the latter. The metric is the difference of the model's two largest logits at the last position; all is done with
the final norm free, and with its scale held in both.

The SAEs are all finished ones of a sweep on the demo model (`--sweep`; Matryoshka prefixes left out), or without one
two that are trained here in half a minute. A figure is the mean over SAEs and prompts at a hook point; "lowest" is the
SAE with the lowest mean over prompts. Times are CPU seconds, which depend less on what else a machine does.

Rows (`--only` takes their names):
  short   8 prompts of 15 to 33 tokens, pieces of code that call for one name
  long    the first 48 tokens of 4 pieces of Python's own library, the corpus that the SAEs are trained on
  edges   on both, effects of all nodes of an SAE on the 10 most active features of one at the next hook point: of the
          50 largest true ones, those among the 50 largest of the gradient. Each SAE is followed by the one of its
          architecture, or else of all, with the nearest L0. Also with upstream latents left out of both that fire at
          more than 0.9 of the positions.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from common import count, machine, parse_rows, parser, print_machine, write_result
from demo_saes import PROMPTS, train_saes
from fronts import print_table
from torch import Tensor, nn

from penstock.models import load_model
from penstock.spec import ModelSpec
from sae_core import SAE
from sae_core.analysis.attribution import ERROR, Attribution, ablate, attribute, logit_difference, recall
from sae_core.analysis.feature_edges import Edges, edges

TOP = 50
TARGETS = 10
DENSE = 0.9  # of the positions
GOAL = 0.7
ROWS = ("short", "long", "edges")
VERSIONS = ("penstock", "torch", "transformer-lens")
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient"},
    "integrated_gradients": {"method": "integrated_gradients"},
    "integrated_gradients, paths=8, steps=1": {"method": "integrated_gradients", "paths": 8, "steps": 1},
    "integrated_gradients, paths=1, steps=16": {"method": "integrated_gradients", "paths": 1, "steps": 16},
    "direct": {"method": "direct"},
}
WITH_GOAL = ("gradient", "integrated_gradients")
LIBRARY = (("ast.py", 300), ("tarfile.py", 4000), ("argparse.py", 9000), ("heapq.py", 2000))  # file, first character
LONG_TOKENS = 48
QUICK_TOKENS = 12


@dataclass(frozen=True)
class Named:
    """An SAE and what it is called."""

    name: str
    architecture: str
    l0: float
    sae: SAE

    @property
    def hook_point(self) -> str:
        return self.sae.cfg.metadata["hook_name"]


@dataclass(frozen=True)
class Point:
    """One SAE (or pair of them) on one prompt. `recall` and `seconds` by method, "ablation" among the latter."""

    sae: str
    hook_point: str
    architecture: str
    l0: float
    prompts: str
    prompt: int
    norm: str
    n_nodes: int
    recall: Mapping[str, float]
    seconds: Mapping[str, float]


# ---- SAEs and prompts -----------------------------------------------------------------------------------------------


def saes_of(arguments: argparse.Namespace) -> list[Named]:
    if arguments.sweep is None:
        with tempfile.TemporaryDirectory(prefix="penstock-attribution-") as folder:
            saes = [SAE.load(path) for path in train_saes(Path(folder), arguments.train_tokens).values()]
        return [Named("topk", "topk", 16.0, sae) for sae in saes]
    import penstock

    front = penstock.front(arguments.sweep, home=arguments.home)
    front = front[front["prefix"].isna()]
    return [
        Named(one.sae_id, one.architecture, float(one.l0),
              penstock.load_sae(arguments.sweep, sae=one.sae_id, home=arguments.home))
        for one in front.itertuples()
    ]  # fmt: skip


def prompts_of(model: nn.Module, quick: bool) -> dict[str, list[Tensor]]:
    library = Path(os.__file__).parent
    texts = [(library / name).read_text(encoding="utf-8")[start : start + 2000] for name, start in LIBRARY]
    prompts = {
        "short": [model.to_tokens(text) for text in PROMPTS],
        "long": [model.to_tokens(text)[:, :LONG_TOKENS] for text in texts],
    }
    return {name: [ids[0][:, :QUICK_TOKENS]] for name, ids in prompts.items()} if quick else prompts


def metric_of(model: nn.Module, ids: Tensor) -> Any:
    with torch.no_grad():
        best, second = model(ids)[0, -1].topk(2).indices.tolist()
    return logit_difference(best, second)


# ---- measuring ------------------------------------------------------------------------------------------------------


def timed(do: Callable, *given: Any, **options: Any) -> tuple[Any, float]:
    started = time.process_time()
    return do(*given, **options), time.process_time() - started


def points_of(model: nn.Module, saes: Sequence[Named], kind: str, prompts: Sequence[Tensor]) -> Iterator[Point]:
    for one in saes:
        for index, ids in enumerate(prompts):
            metric = metric_of(model, ids)
            for norm, freeze in (("free", False), ("frozen", True)):
                true, took = timed(ablate, model, one.sae, ids, metric, freeze_norm=freeze)
                found, seconds = {}, {"ablation": took}
                for name, options in METHODS.items():
                    estimate, seconds[name] = timed(
                        attribute, model, one.sae, ids, metric, freeze_norm=freeze, **options
                    )
                    found[name] = _recall(estimate, true)
                n_nodes = len(true[one.hook_point])
                yield Point(one.name, one.hook_point, one.architecture, one.l0, kind, index, norm, n_nodes, found,
                            seconds)  # fmt: skip


def _recall(estimate: Attribution, true: Attribution) -> float:
    (value,) = recall(estimate, true, top=TOP).values()
    return value


def pairs_of(saes: Sequence[Named]) -> list[tuple[Named, Named]]:
    """Each SAE but those of the last hook point, and one of the next."""
    by_layer: dict[str, list[Named]] = {}
    for one in saes:
        by_layer.setdefault(one.hook_point, []).append(one)
    layers = sorted(by_layer, key=lambda name: int(name.split(".")[1]))
    return [(up, min(by_layer[behind], key=partial(_unlike, up))) for here, behind in pairwise(layers)
            for up in by_layer[here]]  # fmt: skip


def _unlike(up: Named, down: Named) -> tuple[bool, float]:
    return down.architecture != up.architecture, abs(down.l0 - up.l0)


def edge_points_of(
    model: nn.Module, pairs: Sequence[tuple[Named, Named]], kind: str, prompts: Sequence[Tensor]
) -> Iterator[Point]:
    for up, down in pairs:
        for index, ids in enumerate(prompts):
            found, seconds = {}, {}
            for method in ("ablation", "gradient"):
                found[method], seconds[method] = timed(
                    edges, model, up.sae, down.sae, ids, top=TARGETS, method=method
                )
            true, estimate = found["ablation"], found["gradient"]
            recalls = {"all edges": _edge_recall(true, estimate, np.ones(len(true.up_latent), dtype=bool)),
                       "without dense latents": _edge_recall(true, estimate, ~_dense(true))}  # fmt: skip
            layers = f"{up.hook_point} to {down.hook_point}"
            yield Point(f"{up.name} to {down.name}", layers, up.architecture, up.l0, kind, index, "free",
                        true.effect.size, recalls, seconds)  # fmt: skip


def _dense(true: Edges) -> np.ndarray:
    """Which upstream nodes are of a latent that fires nearly everywhere: bool [upstream]."""
    latents, counts = np.unique(true.up_latent, return_counts=True)
    n_positions = (true.up_latent == ERROR).sum()
    return np.isin(true.up_latent, latents[(counts > DENSE * n_positions) & (latents != ERROR)])


def _edge_recall(true: Edges, estimate: Edges, kept: np.ndarray) -> float:
    largest = [set(np.argsort(-np.abs(one.effect[:, kept]), axis=None, kind="stable")[:TOP].tolist())
               for one in (true, estimate)]  # fmt: skip
    return len(largest[0] & largest[1]) / TOP


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A method at a hook point (or between two) on one kind of prompts."""

    hook_point: str
    prompts: str
    norm: str
    method: str
    mean: float
    lowest: float
    goal: float | None

    @property
    def holds(self) -> bool | None:
        return None if self.goal is None else self.mean >= self.goal


def rows_of(points: Sequence[Point], with_goal: Sequence[str]) -> list[Row]:
    rows = []
    for key in dict.fromkeys((point.hook_point, point.prompts, point.norm) for point in points):
        here = [point for point in points if (point.hook_point, point.prompts, point.norm) == key]
        for method in here[0].recall:
            by_sae: dict[str, list[float]] = {}
            for point in here:
                by_sae.setdefault(point.sae, []).append(point.recall[method])
            means = [mean(values) for values in by_sae.values()]
            rows.append(Row(*key, method, mean(means), min(means), GOAL if method in with_goal else None))
    return rows


def print_tables(
    points: Sequence[Point], edge_points: Sequence[Point], rows: Sequence[Row], edge_rows: Sequence[Row]
) -> None:
    if points:
        _print_recall(f"Recall of the {TOP} largest true effects", rows, points)
        _print_seconds("CPU seconds a prompt, means over SAEs and prompts", points)
    if edge_points:
        _print_recall(f"Edges: recall of the {TOP} largest true ones by the gradient", edge_rows, edge_points)
        _print_seconds("Edges: CPU seconds a prompt", edge_points)


def _print_recall(title: str, rows: Sequence[Row], points: Sequence[Point]) -> None:
    n_saes = {key: len({point.sae for point in points if point.hook_point == key}) for key in
              dict.fromkeys(point.hook_point for point in points)}  # fmt: skip
    print_table(
        title, ["hook point", "SAEs", "prompts", "norm", "method", "mean", "lowest", "goal"],
        [[row.hook_point, str(n_saes[row.hook_point]), row.prompts, row.norm, row.method, f"{row.mean:.3f}",
          f"{row.lowest:.3f}", "" if row.goal is None else f"{row.goal:g} {'holds' if row.holds else 'MISSED'}"]
         for row in rows],
    )  # fmt: skip


def _print_seconds(title: str, points: Sequence[Point]) -> None:
    names = list(points[0].seconds)
    print_table(
        title, ["hook point", "prompts", "effects", *names],
        [[hook_point, prompts, f"{effects:.0f}", *(f"{seconds[name]:.3f}" for name in names)]
         for hook_point, prompts, effects, seconds in _seconds(points)],
    )  # fmt: skip


def _seconds(points: Sequence[Point]) -> Iterator[tuple[str, str, float, dict[str, float]]]:
    for key in dict.fromkeys((point.hook_point, point.prompts) for point in points):
        here = [point for point in points if (point.hook_point, point.prompts) == key]
        seconds = {name: mean(point.seconds[name] for point in here) for name in here[0].seconds}
        yield *key, mean(point.n_nodes for point in here), seconds


def figures_of(points: Sequence[Point], rows: Sequence[Row], title: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        name = f"{title}{row.hook_point}, {row.prompts}, norm {row.norm}, {row.method}, recall"
        yield {"name": name, "value": row.mean, "unit": "", "goal": row.goal, "holds": row.holds}
        yield {"name": f"{name}, lowest", "value": row.lowest, "unit": "", "goal": None, "holds": None}
    for hook_point, prompts, _, seconds in _seconds(points):
        for name, value in seconds.items():
            yield {"name": f"{title}{hook_point}, {prompts}, {name}, CPU seconds", "value": value, "unit": "s",
                   "goal": None, "holds": None}  # fmt: skip


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    options = parser(__doc__, repeats=False)
    options.add_argument("--sweep", metavar="NAME", help="of the demo model, whose SAEs are looked at")
    options.add_argument("--home", metavar="DIR", help="where it is; $PENSTOCK_HOME or ./penstock-home unless given")
    options.add_argument("--threads", metavar="N", type=count, default=1, help="of torch; 1")
    arguments = parse_rows(options, ROWS, repeats=1)
    arguments.train_tokens = 16_384 if arguments.quick else 250_000
    torch.set_num_threads(arguments.threads)
    described = machine()
    saes, model = saes_of(arguments), load_model(ModelSpec(name="demo"), "cpu")
    prompts = prompts_of(model, arguments.quick)
    points: list[Point] = []
    edge_points: list[Point] = []
    for kind in ("short", "long"):
        if kind in arguments.only:
            points += _watched(points_of(model, saes, kind, prompts[kind]), kind)
    if "edges" in arguments.only:
        for kind, ids in prompts.items():
            edge_points += _watched(edge_points_of(model, pairs_of(saes), kind, ids), f"edges, {kind}")
    rows, edge_rows = rows_of(points, () if arguments.quick else WITH_GOAL), rows_of(edge_points, ())
    print()
    print_machine(described, VERSIONS)
    print_tables(points, edge_points, rows, edge_rows)
    print(f"\n{arguments.threads} thread(s); load average before the run {described['load_average']}")
    if arguments.quick:
        print("QUICK: two SAEs that have learnt nothing, one prompt of each kind. These figures mean nothing.")
    if arguments.json:
        figures = [*figures_of(points, rows, ""), *figures_of(edge_points, edge_rows, "edges, ")]
        write_result(arguments, described, VERSIONS, sweep=arguments.sweep, threads=arguments.threads,
                     figures=figures, points=[vars(point) for point in [*points, *edge_points]])  # fmt: skip


def _watched(points: Iterator[Point], kind: str) -> Iterator[Point]:
    sae = None
    for point in points:
        if point.sae != sae:
            sae = point.sae
            print(f"[{time.strftime('%H:%M:%S')}] {kind}: {point.architecture}, L0 {point.l0:.1f}, {point.hook_point}",
                  flush=True)  # fmt: skip
        yield point


if __name__ == "__main__":
    main()
