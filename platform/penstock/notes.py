"""What MLflow shows as the description of a sweep's runs: the figures, why an SAE did or did not make it, and the
commands and lines of code that fetch it. A description that a user has changed is left alone."""

import json
import shlex
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from penstock.home import Home
from penstock.identity import content_id
from penstock.pareto import by_hook_point, key_of, kind_of
from penstock.tracking import SPARSITY_SETTINGS, SweepRuns, connect, pages, reported

if TYPE_CHECKING:
    from mlflow.entities import Run

NOTE, NOTE_ID = "mlflow.note.content", "penstock.note"
VIEW = "penstock"
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"  # of an experiment: what `?viewStateShareKey=penstock` shows
_VIEW = {
    "searchFilter": "tags.`penstock.kind` = 'sae'", "orderByKey": "metrics.`ce_recovered`", "orderByAsc": False,
    "startTime": "ALL", "columnWidths": {},
    "selectedColumns": [
        *(f"metrics.`{name}`" for name in ("l0", "ce_recovered", "explained_variance", "dead_fraction")),
        *(f"params.`{name}`" for name in ("hook_point", "architecture", "d_sae")), "tags.`on_front`",
    ],
}  # fmt: skip
_CHARACTERS = 7800  # MLflow keeps 8000 of a tag
_SHOWN = {
    "l0": ("L0", ".4g"), "ce_recovered": ("CE recovered", ".4f"), "kl_recovered": ("KL recovered", ".4f"),
    "ce_increase": ("CE increase, nats", ".4f"), "explained_variance": ("explained variance", ".4f"),
    "mse": ("MSE", ".4g"), "dead_fraction": ("dead latents", ".3f"), "seed_stability": ("seed stability", ".3f"),
}  # fmt: skip


def write_notes(runs: SweepRuns, table: pd.DataFrame, models: Mapping[str, str]) -> None:
    """Describe the sweep's run and those of its SAEs. `table` is the sweep's (see `tracking.sweep_table`), `models` the
    `models:/` address of each that is registered, by `pareto.sae_key`."""
    with reported(runs.home):
        client = connect(runs.home)
        parent = client.get_run(runs.run_id)
        protocol = parent.data.params.get("protocol", "")
        experiment = client.get_experiment(parent.info.experiment_id)
        if VIEW_TAG not in experiment.tags:
            client.set_experiment_tag(experiment.experiment_id, VIEW_TAG, json.dumps(_VIEW))
        _write(client, parent, sweep_note(runs, table, parent.data.params, models))
        rows_of: dict[str, list[dict[str, Any]]] = {}
        for record in table.to_dict("records"):
            rows_of.setdefault(record["run_id"], []).append(record)
        for run in runs.children():
            if run.info.run_id in rows_of:
                _write(client, run, sae_note(runs, rows_of[run.info.run_id], protocol, models))


def views(home: Home) -> dict[str, str]:
    """{sweep: the address, below an MLflow server's, of a table of its SAEs with their figures}, the newest first."""
    with reported(home):
        found = pages(connect(home).search_experiments, order_by=["creation_time DESC"])
        return {one.name: f"/#/experiments/{one.experiment_id}/runs?viewStateShareKey={VIEW}"
                for one in found if VIEW_TAG in one.tags}  # fmt: skip


def _write(client: Any, run: "Run", note: str) -> None:
    from mlflow.entities import RunTag

    tags, note_id = run.data.tags, content_id(note)
    written = tags.get(NOTE)
    if note_id == tags.get(NOTE_ID) or (written and content_id(written) != tags.get(NOTE_ID)):
        return
    client.log_batch(run.info.run_id, tags=[RunTag(NOTE, note), RunTag(NOTE_ID, note_id)])


def sae_note(
    runs: SweepRuns, rows: list[dict[str, Any]], protocol: str, models: Mapping[str, str]
) -> str:
    """An SAE's description as Markdown. `rows` are the table's: the SAE's own, then those of its prefixes."""
    record = rows[0]
    parts = [_verdict(record, runs.l0_band)]
    if record["status"] == "finished":  # MLflow shows the first lines only, until one asks for more
        parts[0] += f"\n`penstock pull {runs.name} --sae {shlex.quote(key_of(record))} --to DIR` fetches it."
        parts += [figures_table(record, protocol), _targets(record)]
        sources = [f'"{runs.name}", sae="{key_of(record)}"', *filter(None, [models.get(key_of(record))])]
        parts.append(load_code(*sources))
        for of_prefix in rows[1:]:
            key, front = key_of(of_prefix), " and is on the front" if of_prefix["on_front"] else ""
            parts.append(
                f"Its first {int(of_prefix['prefix'])} latents alone: `{key}` has L0 {of_prefix['l0']:.4g}, CE "
                f"recovered {of_prefix['ce_recovered']:.4f}{front}."
            )
    return _fitting(parts)


def sweep_note(
    runs: SweepRuns, table: pd.DataFrame, params: Mapping[str, str], models: Mapping[str, str]
) -> str:
    """The sweep's description as Markdown: the front of each hook point, and what to do next."""
    statuses = table[table["prefix"].isna()]["status"].value_counts()
    counts = ", ".join(f"{count} {status}" for status, count in statuses.items())
    front = by_hook_point(table[table["on_front"]])
    band = "" if runs.l0_band is None else f" with an L0 of {runs.l0_band[0]:g} to {runs.l0_band[1]:g}"
    about = [f"{title} `{params[name]}`" for title, name in (
        ("Model", "model"), ("data", "dataset"), ("tokens", "train_tokens"), ("protocol of the figures", "protocol")
    ) if name in params]  # fmt: skip
    facts = ", ".join(about) + "." if about else ""
    parts = [
        f"**{counts}.** On the Pareto front of their hook points{band}: {len(front)} SAEs, listed below.\n"
        f"`penstock report {runs.name} --to report.html` shows all with their curves, `penstock front {runs.name}` "
        "prints them. Each run's description says how to fetch its SAE. Among the runs, `tags.on_front = \"true\"` "
        "finds the front; to compare SAEs, select their runs, then Compare.",
        facts,
    ]  # fmt: skip
    shown = 0
    sections = [_section(str(name), group, models) for name, group in front.groupby("hook_point", sort=False)]
    for section in sections:
        if sum(map(len, [*parts, section])) > _CHARACTERS - 300:
            break
        parts.append(section)
        shown += 1
    if shown < len(sections):
        parts.append(f"... and {len(sections) - shown} more hook points.")
    return _fitting(parts)


def _section(hook_point: str, front: pd.DataFrame, models: Mapping[str, str]) -> str:
    missed = [_missed(record) for record in front.to_dict("records")]
    targets = any(cell is not None for cell in missed)
    header = ["SAE", "architecture", "sparsity", "L0", "CE recovered (95% interval)", "dead",
              *(["targets"] if targets else []), "alias"]  # fmt: skip
    addresses = [models[key].rpartition("@") for key in map(key_of, front.to_dict("records")) if key in models]
    title = f"**`{hook_point}`**" + (f": model `{addresses[0][0]}`" if addresses else "")
    lines = [f"{title}\n", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for record, of_targets in zip(front.to_dict("records"), missed, strict=True):
        key = key_of(record)
        cells = [f"`{key}`", kind_of(record), _sparsity(record), f"{record['l0']:.4g}",
                 _figure(record, "ce_recovered", ".4f"), f"{record['dead_fraction']:.3f}",
                 *([of_targets or ""] if targets else []),
                 f"`@{models[key].rpartition('@')[2]}`" if key in models else ""]  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _verdict(record: Mapping[str, Any], l0_band: tuple[float, float] | None) -> str:
    where = f"`{record['hook_point']}`"
    if record["status"] != "finished":
        reason = f": {record['reason']}" if record.get("reason") else ""
        return f"**{str(record['status']).capitalize()}**{reason}. There is nothing to fetch."
    if record["on_front"]:
        sure = "; its seeds agree" if record["certain"] else ""
        return f"**On the Pareto front** of {where}{sure}."
    if isinstance(record["dominated_by"], str):
        return (
            f"**Not on the front** of {where}: `{record['dominated_by']}` recovers more CE at no higher L0"
            f"{'; their seeds agree' if record['certain'] else ''}."
        )
    if l0_band is not None and not l0_band[0] <= record["l0"] <= l0_band[1]:
        return f"**Not on the front** of {where}: its L0 lies outside {l0_band[0]:g} to {l0_band[1]:g}."
    return f"**Not on the front** of {where}."


def figures_table(record: Mapping[str, Any], protocol: str) -> str:
    """A table's row as a Markdown table of its figures."""
    lines = [f"| figure | value (95% interval), protocol {protocol} |", "|---|---|"]
    for name, (title, form) in _SHOWN.items():
        if pd.notna(record.get(name)):
            lines.append(f"| {title} | {_figure(record, name, form)} |")
    return "\n".join(lines)


def _figure(record: Mapping[str, Any], name: str, form: str) -> str:
    """A figure, with its interval where it has one."""
    low, high = record.get(f"{name}_low"), record.get(f"{name}_high")
    interval = "" if pd.isna(low) or pd.isna(high) else f" ({low:{form}} to {high:{form}})"
    return f"{record[name]:{form}}{interval}"


def _missed(record: Mapping[str, Any]) -> str | None:
    """What the SAE missed of the spec's targets, "met" where nothing, None where there are none."""
    return (record["missed"] or "met") if isinstance(record.get("missed"), str) else None


def _targets(record: Mapping[str, Any]) -> str:
    missed = _missed(record)
    if missed is None:
        return ""
    if missed == "met":
        return "The spec's targets are met."
    return f"Targets missed: {missed}." + (f" The usual remedy: {record['remedy']}." if record.get("remedy") else "")


def _sparsity(record: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={record[name]:g}" for name in SPARSITY_SETTINGS if pd.notna(record.get(name)))


def load_code(*sources: str) -> str:
    """Markdown: how to load an SAE. `sources` are what goes into `load_sae(...)`, a model's address without quotes."""
    calls = [f'sae = penstock.load_sae("{source}")' if _is_model(source) else f"sae = penstock.load_sae({source})"
             for source in sources]  # fmt: skip
    lines = ["```python", "import penstock", "", *calls, "```"]
    for model in filter(_is_model, sources):
        lines += [
            "", "Without Penstock, wherever MLFLOW_TRACKING_URI names this MLflow (SAELens reads the files):", "",
            "```python", "import mlflow, sae_lens", "", f'folder = mlflow.artifacts.download_artifacts("{model}")',
            "sae = sae_lens.SAE.load_from_disk(folder)", "```",
        ]  # fmt: skip
    return "\n".join(lines)


def _is_model(source: str) -> bool:
    return source.startswith("models:/")


def _fitting(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)[:_CHARACTERS] + "\n"
