"""What a driver has said: kept in files that are never appended to, and found again by SAE."""

import json
import threading
from types import SimpleNamespace

import pytest

from penstock.chronicle import Chronicle
from penstock.errors import SweepError
from penstock.eta import START_SECONDS
from penstock.logs import CHUNK_BYTES, SweepLog, about_sae, as_text, find_sae, parse_lines, read_log
from penstock.storage import Storage
from penstock.sweep_files import logs_folder

ID = "0123456789ab"
SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


def test_a_log_is_kept_whole_in_files_of_which_only_the_last_is_written_again(tmp_path):
    storage, local = Storage(tmp_path / "storage"), tmp_path / "session.jsonl"
    log = SweepLog(lambda: 1.5)
    log.add("before anybody knows where it goes")
    log.flush(now=True)
    log.open(storage, f"{logs_folder(ID)}/first", local)
    for number in range(30):
        log.add(f"line {number} " + "x" * (CHUNK_BYTES // 8))
        log.flush(now=True)
    log.flush(now=True)
    files = storage.names(f"{logs_folder(ID)}/first")
    assert len(files) == 4 and files == sorted(files)
    written = (tmp_path / "storage" / logs_folder(ID) / "first" / files[0]).stat().st_size
    assert CHUNK_BYTES <= written < CHUNK_BYTES * 1.3
    second = SweepLog(lambda: 2.5)
    second.open(storage, f"{logs_folder(ID)}/second", local)
    second.add("another attempt")
    second.flush(now=True)
    texts = [line["text"].split(" x")[0] for line in read_log(storage, ID)]
    assert texts == ["before anybody knows where it goes", *(f"line {n}" for n in range(30)), "another attempt"]
    assert [line["text"] for line in parse_lines(local.read_text())] == [line["text"] for line in read_log(storage, ID)]


def test_a_follower_reads_only_what_is_new(tmp_path):
    storage, known = Storage(tmp_path), {}
    log = SweepLog()
    log.open(storage, f"{logs_folder(ID)}/first", None)
    log.add("x" * CHUNK_BYTES)
    log.flush(now=True)
    log.add("one")
    log.flush(now=True)
    assert len(read_log(storage, ID, known)) == 2
    first = next(iter(known))
    (tmp_path / first).write_text("")  # it is not read again
    log.add("two")
    log.flush(now=True)
    assert [line["text"] for line in read_log(storage, ID, known)][1:] == ["one", "two"]


def test_a_follower_misses_nothing_of_a_file_that_was_filled_since_it_looked(tmp_path):
    storage, known = Storage(tmp_path), {}
    log = SweepLog()
    log.open(storage, f"{logs_folder(ID)}/first", None)
    log.add("one")
    log.flush(now=True)
    assert [line["text"] for line in read_log(storage, ID, known)] == ["one"]
    log.add("x" * CHUNK_BYTES)
    log.flush(now=True)
    log.add("two")
    log.flush(now=True)
    assert [line["text"][:3] for line in read_log(storage, ID, known)] == ["one", "xxx", "two"]


def test_who_adds_a_line_does_not_wait_for_a_slow_storage(tmp_path):
    begun, free = threading.Event(), threading.Event()

    class Slow(Storage):
        def write(self, name, data):
            begun.set()
            assert free.wait(30)
            super().write(name, data)

    storage, log = Slow(tmp_path), SweepLog()
    log.open(storage, f"{logs_folder(ID)}/first", None)
    log.add("one")
    writing = threading.Thread(target=lambda: log.flush(now=True))
    writing.start()
    assert begun.wait(30)
    adding = threading.Thread(target=lambda: log.add("two"))
    adding.start()
    adding.join(10)
    waited = adding.is_alive()
    free.set()
    writing.join()
    adding.join()
    assert not waited
    log.flush(now=True)
    assert [line["text"] for line in read_log(storage, ID)] == ["one", "two"]


def test_no_secret_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    storage, log = Storage(tmp_path), SweepLog()
    log.open(storage, f"{logs_folder(ID)}/first", None)
    log.add(f"cannot write with {SECRET}", detail=f"Traceback\nOSError: key {SECRET}, postgresql://me:hush@host/db")
    log.flush(now=True)
    [path] = tmp_path.rglob("*.jsonl")
    assert SECRET not in path.read_text() and "hush" not in path.read_text() and "***" in path.read_text()


def test_a_line_that_is_half_written_is_left_for_the_next_time():
    whole = json.dumps({"time": 1.0, "text": "whole"})
    assert [line["text"] for line in parse_lines(f"{whole}\n{whole[:10]}")] == ["whole"]
    assert parse_lines('[1]\nnull\n{"text": "no time"}\n') == []


def test_a_lines_time_is_utc_and_its_detail_stands_below():
    line = {"time": 0.0, "text": "the plan\n  of it", "detail": "Traceback\nValueError: x\n"}
    assert as_text(line) == (
        "1970-01-01 00:00:00Z  the plan\n      of it\n    Traceback\n    ValueError: x"
    )  # fmt: skip


@pytest.fixture
def lines():
    """A pack of two SAEs: one diverges, the worker dies, the other is saved and finished."""
    chronicle = Chronicle()
    log = chronicle.log
    chronicle.heed({"kind": "started", "pack_id": "p", "sae_ids": ["aa11", "ab22"], "step": 0})
    for tokens in (100, 200, 300, 400):
        chronicle.heed({"kind": "metrics", "sae_id": "aa11", "tokens": tokens, "metrics": {"loss": tokens / 7}})
    chronicle.heed({"kind": "stopped", "pack_id": "p", "sae_id": "aa11", "status": "diverged", "reason": "too far"})
    chronicle.heed({"kind": "saved", "pack_id": "p", "saes": {"ab22": 1200}})
    what = "the worker of pack p died (SIGKILL)"
    death = {"kind": "failure", "pack_id": "p", "what": what, "done": "it is started again"}
    chronicle.heed({**death, "detail": "Traceback\nKilled"})
    chronicle.heed({"kind": "started", "pack_id": "p", "sae_ids": ["ab22"], "step": 1200})
    chronicle.heed({"kind": "started", "pack_id": "q", "sae_ids": ["cc33"], "step": 0})
    chronicle.heed({"kind": "finished", "pack_id": "p", "sae_id": "ab22"})
    log.add("evaluating")
    return [json.loads(line) for line in log._new], chronicle


def test_what_concerns_an_sae_is_its_own_lines_and_its_packs(lines):
    found, chronicle = lines
    of_ab = [line["text"] for line in about_sae(found, "ab22")]
    assert of_ab == [
        "pack p is at its first step",
        "pack p: 1 SAE saved at step 1,200",
        "the worker of pack p died (SIGKILL): it is started again",
        "pack p is at step 1,200 after: the worker of pack p died (SIGKILL)",
        "SAE ab22 finished",
    ]
    of_aa = about_sae(found, "aa11")
    assert [line["text"] for line in of_aa] == [
        "pack p is at its first step",
        "SAE aa11 diverged: too far",
        "the worker of pack p died (SIGKILL): it is started again",
    ]
    assert of_aa[1]["detail"] == "200 tokens: loss 28.57\n300 tokens: loss 42.86\n400 tokens: loss 57.14"
    assert [(one["what"], one["done"]) for one in chronicle.failures.latest] == [
        ("SAE aa11 diverged: too far", "it is stopped, the rest of its pack goes on"),
        ("the worker of pack p died (SIGKILL)", "started again from step 1,200"),
    ]


def test_an_sae_is_named_by_the_beginning_of_its_id(lines):
    found, _ = lines
    assert find_sae(found, "ab") == "ab22" and find_sae(found, "cc33") == "cc33"
    with pytest.raises(SweepError, match="'a' is the beginning of 2 ids: aa11, ab22; accepted: a longer one"):
        find_sae(found, "a")
    with pytest.raises(SweepError, match="names no SAE whose id begins so; there is: aa11, ab22, cc33"):
        find_sae(found, "x")


def test_the_estimate_counts_what_packs_that_wait_have_made_before(tmp_path):
    saes = [SimpleNamespace(sae_id=name) for name in ("a", "b", "c")]
    packs = [SimpleNamespace(pack_id=name, saes=of, hook_point="h") for name, of in (("p", saes[:2]), ("q", saes[2:]))]
    chronicle = Chronicle()
    chronicle.open(Storage(tmp_path), "id", "attempt", packs, {"a": 60, "b": 50, "c": 90})
    stream = {"packs": {"p": {"status": "live", "step": 50, "trained_tokens": 0}, "q": {"status": "expected"}}}
    for second in (0, 10):
        stream["packs"]["p"]["step"] = 50 + second
        chronicle.note(float(second), stream, {})
    about = {"steps": 100, "batch_tokens": 10, "slots": 1, "ended": {}, "evaluation_tokens": 0.0}
    found = chronicle.report("train", 10.0, stream, {}, **about)["eta_seconds"]
    assert found == pytest.approx(40 + START_SECONDS + 10 / 2)  # one step of 2 SAEs a second, and 10 of one SAE left


def test_a_failure_that_a_worker_lived_through_is_not_what_it_died_of():
    chronicle = Chronicle()
    chronicle.heed({"kind": "started", "pack_id": "p", "sae_ids": ["a"], "step": 0})
    done = "the step is made again"
    lived = {"kind": "failure", "pack_id": "p", "what": "a step ran out of memory", "done": done, "worker_lives": True}
    chronicle.heed(lived)
    chronicle.heed({"kind": "started", "pack_id": "p", "sae_ids": ["a"], "step": 7})
    assert [(one["what"], one["done"]) for one in chronicle.failures.latest] == [
        ("a step ran out of memory", "the step is made again"),
        ("the worker of pack p died", "started again from step 7"),
    ]


def test_a_pack_that_has_yielded_still_counts_for_the_estimate():
    chronicle, cost = Chronicle(), {"harvested_tokens": 1000.0, "harvest_seconds": 10.0}
    for pack in ("p", "q"):
        chronicle.heed({"kind": "started", "pack_id": pack, "sae_ids": [pack], "step": 0})

    def eta(status):
        stream = {"packs": {"p": {"status": "live", "step": 10, "trained_tokens": 100},
                            "q": {"status": status, "step": 10, "trained_tokens": 100}}}  # fmt: skip
        for second in (0, 10):
            stream["packs"]["p"]["step"] = second
            chronicle.note(float(second), stream, cost)
        about = {"steps": 100, "batch_tokens": 10, "slots": 1, "ended": {}, "evaluation_tokens": 0.0}
        return chronicle.report("train", 30.0, stream, cost, **about)["eta_seconds"]

    alone = eta("done")
    chronicle.heed({"kind": "halted", "pack_id": "q", "why": "yield", "step": 10})
    assert alone == pytest.approx(90) and eta("done") > 90 + 90


def test_the_estimate_falls_while_packs_train_and_while_an_evaluation_runs():
    chronicle = Chronicle()
    chronicle.heed({"kind": "started", "pack_id": "p", "sae_ids": ["a", "b"], "step": 0})
    about = {"steps": 100, "batch_tokens": 10, "slots": 1, "ended": {}, "evaluation_tokens": 100.0}
    cost = {"harvested_tokens": 1000.0, "harvest_seconds": 10.0}

    def report(second, phase="train"):
        pack = {"status": "live", "step": second, "trained_tokens": second * 20}
        stream = {"packs": {"p": pack}, "hosts": {"h": "idle"}}
        chronicle.note(float(second), stream, cost)
        return chronicle.report(phase, 30.0, stream, cost, **about)

    assert report(0)["eta_seconds"] is None  # nobody can tell yet
    first, later = report(10), report(60)
    assert first["eta_seconds"] == pytest.approx(90 + 2) and later["eta_seconds"] == pytest.approx(40 + 2)
    assert later["rates"]["sae_tokens_per_second"] == pytest.approx(20)
    assert later["rates"]["packs"] == {"p": pytest.approx(10)}
    assert report(100, "evaluate")["eta_seconds"] is None
    chronicle.evaluated = 0.75
    assert report(100, "evaluate")["eta_seconds"] == pytest.approx(10)
