"""The Pareto front and what is picked from it: pure functions on a sweep's table, one row an SAE.

A table needs the columns `hook_point`, `l0` and `ce_recovered`; where there are `status` and `architecture`, they are
heeded. A row with a `prefix` stands for an SAE's first latents, an SAE of its own: its `sae_id` is the whole one's.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from penstock.errors import SweepError
from penstock.sites import ARROW

Band = tuple[float, float]
_NOT_USABLE = ("diverged", "failed")


def sae_key(sae_id: str, prefix: float | None) -> str:
    """What commands and pages call an SAE: its id, or `ID[WIDTH]` for a prefix of it."""
    return sae_id if prefix is None or math.isnan(prefix) else f"{sae_id}[{int(prefix)}]"


def key_of(record: Mapping[str, Any]) -> str:
    """The `sae_key` of a table's row."""
    return sae_key(str(record["sae_id"]), record.get("prefix"))


def kind_of(record: Mapping[str, Any]) -> str:
    """The architecture of a table's row, a prefix's with its width: `matryoshka[256]`."""
    return sae_key(str(record["architecture"]), record.get("prefix"))


def resolve_hook_point(table: pd.DataFrame, given: str) -> str:
    """The table's hook point that is meant: by its label, or for a transcoder's by what it reads. Raises `SweepError`,
    saying what there is, for none or several."""
    labels = sorted(table["hook_point"].dropna().unique())
    meant = [given] if given in labels else [label for label in labels if label.split(ARROW)[0] == given]
    if len(meant) != 1:
        if meant:
            raise SweepError(f"hook point {given!r} is read at several sites: {', '.join(meant)}")
        raise SweepError(f"no hook point {given!r} in this sweep; it has {', '.join(labels) or 'none'}")
    return meant[0]


def find_sae(table: pd.DataFrame, asked: str) -> pd.Series:
    """The row of an SAE by its id or the beginning of it, of a prefix by `ID[WIDTH]`. Raises `SweepError`, saying what
    there is, for none or several."""
    parts = re.fullmatch(r"([^\[\]]+)(?:\[([0-9]+)\])?", asked.strip())
    ids = sorted(set(table["sae_id"]))
    name = parts[1] if parts else ""
    meant = [name] if name in ids else [sae_id for sae_id in ids if name and sae_id.startswith(name)]
    if len(meant) != 1:
        shown = ", ".join((meant or ids)[:5]) + (f" and {len(meant or ids) - 5} more" if len(meant or ids) > 5 else "")
        if meant:
            raise SweepError(f"SAE {asked!r} is the beginning of several: {shown}")
        raise SweepError(f"no SAE {asked!r} in this sweep; it has {shown or 'none'}")
    rows = table[table["sae_id"] == meant[0]]
    keys = [key_of(record) for record in rows.to_dict("records")]
    wanted = sae_key(meant[0], float(parts[2]) if parts and parts[2] else None)
    if wanted not in keys:
        raise SweepError(f"SAE {asked!r}: there is {', '.join(keys)}")
    return rows.iloc[keys.index(wanted)]


def in_band(table: pd.DataFrame, l0_band: Band | None) -> pd.Series:
    """Which rows have an L0 inside the band, both ends included; all rows that have an L0 where there is no band."""
    low, high = l0_band or (float("-inf"), float("inf"))
    return table["l0"].astype(float).between(low, high)


def pareto_front(table: pd.DataFrame, l0_band: Band | None = None) -> pd.Series:
    """Which rows no other row beats, of all rows taken as one set and inside the band: a boolean a row.

    Row a beats row b when its L0 is no higher and its CE recovered no lower, and one of the two is better; equal rows
    do not beat each other. An SAE that diverged or failed, lacks a figure, or recovers nothing (CE recovered of 0 or
    less: leaving the layer out does as well, at L0 0) is never on the front.
    """
    l0, recovered = table["l0"].astype(float), table["ce_recovered"].astype(float)
    usable = in_band(table, l0_band) & (recovered > 0)
    if "status" in table:
        usable &= ~table["status"].isin(_NOT_USABLE)
    front = np.zeros(len(table), dtype=bool)
    best, best_l0 = float("-inf"), float("nan")
    for position in np.lexsort((-recovered, l0)):  # by L0, of equal L0 the best first
        point, point_l0 = recovered.iloc[position], l0.iloc[position]
        if usable.iloc[position] and (point > best or (point == best and point_l0 == best_l0)):
            front[position] = True
            best, best_l0 = point, point_l0
    return pd.Series(front, index=table.index, name="on_front")


def mark_front(table: pd.DataFrame, l0_band: Band | None = None) -> pd.DataFrame:
    """A copy with the columns `on_front` (of its hook point) and `on_overall_front` (of all hook points together)."""
    table = table.reset_index(drop=True)
    marked = table.assign(on_front=False, on_overall_front=pareto_front(table, l0_band))
    for _, group in table.groupby("hook_point", sort=False):
        marked.loc[group.index, "on_front"] = pareto_front(group, l0_band)
    return marked


def by_hook_point(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by hook point, block 4 before block 10, and within one by L0; renumbered from 0."""

    def key(column: pd.Series) -> pd.Series:
        if column.name != "hook_point":
            return column
        return column.astype(str).str.replace(r"\d+", lambda number: number[0].zfill(9), regex=True)

    return table.sort_values(["hook_point", "l0"], key=key, kind="stable", ignore_index=True)


def select(
    table: pd.DataFrame, hook_point: str, architecture: str | None = None, l0_band: Band | None = None
) -> pd.Series:
    """The SAE with the highest CE recovered at a hook point (of one architecture, inside the band): its row.

    It lies on the front of what was asked for; of equals, the one with the lowest L0. Raises `SweepError`, saying what
    there is, when nothing fits.
    """
    hook_point = resolve_hook_point(table, hook_point)
    at_hook = table[table["hook_point"] == hook_point]
    rows = at_hook if architecture is None else _of_architecture(at_hook, architecture)
    front = rows[pareto_front(rows, l0_band)]
    if front.empty:
        raise SweepError(_nothing_fits(rows, hook_point, architecture, l0_band))
    return front.sort_values(["ce_recovered", "l0"], ascending=[False, True], kind="stable").iloc[0]


def _of_architecture(table: pd.DataFrame, architecture: str) -> pd.DataFrame:
    rows = table[table["architecture"] == architecture]
    if rows.empty:
        known = ", ".join(sorted(table["architecture"].dropna().unique())) or "none"
        raise SweepError(f"no SAE with architecture {architecture!r} in this sweep; it has {known}")
    return rows


def _nothing_fits(rows: pd.DataFrame, hook_point: str, architecture: str | None, l0_band: Band | None) -> str:
    asked = f"{architecture or 'SAE'} at {hook_point}"
    usable = rows[rows["l0"].notna() & rows["ce_recovered"].notna()]
    if "status" in usable:
        usable = usable[~usable["status"].isin(_NOT_USABLE)]
    if usable.empty:
        statuses = rows["status"].value_counts().items() if "status" in rows else []
        counts = ", ".join(f"{count} {status}" for status, count in statuses)
        return f"no {asked} has been evaluated ({counts or 'no figures'})"
    there = ", ".join(f"{value:.3g}" for value in sorted(usable["l0"].astype(float)))
    if l0_band is not None and not in_band(usable, l0_band).any():
        return f"no {asked} has an L0 in {l0_band[0]:g}:{l0_band[1]:g}; there are {there}"
    return f"no {asked} recovers any CE loss (L0 {there})"
