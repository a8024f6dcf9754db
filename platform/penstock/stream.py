"""The stream: which block is made when, by which host, for whom, and when it may go.

`StreamState` is a pure state machine (no clock, no Ray, no I/O). `Stream` drives it: it asks hosts for blocks, hands
them out and passes on what the packs report. `actors.py` puts it into a Ray actor.

A block is made once for all packs of a *cohort* (the packs of one wave): nobody runs further ahead of the slowest live
member than the window, so every member finds the block in the object store. A pack that joins later, or whose lease
ended, is a cohort of its own.
"""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

STRIKES = 3
LEASE_SECONDS = 60.0
LEASE_MEDIANS = 10.0
BARRIER_SECONDS = 120.0


@dataclass
class Member:
    """One consumer: a pack, the hook points it reads, and the next block it needs (its cursor)."""

    pack_id: str
    hook_points: tuple[str, ...]
    cohort: int
    cursor: int
    status: Literal["expected", "live", "gone", "done"] = "expected"
    last_progress: float = 0.0
    last_block: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    pause_until: float = 0.0

    @property
    def lease_seconds(self) -> float:
        """How long without a sign of progress until the member counts as hung."""
        return max(LEASE_SECONDS, LEASE_MEDIANS * statistics.median(self.intervals) if self.intervals else 0.0)


@dataclass(frozen=True)
class Work:
    """One harvest: a block at the hook points that somebody waits for."""

    host: int
    block: int
    hook_points: tuple[str, ...]


class HostGoneError(Exception):
    """A model host could not even be built, and never will be."""


class LeaseLostError(Exception):
    """The pack made no progress for too long, or never attached: it has to attach again."""


class StreamState:
    """Who needs which blocks, which are there, which are being made. Times are passed in, never read."""

    def __init__(self, n_blocks: int, window: int, n_hosts: int) -> None:
        if window < 2:
            raise ValueError("a window holds at least two blocks: one in use, one being made")
        self.n_blocks = n_blocks
        self.window = window
        self.members: dict[str, Member] = {}
        self.ready: dict[tuple[int, str], Any] = {}
        self.pending: dict[int, Work] = {}  # by host
        self.idle_hosts: set[int] = set(range(n_hosts))
        self.strikes: dict[int, list[str]] = {}
        self.fatal: str | None = None
        self._opened: dict[int, float] = {}  # cohort -> when it opened
        self._next_own_cohort = -1

    # ---- consumers ----

    def expect(self, packs: Mapping[str, Sequence[str]], cohort: int, cursors: Mapping[str, int]) -> None:
        """Announce the packs of a wave: until they attach, or the barrier ends, their blocks are kept for them."""
        for pack_id, hook_points in packs.items():
            self.members[pack_id] = Member(pack_id, tuple(hook_points), cohort, cursors.get(pack_id, 0))

    def open_cohort(self, cohort: int, now: float) -> None:
        """From now on blocks are made for the cohort; `BARRIER_SECONDS` later it waits for nobody."""
        self._opened.setdefault(cohort, now)

    def attach(self, pack_id: str, cursor: int, now: float) -> None:
        """A pack starts, or starts again, at a block. Calling it twice changes nothing."""
        member = self.members[pack_id]
        if member.status == "gone":
            member.cohort, self._next_own_cohort = self._next_own_cohort, self._next_own_cohort - 1
        member.status, member.cursor = "live", cursor
        member.last_progress = member.last_block = now
        member.pause_until = 0.0
        self.open_cohort(member.cohort, now)
        self._release()

    def detach(self, pack_id: str) -> None:
        """The pack needs no more blocks."""
        self.members[pack_id].status = "done"
        self._release()

    def progress(self, pack_id: str, now: float, pause_seconds: float = 0.0) -> None:
        """The pack has made a step, or announces a pause (checkpoint, compilation, evaluation)."""
        member = self._live(pack_id)
        member.last_progress, member.pause_until = now, now + pause_seconds

    def take(self, pack_id: str, block: int, now: float) -> dict[str, Any] | None:
        """The block at the pack's hook points, or None while it is not there. Asking again gives the same."""
        member = self._live(pack_id)
        # Waiting for a block is no fault of the consumer.
        member.last_progress = max(member.last_progress, now)
        keys = [(block, hook_point) for hook_point in member.hook_points]
        if block >= self._limit(member.cohort) or not all(key in self.ready for key in keys):
            return None
        return {hook_point: self.ready[block, hook_point] for hook_point in member.hook_points}

    def acknowledge(self, pack_id: str, block: int, now: float) -> None:
        """The pack has used the block up. Acknowledging again changes nothing."""
        member = self._live(pack_id)
        if block + 1 > member.cursor:
            member.intervals.append(now - member.last_block)
            member.cursor = block + 1
            member.last_block = now
        member.last_progress = now
        self._release()

    def expire(self, now: float) -> list[str]:
        """End the leases of members that hang, and the wait for members that never came. Their pack ids."""
        expired = []
        for member in self.members.values():
            opened = self._opened.get(member.cohort)
            late = member.status == "expected" and opened is not None and now - opened > BARRIER_SECONDS
            lease_ends = max(member.pause_until, member.last_progress + member.lease_seconds)
            hung = member.status == "live" and now > lease_ends
            if late or hung:
                member.status = "gone"
                expired.append(member.pack_id)
        if expired:
            self._release()
        return expired

    # ---- hosts ----

    def next_work(self) -> Work | None:
        """The block that is needed first and that nobody makes yet, given to an idle host."""
        if not self.idle_hosts or self.fatal:
            return None
        being_made = {(work.block, name) for work in self.pending.values() for name in work.hook_points}
        best: tuple[int, int] | None = None
        wanted: dict[int, set[str]] = {}
        for member in self._active():
            for block in range(member.cursor, min(self._limit(member.cohort), self.n_blocks)):
                missing = {
                    name
                    for name in member.hook_points
                    if (block, name) not in self.ready and (block, name) not in being_made
                }
                if missing:
                    wanted.setdefault(block, set()).update(missing)
                    urgency = (block - member.cursor, block)
                    best = min(best, urgency) if best else urgency
        if best is None:
            return None
        host = min(self.idle_hosts)
        work = Work(host, best[1], tuple(sorted(wanted[best[1]])))
        self.idle_hosts.discard(host)
        self.pending[host] = work
        return work

    def produced(self, work: Work, objects: Mapping[str, Any]) -> None:
        """A host has made a block; what nobody waits for any more is dropped at once."""
        del self.pending[work.host]
        self.idle_hosts.add(work.host)
        self.strikes.pop(work.block, None)
        for hook_point, value in objects.items():
            self.ready[work.block, hook_point] = value
        self._release()

    def failed(self, work: Work, reason: str) -> None:
        """A host died or raised over a block: another one makes it, until it has failed `STRIKES` times."""
        del self.pending[work.host]
        reasons = self.strikes.setdefault(work.block, [])
        reasons.append(reason)
        if len(reasons) >= STRIKES:
            self.fatal = f"block {work.block} has failed {STRIKES} times and is given up; last: {reasons[-1]}"

    def host_back(self, host: int) -> None:
        """A host answers again."""
        self.idle_hosts.add(host)

    def forget(self, block: int, hook_points: Sequence[str]) -> None:
        """The objects of a block are lost: it is made again for whoever still needs it."""
        for hook_point in hook_points:
            self.ready.pop((block, hook_point), None)

    # ---- inside ----

    def _live(self, pack_id: str) -> Member:
        member = self.members[pack_id]
        if member.status != "live":
            raise LeaseLostError(pack_id)
        return member

    def _active(self) -> list[Member]:
        """The members that blocks are made and kept for."""
        return [
            member
            for member in self.members.values()
            if member.status == "live" or (member.status == "expected" and member.cohort in self._opened)
        ]

    def _limit(self, cohort: int) -> int:
        """The first block that the cohort may not have yet."""
        cursors = [member.cursor for member in self._active() if member.cohort == cohort]
        return (min(cursors) if cursors else 0) + self.window

    def _release(self) -> None:
        """Drop what no active member will still read."""
        lowest: dict[str, int] = {}
        for member in self._active():
            for name in member.hook_points:
                lowest[name] = min(lowest.get(name, member.cursor), member.cursor)
        for block, name in [key for key in self.ready if key[1] not in lowest or key[0] < lowest[key[1]]]:
            del self.ready[block, name]


class Host(Protocol):
    """What the stream needs of a model host."""

    async def harvest(self, block: int, hook_points: Sequence[str]) -> tuple[dict[str, Any], "BlockInfo"]: ...

    async def wait_until_up(self) -> None:
        """Return when the host answers again. Raises `HostGoneError` when it never will."""


@dataclass(frozen=True)
class BlockInfo:
    """What making a block cost."""

    tokens: int
    forward_passes: int
    seconds: float


class Stream:
    """Drives a `StreamState`: one task that feeds idle hosts, one call a consumer. Runs in one event loop."""

    def __init__(
        self,
        state: StreamState,
        hosts: Sequence[Host],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.state = state
        self._hosts = hosts
        self._gone = 0
        self._clock = clock
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mail: list[dict[str, Any]] = []
        self._cost = {"blocks_made": 0, "forward_passes": 0, "harvested_tokens": 0, "harvest_seconds": 0.0}

    async def pump(self) -> None:
        """Give work to idle hosts for ever. Cancel it to stop."""
        while True:
            while (work := self.state.next_work()) is not None:
                self._start(self._make(work))
            for pack_id in self.state.expire(self._clock()):
                self._log(f"pack {pack_id}: no step for too long; its lease ends, the others do not wait for it")
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue

    async def attach(self, pack_id: str, cursor: int) -> None:
        self.state.attach(pack_id, cursor, self._clock())
        await self._notify()

    async def detach(self, pack_id: str) -> None:
        self.state.detach(pack_id)
        await self._notify()

    async def acknowledge(self, pack_id: str, block: int) -> None:
        self.state.acknowledge(pack_id, block, self._clock())
        await self._notify()

    async def forget(self, pack_id: str, block: int) -> None:
        """A pack could not read a block that was handed out."""
        self._log(f"block {block} is lost from the object store; it is made again")
        self.state.forget(block, self.state.members[pack_id].hook_points)
        await self._notify()

    async def next_block(self, pack_id: str, block: int, timeout: float = 20.0) -> dict[str, Any] | None:
        """The block, as soon as it is there; None after the timeout, which also keeps the lease."""
        deadline = self._clock() + timeout
        while True:
            if self.state.fatal:
                raise RuntimeError(self.state.fatal)
            if (objects := self.state.take(pack_id, block, self._clock())) is not None:
                return objects
            left = deadline - self._clock()
            if left <= 0:
                return None
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=min(left, 5.0))
                except TimeoutError:
                    continue

    async def report(self, pack_id: str, rows: Sequence[dict[str, Any]], pause_seconds: float = 0.0) -> None:
        """Progress of a pack: metric rows and events for the driver, and a sign of life."""
        self._mail.extend(rows)
        self.state.progress(pack_id, self._clock(), pause_seconds)

    async def collect(self) -> tuple[list[dict[str, Any]], dict[str, float], str | None]:
        """For the driver: what the packs have reported since the last call, the cost so far, a fatal error."""
        mail, self._mail = self._mail, []
        return mail, dict(self._cost), self.state.fatal

    # ---- inside ----

    def _log(self, message: str) -> None:
        print(message, flush=True)
        self._mail.append({"kind": "log", "message": message})

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, work: Work) -> None:
        host = self._hosts[work.host]
        try:
            objects, info = await host.harvest(work.block, work.hook_points)
        except Exception as error:  # whatever a host dies of, the block is made again elsewhere
            self.state.failed(work, _last_line(error))
            self._log(f"host {work.host} lost block {work.block} ({type(error).__name__}); it is made again")
            await self._notify()
            await self._bring_back(work.host)
        else:
            self.state.produced(work, objects)
            self._cost["blocks_made"] += 1
            self._cost["forward_passes"] += info.forward_passes
            self._cost["harvested_tokens"] += info.tokens
            self._cost["harvest_seconds"] += info.seconds
        await self._notify()

    async def _bring_back(self, index: int) -> None:
        try:
            await self._hosts[index].wait_until_up()
            self.state.host_back(index)
        except HostGoneError as error:
            self._gone += 1
            self._log(f"host {index} is gone for good: {_last_line(error)}")
            if self._gone == len(self._hosts):
                self.state.fatal = f"no model host is left: {_last_line(error)}"

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _last_line(error: Exception) -> str:
    """What an error says in the end; an error from another process brings that one's traceback before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
