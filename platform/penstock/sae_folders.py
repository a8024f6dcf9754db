"""Evaluating SAE folders, ours or SAELens', in this process: by what their cfg.json says, or beside a sweep.

Beside a sweep they are evaluated by its protocol, on its rows, so that they stand on one front with its SAEs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from pydantic import ValidationError

from penstock.errors import CheckpointError, DataError, ModelError, SpecError, SweepError
from penstock.evaluate import Asked, evaluation_store, resolve, say, with_options
from penstock.evaluated import Evaluated
from penstock.evaluation import Evaluation, in_process, mean_file
from penstock.home import Home
from penstock.identity import content_id
from penstock.models import ModelDescription, check_sites, describe_model, processing_of
from penstock.pareto import Band, mark_front, sae_key
from penstock.plan import absolute
from penstock.resolved import ResolvedSweep, protocol_of
from penstock.sites import ARROW, Site
from penstock.spec import DataSpec, EvaluateSpec, ExcludeSpec, ModelSpec, SweepSpec
from penstock.storage import Storage
from penstock.subjects import Subject
from penstock.tokens import TokenStore
from penstock.tracking import SPARSITY_SETTINGS, SweepRuns, baseline_table, find_sweep, sweep_table

if TYPE_CHECKING:
    from torch import nn

    from sae_core import SAE

REPORT_TOKENS = 50_000  # unless asked for otherwise
OWN_MEAN = "the first block of the evaluated rows"


@dataclass(frozen=True)
class Folder:
    """An SAE folder, and the site that its cfg.json, or --hook-point, says it belongs to."""

    path: str
    sae: "SAE"
    site: Site

    def about(self, name: str) -> Any:
        return self.sae.cfg.metadata.get(name)

    @property
    def digest(self) -> str:
        """Of what was loaded, so that the same SAE in another folder is known again."""
        digest = blake2b(digest_size=16)
        folder = Path(self.path)
        files = [folder / name for name in ("cfg.json", "sae_weights.safetensors")]
        if not all(file.is_file() for file in files):  # of another format, whose weights may lie deeper, or be one file
            files = sorted(file for file in (folder, *folder.rglob("*")) if file.is_file())
        for file in files:
            with file.open("rb") as stream:
                while piece := stream.read(1 << 24):
                    digest.update(piece)
        return digest.hexdigest()

    @property
    def settings(self) -> dict[str, Any]:
        """What set its sparsity, and its seed, as far as the folder tells."""
        own = self.about("sae_settings") or {}
        found = {name: own.get(name) for name in (*SPARSITY_SETTINGS, "seed")} | {"k": self.sae.cfg.k or own.get("k")}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Ground:
    """What folders are evaluated on, and beside what."""

    spec: SweepSpec
    description: ModelDescription
    storage: Storage
    store: TokenStore
    protocol: Mapping[str, Any]
    means: Mapping[Site, str]
    beside: SweepRuns | None = None

    @property
    def l0_band(self) -> Band | None:
        return None if self.beside is None else self.beside.l0_band


def evaluate_folders(
    home: Home,
    folders: Sequence[str],
    asked: Asked,
    *,
    model: str | None = None,
    processing: str | None = None,
    hook_point: str | None = None,
    beside: str | None = None,
) -> Evaluated:
    """Evaluate SAE folders by what their cfg.json says (model, hook point, context, BOS, dataset) but for what is asked
    for; or `beside` a sweep, by its protocol, in one table and on one front with its SAEs.

    Raises a `UserError` that names the folder, for one that does not load, does not fit the model or does not say what
    it has to.
    """
    loaded = [load_folder(folder, hook_point) for folder in dict.fromkeys(folders)]
    ground = by_their_word(home, loaded, asked, model, processing) if beside is None else _beside(home, loaded, beside)
    subjects: dict[Site, list[Subject]] = {}
    modules: dict[Subject, nn.Module] = {}
    of_subject: dict[Subject, Folder] = {}
    for folder in loaded:
        source = f"evaluated/{content_id([folder.digest, folder.site.label, ground.description.fingerprint])}"
        for prefix in (None, *folder.sae.prefix_widths):
            subject = Subject(sae_key(folder.path, prefix), source, prefix=prefix)
            subjects.setdefault(folder.site, []).append(subject)
            modules[subject] = folder.sae if prefix is None else folder.sae.prefix(prefix)
            of_subject[subject] = folder
    evaluation = Evaluation(
        ground.storage, ground.store, "report", ground.protocol, subjects, ground.means, ground.spec.model.harvest_rows
    )
    _evaluate(evaluation, ground, modules)
    rows = [_row(folder, subject, evaluation) for subject, folder in of_subject.items()]
    return _front(home, pd.DataFrame(rows).astype({"prefix": float}), evaluation.rows(), ground)


def load_folder(path: str, hook_point: str | None) -> Folder:
    """An SAE folder of any format that is known, at the site that it names or at `hook_point`. Raises
    `CheckpointError`."""
    from sae_core import SAE

    sae = SAE.load(path)
    metadata, is_transcoder = sae.cfg.metadata, sae.cfg.is_transcoder
    if hook_point is None:
        names = ("hook_name", "hook_name_out") if is_transcoder else ("hook_name",)
        if missing := [name for name in names if not isinstance(metadata.get(name), str)]:
            raise CheckpointError(f"{path}: it has no metadata.{missing[0]}; accepted: --hook-point "
                                  f"{'READS -> WRITES' if is_transcoder else 'NAME'}")  # fmt: skip
        reads, writes = metadata[names[0]], metadata[names[-1]]
    else:
        reads, _, writes = hook_point.partition(ARROW)
        if bool(writes) != is_transcoder:
            accepted = "READS -> WRITES, as it is a transcoder" if is_transcoder else "one name, as it is no transcoder"
            raise CheckpointError(f"{path}: --hook-point {hook_point!r}; accepted: {accepted}")
        writes = writes or reads
    if metadata.get("hook_head_index") is not None:
        raise CheckpointError(f"{path}: it is of head {metadata['hook_head_index']} alone (metadata.hook_head_index); "
                              "accepted: SAEs of a whole hook point")  # fmt: skip
    return Folder(path, sae, Site(reads, writes))


# ---- by what they say -----------------------------------------------------------------------------------------------


def by_their_word(
    home: Home, loaded: Sequence[Folder], asked: Asked, model: str | None, processing: str | None
) -> Ground:
    """The model, and the rows of its report split, that folders name together, but for what is asked for. Raises a
    `UserError` that names the folder."""
    spec = _described(loaded, asked, model, processing)
    try:
        description = describe_model(spec.model)
    except ModelError as error:
        message = str(error) if model is not None else str(error).replace("model.name", "its cfg.json: model", 1)
        raise ModelError(with_options(message) if model is not None else f"{loaded[0].path}: {message}") from None
    _check_fit(loaded, description)
    storage = Storage(home.storage_uri(None))
    try:
        store = evaluation_store(spec.data, spec.model, description, storage)
    except (DataError, ModelError) as error:
        raise type(error)(_as_said(str(error), loaded[0], asked)) from None
    protocol = {"model": spec.model.name, **protocol_of(spec, store, "report", None, OWN_MEAN)}
    return Ground(spec, description, storage, store, protocol, {})


def _described(loaded: Sequence[Folder], asked: Asked, model: str | None, processing: str | None) -> SweepSpec:
    """What the folders say of their model and data, but for what is asked for, as a spec."""
    data: dict[str, Any] = {
        "dataset": absolute(str(asked.dataset or _required(loaded, "dataset_path", "--dataset"))),
        "report_tokens": asked.tokens or REPORT_TOKENS,
        "context_size": asked.context_size or _agreed(loaded, "context_size", "--context"),
        "bos": _agreed(loaded, "prepend_bos"),
        "text_column": asked.text_column,
    }
    excluded = [folder.about("exclude") for folder in loaded]
    if isinstance(excluded[0], dict) and excluded == excluded[:1] * len(excluded):
        data["exclude"] = ExcludeSpec.model_validate(excluded[0])
    used = {
        "name": absolute(str(model or _required(loaded, "model_name", "--model"))),
        "dtype": _agreed(loaded, "model_dtype"),
        "processing": processing or _processing_of(loaded),
    }
    try:
        return SweepSpec(
            name="folders",
            model=ModelSpec(**{name: value for name, value in used.items() if value is not None}),
            data=DataSpec(**{name: value for name, value in data.items() if value is not None}),
            hook_points=[folder.site.label for folder in loaded[:1]],
            train={"tokens": 1, "batch_tokens": 1},
            saes=[{}],
            evaluate=EvaluateSpec(ablation=asked.ablation or "zero"),
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][-1]) if first["loc"] else "settings"
        given = {"context_size": ("--context", asked.context_size), "name": ("--model", model)}.get(name, ("", None))
        where = f"{given[0]} {given[1]}" if given[1] is not None else (
            f"{loaded[0].path}: its cfg.json: {name} {first['input']!r}")  # fmt: skip
        message = first["msg"].removeprefix("Value error, ")
        raise SpecError(f"{where}: {message[0].lower()}{message[1:]}") from None


def _as_said(message: str, folder: Folder, asked: Asked) -> str:
    """A message about an option that was not given, as one about the folder that the value comes from."""
    for option, name, given in (
        ("--dataset", "dataset_path", asked.dataset), ("--context", "context_size", asked.context_size)
    ):  # fmt: skip
        if given is None and message.startswith(f"{option} ") and folder.about(name) is not None:
            return f"{folder.path}: its metadata.{name} {message.removeprefix(f'{option} ')}; another by {option}"
    return message


def _required(loaded: Sequence[Folder], name: str, option: str) -> Any:
    value = _agreed(loaded, name, option)
    if not value:
        raise CheckpointError(f"{loaded[0].path}: it has no metadata.{name}; accepted: {option}")
    return value


def _agreed(loaded: Sequence[Folder], name: str, option: str | None = None) -> Any:
    """What all folders that say something about it say; None where none does."""
    said = [(folder.path, folder.about(name)) for folder in loaded if folder.about(name) is not None]
    for path, value in said[1:]:
        first, wanted = said[0]
        if value != wanted:
            raise CheckpointError(
                f"{first} and {path} differ in metadata.{name} ({wanted!r}, {value!r}), and one table is of one "
                f"protocol; accepted: {f'{option}, or ' if option else ''}one folder after the other"
            )
    return said[0][1] if said else None


def _processing_of(loaded: Sequence[Folder]) -> str:
    about = {
        name: _agreed(loaded, name, "--processing") for name in ("model_processing", "model_from_pretrained_kwargs")
    }
    try:
        return processing_of(about) or "none"
    except CheckpointError as error:
        raise CheckpointError(f"{loaded[0].path}: {error} (--processing)") from None


# ---- beside a sweep -------------------------------------------------------------------------------------------------


def _beside(home: Home, loaded: Sequence[Folder], name: str) -> Ground:
    runs = find_sweep(home, name)
    sweep = resolve(home, runs)
    _check_protocol(runs, sweep)
    _check_fit(loaded, sweep.model)
    means = _means(sweep, loaded) if sweep.spec.evaluate.ablation == "mean" else {}
    return Ground(sweep.spec, sweep.model, sweep.storage, sweep.evaluated, sweep.protocol, means, runs)


def _check_protocol(runs: SweepRuns, sweep: ResolvedSweep) -> None:
    """Raise `SweepError` where folders would be evaluated by another protocol than the figures beside which they are
    put."""
    file = runs.artifact("protocol.json")
    published = None if file is None else content_id(json.loads(file.read_text(encoding="utf-8")))
    if published not in (None, sweep.protocol_id):
        raise SweepError(
            f"the figures of sweep {runs.name!r} are by protocol {published}, and its spec comes to "
            f"{sweep.protocol_id} now: its dataset has changed, or how figures are made; accepted: the data it was run "
            "with, or another run of it"
        )


def _means(sweep: ResolvedSweep, loaded: Sequence[Folder]) -> dict[Site, str]:
    for folder in loaded:
        if folder.site not in sweep.spec.sites:
            there = ", ".join(site.label for site in sweep.spec.sites)
            raise CheckpointError(
                f"{folder.path}: the sweep ablates to the mean at its own hook points ({there}), and has none for "
                f"{folder.site.label!r}"
            )
    return {site: mean_file(sweep, site) for site in sweep.spec.sites}


def _check_fit(loaded: Sequence[Folder], description: ModelDescription) -> None:
    for folder in loaded:
        try:
            check_sites(description, [folder.site])
        except ModelError as error:
            raise ModelError(f"{folder.path}: {str(error).replace('hook_points: model.name', 'model')}") from None
        sae, site = folder.sae, folder.site
        for what, width, name in (("d_in", sae.d_in, site.reads), ("d_out", sae.d_out, site.writes)):
            there = description.hook_points[name]
            if width != there:
                raise CheckpointError(
                    f"{folder.path}: its {what} is {width}, and {name!r} of model {description.name!r} has {there} "
                    "dimensions"
                )


# ---- doing it -------------------------------------------------------------------------------------------------------


def _evaluate(evaluation: Evaluation, ground: Ground, modules: "Mapping[Subject, nn.Module]") -> None:
    if not evaluation.left():
        say("all of these figures are there already")
        return
    import torch

    from penstock.model_host import ModelHost

    host = ModelHost(ground.spec.model, threads=torch.get_num_threads())
    on_device = {subject: module.to(host.device) for subject, module in modules.items()}
    in_process(evaluation, host, ground.spec.data, say, on_device)


def _row(folder: Folder, subject: Subject, evaluation: Evaluation) -> dict[str, Any]:
    from penstock.compare import trained_as

    cfg = folder.sae.cfg
    return {
        "sae_id": folder.path, "hook_point": folder.site.label, "architecture": trained_as(cfg),
        "d_sae": cfg.d_sae, "prefix": subject.prefix, **folder.settings,
        **evaluation.figures(subject, folder.site), "status": "finished",
    }  # fmt: skip


def _front(home: Home, table: pd.DataFrame, rows: pd.DataFrame, ground: Ground) -> Evaluated:
    """The folders on a front: with the finished SAEs that a sweep has at the same hook points, where there is one."""
    baselines = pd.DataFrame(columns=["kind", "hook_point"])
    if ground.beside is not None:
        of_sweep, evaluated = sweep_table(home, ground.beside), ground.beside.evaluation_rows()
        if evaluated is None:
            raise SweepError(f"sweep {ground.beside.name!r} has no figures of its sequences to compare with; accepted: "
                             "a sweep that has been run to its end")  # fmt: skip
        marks = ["on_front", "on_overall_front", "dominated_by", "certain"]
        here = of_sweep["hook_point"].isin(table["hook_point"]) & (of_sweep["status"] == "finished")
        table = pd.concat([table, of_sweep[here].drop(columns=marks)], ignore_index=True)
        rows = pd.concat([rows, evaluated], ignore_index=True)
        baselines = baseline_table(home, ground.beside)
        baselines = baselines[baselines["hook_point"].isin(table["hook_point"])]
    beside = None if ground.beside is None else ground.beside.name
    return Evaluated(ground.protocol, mark_front(table, ground.l0_band, rows), baselines, ground.l0_band, beside)
