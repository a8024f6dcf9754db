"""Files of a Hugging Face repository: from the hub, or from its cache where the hub cannot be reached.

All files that are asked for come from one commit, and that commit's hash is said. With a hash as the revision nothing
is asked of the hub for what is already in the cache.
"""

import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sae_core.errors import UserError, one_line

_SECONDS = 5  # that the hub has to answer
_ASK_AGAIN = 60.0  # seconds after it did not
_COMMIT = re.compile(r"[0-9a-f]{40}")

_answered: tuple[bool, float] | None = None


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: `root` is a folder with those of its files that were fetched."""

    repo_id: str
    commit: str
    root: Path


class NotThere(UserError):
    """Neither the hub nor the cache has the file."""


def fetch(
    repo_id: str,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    revision: str | None = None,
    force_download: bool = False,
) -> Snapshot:
    """The repository with the required files (one or more) and those of the optional ones that it has.

    revision: branch, tag or commit hash; None: the main branch. Raises UserError with what to do about it.
    """
    root, commit = _fetch(repo_id, required[0], revision, force_download)
    for name in required[1:]:
        _fetch(repo_id, name, commit, force_download)
    for name in optional:
        try:
            _fetch(repo_id, name, commit, force_download)
        except NotThere:
            continue
    return Snapshot(repo_id, commit, root)


def names_in(repo_id: str, path: str, revision: str | None = None) -> list[str]:
    """The names of the files and folders in a folder of a repository; those in the cache where the hub cannot be
    reached. A `path` that is a file, or not there, has none."""
    path = checked(path)
    if answers():
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        try:
            tree = HfApi().list_repo_tree(repo_id, path or None, revision=revision)
            return [PurePosixPath(item.path).name for item in tree]
        except EntryNotFoundError:
            return []
        except Exception as error:  # the client raises OSErrors, ValueErrors and its own: all say what is wrong
            raise _no_repository(repo_id, revision, error) from None
    root = _cached_root(repo_id, revision)
    if root is None:
        raise _no_repository(repo_id, revision, None)
    folder = root / path
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def checked(path: str) -> str:
    """A path in a repository, without slashes at its ends; UserError for one that leads out of it."""
    parts = PurePosixPath(path.replace("\\", "/")).parts if isinstance(path, str) else ("..",)
    if ".." in parts or path.startswith(("/", "~")) or "\0" in path:
        raise UserError(f"path is {path!r}; accepted is a folder or file in the repository, such as 'layers.5'")
    return "/".join(parts)


def answers() -> bool:
    """Whether the hub can be reached. The client would try for half a minute, for every file, before it looks into its
    cache. Asked once a process; again some time after it did not answer."""
    global _answered
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return False
    now = time.monotonic()
    if _answered is None or not (_answered[0] or now - _answered[1] < _ASK_AGAIN):
        _answered = (_ask(constants.ENDPOINT), now)
    return _answered[0]


def _ask(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=_SECONDS).close()
    except urllib.error.HTTPError as error:
        error.close()
        return True
    except urllib.error.URLError as error:  # the client may know certificates that Python does not
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True


def _fetch(repo_id: str, name: str, revision: str | None, force_download: bool) -> tuple[Path, str]:
    """The folder of the repository's commit that has this file, and its hash."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    name = checked(name)
    is_commit = revision is not None and _COMMIT.fullmatch(revision) is not None
    if is_commit and not force_download:
        try:
            return _root_of(hf_hub_download(repo_id, name, revision=revision, local_files_only=True), name)
        except LocalEntryNotFoundError:
            pass
        except (HFValidationError, OSError) as error:
            raise _no_repository(repo_id, revision, error) from None
    online = answers()
    if not online and force_download:
        raise UserError(f"force_download is true, and the hub cannot be reached; accepted: false, for {_ours()}")
    try:
        file = hf_hub_download(
            repo_id, name, revision=revision, force_download=force_download, local_files_only=not online
        )
    except LocalEntryNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        raise NotThere(
            f"{repo_id}{at}: {name} is not in {_ours()}, and the hub cannot be reached; accepted: a connection (and "
            "HF_HUB_OFFLINE unset), or a cache that has the file (HF_HUB_CACHE or HF_HOME says where it lies)"
        ) from None
    except EntryNotFoundError:
        at = f" at revision {revision!r}" if revision else ""
        raise NotThere(f"{repo_id}{at}: the repository has no file {name!r}") from None
    except Exception as error:  # the client raises OSErrors, ValueErrors and its own: all say what is wrong
        raise _no_repository(repo_id, revision, error) from None
    return _root_of(file, name)


def _root_of(file: str, name: str) -> tuple[Path, str]:
    root = Path(file)
    for _ in PurePosixPath(name).parts:
        root = root.parent
    return root, root.name


def _cached_root(repo_id: str, revision: str | None) -> Path | None:
    """The folder of the cache with a revision's files, if there is one."""
    from huggingface_hub import constants

    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) or ".." in repo_id:
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}"
    reference = folder / "refs" / checked(revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    root = folder / "snapshots" / commit if commit and _COMMIT.fullmatch(commit) else None
    return root if root is not None and root.is_dir() else None


def _no_repository(repo_id: str, revision: str | None, error: Exception | None) -> UserError:
    at = f" at revision {revision!r}" if revision else ""
    if error is None:
        return UserError(f"{repo_id}{at}: not in {_ours()}, and the hub cannot be reached")
    return UserError(f"{repo_id}{at}: the hub does not give it ({type(error).__name__}: {one_line(error)})")


def _ours() -> str:
    from huggingface_hub import constants

    return f"the cache of the hub ({constants.HF_HUB_CACHE})"
