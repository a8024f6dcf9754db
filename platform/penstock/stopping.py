"""Asking the driver of a running sweep to stop, and the driver's side of it.

It is asked by a file in the sweep's storage (`penstock stop`) or by SIGTERM (`ray job stop`, scancel, an evicted pod).
Its packs save and end, it ends with exit status 3, and `penstock resume` goes on from there. A second SIGTERM, like
Ctrl-C, ends it at once: the checkpoints that are there are gone on from.
"""

import contextlib
import getpass
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from penstock.errors import SweepError
from penstock.fence import BEAT_SECONDS
from penstock.storage import Storage
from penstock.sweep_files import stop_file

STOPPED_STATUS = 3  # the exit status of a driver that was asked to stop
SAVE_SECONDS = 600.0  # for checkpoints; who has not saved by then is left behind
LEAVE_SECONDS = 60.0  # for the driver, once its packs have ended
JOB_STOP_SECONDS = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray's own variable, in the environment of a job
IDLE_SECONDS = 20.0  # while nobody is attached: workers that only start have nothing to save


class SweepStopped(SweepError):
    """The sweep was asked to stop, and did; it may go on another time."""


def ask_to_stop(storage: Storage, sweep_id: str, *, now: bool = False) -> None:
    """Leave word in the storage; the driver finds it within seconds. `now`: without saving. Raises `OSError`."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = f"user {os.getuid()}"
    by = f"{user} on {socket.gethostname()}"
    storage.write_json(stop_file(sweep_id), {"time": time.time(), "by": by, "now": now})


class StopOrder:
    """Whether this driver has been asked to stop. `listen` and `watch` begin to; `check` raises once it has been."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.now = False
        self._at_once = True  # nothing is there yet that could be saved
        self._terminated = False
        self._before: Any = None
        self._listens = False
        self._storage: Storage | None = None
        self._file = ""
        self._looked = 0.0

    @property
    def asked(self) -> bool:
        return self.reason is not None

    def listen(self) -> None:
        """Take SIGTERM as the order. Ray takes it for its own when it is started: call this again then. Only the main
        thread may."""
        if threading.current_thread() is threading.main_thread():
            before = signal.signal(signal.SIGTERM, self._on_signal)
            if not self._listens:
                self._before, self._listens = before, True

    def watch(self, storage: Storage, sweep_id: str) -> None:
        """Look for the file from now on, and let SIGTERM wait until `check`."""
        self._storage, self._file, self._at_once = storage, stop_file(sweep_id), False
        storage.remove(self._file)

    def look(self) -> bool:
        """Whether it has been asked, by now."""
        if self._storage is not None and time.monotonic() - self._looked >= BEAT_SECONDS:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError, json.JSONDecodeError):  # it may be read in two seconds
                if self._storage.exists(self._file):
                    self._heed(self._storage.read_json(self._file))
        return self.asked

    def check(self) -> None:
        """Raise `SweepStopped` when it has been asked."""
        if self.look():
            raise SweepStopped(f"the sweep was stopped: {self.reason}")

    def close(self) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
            self._listens = False

    def _heed(self, order: Mapping[str, Any]) -> None:
        self.reason = self.reason or f"penstock stop, by {order.get('by', 'somebody')}"
        self.now = self.now or bool(order.get("now"))

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._terminated:
            raise KeyboardInterrupt
        self._terminated, self.reason = True, self.reason or "SIGTERM"
        if self._at_once:
            raise SweepStopped("the sweep was stopped by SIGTERM before it had begun to train")


def main(arguments: list[str]) -> int:
    """`python -m penstock.stopping STORAGE SWEEP_ID [--now]`: leave word, on a machine that has the storage."""
    ask_to_stop(Storage(arguments[0]), arguments[1], now="--now" in arguments[2:])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
