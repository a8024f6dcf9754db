"""The winners of a sweep as registered models of MLflow, `<sweep>.<hook point>`, and what is read from there.

The versions of such a model are the SAEs that were on the front of that hook point; an SAE is one version, however
often its sweep is run. Its artifact is the checkpoint that its run holds, in SAELens' format, stored once. Aliases:
`best` is what `penstock pull --hook-point` gives, `l0-50` the front's SAE with an L0 of 50. They move with the front;
those that users set are left alone.
"""

import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.errors import SweepError, UserError
from penstock.home import Home
from penstock.identity import content_id
from penstock.notes import figures_table, load_code, write_notes
from penstock.pareto import key_of, kind_of, select
from penstock.sites import ARROW
from penstock.tracking import (
    FIGURES,
    SAE_FOLDER,
    SWEEP_ID,
    SweepRuns,
    connect,
    find_sweep,
    pages,
    reported,
    sweep_table,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

BEST = "best"
SWEEP, HOOK_POINT, SAE_KEY, ALIASES = "penstock.sweep", "penstock.hook_point", "penstock.sae", "penstock.aliases"
SCHEME = "models:/"

_log = logging.getLogger("penstock")


@dataclass(frozen=True)
class Winner:
    """A registered version: `uri` is the `models:/` address that names it by the most telling of its aliases."""

    uri: str
    version: str
    aliases: tuple[str, ...]


# ---- writing --------------------------------------------------------------------------------------------------------


def hand_over(home: Home, sweep: str) -> None:
    """What a finished sweep leaves its readers in MLflow: its winners as registered models, and notes in every run.

    A registry that refuses costs the sweep nothing but its models: that is logged as a warning.
    """
    runs = find_sweep(home, sweep)
    table = sweep_table(home, runs)
    winners: dict[str, Winner] = {}
    try:
        winners = register(runs, table)
    except UserError as error:
        _log.warning("the SAEs on the front of %s are not registered as models: %s", runs.name, error)
    write_notes(runs, table, {key: winner.uri for key, winner in winners.items()})


def register(runs: SweepRuns, table: pd.DataFrame) -> dict[str, Winner]:
    """Register the SAEs on a sweep's front, and set the aliases. Returns them by `pareto.sae_key`.

    `table` is the sweep's (see `tracking.sweep_table`). Nothing is registered twice. Raises `SweepError`.
    """
    with reported(runs.home):
        client = connect(runs.home)
        protocol = client.get_run(runs.run_id).data.params.get("protocol", "")
        children = {run.info.run_id: run for run in runs.children()}
        rows = runs.evaluation_rows()
        winners: dict[str, Winner] = {}
        for hook_point, at_hook in table.groupby("hook_point", sort=False):
            front = at_hook[at_hook["on_front"] & (at_hook["status"] == "finished")]
            if not front.empty:
                best = key_of(select(front, str(hook_point), None, runs.l0_band, rows).to_dict())
                shelf = _Shelf(client, runs, str(hook_point), protocol)
                winners |= shelf.put(front.to_dict("records"), best, children)
        return winners


def model_name(sweep: str, hook_point: str) -> str:
    """The registered model's name: `demo.blocks.3.hook_resid_post`, `demo.READS-to-WRITES` of a transcoder. MLflow
    and the addresses that it parses allow a part of the characters only; the others become `_`."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", f"{sweep}.{hook_point.replace(ARROW, '-to-')}")


def aliases_of(front: Sequence[Mapping[str, Any]], best: str) -> dict[str, str]:
    """{alias: `sae_key`} for a front's rows: `best`, and `l0-50` by the rounded L0; of several with the same one the
    highest CE recovered has it, the next is `l0-50-2`."""
    named = {BEST: best}
    for record in sorted(front, key=lambda record: (-record["ce_recovered"], key_of(record))):
        alias = plain = f"l0-{round(record['l0'])}"
        rank = 1
        while alias in named:
            rank += 1
            alias = f"{plain}-{rank}"
        named[alias] = key_of(record)
    return named


class _Shelf:
    """The registered model of one hook point of one sweep name."""

    def __init__(self, client: "MlflowClient", runs: SweepRuns, hook_point: str, protocol: str) -> None:
        self._client, self._runs, self._hook_point, self._protocol = client, runs, hook_point, protocol
        self._model = self._find_or_create()

    def put(
        self, front: Sequence[Mapping[str, Any]], best: str, children: Mapping[str, "Run"]
    ) -> dict[str, Winner]:
        name = self._model.name
        there: dict[str, ModelVersion] = {}
        for version in sorted(_versions(self._client, name), key=lambda version: int(version.version)):
            if SAE_KEY in version.tags and self._is_whole(version, children):
                there[version.tags[SAE_KEY]] = version
        numbers = {}
        for record in sorted(front, key=lambda record: record["l0"]):
            key = key_of(record)
            numbers[key] = self._put_version(record, there.get(key), children[record["run_id"]])
        aliases = aliases_of(front, best)
        self._set_aliases({alias: numbers[key] for alias, key in aliases.items()})
        winners = {}
        for key, number in numbers.items():
            own = tuple(alias for alias, named in aliases.items() if named == key)
            winners[key] = Winner(f"{SCHEME}{name}@{own[0]}", number, own)
        return winners

    def _find_or_create(self) -> "RegisteredModel":
        """The model by its plain name; where somebody else's has that name, by one with a hash behind it."""
        from mlflow.exceptions import MlflowException

        owner = {SWEEP: self._runs.name, HOOK_POINT: self._hook_point}
        plain = model_name(self._runs.name, self._hook_point)
        for name in (plain, f"{plain}-{content_id(owner)[:8]}"):
            model = _find(self._client, name)
            if model is None:
                try:
                    self._client.create_registered_model(name, owner, self._about_model(name))
                except MlflowException:  # another driver was quicker, or something else has the name
                    pass
                model = _find(self._client, name)
            if model is not None and owner.items() <= model.tags.items():
                return model
        raise SweepError(f"the names {plain} and {name} of registered models are taken by something else")

    def _is_whole(self, version: "ModelVersion", children: Mapping[str, "Run"]) -> bool:
        """Whether the run that holds a version's checkpoint is still there: one that was deleted takes it along."""
        from mlflow.exceptions import MlflowException

        if version.run_id in children:
            return True
        try:
            return self._client.get_run(version.run_id).info.lifecycle_stage == "active"
        except MlflowException:
            return False

    def _put_version(self, record: Mapping[str, Any], version: "ModelVersion | None", run: "Run") -> str:
        tags, name = self._tags(record), self._model.name
        if version is None:
            source = f"{run.info.artifact_uri.rstrip('/')}/{self._checkpoint(record, run)}"
            version = self._client.create_model_version(name, source, run.info.run_id, tags=tags, await_creation_for=0)
        if not version.description:
            about = self._about_version(record, f"{SCHEME}{name}/{version.version}")
            self._client.update_model_version(name, version.version, about)
        for key, value in tags.items():
            if version.tags.get(key) != value:
                self._client.set_model_version_tag(name, version.version, key, value)
        return str(version.version)

    def _checkpoint(self, record: Mapping[str, Any], run: "Run") -> str:
        """The artifact of the run that holds the SAE. A prefix's is cut off now: only winners are kept so."""
        if pd.isna(record["prefix"]):
            return SAE_FOLDER
        from penstock.pull import fetch_checkpoint

        artifact = f"{SAE_FOLDER}-{int(record['prefix'])}"
        with tempfile.TemporaryDirectory() as temporary:
            folder, _ = fetch_checkpoint(self._runs.home, pd.Series(record), Path(temporary))
            self._client.log_artifacts(run.info.run_id, str(folder), artifact)
        return artifact

    def _set_aliases(self, wanted: Mapping[str, str]) -> None:
        name, tags = self._model.name, self._model.tags
        for alias, number in wanted.items():
            if str(self._model.aliases.get(alias)) != number:
                self._client.set_registered_model_alias(name, alias, number)
        for alias in set(filter(None, tags.get(ALIASES, "").split(","))) - wanted.keys():
            if alias in self._model.aliases:
                self._client.delete_registered_model_alias(name, alias)
        ours = ",".join(sorted(wanted))
        if tags.get(ALIASES) != ours:
            self._client.set_registered_model_tag(name, ALIASES, ours)

    def _tags(self, record: Mapping[str, Any]) -> dict[str, str]:
        return {
            SAE_KEY: key_of(record), SWEEP_ID: self._runs.sweep_id, "architecture": str(record["architecture"]),
            "d_sae": str(int(record["d_sae"] if pd.isna(record["prefix"]) else record["prefix"])),
            **{name: f"{record[name]:.6g}" for name in FIGURES if pd.notna(record.get(name))},
            **({"protocol": self._protocol} if self._protocol else {}),
        }  # fmt: skip

    def _about_version(self, record: Mapping[str, Any], uri: str) -> str:
        return (
            f"{kind_of(record)} SAE `{key_of(record)}` of the sweep `{self._runs.name}`, at `{self._hook_point}`.\n\n"
            f"{figures_table(record, self._protocol)}\n\n{load_code(uri)}\n"
        )

    def _about_model(self, name: str) -> str:
        return (
            f"The SAEs on the Pareto front of `{self._hook_point}` in the sweep `{self._runs.name}`. `{BEST}` is the "
            "one to take unless you know better, `l0-50` the one with an L0 of 50; set aliases of other names "
            f"yourself.\n\n{load_code(f'{SCHEME}{name}@{BEST}')}\n"
        )


# ---- reading --------------------------------------------------------------------------------------------------------


def is_model_uri(text: str) -> bool:
    return text.startswith("models:")


def find_version(home: Home, uri: str) -> "ModelVersion":
    """The version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `models:/NAME/latest` means. Raises
    `SweepError`, saying what there is."""
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+|latest))", uri)
    if parts is None:
        raise SweepError(f"model {uri!r}: accepted is models:/NAME@ALIAS, models:/NAME/VERSION or models:/NAME/latest")
    name, alias, number = parts.groups()
    with reported(home):
        client = connect(home)
        model = _find(client, name)
        if model is None:
            names = sorted(model.name for model in pages(client.search_registered_models))
            raise SweepError(f"model {uri!r}: no registered model {name!r}; there is {_listed(names)}")
        versions = {int(version.version): version for version in _versions(client, name)}
        if alias is not None:
            if alias not in model.aliases:
                there = _listed(sorted(model.aliases))
                raise SweepError(f"model {uri!r}: {name} has no alias {alias!r}; it has {there}")
            return versions[int(model.aliases[alias])]
        wanted = max(versions, default=0) if number == "latest" else int(number)
        if wanted not in versions:
            raise SweepError(f"model {uri!r}: {name} has no version {number}; it has {_listed(sorted(versions))}")
        return versions[wanted]


def fetch_version(home: Home, version: "ModelVersion", to: Path) -> Path:
    """A local copy of a version's artifact below `to`. Raises `SweepError`."""
    import mlflow
    from mlflow.exceptions import MlflowException

    with reported(home):
        source = connect(home).get_model_version_download_uri(version.name, version.version)
        try:
            fetched = mlflow.artifacts.download_artifacts(source, dst_path=str(to), tracking_uri=home.tracking_uri)
        except (MlflowException, OSError) as error:
            raise SweepError(
                f"the files of model {version.name} version {version.version} cannot be fetched from {source}: {error}"
            ) from None
    return Path(fetched)


def _find(client: "MlflowClient", name: str) -> "RegisteredModel | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    quoted = name.replace("'", "''")
    return list(pages(client.search_model_versions, f"name = '{quoted}'"))


def _listed(names: Sequence[Any]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return (", ".join(map(str, names[:10])) or "none") + more
