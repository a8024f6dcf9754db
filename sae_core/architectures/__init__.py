"""The architectures that can be trained, and how settings find theirs.

To add one: write its file, and add one line to the table.
"""

from collections.abc import Mapping
from typing import Any

from sae_core.architectures.batch_topk import BatchTopKSAE, BatchTopKSettings
from sae_core.architectures.gated import GatedSAE, GatedSettings
from sae_core.architectures.jumprelu import JumpReLUSAE, JumpReLUSettings
from sae_core.architectures.matryoshka import MatryoshkaSAE, MatryoshkaSettings
from sae_core.architectures.standard import StandardSAE, StandardSettings
from sae_core.architectures.topk import TopKSAE, TopKSettings
from sae_core.errors import ConfigError
from sae_core.sae import TrainableSAE
from sae_core.settings import SAESettings, nearest, prefix, read_settings

ARCHITECTURES: dict[str, type[TrainableSAE]] = {
    "standard": StandardSAE,
    "gated": GatedSAE,
    "topk": TopKSAE,
    "batch_topk": BatchTopKSAE,
    "matryoshka": MatryoshkaSAE,
    "jumprelu": JumpReLUSAE,
}


def parse_settings(mapping: Mapping[str, Any], **context: object) -> SAESettings:
    """The settings of one SAE, of the type its `architecture` asks for.

    `context` (for example file="spec.yaml", line=12) is put before the message of the ConfigError that a wrong,
    missing or misspelt setting raises.
    """
    name = mapping.get("architecture") if isinstance(mapping, Mapping) else None
    if name is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"{prefix(context)}architecture is missing in {mapping!r}; known architectures: {known}")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        close = nearest(name, list(ARCHITECTURES))
        raise ConfigError(
            f"{prefix(context)}unknown architecture {name!r}{close}; known architectures: {', '.join(ARCHITECTURES)}"
        )
    return read_settings(ARCHITECTURES[name].settings_type, mapping, **context)


__all__ = [
    "ARCHITECTURES",
    "BatchTopKSAE",
    "BatchTopKSettings",
    "GatedSAE",
    "GatedSettings",
    "JumpReLUSAE",
    "JumpReLUSettings",
    "MatryoshkaSAE",
    "MatryoshkaSettings",
    "StandardSAE",
    "StandardSettings",
    "TopKSAE",
    "TopKSettings",
    "parse_settings",
]
