"""What an SAE should reach, whether it does, and what usually helps where it does not.

A remedy names the SAE's own setting and a value to try. Values are first guesses: L0 is taken to go as k and as
1 / coefficient, and to be moved a tenth inside the band.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.pareto import NOT_USABLE

if TYPE_CHECKING:
    from penstock.spec import TargetSpec

_INSIDE = 1.1
_ROOM = 1.25
"""How far below the band's upper end an L0 has to be for more latents a token to be the first thing to try."""
_MANY_DEAD = 0.2
"""Above this share of dead latents width is not what an SAE lacks."""
_COEFFICIENTS = {"l1_coefficient": "l1_warm_up_steps", "l0_coefficient": "l0_warm_up_steps"}


def missed(table: pd.DataFrame, targets: "TargetSpec") -> pd.DataFrame:
    """A copy of a table, one row an SAE, with the columns `missed` and `remedy`: text, empty for an SAE that reaches
    every target, None where there are no targets or no figures.

    `missed` is like "l0 230 > 200; dead_fraction 0.31 > 0.05"; "(within its interval)" follows where the target lies
    inside the figure's 95% interval, so that other documents might say otherwise. `remedy` is like "sparser: try
    l1_coefficient 1.3 (is 1)".
    """
    judged = [_judged(record, targets) for record in table.to_dict("records")]
    columns = zip(*judged, strict=True) if judged else ((), ())
    return table.assign(
        **{name: pd.Series(list(texts), index=table.index, dtype=object)
           for name, texts in zip(("missed", "remedy"), columns, strict=True)}
    )  # fmt: skip


def _judged(record: Mapping[str, Any], targets: "TargetSpec") -> tuple[str | None, str | None]:
    l0, band = _number(record, "l0"), targets.l0
    if l0 is None or record.get("status") in NOT_USABLE or not targets.model_dump(exclude_none=True):
        return None, None
    misses, remedies = [], []
    too_dense, too_sparse = (band is not None and l0 > band[1]), (band is not None and l0 < band[0])
    if band is not None and (too_dense or too_sparse):
        misses.append(_miss(record, "l0", band[1] if too_dense else band[0]))
        remedies.append(("sparser: " if too_dense else "denser: ") + _sparsity(record, l0, _inside(band, too_dense)))
    too_low = [
        name for name in ("ce_recovered", "explained_variance") if _below(record, name, getattr(targets, name))
    ]
    misses += [_miss(record, name, getattr(targets, name)) for name in too_low]
    if too_low and not too_sparse:  # what is too sparse gains most by what is said of L0 already
        remedies.append("closer: " + _closer(record, l0, band, too_dense))
    dead = _number(record, "dead_fraction")
    if targets.dead_fraction is not None and dead is not None and dead > targets.dead_fraction:
        misses.append(_miss(record, "dead_fraction", targets.dead_fraction))
        remedies.append("fewer dead: " + _fewer_dead(record, dead))
    return "; ".join(misses), "; ".join(remedies)


def _miss(record: Mapping[str, Any], name: str, target: float) -> str:
    value, low, high = (_number(record, key) for key in (name, f"{name}_low", f"{name}_high"))
    assert value is not None
    digits = 3
    while digits < 9 and float(f"{value:.{digits}g}") == float(f"{target:.{digits}g}"):
        digits += 1  # "0.8 < 0.8" would puzzle
    unsure = low is not None and high is not None and low <= target <= high
    return f"{name} {value:.{digits}g} {'<' if value < target else '>'} {target:g}" + (
        " (within its interval)" if unsure else ""
    )


def _below(record: Mapping[str, Any], name: str, target: float | None) -> bool:
    value = _number(record, name)
    return target is not None and value is not None and value < target


def _inside(band: tuple[float, float], too_dense: bool) -> float:
    """The L0 to aim at: a tenth inside the nearer end, the middle of a band that is too narrow for that."""
    low, high = band
    aim = high / _INSIDE if too_dense else low * _INSIDE
    return aim if low <= aim <= high else math.sqrt(low * high) if low > 0 else high / 2


def _sparsity(record: Mapping[str, Any], l0: float, aim: float) -> str:
    """The setting that decides L0, and the value that should lead to `aim`."""
    k, target, d_sae = (_number(record, name) for name in ("k", "target_l0", "d_sae"))
    if k is not None:
        value = max(1.0, k * aim / l0 if l0 > 0 else k)
        if d_sae is not None and value >= d_sae:
            return f"a larger d_sae, as k {k:g} is nearly all of it"
        return _try("k", round(value), k)
    if target is not None:
        return _try("target_l0", aim, target)
    for name in _COEFFICIENTS:
        coefficient = _number(record, name)
        if coefficient is not None:
            return _try(name, coefficient * l0 / aim if l0 > 0 else coefficient / 2, coefficient)
    return "more sparsity" if aim < l0 else "less sparsity"


def _closer(record: Mapping[str, Any], l0: float, band: tuple[float, float] | None, too_dense: bool) -> str:
    d_sae, prefix, dead = (_number(record, name) for name in ("d_sae", "prefix", "dead_fraction"))
    if not too_dense and band is not None and l0 * _ROOM < band[1]:
        aim = min(band[1] / _INSIDE, 2 * l0)
        return f"{_sparsity(record, l0, aim)}, as the band leaves room"
    ways = [] if band is not None else [_sparsity(record, l0, 1.5 * l0)]
    if dead is not None and dead > _MANY_DEAD:
        ways.append("fewer dead latents, before any more width")
    elif prefix is not None:
        ways.append(f"a wider prefix (is {prefix:g})")
    elif d_sae is not None:
        ways.append(_try("d_sae", 2 * d_sae, d_sae))
    return ", or ".join([*ways, "more train.tokens"])


def _fewer_dead(record: Mapping[str, Any], dead: float) -> str:
    ways = []
    for name, warm_up in _COEFFICIENTS.items():
        if _number(record, name) is not None:
            steps = _number(record, warm_up)
            ways.append(_try(warm_up, 2 * steps, steps) if steps else f"{warm_up} of a tenth of the run (is 0)")
    for name in ("aux_coefficient", "pre_act_coefficient"):
        if _number(record, name) == 0:
            ways.append(f"{name} above 0, which revives latents")
    lr = _number(record, "lr")
    ways.append(_try("lr", lr / 2, lr) if lr is not None else "half of train.lr")
    if _number(record, "resample_every_steps") is None and record.get("frozen_decoder") is not True:
        ways.append("resample_every_steps")
    width = _number(record, "prefix") or _number(record, "d_sae")
    if width is not None and dead > _MANY_DEAD:
        ways.append(f"a width of {math.ceil(width * (1 - dead)):g}, what is alive (is {width:g})")
    return ", or ".join(ways)


def _try(name: str, value: float, now: float) -> str:
    return f"try {name} {value:.2g} (is {now:g})" if value < 10 else f"try {name} {value:.0f} (is {now:g})"


def _number(record: Mapping[str, Any], name: str) -> float | None:
    value = record.get(name)
    return None if value is None or isinstance(value, str) or not math.isfinite(value) else float(value)
