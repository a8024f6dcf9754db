"""The stream's decisions, one by one, and under random events: `StreamState` alone, with a fake clock."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.stream_state import (
    BARRIER_SECONDS,
    IN_SPOOL,
    LEASE_SECONDS,
    STRIKES,
    BlockSet,
    LeaseLostError,
    StreamState,
    SupersededError,
)

A, B = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"


def make(work):
    """What a host returns for a piece of work."""
    return {name: f"{name}@{work.block}" for name in work.arrays}


def produce_all(state, spool=False):
    """Let hosts work until there is nothing to do; the blocks made, in order."""
    made = []
    while (work := state.next_work()) is not None:
        state.produced(work, make(work), work.arrays if spool else ())
        made.append((work.block, work.arrays))
    return made


def stream(packs, window=3, n_blocks=8, hosts=1, **options):
    """A stream whose packs are expected and whose cohort 0 has opened at time 0."""
    state = StreamState(n_blocks, window, **options)
    state.expect({pack: list(arrays) for pack, arrays in packs.items()}, cohort=0, cursors={})
    state.open_cohort(0, now=0.0)
    for host in range(hosts):
        state.host_up(f"host-{host}")
    return state


def attached(packs, **options):
    state = stream(packs, **options)
    for pack, arrays in packs.items():
        state.attach(pack, arrays, 0, 0.0)
    return state


def two_packs(**options):
    return stream({"a": [A], "b": [B]}, **options)


def read(state, pack, first, stop, now=1.0, run=0):
    """The pack reads blocks, made as they are needed."""
    made = []
    for block in range(first, stop):
        made += produce_all(state)
        assert state.take(pack, block, now, run) is not None, block
        state.acknowledge(pack, block, now, run)
    return made


def lose(state, pack, block, *arrays):
    """The pack takes the block, and cannot read these arrays of it."""
    assert state.take(pack, block, 1.0) is not None
    assert state.forget(pack, block, arrays)


def blocks_held(state):
    return {block for block, _ in state.ready} | {work.block for work in state.pending.values()}


# ---- who is given what ----------------------------------------------------------------------------------------------


def test_one_forward_pass_makes_a_block_for_every_hook_point():
    assert produce_all(two_packs()) == [(0, (A, B)), (1, (A, B)), (2, (A, B))]


def test_blocks_are_made_before_anybody_has_attached():
    assert two_packs().next_work().block == 0


def test_nothing_is_made_without_hosts_or_members():
    assert produce_all(two_packs(hosts=0)) == []
    state = StreamState(4, 2)
    state.host_up("host")
    assert produce_all(state) == []


def test_a_window_of_one_block_is_refused():
    with pytest.raises(ValueError, match="at least two blocks"):
        StreamState(4, 1)


def test_nobody_runs_further_ahead_than_the_window():
    state = attached({"a": [A], "b": [B]}, window=2)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 1, 1.0)
    assert produce_all(state) == []
    assert state.take("a", 2, 1.0) is None
    state.acknowledge("b", 0, 2.0)
    assert produce_all(state) == [(2, (A, B))]
    assert state.take("a", 2, 2.0) == {A: f"{A}@2"}


def test_a_block_is_dropped_when_its_last_reader_is_through():
    state = attached({"a": [A], "a2": [A], "b": [B]})
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    assert (0, A) in state.ready
    state.acknowledge("a2", 0, 1.0)
    assert (0, A) not in state.ready
    assert (0, B) in state.ready


def test_a_block_that_nobody_waits_for_any_more_is_dropped_when_it_comes():
    state = attached({"a": [A]})
    work = state.next_work()
    state.detach("a")
    state.produced(work, make(work))
    assert not state.ready
    assert state.next_work() is None


def test_taking_and_acknowledging_again_changes_nothing():
    state = attached({"a": [A], "b": [B]})
    produce_all(state)
    assert state.take("a", 0, 1.0) == state.take("a", 0, 1.0) == {A: f"{A}@0"}
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 0, 1.0)
    assert state.members["a"].cursor == 1


def test_a_pack_of_two_arrays_waits_for_both():
    state = attached({"a": [A], "both": [A, B]}, hosts=2)
    produce_all(state)
    lose(state, "both", 0, B)
    assert state.take("both", 0, 1.0) is None and state.take("a", 0, 1.0) is not None
    assert produce_all(state) == [(0, (B,))]
    assert state.take("both", 0, 1.0) == {A: f"{A}@0", B: f"{B}@0"}


def test_a_pack_that_restarts_gets_its_blocks_made_again_for_itself_alone():
    state = attached({"a": [A], "b": [B]})
    for block in range(3):
        produce_all(state)
        state.acknowledge("a", block, 1.0)
        state.acknowledge("b", block, 1.0)
    produce_all(state)
    state.attach("a", [A], 1, 2.0)  # its checkpoint stands at block 1
    made = produce_all(state)
    assert (1, (A,)) in made and (2, (A,)) in made
    assert not any(B in names for block, names in made if block < 3)  # the other pack has had these
    assert state.take("a", 1, 3.0) == {A: f"{A}@1"}


def test_one_that_has_read_all_takes_no_room_from_the_others():
    state = attached({"a": [A]}, window=4)
    read(state, "a", 0, 8)  # it is still busy with its export
    state.attach("late", [B], 0, 2.0)
    assert len(produce_all(state)) == 4


# ---- waves ----------------------------------------------------------------------------------------------------------


def test_a_later_wave_is_not_harvested_for_before_it_starts_and_holds_nobody_up():
    state = StreamState(12, 2)
    state.host_up("host")
    state.expect({"early": [A]}, cohort=0, cursors={})
    state.expect({"late": [B]}, cohort=1, cursors={})
    state.open_cohort(0, 0.0)
    state.attach("early", [A], 0, 0.0)
    assert {name for _, names in produce_all(state) for name in names} == {A}
    read(state, "early", 0, 5)
    state.attach("late", [B], 0, 2.0)
    assert (0, (B,)) in produce_all(state)
    read(state, "early", 5, 12)


def test_the_wait_for_a_pack_that_never_comes_ends():
    state = two_packs(window=2)
    state.attach("a", [A], 0, 0.0)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 1, 1.0)
    assert produce_all(state) == []
    state.progress("a", BARRIER_SECONDS)
    assert state.expire(BARRIER_SECONDS) == []
    assert state.expire(BARRIER_SECONDS + 1) == ["b"]
    assert produce_all(state) == [(2, (A,)), (3, (A,))]


def test_a_wave_that_never_comes_is_waited_for_once_it_has_opened_and_not_before():
    state = StreamState(4, 2)
    state.expect({"a": [A], "b": [B]}, cohort=1, cursors={})
    assert state.expire(10 * BARRIER_SECONDS) == []
    state.attach("a", [A], 0, 1000.0)
    assert state.expire(1000.0 + BARRIER_SECONDS + 1) == ["a", "b"]


def test_a_cursor_that_is_known_beforehand_is_where_blocks_begin():
    state = StreamState(8, 2)
    state.host_up("host")
    state.expect({"a": [A]}, 0, {"a": 5})
    state.open_cohort(0, 0.0)
    assert [block for block, _ in produce_all(state)] == [5, 6]


# ---- leases ---------------------------------------------------------------------------------------------------------


def test_a_hung_pack_loses_its_lease_and_comes_back_as_a_latecomer():
    state = attached({"a": [A], "b": [B]}, window=2, n_blocks=12)
    produce_all(state)
    state.progress("a", 100.0)
    assert state.expire(100.0) == ["b"]
    for call in (state.take, state.acknowledge):
        with pytest.raises(LeaseLostError):
            call("b", 0, 101.0)
    with pytest.raises(LeaseLostError):
        state.progress("b", 101.0)
    read(state, "a", 0, 6, 101.0)
    state.attach("b", [B], 0, 102.0)
    produce_all(state)
    assert state.take("b", 0, 103.0) == {B: f"{B}@0"}
    read(state, "a", 6, 12, 103.0)  # it has not waited


def test_a_lease_is_as_long_as_is_asked_for_or_ten_times_what_a_block_takes():
    state = attached({"a": [A]}, lease_seconds=5.0, n_blocks=20)
    assert state.expire(5.0) == [] and state.lease(state.members["a"]) == 5.0
    for block in range(9):
        produce_all(state)
        state.acknowledge("a", block, 10.0 * block)
    assert state.lease(state.members["a"]) == 100.0
    assert state.expire(179.0) == []
    assert state.expire(181.0) == ["a"]
    assert attached({"a": [A]}).lease(state.members["a"]) == 100.0 and LEASE_SECONDS == 60.0


def test_an_announced_pause_keeps_the_lease():
    state = attached({"a": [A], "b": [B]})
    state.progress("a", 0.0, pause_seconds=600.0)
    state.progress("b", 500.0)
    assert state.expire(500.0) == []
    state.progress("b", 601.0)
    assert state.expire(601.0) == ["a"]


def test_a_step_ends_an_announced_pause():
    state = attached({"a": [A]})
    state.progress("a", 0.0, pause_seconds=600.0)
    state.progress("a", 10.0)
    assert state.expire(71.0) == ["a"]


def test_waiting_for_a_block_keeps_the_lease():
    state = attached({"a": [A]}, hosts=0)
    for now in range(0, 600, 20):
        assert state.take("a", 0, now) is None
        assert state.expire(now) == []


# ---- latecomers -----------------------------------------------------------------------------------------------------


def test_a_latecomer_far_behind_holds_nobody_up_and_shares_the_window():
    state = attached({"a": [A]}, window=4, n_blocks=40, hosts=1)
    read(state, "a", 0, 20)
    state.attach("late", [A], 0, 2.0)
    produce_all(state)
    assert blocks_held(state) == {0, 1, 20, 21}  # two blocks each
    read(state, "a", 20, 40)


def test_a_latecomer_that_has_caught_up_reads_the_same_blocks():
    state = attached({"a": [A]}, window=4, n_blocks=40)
    read(state, "a", 0, 10)
    state.attach("late", [A], 0, 2.0)
    assert state.members["late"].cohort != 0
    read(state, "late", 0, 10, 2.0)
    assert state.members["late"].cohort == state.members["a"].cohort
    before = state.blocks_remade
    for block in range(10, 40):
        read(state, "a", block, block + 1, 3.0)
        read(state, "late", block, block + 1, 3.0)
    assert state.blocks_remade == before


@pytest.mark.parametrize("distance", [0, 4])
def test_one_that_comes_back_within_the_window_is_one_of_the_others_at_once(distance):
    state = attached({"a": [A], "b": [B]}, window=4, n_blocks=12)
    for pack in ("a", "b"):
        read(state, pack, 0, 4)
    read(state, "a", 4, 4 + distance)
    state.progress("a", 100.0)
    assert state.expire(100.0) == ["b"]
    state.attach("b", [B], 4, 101.0)
    assert state.members["b"].cohort == state.members["a"].cohort
    for block in range(4, 12):
        if block >= 4 + distance:
            read(state, "a", block, block + 1, 102.0)
        read(state, "b", block, block + 1, 102.0)
    assert state.blocks_remade <= 4  # those of "b" that were dropped with its lease


def test_packs_that_attach_to_a_new_stream_one_by_one_are_one_cohort_again():
    state = StreamState(40, 4)
    state.host_up("host")
    for pack, cursor in {"a": 12, "b": 14, "c": 11, "d": 15}.items():
        with pytest.raises(LeaseLostError):
            state.take(pack, cursor, 0.0)
        state.attach(pack, [pack], cursor, 0.0)
    assert len({member.cohort for member in state.members.values()}) == 1
    assert produce_all(state)[0] == (11, ("c",)) and len(blocks_held(state)) == 4


def test_a_cohort_does_not_merge_while_its_foremost_would_have_to_wait():
    state = StreamState(60, 4)
    state.host_up("host")
    state.attach("slow", [A], 10, 0.0)
    state.attach("fast", [B], 10, 0.0)
    read(state, "fast", 10, 14)  # as far as the window goes
    state.attach("late", [A], 0, 1.0)
    for block in range(8):
        read(state, "late", block, block + 1)
    assert state.members["late"].cohort != state.members["fast"].cohort  # 14 is not within reach of block 8
    read(state, "late", 8, 10)
    assert state.members["late"].cohort == state.members["fast"].cohort


def test_a_barrier_holds_up_only_those_who_came_to_it():
    state = StreamState(20, 2)
    state.host_up("host")
    state.expect({"a": [A]}, 0, {})
    state.expect({"b": [B], "missing": [B]}, 1, {})
    state.attach("a", [A], 0, 0.0)
    state.attach("b", [B], 0, 0.0)
    read(state, "a", 0, 10)
    assert state.members["missing"].status == "expected"


def test_a_merged_cohort_whose_other_half_hangs_goes_on():
    state = attached({"a": [A]}, window=4, n_blocks=30)
    read(state, "a", 0, 6)
    state.attach("late", [A], 6, 2.0)
    assert state.members["late"].cohort == 0
    read(state, "late", 6, 10, 2.0)
    assert state.take("late", 10, 2.0) is None  # "a" hangs
    state.progress("late", 70.0)
    assert state.expire(70.0) == ["a"]
    read(state, "late", 10, 30, 70.0)
    state.detach("late")
    state.attach("a", [A], 6, 80.0)
    read(state, "a", 6, 30, 80.0)


def test_one_that_left_and_attaches_again_is_a_latecomer():
    state = attached({"a": [A], "b": [B]}, n_blocks=20)
    for block in range(8):
        read(state, "a", block, block + 1)
        read(state, "b", block, block + 1)
    state.detach("b")
    state.attach("b", [B], 0, 2.0)
    read(state, "a", 8, 20, 2.0)  # nobody waits for it
    read(state, "b", 0, 20, 2.0)


def test_more_cohorts_than_the_window_has_blocks_have_one_each():
    state = attached({"a": [A]}, window=2, n_blocks=100)
    read(state, "a", 0, 90)
    for index in range(5):
        state.attach(f"late-{index}", [A], 15 * index, 2.0)
    produce_all(state)
    assert sorted(blocks_held(state)) == [0, 15, 30, 45, 60, 90]
    for index in range(5):
        read(state, f"late-{index}", 15 * index, 15 * index + 10, 3.0)
        assert len(blocks_held(state)) <= 6


def test_nothing_accumulates_when_a_cohort_runs_ahead_of_another():
    state = attached({"a": [A]}, window=8, n_blocks=100)
    read(state, "a", 0, 20)
    state.attach("slow", [A], 0, 2.0)
    state.attach("slower", [A], 10, 2.0)
    for block in range(20, 60):  # past all that the slow ones will read soon
        read(state, "a", block, block + 1, 3.0)
        assert len(blocks_held(state)) <= 8


def test_a_cohort_in_front_is_not_starved_by_several_behind():
    state = attached({"front": [A]}, window=6, n_blocks=200)
    read(state, "front", 0, 100)
    for pack, cursor in (("x", 0), ("y", 40)):
        state.attach(pack, [A], cursor, 2.0)
    cursors, reads = {"front": 100, "x": 0, "y": 40}, dict.fromkeys(("front", "x", "y"), 0)
    for _ in range(60):  # one host, and consumers that need no time
        work = state.next_work()
        state.produced(work, make(work))
        for pack, cursor in cursors.items():
            if work.block != cursor and state.take(pack, cursor, 3.0) is not None:
                state.acknowledge(pack, cursor, 3.0)
                cursors[pack] += 1
                reads[pack] += 1
    assert min(reads.values()) >= 15, reads


# ---- hosts ----------------------------------------------------------------------------------------------------------


def test_a_lost_block_goes_to_another_host_and_is_given_up_after_three():
    state = attached({"a": [A]}, hosts=2)
    for attempt in range(STRIKES):
        work = state.next_work()
        assert work.block == 0
        state.failed(work, f"died ({attempt})")
        state.host_up(work.host)
        assert (state.fatal is not None) == (attempt == STRIKES - 1)
    assert "block 0 has failed 3 times" in state.fatal and "died (2)" in state.fatal
    assert state.next_work() is None
    assert state.blocks_remade == 0


def test_a_block_that_succeeds_has_no_strikes_any_more():
    state = attached({"a": [A]})
    for _ in range(STRIKES - 1):
        state.failed(state.next_work(), "died")
        state.host_up("host-0")
    produce_all(state)
    lose(state, "a", 0, A)
    for _ in range(STRIKES - 1):
        state.failed(state.next_work(), "died")
        state.host_up("host-0")
    assert state.fatal is None


def test_a_host_that_had_gone_before_is_not_held_against_the_block():
    state = attached({"a": [A]})
    for _ in range(STRIKES):
        state.returned(state.next_work())
        assert state.next_work() is None  # the host is away
        state.host_up("host-0")
    assert state.fatal is None and state.next_work().block == 0


def test_a_host_is_given_one_block_at_a_time_however_often_it_says_that_it_is_up():
    state = attached({"a": [A]})
    work = state.next_work()
    state.host_up(work.host)
    assert state.next_work() is None


def test_an_idle_host_may_go_at_once_and_a_busy_one_after_its_block():
    state = attached({"a": [A]}, hosts=2)
    work = state.next_work()
    idle = "host-1" if work.host == "host-0" else "host-0"
    assert state.retire_host(idle)
    assert not state.retire_host(work.host) and not state.retire_host(work.host)
    state.produced(work, make(work))
    assert state.retire_host(work.host)
    assert state.take("a", 0, 1.0) is not None
    state.host_up(work.host)  # it was just being brought back
    assert state.next_work() is None
    state.host_up("host-2")
    assert state.next_work().host == "host-2"


def test_a_retiring_host_may_go_when_it_has_failed():
    state = attached({"a": [A]})
    work = state.next_work()
    assert not state.retire_host(work.host)
    state.failed(work, "died")
    assert state.retire_host(work.host)


# ---- lost and spooled blocks ----------------------------------------------------------------------------------------


def test_a_block_lost_from_the_store_is_made_again():
    state = two_packs()
    state.attach("a", [A], 0, 0.0)
    produce_all(state)
    lose(state, "a", 0, A)
    assert state.take("a", 0, 1.0) is None
    assert produce_all(state) == [(0, (A,))]
    assert state.blocks_remade == 1


def test_a_block_is_made_again_once_however_many_packs_find_that_it_is_lost():
    packs = [f"pack-{index}" for index in range(9)]
    state = attached({pack: [A] for pack in packs})
    produce_all(state)
    lost = [state.take(pack, 0, 1.0) for pack in packs]
    assert all(one is not None for one in lost)
    for pack in packs:  # one after the other, long after the first
        state.forget(pack, 0, [A])
        produce_all(state)
    assert state.blocks_remade == 1
    lose(state, packs[3], 0, A)  # the second one is lost as well
    assert produce_all(state) == [(0, (A,))]


def test_what_the_stream_has_not_handed_out_cannot_be_lost():
    state = attached({"a": [A]})
    produce_all(state)
    assert not state.forget("a", 0, [A]) and not state.forget("unknown", 0, [A])
    assert state.take("a", 0, 1.0) is not None


def test_a_lost_block_that_nobody_needs_is_not_made_again():
    state = attached({"a": [A]})
    read(state, "a", 0, 1)
    state.forget("a", 0, [A])
    assert all(block > 0 for block, _ in produce_all(state))


def test_spooled_blocks_are_handed_out_as_such_and_not_made():
    state = attached({"a": [A], "both": [A, B]}, spooled={A: BlockSet(8, range(8))})
    assert produce_all(state) == [(0, (B,)), (1, (B,)), (2, (B,))]
    assert state.take("both", 0, 1.0) == {A: IN_SPOOL, B: f"{B}@0"}


def test_spooled_blocks_are_read_beyond_the_window():
    state = attached({"a": [A], "slow": [A]}, window=2, spooled={A: BlockSet(8, range(6))})
    for block in range(6):
        assert state.take("a", block, 1.0) == {A: IN_SPOOL}
        state.acknowledge("a", block, 1.0)
    assert state.take("a", 6, 1.0) is None and produce_all(state) == []
    for block in range(5):
        state.acknowledge("slow", block, 1.0)
    assert produce_all(state) == [(6, (A,))]


def test_a_block_made_into_the_spool_is_read_there_once_it_has_left_the_store():
    state = attached({"a": [A]})
    produce_all(state, spool=True)
    assert state.take("a", 0, 1.0) == {A: f"{A}@0"}
    state.acknowledge("a", 0, 1.0)
    assert (0, A) not in state.ready
    state.attach("late", [A], 0, 2.0)
    assert state.take("late", 0, 2.0) == {A: IN_SPOOL}
    assert state.blocks_remade == 0


def test_a_block_found_in_the_spool_by_the_host_was_not_made():
    state = attached({"a": [A]})
    work = state.next_work()
    state.produced(work, {}, work.arrays)
    assert state.take("a", 0, 1.0) == {A: IN_SPOOL} and not state.ready


def test_a_pack_that_restarts_at_a_checkpoint_within_its_lease_holds_nobody_up():
    state = attached({"a": [A], "b": [A]}, window=4, n_blocks=20)
    for block in range(10):
        produce_all(state)
        for pack in ("a", "b"):
            state.acknowledge(pack, block, 1.0)
    state.attach("a", [A], 2, 2.0)
    assert read(state, "b", 10, 20, now=3.0)  # to the end, before the other one has read anything
    state.detach("b")
    assert [block for block, _ in read(state, "a", 2, 20, now=4.0)][-1] == 19


def test_a_pack_that_restarts_where_others_still_are_stays_with_them():
    state = attached({"a": [A], "b": [A]}, window=4)
    produce_all(state)
    state.acknowledge("a", 0, 1.0)
    state.acknowledge("a", 1, 1.0)
    state.attach("a", [A], 0, 2.0)
    assert state.members["a"].cohort == state.members["b"].cohort
    assert produce_all(state) == []  # all it needs is there


def test_with_a_spool_one_forward_pass_serves_the_hook_points_of_later_waves_too():
    state = StreamState(4, 3, spooled={})
    state.expect({"a": [A]}, cohort=0, cursors={})
    state.expect({"b": [B]}, cohort=1, cursors={})
    state.open_cohort(0, 0.0)
    state.host_up("host")
    state.attach("a", [A], 0, 0.0)
    made = []
    for block in range(4):
        made += produce_all(state, spool=True)
        state.acknowledge("a", block, 1.0)
    assert made == [(block, (A, B)) for block in range(4)]
    assert not state.ready  # what only the later wave reads is not kept in the object store
    state.attach("b", [B], 0, 2.0)
    assert produce_all(state) == [] and state.take("b", 3, 2.0) == {B: IN_SPOOL}


def test_without_a_spool_only_hook_points_with_consumers_are_harvested():
    state = StreamState(4, 3)
    state.expect({"a": [A]}, cohort=0, cursors={})
    state.expect({"b": [B]}, cohort=1, cursors={})
    state.open_cohort(0, 0.0)
    state.host_up("host")
    assert produce_all(state) == [(block, (A,)) for block in range(3)]


def test_an_object_that_is_lost_is_read_in_the_spool_if_it_lies_there():
    state = attached({"a": [A]})
    produce_all(state, spool=True)
    lose(state, "a", 0, A)
    assert state.take("a", 0, 1.0) == {A: IN_SPOOL}
    assert produce_all(state) == []


def test_a_lost_spooled_block_is_made_again():
    state = attached({"a": [A]}, spooled={A: BlockSet(8, range(8))})
    lose(state, "a", 0, A)
    assert state.take("a", 0, 1.0) is None
    assert produce_all(state, spool=True) == [(0, (A,))]
    assert state.take("a", 0, 1.0) == {A: f"{A}@0"}


def test_blocks_remade_counts_what_was_made_before_and_nothing_else():
    state = attached({"a": [A]}, n_blocks=40, spooled={A: BlockSet(40, range(5))})
    state.acknowledge("a", 0, 1.0)
    lose(state, "a", 1, A)  # was in the spool, and has never been made
    assert [block for block, _ in produce_all(state)] == [1]
    assert state.blocks_remade == 0
    lose(state, "a", 1, A)
    state.failed(state.next_work(), "died")  # the attempt is none
    state.host_up("host-0")
    assert state.blocks_remade == 0
    assert [block for block, _ in produce_all(state)] == [1]
    assert state.blocks_remade == 1
    state.attach("far", [A], 30, 2.0)  # in front of what has been made
    produce_all(state)
    state.attach("between", [A], 20, 2.0)
    produce_all(state)
    assert state.blocks_remade == 1


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_an_older_run_is_refused_on_every_call():
    state = attached({"a": [A]})
    produce_all(state)
    state.attach("a", [A], 0, 1.0, run=2)
    for call in (
        lambda: state.attach("a", [A], 0, 2.0, run=1),
        lambda: state.take("a", 0, 2.0, run=1),
        lambda: state.acknowledge("a", 0, 2.0, run=1),
        lambda: state.progress("a", 2.0, run=1),
        lambda: state.detach("a", run=1),
    ):
        with pytest.raises(SupersededError, match="run 1 of pack a: run 2 has taken over"):
            call()
    assert state.members["a"].status == "live" and state.members["a"].cursor == 0
    assert state.take("a", 0, 2.0, run=2) is not None


@pytest.mark.parametrize("end", ["lease", "detached"])
def test_an_older_run_is_refused_after_the_newer_one_has_gone(end):
    state = attached({"a": [A]})
    state.attach("a", [A], 0, 0.0, run=2)
    if end == "lease":
        assert state.expire(100.0) == ["a"]
    else:
        state.detach("a", run=2)
    with pytest.raises(SupersededError):
        state.attach("a", [A], 0, 101.0, run=1)
    state.attach("a", [A], 0, 101.0, run=2)
    assert state.members["a"].run == 2


def test_a_newer_run_takes_over_where_its_checkpoint_stands():
    state = attached({"a": [A]})
    read(state, "a", 0, 3)
    state.attach("a", [A], 1, 2.0, run=1)
    read(state, "a", 1, 8, run=1)


def test_detaching_one_that_is_not_known_changes_nothing():
    state = attached({"a": [A]})
    state.detach("b")
    assert list(state.members) == ["a"]


# ---- sets of blocks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_blocks", [1, 7, 8, 9, 100])
def test_a_set_of_blocks_is_a_set(n_blocks):
    chosen = set(range(0, n_blocks, 3))
    blocks = BlockSet(n_blocks, chosen)
    assert {block for block in range(n_blocks) if block in blocks} == chosen and len(blocks) == len(chosen)
    blocks.add(0)
    blocks.discard(n_blocks - 1)
    blocks.discard(n_blocks - 1)
    assert {block for block in range(n_blocks) if block in blocks} == chosen - {n_blocks - 1}


# ---- random events --------------------------------------------------------------------------------------------------

PACKS = {"a": (A,), "a2": (A,), "b": (B,), "ab": (A, B), "b2": (B,), "late": (A,), "later": (B, A)}
N_BLOCKS = 16


class RandomStream(RuleBasedStateMachine):
    """Packs, hosts, losses and the clock in any order. What should be is kept here, apart from the state machine."""

    @initialize(window=st.integers(2, 5), hosts=st.integers(0, 3))
    def begin(self, window, hosts):
        self.window, self.now, self.names = window, 0.0, 0
        self.files: set[tuple[int, str]] = set()  # that lie in the spool
        self.made: set[tuple[int, str]] = set()
        self.remade = 0
        self.working: list = []
        self.failures: dict[int, int] = {}
        self.runs = dict.fromkeys(PACKS, 0)
        self.positions: dict[str, int] = {}  # of the packs that are alive
        self.finished: set[str] = set()
        self.new_stream()
        self.state.expect({"a": PACKS["a"], "a2": PACKS["a2"], "b": PACKS["b"]}, 0, {})
        self.state.expect({"ab": PACKS["ab"], "b2": PACKS["b2"]}, 1, {"b2": 2})
        self.state.open_cohort(0, self.now)
        for _ in range(hosts):
            self.host_joins()

    def new_stream(self):
        spooled = {name: BlockSet(N_BLOCKS, (b for b, array in self.files if array == name)) for name in (A, B)}
        self.state = StreamState(N_BLOCKS, self.window, spooled=spooled)
        self.made, self.remade, self.working, self.failures = set(), 0, [], {}
        self.opened = {0}
        self.before: tuple[set, int] = (set(), 0)  # ready, and the number of cohorts, after the event before
        self.lost: set[tuple[int, str]] = set()  # in this event
        self.joined = False  # whether a member has attached in this event

    def active(self):
        return [
            m
            for m in self.state.members.values()
            if m.cursor < N_BLOCKS and (m.status == "live" or (m.status == "expected" and m.cohort in self.opened))
        ]

    def starts(self):
        starts: dict[int, int] = {}
        for member in self.active():
            starts[member.cohort] = min(member.cursor, starts.get(member.cohort, member.cursor))
        return starts

    # -- consumers --

    def come(self, pack, cursor):
        if pack in self.state.members:
            self.opened.add(self.state.members[pack].cohort)
        self.state.attach(pack, PACKS[pack], cursor, self.now, self.runs[pack])
        self.positions[pack] = cursor
        self.joined = True

    @rule(pack=st.sampled_from(sorted(PACKS)), back=st.integers(0, 16))
    def pack_starts_or_restarts(self, pack, back):
        """From a checkpoint that stands somewhere before the block it was at."""
        self.runs[pack] += 1
        self.finished.discard(pack)
        self.come(pack, max(0, self.positions.get(pack, 0) - back))

    @precondition(lambda self: self.positions)
    @rule(data=st.data(), times=st.integers(1, 4))
    def pack_reads(self, data, times):
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        for _ in range(times):
            self.read(pack)

    @precondition(lambda self: self.positions)
    @rule(data=st.data(), times=st.integers(1, 12))
    def pack_goes_on_while_blocks_are_made(self, data, times):
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        for _ in range(times):
            self.hosts_are_given_work(2)
            while self.working:
                self.finish(self.working.pop())
            self.read(pack)
            self.nothing_lies_there_but_what_a_cohort_needs_within_its_share()

    def read(self, pack):
        """As the client does it."""
        block, run = self.positions[pack], self.runs[pack]
        if block == N_BLOCKS:
            return
        try:
            found = self.state.take(pack, block, self.now, run)
            if found is None:
                return
            assert found == self.state.take(pack, block, self.now, run)
            assert found.keys() == set(PACKS[pack])
            gone = [name for name, one in found.items() if one == IN_SPOOL and (block, name) not in self.files]
            for name, one in found.items():
                assert one in (IN_SPOOL, (name, block))
            if gone:
                assert self.state.forget(pack, block, gone)
                return
            self.state.acknowledge(pack, block, self.now, run)
            self.positions[pack] += 1
        except LeaseLostError:
            self.come(pack, block)

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def pack_leaves(self, data):
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        self.state.detach(pack, self.runs[pack])
        del self.positions[pack]
        self.finished.add(pack)

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def pack_dies_for_ever(self, data):
        del self.positions[data.draw(st.sampled_from(sorted(self.positions)))]

    @precondition(lambda self: self.positions)
    @rule(data=st.data(), pause=st.sampled_from([0.0, 100.0]))
    def pack_says_that_it_lives(self, data, pause):
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        try:
            self.state.progress(pack, self.now, pause, self.runs[pack])
        except LeaseLostError:
            self.come(pack, self.positions[pack])

    @precondition(lambda self: self.positions)
    @rule(data=st.data())
    def run_that_has_outlived_its_trial_calls(self, data):
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        run = self.runs[pack] - 1
        known = pack in self.state.members
        with pytest.raises(SupersededError if known else LeaseLostError):
            self.state.take(pack, self.positions[pack], self.now, run)
        if known:
            with pytest.raises(SupersededError):
                self.state.attach(pack, PACKS[pack], 0, self.now, run)

    @rule(seconds=st.sampled_from([1.0, 30.0, 70.0, 130.0]))
    def time_passes(self, seconds):
        self.now += seconds
        for pack in self.state.expire(self.now):
            assert self.state.members[pack].status == "gone"

    # -- hosts --

    @rule()
    def host_joins(self):
        self.names += 1
        self.state.host_up(f"host-{self.names}")

    @rule(times=st.integers(1, 3))
    def hosts_are_given_work(self, times):
        for _ in range(times):
            starts = self.starts()
            share = max(1, self.window // max(1, len(starts)))
            work = self.state.next_work()
            if work is None:
                return
            for name in work.arrays:
                key = work.block, name
                assert key not in self.state.ready and key not in self.files
                assert not any(work.block == other.block and name in other.arrays for other in self.working)
                assert any(
                    name in m.arrays and m.cursor <= work.block < starts[m.cohort] + share for m in self.active()
                ), "nobody needs it"
            assert work.host not in {other.host for other in self.working}
            self.working.append(work)

    @precondition(lambda self: self.working)
    @rule(data=st.data(), spooled=st.sampled_from([(), (A,), (A, B)]), from_spool=st.booleans())
    def host_has_made_a_block(self, data, spooled, from_spool):
        work = self.working.pop(data.draw(st.integers(0, len(self.working) - 1)))
        self.finish(work, [name for name in spooled if name in work.arrays], from_spool)

    def finish(self, work, spooled=(), from_spool=False):
        keys = {(work.block, name) for name in work.arrays}
        self.failures.pop(work.block, None)
        if from_spool:  # another sweep has put it there
            self.files |= keys
            self.state.produced(work, {}, work.arrays)
            return
        self.remade += bool(keys & self.made)
        self.made |= keys
        self.files |= {(work.block, name) for name in spooled}
        self.state.produced(work, {name: (name, work.block) for name in work.arrays}, spooled)

    @precondition(lambda self: self.working)
    @rule(data=st.data(), before=st.booleans())
    def host_dies(self, data, before):
        index = data.draw(st.integers(0, len(self.working) - 1))
        block = self.working[index].block
        if before:
            self.state.returned(self.working.pop(index))
        elif self.failures.get(block, 0) < STRIKES - 1:
            self.failures[block] = self.failures.get(block, 0) + 1
            self.state.failed(self.working.pop(index), "died")

    @rule(data=st.data())
    def host_retires(self, data):
        hosts = sorted({*self.state.idle_hosts, *(work.host for work in self.working)})
        if hosts:
            host = data.draw(st.sampled_from(hosts))
            assert self.state.retire_host(host) == (host not in {work.host for work in self.working})
            assert host not in self.state.idle_hosts

    # -- losses --

    @precondition(lambda self: self.positions and self.state.ready)
    @rule(data=st.data())
    def object_is_lost(self, data):
        """A pack says that it cannot read what it was handed out, whether or not it has just heard of it."""
        pack = data.draw(st.sampled_from(sorted(self.positions)))
        key = data.draw(st.sampled_from(sorted(self.state.ready)))
        if key[1] in PACKS[pack] and self.state.forget(pack, key[0], [key[1]]):
            assert key not in self.state.ready
            self.lost = {key}

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def file_is_lost(self, data):
        self.files.discard(data.draw(st.sampled_from(sorted(self.files))))

    @rule()
    def stream_restarts(self):
        """Its hosts, and what they were at, are new to it as well."""
        self.new_stream()
        self.host_joins()

    # -- what always holds --

    @invariant()
    def nothing_lies_there_but_what_a_cohort_needs_within_its_share(self):
        if not hasattr(self, "state"):
            return
        starts = self.starts()
        share = max(1, self.window // max(1, len(starts)))
        within = {block for start in starts.values() for block in range(start, start + share)}
        assert len(within) <= max(self.window, len(starts))
        assert {block for block, _ in self.state.ready} <= within
        for block, name in self.state.ready:
            assert any(name in m.arrays and m.cursor <= block for m in self.active())

    @invariant()
    def nothing_that_is_needed_goes_but_by_loss_or_for_a_latecomer(self):
        if not hasattr(self, "state"):
            return
        ready, cohorts = set(self.state.ready), len(self.starts())
        gone = self.before[0] - ready - self.lost
        if not self.joined and cohorts == self.before[1] == 1:
            assert not any(name in m.arrays and m.cursor <= block for block, name in gone for m in self.active())
        self.before, self.lost, self.joined = (ready, cohorts), set(), False

    @invariant()
    def what_is_made_again_is_counted(self):
        if hasattr(self, "state"):
            assert self.state.blocks_remade == self.remade
            assert {w.host: w for w in self.working} == self.state.pending
            assert self.state.fatal is None

    def teardown(self):
        """With one host, and packs that read on, all come to the end; those that died are waited for no longer than
        their leases."""
        if not hasattr(self, "state"):
            return
        while self.working:
            self.finish(self.working.pop())
        self.host_joins()
        for _ in range(20 * N_BLOCKS * len(PACKS)):
            if all(position == N_BLOCKS for position in self.positions.values()):
                break
            work = self.state.next_work()
            if work is not None:
                self.finish(work)
            for pack in sorted(self.positions):
                self.read(pack)
            self.now += 1.0
            self.state.expire(self.now)
            self.nothing_lies_there_but_what_a_cohort_needs_within_its_share()
        assert all(position == N_BLOCKS for position in self.positions.values()), self.positions
        for pack in self.positions:
            self.state.detach(pack, self.runs[pack])
        self.state.expire(self.now + 10 * BARRIER_SECONDS)
        assert not self.state.ready and self.state.next_work() is None


RandomStream.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestRandomStream = RandomStream.TestCase
