"""Where things are kept: one small interface over a local folder or object storage (`s3://`, `gs://`, ...).

A file appears whole or not at all, on a disk as on object storage, and a folder counts only once its manifest is there
with checksums that hold.
"""

import contextlib
import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from penstock.errors import CheckpointError, SweepError
from penstock.redaction import redacted
from sae_core.errors import reason_of

MANIFEST = "manifest.json"
STAGING = "staging"
STAGING_SECONDS = 3600.0


@dataclass(frozen=True)
class StoredFile:
    """A file of a listing: its name below the storage's root, its size, and when it was written (Unix time)."""

    name: str
    bytes: int
    written: float


class Storage:
    """Files below one root. Names are relative to it, with `/`; one with `..` in it, which some file may hold that
    somebody else has written, is refused with a `SweepError`."""

    def __init__(self, uri: str | Path) -> None:
        self.uri = str(uri)
        try:
            if "://" in self.uri:
                self._fs, self._root = pafs.FileSystem.from_uri(self.uri)
            else:
                self._fs, self._root = pafs.LocalFileSystem(), os.path.abspath(self.uri)
        except (ValueError, OSError) as error:
            raise SweepError(redacted(f"storage {self.uri!r} cannot be used: {error}")) from None
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Storage, (self.uri if "://" in self.uri else self._root,)

    def path(self, name: str) -> str:
        """The full path of a name: a plain path on a local disk."""
        if ".." in name.split("/"):
            raise SweepError(f"{name!r} leads out of storage {redacted(self.uri)!r}; accepted: a name in it")
        return f"{self._root}/{name}"

    def at(self, name: str) -> "Storage":
        """The same storage, rooted in a folder of it."""
        self.path(name)
        return Storage(f"{self.uri.rstrip('/')}/{name}")

    def exists(self, name: str) -> bool:
        return self._fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def read(self, name: str) -> bytes:
        """The whole of a file. Raises `FileNotFoundError`."""
        with self._fs.open_input_stream(self.path(name), compression=None) as stream:
            return stream.read()

    def reading(self, name: str) -> pa.NativeFile:
        """A file to read parts of. Raises `FileNotFoundError`."""
        return self._fs.open_input_file(self.path(name))

    def write(self, name: str, data: bytes) -> None:
        """Write a file that appears whole: by renaming on a disk, by nature on object storage."""
        target = self.path(name)
        if self.is_local:
            self._fs.create_dir(os.path.dirname(target), recursive=True)
            temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with open(temporary, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, target)
            finally:
                Path(temporary).unlink(missing_ok=True)
        else:
            with self._fs.open_output_stream(target, compression=None) as stream:
                stream.write(data)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream into a file that appears whole at the end of the `with` block, and not at all when that fails.

        Unlike `write` it does not wait for the disk: a file is whole for every reader, yet not after a power cut.
        """
        target = self.path(name)
        if self.is_local:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
            try:
                with pa.OSFile(temporary, "wb") as stream:
                    yield stream
                os.replace(temporary, target)
            finally:
                Path(temporary).unlink(missing_ok=True)
        else:
            try:
                with self._fs.open_output_stream(target, compression=None) as stream:
                    yield stream
            except BaseException:  # closing the stream has made an object of what it got so far
                with contextlib.suppress(OSError):
                    self.remove(name)
                raise

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1) + "\n").encode())

    def names(self, folder: str) -> list[str]:
        """The names directly below a folder, sorted; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True)
        return sorted(info.base_name for info in self._fs.get_file_info(selector))

    def files(self, folder: str) -> list[StoredFile]:
        """All files below a folder, however deep; empty where there is no such folder."""
        selector = pafs.FileSelector(self.path(folder), allow_not_found=True, recursive=True)
        return [
            StoredFile(info.path.removeprefix(self._root).lstrip("/"), info.size, (info.mtime_ns or 0) / 1e9)
            for info in self._fs.get_file_info(selector)
            if info.type == pafs.FileType.File
        ]

    def delete(self, folder: str) -> None:
        """Delete a folder and what is in it; nothing where there is none."""
        if self.exists(folder):
            self._fs.delete_dir(self.path(folder))

    def remove(self, name: str) -> None:
        """Remove a file; nothing where there is none."""
        if self.exists(name):
            self._fs.delete_file(self.path(name))

    def check_writable(self, field: str = "storage") -> None:
        """Write a file and take it away again, with the folders made for it. Raises `SweepError` naming `field`."""
        name = f"{uuid.uuid4().hex[:8]}.probe"
        made = [folder for folder in Path(self.path(name)).parents if self.is_local and not folder.exists()]
        try:
            self.write(name, b"")
            self.remove(name)
        except OSError as error:
            raise SweepError(
                f"{field} {self.uri!r} cannot be written to: {reason_of(error)}; accepted: a place that this user may "
                "write to"
            ) from None
        finally:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    # ---- folders that count only when whole ----

    def commit_folder(
        self, folder: str, files: Mapping[str, bytes], guard: Callable[[], None] = lambda: None
    ) -> None:
        """Write files with a manifest of their checksums: a reader sees all of them or no folder.

        On a disk the folder is written elsewhere and moved to its place; on object storage its manifest comes last. A
        folder that is there and whole stays as it is. `guard` keeps the folder from coming about by raising: it is
        called first, and again when everything but the last step is done.
        """
        guard()
        sums = {name: hashlib.blake2b(data, digest_size=16).hexdigest() for name, data in files.items()}
        staged = f"{STAGING}/{uuid.uuid4().hex}" if self.is_local else folder
        try:
            for name, data in files.items():
                self.write(f"{staged}/{name}", data)
            if self.is_local:
                self.write_json(f"{staged}/{MANIFEST}", sums)
                guard()
                self._move_folder(staged, folder)
            else:
                guard()
                self.write_json(f"{staged}/{MANIFEST}", sums)
        finally:
            if self.is_local:
                self.delete(staged)

    def _move_folder(self, staged: str, folder: str) -> None:
        os.makedirs(os.path.dirname(self.path(folder)), exist_ok=True)
        if self.exists(folder) and not self.is_committed(folder):
            self.delete(folder)
        try:
            os.rename(self.path(staged), self.path(folder))
        except OSError as error:  # somebody else's is there
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def clean_staging(self) -> None:
        """Delete what writers that were killed have left behind."""
        for info in self._fs.get_file_info(pafs.FileSelector(self.path(STAGING), allow_not_found=True)):
            if time.time() - info.mtime.timestamp() > STAGING_SECONDS:
                self.delete(f"{STAGING}/{info.base_name}")

    def is_committed(self, folder: str) -> bool:
        return self.exists(f"{folder}/{MANIFEST}")

    def read_folder(self, folder: str) -> dict[str, bytes]:
        """The files of a committed folder, checked. Raises `CheckpointError` when one is missing or damaged."""
        try:
            sums = self.read_json(f"{folder}/{MANIFEST}")
            self._check_manifest(folder, sums)
            files = {name: self.read(f"{folder}/{name}") for name in sums}
        except (OSError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.path(folder)} is not a complete checkpoint: {error}") from None
        for name, data in files.items():
            if hashlib.blake2b(data, digest_size=16).hexdigest() != sums[name]:
                raise CheckpointError(f"{self.path(folder)}/{name} is damaged: its checksum is not the manifest's")
        return files

    def _check_manifest(self, folder: str, sums: Any) -> None:
        """Raise `CheckpointError` for a manifest, or a link, that would have a file outside the folder read as one of
        its own."""
        where = self.path(folder)
        if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
            raise CheckpointError(f"{where}/{MANIFEST} is damaged: it is no table of checksums by name")
        for name in sums:
            inside = name and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))
            if inside and self.is_local:
                root = os.path.realpath(where)
                inside = os.path.realpath(f"{where}/{name}").startswith(f"{root}{os.sep}")
            if not inside:
                raise CheckpointError(f"{where}/{MANIFEST} names {name!r}, which leads out of its folder; accepted: "
                                      "files of the folder")  # fmt: skip
