"""Stopping, resuming and reading the log of a sweep: by its storage, and through a dashboard."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest

from penstock.cli import main
from penstock.control import kept_spec
from penstock.errors import SpecError
from penstock.fence import Pulse
from penstock.home import Home, remember
from penstock.logs import SweepLog
from penstock.status import look, note_submitted, status_of
from penstock.stopping import StopOrder, SweepStopped, ask_to_stop
from penstock.storage import Storage
from penstock.sweep_files import logs_folder, spec_file, status_file, stop_file
from test_status import ID, standing

SPEC = """\
name: demo
model: {name: demo}
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 1M}
saes: [{architecture: topk, d_sae: 4x, k: 8}]
"""


@pytest.fixture
def home(tmp_path) -> Home:
    home = Home(tmp_path / "home")
    remember(home, "demo", ID, Storage(tmp_path / "bucket"))
    return home


@pytest.fixture
def storage(tmp_path) -> Storage:
    return Storage(tmp_path / "bucket")


@contextmanager
def driver(storage: Storage, order: StopOrder, outcome: dict):
    """A driver that reports, and ends when it is asked to."""
    report = standing()
    pulse = Pulse(storage, status_file(ID), lambda: report)
    over = threading.Event()

    def work():
        while not over.wait(0.05):
            if order.look():
                report["outcome"] = outcome
                pulse.stop("stopped")
                return

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        pulse.stop(pulse.last)


# ---- the driver's side ----------------------------------------------------------------------------------------------


def test_an_order_in_the_storage_is_found_and_one_of_an_earlier_attempt_is_not(storage, monkeypatch):
    monkeypatch.setattr("penstock.stopping.BEAT_SECONDS", 0.0)
    ask_to_stop(storage, ID)
    order = StopOrder()
    order.watch(storage, ID)
    order.check()
    storage.write(stop_file(ID), b"{half")
    order.check()  # it is read again in two seconds
    ask_to_stop(storage, ID)
    with pytest.raises(SweepStopped, match="the sweep was stopped: penstock stop, by .* on "):
        order.check()
    assert not order.now
    ask_to_stop(storage, ID, now=True)
    order.look()
    assert order.now


def in_a_process(code: str) -> subprocess.CompletedProcess:
    begin = "import os, signal, sys; from penstock.stopping import StopOrder, SweepStopped; order = StopOrder()\n"
    return subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, timeout=60, check=False)


def test_sigterm_waits_for_a_driver_that_trains_and_a_second_one_does_not(tmp_path):
    code = f"""
from penstock.storage import Storage
order.listen(); order.listen(); order.watch(Storage({str(tmp_path)!r}), 'x')
os.kill(os.getpid(), signal.SIGTERM)
print(order.asked, order.reason, flush=True)
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = in_a_process(code)
    assert done.stdout == "True SIGTERM\n" and "KeyboardInterrupt" in done.stderr


def test_the_first_sigterm_lets_a_driver_save_that_was_asked_otherwise_before(tmp_path):
    code = f"""
from penstock.stopping import ask_to_stop
from penstock.storage import Storage
storage = Storage({str(tmp_path)!r})
order.listen(); order.watch(storage, 'x')
ask_to_stop(storage, 'x')
print(order.look(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print(order.reason.split(',')[0], flush=True)
"""
    done = in_a_process(code)
    assert done.stdout == "True\npenstock stop\n" and done.returncode == 0


def test_sigterm_ends_a_driver_that_only_starts_at_once_and_the_handler_before_comes_back():
    done = in_a_process("""
order.listen()
try:
    os.kill(os.getpid(), signal.SIGTERM)
except SweepStopped as stopped:
    print(stopped)
order.close()
os.kill(os.getpid(), signal.SIGTERM)
""")
    assert done.stdout == "the sweep was stopped by SIGTERM before it had begun to train\n"
    assert done.returncode == -signal.SIGTERM


# ---- penstock stop --------------------------------------------------------------------------------------------------


def test_stopping_waits_until_all_is_saved_and_says_how_it_goes_on(home, storage, capsys):
    order = StopOrder()
    order.watch(storage, ID)
    outcome = {"status": "stopped", "exit_status": 3, "reason": "x", "left": "of 7 SAEs 2 done, 5 saved at step 8"}
    with driver(storage, order, outcome):
        time.sleep(0.2)
        assert main(["stop", "demo", "--home", str(home.path)]) == 0
    out = capsys.readouterr().out
    assert "asked to stop: every pack saves and ends" in out
    assert "stopped: of 7 SAEs 2 done, 5 saved at step 8\ngo on with: penstock resume demo\n" in out
    assert main(["stop", "demo", "--home", str(home.path)]) == 0
    assert "has ended already: stopped" in capsys.readouterr().out


def test_stopping_without_waiting_leaves_word_and_returns(home, storage, capsys):
    storage.write_json(status_file(ID), {"time": time.time(), **standing()})
    assert main(["stop", "demo", "--now", "--no-wait", "--home", str(home.path)]) == 0
    assert storage.read_json(stop_file(ID))["now"] is True and "ends without saving" in capsys.readouterr().out


def test_a_driver_that_has_just_died_is_not_waited_for(home, storage, capsys, monkeypatch):
    monkeypatch.setattr("penstock.control.SILENT_WAIT_SECONDS", 4.0)
    storage.write_json(status_file(ID), {"time": time.time() - 3.0, **standing()})
    began = time.monotonic()
    assert main(["stop", "demo", "--home", str(home.path)]) == 1
    assert time.monotonic() - began < 5
    silence = r"its driver \(process 4711 on the-driver\) has not been heard of for \d s; if it is dead: "
    assert re.search(silence + "penstock resume demo", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("report", "said"),
    [
        (None, "has not reported yet, and cannot be asked"),
        ({"time": time.time() - 600}, "has not been heard of .* nothing is left to stop, and penstock resume demo"),
    ],
)
def test_a_driver_that_is_not_there_cannot_be_asked(report, said, home, storage, capsys):
    if report is not None:
        storage.write_json(status_file(ID), {**standing(), **report})
    assert main(["stop", "demo", "--home", str(home.path)]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err), err
    assert not storage.exists(stop_file(ID))


# ---- penstock resume ------------------------------------------------------------------------------------------------


def test_a_sweep_is_gone_on_with_by_the_spec_that_is_kept_with_it(storage, tmp_path):
    storage.write(spec_file(ID), SPEC.encode())
    spec = kept_spec(storage, ID, "demo")
    assert spec.name == "demo" and spec.storage == storage.uri and spec.train.tokens == 1_000_000
    storage.write(spec_file(ID), b"name: demo\nsaes: 7\n")
    with pytest.raises(SpecError, match="the spec of sweep demo"):
        kept_spec(storage, ID, "demo")


@pytest.mark.parametrize(
    ("report", "published", "status", "said"),
    [
        ({}, False, 2, "sweep 'demo' is running: process 4711 on the-driver is at it; accepted: penstock stop demo"),
        ({"phase": "ended", "outcome": {"status": "finished", "exit_status": 0}}, True, 0, "has finished; what came"),
        ({"phase": "stopped", "outcome": {"status": "stopped", "left": "of 7 SAEs 2 done"}}, True, 2,
         "was stopped; of 7 SAEs 2 done"),
        ({"phase": "stopped", "outcome": {"status": "stopped", "left": "of 7 SAEs 2 done"}}, False, 2,
         "keeps no spec in storage .* accepted: penstock run SPEC"),
    ],
)  # fmt: skip
def test_what_runs_or_has_finished_is_not_gone_on_with(report, published, status, said, home, storage, capsys):
    storage.write_json(status_file(ID), {"time": time.time(), **standing(), **report})
    if published:
        storage.write_json(f"sweeps/{ID}/result.json", {})
    assert main(["resume", "demo", "--home", str(home.path)]) == status
    captured = capsys.readouterr()
    assert re.search(said, captured.out + captured.err), captured


def test_a_job_that_was_submitted_since_is_known_until_it_reports(home, storage, capsys):
    outcome = {"status": "stopped", "exit_status": 3, "reason": "x", "left": "of 7 SAEs 2 done"}
    stopped = {"time": time.time() - 5.0, **standing(phase="stopped", outcome=outcome)}
    storage.write_json(status_file(ID), stopped)
    note_submitted(storage, look(home, "demo"), "http://head:8265")
    assert main(["stop", "demo", "--home", str(home.path)]) == 2
    said = "a job that goes on with it was submitted 0 s ago and has not reported yet"
    assert f"{said}; accepted: penstock stop demo --address http://head:8265" in capsys.readouterr().err
    assert main(["status", "demo", "--home", str(home.path)]) == 0
    out = capsys.readouterr().out
    assert f"{said}\nask its cluster: penstock status demo --watch --address http://head:8265\n" in out
    assert "go on with" not in out
    found = look(home, "demo")
    assert status_of(found) is None  # --watch waits for it
    assert status_of(replace(found, seen=found.seen + 601)) == 1
    storage.write_json(status_file(ID), {**stopped, "time": time.time()})  # the job's own
    assert look(home, "demo").submitted is None and status_of(look(home, "demo")) == 3


# ---- penstock logs --------------------------------------------------------------------------------------------------


def test_the_log_is_shown_when_the_driver_is_gone(home, storage, capsys):
    assert main(["logs", "demo", "--home", str(home.path)]) == 0
    assert "has no log yet" in capsys.readouterr().out
    log = SweepLog(lambda: 0.0)
    log.open(storage, f"{logs_folder(ID)}/first", None)
    log.add("pack p is at its first step", pack="p", saes=["aa11"])
    log.add("evaluating")
    log.flush(now=True)
    assert main(["logs", ID, "--home", str(home.path)]) == 0
    assert capsys.readouterr().out == (
        "1970-01-01 00:00:00Z  pack p is at its first step\n1970-01-01 00:00:00Z  evaluating\n"
    )
    assert main(["logs", "demo", "--sae", "aa", "--home", str(home.path)]) == 0
    assert capsys.readouterr().out == "1970-01-01 00:00:00Z  pack p is at its first step\n"
    assert main(["logs", "demo", "--sae", "zz", "--home", str(home.path)]) == 2


# ---- from afar ------------------------------------------------------------------------------------------------------


@contextmanager
def cluster(files: dict[str, dict[str, str]], jobs: list[dict], posted: list[str], gone: Collection[str] = ()):
    """A dashboard of nodes with files in their log folders; it has not noticed yet that some are gone."""
    nodes = [{"node_id": name, "node_ip": f"10.0.0.{number}", "state": "ALIVE", "is_head_node": number == 0,
              "resources_total": {}, "labels": {}} for number, name in enumerate(files)]  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            parts = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(parts.query).items()}
            if query.get("node_id") in gone:
                self.send_error(500)
                return
            answer = {
                "/api/version": lambda: {"ray_version": "2.60.0", "version": "4", "ray_commit": "x"},
                "/api/v0/nodes": lambda: {"data": {"result": {"result": nodes}}},
                "/api/v0/jobs": lambda: {"data": {"result": {"result": jobs}}},
                "/api/v0/logs": lambda: {"data": {"result": {"internal": sorted(files[query["node_id"]])}}},
                "/api/v0/logs/file": lambda: files[query["node_id"]].get(query["filename"], ""),
            }[parts.path]()
            self.answer(answer if isinstance(answer, str) else json.dumps(answer))

        def do_POST(self):
            posted.append(self.path)
            self.answer(json.dumps({"stopped": True}))

        def answer(self, text):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def reported(**changes) -> str:
    return json.dumps({"time": time.time(), **standing(**changes)})


def test_sweeps_of_a_cluster_are_found_on_the_nodes_of_their_drivers(tmp_path, capsys):
    line = json.dumps({"time": 0.0, "text": "said"})
    other = "f" * 12
    files = {
        "head": {f"penstock-{ID}.json": reported(started=1.0)},
        "worker": {f"penstock-{other}.json": reported(sweep_id=other, phase="evaluate"),
                   f"penstock-{other}-log.jsonl": line, "penstock-odd.json": "{half"},
        "far": {"penstock-unseen.json": reported(name="unseen", sweep_id="unseen")},
    }  # fmt: skip
    jobs = [{"type": "DRIVER", "driver_info": {"node_ip_address": "10.0.0.1"}, "status": "RUNNING", "start_time": 5}]
    nowhere = ["--home", str(tmp_path / "none")]
    with cluster(files, jobs, []) as address:
        assert main(["status", "--address", address, *nowhere]) == 0
        out = capsys.readouterr().out
        assert ID in out and other in out and "unseen" not in out
        assert main(["status", "demo", "--address", address, *nowhere]) == 0  # the latest of that name
        assert f"sweep demo ({other})" in (out := capsys.readouterr().out) and "phase evaluate" in out
        assert main(["logs", "demo", "--address", address, *nowhere]) == 0
        assert capsys.readouterr().out == "1970-01-01 00:00:00Z  said\n"
        assert main(["status", "nope", "--address", address, *nowhere]) == 2
        assert "no sweep 'nope' has reported on the cluster" in capsys.readouterr().err


def test_a_node_that_is_gone_hides_no_sweep_of_another_one(tmp_path, capsys):
    files = {"head": {f"penstock-{ID}.json": reported()}, "worker": {}}
    jobs = [{"type": "DRIVER", "driver_info": {"node_ip_address": "10.0.0.1"}, "status": "RUNNING", "start_time": 5}]
    with cluster(files, jobs, [], gone=["worker"]) as address:
        assert main(["status", "demo", "--address", address, "--home", str(tmp_path)]) == 0
    assert f"sweep demo ({ID})" in capsys.readouterr().out
    with cluster(files, jobs, [], gone=files) as address:
        assert main(["status", "demo", "--address", address, "--home", str(tmp_path)]) == 2
    assert "/api/v0/logs was answered with 500" in capsys.readouterr().err


def test_a_job_that_waits_for_its_checkpoints_is_stopped_by_ray(tmp_path, capsys):
    running = reported(job="raysubmit_1", job_stop_seconds=660.0)
    posted: list[str] = []
    with cluster({"head": {f"penstock-{ID}.json": running}}, [], posted) as address:
        assert main(["stop", "demo", "--no-wait", "--address", address, "--home", str(tmp_path)]) == 0
    assert posted == ["/api/jobs/raysubmit_1/stop"]


def test_a_job_that_has_not_begun_to_train_is_stopped_by_ray(tmp_path, capsys):
    jobs = [
        {"submission_id": name, "status": status, "start_time": start, "metadata": {"sweep": "demo"}}
        for name, status, start in (("old", "SUCCEEDED", 1), ("new", "RUNNING", 2))
    ]
    posted: list[str] = []
    ended = reported(phase="ended", outcome={"status": "finished", "exit_status": 0})
    with cluster({"head": {f"penstock-{ID}.json": ended}}, jobs, posted) as address:
        assert main(["stop", "demo", "--address", address, "--home", str(tmp_path)]) == 0
    assert posted == ["/api/jobs/new/stop"] and "before it had begun to train" in capsys.readouterr().out
