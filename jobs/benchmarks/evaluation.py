"""Evaluating the 20 SAEs of a sweep at one hook point: ours against `run_evals` of the released SAELens.

    python jobs/benchmarks/evaluation.py [--quick] [--json FILE] [--repeats N] [--only NAME,...] [--threads N]

Ours runs the model once without SAEs, once ablated, and from the hook point on once for each SAE; SAELens runs it three
times and once up to the hook point for each. So what can be gained depends on how much of the model lies below the
hook point, which the table says: by counted multiplications, and as the share of a forward pass' time.

Both sides load the same folders and evaluate them on the same tokens in the same rows a forward pass, in float32, with
the same model object (as the platform loads it) and the same threads, in one process, one after the other. Theirs is
asked for the figures that ours has: CE, KL, L0, L1, explained variance, error, norms and feature densities. Figures
are compared after the timing, and a difference beyond 1e-4 ends the benchmark: it would not have been the same work.

Rows (`--only` takes their names):
  deep-70, deep-middle    a random GPT-2 of 12 layers whose unembedding has the share of Pythia-410M's
  demo-last, demo-middle  the demo model, with its large unembedding, on Python's source

CPU time is shown beside the wall time that the goals are about: it depends less on what else a machine does.

Of the SAEs, four are of each of topk, batch_topk, jumprelu, standard and gated, trained for a moment on the spot.
`--quick` has deep-70 alone, unless told otherwise.
"""

import argparse
import inspect
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Comparison, count, interleaved, machine, medians, parse_rows, parser, report
from torch import Tensor, nn

from penstock.models import load_model
from penstock.spec import ModelSpec
from sae_core import SAE, SAETrainer, TrainingSettings, calibrate, evaluate_rows, parse_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sae_lens
    from sae_lens.evals import EvalConfig
    from sae_lens.training.activation_scaler import ActivationScaler

VERSIONS = ("penstock", "sae-lens", "torch")
THEIR_NAMES = {
    "ce_recovered": "ce_loss_score",
    "ce_clean": "ce_loss_without_sae",
    "ce_ablated": "ce_loss_with_ablation",
    "ce_sae": "ce_loss_with_sae",
    "kl_recovered": "kl_div_score",
    "kl_sae": "kl_div_with_sae",
    "kl_ablated": "kl_div_with_ablation",
    "explained_variance": "explained_variance",
    "mse": "mse",
    "cosine": "cossim",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "l0": "l0",
    "l1": "l1",
}
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Size:
    n_layers: int  # of the random model, as the next three
    d_model: int
    n_heads: int
    vocabulary: int
    rows: int
    context: int
    expansion: int
    steps: int  # of training


FULL = Size(n_layers=12, d_model=256, n_heads=4, vocabulary=6144, rows=8, context=128, expansion=8, steps=20)
QUICK = Size(n_layers=4, d_model=32, n_heads=2, vocabulary=128, rows=2, context=32, expansion=2, steps=5)


@dataclass(frozen=True)
class Task:
    """Where SAEs are evaluated; `layer`: the hook point is its output."""

    model: str
    layer: int
    goal: float | None

    @property
    def hook_point(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"


def tasks(size: Size) -> dict[str, Task]:
    deep = size.n_layers
    return {
        "deep-70": Task("deep", deep - max(1, deep // 6) - 1, 8),
        "deep-middle": Task("deep", deep // 2 - 1, 5),
        "demo-last": Task("demo", 5, 8),
        "demo-middle": Task("demo", 2, 5),
    }


def settings(d_sae: int) -> dict[str, dict[str, Any]]:
    """Of 20 SAEs, by name."""
    grids = {
        "topk": ("k", (8, 16, 32, 64)),
        "batch_topk": ("k", (8, 16, 32, 64)),
        "jumprelu": ("target_l0", (8, 16, 32, 64)),
        "standard": ("l1_coefficient", (0.5, 1, 2, 4)),
        "gated": ("l1_coefficient", (0.5, 1, 2, 4)),
    }
    return {f"{name}-{value}": {"architecture": name, "d_sae": d_sae, key: min(value, d_sae // 2)}
            for name, (key, values) in grids.items() for value in values}  # fmt: skip


# ---- models, tokens, SAEs -------------------------------------------------------------------------------------------


def deep_model(size: Size) -> nn.Module:
    """A random GPT-2, from a folder as users load theirs."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=size.n_layers, n_embd=size.d_model, n_head=size.n_heads, vocab_size=size.vocabulary,
        n_positions=size.context, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    network = GPT2LMHeadModel(config)
    for parameter in network.parameters():  # the usual start is too small for what is predicted to depend on layers
        parameter.data.mul_(6) if parameter.ndim == 2 else None
    with tempfile.TemporaryDirectory(prefix="penstock-evaluation-") as folder:
        network.save_pretrained(folder)
        return load_model(ModelSpec(name=folder), "cpu")


def tokens_of(model: nn.Module, name: str, size: Size) -> Tensor:
    n_tokens = size.rows * size.context
    if name == "deep":
        return torch.randint(0, size.vocabulary, (n_tokens,)).view(size.rows, size.context)
    ids = model.tokenizer(inspect.getsource(argparse) + inspect.getsource(inspect))["input_ids"]
    return torch.tensor(ids[:n_tokens]).view(size.rows, size.context)


@torch.no_grad()
def activations_of(model: nn.Module, hook_point: str, tokens: Tensor) -> Tensor:
    """[tokens, d]"""
    seen: list[Tensor] = []
    model.run_with_hooks(tokens, return_type=None, fwd_hooks=[(hook_point, lambda x, hook: seen.append(x.clone()))])
    return seen[0].flatten(0, 1)


def train(x: Tensor, hook_point: str, size: Size, folder: Path) -> None:
    """Save a folder for each SAE. Thresholds are not set on these very tokens: then one would be the activation of one
    of them, and rounding would decide whether that counts."""
    batch = min(512, len(x) // 2)
    training = TrainingSettings(steps=size.steps, batch_tokens=batch, lr=3e-3, dead_after_tokens=size.steps * batch)
    for name, chosen in settings(size.expansion * x.shape[1]).items():
        trainer = SAETrainer(parse_settings(chosen), training, calibrate(x))
        for step in range(size.steps):
            start = step * batch % (len(x) - batch + 1)
            trainer.train_step(x[start : start + batch])
        trainer.export({"hook_name": hook_point, "model_name": "benchmark"}).save(folder / name)


# ---- the two sides --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    seconds: float
    cpu_seconds: float
    figures: Mapping[str, Mapping[str, float]]  # by SAE
    density: Mapping[str, Sequence[float]]


def ours(model: nn.Module, saes: Mapping[str, nn.Module], hook_point: str, tokens: Tensor) -> Found:
    kept = torch.ones_like(tokens, dtype=torch.bool)
    started = _clocks()
    sums = evaluate_rows(model, saes, hook_point, tokens, kept, rows_per_forward=len(tokens))
    metrics = {name: one.metrics() for name, one in sums.items()}
    density = {name: one.feature_density.tolist() for name, one in sums.items()}
    return Found(*_since(started), metrics, density)


class _Rows:
    """The part of SAELens' activation store that its evaluation reads."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.store_batch_size_prompts, self.context_size = tokens.shape

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        return self.tokens[:batch_size]

    def reset_input_dataset(self) -> None:
        pass


def theirs(model: nn.Module, saes: Mapping[str, Any], tokens: Tensor) -> Found:
    asked = EvalConfig(
        n_eval_reconstruction_batches=1, n_eval_sparsity_variance_batches=1, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True,
    )  # fmt: skip
    figures, density = {}, {}
    started = _clocks()
    for name, sae in saes.items():
        groups, features = sae_lens.run_evals(
            sae, _Rows(tokens), model, ActivationScaler(), asked, exclude_special_tokens=False
        )
        found = {key: value for group in groups.values() for key, value in group.items()}
        figures[name] = {key: found[their] for key, their in THEIR_NAMES.items()}
        density[name] = features["feature_density"]
    return Found(*_since(started), figures, density)


def _clocks() -> tuple[float, float]:
    """Wall and CPU seconds of this process."""
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _clocks()
    return wall - started[0], cpu - started[1]


def difference(one: Found, other: Found) -> tuple[float, str]:
    """The greatest relative difference of a figure, and which. CE recovered is compared as a difference of CE relative
    to the clean one: where ablation hardly matters, the ratio is made of the last digits of float32 means."""
    apart = {}
    for name, figures in other.figures.items():
        gap = abs(figures["ce_ablated"] - figures["ce_clean"]) / figures["ce_clean"]
        for key, value in figures.items():
            scale = gap if key == "ce_recovered" else 1 / max(abs(value), 1e-3)
            apart[f"{key} of {name}"] = abs(one.figures[name][key] - value) * scale
        pairs = zip(one.density[name], other.density[name], strict=True)
        apart[f"feature density of {name}"] = max(abs(a - b) for a, b in pairs)
    return max((value, name) for name, value in apart.items())


# ---- how much lies below --------------------------------------------------------------------------------------------


def counted_share(model: nn.Module, layer: int, context: int) -> float:
    """The share of a forward pass' multiplications up to a layer's output: weights, attention's two products, and the
    unembedding."""
    cfg = model.cfg
    of_layer = 4 * cfg.d_model * cfg.d_model + 2 * cfg.d_model * cfg.d_mlp + 2 * context * cfg.d_model
    return (layer + 1) * of_layer / (cfg.n_layers * of_layer + cfg.d_model * cfg.d_vocab)


@torch.no_grad()
def timed_share(model: nn.Module, hook_point: str, tokens: Tensor, passes: int = 5) -> float:
    """The share of a forward pass' time up to a hook point: the median over some passes."""
    at: list[float] = []
    shares = []
    for _ in range(passes):
        started = time.perf_counter()
        model.run_with_hooks(
            tokens, return_type="logits", fwd_hooks=[(hook_point, lambda x, hook: at.append(time.perf_counter()))]
        )
        shares.append((at[-1] - started) / (time.perf_counter() - started))
    return median(shares)


# ---- the whole ------------------------------------------------------------------------------------------------------


def measure(name: str, task: Task, model: nn.Module, size: Size, arguments: argparse.Namespace) -> list[Comparison]:
    tokens = tokens_of(model, task.model, size)
    with tempfile.TemporaryDirectory(prefix="penstock-evaluation-") as folder:
        train(activations_of(model, task.hook_point, tokens), task.hook_point, size, Path(folder))
        names = list(settings(1 << 20))
        our_saes = {one: SAE.load(Path(folder, one)) for one in names}
        their_saes = {one: sae_lens.SAE.load_from_disk(Path(folder, one)) for one in names}
    ours(model, dict(list(our_saes.items())[:1]), task.hook_point, tokens)  # what a first call costs, on both sides
    theirs(model, dict(list(their_saes.items())[:1]), tokens)
    found = interleaved(
        {f"{name}, ours": lambda: ours(model, our_saes, task.hook_point, tokens),
         f"{name}, SAELens": lambda: theirs(model, their_saes, tokens)},
        arguments.repeats,
    )  # fmt: skip
    mine, other = found.values()
    apart, which = difference(mine[0], other[0])
    if apart > TOLERANCE:
        raise SystemExit(f"{name}: {which} differs by {apart:.1e}; accepted: {TOLERANCE:.0e}")
    our_times, their_times = (
        medians({"wall": one.seconds, "cpu": one.cpu_seconds} for one in runs) for runs in found.values()
    )
    goal = None if arguments.quick else task.goal
    label = f"{name}: {len(our_saes)} SAEs at {task.hook_point}"
    return [
        Comparison(label, "s", our_times["wall"], their_times["wall"], goal=goal),
        Comparison(f"{name}: CPU time of the same", "s", our_times["cpu"], their_times["cpu"]),
        Comparison(f"{name}: multiplications below", "%", 100 * counted_share(model, task.layer, size.context)),
        Comparison(f"{name}: time below", "%", 100 * timed_share(model, task.hook_point, tokens)),
        Comparison(f"{name}: greatest difference of a figure", "1e-6", 1e6 * apart),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--threads", metavar="N", type=count, default=2, help="of torch, on both sides; 2")
    arguments = parse_rows(options, list(tasks(FULL)), repeats=3)
    if arguments.quick and arguments.only == list(tasks(FULL)):
        arguments.only = ["deep-70"]
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    described, size = machine(), QUICK if arguments.quick else FULL
    rows = []
    for name in arguments.only:
        task = tasks(size)[name]
        model = load_model(ModelSpec(name="demo"), "cpu") if task.model == "demo" else deep_model(size)
        rows += measure(name, task, model, size, arguments)
    notes = [f"{size.rows} rows of {size.context} tokens in one forward pass, {arguments.threads} threads."]
    if arguments.quick:
        notes.append("QUICK: tiny models and next to no tokens. These figures mean nothing.")
    report("Evaluating 20 SAEs at one hook point", rows, arguments, described, VERSIONS, notes)


if __name__ == "__main__":
    main()
