"""A pack's side of the stream. Light: no torch, since a trial's own process uses it too."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from penstock.errors import SweepError

REPORT_SECONDS = 1.0


class StreamClient:
    """A pack's side of the stream: blocks in order, whatever happens to the stream or its hosts meanwhile."""

    def __init__(self, stream: Any, pack_id: str) -> None:
        self._stream = stream
        self._pack_id = pack_id
        self._events: list[dict[str, Any]] = []
        self._sent = time.monotonic()
        self._report: Any = None

    def blocks(self, first: int, stop: int, hook_points: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(block, {hook point: read-only array}) in order; a block counts as used up when the next one is asked for."""
        self._attach(first)
        request = self._request(first)
        for block in range(first, stop):
            arrays = self._fetch(request, block, hook_points)
            request = self._request(block + 1) if block + 1 < stop else None
            yield block, arrays
            del arrays  # the object store may only drop what no process maps
            self._call_quietly(self._stream.acknowledge, block)

    def wait_for(self, block: int) -> None:
        """Return when a block has been made."""
        self._attach(block)
        self._resolve(self._request(block), block)

    def emit(self, event: dict[str, Any]) -> None:
        """Tell the driver something; sent with the next sign of life."""
        self._events.append(event)

    def log(self, message: str) -> None:
        """Say something where the user sees it."""
        print(message, flush=True)
        self.emit({"kind": "log", "message": f"pack {self._pack_id}: {message}"})

    def keep_alive(self) -> None:
        """Send what was emitted, about once a second."""
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self._send(0.0)

    def flush(self, pause_seconds: float) -> None:
        """Send what was emitted now, and announce a pause of up to that long."""
        self._send(pause_seconds)

    def close(self) -> None:
        """Send the rest and leave the stream."""
        self._send(0.0)
        self._call_quietly(self._stream.detach)

    # ---- inside ----

    def _send(self, pause_seconds: float) -> None:
        events, self._events = self._events, []
        self._sent = time.monotonic()
        self._call_quietly(self._stream.report, events, pause_seconds)

    def _call_quietly(self, method: Any, *args: Any) -> None:
        """A call whose loss does no harm: what it says is repeated, or stands in storage as well."""
        try:
            ray.get(method.remote(self._pack_id, *args), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            pass

    def _request(self, block: int) -> Any:
        return self._stream.next_block.remote(self._pack_id, block)

    def _attach(self, block: int) -> None:
        for _ in range(120):
            try:
                ray.get(self._stream.attach.remote(self._pack_id, block))
                return
            except ray.exceptions.RayActorError:
                time.sleep(1.0)  # the stream is being restarted
        raise SweepError(f"pack {self._pack_id}: the stream has been away for two minutes")

    def _resolve(self, request: Any, block: int) -> dict[str, Any]:
        while True:
            try:
                refs = ray.get(request)
                if refs is not None:
                    return refs
            except ray.exceptions.RayActorError:
                self._attach(block)
            except ray.exceptions.RayTaskError as error:
                if "LeaseLostError" not in str(error):
                    raise
                self._attach(block)
            request = self._request(block)

    def _fetch(self, request: Any, block: int, hook_points: Sequence[str]) -> dict[str, Any]:
        while True:
            refs = self._resolve(request, block)
            try:
                return dict(zip(hook_points, ray.get([refs[name] for name in hook_points]), strict=True))
            except (ray.exceptions.ObjectLostError, ray.exceptions.ReferenceCountingAssertionError):
                self._call_quietly(self._stream.forget, block)
                request = self._request(block)


