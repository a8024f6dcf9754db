"""A small finished sweep in a real MLflow database, for the tests of everything that reads one."""

from pathlib import Path

import pandas as pd
import torch

from penstock.home import Home
from penstock.tracking import TrackedSAE, Tracker, sweep_table
from sae_core import SAE, SAEConfig, TopKSAE

EARLY, LATE = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"
SPEC = "name: demo\nselect: {l0_band: [2.0, 16.0]}\n"

# sae_id: hook point, k, status, l0, ce_recovered
SAES = {
    "early-4": (EARLY, 4, "finished", 4.0, 0.80),
    "early-8": (EARLY, 8, "finished", 8.0, 0.90),
    "early-9": (EARLY, 9, "finished", 9.0, 0.85),
    "early-32": (EARLY, 32, "finished", 32.0, 0.98),
    "late-8": (LATE, 8, "finished", 8.0, 0.70),
    "late-16": (LATE, 16, "diverged", None, None),
}


def tracked(sae_id: str) -> TrackedSAE:
    hook_point, k, *_ = SAES[sae_id]
    return TrackedSAE(sae_id, hook_point, {"architecture": "topk", "d_sae": 6, "k": k, "lr": 4e-4, "seed": 0})


FROZEN = TrackedSAE("frozen", EARLY, {"architecture": "topk", "d_sae": 6, "k": 8}, baseline="frozen_decoder")


def write_sae(folder: Path, hook_point: str) -> SAE:
    """A real SAE of 4 dimensions and 6 latents, saved to a folder."""
    generator = torch.Generator().manual_seed(0)
    fields = {"architecture": "topk", "d_in": 4, "d_sae": 6, "k": 2, "rescale_acts_by_decoder_norm": True}
    cfg = SAEConfig(**fields, metadata={"hook_name": hook_point})
    sae = TopKSAE(cfg, {name: torch.randn(shape, generator=generator) for name, shape in TopKSAE.shapes(cfg).items()})
    sae.save(folder, sparsity=torch.full((6,), -1.0))
    return sae


def figures(l0: float, ce_recovered: float) -> dict[str, float]:
    return {
        "l0": l0, "ce_recovered": ce_recovered, "kl_recovered": ce_recovered - 0.01, "explained_variance": 0.7,
        "dead_fraction": 0.25, "mse": 1.5, "ce_increase": 4 * (1 - ce_recovered),
    }  # fmt: skip


def evaluation_rows(sae: str, hook_point: str, n_rows: int = 6, loss: float = 1.5) -> pd.DataFrame:
    """Figures of a few sequences, two a document, as an evaluation leaves them."""
    sums = {
        "n_tokens": 8.0, "n_predictions": 7.0, "ce_clean": 7.0, "ce_ablated": 28.0, "ce_sae": 7 * loss,
        "kl_ablated": 14.0, "kl_sae": 3.5, "l0": 32.0, "l1": 40.0, "squared_error": 12.0, "square_centred": 40.0,
        "square_x": 60.0, "square_x_hat": 50.0, "x_dot_x_hat": 48.0, "cosine": 7.0, "l2_ratio": 7.5,
    }  # fmt: skip
    index = range(n_rows)
    leading = {"sae": sae, "hook_point": hook_point, "row": list(index), "document": [at // 2 for at in index]}
    return pd.DataFrame({**leading, **{name: [value + 0.01 * at for at in index] for name, value in sums.items()}})


def make_sweep(home: Home, folder: Path, name: str = "demo", sweep_id: str = "0123456789ab") -> Tracker:
    tracker = Tracker(home, name, sweep_id)
    tracker.open(SPEC, {"train_tokens": 1000}, [*(tracked(sae_id) for sae_id in SAES), FROZEN])
    for sae_id, (hook_point, _, status, l0, recovered) in SAES.items():
        tracker.log_rows(sae_id, [{"tokens": at, "metrics": {"loss": 1024 / at}} for at in (512, 1024)])
        if status == "finished":
            write_sae(folder / sae_id, hook_point)
            tracker.finish_sae(sae_id, status=status, metrics=figures(l0, recovered), folder=folder / sae_id)
        else:
            tracker.finish_sae(sae_id, status=status, metrics={}, folder=None, reason="loss was nan at step 3")
    tracker.finish_sae("frozen", status="finished", metrics=figures(8.0, 0.4), folder=None)
    plot = folder / "pareto.png"
    plot.write_bytes(b"a picture")
    baselines = pd.DataFrame([{"kind": "pca", "hook_point": EARLY, "k": 8, "l0": 8.0, "ce_recovered": 0.5}])
    tracker.finish_sweep(
        status="finished", front=sweep_table(home, name), baselines=baselines, files=[plot],
        cost={"seconds_total": 12.5, "sae_tokens_per_second": 4096.0},
    )  # fmt: skip
    return tracker
