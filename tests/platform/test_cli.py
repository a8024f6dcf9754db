import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pandas as pd
import pytest

import penstock
from penstock.cli import JSON_KEYS, format_front, front_json, main, text_table
from penstock.errors import SpecError, SweepError
from penstock.tracking import find_sweep
from tracked_sweep import EARLY, LATE


@pytest.fixture(autouse=True)
def _home(finished_home, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("PENSTOCK_HOME", str(finished_home.path))


def test_list_shows_the_sweeps(capsys, finished_home):
    assert main(["list"]) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.split() == ["sweep", "id", "status", "SAEs", "started"] and set(rule) == {"-", " "}
    assert row.split()[:4] == ["demo", "0123456789ab", "finished", "6"]


def test_the_home_is_taken_before_and_after_the_command(capsys, tmp_path):
    for arguments in (["--home", str(tmp_path), "list"], ["list", "--home", str(tmp_path)]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == "no sweeps yet\n"


def test_front_prints_a_table_a_hook_point_with_the_front_marked(capsys):
    assert main(["front", "demo"]) == 0
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("*  ")] == [
        "*  topk          k=4        4.00   0.8000   0.7900      0.7000  0.250  finished  early-4",
        "*  topk          k=8        8.00   0.9000   0.8900      0.7000  0.250  finished  early-8",
        "*  topk          k=8        8.00   0.7000   0.6900      0.7000  0.250  finished  late-8",
    ]
    assert out.index(EARLY) < out.index("early-32") < out.index(LATE) < out.index("late-16")
    assert "on the Pareto front of its hook point: 3 of 6" in out


def test_front_as_json_has_exactly_the_promised_keys(capsys, finished_home):
    assert main(["front", "demo", "--json"]) == 0
    saes = json.loads(capsys.readouterr().out)
    assert [sae["sae_id"] for sae in saes] == ["early-4", "early-8", "early-9", "early-32", "late-8", "late-16"]
    assert all(tuple(sae)[: len(JSON_KEYS)] == JSON_KEYS for sae in saes)
    run_ids = {run.data.tags["sae_id"]: run.info.run_id for run in find_sweep(finished_home, "demo").children()}
    assert saes[1].items() >= {
        "sae_id": "early-8", "hook_point": EARLY, "architecture": "topk", "d_sae": 6, "prefix": None, "l0": 8.0,
        "ce_recovered": 0.9, "kl_recovered": 0.89, "explained_variance": 0.7, "dead_fraction": 0.25, "on_front": True,
        "status": "finished", "run_id": run_ids["early-8"], "k": 8, "seed": 0, "dominated_by": None, "certain": False,
        "knee": False, "hypervolume": pytest.approx((0.8 * math.log(2) + 0.9 * math.log(2)) / math.log(8)),
    }.items()  # fmt: skip
    assert [sae["dominated_by"] for sae in saes] == [None, None, "early-8", None, None, None]
    assert (saes[5]["status"], saes[5]["l0"], saes[5]["on_front"]) == ("diverged", None, False)


def test_front_keeps_to_the_hook_point_and_the_band(capsys):
    assert main(["front", "demo", "--hook-point", EARLY, "--l0", "9:", "--json"]) == 0
    saes = json.loads(capsys.readouterr().out)
    assert [(sae["sae_id"], sae["on_front"]) for sae in saes] == [("early-9", True), ("early-32", True)]


def test_pull_says_what_it_took_and_how_to_load_it(capsys, tmp_path):
    folder = str(tmp_path / "best")
    assert main(["pull", "demo", "--hook-point", EARLY, "--architecture", "topk", "--l0", "2:5", "--to", folder]) == 0
    out = capsys.readouterr().out
    assert f"{folder}: topk at {EARLY}, L0 4, CE recovered 0.8000 (SAE early-4)" in out
    exec(out.split("load it with: ")[1], namespace := {})
    assert namespace["sae"].cfg.k == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["front", "demx"], "no sweep 'demx' in"),
        (["front", "demo", "--hook-point", "x"], f"it has {EARLY}, {LATE}"),
        (["front", "demo", "--architecture", "x"], "no SAE with architecture 'x' in this sweep; it has topk"),
        (["compare", "demo:early-4"], "1 SAE to compare; accepted: two or more"),
        (["compare", "demo:early-4", "demo:early-4"], "'demo:early-4' is named twice"),
        (["compare", "demo:early-4", "demo:nosuch"], "no SAE 'nosuch' in this sweep"),
        (["compare", "demo:early-4", "nosuch"], "SAE 'nosuch': there is no such folder; accepted"),
        (["compare", "early-4", "early-8", "--sweep", "nosuch"], "no sweep 'nosuch' in"),
        (["compare", "demo:early-4", "demo:late-16"], "SAE late-16 is diverged"),
        (["compare", "a", "b", "--to", "no/such/x.parquet"], "accepted is a .parquet file in a folder that is there"),
        (["compare", "a", "b", "--to", "x.csv"], "--to 'x.csv': accepted is a .parquet file"),
        (["pull", "demo", "--to", "y"], "sweep 'demo' has many SAEs: give a hook point to pick the best of"),
        (["pull", "demo", "--sae", "a", "--architecture", "topk", "--l0", "2:4", "--to", "y"],
         "architecture 'topk', l0 (2.0, 4.0) cannot go with sae 'a'"),
        (["pull", "models:/x@best", "--to", "y"], "no registered model 'x'; there is none"),
        (["pull", "demo", "--hook-point", "x", "--to", "y"], f"no hook point 'x' in this sweep; it has {EARLY}"),
        (["pull", "demo", "--hook-point", LATE, "--l0", "90:", "--to", "y"], "there are 8"),
        (["report", "nosuch", "--to", "x.html"], "no sweep 'nosuch'"),
        (["list", "--home", "s3://bucket"], "is a URI"),
        (["ui", "--home", "never-made"], "holds no sweeps yet"),
        (["plan", "no-such.yaml"], "no-such.yaml"),
        (["run", "no-such.yaml"], "no-such.yaml"),
        (["spool", "list"], "no sweep of this home has kept activations"),
        (["spool", "prune", "no-such", "--yes"], "no-such' is no such folder; accepted: the folder or URI of a spool"),
    ],
)
def test_what_a_user_got_wrong_is_one_message_and_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("penstock: ") and message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_front_of_one_architecture_by_architecture_and_over_all(capsys):
    assert main(["front", "demo", "--architecture", "topk", "--by", "architecture"]) == 0
    out = capsys.readouterr().out
    assert f"{EARLY} · topk, d_sae 6" in out and "on the Pareto front of its hook point and architecture: 3 of 6" in out
    assert main(["front", "demo", "--over-all"]) == 0
    out = capsys.readouterr().out
    # CE increases of 0.08, 0.4, 0.6, 0.8 and 1.2 nats; early-32 lies outside the spec's band.
    ids = [line.split()[-1] for line in out.splitlines() if line]
    assert ids[2:7] == ["early-32", "early-8", "early-9", "early-4", "late-8"]
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("*  ")] == ["early-8", "early-4"]
    assert "on (L0, CE increase in nats a token)" in out
    with pytest.raises(SweepError, match="by 'd_sae': accepted is 'architecture'"):
        penstock.front("demo", by="d_sae")


def test_compare_says_what_is_shared_and_writes_each_latents_stability(capsys, tmp_path):
    target = tmp_path / "latents.parquet"
    assert main(["compare", "early-4", "early-8", "--sweep", "demo", "--to", str(target), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)  # the sweep's SAEs are all of one seed
    assert found["shares"] == [[1, 1], [1, 1]] and found["pairs"][0]["a"] == "early-4"
    assert len(pd.read_parquet(target)) == 12
    assert main(["compare", "demo:early-4", "demo:early-8", "--threshold", "0.9"]) == 0
    assert "mutual nearest neighbours of a decoder cosine above 0.9" in capsys.readouterr().out


@pytest.mark.parametrize("cosine", ["0", "1", "x", "-0.5", "nan"])
def test_a_threshold_that_is_no_cosine_is_refused(cosine, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["compare", "a", "b", f"--threshold={cosine}"])
    assert exit_.value.code == 2
    assert f"accepted is a cosine above 0 and below 1, not '{cosine}'" in capsys.readouterr().err


@pytest.mark.parametrize("band", ["9:4", "x", "1:2:3", "5"])
def test_a_band_that_is_none_is_refused(band, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["front", "demo", "--l0", band])
    assert exit_.value.code == 2
    assert f"an L0 band is LO:HI with LO at most HI (50:200), not '{band}'" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fornt"], ["front"], ["submit", "x.yaml"], ["pull", "demo"],
                                       ["spool"], ["spool", "prune", "--keep", "nan"],
                                       ["spool", "prune", "--keep", "1", "--stream", "a"]])  # fmt: skip
def test_a_wrong_command_exits_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2 and "usage: penstock" in capsys.readouterr().err


def test_ctrl_c_is_status_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("penstock.cli.front_json", interrupted)
    assert main(["front", "demo", "--json"]) == 130


def test_a_reader_that_goes_away_is_no_error():
    code = "import sys; from penstock.cli import main; sys.exit(main(['front', 'demo']))"
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=120)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_and_errors_import_nothing_heavy():
    code = (
        "import sys\nfrom penstock.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(*sys.modules)"
    )
    for arguments in (["--help"], ["front", "--help"], ["list", "--home", "s3://x"], ["front"], ["spool", "list", "."]):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        assert not {"mlflow", "torch", "ray", "pandas", "transformers"} & set(done.stdout.split())


def test_the_ui_serves_the_sweep_and_ends_with_ctrl_c(finished_home):
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli", "ui"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("MLflow UI: http://127.0.0.1:"), process.stderr.read()
        address = line.split()[2]
        run = next(run for run in find_sweep(finished_home, "demo").children() if run.data.tags["sae_id"] == "early-8")
        path = f"{address}/get-artifact?path=sae/cfg.json&run_uuid={run.info.run_id}"
        with urllib.request.urlopen(path, timeout=30) as answer:
            assert json.load(answer)["architecture"] == "topk"
        for attack in ("../../../mlflow.db", "/etc/passwd", "sae/../../../../mlflow.db"):
            with pytest.raises(urllib.error.HTTPError, match="400|404|500"):
                urllib.request.urlopen(path.replace("sae/cfg.json", attack), timeout=30).close()
        # Names that a page may point here (DNS rebinding); MLflow's own default takes the second for a private address.
        for host in ("attacker.example", "10.attacker.example", "127.0.0.1.attacker.example"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(urllib.request.Request(address, headers={"Host": host}), timeout=30).close()
        process.send_signal(signal.SIGINT)
        # A shell shows 130 for both. Python itself ends by the signal where it came in the middle of an exec, as in the
        # making of a dataclass, though the exception was caught.
        assert process.wait(timeout=30) in (130, -signal.SIGINT)
    finally:
        process.kill()
        process.communicate()
    with pytest.raises(OSError):  # the server ended with it
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            urllib.request.urlopen(address, timeout=1).close()


def test_the_ui_of_a_server_is_where_the_server_is(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert main(["ui"]) == 0
    assert capsys.readouterr().out == "MLflow already runs at http://mlflow:5000\n"


def test_a_port_in_use_is_one_message(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capsys.readouterr().err
    assert main(["ui", "--port", "99999"]) == 2


# ---- tables ----


def table(**columns) -> pd.DataFrame:
    length = len(next(iter(columns.values())))
    base = {
        "sae_id": ["a", "b"], "hook_point": ["h"] * 2, "architecture": ["topk", "standard"], "d_sae": [64, 64],
        "l0": [8.0, 4.0], "ce_recovered": [0.9, 0.8], "kl_recovered": [0.9, 0.8], "explained_variance": [0.5, 0.4],
        "dead_fraction": [0.0, math.nan], "on_front": [True, False], "status": ["finished"] * 2, "run_id": ["r"] * 2,
    }  # fmt: skip
    leading = {key: base.pop(key) for key in ("sae_id", "hook_point", "architecture", "d_sae")}
    return pd.DataFrame({key: value[:length] for key, value in {**leading, **columns, **base}.items()})


def test_the_text_shows_the_settings_that_differ_and_hides_a_status_that_is_always_finished():
    text = format_front(table(k=[8, math.nan], l1_coefficient=[math.nan, 0.5], seed=[0, 1], lr=[1e-3, 1e-3]))
    assert text == "\n".join([
        "h, d_sae 64",
        "   architecture  sparsity            seed    L0  CE rec.  KL rec.  expl. var.   dead  sae_id",
        "   standard      l1_coefficient=0.5     1  4.00   0.8000   0.8000      0.4000      -  b",
        "*  topk          k=8                    0  8.00   0.9000   0.9000      0.5000  0.000  a",
        "   hypervolume 0.8000 (log L0 in 4:8, from CE recovered 0)",
        "",
        "* on the Pareto front of its hook point: 1 of 2",
    ])  # fmt: skip


def test_no_saes_are_said_to_be_none():
    assert format_front(table(k=[1, 2]).iloc[:0]) == "no SAEs"
    assert front_json(table(k=[1, 2]).iloc[:0]) == "[]"


def test_json_writes_null_for_what_is_missing_and_whole_widths():
    a, b = json.loads(front_json(table(k=[8, 9]).assign(d_sae=[64.0, math.nan])))
    assert (a["d_sae"], b["d_sae"], b["dead_fraction"]) == (64, None, None)
    assert type(a["d_sae"]) is int


def test_columns_are_aligned():
    assert text_table(["a", "bb"], [["xyz", "1"], ["", "22"]], right={"bb"}) == "a    bb\n---  --\nxyz   1\n     22"


def test_a_spec_error_of_several_lines_is_printed_whole(monkeypatch, capsys):
    def refuse(*_):
        raise SpecError("x.yaml, line 1: first\nx.yaml, line 2: second")

    monkeypatch.setattr("penstock.cli.Home.resolve", refuse)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "penstock: x.yaml, line 1: first\nx.yaml, line 2: second\n"
