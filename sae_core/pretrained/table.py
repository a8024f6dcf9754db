"""The table of releases: which SAE of the world lies where, in which format.

releases.json is made by jobs/build_releases.py. Of SAEs that are alike but for numbers it has one pattern: `{0}` in id,
path or Neuronpedia name stands for the first number of each entry of `numbers`.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

FILE = Path(__file__).with_name("releases.json")
NUMBER = r"\d+"
# By what SAELens' directory calls the code that reads a release.
FORMATS_THERE = {
    None: "sae_lens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "lm_saes",
    "dictionary_learning_1": "dictionary_learning",
    "connor_rob_hook_z": "attention_kk",
    "mwhanna_transcoder": "circuit_tracer",
    "mntss_clt_layer_transcoder": "circuit_tracer_clt",
    "qwen_scope": "qwen_scope",
    "goodfire": "goodfire",
    "deepseek_r1": "linear_pair",
}
REFUSED = {
    "temporal": "temporal SAEs predict a token's latents from those before it by attention, and have no encoder of one "
    "token's activations",
}
# Names in use for a release beside the one that the directory has.
ALIASES = {
    "gemma-2b-res": "gemma-2b-res-jb",
    "gemma-2b-it-res": "gemma-2b-it-res-jb",
    "gpt2-small-res": "gpt2-small-res-jb",
    "gpt2-small-hook-z": "gpt2-small-hook-z-kk",
    "mistral-7b-res": "mistral-7b-res-wg",
}
HOW_TO_LIST = "sae_core.pretrained.releases() lists all of them"


@dataclass(frozen=True)
class Entry:
    """One SAE of a release. `overrides` replace what its own configuration says."""

    release: str
    sae_id: str
    repo_id: str
    path: str
    model: str
    format: str
    neuronpedia_id: str | None = None
    l0: float | None = None
    variance_explained: float | None = None
    norm_scaling_factor: float | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def releases(model: str | None = None, release: str | None = None) -> "pd.DataFrame":
    """The SAEs that `SAE.from_pretrained` knows: a table with the columns release, sae_id, model, format, l0,
    variance_explained (as their authors state them, where they do), neuronpedia_id, repo_id and path.

    model, release: only those whose model, or release, has this text in its name, upper or lower case.
    """
    import pandas as pd

    columns = ["release", "sae_id", "model", "format", "l0", "variance_explained", "neuronpedia_id", "repo_id", "path"]
    wanted = [
        entry
        for name in names()
        if release is None or release.lower() in name.lower()
        if model is None or model.lower() in _table()[name]["model"].lower()
        for entry in entries(name).values()
    ]
    return pd.DataFrame([[getattr(entry, name) for name in columns] for entry in wanted], columns=columns)


def names() -> list[str]:
    """The releases that can be loaded."""
    return [name for name, there in _table().items() if there["format"] not in REFUSED]


def find(release: str, sae_id: str) -> Entry:
    """The SAE of this name; UserError with the nearest names for one that is not there, or not readable."""
    for name, value in (("release", release), ("sae_id", sae_id)):
        if not isinstance(value, str):
            raise UserError(f"{name} is {value!r}; accepted is a name: {HOW_TO_LIST}")
    known = entries(named(release))
    if sae_id in known:
        entry = known[sae_id]
        if entry.format in REFUSED:
            raise UserError(f"release {entry.release!r} cannot be loaded: {REFUSED[entry.format]}")
        return entry
    close = _nearest(sae_id, list(known))
    hint = f"did you mean {', '.join(map(repr, close))}?" if close else f"for example {', '.join(list(known)[:3])}"
    raise UserError(
        f"sae_id is {sae_id!r}; release {named(release)!r} has {len(known)} SAEs, and none of this id ({hint}); "
        f"sae_core.pretrained.releases(release={named(release)!r}) lists them"
    )


def at(repo_id: str, path: str) -> Entry | None:
    """The SAE that lies there, if it is one of a release: what the release states of it is then known."""
    for name, there in _table().items():
        if there["repo"] == repo_id:
            for entry in entries(name).values():
                if entry.path == path:
                    return entry
    return None


def is_release(name: str) -> bool:
    return name in _table() or name in ALIASES


def named(release: str) -> str:
    """The directory's name of a release: case, and - for _, do not matter, and there are ALIASES."""
    table = _table()
    wanted = ALIASES.get(release, release)
    if wanted in table:
        return wanted
    same = [name for name in table if _plain(name) == _plain(wanted)]
    if len(same) == 1:
        return same[0]
    close = _nearest(release, [*table, *ALIASES])
    hint = f" (did you mean {', '.join(map(repr, close))}?)" if close else ""
    of_repo = [name for name, there in table.items() if there["repo"] == release]
    if of_repo:
        hint = f" (this repository's: {', '.join(map(repr, of_repo))})"
    raise UserError(
        f"release is {release!r}, which is none of the {len(table)} that are known{hint}; {HOW_TO_LIST}, and "
        "SAE.from_hub(repo_id, path) loads from any repository in a known format"
    )


@cache
def entries(name: str) -> dict[str, Entry]:
    """The SAEs of the release of this name, by id."""
    there = _table()[name]
    return {
        row["sae_id"]: Entry(
            release=name,
            repo_id=there["repo"],
            model=there["model"],
            format=there["format"],
            overrides=there.get("overrides", {}),
            **row,
        )
        for group in there["saes"]
        for row in _rows(group)
    }


def _rows(group: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    numbers = [row.split(",") for row in group["numbers"].split()] if "numbers" in group else [[]]
    for index, row in enumerate(numbers):
        sae_id = group["id"].format(*row)
        neuronpedia = group.get("neuronpedia")
        per_row = {
            name: value[index] if isinstance(value := group.get(name), list) else value
            for name in ("l0", "variance_explained", "norm_scaling_factor")
        }
        yield {
            "sae_id": sae_id,
            "path": group["path"].format(*row) if "path" in group else sae_id,
            "neuronpedia_id": neuronpedia and neuronpedia.format(*row),
            **per_row,
        }


@cache
def _table() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))


def _plain(name: str) -> str:
    return re.sub(r"[-_. ]", "-", name.lower())


def _nearest(name: str, known: list[str]) -> list[str]:
    """Up to three: those that hold the name, or are spelt nearly like it."""
    holding = [other for other in known if name and _plain(name) in _plain(other)]
    return list(dict.fromkeys([*get_close_matches(name, known, n=3, cutoff=0.5), *holding]))[:3]
