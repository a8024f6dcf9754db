"""Which SAE to take at each hook point, and why: what the report says first.

The SAE is the one that `penstock pull --hook-point` fetches (`pareto.select`). Everything said of it is read off the
table, and, where the evaluation's rows are there, off paired differences: nothing is said that was not measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from penstock.errors import SweepError
from penstock.pareto import NOT_USABLE, Band, in_band, key_of, knee, seed_groups, select
from penstock_dashboards.marks import BASELINES, REFERENCES, at_hook, band_text, known

_AS_SPARSE = 1.02  # a baseline with k of 32 has an L0 near it: an SAE a little above is held against it, too


@dataclass(frozen=True)
class Answer:
    """The SAE to take at a hook point. `key` is None where there is none, and `why` then says so.

    `also` are others worth a look: (key, "knee" or "sparser", in words). `ties` are the keys of the other SAEs whose
    CE recovered cannot be told from the highest; None where nothing tells.
    """

    hook_point: str
    key: str | None
    why: Sequence[str]
    also: Sequence[tuple[str, str, str]] = ()
    ties: Sequence[str] | None = None
    knee: str | None = None
    targets: Sequence[Mapping[str, Any]] = field(default_factory=tuple)


def answers(
    table: pd.DataFrame,
    baselines: pd.DataFrame,
    l0_band: Band | None,
    targets: Mapping[str, Any],
    rows: pd.DataFrame | None = None,
) -> list[Answer]:
    """One a hook point, in the table's order. `targets` are the spec's, `rows` the evaluation's, one a sequence."""
    return [
        _answer(at_hook(table, name), at_hook(baselines, name), name, l0_band, targets, rows)
        for name in dict.fromkeys(table["hook_point"])
    ]


def _answer(
    table: pd.DataFrame,
    baselines: pd.DataFrame,
    hook_point: str,
    l0_band: Band | None,
    targets: Mapping[str, Any],
    rows: pd.DataFrame | None,
) -> Answer:
    rows = None if rows is None else rows[rows["hook_point"] == hook_point]
    try:
        best = select(table, hook_point, l0_band=l0_band, rows=rows).to_dict()
    except SweepError as error:
        return Answer(hook_point, None, [f"{str(error)[0].upper()}{str(error)[1:]}."])
    crowd = _usable(table[in_band(table, l0_band)])
    front = crowd[crowd["on_front"].astype(bool)]
    turn = knee(front)
    at_knee = None if turn is None else front.loc[turn].to_dict()
    records = crowd.to_dict("records")
    top = max(records, key=lambda record: (float(record["ce_recovered"]), -float(record["l0"])))
    as_good = _as_good(top, front.to_dict("records"), rows)
    ties = None if as_good is None else [record for record in as_good if key_of(record) != key_of(best)]
    why = [
        *_rank(best, top, len(records), l0_band),
        *_about_ties(best, ties, len(records)),
        *_about_baselines(best, baselines),
        _about_seeds(best, table),
    ]
    return Answer(
        hook_point=hook_point,
        key=key_of(best),
        why=why,
        also=_also(best, ties or (), at_knee),
        ties=None if ties is None else [key_of(record) for record in ties],
        knee=None if at_knee is None else key_of(at_knee),
        targets=verdicts(best, targets),
    )


def _usable(table: pd.DataFrame) -> pd.DataFrame:
    kept = table["l0"].notna() & table["ce_recovered"].notna()
    return table[kept & ~table["status"].isin(NOT_USABLE)] if "status" in table else table[kept]


def _as_good(
    top: Mapping[str, Any], front: Sequence[Mapping[str, Any]], rows: pd.DataFrame | None
) -> list[Mapping[str, Any]] | None:
    """Those of the front whose CE recovered cannot be told from the highest, that one itself among them; None where
    there are too few documents, or no evaluation rows, to tell."""
    from penstock.statistics import LEAST_DOCUMENTS, Bootstrap

    if rows is None or key_of(top) not in set(rows["sae"]):
        return None
    names = {key_of(record) for record in front} | {key_of(top)}
    bootstrap = Bootstrap(rows[rows["sae"].isin(names)])
    if bootstrap.documents < LEAST_DOCUMENTS:
        return None
    return [record for record in front if key_of(record) in bootstrap.names
            and bootstrap.difference(key_of(top), key_of(record), "ce_recovered")[0] <= 0]  # fmt: skip


# ---- in words -------------------------------------------------------------------------------------------------------


def _rank(best: Mapping[str, Any], top: Mapping[str, Any], count: int, l0_band: Band | None) -> list[str]:
    where = f"with {band_text(l0_band)}" if l0_band else "here"
    figure = interval_text(best, "ce_recovered", 4)
    free = [] if l0_band else ["No L0 band was set (select.l0_band in the spec), so the densest come first."]
    if count == 1:
        return [f"The only SAE {where}: CE recovered {figure}.", *free]
    if key_of(best) == key_of(top):
        return [f"Highest CE recovered of the {count} SAEs {where}: {figure}.", *free]
    return [f"CE recovered {figure}: as good as any of the {count} SAEs {where}, as far as documents can tell.", *free]


def _about_ties(best: Mapping[str, Any], ties: Sequence[Mapping[str, Any]] | None, count: int) -> list[str]:
    """How it stands to the others, and what decided among equals: dead latents in whole percent, then L0."""
    dead = ""
    if known(best.get("dead_fraction")):
        share = float(best["dead_fraction"])
        dead = f"{share:.1%} of its latents are dead" if share else "None of its latents is dead"
    if ties is None or count == 1:
        return [f"{dead}."] if dead else []
    if not ties:
        said = "Ahead of every other one beyond chance (paired over documents, 95%)."
        return [said, *([f"{dead}."] if dead else [])]
    others = f"{len(ties)} other{'' if len(ties) == 1 else 's'}"
    said = f"Not distinguishable in CE recovered from {others} (paired over documents, 95%)."
    if not dead:
        return [said]
    rivals = [float(record["dead_fraction"]) for record in ties if known(record.get("dead_fraction"))]
    if rivals and round(float(best["dead_fraction"]), 2) < round(min(rivals), 2):
        share = f"{float(best['dead_fraction']):.1%}" if best["dead_fraction"] else "none"
        return [said, f"Of all these it has the fewest dead latents: {share}."]
    return [said, f"{dead}, no more than in any of these to a percent, and of such it has the lowest L0."]


def _about_baselines(best: Mapping[str, Any], baselines: pd.DataFrame) -> list[str]:
    if baselines.empty:
        return []
    rivals = baselines[~baselines["kind"].isin(REFERENCES) & baselines["ce_recovered"].notna()]
    rivals = rivals[rivals["l0"].astype(float) <= float(best["l0"]) * _AS_SPARSE]
    if rivals.empty:
        return []
    rival = rivals.loc[rivals["ce_recovered"].astype(float).idxmax()]
    label = BASELINES.get(rival["kind"], (str(rival["kind"]),))[0]
    said = f"{label} recovers {float(rival['ce_recovered']):.4f} at L0 {float(rival['l0']):.3g}"
    if float(rival["ce_recovered"]) < float(best["ce_recovered"]):
        return [f"Ahead of every baseline that is as sparse: {said}."]
    return [f"A baseline that is as sparse does as well or better: {said}."]


def _about_seeds(best: Mapping[str, Any], table: pd.DataFrame) -> str:
    groups = seed_groups(table)
    own = groups[[key_of(best) in members for members in groups["members"]]].iloc[0]
    if own["seeds"] < 2:
        return "One seed only: another seed may rank otherwise."
    low, high = own["ce_recovered_min"], own["ce_recovered_max"]
    return f"{own['seeds']} seeds of these settings: CE recovered {low:.4f} to {high:.4f}."


def _also(
    best: Mapping[str, Any], ties: Sequence[Mapping[str, Any]], at_knee: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """The knee, and the SAE with the fewest active latents among those that are as good."""
    found = []
    if at_knee is not None and key_of(at_knee) == key_of(best):
        found.append((key_of(best), "knee", "It is also the knee of the front."))
    elif at_knee is not None:
        found.append((key_of(at_knee), "knee", _trade(best, at_knee)))
    sparser = [record for record in ties if float(record["l0"]) < 0.95 * float(best["l0"])]
    if sparser:
        least = min(sparser, key=lambda record: float(record["l0"]))
        if at_knee is None or key_of(least) != key_of(at_knee):
            found.append((key_of(least), "sparser", f"as good as can be told: {_trade(best, least)}"))
    return found


def _trade(best: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    less = float(other["ce_recovered"]) - float(best["ce_recovered"])
    return f"L0 {float(other['l0']):.3g} in place of {float(best['l0']):.3g}, CE recovered {signed(less)}"


def signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "\N{MINUS SIGN}")


def interval_text(record: Mapping[str, Any], name: str, decimals: int) -> str:
    """`0.9738 [0.9711, 0.9762]`; the figure alone where there is no interval."""
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    figure = f"{float(record[name]):.{decimals}f}"
    return f"{figure} [{low:.{decimals}f}, {high:.{decimals}f}]" if known(low) and known(high) else figure


# ---- targets --------------------------------------------------------------------------------------------------------


def verdicts(record: Mapping[str, Any], targets: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The spec's targets with what an SAE reached: `{"name", "target", "value", "met"}`; `met` is None without a
    figure."""
    found = []
    for name, wanted in targets.items():
        if wanted is None:
            continue
        value = float(record[name]) if known(record.get(name)) else None
        if name == "l0":
            low, high = float(wanted[0]), float(wanted[1])
            met, text = value is not None and low <= value <= high, band_text((low, high))
        elif name == "dead_fraction":
            met, text = value is not None and value <= float(wanted), f"dead fraction ≤ {float(wanted):g}"
        else:
            label = {"ce_recovered": "CE recovered"}.get(name, name.replace("_", " "))
            met, text = value is not None and value >= float(wanted), f"{label} ≥ {float(wanted):g}"
        found.append({"name": name, "target": text, "value": value, "met": None if value is None else met})
    return found
