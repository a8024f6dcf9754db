"""How near an SAE comes to the L0 that it was asked for, and at what quality: `target_l0` of Penstock, of every
architecture whose sparsity a coefficient sets, and for JumpReLU the quadratic mode of the released SAELens, which has
none for the others.

    python jobs/benchmarks/target_l0.py [--quick] [--json FILE] [--cache DIR] [--jobs N] ...

Both sides train on the activations of the demo model (`jobs/specs/demo.yaml`), on the same tokens in the same order,
with the same steps and schedules, all else at each side's defaults (`sides.py`), at the demo spec's learning rates.
SAELens needs a coefficient beside the target: each of a grid is tried, and the table shows all of them. What a side
saves is evaluated on the report split, with zero ablation. Trained SAEs are kept in `--cache`, which may be the one of
`frontier.py`.
"""

import argparse
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from common import machine, parser, print_machine, write_result
from frontier import D_SAE, QUICK, SPEC, VERSIONS, Run, Task, Workers, prepare
from fronts import print_table
from sides import Recipe

TARGETS = (8.0, 16.0, 32.0)
COEFFICIENTS = (0.1, 1.0, 10.0)  # of SAELens' quadratic penalty; its own default is 1
LRS = {"standard": 8e-3, "gated": 8e-3, "jumprelu": 4e-3}  # the demo spec's
GOAL = 0.1  # greatest relative error of L0
FIGURES = ("l0", "explained_variance", "ce_recovered", "dead_fraction")


@dataclass(frozen=True)
class Point:
    """One SAE. `coefficient` None: ours, which finds it."""

    hook_point: str
    architecture: str
    target: float
    coefficient: float | None
    figures: Mapping[str, float]

    @property
    def error(self) -> float:
        """Relative error of L0."""
        return self.figures["l0"] / self.target - 1


def measure(task: Task, arguments: argparse.Namespace) -> list[Point]:
    asked = list(_asked(arguments))
    with Workers(0 if arguments.quick else arguments.jobs) as workers:
        figures = workers.figures(task, [run for run, _, _ in asked], "report")
    return [Point(run.hook_point, run.recipe.architecture, target, coefficient, {name: one[name] for name in FIGURES})
            for (run, target, coefficient), one in zip(asked, figures, strict=True)]  # fmt: skip


def _asked(arguments: argparse.Namespace) -> Iterator[tuple[Run, float, float | None]]:
    for hook_point, name, target in product(arguments.hook_points, arguments.architectures, arguments.targets):
        lr = arguments.lr or LRS[name]
        recipe = Recipe(name, D_SAE, {"target_l0": target}, lr, arguments.seed)
        yield Run("ours", hook_point, "target", recipe), target, None
        for coefficient in arguments.coefficients if name == "jumprelu" else ():
            settings = {"target_l0": target, "l0_coefficient": coefficient, "jumprelu_sparsity_loss_mode": "quadratic"}
            recipe = Recipe(name, D_SAE, settings, lr, arguments.seed)
            yield Run("theirs", hook_point, "quadratic", recipe), target, coefficient


def figures_of(points: Sequence[Point], quick: bool) -> list[dict[str, Any]]:
    """As the JSON has them. What must hold is our error; of SAELens' SAEs the one nearest to the target counts."""
    out = []
    cases: dict[tuple[str, str, float], list[Point]] = {}
    for point in points:
        cases.setdefault((point.hook_point, point.architecture, point.target), []).append(point)
    for (hook_point, architecture, target), here in cases.items():
        name = f"{hook_point}, {architecture}, target L0 {target:g}"
        best = {side: min(of_side, key=lambda point: abs(point.error)) for side, of_side in (
            ("ours", [point for point in here if point.coefficient is None]),
            ("opponent", [point for point in here if point.coefficient is not None]),
        ) if of_side}  # fmt: skip
        for side, point in best.items():
            judged, error = side == "ours" and not quick, abs(point.error)
            goal, holds = (GOAL, error <= GOAL) if judged else (None, None)
            out.append(_figure(f"{name}, error of L0, {side}", error, goal, holds))
            out += [_figure(f"{name}, {figure}, {side}", point.figures[figure]) for figure in FIGURES]
    return out


def _figure(name: str, value: float, goal: float | None = None, holds: bool | None = None) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": "", "goal": goal, "holds": holds}


def print_points(points: Sequence[Point]) -> None:
    columns = ["hook point", "architecture", "target", "trained by", "L0", "error", "expl. var.", "CE rec.", "dead"]
    print_table("Asked for an L0, on the report split", columns, [
        [point.hook_point, point.architecture, f"{point.target:g}",
         "Penstock" if point.coefficient is None else f"SAELens, coefficient {point.coefficient:g}",
         f"{point.figures['l0']:.2f}", f"{point.error:+.1%}", *(f"{point.figures[name]:.4f}" for name in FIGURES[1:])]
        for point in points
    ])  # fmt: skip


def main() -> None:
    arguments = _arguments()
    described = machine()
    with tempfile.TemporaryDirectory(prefix="penstock-target-l0-") as scratch:
        spec = yaml.safe_load(SPEC.read_text(encoding="utf-8")) | (QUICK if arguments.quick else {})
        spec["hook_points"] = arguments.hook_points = arguments.hook_points or spec["hook_points"]
        task = prepare(yaml.safe_dump(spec), Path(arguments.cache or scratch).absolute())
        points = measure(task, arguments)
    print()
    print_machine(described, VERSIONS)
    print_points(points)
    if arguments.quick:
        print("QUICK: a few steps. These figures mean nothing.")
    if arguments.json:
        write_result(arguments, described, VERSIONS, figures=figures_of(points, arguments.quick))


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, repeats=False)
    made.add_argument("--hook-points", metavar="H,H", type=lambda text: text.split(","),
                      help="those of jobs/specs/demo.yaml unless given")  # fmt: skip
    made.add_argument("--targets", metavar="X,Y", type=_numbers, default=TARGETS)
    made.add_argument("--coefficients", metavar="X,Y", type=_numbers, default=COEFFICIENTS,
                      help="of SAELens; empty for ours alone")  # fmt: skip
    made.add_argument("--architectures", metavar="A,B", type=_architectures, default=tuple(LRS),
                      help=f"of {', '.join(LRS)}; all unless given")  # fmt: skip
    made.add_argument("--lr", type=float, help="of all; the demo spec's of each architecture unless given")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--cache", metavar="DIR", type=Path, help="where what is trained is kept, to go on from")
    made.add_argument("--jobs", metavar="N", type=int, default=os.cpu_count(), help="processes of one thread each")
    arguments = made.parse_args()
    if arguments.quick:
        arguments.targets, arguments.coefficients = arguments.targets[:1], arguments.coefficients[-1:]
    return arguments


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(","))) if text else ()


def _architectures(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(LRS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(LRS)}")
    return names


if __name__ == "__main__":
    main()
