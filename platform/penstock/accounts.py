"""What a sweep's hosts and packs are held for, noted while it runs: one file an attempt, which `penstock cost` reads.

Light: a pack's worker and the driver keep the books, and neither needs more than the clock for it.
"""

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from penstock.storage import Storage

WRITE_SECONDS = 10.0
BUSY, IDLE, STARTING = "busy", "idle", "starting"
# In these the stream's word on its hosts is an old one: they work for the driver.
WORKING_PHASES = ("search", "evaluate")


class WorkerClock:
    """The time of a pack's worker, from when its code runs: so much for each SAE, so much waiting, the rest for start,
    checkpoints and the like."""

    def __init__(self, pack_id: str) -> None:
        self._pack_id = pack_id
        self._started = time.time()
        self._said = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._said >= WRITE_SECONDS

    def event(self, laps: Mapping[str, tuple[float, float, int]], waiting: float) -> dict[str, Any]:
        """What the driver is told: totals, so that what is lost on the way comes with the next.

        laps: of each SAE the seconds it has kept this worker busy, those of them up to its last checkpoint, and the
        tokens it was trained on. waiting: seconds without a block.
        """
        self._said = time.monotonic()
        return {
            "kind": "time", "worker": f"{self._pack_id}-{self._started:.3f}", "pack": self._pack_id,
            "started": self._started, "held": time.time() - self._started, "waiting": waiting,
            "saes": {sae_id: list(lap) for sae_id, lap in laps.items()},
        }  # fmt: skip


class Accounts:
    """The books of one attempt at a sweep, in its driver. `tick` is called by the driver's pulse, the rest by its main
    thread.

    Args:
        about: what stands in the file as it is, `started` among it: since when hosts are held.
    """

    def __init__(self, storage: Storage, file: str, about: Mapping[str, Any]) -> None:
        self._storage, self._file, self._about = storage, file, dict(about)
        self._lock = threading.Lock()
        self._ticked, self._written = float(about["started"]), 0.0
        self._phases: dict[str, dict[str, Any]] = {}
        self._workers: dict[str, dict[str, Any]] = {}
        self._saes: dict[str, str] = {}
        self._stopped: dict[str, str] = {}
        self._blocks: dict[str, float] = {}

    def add_saes(self, titles: Mapping[str, str]) -> None:
        """The SAEs of the sweep, which bear what it costs: what each is called, by its id."""
        with self._lock:
            self._saes |= titles

    def heed(self, event: Mapping[str, Any]) -> None:
        """Take in what a worker has said of its time; the latest counts."""
        with self._lock:
            self._workers[event["worker"]] = {key: value for key, value in event.items() if key != "kind"}

    def tick(
        self, phase: str, hosts: Mapping[str, str], stopped: Mapping[str, str], blocks: Mapping[str, float]
    ) -> None:
        """Book the time since the last tick. hosts: the state of each, as the stream has it; one that could not be
        built holds nothing. stopped: SAEs that are diverged, failed or pruned. blocks: what making them has come to."""
        with self._lock:
            now = time.time()
            seconds, self._ticked = now - self._ticked, now
            booked = self._phases.setdefault(phase, {"seconds": 0.0, "hosts": {BUSY: 0.0, IDLE: 0.0, STARTING: 0.0}})
            booked["seconds"] += seconds
            for state in hosts.values():
                kind = BUSY if phase in WORKING_PHASES or state.startswith("block ") else state
                if kind in booked["hosts"]:
                    booked["hosts"][kind] += seconds
            self._stopped, self._blocks = dict(stopped), dict(blocks)
        if now - self._written >= WRITE_SECONDS:
            self.write()

    def write(self, *, over: bool = False) -> None:
        with self._lock:
            record = {
                **self._about, "time": self._ticked, "over": over, "phases": self._phases, "workers": self._workers,
                "saes": self._saes, "stopped": self._stopped, "blocks": self._blocks,
            }  # fmt: skip
            text = json.dumps(record)
            self._written = time.time()
        with contextlib.suppress(OSError):  # as with the report: the next one may do
            self._storage.write(self._file, text.encode())
