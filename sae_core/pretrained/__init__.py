"""The world's SAEs: releases by name, repositories of the Hugging Face hub, folders in any known format.

    releases()         the table of what SAE.from_pretrained knows
    warn_if_absurd()   whether a loaded SAE reconstructs real activations at all

table.py has the releases, hub.py gets the files, formats/ has one reader a format, loading.py puts them together. The
names below are looked up on first use.
"""

import importlib
from typing import Any

_MODULES = {
    "absurd": ["AbsurdReconstruction", "warn_if_absurd"],
    "loading": ["CrossLayerDecoder"],
    "table": ["releases"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
