"""`penstock.train(...)`: one call, no spec file. What it runs is a sweep like any other."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import BaseModel

from penstock.errors import SpecError, SweepError
from penstock.home import Home
from penstock.pareto import Band, find_sae, key_of, select
from penstock.pull import front, load_sae, pull
from penstock.spec import (
    BaselineSpec,
    DataSpec,
    ModelSpec,
    ResourceSpec,
    SweepSpec,
    TrainSpec,
    check_spec,
)
from penstock.tracking import find_sweep

if TYPE_CHECKING:
    from sae_core import SAE

SOURCE = "penstock.train"
# Whose settings may stand alone among the keywords, in this order; those of an SAE come second.
_ALONE: dict[str, type[BaseModel]] = {"train": TrainSpec, "data": DataSpec, "model": ModelSpec,
                                      "resources": ResourceSpec}  # fmt: skip
_SHORT = {"model": "name", "data": "dataset"}  # what a text in place of a section means


def train(
    *,
    home: str | Path | Home | None = None,
    address: str | None = None,
    allow_code_change: bool = False,
    **settings: Any,
) -> "Trained":
    """Train one SAE, or several on one stream of activations, and hand them back evaluated.

        penstock.train(model="demo", hook_point="blocks.4.hook_resid_post", architecture="topk", d_sae="8x", k=32,
                       tokens="2M")

    Keywords are those of a sweep's spec. A section is given by its name, as a mapping (`data={"context_size": 256}`);
    settings of `train`, `data`, `model` and `resources` may stand alone (`tokens`, `lr`, `context_size`, `dtype`,
    `gpus_per_pack`), and so may those of the SAE (`architecture`, `d_sae`, `k`, `seed`, ...), where a list is an axis:
    `k=[16, 32]` trains two. In place of the latter, `saes=[{...}, {...}]` names several kinds. `hook_point` is a name,
    {"reads": A, "writes": B} for transcoders, or with `hook_points` a list. `name` is the sweep's, "train" unless
    given. Baselines are not evaluated unless asked for, and GPUs are used where this machine has them.

    `home` is where it is kept (else `PENSTOCK_HOME`, else ./penstock-home): the same call again trains nothing and
    gives the same back, and one that was interrupted goes on. It runs on a local Ray, or on the cluster at `address`.

    Raises `SpecError` for a keyword that is not known or a value that is not accepted, and `SweepError` where an SAE
    was not trained to its end; what else is wrong with model or data is a `UserError`, too.
    """
    from penstock.plan import check_sweep

    spec, _ = check_sweep(spec_of(settings))
    where = home if isinstance(home, Home) else Home.resolve(home)
    return run_spec(spec, where, address, allow_code_change=allow_code_change)


def run_spec(spec: SweepSpec, home: Home, address: str | None = None, *, allow_code_change: bool = False) -> "Trained":
    """Run a spec that `check_sweep` has checked. Raises `SweepError` unless every SAE was trained to its end, but for
    those that `search` has pruned."""
    from penstock.storage import Storage
    from penstock.sweep import Driver

    if spec.storage is None:
        home.check_writable()
    else:
        Storage(home.storage_uri(spec.storage)).check_writable()
    home.check_tracking()
    driver = Driver(spec, home, allow_code_change)
    try:
        driver.run(address)
        trained = Trained(driver.sweep.sweep_id, spec.name, home)
    finally:
        driver.close()
    table = trained.front
    unfinished = table[~table["status"].isin(["finished", "pruned"]) & table["prefix"].isna()]
    if len(unfinished):
        reasons = "; ".join(f"{row['sae_id']} {row['status']}: {row['reason']}" for _, row in unfinished.iterrows())
        raise SweepError(
            f"sweep {spec.name} ({trained.sweep}): {len(unfinished)} of {table['prefix'].isna().sum()} SAE(s) were not "
            f"trained to their end: {reasons}; those that were are in penstock.front({trained.sweep!r})"
        )
    return trained


@dataclass(frozen=True)
class Trained:
    """What a run came to. `sweep` is its id, which `penstock front`, `pull`, `report` and `ui` know as well."""

    sweep: str
    name: str
    home: Home

    @cached_property
    def front(self) -> pd.DataFrame:
        """One row an SAE: its settings, figures and their intervals, whether it is on the front (see
        `penstock.front`)."""
        return front(self.sweep, home=self.home)

    @property
    def saes(self) -> "Mapping[str, SAE]":
        """The finished SAEs by id, in the order of `front`; each is loaded when it is asked for."""
        rows = self.front[self.front["prefix"].isna() & (self.front["status"] == "finished")]
        return _Saes(self.sweep, self.home, tuple(rows["sae_id"]))

    @cached_property
    def sae(self) -> "SAE":
        """The SAE, or of several at one hook point the best (see `best`)."""
        return self.best()

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The figures of `sae` on the report split: l0, ce_recovered (and as SAELens calls it, ce_loss_score),
        kl_recovered, explained_variance, dead_fraction, ..., and their 95% intervals (`l0_low`, `l0_high`, ...)."""
        return self.metrics_of(self._best_row(None, None, None))

    def best(
        self, hook_point: str | None = None, *, architecture: str | None = None, l0: Band | None = None
    ) -> "SAE":
        """The SAE with the highest CE recovered at a hook point (see `penstock.pull`)."""
        return load_sae(self.sweep, sae=key_of(self._best_row(hook_point, architecture, l0)), home=self.home)

    def metrics_of(self, row: str | pd.Series) -> dict[str, float]:
        """The figures of an SAE: a row of `front`, or an id."""
        row = find_sae(self.front, row) if isinstance(row, str) else row
        names = list(row.index)
        figures = {
            name: float(row[name])
            for name in names[names.index("l0") : names.index("on_front")]
            if pd.notna(row[name])
        }
        return figures | ({"ce_loss_score": figures["ce_recovered"]} if "ce_recovered" in figures else {})

    def pull(self, to: str | Path, **choice: Any) -> Path:
        """Put an SAE into a folder that SAELens reads, too: `penstock.pull` of this sweep, of `sae` unless another one
        is chosen (`hook_point`, `sae`, `architecture`, `l0`, `at`)."""
        if not {"hook_point", "sae"} & choice.keys():
            choice["sae"] = key_of(self._best_row(None, choice.pop("architecture", None), choice.pop("l0", None)))
        return pull(self.sweep, to=to, home=self.home, **choice)

    def _best_row(self, hook_point: str | None, architecture: str | None, l0: Band | None) -> pd.Series:
        table = self.front
        if hook_point is None:
            places = sorted(table["hook_point"].unique())
            if len(places) > 1:
                raise SweepError(
                    f"there are SAEs at {len(places)} hook points, and none is the best of all; accepted: "
                    f".best(hook_point=...) with one of {', '.join(places)}; .saes has all"
                )
            hook_point = places[0]
        runs = find_sweep(self.home, self.sweep)
        return select(table, hook_point, architecture, l0 or runs.l0_band, runs.evaluation_rows())

    def __repr__(self) -> str:
        return f"Trained(sweep={self.sweep!r}, name={self.name!r}, saes={len(self.saes)}, home={str(self.home.path)!r})"


@dataclass(frozen=True)
class _Saes(Mapping[str, Any]):
    sweep: str
    home: Home
    ids: tuple[str, ...]

    def __getitem__(self, sae_id: str) -> "SAE":
        if sae_id not in self.ids:
            raise KeyError(sae_id)
        return load_sae(self.sweep, sae=sae_id, home=self.home)

    def __iter__(self) -> Iterator[str]:
        return iter(self.ids)

    def __len__(self) -> int:
        return len(self.ids)


# ---- from keywords to a spec ----------------------------------------------------------------------------------------


def spec_of(settings: Mapping[str, Any]) -> SweepSpec:
    """The spec that keywords of `train` stand for. Raises `SpecError`."""
    given = {name: plain(value) for name, value in settings.items()}
    raw: dict[str, Any] = {"name": "train"}
    for name in [name for name in given if name in SweepSpec.model_fields]:
        value = given.pop(name)
        raw[name] = {_SHORT[name]: value} if name in _SHORT and isinstance(value, str) else value
    if "hook_point" in given:
        if "hook_points" in raw:
            raise SpecError(f"{SOURCE}: hook_point and hook_points are both given; accepted: one of them")
        raw["hook_points"] = [given.pop("hook_point")]
    if isinstance(raw.get("hook_points"), str | Mapping):
        raw["hook_points"] = [raw["hook_points"]]
    entry = _sae_entry(given, raw)
    for name in list(given):
        section = next((section for section, kind in _ALONE.items() if name in kind.model_fields), None)
        if section is None:
            raise _unknown(name, entry)
        held = raw.setdefault(section, {})
        if isinstance(held, dict):
            if name in held:
                raise SpecError(f"{SOURCE}: {name} is given twice, alone and in {section}; accepted: once")
            held[name] = given.pop(name)
    if entry:
        raw["saes"] = [entry]
    for name, what in (("hook_points", "hook_point"), ("saes", "architecture")):
        if name not in raw:
            raise SpecError(f"{SOURCE}: {what} is missing" + _example(what))
    if isinstance(raw.setdefault("train", {}), dict) and "tokens" not in raw["train"]:
        raise SpecError(f"{SOURCE}: tokens is missing: how many the SAE is trained on, like tokens='2M'")
    raw.setdefault("baselines", BaselineSpec(k=[]).model_dump())
    if isinstance(raw.setdefault("resources", {}), dict):
        raw["resources"] = {**local_gpus(), **raw["resources"]}
    return check_spec(raw, SOURCE)


def local_gpus(device: str | None = None) -> dict[str, float]:
    """Resources with which model host and pack share this machine's GPU, or have one each; none where there is none."""
    import torch

    gpus = torch.cuda.device_count() if device is None or device.startswith("cuda") else 0
    share = {0: 0.0, 1: 0.5}.get(gpus, 1.0)
    return {"gpus_per_host": share, "gpus_per_pack": share} if gpus else {}


def _sae_entry(given: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the SAE among the keywords, taken out of them."""
    from sae_core.architectures import ARCHITECTURES

    if "saes" in raw:
        if "architecture" in given:
            raise SpecError(f"{SOURCE}: architecture and saes are both given; accepted: one of them")
        return {}
    if "architecture" not in given:
        return {}
    named = given["architecture"]
    known: dict[str, None] = {}
    for name in named if isinstance(named, list) else [named]:
        if str(name) not in ARCHITECTURES:
            near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SpecError(f"{SOURCE}: architecture is {name!r}: {hint}accepted: {', '.join(ARCHITECTURES)}")
        known |= dict.fromkeys(ARCHITECTURES[str(name)].settings_type.model_fields)
    own = [name for name in given if name in known and name not in TrainSpec.model_fields]
    return {name: given.pop(name) for name in own}


def _unknown(name: str, entry: Mapping[str, Any]) -> SpecError:
    from sae_core.architectures import ARCHITECTURES

    named = entry.get("architecture", list(ARCHITECTURES))
    of_sae = dict.fromkeys(
        setting
        for architecture in (named if isinstance(named, list) else [named])
        for setting in ARCHITECTURES[str(architecture)].settings_type.model_fields
    )
    groups = {
        "sections": [*(field for field in SweepSpec.model_fields if field != "hook_points"), "hook_point(s)"],
        **{f"of {section}": list(kind.model_fields) for section, kind in _ALONE.items()},
        f"of the SAE ({named if isinstance(named, str) else 'any architecture'})": list(of_sae),
        "of the call": ["home", "address", "allow_code_change"],
    }
    every = ["hook_point", *(known for group in groups.values() for known in group)]
    near = difflib.get_close_matches(name, every, n=1)
    hint = f"did you mean `{near[0]}`? " if near else ""
    accepted = "; ".join(f"{label}: {', '.join(dict.fromkeys(group))}" for label, group in groups.items())
    return SpecError(f"{SOURCE}: unknown keyword `{name}`; {hint}accepted are {accepted}")


def _example(what: str) -> str:
    return {
        "hook_point": ": where the SAE reads, like hook_point='blocks.4.hook_resid_post'",
        "architecture": ": what is trained, like architecture='topk', d_sae='8x', k=32, or saes=[{...}, ...]",
    }[what]


def plain(value: Any) -> Any:
    """Tuples as lists and paths as texts, as YAML would have them; numbers of numpy and torch as Python's."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", exclude_unset=True)
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if getattr(value, "ndim", None) == 0 else value
