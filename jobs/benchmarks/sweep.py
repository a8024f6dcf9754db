"""The headline: one sweep, from the command to the figures of its last SAE, against the released SAELens.

    python jobs/benchmarks/sweep.py [--quick] [--json FILE] [--repeats N]

Both sides train the 20 standard, gated and TopK SAEs of `jobs/specs/demo.yaml` (their settings mean the same on both
sides) on as many tokens of the same corpus, with the same model, batch, learning rate, warm-ups and context, and
evaluate each on as many report tokens. Ours is `penstock run` in an empty home; SAELens is `MultiSAETrainingRunner`
and then `run_evals` an SAE (`saelens_sweep.py`). Each is a process of its own, and its wall time counts from the first
instruction to the last: imports, Ray, reading and tokenising, training, evaluation, results on disk. The corpus
reaches SAELens as a `datasets` folder of shuffled documents, written before its clock starts. Both may use two threads
of a CPU.

`--quick` runs the code of both sides in this process on a few thousand tokens, ours without Ray. It only shows that
the benchmark still works.
"""

import argparse
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import yaml
from common import ROOT, Comparison, interleaved, machine, medians, parser, report, timed

from penstock.batches import Schedule, batches
from penstock.demo import MODEL_FOLDER, documents
from penstock.model_host import ModelHost
from penstock.pack import Pack
from penstock.plan import members, plan_packs, plan_saes, read_sweep, training_settings
from penstock.spec import SweepSpec
from penstock.splits import Split, document_hash, split_of
from penstock.storage import Storage
from penstock.subjects import Subject, load_subject
from penstock.tokens import build_token_store
from sae_core import calibrate

if TYPE_CHECKING:
    from saelens_sweep import Job

SPEC = ROOT / "jobs/specs/demo.yaml"
ARCHITECTURES = ("standard", "gated", "topk")
GOAL = 1.5
THREADS = 2
PHASES = ("start", "train", "evaluate", "rest")
VERSIONS = ("penstock", "sae-lens", "torch", "ray", "transformers", "transformer-lens")
QUICK = {
    "hook_points": ["blocks.1.hook_resid_post"],
    "data": {"dataset": "demo", "context_size": 128, "search_tokens": 256, "report_tokens": 1024, "block_tokens": 4096},
    "train": {"tokens": 3072, "batch_tokens": 256, "lr": 4.0e-3},
    "saes": [
        {"architecture": "standard", "d_sae": "8x", "l1_coefficient": 2},
        {"architecture": "gated", "d_sae": "8x", "l1_coefficient": 2},
        {"architecture": "topk", "d_sae": "8x", "k": 16},
    ],
}
QUICK_DOCUMENTS = 60
QUICK_THREADS = 1  # on next to no data, and beside whatever else runs, two would only wait for each other


@dataclass(frozen=True)
class Side:
    """One run of one side: seconds of each phase, and architecture, l0, ce_recovered, ... of each SAE."""

    seconds: dict[str, float]
    saes: list[dict[str, Any]]


def main() -> None:
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="penstock-benchmark-") as folder:
        (_quick if arguments.quick else _full)(arguments, Path(folder))


def _full(arguments: argparse.Namespace, folder: Path) -> None:
    described = machine()
    spec_path = _write_spec(folder)
    spec = read_sweep(spec_path)[0]
    _write_documents(folder, documents())
    _warm_up(folder)
    runs = interleaved(
        {"penstock": lambda: _penstock(spec_path, spec, folder), "SAELens": lambda: _saelens(spec_path, folder)},
        arguments.repeats,
    )
    ours, theirs = runs["penstock"], runs["SAELens"]
    title = (f"{len(ours[0].saes)} SAEs, {spec.train.tokens:,} tokens: `penstock run` against SAELens, "
             f"{THREADS} threads")  # fmt: skip
    rows = [*_seconds_rows(ours, theirs, GOAL), *_quality_rows(ours, theirs)]
    notes = [
        "start: until the first training step. rest: interpreters, results, shutting down.",
        "Quality: medians over the SAEs of an architecture, each side's own evaluation, zero ablation.",
    ]
    report(title, rows, arguments, described, VERSIONS, notes)


def _quick(arguments: argparse.Namespace, folder: Path) -> None:
    described = machine()
    spec_path = _write_spec(folder, QUICK)
    _write_documents(folder, islice(documents(), QUICK_DOCUMENTS))
    runs = interleaved(
        {"penstock": lambda: _penstock_here(spec_path, folder), "SAELens": lambda: _saelens_here(spec_path, folder)},
        arguments.repeats,
    )
    ours, theirs = runs["penstock"], runs["SAELens"]
    rows = [*_seconds_rows(ours, theirs, None), *_quality_rows(ours, theirs)]
    note = "QUICK: both sides in one process on a few thousand tokens, ours without Ray. These figures mean nothing."
    report("quick check of the sweep benchmark", rows, arguments, described, VERSIONS, [note])


# ---- the task -------------------------------------------------------------------------------------------------------


def _write_spec(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """The demo's spec, of the compared architectures, with one learning rate (SAELens has one for all) and without
    baselines; `changes` replaces whole sections."""
    spec = yaml.safe_load(SPEC.read_text(encoding="utf-8"))
    saes = [entry for entry in spec["saes"] if entry["architecture"] in ARCHITECTURES]
    saes = [{name: value for name, value in entry.items() if name != "lr"} for entry in saes]
    spec |= {"name": "benchmark", "saes": saes, "baselines": {"k": []}} | (changes or {})
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(spec), encoding="utf-8")
    return path


def _write_documents(folder: Path, texts: Iterable[str]) -> None:
    """The corpus as SAELens' users have theirs: a `datasets` folder of shuffled documents for each split."""
    from datasets import Dataset

    by_split: dict[Split, list[str]] = {"train": [], "search": [], "report": []}
    for text in texts:
        by_split[split_of(document_hash(text))].append(text)
    for split in ("train", "report"):
        random.Random(0).shuffle(by_split[split])
        Dataset.from_dict({"text": by_split[split]}).save_to_disk(folder / split)


def _warm_up(folder: Path) -> None:
    """Both sides' libraries into the page cache, so that the first run does not pay for the disk."""
    imports = "import sae_lens, ray, mlflow, pandas, matplotlib.pyplot, plotly, penstock.actors"
    timed([sys.executable, "-c", imports], folder / "warm-up.log")


def _job(spec_path: Path, folder: Path, threads: int) -> "Job":
    """The sweep of a spec as SAELens is told it."""
    from saelens_sweep import Job

    spec, model = read_sweep(spec_path)
    training = training_settings(spec.train)
    saes = [
        {"hook_point": _module(hook_point), "d_in": model.hook_points[hook_point], **settings}
        for hook_point in spec.hook_points
        for settings in spec.sae_settings(model.hook_points[hook_point])
    ]
    rows, n_batches = _report_rows(spec)
    return Job(
        model=str(MODEL_FOLDER),
        train_documents=str(folder / "train"),
        report_documents=str(folder / "report"),
        saes=saes,
        output=str(folder / "saelens"),
        context_size=spec.data.context_size,
        batch_tokens=training.batch_tokens,
        steps=training.steps,
        lr=training.lr,
        lr_warm_up_steps=training.lr_warm_up_steps,
        lr_decay_steps=training.decay_steps,
        report_rows=rows,
        report_batches=n_batches,
        threads=threads,
    )


def _module(hook_point: str) -> str:
    """`blocks.1.hook_resid_post` by the name that the demo model's own module has."""
    _, layer, name = hook_point.split(".", 2)
    if name != "hook_resid_post":
        raise SystemExit(f"hook point {hook_point!r}: SAELens reads the output of a whole block of this model only")
    return f"transformer.h.{layer}"


def _report_rows(spec: SweepSpec) -> tuple[int, int]:
    """(rows, batches) that hold `report_tokens` tokens after the BOS, in batches near SAELens' default of 32 rows."""
    least = math.ceil(spec.data.report_tokens / (spec.data.context_size - 1))
    sizes = range(16, 49)
    size = min(sizes, key=lambda size: (-least % size, abs(size - 32)))
    n_batches = math.ceil(least / size)
    return n_batches * size, n_batches


# ---- whole runs -----------------------------------------------------------------------------------------------------


def _penstock(spec_path: Path, spec: SweepSpec, folder: Path) -> Side:
    with tempfile.TemporaryDirectory(dir=folder) as home:
        command = [sys.executable, "-m", "penstock.cli"]
        _, wall = timed([*command, "run", str(spec_path), "--home", home], folder / "penstock.log")
        timed([*command, "front", spec.name, "--json", "--home", home], folder / "front.json")
        [result] = Path(home).glob("sweeps/*/result.json")
        cost = json.loads(result.read_text(encoding="utf-8"))["cost"]
    saes = json.loads((folder / "front.json").read_text(encoding="utf-8"))
    start, evaluate = cost["seconds_to_first_step"], cost["seconds_evaluate"]
    train = cost["seconds_start"] + cost["seconds_train"] - start
    return Side(_phases(wall, start, train, evaluate), saes)


def _saelens(spec_path: Path, folder: Path) -> Side:
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(asdict(_job(spec_path, folder, THREADS))), encoding="utf-8")
    script = str(Path(__file__).with_name("saelens_sweep.py"))
    began, wall = timed([sys.executable, script, str(job), str(result)], folder / "saelens.log")
    outcome = json.loads(result.read_text(encoding="utf-8"))
    at = [began, outcome["ready_at"], outcome["trained_at"], outcome["evaluated_at"]]
    return Side(_phases(wall, at[1] - at[0], at[2] - at[1], at[3] - at[2]), outcome["saes"])


def _phases(wall: float, start: float, train: float, evaluate: float) -> dict[str, float]:
    rest = max(0.0, wall - start - train - evaluate)
    return {"wall": wall} | dict(zip(PHASES, (start, train, evaluate, rest), strict=True))


# ---- quick ----------------------------------------------------------------------------------------------------------


def _penstock_here(spec_path: Path, folder: Path) -> Side:
    """What the hosts, the packs and the evaluation do, without Ray."""
    began = time.perf_counter()
    spec, model = read_sweep(spec_path)
    [hook_point] = spec.hook_points
    with tempfile.TemporaryDirectory(dir=folder) as home:
        storage = Storage(home)
        store = build_token_store(spec.data, spec.model, spec.train, storage)
        [planned] = plan_packs(spec, plan_saes(spec, model, store.train_id))
        schedule = Schedule(tuple(map(int, store.kept_per_block)), spec.train.batch_tokens, spec.train.steps)
        host = ModelHost(spec.model, device="cpu", threads=QUICK_THREADS)
        ready = time.perf_counter()
        x = torch.from_numpy(host.harvest(store, spec.data, 0, planned.hook_points)[hook_point])
        pack = Pack(members(planned, {}), training_settings(spec.train), {hook_point: calibrate(x)}, storage)
        for step, batch in batches(schedule, 0, len(x), 0):
            pack.step(step, {hook_point: x[batch]})
        pack.finish()
        trained = time.perf_counter()
        subjects = {sae.sae_id: load_subject(Subject(sae.sae_id, f"saes/{sae.sae_id}/final"), storage)
                    for sae in planned.saes}  # fmt: skip
        sums = host.evaluate(store, spec.data, hook_point, subjects, "report", 0, store.n_rows("report"))
        saes = [{"architecture": sae.settings.architecture, **sums[sae.sae_id].metrics()} for sae in planned.saes]
        evaluated = time.perf_counter()
    return Side(_phases(evaluated - began, ready - began, trained - ready, evaluated - trained), saes)


def _saelens_here(spec_path: Path, folder: Path) -> Side:
    import saelens_sweep

    job = _job(spec_path, folder, QUICK_THREADS)
    began = time.time()
    outcome = saelens_sweep.run(job)
    at = [began, outcome.ready_at, outcome.trained_at, outcome.evaluated_at]
    return Side(_phases(at[3] - at[0], at[1] - at[0], at[2] - at[1], at[3] - at[2]), outcome.saes)


# ---- the figures ----------------------------------------------------------------------------------------------------


def _seconds_rows(ours: Sequence[Side], theirs: Sequence[Side], goal: float | None) -> list[Comparison]:
    mine, others = medians(run.seconds for run in ours), medians(run.seconds for run in theirs)
    wall = Comparison("wall", "s", mine["wall"], others["wall"], goal)
    return [wall, *(Comparison(phase, "s", mine[phase], others[phase], lower_is_better=None) for phase in PHASES)]


def _quality_rows(ours: Sequence[Side], theirs: Sequence[Side]) -> list[Comparison]:
    """Medians over the SAEs of each architecture and over the runs; a ratio of these would say nothing."""
    rows = []
    for architecture in dict.fromkeys(sae["architecture"] for sae in theirs[0].saes):
        for name, label in (("l0", "L0"), ("ce_recovered", "CE recovered"), ("explained_variance", "expl. variance")):
            mine, others = (
                median(sae[name] for run in runs for sae in run.saes if sae["architecture"] == architecture)
                for runs in (ours, theirs)
            )
            rows.append(Comparison(f"{architecture}, {label}", "", mine, others, lower_is_better=None))
    return rows


if __name__ == "__main__":
    main()
