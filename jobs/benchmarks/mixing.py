"""What the size of a block costs: SAEs trained on batches from blocks of several sizes, and from one full shuffle.

    python jobs/benchmarks/mixing.py [--quick] [--json FILE] [--tokens N] [--blocks N,N] [--batch-tokens N] [--seeds N]

A block is the only unit of shuffling: the rows of the corpus are in random order, and the tokens of a block are
permuted once. So the tokens of a small block come from few rows, its batches resemble one another and not the corpus.
The ideal is one permutation of all tokens of the run.

The activations of the demo model (`jobs/specs/demo.yaml`, `blocks.4.hook_resid_post`) are harvested once, in the order
of the rows. For every seed the rows are put into a random order, and for every block size the same rows are cut into
blocks, each permuted, what does not fill a batch left out, by Penstock's own rules. On the batches `SAETrainer` trains
the demo spec's topk (k 16) and standard (L1 2) SAEs: for all block sizes with equal initial weights (of that seed),
steps, schedules and calibration (from the first 65,536 tokens). All are evaluated by
`sae_core.evaluation.evaluate_rows` on the same tokens of the search split.

MSE is summed over d_in, in the units of the activations. Its ratio to the full shuffle's is paired: within a seed rows
and initial weights are the same. Intervals are 95% t-intervals over seeds. The standard SAE's L0 moves with the mixing,
and its MSE with that: a part of its ratio is a move along the front. Two figures show bad mixing where the final loss
does not:
  loss noise      standard deviation of the training loss over the last fifth of the steps, about a straight line (the
                  learning rate falls), in percent of the mean loss
  design effect   E||batch mean - mean||^2 over that of batches of independent tokens: by this factor a batch is worth
                  fewer tokens than it has (L. Kish, Survey Sampling, 1965); 1 where mixing is perfect
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import numpy as np
import torch
import yaml
from common import ROOT, count, machine, parser, print_machine, write_result
from fronts import Interval, mean_interval, print_table, shown
from torch import Tensor

from penstock.batches import Schedule, batches
from penstock.model_host import ModelHost
from penstock.plan import training_settings
from penstock.spec import SweepSpec, parse_spec
from penstock.storage import Storage
from penstock.tokens import TokenStore, build_token_store, row_generator
from sae_core import Calibration, SAETrainer, TrainingSettings, calibrate, parse_settings

SPEC = ROOT / "jobs/specs/demo.yaml"
HOOK_POINT = "blocks.4.hook_resid_post"
BLOCKS = (640, 4096, 16_384, 65_536, 262_144, 1_048_576)  # the first is five rows: one batch, of hardly any documents
FULL = "all"
SAES: dict[str, dict[str, Any]] = {  # the demo spec's
    "topk": {"architecture": "topk", "d_sae": 1024, "k": 16},
    "standard": {
        "architecture": "standard", "d_sae": 1024, "lr": 8e-3, "l1_coefficient": 2, "l1_warm_up_steps": 200,
    },
}  # fmt: skip
FIGURES = ("mse", "explained_variance", "ce_recovered", "l0")
NOISY_SHARE = 0.2
CALIBRATION_TOKENS = 65_536
WIDTHS = (128, 4096)
QUICK = {"tokens": 4096, "blocks": (640, 4096), "seeds": 2, "search_tokens": 256}
VERSIONS = ("penstock", "torch", "transformer-lens")


# ---- the activations and their orders -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Kept tokens of the train rows, in the order of the rows."""

    x: Tensor  # [tokens, d_in] float32
    kept: np.ndarray  # int64 [rows], tokens of each row
    calibration: Calibration

    def rows_for(self, n_tokens: int, rows: np.ndarray) -> int:
        """How many of `rows`, from the first on, hold that many tokens."""
        return int(np.searchsorted(np.cumsum(self.kept[rows]), n_tokens)) + 1


def harvest(spec: SweepSpec, store: TokenStore, host: ModelHost) -> Corpus:
    parts = []
    for block, n_kept in enumerate(store.kept_per_block):
        permuted = host.harvest(store, spec.data, block, [HOOK_POINT])[HOOK_POINT]
        # Token i of the block lies at places[i].
        parts.append(permuted[row_generator(spec.data.seed, block).permutation(int(n_kept))])
    x = np.concatenate(parts)
    kept = store.kept(store.rows("train", 0, len(parts) * store.block_rows)).sum(1, dtype=np.int64)
    return Corpus(torch.from_numpy(x), kept, calibrate(x[:CALIBRATION_TOKENS]))


def batches_of(corpus: Corpus, block_rows: int | None, training: TrainingSettings, seed: int) -> np.ndarray:
    """int64 [steps, batch_tokens]: the tokens of every batch of a run whose data seed is `seed`.

    `block_rows` None: one block of as many rows as the run needs, which is the full shuffle.
    """
    rows = row_generator(seed).permutation(len(corpus.kept))
    if block_rows is None:
        block_rows = corpus.rows_for(training.steps * training.batch_tokens, rows)
        rows = rows[:block_rows]
    blocks = [rows[start : start + block_rows] for start in range(0, len(rows), block_rows)]
    kept_per_block = tuple(int(corpus.kept[block].sum()) for block in blocks)
    schedule = Schedule(kept_per_block, training.batch_tokens, training.steps)
    firsts = np.cumsum(corpus.kept) - corpus.kept
    order = np.empty((training.steps, training.batch_tokens), dtype=np.int64)
    for index, block in zip(range(schedule.n_blocks), blocks, strict=False):
        tokens = np.concatenate([np.arange(firsts[row], firsts[row] + corpus.kept[row]) for row in block])
        permuted = np.empty_like(tokens)
        permuted[row_generator(seed, index).permutation(len(tokens))] = tokens
        for step, part in batches(schedule, index, len(tokens), 0):
            order[step] = permuted[part]
    return order


def design_effect(x: Tensor, order: np.ndarray) -> float:
    """E||batch mean - mean||^2 over tr Cov(x) / batch_tokens, of the batches `order` [steps, batch_tokens]."""
    means, square = [], 0.0
    for indices in order:
        batch = x[torch.from_numpy(indices)].double()
        means.append(batch.mean(0))
        square += float(batch.square().sum()) / batch.shape[0] / len(order)
    of_batches = torch.stack(means)
    overall = of_batches.mean(0)
    variance = square - float(overall.square().sum())
    return float((of_batches - overall).square().sum(1).mean()) * order.shape[1] / variance


# ---- training and evaluating ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """One SAE. `block_tokens` None: the full shuffle."""

    sae: str
    block_tokens: int | None
    seed: int
    loss_noise: float  # of the mean loss
    figures: Mapping[str, float]


def train(
    corpus: Corpus, order: np.ndarray, settings: Mapping[str, Any], training: TrainingSettings
) -> tuple[SAETrainer, float]:
    """The trainer at its end, and the noise of its loss."""
    trainer = SAETrainer(parse_settings(dict(settings)), training, corpus.calibration)
    losses = []
    watched_from = int((1 - NOISY_SHARE) * training.steps)
    for step, indices in enumerate(order):
        metrics = trainer.train_step(corpus.x[torch.from_numpy(indices)], want_metrics=step >= watched_from)
        if metrics is not None:
            losses.append(metrics["loss"])
    if trainer.diverged:
        raise SystemExit(f"{settings}: diverged, so there is nothing to compare")
    steps = np.arange(len(losses))
    residual = np.array(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return trainer, float(residual.std() / np.mean(losses))


def measure(
    spec: SweepSpec, store: TokenStore, arguments: argparse.Namespace
) -> tuple[list[Point], dict[int | None, list[float]]]:
    """Every SAE, and each block size's design effects, one a seed."""
    host = ModelHost(spec.model, device="cpu", threads=1)
    clock = time.monotonic()
    corpus = harvest(spec, store, host)
    _say(f"{len(corpus.x):,} tokens of {len(corpus.kept):,} rows harvested in {time.monotonic() - clock:.0f} s")
    training = training_settings(spec.train)
    points: list[Point] = []
    effects: dict[int | None, list[float]] = {size: [] for size in (*arguments.blocks, None)}
    for seed in range(arguments.seeds):
        saes, noise = {}, {}
        for size in effects:
            order = batches_of(corpus, None if size is None else size // spec.data.context_size, training, seed)
            effects[size].append(design_effect(corpus.x, order))
            for name, settings in SAES.items():
                trainer, noise[name, size] = train(corpus, order, {**settings, "seed": seed}, training)
                saes[name, size] = trainer.export()
            _say(f"seed {seed}, block {_label(size)}: trained, design effect {effects[size][-1]:.2f}")
        sums = host.evaluate(
            store, spec.data, HOOK_POINT, {f"{name} {size}": sae for (name, size), sae in saes.items()}, "search", 0,
            store.n_rows("search"),
        )  # fmt: skip
        for name, size in saes:
            found = sums[f"{name} {size}"].metrics()
            points.append(Point(name, size, seed, noise[name, size], {key: found[key] for key in FIGURES}))
            _say(f"seed {seed}, {name}, block {_label(size)}: MSE {found['mse']:.3f}")
    return points, effects


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _label(block_tokens: int | None) -> str:
    return FULL if block_tokens is None else f"{block_tokens:,}"


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kind of SAE at one block size: means over seeds, with half-widths of 95% t-intervals."""

    sae: str
    block_tokens: int | None
    mse: Interval
    mse_ratio: Interval  # to the full shuffle with the same seed
    explained_variance: Interval
    ce_recovered: Interval
    l0: Interval
    loss_noise: Interval  # percent


def compare(points: Sequence[Point]) -> list[Row]:
    found = {(point.sae, point.block_tokens, point.seed): point for point in points}
    rows = []
    for sae, size in dict.fromkeys((point.sae, point.block_tokens) for point in points):
        here = [point for point in points if (point.sae, point.block_tokens) == (sae, size)]
        ratios = [point.figures["mse"] / found[sae, None, point.seed].figures["mse"] for point in here]
        figures = {name: _interval([point.figures[name] for point in here]) for name in FIGURES}
        noise = _interval([100 * point.loss_noise for point in here])
        rows.append(Row(sae, size, mse_ratio=_interval(ratios), loss_noise=noise, **figures))
    return rows


def _interval(values: Sequence[float]) -> Interval:
    found = mean_interval(values)
    assert found is not None
    return found


def block_bytes(block_tokens: int, d_in: int) -> int:
    """Of one hook point, in float32."""
    return 4 * block_tokens * d_in


def figures_of(rows: Sequence[Row], effects: Mapping[int | None, Sequence[float]]) -> list[dict[str, Any]]:
    return list(_figures(rows, effects))


def _figures(rows: Sequence[Row], effects: Mapping[int | None, Sequence[float]]) -> Iterator[dict[str, Any]]:
    units = {"mse": "", "mse_ratio": "x", "explained_variance": "", "ce_recovered": "", "l0": "", "loss_noise": "%"}
    for row in rows:
        for name, unit in units.items():
            for part, value in zip(("", " (half-width)"), getattr(row, name), strict=True):
                yield _figure(f"{row.sae}, block {_label(row.block_tokens)}, {name}{part}", value, unit)
    for size, values in effects.items():
        yield _figure(f"block {_label(size)}, design effect", mean(values), "x")
        if size is not None:
            for d_in in WIDTHS:
                yield _figure(f"block {_label(size)}, memory at d_in {d_in}", block_bytes(size, d_in) / 1e6, "MB")


def _figure(name: str, value: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "unit": unit, "goal": None, "holds": None}


def print_tables(
    spec: SweepSpec, rows: Sequence[Row], effects: Mapping[int | None, Sequence[float]], seeds: int
) -> None:
    train, context = spec.train, spec.data.context_size
    print_table(
        f"{train.steps * train.batch_tokens:,} tokens in batches of {train.batch_tokens}, rows of {context}",
        ["block tokens", "rows", "batches, at most", "design effect", *(f"MB at d_in {d_in}" for d_in in WIDTHS)],
        [[_label(size), *(("-", "-") if size is None else (f"{size // context:,}", f"{size // train.batch_tokens:,}")),
          f"{mean(values):.2f}",
          *("-" if size is None else f"{block_bytes(size, d_in) / 1e6:,.1f}" for d_in in WIDTHS)]
         for size, values in effects.items()],
    )  # fmt: skip
    print_table(
        f"SAEs on the search split, mean and 95% t-interval over {seeds} seeds",
        ["SAE", "block tokens", "MSE / full shuffle", "MSE", "expl. var.", "CE rec.", "L0", "loss noise (%)"],
        [[row.sae, _label(row.block_tokens), "1" if row.block_tokens is None else shown(row.mse_ratio),
          f"{row.mse[0]:.3f}", shown(row.explained_variance), f"{row.ce_recovered[0]:.4f}", f"{row.l0[0]:.2f}",
          f"{row.loss_noise[0]:.2f} ± {row.loss_noise[1]:.2f}"] for row in rows],
    )  # fmt: skip


# ---- main -----------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(1)
    described = machine()
    specs = [_spec(arguments, size) for size in arguments.blocks]
    with tempfile.TemporaryDirectory(prefix="penstock-mixing-") as folder:
        stores = [build_token_store(spec.data, spec.model, spec.train, Storage(folder)) for spec in specs]
        # What fills no batch is left out, and blocks are whole: the number of rows depends on the size of a block.
        store, spec = max(zip(stores, specs, strict=True), key=lambda pair: pair[0].n_rows("train"))
        points, effects = measure(spec, store, arguments)
    rows = compare(points)
    print()
    print_machine(described, VERSIONS)
    print_tables(spec, rows, effects, arguments.seeds)
    if arguments.quick:
        print("QUICK: a few steps. These figures mean nothing.")
    if arguments.json:
        more = {"tokens": spec.train.steps * spec.train.batch_tokens, "batch_tokens": spec.train.batch_tokens,
                "points": [vars(point) for point in points]}  # fmt: skip
        write_result(arguments, described, VERSIONS, figures=figures_of(rows, effects), **more)


def _spec(arguments: argparse.Namespace, block_tokens: int) -> SweepSpec:
    spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    spec["data"] |= {"block_tokens": block_tokens, "search_tokens": arguments.search_tokens}
    spec["train"] |= {"tokens": arguments.tokens, "batch_tokens": arguments.batch_tokens}
    spec["hook_points"] = [HOOK_POINT]
    if arguments.quick:
        spec["train"]["lr_warm_up_steps"] = 0
    return parse_spec(yaml.safe_dump(spec), str(SPEC))


def _arguments() -> argparse.Namespace:
    made = parser(__doc__, repeats=False)
    made.add_argument("--tokens", metavar="N", type=count, default=2_000_000, help="to train on")
    made.add_argument("--blocks", metavar="N,N", type=_counts, default=BLOCKS, help="block sizes, in tokens")
    made.add_argument("--batch-tokens", metavar="N", type=count, default=512)
    made.add_argument("--seeds", metavar="N", type=count, default=5, help="each of the initial weights and of the data")
    made.set_defaults(search_tokens=30_000)
    arguments = made.parse_args()
    if arguments.quick:
        vars(arguments).update(QUICK)
    return arguments


def _counts(text: str) -> tuple[int, ...]:
    return tuple(count(part) for part in text.split(","))


if __name__ == "__main__":
    main()
