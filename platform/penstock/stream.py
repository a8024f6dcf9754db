"""The stream: asks hosts for blocks, hands them out to packs, and passes on what the packs report.

`stream_state.py` decides; this drives it, in one event loop. `actors.py` puts it into a Ray actor.
"""

import asyncio
import statistics
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.stream_state import HaltedError, LeaseLostError, StreamState, Work
from penstock.text import last_line

# A host that is silent for longer than this, and many times longer than blocks take, hangs.
HARVEST_SECONDS = 600.0
HARVEST_MEDIANS = 20.0
ANSWER_SECONDS = 20.0


class HostGoneError(Exception):
    """A model host could not even be built, and never will be."""


@dataclass(frozen=True)
class BlockInfo:
    """What making a block cost. `spooled`: the arrays that lie in the spool now; `from_spool`: the whole block lay
    there already, and no array comes with it. `notice`: what the user should know: the spool takes no more blocks.
    `spool_bytes`: what the whole spool holds, None where there is none."""

    tokens: int
    forward_passes: int
    seconds: float
    spooled: tuple[str, ...] = ()
    from_spool: bool = False
    notice: str | None = None
    spool_bytes: int | None = None


class Host(Protocol):
    """What the stream needs of a model host."""

    async def harvest(self, block: int, arrays: Sequence[str]) -> tuple[Mapping[str, Any], BlockInfo]: ...

    async def wait_until_up(self) -> None:
        """Return when the host answers. Raises `HostGoneError` when it never will."""

    def kill(self) -> None:
        """End a host that hangs; it starts again by itself."""


class Stream:
    """Drives a `StreamState`: one task that feeds idle hosts, one call a consumer. Runs in one event loop."""

    def __init__(self, state: StreamState, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = state
        self.hosts: dict[str, Host] = {}
        self.broken: dict[str, str] = {}  # hosts that could not be built, and why
        self._cost = {
            "blocks_made": 0, "blocks_lost": 0, "spool_hits": 0, "blocks_spooled": 0,
            "forward_passes": 0, "harvested_tokens": 0, "harvest_seconds": 0.0,
        }  # fmt: skip
        self.consumed: dict[str, dict[str, float]] = {}  # pack -> what it has said of itself
        self.stops: dict[str, str] = {}  # SAEs that are to stop, and why
        self.spool_bytes: int | None = None  # as the last host to make a block has said
        self.spool_is_full = False
        self._halts: dict[str, tuple[int, str]] = {}  # packs that are to save and end: up to which run, and why
        self._halt_all: str | None = None
        self._clock = clock
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mail: list[dict[str, Any]] = []
        self._harvests: deque[float] = deque(maxlen=32)
        self._noticed: set[str] = set()

    async def pump(self) -> None:
        """Give work to idle hosts for ever. Cancel it to stop."""
        while True:
            for pack_id in self.state.expire(self._clock()):
                self._log(f"pack {pack_id}: no step for too long; its lease ends, the others do not wait for it")
                if self.state.members[pack_id].run:  # one that has not come yet is no failure
                    self._failed(f"pack {pack_id} made no step for too long", "the others do not wait for it", pack_id)
            while (work := self.state.next_work()) is not None:
                self._start(self._make(work))
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=1.0)
                except TimeoutError:
                    continue

    # ---- hosts ----

    async def set_hosts(self, hosts: Mapping[str, Host]) -> list[str]:
        """From now on these hosts make the blocks. New ones join as soon as they answer; others finish the block at
        hand and leave. The names of those that are still at it; others that are not named may be ended."""
        for name, host in hosts.items():
            if name not in self.hosts:
                self.hosts[name] = host
                self._start(self._bring_back(name))
        for name in [name for name in self.hosts if name not in hosts and self.state.retire_host(name)]:
            del self.hosts[name]
        self._check_hosts()
        await self._notify()
        return [name for name in self.hosts if name not in hosts]

    # ---- consumers ----

    async def attach(self, pack_id: str, arrays: Sequence[str], cursor: int, run: int) -> None:
        self.state.attach(pack_id, arrays, cursor, self._clock(), run)
        await self._notify()

    async def detach(self, pack_id: str, run: int) -> None:
        self.state.detach(pack_id, run)
        await self._notify()

    async def acknowledge(self, pack_id: str, block: int, run: int) -> None:
        self.state.acknowledge(pack_id, block, self._clock(), run)
        await self._notify()

    async def forget(self, pack_id: str, block: int, arrays: Sequence[str], reason: str) -> None:
        """A pack could not read arrays of a block that was handed out."""
        if self.state.forget(pack_id, block, arrays):
            self._cost["blocks_lost"] += 1
            self._log(f"block {block} is lost ({reason}); it is made again")
            self._failed(f"block {block} is lost ({reason})", "it is made again")
            await self._notify()

    async def next_block(self, pack_id: str, block: int, run: int, timeout: float = 20.0) -> dict[str, Any] | None:
        """The block, as soon as it is there; None after the timeout, which also keeps the lease."""
        deadline = self._clock() + timeout
        while True:
            if self.state.fatal:
                raise RuntimeError(self.state.fatal)
            if why := self.halted(pack_id, run):
                raise HaltedError(why)
            if (objects := self.state.take(pack_id, block, self._clock(), run)) is not None:
                return objects
            left = deadline - self._clock()
            if left <= 0:
                return None
            lease = self.state.lease(self.state.members[pack_id])
            async with self._changed:
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=min(left, 5.0, lease / 2))
                except TimeoutError:
                    continue

    async def report(
        self, pack_id: str, rows: Sequence[dict[str, Any]], about: Mapping[str, float], pause_seconds: float, run: int
    ) -> dict[str, Any]:
        """Progress of a pack: metric rows and events for the driver, figures about itself, and a sign of life. The
        answer is what has been decided: `stops`, the SAEs that are to stop, in this pack or another, and why; `halt`,
        why the pack itself is to save and end, None where it is not."""
        with suppress(LeaseLostError):  # what it says counts all the same; it attaches again for its next block
            self.state.progress(pack_id, self._clock(), pause_seconds, run)
        self._mail.extend(rows)
        if about:
            self.consumed[pack_id] = dict(about)
        return {"stops": self.stops, "halt": self.halted(pack_id, run)}

    def halted(self, pack_id: str, run: int) -> str | None:
        """Why a run of a pack is to save and end; None where it is not."""
        upto, why = self._halts.get(pack_id, (-1, ""))
        return self._halt_all or (why if run <= upto else None)

    # ---- the driver ----

    async def postpone(self, packs: Collection[str]) -> None:
        """These packs do not start now: nobody waits for them."""
        self.state.postpone(packs)
        await self._notify()

    async def halt(self, packs: Collection[str] | None, why: str) -> None:
        """Have these packs save and end as they stand, and say why; all there are and all to come where None is given.
        An order to one pack is to the run of it that is attached: when it is started again it goes on."""
        if packs is None:
            self._halt_all = why
        for pack_id in packs or ():
            if (member := self.state.members.get(pack_id)) is not None:
                self._halts[pack_id] = member.run, why
        await self._notify()  # those that wait for a block hear of it at once

    async def collect(self) -> dict[str, Any]:
        """For the driver: what the packs have reported since the last call (`mail`), the cost so far, a fatal error,
        and how things stand (`status`)."""
        mail, self._mail = self._mail, []
        return {"mail": mail, "cost": self.cost, "fatal": self.state.fatal, "status": self.status()}

    @property
    def cost(self) -> dict[str, float]:
        """What making and losing blocks has come to so far."""
        return {**self._cost, "blocks_remade": self.state.blocks_remade}

    @property
    def paused_packs(self) -> int:
        """How many packs are in a pause that they have announced."""
        now = self._clock()
        return sum(one.status == "live" and now < one.pause_until for one in self.state.members.values())

    def status(self) -> dict[str, Any]:
        """How things stand: hosts, window, and every pack's cursor, lag behind the foremost, and figures."""
        now, members = self._clock(), self.state.members.values()
        foremost = max((member.cursor for member in members if member.status == "live"), default=0)
        return {
            "blocks": self.state.n_blocks,
            "window": self.state.window,
            "blocks_in_store": len({block for block, _ in self.state.ready}),
            "arrays_in_store": len(self.state.ready),
            "hosts": {
                name: f"block {self.state.pending[name].block}" if name in self.state.pending
                else "idle" if name in self.state.idle_hosts else self.broken.get(name, "starting")
                for name in self.hosts
            },
            "packs": {
                member.pack_id: {
                    "status": member.status, "block": member.cursor, "lag": max(0, foremost - member.cursor),
                    "silent_seconds": round(now - member.last_progress, 1) if member.status == "live" else 0.0,
                    **self.consumed.get(member.pack_id, {}),
                }
                for member in members
            },
        }  # fmt: skip

    # ---- inside ----

    def _log(self, message: str) -> None:
        print(message, flush=True)
        self._mail.append({"kind": "log", "message": message})

    def _failed(self, what: str, done: str, pack_id: str | None = None) -> None:
        """Something for the driver's list of failures, that has been said."""
        self._mail.append({"kind": "failure", "pack_id": pack_id, "what": what, "done": done, "said": True})

    def _start(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, work: Work) -> None:
        host = self.hosts[work.host]
        if work.block in self.state.strikes and not await _answers(host):
            self.state.returned(work)
            await self._notify()
            await self._bring_back(work.host)
            return
        patience = max(HARVEST_SECONDS, HARVEST_MEDIANS * statistics.median(self._harvests or [0.0]))
        limit = asyncio.timeout(patience)
        try:
            async with limit:
                objects, info = await host.harvest(work.block, work.arrays)
        except Exception as error:  # whatever a host dies of, the block is made again elsewhere
            if limit.expired():
                host.kill()
            reason = f"no answer for {patience:.0f} s" if limit.expired() else last_line(error)
            self.state.failed(work, reason)
            self._log(f"host {work.host} lost block {work.block} ({type(error).__name__}: {reason}); it is made again")
            self._failed(f"{work.host} lost block {work.block} ({reason})", "it is made again, the host starts again")
            await self._notify()
            await self._bring_back(work.host)
        else:
            self._harvests.append(info.seconds)
            self._count(info)
            spooled = work.arrays if info.from_spool else info.spooled
            self.state.produced(work, {} if info.from_spool else objects, spooled)
        await self._notify()

    def _count(self, info: BlockInfo) -> None:
        self._cost["spool_hits" if info.from_spool else "blocks_made"] += 1
        self._cost["blocks_spooled"] += bool(info.spooled)
        self._cost["forward_passes"] += info.forward_passes
        self._cost["harvested_tokens"] += 0 if info.from_spool else info.tokens
        self._cost["harvest_seconds"] += info.seconds
        if info.spool_bytes is not None:
            self.spool_bytes, self.spool_is_full = info.spool_bytes, info.notice is not None
        if info.notice and info.notice not in self._noticed:
            self._noticed.add(info.notice)
            self._log(info.notice)

    async def _bring_back(self, name: str) -> None:
        host = self.hosts.get(name)
        if host is None or name in self.state.retiring:
            return
        try:
            await host.wait_until_up()
        except HostGoneError as error:
            self.broken[name] = last_line(error)
            self._log(f"host {name} is gone: {self.broken[name]}")
            self._failed(f"{name} could not be built ({self.broken[name]})", "the sweep goes on without it")
            self._check_hosts()
        else:
            self.state.host_up(name)
        await self._notify()

    def _check_hosts(self) -> None:
        """Give up when all hosts that are to stay could not be built."""
        staying = self.hosts.keys() - self.state.retiring
        if staying and staying <= self.broken.keys():
            self.state.fatal = f"no model host is left: {self.broken[min(staying)]}"

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


async def _answers(host: Host) -> bool:
    """Whether a host is there: the death of an idle one went unnoticed, and is no fault of the block."""
    try:
        await asyncio.wait_for(host.wait_until_up(), ANSWER_SECONDS)
    except (TimeoutError, HostGoneError):
        return False
    return True
