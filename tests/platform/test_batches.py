import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batches import Schedule, batches, checkpoint_steps
from penstock.errors import DataError


def test_a_step_lies_in_its_block_at_its_offset():
    schedule = Schedule((10, 7, 12), batch_tokens=4, steps=6)  # 2, 1 and 3 batches a block
    assert [schedule.locate(step) for step in range(6)] == [(0, 0), (0, 4), (1, 0), (2, 0), (2, 4), (2, 8)]


def test_a_block_that_holds_no_batch_is_passed_over():
    schedule = Schedule((4, 3, 8), batch_tokens=4, steps=3)
    assert [schedule.locate(step) for step in range(3)] == [(0, 0), (2, 0), (2, 4)]
    assert list(schedule.steps_of(1)) == []


def test_the_run_ends_inside_a_block():
    schedule = Schedule((8, 8, 8), batch_tokens=4, steps=3)
    assert schedule.n_blocks == 2
    assert list(schedule.steps_of(1)) == [2]


def test_batches_of_a_block_resume_at_a_step():
    schedule = Schedule((10, 7, 12), batch_tokens=4, steps=6)
    assert list(batches(schedule, 2, 12, from_step=4)) == [(4, slice(4, 8)), (5, slice(8, 12))]


def test_every_step_comes_once_and_in_order_over_all_blocks():
    schedule = Schedule((9, 3, 17, 8), batch_tokens=4, steps=8)
    seen = [step for block in range(4) for step, _ in batches(schedule, block, schedule.kept_per_block[block], 0)]
    assert seen == list(range(8))


def test_too_few_tokens_names_the_field_and_what_is_there():
    with pytest.raises(DataError, match=r"train.tokens: 5 batches of 4 .* holds 4 .* accepted: 16 tokens or fewer"):
        Schedule((8, 8), batch_tokens=4, steps=5)


def test_a_block_of_another_length_than_counted_is_a_fault():
    with pytest.raises(RuntimeError, match="block 0 has 9 tokens"):
        list(batches(Schedule((8,), 4, 2), 0, 9, 0))


def test_checkpoints_are_spread_over_the_run_and_leave_out_its_end():
    assert checkpoint_steps(100, 3) == [25, 50, 75]
    assert checkpoint_steps(2, 5) == [1]
    assert checkpoint_steps(100, 0) == []


@st.composite
def schedules(draw) -> Schedule:
    """Any blocks, of which some hold no batch, and any number of steps that lie in them."""
    batch_tokens = draw(st.integers(1, 50))
    kept = draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
    there = sum(tokens // batch_tokens for tokens in kept)
    if not there:
        kept.append(batch_tokens)
    return Schedule(tuple(kept), batch_tokens, draw(st.integers(1, max(1, there))))


def all_batches(schedule: Schedule, from_step: int = 0) -> list[tuple[int, int, slice]]:
    """(block, step, slice) in the order in which the blocks come."""
    return [
        (block, step, place)
        for block, length in enumerate(schedule.kept_per_block)
        for step, place in batches(schedule, block, length, from_step)
    ]


@settings(deadline=None)
@given(schedules())
def test_whatever_the_blocks_every_step_comes_once_and_where_it_is_located(schedule):
    found = all_batches(schedule)
    assert [step for _, step, _ in found] == list(range(schedule.steps))
    for block, step, place in found:
        assert schedule.locate(step) == (block, place.start)
        assert step in schedule.steps_of(block) and schedule.first_step(block) <= step
        assert place.stop - place.start == schedule.batch_tokens and place.stop <= schedule.kept_per_block[block]
    assert schedule.n_blocks == found[-1][0] + 1
    assert all(not schedule.steps_of(block) for block in range(schedule.n_blocks, len(schedule.kept_per_block)))


@settings(deadline=None)
@given(schedules(), st.data())
def test_resuming_at_any_step_gives_what_is_left_and_nothing_else(schedule, data):
    step = data.draw(st.integers(0, schedule.steps))
    assert all_batches(schedule, step) == all_batches(schedule)[step:]


@settings(deadline=None)
@given(schedules())
def test_of_a_block_that_is_used_to_its_end_less_than_a_batch_is_dropped(schedule):
    used = [0] * len(schedule.kept_per_block)
    for block, _, place in all_batches(schedule):
        assert place.start == used[block]  # batches follow one another without a gap
        used[block] = place.stop
    for block in range(schedule.n_blocks - 1):
        assert 0 <= schedule.kept_per_block[block] - used[block] < schedule.batch_tokens


@settings(deadline=None)
@given(schedules())
def test_one_step_more_than_the_blocks_hold_is_refused(schedule):
    there = sum(tokens // schedule.batch_tokens for tokens in schedule.kept_per_block)
    assert Schedule(schedule.kept_per_block, schedule.batch_tokens, there).steps == there
    with pytest.raises(DataError, match=f"holds {there} "):
        Schedule(schedule.kept_per_block, schedule.batch_tokens, there + 1)
