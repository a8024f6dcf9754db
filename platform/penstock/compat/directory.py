"""SAELens' directory of releases, by its names. As one table, a row an SAE: `sae_core.pretrained.releases()`."""

from dataclasses import dataclass
from typing import Any

from sae_core.pretrained import table


@dataclass(frozen=True)
class PretrainedSAELookup:
    """A release: where it lies, and of each SAE, by its id, the path there and what its authors state."""

    release: str
    repo_id: str
    model: str
    conversion_func: str  # the format that it is read as
    saes_map: dict[str, str]
    expected_var_explained: dict[str, float | None]
    expected_l0: dict[str, float | None]
    neuronpedia_id: dict[str, str | None]
    norm_scaling_factor: dict[str, float]
    config_overrides: dict[str, Any]


def get_pretrained_saes_directory() -> dict[str, PretrainedSAELookup]:
    """The releases that `SAE.from_pretrained` can load, by name."""
    directory = {}
    for release in table.names():
        saes = table.entries(release)
        one = next(iter(saes.values()))
        directory[release] = PretrainedSAELookup(
            release, one.repo_id, one.model, one.format,
            {name: entry.path for name, entry in saes.items()},
            {name: entry.variance_explained for name, entry in saes.items()},
            {name: entry.l0 for name, entry in saes.items()},
            {name: entry.neuronpedia_id for name, entry in saes.items()},
            {name: entry.norm_scaling_factor for name, entry in saes.items() if entry.norm_scaling_factor is not None},
            dict(one.overrides),
        )  # fmt: skip
    return directory
