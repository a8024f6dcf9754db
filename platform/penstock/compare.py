"""Whether SAEs have the same features: `penstock compare`, and the seed stability of a sweep's SAEs.

SAEs are compared by their decoder directions (see sae_core/matching.py), live latents only: what has never fired is no
feature. That finds the same direction, not the same behaviour; a feature that another SAE splits or writes along
another direction counts as not found.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.errors import CheckpointError, SweepError
from penstock.home import Home
from penstock.text import text_table

if TYPE_CHECKING:
    from torch import Tensor

    from penstock.plan import PlannedSAE
    from penstock.storage import Storage
    from sae_core import SAEConfig

_SAMPLED_LATENTS = 8192
"""Seed stability of wider SAEs is that of so many of their latents, spread evenly: a driver has no time for more."""


_PAIRS_SHOWN = 28
"""A line a pair, for up to eight SAEs; the matrix is enough to read of more."""


@dataclass(frozen=True)
class Dictionary:
    """An SAE's live features: `directions` [n_live, d] of unit length, `latents` [n_live] their numbers in the SAE."""

    name: str
    architecture: str
    hook_point: str
    d_sae: int
    latents: "Tensor"
    directions: "Tensor"

    @property
    def d(self) -> int:
        return int(self.directions.shape[1])


@dataclass(frozen=True)
class Pair:
    """Two dictionaries compared, `a` and `b` by their place in the list.

    shared: how many features they share; of_a, of_b: as shares of their live latents; mean_max_cosine_a: over a's
    latents, of the greatest cosine with any of b's; hungarian_shared (as a share of the narrower one's latents above
    the threshold), hungarian_cosine (the mean of all pairs): None where the method was left out.
    """

    a: int
    b: int
    shared: int
    of_a: float
    of_b: float
    mean_max_cosine_a: float
    mean_max_cosine_b: float
    hungarian_shared: float | None
    hungarian_cosine: float | None


@dataclass(frozen=True)
class Comparison:
    """`latents`: one row a live latent, with columns sae, latent, found_in (in how many of the others), of (how many
    others), mean_cosine (of the greatest cosines with each other one)."""

    threshold: float
    dictionaries: Sequence[Dictionary]
    pairs: Sequence[Pair]
    latents: pd.DataFrame

    def stability(self, dictionary: Dictionary) -> float:
        """In what share of the others one of its latents is found again, on average."""
        own = self.latents[self.latents["sae"] == dictionary.name]
        return float((own["found_in"] / own["of"]).mean())

    def shares(self) -> list[list[float]]:
        """[of, in]: the share of one SAE's live latents that are found again in another; 1 with itself."""
        n = len(self.dictionaries)
        table = [[1.0] * n for _ in range(n)]
        for pair in self.pairs:
            table[pair.a][pair.b], table[pair.b][pair.a] = pair.of_a, pair.of_b
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "saes": [
                {"name": one.name, "architecture": one.architecture, "hook_point": one.hook_point, "d_sae": one.d_sae,
                 "live": len(one.latents), "stability": self.stability(one)} for one in self.dictionaries
            ],
            "shares": self.shares(),
            "pairs": [
                {**vars(pair), "a": self.dictionaries[pair.a].name, "b": self.dictionaries[pair.b].name}
                for pair in self.pairs
            ],
        }  # fmt: skip


def compare(
    saes: Sequence[str], *, sweep: str | None = None, threshold: float | None = None, home: str | Home | None = None
) -> Comparison:
    """Compare two or more SAEs, each with each.

    Each is a folder, `SWEEP:SAE_ID`, a registered model's address (`models:/NAME@best`), or with `sweep` an id of that
    sweep; a prefix is `ID[WIDTH]`. A feature counts as shared above the cosine `threshold`, 0.7 unless given. The
    decoders of all lie in memory at once, in float32; their cosines never do. Raises `SweepError` for fewer than two,
    one named twice, widths d_in that differ, and what cannot be found.
    """
    from sae_core.matching import THRESHOLD

    threshold = THRESHOLD if threshold is None else threshold
    if not 0 < threshold < 1:
        raise SweepError(f"threshold {threshold:g}: accepted is a cosine above 0 and below 1")
    if len(saes) < 2:
        raise SweepError(f"{len(saes)} SAE to compare; accepted: two or more")
    twice = sorted({name for name in saes if list(saes).count(name) > 1})
    if twice:
        raise SweepError(f"SAE {twice[0]!r} is named twice")
    finder, loaded = _Finder(sweep, home), []
    for name in saes:
        loaded.append(finder.find(name))
        first, last = loaded[0], loaded[-1]
        if first.d != last.d:
            raise SweepError(
                f"{first.name} has d_in {first.d} and {last.name} {last.d}: features can only be compared in one space"
            )
    return compare_dictionaries(loaded, threshold)


def compare_dictionaries(dictionaries: Sequence[Dictionary], threshold: float) -> Comparison:
    """The comparison of features that lie in memory already, of one d."""
    import torch

    from sae_core.matching import match

    n = len(dictionaries)
    found = [torch.zeros(len(one.latents), dtype=torch.int64) for one in dictionaries]
    cosines = [torch.zeros(len(one.latents)) for one in dictionaries]
    pairs = []
    for a, b in combinations(range(n), 2):
        one, other = dictionaries[a].directions, dictionaries[b].directions
        ab, ba = match(one, other)
        for at, matching in ((a, ab), (b, ba)):
            found[at] += matching.found(threshold)
            cosines[at] += matching.cosine
        shared = int(ab.found(threshold).sum())
        pairs.append(Pair(
            a, b, shared, shared / len(one), shared / len(other), float(ab.cosine.mean()), float(ba.cosine.mean()),
            *_hungarian(one, other, threshold),
        ))  # fmt: skip
    latents = [
        pd.DataFrame({"sae": one.name, "latent": one.latents.numpy(), "found_in": found[at].numpy(), "of": n - 1,
                      "mean_cosine": (cosines[at] / (n - 1)).numpy()}) for at, one in enumerate(dictionaries)
    ]  # fmt: skip
    return Comparison(threshold, dictionaries, pairs, pd.concat(latents, ignore_index=True))


def _hungarian(a: "Tensor", b: "Tensor", threshold: float) -> tuple[float | None, float | None]:
    from sae_core.matching import HUNGARIAN_LATENTS, hungarian

    if max(len(a), len(b)) > HUNGARIAN_LATENTS:
        return None, None
    cosines = hungarian(a, b)[2]
    return float((cosines > threshold).float().mean()), float(cosines.mean())


# ---- reading SAEs ---------------------------------------------------------------------------------------------------


class _Finder:
    """Finds SAEs by what a user calls them, and reads each sweep's table once."""

    def __init__(self, sweep: str | None, home: str | Home | None):
        self._sweep = sweep
        self._home = home if isinstance(home, Home) else Home.resolve(home)
        self._tables: dict[str, pd.DataFrame] = {}

    def find(self, name: str) -> Dictionary:
        from penstock.pull import fetch_checkpoint, pull

        if self._sweep is None and Path(name).is_dir():
            return read_dictionary(Path(name), name)
        sweep, colon, sae_id = (self._sweep, ":", name) if self._sweep is not None else name.rpartition(":")
        with tempfile.TemporaryDirectory() as temporary:
            if name.startswith("models:/") and self._sweep is None:
                return read_dictionary(pull(name, to=Path(temporary) / "sae", home=self._home), name)
            if not colon or not sweep:
                raise SweepError(
                    f"SAE {name!r}: there is no such folder; accepted: an SAE's folder, SWEEP:SAE_ID, "
                    "models:/NAME@ALIAS, or with --sweep an id"
                )
            return read_dictionary(fetch_checkpoint(self._home, self._row(sweep, sae_id), Path(temporary))[0], name)

    def _row(self, sweep: str, sae_id: str) -> pd.Series:
        from penstock.pareto import find_sae, key_of
        from penstock.tracking import sweep_table

        if sweep not in self._tables:
            self._home.check_tracking()
            self._tables[sweep] = sweep_table(self._home, sweep)
        row = find_sae(self._tables[sweep], sae_id)
        if row["status"] != "finished":
            raise SweepError(f"SAE {key_of(row.to_dict())} is {row['status']}: only finished ones can be compared")
        return row


def read_dictionary(folder: Path, name: str) -> Dictionary:
    """The features of the SAE in a folder, ours or SAELens'. Raises `CheckpointError` for one that does not load, or
    whose latents are all dead."""
    from sae_core import SAE
    from sae_core.checkpoint import load_sparsity
    from sae_core.matching import directions, live

    sae = SAE.load(folder)
    alive = live(sae.d_sae, load_sparsity(folder))
    if not alive.any():
        raise CheckpointError(f"{name}: none of its {sae.d_sae} latents has ever fired: there is nothing to compare")
    hook_point = sae.cfg.metadata.get("hook_name_out") or sae.cfg.metadata.get("hook_name") or ""
    latents = alive.nonzero()[:, 0]
    return Dictionary(
        name, trained_as(sae.cfg), str(hook_point), sae.d_sae, latents, directions(sae.W_dec)[latents]
    )


def trained_as(cfg: "SAEConfig") -> str:
    """The architecture that an SAE was trained as, where its folder tells; else the one that it is saved as. A
    batch_topk SAE is saved as a jumprelu one, as SAELens does."""
    settings = cfg.metadata.get("sae_settings")
    trained = settings.get("architecture") if isinstance(settings, dict) else None
    return trained if isinstance(trained, str) else cfg.architecture


# ---- a sweep's seeds ------------------------------------------------------------------------------------------------


def seed_stability(storage: "Storage", saes: "Sequence[PlannedSAE]") -> dict[str, float]:
    """By SAE id, of SAEs that have siblings, the same settings at the same site with another seed: the share of live
    latents that are found again in a sibling (mutual nearest neighbours of a cosine above 0.7), averaged over the
    siblings. `saes` are finished ones. Of an SAE without a live latent there is none."""
    groups: dict[str, list[PlannedSAE]] = {}
    for sae in saes:
        settings = sae.settings.model_dump(mode="json", exclude={"seed"})
        groups.setdefault(str([sae.site.label, sae.baseline, settings]), []).append(sae)
    found: dict[str, float] = {}
    for siblings in groups.values():
        if len(siblings) > 1:
            loaded = {sae.sae_id: _stored(storage, sae) for sae in siblings}
            found |= _stability({key: features for key, features in loaded.items() if features is not None})
    return found


def _stability(loaded: "Mapping[str, Tensor]") -> dict[str, float]:
    from sae_core.matching import found_again

    shares: dict[str, list[float]] = {}
    for one, features in loaded.items():
        for other, others in loaded.items():
            if other != one:
                again = found_again(features, others, most=_SAMPLED_LATENTS)
                shares.setdefault(one, []).append(float(again.float().mean()))
    return {key: sum(values) / len(values) for key, values in shares.items()}


def _stored(storage: "Storage", sae: "PlannedSAE") -> "Tensor | None":
    with tempfile.TemporaryDirectory() as temporary:
        for name, data in storage.read_folder(f"saes/{sae.sae_id}/final").items():
            (Path(temporary) / name).write_bytes(data)
        try:
            return read_dictionary(Path(temporary), sae.sae_id).directions
        except CheckpointError:
            return None


def write_latents(comparison: Comparison, to: Path) -> None:
    """The comparison's `latents` as a Parquet file. Raises `SweepError` where it cannot be written."""
    try:
        comparison.latents.to_parquet(to, index=False)
    except OSError as error:
        raise SweepError(f"cannot write {str(to)!r}: {error.strerror or error}") from None


# ---- as text --------------------------------------------------------------------------------------------------------


def format_comparison(comparison: Comparison) -> str:
    """The SAEs, the matrix of shares and a line a pair, as aligned text."""
    numbers = [str(place + 1) for place in range(len(comparison.dictionaries))]
    shares = comparison.shares()
    rows = [
        [number, one.name, one.architecture, str(one.d_sae), str(len(one.latents)), f"{comparison.stability(one):.3f}",
         *("-" if number == numbers[at] else f"{share:.3f}" for at, share in enumerate(row))]
        for number, one, row in zip(numbers, comparison.dictionaries, shares, strict=True)
    ]  # fmt: skip
    header = ["", "SAE", "architecture", "d_sae", "live", "stability", *(f"in {number}" for number in numbers)]
    parts = [
        text_table(header, rows, right={"d_sae", "live", "stability", *header[6:]}),
        f"in N: share of the SAE's live latents found again in SAE N: as mutual nearest neighbours of a decoder cosine "
        f"above {comparison.threshold:g}\nstability: its mean over the other SAEs",
        "" if len(comparison.pairs) > _PAIRS_SHOWN else text_table(
            ["pair", "shared", "of the first", "of the second", "mean max cosine", "Hungarian", "its mean cosine"],
            [[f"{numbers[pair.a]} - {numbers[pair.b]}", str(pair.shared), f"{pair.of_a:.3f}", f"{pair.of_b:.3f}",
              f"{pair.mean_max_cosine_a:.3f} / {pair.mean_max_cosine_b:.3f}", _share(pair.hungarian_shared),
              _share(pair.hungarian_cosine)] for pair in comparison.pairs],
            right={"shared", "of the first", "of the second", "mean max cosine", "Hungarian", "its mean cosine"},
        ),
        *_remarks(comparison),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts))


def _remarks(comparison: Comparison) -> list[str]:
    from sae_core.matching import HUNGARIAN_LATENTS

    remarks = []
    if len(comparison.pairs) > _PAIRS_SHOWN:
        remarks.append(f"The {len(comparison.pairs)} pairs, with mean cosines and the Hungarian method, are in --json.")
    hook_points = sorted({one.hook_point for one in comparison.dictionaries if one.hook_point})
    if len(hook_points) > 1:
        remarks.append(f"These are of several hook points ({', '.join(hook_points)}), whose directions need not agree.")
    if any(pair.hungarian_shared is None for pair in comparison.pairs):
        remarks.append(f"The Hungarian method is left out above {HUNGARIAN_LATENTS} live latents.")
    return ["\n".join(remarks)] if remarks else []


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
