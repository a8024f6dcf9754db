"""What went wrong in a sweep and what was done about it, for `penstock status`, `penstock logs` and the metrics."""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

REMEMBERED = 100


class Failures:
    """The latest failures; `total` counts all. What was done about a pack's failure is known when the pack goes on."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._latest: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self._open: dict[str, dict[str, Any]] = {}  # pack -> its failure that nothing has come of yet
        self._begun: set[str] = set()
        self.total = 0

    @property
    def latest(self) -> list[dict[str, Any]]:
        """`time` (Unix), `what`, `done`, oldest first."""
        return [dict(one) for one in list(self._latest)]

    def note(self, what: str, done: str, pack_id: str | None = None) -> None:
        """Something went wrong. `pack_id`: the pack whose next start is what comes of it; until then, `done` is what is
        tried."""
        before = self._open.get(pack_id or "")
        if before is not None and before["what"] == what:  # said by two that saw the same
            return
        one = {"time": self._clock(), "what": what, "done": done}
        self._latest.append(one)
        self.total += 1
        if pack_id is not None:
            self._open[pack_id] = one

    def started(self, pack_id: str, step: int) -> dict[str, Any] | None:
        """A pack's worker is at its first step. The failure that this is the end of, if it is one: where nobody has
        said what the worker before it died of, that it died is all that is known."""
        again = pack_id in self._begun
        self._begun.add(pack_id)
        if not again and pack_id not in self._open:
            return None
        if pack_id not in self._open:
            self.note(f"the worker of pack {pack_id} died", "", pack_id)
        one = self._open.pop(pack_id)
        one["done"] = f"started again from step {step:,}" if step else "started again from the beginning"
        return dict(one)

    def ended(self, pack_id: str) -> None:
        """A pack has ended as it was told to: its next start is no failure's."""
        self._begun.discard(pack_id)
