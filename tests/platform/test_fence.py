"""Who may write for a sweep, with real processes and files."""

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from penstock import fence as fences
from penstock.errors import SweepError
from penstock.fence import Fence, FencedError, Pulse, claim, release
from penstock.storage import Storage

FILE, BEAT = "sweeps/s/attempt.json", "sweeps/s/status.json"


@pytest.fixture
def storage(tmp_path):
    return Storage(tmp_path)


def take(storage):
    said = []
    return claim(storage, FILE, BEAT, said.append), said


def of_other_process(storage, source):
    """What another process prints that runs `source` on the storage."""
    code = f"from penstock.fence import *\nfrom penstock.storage import Storage\nstorage = Storage({storage.uri!r})\n"
    code += textwrap.dedent(source)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_later_driver_fences_the_earlier_one_off(storage):
    first, _ = take(storage)
    first.of("pack", 1).check()
    second, _ = take(storage)
    second.of("pack", 1).check()
    with pytest.raises(FencedError, match=f"attempt 2 .process {os.getpid()}"):
        first.of("pack", 1).check()


def test_the_later_run_of_a_pack_fences_the_earlier_one_off_and_no_other_pack(storage):
    fence, _ = take(storage)
    early, late, other = fence.of("pack", 1), fence.of("pack", 2), fence.of("other", 1)
    late.close_to_others()
    late.check()
    other.check()
    with pytest.raises(FencedError, match="a newer run of it has taken over"):
        early.check()


def test_a_driver_that_lives_keeps_the_sweep(storage, monkeypatch):
    monkeypatch.setattr(fences, "BEAT_SECONDS", 0.2)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(f"""
            import time
            from penstock import fence
            from penstock.storage import Storage
            fence.BEAT_SECONDS = 0.2
            storage = Storage({storage.uri!r})
            fence.claim(storage, {FILE!r}, {BEAT!r}, print)
            pulse = fence.Pulse(storage, {BEAT!r}, dict)
            print("beating", flush=True)
            time.sleep(60)
        """)], stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "beating\n"
        with pytest.raises(SweepError, match=f"running already: process {child.pid} on"):
            take(storage)
        assert storage.read_json(FILE)["pid"] == child.pid  # nothing was taken from it
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    fence, said = take(storage)  # a killed one is not waited for
    assert said == [] and storage.read_json(FILE)["attempt"] == 2
    fence.of("pack", 1).check()


def test_a_driver_of_another_machine_that_is_silent_is_taken_over_from(storage, monkeypatch):
    monkeypatch.setattr(fences, "SILENT_SECONDS", 0.5)
    take(storage)
    about = storage.read_json(FILE)
    storage.write_json(FILE, {**about, "machine": "elsewhere", "pid": 1})
    _, said = take(storage)
    assert "process 1 on elsewhere" in said[0]


def test_a_driver_that_has_ended_is_not_waited_for(storage):
    of_other_process(storage, f"release(claim(storage, {FILE!r}, {BEAT!r}, print))")
    about = storage.read_json(FILE)
    storage.write_json(FILE, {**about, "machine": "elsewhere"})
    assert take(storage)[1] == []


def test_a_driver_that_was_taken_over_from_does_not_end_its_successor(storage):
    first, _ = take(storage)
    take(storage)
    release(first)
    assert "ended" not in storage.read_json(FILE)


def test_a_pulse_says_how_things_stand_and_that_they_have_ended(storage, monkeypatch):
    monkeypatch.setattr(fences, "BEAT_SECONDS", 0.05)
    pulse = Pulse(storage, BEAT, lambda: {"phase": "train"})
    while not storage.exists(BEAT):
        pass
    assert storage.read_json(BEAT)["phase"] == "train"
    pulse.stop()
    assert storage.read_json(BEAT)["phase"] == "ended"


def test_a_driver_that_cannot_say_how_it_stands_is_not_taken_for_a_dead_one(storage, monkeypatch, capsys):
    monkeypatch.setattr(fences, "BEAT_SECONDS", 0.05)
    stands = [{"phase": "train"}]

    def standing():
        if stands:
            return stands.pop()
        raise RuntimeError("dictionary changed size during iteration")

    pulse = Pulse(storage, BEAT, standing)
    while stands or not storage.exists(BEAT):
        pass
    first = storage.read(BEAT)
    while storage.read(BEAT) == first:
        pass
    assert storage.read_json(BEAT)["phase"] == "train"
    pulse.stop()
    assert storage.read_json(BEAT)["phase"] == "ended"
    assert capsys.readouterr().err.count("Traceback") == 1  # it is said once


def test_a_fence_closed_while_a_folder_is_written_keeps_it_from_coming_about(storage):
    mine, _ = take(storage)
    pack = mine.of("pack", 1)
    calls = []

    def guard():
        calls.append(None)
        if len(calls) == 2:  # everything but the last step is done: another driver takes over
            take(storage)
        pack.check()

    with pytest.raises(FencedError):
        storage.commit_folder("saes/x/checkpoints/step-1", {"state": b"1"}, guard)
    assert not storage.exists("saes/x/checkpoints/step-1") and storage.names("staging") == []


def test_a_folder_that_is_there_is_not_written_over_by_one_that_was_overtaken(storage):
    storage.commit_folder("saes/x/final", {"weights": b"the newer one's"})
    before = storage.read_folder("saes/x/final")
    storage.commit_folder("saes/x/final", {"weights": b"the older one's"})
    assert storage.read_folder("saes/x/final") == before
    storage.write("saes/y/final/weights", b"ha")  # half a folder, of a writer that was killed
    storage.commit_folder("saes/y/final", {"weights": b"whole"})
    assert storage.read_folder("saes/y/final") == {"weights": b"whole"}


def test_fences_travel(storage):
    fence, _ = take(storage)
    same = pickle.loads(pickle.dumps(fence.of("pack", 3)))
    assert isinstance(same, Fence) and same.run == 3
    same.check()
