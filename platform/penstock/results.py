"""What a sweep came to: the table, the baselines, the plots, and all of it in MLflow."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.compare import seed_stability
from penstock.evaluation import Evaluation, bases, evaluation_of, of_sae
from penstock.identity import code_hash
from penstock.pack import KEPT
from penstock.pareto import mark_front
from penstock.plan import FROZEN_DECODER, PlannedSAE
from penstock.registry import hand_over
from penstock.resolved import ResolvedSweep
from penstock.statistics import HEADLINE
from penstock.sweep_files import published_file, result_file
from penstock.targets import missed
from penstock.tracking import ROWS_FILE

if TYPE_CHECKING:
    from penstock.mirror import Mirror
    from penstock.tracking import Tracker

SETTLED = ("finished", "diverged", "pruned")


def outcome(
    sweep: ResolvedSweep, sae: PlannedSAE, evaluation: Evaluation
) -> tuple[str, dict[str, float], str | None]:
    """(status, figures of an evaluation, why it was stopped) of an SAE."""
    if sweep.is_finished(sae):
        summary = sweep.storage.read_json(f"saes/{sae.sae_id}/final/summary.json")
        figures = evaluation.figures(of_sae(sae), sae.site)
        # Whether a latent is dead shows over more tokens than the report split has.
        return "finished", figures | {name: summary[name] for name in ("dead_fraction", "dead_over_tokens")}, None
    stopped = sweep.stopped(sae)
    return stopped.get("status", "failed"), {}, stopped.get("reason", "its pack never finished it")


def prefix_figures(
    sweep: ResolvedSweep, sae: PlannedSAE, evaluation: Evaluation
) -> dict[int, dict[str, float]]:
    """The figures of a finished SAE's prefixes, by width."""
    if not sae.prefix_widths or not sweep.is_finished(sae):
        return {}
    summary = sweep.storage.read_json(f"saes/{sae.sae_id}/final/summary.json")
    found = {}
    for width in sae.prefix_widths:
        figures = evaluation.figures(of_sae(sae, width), sae.site)
        dead = summary["dead_fraction_of_prefix"][str(width)]
        found[width] = figures | {"dead_fraction": dead, "dead_over_tokens": summary["dead_over_tokens"]}
    return found


def sae_table(
    sweep: ResolvedSweep, evaluation: Evaluation | None = None, stability: Mapping[str, float] | None = None
) -> pd.DataFrame:
    """One row an SAE and one a prefix, baselines left out: settings, figures with their 95% intervals (`l0_low`,
    `l0_high`, ...), status, whether it is on the front and who dominates it, which of the spec's targets it misses.
    Figures are those that are published, unless another evaluation of the sweep's SAEs is given. `stability`: by SAE
    id, from `compare.seed_stability`, the column `seed_stability`."""
    evaluation, rows = evaluation or evaluation_of(sweep), []
    for sae in sweep.saes:
        if sae.baseline is None:
            status, whole, reason = outcome(sweep, sae, evaluation)
            ended = {"status": status, "reason": reason}
            for prefix, figures in {None: whole, **prefix_figures(sweep, sae, evaluation)}.items():
                rows.append({"sae_id": sae.sae_id, **sae.params, "prefix": prefix, **figures, **ended})
    table = pd.DataFrame(rows).astype({"prefix": float})
    # Settings first, also those that only later rows have: what stands before the figures was asked for.
    leading = ["sae_id", *dict.fromkeys(name for sae in sweep.saes if sae.baseline is None for name in sae.params)]
    table = table[[*leading, *table.columns.difference(leading, sort=False)]]
    intervals = [f"{name}_{end}" for name in HEADLINE for end in ("low", "high")]
    missing = [name for name in (*HEADLINE, *intervals) if name not in table]
    table = table.assign(**dict.fromkeys(missing, float("nan")))
    whole = table["prefix"].isna()
    table = table.assign(seed_stability=table["sae_id"].where(whole).map(stability or {}).astype(float))
    return missed(mark_front(table, sweep.spec.select.l0_band, evaluation.rows()), sweep.spec.targets)


def baseline_table(sweep: ResolvedSweep, evaluation: Evaluation | None = None) -> pd.DataFrame:
    """One row a baseline: kind, hook_point, k and its figures. Bases of what a transcoder writes have kinds of their
    own, `target_neurons` and `target_pca`."""
    evaluation, rows = evaluation or evaluation_of(sweep), []
    for site in sweep.spec.sites:
        for basis in bases(sweep, site):
            figures = evaluation.figures(basis, site)
            kind = f"target_{basis.basis}" if site.is_transcoder else basis.basis
            rows.append({"kind": kind, "hook_point": site.label, "k": basis.k, **figures})
    for sae in sweep.saes:
        if sae.baseline is not None and sweep.is_finished(sae):
            _, figures, _ = outcome(sweep, sae, evaluation)
            rows.append({"kind": FROZEN_DECODER, "hook_point": sae.hook_point, "k": sae.params["k"], **figures})
    return pd.DataFrame(rows, columns=None if rows else ["kind", "hook_point", "k", "l0", "ce_recovered"])


def publish(
    sweep: ResolvedSweep, tracker: "Tracker", cost: Mapping[str, float], mirror: "Mirror | None" = None
) -> pd.DataFrame:
    """Log every SAE's end, the tables, the plots and the cost. Returns the table."""
    evaluation = evaluation_of(sweep)
    finished = [sae for sae in sweep.saes if sae.baseline is None and sweep.is_finished(sae)]
    stability = seed_stability(sweep.storage, finished)
    for sae in sweep.saes:
        _publish_sae(sweep, tracker, mirror, sae, evaluation, stability)
    table, baselines = sae_table(sweep, evaluation, stability), baseline_table(sweep, evaluation)
    status = "finished" if table["status"].isin(SETTLED).all() else "failed"
    files = [*_write_files(sweep, table, baselines, evaluation.rows(), cost, status), _write_rows(sweep, evaluation)]
    tracker.finish_sweep(status=status, front=table, baselines=baselines, cost=cost, files=files)
    hand_over(sweep.home, sweep.sweep_id)
    sweep.storage.write_json(published_file(sweep.sweep_id), {"protocol": sweep.protocol, "store": sweep.store.id})
    if status == "finished":
        record = {"saes": [sae.sae_id for sae in sweep.saes], "cost": dict(cost)}
        sweep.storage.write_json(result_file(sweep.sweep_id), record)
    return table


def end_stopped(sweep: ResolvedSweep, tracker: "Tracker", mirror: "Mirror | None" = None) -> None:
    """Log the end of the SAEs that have diverged or were pruned: it stays so when the sweep goes on another time."""
    for sae in sweep.saes:
        if not sweep.is_finished(sae) and sweep.stopped(sae).get("status") in SETTLED:
            _publish_sae(sweep, tracker, mirror, sae, evaluation_of(sweep), {})


def report_folder(sweep: ResolvedSweep) -> Path:
    return sweep.home.path / "reports" / sweep.sweep_id


def _publish_sae(
    sweep: ResolvedSweep,
    tracker: "Tracker",
    mirror: "Mirror | None",
    sae: PlannedSAE,
    evaluation: Evaluation,
    stability: Mapping[str, float],
) -> None:
    status, figures, reason = outcome(sweep, sae, evaluation)
    if sae.sae_id in stability:
        figures |= {"seed_stability": stability[sae.sae_id]}
    for width, of_prefix in prefix_figures(sweep, sae, evaluation).items():
        figures |= {f"prefix_{width}.{name}": value for name, value in of_prefix.items()}
    if status == "finished":
        files = sweep.storage.read_folder(f"saes/{sae.sae_id}/final")
        history = json.loads(files.pop("summary.json"))["history"]
    else:
        files, history = {}, sweep.stopped(sae).get("history", [])
    new = tracker.log_rows(sae.sae_id, history)
    if mirror is not None:
        mirror.log(sae.sae_id, new)
        mirror.finish(sae.sae_id, status, figures)
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryDirectory() as also:
        folder = Path(temporary)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        kept = Path(also) if _copy_kept(sweep, sae, Path(also)) else None
        tracker.finish_sae(
            sae.sae_id, status=status, metrics=figures, folder=folder if files else None, reason=reason, kept=kept
        )


def _copy_kept(sweep: ResolvedSweep, sae: PlannedSAE, to: Path) -> bool:
    """Copy what the SAE was on the way to a folder; whether there is any."""
    names = [name for name in sweep.storage.names(f"saes/{sae.sae_id}/{KEPT}") if name.isdigit()]
    for name in names:
        (to / name).mkdir()
        for file, data in sweep.storage.read_folder(f"saes/{sae.sae_id}/{KEPT}/{name}").items():
            (to / name / file).write_bytes(data)
    return bool(names)


def _write_rows(sweep: ResolvedSweep, evaluation: Evaluation) -> Path:
    path = report_folder(sweep) / ROWS_FILE
    evaluation.rows().to_parquet(path, index=False)
    return path


def sae_details(sweep: ResolvedSweep) -> dict[str, Any]:
    """The curves and firing rates of the SAEs, as far as they got: the content of `details.json`."""
    from safetensors.numpy import load

    from penstock_dashboards.details import details

    histories, sparsities, prefixes = {}, {}, {}
    for sae in sweep.saes:
        if sae.baseline is not None:
            continue
        final = f"saes/{sae.sae_id}/final"
        prefixes[sae.sae_id] = sae.prefix_widths
        if sweep.is_finished(sae):
            histories[sae.sae_id] = sweep.storage.read_json(f"{final}/summary.json")["history"]
            sparsities[sae.sae_id] = load(sweep.storage.read(f"{final}/sparsity.safetensors"))["sparsity"]
        else:
            histories[sae.sae_id] = sweep.stopped(sae).get("history", [])
    return details(histories, sparsities, prefixes)


def _write_files(
    sweep: ResolvedSweep,
    table: pd.DataFrame,
    baselines: pd.DataFrame,
    rows: pd.DataFrame,
    cost: Mapping[str, float],
    status: str,
) -> Sequence[Path]:
    from penstock_dashboards.pareto import write_png
    from penstock_dashboards.report import Source, write_report

    folder = report_folder(sweep)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("report.html", "protocol.json", "details.json", "pareto.png")
    page, protocol, details, png = (folder / name for name in names)
    known = sae_details(sweep)
    details.write_text(json.dumps(known, allow_nan=False) + "\n")
    protocol.write_text(json.dumps(sweep.protocol, indent=1) + "\n")
    band = sweep.spec.select.l0_band
    source = Source(
        title=sweep.spec.name,
        sweep=sweep.sweep_id,
        l0_band=band,
        spec=sweep.yaml,
        facts={"status": status},
        provenance={"sweep": sweep.sweep_id, "protocol": sweep.protocol_id, "code": code_hash()},
        protocol=sweep.protocol,
        cost=cost,
        options=("--home", str(sweep.home.path)) if sweep.home.artifact_location else (),
        details=known,
        rows=rows,
    )
    write_report(table, baselines, page, source)
    if not table["ce_recovered"].notna().any():
        return [page, protocol, details]
    write_png(table, baselines, png, title=sweep.spec.name, l0_band=band)
    return [page, protocol, details, png]
