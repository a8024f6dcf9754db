"""The estimated end, recent rates and failures: pure arithmetic."""

import pytest

from penstock.eta import START_SECONDS, Rates, Work, evaluation_seconds, rest_of, training_seconds
from penstock.failures import REMEMBERED, Failures


def test_the_last_pack_to_end_is_the_end():
    running = [Work(100, 4, 10.0, True), Work(300, 2, 10.0, True)]
    assert training_seconds(running, 2) == pytest.approx(30)
    assert training_seconds([], 2) == 0 and training_seconds([Work(0, 4, None, True)], 1) == 0


def test_packs_that_wait_take_the_place_that_is_free_first():
    """Each SAE-step costs as in the packs that run: 40 of them a second."""
    works = [Work(100, 4, 10.0, True), Work(200, 4, 10.0, True), Work(100, 8, None, False), Work(100, 4, None, False)]
    first, second = 10 + START_SECONDS + 20, 20 + START_SECONDS + 10
    assert training_seconds(works, 2) == pytest.approx(max(first, second))
    assert training_seconds(works, 4) == pytest.approx(START_SECONDS + 20)  # two places are free at once
    alone = [Work(100, 4, 10.0, True), Work(100, 4, None, False), Work(100, 4, None, False)]
    assert training_seconds(alone, 1) == pytest.approx(10 + 2 * (START_SECONDS + 10))


def test_a_pack_that_only_starts_is_reckoned_by_the_others():
    assert training_seconds([Work(100, 4, 10.0, True), Work(100, 2, None, True)], 2) == pytest.approx(
        START_SECONDS + 100 * 2 / 40
    )


def test_nobody_can_tell_before_there_is_a_rate_or_when_nothing_moves():
    assert training_seconds([Work(100, 4, None, True)], 1) is None
    assert training_seconds([Work(100, 4, None, False)], 1) is None
    assert training_seconds([Work(100, 4, 10.0, True), Work(100, 4, 0.0, True)], 2) is None
    assert evaluation_seconds(1000, {}, 1) is None and evaluation_seconds(0, {}, 1) == 0
    assert rest_of(10, 0.0) is None and rest_of(30, 0.75) == pytest.approx(10)


def test_evaluation_is_reckoned_by_what_harvesting_took():
    assert evaluation_seconds(1000, {"harvested_tokens": 5000, "harvest_seconds": 10}, 2) == pytest.approx(2.0)


def test_rates_are_of_the_last_minute_and_survive_a_worker_that_starts_again():
    rates = Rates(60)
    for second in range(0, 200, 2):
        rates.note(second, {"slow": second * 1.0, "fast": second * 5.0 + (1000 if second > 150 else 0)})
    assert rates.rate("slow") == pytest.approx(1.0) and rates.rate("none") is None
    assert rates.rate("fast") > 5.0
    rates.note(200, {"slow": 10.0, "fast": 3000.0})  # from its checkpoint
    assert rates.rate("slow") is None and rates.rate("fast") is not None
    for second in range(202, 220, 2):
        rates.note(second, {"slow": 10.0 + (second - 200) * 2.0, "fast": 3000.0})
    assert rates.rate("slow") == pytest.approx(2.0)
    assert rates.total(["slow", "fast", "none"]) == pytest.approx(rates.rate("slow") + rates.rate("fast"))
    assert rates.total(["none"]) is None


def test_a_failure_is_closed_by_the_next_start_of_its_pack():
    failures = Failures(lambda: 7.0)
    assert failures.started("a", 0) is None and failures.started("b", 0) is None
    failures.note("the worker of pack a died (SIGKILL)", "it is started again", "a")
    failures.note("the worker of pack a died (SIGKILL)", "it is started again", "a")  # the trial saw it too
    assert failures.started("b", 8) == {
        "time": 7.0, "what": "the worker of pack b died", "done": "started again from step 8",
    }  # fmt: skip
    failures.started("a", 1200)
    assert [one["done"] for one in failures.latest] == ["started again from step 1,200", "started again from step 8"]
    failures.ended("a")
    assert failures.started("a", 9) is None and failures.total == 2


def test_the_latest_failures_are_kept_and_all_are_counted():
    failures = Failures()
    for number in range(REMEMBERED + 5):
        failures.note(f"block {number} is lost", "it is made again")
    assert failures.total == REMEMBERED + 5 and len(failures.latest) == REMEMBERED
    assert failures.latest[0]["what"] == "block 5 is lost"
