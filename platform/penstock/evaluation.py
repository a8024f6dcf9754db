"""Evaluating a sweep: every SAE and baseline on the same report tokens, by whichever model hosts are there.

The work is cut into slices of rows, each for all SAEs of a site, so that the passes they share are made once, and no
slice keeps a host for longer than a block does.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from penstock.errors import SweepError, UserError
from penstock.pareto import sae_key
from penstock.plan import PlannedSAE
from penstock.resolved import ResolvedSweep
from penstock.sites import Site
from penstock.subjects import BASES, Subject

STATUS_SECONDS = 10.0
TRIES_PER_HOST = 3


@dataclass
class _Round:
    """The evaluation of one site: how many slices are still out, and the sums so far."""

    site: Site
    subjects: tuple[Subject, ...]
    left: int
    sums: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Slice:
    round: _Round
    start_row: int
    stop_row: int


def figures_file(sweep: ResolvedSweep, subject: Subject, site: Site) -> str:
    """Where the figures of a subject lie under the sweep's protocol."""
    if subject.basis is None:
        prefix = "" if subject.prefix is None else f"-prefix-{subject.prefix}"
        return f"{subject.source.removesuffix('/final')}/evaluation-{sweep.protocol_id}{prefix}.json"
    place = "+".join(site.hook_points)
    return f"{sweep.calibration_folder}/{place}/{subject.name}-{sweep.protocol_id}.json"


def of_sae(sae: PlannedSAE, prefix: int | None = None) -> Subject:
    """A finished SAE, or the first latents of it."""
    return Subject(sae_key(sae.sae_id, prefix), f"saes/{sae.sae_id}/final", prefix=prefix)


def bases(sweep: ResolvedSweep, site: Site) -> list[Subject]:
    """The baselines that need no training: the top k neurons and principal components.

    At a transcoder's site they are bases of what is written, so that they know what a transcoder has to predict: there
    they show what k coefficients can reach at most, rather than what has to be beaten.
    """
    source = sweep.calibration_file(site.array(site.writes, sweep.spec.data.exclude.norm_over_median))
    return [
        Subject(f"{basis}-{k}", source, basis, k)
        for basis in BASES
        for k in sweep.spec.baselines.k
        if k <= sweep.model.hook_points[site.writes]
    ]


def evaluate_on_hosts(sweep: ResolvedSweep, hosts: Sequence[Any], say: Callable[[str], None]) -> int:
    """Evaluate what has no figures yet, and write them into storage. Returns the tokens that went through SAEs.

    A host that dies is given its slice again. Raises `SweepError` when they keep dying.
    """
    import ray

    todo = _slices(sweep)
    if not todo:
        return 0
    rounds = {id(part.round): part.round for part in todo}.values()
    say(
        f"evaluating {sum(len(one.subjects) for one in rounds)} SAEs and baselines on "
        f"{sweep.spec.data.report_tokens:,} tokens of the report split"
    )
    total, shown, failures, tokens = len(todo), time.monotonic(), 0, 0
    idle, asked = list(hosts), {}
    while todo or asked:
        while todo and idle:
            host, part = idle.pop(), todo.pop(0)
            rows = part.start_row, part.stop_row
            reference = host.evaluate.remote(sweep.store.id, part.round.site, part.round.subjects, "report", *rows)
            asked[reference] = host, part
        finished, _ = ray.wait(list(asked), timeout=1.0)
        for reference in finished:
            host, part = asked.pop(reference)
            try:
                sums = ray.get(reference)
            except ray.exceptions.RayActorError:
                failures += 1
                if failures > TRIES_PER_HOST * len(hosts):
                    raise SweepError("the model hosts die while evaluating; Ray's logs say of what") from None
                say("a model host died while evaluating; its slice is made again")
                todo.insert(0, part)
                time.sleep(1.0)
            except UserError as error:  # it comes with the host's traceback around it
                raise getattr(error, "cause", error) from None
            else:
                tokens += _add(sweep, part.round, sums)
            idle.append(host)
        if time.monotonic() - shown > STATUS_SECONDS:
            shown = time.monotonic()
            say(f"evaluation: {total - len(todo) - len(asked)} of {total} slices")
    return tokens


def _slices(sweep: ResolvedSweep) -> list[_Slice]:
    rows, slices = _report_rows(sweep), []
    for site in sweep.spec.sites:
        trained = [sae for sae in sweep.saes if sae.site == site and sweep.is_finished(sae)]
        subjects = [of_sae(sae, prefix) for sae in trained for prefix in (None, *sae.prefix_widths)]
        subjects += bases(sweep, site)
        new = tuple(one for one in subjects if not sweep.storage.exists(figures_file(sweep, one, site)))
        if new:
            # As long as harvesting a block, so that neither kind of work starves the other.
            length = max(sweep.spec.model.harvest_rows, sweep.spec.data.block_rows // len(new))
            starts = range(0, rows, length)
            one = _Round(site, new, len(starts))
            slices += [_Slice(one, start, min(start + length, rows)) for start in starts]
    return slices


def _report_rows(sweep: ResolvedSweep) -> int:
    """Rows of the report split that hold `report_tokens` kept tokens."""
    total = sweep.store.n_rows("report")
    kept = np.cumsum(sweep.store.kept(sweep.store.rows("report", 0, total)).sum(1))
    return min(total, int(np.searchsorted(kept, sweep.spec.data.report_tokens)) + 1)


def _add(sweep: ResolvedSweep, one: _Round, sums: Mapping[str, Any]) -> int:
    """Take in the sums of a slice; after the last one write the figures, and return the tokens they are of."""
    for name, part in sums.items():
        one.sums[name] = one.sums[name].merge(part) if name in one.sums else part
    one.left -= 1
    if one.left:
        return 0
    tokens = 0
    for subject in one.subjects:
        metrics = one.sums[subject.name].metrics()
        tokens += int(metrics["n_tokens"])
        record = {"protocol": sweep.protocol, "metrics": metrics}
        sweep.storage.write_json(figures_file(sweep, subject, one.site), record)
    return tokens
