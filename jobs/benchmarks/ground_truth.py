"""Where the truth is known: which features do Penstock's and SAELens' SAEs find in SAELens' synthetic model?

    python jobs/benchmarks/ground_truth.py [--json FILE] [--architectures a,b] [--seeds N] [--quick]

128 features in 48 dimensions, with Zipfian firing rates, correlations, and 16 trees of a parent and three children that
fire only where it does, half of the trees with children that exclude each other. Both sides train SAEs of 128 latents
on the same samples in the same order with the same schedules (`sides.py`), around the true L0. `sae_lens.synthetic`
evaluates both on the same fresh samples:

- MCC: mean cosine of decoder rows and features, matched one to one (arXiv 2505.20254)
- precision, recall, F1: of a latent as a detector of the feature nearest to its decoder row; means over latents

and to these comes, as that package has none,

- absorption: of the samples on which a parent feature is active, the share on which the latent nearest to the parent is
  silent while a latent nearest to a child is not (the idea of arXiv 2409.14507). Less is better.

Each side's learning rate is the one of `LRS` (and the variant of `VARIANTS`) with the highest MCC at the true L0 with
seed 0. Figures are read off each seed's front at half, once and twice the true L0; intervals are 95% t-intervals.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from common import machine, parser, print_machine, write_result
from fronts import difference_interval, holds, mean_interval, per_seed, print_table, shown, verdict
from sides import SIDES, Recipe, Schedule, Side, train, variants

from sae_core import SAE, Calibration, calibrate

N_FEATURES, D_IN, N_TREES, CHILDREN = 128, 48, 16, 3
SCHEDULE = Schedule(steps=1500, batch_tokens=512, lr_warm_up_steps=50, lr_decay_steps=300, dead_after_tokens=50_000,
                    coefficient_warm_up_steps=300)  # fmt: skip
EVALUATED, AT_ONCE = 40_000, 8_000
LRS = (3e-3, 1e-2, 3e-2)
FIGURES = {"mcc": "MCC", "precision": "precision", "recall": "recall", "f1": "F1", "absorption": "absorption"}
LESS_IS_BETTER = ("absorption",)
AROUND = (0.5, 1.0, 2.0)  # times the true L0
KS = (2, 3, 5, 7, 10)  # the true L0 is 4.6
VARIANTS = variants(l1=(1, 2, 4, 6, 9), k=KS, l0=(0.3, 0.6, 1, 2, 4), widths=(16, 32, 64, 128))
VERSIONS = ("penstock", "sae-lens", "torch")
QUICK = Schedule(steps=30, batch_tokens=512, lr_warm_up_steps=0, lr_decay_steps=5, dead_after_tokens=4_000)
QUICK_EVALUATED = 4_000


@dataclass(frozen=True)
class World:
    """The synthetic model, the samples that all SAEs are trained on, and those they are evaluated on."""

    model: Any
    x: np.ndarray  # [steps * batch_tokens, D_IN]
    calibration: Calibration
    n_evaluated: int

    @property
    def families(self) -> dict[int, list[int]]:
        """The children of each parent feature."""
        return {root.feature_index: [child.feature_index for child in root.children]
                for root in self.model.hierarchy.roots}  # fmt: skip

    @property
    def true_l0(self) -> float:
        return float((self.evaluated[1] > 0).float().sum(1).mean())

    @property
    def evaluated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations [n, D_IN] and features [n, N_FEATURES], the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return self.model.sample_with_features(self.n_evaluated)


@cache
def world(schedule: Schedule = SCHEDULE, n_evaluated: int = EVALUATED) -> World:
    """The task, the same in every process."""
    from sae_lens.synthetic import (
        HierarchyConfig,
        LowRankCorrelationConfig,
        OrthogonalizationConfig,
        SyntheticModel,
        SyntheticModelConfig,
        ZipfianFiringProbabilityConfig,
    )

    config = SyntheticModelConfig(
        N_FEATURES,
        D_IN,
        firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.02),
        hierarchy=HierarchyConfig(N_TREES, branching_factor=CHILDREN, max_depth=1, mutually_exclusive_portion=0.5),
        orthogonalization=OrthogonalizationConfig(num_steps=100),
        correlation=LowRankCorrelationConfig(rank=8, correlation_scale=0.1),
        std_firing_magnitudes=0.3,
        seed=0,
    )
    n_tokens = schedule.steps * schedule.batch_tokens
    with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):  # progress bars
        torch.manual_seed(1)
        model = SyntheticModel(config)
        x = np.concatenate([model.sample(size).numpy() for size in _parts(n_tokens, 8192)])
    return World(model, x, calibrate(x[:65_536]), n_evaluated)


def _parts(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


def evaluate(task: World, sae: SAE) -> dict[str, float]:
    """The figures of one SAE: MCC, precision, recall, absorption, L0, explained variance, dead latents."""
    from sae_lens.synthetic import eval_sae_on_synthetic_data

    with torch.random.fork_rng():
        torch.manual_seed(2)
        found = eval_sae_on_synthetic_data(
            sae, task.model.feature_dict, task.model.activation_generator, task.n_evaluated, AT_ONCE
        )
    return {
        "l0": found.sae_l0,
        "mcc": found.mcc,
        "precision": found.classification.precision,
        "recall": found.classification.recall,
        "f1": found.classification.f1_score,
        "absorption": absorption(task, sae),
        "explained_variance": found.explained_variance,
        "dead_fraction": found.dead_latents / sae.d_sae,
    }


@torch.no_grad()
def absorption(task: World, sae: SAE) -> float:
    """The share of absorbed parents, see above."""
    from sae_lens.util import cosine_similarities

    x, features = task.evaluated
    fires = torch.cat([sae.encode(part) != 0 for part in x.split(AT_ONCE)])
    nearest = cosine_similarities(task.model.feature_dict.feature_vectors, sae.W_dec).argmax(1)
    return absorbed_share(fires, features > 0, nearest, task.families)


def absorbed_share(
    fires: torch.Tensor, active: torch.Tensor, nearest: torch.Tensor, families: Mapping[int, Sequence[int]]
) -> float:
    """Over all parents and the samples on which they are active: how often the parent's latent is silent while one of
    its children's is not. fires: [n, d_sae], active: [n, n_features], nearest: [n_features], the latent of each."""
    n_active = n_absorbed = 0
    for parent, children in families.items():
        at = active[:, parent]
        others = [int(nearest[child]) for child in children if nearest[child] != nearest[parent]]
        n_active += int(at.sum())
        n_absorbed += int((at & ~fires[:, nearest[parent]] & fires[:, others].any(1)).sum())
    return n_absorbed / n_active


# ---- both sides -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """One side of one architecture. `points`: the settings and figures of each SAE; `lr`, `variant`: what it chose."""

    side: Side
    architecture: str
    variant: str
    lr: float
    tuning: dict[str, float]
    points: list[dict[str, Any]]


def run(side: Side, architecture: str, lrs: Sequence[float], seeds: int, schedule: Schedule, task: World) -> Result:
    """Tune with seed 0, then train with the other seeds."""

    def points(grid: Sequence[Mapping[str, Any]], lr: float, seed: int) -> list[dict[str, Any]]:
        recipes = [Recipe(architecture, N_FEATURES, settings, lr, seed) for settings in grid]
        return [
            {**recipe.settings, "seed": seed, **evaluate(task, train(side, recipe, schedule, task.x, task.calibration))}
            for recipe in recipes
        ]

    grids = VARIANTS[architecture][side]
    first = {(variant, lr): points(grids[variant], lr, 0) for variant, lr in product(grids, lrs)}
    scores = {key: next(iter(per_seed(found, "mcc", task.true_l0)), 0.0) for key, found in first.items()}
    variant, lr = max(scores, key=lambda key: scores[key])
    rest = [point for seed in range(1, seeds) for point in points(grids[variant], lr, seed)]
    tuning = {f"{name} {value:g}": score for (name, value), score in scores.items()}
    return Result(side, architecture, variant, lr, tuning, first[variant, lr] + rest)


@dataclass(frozen=True)
class Row:
    """One figure of both sides at one L0."""

    architecture: str
    figure: str
    l0: float
    ours: tuple[float, float] | None
    theirs: tuple[float, float] | None
    difference: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        if self.figure not in LESS_IS_BETTER or self.difference is None:
            return verdict(self.ours, self.theirs, self.difference)
        mean, half = self.difference
        return {"above": "less", "BELOW": "MORE"}.get(found := verdict(self.ours, self.theirs, (-mean, half)), found)

    @property
    def holds(self) -> bool:
        return self.verdict == "less" or holds(self.verdict)


def compare(results: Sequence[Result], true_l0: float) -> list[Row]:
    """Every figure of every architecture at half, once and twice the true L0."""
    points = {(result.architecture, result.side): result.points for result in results}
    rows = []
    for architecture in dict.fromkeys(result.architecture for result in results):
        for times, figure in product(AROUND, FIGURES):
            ours, theirs = (per_seed(points[architecture, side], figure, times * true_l0) for side in SIDES)
            rows.append(Row(architecture, figure, times * true_l0, mean_interval(ours), mean_interval(theirs),
                            difference_interval(ours, theirs)))  # fmt: skip
    return rows


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    described = machine()
    torch.set_num_threads(1)
    schedule = QUICK if arguments.quick else SCHEDULE
    task = world(schedule, QUICK_EVALUATED if arguments.quick else EVALUATED)
    results = []
    for architecture, side in product(arguments.architectures, SIDES):
        results.append(run(side, architecture, arguments.lr, arguments.seeds, schedule, task))
        scores = ", ".join(f"{name}: {score:.3f}" for name, score in results[-1].tuning.items())
        print(f"{architecture}, {side}: MCC at the true L0 by variant and lr: {scores}", flush=True)
    rows = compare(results, task.true_l0)
    print()
    print_machine(described, VERSIONS)
    _print_tables(task, results, rows, arguments.seeds)
    if arguments.quick:
        print("QUICK: a few steps. These figures mean nothing.")
    if arguments.json:
        points = [result.__dict__ for result in results]
        figures = _figures(rows, arguments.quick)
        write_result(arguments, described, VERSIONS, seeds=arguments.seeds, figures=figures, points=points)


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, repeats=False)
    made.add_argument("--architectures", metavar="A,B", type=lambda text: tuple(text.split(",")),
                      default=tuple(VARIANTS), help=f"of {', '.join(VARIANTS)}; all unless given")  # fmt: skip
    made.add_argument("--seeds", metavar="N", type=int, default=3)
    made.add_argument("--lr", metavar="X,Y", type=lambda text: tuple(map(float, text.split(","))), default=LRS)
    arguments = made.parse_args()
    if unknown := [name for name in arguments.architectures if name not in VARIANTS]:
        made.error(f"--architectures: {unknown[0]!r} is none of {', '.join(VARIANTS)}")
    if arguments.quick:
        arguments.architectures, arguments.lr, arguments.seeds = ("topk",), (3e-3,), 1
    return arguments


def _print_tables(task: World, results: Sequence[Result], rows: Sequence[Row], seeds: int) -> None:
    names = ("l0", *FIGURES, "explained_variance", "dead_fraction")
    cells = []
    for result in results:
        asked = {json.dumps(settings := {name: value for name, value in point.items() if name in
                 ("k", "l1_coefficient", "l0_coefficient", "target_l0")}): settings for point in result.points}
        for settings in asked.values():
            points = [point for point in result.points if settings.items() <= point.items()]
            means = [sum(point[name] for point in points) / len(points) for name in names]
            cells.append([result.architecture, result.side, f"{result.variant} lr {result.lr:g}",
                          ", ".join(f"{name} {value}" for name, value in settings.items()),
                          *(f"{mean:.3f}" for mean in means)])  # fmt: skip
    print_table(f"{N_FEATURES} features in {D_IN} dimensions, true L0 {task.true_l0:.2f}; means over {seeds} seeds",
                ["architecture", "side", "chosen", "asked for", "L0", *FIGURES.values(), "expl. var.", "dead"],
                cells)  # fmt: skip
    print_table(f"At equal L0, mean and 95% t-interval over {seeds} seeds",
                ["architecture", "L0", "figure", "Penstock", "SAELens", "difference", ""], [
        [row.architecture, f"{row.l0:.2f}", FIGURES[row.figure], shown(row.ours), shown(row.theirs),
         shown(row.difference, "+"), row.verdict]
        for row in rows
    ])  # fmt: skip


def _figures(rows: Sequence[Row], quick: bool) -> list[dict[str, Any]]:
    out = []
    for row in rows:
        name = f"{row.architecture}, L0 {row.l0:.2f}, {FIGURES[row.figure]}"
        for side, value in (("ours", row.ours), ("opponent", row.theirs), ("difference", row.difference)):
            for part, number in zip(("", " (half-width)"), value or (None, None), strict=True):
                judged = side == "difference" and not part and not quick
                out.append({"name": f"{name}, {side}{part}", "value": number, "unit": "", "goal": 0 if judged else None,
                            "holds": row.holds if judged else None})  # fmt: skip
    return out


if __name__ == "__main__":
    main()
