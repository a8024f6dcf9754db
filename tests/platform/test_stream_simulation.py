"""A large run in simulated time: 1,000 hosts, 200 packs, and everything that goes wrong, many times."""

import heapq
import random

import pytest

from penstock.stream_state import IN_SPOOL, BlockSet, LeaseLostError, StreamState

N_BLOCKS, WINDOW, N_HOSTS = 200, 8, 1000
ARRAYS = [f"blocks.{layer}.hook_resid_post" for layer in range(8)]
PACKS = {f"pack-{index:03}": (ARRAYS[index % 8],) for index in range(200)}
STEP_SECONDS, HARVEST_SECONDS = (4.0, 6.0), (5.0, 20.0)
CHECKPOINT_BLOCKS = 25
HANG_SECONDS = (200.0, 600.0)


class Simulation:
    """A heap of (time, what happens). Packs read as the client does, hosts work as the stream has them work."""

    def __init__(self, seed, spool):
        self.random, self.spool = random.Random(seed), spool
        self.now, self.events, self.counter = 0.0, [], 0
        self.files: set[tuple[int, str]] = set()
        self.makings: dict[tuple[int, str], int] = {}  # how often each was made ...
        self.removed: dict[tuple[int, str], int] = {}  # ... and its file removed
        self.happened = dict.fromkeys(("hosts", "packs", "hangs", "streams", "objects", "files", "expired"), 0)
        self.run = dict.fromkeys(PACKS, 0)
        self.next = dict.fromkeys(PACKS, 0)  # the block that the pack needs next
        self.seen = {pack: [[]] for pack in PACKS}  # by run
        self.lost: set[tuple] = set()  # objects
        self.waiting: set[str] = set()
        self.to_hang: set[str] = set()
        self.left = set(PACKS)
        self.hosts = [f"host-{index}" for index in range(N_HOSTS)]
        self.stream = 0
        self.new_stream()
        self.state.expect(PACKS, 0, {})
        self.state.open_cohort(0, 0.0)
        for pack in PACKS:
            self.later(self.random.uniform(0.0, 60.0), self.attach, pack, 0)
        self.later(30.0, self.misfortune)
        self.later(1.0, self.tick)

    def later(self, seconds, what, *args):
        self.counter += 1
        heapq.heappush(self.events, (self.now + seconds, self.counter, what, args))

    def new_stream(self):
        self.stream += 1
        spooled = {name: BlockSet(N_BLOCKS) for name in ARRAYS}
        for block, name in self.files:
            spooled[name].add(block)
        self.state = StreamState(N_BLOCKS, WINDOW, spooled=spooled)
        for host in self.hosts:
            self.state.host_up(host)

    def go(self):
        while self.left:
            self.now, _, what, args = heapq.heappop(self.events)
            assert self.now < 40_000, (len(self.left), self.happened)
            what(*args)
            assert self.state.fatal is None

    # -- the stream --

    def tick(self):
        """Once a second: leases, and packs that have waited for long ask again."""
        self.happened["expired"] += len(self.state.expire(self.now))
        self.changed()
        for pack in sorted(self.waiting):
            self.ask(pack, self.run[pack])
        self.later(1.0, self.tick)

    def changed(self):
        """Hosts are given what there is to do; nothing stands beyond the window."""
        begun = False
        while (work := self.state.next_work()) is not None:
            self.later(self.random.uniform(*HARVEST_SECONDS), self.ready, work, self.stream)
            begun = True
        if begun:
            active = [m for m in self.state.members.values() if m.status in ("live", "expected")]
            bound = max(WINDOW, len({m.cohort for m in active if m.cursor < N_BLOCKS}))
            assert len({block for block, _ in self.state.ready}) <= bound

    def ready(self, work, stream):
        if stream != self.stream:
            return  # nobody waits for it any more
        if self.random.random() < 0.03:
            self.happened["hosts"] += 1
            self.state.failed(work, "died")
            self.later(self.random.uniform(30.0, 90.0), self.host_back, work.host, stream)
        else:
            keys = [(work.block, name) for name in work.arrays]
            for key in keys:
                self.makings[key] = self.makings.get(key, 0) + 1
            objects = {key[1]: (*key, self.stream, self.makings[key]) for key in keys}
            if self.spool:
                self.files.update(keys)
            self.state.produced(work, objects, work.arrays if self.spool else ())
            for pack in sorted(self.waiting):
                if self.next[pack] == work.block:
                    self.ask(pack, self.run[pack])
        self.changed()

    def host_back(self, host, stream):
        if stream == self.stream:
            self.state.host_up(host)
            self.changed()

    # -- packs --

    def attach(self, pack, run):
        if run == self.run[pack]:
            self.state.attach(pack, PACKS[pack], self.next[pack], self.now, run)
            self.changed()
            self.ask(pack, run)

    def ask(self, pack, run):
        """The pack needs its next block; with it, it makes its steps."""
        if run != self.run[pack]:
            return
        block, (name,) = self.next[pack], PACKS[pack]
        self.waiting.add(pack)
        try:
            found = self.state.take(pack, block, self.now, run)
        except LeaseLostError:
            self.attach(pack, run)
            return
        if found is None:
            return
        if found[name] in self.lost or (found[name] == IN_SPOOL and (block, name) not in self.files):
            self.happened["objects"] += found[name] in self.lost
            self.state.forget(pack, block, [name])
            self.changed()
            return
        assert found.keys() == {name} and (found[name] == IN_SPOOL or found[name][:2] == (block, name))
        self.waiting.discard(pack)
        self.seen[pack][-1].append(block)
        seconds = self.random.uniform(*STEP_SECONDS)
        if pack in self.to_hang:
            self.to_hang.remove(pack)
            seconds += self.random.uniform(*HANG_SECONDS)
        self.later(seconds, self.used_up, pack, block, run)

    def used_up(self, pack, block, run):
        if run != self.run[pack]:
            return
        self.next[pack] = block + 1
        try:
            self.state.acknowledge(pack, block, self.now, run)
        except LeaseLostError:
            pass  # it will hear of it again when it asks for its next block
        if block + 1 < N_BLOCKS:
            self.changed()
            self.ask(pack, run)
        else:
            self.state.detach(pack, run)
            self.left.discard(pack)
            self.changed()

    def start_again(self, pack, seconds):
        """From its last checkpoint, after so many seconds; what its worker had under way is no more."""
        self.run[pack] += 1
        self.waiting.discard(pack)
        self.next[pack] -= self.next[pack] % CHECKPOINT_BLOCKS
        self.seen[pack].append([])
        self.later(seconds, self.attach, pack, self.run[pack])

    # -- misfortune --

    def misfortune(self):
        kind = self.random.choice(["packs", "hangs", "objects", "objects", "files", "streams"])
        pack = self.random.choice(sorted(self.left))
        if kind == "packs":
            self.start_again(pack, self.random.uniform(5.0, 40.0))
        elif kind == "hangs":
            if self.random.random() < 0.5:
                self.start_again(pack, self.random.uniform(*HANG_SECONDS))
            else:
                self.to_hang.add(pack)
        elif kind == "objects" and self.state.ready:
            key = self.random.choice(sorted(self.state.ready))
            self.lost.add(self.state.ready[key][1])
        elif kind == "files" and self.files:
            for key in self.random.sample(sorted(self.files), 20):
                self.files.discard(key)
                self.removed[key] = self.removed.get(key, 0) + 1
        elif kind == "streams" and self.happened["streams"] < 3:
            self.new_stream()
        else:
            kind = None
        if kind and kind != "objects":
            self.happened[kind] += 1
        self.changed()
        self.later(self.random.uniform(20.0, 60.0), self.misfortune)


@pytest.mark.parametrize("spool", [False, True], ids=["without a spool", "with a spool"])
def test_every_pack_reads_every_block_once_in_order_whatever_happens(spool):
    simulation = Simulation(seed=7, spool=spool)
    simulation.go()
    for pack, runs in simulation.seen.items():
        for number, blocks in enumerate(runs):
            first = blocks[0] if blocks else 0
            assert blocks == list(range(first, first + len(blocks)))
            assert first % CHECKPOINT_BLOCKS == 0 and (number > 0 or first == 0)
        assert runs[-1][-1] == N_BLOCKS - 1, pack
    assert all(times for kind, times in simulation.happened.items() if spool or kind != "files"), simulation.happened
    assert simulation.makings.keys() == {(block, name) for block in range(N_BLOCKS) for name in ARRAYS}
    if spool:
        for key, times in simulation.makings.items():
            assert times <= 1 + simulation.removed.get(key, 0), key
