"""One small sweep, tracked from its opening to its registered models, as a process of its own: HOME CHECKPOINT NAME.
It loads no torch, so that eight of them start quickly."""

import sys
from pathlib import Path

import pandas as pd

from penstock.home import Home
from penstock.registry import hand_over
from penstock.tracking import TrackedSAE, Tracker, sweep_table

EARLY, LATE = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"
N_ROWS = 60
SAES = {"a": (EARLY, 4.0, 0.8), "b": (EARLY, 8.0, 0.9), "c": (LATE, 8.0, 0.7)}


def rows(upto: int) -> list[dict]:
    metrics = ("loss", "l0", "explained_variance", "dead_fraction")
    return [{"tokens": 512 * at, "metrics": {name: at + 0.5 for name in metrics}} for at in range(1, upto + 1)]


def figures(l0: float, ce_recovered: float) -> dict[str, float]:
    return {"l0": l0, "ce_recovered": ce_recovered, "explained_variance": 0.7, "dead_fraction": 0.25}


def main(home: Home, checkpoint: Path, name: str) -> None:
    settings = {"architecture": "topk", "d_sae": 6}
    tracked = [TrackedSAE(sae, site, settings | {"k": int(l0)}) for sae, (site, l0, _) in SAES.items()]
    tracker = Tracker(home, name, f"id-of-{name}")
    tracker.open("name: small\n", {"protocol": "p" * 12}, tracked)
    for upto in (N_ROWS // 3, N_ROWS // 2, N_ROWS):  # each repeats what came before
        for sae in SAES:
            tracker.log_rows(sae, rows(upto))
    for sae, (_, l0, recovered) in SAES.items():
        tracker.finish_sae(sae, status="finished", metrics=figures(l0, recovered), folder=checkpoint)
    front = sweep_table(home, name)
    tracker.finish_sweep(status="finished", front=front, baselines=pd.DataFrame(), cost={"seconds": 1.0}, files=[])
    hand_over(home, name)


if __name__ == "__main__":
    main(Home(Path(sys.argv[1])), Path(sys.argv[2]), sys.argv[3])
