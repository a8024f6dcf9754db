"""An SAE is what it was made from: ids by content, and the hash of the code that made it."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

from penstock.errors import SweepError

# Part of every SAE's identity: raise it when the same settings no longer give the same SAE.
FORMAT = 1


def content_id(value: Any, length: int = 12) -> str:
    """A short id of anything that JSON can write, the same in every process and for every order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()[:length]


@cache
def code_hash() -> str:
    """A hash of the source of `penstock` and `sae_core` as this process imports them."""
    import penstock
    import sae_core

    digest = hashlib.blake2b(digest_size=8)
    for package in (penstock, sae_core):
        root = Path(package.__file__).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def check_code(expected: str) -> None:
    """Raise `SweepError` when this process imports other source code than the driver does."""
    if code_hash() != expected:
        raise SweepError(
            f"this process runs source code {code_hash()} and its driver runs {expected}: an older installation is in "
            "the way on this node; submit with `penstock submit`, which ships the code, or update the image"
        )
