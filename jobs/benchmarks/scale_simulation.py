"""The stream's own code, driven by simulated hosts and packs on simulated time.

`Stream` and `StreamState` run as they are, in an event loop whose clock stands still but for three things: the CPU time
that their code takes here, what every call costs the actor beyond that (`call_seconds`), and sleep, which passes at
once. So the loop is the actor's one thread: while it is busy, everybody waits.
"""

import asyncio
import pickle
import selectors
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.meters import Meters
from penstock.stream import BlockInfo, Stream
from penstock.stream_state import StreamState

ARRAY = "blocks.12.hook_resid_post"
REPORT_SECONDS, COLLECT_SECONDS, METERS_SECONDS = 1.0, 0.5, 1.0
# What a run may be freed of, to see what it was held up by.
LIMITS = ("the hosts' network", "calls of the stream's actor", "the code of the stream", "the window")
NETWORK, CALLS, CODE, WINDOW = LIMITS


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
    network, were busy; `code_seconds`: CPU seconds of the stream's code a hand-out; `reply_bytes` of the driver's
    question how things stand."""

    rate: float
    actor_busy: float
    network_busy: float
    code_seconds: float
    reply_bytes: int


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


class _Network:
    """What hosts send, one copy after the other; a copy a node."""

    def __init__(self, setting: Setting) -> None:
        self._seconds = 0.0 if NETWORK in setting.freed else setting.block_bytes / setting.nic_bytes
        self._free_at = [0.0] * setting.nodes
        self._there_at: dict[tuple[int, int], float] = {}
        self.busy = [0.0] * setting.nodes

    def there_at(self, host: int, block: int, node: int, asked_at: float) -> float:
        """When a block that a node asks for has come from its host's."""
        if host == node:
            return asked_at
        if (block, node) not in self._there_at:
            self._free_at[host] = max(self._free_at[host], asked_at) + self._seconds
            self._there_at[block, node] = self._free_at[host]
            self.busy[host] += self._seconds
        return max(asked_at, self._there_at[block, node])


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
        return loop.run_until_complete(_run(loop, setting, warm_up, measured))
    finally:
        asyncio.set_event_loop(None)
        loop.close()


async def _run(loop: _Loop, setting: Setting, warm_up: int, measured: int) -> Outcome:
    n_blocks, n_packs = warm_up + measured, setting.nodes * setting.packs_per_node
    call = 0.0 if CALLS in setting.freed else setting.call_seconds
    state = StreamState(n_blocks, n_blocks + 2 if WINDOW in setting.freed else setting.window)
    packs = {f"pack-{index:05}": (ARRAY,) for index in range(n_packs)}
    state.expect(packs, 0, {})
    state.open_cohort(0, loop.time())
    stream, network = Stream(state, clock=loop.time), _Network(setting)
    meters = Meters("simulated")
    ends = [0.0] * n_blocks
    calls: set[asyncio.Task[Any]] = set()

    def tell(question: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        """A call of the actor, which takes its turn; the caller goes on."""

        async def answered() -> tuple[float, Any]:
            loop.charge(call)
            found = await question
            return loop.time(), found

        calls.add(task := asyncio.ensure_future(answered()))
        task.add_done_callback(calls.discard)
        return task

    async def pack(pack_id: str, node: int) -> None:
        # A pack is a process of its own: `now` is its time, which the loop, while the actor is busy, is behind.
        now, _ = await tell(stream.attach(pack_id, (ARRAY,), 0, 0))
        ahead, said = tell(stream.next_block(pack_id, 0, 0)), now
        for block in range(n_blocks):
            while (answer := await ahead)[1] is None:
                ahead = tell(stream.next_block(pack_id, block, 0))
            asked_at = answer[0] if setting.prefetch else max(now, answer[0])
            now = max(now, network.there_at(answer[1][ARRAY], block, node, asked_at))
            await asyncio.sleep(now - loop.time())
            if block + 1 < n_blocks:
                ahead = tell(stream.next_block(pack_id, block + 1, 0))
            done = now + setting.step_seconds
            while now < done:
                report_at = max(now, said + REPORT_SECONDS)
                now = min(done, report_at)
                await asyncio.sleep(now - loop.time())
                if now == report_at:
                    said = now
                    tell(stream.report(pack_id, [], {"wait_seconds": 0.0, "spool_reads": 0}, 0.0, 0))
            ends[block] = max(ends[block], now)
            tell(stream.acknowledge(pack_id, block, 0))

    async def ask(seconds: float, question: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(seconds)
            question()

    def collect() -> None:
        loop.charge(call)
        replies.append(stream.status())

    replies: list[Any] = []
    others = [
        asyncio.ensure_future(stream.pump()),
        asyncio.ensure_future(ask(COLLECT_SECONDS, collect)),
        asyncio.ensure_future(ask(METERS_SECONDS, lambda: meters.update(stream))),
    ]
    hosts = {f"host-{index}": _Host(index, loop, setting, call) for index in range(setting.nodes)}
    await stream.set_hosts(hosts)
    begun = loop.time()
    await asyncio.gather(*(pack(pack_id, index // setting.packs_per_node) for index, pack_id in enumerate(packs)))
    passed = loop.time() - begun
    code = loop.code_seconds
    unfinished = {*others, *calls}
    while unfinished:  # of those that wait with a timeout, one whose turn has just come takes no notice
        for task in unfinished:
            task.cancel()
        _, unfinished = await asyncio.wait(unfinished, timeout=0.0)
    return Outcome(
        rate=measured / (ends[-1] - ends[warm_up - 1]),
        actor_busy=(loop.charged + (0.0 if CODE in setting.freed else code)) / passed,
        network_busy=max(network.busy) / passed,
        code_seconds=code / (n_blocks * n_packs),
        reply_bytes=len(pickle.dumps(replies[-1])) if replies else 0,
    )


def bottlenecks(setting: Setting, warm_up: int, measured: int, enough: float) -> list[tuple[str, Outcome]]:
    """What holds a setting up, most first: ("as it is", its outcome), and then every limit that had to be lifted, in
    this order, until the rate was `enough` blocks a second, with the outcome without it and those before. Lifted next
    is always the limit without which the rate is greatest."""
    found = [("as it is", simulate(setting, warm_up, measured))]
    while found[-1][1].rate < enough and len(setting.freed) < len(LIMITS):
        without = {
            limit: simulate(replace(setting, freed=setting.freed | {limit}), warm_up, measured)
            for limit in LIMITS if limit not in setting.freed
        }  # fmt: skip
        limit = max(without, key=lambda one: without[one].rate)
        setting = replace(setting, freed=setting.freed | {limit})
        found.append((limit, without[limit]))
    return found
