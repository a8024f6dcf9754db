"""One training step of ours against one of the released SAELens, in time and in memory.

    python jobs/benchmarks/step.py [--quick] [--json FILE] [--repeats N] [--only NAME,...]
                                   [--device cuda] [--batch-tokens N]

A step is all that a trainer does with a batch of raw activations: ours `SAETrainer.train_step`, theirs
`sae_lens.training.sae_trainer.SAETrainer.step` and what its `fit` calls around it; on both sides with the scaling of
the batch, forward and backward pass, clipping, Adam, schedules and the count of dead latents. Both start from equal
weights, have the normalisation `expected_average_only_in`, see the same batches (of a sparse dictionary) in the same
order, in one process, in float32 and with two threads, one step of each in turn; medians are shown. The learning rate
is so low that weights stay as they were prepared. After the timing, L0 and reconstruction error of both sides are
compared on one batch, and a difference ends the benchmark: it would not have been the same work.

Rows (`--only` takes their names), at d_in 512, d_sae 8192 and 4096 tokens a batch:
  topk, batch_topk, matryoshka        k 32; five nested widths, each twice the one before
  topk-dead                           a tenth of the latents never fires, and AuxK works on both sides
  standard, jumprelu, gated           biases or thresholds such that each latent fires on 64 of 8192 tokens
  standard-dense, ... -dense          the same with half of all latents active, as SAELens' SAEs start
  memory                              what a topk step takes
  pack                                16 SAEs (d_in 128, d_sae 1024) on one stream, theirs in a MultiSAETrainer

"bf16 encoder" is `encoder_dtype: bfloat16` on our side only. Its goals hold on processors that multiply bfloat16.

The encoder's GEMM alone is x W_enc + b_enc in float32 into a matrix that is already there. The share of the GEMM peak
counts the multiplications that a step cannot avoid, 2 B d_in (d_sae + 4 L0): the encoder, and on the active pairs the
decoder, its gradient in the activations and the gradients of both weights. The peak is that of a large square GEMM.

Memory is the peak of the resident memory in a step, less libraries, batches, weights and Adam's moments; so it is the
gradients, all temporaries, and any workspace that is kept from step to step. Each side runs in a process of its own.
There the kernel's own record of the peak (VmHWM) is reset before a step: it misses nothing, where a sampling thread
can miss a peak, and torch's profiler does not see what numpy or a kernel of ours allocates. Freed memory is returned
to the system before each reading. On CUDA it is the peak of torch's allocator.

`--device cuda` runs all of it there, without goals, as does `--batch-tokens` with another number than 4096.
"""

import argparse
import ctypes
import gc
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Comparison, interleaved, machine, parse_rows, parser, report
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from sae_core import Calibration, SAETrainer, TrainingSettings, calibrate, parse_settings

THREADS = 2
STEPS = 7
WARM_UP = 1
N_BATCHES = 4
LR = 1e-6
DEAD_STEPS = 1000  # SAELens' default
DEAD_SHARE = 0.1
PACK_ARCHITECTURES = ("topk", "standard", "gated", "jumprelu")
PACK_L0 = (8, 16, 32, 64)
VERSIONS = ("penstock", "sae-lens", "torch")
CONFIGS = {
    "topk": TopKTrainingSAEConfig,
    "batch_topk": BatchTopKTrainingSAEConfig,
    "matryoshka": MatryoshkaBatchTopKTrainingSAEConfig,
    "standard": StandardTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
}
THEIR_NAMES = {
    "widths": "matryoshka_widths",
    "bandwidth": "jumprelu_bandwidth",
    "sparsity": "jumprelu_sparsity_loss_mode",
    "ste_to_input": "jumprelu_ste_to_input",
}
MB = 2**20


@dataclass(frozen=True)
class Size:
    d_in: int
    d_sae: int
    batch_tokens: int
    k: int
    l0: int  # of the penalised architectures, where they are prepared sparse


FULL = Size(d_in=512, d_sae=8192, batch_tokens=4096, k=32, l0=64)
QUICK = Size(d_in=32, d_sae=256, batch_tokens=1024, k=8, l0=16)
PACK = Size(d_in=128, d_sae=1024, batch_tokens=4096, k=32, l0=32)


@dataclass(frozen=True)
class Task:
    """One SAE, how its weights are prepared, and what is promised of it: least ratios, float32 and bf16 encoder."""

    name: str
    settings: Mapping[str, Any]
    l0: int | None = None  # None: weights as they start
    dead_share: float = 0.0
    goal: float | None = None
    bf16: bool = False
    bf16_goal: float | None = None


def tasks(size: Size) -> list[Task]:
    d_sae = size.d_sae
    widths = [d_sae // part for part in (16, 8, 4, 2, 1)]
    topk = {"architecture": "topk", "d_sae": d_sae, "k": size.k}
    batch_topk = {"architecture": "batch_topk", "d_sae": d_sae, "k": size.k}
    matryoshka = {"architecture": "matryoshka", "d_sae": d_sae, "k": size.k, "widths": widths}
    penalised = {name: penalised_settings(name, d_sae) for name in ("standard", "jumprelu", "gated")}
    return [
        Task("topk", topk, goal=5, bf16=True, bf16_goal=8),
        Task("batch_topk", batch_topk, goal=6, bf16=True, bf16_goal=10),
        Task("matryoshka", matryoshka, goal=8, bf16=True, bf16_goal=12),
        Task("topk-dead", topk, dead_share=DEAD_SHARE, goal=3),
        *(Task(name, settings, size.l0, goal=3, bf16=True, bf16_goal=5) for name, settings in penalised.items()),
        *(Task(f"{name}-dense", settings, d_sae // 2, goal=1.2) for name, settings in penalised.items()),
    ]


def penalised_settings(architecture: str, d_sae: int) -> dict[str, Any]:
    settings = {"architecture": architecture, "d_sae": d_sae}
    # Pairs within the bandwidth are work for us. It is as many spreads of these pre-activations (0.29) as our default
    # of 1.0 is of those of the demo model (0.8 and 0.93).
    if architecture == "jumprelu":
        return settings | {"l0_coefficient": 1.0, "bandwidth": 0.3, "sparsity": "step", "ste_to_input": False}
    return settings | {"l1_coefficient": 1.0}


def pack_tasks(size: Size) -> list[Task]:
    made = []
    for architecture in PACK_ARCHITECTURES:
        for l0 in PACK_L0:
            name = f"{architecture}-{l0}"
            if architecture == "topk":
                made.append(Task(name, {"architecture": architecture, "d_sae": size.d_sae, "k": l0}))
            else:
                made.append(Task(name, penalised_settings(architecture, size.d_sae), l0))
    return made


# ---- both sides -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Batches [batch_tokens, d_in] of a size, on the device, and their calibration."""

    size: Size
    batches: Sequence[Tensor]
    calibration: Calibration
    device: str

    @staticmethod
    def of(size: Size, device: str) -> "Data":
        """Sparse sums of four times as many directions as dimensions, with noise and a mean."""
        draw = torch.Generator().manual_seed(0)
        directions = torch.randn(4 * size.d_in, size.d_in, generator=draw) / sqrt(size.d_in)
        offset = torch.randn(size.d_in, generator=draw)
        batches = []
        for _ in range(N_BATCHES):
            shape = (size.batch_tokens, len(directions))
            strengths = torch.rand(shape, generator=draw)
            strengths *= torch.rand(shape, generator=draw) < 16 / len(directions)
            noise = torch.randn(size.batch_tokens, size.d_in, generator=draw)
            batches.append(3 * strengths @ directions + 0.02 * noise + offset)
        return Data(size, [batch.to(device) for batch in batches], calibrate(torch.cat(batches)), device)


def training_settings(size: Size, encoder_dtype: str) -> TrainingSettings:
    return TrainingSettings(
        steps=10 * DEAD_STEPS,
        batch_tokens=size.batch_tokens,
        lr=LR,
        lr_decay_steps=0,
        dead_after_tokens=DEAD_STEPS * size.batch_tokens,
        encoder_dtype=encoder_dtype,
    )


class Ours:
    """One SAE of ours."""

    def __init__(self, task: Task, data: Data, encoder_dtype: str = "float32"):
        training = training_settings(data.size, encoder_dtype)
        self.data = data
        self.trainer = SAETrainer(parse_settings(task.settings), training, data.calibration, device=data.device)
        state = self.trainer.state()
        weights = {name.removeprefix("weights."): tensor for name, tensor in state.items() if "weights." in name}
        self.start = prepared(weights, task, data)
        state |= {f"weights.{name}": tensor for name, tensor in self.start.items()}
        dead = dead_latents(task, data.size)
        state["counters.tokens_since_fired"][dead] = training.dead_after_tokens
        state["counters.progress"][1] = training.dead_after_tokens
        self.trainer.load_state(state)

    def step(self, x: Tensor) -> None:
        self.trainer.train_step(x)

    def measure(self, x: Tensor) -> dict[str, float]:
        """L0, squared error and the rest of the loss (normalised units), dead share; by making a step."""
        metrics = self.trainer.train_step(x, want_metrics=True)
        mse = metrics["mse"] * self.data.calibration.scale**2
        return {"l0": metrics["l0"], "mse": mse, "rest": metrics["loss"] - mse, "dead": metrics["dead_fraction"]}


class SAELens:
    """The same SAEs in a `MultiSAETrainer`, with the weights that ours started from."""

    def __init__(self, starts: Mapping[str, tuple[Task, Mapping[str, Tensor]]], data: Data):
        size = data.size
        config = SAETrainerConfig(
            total_training_samples=10 * DEAD_STEPS * size.batch_tokens,
            train_batch_size_samples=size.batch_tokens,
            lr=LR,
            lr_end=LR,  # unused by the constant schedule, but asserted
            device=data.device,
            dead_feature_window=DEAD_STEPS,
        )
        saes = {name: saelens_sae(task, start, data) for name, (task, start) in starts.items()}
        hook_names = dict.fromkeys(saes, "hook")
        self.trainers = MultiSAETrainer(config, saes, hook_names, data_provider=iter(())).trainers
        for name, (task, _) in starts.items():
            self.trainers[name].activation_scaler.scaling_factor = data.calibration.scale
            dead = dead_latents(task, size).to(data.device)
            self.trainers[name].n_forward_passes_since_fired[dead] = DEAD_STEPS + 1.0

    def step(self, x: Tensor) -> None:
        """What `fit` does with a batch, but for its progress bar."""
        for trainer in self.trainers.values():
            trainer.maybe_reset_sparsity()
            trainer.step(x)
            trainer.n_training_steps += 1

    def measure(self, x: Tensor) -> dict[str, dict[str, float]]:
        """As `Ours.measure`, of each SAE."""
        return {name: self._measure(trainer, x) for name, trainer in self.trainers.items()}

    @staticmethod
    def _measure(trainer: Any, x: Tensor) -> dict[str, float]:
        output = trainer.step(x)
        mse = output.losses["mse_loss"].item()
        return {
            "l0": float((output.feature_acts > 0).sum()) / len(x),
            "mse": mse,
            "rest": output.loss.item() - mse,
            "dead": float(trainer.dead_neurons.float().mean()),
        }


def saelens_sae(task: Task, start: Mapping[str, Tensor], data: Data) -> TrainingSAE[Any]:
    settings = {THEIR_NAMES.get(name, name): value for name, value in task.settings.items()}
    config = CONFIGS[settings.pop("architecture")](
        d_in=data.size.d_in, normalize_activations="expected_average_only_in", device=data.device, **settings
    )
    sae = TrainingSAE.get_sae_class_for_architecture(config.architecture())(config)
    sae.load_state_dict({**sae.state_dict(), **start})
    return sae


def prepared(weights: Mapping[str, Tensor], task: Task, data: Data) -> dict[str, Tensor]:
    """Weights at which each latent fires on l0 / d_sae of the tokens, or with latents that are too weak to fire."""
    made = {name: tensor.clone() for name, tensor in weights.items()}
    # far below the k strongest, yet positive on half of the tokens: AuxK finds them
    made["W_enc"][:, dead_latents(task, data.size)] *= 0.01
    if task.l0 is not None:
        x = data.batches[0].cpu() * data.calibration.scale
        pre = (x - made["b_dec"]) @ made["W_enc"]
        n_firing = round(len(x) * task.l0 / data.size.d_sae)
        level = pre.topk(n_firing + 1, dim=0).values[-2:].mean(0)
        match task.settings["architecture"]:
            case "jumprelu":
                made["threshold"] = level
            case "gated":
                made["b_gate"] = -level
            case _:
                made["b_enc"] = -level
    return made


def dead_latents(task: Task, size: Size) -> Tensor:
    """Indices of the latents that never fire, spread over all."""
    n_dead = round(task.dead_share * size.d_sae)
    return torch.arange(n_dead) * size.d_sae // max(n_dead, 1)


def check_same_work(task: Task, ours: Mapping[str, float], theirs: Mapping[str, float], within: float) -> None:
    for figure in ("l0", "mse"):
        if abs(ours[figure] - theirs[figure]) > within * theirs[figure]:
            raise SystemExit(f"{task.name}: {figure} is {ours[figure]} with us and {theirs[figure]} in SAELens")
    if task.dead_share and not all(
        abs(side["dead"] - task.dead_share) < 0.01 and side["rest"] > 0.1 * side["mse"] for side in (ours, theirs)
    ):
        raise SystemExit(f"{task.name}: AuxK does not work on a share of {task.dead_share} dead: {ours}, {theirs}")


# ---- time -----------------------------------------------------------------------------------------------------------


def stopwatch(work: Callable[[Tensor], object], batches: Iterator[Tensor]) -> float:
    """Seconds that `work` takes on the next batch."""
    x = next(batches)
    if x.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    work(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_seconds(
    sides: Mapping[str, Callable[[Tensor], object]], batches: Sequence[Tensor], repeats: int
) -> dict[str, float]:
    runs = {name: partial(stopwatch, work, cycle(batches)) for name, work in sides.items()}
    interleaved(runs, WARM_UP, announce=False)
    return {name: median(seconds) for name, seconds in interleaved(runs, repeats, announce=False).items()}


@dataclass(frozen=True)
class Timing:
    """Seconds a step and measures of each side: ours, ours with a bf16 encoder, SAELens, and the GEMM alone."""

    seconds: dict[str, float]
    measures: dict[str, dict[str, float]]


def time_task(task: Task, data: Data, repeats: int) -> Timing:
    ours = {"ours": Ours(task, data)}
    if task.bf16:
        ours["bf16"] = Ours(task, data, "bfloat16")
    start = ours["ours"].start
    saelens = SAELens({task.name: (task, start)}, data)
    out = torch.empty(data.size.batch_tokens, data.size.d_sae, device=data.device)
    W_enc, bias = (tensor.to(data.device) for tensor in (start["W_enc"].contiguous(), torch.zeros(data.size.d_sae)))
    sides = {
        **{name: side.step for name, side in ours.items()},
        "SAELens": saelens.step,
        "GEMM": lambda x: torch.addmm(bias, x, W_enc, out=out),
    }
    seconds = median_seconds(sides, data.batches, repeats)
    x = data.batches[0]
    measures = {name: side.measure(x) for name, side in ours.items()}
    measures["SAELens"] = saelens.measure(x)[task.name]
    for name in ours:
        check_same_work(task, measures[name], measures["SAELens"], within=0.01 if name == "ours" else 0.05)
    return Timing(seconds, measures)


def time_pack(data: Data, repeats: int) -> Comparison:
    """The SAEs of a pack on each batch, as both sides train several: theirs one after the other, each on all threads,
    ours as `penstock.pack` does with `saes_at_once`, as many at a time as there are threads, each on one."""
    listed = pack_tasks(data.size)
    ours = {task.name: Ours(task, data) for task in listed}
    saelens = SAELens({task.name: (task, ours[task.name].start) for task in listed}, data)
    threads = torch.get_num_threads() if data.device == "cpu" else 1
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def step(x: Tensor) -> None:
            list(pool.map(lambda side: side.step(x), ours.values()))

        seconds = median_seconds({"ours": step, "SAELens": saelens.step}, data.batches, repeats)
    torch.set_num_threads(threads)  # for whatever runs next
    theirs = saelens.measure(data.batches[0])
    for task in listed:
        check_same_work(task, ours[task.name].measure(data.batches[0]), theirs[task.name], within=0.01)
    tokens = len(listed) * data.size.batch_tokens
    rates = (tokens / seconds["ours"], tokens / seconds["SAELens"])
    return Comparison(f"pack of {len(listed)}", "SAE-tokens/s", *rates, goal=5, lower_is_better=False)


def gemm_peak(device: str, side: int) -> float:
    """Floating-point operations a second in a square float32 product: the best of three."""
    a, b, out = (torch.rand(side, side, device=device) for _ in range(3))
    seconds = [stopwatch(lambda x: torch.mm(x, b, out=out), iter([a])) for _ in range(4)]
    return 2 * side**3 / min(seconds[1:])


# ---- memory ---------------------------------------------------------------------------------------------------------


def step_memory(side: str, size: Size, device: str, threads: int) -> float:
    """Bytes that a topk step takes at its peak beyond libraries, batches, weights and Adam's moments."""
    torch.set_num_threads(threads)
    gc.freeze()  # the libraries' objects, so that collecting is quick
    make = {"ours": _ours_alone, "SAELens": _saelens_alone}[side]
    data, little = Data.of(size, device), Data.of(QUICK, device)
    for x in little.batches:  # so that libraries, threads and kernels are there
        make(little).step(x)
    del x, little
    base = _resident(device)
    alone = make(data)
    weights = 4 * (2 * size.d_in * size.d_sae + size.d_sae + size.d_in)
    peaks = []
    for x in data.batches:
        _resident(device)
        _reset_peak(device)
        alone.step(x)
        peaks.append(_peak(device))
    return max(peaks[1:]) - base - 3 * weights


def _ours_alone(data: Data) -> Ours:
    return Ours(tasks(data.size)[0], data)


def _saelens_alone(data: Data) -> SAELens:
    task = tasks(data.size)[0]
    return SAELens({task.name: (task, _ours_alone(data).start)}, data)


def _resident(device: str) -> int:
    """Bytes in use, once all that is free is given back."""
    gc.collect()
    if device == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    [kilobytes] = re.findall(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.M)
    return 1024 * int(kilobytes)


def compare_memory(size: Size, device: str, *, apart: bool, threads: int) -> Comparison:
    """`apart`: each side in a new process."""
    taken = {}
    for side in ("ours", "SAELens"):
        if apart:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                taken[side] = process.submit(step_memory, side, size, device, threads).result()
        else:
            taken[side] = step_memory(side, size, device, threads)
    return Comparison("topk, memory of a step", "MB", taken["ours"] / MB, taken["SAELens"] / MB, 0.5, at_most=True)


# ---- the figures ----------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = read_arguments()
    size = QUICK if arguments.quick else replace(FULL, batch_tokens=arguments.batch_tokens)
    pack_size = replace(PACK if not arguments.quick else QUICK, batch_tokens=size.batch_tokens)
    threads = 1 if arguments.quick else THREADS
    torch.set_num_threads(threads)
    gc.freeze()  # so that no step happens to pay for a search through all that the libraries have made
    described = machine()
    device, repeats = arguments.device, arguments.repeats
    rows: list[Comparison] = []
    context: list[Comparison] = []
    wanted = [task for task in tasks(size) if task.name in arguments.only]
    if wanted:
        data = Data.of(size, device)
        peak = gemm_peak(device, 256 if arguments.quick else 4096)
        context.append(Comparison("GEMM peak", "GFLOP/s", peak / 1e9))
        for task in wanted:
            timing = time_task(task, data, repeats)
            milliseconds = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in timing.seconds.items())
            print(f"[{time.strftime('%H:%M:%S')}] {task.name}: {milliseconds}", flush=True)
            rows += time_rows(task, timing)
            context += context_rows(task, timing, size, peak)
        del data
    if "memory" in arguments.only:
        rows.append(compare_memory(size, device, apart=not arguments.quick, threads=threads))
    if "pack" in arguments.only:
        rows.append(time_pack(Data.of(pack_size, device), repeats))

    notes = [f"L0 and reconstruction error of both sides agree. Share of the peak: 2 B d_in (d_sae + 4 L0) a step. "
             f"{threads} threads, device {device}."]  # fmt: skip
    promised = not arguments.quick and device == "cpu" and size == FULL
    if not promised:
        rows = [replace(row, goal=None) for row in rows]
    elif not has_bf16_units():
        rows = [replace(row, goal=None) if "bf16" in row.name else row for row in rows]
        notes.append("This processor has no bfloat16 units (avx512_bf16, amx_bf16): no goal for the bf16 encoder.")
    if arguments.quick:
        notes.append("QUICK: tiny SAEs, memory within this process. These figures mean nothing.")
    title = f"one training step, d_in {size.d_in}, d_sae {size.d_sae}, {size.batch_tokens} tokens: ours against SAELens"
    report(title, rows + context, arguments, described, VERSIONS, notes)


def read_arguments() -> argparse.Namespace:
    names = [task.name for task in tasks(FULL)] + ["memory", "pack"]
    options = parser(__doc__)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--batch-tokens", metavar="N", type=int, default=FULL.batch_tokens)
    return parse_rows(options, names, STEPS)


def time_rows(task: Task, timing: Timing) -> list[Comparison]:
    milliseconds = {name: 1e3 * seconds for name, seconds in timing.seconds.items()}
    ours, theirs = milliseconds["ours"], milliseconds["SAELens"]
    rows = [Comparison(task.name, "ms", ours, theirs, task.goal)]
    if task.bf16:
        rows.append(Comparison(f"{task.name}, bf16 encoder", "ms", milliseconds["bf16"], theirs, task.bf16_goal))
    if task.name == "topk":
        name = "topk against the encoder's GEMM alone"
        rows.append(Comparison(name, "ms", ours, milliseconds["GEMM"], 1.8, at_most=True))
    return rows


def context_rows(task: Task, timing: Timing, size: Size, peak: float) -> list[Comparison]:
    sides = ("ours", "SAELens")
    l0 = {side: timing.measures[side]["l0"] for side in sides}
    rates = [size.batch_tokens / timing.seconds[side] for side in sides]
    per_token = [2 * size.d_in * (size.d_sae + 4 * l0[side]) for side in sides]
    shares = [100 * rate * operations / peak for rate, operations in zip(rates, per_token, strict=True)]
    shown = [("L0", "", l0.values()), ("rate", "tokens/s", rates), ("share of the GEMM peak", "%", shares)]
    if task.dead_share:
        shown.append(("dead latents", "%", [100 * timing.measures[side]["dead"] for side in sides]))
    return [Comparison(f"{task.name}, {name}", unit, *pair, lower_is_better=None) for name, unit, pair in shown]


def has_bf16_units() -> bool:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return bool(re.search(r"\b(avx512_bf16|amx_bf16)\b", flags))


if __name__ == "__main__":
    main()
