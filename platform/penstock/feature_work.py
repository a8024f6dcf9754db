"""What model hosts do for feature dashboards: put slices of rows through SAEs, and look at what latents write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from penstock.sites import Site
from penstock.spec import DataSpec
from penstock.splits import Split
from penstock.tokens import TokenStore
from sae_core import SAE
from sae_core.analysis.features import (
    FeaturePass,
    FeatureSettings,
    LatentLogits,
    Part,
    add_rows,
    decoder_neighbours,
    latent_logits,
)

if TYPE_CHECKING:
    from penstock.model_host import ModelHost

SHOWN_TOKENS = 2048  # whose activations the driver gets of an SAE from elsewhere, to see whether it fits the model

Limits = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Group:
    """Some latents of the SAE of this name. `with_errors`: what it does not reconstruct is summed up, too."""

    name: str
    site: Site
    latents: range
    with_errors: bool


@dataclass(frozen=True)
class RowsWork:
    """A slice of rows, through the SAEs of a pass' groups. `shown`: names of SAEs of which the activations are wanted
    as well."""

    tokens_id: str
    split: Split
    start_row: int
    stop_row: int
    groups: tuple[Group, ...]
    settings: FeatureSettings
    shown: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(group.name for group in self.groups))

    def run(
        self, host: "ModelHost", store: TokenStore, data: DataSpec, saes: Mapping[str, SAE],
        limits: tuple[Limits, ...],
    ) -> "RowsDone":  # fmt: skip
        sites = list(dict.fromkeys(group.site for group in self.groups))
        rows = self.split, self.start_row, self.stop_row
        found, kept = host.rows_of(store, data, sites, *rows)
        passes = [
            FeaturePass(len(group.latents), store.context_size, self.settings, first_latent=group.latents.start,
                        limits=limit)
            for group, limit in zip(self.groups, limits, strict=True)
        ]  # fmt: skip
        shown = {}
        for name in self.names:
            own = [(one, group) for one, group in zip(passes, self.groups, strict=True) if group.name == name]
            site = own[0][1].site
            target = found[site.writes] if own[0][1].with_errors else None
            of_latents = [(one, group.latents) for one, group in own]
            add_rows(of_latents, saes[name], found[site.reads], kept[site], self.start_row, target)
            if name in self.shown:
                shown[name] = tuple(found[at][kept[site]][:SHOWN_TOKENS].clone() for at in (site.reads, site.writes))
        return RowsDone([one.part() for one in passes], shown)


@dataclass(frozen=True)
class RowsDone:
    """The part of each group, and of SAEs that were asked for (what they read, what they are to reconstruct)."""

    parts: list[Part]
    shown: dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LatentsWork:
    """What some latents write: their logits, and their neighbours."""

    tokens_id: str
    group: Group
    settings: FeatureSettings

    @property
    def names(self) -> list[str]:
        return [self.group.name]

    def run(
        self, host: "ModelHost", store: TokenStore, data: DataSpec, saes: Mapping[str, SAE], limits: Any = None
    ) -> "LatentsDone":
        W_dec, latents = saes[self.group.name].W_dec, self.group.latents
        rows = W_dec[latents.start : latents.stop]
        logits = latent_logits(host.model, self.group.site.writes, rows, self.settings.logits)
        return LatentsDone(logits, decoder_neighbours(W_dec, self.settings.neighbours, latents))


@dataclass(frozen=True)
class LatentsDone:
    logits: LatentLogits | None
    neighbours: tuple[np.ndarray, np.ndarray]


FeatureWork = RowsWork | LatentsWork
