"""Which block is made when, by which host, for whom, and when it may go: the stream as a pure state machine.

No clock, no Ray, no I/O: times are passed in, and what a block *is* (an object reference, a file) is opaque here.

A block is made once for all packs of a *cohort*: nobody runs further ahead of the slowest live member than the window,
so every member finds the block in the object store. The packs of a wave are a cohort. One that joins later, or comes
back after its lease or its work had ended, is a cohort of its own, until it has caught up with another: two cohorts
become one as soon as nobody in front has to wait for it. Several cohorts share the window, so that what stands in the
object store stays bounded. Blocks in the spool take no room in it: they are neither made nor kept, and may be read
however far ahead.
"""

import statistics
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

STRIKES = 3
LEASE_SECONDS = 60.0
LEASE_MEDIANS = 10.0
BARRIER_SECONDS = 120.0

IN_SPOOL = "in spool"  # handed out in place of an object: the consumer reads the block there


class LeaseLostError(Exception):
    """The pack made no progress for too long, or never attached: it has to attach again."""


class HaltedError(Exception):
    """The pack is to save and to end, though its SAEs have not: what the error says is why."""


class SupersededError(Exception):
    """A newer run of the same pack has attached: this one has outlived its trial and must end."""


class BlockSet:
    """A set of block numbers, a bit each."""

    def __init__(self, n_blocks: int, blocks: Iterable[int] = ()) -> None:
        self._bits = bytearray(n_blocks // 8 + 1)
        for block in blocks:
            self.add(block)

    def add(self, block: int) -> None:
        self._bits[block >> 3] |= 1 << (block & 7)

    def discard(self, block: int) -> None:
        self._bits[block >> 3] &= ~(1 << (block & 7))

    def __contains__(self, block: int) -> bool:
        return bool(self._bits[block >> 3] & (1 << (block & 7)))

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()


@dataclass
class Member:
    """One consumer: a pack, the arrays it reads, and the next block it needs (its cursor)."""

    pack_id: str
    arrays: tuple[str, ...]
    cohort: int
    cursor: int
    run: int = 0  # of the pack's several runs, in the order they were started, the one that is attached
    status: Literal["expected", "live", "gone", "done"] = "expected"
    last_progress: float = 0.0
    last_block: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    pause_until: float = 0.0
    taken: tuple[int, int] = (-1, 0)  # the block handed out last, and how many harvests there had been by then


@dataclass(frozen=True)
class Work:
    """One harvest: a block's arrays that somebody waits for."""

    host: str
    block: int
    arrays: tuple[str, ...]


@dataclass(frozen=True)
class _Cohort:
    """The active members' needs: the lowest cursor of each array and of all."""

    lowest: dict[str, int]
    start: int


class StreamState:
    """Who needs which blocks, which are there, which are being made.

    Args:
        n_blocks: of the run.
        window: blocks (of all arrays) that may stand beyond the slowest consumer.
        spooled: the blocks of each array that lie in the spool; None where there is no spool. With one, whoever needs a
            block first has it made at the hook points of later waves too: one forward pass, read from the spool later.
    """

    def __init__(
        self,
        n_blocks: int,
        window: int,
        *,
        spooled: Mapping[str, BlockSet] | None = None,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        if window < 2:
            raise ValueError("a window holds at least two blocks: one in use, one being made")
        self.n_blocks = n_blocks
        self.window = window
        self.members: dict[str, Member] = {}
        self.ready: dict[tuple[int, str], tuple[int, Any]] = {}  # (number of the harvest, object)
        self.spooled: dict[str, BlockSet] = dict(spooled or {})
        self._made_along: set[str] | None = None if spooled is None else set()  # arrays of packs that were announced
        self.pending: dict[str, Work] = {}  # by host
        self.idle_hosts: dict[str, None] = {}  # in the order they became idle
        self.retiring: set[str] = set()
        self.strikes: dict[int, list[str]] = {}
        self.fatal: str | None = None
        self.blocks_remade = 0
        self._lease_seconds = lease_seconds
        self._opened: dict[int, float] = {}  # cohort -> when it opened
        self._next_own_cohort = -1
        self._cohorts: dict[int, _Cohort] = {}
        self._harvests = 0
        self._being_made: set[tuple[int, str]] = set()
        self._made: dict[str, BlockSet] = {}  # by array

    # ---- consumers ----

    def expect(self, packs: Mapping[str, Sequence[str]], cohort: int, cursors: Mapping[str, int]) -> None:
        """Announce the packs of a wave: until they attach, or the barrier ends, their blocks are kept for them."""
        for pack_id, arrays in packs.items():
            self.members[pack_id] = Member(pack_id, tuple(arrays), cohort, cursors.get(pack_id, 0))
            if self._made_along is not None:
                self._made_along.update(arrays)

    def open_cohort(self, cohort: int, now: float) -> None:
        """From now on blocks are made for the cohort; `BARRIER_SECONDS` later it waits for nobody."""
        if cohort not in self._opened:
            self._opened[cohort] = now
            self._update(cohort)

    def attach(self, pack_id: str, arrays: Sequence[str], cursor: int, now: float, run: int = 0) -> None:
        """A pack starts, or starts again, at a block. Calling it twice changes nothing.

        Raises `SupersededError` when a later run of the pack is there.
        """
        before = self.members.get(pack_id)
        if before is not None:
            self._check_run(before, run)
        if before is None or before.status in ("gone", "done") or self._has_passed(before, cursor):
            self._next_own_cohort -= 1
            self.members[pack_id] = Member(pack_id, tuple(arrays), self._next_own_cohort, cursor)
            if before is not None:
                self._update(before.cohort)
        member = self.members[pack_id]
        member.status, member.cursor, member.run = "live", cursor, run
        member.last_progress = member.last_block = now
        member.pause_until = 0.0
        self.open_cohort(member.cohort, now)
        self._update(member.cohort)

    def detach(self, pack_id: str, run: int = 0) -> None:
        """The pack needs no more blocks."""
        member = self.members.get(pack_id)
        if member is not None:
            self._check_run(member, run)
            member.status = "done"
            self._update(member.cohort)

    def progress(self, pack_id: str, now: float, pause_seconds: float = 0.0, run: int = 0) -> None:
        """The pack has made a step, or announces a pause (checkpoint, compilation, evaluation)."""
        member = self._live(pack_id, run)
        member.last_progress, member.pause_until = now, now + pause_seconds

    def take(self, pack_id: str, block: int, now: float, run: int = 0) -> dict[str, Any] | None:
        """The block by array, or None while it is not there; `IN_SPOOL` for what is to be read in the spool. Asking
        again gives the same."""
        member = self._live(pack_id, run)
        # Waiting for a block is no fault of the consumer.
        member.last_progress = max(member.last_progress, now)
        within = block < self._limit(member.cohort)
        found = {}
        for name in member.arrays:
            if within and (block, name) in self.ready:
                _, found[name] = self.ready[block, name]
            elif self._in_spool(block, name):
                found[name] = IN_SPOOL
            else:
                return None
        member.taken = block, self._harvests
        return found

    def acknowledge(self, pack_id: str, block: int, now: float, run: int = 0) -> None:
        """The pack has used the block up. Acknowledging again changes nothing."""
        member = self._live(pack_id, run)
        member.last_progress = now
        if block + 1 > member.cursor:
            member.intervals.append(now - member.last_block)
            was, member.cursor = member.cursor, block + 1
            member.last_block = now
            lowest = self._cohorts[member.cohort].lowest
            if any(lowest[name] == was for name in member.arrays):
                self._update(member.cohort)

    def postpone(self, packs: Iterable[str]) -> None:
        """Wait for these packs no longer, where their wave has begun without them: they come later."""
        for pack_id in packs:
            member = self.members.get(pack_id)
            if member is not None and member.status == "expected" and member.cohort in self._opened:
                member.status = "gone"
                self._update(member.cohort)

    def expire(self, now: float) -> list[str]:
        """End the leases of members that hang, and the wait for members that never came. Their pack ids."""
        expired = []
        for member in self.members.values():
            opened = self._opened.get(member.cohort)
            late = member.status == "expected" and opened is not None and now - opened > BARRIER_SECONDS
            hung = member.status == "live" and now > max(member.pause_until, member.last_progress + self.lease(member))
            if late or hung:
                member.status = "gone"
                expired.append(member.pack_id)
        for cohort in {self.members[pack_id].cohort for pack_id in expired}:
            self._update(cohort)
        return expired

    def lease(self, member: Member) -> float:
        """How long without a sign of progress until the member counts as hung."""
        median = statistics.median(member.intervals) if member.intervals else 0.0
        return max(self._lease_seconds, LEASE_MEDIANS * median)

    # ---- hosts ----

    def host_up(self, host: str) -> None:
        """A host answers: it may be given work."""
        if host not in self.pending and host not in self.retiring:
            self.idle_hosts[host] = None

    def retire_host(self, host: str) -> bool:
        """The host gets no more work. Whether it is free to go already; else `produced` or `failed` comes first."""
        self.idle_hosts.pop(host, None)
        self.retiring.add(host)
        return host not in self.pending

    def next_work(self) -> Work | None:
        """The block that is needed first and that nobody makes yet, given to an idle host."""
        if not self.idle_hosts or self.fatal:
            return None
        best: tuple[int, int, int, int] | None = None
        wanted: dict[int, set[str]] = {}
        for turn, (number, cohort) in enumerate(self._cohorts.items()):
            limit = min(self._limit(number), self.n_blocks)
            for name, lowest in cohort.lowest.items():
                for block in range(lowest, limit):
                    if self._is_missing(block, name):
                        wanted.setdefault(block, set()).add(name)
                        urgency = block - lowest, turn, block, number
                        best = min(best, urgency) if best else urgency
        if best is None:
            return None
        *_, block, number = best
        self._cohorts[number] = self._cohorts.pop(number)  # of equal urgency, the others come first next time
        host = next(iter(self.idle_hosts))
        along = {name for name in self._made_along or () if self._is_missing(block, name)}
        work = Work(host, block, tuple(sorted(wanted[block] | along)))
        del self.idle_hosts[host]
        self.pending[host] = work
        self._being_made.update((block, name) for name in work.arrays)
        return work

    def produced(self, work: Work, objects: Mapping[str, Any], spooled: Iterable[str] = ()) -> None:
        """A host has made a block, and put the arrays named by `spooled` into the spool; what nobody waits for any more
        is dropped at once."""
        self._ended(work)
        self.host_up(work.host)
        self.strikes.pop(work.block, None)
        for name in spooled:
            self.spooled.setdefault(name, BlockSet(self.n_blocks)).add(work.block)
        made = [self._made.setdefault(name, BlockSet(self.n_blocks)) for name in objects]
        self.blocks_remade += any(work.block in blocks for blocks in made)
        for blocks in made:
            blocks.add(work.block)
        self._harvests += 1
        for name, value in objects.items():
            self.ready[work.block, name] = self._harvests, value
        self._release()

    def failed(self, work: Work, reason: str) -> None:
        """A host died or raised over a block: another one makes it, until it has failed `STRIKES` times."""
        self._ended(work)
        reasons = self.strikes.setdefault(work.block, [])
        reasons.append(reason)
        if len(reasons) >= STRIKES:
            self.fatal = f"block {work.block} has failed {STRIKES} times and is given up; last: {reasons[-1]}"

    def returned(self, work: Work) -> None:
        """A host turns out to have gone before it was given the block, which is no fault of the block."""
        self._ended(work)

    def forget(self, pack_id: str, block: int, arrays: Iterable[str]) -> bool:
        """A pack cannot read arrays of the block it was handed out: they come from the spool instead, or are made again
        for whoever still needs them. Whether that is news: others may have said so, and the arrays been made again."""
        member, news = self.members.get(pack_id), False
        if member is None or member.taken[0] != block:
            return False
        for name in arrays:
            if (block, name) in self.ready:
                if self.ready[block, name][0] <= member.taken[1]:
                    del self.ready[block, name]
                    news = True
            elif self._in_spool(block, name):
                self.spooled[name].discard(block)
                news = True
        return news

    # ---- inside ----

    def _ended(self, work: Work) -> None:
        del self.pending[work.host]
        self._being_made.difference_update((work.block, name) for name in work.arrays)

    def _has_passed(self, member: Member, cursor: int) -> bool:
        """Whether the others of a live member's cohort are all beyond the cursor: they do not wait for it."""
        others = [one.cursor for one in self._active(member.cohort) if one is not member]
        return member.status == "live" and cursor < min(others, default=0)

    def _live(self, pack_id: str, run: int) -> Member:
        member = self.members.get(pack_id)
        if member is None:  # the stream itself is new
            raise LeaseLostError(pack_id)
        self._check_run(member, run)
        if member.status != "live":
            raise LeaseLostError(pack_id)
        return member

    def _check_run(self, member: Member, run: int) -> None:
        if run < member.run:
            raise SupersededError(f"run {run} of pack {member.pack_id}: run {member.run} has taken over")

    def _is_missing(self, block: int, name: str) -> bool:
        key = block, name
        return key not in self.ready and key not in self._being_made and not self._in_spool(block, name)

    def _in_spool(self, block: int, name: str) -> bool:
        return name in self.spooled and block in self.spooled[name]

    def _share(self, n_cohorts: int) -> int:
        """Blocks of the window that each of so many cohorts may use."""
        return max(1, self.window // max(1, n_cohorts))

    def _limit(self, number: int) -> int:
        """The first block that the cohort may not have in the object store yet."""
        cohort = self._cohorts.get(number)
        return (cohort.start if cohort else 0) + self._share(len(self._cohorts))

    def _active(self, number: int) -> list[Member]:
        """The members of a cohort that need blocks, or are waited for."""
        statuses = ("live", "expected") if number in self._opened else ("live",)
        return [
            member
            for member in self.members.values()
            if member.cohort == number and member.status in statuses and member.cursor < self.n_blocks
        ]

    def _update(self, number: int) -> None:
        """Work out again what a cohort needs, once one of its members has changed."""
        lowest: dict[str, int] = {}
        for member in self._active(number):
            for name in member.arrays:
                lowest[name] = min(lowest.get(name, member.cursor), member.cursor)
        before = self._cohorts.get(number)
        if lowest:
            self._cohorts[number] = _Cohort(lowest, min(lowest.values()))
        else:
            self._cohorts.pop(number, None)
        if self._cohorts.get(number) != before:
            self._merge(number)
            self._release()

    def _merge(self, number: int) -> None:
        """Join the cohort to another, where all members of the one ahead are within the reach of the one behind."""
        for other in self._cohorts if number in self._cohorts else ():
            if other != number:
                behind, ahead = sorted((number, other), key=lambda one: self._cohorts[one].start)
                reach = self._cohorts[behind].start + self._share(len(self._cohorts) - 1)
                if self._cohorts[ahead].start > reach or any(m.cursor > reach for m in self._active(ahead)):
                    continue
                if any(m.status == "expected" for m in self._active(number) + self._active(other)):
                    continue  # a barrier holds up those alone who came to it
                for member in self.members.values():
                    if member.cohort == number:
                        member.cohort = other
                del self._cohorts[number]
                self._update(other)
                return

    def _release(self) -> None:
        """Drop what no cohort needs within its share of the window. (A latecomer that makes the shares smaller costs
        the others the blocks beyond; keeping them would let the store fill with what each leaves for the next.)"""
        share, cohorts = self._share(len(self._cohorts)), self._cohorts.values()
        for block, name in list(self.ready):
            if not any(one.lowest.get(name, self.n_blocks) <= block < one.start + share for one in cohorts):
                del self.ready[block, name]
