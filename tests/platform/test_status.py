import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from penstock.cli import main
from penstock.control import ask_for_hosts
from penstock.errors import SweepError
from penstock.fence import Pulse
from penstock.home import Home, remember
from penstock.status import (
    Standing,
    describe,
    describe_all,
    look,
    show,
    status_of,
)
from penstock.storage import Storage
from penstock.stream import Stream
from penstock.stream_state import StreamState
from penstock.sweep_files import control_file, status_file

ID = "0123456789ab"
EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture
def home(tmp_path) -> Home:
    """A home with a sweep whose state is kept elsewhere, by URI."""
    home, storage = Home(tmp_path / "home"), Storage(f"file://{tmp_path}/bucket")
    remember(home, "demo", ID, storage)
    return home


def storage_of(home: Home) -> Storage:
    return Storage(f"file://{home.path.parent}/bucket")


def stream_status() -> dict:
    """Two packs and three hosts after the first block: one host works, one is idle, one could not be built."""
    state = StreamState(n_blocks=40, window=4)
    stream = Stream(state, clock=lambda: 100.0)
    state.expect({"pack-early": (EARLY,), "pack-late": (LATE,)}, 0, {})
    for pack_id, array in (("pack-early", EARLY), ("pack-late", LATE)):
        state.attach(pack_id, (array,), 0, 100.0)
    stream.hosts = dict.fromkeys(["host-a", "host-b", "host-c", "host-d"])
    state.host_up("host-a")
    work = state.next_work()
    state.produced(work, {EARLY: b"", LATE: b""})
    assert state.next_work().block == 1
    state.host_up("host-b")
    stream.broken = {"host-c": "the model cannot be read"}
    state.acknowledge("pack-early", 0, 100.0)
    stream.consumed["pack-early"] = {"wait_seconds": 20.0, "spool_reads": 3, "step": 8, "trained_tokens": 4096}
    return stream.status()


def standing(**changes) -> dict:
    """What the driver says of itself; see `Driver._standing`."""
    return {
        "name": "demo", "sweep_id": ID, "phase": "train", "started": time.time() - 200.0, "pid": 4711,
        "machine": "the-driver", "saes": 8, "left": 6, "tokens": 1_000_000,
        "tokens_at": {EARLY: [500_000, 250_000], LATE: [0, 0, 0], "blocks.2.hook_mlp_out": []},
        "packs": {"pack-early": [EARLY, 2], "pack-late": [LATE, 3]}, "sae_tokens_per_second": 3750.4,
        "stopped": {"diverged": 1}, "eta_seconds": 7500.0, "share": {"slots": 2, "sweeps": ["a", "b", "c"]},
        "rates": {"seconds": 60.0, "sae_tokens_per_second": 5000.0, "harvested_tokens_per_second": 900.0,
                  "packs": {"pack-early": 2500.0, "pack-late": None}},
        "failures": [{"time": 7.0, "what": "the worker of pack-early died (SIGKILL)",
                      "done": "started again from step 8"}],
        "failures_total": 1, "stopping": False, "outcome": {}, "home": "/h", "storage": "/h", "folder": "/",
        "job": None, "job_stop_seconds": 0.0,
        "cost": {"blocks_made": 1, "blocks_remade": 2, "blocks_lost": 3, "spool_hits": 4, "forward_passes": 1234,
                 "harvested_tokens": 65536}, "stream": stream_status(),
    } | changes  # fmt: skip


@contextmanager
def pulse(home: Home, **changes):
    """A driver's pulse, beating; the report as it goes out next may be changed."""
    report = standing(**changes)
    beating = Pulse(storage_of(home), status_file(ID), lambda: report)
    try:
        until(lambda: storage_of(home).exists(status_file(ID)))
        yield report
    finally:
        beating.stop()


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def grow_old(home: Home, seconds: float, **changes) -> None:
    """Leave the report of a driver that was killed some time ago."""
    storage_of(home).write_json(status_file(ID), {"time": time.time() - seconds, **standing(**changes)})


def test_the_report_of_a_running_sweep_is_told_in_full(home, capsys):
    with pulse(home):
        for name in ("demo", ID):
            assert main(["status", name, "--home", str(home.path)]) == 0
            out = capsys.readouterr().out
            assert f"sweep demo ({ID}): 8 SAEs, 2 of them done before\n" in out
            assert re.search(r"^phase train, 3 min 2\d s after its start; reported [0-4] s ago$", out, re.MULTILINE)
    assert f"{EARLY}  [#########...............]  37%  2 SAEs\n" in out
    assert f"{LATE}  [........................]   0%  3 SAEs\n" in out
    assert "blocks.2.hook_mlp_out     nothing left to train\n" in out
    assert "SAEs   2 training, 3 not begun, 2 done before, 1 diverged\n" in out
    assert "tokens 1,000,000 an SAE; 5,000 SAE-tokens/s lately (3,750 on average), 900 harvested\n" in out
    assert "\nshare  2 packs at once, beside 3 other sweeps on the cluster\n" in out
    assert "\nabout 2 h 5 min left, evaluation included\n" in out
    assert "hosts  host-a  working on block 1\n       host-b  idle\n" in out
    assert "       host-c  broken: the model cannot be read\n       host-d  starting\n" in out
    assert "window 1 of 4 blocks in the object store (1 arrays)" in out
    rows = [re.split(r"\s{2,}", line) for line in out.splitlines() if line.startswith("pack")]
    assert rows == [
        ["pack", "hook point", "SAEs", "status", "block", "lag", "waits", "tok/s"],
        ["pack-early", EARLY, "2", "live", "1/40", "0", "10%", "2,500"],
        ["pack-late", LATE, "3", "live", "0/40", "1", "0%", "-"],
    ]
    assert "failures  1 so far:\n  00:00:07Z  the worker of pack-early died (SIGKILL)\n" in out
    assert "             -> started again from step 8\n" in out
    assert "cost   1 blocks made, 2 made again, 3 lost; 4 spool hits\n" in out
    assert "1,234 forward passes, 65,536 tokens harvested" in out


def test_a_driver_that_reports_before_its_stream_does_is_shown_too(home, capsys):
    with pulse(home, stream={}, cost={}, phase="start", tokens_at={EARLY: [0]}):
        assert main(["status", "demo", "--home", str(home.path)]) == 0
    out = capsys.readouterr().out
    assert "phase start" in out and EARLY in out and "hosts" not in out and "cost" not in out


def test_a_silent_driver_is_named(home, capsys):
    grow_old(home, 42.0)
    assert main(["status", "demo", "--home", str(home.path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"its driver \(process 4711 on the-driver\) has not been heard of for 4[2-5] s", out)
    assert main(["status", "demo", "--json", "--home", str(home.path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["silent"] and 42 <= found["age_seconds"] < 60 and found["phase"] == "train" and found["pid"] == 4711


def test_one_report_short_of_silence_says_nothing_of_it(home):
    grow_old(home, 8.0)
    assert "not been heard of" not in describe(look(home, "demo"))


def test_waiting_is_measured_between_two_reports(home):
    grow_old(home, 6.0)
    before = look(home, "demo")
    report = standing()
    report["stream"]["packs"]["pack-early"]["wait_seconds"] = 21.5
    report["stream"]["packs"]["pack-late"]["wait_seconds"] = 6.0
    report["stream"]["packs"]["half-a-pack"] = {"status": "live", "block": 0, "lag": 1, "wait_seconds": 3.0}
    storage_of(home).write_json(status_file(ID), {"time": before.report["time"] + 6.0, **report})
    text = describe(look(home, "demo"), before)
    rows = [re.split(r"\s{2,}", line) for line in text.splitlines() if "  live  " in line]
    assert [(row[0], row[6]) for row in rows] == [
        ("pack-early", "25%"), ("pack-late", "100%"), ("half-a-pack", "50%"),
    ]  # fmt: skip
    assert rows[2][1:3] == ["half of a pack", "-"]


def test_a_pack_that_starts_again_counts_its_waiting_from_zero(home):
    grow_old(home, 6.0)
    before = look(home, "demo")
    report = standing()
    report["stream"]["packs"]["pack-early"]["wait_seconds"] = 3.0
    storage_of(home).write_json(status_file(ID), {"time": before.report["time"] + 6.0, **report})
    assert re.search(r"pack-early .* 50%", describe(look(home, "demo"), before))


def test_following_ends_when_the_sweep_does(home, capsys, monkeypatch):
    monkeypatch.setattr("penstock.status.BEAT_SECONDS", 0.1)
    with pulse(home):
        follower = threading.Thread(target=show, args=(home, "demo"), kwargs={"follow": True}, daemon=True)
        follower.start()
        time.sleep(0.5)
        assert follower.is_alive()
    follower.join(10)  # the pulse's last beat says that it has ended
    assert not follower.is_alive()
    blocks = capsys.readouterr().out.split(f"\nsweep demo ({ID})")
    assert len(blocks) >= 3 and all(block.endswith("\n") for block in blocks)  # a blank line apart
    assert "\x1b" not in "".join(blocks)
    assert "phase train" in blocks[-2] and re.search(r"\nended \d s ago, after 3 min 2", blocks[-1])
    assert "it has no results yet: penstock resume demo goes on where it stands" in blocks[-1]


def test_following_as_json_is_an_object_a_line(home, capsys, monkeypatch):
    monkeypatch.setattr("penstock.status.BEAT_SECONDS", 0.1)
    with pulse(home):
        follower = threading.Thread(
            target=show, args=(home, "demo"), kwargs={"follow": True, "as_json": True}, daemon=True
        )
        follower.start()
        time.sleep(0.3)
    follower.join(10)
    phases = [json.loads(line)["phase"] for line in capsys.readouterr().out.splitlines()]
    assert set(phases[:-1]) == {"train"} and phases[-1] == "ended"


def on_a_terminal(home: Home, size: tuple[int, int], end) -> tuple[int, str]:
    """(exit status, what a terminal of so many rows and columns got) of `penstock status demo --follow`."""
    import fcntl
    import pty
    import select
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "penstock.cli", "status", "demo", "--follow", "--home", str(home.path)]
    # Tests that were started in the background ignore Ctrl-C, and what they start would too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment)
    signal.signal(signal.SIGINT, before)
    os.close(theirs)
    got = b""
    try:
        while True:
            assert select.select([ours], [], [], 60)[0], got
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            if not got:
                end(process)
            got += chunk
        return process.wait(30), got.decode()
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def plain(line: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[\d+m", "", line)


def test_a_terminal_is_redrawn_in_place_and_never_scrolls(home):
    with pulse(home) as report:
        status, got = on_a_terminal(home, (12, 50), lambda process: report.update(phase="ended"))
    first, *_, last = got.split("\x1b[H")[1:]
    lines = first.replace("\x1b[K", "").removesuffix("\x1b[J").split("\r\n")
    assert len(lines) == 12 and max(map(len, map(plain, lines))) == 50  # the cursor ends on the twelfth
    assert status == 1  # it has ended without a word on what it has come to
    assert "\x1b[1msweep demo" in first
    assert got.count("\x1b[2J") == 1
    assert "spool hits" in last and "ended" in last  # the last one is whole


def test_ctrl_c_ends_following_with_130(home):
    with pulse(home):
        status, got = on_a_terminal(home, (40, 150), lambda process: process.send_signal(signal.SIGINT))
    assert status == 130 and "phase train" in got and "Traceback" not in got


def test_a_finished_sweep_without_a_report_says_so(home, capsys):
    assert main(["status", "demo", "--home", str(home.path)]) == 0
    assert "has not reported yet" in capsys.readouterr().out
    storage_of(home).write_json(f"sweeps/{ID}/result.json", {})
    assert main(["status", "demo", "--follow", "--home", str(home.path)]) == 0
    out = capsys.readouterr().out
    assert "has finished and left no report" in out and "penstock front demo" in out
    assert main(["status", "demo", "--json", "--home", str(home.path)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "sweep_id": ID, "phase": None, "published": True, "age_seconds": 0.0, "silent": False,
    }  # fmt: skip


def test_a_sweep_that_ended_with_results_names_its_front(home):
    grow_old(home, 7300.0, phase="ended")
    storage_of(home).write_json(f"sweeps/{ID}/result.json", {})
    text = describe(look(home, "demo"))
    assert "ended 2 h 1 min ago" in text and "penstock front demo" in text and "not been heard of" not in text


@pytest.mark.parametrize("arguments", [["status", "other"], ["scale", "other", "--model-hosts", "2"]])
def test_an_unknown_sweep_is_refused(home, arguments, capsys):
    assert main([*arguments, "--home", str(home.path)]) == 2
    assert "no sweep 'other' was started from home" in capsys.readouterr().err


def test_scaling_asks_the_driver_and_says_what_comes(home, capsys):
    with pulse(home):
        assert main(["scale", "demo", "--model-hosts", "6", "--home", str(home.path)]) == 0
    assert storage_of(home).read_json(control_file(ID)) == {"model_hosts": 6}
    out = capsys.readouterr().out
    assert "6 model host(s) asked for, 4 there now" in out and "penstock status demo --watch" in out


@pytest.mark.parametrize(
    ("seconds", "phase", "message"),
    [
        (0.0, "ended", "it has ended"),
        (0.0, "evaluate", "it is evaluating already"),
        (11.0, "train", r"its driver \(process 4711 on the-driver\) has not been heard of for 1\d s"),
    ],
)
def test_a_sweep_that_is_not_training_cannot_be_scaled(home, seconds, phase, message):
    grow_old(home, seconds, phase=phase)
    with pytest.raises(SweepError, match=f"sweep 'demo' cannot be scaled: {message}.*; accepted: a sweep that is"):
        ask_for_hosts(home, "demo", 2)
    assert not storage_of(home).exists(control_file(ID))


def test_a_sweep_that_has_not_reported_cannot_be_scaled(home):
    with pytest.raises(SweepError, match="it has not reported yet"):
        ask_for_hosts(home, "demo", 2)


@pytest.mark.parametrize("count", ["0", "-1", "1.5", "two"])
def test_a_number_of_hosts_that_is_none_is_refused(home, count, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["scale", "demo", f"--model-hosts={count}"])
    assert exit_.value.code == 2 and "whole number of 1 or more" in capsys.readouterr().err


def test_the_status_needs_neither_ray_nor_mlflow_nor_torch(home):
    grow_old(home, 1.0)
    code = (
        "import sys; from penstock.cli import main; status = main(sys.argv[1:]); "
        "print([name for name in ('ray', 'mlflow', 'torch') if name in sys.modules]); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "status", "demo", "--home", str(home.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_everything_fits_eighty_columns():
    long = standing(packs={"pack-early": ["blocks.31.attn.hook_result_of_a_long_name", 128], "pack-late": [LATE, 3]})
    table = describe(Standing("demo", ID, time.time(), {"time": time.time(), **long})).split("\n\n")[3]
    assert table.startswith("pack ") and "blocks.31.at.." in table
    assert max(map(len, table.splitlines())) <= 80
    every = [Standing("a-name-of-a-sweep-that-is-long", ID, time.time(), {"time": time.time(), **long})]
    assert max(map(len, describe_all(every).splitlines())) <= 80


def ended(outcome: dict, phase: str = "ended", published: bool = False) -> Standing:
    return Standing("demo", ID, 100.0, {"time": 90.0, **standing(phase=phase, outcome=outcome)}, published)


@pytest.mark.parametrize(
    ("one", "status", "said"),
    [
        (ended({"status": "finished", "exit_status": 0}, published=True), 0, "what came out: penstock front demo"),
        (ended({"status": "failed", "exit_status": 1}), 1, "some SAEs failed: .*penstock resume demo tries them again"),
        (ended({"status": "failed", "exit_status": 2, "reason": "SweepError: no host is left"}), 2,
         "failed: SweepError: no host is left\nit has no results yet: penstock resume demo"),
        (ended({"status": "stopped", "exit_status": 3, "reason": "the sweep was stopped: SIGTERM",
                "left": "of 7 SAEs 2 done, 5 saved at step 8 of 100"}, "stopped"), 3,
         "stopped: the sweep was stopped: SIGTERM\nof 7 SAEs 2 done, 5 saved at step 8 of 100; go on with: penstock"),
        (ended({}), 1, "it has no results yet"),
        (Standing("demo", ID, 500.0, {"time": 90.0, **standing()}), 1, "if it is dead: penstock resume demo"),
        (Standing("demo", ID, 100.0, {"time": 90.0, **standing()}), None, "phase train"),
        (Standing("demo", ID, 100.0, {"time": 99.0, **standing(stopping=True)}), None, "stopping: every pack saves"),
    ],
)  # fmt: skip
def test_an_outcome_is_told_and_is_the_exit_status_of_watching(one, status, said):
    assert status_of(one) == status
    assert re.search(said, describe(one))


def test_without_a_name_all_sweeps_are_shown_those_that_run_first(home, capsys, tmp_path):
    grow_old(home, 8000.0, phase="stopped", outcome={"status": "stopped", "exit_status": 3})
    for number, name in enumerate(["young", "lost", "silent"]):
        sweep_id = f"{number}" * 12
        storage = Storage(tmp_path / "elsewhere")
        remember(home, name, sweep_id, storage)
        if name != "silent":
            age = 1.0 if name == "young" else 500.0
            report = standing(name=name, sweep_id=sweep_id)
            storage.write_json(status_file(sweep_id), {"time": time.time() - age, **report})
    assert main(["status", "--home", str(home.path)]) == 0
    header, _, *rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    assert header == ["sweep", "id", "state", "SAEs", "trained", "SAE-tok/s", "left", "heard of"]
    assert [(row[0], row[2]) for row in rows] == [
        ("young", "train"), ("lost", "lost"), ("demo", "stopped"), ("silent", "not reported"),
    ]  # fmt: skip
    assert rows[0][3:7] == ["8", "15%", "5,000", "2 h 5 min"] and rows[1][5:7] == ["-", "-"]
    assert main(["status", "--json", "--home", str(home.path)]) == 0
    found = json.loads(capsys.readouterr().out)["sweeps"]
    assert [one["phase"] for one in found] == ["train", "train", "stopped", None]
    assert main(["status", "--home", str(tmp_path / "empty")]) == 0
    assert capsys.readouterr().out == "no sweeps yet\n"


def test_colours_are_left_out_where_they_are_not_wanted(home, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    with pulse(home) as report:
        _, got = on_a_terminal(home, (40, 150), lambda process: report.update(phase="ended"))
    assert not re.search(r"\x1b\[\d+m", got)


def statuses(one: Standing) -> list[str]:
    rows = (re.split(r"\s{2,}", line) for line in describe(one).splitlines())
    return [row[3] for row in rows if row[0] in ("pack-early", "pack-late")]


def test_packs_and_saes_of_a_sweep_that_has_stopped_are_neither_done_nor_at_work():
    stream = stream_status()
    stream["packs"]["pack-early"]["status"] = "done"
    running = {"time": 99.0, **standing(stream=stream, halted=["pack-early"])}
    assert statuses(Standing("demo", ID, 100.0, running)) == ["yielded", "live"]
    stopping = {**running, "stopping": True}
    assert statuses(Standing("demo", ID, 100.0, stopping)) == ["stopped", "live"]
    over = Standing("demo", ID, 100.0, {**stopping, "phase": "stopped", "outcome": {"status": "stopped"}})
    assert statuses(over) == ["stopped", "stopped"]
    assert "SAEs   2 begun, 3 not begun, 2 done before, 1 diverged\n" in describe(over)
    finished = Standing("demo", ID, 100.0, {**running, "halted": [], "phase": "ended"}, published=True)
    assert statuses(finished)[0] == "done"


def test_a_cluster_that_is_shared_with_one_sweep_has_one_other():
    report = {"time": 99.0, **standing(share={"slots": 1, "sweeps": ["a"]})}
    assert "\nshare  1 pack at once, beside 1 other sweep on the cluster\n" in describe(
        Standing("demo", ID, 100.0, report)
    )


def test_saes_that_diverged_in_an_earlier_attempt_are_not_done():
    report = {"time": 99.0, **standing(stopped={"diverged": 3})}
    text = describe(Standing("demo", ID, 100.0, report))
    assert f"sweep demo ({ID}): 8 SAEs\n" in text and "2 training, 3 not begun, 3 diverged\n" in text
