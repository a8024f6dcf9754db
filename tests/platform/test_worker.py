"""The life of a pack on its worker, with a stream that hands out blocks from memory."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from penstock import pack as pack_module
from penstock.batches import Schedule, batches
from penstock.identity import code_hash
from penstock.journal import Journal
from penstock.pack import Pack, PackMember
from penstock.probe import Probe
from penstock.search import Stop
from penstock.storage import Storage
from penstock.stream_state import HaltedError
from penstock.worker import PackJob, _train
from sae_core import TrainingSettings, calibrate, parse_settings

READS, WRITES = "blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"
SCHEDULE = Schedule((100, 100, 100), 32, 8)  # three steps a block; the last one is the second of block 2
TRAINING = TrainingSettings(steps=8, batch_tokens=32, lr=1e-2, dead_after_tokens=64)


def arrays(block: int) -> dict[str, np.ndarray]:
    read = np.random.default_rng(block).normal(1.0, size=(100, 8)).astype(np.float32)
    return {READS: read, WRITES: np.maximum(read[:, :4], 0)}


CALIBRATIONS = {name: calibrate(array) for name, array in arrays(0).items()}
MEMBERS = (
    PackMember("sae", READS, READS, parse_settings({"architecture": "batch_topk", "d_sae": 16, "k": 3})),
    PackMember("coder", READS, WRITES, parse_settings({"architecture": "batch_topk", "d_sae": 16, "k": 3})),
)


class Blocks:
    """A pack's side of a stream in which every block is there. `taken` are those that were read."""

    def __init__(self):
        self.taken, self.events, self.about = [], [], {}
        self.stops = {}  # what has been decided, as far as the pack has heard
        self.stop_when = {}  # step -> what is decided then
        self.halt, self.halt_at = None, None  # the step after which the pack is told to save and to end

    def blocks(self, first, stop):
        for block in range(first, stop):
            self.taken.append(block)
            yield block, arrays(block)

    def block(self, block):
        return arrays(block)

    def emit(self, event):
        self.events.append(event)

    def events_of(self, kind):
        return [event for event in self.events if event["kind"] == kind]

    def log(self, message):
        self.emit({"kind": "log", "message": message})

    def flush(self, pause_seconds):
        pass

    def keep_alive(self):
        self.stops = self.stops | self.stop_when.get(self.about["step"], {})
        self.halt = "stop" if self.about["step"] == self.halt_at else self.halt


@pytest.fixture
def start(tmp_path):
    def start(name: str) -> tuple[PackJob, Blocks]:
        storage = Storage(tmp_path / name)
        for array, calibration in CALIBRATIONS.items():
            storage.write(f"calibration/{array}.safetensors", save_tensors(calibration.to_tensors()))
        job = PackJob(
            pack_id=name, members=MEMBERS, hook_points=(READS, WRITES), training=TRAINING, schedule=SCHEDULE,
            storage=storage, calibration_folder="calibration", dtype="float32", checkpoints=0, micro_batch_tokens=None,
            threads=1, saes_at_once=2, on_gpu=False, spool=None, allow_code_change=False,
            code=code_hash(), journal=Journal(storage, "sweep"),
        )  # fmt: skip
        return job, Blocks()

    return start


@pytest.mark.parametrize("checkpoints", [0, 4])
@pytest.mark.parametrize("step", [1, 3, 4, 7, 8])
def test_a_pack_that_is_told_to_end_goes_on_from_that_very_step(start, step, checkpoints):
    """In the middle of a block, at its end, at a planned checkpoint; at step 8 there is nothing left to leave."""
    whole, stream = start("whole")
    _train(whole, stream, free)
    job, stream = start("halted")
    job = replace(job, checkpoints=checkpoints)
    stream.halt_at = step
    if step < 8:
        with pytest.raises(HaltedError, match="stop"):
            _train(job, stream, free)
        [halted] = stream.events_of("halted")
        assert halted == {"kind": "halted", "why": "stop", "step": step, "saved": {"sae": step, "coder": step}}
        for member in MEMBERS:
            names = job.storage.names(f"saes/{member.sae_id}/checkpoints")
            assert names[-1] == f"step-{step:09d}"
        again = Blocks()
        _train(job, again, free)
        assert [event["step"] for event in again.events_of("started")] == [step]
        assert again.taken[0] == SCHEDULE.locate(step)[0]
    else:
        _train(job, stream, free)
        assert not stream.events_of("halted")
    found, expected = weights(job), weights(whole)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
    def curve(one):
        return one.storage.read_json("saes/sae/final/summary.json")["history"]

    assert curve(job) == curve(whole)


def free() -> None:
    """A fence that nobody else has closed."""


def weights(job: PackJob) -> dict[str, torch.Tensor]:
    return {
        f"{member.sae_id}.{name}": tensor
        for member in MEMBERS
        for name, tensor in load_tensors(
            job.storage.read_folder(f"saes/{member.sae_id}/final")["sae_weights.safetensors"]
        ).items()
    }


@pytest.mark.parametrize("reached", [4, 8])
def test_a_pack_resumed_anywhere_exports_the_bits_of_an_uninterrupted_one(start, reached):
    """At step 8 nothing is left to train, and the last block is read for its end alone: thresholds depend on it."""
    whole, stream = start("whole")
    _train(whole, stream, free)
    assert stream.taken == [0, 1, 2]
    broken, stream = start("broken")
    pack = Pack(MEMBERS, TRAINING, CALIBRATIONS, broken.storage)
    for block in range(3):
        views = {name: torch.from_numpy(array) for name, array in arrays(block).items()}
        for step, batch in batches(SCHEDULE, block, 100, 0):
            if step < reached:
                pack.step(step, {name: view[batch] for name, view in views.items()})
    pack.checkpoint()
    _train(broken, stream, free)
    assert stream.taken == {4: [1, 2], 8: [2]}[reached]
    ours, theirs = weights(broken), weights(whole)
    assert ours.keys() == theirs.keys() and any("threshold" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pack_whose_saes_have_all_ended_reads_nothing(start):
    job, stream = start("done")
    _train(job, stream, free)
    again = Blocks()
    _train(job, again, free)
    assert again.taken == [] and [event["kind"] for event in again.events] == ["time"]


# ---- rungs ----------------------------------------------------------------------------------------------------------


def with_probe(job: PackJob, rungs: tuple[int, ...]) -> PackJob:
    probe = Probe("calibration", "p")
    for name, array in arrays(99).items():
        probe.store(job.storage, name, torch.from_numpy(array))
    return replace(job, probe=probe, rungs=rungs)


def rung_events(stream: Blocks) -> list[tuple[str, int]]:
    return [(event["sae_id"], event["step"]) for event in stream.events if event["kind"] == "rung"]


def test_at_a_rung_every_sae_is_measured_as_it_would_be_used_and_no_weight_changes(start):
    whole, stream = start("whole")
    _train(whole, stream, free)
    measured, stream = start("measured")
    measured = with_probe(measured, (2, 4))
    _train(measured, stream, free)
    assert rung_events(stream) == [("sae", 2), ("coder", 2), ("sae", 4), ("coder", 4)]
    ours, theirs = weights(measured), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    record = measured.storage.read_json(measured.probe.rung_file("coder", 4))
    assert record == {key: value for key, value in stream.events_of("rung")[3].items() if key not in ("kind", "sae_id")}
    assert record["tokens"] == 4 * 32
    # by hand, with the SAE as it stood after four steps
    pack = Pack(MEMBERS, TRAINING, CALIBRATIONS, Storage(f"{measured.storage.uri}-by-hand"))
    for block in range(2):
        views = {name: torch.from_numpy(array) for name, array in arrays(block).items()}
        for step, batch in batches(SCHEDULE, block, 100, 0):
            if step < 4:
                pack.step(step, {name: view[batch] for name, view in views.items()})
                latest = torch.from_numpy(arrays(block)[READS])[batch]
    sae = next(slot.trainer for slot in pack._slots if slot.member.sae_id == "coder").export(tokens=latest)
    x, target = (torch.from_numpy(arrays(99)[name]) for name in (READS, WRITES))
    f, x_hat = sae.reconstruct(x)
    unexplained = float((target - x_hat).square().sum() / (target - target.mean(0)).square().sum())
    assert record["l0"] == pytest.approx(float((f != 0).double().sum(1).mean()), abs=1e-9)
    assert record["explained_variance"] == pytest.approx(1 - unexplained, rel=1e-5)


def test_an_sae_that_is_stopped_frees_its_share_and_the_others_keep_their_bits(start):
    whole, stream = start("whole")
    _train(whole, stream, free)
    pruned, stream = start("pruned")
    pruned.journal.write_stop(Stop("coder", 2, "beaten"), 64)
    stream.stop_when = {5: {"coder": "beaten", "another pack's": "beaten"}}
    # It is in the journal already when the pack starts, as for a pack that starts again: then it is left out at once.
    _train(pruned, stream, free)
    assert not pruned.storage.exists("saes/coder/final") and rung_events(stream) == []
    alone = {name: value for name, value in weights(whole).items() if name.startswith("sae.")}
    folder = pruned.storage.read_folder("saes/sae/final")["sae_weights.safetensors"]
    assert all(torch.equal(load_tensors(folder)[name.removeprefix("sae.")], value) for name, value in alone.items())


def test_a_stop_that_arrives_while_the_pack_runs_ends_that_sae_there(start):
    whole, stream = start("whole")
    _train(whole, stream, free)
    pruned, stream = start("pruned")
    stream.stop_when = {5: {"coder": "beaten", "another pack's": "beaten"}}
    _train(pruned, stream, free)
    (stopped,) = stream.events_of("stopped")
    assert stopped == {"kind": "stopped", "sae_id": "coder", "status": "pruned", "reason": "beaten", "step": 5,
                       "tokens": 5 * 32}  # fmt: skip
    assert not pruned.storage.exists("saes/coder/final") and not pruned.storage.exists("saes/coder/stopped.json")
    run = pruned.storage.read_json("sweeps/sweep/pruned/coder-run.json")
    assert run["step"] == 5 and [row["tokens"] for row in run["history"]] == [32 * step for step in range(1, 6)]
    assert stream.about["trained_tokens"] == 5 * 32 + 8 * 32
    alone = {name: value for name, value in weights(whole).items() if name.startswith("sae.")}
    folder = pruned.storage.read_folder("saes/sae/final")["sae_weights.safetensors"]
    assert all(torch.equal(load_tensors(folder)[name.removeprefix("sae.")], value) for name, value in alone.items())


def test_a_pack_whose_saes_are_all_stopped_reads_no_further(start):
    job, stream = start("nobody")
    stream.stop_when = {2: {"coder": "beaten", "sae": "beaten"}}
    _train(job, stream, free)
    assert stream.taken == [0] and len(stream.events_of("stopped")) == 2


def test_an_sae_that_cannot_be_measured_fails_alone(start, monkeypatch):
    job, stream = start("faulty")
    job = with_probe(job, (4,))
    measured = pack_module.measure

    def faulty(sae, x, target):
        if x.shape != target.shape:  # the transcoder
            raise ArithmeticError("no figures today")
        return measured(sae, x, target)

    monkeypatch.setattr(pack_module, "measure", faulty)
    _train(job, stream, free)
    (stopped,) = stream.events_of("stopped")
    assert (stopped["sae_id"], stopped["status"]) == ("coder", "failed") and "no figures today" in stopped["reason"]
    assert rung_events(stream) == [("sae", 4)] and job.storage.is_committed("saes/sae/final")
