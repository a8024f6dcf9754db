"""The life of a pack on its worker, with a stream that hands out blocks from memory."""

import numpy as np
import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from penstock.batches import Schedule, batches
from penstock.identity import code_hash
from penstock.pack import Pack, PackMember
from penstock.storage import Storage
from penstock.train import PackJob, _train
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

    def blocks(self, first, stop):
        for block in range(first, stop):
            self.taken.append(block)
            yield block, arrays(block)

    def block(self, block):
        return arrays(block)

    def emit(self, event):
        self.events.append(event)

    def log(self, message):
        self.emit({"kind": "log", "message": message})

    def flush(self, pause_seconds):
        pass

    def keep_alive(self):
        pass


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
            code=code_hash(),
        )  # fmt: skip
        return job, Blocks()

    return start


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
    assert again.taken == [] and again.events == []
