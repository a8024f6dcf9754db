"""Write sae_core/pretrained/releases.json from the directory of pretrained SAEs of an installed sae_lens.

    python jobs/build_releases.py [--sae-lens FOLDER] [--to FILE]

FOLDER holds pretrained_saes.yaml (default: the installed package). What is kept is what loading and browsing need:
where each SAE lies, in which format, its scale, its L0 and explained variance, and its name on Neuronpedia. SAEs of a
release whose rows differ in numbers alone are one line: a pattern, and the numbers.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from sae_core.pretrained.table import FILE, FORMATS_THERE, NUMBER

FIELDS = ("l0", "variance_explained", "norm_scaling_factor")


def releases_of(directory: Mapping[str, Any]) -> dict[str, Any]:
    """The table's content, of that of pretrained_saes.yaml."""
    table: dict[str, Any] = {}
    for name in sorted(directory):
        there = directory[name]
        release = {
            "repo": there["repo_id"],
            "model": there["model"],
            "format": FORMATS_THERE.get(there.get("conversion_func"), there.get("conversion_func")),
        }
        if there.get("config_overrides"):
            release["overrides"] = there["config_overrides"]
        table[name] = {**release, "saes": groups(there["saes"])}
    return table


def groups(saes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """SAEs whose id, path and Neuronpedia name are alike but for numbers, as patterns with the numbers beside them."""
    found: dict[tuple[str | None, ...], list[tuple[list[str], Mapping[str, Any]]]] = {}
    for sae in saes:
        texts = [str(sae["id"]), str(sae["path"]), sae.get("neuronpedia")]
        skeleton = tuple(None if text is None else re.sub(NUMBER, "#", text) for text in texts)
        columns = [number for text in texts if text is not None for number in re.findall(NUMBER, text)]
        found.setdefault(skeleton, []).append((columns, sae))
    return [_group(skeleton, members) for skeleton, members in found.items()]


def _group(skeleton: tuple[str | None, ...], members: list[tuple[list[str], Mapping[str, Any]]]) -> dict[str, Any]:
    columns = list(zip(*(numbers for numbers, _ in members), strict=True))
    kept: list[tuple[str, ...]] = []
    written = []  # what stands for each number of the texts: itself where it is always the same, or its column
    for column in columns:
        if len(set(column)) == 1:
            written.append(column[0])
        else:
            kept.append(column) if column not in kept else None
            written.append(f"{{{kept.index(column)}}}")
    places = iter(written)
    names = ("id", "path", "neuronpedia")
    group: dict[str, Any] = {
        name: re.sub("#", lambda _: next(places), text) for name, text in zip(names, skeleton, strict=True) if text
    }
    if group["path"] == group["id"]:
        del group["path"]
    if kept:
        group["numbers"] = " ".join(",".join(row) for row in zip(*kept, strict=True))
    for field in FIELDS:
        values = [sae.get(field) for _, sae in members]
        if any(value is not None for value in values):
            group[field] = values[0] if len(set(values)) == 1 else values
    return group


def written(table: Mapping[str, Any]) -> str:
    """JSON with one line a group, so that a change can be read in a diff."""
    blocks = []
    for name, release in table.items():
        head = ", ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in release.items() if key != "saes")
        lines = ",\n  ".join(json.dumps(group, separators=(",", ":")) for group in release["saes"])
        blocks.append(f'{json.dumps(name)}: {{{head}, "saes": [\n  {lines}]}}')
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae-lens", type=Path, help="the folder that holds pretrained_saes.yaml")
    parser.add_argument("--to", type=Path, default=FILE)
    given = parser.parse_args()
    folder = given.sae_lens
    if folder is None:
        spec = find_spec("sae_lens")
        if spec is None or spec.origin is None:
            parser.error("sae_lens is not installed; accepted: --sae-lens FOLDER, or the extra `compat`")
        folder = Path(spec.origin).parent
    directory = yaml.load((folder / "pretrained_saes.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    table = releases_of(directory)
    given.to.write_text(written(table), encoding="utf-8")
    count = sum(len(release["saes"]) for release in directory.values())
    print(f"{given.to}: {len(table)} releases, {count} SAEs, {given.to.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
