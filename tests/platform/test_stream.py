"""The stream in one event loop, with hosts that die, hang, cannot be built, come and go."""

import asyncio
import contextlib
import time

import pytest

from penstock import stream as stream_module
from penstock.stream import BlockInfo, HostGoneError, Stream
from penstock.stream_state import IN_SPOOL, BlockSet, HaltedError, LeaseLostError, StreamState, SupersededError
from penstock.text import last_line

A, B = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"


class Host:
    """A host that makes blocks at once."""

    def __init__(self):
        self.made, self.kills, self.up = [], 0, 0

    async def harvest(self, block, arrays):
        await asyncio.sleep(0)
        self.made.append(block)
        return {name: (name, block) for name in arrays}, BlockInfo(tokens=10, forward_passes=2, seconds=0.1)

    async def wait_until_up(self):
        await asyncio.sleep(0)
        self.up += 1

    def kill(self):
        self.kills += 1


class FlakyHost(Host):
    """A host that dies over every block once."""

    def __init__(self):
        super().__init__()
        self.failed = set()

    async def harvest(self, block, arrays):
        if block not in self.failed:
            self.failed.add(block)
            raise ConnectionError("the host died")
        return await super().harvest(block, arrays)


class HostThatCannotBeBuilt(Host):
    async def harvest(self, block, arrays):
        raise ConnectionError("died in its creation task")

    async def wait_until_up(self):
        raise HostGoneError("Traceback ...\nModelError: model.name './tiny' is not a complete model")


class SlowHost(Host):
    """A host that makes a block when it is let."""

    def __init__(self):
        super().__init__()
        self.let = asyncio.Event()

    async def harvest(self, block, arrays):
        await self.let.wait()
        return await super().harvest(block, arrays)


class SpoolingHost(Host):
    """A host that puts blocks into a spool, which has room for three; block 0 lies there already."""

    async def harvest(self, block, arrays):
        if block == 0:
            return dict.fromkeys(arrays), BlockInfo(0, 0, 0.0, from_spool=True)
        made, _ = await super().harvest(block, arrays)
        room = block < 3
        return made, BlockInfo(10, 2, 0.1, tuple(arrays) if room else (), notice=None if room else "the spool is full")


@contextlib.asynccontextmanager
async def running(packs, hosts, n_blocks=4, window=2, **options):
    """A stream that runs, with the hosts by name."""
    state = StreamState(n_blocks, window, **options)
    state.expect({pack: list(arrays) for pack, arrays in packs.items()}, 0, {})
    state.open_cohort(0, time.monotonic())
    stream = Stream(state)
    pump = asyncio.ensure_future(stream.pump())
    await stream.set_hosts(hosts)
    try:
        yield stream
        assert not pump.done()
    finally:
        pump.cancel()


async def consume(stream, pack, arrays, n_blocks=4, first=0, run=0):
    """Read to the end, as a pack does; what came, block by block."""
    seen = []
    await stream.attach(pack, arrays, first, run)
    for block in range(first, n_blocks):
        while (objects := await stream.next_block(pack, block, run)) is None:
            pass
        seen.append(objects)
        await stream.acknowledge(pack, block, run)
    await stream.report(pack, [{"kind": "finished", "pack": pack}], {}, 0.0, run)
    await stream.detach(pack, run)
    return seen


def blocks(arrays, n_blocks=4):
    return [{name: (name, block) for name in arrays} for block in range(n_blocks)]


def logs(found):
    return [event["message"] for event in found["mail"] if event["kind"] == "log"]


async def until(condition):
    """Wait until something holds."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), timeout=20))


# ---- dying hosts ----------------------------------------------------------------------------------------------------


def test_every_pack_reads_every_block_once_in_order_over_dying_hosts():
    async def scenario():
        hosts = {"one": FlakyHost(), "two": FlakyHost()}
        async with running({"a": [A], "b": [A, B]}, hosts, 12) as stream:
            seen = await asyncio.gather(consume(stream, "a", [A], 12), consume(stream, "b", [A, B], 12))
            return seen, hosts, stream.state, await stream.collect()

    seen, hosts, state, found = run(scenario)
    assert seen == [blocks([A], 12), blocks([A, B], 12)]
    assert found["fatal"] is None and not state.ready
    assert found["cost"]["blocks_made"] == 12  # one forward pass a block, whoever reads it
    assert found["cost"]["blocks_remade"] == 0
    assert sorted(hosts["one"].made + hosts["two"].made) == list(range(12))
    assert {event["pack"] for event in found["mail"] if event["kind"] == "finished"} == {"a", "b"}
    assert any("lost block" in message and "the host died" in message for message in logs(found))


def test_a_block_that_kills_every_host_ends_the_sweep_by_its_name():
    class Poisoned(Host):
        async def harvest(self, block, arrays):
            if block == 2:
                raise ValueError("nan in the weights")
            return await super().harvest(block, arrays)

    async def scenario():
        async with running({"a": [A]}, {"one": Poisoned(), "two": Poisoned()}) as stream:
            with pytest.raises(RuntimeError, match="block 2 has failed 3 times and is given up; last: nan in the weig"):
                await consume(stream, "a", [A])
            assert stream.state.members["a"].cursor == 2
            assert "block 2 has failed" in (await stream.collect())["fatal"]

    run(scenario)


def test_hosts_that_have_died_while_idle_are_not_held_against_the_next_block(monkeypatch):
    class GoneWithItsNode(Host):
        gone = False

        async def harvest(self, block, arrays):
            if self.gone:
                raise ConnectionError("the actor is dead")
            return await super().harvest(block, arrays)

        async def wait_until_up(self):
            await super().wait_until_up()
            if self.gone:
                await asyncio.Event().wait()

    monkeypatch.setattr(stream_module, "ANSWER_SECONDS", 0.02)

    async def scenario():
        hosts = {f"host-{index}": GoneWithItsNode() for index in range(8)}
        async with running({"a": [A]}, hosts, 6) as stream:
            await until(lambda: len(stream.state.ready) == 2 and len(stream.state.idle_hosts) == 8)
            for name in list(stream.state.idle_hosts)[:7]:
                hosts[name].gone = True
            return await consume(stream, "a", [A], 6)

    assert run(scenario) == blocks([A], 6)


# ---- hosts that cannot be built -------------------------------------------------------------------------------------


def test_a_sweep_whose_hosts_cannot_be_built_ends_with_the_reason():
    async def scenario():
        hosts = {"one": HostThatCannotBeBuilt(), "two": HostThatCannotBeBuilt()}
        async with running({"a": [A]}, hosts) as stream:
            await stream.attach("a", [A], 0, 0)
            with pytest.raises(RuntimeError, match="no model host is left: ModelError: model.name './tiny'"):
                await stream.next_block("a", 0, 0)
            assert all("ModelError" in state for state in stream.status()["hosts"].values())

    run(scenario)


def test_one_host_that_cannot_be_built_is_done_without():
    async def scenario():
        async with running({"a": [A]}, {"bad": HostThatCannotBeBuilt(), "good": Host()}) as stream:
            assert await consume(stream, "a", [A]) == blocks([A])
            found = await stream.collect()
            assert found["fatal"] is None
            assert found["status"]["hosts"] == {
                "bad": "ModelError: model.name './tiny' is not a complete model", "good": "idle"
            }  # fmt: skip
            assert sum("host bad is gone" in message for message in logs(found)) == 1

    run(scenario)


def test_a_sweep_ends_when_only_hosts_that_could_not_be_built_are_to_stay():
    async def scenario():
        bad = HostThatCannotBeBuilt()
        async with running({"a": [A]}, {"bad": bad, "good": Host()}) as stream:
            await until(lambda: stream.broken)
            await stream.set_hosts({"bad": bad})
            with pytest.raises(RuntimeError, match="no model host is left"):
                await consume(stream, "a", [A])

    run(scenario)


# ---- hosts that hang ------------------------------------------------------------------------------------------------


def test_a_host_that_hangs_is_killed_and_its_block_made_elsewhere(monkeypatch):
    monkeypatch.setattr(stream_module, "HARVEST_SECONDS", 0.05)
    monkeypatch.setattr(stream_module, "HARVEST_MEDIANS", 0.0)

    async def scenario():
        hanging, good = SlowHost(), Host()
        async with running({"a": [A]}, {"hanging": hanging}) as stream:
            await until(lambda: stream.state.pending)
            await stream.set_hosts({"hanging": hanging, "good": good})
            assert await consume(stream, "a", [A]) == blocks([A])
            assert hanging.kills >= 1 and 0 in good.made
            assert any("hanging lost block 0 (TimeoutError: no answer for 0 s)" in message
                       for message in logs(await stream.collect()))  # fmt: skip

    run(scenario)


def test_patience_grows_with_what_blocks_take(monkeypatch):
    monkeypatch.setattr(stream_module, "HARVEST_SECONDS", 0.001)
    monkeypatch.setattr(stream_module, "HARVEST_MEDIANS", 20.0)

    class Sleepy(Host):
        async def harvest(self, block, arrays):
            if self.made:  # the first one is quick, and says that it took 0.1 s: two seconds are no fault
                await asyncio.sleep(0.02)
            return await super().harvest(block, arrays)

    async def scenario():
        host = Sleepy()
        async with running({"a": [A]}, {"host": host}) as stream:
            assert await consume(stream, "a", [A]) == blocks([A])
            assert host.kills == 0

    run(scenario)


def test_a_host_in_which_something_times_out_has_answered_and_is_not_killed():
    class ItsStorageIsAway(FlakyHost):
        async def harvest(self, block, arrays):
            if block not in self.failed:
                self.failed.add(block)
                raise TimeoutError("the storage did not answer")
            return await super().harvest(block, arrays)

    async def scenario():
        host = ItsStorageIsAway()
        async with running({"a": [A]}, {"host": host}) as stream:
            assert await consume(stream, "a", [A]) == blocks([A])
            assert host.kills == 0
            assert any("the storage did not answer" in message for message in logs(await stream.collect()))

    run(scenario)


# ---- hosts that come and go -----------------------------------------------------------------------------------------


def test_hosts_join_and_leave_while_blocks_are_made():
    async def scenario():
        slow, idle, late = SlowHost(), Host(), Host()
        async with running({"a": [A]}, {"slow": slow}, n_blocks=6) as stream:
            await until(lambda: stream.state.pending)
            await stream.set_hosts({"slow": slow, "idle": idle})
            await until(lambda: idle.made and "idle" in stream.state.idle_hosts)
            assert stream.status()["hosts"] == {"slow": "block 0", "idle": "idle"}
            assert await stream.set_hosts({"late": late}) == ["slow"]  # it is at a block
            assert await stream.set_hosts({"late": late}) == ["slow"]
            slow.let.set()
            await until(lambda: not stream.state.pending)
            assert await stream.set_hosts({"late": late}) == []
            assert await consume(stream, "a", [A], 6) == blocks([A], 6)
            assert slow.made == [0] and idle.made == [1] and late.made == [2, 3, 4, 5]
            assert list(stream.hosts) == ["late"] and late.up == 1

    run(scenario)


def test_a_host_that_leaves_before_it_is_up_is_given_nothing():
    class Loading(Host):
        async def wait_until_up(self):
            await self.loaded.wait()

    async def scenario():
        loading, good = Loading(), Host()
        loading.loaded = asyncio.Event()
        async with running({"a": [A]}, {"loading": loading}) as stream:
            assert await stream.set_hosts({"good": good}) == []
            loading.loaded.set()
            assert await consume(stream, "a", [A]) == blocks([A])
            assert not loading.made

    run(scenario)


def test_a_leaving_host_that_dies_is_not_brought_back():
    async def scenario():
        host, good = FlakyHost(), Host()
        slow = SlowHost()
        host.harvest_once = host.harvest

        async def harvest(block, arrays):
            await slow.let.wait()
            return await host.harvest_once(block, arrays)

        host.harvest = harvest
        async with running({"a": [A]}, {"host": host}) as stream:
            await until(lambda: stream.state.pending)
            assert await stream.set_hosts({"good": good}) == ["host"]
            slow.let.set()
            assert await consume(stream, "a", [A]) == blocks([A])
            assert await stream.set_hosts({"good": good}) == []
            assert host.up == 1

    run(scenario)


# ---- spool, losses --------------------------------------------------------------------------------------------------


def test_blocks_are_made_into_the_spool_and_found_there_and_a_notice_is_given_once():
    async def scenario():
        async with running({"a": [A]}, {"host": SpoolingHost()}, n_blocks=6) as stream:
            seen = await consume(stream, "a", [A], 6)
            again = [await consume(stream, "late", [A], 3), await stream.collect()]
            return seen, again

    seen, (again, found) = run(scenario)
    assert seen == [{A: IN_SPOOL}, *blocks([A], 6)[1:]]
    assert again == [{A: IN_SPOOL}] * 3
    assert {name: found["cost"][name] for name in ("blocks_made", "spool_hits", "blocks_spooled", "blocks_remade")} == {
        "blocks_made": 5, "spool_hits": 1, "blocks_spooled": 2, "blocks_remade": 0
    }  # fmt: skip
    assert found["cost"]["harvested_tokens"] == 50 and found["cost"]["forward_passes"] == 10
    assert logs(found).count("the spool is full") == 1


def test_a_stream_that_lies_in_the_spool_needs_no_host():
    async def scenario():
        async with running({"a": [A]}, {}, spooled={A: BlockSet(4, range(4))}) as stream:
            assert await consume(stream, "a", [A]) == [{A: IN_SPOOL}] * 4

    run(scenario)


def test_a_block_that_a_pack_cannot_read_is_made_again():
    async def scenario():
        host = Host()
        async with running({"a": [A]}, {"host": host}) as stream:
            await stream.attach("a", [A], 0, 0)
            assert await stream.next_block("a", 0, 0) == blocks([A])[0]
            await stream.forget("a", 0, [A], "ObjectLostError")
            assert await consume(stream, "a", [A]) == blocks([A])
            found = await stream.collect()
            assert host.made.count(0) == 2
            assert found["cost"]["blocks_lost"] == found["cost"]["blocks_remade"] == 1
            assert "block 0 is lost (ObjectLostError); it is made again" in logs(found)

    run(scenario)


def test_waiting_for_a_block_is_no_fault_however_short_the_lease():
    async def scenario():
        host = SlowHost()
        async with running({"a": [A]}, {"host": host}, lease_seconds=0.2) as stream:
            reading = asyncio.ensure_future(consume(stream, "a", [A]))
            await asyncio.sleep(1.5)  # the pump looks for ended leases once a second
            host.let.set()
            assert await reading == blocks([A])
            assert logs(await stream.collect()) == []

    run(scenario)


# ---- packs ----------------------------------------------------------------------------------------------------------


def test_a_block_that_is_not_there_in_time_is_no_error():
    async def scenario():
        async with running({"a": [A]}, {}) as stream:
            await stream.attach("a", [A], 0, 0)
            begun = time.monotonic()
            assert await stream.next_block("a", 0, 0, timeout=0.05) is None
            assert time.monotonic() - begun < 2.0

    run(scenario)


def test_a_pack_that_hangs_holds_nobody_up_for_longer_than_its_lease():
    async def scenario():
        async with running({"a": [A], "hung": [A]}, {"host": Host()}, lease_seconds=0.3) as stream:
            await stream.attach("hung", [A], 0, 0)
            assert await consume(stream, "a", [A]) == blocks([A])
            assert any("pack hung: no step for too long" in message for message in logs(await stream.collect()))
            with pytest.raises(LeaseLostError):
                await stream.next_block("hung", 0, 0)
            assert await consume(stream, "hung", [A]) == blocks([A])

    run(scenario)


def test_a_newer_run_sends_the_older_one_away_while_it_waits():
    async def scenario():
        async with running({"a": [A]}, {}) as stream:
            await stream.attach("a", [A], 0, 1)
            waiting = asyncio.ensure_future(stream.next_block("a", 0, 1))
            await asyncio.sleep(0.01)
            await stream.attach("a", [A], 0, 2)
            with pytest.raises(SupersededError):
                await waiting
            await stream.set_hosts({"host": Host()})
            assert await consume(stream, "a", [A], run=2) == blocks([A])

    run(scenario)


def test_what_an_older_run_reports_does_not_count():
    async def scenario():
        async with running({"a": [A]}, {}) as stream:
            await stream.attach("a", [A], 0, 2)
            await stream.report("a", [], {"step": 7.0}, 0.0, 2)
            with pytest.raises(SupersededError):
                await stream.report("a", [{"kind": "fatal", "reason": "fenced"}], {"step": 3.0}, 0.0, 1)
            found = await stream.collect()
            assert found["mail"] == [] and found["status"]["packs"]["a"]["step"] == 7.0

    run(scenario)


def test_what_a_pack_reports_after_its_lease_or_to_a_new_stream_counts():
    async def scenario():
        async with running({}, {}) as stream:
            await stream.report("a", [{"kind": "metrics"}], {}, 0.0, 1)
            assert (await stream.collect())["mail"] == [{"kind": "metrics"}]

    run(scenario)


def test_what_packs_say_is_collected_once_and_the_status_says_how_things_stand():
    async def scenario():
        async with running({"a": [A], "b": [A, B]}, {"host": Host()}) as stream:
            await stream.attach("a", [A], 0, 1)
            assert await stream.next_block("a", 0, 1) is not None
            await stream.acknowledge("a", 0, 1)
            await until(lambda: not stream.state.pending and len(stream.state.ready) == 4)
            await stream.report("a", [{"kind": "metrics"}], {"step": 5.0}, 0.0, 1)
            found = await stream.collect()
            assert found["mail"] == [{"kind": "metrics"}] and found["fatal"] is None
            status = found["status"]
            assert {name: status[name] for name in ("blocks", "window", "blocks_in_store", "arrays_in_store")} == {
                "blocks": 4, "window": 2, "blocks_in_store": 2, "arrays_in_store": 4
            }  # fmt: skip
            assert status["hosts"] == {"host": "idle"}
            a, b = status["packs"]["a"], status["packs"]["b"]
            assert 0.0 <= a.pop("silent_seconds") < 10.0
            assert a == {"status": "live", "block": 1, "lag": 0, "step": 5.0}
            assert b == {"status": "expected", "block": 0, "lag": 1, "silent_seconds": 0.0}
            assert (await stream.collect())["mail"] == []
            await stream.detach("a", 1)
            done = stream.status()["packs"]["a"]
            assert done["status"] == "done" and done["step"] == 5.0

    run(scenario)


def test_the_last_line_of_an_error_is_what_it_says():
    assert last_line(ValueError("Traceback\n  in f\nValueError: so it is\n")) == "ValueError: so it is"
    assert last_line(ConnectionError()) == "ConnectionError"


def test_a_pack_hears_with_every_report_what_has_been_decided_and_so_does_one_that_is_late():
    async def scenario():
        async with running({"p": [A]}, {"host": Host()}) as stream:
            await stream.attach("p", [A], 0, 0)
            assert await stream.report("p", [], {}, 0.0, 0) == {"stops": {}, "halt": None}
            stream.stops |= {"sae": "another one beats it"}
            stream.stops |= {"later": "dead"}
            told = {"sae": "another one beats it", "later": "dead"}
            assert await stream.report("p", [], {}, 0.0, 0) == {"stops": told, "halt": None}
            assert (await stream.report("unknown", [], {}, 0.0, 0))["stops"] == told

    asyncio.run(scenario())


def test_a_pack_that_is_told_to_end_hears_of_it_with_its_report_and_while_it_waits_for_a_block():
    async def scenario():
        async with running({"p": [A], "q": [A]}, {}) as stream:  # no host: no block ever comes
            for pack in "pq":
                await stream.attach(pack, [A], 0, 7)
            waiting = asyncio.ensure_future(stream.next_block("p", 0, 7))
            await asyncio.sleep(0)
            await stream.halt(["p", "unknown"], "yield")
            with pytest.raises(HaltedError, match="yield"):
                await waiting
            assert (await stream.report("p", [], {}, 0.0, 7))["halt"] == "yield"
            assert (await stream.report("q", [], {}, 0.0, 7))["halt"] is None
            assert stream.halted("p", 8) is None  # started again: it goes on
            await stream.halt(None, "stop")
            assert {stream.halted(pack, 8) for pack in ("p", "q", "half-a-pack")} == {"stop"}

    run(scenario)
