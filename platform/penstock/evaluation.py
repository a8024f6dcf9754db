"""Evaluating by one protocol: every SAE and baseline on the same tokens, by whichever model hosts are there.

The work is cut into slices of rows, each for all SAEs of a site, so that the passes they share are made once, and no
slice keeps a host for longer than a block does. What comes of it lies in storage under the protocol's id: the figures
with their 95% intervals over documents, and beside them the sums of every row, from which SAEs are compared paired.
What is there already is not evaluated again.

Decisions are made on the `search` split, by SAEs alone; what is published is of the `report` split, which nothing else
reads.
"""

import io
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from penstock.identity import content_id
from penstock.pareto import sae_key
from penstock.plan import PlannedSAE
from penstock.resolved import ResolvedSweep
from penstock.sites import Site
from penstock.slices import STATUS_SECONDS, over_hosts
from penstock.spec import DataSpec
from penstock.splits import Split
from penstock.statistics import Bootstrap
from penstock.storage import Storage
from penstock.subjects import BASES, Subject, evaluate_subjects, load_mean, load_subject
from penstock.tokens import TokenStore

if TYPE_CHECKING:
    from torch import nn

    from penstock.model_host import ModelHost

Say = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, on which rows of which split, and by which protocol.

    `means` names, by site, the calibration whose mean stands for an ablated activation; needed for mean ablation alone.
    A slice has at least `rows_at_once` rows, those of a forward pass.
    """

    storage: Storage
    store: TokenStore
    split: Split
    protocol: Mapping[str, Any]
    subjects: Mapping[Site, Sequence[Subject]]
    means: Mapping[Site, str] = field(default_factory=dict)
    rows_at_once: int = 1

    @cached_property
    def protocol_id(self) -> str:
        return content_id(self.protocol)

    @property
    def tokens(self) -> int:
        """How many kept tokens the protocol asks for."""
        return self.protocol[f"{self.split}_tokens"]

    @cached_property
    def n_rows(self) -> int:
        """Rows of the split that hold so many kept tokens."""
        total = self.store.n_rows(self.split)
        kept = np.cumsum(self.store.kept(self.store.rows(self.split, 0, total)).sum(1))
        return min(total, int(np.searchsorted(kept, self.tokens)) + 1)

    @cached_property
    def documents(self) -> np.ndarray:
        """int64 [n_rows]: the document that each row begins in; those of different sources of a mixture differ."""
        document = self.store.documents(self.split, 0, self.n_rows).astype(np.int64)
        return document + (self.store.source_of(self.split, 0, self.n_rows).astype(np.int64) << 32)

    def figures(self, subject: Subject, site: Site) -> dict[str, float]:
        """The figures of a subject that has been evaluated, with their intervals."""
        return self.storage.read_json(_figures_file(self.protocol_id, subject, site))["metrics"]

    def rows(self) -> pd.DataFrame:
        """The sums of every row, of all subjects that have been evaluated: `sae`, `hook_point` (the site's label),
        `row`, `document` and `sae_core.evaluation.ROW_SUMS`."""
        frames = [
            self._read_rows(subject, site)
            for site, subjects in self.subjects.items()
            for subject in subjects
            if self._is_done(subject, site)
        ]
        return pd.concat(frames, ignore_index=True) if frames else _no_rows()

    def _read_rows(self, subject: Subject, site: Site) -> pd.DataFrame:
        rows = pd.read_parquet(io.BytesIO(self.storage.read(_rows_file(self.protocol_id, subject, site))))
        return rows.assign(sae=subject.name)  # the same folder may have had another name

    def _is_done(self, subject: Subject, site: Site) -> bool:
        return self.storage.exists(_figures_file(self.protocol_id, subject, site))

    # ---- the work ----

    def left(self) -> "list[Slice]":
        """What has no figures yet, cut into slices."""
        slices = []
        for site, subjects in self.subjects.items():
            new = tuple(one for one in subjects if not self._is_done(one, site))
            if new:
                # As long as harvesting a block, so that neither kind of work starves the other.
                length = max(self.rows_at_once, self.store.block_rows // len(new))
                starts = range(0, self.n_rows, length)
                work = _SiteWork(site, new, len(starts))
                slices += [Slice(work, start, min(start + length, self.n_rows)) for start in starts]
        return slices

    def add(self, part: "Slice", sums: Mapping[str, Any]) -> int:
        """Take in the sums of a slice, in whatever order they come; with the last of a site write its figures, and
        return the tokens that they are of."""
        work = part.work
        work.sums[part.start_row] = dict(sums)
        if len(work.sums) < work.n_slices:
            return 0
        in_order = [work.sums[start] for start in sorted(work.sums)]
        metrics, frames = {}, {}
        for subject in work.subjects:  # one by one: merged, each has an array [rows, d_out] of its own
            first, *others = (one.pop(subject.name) for one in in_order)
            merged = first.merge(*others)
            metrics[subject.name] = merged.metrics()
            about = {"sae": subject.name, "hook_point": work.site.label, "row": np.arange(self.n_rows)}
            frames[subject.name] = pd.DataFrame({**about, "document": self.documents, **merged.rows()})
        bootstrap = Bootstrap(pd.concat(frames.values(), ignore_index=True))
        for subject in work.subjects:
            rows = io.BytesIO()
            frames[subject.name].to_parquet(rows, index=False)
            self.storage.write(_rows_file(self.protocol_id, subject, work.site), rows.getvalue())
            record = {
                "protocol": dict(self.protocol),
                "metrics": metrics[subject.name] | bootstrap.intervals(subject.name),
            }
            self.storage.write_json(_figures_file(self.protocol_id, subject, work.site), record)  # last: now it counts
        return sum(int(metrics[subject.name]["n_tokens"]) for subject in work.subjects)


@dataclass
class _SiteWork:
    """The evaluation of one site: the sums so far, by the slices' first rows."""

    site: Site
    subjects: tuple[Subject, ...]
    n_slices: int
    sums: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Some rows, for all subjects of a site."""

    work: _SiteWork
    start_row: int
    stop_row: int


def _figures_file(protocol_id: str, subject: Subject, site: Site) -> str:
    """Where the figures of a subject lie: an SAE's beside its folder, a basis' by the calibration that it is made from
    and the site's hook points."""
    if subject.basis is None:
        prefix = "" if subject.prefix is None else f"-prefix-{subject.prefix}"
        return f"{subject.source.removesuffix('/final')}/evaluation-{protocol_id}{prefix}.json"
    place = "+".join(site.hook_points)
    return f"{posixpath.dirname(subject.source)}/{place}/{subject.name}-{protocol_id}.json"


def _rows_file(protocol_id: str, subject: Subject, site: Site) -> str:
    return f"{_figures_file(protocol_id, subject, site).removesuffix('.json')}-rows.parquet"


def _no_rows() -> pd.DataFrame:
    from sae_core.evaluation import ROW_SUMS

    return pd.DataFrame(columns=["sae", "hook_point", "row", "document", *ROW_SUMS])


# ---- a sweep's ------------------------------------------------------------------------------------------------------


def of_sae(sae: PlannedSAE, prefix: int | None = None) -> Subject:
    """A finished SAE, or the first latents of it."""
    return sae_subject(sae.sae_id, prefix)


def sae_subject(sae_id: str, prefix: int | None = None) -> Subject:
    return Subject(sae_key(sae_id, prefix), f"saes/{sae_id}/final", prefix=prefix)


def bases(sweep: ResolvedSweep, site: Site) -> list[Subject]:
    """The baselines that need no training: the top k neurons and principal components.

    At a transcoder's site they are bases of what is written, so that they know what a transcoder has to predict: there
    they show what k coefficients can reach at most, rather than what has to be beaten.
    """
    source = mean_file(sweep, site)
    return [
        Subject(f"{basis}-{k}", source, basis, k)
        for basis in BASES
        for k in sweep.spec.baselines.k
        if k <= sweep.model.hook_points[site.writes]
    ]


def mean_file(sweep: ResolvedSweep, site: Site) -> str:
    """The calibration of what is written at a site."""
    return sweep.calibration_file(site.array(site.writes, sweep.spec.data.exclude.norm_over_median))


def evaluation_of(
    sweep: ResolvedSweep, split: Split = "report", saes: Iterable[PlannedSAE] | None = None
) -> Evaluation:
    """The evaluation of a sweep's finished SAEs and their prefixes (of these SAEs, where they are given) by its own
    protocol. For the figures that are published, on `report`, the baselines belong to it."""
    published = split == "report"
    given = sweep.saes if saes is None else list(saes)
    finished = [sae for sae in given if (published or sae.baseline is None) and sweep.is_finished(sae)]
    subjects = {}
    for site in sweep.spec.sites:
        of_site = [sae for sae in finished if sae.site == site]
        subjects[site] = [of_sae(sae, prefix) for sae in of_site for prefix in (None, *sae.prefix_widths)]
        if published and saes is None:
            subjects[site] += bases(sweep, site)
    return Evaluation(
        storage=sweep.storage,
        store=sweep.evaluated,
        split=split,
        protocol=sweep.protocol_of(split),
        subjects=subjects,
        means={site: mean_file(sweep, site) for site in sweep.spec.sites},
        rows_at_once=sweep.spec.model.harvest_rows,
    )


def evaluate_on_hosts(
    sweep: ResolvedSweep,
    hosts: Sequence[Any],
    say: Say,
    split: Split = "report",
    saes: Iterable[PlannedSAE] | None = None,
    check: Callable[[float], None] = lambda share: None,
) -> int:
    """Evaluate what of a sweep has no figures yet on a split (see `evaluation_of`). Returns the tokens that went
    through SAEs. Raises `SweepError` when the hosts keep dying. `check` ends it by raising."""
    return on_hosts(evaluation_of(sweep, split, saes), hosts, say, check)


def figures_of(sweep: ResolvedSweep, subject: Subject, site: Site, split: Split = "report") -> dict[str, float]:
    """The figures of a subject that has been evaluated on a split, with their intervals (`l0`, `l0_low`, ...)."""
    return sweep.storage.read_json(_figures_file(content_id(sweep.protocol_of(split)), subject, site))["metrics"]


def rows_of(sweep: ResolvedSweep, split: Split = "report") -> pd.DataFrame:
    """The evaluation rows of all that a sweep has figures of on a split; see `Evaluation.rows`."""
    return evaluation_of(sweep, split).rows()


# ---- doing it -------------------------------------------------------------------------------------------------------


def on_hosts(
    evaluation: Evaluation, hosts: Sequence[Any], say: Say, check: Callable[[float], None] = lambda share: None
) -> int:
    """Evaluate what is left on model hosts (Ray actors), and write the figures. Returns the tokens that went through
    SAEs. A host that dies is given its slice again. Raises `SweepError` when they keep dying."""
    todo, tokens = evaluation.left(), 0
    if not todo:
        return 0
    _say_what(evaluation, todo, say)

    def ask(host: Any, part: Slice) -> Any:
        mean = evaluation.means[part.work.site] if evaluation.protocol["ablation"] == "mean" else None
        rows, work = (part.start_row, part.stop_row), part.work
        return host.evaluate.remote(evaluation.store.id, work.site, work.subjects, evaluation.split, *rows, mean)

    for part, sums in over_hosts(todo, hosts, ask, say, "evaluating", check):
        tokens += evaluation.add(part, sums)
    return tokens


def in_process(
    evaluation: Evaluation,
    host: "ModelHost",
    data: DataSpec,
    say: Say,
    loaded: "Mapping[Subject, nn.Module] | None" = None,
) -> int:
    """Evaluate what is left on a model host of this process, and write the figures. Returns the tokens that went
    through SAEs. `data` says which tokens are excluded; `loaded` holds subjects that are not to be read from storage.
    Without a calibration the mean for an ablation is that of the evaluated rows' first block."""
    todo, modules = evaluation.left(), dict(loaded or {})
    if not todo:
        return 0
    _say_what(evaluation, todo, say)
    shown, tokens, means = time.monotonic(), 0, {}
    for number, part in enumerate(todo):
        site = part.work.site
        for subject in part.work.subjects:
            if subject not in modules:
                modules[subject] = load_subject(subject, evaluation.storage)
        if evaluation.protocol["ablation"] == "mean" and site not in means:
            means[site] = (
                load_mean(evaluation.storage, evaluation.means[site])
                if site in evaluation.means
                else host.mean_written(evaluation.store, data, site, evaluation.split)
            )
        of_site = {subject: modules[subject] for subject in part.work.subjects}
        rows = evaluation.split, part.start_row, part.stop_row
        sums = evaluate_subjects(host, evaluation.store, data, site, of_site, *rows, means.get(site))
        tokens += evaluation.add(part, sums)
        if time.monotonic() - shown > STATUS_SECONDS:
            shown = time.monotonic()
            say(f"evaluation: {number + 1} of {len(todo)} slices")
    return tokens


def _say_what(evaluation: Evaluation, todo: Sequence[Slice], say: Say) -> None:
    works = {id(part.work): part.work for part in todo}.values()
    subjects = [subject for work in works for subject in work.subjects]
    baselines = sum(subject.basis is not None for subject in subjects)
    beside = f" and {baselines} baselines" if baselines else ""
    say(f"evaluating {len(subjects) - baselines} SAE(s){beside} on {evaluation.tokens:,} tokens of the "
        f"{evaluation.split} split")  # fmt: skip
