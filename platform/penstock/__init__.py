"""Penstock: sweeps of sparse autoencoders on one stream of activations.

`train(...)` runs one without a spec file. `front(sweep)`, `load_sae(sweep, hook_point=...)` and `pull(sweep,
hook_point=..., to=...)` read what a sweep made; `load_model(sae=...)` loads the model of an SAE, to look into.
"""

from typing import Any

__version__ = "0.1.0"
_HOME = {"front": "pull", "load_model": "hooked", "load_sae": "pull", "pull": "pull", "train": "train_one"}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    # Looked up on first use: importing the package stays instant.
    if name in _HOME:
        import importlib

        value = getattr(importlib.import_module(f"penstock.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
