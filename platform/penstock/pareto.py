"""The Pareto front and what is picked from it: pure functions on a sweep's table, one row an SAE.

A table needs the columns `sae_id`, `hook_point`, `l0` and `ce_recovered`; where there are `status`, `architecture`,
`d_sae`, `protocol` and `dead_fraction`, they are heeded. A row with a `prefix` stands for an SAE's first latents, an
SAE of its own: its `sae_id` is the whole one's.

**Dominated.** SAEs are compared only where they compete: at one hook point, of one width (a prefix's own) and under one
protocol. With the evaluation's rows (one a sequence, see statistics.py), b dominates a where b's L0 is no higher on the
same tokens and its CE recovered is higher, the paired 95% interval of the difference above 0. Whatever is closer counts
for a: equal within noise is not dominated, also where b is sparser. As b's figure has to be higher, no circle of SAEs
can dominate one another: a front is never empty, and what is not on it has been beaten. It is a verdict on one pair;
with dozens of rivals, one in forty that are as good as a will be taken for better. Without rows (a sweep that still
runs, or is from before there were any) the figures decide as they are.

**Certain** is a verdict that training again would not turn, as far as seeds tell: every seed of the same settings, two
at least, has it against every seed, two at least, of the other side. What is not dominated is certainly so where all
that is sparser certainly recovers less. Without rows, or with one seed, nothing is certain.

**Hook points** are not compared by CE recovered: its denominator, what leaving the layer out costs, is each one's own.
What an SAE costs the model's predictions is `ce_increase`, in nats a token, and that is the same everywhere.
"""

import math
import re
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from penstock.errors import SweepError
from penstock.sites import ARROW

if TYPE_CHECKING:
    from penstock.statistics import Bootstrap

Band = tuple[float, float]
NOT_USABLE = ("diverged", "failed", "pruned")


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
    """Which rows no other row beats by the figures as they are, of all rows taken as one set and inside the band: a
    boolean a row.

    Row a beats row b when its L0 is no higher and its CE recovered no lower, and one of the two is better; equal rows
    do not beat each other. An SAE that diverged, failed or was pruned, lacks a figure, or recovers nothing (CE
    recovered of 0 or less: leaving the layer out does as well, at L0 0) is never on the front.
    """
    return _front(table["l0"].astype(float), table["ce_recovered"].astype(float), _usable(table, l0_band))


def mark_front(
    table: pd.DataFrame, l0_band: Band | None = None, rows: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A copy with the columns `on_front`, `dominated_by`, `certain` and `on_overall_front`.

    `rows` are the evaluation rows of these SAEs (others' do not matter). `on_front` says that an SAE is usable, inside
    the band and not dominated (see above), `dominated_by` names what dominates it best (`sae_key`; None for what is not
    dominated or not usable), `certain` whether seeds agree on that. `on_overall_front` is the front over all hook
    points on (L0, CE increase), by the figures as they are.
    """
    table = table.reset_index(drop=True)
    rows = None if rows is None or rows.empty else rows
    on_front, certain = np.zeros(len(table), dtype=bool), np.zeros(len(table), dtype=bool)
    dominated_by: list[str | None] = [None] * len(table)
    usable = table[_usable(table, l0_band)]
    settings = None if rows is None else _settings_keys(usable)
    for hook_point, group in usable.groupby("hook_point", sort=False):
        of_hook_point = None if rows is None else rows[rows["hook_point"] == hook_point]
        for _, peers in group.groupby(_class_of(group), sort=False):
            bootstrap = None if of_hook_point is None else _bootstrap(of_hook_point, peers)
            rivals = _Rivals(peers, bootstrap)
            on_front[peers.index] = ~rivals.dominated
            for position, best in rivals.best_dominators():
                dominated_by[peers.index[position]] = key_of(peers.iloc[best].to_dict())
            if settings is not None:
                certain[peers.index] = rivals.certain(settings[peers.index])
    return table.assign(
        on_front=on_front,
        on_overall_front=_overall_front(table, l0_band),
        dominated_by=pd.Series(dominated_by, index=table.index, dtype=object),
        certain=certain,
    )


class _Rivals:
    """Who dominates whom among SAEs that may be compared. Matrices are [of, by]: [i, j] is about i and rival j."""

    def __init__(self, peers: pd.DataFrame, bootstrap: "Bootstrap | None"):
        self.l0, self.recovered = (peers[name].to_numpy(float) for name in ("l0", "ce_recovered"))
        self.seeds = peers["seed"].to_numpy() if "seed" in peers else np.zeros(len(peers))
        self.no_denser = self.l0[None, :] <= self.l0[:, None]
        gain = self.recovered[None, :] - self.recovered[:, None]
        if bootstrap is None:
            sparser = self.l0[None, :] < self.l0[:, None]
            self.dominates = self.no_denser & (gain >= 0) & ((gain > 0) | sparser)
            self.falls_short = np.zeros_like(self.dominates)
        else:
            low, high = _differences(bootstrap, [key_of(record) for record in peers.to_dict("records")])
            self.dominates = self.no_denser & (gain > 0) & (low > 0)
            self.falls_short = high < 0
        self.dominated = self.dominates.any(axis=1)

    def best_dominators(self) -> list[tuple[int, int]]:
        """(an SAE that is dominated, what it is dominated by): one on the front where there is one, the best of it."""
        order = np.lexsort((self.l0, -self.recovered, self.dominated))
        return [(int(i), int(order[self.dominates[i, order]][0])) for i in np.flatnonzero(self.dominated)]

    def certain(self, settings: pd.Series) -> np.ndarray:
        """Whether the verdict on each SAE is that on all seeds of its settings against all of its rivals'."""
        members = [np.flatnonzero(settings.to_numpy() == key) for key in settings.unique()]
        repeated = [len(set(self.seeds[group])) > 1 for group in members]
        certain = np.zeros(len(settings), dtype=bool)
        for own, is_repeated in zip(members, repeated, strict=True):
            others = [(group, twice) for group, twice in zip(members, repeated, strict=True) if group is not own]
            beaten = any(twice and self.dominates[np.ix_(own, group)].all() for group, twice in others)
            safe = all(
                (twice or not self.no_denser[pairs].any()) and (self.falls_short | ~self.no_denser)[pairs].all()
                for pairs, twice in ((np.ix_(own, group), twice) for group, twice in others)
            )
            # Of seeds of which one is dominated, be it by another of them, and one is not, nothing is certain.
            certain[own] = is_repeated and (beaten or (safe and not self.dominated[own].any()))
        return certain


def _front(l0: pd.Series, quality: pd.Series, usable: pd.Series) -> pd.Series:
    front = np.zeros(len(l0), dtype=bool)
    best, best_l0 = float("-inf"), float("nan")
    for position in np.lexsort((-quality, l0)):  # by L0, of equal L0 the best first
        point, point_l0 = quality.iloc[position], l0.iloc[position]
        if usable.iloc[position] and (point > best or (point == best and point_l0 == best_l0)):
            front[position] = True
            best, best_l0 = point, point_l0
    return pd.Series(front, index=l0.index, name="on_front")


def _usable(table: pd.DataFrame, l0_band: Band | None) -> pd.Series:
    usable = in_band(table, l0_band) & (table["ce_recovered"].astype(float) > 0)
    return usable & ~table["status"].isin(NOT_USABLE) if "status" in table else usable


def ce_increase(table: pd.DataFrame) -> pd.Series:
    """CE with the SAE less CE without, in nats a token; NaN where the table does not tell."""
    if "ce_increase" in table and table["ce_increase"].notna().any():
        return table["ce_increase"].astype(float)
    if {"ce_sae", "ce_clean"} <= set(table):
        return table["ce_sae"].astype(float) - table["ce_clean"].astype(float)
    return pd.Series(float("nan"), index=table.index)


def _overall_front(table: pd.DataFrame, l0_band: Band | None) -> pd.Series:
    increase = ce_increase(table)
    if increase.isna().all() and table["hook_point"].nunique() == 1:
        return pareto_front(table, l0_band)  # there the two order SAEs alike
    return _front(table["l0"].astype(float), -increase, _usable(table, l0_band) & increase.notna())


def _class_of(table: pd.DataFrame) -> pd.Series:
    """Width and protocol: what may be compared within a hook point."""
    records = [[record.get(name) for name in ("prefix", "d_sae", "protocol")] for record in table.to_dict("records")]
    keys = [f"{width if pd.isna(prefix) else int(prefix)} {protocol}" for prefix, width, protocol in records]
    return pd.Series(keys, index=table.index, dtype=object)


def _settings_keys(table: pd.DataFrame) -> pd.Series:
    """What SAEs that differ in nothing but the seed have in common, one a row."""
    from sae_core.architectures import ARCHITECTURES

    known = {name for sae in ARCHITECTURES.values() for name in sae.settings_type.model_fields} - {"seed"}
    columns = [name for name in table if name in known | {"hook_point", "prefix", "protocol"}]
    keys: list[Hashable] = [str([record[name] for name in columns]) for record in table.to_dict("records")]
    return pd.Series(keys, index=table.index, dtype=object)


def _bootstrap(rows: pd.DataFrame, table: pd.DataFrame) -> "Bootstrap":
    from penstock.statistics import Bootstrap

    return Bootstrap(rows[rows["sae"].isin({key_of(record) for record in table.to_dict("records")})])


def _differences(bootstrap: "Bootstrap", keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Both ends [of, by] of the intervals of CE recovered of `by` less that of `of`; NaN where nothing can be said."""
    from penstock.statistics import LEAST_DOCUMENTS

    low, high = (np.full((len(keys), len(keys)), float("nan")) for _ in range(2))
    if bootstrap.documents >= LEAST_DOCUMENTS:
        there = [position for position, key in enumerate(keys) if key in bootstrap.names]
        for of in there:
            found = bootstrap.differences([keys[by] for by in there], keys[of], "ce_recovered")
            low[of, there], high[of, there] = found
    return low, high


def by_hook_point(table: pd.DataFrame) -> pd.DataFrame:
    """The rows by hook point, block 4 before block 10, and within one by L0; renumbered from 0."""

    def key(column: pd.Series) -> pd.Series:
        if column.name != "hook_point":
            return column
        return column.astype(str).str.replace(r"\d+", lambda number: number[0].zfill(9), regex=True)

    return table.sort_values(["hook_point", "l0"], key=key, kind="stable", ignore_index=True)


def select(
    table: pd.DataFrame,
    hook_point: str,
    architecture: str | None = None,
    l0_band: Band | None = None,
    rows: pd.DataFrame | None = None,
) -> pd.Series:
    """The SAE to take at a hook point (of one architecture, inside the band): its row of the table.

    That is the one with the highest CE recovered. Others on the front whose CE recovered does not differ from it, by
    the paired interval where there are evaluation rows and to the last digit where there are none, are as good: of all
    these, the one with the fewest dead latents (in whole percent), and of such the one with the lowest L0. Raises
    `SweepError`, saying what there is, when nothing fits.
    """
    hook_point = resolve_hook_point(table, hook_point)
    at_hook = table[table["hook_point"] == hook_point]
    asked = at_hook if architecture is None else of_architecture(at_hook, architecture)
    rows = None if rows is None or rows.empty else rows
    front = asked[mark_front(asked, l0_band, rows)["on_front"].to_numpy()]
    if front.empty:
        raise SweepError(_nothing_fits(asked, hook_point, architecture, l0_band))
    recovered = front["ce_recovered"].astype(float)
    as_good = (recovered == recovered.max()).to_numpy()
    if rows is not None:
        best = int(np.lexsort((front["l0"].astype(float), -recovered))[0])
        keys = [key_of(record) for record in front.to_dict("records")]
        low, _ = _differences(_bootstrap(rows[rows["hook_point"] == hook_point], front), keys)
        as_good = as_good | (low[:, best] <= 0)
    dead = front["dead_fraction"] if "dead_fraction" in front else pd.Series(float("nan"), index=front.index)
    order = np.lexsort((front["l0"].astype(float), dead.astype(float).round(2).fillna(1.0), ~as_good))
    return front.iloc[int(order[0])]


# ---- a front as numbers ---------------------------------------------------------------------------------------------


def hypervolume(table: pd.DataFrame, l0_band: Band, reference: float = 0.0) -> float:
    """How much of the plane of (log L0, CE recovered) SAEs leave behind them inside a band, of all rows taken as one
    set: 1 is an SAE that recovers everything at the band's lower end, 0 is none in the band.

    The reference point is (upper end of the band, `reference`): the area between `reference` and the highest CE
    recovered that is to be had up to each L0, over log L0, by log(high / low) * (1 - reference) (Zitzler and Thiele,
    Multiobjective Optimization Using Evolutionary Algorithms, PPSN 1998). An SAE outside the band counts for nothing,
    as it is picked for nothing; one just below its lower end may be worth a wider band. Raises `SweepError` for a band
    without two finite ends above 0.
    """
    low, high = l0_band
    if not 0 < low < high < float("inf"):
        raise SweepError(f"L0 band {low:g}:{high:g}: a hypervolume needs two different finite ends above 0")
    front = table[pareto_front(table, l0_band)].sort_values("l0")
    at = np.log(front["l0"].to_numpy(float))
    ends = np.append(at[1:], np.log(high))
    above = np.maximum(front["ce_recovered"].to_numpy(float) - reference, 0)
    return float(((ends - at) * above).sum() / (np.log(high / low) * (1 - reference)))


def knee(front: pd.DataFrame) -> Hashable | None:
    """The index label of the row from which on more latents a token pay less than before; None where there is none.

    On (log L0, CE recovered), both scaled to 0 to 1, it is the point farthest above the line from the front's sparsest
    to its densest point (Satopaa et al., Finding a "Kneedle" in a Haystack, 2011). `front` is one hook point's; rows
    that are not on the front of the figures as they are do not count. At least three have to.
    """
    points = front[pareto_front(front) & (front["l0"].astype(float) > 0)].sort_values("l0", kind="stable")
    x, y = np.log(points["l0"].to_numpy(float)), points["ce_recovered"].to_numpy(float)
    if len(points) < 3 or x[-1] == x[0] or y[-1] == y[0]:
        return None
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    best = int(above.argmax())
    return points.index[best] if above[best] > 1e-9 else None


def seed_groups(table: pd.DataFrame) -> pd.DataFrame:
    """One row for SAEs that differ in nothing but the seed: what error bars show, on pages and in `penstock front`.

    Columns: `sae` (`sae_key` of the first), `members` (list of keys), `seeds` (how many different ones have figures),
    `hook_point`, `architecture`, `d_sae`, `prefix` where the table has them, and for l0, ce_recovered, kl_recovered,
    explained_variance, ce_increase, mse and dead_fraction `<name>_mean`, `<name>_std` (of a sample, NaN for one seed),
    `<name>_min` and `<name>_max`, over the members that have it and neither diverged, failed nor were pruned. A bar
    from min to max is honest for two to four seeds, where a standard deviation says little. Sampling of documents is
    another uncertainty: the intervals.
    """
    from penstock.statistics import HEADLINE

    figures = [name for name in (*HEADLINE, "dead_fraction") if name in table]
    leading = [name for name in ("hook_point", "architecture", "d_sae", "prefix") if name in table]
    groups = []
    for _, group in table.groupby(_settings_keys(table), sort=False):
        keys = [key_of(record) for record in group.to_dict("records")]
        usable = group[group["l0"].notna()]
        if "status" in usable:
            usable = usable[~usable["status"].isin(NOT_USABLE)]
        found = {name: usable[name].astype(float) for name in figures}
        groups.append(
            {
                "sae": keys[0],
                "members": keys,
                "seeds": int(usable["seed"].nunique()) if "seed" in usable else len(usable),
                **{name: group[name].iloc[0] for name in leading},
                **{f"{name}_{kind}": getattr(values, kind)() if len(values) else float("nan")
                   for name, values in found.items() for kind in ("mean", "std", "min", "max")},
            }
        )  # fmt: skip
    return pd.DataFrame(groups)


def of_architecture(table: pd.DataFrame, architecture: str) -> pd.DataFrame:
    """The rows of an architecture. Raises `SweepError`, saying what there is, for none."""
    rows = table[table["architecture"] == architecture]
    if rows.empty:
        known = ", ".join(sorted(table["architecture"].dropna().unique())) or "none"
        raise SweepError(f"no SAE with architecture {architecture!r} in this sweep; it has {known}")
    return rows


def _nothing_fits(rows: pd.DataFrame, hook_point: str, architecture: str | None, l0_band: Band | None) -> str:
    asked = f"{architecture or 'SAE'} at {hook_point}"
    usable = rows[rows["l0"].notna() & rows["ce_recovered"].notna()]
    if "status" in usable:
        usable = usable[~usable["status"].isin(NOT_USABLE)]
    if usable.empty:
        statuses = rows["status"].value_counts().items() if "status" in rows else []
        counts = ", ".join(f"{count} {status}" for status, count in statuses)
        return f"no {asked} has been evaluated ({counts or 'no figures'})"
    found = [f"{value:.3g}" for value in sorted(usable["l0"].astype(float))]
    there = ", ".join(found) if len(found) <= 8 else f"{len(found)}, from {found[0]} to {found[-1]}"
    if l0_band is not None and not in_band(usable, l0_band).any():
        return f"no {asked} has an L0 in {l0_band[0]:g}:{l0_band[1]:g}; there are {there}"
    return f"no {asked} recovers any CE loss (L0 {there})"
