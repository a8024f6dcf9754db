"""The optional mirror of curves and figures in Weights & Biases."""

import builtins
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from penstock.home import Home
from penstock.mirror import Mirror
from penstock.spec import TrackingSpec
from tracked_sweep import tracked

ROWS = [{"tokens": 100, "metrics": {"loss": 2.0}}, {"tokens": 200, "metrics": {"loss": 1.0}}]


@pytest.fixture
def said():
    return []


def mirror(tmp_path, said, project="mine") -> Mirror:
    return Mirror(TrackingSpec(wandb_project=project), Home(tmp_path), "demo", said.append)


def write(one: Mirror) -> None:
    one.open("sweep-1", [tracked("early-4"), tracked("early-8")])
    one.log("early-4", ROWS)
    one.log("early-8", ROWS[:1])
    one.finish("early-4", "finished", {"l0": 4.0})
    one.close()


def records(data: bytes) -> list[bytes]:
    """The records of a file of W&B: a head of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    found, position, parts = [], 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
    return found


def written_elsewhere(folder: Path, **environment: str) -> list[str]:
    """What is said where a process of its own, with such an environment, writes: W&B keeps to what it has first seen of
    its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")} | environment
    code = (
        "import sys; from pathlib import Path; from test_mirror import mirror, write\n"
        "said = []; write(mirror(Path(sys.argv[1]), said)); print(len(said), *said)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder], env=environment, cwd=Path(__file__).parent, text=True,
        capture_output=True, timeout=120, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout.strip().splitlines()[-1].split(" ", 1)


@pytest.mark.filterwarnings("ignore")
def test_curves_and_figures_are_mirrored_offline(tmp_path):
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    assert written_elsewhere(tmp_path, WANDB_MODE="offline") == ["0"]
    curves, summaries = {}, {}
    for file in tmp_path.glob("wandb/offline-run-*/*.wandb"):
        for record in map(Record.FromString, records(file.read_bytes())):
            if record.HasField("run"):
                run = record.run.run_id
                assert record.run.project == "mine" and record.run.run_group == "demo sweep-1"
            for item in [record.history] if record.HasField("history") else []:
                values = {entry.key or ".".join(entry.nested_key): json.loads(entry.value_json) for entry in item.item}
                curves.setdefault(run, []).append((values["tokens"], values["train/loss"]))
            for entry in record.summary.update if record.HasField("summary") else []:
                key = entry.key or ".".join(entry.nested_key)
                summaries.setdefault(run, {})[key] = json.loads(entry.value_json)
    assert curves == {"sweep-1-early-4": [(100, 2.0), (200, 1.0)], "sweep-1-early-8": [(100, 2.0)]}
    assert summaries["sweep-1-early-4"]["l0"] == 4.0 and summaries["sweep-1-early-4"]["status"] == "finished"
    assert summaries["sweep-1-early-8"]["status"] == "interrupted"


def test_nothing_is_done_unless_the_spec_names_a_project(tmp_path, said):
    before = threading.active_count()
    write(mirror(tmp_path, said, project=None))
    assert said == [] and list(tmp_path.iterdir()) == [] and threading.active_count() == before


def test_a_missing_package_is_said_once(tmp_path, said, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "wandb":
            raise ModuleNotFoundError("No module named 'wandb'", name="wandb")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    write(mirror(tmp_path, said))
    (message,) = said
    assert "tracking.wandb_project 'mine'" in message and "pip install 'penstock[wandb]'" in message


def test_without_a_key_it_is_given_up_and_asks_nobody(tmp_path):
    pytest.importorskip("wandb")
    home = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}  # where a key would be kept
    count, message = written_elsewhere(tmp_path, WANDB_BASE_URL="http://127.0.0.1:9", **home)
    assert count == "1" and "MLflow has all of it" in message


def test_a_server_that_never_answers_delays_the_end_by_a_bounded_time(tmp_path, said, monkeypatch):
    one = mirror(tmp_path, said)
    hangs = threading.Event()
    monkeypatch.setattr(Mirror, "_open", lambda *given: hangs.wait(30))
    monkeypatch.setattr("penstock.mirror.CLOSE_SECONDS", 0.2)
    write(one)
    assert len(said) == 1 and "has not answered" in said[0]
    hangs.set()
