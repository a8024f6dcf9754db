"""A cache of the Hugging Face hub, laid out as its client lays it out, so that real loading code runs without a network
(HF_HUB_CACHE names it; HF_HUB_OFFLINE=1)."""

import hashlib
from collections.abc import Mapping
from pathlib import Path


def add_repository(cache: Path, repo_id: str, files: Mapping[str, bytes]) -> str:
    """Put a repository's files into the cache, as blobs that a snapshot links to. Returns the commit."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1("".join([repo_id, *files]).encode()).hexdigest()
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link = folder / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return commit
