"""Which split a document belongs to: a function of its content alone, so no two runs ever disagree."""

import hashlib
from typing import Literal

Split = Literal["train", "search", "report"]
SPLITS: tuple[Split, ...] = ("train", "search", "report")

_SEARCH_PER_MILLE = 50
_REPORT_PER_MILLE = 50


def document_hash(text: str | bytes) -> bytes:
    """16 bytes that identify a document by its content."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return hashlib.blake2b(data, digest_size=16).digest()


def split_of(content_hash: bytes) -> Split:
    """The split of a document: 90% `train`, 5% `search`, 5% `report`."""
    bucket = int.from_bytes(content_hash[:8], "little") % 1000
    if bucket < _REPORT_PER_MILLE:
        return "report"
    if bucket < _REPORT_PER_MILLE + _SEARCH_PER_MILLE:
        return "search"
    return "train"
