"""SAELens' evaluation of an SAE by its names."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from penstock.compat.store import ActivationsStore
from penstock.errors import ConfigError

if TYPE_CHECKING:
    from sae_core import SAE

# Group -> (what has to be asked for, {SAELens' name: ours}).
_GROUPS: dict[str, tuple[str, dict[str, str]]] = {
    "model_behavior_preservation": (
        "compute_kl",
        {"kl_div_score": "kl_recovered", "kl_div_with_ablation": "kl_ablated", "kl_div_with_sae": "kl_sae"},
    ),
    "model_performance_preservation": (
        "compute_ce_loss",
        {"ce_loss_score": "ce_recovered", "ce_loss_with_ablation": "ce_ablated", "ce_loss_with_sae": "ce_sae",
         "ce_loss_without_sae": "ce_clean"},
    ),
    "reconstruction_quality": (
        "compute_variance_metrics", {"explained_variance": "explained_variance", "mse": "mse", "cossim": "cosine"}
    ),
    "shrinkage": (
        "compute_l2_norms",
        {"l2_ratio": "l2_ratio", "relative_reconstruction_bias": "relative_reconstruction_bias"},
    ),
    "sparsity": ("compute_sparsity_metrics", {"l0": "l0", "l1": "l1"}),
}  # fmt: skip


@dataclass
class EvalConfig:
    """What `run_evals` measures, and on how many rows: batches times batch_size_prompts (the store's unless given), the
    larger number of batches, as far as the report split goes."""

    batch_size_prompts: int | None = None
    n_eval_reconstruction_batches: int = 10
    compute_kl: bool = False
    compute_ce_loss: bool = False
    n_eval_sparsity_variance_batches: int = 1
    compute_l2_norms: bool = False
    compute_sparsity_metrics: bool = False
    compute_variance_metrics: bool = False
    compute_featurewise_density_statistics: bool = False
    compute_featurewise_weight_based_metrics: bool = False


def get_eval_everything_config(
    batch_size_prompts: int | None = None,
    n_eval_reconstruction_batches: int = 10,
    n_eval_sparsity_variance_batches: int = 1,
) -> EvalConfig:
    """All of it."""
    return EvalConfig(
        batch_size_prompts, n_eval_reconstruction_batches, True, True, n_eval_sparsity_variance_batches,
        True, True, True, True, True,
    )  # fmt: skip


def run_evals(
    sae: "SAE",
    activation_store: ActivationsStore,
    model: Any = None,
    *unused: Any,
    eval_config: EvalConfig | None = None,
    model_kwargs: Mapping[str, Any] = {},
    ignore_tokens: Iterable[int] | None = None,
    exclude_special_tokens: bool = True,
    verbose: bool = False,
) -> tuple[dict[str, dict[str, float]], dict[str, list[float]]]:
    """({group: {metric: value}}, {metric of each latent: values}), by SAELens' names.

    Unlike SAELens it does not draw from the data that is trained on: it is the beginning of the store's report split,
    the same rows for every SAE, and tokens that the store excludes count nowhere. Figures with intervals, over more
    tokens: `penstock evaluate`. Where it used to be given, an activation scaler is not needed.
    """
    from sae_core import evaluate_rows

    configs = [one for one in unused if isinstance(one, EvalConfig)]
    config = eval_config or (configs[0] if configs else EvalConfig())
    if model_kwargs or ignore_tokens or not exclude_special_tokens:
        raise ConfigError("run_evals: model_kwargs, ignore_tokens and exclude_special_tokens=False cannot be given; "
                          "accepted: exclude_special_tokens and seqpos_slice in the store's configuration")  # fmt: skip
    data, store = activation_store.sweep.spec.data, activation_store.sweep.evaluated
    batch = config.batch_size_prompts or activation_store.store_batch_size_prompts
    n_batches = max(config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches)
    n_rows = min(store.n_rows("report"), batch * n_batches)
    rows = store.rows("report", 0, n_rows)
    sums = evaluate_rows(
        activation_store.model if model is None else model,
        {"sae": sae},
        activation_store.hook_name,
        torch.from_numpy(rows.astype("int64")),
        torch.from_numpy(store.kept(rows)),
        rows_per_forward=min(batch, data.block_rows),
    )["sae"]
    figures = sums.metrics()
    found = {
        group: {theirs: figures[ours] for theirs, ours in names.items()}
        for group, (wanted, names) in _GROUPS.items()
        if getattr(config, wanted)
    }
    total = int(n_rows * store.context_size)
    found["token_stats"] = {"total_tokens_eval_reconstruction": total, "total_tokens_eval_sparsity_variance": total}
    latents: dict[str, list[float]] = {}
    if config.compute_featurewise_density_statistics:
        latents["feature_density"] = sums.feature_density.tolist()
    if config.compute_featurewise_weight_based_metrics:
        W_enc = sae.W_enc.float()
        latents["encoder_norm"] = W_enc.norm(dim=0).tolist()
        latents["encoder_decoder_cosine_sim"] = torch.cosine_similarity(W_enc.T, sae.W_dec.float(), dim=1).tolist()
        if hasattr(sae, "b_enc"):
            latents["encoder_bias"] = sae.b_enc.float().tolist()
    return found, latents
