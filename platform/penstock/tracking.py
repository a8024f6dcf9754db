"""MLflow: an experiment a sweep name, a parent run a sweep, a child run an SAE.

The driver is the only writer, through one `Tracker`, in batches; everybody else reads (`find_sweep`, `sweep_table`).

- Live curves of a child, against tokens as the step: `train/loss`, `train/l0`, `train/explained_variance`,
  `train/dead_fraction`. Final figures have plain names: `l0`, `ce_recovered`, `dead_fraction`, ...; those of an SAE's
  prefixes the width before them: `prefix_256.l0`.
- Tags of a child: `sae_id`, `hook_point`, `architecture`, `status` (queued, running, finished, diverged, failed,
  stopped, pruned), `reason` where it did not finish, `proposed` (the round, where search proposed it), `on_front`,
  `on_overall_front`, `missed` and `remedy` (the spec's targets), and `baseline` for what is no candidate.
- A child's `sae/` holds its checkpoint, `kept/TOKENS/` what it was on the way, where the spec has asked for that
  (`train.keep`); the parent's artifacts are `spec.yaml`, `front.json`, `baselines.json`,
  `evaluation.parquet` (the figures of every sequence), `details.json` (curves and firing rates), the report and plots.
"""

import contextlib
import difflib
import io
import json
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from penstock.errors import SweepError
from penstock.home import Home
from penstock.mlflow_access import refusal
from penstock.pareto import key_of, mark_front
from penstock.redaction import redacted
from penstock.text import number

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

KIND = "penstock.kind"  # "sweep" or "sae"
SWEEP_ID = "penstock.sweep_id"
OPENED_AT = "penstock.opened_at_ms"
SAE_COUNT = "penstock.saes"
L0_BAND = "penstock.l0_band"
LOGGED_TOKENS = "penstock.logged_tokens"  # the high-water mark of a child's curves
NOT_FINITE = "penstock.not_finite"
PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
LOGGED_TABLES = "mlflow.loggedArtifacts"  # what the UI offers as tables

SAE_FOLDER, KEPT_FOLDER = "sae", "kept"
FRONT_FILE, BASELINES_FILE, SPEC_FILE = "front.json", "baselines.json", "spec.yaml"
ROWS_FILE, DETAILS_FILE = "evaluation.parquet", "details.json"
FIGURES = ["l0", "ce_recovered", "kl_recovered", "explained_variance", "dead_fraction", "ce_increase"]
VERDICTS = ["missed", "remedy"]  # an SAE's targets, in words

SPARSITY_SETTINGS = ("target_l0", "k", "l1_coefficient", "l0_coefficient")  # the first that is set fixes the L0
NOT_APPLICABLE = ("", "n/a")  # of a number and of a text
_FOR_PLOTS = {"sparsity_value", "sparsity_by"}  # parameters that repeat others under one name
_RUN_STATUS = {"finished": "FINISHED", "diverged": "FAILED", "failed": "FAILED", "stopped": "KILLED",
               "pruned": "KILLED"}  # fmt: skip
_SETTLED = ("finished", "diverged", "pruned")  # training again in this sweep would give the same
_FOR_THE_UI = {"mlflow.experimentKind": "custom_model_development"}  # else it opens on pages for chat applications
_BATCH_METRICS, _BATCH_PARAMS, _TAG_CHARACTERS, _PARAM_CHARACTERS = 1000, 100, 4000, 5000  # MLflow's limits


@dataclass(frozen=True)
class TrackedSAE:
    """What is known of an SAE before it is trained. `baseline` is "frozen_decoder" for the one that is no candidate;
    `proposed` is the round (1, 2, ...) in which search proposed it, None for an SAE of the spec."""

    sae_id: str
    hook_point: str
    params: Mapping[str, Any]
    baseline: str | None = None
    proposed: int | None = None

    @property
    def title(self) -> str:
        """What the UI calls the run: `topk k=32 · blocks.3.hook_resid_post · d_sae=1024 seed=0`. What SAEs differ in
        comes first: a table of runs has room for some twenty characters."""

        def of(*names: str) -> str:
            given = [(name, self.params[name]) for name in names if self.params.get(name) is not None]
            return " ".join(f"{name}={number(value)}" for name, value in given)

        kind = self.baseline or str(self.params.get("architecture", "sae"))
        first = f"{kind} {of(*SPARSITY_SETTINGS)}".rstrip()
        return " · ".join(filter(None, [first, self.hook_point, of("d_sae", "seed")]))

    @property
    def sparsity(self) -> dict[str, Any]:
        """What sets the SAE's L0, under names that every architecture has: a plot of runs needs one axis for all."""
        name = next((name for name in SPARSITY_SETTINGS if self.params.get(name) is not None), None)
        return {} if name is None else {"sparsity_value": self.params[name], "sparsity_by": name}


# ---- writing --------------------------------------------------------------------------------------------------------


class Tracker:
    """The only writer of a sweep's runs. Everything may be called again: a replay or a new driver repeats nothing."""

    def __init__(self, home: Home, name: str, sweep_id: str) -> None:
        self._home, self._name, self._sweep_id = home, name, sweep_id
        self._client: MlflowClient
        self._experiment_id, self._parent = "", ""
        self._saes: dict[str, TrackedSAE] = {}  # by sae_id, as the next six
        self._runs: dict[str, str] = {}
        self._params: dict[str, set[str]] = {}
        self._marks: dict[str, int] = {}
        self._statuses: dict[str, str] = {}
        self._on_front: dict[str, tuple[bool, bool]] = {}
        self._ended: set[str] = set()

    def open(self, resolved_spec_yaml: str, params: Mapping[str, Any], saes: Sequence[TrackedSAE]) -> str:
        """Find the sweep's runs again or create them, take over what a dead driver left, and return the parent's id.

        A parameter keeps the first value it was given, as MLflow demands; `spec.yaml` is always the latest. SAEs that
        finished or diverged stay ended; the others wait as `queued`. Raises `SweepError` when MLflow cannot be used.
        """
        with reported(self._home, f"the sweep {self._name!r}"):
            _ensure_database(self._home)
            self._client = connect(self._home)
            self._experiment_id = experiment = self._experiment()
            tags = {
                KIND: "sweep", SWEEP_ID: self._sweep_id, RUN_NAME: f"{self._name} {self._sweep_id[:8]}",
                OPENED_AT: str(_now_ms()), SAE_COUNT: _candidates(saes),
                L0_BAND: _band_text(resolved_spec_yaml), "status": "running",
            }  # fmt: skip
            self._open_parent(experiment, tags, params)
            self._client.log_text(self._parent, resolved_spec_yaml, SPEC_FILE)
            self._open_children(saes)
            self._end_leftovers()
        return self._parent

    def add(self, saes: Sequence[TrackedSAE]) -> None:
        """Runs for further SAEs of the open sweep, those that search proposes. Known ones are left as they are."""
        with reported(self._home):
            self._open_children([sae for sae in saes if sae.sae_id not in self._runs])
            self._write(self._parent, tags={SAE_COUNT: _candidates(self._saes.values())})

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(self._name)
        if experiment is None:
            try:
                return self._client.create_experiment(self._name, self._home.artifact_location, dict(_FOR_THE_UI))
            except MlflowException:  # another driver was quicker
                experiment = self._client.get_experiment_by_name(self._name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage == "deleted":
            self._client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _open_parent(self, experiment: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
        found = list(_search(self._client, [experiment], {KIND: "sweep", SWEEP_ID: self._sweep_id}))
        if found:
            parent = max(found, key=_opened_at)
            self._parent, known = parent.info.run_id, parent.data.params
            if parent.info.status != "RUNNING":
                self._client.update_run(self._parent, status="RUNNING")
            self._write(self._parent, tags=tags, params=_new_params(params, known))
        else:
            self._parent = self._client.create_run(experiment, tags=dict(tags)).info.run_id
            self._write(self._parent, params=_new_params(params, {}))

    def _open_children(self, saes: Sequence[TrackedSAE]) -> None:
        found = {run.data.tags["sae_id"]: run for run in self._children()}
        for sae in saes:
            self._saes[sae.sae_id] = sae
            if sae.sae_id in found:
                self._take_over(sae, found[sae.sae_id])
            else:
                self._create_child(sae)
        self._write_params()

    def _write_params(self) -> None:
        """Each SAE's own settings, and what plots of many runs need beside them: MLflow's parallel coordinates leave
        out a run that lacks one of their parameters, so that every axis of the sweep stands in every run. A number that
        an architecture does not have is empty, which those plots draw at 0: with a word among them they would take the
        axis for one of names, and leave out the minority."""
        axes = sweep_axes([sae.params for sae in self._saes.values() if sae.baseline is None])
        for sae_id, sae in self._saes.items():
            lacking = {name: absent for name, absent in axes.items() if sae.params.get(name) is None}
            params = {"hook_point": sae.hook_point, **sae.params, **sae.sparsity, **lacking, "proposed": sae.proposed}
            new = _new_params(params, self._params[sae_id])
            if new:
                self._write(self._runs[sae_id], params=new)
                self._params[sae_id] |= new.keys()

    def _children(self) -> Iterator["Run"]:
        for run in _search(self._client, [self._experiment_id], {PARENT: self._parent}):
            if "sae_id" in run.data.tags:
                yield run

    def _end_leftovers(self) -> None:
        """End the runs of SAEs that are no part of the sweep any more."""
        for run in self._children():
            if run.data.tags["sae_id"] not in self._runs and run.info.status == "RUNNING":
                self._client.set_tag(run.info.run_id, "status", "stopped")
                self._client.set_terminated(run.info.run_id, "KILLED")

    def _create_child(self, sae: TrackedSAE) -> None:
        tags = {
            KIND: "sae", SWEEP_ID: self._sweep_id, PARENT: self._parent, RUN_NAME: sae.title, "sae_id": sae.sae_id,
            "hook_point": sae.hook_point, "architecture": str(sae.params.get("architecture", "")),
            "status": "queued", "on_front": "false",
        }  # fmt: skip
        if sae.baseline is not None:
            tags["baseline"] = sae.baseline
        if sae.proposed is not None:
            tags["proposed"] = str(sae.proposed)
        run_id = self._client.create_run(self._experiment_id, tags=tags).info.run_id
        self._params[sae.sae_id] = set()
        self._remember(sae.sae_id, run_id, mark=-1, status="queued", on_front=(False, False))

    def _take_over(self, sae: TrackedSAE, run: "Run") -> None:
        tags, run_id = run.data.tags, run.info.run_id
        status = tags.get("status", "queued")
        mark = int(tags.get(LOGGED_TOKENS, -1))
        if status not in _SETTLED:
            # MLflow writes a batch's metrics before its tags: a driver that died in between left the mark behind.
            mark = max([mark, *self._logged_steps(run)])
            if run.info.status != "RUNNING":
                self._client.update_run(run_id, status="RUNNING")
            if status != "queued":
                status = "queued"
                self._client.set_tag(run_id, "status", status)
        elif run.info.status != _RUN_STATUS[status]:
            self._client.set_terminated(run_id, _RUN_STATUS[status])
        self._params[sae.sae_id] = set(run.data.params)
        front = tags.get("on_front") == "true", tags.get("on_overall_front") == "true"
        self._remember(sae.sae_id, run_id, mark=mark, status=status, on_front=front)
        if status in _SETTLED:
            self._ended.add(sae.sae_id)

    def _logged_steps(self, run: "Run") -> Iterator[int]:
        for key in run.data.metrics:
            if key.startswith("train/"):
                yield max(metric.step for metric in self._client.get_metric_history(run.info.run_id, key))

    def _remember(self, sae_id: str, run_id: str, *, mark: int, status: str, on_front: tuple[bool, bool]) -> None:
        self._runs[sae_id], self._marks[sae_id], self._statuses[sae_id] = run_id, mark, status
        self._on_front[sae_id] = on_front

    def log_rows(self, sae_id: str, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Add points to an SAE's curves: each row is `{"tokens": int, "metrics": {name: float}}`. Returns the rows that
        were new.

        A name without a `/` becomes `train/<name>`. Rows at or before the last one logged are left out, also those
        that an earlier driver logged; so are values that are not finite, the first of which the run's tag names.
        """
        from mlflow.entities import Metric

        now = _now_ms()
        batch: list[Any] = []
        mark, not_finite = self._marks[sae_id], None
        new: list[Mapping[str, Any]] = []
        for row in sorted(rows, key=lambda row: row["tokens"]):
            if row["tokens"] <= mark:
                continue
            new.append(row)
            if len(batch) + len(row["metrics"]) > _BATCH_METRICS:
                self._write_rows(sae_id, batch, mark, not_finite)
                batch = []
            mark = int(row["tokens"])
            for name, value in row["metrics"].items():
                key = name if "/" in name else f"train/{name}"
                if math.isfinite(value):
                    batch.append(Metric(key, float(value), now, mark))
                elif not_finite is None:
                    not_finite = f"{key} was {value} at {mark} tokens"
        if mark > self._marks[sae_id]:
            self._write_rows(sae_id, batch, mark, not_finite)
        return new

    def _write_rows(self, sae_id: str, batch: Sequence[Any], mark: int, not_finite: str | None) -> None:
        tags = {LOGGED_TOKENS: str(mark)}
        if self._statuses[sae_id] == "queued":
            tags["status"] = self._statuses[sae_id] = "running"
        if not_finite is not None:
            tags[NOT_FINITE] = not_finite
        self._write(self._runs[sae_id], metrics=batch, tags=tags)
        self._marks[sae_id] = mark

    def finish_sae(
        self,
        sae_id: str,
        *,
        status: str,
        metrics: Mapping[str, float],
        folder: Path | None,
        reason: str | None = None,
        kept: Path | None = None,
    ) -> None:
        """End an SAE's run: its final figures, its checkpoint as the artifact `sae/`, and why it ended. `kept` is a
        folder of checkpoints of the same kind, by the tokens that they had been trained on.

        `status` is finished, diverged, failed, stopped or pruned. A run that has already ended so is left as it is: it
        is ended last, so an ended run is a complete one.
        """
        from mlflow.entities import Metric

        if sae_id in self._ended and self._statuses[sae_id] == status:
            return
        run_id, now = self._runs[sae_id], _now_ms()
        step = max(self._marks[sae_id], 0)
        final = [Metric(name, float(value), now, step) for name, value in metrics.items() if math.isfinite(value)]
        if folder is not None:
            self._client.log_artifacts(run_id, str(folder), SAE_FOLDER)
        if kept is not None:
            self._client.log_artifacts(run_id, str(kept), KEPT_FOLDER)
        tags = {"status": status} | ({"reason": reason} if reason else {})
        self._write(run_id, metrics=final, tags=tags)
        self._client.set_terminated(run_id, _RUN_STATUS[status])
        self._statuses[sae_id] = status
        self._ended.add(sae_id)

    def finish_sweep(
        self,
        *,
        status: str,
        front: pd.DataFrame,
        baselines: pd.DataFrame,
        cost: Mapping[str, float],
        files: Sequence[Path],
    ) -> None:
        """End the parent: the SAEs on the front (`front` has sae_id, on_front, on_overall_front), the tables, the cost
        (metrics named `cost/...`) and files such as plots. `status` is finished, failed or stopped.
        """
        from mlflow.entities import Metric

        self._tag_front(front)
        self._log_verdicts(front)
        for file in files:
            self._client.log_artifact(self._parent, str(file))
        for name, table in ((FRONT_FILE, front), (BASELINES_FILE, baselines)):
            # Not `log_table`, which appends to the table of an earlier attempt.
            self._client.log_text(self._parent, table.to_json(orient="split", index=False, double_precision=15), name)
        now = _now_ms()
        spent = [Metric(key if key.startswith("cost/") else f"cost/{key}", float(value), now, 0)
                 for key, value in cost.items() if math.isfinite(value)]  # fmt: skip
        tables = [{"path": name, "type": "table"} for name in (FRONT_FILE, BASELINES_FILE)]
        self._write(self._parent, metrics=spent, tags={"status": status, LOGGED_TABLES: json.dumps(tables)})
        self._client.set_terminated(self._parent, _RUN_STATUS[status])

    def interrupt(self, reason: str, status: str = "interrupted") -> None:
        """End what has not ended, as killed and with the reason: the sweep was `interrupted`, or `stopped` by somebody,
        and may go on another time."""
        for sae_id, run_id in self._runs.items():
            if sae_id not in self._ended:
                self._write(run_id, tags={"status": status})
                self._client.set_terminated(run_id, "KILLED")
        self._write(self._parent, tags={"status": status, "reason": redacted(reason)})
        self._client.set_terminated(self._parent, "KILLED")

    def _log_verdicts(self, front: pd.DataFrame) -> None:
        """What only the whole table says of an SAE: the targets it missed, how many latents other seeds find again."""
        from mlflow.entities import Metric

        for record in front.to_dict("records"):
            sae_id, prefix = record["sae_id"], _prefix_text(record)
            tags = {f"{prefix}{name}": record[name] for name in VERDICTS if isinstance(record.get(name), str)}
            stability = record.get("seed_stability", math.nan)
            step = max(self._marks[sae_id], 0)
            metrics = [Metric(f"{prefix}seed_stability", float(stability), _now_ms(), step)] if stability >= 0 else []
            self._write(self._runs[sae_id], metrics=metrics, tags=tags)

    def _tag_front(self, front: pd.DataFrame) -> None:
        marked = {row["sae_id"]: (bool(row.get("on_front")), bool(row.get("on_overall_front")))
                  for row in front.to_dict("records") if key_of(row) == row["sae_id"]}  # fmt: skip
        for sae_id, run_id in self._runs.items():
            flags = marked.get(sae_id, (False, False))
            if flags != self._on_front[sae_id]:
                names = ("on_front", "on_overall_front")
                self._write(run_id, tags={name: str(flag).lower() for name, flag in zip(names, flags, strict=True)})
                self._on_front[sae_id] = flags

    def _write(
        self,
        run_id: str,
        *,
        metrics: Sequence[Any] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Param, RunTag

        settings = [Param(key, value) for key, value in (params or {}).items()]
        for start in range(0, max(len(settings) - _BATCH_PARAMS, 0), _BATCH_PARAMS):
            self._client.log_batch(run_id, params=settings[start : start + _BATCH_PARAMS])
        last = settings[max(len(settings) - 1, 0) // _BATCH_PARAMS * _BATCH_PARAMS :]
        labels = [RunTag(key, value[:_TAG_CHARACTERS]) for key, value in (tags or {}).items()]
        if metrics or last or labels:
            self._client.log_batch(run_id, metrics=list(metrics), params=last, tags=labels)


def sweep_axes(settings: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The settings that differ among the SAEs that have them, and what stands for each in the others' runs."""
    values: dict[str, list[Any]] = {}
    for params in settings:
        for name, value in params.items():
            if value is not None:
                values.setdefault(name, []).append(value)
    return {name: NOT_APPLICABLE[not all(isinstance(value, (int, float)) for value in found)]
            for name, found in values.items() if len(set(map(str, found))) > 1}  # fmt: skip


def _new_params(params: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    return {key: str(value)[:_PARAM_CHARACTERS] for key, value in params.items()
            if value is not None and key not in known}  # fmt: skip


def _band_text(resolved_spec_yaml: str) -> str:
    spec = yaml.safe_load(resolved_spec_yaml)
    band = (spec.get("select") or {}).get("l0_band") if isinstance(spec, dict) else None
    if isinstance(band, str):
        from penstock.spec import parse_band

        band = parse_band(band)
    return f"{float(band[0])}:{float(band[1])}" if band else ""


def _candidates(saes: Iterable[TrackedSAE]) -> str:
    return str(sum(sae.baseline is None for sae in saes))


def _now_ms() -> int:
    return int(time.time() * 1000)


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SweepRuns:
    """One sweep in MLflow. `l0_band` is the band that its spec takes the front in."""

    home: Home
    name: str
    sweep_id: str
    run_id: str
    experiment_id: str
    status: str
    saes: int
    started: pd.Timestamp
    l0_band: tuple[float, float] | None
    cost: Mapping[str, float]

    def children(self) -> list["Run"]:
        """The runs of its SAEs and trained baselines, in the order they were created."""
        with reported(self.home):
            found = _search(connect(self.home), [self.experiment_id], {PARENT: self.run_id})
            return sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))

    def artifact(self, name: str) -> Path | None:
        """A local copy of one of the sweep's own artifacts; None where there is none (yet)."""
        return fetch_artifact(self.home, self.run_id, name)

    def evaluation_rows(self) -> pd.DataFrame | None:
        """The figures of every sequence that the sweep's SAEs were evaluated on; None for a sweep that has none (yet).

        Columns: sae (`pareto.sae_key`), hook_point, row, document, then the sums of `sae_core.evaluation.ROW_SUMS`.
        """
        path = self.artifact(ROWS_FILE)
        return None if path is None else pd.read_parquet(path)

    def details(self) -> dict[str, Any]:
        """Training curves and firing rates by `pareto.sae_key`; empty for a sweep that has none (yet)."""
        path = self.artifact(DETAILS_FILE)
        return {} if path is None else json.loads(path.read_text(encoding="utf-8"))

    @property
    def spec(self) -> str:
        """The resolved spec, as YAML text."""
        path = self.artifact(SPEC_FILE)
        return path.read_text(encoding="utf-8") if path else ""


def find_sweep(home: Home, sweep: str) -> SweepRuns:
    """A sweep by name (the run opened last) or by id. Raises `SweepError` listing the sweeps there are."""
    sweeps = _all_sweeps(home)
    named = [runs for runs in sweeps if runs.name == sweep] or [runs for runs in sweeps if runs.sweep_id == sweep]
    if named:
        return named[0]
    names = list(dict.fromkeys(runs.name for runs in sweeps))
    if not names:
        raise SweepError(f"no sweep {sweep!r}: {place(home)} holds none yet; `penstock run SPEC` makes one")
    near = difflib.get_close_matches(sweep, names, n=len(names), cutoff=0.4)
    ordered = [*near, *(name for name in names if name not in near)]
    shown = ", ".join(ordered[:10]) + (f" and {len(ordered) - 10} more" if len(ordered) > 10 else "")
    raise SweepError(f"no sweep {sweep!r} in {place(home)}; there is {shown} (or give a sweep's id)")


def list_sweeps(home: Home) -> pd.DataFrame:
    """All sweeps, the one opened last first: name, sweep_id, status, saes, started, run_id. Empty in an unused home."""
    found = _all_sweeps(home) if has_database(home) else []
    columns = ["name", "sweep_id", "status", "saes", "started", "run_id"]
    return pd.DataFrame([[getattr(runs, column) for column in columns] for runs in found], columns=columns)


def sweep_table(home: Home, sweep: str | SweepRuns, *, with_baselines: bool = False) -> pd.DataFrame:
    """One row an SAE: sae_id, hook_point, architecture, d_sae, prefix, every other parameter, the final figures (l0,
    ce_recovered, kl_recovered, explained_variance, dead_fraction, ce_increase, their intervals `l0_low`, `l0_high`,
    ..., seed_stability), on_front, on_overall_front, dominated_by, certain, missed, remedy, status, reason, proposed,
    run_id.

    An SAE's prefixes that were evaluated follow it, each in a row with its width as `prefix` (else NaN).

    The front is taken in the spec's L0 band, from the figures there are so far: a running sweep has one, too. With
    baselines, there is a column `baseline` and a row for each that was trained.
    """
    runs = sweep if isinstance(sweep, SweepRuns) else find_sweep(home, sweep)
    every = (row for run in runs.children() for row in _rows(run))
    rows = [row for row in every if with_baselines or row["baseline"] is None]
    table = pd.DataFrame(rows)
    leading = ["sae_id", "hook_point", "architecture", "d_sae", "prefix"]
    numbers = [*FIGURES, "seed_stability", "proposed", "prefix"]
    for column in [*leading, "baseline", *numbers, *VERDICTS, "status", "reason", "run_id"]:
        if column not in table:
            table[column] = pd.Series(index=table.index, dtype=float if column in numbers else object)
    table = table.astype({"prefix": float, "proposed": float})
    is_candidate = table["baseline"].isna()
    marked = mark_front(table[is_candidate], runs.l0_band, runs.evaluation_rows())
    for flag in ("on_front", "on_overall_front", "certain"):
        table[flag] = False
        table.loc[is_candidate, flag] = marked[flag].to_numpy()
    table["dominated_by"] = pd.Series(index=table.index, dtype=object)
    table.loc[is_candidate, "dominated_by"] = marked["dominated_by"].to_numpy()
    trailing = ["on_front", "on_overall_front", "dominated_by", "certain", *VERDICTS, "status", "reason", "proposed",
                *(["baseline"] if with_baselines else []), "run_id"]  # fmt: skip
    final = {name for row in rows for name in row["final"]} | {"seed_stability"}
    others = [name for name in table if name not in {*leading, *FIGURES, *trailing, *final, "baseline", "final"}]
    extra = sorted(final - set(FIGURES))
    return table[[*leading, *others, *FIGURES, *extra, *trailing]].reset_index(drop=True)


def baseline_table(home: Home, sweep: str | SweepRuns) -> pd.DataFrame:
    """What every SAE has to beat: kind (neurons, pca, frozen_decoder), hook_point, k, l0, ce_recovered, ..."""
    runs = sweep if isinstance(sweep, SweepRuns) else find_sweep(home, sweep)
    columns = ["kind", "hook_point", "k", "l0", "ce_recovered"]
    path = runs.artifact(BASELINES_FILE)
    table = pd.DataFrame(columns=columns) if path is None else _read_split_json(path.read_text(encoding="utf-8"))
    if "kind" not in table or not (table["kind"] == "frozen_decoder").any():
        trained = sweep_table(home, runs, with_baselines=True)
        trained = trained[trained["baseline"].notna() & trained["ce_recovered"].notna()].rename(
            columns={"baseline": "kind"}
        )
        present = [column for column in [*columns, *FIGURES[2:]] if column in trained]
        parts = [part for part in (table, trained[present]) if not part.empty]
        table = pd.concat(parts, ignore_index=True) if parts else table
    return table


def fetch_artifact(home: Home, run_id: str, name: str, to: Path | None = None) -> Path | None:
    """A run's artifact (a file or a folder) as a local path, below `to` where it is given; None where it is absent.

    Without `to` the path may be the artifact itself: read it, do not write to it.
    """
    from mlflow.exceptions import MlflowException

    with reported(home):
        client = connect(home)
        if name not in [item.path for item in client.list_artifacts(run_id, os.path.dirname(name) or None)]:
            return None
        try:
            return Path(client.download_artifacts(run_id, name, None if to is None else str(to)))
        except (MlflowException, OSError) as error:
            raise SweepError(f"the artifact {name} of run {run_id} cannot be fetched: {error}") from None


def kept_tokens(home: Home, run_id: str) -> list[int]:
    """After how many tokens the SAE of a run was kept on the way, in ascending order."""
    with reported(home):
        found = [os.path.basename(item.path) for item in connect(home).list_artifacts(run_id, KEPT_FOLDER)]
    return sorted(int(name) for name in found if name.isdigit())


def _all_sweeps(home: Home) -> list[SweepRuns]:
    with reported(home):
        client = connect(home)
        experiments = {item.experiment_id: item.name for item in pages(client.search_experiments)}
        found = sorted(_search(client, list(experiments), {KIND: "sweep"}), key=_opened_at, reverse=True)
        return [_sweep_runs(home, run, experiments[run.info.experiment_id]) for run in found]


def _sweep_runs(home: Home, run: "Run", name: str) -> SweepRuns:
    tags = run.data.tags
    low, _, high = tags.get(L0_BAND, "").partition(":")
    return SweepRuns(
        home=home,
        name=name,
        sweep_id=tags[SWEEP_ID],
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        status=tags.get("status", "running"),
        saes=int(tags.get(SAE_COUNT, 0)),
        started=pd.Timestamp(run.info.start_time, unit="ms", tz="UTC"),
        l0_band=(float(low), float(high)) if high else None,
        cost={key.removeprefix("cost/"): value for key, value in run.data.metrics.items() if key.startswith("cost/")},
    )


def _rows(run: "Run") -> Iterator[dict[str, Any]]:
    """The row of an SAE, and those of its prefixes, the narrowest first."""
    tags = run.data.tags
    final: dict[int | None, dict[str, float]] = {None: {}}
    for key, value in run.data.metrics.items():
        found = re.fullmatch(r"prefix_(\d+)\.(.+)", key)
        if found:
            final.setdefault(int(found[1]), {})[found[2]] = value
        elif "/" not in key:
            final[None][key] = value
    for width in sorted(final, key=lambda width: width or 0):
        prefix = {"prefix": width}
        yield {
            **{key: _typed(value) for key, value in run.data.params.items()
               if key not in _FOR_PLOTS and value not in NOT_APPLICABLE},
            **final[width],
            **{key: tags.get(key) for key in ("sae_id", "hook_point", "architecture", "status", "reason", "baseline")},
            **{key: tags.get(f"{_prefix_text(prefix)}{key}") for key in VERDICTS},
            "proposed": tags.get("proposed"),
            **prefix,
            "run_id": run.info.run_id,
            "final": tuple(final[width]),
        }


def _prefix_text(record: Mapping[str, Any]) -> str:
    """What stands before the names of a prefix's figures in its SAE's run."""
    width = record.get("prefix")
    return "" if width is None or math.isnan(width) else f"prefix_{int(width)}."


def _typed(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _read_split_json(text: str) -> pd.DataFrame:
    return pd.read_json(io.StringIO(text), orient="split", precise_float=True)


def _opened_at(run: "Run") -> tuple[int, int]:
    return int(run.data.tags.get(OPENED_AT, 0)), run.info.start_time


# ---- MLflow itself --------------------------------------------------------------------------------------------------


def has_database(home: Home) -> bool:
    """Whether there is anything to read: False only for an SQLite database that does not exist yet."""
    uri = home.tracking_uri
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def place(home: Home) -> str:
    return str(home.path) if home.artifact_location else home.tracking_uri


def connect(home: Home) -> "MlflowClient":
    """A client, made without creating anything. Raises `SweepError` where there is no database yet."""
    if not has_database(home):
        raise SweepError(f"{place(home)} holds no sweeps yet; `penstock run SPEC` makes one, --home looks elsewhere")
    _quiet_mlflow()
    from mlflow import MlflowClient

    registry = os.environ.get("MLFLOW_REGISTRY_URI") or home.tracking_uri
    return MlflowClient(tracking_uri=home.tracking_uri, registry_uri=registry)


def _quiet_mlflow() -> None:
    """Import MLflow without its chatter: no lines about tables and runs, no progress bars, no usage statistics."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # A server with S3 behind it would send its clients there, by addresses that only the server may be able to reach.
    os.environ.setdefault("MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD", "false")
    import mlflow  # noqa: F401 -- it sets its loggers' levels when it is imported

    for name in ("mlflow.store.db", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def reported(home: Home, what: str = "it") -> Iterator[None]:
    """MLflow's own complaints as one line for the user. `what` is what is read or written."""
    _quiet_mlflow()
    from mlflow.exceptions import MlflowException
    from requests.exceptions import HTTPError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, HTTPError, SQLAlchemyError) as error:
        message = str(error).strip().splitlines()
        reason = refusal(home.tracking_uri, str(error), what) or (message[0] if message else repr(error))
        raise SweepError(redacted(f"MLflow at {home.tracking_uri} cannot be used: {reason}")) from error


def _ensure_database(home: Home) -> None:
    """Make the SQLite database where there is none: whole or not at all, and without a flush a schema change.

    MLflow builds its schema in some sixty committed steps. Built beside its place and linked into it, a killed driver
    leaves no half-made one, and of two drivers that start at once one wins.
    """
    uri = home.tracking_uri
    if not uri.startswith("sqlite:///"):
        return
    path = Path(uri.removeprefix("sqlite:///"))
    if path.exists():
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
    except OSError as error:
        raise SweepError(f"the home {str(path.parent)!r} cannot be written to: {error}") from None
    _quiet_mlflow()
    import sqlalchemy
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    def unflushed(connection: Any, _: Any) -> None:
        connection.execute("PRAGMA synchronous = OFF")

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", unflushed)
    try:
        store = SqlAlchemyStore(f"sqlite:///{temporary}", home.artifact_location or str(path.parent / "artifacts"))
        store.engine.dispose()
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(temporary, path)
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", unflushed)
        temporary.unlink(missing_ok=True)


def _search(client: "MlflowClient", experiments: Sequence[str], tags: Mapping[str, str]) -> Iterator["Run"]:
    if not experiments:
        return iter(())
    condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return pages(client.search_runs, list(experiments), filter_string=condition)


def pages(search: Any, *arguments: Any, **options: Any) -> Iterator[Any]:
    page = search(*arguments, **options)
    yield from page
    while page.token:
        page = search(*arguments, **options, page_token=page.token)
        yield from page
