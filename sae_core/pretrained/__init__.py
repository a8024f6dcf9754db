"""The world's SAEs: releases by name, repositories of the Hugging Face hub, folders in any known format.

    releases()         the table of what SAE.from_pretrained knows
    warn_if_absurd()   whether a loaded SAE reconstructs real activations at all

table.py has the releases, hub.py gets the files, formats/ has one reader a format, loading.py puts them together. The
names below are looked up on first use.
"""

from sae_core.lazy import names_on_first_use

_MODULES = {
    "absurd": ["AbsurdReconstruction", "warn_if_absurd"],
    "loading": ["CrossLayerDecoder"],
    "table": ["releases"],
}

__all__, __getattr__ = names_on_first_use(__name__, _MODULES)
