"""What a sweep's driver has said, kept beside the sweep, and `penstock logs`, which shows it.

    sweeps/<id>/logs/<attempt>/00000.jsonl    one object a line: `time`, `text`, and what it concerns

Nothing can be appended to in object storage, so that an attempt's log is cut into files of about 64 KB, of which only
the last one is ever written again. The same lines stand in the log folder of the Ray session on the driver's node,
where the cluster's dashboard shows them to whoever has its token.
"""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from penstock.errors import SweepError
from penstock.redaction import redacted
from penstock.storage import Storage
from penstock.sweep_files import logs_folder

CHUNK_BYTES = 64 * 1024
FLUSH_SECONDS = 4.0
Line = Mapping[str, Any]


def session_file(sweep_id: str) -> str:
    """The log's name in the log folder of a Ray session."""
    return f"penstock-{sweep_id}-log.jsonl"


class SweepLog:
    """The log of one attempt. Lines are kept in memory until `open` says where they go."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._chunk: list[str] = []  # lines of the file that is written again, of which so many stand in it
        self._written = 0
        self._number = 0
        self._flushed = 0.0
        self._storage: Storage | None = None
        self._folder = ""
        self._local: Path | None = None
        self._new: list[str] = []  # lines for the local file

    def add(self, text: str, **about: Any) -> None:
        """A line, and what it concerns: `sae`, or several, `of`; `pack`; `saes` says which those of the pack are from
        now on. `detail`: more lines, a traceback or the end of a curve. Whatever looks like a secret is hidden."""
        line = {"time": round(self._clock(), 3), "text": redacted(text)}
        line |= {name: value for name, value in about.items() if value is not None}
        if "detail" in line:
            line["detail"] = redacted(line["detail"])
        written = json.dumps(line, ensure_ascii=False)
        with self._lock:
            self._chunk.append(written)
            self._new.append(written)

    def open(self, storage: Storage, folder: str, local: Path | None) -> None:
        """From now on it is kept in a folder of the storage, and in a local file where one is given."""
        with self._lock:
            self._storage, self._folder, self._local = storage, folder, local

    def flush(self, *, now: bool = False) -> None:
        """Write what is new, every few seconds at most unless it is to be `now`. A storage that is full loses no line:
        the next call tries again. One thread at a time may; others may add lines meanwhile, and wait for no storage."""
        if self._storage is None or not (now or time.monotonic() - self._flushed >= FLUSH_SECONDS):
            return
        self._flushed = time.monotonic()
        with self._lock:
            new, self._new = self._new, []
            chunk = list(self._chunk)
        if self._local is not None and new:
            with contextlib.suppress(OSError), self._local.open("a", encoding="utf-8") as stream:
                stream.write("".join(f"{line}\n" for line in new))
        if len(chunk) == self._written:
            return
        with contextlib.suppress(OSError):
            text = "".join(f"{line}\n" for line in chunk)
            self._storage.write(f"{self._folder}/{self._number:05d}.jsonl", text.encode())
            self._written = len(chunk)
            if len(text) >= CHUNK_BYTES:
                with self._lock:
                    del self._chunk[: len(chunk)]
                self._written, self._number = 0, self._number + 1


def read_log(storage: Storage, sweep_id: str, known: dict[str, list[Line]] | None = None) -> list[Line]:
    """The lines of all attempts, in order. Raises `SweepError` when the storage cannot be read. `known`: files that
    were read before, by name; only the last one of an attempt, which may have grown since, is read again."""
    lines: list[Line] = []
    folder, known = logs_folder(sweep_id), {} if known is None else known
    try:
        for attempt in storage.names(folder):
            files = [f"{folder}/{attempt}/{name}" for name in storage.names(f"{folder}/{attempt}")]
            last = max((file for file in files if file in known), default=None)
            for file in files:
                if file not in known or file == last:
                    known[file] = parse_lines(storage.read(file).decode("utf-8", "replace"))
                lines += known[file]
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r}: the log of sweep {sweep_id} cannot be read: {error}") from None
    return lines


def parse_lines(text: str) -> list[Line]:
    """Lines that are not whole (the end of a file that is being written) are left for the next time."""
    lines = []
    for one in text.split("\n"):
        with contextlib.suppress(ValueError):
            found = json.loads(one)
            if isinstance(found, dict) and "text" in found and "time" in found:
                lines.append(found)
    return lines


def find_sae(lines: Iterable[Line], asked: str) -> str:
    """The SAE that an id, or the beginning of one, means. Raises `SweepError` when it is none or several."""
    known = {line["sae"] for line in lines if "sae" in line} | {one for line in lines for one in line.get("saes", ())}
    found = sorted(one for one in known if one.startswith(asked))
    if asked in found:
        return asked
    if len(found) == 1:
        return found[0]
    if found:
        raise SweepError(f"--sae {asked!r} is the beginning of {len(found)} ids: {', '.join(found[:5])}; accepted: a "
                         "longer one")  # fmt: skip
    some = f"; there is: {', '.join(sorted(known)[:5])}{', ...' if len(known) > 5 else ''}" if known else ""
    raise SweepError(f"--sae {asked!r}: the log names no SAE whose id begins so{some}")


def about_sae(lines: Sequence[Line], sae_id: str) -> list[Line]:
    """The lines that concern an SAE: its own, and those of the packs that it is in."""
    packs, found = set(), []
    for line in lines:
        if "saes" in line and "pack" in line:
            (packs.add if sae_id in line["saes"] else packs.discard)(line["pack"])
        named = {line.get("sae"), *line.get("of", ())} - {None}
        if sae_id in named if named else line.get("pack") in packs:
            found.append(line)
    return found


def as_text(line: Line) -> str:
    """`2026-01-31 23:59:59Z  text`, and below it the detail."""
    stamp = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(line["time"]))
    first, *rest = (line["text"].splitlines() or [""]) + line.get("detail", "").rstrip().splitlines()
    return "\n".join([f"{stamp}  {first}", *(f"    {one}" for one in rest)])
