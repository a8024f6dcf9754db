"""A sweep's report: one HTML file that says which SAE to take and why, and holds all that this rests on.

This module gathers what the page shows as plain data (`page_data`); `page` puts it into the file, and the page's own
script (`templates/`) draws it.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from penstock.home import Home
from penstock.pareto import Band, by_hook_point, ce_increase, in_band, key_of, kind_of, seed_groups
from penstock_dashboards.answer import Answer, answers, signed, verdicts
from penstock_dashboards.details import rounded, spread
from penstock_dashboards.marks import BASELINES, REFERENCES, STYLES, Style, at_hook, baseline_points, known, style_of
from penstock_dashboards.page import write_page

FIGURES = {  # label, decimals, whether less is better, what it is
    "l0": ("L0", 2, True, "active latents a token"),
    "ce_recovered": ("CE recovered", 4, False, "of the loss that ablating the hook point costs; 1 is all of it"),
    "ce_increase": ("CE increase, nats", 4, True, "what the model loses a token with the SAE in place"),
    "dead_fraction": ("Dead", 3, True, "share of latents that never fired over the stated tokens"),
    "explained_variance": ("Explained variance", 4, False, "of the activations"),
    "kl_recovered": ("KL recovered", 4, False, "of the divergence from the clean model that ablation causes"),
    "seed_stability": ("Seed stability", 3, False, "share of latents found again with other seeds"),
}
_MORE = {  # label, decimals
    "mse": ("MSE", 4), "l1": ("L1", 3), "cosine": ("Cosine", 4), "l2_ratio": ("L2 ratio", 4),
    "relative_reconstruction_bias": ("Relative reconstruction bias", 4), "kl_sae": ("KL with the SAE", 4),
    "kl_ablated": ("KL ablated", 4), "ce_sae": ("CE with the SAE", 4), "ce_clean": ("CE of the model", 4),
    "ce_ablated": ("CE ablated", 4), "n_tokens": ("Tokens evaluated", 0), "dead_over_tokens": ("Dead over tokens", 0),
}  # fmt: skip
_TEXTS = {"sae_id", "hook_point", "architecture", "prefix", "status", "reason", "run_id", "on_front", "kind",
          "baseline", "on_overall_front", "dominated_by", "certain", "missed", "remedy", "proposed"}  # fmt: skip
_NAMING = ("d_sae", "k", "l1_coefficient", "l0_coefficient", "target_l0", "seed")
_CURVE_POINTS = 30_000  # of all curves together: the page of many SAEs keeps fewer points of each
_CURVES = (40, 200)  # the fewest and the most points of a curve


@dataclass(frozen=True)
class Source:
    """What a page says around the tables. `sweep` and `options` are how its commands call the sweep and find it.

    `spec` is the resolved spec (YAML), `facts` lead the page, `provenance` ends it, `protocol` is what the figures
    were measured on, `cost` has MLflow's names (`seconds_train`, ...), `details` is as `details.details` makes it, and
    `rows` are the evaluation's rows, one a sequence (`SweepRuns.evaluation_rows`).
    """

    title: str
    sweep: str
    l0_band: Band | None = None
    spec: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    options: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    rows: pd.DataFrame | None = None


def report(home: Home, sweep: str, to: str | Path) -> Path:
    """Write a sweep's report, as MLflow knows the sweep by now, and return its path. Raises `SweepError`.

    The commands in it name the sweep by its id and the home by its path, so that they go on meaning this sweep.
    """
    from mlflow import MlflowClient

    from penstock.tracking import baseline_table, find_sweep, sweep_table

    runs = find_sweep(home, sweep)
    parameters = MlflowClient(tracking_uri=home.tracking_uri).get_run(runs.run_id).data.params
    protocol = runs.artifact("protocol.json")
    source = Source(
        title=runs.name,
        sweep=runs.sweep_id,
        l0_band=runs.l0_band,
        spec=runs.spec,
        facts={"status": runs.status, "started": f"{runs.started.tz_convert(None):%Y-%m-%d %H:%M} UTC"},
        provenance={"sweep": runs.sweep_id, "MLflow run": runs.run_id, **parameters},
        protocol={} if protocol is None else json.loads(protocol.read_text(encoding="utf-8")),
        cost=runs.cost,
        options=("--home", str(home.path)) if home.artifact_location else (),
        details=runs.details(),
        rows=runs.evaluation_rows(),
    )
    return write_report(sweep_table(home, runs), baseline_table(home, runs), to, source)


def write_report(table: pd.DataFrame, baselines: pd.DataFrame, to: str | Path, source: Source) -> Path:
    """Write a sweep's table (with `on_front`) and its baselines as one page, whole or not at all, and return its path.

    Raises `SweepError` when the file cannot be written.
    """
    data = page_data(table, baselines, source)
    return write_page(Path(to), source.title, _in_short(data), data)


def page_data(table: pd.DataFrame, baselines: pd.DataFrame, source: Source) -> dict[str, Any]:
    """All that the page shows, in JSON's types only. SAEs, hook points and architectures are named by their place."""
    table = by_hook_point(_complete(table))
    baselines = baseline_points(baselines)
    spec = yaml.safe_load(source.spec) if source.spec else {}
    spec = spec if isinstance(spec, dict) else {}
    targets = {name: value for name, value in (spec.get("targets") or {}).items() if value is not None}
    settings = _settings(table)
    hook_points = list(dict.fromkeys([*table["hook_point"], *baselines["hook_point"]]))
    architectures = _architectures(table)
    picked = answers(table, baselines, source.l0_band, targets, source.rows)
    data = {
        "title": source.title,
        "facts": _facts(table, source),
        "band": source.l0_band,
        "hooks": hook_points,
        "architectures": [{"name": name, **_look(style_of(name))} for name in architectures],
        "figures": _figures(table),
        "settings": settings,
        "naming": _naming(table),
        "varied": [name for name in settings if table.groupby("architecture")[name].nunique(dropna=False).gt(1).any()],
        "saes": _saes(table, source, targets, hook_points, architectures, settings),
        "targets": bool(targets),
        "answers": [_answer(answer, hook_points) for answer in picked],
        "baselines": _baselines(baselines, hook_points),
        "beaten": _beaten(table, baselines, hook_points),
        "losses": _losses(table, hook_points),
        "details": _details(table, source.details),
        "protocol": _protocol(spec, source.protocol, table),
        "cost": _cost(source.cost),
        "provenance": [[name, str(value)] for name, value in source.provenance.items()],
        "spec": source.spec,
    }
    return _plain(data)


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """The table with every column that the page counts on; that of an older sweep, or of one without figures, lacks
    some."""
    table = table.drop(columns="prefix") if "prefix" in table and table["prefix"].isna().all() else table
    added: dict[str, Any] = {}
    for name in ("l0", "ce_recovered"):
        if name not in table:
            added[name] = math.nan
    if "ce_increase" not in table or table["ce_increase"].isna().all():
        added["ce_increase"] = ce_increase(table)
    for name in ("on_front", "on_overall_front"):
        if name not in table:
            added[name] = False
    return table.assign(**added)


def _plain(value: Any) -> Any:
    """The same with JSON's own types only: numpy's scalars as Python's, null for what is not finite, floats with seven
    digits."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not value.is_integer():  # nor is inf or nan an integer
        return rounded(value, 7)
    return int(value) if isinstance(value, float) and abs(value) < 2**53 else value


# ---- the SAEs -------------------------------------------------------------------------------------------------------


def _settings(table: pd.DataFrame) -> list[str]:
    """What the SAEs were asked for: the columns before the first figure, L0, but those that say which one it is."""
    names = list(table)
    return [name for name in names[: names.index("l0")] if name not in _TEXTS]


def _architectures(table: pd.DataFrame) -> list[str]:
    there = {str(name) for name in table["architecture"]}
    return [*(name for name in STYLES if name in there), *sorted(there - set(STYLES))]


def _look(style: Style) -> dict[str, str]:
    return {"light": style.colour, "dark": style.dark, "shape": style.shape}


def _figures(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The figures there are, those that lead first: `lead` ones are in the table unasked."""
    found = [
        {"name": name, "label": label, "decimals": decimals, "less": less, "about": about, "lead": True}
        for name, (label, decimals, less, about) in FIGURES.items()
        if name in table and (table[name].notna().any() or name in ("l0", "ce_recovered"))
    ]
    names = list(table)
    for name in names[names.index("l0") :]:
        if name in FIGURES or name in _TEXTS or name.endswith(("_low", "_high")) or not table[name].notna().any():
            continue
        if pd.api.types.is_numeric_dtype(table[name]):
            label, decimals = _MORE.get(name, (name.replace("_", " "), None))
            found.append({"name": name, "label": label, "decimals": decimals, "less": None, "about": "", "lead": False})
    return found


def _saes(
    table: pd.DataFrame,
    source: Source,
    targets: Mapping[str, Any],
    hook_points: Sequence[str],
    architectures: Sequence[str],
    settings: Sequence[str],
) -> list[dict[str, Any]]:
    seeds = {key: (number, int(group["seeds"])) for number, group in enumerate(seed_groups(table).to_dict("records"))
             for key in group["members"]}  # fmt: skip
    names = [figure["name"] for figure in _figures(table)]
    records = table.to_dict("records")
    by_key = {key_of(record): record for record in records}
    naming = _naming(table)
    called = {key: _called(record, [name for name in naming if name != "seed" or seeds[key][1] > 1])
              for key, record in by_key.items()}  # fmt: skip
    found = []
    for (key, record), in_the_band in zip(by_key.items(), in_band(table, source.l0_band), strict=True):
        evaluated = known(record.get("l0")) and known(record.get("ce_recovered"))
        group, count = seeds[key]
        folder = f"sae-{key.replace('[', '-').rstrip(']')}"
        found.append({
            "key": key,
            "whole": str(record["sae_id"]),
            "kind": kind_of(record),
            "called": called[key],
            "hook": hook_points.index(record["hook_point"]),
            "architecture": architectures.index(str(record["architecture"])),
            "status": str(record["status"]) if known(record.get("status")) else "",
            "front": bool(record["on_front"]),
            "overall": bool(record["on_overall_front"]),
            "seeds": group if count > 1 else None,
            "figures": {name: record[name] for name in names if known(record.get(name))},
            "intervals": {name: [record[f"{name}_low"], record[f"{name}_high"]] for name in names
                          if known(record.get(f"{name}_low")) and known(record.get(f"{name}_high"))},
            "settings": {name: _typed(record[name]) for name in settings if known(record.get(name))},
            "why": _why(record, bool(in_the_band), count, by_key, called),
            "missed": _text(record, "missed"),
            "remedy": _text(record, "remedy").rstrip("."),
            "targets": verdicts(record, targets) if evaluated else [],
            "command": _command(source, key, folder) if evaluated else None,
            "folder": folder,
        })  # fmt: skip
    return found


def _naming(table: pd.DataFrame) -> list[str]:
    """The settings that an SAE is called by: what sets its sparsity, its width where widths vary, its seed."""
    widths = table["d_sae"].nunique() > 1 if "d_sae" in table else False
    return [name for name in _NAMING if name in table and (name != "d_sae" or widths)]


def _called(record: Mapping[str, Any], shown: Sequence[str]) -> str:
    """What a sentence calls an SAE: `topk k=32`."""
    parts = [f"{name}={_typed(record[name])}" for name in shown if known(record.get(name))]
    return " ".join([kind_of(record), *parts])


def _typed(value: Any) -> Any:
    """A setting as it was written: 16.0 in a column that has gaps was 16. A list is text, as MLflow keeps it."""
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, list | tuple):
        return str(tuple(value))
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


def _text(record: Mapping[str, Any], name: str) -> str:
    return str(record[name]) if known(record.get(name)) else ""


def _why(
    record: Mapping[str, Any],
    in_the_band: bool,
    seeds: int,
    by_key: Mapping[str, Mapping[str, Any]],
    called: Mapping[str, str],
) -> list[list[str]]:
    """Sentences on where an SAE stands, each with the key of the SAE that it names ("" for none)."""
    status, reason = _text(record, "status"), _text(record, "reason").rstrip(".")
    found = []
    if status and status != "finished":
        said = {"pruned": "Stopped by search before its end"}.get(status, status.capitalize())
        found.append([f"{said}{': ' + reason if reason else ''}.", ""])
    if known(record.get("proposed")):
        found.append([f"Proposed by search in round {int(record['proposed'])}, to fill a gap of the front.", ""])
    if not (known(record.get("l0")) and known(record.get("ce_recovered"))):
        return found
    by = _text(record, "dominated_by")
    if record["on_front"]:
        said = "as far as can be told, none of its width that is as sparse recovers more"
        found.append([f"On the front of its hook point: {said}.", ""])
    elif not in_the_band:
        found.append(["Not on the front: its L0 lies outside the band that the front is taken in.", ""])
    elif by in by_key:
        other = by_key[by]
        gain = float(other["ce_recovered"]) - float(record["ce_recovered"])
        less = f"L0 {float(other['l0']):.3g} against {float(record['l0']):.3g}, CE recovered {signed(gain)}"
        found.append([f"Not on the front: dominated by {called[by]} ({less}).", by])
    elif float(record["ce_recovered"]) <= 0:
        found.append(["Not on the front: it recovers nothing of the loss that ablation costs.", ""])
    else:
        found.append(["Not on the front of its hook point.", ""])
    if seeds < 2:
        found.append(["One seed only: another seed may stand elsewhere.", ""])
    elif known(record.get("certain")):
        certain = bool(record["certain"])
        found.append([f"{'Certain: all' if certain else 'Not certain:'} {seeds} seeds of these settings "
                      f"{'agree on that' if certain else 'do not settle it'}.", ""])  # fmt: skip
    return found


def _command(source: Source, key: str, folder: str) -> str:
    return shlex.join(["penstock", "pull", source.sweep, "--sae", key, "--to", folder, *source.options])


def _answer(answer: Answer, hook_points: Sequence[str]) -> dict[str, Any]:
    return {"hook": hook_points.index(answer.hook_point), "key": answer.key, "why": answer.why, "also": answer.also,
            "ties": answer.ties, "knee": answer.knee, "targets": answer.targets}  # fmt: skip


def _details(table: pd.DataFrame, details: Mapping[str, Any]) -> dict[str, Any]:
    """The details of the table's SAEs, with fewer points a curve where there are many."""
    keys = [key for key in map(key_of, table.to_dict("records")) if key in details]
    fewest, most = _CURVES
    points = min(max(_CURVE_POINTS // max(len(keys), 1), fewest), most)
    found = {}
    for key in keys:
        found[key] = dict(details[key])
        curves = found[key].get("curves")
        if curves:
            kept = spread(len(curves["tokens"]), points)
            found[key]["curves"] = {name: [values[i] for i in kept] for name, values in curves.items()}
    return found


# ---- around them ----------------------------------------------------------------------------------------------------


def _facts(table: pd.DataFrame, source: Source) -> list[list[str]]:
    whole = table[table["prefix"].isna()] if "prefix" in table else table
    saes = f"{len(whole)} SAE{'' if len(whole) == 1 else 's'}"
    if len(whole) < len(table):
        saes += f" and {len(table) - len(whole)} prefixes"
    hook_points = table["hook_point"].nunique()
    facts = [["SAEs", f"{saes} at {hook_points} hook point{'' if hook_points == 1 else 's'}"]]
    if "status" in whole and not (whole["status"] == "finished").all():
        counts = whole["status"].value_counts()
        facts.append(["ended", ", ".join(f"{count} {status}" for status, count in counts.items())])
    facts += [[name, str(value)] for name, value in source.facts.items()]
    if known(source.cost.get("seconds_total")):
        facts.append(["took", _time(float(source.cost["seconds_total"]))])
    return facts


def _time(seconds: float) -> str:
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _baselines(baselines: pd.DataFrame, hook_points: Sequence[str]) -> list[dict[str, Any]]:
    """A line a kind and hook point."""
    found = []
    for (hook_point, kind), group in baselines.groupby(["hook_point", "kind"], sort=False):
        label, _, dashes = BASELINES[kind]
        names = [name for name in FIGURES if name in group]
        points = [{"k": record.get("k"), "figures": {name: record[name] for name in names if known(record[name])}}
                  for record in group.to_dict("records")]  # fmt: skip
        found.append({"hook": hook_points.index(hook_point), "kind": kind, "label": label, "dashes": dashes,
                      "reference": kind in REFERENCES, "points": points})  # fmt: skip
    return found


def _beaten(table: pd.DataFrame, baselines: pd.DataFrame, hook_points: Sequence[str]) -> list[dict[str, Any]]:
    """Each baseline, and beside it the SAE that recovers the most with no more active latents."""
    points = table[table["l0"].notna() & table["ce_recovered"].notna()]
    found = []
    for record in baselines.to_dict("records"):
        rivals = at_hook(points, record["hook_point"])
        rivals = rivals[rivals["l0"] <= record["l0"]]
        reference = record["kind"] in REFERENCES
        row = {"hook": hook_points.index(record["hook_point"]), "label": BASELINES[record["kind"]][0],
               "k": record.get("k"), "l0": record["l0"], "ce_recovered": record["ce_recovered"],
               "reference": reference, "key": None, "ahead": None}  # fmt: skip
        if not reference and not rivals.empty:
            best = rivals.loc[rivals["ce_recovered"].astype(float).idxmax()].to_dict()
            row |= {"key": key_of(best), "ahead": float(best["ce_recovered"]) - float(record["ce_recovered"])}
        found.append(row)
    return found


def _losses(table: pd.DataFrame, hook_points: Sequence[str]) -> list[dict[str, Any]]:
    """What CE recovered is a share of, a hook point: the model's loss, clean and ablated, in nats a token."""
    if not {"ce_clean", "ce_ablated"} <= set(table):
        return []
    measured = table.dropna(subset=["ce_clean", "ce_ablated"]).drop_duplicates("hook_point")
    return [{"hook": hook_points.index(record["hook_point"]), "clean": record["ce_clean"],
             "ablated": record["ce_ablated"]} for record in measured.to_dict("records")]  # fmt: skip


def _protocol(spec: Mapping[str, Any], protocol: Mapping[str, Any], table: pd.DataFrame) -> list[list[str]]:
    """What the figures were measured on: from the protocol that stands beside them, from the spec and the figures."""
    data, model, train, evaluate = (spec.get(name) or {} for name in ("data", "model", "train", "evaluate"))
    tokens, dead = (_one_value(table, name) for name in ("n_tokens", "dead_over_tokens"))
    facts = []
    if tokens is not None:
        split = f"{tokens:,.0f} tokens, the same for every SAE and baseline"
        facts.append(["evaluated on", f"{split}; the report split, whose documents no SAE was trained on"])
    if any(name.endswith("_low") and table[name].notna().any() for name in table):
        facts.append(["intervals", "95%, bootstrap over documents; differences of two SAEs are paired"])
    if data:
        facts.append(["dataset", _joined([data.get("dataset"), data.get("subset")])])
        start = "each begins with BOS" if data.get("bos") else "no BOS is put before them"
        facts.append(["context", f"{evaluate.get('context_size') or data.get('context_size')} tokens; {start}"])
        facts.append(["left out", _exclusions(data.get("exclude") or {})])
    if model:
        facts.append(["model", _joined([model.get("name"), model.get("revision"), model.get("dtype"),
                                        f"processing {model.get('processing')}"])])  # fmt: skip
    if "ce_clean" in table:
        ablation = protocol.get("ablation") or evaluate.get("ablation") or "zero"
        ablated = "the activation set to zero" if ablation == "zero" else f"the activation set to its {ablation}"
        formula = "(CE ablated − CE with the SAE) / (CE ablated − CE of the model)"
        facts.append(["CE recovered", f"{formula}; ablated: {ablated}"])
    if dead is not None:
        facts.append(["dead", f"a latent that is never active over {dead:,.0f} tokens of training"])
    if train.get("tokens"):
        facts.append(["trained on", f"{train['tokens']:,} tokens an SAE, in batches of {train.get('batch_tokens'):,}"])
    return facts


def _exclusions(exclude: Mapping[str, Any]) -> str:
    parts = []
    if exclude.get("special_tokens"):
        parts.append("special tokens")
    if exclude.get("first_positions"):
        count = exclude["first_positions"]
        parts.append("the first position" if count == 1 else f"the first {count} positions")
    if exclude.get("norm_over_median"):
        parts.append(f"tokens with a norm over {exclude['norm_over_median']:g} times the median")
    return ", ".join(parts) or "nothing"


def _one_value(table: pd.DataFrame, column: str) -> float | None:
    """The value that all SAEs share; None where there is none or they differ."""
    values = table[column].dropna().unique() if column in table else []
    return float(values[0]) if len(values) == 1 else None


def _joined(parts: Sequence[Any]) -> str:
    return ", ".join(str(part) for part in parts if part is not None)


def _cost(cost: Mapping[str, float]) -> dict[str, Any]:
    """Seconds by phase, and every other figure under MLflow's name for it."""
    known_cost = {name: float(value) for name, value in cost.items() if known(value)}
    other = {"seconds_total", "seconds_to_first_step"}
    phases = [[name.removeprefix("seconds_").replace("_", " "), value] for name, value in known_cost.items()
              if name.startswith("seconds_") and name not in other and value > 0]  # fmt: skip
    total = max(known_cost.get("seconds_total", 0.0), sum(value for _, value in phases))
    rest = total - sum(value for _, value in phases)
    if phases and rest > 0.01 * total:
        phases.append(["other", rest])
    figures = sorted((name, value) for name, value in known_cost.items())
    return {"phases": phases, "total": total, "figures": [list(pair) for pair in figures]}


def _in_short(data: Mapping[str, Any]) -> list[str]:
    """The answers as plain sentences, for readers whose browser runs no scripts."""
    called = {sae["key"]: sae["called"] for sae in data["saes"]}
    return [
        f"{data['hooks'][answer['hook']]}: "
        + (f"{called[answer['key']]} (SAE {answer['key']}). " if answer["key"] else "")
        + " ".join(answer["why"])
        for answer in data["answers"]
    ]
