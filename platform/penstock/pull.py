"""Handing back what a sweep made: its front as a table, an SAE as an object, a checkpoint as a folder.

`penstock.front`, `penstock.load_sae` and `penstock.pull` are these functions.
"""

import json
import math
import os
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.errors import CheckpointError, SweepError
from penstock.home import Home
from penstock.pareto import (
    Band,
    by_hook_point,
    find_sae,
    in_band,
    key_of,
    mark_front,
    of_architecture,
    resolve_hook_point,
    select,
)
from penstock.registry import fetch_version, find_version, is_model_uri
from penstock.tracking import (
    KEPT_FOLDER,
    SAE_FOLDER,
    SweepRuns,
    fetch_artifact,
    find_sweep,
    kept_tokens,
    sweep_table,
)

if TYPE_CHECKING:
    from torch import Tensor

    from sae_core import SAE

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
PROVENANCE = "penstock.json"
_NAMED = {"sae_id", "run_id"}
_OURS = {CONFIG, WEIGHTS, SPARSITY, PROVENANCE}


def front(
    sweep: str,
    *,
    hook_point: str | None = None,
    architecture: str | None = None,
    l0: Band | None = None,
    by: str | None = None,
    home: str | Home | None = None,
) -> pd.DataFrame:
    """Every SAE of a sweep, one row each, by hook point and L0; `on_front` says which of them no other dominates (see
    `penstock.pareto`), `dominated_by` what does.

    `sweep` is a name (its latest run) or an id, `hook_point` a hook point as the table has it (`READS -> WRITES` for
    transcoders, or what they read alone). An SAE's prefixes have rows of their own, with a `prefix`. With a band `l0`
    or an `architecture` only such SAEs are listed, and the front is the one among them; without a band, it is the one
    in the spec's. With `by="architecture"` each architecture has a front of its own. Raises `SweepError` for a sweep,
    hook point or architecture that is not there.
    """
    _check_band(l0)
    runs = find_sweep(_home(home), sweep)
    table = sweep_table(runs.home, runs)
    if hook_point is not None:
        table = table[table["hook_point"] == resolve_hook_point(table, hook_point)]
    if architecture is not None:
        table = of_architecture(table, architecture)
    if by not in (None, "architecture"):
        raise SweepError(f"by {by!r}: accepted is 'architecture'")
    if l0 is not None or architecture is not None or by is not None:
        band = l0 or runs.l0_band
        table = table if l0 is None else table[in_band(table, l0)]
        groups = [table] if by is None or table.empty else [group for _, group in table.groupby("architecture")]
        rows = runs.evaluation_rows()
        table = pd.concat([mark_front(group, band, rows) for group in groups], ignore_index=True)
    return by_hook_point(table)


def load_sae(
    sweep: str,
    *,
    hook_point: str | None = None,
    sae: str | None = None,
    architecture: str | None = None,
    l0: Band | None = None,
    at: int | str | None = None,
    home: str | Home | None = None,
) -> "SAE":
    """The SAE with the highest CE recovered at a hook point, or the one named (see `pull`), ready to `encode` and
    `decode`. In place of a sweep, a registered model's address names one, too: `models:/NAME@best`, `models:/NAME/3`.
    """
    choice = _choose(_home(home), sweep, hook_point, sae, architecture, l0, at)
    with tempfile.TemporaryDirectory() as folder:
        return choice.fetch(Path(folder))[1]


def pull(
    sweep: str,
    *,
    to: str | Path,
    hook_point: str | None = None,
    sae: str | None = None,
    architecture: str | None = None,
    l0: Band | None = None,
    at: int | str | None = None,
    home: str | Home | None = None,
) -> Path:
    """Put the SAE with the highest CE recovered at a hook point, or the one that `sae` names, into the folder `to`, and
    return that folder. Of SAEs whose CE recovered does not differ from the highest, by the paired interval, it is the
    one with the fewest dead latents (see `pareto.select`).

    `sae` is an id or the beginning of one, `ID[WIDTH]` for a prefix. `l0` is the band to pick from, the spec's unless
    given. With `at` it is what that SAE was after so many tokens of its training (50M, 2_000_000), one of those points
    that `train.keep` kept. `sweep` may also be a registered model's address, alone: `models:/NAME@best`. The folder
    holds cfg.json, sae_weights.safetensors and sparsity.safetensors, which `sae_core.SAE.load` and, for architectures
    it has, `sae_lens` read, and penstock.json, which says where it comes from. An SAE pulled there earlier is
    replaced; a folder with anything else in it is refused. Raises `SweepError`.
    """
    folder = Path(to)
    if not str(to):
        raise SweepError("cannot pull to '': name a folder")
    _check_target(folder)
    where = _home(home)
    choice = _choose(where, sweep, hook_point, sae, architecture, l0, at)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SweepError(f"cannot pull to {str(folder)!r}: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as temporary:
        fetched, _ = choice.fetch(Path(temporary))
        # The provenance first, so that the folder is known as ours, and cfg.json last, without which none loads: an
        # interrupted pull can be repeated, and never leaves one SAE's configuration beside another's weights.
        (folder / CONFIG).unlink(missing_ok=True)
        provenance = Path(temporary) / PROVENANCE
        provenance.write_text(json.dumps(choice.provenance, indent=1) + "\n", encoding="utf-8")
        os.replace(provenance, folder / PROVENANCE)  # never written through a link that somebody has put there
        names = {path.name for path in fetched.iterdir()} & (_OURS - {PROVENANCE})
        for stale in _OURS - names - {PROVENANCE}:
            (folder / stale).unlink(missing_ok=True)
        for name in sorted(names, key=lambda name: name == CONFIG):
            os.replace(fetched / name, folder / name)
    return folder


def _home(home: str | Home | None) -> Home:
    where = home if isinstance(home, Home) else Home.resolve(home)
    where.check_tracking()
    return where


def _check_band(l0: Any) -> None:
    try:
        low, high = l0 or (0, math.inf)
        fits = float(low) <= float(high)
    except (TypeError, ValueError):
        fits = False
    if not fits or isinstance(l0, str):
        raise SweepError(f"l0 {l0!r}: accepted is a pair (LO, HI) with LO at most HI, like (50, 200)")


@dataclass(frozen=True)
class _Choice:
    """An SAE that was asked for. `fetch` puts its checkpoint below a folder and gives (where it lies, the SAE)."""

    fetch: Callable[[Path], tuple[Path, "SAE"]]
    provenance: Mapping[str, Any]


def _choose(
    home: Home,
    sweep: str,
    hook_point: str | None,
    sae: str | None,
    architecture: str | None,
    l0: Band | None,
    at: int | str | None,
) -> _Choice:
    _check_band(l0)
    if is_model_uri(sweep):
        if not (hook_point is sae is architecture is l0 is at is None):
            raise SweepError(
                f"model {sweep!r} is one SAE: hook_point, sae, architecture, l0 and at go with a sweep's name"
            )
        return _choose_registered(home, sweep)
    if hook_point is None and sae is None:
        raise SweepError(
            f"sweep {sweep!r} has many SAEs: give a hook point to pick the best of (an architecture and a band of L0 "
            "narrow it down), or the id of an SAE"
        )
    given = {"hook_point": hook_point, "architecture": architecture, "l0": l0}
    if sae is not None and (besides := [f"{name} {value!r}" for name, value in given.items() if value is not None]):
        raise SweepError(f"{', '.join(besides)} cannot go with sae {sae!r}, which is one SAE; accepted: either of them")
    runs = find_sweep(home, sweep)
    table = sweep_table(home, runs)
    if sae is None:
        row = select(table, str(hook_point), architecture, l0 or runs.l0_band, runs.evaluation_rows())
    else:
        row = find_sae(table, sae)
        if row["status"] != "finished":
            raise SweepError(f"SAE {key_of(row)} is {row['status']}: only what is finished can be fetched")
    if at is None:
        return _Choice(lambda to: fetch_checkpoint(home, row, to), _provenance(runs, row))
    tokens = _kept_at(home, row, at)
    # The figures are those of the end, and not of what is fetched.
    settings = row[[name for name in row.index if name in _NAMED or name not in _of_the_end(row)]]
    provenance = _provenance(runs, settings) | {"at_tokens": tokens}
    return _Choice(lambda to: fetch_checkpoint(home, row, to, f"{KEPT_FOLDER}/{tokens}"), provenance)


def _of_the_end(row: pd.Series) -> set[str]:
    """The columns of a sweep's table from its figures on."""
    names = list(row.index)
    return set(names[names.index("l0") :])


def _kept_at(home: Home, row: pd.Series, at: int | str) -> int:
    from penstock.spec import parse_count

    try:
        tokens = parse_count(at)
    except ValueError as error:
        raise SweepError(f"at {at!r}: {error}") from None
    kept = kept_tokens(home, row["run_id"])
    if tokens not in kept:
        there = f"it was kept at {', '.join(map(str, kept))}" if kept else "nothing of it was kept on the way"
        raise SweepError(
            f"at {at!r}: SAE {row['sae_id']} was not kept at so many tokens; accepted is a point of its training that "
            f"train.keep kept: {there}"
        )
    return int(tokens)


def _choose_registered(home: Home, uri: str) -> _Choice:
    version = find_version(home, uri)
    about = f"model {version.name} version {version.version}"

    def fetch(to: Path) -> tuple[Path, "SAE"]:
        folder = fetch_version(home, version, to)
        return folder, _load(folder, about)[0]

    figures = {name: value for name, value in version.tags.items() if not name.startswith("mlflow.")}
    leading = {"model": uri, "name": version.name, "version": int(version.version), "run_id": version.run_id}
    return _Choice(fetch, leading | figures)


def fetch_checkpoint(home: Home, row: pd.Series, to: Path, name: str = SAE_FOLDER) -> tuple[Path, "SAE"]:
    """The checkpoint's folder below `to`, and the SAE in it, of a row of `tracking.sweep_table`; a prefix's is cut off.
    `name`: of the artifact, the SAE as it was at the end unless given.

    Raises `CheckpointError` for one that does not load.
    """
    folder = fetch_artifact(home, row["run_id"], name, to)
    sae, sparsity = _load(folder, f"the checkpoint of SAE {row['sae_id']} (run {row['run_id']})")
    if pd.isna(row["prefix"]):
        return Path(str(folder)), sae
    width = int(row["prefix"])
    sae, of_prefix = sae.prefix(width), to / f"{SAE_FOLDER}-{width}"
    sae.save(of_prefix, sparsity=None if sparsity is None else sparsity[:width])
    return of_prefix, sae


def _load(folder: Path | None, about: str) -> "tuple[SAE, Tensor | None]":
    from sae_core import SAE
    from sae_core.checkpoint import load_sparsity

    missing = [name for name in (CONFIG, WEIGHTS) if folder is None or not (folder / name).is_file()]
    if folder is None or missing:
        raise CheckpointError(f"{about} lacks {', '.join(missing)}")
    try:
        return SAE.load(folder), load_sparsity(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{about} is damaged: {error}") from None


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SweepError(f"cannot pull to {str(folder)!r}: it is a file")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    foreign = sorted(there - _OURS) if PROVENANCE in there else sorted(there)
    if foreign:
        raise SweepError(
            f"cannot pull to {str(folder)!r}: it holds {', '.join(foreign[:5])}; name a new or an empty folder, or one "
            "that holds nothing but an SAE pulled earlier"
        )


def _provenance(runs: SweepRuns, row: pd.Series) -> dict[str, Any]:
    settings = {name: _plain(value) for name, value in row.items()}
    leading = {"sweep": runs.name, "sweep_id": runs.sweep_id, "sae_id": row["sae_id"], "run_id": row["run_id"]}
    if settings.get("prefix") is not None:
        settings["prefix"] = int(settings["prefix"])
    return leading | {name: value for name, value in settings.items() if value is not None and name not in leading}


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _CallableModule(types.ModuleType):
    """Importing this module sets `penstock.pull` to the module, which would hide the function of that name: so calling
    the module is calling the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        return pull(*arguments, **options)


sys.modules[__name__].__class__ = _CallableModule
