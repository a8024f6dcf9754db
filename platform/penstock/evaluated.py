"""What an evaluation came to, for people and for programs: its protocol, SAEs with their intervals, baselines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import fill
from typing import Any

import pandas as pd

from penstock.front_table import sparsity_of, why_not_on_front, with_interval
from penstock.identity import content_id
from penstock.pareto import Band, by_hook_point, key_of, kind_of
from penstock.statistics import HEADLINE
from penstock.text import number, plain, text_table
from penstock.tracking import SPARSITY_SETTINGS

# name: its title, and its decimals
_SHOWN = {
    "l0": ("L0", 2),
    "ce_recovered": ("CE rec.", 4),
    "ce_increase": ("CE increase", 4),
    "explained_variance": ("expl. var.", 4),
}
_LINE = 110
_INTERVALS = tuple(name for metric in HEADLINE for name in (metric, f"{metric}_low", f"{metric}_high"))
_WHOLE = ("d_sae", "prefix", "k", "seed", "n_tokens")
_JSON_KEYS = (
    *("sae_id", "kind", "hook_point", "architecture", "d_sae", "prefix", *SPARSITY_SETTINGS, "seed"),
    *(*_INTERVALS, "n_tokens", "on_front", "dominated_by", "certain"),
)


@dataclass(frozen=True)
class Evaluated:
    """Figures by one protocol: `table` has one row an SAE, `baselines` one for each thing that they have to beat.
    `l0_band` is where a front was looked for, `beside` the name of the sweep that folders stand beside."""

    protocol: Mapping[str, Any]
    table: pd.DataFrame
    baselines: pd.DataFrame
    l0_band: Band | None = None
    beside: str | None = None

    @property
    def protocol_id(self) -> str:
        return content_id(self.protocol)

    def as_json(self) -> str:
        record = {
            "protocol": dict(self.protocol),
            "protocol_id": self.protocol_id,
            "saes": _records(self.table),
            "baselines": _records(self.baselines),
        }
        return json.dumps(record, indent=1)

    def as_text(self) -> str:
        return f"{describe_protocol(self.protocol)}\n\n{_format(self)}"


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """A protocol as the lines that belong above every table of its figures."""
    exclude, split = protocol["exclude"], protocol["split"]
    left_out = [
        *(["special tokens"] if exclude["special_tokens"] else []),
        *([f"the first {exclude['first_positions']} of a row"] if exclude["first_positions"] else []),
        *([f"norms over {exclude['norm_over_median']:g} times the median"] if exclude["norm_over_median"] else []),
    ]
    parts = [
        f"{protocol['dataset']}, {protocol[f'{split}_tokens']:,} tokens of its {split} split",
        f"context {protocol['context_size']} {'with' if protocol['bos'] else 'without'} BOS",
        f"{protocol['ablation']} ablation",
        f"left out: {', '.join(left_out) or 'nothing'}",
        f"model {protocol['model'] + ' ' if 'model' in protocol else ''}in {protocol['dtype']}, "
        f"processing {protocol['processing']}",
    ]
    return fill(f"protocol   {content_id(protocol)}: {'; '.join(parts)}", _LINE, subsequent_indent=" " * 11,
                break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _format(found: Evaluated) -> str:
    """One table a hook point, by L0, with 95% intervals; `*` marks the front."""
    table, baselines = found.table, found.baselines
    asked = table["sae_id"] if "run_id" not in table else table["sae_id"][table["run_id"].isna()]
    named = baselines.rename(columns={"kind": "architecture"}).assign(sae_id="", on_front=False, dominated_by=None)
    ordered = by_hook_point(pd.concat([part for part in (table, named) if not part.empty], ignore_index=True))
    is_sae = ordered["sae_id"] != ""
    why_not = [why if of_sae else "" for why, of_sae in
               zip(why_not_on_front(ordered, found.l0_band), is_sae, strict=True)]  # fmt: skip
    marks = ["" if found.beside is None or sae_id not in set(asked) else ">" for sae_id in ordered["sae_id"]]
    figures = [with_interval(ordered, name, decimals) for name, (_, decimals) in _SHOWN.items()]
    records = ordered.to_dict("records")
    titles = [title for title, _ in _SHOWN.values()]
    header = ["", "architecture", "d_sae", "sparsity", *titles, "SAE", *(["dominated by"] if any(why_not) else [])]
    rows = [
        [marks[at] + "*" * bool(record["on_front"]), kind_of(record), number(record.get("d_sae")), sparsity_of(record),
         *(cells[at] for cells in figures), key_of(record) if record["sae_id"] else "", *[why_not[at]] * any(why_not)]
        for at, record in enumerate(records)
    ]  # fmt: skip
    head, _, *lines = text_table(header, rows, right={"d_sae", *titles}).splitlines()
    parts: list[str] = []
    for record, line in zip(records, lines, strict=True):
        title = f"\n{record['hook_point']}\n{head}"
        if title not in parts:
            parts.append(title)
        parts.append(line)
    count = int(table["on_front"].sum())
    notes = [
        *([f"> evaluated here; the others are those of the sweep {found.beside}"] if found.beside is not None else []),
        f"* not dominated at its hook point and width: {count} of {len(table)}",
        "± half of the 95% interval over documents; CE increase in nats a token",
    ]
    return "\n".join(parts).lstrip("\n") + "\n\n" + "\n".join(notes)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """JSON's rows of a table, null where a figure is missing."""
    found = []
    for record in table.to_dict("records"):
        values = {key: plain(record[key]) for key in _JSON_KEYS if key in record}
        found.append(values | {key: int(values[key]) for key in _WHOLE if values.get(key) is not None})
    return found
