"""Penstock: sweeps of sparse autoencoders on one stream of activations.

`front(sweep)`, `load_sae(sweep, hook_point=...)` and `pull(sweep, hook_point=..., to=...)` read what a sweep made.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "front", "load_sae", "pull"]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package stays instant.
    if name in ("front", "load_sae", "pull"):
        import importlib

        value = getattr(importlib.import_module("penstock.pull"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
