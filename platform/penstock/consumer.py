"""A pack's side of the stream. Light: no torch, since a trial's own process uses it too."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray

from penstock.errors import SweepError
from penstock.spool import SpooledStream, SpoolError
from penstock.stream_state import HaltedError, LeaseLostError

REPORT_SECONDS = 1.0
SIGN_SECONDS = 20.0
AWAY_SECONDS = 120


class StreamClient:
    """A pack's side of the stream: blocks in order, whatever happens to the stream, its hosts or its objects meanwhile.

    Args:
        stream: the stream actor's handle.
        arrays: the names of the arrays that the pack reads.
        run: of the pack's several runs the later one has the greater number; the stream serves the latest alone.
        spool: where blocks lie that the stream hands out as spooled.
    """

    def __init__(
        self, stream: Any, pack_id: str, arrays: Sequence[str], run: int, spool: SpooledStream | None = None
    ) -> None:
        self._stream = stream
        self.pack_id = pack_id
        self._arrays = tuple(arrays)
        self._run = run
        self._spool = spool
        self._events: list[dict[str, Any]] = []
        self._sent = time.monotonic()
        self._next: Any = None  # the request for the next block, until its objects are on their way ...
        self._coming: list[Any] = []  # ... and these
        self._last_call: Any = None
        self._report: Any = None
        self.stops: dict[str, str] = {}  # SAEs that have been decided to stop, and why, as far as it is known here
        self.halt: str | None = None  # why the pack is to save and end, as far as it is known here
        self.about: dict[str, float] = {"wait_seconds": 0.0, "spool_reads": 0}

    def blocks(self, first: int, stop: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """(block, read-only array by name) in order; a block counts as used up when the next one is asked for: keep
        nothing of it then, since the object store may only drop what no process maps. Raises `HaltedError` when the
        pack is to save and end."""
        self._attach(first)
        request = self._request(first)
        for block in range(first, stop):
            arrays = self._fetch(request, block)
            self._next = request = self._request(block + 1) if block + 1 < stop else None
            yield block, arrays
            del arrays
            self._tell(self._stream.acknowledge, block)

    def passing(self, first: int, stop: int) -> Iterator[int]:
        """Every block's number once the block is there, in order, without reading it."""
        self._attach(first)
        for block in range(first, stop):
            self._resolve(self._request(block), block)
            yield block
            self._tell(self._stream.acknowledge, block)

    def block(self, block: int) -> dict[str, np.ndarray]:
        """One block, wherever the pack stands."""
        self._attach(block)
        return self._fetch(self._request(block), block)

    def emit(self, event: dict[str, Any]) -> None:
        """Tell the driver something; sent with the next sign of life."""
        self._events.append({"pack_id": self.pack_id, **event})

    def log(self, message: str) -> None:
        """Say something where the user sees it."""
        print(message, flush=True)
        self.emit({"kind": "log", "message": f"pack {self.pack_id}: {message}"})

    def keep_alive(self) -> None:
        """Send what was emitted, about once a second; have the next block come nearer. To be called at every step."""
        self._fetch_ahead()
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self.flush(0.0)

    def flush(self, pause_seconds: float) -> None:
        """Send what was emitted now, and announce a pause of up to that long; take in the answer to what was sent
        before."""
        self._hear()
        events, self._events = self._events, []
        self._sent = time.monotonic()
        self._report = self._tell(self._stream.report, events, self.about, pause_seconds)

    def ask_halted(self) -> str | None:
        """Why the pack is to save and end; None where it is not, or where the stream is away."""
        try:
            return ray.get(self._stream.halted.remote(self.pack_id, self._run), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            return None

    def close(self) -> None:
        """Send the rest and leave the stream."""
        self.flush(0.0)
        self._tell(self._stream.detach)
        try:  # calls of one caller arrive in their order: the last one answered, all are
            ray.get(self._last_call, timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            pass

    # ---- inside ----

    def _tell(self, method: Any, *args: Any) -> Any:
        """A call whose answer nobody waits for and whose loss does no harm: what it says is repeated, or stands in
        storage as well."""
        self._last_call = method.remote(self.pack_id, *args, self._run)
        return self._last_call

    def _hear(self) -> None:
        """What was answered to the last report; an answer that is not there yet, or lost, comes with the next."""
        if self._report is not None and ray.wait([self._report], timeout=0)[0]:
            with contextlib.suppress(ray.exceptions.RayError):
                decided = ray.get(self._report)
                self.stops, self.halt = decided["stops"], decided["halt"]

    def _request(self, block: int) -> Any:
        return self._stream.next_block.remote(self.pack_id, block, self._run)

    def _attach(self, block: int) -> None:
        for _ in range(AWAY_SECONDS):
            try:
                ray.get(self._stream.attach.remote(self.pack_id, self._arrays, block, self._run))
                return
            except ray.exceptions.RayActorError:
                time.sleep(1.0)  # the stream is being restarted
        raise SweepError(f"pack {self.pack_id}: the stream has been away for {AWAY_SECONDS} s")

    def _resolve(self, request: Any, block: int) -> dict[str, Any]:
        while True:
            try:
                found = ray.get(request)
                if found is not None:
                    return found
            except HaltedError as error:  # it comes with the stream's traceback around it
                raise getattr(error, "cause", error) from None
            except (ray.exceptions.RayActorError, LeaseLostError):
                self._attach(block)
            request = self._request(block)

    def _fetch(self, request: Any, block: int) -> dict[str, np.ndarray]:
        begun = time.perf_counter()
        while True:
            found = self._resolve(request, block)
            spooled = [name for name in self._arrays if isinstance(found[name], str)]  # `IN_SPOOL`
            in_store = [name for name in self._arrays if name not in spooled]
            lost, reason = in_store, "an object is gone from the store"
            try:
                objects = [found[name] for name in in_store]
                self._wait_for(objects)
                arrays = dict(zip(in_store, ray.get(objects), strict=True))
                lost = spooled
                for name in spooled:
                    assert self._spool is not None
                    arrays[name] = self._spool.read(name, block)
            except (ray.exceptions.ObjectLostError, ray.exceptions.ReferenceCountingAssertionError) as error:
                reason = f"{reason}: {type(error).__name__}"
            except SpoolError as error:
                reason = str(error)
                for name in spooled:
                    self._drop(name, block)
            else:
                self._coming = []
                self.about["wait_seconds"] += time.perf_counter() - begun
                self.about["spool_reads"] += bool(spooled)
                return arrays
            self._tell_lost(block, lost, reason)
            request = self._request(block)

    def _wait_for(self, objects: list[Any]) -> None:
        """Return once the objects are on this node, or lost. That one is long on its way is no fault of the pack."""
        while objects and len(ray.wait(objects, num_returns=len(objects), timeout=SIGN_SECONDS)[0]) < len(objects):
            self.flush(0.0)

    def _fetch_ahead(self) -> None:
        """Have Ray bring the next block to this node, once it is there, while the pack trains on this one."""
        if self._next is None or not ray.wait([self._next], timeout=0)[0]:
            return
        request, self._next = self._next, None
        try:
            found = ray.get(request) or {}
        except Exception:  # whoever asks for the block meets it again
            return
        # Held until the block is asked for: without a reference nothing is fetched.
        self._coming = [one for one in found.values() if not isinstance(one, str)]
        if self._coming:
            ray.wait(self._coming, num_returns=len(self._coming), timeout=0)

    def _drop(self, name: str, block: int) -> None:
        """Take a damaged block out of the spool, so that it is written again; one that can be read stays."""
        assert self._spool is not None
        try:
            self._spool.read(name, block)
        except SpoolError:
            self._spool.remove(name, block)

    def _tell_lost(self, block: int, arrays: Sequence[str], reason: str) -> None:
        try:
            ray.get(self._stream.forget.remote(self.pack_id, block, list(arrays), reason), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            pass  # a stream that is new has forgotten it anyway
