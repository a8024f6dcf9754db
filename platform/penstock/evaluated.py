"""What an evaluation came to, for people and for programs: its protocol, SAEs with their intervals, baselines."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from penstock.identity import content_id
from penstock.pareto import by_hook_point, key_of, kind_of
from penstock.statistics import HEADLINE
from penstock.text import figure, number, plain, text_table
from penstock.tracking import SPARSITY_SETTINGS

# name: its title, and its decimals
_SHOWN = {
    "l0": ("L0", 2),
    "ce_recovered": ("CE rec.", 4),
    "ce_increase": ("CE incr.", 4),
    "explained_variance": ("expl. var.", 4),
}
_INTERVALS = tuple(name for metric in HEADLINE for name in (metric, f"{metric}_low", f"{metric}_high"))
_WHOLE = ("d_sae", "prefix", "k", "seed", "n_tokens")
_JSON_KEYS = (
    *("sae_id", "kind", "hook_point", "architecture", "d_sae", "prefix", *SPARSITY_SETTINGS, "seed"),
    *(*_INTERVALS, "n_tokens", "on_front", "dominated_by", "certain"),
)


@dataclass(frozen=True)
class Evaluated:
    """Figures by one protocol: `table` has one row an SAE, `baselines` one for each thing that they have to beat."""

    protocol: Mapping[str, Any]
    table: pd.DataFrame
    baselines: pd.DataFrame

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
        return f"{describe_protocol(self.protocol)}\n\n{_format(self.table, self.baselines)}"


def describe_protocol(protocol: Mapping[str, Any]) -> str:
    """A protocol as a line that belongs above every table of its figures."""
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
    return f"protocol   {content_id(protocol)}: {'; '.join(parts)}"


def _format(table: pd.DataFrame, baselines: pd.DataFrame) -> str:
    """One table a hook point, by L0, with 95% intervals; `*` marks the front."""
    named = baselines.rename(columns={"kind": "architecture"}).assign(sae_id="", on_front=False)
    both = pd.concat([part for part in (table, named) if not part.empty], ignore_index=True)
    header = ["", "architecture", "d_sae", "sparsity", *(title for title, _ in _SHOWN.values()), "dominated by", "SAE"]
    ordered = by_hook_point(both).to_dict("records")
    head, _, *lines = text_table(header, [_text_row(record) for record in ordered], right={"d_sae"}).splitlines()
    parts: list[str] = []
    for record, line in zip(ordered, lines, strict=True):
        title = f"\n{record['hook_point']}\n{head}"
        if title not in parts:
            parts.append(title)
        parts.append(line)
    count = int(table["on_front"].sum())
    note = f"* not dominated at its hook point and width: {count} of {len(table)}; [95% intervals over documents]"
    return "\n".join(parts).lstrip("\n") + f"\n\n{note}"


def _text_row(record: Mapping[str, Any]) -> list[str]:
    sparsity = [f"{name}={number(record[name])}" for name in SPARSITY_SETTINGS if plain(record.get(name)) is not None]
    figures = [
        "{} [{}, {}]".format(*(figure(record.get(key), decimals) for key in (name, f"{name}_low", f"{name}_high")))
        for name, (_, decimals) in _SHOWN.items()
    ]
    return [
        "*" if record["on_front"] else "", kind_of(record), number(record.get("d_sae")), " ".join(sparsity),
        *figures, plain(record.get("dominated_by")) or "", key_of(record) if record["sae_id"] else "",
    ]  # fmt: skip


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """JSON's rows of a table, null where a figure is missing."""
    found = []
    for record in table.to_dict("records"):
        values = {key: plain(record[key]) for key in _JSON_KEYS if key in record}
        found.append(values | {key: int(values[key]) for key in _WHOLE if values.get(key) is not None})
    return found
