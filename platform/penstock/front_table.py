"""What `penstock front` shows: a sweep's table (see `tracking.sweep_table`) as text and as JSON."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.errors import SweepError
from penstock.text import figure, number, plain, text_table, whole

if TYPE_CHECKING:
    import pandas as pd

    from penstock.pareto import Band

JSON_KEYS = ("sae_id", "hook_point", "architecture", "d_sae", "prefix", "l0", "ce_recovered", "kl_recovered",
             "explained_variance", "dead_fraction", "on_front", "status", "run_id", "ce_increase", "on_overall_front",
             "dominated_by", "certain", "missed", "remedy", "seed_stability", "knee", "hypervolume")  # fmt: skip
SPARSITY = ("k", "l1_coefficient", "target_l0", "l0_coefficient")
_SHORT_ID = 8
_NOT_SETTINGS = {"sae_id", "hook_point", "architecture", "d_sae", "prefix", *SPARSITY}


def front_json(table: "pd.DataFrame", l0_band: "Band | None" = None) -> str:
    """A list with one object an SAE: `JSON_KEYS`, then all other columns of the table; null where a figure is missing.

    `knee` says whether the SAE is the knee of the front of its hook point, `hypervolume` is that front's, in the L0
    band or what stands for it (see `hypervolume_band`).
    """
    if table.empty:
        return "[]"
    knees, volumes = _knees(table, ["hook_point"]), _hypervolumes(table, l0_band, ["hook_point"])
    records = []
    for label, record in zip(table.index, table.to_dict("records"), strict=True):
        shown = {"knee": label in knees, "hypervolume": volumes.get((record["hook_point"],))}
        values = {**dict.fromkeys(JSON_KEYS), **record, **shown}
        records.append({key: plain(value) for key, value in values.items()})
    counts = ("d_sae", "prefix", "k", "seed", "proposed")
    return json.dumps([record | {key: whole(record[key]) for key in counts if key in record} for record in records],
                      indent=1)  # fmt: skip


def format_front(table: "pd.DataFrame", l0_band: "Band | None" = None, *, by_architecture: bool = False) -> str:
    """A sweep's SAEs as aligned text, by hook point (and architecture) and L0; `*` marks the front.

    Beside the figures, with 95% intervals where there are some, it shows the settings that differ between SAEs of the
    architectures that have them, the sparsity coefficients in one column. Below a hook point's rows stand the
    hypervolume in the L0 band, the knee and what several seeds say; at the end, what targets are missed.
    """
    from penstock.pareto import by_hook_point

    if table.empty:
        return "no SAEs"
    ordered = by_hook_point(table)
    sections = ["hook_point", "architecture"] if by_architecture else ["hook_point"]
    if by_architecture:
        places = ordered["hook_point"].map({name: at for at, name in enumerate(ordered["hook_point"].unique())})
        order = ordered.assign(_place=places).sort_values(["_place", "architecture"], kind="stable").index
        ordered = ordered.loc[order].reset_index(drop=True)
    columns = _Columns(ordered, sections, l0_band)
    head, _, *lines = text_table(columns.header(), columns.rows(), right=columns.right).splitlines()
    volumes, band = _hypervolumes(ordered, l0_band, sections), hypervolume_band(ordered, l0_band)
    parts: list[str] = []
    for key, group in ordered.groupby(sections, sort=False):
        title = " · ".join(key) + ("" if columns.has_widths else f", d_sae {number(group['d_sae'].iloc[0])}")
        parts.append("\n".join([title, head, *(lines[position] for position in group.index)]))
        if band is not None:
            inside = f"log L0 in {band[0]:.3g}:{band[1]:.3g}, from CE recovered 0"
            parts[-1] += f"\n   hypervolume {volumes[key]:.4f} ({inside})"
    return "\n\n".join([*parts, *_seeds(ordered, columns), _legend(ordered, columns), *_remedies(ordered)])


def format_over_all(table: "pd.DataFrame") -> str:
    """The SAEs of all hook points in one table, by what they cost the model: CE increase in nats a token, least first.
    `*` marks the front on (L0, CE increase) by the figures as they are."""
    from penstock.pareto import ce_increase, key_of, kind_of

    if table.empty:
        return "no SAEs"
    increase = ce_increase(table)
    if increase.isna().all():
        raise SweepError("this sweep's figures are from before the CE increase was kept; accepted: a newer sweep")
    ordered = table.assign(ce_increase=increase).sort_values(["ce_increase", "l0"], kind="stable", ignore_index=True)
    ordered = ordered[ordered["ce_increase"].notna()]
    figures = [with_interval(ordered, name, decimals) for name, decimals in (("ce_increase", 4), ("l0", 2))]
    recovered = with_interval(ordered, "ce_recovered", 4)
    rows = [
        ["*" if record["on_overall_front"] else "", record["hook_point"], kind_of(record), number(record["d_sae"]),
         sparsity_of(record), figures[0][at], figures[1][at], recovered[at], figure(record["dead_fraction"], 3),
         key_of(record)] for at, record in enumerate(ordered.to_dict("records"))
    ]  # fmt: skip
    header = ["", "hook point", "architecture", "d_sae", "sparsity", "CE increase", "L0", "CE rec.", "dead", "sae_id"]
    right = {"d_sae", "CE increase", "L0", "CE rec.", "dead"}
    return text_table(header, rows, right=right) + (
        f"\n\n* on the front over all hook points, on (L0, CE increase in nats a token), by the figures as they are: "
        f"{int(ordered['on_overall_front'].sum())} of {len(ordered)}\n"
        "CE recovered is of what leaving that layer out costs, which differs: compare it within a hook point only."
    )


def hypervolume_band(table: "pd.DataFrame", l0_band: "Band | None") -> "Band | None":
    """The L0 band, its open ends closed by the lowest and the highest L0 of the table; None where that is no band."""
    found = table["l0"].astype(float)
    usable = found[(found > 0) & (table["ce_recovered"].astype(float) > 0)]
    if usable.empty:
        return None
    low, high = l0_band or (0.0, math.inf)
    low, high = low if low > 0 else float(usable.min()), high if math.isfinite(high) else float(usable.max())
    return (low, high) if 0 < low < high else None


def why_not_on_front(table: "pd.DataFrame", l0_band: "Band | None" = None) -> list[str]:
    """A cell a row: the beginning of the id of what dominates it, or why it was not compared at all; empty for what is
    on the front, and for what has no figures."""
    cells = []
    for record in table.to_dict("records"):
        cell, l0, recovered = short_id(record.get("dominated_by")), plain(record["l0"]), plain(record["ce_recovered"])
        if not (cell or record["on_front"] or l0 is None or recovered is None):
            if l0_band is not None and not l0_band[0] <= l0 <= l0_band[1]:
                cell = f"(L0 not in {l0_band[0]:g}:{l0_band[1]:g})"
            elif recovered <= 0:
                cell = "(recovers nothing)"
        cells.append(cell)
    return cells


# ---- columns --------------------------------------------------------------------------------------------------------


class _Columns:
    """The cells of a table's rows, those that are worth their width."""

    def __init__(self, table: "pd.DataFrame", sections: Sequence[str], l0_band: "Band | None" = None):
        self.table, self.records, self.sections = table, table.to_dict("records"), sections
        self.settings = _varying_settings(table)
        self.has_status = bool((table["status"] != "finished").any())
        self.has_targets = "missed" in table and bool(table["missed"].map(lambda text: isinstance(text, str)).any())
        self.why_not = why_not_on_front(table, l0_band)
        self.has_stability = "seed_stability" in table and bool(table["seed_stability"].notna().any())
        self.has_rounds = "proposed" in table and bool(table["proposed"].notna().any())
        self.knees = _knees(table, sections)
        self.has_widths = table["d_sae"].nunique() > 1
        self.has_intervals = "ce_recovered_low" in table and bool(table["ce_recovered_low"].notna().any())
        # Intervals take the room of KL recovered, which orders SAEs much as CE recovered does; --json has it.
        self.further = [("explained_variance", "expl. var.")]
        self.further = [*([] if self.has_intervals else [("kl_recovered", "KL rec.")]), *self.further]
        self.right = {"d_sae", "L0", "CE rec.", "KL rec.", "expl. var.", "dead", "stable", "round",
                      *self.settings}  # fmt: skip

    def header(self) -> list[str]:
        return [
            "", "architecture", *(["d_sae"] if self.has_widths else []), "sparsity", *self.settings, "L0", "CE rec.",
            *(title for _, title in self.further), "dead",
            *(["stable"] if self.has_stability else []), *(["round"] if self.has_rounds else []),
            *(["status"] if self.has_status else []), *(["missed"] if self.has_targets else []), "sae_id",
            *(["dominated by"] if any(self.why_not) else []),
        ]  # fmt: skip

    def rows(self) -> list[list[str]]:
        from penstock.pareto import key_of, kind_of

        figures = [with_interval(self.table, name, decimals) for name, decimals in
                   (("l0", 2), ("ce_recovered", 4))]  # fmt: skip
        figures += [[figure(record[name], 4) for record in self.records] for name, _ in self.further]
        return [
            [
                self._mark(label, record), kind_of(record), *([number(record["d_sae"])] if self.has_widths else []),
                sparsity_of(record),
                *(cells[at] for cells in self.settings.values()), *(cells[at] for cells in figures),
                figure(record["dead_fraction"], 3),
                *([_or_empty(record["seed_stability"], 3)] if self.has_stability else []),
                *([number(record["proposed"])] if self.has_rounds else []),
                *([str(record["status"])] if self.has_status else []),
                *([_missed_names(record["missed"])] if self.has_targets else []), key_of(record),
                *([self.why_not[at]] if any(self.why_not) else []),
            ]
            for at, (label, record) in enumerate(zip(self.table.index, self.records, strict=True))
        ]  # fmt: skip

    def _mark(self, label: Any, record: Mapping[str, Any]) -> str:
        marks = "*" if record["on_front"] else ""
        marks += "k" if label in self.knees else ""
        return marks + ("!" if record.get("certain") is True else "")


def with_interval(table: "pd.DataFrame", name: str, decimals: int) -> list[str]:
    """The cells of a figure, with half the width of its interval where any row has one: `0.971 ±.004`."""
    values = [plain(value) for value in table[name]]
    if f"{name}_low" not in table or not table[f"{name}_low"].notna().any():
        return [figure(value, decimals) for value in values]
    halves = [(high - low) / 2 for low, high in zip(table[f"{name}_low"], table[f"{name}_high"], strict=True)]
    wide = sorted(half for half in halves if math.isfinite(half))
    if decimals > 2 and wide[len(wide) // 2] >= 0.0015:
        decimals -= 1  # the last digit would say nothing
    cells = []
    for value, half in zip(values, halves, strict=True):
        margin = f"{half:.{decimals}f}".removeprefix("0") if math.isfinite(half) else ""
        cells.append(figure(value, decimals) + (f" ±{margin}" if margin else " " * (decimals + 3)))
    return cells


def _varying_settings(table: "pd.DataFrame") -> dict[str, list[str]]:
    """The settings that are worth a column, with their cells: those that differ between SAEs whose architecture has
    them. A cell is empty where an architecture does not have the setting, or has it at its default."""
    columns = list(table.columns)
    names = [name for name in columns[: columns.index("l0")] if name not in _NOT_SETTINGS]
    records, found = table.to_dict("records"), {}
    for name in names:
        cells = [None if (default := _default(record, name)) is _ABSENT else _cell(record, name, default)
                 for record in records]  # fmt: skip
        if len({cell for cell in cells if cell is not None}) > 1:
            found[name] = [cell or "" for cell in cells]
    return found


_ABSENT = object()


def _default(record: Mapping[str, Any], name: str) -> Any:
    """An architecture's default of a setting; None where there is none, `_ABSENT` where it has no such setting."""
    from pydantic_core import PydanticUndefined

    from sae_core.architectures import ARCHITECTURES

    architecture = ARCHITECTURES.get(str(record.get("architecture")))
    if architecture is None:
        return None
    field = architecture.settings_type.model_fields.get(name)
    if field is None:
        return _ABSENT if plain(record.get(name)) is None else None
    default = field.get_default(call_default_factory=True, validated_data=dict(record))
    return None if default is PydanticUndefined else default


def _cell(record: Mapping[str, Any], name: str, default: Any) -> str:
    value = plain(record[name])
    at_default = value is None or value == default or str(value).lower() == str(default).lower()
    return "" if at_default and name != "seed" else number(value) or number(default)


def sparsity_of(record: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={number(record[name])}" for name in SPARSITY if plain(record.get(name)) is not None)


def _or_empty(value: Any, decimals: int) -> str:
    return "" if plain(value) is None else figure(value, decimals)


def short_id(sae: Any) -> str:
    """The beginning of an id, which commands accept, and a prefix's width; a folder's name as it is."""
    return re.sub(rf"^([0-9a-f]{{{_SHORT_ID}}})[0-9a-f]*(?=\[|$)", r"\1", str(plain(sae) or ""))


_TARGET_NAMES = {"l0": "L0", "ce_recovered": "CE", "explained_variance": "EV", "dead_fraction": "dead"}


def _missed_names(text: Any) -> str:
    """Which targets are missed, by one word each; `-` for an SAE that misses none."""
    if not isinstance(text, str):
        return ""
    return " ".join(_TARGET_NAMES.get(part.split()[0], part.split()[0]) for part in text.split("; ") if part) or "-"


# ---- below the rows -------------------------------------------------------------------------------------------------


def _knees(table: "pd.DataFrame", sections: Sequence[str]) -> set[Any]:
    """The index labels of the fronts' knees."""
    from penstock.pareto import knee

    fronts = table[table["on_front"].astype(bool)].groupby(list(sections), sort=False)
    return {label for label in (knee(front) for _, front in fronts) if label is not None}


def _hypervolumes(
    table: "pd.DataFrame", l0_band: "Band | None", sections: Sequence[str]
) -> dict[tuple[Any, ...], float]:
    """By the sections' values; in one band for all, so that they compare."""
    from penstock.pareto import hypervolume

    band = hypervolume_band(table, l0_band)
    groups = table.groupby(list(sections), sort=False)
    return {} if band is None else {key: hypervolume(group, band) for key, group in groups}


def _seeds(table: "pd.DataFrame", columns: _Columns) -> list[str]:
    """What SAEs of the same settings say with several seeds; nothing where there is one seed each."""
    from penstock.pareto import key_of, kind_of, seed_groups

    if "seed" not in table or table["seed"].nunique() < 2:
        return []
    groups = seed_groups(table)
    groups = groups[groups["seeds"] > 1]
    if groups.empty:
        return []
    settings = {name: cells for name, cells in columns.settings.items() if name != "seed"}
    at = {key_of(record): place for place, record in enumerate(columns.records)}
    rows = []
    for group in groups.to_dict("records"):
        place = at[group["sae"]]
        record = columns.records[place]
        rows.append(
            [record["hook_point"], kind_of(record), number(record["d_sae"]), sparsity_of(record),
             *(cells[place] for cells in settings.values()), str(group["seeds"]), _spread(group, "l0", 2),
             _spread(group, "ce_recovered", 4), _spread(group, "dead_fraction", 3)]
        )  # fmt: skip
    header = ["hook point", "architecture", "d_sae", "sparsity", *settings, "seeds", "L0", "CE rec.", "dead"]
    right = {"d_sae", *settings, "seeds"}
    return ["Over seeds: mean (lowest to highest)\n" + text_table(header, rows, right=right)]


def _spread(group: Mapping[str, Any], name: str, decimals: int) -> str:
    mean, low, high = (group.get(f"{name}_{kind}") for kind in ("mean", "min", "max"))
    return f"{figure(mean, decimals)} ({figure(low, decimals)} to {figure(high, decimals)})"


def _legend(table: "pd.DataFrame", columns: _Columns) -> str:
    count = int(table["on_front"].sum())
    among = " and architecture" if "architecture" in columns.sections else ""
    lines = [f"* on the Pareto front of its hook point{among}: {count} of {len(table)}"]
    if columns.knees:
        lines.append("k the front's knee, the point farthest above its chord in (log L0, CE recovered)")
    if any(record.get("certain") is True for record in columns.records):
        lines.append("! certain: all seeds, two at least on either side, say the same of it")
    if columns.has_intervals:
        lines.append("± half of the 95% interval over documents; dominated where the paired difference says so")
    if columns.has_stability:
        lines.append("stable: share of live latents found again in the other seeds of the same settings")
    return "\n".join(lines)


def _remedies(table: "pd.DataFrame") -> list[str]:
    """What SAEs on the front miss, and what usually helps: two lines each. Of the others only how many there are."""
    from penstock.pareto import key_of

    if "missed" not in table:
        return []
    missing = [record for record in table.to_dict("records") if isinstance(record["missed"], str) and record["missed"]]
    lines = [f"{short_id(key_of(record))}: {record['missed']}\n  {record['remedy']}"
             for record in missing if record["on_front"]]  # fmt: skip
    if others := len(missing) - len(lines):
        lines.append(f"{others} that are not on the front miss some, too; --json has all of it")
    return ["Targets missed, and what usually helps\n" + "\n".join(lines)] if lines else []
