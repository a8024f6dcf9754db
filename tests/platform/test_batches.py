import pytest

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
