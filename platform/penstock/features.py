"""`penstock features`: dashboards of whole SAEs, of a sweep or from folders of any known format.

Tokens of the `report` split, which nothing was trained on, stream through the SAEs on model hosts, or in this process.
SAEs of several hook points share the forward passes. Slices of rows are the same however many hosts there are, and what
comes of them is merged exactly (see `sae_core.analysis.features`), so that the result is the same, too.

What is kept of an SAE is bounded by a budget. Where all latents at once would pass it, they are done in groups, with a
further pass over the tokens for each; the log says so.
"""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penstock import __version__
from penstock.errors import CheckpointError, DataError, SweepError
from penstock.evaluate import Asked, Hosts, resolve, say, store_asked_for
from penstock.feature_work import FeatureWork, Group, LatentsDone, LatentsWork, RowsDone, RowsWork
from penstock.home import Home
from penstock.identity import content_id
from penstock.pareto import Band, find_sae, key_of, of_architecture, resolve_hook_point, select
from penstock.sae_folders import REPORT_TOKENS, by_their_word, load_folder
from penstock.sites import Site
from penstock.slices import STATUS_SECONDS, over_hosts
from penstock.spec import ResourceSpec, SweepSpec
from penstock.splits import Split
from penstock.subjects import load_subject
from penstock.tokens import TokenStore, load_tokenizer
from penstock.tracking import SweepRuns, connect, find_sweep, reported, sweep_table
from sae_core import SAE
from sae_core.analysis.feature_files import FeatureWriter, is_features, read_features
from sae_core.analysis.features import (
    BINS,
    FeatureSettings,
    LatentLogits,
    MergedFeatures,
    example_tables,
    latent_groups,
    latents_table,
)
from sae_core.errors import reason_of

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 500_000  # unless asked for otherwise, or where the split has fewer
SLICE_TOKENS = 16_384
BUDGET_GB = 2.0
_LATENTS_AT_ONCE = 1024  # whose logits and neighbours are one piece of work
_LEAST_LATENTS = 64  # of a pass: the SAE is run anew for each
_SPLIT: Split = "report"
_METADATA = (
    "model_name", "model_processing", "model_dtype", "model_from_pretrained_kwargs", "hook_head_index", "dataset_path",
    "context_size", "prepend_bos", "neuronpedia_id", "source",
)  # fmt: skip


@dataclass(frozen=True)
class Which:
    """Which SAE of a sweep: one by its id (`ID[WIDTH]` for a prefix), or the best of a hook point; the best of each
    hook point where neither is given. `architecture` and `l0` narrow the choice down."""

    sae: str | None = None
    hook_point: str | None = None
    architecture: str | None = None
    l0: Band | None = None


@dataclass(frozen=True)
class Workers:
    """Where the work is done: in this process for one worker without a cluster, else on model hosts. `n` None: one, or
    on a cluster as many as the sweep's spec asks for. `gpus` of each host; None as the spec says, and for folders what
    this machine has."""

    n: int | None = None
    address: str | None = None
    gpus: float | None = None

    @property
    def on_a_cluster(self) -> bool:
        return self.address is not None or "RAY_ADDRESS" in os.environ

    @property
    def in_process(self) -> bool:
        return not self.on_a_cluster and self.n in (None, 1)

    def resources(self, resources: ResourceSpec) -> ResourceSpec:
        changes = {"model_hosts": self.n, "gpus_per_host": self.gpus}
        return resources.model_copy(update={name: value for name, value in changes.items() if value is not None})


@dataclass(frozen=True)
class _Looked:
    """An SAE to look at, and the folder its features go to. `about` is its section of about.json."""

    name: str
    sae: SAE
    site: Site
    folder: Path
    about: Mapping[str, Any]
    is_foreign: bool = False


@dataclass(frozen=True)
class _Ground:
    """What SAEs are looked at on: rows 0 to `n_rows` of a store's report split."""

    spec: SweepSpec
    home: Home
    store: TokenStore
    n_rows: int
    settings: FeatureSettings
    workers: Workers
    budget_gb: float

    @property
    def about_data(self) -> dict[str, Any]:
        data = self.spec.data
        return {
            "dataset": data.label,
            "split": _SPLIT,
            "context_size": self.store.context_size,
            "bos": data.bos,
            "rows": self.n_rows,
            "exclude": data.exclude.model_dump(),
            "store": self.store.id,
        }

    def tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """Of ascending rows, int32 [n, context]."""
        found = np.empty((len(rows), self.store.context_size), np.int32)
        at_once = 4096
        for block in np.unique(rows // at_once):
            here = rows // at_once == block
            stop = min(self.store.n_rows(_SPLIT), int(block + 1) * at_once)
            found[here] = self.store.rows(_SPLIT, int(block) * at_once, stop)[rows[here] - block * at_once]
        return found


def features_of_sweep(
    home: Home, name: str, which: Which, asked: Asked, *, workers: Workers | None = None, to: Path | None = None,
    settings: FeatureSettings | None = None, budget_gb: float = BUDGET_GB,
) -> list[Path]:  # fmt: skip
    """Make the dashboards of one SAE of a sweep, or of the best of each hook point: a folder for each.

    `to` is the folder, or where there are several the one that they lie in; by default `features/` of the home. What is
    there complete, by the same settings, stays. Raises a `UserError` for a sweep, an SAE or tokens that are not there,
    and for a folder `to` that holds something else.
    """
    workers, settings = workers or Workers(), settings or FeatureSettings()
    runs = find_sweep(home, name)
    rows = _chosen(home, runs, which)
    sweep = resolve(home, runs)
    if to is not None and len(rows) > 1:
        _check_parent(to)
    _check_budget(budget_gb, settings)
    found = []
    for row in rows:
        key = key_of(row.to_dict())
        folder_name = f"{runs.name}-{key.replace('[', '-').rstrip(']')}"
        folder = home.path / "features" / folder_name if to is None else to if len(rows) == 1 else to / folder_name
        _check_target(folder)
        sae = _of_sweep(sweep.storage, row)
        reads, _, writes = str(row["hook_point"]).partition(" -> ")
        site = Site(reads, writes or reads)
        about = _about_sae(sae, site, key, runs.name, None)
        found.append((row, _Looked(key, sae, site, folder, about)))
    store, tokens, asked = _rows_of(asked, lambda wanted: store_asked_for(sweep, wanted), sweep.spec.data.report_tokens)
    data = asked.data(sweep.spec.data)
    spec = sweep.spec.model_copy(update={"data": data, "resources": workers.resources(sweep.spec.resources)})
    ground = _Ground(spec, home, store, _n_rows(store, tokens), settings, workers, budget_gb)
    folders = _make(ground, [looked for _, looked in found])
    with reported(home):
        for (row, _), folder in zip(found, folders, strict=True):
            connect(home).set_tag(row["run_id"], "features", str(folder))
    return folders


def features_of_folder(
    home: Home, folder: str, asked: Asked, *, model: str | None = None, processing: str | None = None,
    hook_point: str | None = None, workers: Workers | None = None, to: Path | None = None,
    settings: FeatureSettings | None = None, budget_gb: float = BUDGET_GB,
) -> Path:  # fmt: skip
    """Make the dashboard of an SAE folder, by what it says of its model, hook point and dataset but for what is asked
    for. `to` as in `features_of_sweep`. Raises a `UserError` that names the folder."""
    workers, settings = workers or Workers(), settings or FeatureSettings()
    _check_budget(budget_gb, settings)
    loaded = load_folder(folder, hook_point)
    sae_id = content_id([loaded.digest, loaded.site.label])
    name = Path(os.path.abspath(folder)).name
    target = home.path / "features" / f"{name}-{sae_id}" if to is None else to
    _check_target(target)

    def store_of(wanted: Asked) -> TokenStore:
        nonlocal word
        word = by_their_word(home, [loaded], wanted, model, processing)
        return word.store

    word: Any = None
    store, tokens, _ = _rows_of(asked, store_of, REPORT_TOKENS)
    resources = workers.resources(word.spec.resources)
    if workers.gpus is None and not workers.on_a_cluster:
        resources = resources.model_copy(update={"gpus_per_host": _gpus_each(resources.model_hosts)})
    spec = word.spec.model_copy(update={"name": name, "resources": resources})
    ground = _Ground(spec, home, store, _n_rows(store, tokens), settings, workers, budget_gb)
    about = _about_sae(loaded.sae, loaded.site, sae_id, None, name)
    if model is not None or "model_name" not in about["metadata"]:
        about["metadata"]["model_name"] = spec.model.name
    about["metadata"]["model_processing"] = spec.model.processing
    [made] = _make(ground, [_Looked(sae_id, loaded.sae, loaded.site, target, about, is_foreign=True)])
    return made


# ---- which SAE, which tokens, which folder --------------------------------------------------------------------------


def _chosen(home: Home, runs: SweepRuns, which: Which) -> "list[pd.Series]":
    table = sweep_table(home, runs)
    if which.sae is not None:
        row = find_sae(table, which.sae)
        if row["status"] != "finished":
            raise SweepError(f"SAE {key_of(row.to_dict())} is {row['status']}: only a finished one has features")
        return [row]
    band, rows = which.l0 or runs.l0_band, runs.evaluation_rows()
    if which.hook_point is not None:
        return [select(table, which.hook_point, which.architecture, band, rows)]
    found, reasons = [], []
    narrowed = table if which.architecture is None else of_architecture(table, which.architecture)
    for hook_point in dict.fromkeys(narrowed["hook_point"].dropna()):
        try:
            found.append(select(table, resolve_hook_point(table, hook_point), which.architecture, band, rows))
        except SweepError as error:
            reasons.append(str(error))
    if not found:
        raise SweepError("; ".join(reasons) or f"sweep {runs.name!r} has no SAE")
    return found


def _of_sweep(storage: Any, row: "pd.Series") -> SAE:
    from penstock.evaluation import sae_subject

    prefix = None if math.isnan(row["prefix"]) else int(row["prefix"])
    sae = load_subject(sae_subject(row["sae_id"], prefix), storage)
    assert isinstance(sae, SAE)
    return sae


def _about_sae(sae: SAE, site: Site, sae_id: str, sweep: str | None, folder: str | None) -> dict[str, Any]:
    cfg = sae.cfg
    metadata = {name: cfg.metadata[name] for name in _METADATA if cfg.metadata.get(name) is not None}
    names = {"hook_name": site.reads} | ({"hook_name_out": site.writes} if site.is_transcoder else {})
    about = {
        "architecture": cfg.architecture, "d_in": sae.d_in, "d_sae": sae.d_sae, "id": sae_id, "sweep": sweep,
        "folder": folder, "metadata": names | metadata,
    }  # fmt: skip
    return json.loads(json.dumps(about, default=str))


def _rows_of(
    asked: Asked, store_of: Callable[[Asked], TokenStore], fallback: int
) -> tuple[TokenStore, int, Asked]:
    """(store, kept tokens, what is asked for with their number): TOKENS of them where no number is asked for, or where
    there are not so many, what figures are made of."""
    if asked.tokens is not None:
        return store_of(asked), asked.tokens, asked
    more = replace(asked, tokens=TOKENS)
    try:
        return store_of(more), TOKENS, more
    except DataError:
        found = store_of(asked)
        say(f"the {_SPLIT} split has fewer than {TOKENS:,} tokens: {fallback:,} are looked at; --tokens takes others")
        return found, fallback, asked


def _n_rows(store: TokenStore, tokens: int) -> int:
    """How many rows of the split hold so many kept tokens; all, if they do not."""
    total, seen, at_once = store.n_rows(_SPLIT), 0, 65_536
    for start in range(0, total, at_once):
        kept = np.cumsum(store.kept(store.rows(_SPLIT, start, min(start + at_once, total))).sum(1))
        if seen + kept[-1] >= tokens:
            return start + int(np.searchsorted(kept, tokens - seen)) + 1
        seen += int(kept[-1])
    return total


def _gpus_each(n: int) -> float:
    import torch

    return min(1.0, torch.cuda.device_count() / n)


def _check_target(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise SweepError(f"--to {str(folder)!r} is a file; accepted: a new or empty folder, or one of features")
    if folder.is_dir() and any(folder.iterdir()) and not is_features(folder):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise SweepError(f"--to {str(folder)!r} holds {there}; accepted: a new or empty folder, or one of features, "
                         "which is replaced")  # fmt: skip


def _check_parent(folder: Path) -> None:
    """Of several folders of features."""
    if folder.is_file() or is_features(folder) or (folder / "cfg.json").exists():
        what = "a file" if folder.is_file() else "a folder of one SAE"
        raise SweepError(f"--to {str(folder)!r} is {what}, and there are several; accepted: a folder to hold theirs, "
                         "or one SAE by --sae or --hook-point")  # fmt: skip


def _check_budget(budget_gb: float, settings: FeatureSettings) -> None:
    least = _LEAST_LATENTS * settings.bytes_per_latent / 1e9
    if budget_gb < least:
        raise SweepError(f"--memory {budget_gb:g}: accepted is a number of GB from {least:.2g} on, which is what "
                         f"{_LEAST_LATENTS} latents take; each so many are a further pass over the tokens")  # fmt: skip


def _is_there(looked: _Looked, ground: _Ground) -> bool:
    """Whether the folder holds the features of this SAE, on these rows and by these settings."""
    try:
        about = read_features(looked.folder).about
    except CheckpointError:
        return False
    data = {name: value for name, value in about["data"].items() if name != "tokens"}
    wanted = ground.about_data, asdict(ground.settings), dict(looked.about)
    return (data, about["settings"], about["sae"]) == wanted


# ---- making them ----------------------------------------------------------------------------------------------------


def _make(ground: _Ground, every: Sequence[_Looked]) -> list[Path]:
    """Make what is not there yet; the folders of all."""
    todo = []
    for looked in every:
        if _is_there(looked, ground):
            say(f"{looked.folder}: is there already, by the same settings")
        else:
            todo.append(looked)
    if todo:
        with contextlib.ExitStack() as stack:
            writers = {}
            for looked in todo:  # before anything is started whose result could not be written
                with _writing_to(looked.folder):
                    writers[looked.name] = stack.enter_context(FeatureWriter(looked.folder))
            crew = stack.enter_context(contextlib.closing(_start(ground, todo)))
            _Run(ground, todo, writers, crew).run()
    return [looked.folder for looked in every]


@contextlib.contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SweepError(f"features cannot be written to {str(folder)!r}: {reason_of(error)}; accepted: --to with a "
                         "folder that can be, and has room") from None  # fmt: skip


class _Run:
    """One run over the tokens, in as many passes as the budget needs."""

    def __init__(
        self, ground: _Ground, todo: Sequence[_Looked], writers: Mapping[str, FeatureWriter], crew: "_Crew"
    ):  # fmt: skip
        self._ground, self._todo, self._writers, self._crew = ground, {one.name: one for one in todo}, writers, crew
        self._figures: dict[str, _Figures] = {one.name: _Figures() for one in todo}
        at_once = max(1, SLICE_TOKENS // (ground.store.context_size * ground.spec.model.harvest_rows))
        self._slice_rows = at_once * ground.spec.model.harvest_rows

    def run(self) -> None:
        ground, passes = self._ground, self._passes()
        names = ", ".join(f"{one.name} at {one.site.label}" for one in self._todo.values())
        say(f"features of {len(self._todo)} SAE(s) on {ground.n_rows:,} rows of the {_SPLIT} split of "
            f"{ground.spec.data.label}: {names}")  # fmt: skip
        if len(passes) > 1:
            groups = sum(map(len, passes))
            say(f"latents are done in {groups} groups, {len(passes)} passes over the tokens: all at once could take "
                f"more than {ground.budget_gb:g} GB")  # fmt: skip
        for number, groups in enumerate(passes):
            self._run_pass(groups, "features" if len(passes) == 1 else f"features, pass {number + 1} of {len(passes)}")

    def _passes(self) -> list[tuple[Group, ...]]:
        """The groups of all SAEs, put together into passes within the budget."""
        settings, budget = self._ground.settings, int(self._ground.budget_gb * 1e9)
        passes: list[list[Group]] = []
        room = 0
        for looked in self._todo.values():
            for latents in latent_groups(looked.sae.d_sae, settings, budget):
                size = len(latents) * settings.bytes_per_latent
                if not passes or size > room:
                    passes.append([])
                    room = budget
                room -= size
                passes[-1].append(Group(looked.name, looked.site, latents, with_errors=latents.start == 0))
        return [tuple(groups) for groups in passes]

    def _run_pass(self, groups: tuple[Group, ...], what: str) -> None:
        ground, settings = self._ground, self._ground.settings
        merged = [MergedFeatures(len(group.latents), settings) for group in groups]
        starts = range(0, ground.n_rows, self._slice_rows)
        stops = [min(start + self._slice_rows, ground.n_rows) for start in starts]
        foreign = tuple(g.name for g in groups if self._todo[g.name].is_foreign and g.latents.start == 0)
        works = [
            RowsWork(ground.store.id, _SPLIT, start, stop, groups, settings, foreign if start == 0 else ())
            for start, stop in zip(starts, stops, strict=True)
        ]
        numbers = {work.start_row: number for number, work in enumerate(works)}
        started = time.monotonic()
        for work, done in self._crew.each(works, lambda: tuple(one.limits for one in merged), what):
            assert isinstance(done, RowsDone)
            self._warn(done)
            for one, part in zip(merged, done.parts, strict=True):
                one.add(numbers[work.start_row], part)
        seconds = time.monotonic() - started
        tokens = ground.n_rows * ground.store.context_size
        say(f"{what}: {tokens:,} tokens in {seconds:.1f} s, {tokens / max(seconds, 1e-9):,.0f} a second")
        for group, one, (logits, neighbours) in zip(groups, merged, self._of_latents(groups), strict=True):
            looked, figures = self._todo[group.name], self._figures[group.name]
            if logits is None and settings.logits and group.latents.start == 0:
                say(f"{looked.name}: no logits: what is written at {looked.site.writes} reaches the residual stream by "
                    "no linear path")  # fmt: skip
            table = latents_table(one, group.latents, logits, neighbours)
            figures.add(one)
            with _writing_to(looked.folder):
                self._writers[group.name].add(table, example_tables(one, group.latents, ground.tokens_of))
                if group.latents.stop == looked.sae.d_sae:
                    self._close(looked, figures)

    def _of_latents(
        self, groups: Sequence[Group]
    ) -> list[tuple[LatentLogits | None, tuple[np.ndarray, np.ndarray]]]:
        """Logits and neighbours of the latents of each group."""
        works = [
            LatentsWork(self._ground.store.id, replace(group, latents=group.latents[start : start + _LATENTS_AT_ONCE]),
                        self._ground.settings)
            for group in groups for start in range(0, len(group.latents), _LATENTS_AT_ONCE)
        ]  # fmt: skip
        done = {}
        for work, found in self._crew.each(works, lambda: None, "logits and neighbours"):
            assert isinstance(found, LatentsDone)
            done[work.group.name, work.group.latents.start] = found
        every = []
        for group in groups:
            parts = [done[group.name, start] for start in group.latents[::_LATENTS_AT_ONCE]]
            every.append((_joined([part.logits for part in parts]), _stacked([part.neighbours for part in parts])))
        return every

    def _warn(self, done: RowsDone) -> None:
        """Of SAEs from elsewhere, say so if they make nothing of these activations."""
        for name, (x, target) in done.shown.items():
            from sae_core.pretrained import warn_if_absurd

            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                warn_if_absurd(self._todo[name].sae, x, target if self._todo[name].site.is_transcoder else None)
            for one in caught:
                say(f"warning: {one.message}")

    def _close(self, looked: _Looked, figures: "_Figures") -> None:
        ground = self._ground
        about = {
            "sae": dict(looked.about),
            "data": ground.about_data | {"tokens": figures.n_tokens},
            "settings": asdict(ground.settings),
            "bins": [float(edge) for edge in BINS],
            "figures": figures.as_dict(looked.sae.d_sae),
            "penstock_version": __version__,
        }
        self._writers[looked.name].close(about, load_tokenizer(ground.spec.model).texts)


def _joined(parts: Sequence[LatentLogits | None]) -> LatentLogits | None:
    if any(part is None for part in parts):
        return None
    names = ("top_tokens", "top_logits", "bottom_tokens", "bottom_logits")
    return LatentLogits(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _stacked(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    latents, cosines = zip(*parts, strict=True)
    return np.concatenate(latents), np.concatenate(cosines)


@dataclass
class _Figures:
    """Those of a whole SAE, from the groups of its latents."""

    n_tokens: int = 0
    fired: int = 0
    dead: int = 0
    explained_variance: float | None = None

    def add(self, merged: MergedFeatures) -> None:
        totals = merged.totals
        self.n_tokens = totals.n_tokens
        self.fired += int(totals.fired.sum())
        self.dead += int((totals.fired == 0).sum())
        if totals.explained_variance is not None:
            self.explained_variance = totals.explained_variance

    def as_dict(self, d_sae: int) -> dict[str, float]:
        found = {"l0": self.fired / max(self.n_tokens, 1), "dead_fraction": self.dead / d_sae}
        explained = self.explained_variance
        return found | ({} if explained is None or not math.isfinite(explained) else {"explained_variance": explained})


# ---- who does the work ----------------------------------------------------------------------------------------------


class _Crew:
    """Does pieces of work, in this process or on model hosts."""

    def each(
        self, works: Sequence[Any], limits: Callable[[], Any], what: str
    ) -> Iterator[tuple[Any, Any]]:
        """Each piece with its result, in whatever order they are done; `limits` are asked for as late as can be."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


def _start(ground: _Ground, todo: Sequence[_Looked]) -> _Crew:
    return _Here(ground, todo) if ground.workers.in_process else _OnHosts(ground, todo)


class _Here(_Crew):
    def __init__(self, ground: _Ground, todo: Sequence[_Looked]):
        import torch

        from penstock.model_host import ModelHost

        self._host = ModelHost(ground.spec.model, threads=torch.get_num_threads())
        self._store, self._data = ground.store, ground.spec.data
        self._saes = {looked.name: looked.sae.to(self._host.device) for looked in todo}

    def each(
        self, works: Sequence[FeatureWork], limits: Callable[[], Any], what: str
    ) -> Iterator[tuple[FeatureWork, Any]]:
        shown = time.monotonic()
        for number, work in enumerate(works):
            yield work, work.run(self._host, self._store, self._data, self._saes, limits())
            if time.monotonic() - shown > STATUS_SECONDS:
                shown = time.monotonic()
                say(f"{what}: {number + 1} of {len(works)} slices")

    def close(self) -> None:
        pass


class _OnHosts(_Crew):
    def __init__(self, ground: _Ground, todo: Sequence[_Looked]):
        self._hosts = Hosts(ground.spec, ground.store, ground.home, ground.workers.address)
        there, asked = self._hosts.spec.resources.model_hosts, ground.workers.n
        if asked is not None and there < asked:
            say(f"--workers {asked}: this machine has room for {there}")
        try:
            self._hosts.join(ground.workers.address)
            import ray

            self._saes = {looked.name: ray.put(looked.sae) for looked in todo}
        except BaseException:
            self._hosts.close()
            raise

    def each(
        self, works: Sequence[FeatureWork], limits: Callable[[], Any], what: str
    ) -> Iterator[tuple[FeatureWork, Any]]:
        def ask(host: Any, work: FeatureWork) -> Any:
            return host.features.remote(work, {name: self._saes[name] for name in work.names}, limits())

        return over_hosts(works, list(self._hosts.fleet.hosts.values()), ask, say, what)

    def close(self) -> None:
        self._hosts.close()
