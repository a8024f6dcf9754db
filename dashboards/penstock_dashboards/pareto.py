"""The Pareto plot of a sweep, as a PNG and as one self-contained HTML file, and the report around it.

L0 (log) against CE recovered, a panel a hook point, a colour and a marker an architecture (the Okabe-Ito palette, which
colour-blind readers tell apart); a filled marker is on the front of its hook point. Beside the SAEs stand the baselines
that an SAE has to beat.
"""

import contextlib
import html
import importlib.resources
import math
import os
import string
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.errors import SweepError
from penstock.home import Home
from penstock.pareto import Band, by_hook_point

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str  # matplotlib's name
    symbol: str  # plotly's name


_STYLES = {
    "standard": _Style("#0072B2", "o", "circle"),
    "gated": _Style("#D55E00", "s", "square"),
    "topk": _Style("#009E73", "^", "triangle-up"),
    "batch_topk": _Style("#CC79A7", "D", "diamond"),
    "jumprelu": _Style("#E69F00", "P", "cross"),
    "matryoshka": _Style("#56B4E9", "v", "triangle-down"),
}
_OTHERS = (_Style("#332288", "X", "x"), _Style("#882255", "p", "pentagon"), _Style("#117733", "h", "hexagon"))
_BASELINES = {  # label, matplotlib's line style, plotly's
    "neurons": ("top-k neurons", (0, (5, 2)), "dash"),
    "pca": ("top-k PCA", (0, (1.2, 1.6)), "dot"),
    "frozen_decoder": ("frozen random decoder", (0, (6, 2, 1.2, 2)), "dashdot"),
}
_INK, _SOFT, _GREY, _GRID, _BAND = "#1f2430", "#667085", "#8a919e", "#e4e7ec", "#eef3fb"
_X_LABEL, _Y_LABEL = "L0 (active latents a token)", "CE recovered"
_COLUMNS = 3  # panels in a row, at most
_DENSE_TICKS = 3000.0  # the widest range of L0 (high over low) that has ticks at 1, 2 and 5
_IDENTITY = {"sae_id", "hook_point", "architecture", "status", "run_id", "on_front", "on_overall_front", "baseline"}
_FIGURES = {
    "l0": ("L0", 2),
    "ce_recovered": ("CE recovered", 4),
    "kl_recovered": ("KL recovered", 4),
    "explained_variance": ("explained variance", 4),
    "dead_fraction": ("dead fraction", 3),
}


def write_png(
    table: pd.DataFrame, baselines: pd.DataFrame, path: str | Path, *, title: str, l0_band: Band | None = None
) -> Path:
    """Draw the front of a sweep's table (with `on_front`) and its baselines as a PNG, and return its path.

    Raises `SweepError` when no SAE has been evaluated.
    """
    from matplotlib.figure import Figure

    points = _points(table)
    baselines = _baseline_points(baselines)
    hook_points, rows, columns = _layout(table, points)
    width = max(5.0 * columns, 6.6)
    figure = Figure(figsize=(width, 4.2 * rows + 1.25), dpi=160, facecolor="white")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    x_range, y_range = _ranges(points, baselines)
    for axes, hook_point in zip(grid.flat, hook_points, strict=False):
        _draw_panel(axes, _at(points, hook_point), _at(baselines, hook_point), l0_band, x_range)
        axes.set_title(hook_point, loc="left", fontsize=10.5, color=_INK, pad=8)
        axes.set(xlim=x_range, ylim=y_range)
    for axes in list(grid.flat)[len(hook_points) :]:
        axes.set_visible(False)
    for position, axes in enumerate(grid.flat):
        if position < len(hook_points):
            axes.tick_params(labelbottom=position + columns >= len(hook_points))
            if position + columns >= len(hook_points):
                axes.set_xlabel(_X_LABEL, fontsize=9.5, color=_SOFT)
            if position % columns == 0:
                axes.set_ylabel(_Y_LABEL, fontsize=9.5, color=_SOFT)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.72 / width, right=1 - 0.25 / width, bottom=1.12 / height, top=1 - 0.95 / height, wspace=0.06, hspace=0.2
    )
    figure.text(0.72 / width, 1 - 0.28 / height, title, fontsize=14, weight="bold", color=_INK, va="center")
    figure.text(0.72 / width, 1 - 0.53 / height, _lead(points), fontsize=9.5, color=_SOFT, va="center")
    _draw_legend(figure, points, baselines, l0_band)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Title": title})
    return path


def write_html(
    table: pd.DataFrame, baselines: pd.DataFrame, path: str | Path, *, title: str, l0_band: Band | None = None
) -> Path:
    """The same plot to hover over, and the SAEs as a table to sort, in one HTML file that needs nothing else."""
    return _write_page(table, baselines, path, title=title, l0_band=l0_band)


def report(home: Home, sweep: str, to: str | Path) -> Path:
    """A sweep's report as one HTML file: summary, plot, table, baselines, cost and spec. Raises `SweepError`."""
    from penstock.tracking import baseline_table, find_sweep, sweep_table

    runs = find_sweep(home, sweep)
    baselines = baseline_table(home, runs)
    cost = [(name, f"{value:,.6g}") for name, value in sorted(runs.cost.items())]
    facts = {
        "status": runs.status,
        "started": f"{runs.started.tz_convert(None):%Y-%m-%d %H:%M} UTC",
        "sweep id": runs.sweep_id,
    }
    if "sae_tokens_per_second" in runs.cost:
        facts["SAE-tokens a second"] = f"{runs.cost['sae_tokens_per_second']:,.0f}"
    if "seconds_total" in runs.cost:
        facts["seconds"] = f"{runs.cost['seconds_total']:,.0f}"
    sections = [_section("Cost", _plain_table(["figure", "value"], cost))] if cost else []
    sections.append(f"<h2>Spec</h2>\n<pre>{html.escape(runs.spec)}</pre>")
    return _write_page(
        sweep_table(home, runs), baselines, to, title=runs.name, l0_band=runs.l0_band, facts=facts, sections=sections
    )


# ---- the PNG --------------------------------------------------------------------------------------------------------


def _draw_panel(
    axes: "Axes", points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None, x_range: tuple[float, float]
) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(_ticks(x_range)))
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
    for kind, group in _by_kind(baselines):
        axes.plot(group["x"], group["ce_recovered"], color=_GREY, linestyle=_BASELINES[kind][1], linewidth=1.4,
                  marker=".", markersize=5, zorder=2)  # fmt: skip
    front = points[points["on_front"]]
    axes.plot(front["x"], front["ce_recovered"], color=_INK, linewidth=1.5, alpha=0.75, zorder=3)
    for architecture, group in _by_architecture(points):
        style = _style(architecture)
        for on_front, zorder in ((False, 4), (True, 5)):
            part = group[group["on_front"] == on_front]
            axes.scatter(part["x"], part["ce_recovered"], marker=style.marker, s=62 if on_front else 46,
                         facecolor=style.colour if on_front else "white", edgecolor=_INK if on_front else style.colour,
                         linewidth=0.9 if on_front else 1.5, zorder=zorder)  # fmt: skip


def _draw_legend(figure: Any, points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    def dot(style: _Style, face: str, edge: str, label: str) -> Line2D:
        return Line2D([], [], linestyle="", marker=style.marker, markersize=7.5, markerfacecolor=face,
                      markeredgecolor=edge, label=label)  # fmt: skip

    saes = [dot(_style(name), _style(name).colour, _style(name).colour, name) for name, _ in _by_architecture(points)]
    saes.append(Line2D([], [], color=_INK, linewidth=1.5, marker="o", markersize=7, markerfacecolor=_GREY,
                       markeredgecolor=_INK, label="on the front"))  # fmt: skip
    if not points["on_front"].all():
        saes.append(dot(_Style(_GREY, "o", "circle"), "white", _GREY, "not on it"))
    others: list[Any] = [
        Line2D([], [], color=_GREY, linestyle=_BASELINES[kind][1], linewidth=1.4, label=_BASELINES[kind][0])
        for kind, _ in _by_kind(baselines)
    ]
    if l0_band is not None:
        others.append(Patch(color=_BAND, label=_band_text(l0_band)))
    for handles, inches in ((saes, 0.32), (others, 0.06)):
        figure.legend(handles=handles, loc="lower center", ncols=max(len(handles), 1), frameon=False, fontsize=9,
                      labelcolor=_INK, handlelength=2.4, columnspacing=1.6, borderpad=0.2,
                      bbox_to_anchor=(0.5, inches / figure.get_figheight()))  # fmt: skip


# ---- the HTML -------------------------------------------------------------------------------------------------------


def _write_page(
    table: pd.DataFrame,
    baselines: pd.DataFrame,
    path: str | Path,
    *,
    title: str,
    l0_band: Band | None,
    facts: Mapping[str, str] | None = None,
    sections: Sequence[str] = (),
) -> Path:
    points = _points(table)
    compared = _baseline_points(baselines)
    chart = _chart(points, compared, l0_band, _layout(table, points))
    figure = chart.to_html(include_plotlyjs=True, full_html=False, config={"displaylogo": False, "responsive": True})
    tiles = "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
                    for name, value in (facts or {}).items())  # fmt: skip
    below = [_section("Baselines", _baselines_html(compared))] if not compared.empty else []
    template = importlib.resources.files(__package__).joinpath("templates/pareto.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(
        title=html.escape(title),
        lead=html.escape(_lead(points)),
        tiles=f'<div class="tiles">{tiles}</div>' if tiles else "",
        chart=figure,
        table=_table_html(table),
        sections="\n".join([*below, *sections]),
    )
    return _write_whole(Path(path), page)


def _write_whole(path: Path, page: str) -> Path:
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SweepError(f"{str(path)!r} cannot be written: {error}") from None
    return path


def _chart(
    points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None, layout: tuple[list[str], int, int]
) -> "go.Figure":
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    hook_points, rows, columns = layout
    figure = make_subplots(
        rows=rows, cols=columns, shared_yaxes=True, subplot_titles=[html.escape(name) for name in hook_points],
        horizontal_spacing=0.03, vertical_spacing=0.12,
    )  # fmt: skip
    x_range, y_range = _ranges(points, baselines)
    for position, hook_point in enumerate(hook_points):
        place = {"row": position // columns + 1, "col": position % columns + 1}
        for trace in _traces(_at(points, hook_point), _at(baselines, hook_point), first=position == 0):
            figure.add_trace(trace, **place)
        if l0_band is not None:
            low, high = max(l0_band[0], x_range[0]), min(l0_band[1], x_range[1])
            figure.add_vrect(x0=low, x1=high, fillcolor=_BAND, line_width=0, layer="below", **place)
    first = set(_at(points, hook_points[0])["architecture"])
    for name in sorted(set(points["architecture"]) - first):  # the legend is made from the first panel's traces
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, legendgroup=name,
                                    marker=_plotly_marker(_style(name), [True])), row=1, col=1)  # fmt: skip
    ticks = _ticks(x_range)
    figure.update_xaxes(type="log", range=[math.log10(edge) for edge in x_range], tickvals=ticks,
                        ticktext=[f"{tick:g}" for tick in ticks], gridcolor=_GRID, title_text=_X_LABEL)  # fmt: skip
    figure.update_yaxes(range=list(y_range), gridcolor=_GRID, zeroline=False)
    figure.update_yaxes(title_text=_Y_LABEL, col=1)
    figure.update_layout(
        template="plotly_white", height=430 * rows + 110, margin={"l": 60, "r": 20, "t": 40, "b": 60},
        legend={"orientation": "h", "y": -0.16 / rows, "x": 0.5, "xanchor": "center", "yanchor": "top"},
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"size": 12, "color": _INK}},
        font={"color": _INK, "family": "system-ui, sans-serif"},
    )  # fmt: skip
    return figure


def _traces(points: pd.DataFrame, baselines: pd.DataFrame, first: bool) -> Iterator["go.Scatter"]:
    import plotly.graph_objects as go

    for kind, group in _by_kind(baselines):
        label, _, dash = _BASELINES[kind]
        yield go.Scatter(
            x=group["x"], y=group["ce_recovered"], mode="lines+markers", name=label, legendgroup=label,
            showlegend=first, line={"color": _GREY, "dash": dash, "width": 1.6}, marker={"size": 5},
            hovertemplate=f"<b>{label}</b><br>L0 %{{x:.3g}}<br>CE recovered %{{y:.4f}}<extra></extra>",
        )  # fmt: skip
    front = points[points["on_front"]]
    yield go.Scatter(
        x=front["x"], y=front["ce_recovered"], mode="lines", name="front", legendgroup="front", showlegend=first,
        line={"color": _INK, "width": 1.6}, hoverinfo="skip",
    )  # fmt: skip
    for architecture, group in _by_architecture(points):
        yield go.Scatter(
            x=group["x"], y=group["ce_recovered"], mode="markers", name=architecture, legendgroup=architecture,
            showlegend=first, marker=_plotly_marker(_style(architecture), list(group["on_front"])),
            text=[_hover(record) for record in group.to_dict("records")], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip


def _plotly_marker(style: _Style, on_front: Sequence[bool]) -> dict[str, Any]:
    return {
        "symbol": style.symbol,
        "size": [11 if flag else 9 for flag in on_front],
        "color": [style.colour if flag else "white" for flag in on_front],
        "line": {"width": [1 if flag else 1.8 for flag in on_front],
                 "color": [_INK if flag else style.colour for flag in on_front]},
    }  # fmt: skip


def _hover(record: Mapping[str, Any]) -> str:
    """All that is known of an SAE: what it is, its figures, then its settings."""
    lines = [f"<b>{html.escape(str(record['architecture']))}</b>  {html.escape(str(record['sae_id']))}"]
    lines += [f"{label} {record[name]:.{decimals}f}" for name, (label, decimals) in _FIGURES.items()
              if _known(record.get(name))]  # fmt: skip
    lines += [f"{html.escape(name)} {html.escape(_text(value))}" for name, value in record.items()
              if name not in _IDENTITY and name not in _FIGURES and name != "x" and _known(value)]  # fmt: skip
    where = "on the front" if record["on_front"] else "not on the front"
    lines.append(f"{where}, {record['status']}" if "status" in record else where)
    return "<br>".join(lines)


def _table_html(table: pd.DataFrame) -> str:
    """The SAEs by hook point and L0: identity, settings that differ between them, figures, status."""
    figures = [name for name in _FIGURES if name in table]
    rest = [name for name in table if name not in _IDENTITY and name not in _FIGURES]
    differing = [name for name in rest if table[name].nunique(dropna=False) > 1]
    measured = [name for name in differing if list(table).index(name) > list(table).index("l0")]
    settings = [name for name in differing if name not in measured]
    status = ["status"] if "status" in table else []
    columns = ["hook_point", "architecture", *settings, *figures, *measured, *status, "sae_id"]
    labels = {name: label for name, (label, _) in _FIGURES.items()}
    flags = {name for name in columns if pd.api.types.is_bool_dtype(table[name])}
    numeric = {name for name in columns if pd.api.types.is_numeric_dtype(table[name])} - flags
    head = "".join(f'<th{" class=number" if name in numeric else ""}>{html.escape(labels.get(name, name))}</th>'
                   for name in columns)  # fmt: skip
    ordered = by_hook_point(table).to_dict("records")
    body = "\n".join(_row_html(record, columns, numeric) for record in ordered)
    return f'<table class="sortable" id="saes"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _row_html(record: Mapping[str, Any], columns: Sequence[str], numeric: set[str]) -> str:
    cells = []
    for name in columns:
        value = record[name]
        key = html.escape(str(value)) if _known(value) else ""
        shown = _text(value, _FIGURES[name][1] if name in _FIGURES else None) if _known(value) else ""
        kind = ' class="number"' if name in numeric else ' class="name"' if name in ("sae_id", "hook_point") else ""
        cells.append(f'<td{kind} data-value="{key}">{html.escape(shown)}</td>')
    return f"<tr{' class=front' if record['on_front'] else ''}>{''.join(cells)}</tr>"


def _baselines_html(baselines: pd.DataFrame) -> str:
    figures = [name for name in _FIGURES if name in baselines and baselines[name].notna().any()]
    rows = [
        [_BASELINES[record["kind"]][0], str(record["hook_point"]), _text(record.get("k")),
         *[_text(record[name], _FIGURES[name][1]) for name in figures]]
        for record in baselines.to_dict("records")
    ]  # fmt: skip
    return _plain_table(["baseline", "hook point", "k", *[_FIGURES[name][0] for name in figures]], rows)


def _plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _section(title: str, table: str) -> str:
    return f'<h2>{html.escape(title)}</h2>\n<div class="scroll">{table}</div>'


# ---- what both draw -------------------------------------------------------------------------------------------------


def _layout(table: pd.DataFrame, points: pd.DataFrame) -> tuple[list[str], int, int]:
    """The hook points that have points, in the table's order, and the rows and columns of panels they take."""
    drawn = set(points["hook_point"])
    hook_points = [name for name in dict.fromkeys(table["hook_point"]) if name in drawn]
    rows = math.ceil(len(hook_points) / _COLUMNS)
    return hook_points, rows, math.ceil(len(hook_points) / rows)


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """The SAEs that have figures, by L0; `x` is where they stand on the log axis."""
    points = table[table["l0"].notna() & table["ce_recovered"].notna()] if "l0" in table else table.iloc[:0]
    if points.empty:
        raise SweepError("there is nothing to draw: no SAE of this sweep has been evaluated")
    points = points.assign(x=points["l0"].astype(float).clip(lower=0.1), on_front=points["on_front"].astype(bool))
    return points.sort_values(["x", "ce_recovered"], kind="stable")


def _baseline_points(baselines: pd.DataFrame) -> pd.DataFrame:
    if baselines.empty:
        return pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered", "x"])
    known = baselines[baselines["kind"].isin(list(_BASELINES)) & baselines["ce_recovered"].notna()]
    known = known.assign(x=known["l0"].astype(float).clip(lower=0.1))
    return known.sort_values(["hook_point", "kind", "x"], kind="stable")


def _lead(points: pd.DataFrame) -> str:
    count, on_front = len(points), int(points["on_front"].sum())
    return f"{count} SAEs, {on_front} on the front of their hook point; up and to the left is better"


def _band_text(l0_band: Band) -> str:
    low, high = l0_band
    if math.isinf(high):
        return f"L0 of {low:g} or more"
    return f"L0 {low:g} to {high:g}" if low > 0 else f"L0 up to {high:g}"


def _at(rows: pd.DataFrame, hook_point: str) -> pd.DataFrame:
    return rows[rows["hook_point"] == hook_point]


def _by_architecture(points: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    ordered = [*_STYLES, *sorted(set(points["architecture"]) - set(_STYLES))]
    for name in ordered:
        if (points["architecture"] == name).any():
            yield name, points[points["architecture"] == name]


def _by_kind(baselines: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    for kind in _BASELINES:
        if (baselines["kind"] == kind).any():
            yield kind, baselines[baselines["kind"] == kind]


def _style(architecture: str) -> _Style:
    return _STYLES.get(architecture) or _OTHERS[sum(architecture.encode()) % len(_OTHERS)]


def _ranges(points: pd.DataFrame, baselines: pd.DataFrame) -> tuple[tuple[float, float], tuple[float, float]]:
    """The axes' limits: all L0s; CE recovered from the lowest (0 at the lowest, worse lies below the plot) to 1."""
    x = [*points["x"], *baselines["x"]]
    y = [*points["ce_recovered"].astype(float), *baselines["ce_recovered"].astype(float)]
    low, high = max(min(y), 0.0), max(max(y), 1.0)
    margin = 0.05 * max(high - low, 0.02)
    return (min(x) / 1.25, max(x) * 1.25), (low - margin, high + margin)


def _ticks(x_range: tuple[float, float]) -> list[float]:
    low, high = x_range
    steps = (1, 2, 5) if high / low <= _DENSE_TICKS else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for exponent in exponents for step in steps if low <= (tick := step * 10.0**exponent) <= high]


def _known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and math.isnan(value)) and value is not pd.NA


def _text(value: Any, decimals: int | None = None) -> str:
    if not _known(value):
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}" if decimals is not None else f"{value:.6g}"
    return str(value)
