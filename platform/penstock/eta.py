"""How long a sweep still takes, from what its packs have done lately."""

import heapq
import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

RECENT_SECONDS = 60.0
LEAST_SECONDS = 5.0  # a rate over less than this says nothing
START_SECONDS = 15.0  # a pack's worker, until its first step
EVALUATION_SHARE = 0.5  # of a host's speed at harvesting, which stops at the deepest hook point and needs no logits


@dataclass(frozen=True)
class Work:
    """What one pack still has to do: `steps` with so many SAEs, at so many steps a second lately (None: nobody knows
    yet). One that is not `running` waits for a place."""

    steps: float
    saes: int
    rate: float | None
    running: bool


def training_seconds(works: Sequence[Work], slots: int) -> float | None:
    """When the last pack ends, in seconds from now, with `slots` packs at a time; None where no pack has a rate yet, or
    one that runs has come to a stand."""
    works = [work for work in works if work.steps > 0 and work.saes > 0]
    if not works:
        return 0.0
    running = [work for work in works if work.running]
    known = [work for work in running if work.rate is not None]
    if not known or any(work.rate == 0 for work in known):
        return None
    sae_steps = statistics.median(work.rate * work.saes for work in known)  # a second

    def as_others(work: Work) -> float:
        return START_SECONDS + work.steps * work.saes / sae_steps

    ends = [as_others(work) if work.rate is None else work.steps / work.rate for work in running]
    places = ends + [0.0] * max(0, slots - len(ends))
    heapq.heapify(places)
    last = max(ends)
    for work in works:
        if not work.running:
            end = heapq.heappop(places) + as_others(work)
            heapq.heappush(places, end)
            last = max(last, end)
    return last


def evaluation_seconds(passes_tokens: float, cost: Mapping[str, float], hosts: int) -> float | None:
    """What evaluating takes that runs the model over so many tokens, passes counted one by one, by what harvesting has
    taken so far; None where nothing has been harvested."""
    if passes_tokens <= 0:
        return 0.0
    if not cost.get("harvested_tokens") or not cost.get("harvest_seconds"):
        return None
    rate = cost["harvested_tokens"] / cost["harvest_seconds"] * EVALUATION_SHARE
    return passes_tokens / rate / max(1, hosts)


def rest_of(seconds: float, share: float) -> float | None:
    """What is left of a job of which a share is done after so many seconds; None where that is nothing yet."""
    return seconds * (1 - share) / share if share > 0 and seconds > 0 else None


class Rates:
    """Counts as they grow, by name, over the last minute."""

    def __init__(self, seconds: float = RECENT_SECONDS) -> None:
        self.seconds = seconds
        self._seen: deque[tuple[float, dict[str, float]]] = deque()

    def note(self, now: float, counts: Mapping[str, float]) -> None:
        """How the counts stand at a time. A count that falls begins anew: its worker was started again."""
        if self._seen:
            last = self._seen[-1][1]
            for name in [name for name, value in counts.items() if value < last.get(name, value)]:
                for _, earlier in self._seen:
                    earlier.pop(name, None)
        self._seen.append((now, dict(counts)))
        while self._seen[0][0] < now - self.seconds:
            self._seen.popleft()

    def rate(self, name: str) -> float | None:
        """Of a count, a second; None while too little is known."""
        with_it = [(time, counts[name]) for time, counts in self._seen if name in counts]
        if len(with_it) < 2 or (seconds := with_it[-1][0] - with_it[0][0]) < LEAST_SECONDS:
            return None
        return (with_it[-1][1] - with_it[0][1]) / seconds

    def total(self, names: Iterable[str]) -> float | None:
        """Of several counts together; None where none is known."""
        rates = [rate for name in names if (rate := self.rate(name)) is not None]
        return sum(rates) if rates else None
