"""The spool: blocks of activations on disk, so that a second sweep over the same activations makes no forward pass.

Layout, below a root that is a local folder or object storage:

    <stream>/about.json               what a person wants to know of it: model, dataset, context_size, ...
    <stream>/used                     its time says when the stream was last used
    <stream>/<array>/0000000.arrow    one block: one record batch, column activations: fixed_size_list<T>[d]

A stream is an address of 12 hex digits that stands for all that decides its activations (model, data, exclusion, seed,
dtype), so that a block never changes: whoever is first writes it, under a temporary name that is then replaced. Nothing
waits for the disk, so a power cut may leave a damaged file. The checksum in the schema's metadata finds it, as it finds
every other damage: it is verified at every read.
"""

import contextlib
import re
import shutil
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from penstock.errors import SweepError
from penstock.storage import Storage
from sae_core.errors import reason_of

FORMAT = 1
ABOUT = "about.json"
USED = "used"
COLUMN = "activations"

_STREAM = re.compile(r"[0-9a-f]{12}")
_BLOCK = re.compile(r"([^/]+)/(\d{7,})\.arrow(\.[0-9a-f]{8}\.tmp)?")
_TYPES = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16()}  # bfloat16 as its bits
_IDLE_SECONDS = 3600.0  # a stream used since is not removed for room, nor a temporary file written since
_TOUCH_SECONDS = 60.0
_MEASURE_SECONDS = 1.0
_MEASURE_SHARE = 0.01  # of a process's time, at most, goes into measuring the spool
_SPARE_BYTES = 1 << 30  # of the disk, left to checkpoints and everything else
# What pyarrow raises on a damaged file: it checks every offset and length before it uses it.
_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError)


class SpoolError(SweepError):
    """A block is not in the spool or is damaged."""


@dataclass(frozen=True)
class StreamInfo:
    """What the spool holds of one stream. `blocks` and `bytes` count all its arrays; `used` is a Unix time."""

    id: str
    about: dict[str, Any]
    arrays: tuple[str, ...]
    blocks: int
    bytes: int
    used: float


class Spool:
    """The streams below one root. `limit_bytes`: what they may hold together (None: no limit). Picklable."""

    def __init__(self, storage: Storage, limit_bytes: int | None = None) -> None:
        self.storage = storage
        self.limit_bytes = limit_bytes

    @property
    def place(self) -> str:
        """Its path or URI as messages show it, without the credentials and options that a URI may hold."""
        uri = self.storage.uri
        return re.sub(r"//[^/]*@", "//", uri).partition("?")[0] if "://" in uri else self.storage.path("").rstrip("/")

    def stream(self, stream_id: str) -> "SpooledStream":
        """A stream by its address, of 12 hex digits, whether anything of it is there or not."""
        return SpooledStream(self, stream_id)

    def streams(self) -> list[StreamInfo]:
        """What there is, the most recently used first. Raises `SpoolError` when the spool cannot be listed."""
        try:
            found = _scan(self.storage)
        except OSError as error:
            raise SpoolError(f"spool {self.place!r} cannot be listed: {reason_of(error)}") from None
        return [replace(info, about=self._about(info.id)) for info in reversed(found)]

    def removable(
        self, keep_bytes: int = 0, *, keep: Collection[str] = (), unused_seconds: float = 0
    ) -> list[StreamInfo]:
        """What `prune` would remove, in that order."""
        return _least_recent(self.streams(), keep_bytes, keep, unused_seconds)

    def prune(self, keep_bytes: int = 0, *, keep: Collection[str] = (), unused_seconds: float = 0) -> list[StreamInfo]:
        """Remove whole streams, the least recently used first, until at most `keep_bytes` are left; what was removed.

        Neither the streams in `keep` go, nor those used within the last `unused_seconds`. Raises `SpoolError` when one
        cannot be removed.
        """
        doomed = self.removable(keep_bytes, keep=keep, unused_seconds=unused_seconds)
        for info in doomed:
            try:
                with contextlib.suppress(FileNotFoundError):  # somebody else removes it, too
                    self.storage.delete(info.id)
            except OSError as error:
                path = self.storage.path(info.id)
                raise SpoolError(f"stream {info.id} ({path}) cannot be removed: {reason_of(error)}") from None
        _usage(self.storage).forget()
        return doomed

    def _about(self, stream_id: str) -> dict[str, Any]:
        try:
            about = self.storage.read_json(f"{stream_id}/{ABOUT}")
        except (OSError, ValueError):  # it is for people only: without it the blocks are as good
            return {}
        return about if isinstance(about, dict) else {}


class SpooledStream:
    """One stream of a spool. Picklable. An array is a hook point's name; a block is numbered from 0.

    `full` says why the last block could not be kept: None where it could.
    """

    def __init__(self, spool: Spool, stream_id: str) -> None:
        assert _STREAM.fullmatch(stream_id), stream_id
        self.spool = spool
        self.id = stream_id
        self.full: str | None = None
        self._storage = spool.storage
        self._touch_due = 0.0

    def __reduce__(self) -> tuple[Any, ...]:
        return SpooledStream, (self.spool, self.id)

    def describe(self, about: Mapping[str, Any]) -> None:
        """Write about.json unless it is there, touch the stream, and remove what killed writers left of it."""
        try:
            if not self._storage.exists(f"{self.id}/{ABOUT}"):
                self._storage.write_json(f"{self.id}/{ABOUT}", dict(about))
            for file in self._storage.files(self.id):
                if file.name.endswith(".tmp") and file.written < time.time() - _IDLE_SECONDS:
                    self._storage.remove(file.name)
        except OSError as error:
            self.full = reason_of(error)
        self.touch()

    def touch(self) -> None:
        """Say that the stream is in use; writing and reading do so by themselves, once a minute.

        A spool that may only be read is left as it is.
        """
        self._touch_due = time.monotonic() + _TOUCH_SECONDS
        name = f"{self.id}/{USED}"
        with contextlib.suppress(OSError):
            if self._storage.is_local:
                path = Path(self._storage.path(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            else:
                self._storage.write(name, b"")

    def blocks(self, array: str) -> list[int]:
        """The numbers of the blocks there are, by one listing. Raises `SpoolError` when that fails."""
        try:
            names = self._storage.names(f"{self.id}/{array}")
        except OSError as error:
            raise SpoolError(f"{self._path(array)} cannot be listed: {reason_of(error)}") from None
        matches = (_BLOCK.fullmatch(f"{array}/{name}") for name in names)
        return sorted(int(match[2]) for match in matches if match and not match[3])

    def count_whole(self, arrays: Iterable[str], n_blocks: int) -> int:
        """How many of the first `n_blocks` blocks are there at all of these arrays."""
        return len(set(range(n_blocks)).intersection(*(self.blocks(array) for array in arrays)))

    def has(self, array: str, block: int) -> bool:
        """Whether there is such a block, damaged or not; False where the storage does not answer."""
        try:
            return self._storage.exists(f"{self.id}/{_block_name(array, block)}")
        except OSError:
            return False

    def write(self, array: str, block: int, values: np.ndarray, dtype: str) -> bool:
        """Keep a block; False where it is there already or cannot be kept, and then `full` says why.

        `values`: [tokens, d], of the numpy type that stands for the torch type named `dtype`: uint16 for bfloat16.
        Where the limit or the disk leaves no room for it, other streams that were not used for an hour are removed.
        """
        name = f"{self.id}/{_block_name(array, block)}"
        batch = _to_batch(values, dtype, _identity(self.id, array, block))
        reserved = 0
        try:
            if self._storage.exists(name):
                return False
            self._touch_now_and_then()
            usage = _usage(self._storage)
            self.full = usage.reserve(self.spool, self.id, values.nbytes)
            if self.full:
                return False
            reserved = values.nbytes
            with self._storage.writing(name) as stream, pa.ipc.new_file(stream, batch.schema) as writer:
                writer.write_batch(batch)
        except OSError as error:
            if reserved:
                usage.forget()
            self.full = f"{self._path(_block_name(array, block))} cannot be written: {reason_of(error)}"
            return False
        return True

    def read(self, array: str, block: int, dtype: str | None = None) -> np.ndarray:
        """The block: [tokens, d], read-only; mapped into memory from a disk, fetched from object storage.

        `dtype`: the torch type that it has to have, where the caller knows. Raises `SpoolError` naming the file where
        it is missing, cut off, damaged, or another block.
        """
        name = _block_name(array, block)
        path = self._path(name)
        try:
            if self._storage.is_local:
                source = pa.memory_map(path, "r")
            else:
                source = pa.BufferReader(self._storage.read(f"{self.id}/{name}"))
            values = _from_file(source, _identity(self.id, array, block), dtype)
        except FileNotFoundError:
            raise SpoolError(f"{path} is missing: the spool does not hold this block") from None
        except _Unfit as error:
            raise SpoolError(f"{path} {error}") from None
        except _DAMAGE as error:
            raise SpoolError(f"{path} is empty, cut off or damaged: {reason_of(error)}") from None
        self._touch_now_and_then()
        return values

    @property
    def held_bytes(self) -> int:
        """What the whole spool holds, as far as this process has measured and written."""
        return _usage(self._storage).held_bytes

    def shape(self, array: str, block: int) -> tuple[int, int]:
        """(tokens, d) of a block by the schema of its file: its activations are neither read nor verified.

        Raises `SpoolError` naming the file where it is missing, cut off, or another block.
        """
        name = _block_name(array, block)
        try:
            with self._storage.reading(f"{self.id}/{name}") as source:
                metadata = _metadata(pa.ipc.open_file(source), _identity(self.id, array, block))
            tokens, d = map(int, metadata["shape"].split(","))
        except _Unfit as error:
            raise SpoolError(f"{self._path(name)} {error}") from None
        except _DAMAGE as error:
            raise SpoolError(f"{self._path(name)} is missing, cut off or damaged: {reason_of(error)}") from None
        return tokens, d

    def remove(self, array: str, block: int) -> None:
        """Remove a block, as one does with a damaged one; nothing where there is none."""
        name = _block_name(array, block)
        try:
            with contextlib.suppress(FileNotFoundError):
                self._storage.remove(f"{self.id}/{name}")
        except OSError as error:
            raise SpoolError(f"{self._path(name)} cannot be removed: {reason_of(error)}") from None
        _usage(self._storage).forget()

    def _path(self, name: str) -> str:
        return self._storage.path(f"{self.id}/{name}")

    def _touch_now_and_then(self) -> None:
        if time.monotonic() >= self._touch_due:
            self.touch()


def _block_name(array: str, block: int) -> str:
    assert array and "/" not in array, array
    return f"{array}/{block:07d}.arrow"


# ---- one block ------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """Why a file is not the block that was asked for."""


def _identity(stream_id: str, array: str, block: int) -> dict[str, str]:
    return {"format": str(FORMAT), "stream": stream_id, "array": array, "block": str(block)}


def _to_batch(values: np.ndarray, dtype: str, identity: Mapping[str, str]) -> pa.RecordBatch:
    """The record batch over the array's own memory."""
    value_type = _TYPES[dtype]
    assert values.ndim == 2 and values.dtype == value_type.to_pandas_dtype(), (values.shape, values.dtype, dtype)
    values = np.ascontiguousarray(values)
    tokens, d = values.shape
    list_type = pa.list_(value_type, d)
    flat = pa.Array.from_buffers(value_type, values.size, [None, pa.py_buffer(values)], null_count=0)
    column = pa.Array.from_buffers(list_type, tokens, [None], null_count=0, children=[flat])
    metadata = {**identity, "dtype": dtype, "shape": f"{tokens},{d}", "xxh3_128": xxhash.xxh3_128_hexdigest(values)}
    schema = pa.schema([pa.field(COLUMN, list_type, nullable=False)], metadata=metadata)
    return pa.RecordBatch.from_arrays([column], schema=schema)


def _metadata(reader: pa.ipc.RecordBatchFileReader, identity: Mapping[str, str]) -> dict[str, str]:
    """What a file says of itself. Raises `_Unfit` where it is not the block that was asked for."""
    metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
    for key, value in identity.items():
        if metadata.get(key) != value:
            raise _Unfit(f"is of another block, or damaged: its {key} is {metadata.get(key)!r}, not {value!r}")
    return metadata


def _from_file(source: pa.NativeFile, identity: Mapping[str, str], dtype: str | None) -> np.ndarray:
    """The array of a file, without a copy. Raises `_Unfit`, or one of `_DAMAGE` where pyarrow cannot read it."""
    reader = pa.ipc.open_file(source)
    metadata = _metadata(reader, identity)
    found = metadata["dtype"]
    if found not in _TYPES or found != (dtype or found):
        accepted = dtype or ", ".join(_TYPES)
        raise _Unfit(f"holds activations of another dtype, or is damaged: {found!r}; accepted: {accepted}")
    tokens, d = map(int, metadata["shape"].split(","))
    if reader.schema.names != [COLUMN] or reader.schema.field(0).type != pa.list_(_TYPES[found], d):
        raise _Unfit(f"is damaged: its columns are not one of {d} values of {found} a token")
    if reader.num_record_batches != 1:
        raise _Unfit(f"is damaged: it has {reader.num_record_batches} record batches, not one")
    batch = reader.get_batch(0)
    batch.validate(full=True)
    column = batch.column(0)
    if len(column) != tokens or column.null_count or column.values.null_count:
        raise _Unfit(f"is damaged: it does not hold the {tokens} tokens it names")
    values = np.frombuffer(column.values.buffers()[1], _TYPES[found].to_pandas_dtype(), count=tokens * d)
    if xxhash.xxh3_128_hexdigest(values) != metadata["xxh3_128"]:
        raise _Unfit("is damaged: its activations do not have the checksum written with them")
    return values.reshape(tokens, d)


# ---- room -----------------------------------------------------------------------------------------------------------


class _Usage:
    """What a spool holds, as far as one process knows: measured now and then, and counted on in between."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._streams: list[StreamInfo] = []
        self._bytes = 0
        self._due = 0.0

    @property
    def held_bytes(self) -> int:
        return self._bytes

    def forget(self) -> None:
        """Measure anew before the next block."""
        self._due = 0.0

    def reserve(self, spool: Spool, stream_id: str, n_bytes: int) -> str | None:
        """Count `n_bytes` more, after removing streams for them where they do not fit; why not, where that fails."""
        with self._lock:
            if time.monotonic() >= self._due:
                self._measure(spool.storage)
            lacking, problem = self._lacking(spool, n_bytes)
            if lacking > 0:
                doomed = _least_recent(self._streams, self._bytes - lacking, {stream_id}, _IDLE_SECONDS)
                if sum(info.bytes for info in doomed) >= lacking:
                    for info in doomed:
                        _delete_if_idle(spool.storage, info.id)
                    self._measure(spool.storage)
                    lacking, problem = self._lacking(spool, n_bytes)
            if lacking > 0:
                return problem
            self._bytes += n_bytes
            return None

    def _measure(self, storage: Storage) -> None:
        began = time.monotonic()
        self._streams = _scan(storage)
        self._bytes = sum(info.bytes for info in self._streams)
        ended = time.monotonic()
        self._due = ended + max(_MEASURE_SECONDS, (ended - began) / _MEASURE_SHARE)

    def _lacking(self, spool: Spool, n_bytes: int) -> tuple[int, str]:
        """How many bytes too large a block is (0 or less: it fits), and for what."""
        cases = [(0, "")]
        free = _free_bytes(spool.storage)
        if free is not None:
            text = f"the disk of spool {spool.place!r} is full: {free / 1e9:.2f} GB free, 1 GiB is left to others"
            cases.append((n_bytes - (free - _SPARE_BYTES), text))
        if spool.limit_bytes is not None:
            held = f"{self._bytes / 1e9:.2f} of {spool.limit_bytes / 1e9:.2f} GB"
            text = f"spool {spool.place!r} is full: it holds {held}, and too little of it has gone unused for an hour"
            cases.append((self._bytes + n_bytes - spool.limit_bytes, text))
        return max(cases)


_usages: dict[str, _Usage] = {}


def _usage(storage: Storage) -> _Usage:
    """The one figure of a process: a stream that was pickled and sent here does not begin by measuring."""
    return _usages.setdefault(storage.path(""), _Usage())


def _scan(storage: Storage) -> list[StreamInfo]:
    """The streams of a spool, the least recently used first, without their `about`."""
    found = (_stream_info(storage, name) for name in storage.names("") if _STREAM.fullmatch(name))
    return sorted((info for info in found if info), key=lambda info: (info.used, info.id))


def _stream_info(storage: Storage, stream_id: str) -> StreamInfo | None:
    """None where nothing in the folder is of the spool's layout: a folder named by mistake is no spool."""
    files = [replace(file, name=file.name.removeprefix(f"{stream_id}/")) for file in storage.files(stream_id)]
    blocks = [match for file in files if (match := _BLOCK.fullmatch(file.name))]
    if not blocks and not {file.name for file in files} & {ABOUT, USED}:
        return None
    whole = [match[1] for match in blocks if not match[3]]
    n_bytes, used = sum(file.bytes for file in files), max(file.written for file in files)
    return StreamInfo(stream_id, {}, tuple(sorted(set(whole))), len(whole), n_bytes, used)


def _least_recent(
    streams: Iterable[StreamInfo], keep_bytes: int, keep: Collection[str], unused_seconds: float
) -> list[StreamInfo]:
    """The streams to remove, so that at most `keep_bytes` are left, as far as the others may go."""
    streams = sorted(streams, key=lambda info: (info.used, info.id))
    left = sum(info.bytes for info in streams)
    before = time.time() - unused_seconds
    doomed = []
    for info in streams:
        if left > keep_bytes and info.id not in keep and info.used <= before:
            doomed.append(info)
            left -= info.bytes
    return doomed


def _delete_if_idle(storage: Storage, stream_id: str) -> None:
    """Remove a stream unless somebody has used it since it was measured. One that is being removed already may fail."""
    info = _stream_info(storage, stream_id)
    if info and info.used < time.time() - _IDLE_SECONDS:
        with contextlib.suppress(OSError):
            storage.delete(stream_id)


def _free_bytes(storage: Storage) -> int | None:
    """What this user may still write to a local disk; None for object storage."""
    if not storage.is_local:
        return None
    root = Path(storage.path(""))
    return shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
