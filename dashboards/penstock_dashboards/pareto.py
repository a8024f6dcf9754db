"""The Pareto plot of a sweep as a PNG, for READMEs and MLflow; `report` is the page to look into.

L0 (log) against CE recovered, a panel a hook point, a colour and a marker an architecture; a filled marker is on the
front of its hook point, bars are 95% intervals. Beside the SAEs stand the baselines that an SAE has to beat.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.pareto import Band, pareto_front
from penstock_dashboards.marks import (
    BASELINES,
    X_LABEL,
    Y_LABEL,
    Style,
    at_hook,
    band_text,
    baseline_points,
    by_architecture,
    by_kind,
    drawn_hook_points,
    drawn_points,
    lead,
    ranges,
    style_of,
    ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _SOFT, _GREY, _GRID, _BAND = "#1f2430", "#667085", "#8a919e", "#e4e7ec", "#eef3fb"
_COLUMNS = 3  # panels in a row, at most


def write_png(
    table: pd.DataFrame, baselines: pd.DataFrame, path: str | Path, *, title: str, l0_band: Band | None = None
) -> Path:
    """Draw the front of a sweep's table (with `on_front`) and its baselines as a PNG, and return its path.

    Raises `SweepError` when no SAE has been evaluated.
    """
    from matplotlib.figure import Figure

    points = drawn_points(table)
    baselines = baseline_points(baselines)
    hook_points, rows, columns = _layout(table, points)
    width = max(5.0 * columns, 6.6)
    figure = Figure(figsize=(width, 4.2 * rows + 1.25), dpi=160, facecolor="white")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    x_range, y_range = ranges(points, baselines)
    for axes, hook_point in zip(grid.flat, hook_points, strict=False):
        _draw_panel(axes, at_hook(points, hook_point), at_hook(baselines, hook_point), l0_band, x_range)
        axes.set_title(hook_point, loc="left", fontsize=10.5, color=_INK, pad=8)
        axes.set(xlim=x_range, ylim=y_range)
    for axes in list(grid.flat)[len(hook_points) :]:
        axes.set_visible(False)
    for position, axes in enumerate(grid.flat):
        if position < len(hook_points):
            axes.tick_params(labelbottom=position + columns >= len(hook_points))
            if position + columns >= len(hook_points):
                axes.set_xlabel(X_LABEL, fontsize=9.5, color=_SOFT)
            if position % columns == 0:
                axes.set_ylabel(Y_LABEL, fontsize=9.5, color=_SOFT)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.72 / width, right=1 - 0.25 / width, bottom=1.12 / height, top=1 - 0.95 / height, wspace=0.06, hspace=0.2
    )
    figure.text(0.72 / width, 1 - 0.28 / height, title, fontsize=14, weight="bold", color=_INK, va="center")
    figure.text(0.72 / width, 1 - 0.53 / height, lead(points), fontsize=9.5, color=_SOFT, va="center")
    _draw_legend(figure, points, baselines, l0_band)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": title})
    return path


# ---- the PNG --------------------------------------------------------------------------------------------------------


def _layout(table: pd.DataFrame, points: pd.DataFrame) -> tuple[list[str], int, int]:
    """The hook points to draw, and the rows and columns of panels that they take."""
    hook_points = drawn_hook_points(table, points)
    rows = math.ceil(len(hook_points) / _COLUMNS)
    return hook_points, rows, math.ceil(len(hook_points) / rows)


def _draw_panel(
    axes: "Axes", points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None, x_range: tuple[float, float]
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks(x_range)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=8.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c9ced6")
    if l0_band is not None:
        low, high = max(l0_band[0], x_range[0]), min(l0_band[1], x_range[1])
        if low < high:
            axes.axvspan(low, high, color=_BAND, zorder=0, linewidth=0)
    for kind, group in by_kind(baselines):
        axes.plot(group["x"], group["ce_recovered"], color=_GREY, linestyle=BASELINES[kind][1], linewidth=1.4,
                  marker=".", markersize=5, zorder=2)  # fmt: skip
    front = points[pareto_front(points.assign(l0=points["l0"].where(points["on_front"])))]
    axes.plot(front["x"], front["ce_recovered"], color=_INK, linewidth=1.5, alpha=0.75, zorder=3)
    for architecture, group in by_architecture(points):
        style = style_of(architecture)
        for on_front, zorder in ((False, 4), (True, 5)):
            part = group[group["on_front"] == on_front]
            axes.scatter(part["x"], part["ce_recovered"], marker=style.marker, s=62 if on_front else 46,
                         facecolor=style.colour if on_front else "white", edgecolor=_INK if on_front else style.colour,
                         linewidth=0.9 if on_front else 1.5, zorder=zorder)  # fmt: skip
        _draw_intervals(axes, group, style)


def _draw_intervals(axes: "Axes", points: pd.DataFrame, style: Style) -> None:
    """Bars from low to high, up and across, where the table has them."""
    for name, along in (("ce_recovered", "y"), ("l0", "x")):
        ends = [f"{name}_low", f"{name}_high"]
        if set(ends) <= set(points):
            there = points.dropna(subset=ends)
            x, y = there["x"], there["ce_recovered"].astype(float)
            at = x if along == "x" else y
            # A percentile interval need not hold the figure itself; a bar has no negative length.
            sides = [(at - there[ends[0]]).clip(lower=0), (there[ends[1]] - at).clip(lower=0)]
            bars = {f"{along}err": sides}
            axes.errorbar(x, y, fmt="none", ecolor=style.colour, elinewidth=1.1, zorder=3.5, **bars)


def _draw_legend(figure: Any, points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(style: Style, face: str, edge: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=style.marker, markersize=7.5, markerfacecolor=face,
                      markeredgecolor=edge, label=label)  # fmt: skip

    saes = [
        dot(style_of(name), style_of(name).colour, style_of(name).colour, name) for name, _ in by_architecture(points)
    ]
    saes.append(Line2D([], [], color=_INK, linewidth=1.5, marker="o", markersize=7, markerfacecolor=_GREY,
                       markeredgecolor=_INK, label="on the front"))  # fmt: skip
    if not points["on_front"].all():
        saes.append(dot(Style(_GREY, _GREY, "o", "circle"), "white", _GREY, "not on it"))
    others: list[Any] = [
        Line2D([], [], color=_GREY, linestyle=BASELINES[kind][1], linewidth=1.4, label=BASELINES[kind][0])
        for kind, _ in by_kind(baselines)
    ]
    if l0_band is not None:
        others.append(Patch(color=_BAND, label=band_text(l0_band)))
    for handles, inches in ((saes, 0.32), (others, 0.06)):
        figure.legend(handles=handles, loc="lower center", ncols=max(len(handles), 1), frameon=False, fontsize=9,
                      labelcolor=_INK, handlelength=2.4, columnspacing=1.6, borderpad=0.2,
                      bbox_to_anchor=(0.5, inches / figure.get_figheight()))  # fmt: skip
