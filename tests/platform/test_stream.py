import asyncio

import pytest

from penstock.stream import BARRIER_SECONDS, BlockInfo, HostGoneError, LeaseLostError, Stream, StreamState

A, B = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"


def make(work):
    """What a host returns for a piece of work."""
    return {name: f"{name}@{work.block}" for name in work.hook_points}


def produce_all(state):
    """Let hosts work until there is nothing to do; the blocks made, in order."""
    made = []
    while (work := state.next_work()) is not None:
        state.produced(work, make(work))
        made.append((work.block, work.hook_points))
    return made


def two_packs(window=3, n_blocks=8):
    state = StreamState(n_blocks, window, n_hosts=1)
    state.expect({"a": [A], "b": [B]}, cohort=0, cursors={})
    state.open_cohort(0, now=0.0)
    return state


def test_one_forward_pass_makes_a_block_for_every_hook_point():
    assert produce_all(two_packs()) == [(0, (A, B)), (1, (A, B)), (2, (A, B))]


def test_blocks_are_made_before_anybody_has_attached():
    state = two_packs()
    assert state.next_work().block == 0


def test_nobody_runs_further_ahead_than_the_window():
    state = two_packs(window=2)
    state.attach("a", 0, 0.0)
    state.attach("b", 0, 0.0)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 1, 1.0)
    assert produce_all(state) == []
    assert state.take("a", 2, 1.0) is None
    state.acknowledge("b", 0, 2.0)
    assert produce_all(state) == [(2, (A, B))]
    assert state.take("a", 2, 2.0) == {A: f"{A}@2"}


def test_a_block_is_dropped_when_its_last_reader_is_through():
    state = two_packs()
    state.expect({"a2": [A]}, cohort=0, cursors={})
    for pack in ("a", "a2", "b"):
        state.attach(pack, 0, 0.0)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    assert (0, A) in state.ready
    state.acknowledge("a2", 0, 1.0)
    assert (0, A) not in state.ready
    assert (0, B) in state.ready


def test_taking_and_acknowledging_again_changes_nothing():
    state = two_packs()
    state.attach("a", 0, 0.0)
    produce_all(state)
    assert state.take("a", 0, 1.0) == state.take("a", 0, 1.0) == {A: f"{A}@0"}
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 0, 1.0)
    assert state.members["a"].cursor == 1


def test_a_pack_that_restarts_gets_its_blocks_made_again():
    state = two_packs(window=3)
    state.attach("a", 0, 0.0)
    state.attach("b", 0, 0.0)
    for block in range(3):
        produce_all(state)
        state.acknowledge("a", block, 1.0)
        state.acknowledge("b", block, 1.0)
    produce_all(state)
    state.attach("a", 1, 2.0)  # its checkpoint stands at block 1
    made = produce_all(state)
    assert (1, (A,)) in made and (2, (A,)) in made
    assert not any(B in names for block, names in made if block < 3)  # the other pack has had these
    assert state.take("a", 1, 3.0) == {A: f"{A}@1"}


def test_a_later_wave_is_not_harvested_for_before_it_starts_and_holds_nobody_up():
    state = StreamState(6, 2, 1)
    state.expect({"early": [A]}, cohort=0, cursors={})
    state.expect({"late": [B]}, cohort=1, cursors={})
    state.open_cohort(0, 0.0)
    state.attach("early", 0, 0.0)
    assert {name for _, names in produce_all(state) for name in names} == {A}
    for block in range(3):
        produce_all(state)
        state.acknowledge("early", block, 1.0)
    state.attach("late", 0, 2.0)
    assert (0, (B,)) in produce_all(state)
    assert state.take("early", 3, 2.0) is not None


def test_the_wait_for_a_pack_that_never_comes_ends():
    state = two_packs(window=2)
    state.attach("a", 0, 0.0)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 1, 1.0)
    assert produce_all(state) == []
    state.progress("a", BARRIER_SECONDS)
    assert state.expire(BARRIER_SECONDS + 1) == ["b"]
    assert produce_all(state) == [(2, (A,)), (3, (A,))]


def test_a_hung_pack_loses_its_lease_and_comes_back_as_a_latecomer():
    state = two_packs(window=2)
    state.attach("a", 0, 0.0)
    state.attach("b", 0, 0.0)
    produce_all(state)
    state.progress("a", 100.0)
    assert state.expire(100.0) == ["b"]
    with pytest.raises(LeaseLostError):
        state.take("b", 0, 101.0)
    state.acknowledge("a", 0, 101.0)
    state.acknowledge("a", 1, 101.0)
    produce_all(state)
    state.attach("b", 0, 102.0)
    produce_all(state)
    assert state.take("a", 3, 103.0) is not None
    assert state.take("b", 0, 103.0) == {B: f"{B}@0"}


def test_an_announced_pause_keeps_the_lease():
    state = two_packs()
    state.attach("a", 0, 0.0)
    state.attach("b", 0, 0.0)
    state.progress("a", 0.0, pause_seconds=600.0)
    state.progress("b", 500.0)
    assert state.expire(500.0) == []
    state.progress("b", 601.0)
    assert state.expire(601.0) == ["a"]


def test_a_lost_block_goes_to_another_host_and_is_given_up_after_three():
    state = StreamState(4, 2, n_hosts=2)
    state.expect({"a": [A]}, 0, {})
    state.open_cohort(0, 0.0)
    for attempt in range(3):
        work = state.next_work()
        assert work.block == 0
        state.failed(work, f"died ({attempt})")
        state.host_back(work.host)
        assert (state.fatal is not None) == (attempt == 2)
    assert "block 0 has failed 3 times" in state.fatal and "died (2)" in state.fatal
    assert state.next_work() is None


def test_a_block_lost_from_the_store_is_made_again():
    state = two_packs()
    state.attach("a", 0, 0.0)
    produce_all(state)
    state.forget(0, [A])
    assert state.take("a", 0, 1.0) is None
    assert produce_all(state) == [(0, (A,))]


class FlakyHost:
    """A host that dies over every block once."""

    def __init__(self):
        self.failed, self.made = set(), []

    async def harvest(self, block, hook_points):
        await asyncio.sleep(0)
        if block not in self.failed:
            self.failed.add(block)
            raise ConnectionError("the host died")
        self.made.append(block)
        return {name: (name, block) for name in hook_points}, BlockInfo(tokens=10, forward_passes=2, seconds=0.1)

    async def wait_until_up(self):
        await asyncio.sleep(0)


def test_every_pack_reads_every_block_once_in_order_over_dying_hosts():
    async def scenario():
        state = StreamState(12, 2, n_hosts=2)
        state.expect({"a": [A], "b": [A, B]}, 0, {})
        state.open_cohort(0, 0.0)
        hosts = [FlakyHost(), FlakyHost()]
        stream = Stream(state, hosts)
        pump = asyncio.ensure_future(stream.pump())

        async def consume(pack, names):
            await stream.attach(pack, 0)
            for block in range(12):
                while (objects := await stream.next_block(pack, block)) is None:
                    pass
                assert objects == {name: (name, block) for name in names}
                await stream.acknowledge(pack, block)
            await stream.report(pack, [{"kind": "finished", "pack": pack}])
            await stream.detach(pack)

        await asyncio.wait_for(asyncio.gather(consume("a", [A]), consume("b", [A, B])), timeout=20)
        pump.cancel()
        return state, hosts, await stream.collect()

    state, hosts, (mail, cost, fatal) = asyncio.run(scenario())
    assert fatal is None and not state.ready
    assert cost["blocks_made"] == 12  # one forward pass a block, whoever reads it
    assert sorted(hosts[0].made + hosts[1].made) == list(range(12))
    assert {event["pack"] for event in mail if event["kind"] == "finished"} == {"a", "b"}
    assert any("lost block" in event["message"] for event in mail if event["kind"] == "log")


class HostThatCannotBeBuilt:
    async def harvest(self, block, hook_points):
        raise ConnectionError("died in its creation task")

    async def wait_until_up(self):
        raise HostGoneError("Traceback ...\nModelError: model.name './tiny' is not a complete model")


def test_a_sweep_whose_hosts_cannot_be_built_ends_with_the_reason():
    async def scenario():
        state = StreamState(4, 2, n_hosts=1)
        state.expect({"a": [A]}, 0, {})
        state.open_cohort(0, 0.0)
        stream = Stream(state, [HostThatCannotBeBuilt()])
        pump = asyncio.ensure_future(stream.pump())
        await stream.attach("a", 0)
        with pytest.raises(RuntimeError, match="no model host is left: ModelError"):
            await asyncio.wait_for(stream.next_block("a", 0), timeout=20)
        pump.cancel()

    asyncio.run(scenario())
