"""Who may write for a sweep: the latest driver's trials, and of each pack its latest run. Whoever they have outlived
finds out before anything it has written counts."""

import contextlib
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.errors import SweepError
from penstock.storage import Storage

BEAT_SECONDS = 2.0
SILENT_SECONDS = 10.0


class FencedError(SweepError):
    """A newer driver, or a newer run of the pack, has taken over: nothing more may be written."""


@dataclass(frozen=True)
class Fence:
    """Lets one run of one pack write, while it is the latest. `file` names the sweep's driver; `token` is of the one
    that started the pack."""

    storage: Storage
    file: str
    token: str
    pack_id: str = ""
    run: int = 0

    @property
    def run_file(self) -> str:
        """Where the latest run of the pack stands."""
        return f"{self.file.removesuffix('.json')}-packs/{self.pack_id}.json"

    def of(self, pack_id: str, run: int) -> "Fence":
        """The fence of a run of a pack."""
        return Fence(self.storage, self.file, self.token, pack_id, run)

    def close_to_others(self) -> None:
        """From now on earlier runs of the pack may not write."""
        self.storage.write_json(self.run_file, {"run": self.run})

    def check(self) -> None:
        """Raise `FencedError` when a newer driver, or a newer run of the pack, has taken over."""
        driver = self.storage.read_json(self.file)
        if driver["token"] != self.token:
            raise FencedError(
                f"attempt {driver['attempt']} (process {driver['pid']} on {driver['machine']}) has taken this sweep "
                "over; nothing more is written here"
            )
        if self.storage.exists(self.run_file) and self.storage.read_json(self.run_file)["run"] > self.run:
            raise FencedError(f"pack {self.pack_id}: a newer run of it has taken over; nothing more is written")


def claim(storage: Storage, file: str, beat_file: str, say: Callable[[str], None]) -> Fence:
    """Take a sweep over for this process.

    A driver shows that it lives by rewriting `beat_file` (see `Pulse`). Raises `SweepError` when another one does.
    """
    before = storage.read_json(file) if storage.exists(file) else None
    if before is not None and not before.get("ended") and _may_live(before):
        _wait_for_silence(storage, beat_file, before, say)
    token = uuid.uuid4().hex
    attempt = (before["attempt"] if before else 0) + 1
    about = {"attempt": attempt, "token": token, "machine": socket.gethostname(), "pid": os.getpid(),
             "started": time.time()}  # fmt: skip
    storage.write_json(file, about)
    return Fence(storage, file, token)


def release(fence: Fence) -> None:
    """Say that the driver has ended, so that the next one need not wait to see it."""
    driver = fence.storage.read_json(fence.file)
    if driver["token"] == fence.token:
        fence.storage.write_json(fence.file, {**driver, "ended": time.time()})


def _may_live(driver: dict[str, Any]) -> bool:
    if driver["machine"] != socket.gethostname():
        return True
    if driver["pid"] == os.getpid():  # this very process, earlier
        return False
    try:
        os.kill(driver["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _wait_for_silence(
    storage: Storage, beat_file: str, driver: dict[str, Any], say: Callable[[str], None]
) -> None:
    where = f"process {driver['pid']} on {driver['machine']}"
    say(f"this sweep was started by {where}; looking whether it is alive")
    first, deadline = _beat(storage, beat_file), time.monotonic() + SILENT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 4)
        if _beat(storage, beat_file) != first:
            raise SweepError(
                f"this sweep is running already: {where} is at it; accepted: wait for it, or stop it first"
            )


def _beat(storage: Storage, beat_file: str) -> bytes | None:
    return storage.read(beat_file) if storage.exists(beat_file) else None


class Pulse:
    """Writes how things stand every few seconds, which also shows that this process lives."""

    def __init__(self, storage: Storage, file: str, standing: Callable[[], dict[str, Any]]) -> None:
        self._storage, self._file, self._standing = storage, file, standing
        self._stopped = threading.Event()
        self.last = "ended"
        self._latest: dict[str, Any] | None = None
        self._has_complained = False
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    def stop(self, phase: str = "ended") -> None:
        """Write a last time, with what the sweep has come to as its phase."""
        self.last = phase
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            self._beat({})
            self._stopped.wait(BEAT_SECONDS)
        self._beat({"phase": self.last})

    def _beat(self, last: dict[str, Any]) -> None:
        try:
            self._latest = self._standing()
        except OSError:  # a disk that is full, a network that is away: the next one may do
            pass
        except Exception:  # a driver that cannot say how it stands must not be taken for a dead one
            if not self._has_complained:
                traceback.print_exc()
            self._has_complained = True
        if self._latest is not None:
            with contextlib.suppress(OSError):
                self._storage.write_json(self._file, {"time": time.time(), **self._latest, **last})
