"""What the plot and the page share: how an architecture and a baseline look, which rows are drawn, and where.

Every architecture has a colour and a marker of its own. The colours stand out from the page's light and dark grounds
(contrast of 3 or more, WCAG 1.4.11) and from each other in every kind of colour vision (CIELAB distance of 18 or more,
protanopia, deuteranopia and tritanopia simulated after Machado et al., 2009; to be seen apart takes about 2).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from penstock.errors import SweepError
from penstock.pareto import Band


@dataclass(frozen=True)
class Style:
    """A colour on a light and on a dark ground, and one marker: by matplotlib's name and by the page's."""

    colour: str
    dark: str
    marker: str
    shape: str


STYLES = {
    "standard": Style("#3A4290", "#5B91F5", "o", "circle"),
    "gated": Style("#AA0F0B", "#E56B3C", "s", "square"),
    "topk": Style("#138440", "#17D592", "^", "triangle"),
    "batch_topk": Style("#BA417E", "#BE76A8", "D", "diamond"),
    "jumprelu": Style("#B38000", "#F3D02A", "P", "plus"),
    "matryoshka": Style("#0086E2", "#C5E4FF", "v", "triangle-down"),
}
OTHERS = (
    Style("#882E72", "#C98BD0", "X", "cross"),
    Style("#6F7A12", "#BDC653", "p", "pentagon"),
    Style("#7A5230", "#C9A27E", "h", "hexagon"),
)
BASELINES = {  # label, matplotlib's line style, the page's dashes
    "neurons": ("top-k neurons", (0, (5, 2)), "5 3"),
    "pca": ("top-k PCA", (0, (1.2, 1.6)), "1.5 3"),
    "frozen_decoder": ("frozen random decoder", (0, (6, 2, 1.2, 2)), "7 3 1.5 3"),
    "target_neurons": ("top-k neurons of the target", (0, (9, 3)), "10 4"),
    "target_pca": ("top-k PCA of the target", (0, (9, 3, 1.2, 3)), "10 3 1.5 3"),
}
REFERENCES = ("target_neurons", "target_pca")  # they see what a transcoder has to predict: nothing it has to beat
X_LABEL, Y_LABEL = "L0 (active latents a token)", "CE recovered"
_DENSE_TICKS = 3000.0  # the widest range of L0 (high over low) that has ticks at 1, 2 and 5


def drawn_points(table: pd.DataFrame) -> pd.DataFrame:
    """The SAEs that have figures, by L0; `x` is where they stand on the log axis. Raises `SweepError` for none."""
    points = table[table["l0"].notna() & table["ce_recovered"].notna()] if "l0" in table else table.iloc[:0]
    if points.empty:
        raise SweepError("there is nothing to draw: no SAE of this sweep has been evaluated")
    points = points.assign(x=points["l0"].astype(float).clip(lower=0.1), on_front=points["on_front"].astype(bool))
    return points.sort_values(["x", "ce_recovered"], kind="stable")


def baseline_points(baselines: pd.DataFrame) -> pd.DataFrame:
    """The baselines that have figures, along each kind's axis of k."""
    if baselines.empty:
        return pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered", "x"])
    kept = baselines[baselines["kind"].isin(list(BASELINES)) & baselines["ce_recovered"].notna()]
    kept = kept.assign(x=kept["l0"].astype(float).clip(lower=0.1))
    return kept.sort_values(["hook_point", "kind", "x"], kind="stable")


def lead(points: pd.DataFrame) -> str:
    prefixes = int(points["prefix"].notna().sum()) if "prefix" in points else 0
    count, on_front = len(points) - prefixes, int(points["on_front"].sum())
    saes = "1 SAE" if count == 1 else f"{count} SAEs"
    if prefixes:
        saes += f" and {prefixes} prefix{'' if prefixes == 1 else 'es'}"
    return f"{saes}, {on_front} on the front of their hook point; up and to the left is better"


def band_text(l0_band: Band) -> str:
    low, high = l0_band
    if math.isinf(high):
        return f"L0 of {low:g} or more"
    return f"L0 {low:g} to {high:g}" if low > 0 else f"L0 up to {high:g}"


def drawn_hook_points(table: pd.DataFrame, points: pd.DataFrame) -> list[str]:
    """The hook points that have points, in the table's order."""
    drawn = set(points["hook_point"])
    return [name for name in dict.fromkeys(table["hook_point"]) if name in drawn]


def at_hook(rows: pd.DataFrame, hook_point: str) -> pd.DataFrame:
    return rows[rows["hook_point"] == hook_point]


def by_architecture(points: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    ordered = [*STYLES, *sorted(set(points["architecture"]) - set(STYLES))]
    for name in ordered:
        if (points["architecture"] == name).any():
            yield name, points[points["architecture"] == name]


def by_kind(baselines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for kind in BASELINES:
        if (baselines["kind"] == kind).any():
            yield kind, baselines[baselines["kind"] == kind]


def style_of(architecture: str) -> Style:
    return STYLES.get(architecture) or OTHERS[sum(architecture.encode()) % len(OTHERS)]


def ranges(points: pd.DataFrame, baselines: pd.DataFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """The axes' limits: all L0s; CE recovered from the lowest (0 at the lowest, worse lies below the plot) to 1."""
    x = [*points["x"], *baselines["x"]]
    y = [*points["ce_recovered"].astype(float), *baselines["ce_recovered"].astype(float)]
    low, high = max(min(y), 0.0), max(max(y), 1.0)
    margin = 0.05 * max(high - low, 0.02)
    return (min(x) / 1.25, max(x) * 1.25), (low - margin, high + margin)


def ticks(x_range: tuple[float, float]) -> list[float]:
    low, high = x_range
    steps = (1, 2, 5) if high / low <= _DENSE_TICKS else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for exponent in exponents for step in steps if low <= (tick := step * 10.0**exponent) <= high]


def known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value is not pd.NA


def text_of(value: Any, decimals: int | None = None) -> str:
    if not known(value):
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}" if decimals is not None else f"{value:.6g}"
    return str(value)
