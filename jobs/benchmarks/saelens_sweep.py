"""The opponent of `sweep.py`: the released SAELens trains and evaluates the SAEs of a sweep, as its users would.

    python jobs/benchmarks/saelens_sweep.py JOB.json RESULT.json

One `MultiSAETrainingRunner` trains all SAEs on one forward pass; `run_evals` then evaluates each on the same report
rows. Its defaults hold but for: two threads, no Weights & Biases, no checkpoints, few batches for the norm estimate,
no feature densities, and what makes it the same task (normalisation, learning rate with warm-up and decay, excluded
special tokens).

Facts about sae_lens 6.54.12 that this file has to respect:
- Its `HookedTransformer` loader takes names of TransformerLens' own table only, so a local Hugging Face folder goes in
  as `AutoModelForCausalLM`, whose hook points are the modules' own names. It is also the fastest of the ways in
  (a forward pass up to block 4 of the demo model: 0.11 s, through a TransformerBridge 0.18 s).
- `AutoModelForCausalLM` keeps the type of the stored weights, float16 here, so float32 has to be asked for.
- `run_evals` goes on where its token source stands, so that every SAE is evaluated on other tokens. A source of
  exactly the rows of one evaluation starts over each time: every SAE sees the same rows, in both of its passes.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from sae_lens import (
    ActivationsStore,
    GatedTrainingSAEConfig,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    run_evals,
)
from sae_lens.evals import EvalConfig
from sae_lens.training.activation_scaler import ActivationScaler

CONFIGS = {"standard": StandardTrainingSAEConfig, "gated": GatedTrainingSAEConfig, "topk": TopKTrainingSAEConfig}
NORM_BATCHES = 16


@dataclass(frozen=True)
class Job:
    """A sweep in SAELens' terms. `saes`: hook_point (a module's name), architecture, d_in, d_sae, sparsity."""

    model: str
    train_documents: str
    report_documents: str
    saes: list[dict[str, Any]]
    output: str
    context_size: int
    batch_tokens: int
    steps: int
    lr: float
    lr_warm_up_steps: int
    lr_decay_steps: int
    report_rows: int
    report_batches: int
    threads: int


@dataclass(frozen=True)
class Outcome:
    """Seconds since the epoch at which a phase ended, and the figures of each SAE."""

    ready_at: float
    trained_at: float
    evaluated_at: float
    saes: list[dict[str, Any]]


def run(job: Job) -> Outcome:
    """The whole sweep in this process."""
    torch.set_num_threads(job.threads)
    runner = MultiSAETrainingRunner(_config(job), override_dataset=load_from_disk(job.train_documents))
    ready_at = time.time()
    saes = runner.run()
    trained_at = time.time()
    store = _report_rows(job, runner, next(iter(saes.values())))
    figures = [
        {"architecture": described["architecture"], **_evaluate(job, runner, store, sae)}
        for described, sae in zip(job.saes, saes.values(), strict=True)
    ]
    return Outcome(ready_at, trained_at, time.time(), figures)


def _config(job: Job) -> MultiSAETrainingRunnerConfig:
    names = [f"sae-{index}" for index in range(len(job.saes))]
    return MultiSAETrainingRunnerConfig(
        saes={name: _sae_config(described) for name, described in zip(names, job.saes, strict=True)},
        hook_names={name: described["hook_point"] for name, described in zip(names, job.saes, strict=True)},
        model_name=job.model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "float32"},
        context_size=job.context_size,
        training_tokens=job.steps * job.batch_tokens,
        train_batch_size_tokens=job.batch_tokens,
        lr=job.lr,
        lr_warm_up_steps=job.lr_warm_up_steps,
        lr_decay_steps=job.lr_decay_steps,
        exclude_special_tokens=True,
        n_batches_for_norm_estimate=min(NORM_BATCHES, job.steps),
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=job.output,
    )


def _sae_config(described: dict[str, Any]) -> TrainingSAEConfig:
    settings = {name: value for name, value in described.items() if name not in ("architecture", "hook_point")}
    return CONFIGS[described["architecture"]](normalize_activations="expected_average_only_in", **settings)


def _report_rows(job: Job, runner: MultiSAETrainingRunner, sae: TrainingSAE[Any]) -> ActivationsStore:
    """A token source of exactly the rows of one evaluation, tokenised once."""
    batch = job.report_rows // job.report_batches
    texts = ActivationsStore.from_sae(runner.model, sae, load_from_disk(job.report_documents))
    rows = Dataset.from_dict({"input_ids": texts.get_batch_tokens(job.report_rows).tolist()})
    return ActivationsStore.from_sae(runner.model, sae, rows, store_batch_size_prompts=batch)


def _evaluate(
    job: Job, runner: MultiSAETrainingRunner, store: ActivationsStore, sae: TrainingSAE[Any]
) -> dict[str, float]:
    metrics, _ = run_evals(
        sae=sae.eval(),
        activation_store=store,
        model=runner.model,
        activation_scaler=ActivationScaler(),  # the norm was folded into the weights at the end of training
        eval_config=EvalConfig(
            n_eval_reconstruction_batches=job.report_batches,
            n_eval_sparsity_variance_batches=job.report_batches,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        ),
        exclude_special_tokens=True,
    )
    return {
        "l0": metrics["sparsity"]["l0"],
        "ce_recovered": metrics["model_performance_preservation"]["ce_loss_score"],
        "kl_recovered": metrics["model_behavior_preservation"]["kl_div_score"],
        "explained_variance": metrics["reconstruction_quality"]["explained_variance"],
    }


if __name__ == "__main__":
    outcome = run(Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
    Path(sys.argv[2]).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
