"""Names of a package that are looked up on first use, so that importing it, or only a part, stays instant."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def names_on_first_use(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package (by its `__name__`) whose modules hold these names."""
    home = {name: module for module, names in modules.items() for name in names}

    def look_up(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return sorted(home), look_up
