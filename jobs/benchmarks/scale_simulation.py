"""The stream's own code, driven by simulated hosts and packs on simulated time.

`Stream` and `StreamState` run as they are, in an event loop whose clock stands still but for three things: the CPU time
that their code takes here, what every call costs the actor beyond that (`call_seconds`), and sleep, which passes at
once. So the loop is the actor's one thread: while it is busy, everybody waits.
"""

import asyncio
import contextlib
import heapq
import io
import pickle
import selectors
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.consumer import SIGN_SECONDS
from penstock.meters import Meters
from penstock.stream import BlockInfo, Stream
from penstock.stream_state import LeaseLostError, StreamState

ARRAY = "blocks.12.hook_resid_post"
REPORT_SECONDS, COLLECT_SECONDS, METERS_SECONDS = 1.0, 0.5, 1.0
# What a run may be freed of, to see what it was held up by.
LIMITS = ("the hosts' network", "calls of the stream's actor", "the code of the stream", "the window")
NETWORK, CALLS, CODE, WINDOW = LIMITS
NEAR = 0.3  # of the time busy: with less, nobody waited for the actor


@dataclass(frozen=True)
class Setting:
    """One simulated cluster: every node has a host and `packs_per_node`, which share the node's copy of a block.

    `nic_bytes`: a second, that a node can send (and receive); every node that reads a block gets it from the host that
    made it. `call_seconds`: of the actor, for each call, beside the code that runs here. `prefetch`: packs fetch a
    block while they train on the one before. `freed`: limits that do not hold.
    """

    nodes: int
    harvest_seconds: float
    step_seconds: float
    block_bytes: float
    window: int
    nic_bytes: float
    call_seconds: float
    packs_per_node: int = 1
    prefetch: bool = True
    freed: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True)
class Outcome:
    """Blocks a second that every pack was trained on; shares of the time that the actor, and the busiest host's
    network, were busy; `code_seconds`: CPU seconds of the stream's code a hand-out; `reply_bytes` of the
    answer to the driver's question how things stand; leases that packs have lost."""

    rate: float
    actor_busy: float
    network_busy: float
    code_seconds: float
    reply_bytes: int
    leases_lost: int


class _SkippedTime(selectors.DefaultSelector):
    """Waits for nothing: the time until the next timer is added to the clock."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if not found and timeout is None:
            raise RuntimeError("nothing is left that could happen")
        if not found and timeout > 0:
            self.skipped += timeout
        return found


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, counts_code: bool) -> None:
        self._waiting = _SkippedTime()
        self._counts_code = counts_code
        self.charged, self._begun = 0.0, time.thread_time()
        super().__init__(self._waiting)

    @property
    def code_seconds(self) -> float:
        return time.thread_time() - self._begun

    def time(self) -> float:
        return self._waiting.skipped + self.charged + (self.code_seconds if self._counts_code else 0.0)

    def charge(self, seconds: float) -> None:
        self.charged += seconds


class _Sender:
    """What one node sends. Copies under way at once share its network alike: Ray sends a chunk of each in
    turn."""

    def __init__(self, loop: _Loop, copy_seconds: float) -> None:
        self._loop, self._copy_seconds = loop, copy_seconds
        self._share = 0.0  # seconds of the network that each copy under way since the start would have had ...
        self._at = 0.0  # ... by now
        self._ends: list[tuple[float, int, asyncio.Future[float]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._sent, self.busy = 0, 0.0

    def send(self, now: float) -> "asyncio.Future[float]":
        """Its result is when the copy has arrived."""
        self._advance(now)
        self._sent += 1
        arrived = self._loop.create_future()
        heapq.heappush(self._ends, (self._share + self._copy_seconds, self._sent, arrived))
        self._set_timer()
        return arrived

    def _advance(self, now: float) -> None:
        while self._ends:
            first = self._at + (self._ends[0][0] - self._share) * len(self._ends)
            until = min(first, max(now, self._at))
            self._share += (until - self._at) / len(self._ends)
            self.busy += until - self._at
            self._at = until
            if first > now:
                return
            self._share, _, arrived = heapq.heappop(self._ends)
            if not arrived.done():
                arrived.set_result(first)
        self._at = max(now, self._at)

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._ends:
            first = self._at + (self._ends[0][0] - self._share) * len(self._ends)
            self._timer = self._loop.call_at(first, self._tick, first)

    def _tick(self, due: float) -> None:
        self._advance(max(due, self._loop.time()))
        self._set_timer()


class _Network:
    """Blocks on their way; a copy a node."""

    def __init__(self, loop: _Loop, setting: Setting) -> None:
        self._free = NETWORK in setting.freed
        self._senders = [_Sender(loop, setting.block_bytes / setting.nic_bytes) for _ in range(setting.nodes)]
        self._coming: dict[tuple[int, int], asyncio.Future[float]] = {}

    async def bring(self, host: int, block: int, node: int, now: float) -> float:
        """When a block that a node asks for now is there."""
        if host == node or self._free:
            return now
        if (block, node) not in self._coming:
            self._coming[block, node] = self._senders[host].send(now)
        return max(now, await self._coming[block, node])

    @property
    def busy(self) -> float:
        """Seconds that the busiest host was sending."""
        return max(sender.busy for sender in self._senders)


class _Host:
    def __init__(self, index: int, loop: _Loop, setting: Setting, call_seconds: float) -> None:
        self._index, self._loop, self._setting, self._call_seconds = index, loop, setting, call_seconds

    async def harvest(self, block: int, arrays: Sequence[str]) -> tuple[dict[str, Any], BlockInfo]:
        self._loop.charge(self._call_seconds)
        await asyncio.sleep(self._setting.harvest_seconds)
        return dict.fromkeys(arrays, self._index), BlockInfo(1, 1, self._setting.harvest_seconds)

    async def wait_until_up(self) -> None:
        pass

    def kill(self) -> None:
        raise AssertionError("no simulated host hangs")


def simulate(setting: Setting, warm_up: int, measured: int) -> Outcome:
    """Run `warm_up` and then `measured` blocks."""
    loop = _Loop(CODE not in setting.freed)
    try:
        asyncio.set_event_loop(loop)
        with contextlib.redirect_stdout(io.StringIO()):  # the stream says when a pack loses its lease
            return loop.run_until_complete(_run(loop, setting, warm_up, measured))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(loop: _Loop, setting: Setting, warm_up: int, measured: int) -> Outcome:
    n_blocks, n_packs = warm_up + measured, setting.nodes * setting.packs_per_node
    call_seconds = 0.0 if CALLS in setting.freed else setting.call_seconds
    state = StreamState(n_blocks, n_blocks + 2 if WINDOW in setting.freed else setting.window)
    packs = {f"pack-{index:05}": (ARRAY,) for index in range(n_packs)}
    state.expect(packs, 0, {})
    state.open_cohort(0, loop.time())
    stream, network = Stream(state, clock=loop.time), _Network(loop, setting)
    meters = Meters("simulated")
    ends = [0.0] * n_blocks
    tasks: set[asyncio.Task[Any]] = set()

    def start(work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        tasks.add(task := asyncio.ensure_future(work))
        task.add_done_callback(tasks.discard)
        return task

    async def call(method: Callable[..., Coroutine[Any, Any, Any]], *about: Any) -> Any:
        """A call of the actor, which takes its turn."""
        loop.charge(call_seconds)
        return await method(*about, 0)

    async def tell(method: Callable[..., Coroutine[Any, Any, Any]], *about: Any) -> None:
        with contextlib.suppress(LeaseLostError):  # it hears of it when it asks for its next block
            await call(method, *about)

    async def find(pack_id: str, block: int) -> tuple[float, int]:
        """When it is known which host has the block, and which."""
        while True:
            try:
                if (found := await call(stream.next_block, pack_id, block)) is not None:
                    return loop.time(), found[ARRAY]
            except LeaseLostError:
                await call(stream.attach, pack_id, (ARRAY,), block)

    async def fetch(pack_id: str, node: int, block: int) -> float:
        answered, host = await find(pack_id, block)
        return await network.bring(host, block, node, answered)

    async def pack(pack_id: str, node: int) -> None:
        # A pack is a process of its own: `now` is its time, which the loop, while the actor is busy, is behind.
        await call(stream.attach, pack_id, (ARRAY,), 0)
        now = said = loop.time()
        request = fetch if setting.prefetch else find
        about = (node,) if setting.prefetch else ()
        ahead = start(request(pack_id, *about, 0))
        for block in range(n_blocks):
            while not (await asyncio.wait([ahead], timeout=SIGN_SECONDS))[0]:
                start(tell(stream.report, pack_id, [], {}, 0.0))
            if setting.prefetch:
                now = max(now, await ahead)
            else:
                answered, host = await ahead
                now = await network.bring(host, block, node, max(now, answered))
            await asyncio.sleep(now - loop.time())
            if block + 1 < n_blocks:
                ahead = start(request(pack_id, *about, block + 1))
            done = now + setting.step_seconds
            while now < done:
                report_at = max(now, said + REPORT_SECONDS)
                now = min(done, report_at)
                await asyncio.sleep(now - loop.time())
                if now == report_at:
                    said = now
                    start(tell(stream.report, pack_id, [], {"wait_seconds": 0.0, "spool_reads": 0}, 0.0))
            ends[block] = max(ends[block], now)
            start(tell(stream.acknowledge, pack_id, block))
        start(tell(stream.detach, pack_id))

    async def ask(seconds: float, question: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            question()

    def collect() -> None:
        loop.charge(call_seconds)
        replies.append(stream.status())

    replies: list[Any] = []
    others = [
        asyncio.ensure_future(stream.pump()),
        asyncio.ensure_future(ask(COLLECT_SECONDS, collect)),
        asyncio.ensure_future(ask(METERS_SECONDS, lambda: meters.update(stream))),
    ]
    hosts = {f"host-{index}": _Host(index, loop, setting, call_seconds) for index in range(setting.nodes)}
    await stream.set_hosts(hosts)
    begun = loop.time()
    await asyncio.gather(*(pack(pack_id, index // setting.packs_per_node) for index, pack_id in enumerate(packs)))
    passed = loop.time() - begun
    code = loop.code_seconds
    unfinished = {*others, *tasks}
    while unfinished:  # of those that wait with a timeout, one whose turn has just come takes no notice
        for task in unfinished:
            task.cancel()
        ended, unfinished = await asyncio.wait(unfinished, timeout=1.0)
        for task in ended:  # looked at, so that asyncio does not complain of how one came to its end
            task.cancelled() or task.exception()
    return Outcome(
        rate=measured / (ends[-1] - ends[warm_up - 1]),
        actor_busy=(loop.charged + (0.0 if CODE in setting.freed else code)) / passed,
        network_busy=network.busy / passed,
        code_seconds=code / (n_blocks * n_packs),
        reply_bytes=len(pickle.dumps(replies[-1])) if replies else 0,
        leases_lost=sum("its lease ends" in event.get("message", "") for event in (await stream.collect())["mail"]),
    )


def bottlenecks(setting: Setting, warm_up: int, measured: int, enough: float) -> list[tuple[str, Outcome]]:
    """What holds a setting up, most first: ("as it is", its outcome), and then every limit that had to be lifted, in
    this order, until the rate was `enough` blocks a second, with the outcome without it and those before. Lifted next
    is always the limit without which the rate is greatest. The actor is none while it is idle most of the time."""
    found = [("as it is", simulate(setting, warm_up, measured))]
    while found[-1][1].rate < enough and len(setting.freed) < len(LIMITS):
        idle = {CALLS, CODE} if found[-1][1].actor_busy < NEAR else set()
        without = {
            limit: simulate(replace(setting, freed=setting.freed | {limit}), warm_up, measured)
            for limit in LIMITS if limit not in setting.freed | idle
        }  # fmt: skip
        limit = max(without, key=lambda one: without[one].rate)
        setting = replace(setting, freed=setting.freed | {limit})
        found.append((limit, without[limit]))
    return found
