"""Comparing two fronts of SAEs that were trained with several seeds: interpolation, intervals, verdicts, tables.

    ours, theirs = (per_seed(points, "ce_recovered", l0=16) for points in (our_points, their_points))
    verdict(mean_interval(ours), mean_interval(theirs), difference_interval(ours, theirs))

A *point* is a mapping with `seed`, `l0` and figures. Where a side is not at a given L0, that is a verdict too.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

REACH, GAP = 1.1, 4.0  # how far beyond a front, and between what neighbours, a figure is still read off it

Interval = tuple[float, float]  # mean, half-width; the half-width is 0 for a single seed


# ---- reading a front ------------------------------------------------------------------------------------------------


def per_seed(points: Sequence[Mapping[str, Any]], name: str, l0: float) -> list[float]:
    """The figure that each seed's front has at `l0`, in the order of seeds; empty where one does not reach so far."""
    by_seed: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        by_seed.setdefault(point["seed"], []).append((point["l0"], point[name]))
    values = [interpolate(by_seed[seed], l0) for seed in sorted(by_seed)]
    return [value for value in values if value is not None] if None not in values else []


def interpolate(points: Sequence[tuple[float, float]], l0: float) -> float | None:
    """The figure at `l0` on a front of (L0, figure); None where it is not reached.

    Monotone cubic in log L0 between points (no overshoot, whatever the spacing), the last line beyond them.
    """
    from scipy.interpolate import PchipInterpolator

    points = sorted({round(math.log(x), 9): y for x, y in points if x > 0}.items())
    if len(points) < 2:
        return None
    x, y = np.array(points).T
    at = math.log(l0)
    if not x[0] - math.log(REACH) <= at <= x[-1] + math.log(REACH):
        return None
    inside = min(max(at, x[0]), x[-1])
    right = min(max(int(np.searchsorted(x, inside)), 1), len(x) - 1)
    if x[right] - x[right - 1] > math.log(GAP):
        return None
    slope = (y[1] - y[0]) / (x[1] - x[0]) if at < x[0] else (y[-1] - y[-2]) / (x[-1] - x[-2])
    return float(PchipInterpolator(x, y)(inside) + slope * (at - inside))


# ---- intervals and verdicts -----------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float]) -> Interval | None:
    """(mean, half-width of its 95% t-interval)."""
    if not values:
        return None
    if len(values) == 1:
        return values[0], 0.0
    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), _t(len(values) - 1) * error


def difference_interval(a: Sequence[float], b: Sequence[float]) -> Interval | None:
    """(mean(a) - mean(b), half-width of its 95% interval by Welch, who lets the variances differ)."""
    if not a or not b:
        return None
    mean = statistics.mean(a) - statistics.mean(b)
    if min(len(a), len(b)) < 2:
        return mean, 0.0
    squares = [statistics.variance(values) / len(values) for values in (a, b)]
    if not sum(squares):
        return mean, 0.0
    freedom = sum(squares) ** 2 / sum(square**2 / (len(v) - 1) for square, v in zip(squares, (a, b), strict=True))
    return mean, _t(freedom) * math.sqrt(sum(squares))


def _t(freedom: float) -> float:
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def verdict(ours: Interval | None, theirs: Interval | None, difference: Interval | None) -> str:
    """Of a figure where more is better. Capitals: where ours is behind."""
    if difference is None:
        return "only ours" if ours else "ONLY THEIRS" if theirs else "neither"
    mean, half = difference
    if abs(mean) <= half:
        return "within noise"
    return "above" if mean > 0 else "BELOW"


def holds(verdict: str) -> bool:
    """Whether ours is at least level with theirs."""
    return verdict in ("above", "within noise", "only ours", "neither")


# ---- tables ---------------------------------------------------------------------------------------------------------


def shown(value: Interval | None, sign: str = "") -> str:
    """`mean ± half-width`, or a dash."""
    return "-" if value is None else f"{value[0]:{sign}.4f} ± {value[1]:.4f}"


def print_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print aligned columns under a title."""
    lines = [list(header), *map(list, cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    print("\n".join(["", title, "", text[0], "-" * len(text[0]), *text[1:]]))
