"""What the report shows of one SAE: its curves over the tokens of its training, and how often its latents fire.

It is the parent run's artifact `details.json`:

    {sae_key: {"curves": {"tokens": [...], "loss": [...], "l0": [...], "explained_variance": [...],
                          "dead_fraction": [...]},
               "firing_rates": {"edges": [...], "counts": [...], "never": N}}}

`edges` are log10 of firing rates, one more than there are `counts` (latents between two edges); `never` is how many
latents did not fire at all. A prefix (`ID[WIDTH]`) has the firing rates of its latents and no curves of its own. What
is not there, or not finite, is null or left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from penstock.pareto import sae_key

CURVES = ("loss", "l0", "explained_variance", "dead_fraction")
POINTS = 200  # a curve keeps so many
BIN = 0.25  # a bin's width, in decades
NEVER = -9.5  # checkpoints hold log10(rate + 1e-10): what lies below never fired


def details(
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    sparsities: Mapping[str, np.ndarray] | None = None,
    prefixes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The content of `details.json`, ready for JSON.

    histories: by SAE id, its curves' rows `{"tokens": int, "metrics": {name: float}}`, as its summary keeps them.
    sparsities: by SAE id, log10 firing rates [d_sae], as `sparsity.safetensors` keeps them; SAEs may be missing.
    prefixes: by SAE id, the widths of its prefixes.
    """
    found: dict[str, Any] = {}
    for sae_id, history in histories.items():
        found[sae_id] = {"curves": curves(history)} if history else {}
    for sae_id, sparsity in (sparsities or {}).items():
        found.setdefault(sae_id, {})["firing_rates"] = firing_rates(sparsity)
        for width in (prefixes or {}).get(sae_id, ()):
            found[sae_key(sae_id, width)] = {"firing_rates": firing_rates(sparsity[:width])}
    return found


def curves(history: Sequence[Mapping[str, Any]], points: int = POINTS) -> dict[str, list[float | None]]:
    """At most `points` of a history's rows, the first and the last among them, evenly spread; null for what a row has
    no finite value of."""
    rows = sorted(history, key=lambda row: row["tokens"])
    kept = [rows[i] for i in spread(len(rows), points)]
    names = [name for name in CURVES if any(name in row["metrics"] for row in kept)]
    values = {name: [rounded(row["metrics"].get(name)) for row in kept] for name in names}
    return {"tokens": [int(row["tokens"]) for row in kept], **values}


def firing_rates(sparsity: np.ndarray) -> dict[str, Any]:
    """A histogram of log10 firing rates [d_sae]."""
    rates = np.asarray(sparsity, dtype=float)
    fired = rates[np.isfinite(rates) & (rates > NEVER)].clip(max=0.0)
    never = int(len(rates) - len(fired))
    if not len(fired):
        return {"edges": [], "counts": [], "never": never}
    low = math.floor(fired.min() / BIN)
    edges = [BIN * step for step in range(low, 1)] if low < 0 else [-BIN, 0.0]
    counts, _ = np.histogram(fired, bins=edges)
    return {"edges": edges, "counts": counts.tolist(), "never": never}


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 ... count - 1, the first and the last among them, evenly spread."""
    if count <= most:
        return list(range(count))
    return sorted({round(step * (count - 1) / (most - 1)) for step in range(most)})


def rounded(value: Any, digits: int = 4) -> float | None:
    """A number with so many significant digits; None for what is not finite."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
