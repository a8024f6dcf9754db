"""One HTML page for a sweep: panels to hover over, a table to sort and filter, and all that the figures rest on.

The page needs nothing else: plotly, the style and the script are inside, and its content security policy lets it fetch
nothing. What the script shows on hover and in the drawer of a picked SAE lies in the page as data, made here.
"""

import contextlib
import html
import importlib.resources
import json
import math
import os
import shlex
import string
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from penstock.errors import SweepError
from penstock.pareto import Band, by_hook_point, key_of, kind_of
from penstock_dashboards.marks import (
    BASELINES,
    FIGURES,
    REFERENCES,
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
    known,
    lead,
    ranges,
    style_of,
    text_of,
    ticks,
)

_IDENTITY = {"sae_id", "hook_point", "architecture", "status", "run_id", "on_front", "on_overall_front", "baseline",
             "kind", "x"}  # fmt: skip
_LABELS = {"hook_point": "hook point", "sae_id": "SAE"} | {name: label for name, (label, _) in FIGURES.items()}
_PHASES = {"seconds_start": "start", "seconds_train": "train", "seconds_evaluate": "evaluate"}
_SHAPES = {  # plotly's symbols in a box of 16 by 16, for the legend and the table
    "circle": '<circle cx="8" cy="8" r="5"/>',
    "square": '<path d="M3.5 3.5h9v9h-9z"/>',
    "triangle-up": '<path d="M8 2.5 13.5 12.5h-11z"/>',
    "triangle-down": '<path d="M8 13.5 13.5 3.5h-11z"/>',
    "diamond": '<path d="M8 2 13.5 8 8 14 2.5 8z"/>',
    "cross": '<path d="M6 2.5h4V6h3.5v4H10v3.5H6V10H2.5V6H6z"/>',
    "x": '<path d="M4.8 2 8 5.2 11.2 2 14 4.8 10.8 8 14 11.2 11.2 14 8 10.8 4.8 14 2 11.2 5.2 8 2 4.8z"/>',
    "pentagon": '<path d="M8 2.3 13.7 6.4 11.5 13.2h-7L2.3 6.4z"/>',
    "hexagon": '<path d="M8 2 13.2 5v6L8 14 2.8 11V5z"/>',
}
_DASHES = {"dash": "5 2.5", "dot": "1.5 2", "dashdot": "6 2 1.5 2", "longdash": "9 3", "longdashdot": "9 3 1.5 3"}


@dataclass(frozen=True)
class Source:
    """What a page says around the tables. `sweep` and `options` are how its commands call the sweep and find it."""

    title: str
    sweep: str
    l0_band: Band | None = None
    spec: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    options: Sequence[str] = ()


def write_page(table: pd.DataFrame, baselines: pd.DataFrame, path: Path, source: Source) -> Path:
    """Write a sweep's table (with `on_front`) and its baselines as one page, whole or not at all, and return its path.

    Raises `SweepError` when no SAE has been evaluated or the file cannot be written.
    """
    from plotly.offline import get_plotlyjs

    table = by_hook_point(table)
    if "prefix" in table and table["prefix"].isna().all():
        table = table.drop(columns="prefix")
    points, compared = drawn_points(table), baseline_points(baselines)
    data = {
        "panels": _panels(table, points, compared, source.l0_band),
        "marks": _sae_marks(table, source) | _baseline_marks(compared),
    }
    sections = [
        _baselines_section(compared, table, points),
        _protocol_section(table, source.spec),
        _cost_section(source.cost),
    ]
    if source.spec:
        sections.append(
            f"<details open><summary><h2>Spec</h2></summary>\n<pre>{html.escape(source.spec)}</pre></details>"
        )
    template = string.Template(_file("pareto.html"))
    page = template.substitute(
        title=html.escape(source.title),
        lead=html.escape(lead(points)),
        tiles=_tiles(source.facts),
        filters=_filters(table, points),
        legend=_legend(points, compared, source.l0_band),
        table=_table_html(table),
        sections="\n".join(sections),
        style=_file("pareto.css"),
        plotly=get_plotlyjs(),
        data=json.dumps(_plain(data), allow_nan=False).replace("<", "\\u003c"),
        script=_file("pareto.js"),
    )
    return _write_whole(path, page)


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(f"templates/{name}").read_text(encoding="utf-8")


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


def _plain(value: Any) -> Any:
    """The same with JSON's own types only: numpy's scalars as Python's, null for what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the panels -----------------------------------------------------------------------------------------------------


def _panels(
    table: pd.DataFrame, points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None
) -> list[dict[str, Any]]:
    """A plotly figure a hook point, all with the same axes. Colours named `var(--...)` are the style sheet's: the
    script puts in the light or the dark ones."""
    x_range, y_range = ranges(points, baselines)
    layout = _panel_layout(x_range, y_range, l0_band)
    return [
        {
            "hook_point": name,
            "data": list(_traces(at_hook(points, name), at_hook(baselines, name))),
            "layout": layout,
        }
        for name in drawn_hook_points(table, points)
    ]


def _panel_layout(x_range: tuple[float, float], y_range: tuple[float, float], l0_band: Band | None) -> dict[str, Any]:
    axis = {"gridcolor": "var(--line)", "linecolor": "var(--line)", "zeroline": False, "tickfont": {"size": 11.5}}
    at = ticks(x_range)
    shapes = []
    if l0_band is not None and (low := max(l0_band[0], x_range[0])) < (high := min(l0_band[1], x_range[1])):
        shapes.append({"type": "rect", "layer": "below", "xref": "x", "yref": "paper", "x0": low, "x1": high, "y0": 0,
                       "y1": 1, "fillcolor": "var(--band)", "line": {"width": 0}})  # fmt: skip
    return {
        "xaxis": axis | {"type": "log", "range": [math.log10(edge) for edge in x_range], "title": {"text": X_LABEL},
                         "tickvals": at, "ticktext": [f"{tick:g}" for tick in at]},
        "yaxis": axis | {"range": list(y_range), "title": {"text": Y_LABEL}},
        "shapes": shapes,
        "margin": {"l": 58, "r": 14, "t": 26, "b": 46},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--grey)", "activecolor": "var(--link)"},
        "font": {"color": "var(--soft)", "family": "system-ui, Segoe UI, Roboto, sans-serif", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False, "hovermode": "closest", "dragmode": "zoom", "autosize": True, "uirevision": "kept",
    }  # fmt: skip


def _traces(points: pd.DataFrame, baselines: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Baselines, the front, then the SAEs by architecture. `customdata` are the keys of the marks to show on hover."""
    for kind, group in by_kind(baselines):
        label, _, dash = BASELINES[kind]
        yield {
            "type": "scatter", "mode": "lines+markers", "name": label, "x": list(group["x"]),
            "y": list(group["ce_recovered"]), "line": {"color": "var(--grey)", "dash": dash, "width": 1.6},
            "marker": {"size": 5, "color": "var(--grey)"}, "hoverinfo": "none",
            "customdata": [_baseline_key(record) for record in group.to_dict("records")],
        }  # fmt: skip
    front = points[points["on_front"]]
    yield {"type": "scatter", "mode": "lines", "name": "front", "x": list(front["x"]), "y": list(front["ce_recovered"]),
           "line": {"color": "var(--ink)", "width": 1.6}, "hoverinfo": "skip"}  # fmt: skip
    for architecture, group in by_architecture(points):
        yield {
            "type": "scatter", "mode": "markers", "name": architecture, "x": list(group["x"]),
            "y": list(group["ce_recovered"]), "hoverinfo": "none",
            "customdata": [key_of(record) for record in group.to_dict("records")],
            "marker": _marker(style_of(architecture), [bool(flag) for flag in group["on_front"]]),
            "unselected": {"marker": {"opacity": 0.1}},
        }  # fmt: skip


def _marker(style: Style, on_front: Sequence[bool]) -> dict[str, Any]:
    return {
        "symbol": style.symbol,
        "size": [12 if flag else 10 for flag in on_front],
        "color": [style.colour if flag else "var(--paper)" for flag in on_front],
        "opacity": 1,
        "line": {"width": [1 if flag else 1.8 for flag in on_front],
                 "color": ["var(--ink)" if flag else style.colour for flag in on_front]},
    }  # fmt: skip


# ---- what is known of a mark ----------------------------------------------------------------------------------------


def _sae_marks(table: pd.DataFrame, source: Source) -> dict[str, Any]:
    """By SAE id (`ID[WIDTH]` of a prefix): heading, settings, figures, and how to fetch and load it."""
    settings, measured = _columns_of(table)
    marks = {}
    for record in table.to_dict("records"):
        status = [str(record["status"])] if known(record.get("status")) else []
        where = "on the front" if record["on_front"] else "not on the front"
        drawn = known(record.get("l0")) and known(record.get("ce_recovered"))
        marks[key_of(record)] = {
            "title": kind_of(record),
            "architecture": str(record["architecture"]),
            "hook_point": str(record["hook_point"]),
            "note": ", ".join([where, *status] if drawn else status),
            "colour": style_of(record["architecture"]).colour,
            "figures": _pairs(record, [name for name in FIGURES if name in record]),
            "settings": _pairs(record, settings),
            "measured": _pairs(record, measured),
            "commands": _commands(record, source) if drawn else [],
            "x": max(float(record["l0"]), 0.1) if drawn else None,
            "y": record["ce_recovered"] if drawn else None,
        }
    return marks


def _baseline_marks(baselines: pd.DataFrame) -> dict[str, Any]:
    measured = [name for name in baselines if name not in _IDENTITY and name not in FIGURES and name != "k"]
    return {
        _baseline_key(record): {
            "title": BASELINES[record["kind"]][0], "hook_point": str(record["hook_point"]),
            "note": "a basis of the target: what so many coefficients can reach" if record["kind"] in REFERENCES
                    else "a baseline: what an SAE has to beat",
            "colour": "var(--grey)",
            "figures": _pairs(record, [name for name in FIGURES if name in record]),
            "settings": _pairs(record, ["k"]), "measured": _pairs(record, measured), "commands": [],
        }
        for record in baselines.to_dict("records")
    }  # fmt: skip


def _baseline_key(record: Mapping[str, Any]) -> str:
    return f"baseline {record['kind']} {text_of(record.get('k'))} {record['hook_point']}"


def _pairs(record: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    return [[_label(name), _shown(name, record[name])] for name in names if known(record.get(name))]


def _label(name: str) -> str:
    return _LABELS.get(name, name)


def _shown(name: str, value: Any) -> str:
    return text_of(value, FIGURES[name][1] if name in FIGURES else None)


def _columns_of(table: pd.DataFrame) -> tuple[list[str], list[str]]:
    """(settings, measured figures beside the five that lead): what stands before L0 is set, what stands after it is
    measured."""
    names = list(table)
    rest = [name for name in names if name not in _IDENTITY and name not in FIGURES]
    at = names.index("l0")
    return [name for name in rest if names.index(name) < at], [name for name in rest if names.index(name) > at]


def _commands(record: Mapping[str, Any], source: Source) -> list[list[str]]:
    """[what it does, text to copy] of the command that pulls this very SAE, and of the code that loads it."""
    key = key_of(record)
    folder = f"sae-{key.replace('[', '-').rstrip(']')}"
    words = ["penstock", "pull", source.sweep, "--sae", key, "--to", folder, *source.options]
    code = f"from sae_core import SAE\nsae = SAE.load({folder!r})"
    return [["fetch it", shlex.join(words)], ["load it", code]]


# ---- the table of SAEs ----------------------------------------------------------------------------------------------


def _table_html(table: pd.DataFrame) -> str:
    """The SAEs by hook point and L0. Columns that differ only between architectures, and the figures beside the five
    that lead, are there but shown on demand (`more`)."""
    settings, measured = _columns_of(table)
    differing = [name for name in settings if table[name].nunique(dropna=False) > 1]
    varied = [name for name in differing if (table.groupby("architecture")[name].nunique() > 1).any()]
    figures = [name for name in FIGURES if name in table]
    status = ["status"] if "status" in table else []
    finished = not status or (table["status"] == "finished").all()
    shown = ["hook_point", "architecture", *varied, *figures, *([] if finished else status), "sae_id"]
    columns = [*shown, *(name for name in [*settings, *measured, *status] if name not in shown)]
    flags = {name for name in columns if pd.api.types.is_bool_dtype(table[name])}
    numeric = {name for name in columns if pd.api.types.is_numeric_dtype(table[name])} - flags
    kinds = {name: _classes(name, name in numeric, name in shown) for name in columns}
    head = "".join(f'<th scope="col"{kinds[name]} data-column="{html.escape(name)}"><button type="button">'
                   f"{html.escape(_label(name))}</button></th>" for name in columns)  # fmt: skip
    body = "\n".join(_row_html(record, kinds) for record in table.to_dict("records"))
    return f'<table class="sortable" id="saes"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _classes(name: str, numeric: bool, shown: bool) -> str:
    names = [*(["number"] if numeric else []), *(["name"] if name in ("sae_id", "hook_point") else []),
             *([] if shown else ["more"])]  # fmt: skip
    return f' class="{" ".join(names)}"' if names else ""


def _row_html(record: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    cells = []
    for name, kind in kinds.items():
        value = record[name]
        key = html.escape(str(value)) if known(value) else ""
        text = html.escape(_shown(name, value))
        if name == "architecture":
            text = f"{_glyph(style_of(value), bool(record['on_front']))} {html.escape(kind_of(record))}"
        elif name == "sae_id":
            text = f'<button type="button" class="pick">{html.escape(key_of(record))}</button>'
        cells.append(f'<td{kind} data-value="{key}">{text}</td>')
    front = ' class="front"' if record["on_front"] else ""
    return f'<tr{front} data-sae="{html.escape(key_of(record))}">{"".join(cells)}</tr>'


def _glyph(style: Style, filled: bool) -> str:
    fill, width = (style.colour, 0) if filled else ("none", 1.6)
    title = "<title>on the front of its hook point</title>" if filled else ""
    return (f'<svg class="glyph" viewBox="0 0 16 16" fill="{fill}" stroke="{style.colour}" stroke-width="{width}">'
            f"{title}{_SHAPES[style.symbol]}</svg>")  # fmt: skip


# ---- around it ------------------------------------------------------------------------------------------------------


def _tiles(facts: Mapping[str, str]) -> str:
    tiles = "".join(f'<div class="tile"><b>{html.escape(value)}</b><span>{html.escape(name)}</span></div>'
                    for name, value in facts.items())  # fmt: skip
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _filters(table: pd.DataFrame, points: pd.DataFrame) -> str:
    """A switch an architecture, and the choice of a hook point where there are several."""
    counts = table["architecture"].value_counts()
    names = [name for name, _ in by_architecture(points)]
    names += [name for name in dict.fromkeys(table["architecture"]) if name not in names]
    chips = "".join(
        f'<label class="chip"><input type="checkbox" name="architecture" value="{html.escape(str(name))}" checked>'
        f"{_glyph(style_of(name), True)} {html.escape(str(name))} <small>{counts[name]}</small></label>"
        for name in names
    )
    hook_points = list(dict.fromkeys(table["hook_point"]))
    choice = ""
    if len(hook_points) > 1:
        options = "".join(f"<option>{html.escape(str(name))}</option>" for name in hook_points)
        choice = ('<select id="hook-point" aria-label="hook point"><option value="">all hook points</option>'
                  f"{options}</select>")  # fmt: skip
    return f"{chips}{choice}"


def _legend(points: pd.DataFrame, baselines: pd.DataFrame, l0_band: Band | None) -> str:
    grey = Style("var(--soft)", "o", "circle")
    items = [(_glyph(grey, True), "on the front"), (_line("var(--ink)"), "the front")]
    if not points["on_front"].all():
        items.insert(1, (_glyph(grey, False), "not on it"))
    items += [(_line("var(--grey)", _DASHES[BASELINES[kind][2]]), BASELINES[kind][0]) for kind, _ in by_kind(baselines)]
    if l0_band is not None:
        items.append(('<i class="band"></i>', band_text(l0_band)))
    return "".join(f"<span>{mark} {html.escape(label)}</span>" for mark, label in items)


def _line(colour: str, dashes: str = "") -> str:
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (f'<svg class="line" viewBox="0 0 28 16" fill="none" stroke="{colour}" stroke-width="1.8"{pattern}>'
            '<path d="M1 8h26"/></svg>')  # fmt: skip


def _baselines_section(baselines: pd.DataFrame, table: pd.DataFrame, points: pd.DataFrame) -> str:
    """The baselines, and beside each the SAE that recovers the most with no more active latents."""
    if baselines.empty:
        return ""
    leading = [name for name in FIGURES if name != "dead_fraction"]
    figures = [name for name in leading if name in baselines and baselines[name].notna().any()]
    rows, won, met = [], 0, 0
    for hook_point in dict.fromkeys([*table["hook_point"], *baselines["hook_point"]]):
        for record in at_hook(baselines, hook_point).to_dict("records"):
            rivals = points[(points["hook_point"] == hook_point) & (points["l0"] <= record["l0"])]
            label, k = BASELINES[record["kind"]][0], text_of(record.get("k"))
            cells = [_cell(hook_point, "name"), _cell(label), _cell(k, "number")]
            cells += [_cell(_shown(name, record[name]), "number") for name in figures]
            if record["kind"] in REFERENCES:
                cells += [_cell("it sees the target"), _cell("")]
            elif rivals.empty:
                cells += [_cell("none"), _cell("")]
            else:
                best = rivals.loc[rivals["ce_recovered"].astype(float).idxmax()]
                margin = float(best["ce_recovered"]) - float(record["ce_recovered"])
                met, won = met + 1, won + (margin > 0)
                where = f"{kind_of(best)} at L0 {best['l0']:.3g}: {best['ce_recovered']:.4f}"
                cells += [_cell(where), _cell(f"{margin:+.4f}", "number better" if margin > 0 else "number worse")]
            rows.append(cells)
    labels = [FIGURES[name][0] for name in figures]
    header = ["hook point", "baseline", "k", *labels, "best SAE, no more L0", "ahead by"]
    numeric = {"k", "ahead by", *labels}
    text = "An SAE that does not beat these is worth nothing. " + (
        f"With no more active latents, the best SAE recovers more of the CE in {won} of {met} comparisons."
        if met else "No SAE has as few active latents, so none can be compared."
    )  # fmt: skip
    if baselines["kind"].isin(REFERENCES).any():
        text += (" A basis of the target is no rival: it sees the very activations that a transcoder has to predict, "
                 "and shows how much so many coefficients of them are worth.")  # fmt: skip
    return _section("Baselines", _grid(header, numeric, rows), text)


def _protocol_section(table: pd.DataFrame, spec: str) -> str:
    """What the figures were measured on, from the spec and from the figures themselves."""
    settings = yaml.safe_load(spec) if spec else {}
    facts = _protocol_facts(settings if isinstance(settings, dict) else {}, table)
    losses = [name for name in ("ce_clean", "ce_ablated") if name in table and table[name].notna().any()]
    if not facts and not losses:
        return ""
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts)
    parts = [f'<dl class="facts">{listed}</dl>']
    if losses:
        measured = table.dropna(subset=losses).drop_duplicates("hook_point")
        rows = [[_cell(record["hook_point"], "name"), *[_cell(text_of(record[name], 4), "number") for name in losses]]
                for record in measured.to_dict("records")]  # fmt: skip
        labels = {"ce_clean": "CE of the model (nats a token)", "ce_ablated": "CE with the hook point ablated"}
        header = ["hook point", *[labels[name] for name in losses]]
        parts.append(f'<div class="scroll narrow">{_grid(header, set(header[1:]), rows)}</div>')
    return f"<h2>Protocol</h2>\n{''.join(parts)}"


def _protocol_facts(spec: Mapping[str, Any], table: pd.DataFrame) -> list[tuple[str, str]]:
    data, model, train = (spec.get(name) or {} for name in ("data", "model", "train"))
    tokens, dead = (_one_value(table, name) for name in ("n_tokens", "dead_over_tokens"))
    facts = []
    if tokens is not None:
        split = f"{tokens:,.0f} tokens, the same for every SAE and baseline"
        facts.append(("evaluated on", f"{split}; the report split, whose documents no SAE was trained on"))
    if data:
        facts.append(("dataset", _joined([data.get("dataset"), data.get("subset")])))
        start = "each begins with BOS" if data.get("bos") else "no BOS is put before them"
        facts.append(("context", f"{data.get('context_size')} tokens; {start}"))
        facts.append(("left out", _exclusions(data.get("exclude") or {})))
    if model:
        facts.append(("model", _joined([model.get("name"), model.get("revision"), model.get("dtype"),
                                        f"processing {model.get('processing')}"])))  # fmt: skip
    if "ce_clean" in table:
        formula = "(CE ablated − CE with the SAE) / (CE ablated − CE of the model); ablated: the activation set to zero"
        facts.append(("CE recovered", formula))
    if dead is not None:
        facts.append(("dead", f"a latent that is never active over {dead:,.0f} tokens of training"))
    if train.get("tokens"):
        facts.append(("trained on", f"{train['tokens']:,} tokens an SAE, in batches of {train.get('batch_tokens'):,}"))
    return facts


def _exclusions(exclude: Mapping[str, Any]) -> str:
    parts = []
    if exclude.get("special_tokens"):
        parts.append("special tokens")
    if exclude.get("first_positions"):
        count = exclude["first_positions"]
        parts.append("the first position" if count == 1 else f"the first {count} positions")
    if exclude.get("norm_over_median"):
        parts.append(f"tokens with a norm over {exclude['norm_over_median']:g} times the median")
    return ", ".join(parts) or "nothing"


def _one_value(table: pd.DataFrame, column: str) -> float | None:
    """The value that all SAEs share; None where there is none or they differ."""
    values = table[column].dropna().unique() if column in table else []
    return float(values[0]) if len(values) == 1 else None


def _joined(parts: Sequence[Any]) -> str:
    return ", ".join(str(part) for part in parts if part is not None)


def _cost_section(cost: Mapping[str, float]) -> str:
    """The phases as shares of one bar, then every figure under MLflow's name for it."""
    if not cost:
        return ""
    total = max(cost.get("seconds_total", 0.0), sum(cost.get(name, 0.0) for name in _PHASES))
    spent = [(label, cost[name]) for name, label in _PHASES.items() if cost.get(name)]
    bar = ""
    if spent and total:
        rest = total - sum(seconds for _, seconds in spent)
        parts = [*spent, ("other", rest)] if rest > 0.01 * total else spent
        pieces = "".join(f'<div style="flex-grow:{seconds / total:.4f}"><b>{html.escape(label)}</b> {seconds:,.1f} s'
                         "</div>" for label, seconds in parts)  # fmt: skip
        bar = f'<div class="phases">{pieces}</div>'
    rows = [[_cell(name, "name"), _cell(_amount(value), "number"), _cell("s" if "seconds" in name.split("_") else "")]
            for name, value in sorted(cost.items()) if not name.endswith("_per_second")]  # fmt: skip
    rows += [[_cell(name, "name"), _cell(_amount(value), "number"), _cell("a second")]
             for name, value in sorted(cost.items()) if name.endswith("_per_second")]  # fmt: skip
    grid = _grid(["figure", "value", "unit"], {"value"}, rows)
    return f'<h2>Cost</h2>\n{bar}<div class="scroll narrow">{grid}</div>'


def _amount(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.1f}"


def _section(title: str, table: str, text: str = "") -> str:
    paragraph = f"<p>{html.escape(text)}</p>\n" if text else ""
    return f'<h2>{html.escape(title)}</h2>\n{paragraph}<div class="scroll">{table}</div>'


def _cell(text: str, kind: str = "") -> str:
    return f"<td{f' class={json.dumps(kind)}' if kind else ''}>{html.escape(str(text))}</td>"


def _grid(header: Sequence[str], numeric: set[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the header's texts, and rows of ready cells."""
    head = "".join(f'<th scope="col"{" class=number" if cell in numeric else ""}>{html.escape(cell)}</th>'
                   for cell in header)  # fmt: skip
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
