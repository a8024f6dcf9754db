"""The order to stop, without Ray: which packs are started again, and which are not."""

import pytest

from penstock.trial import STOP, YIELD, _death, pack_queue

KILLED = """The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail:
Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: ..."""


class WorkerGroupError(Exception):
    def __init__(self, *causes):
        self.worker_failures = dict(enumerate(causes))


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (WorkerGroupError(RuntimeError(KILLED)), "its process was killed, or crashed"),
        (RuntimeError("The actor died because its node has died. Node Id: 12"), "its node died"),
        (RuntimeError("Task was killed due to the node running low on memory."), "the node ran out of memory"),
        (WorkerGroupError(ValueError("Traceback\n  in f\nValueError: so it is\n")), "ValueError: so it is"),
        (KeyError(), "KeyError"),
    ],
)
def test_what_a_worker_died_of_is_said_shortly(error, cause):
    assert _death("p", error)["what"] == f"the worker of pack p died ({cause})"


def test_a_pack_that_yields_is_queued_again_and_one_that_is_stopped_is_not():
    from ray.tune.search import Searcher

    queue = pack_queue([("a", ("1", "2")), ("b", ("3",))])
    assert queue.suggest("t1") == {"pack": "a", "saes": ("1", "2")}
    assert queue.suggest("t2") == {"pack": "b", "saes": ("3",)}
    queue.on_trial_complete("t1", {"halted": YIELD})
    assert queue.suggest("t3") == {"pack": "a", "saes": ("1", "2")}
    queue.on_trial_complete("t2", {"halted": STOP})
    assert queue.suggest("t4") is None  # the last one still runs: it may be split
    queue.on_trial_complete("t3", {"split": ["1", "2"]})
    assert queue.suggest("t5") == {"pack": "a", "saes": ("1",)}
    queue.on_trial_complete("t5", {"halted": YIELD})
    assert [queue.suggest(name)["saes"] for name in ("t6", "t7")] == [("2",), ("1",)]
    for name in ("t6", "t7"):
        queue.on_trial_complete(name, {})
    assert queue.suggest("t8") == Searcher.FINISHED
