"""Reading what others wrote: weights and configurations of which nothing is believed before it is checked.

Only safetensors and JSON, and only from the folder that is meant. Whatever is wrong is a CheckpointError that names
file and field.
"""

import json
import os
import stat
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sae_core.errors import CheckpointError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


# ---- files ----


def read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    real = find_file(folder, name)
    try:
        raw = json.loads(Path(real).read_bytes().decode("utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # no JSON, or no text
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which of two values they take: neither is what was meant for sure."""
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen:
            raise ValueError(f"{name!r} stands there twice")
        seen[name] = value
    return seen


def find_file(folder: Path, name: str) -> str:
    """The real path of a file of the folder. A link must not lead out of it, but for those of a Hugging Face cache,
    whose snapshots link to the blobs beside them."""
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise CheckpointError(f"{folder}: no folder, but a file")
        base, real = Path(os.path.realpath(folder)), os.path.realpath(folder / name, strict=True)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            raise CheckpointError(f"{folder / name}: cannot be read ({error.strerror})") from None
        what = f"{name} is missing" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder}: {what}") from None
    homes = [base, *(above.parent / "blobs" for above in (base, *base.parents) if above.name == "snapshots")]
    if not any(Path(real).is_relative_to(home) for home in homes):
        raise CheckpointError(f"{folder / name}: links to {real}; accepted are files of the folder itself")
    if not os.path.isfile(real):
        raise CheckpointError(f"{folder / name}: not a file")
    return real


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    real = find_file(folder, name)
    try:
        with open(real, "rb"):  # safetensors calls any file missing that it may not open
            return load_file(real)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file, truncated or damaged ({error})") from None


def check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: Path) -> None:
    if missing := sorted(shapes.keys() - tensors.keys()):
        raise CheckpointError(f"{path}: the tensors {missing} are missing; it has {sorted(tensors)}")
    if unknown := sorted(tensors.keys() - shapes.keys()):
        raise CheckpointError(f"{path}: unknown tensors {unknown}; expected are {sorted(shapes)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{path}: {name} has shape {list(tensors[name].shape)}; expected is {list(shape)}")
        if tensors[name].dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {name} has type {tensors[name].dtype}; accepted: {', '.join(DTYPES)}")
        least, most = (float(end) for end in tensors[name].aminmax())  # isfinite would make a copy of it
        # a latent above whose threshold nothing is does not fire: so some are switched off
        if not isfinite(least) or not (isfinite(most) or (name == "threshold" and most > 0)):
            raise CheckpointError(f"{path}: {name} has values that are not finite numbers")


# ---- fields ----


def dtype_of(given: object, field: str) -> torch.dtype:
    name = str(given).removeprefix("torch.")
    if name not in DTYPES:
        raise CheckpointError(f"{field} is {given!r}; accepted: {', '.join(DTYPES)}")
    return DTYPES[name]


def whole(value: Any, name: str, path: str | Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise CheckpointError(f"{path}: {name} is {value!r}; accepted is a whole number above 0")
    return value


def flag(value: Any, name: str, path: str | Path) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: {name} is {value!r}; accepted: true, false")
    return value
