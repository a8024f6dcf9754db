"""A pack's worker: resume, read blocks, train, checkpoint, export."""

import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from penstock.accounts import WorkerClock
from penstock.activations import from_wire
from penstock.batches import Schedule, batches, checkpoint_steps
from penstock.calibrations import calibration_file, load_calibration, store_calibrations
from penstock.consumer import StreamClient
from penstock.errors import SweepError, UserError
from penstock.fence import Fence, FencedError
from penstock.identity import check_code
from penstock.journal import Journal
from penstock.memory import is_out_of_memory
from penstock.pack import Pack, PackMember, PackOutOfMemoryError
from penstock.probe import Probe
from penstock.spool import SpooledStream
from penstock.storage import Storage
from penstock.stream_state import HaltedError
from penstock.trial import PAUSE_SECONDS, Unfinished, has_ended
from sae_core import Calibration, TrainingSettings

TAIL_TOKENS = 8192  # the last of the run, on which thresholds are calibrated when an SAE is exported

# Blocks are shared memory, read-only by nature; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class PackJob:
    """Everything a pack's worker needs; the stream's handle travels beside it. `hook_points` names the arrays of the
    stream that the pack is fed. At the steps `rungs` its SAEs are measured on the search activations of `probe`. At so
    many points as `keep` says, evenly spread, its SAEs are kept as they would be used then."""

    pack_id: str
    members: tuple[PackMember, ...]
    hook_points: tuple[str, ...]
    training: TrainingSettings
    schedule: Schedule
    storage: Storage
    calibration_folder: str
    dtype: str
    checkpoints: int
    micro_batch_tokens: int | None
    threads: int
    saes_at_once: int
    on_gpu: bool
    spool: SpooledStream | None
    journal: Journal
    allow_code_change: bool
    code: str
    probe: Probe | None = None
    rungs: tuple[int, ...] = ()
    keep: int = 0

    def part(self, pack_id: str, sae_ids: Collection[str]) -> "PackJob":
        """The job of some of the pack's SAEs, as a pack of their own."""
        return replace(self, pack_id=pack_id, members=tuple(one for one in self.members if one.sae_id in sae_ids))


def train_pack(job: PackJob, stream: Any, fence: Fence) -> Unfinished | None:
    """The whole life of a pack on its worker; why it has ended before its SAEs have, where it has."""
    client = StreamClient(stream, job.pack_id, job.hook_points, fence.run, job.spool)
    try:
        check_code(job.code)
        _train(job, client, fence.check)
    except FencedError:  # another one does this work now; there is nobody to tell
        raise
    except HaltedError as order:
        client.close()
        return Unfinished("halt", str(order))
    except UserError as error:  # trying again would not help: the driver ends the sweep
        client.emit({"kind": "fatal", "reason": str(error)})
    except Exception as error:
        if not (isinstance(error, PackOutOfMemoryError) or is_out_of_memory(error)):
            raise
        traceback.print_exception(error)
        client.flush(PAUSE_SECONDS)
        return Unfinished("memory", f"out of memory: {' '.join(str(error).split())}")
    client.close()
    return None


def _train(job: PackJob, client: StreamClient, guard: Callable[[], None]) -> None:
    clock = WorkerClock(job.pack_id)
    torch.set_num_threads(job.threads)
    device = "cuda" if job.on_gpu and torch.cuda.is_available() else "cpu"
    left = [member for member in job.members if not has_ended(job.storage, member.sae_id, job.journal)]
    pack = Pack(
        left,
        job.training,
        _calibrations(job, client),
        job.storage,
        device=device,
        micro_batch_tokens=job.micro_batch_tokens,
        saes_at_once=job.saes_at_once if device == "cpu" else 1,
        emit=client.emit,
        log=client.log,
        guard=guard,
        allow_code_change=job.allow_code_change,
    )
    save_after = set(checkpoint_steps(job.training.steps, job.checkpoints))
    keep_after = set(checkpoint_steps(job.training.steps, job.keep))
    tails: dict[str, torch.Tensor] = {}
    if left:
        first_step = pack.next_step
        sae_ids = [member.sae_id for member in left]
        client.emit({"kind": "started", "pack_id": job.pack_id, "sae_ids": sae_ids, "step": first_step})
        # The last block is read also where no step is left to make: its end is needed to export.
        first_block = job.schedule.locate(min(first_step, job.schedule.steps - 1))[0]
        try:
            for block, arrays in client.blocks(first_block, job.schedule.n_blocks):
                views = {name: from_wire(array, job.dtype) for name, array in arrays.items()}
                del arrays
                length = len(next(iter(views.values())))
                for step, batch in batches(job.schedule, block, length, first_step):
                    inputs = {name: view[batch].to(device, torch.float32) for name, view in views.items()}
                    pack.step(step, inputs)
                    client.about |= {"step": step + 1, "trained_tokens": pack.tokens_trained}
                    if clock.due:
                        client.emit(clock.event(pack.laps(), client.about.get("wait_seconds", 0.0)))
                    client.keep_alive()
                    if step + 1 in job.rungs:
                        _report_rung(job, client, pack, step + 1, inputs)
                    del inputs
                    pack.prune(client.stops, job.journal.write_run)
                    if step + 1 in keep_after:  # before a checkpoint, from which it would not be made again
                        client.flush(PAUSE_SECONDS)
                        latest = slice(max(0, batch.stop - TAIL_TOKENS), batch.stop)
                        pack.keep(step + 1, {name: view[latest].to(torch.float32) for name, view in views.items()})
                    if step + 1 in save_after:
                        client.flush(PAUSE_SECONDS)
                        pack.checkpoint()
                    if client.halt is not None and pack.next_step < job.training.steps:
                        raise HaltedError(client.halt)
                if block == job.schedule.n_blocks - 1:
                    tails = {name: view[last_tokens(job.schedule)].to(torch.float32, copy=True)
                             for name, view in views.items()}  # fmt: skip
                elif pack.next_step >= job.training.steps:  # every SAE was stopped
                    break
                views.clear()
        except HaltedError as order:
            client.flush(PAUSE_SECONDS)
            saved = pack.checkpoint()
            client.emit({"kind": "halted", "why": str(order), "saved": saved, "step": pack.next_step})
            client.emit(clock.event(pack.laps(), client.about.get("wait_seconds", 0.0)))
            raise
    client.flush(PAUSE_SECONDS)
    pack.finish(tails)
    client.emit(clock.event(pack.laps(), client.about.get("wait_seconds", 0.0)))


def _report_rung(
    job: PackJob, client: StreamClient, pack: Pack, step: int, latest: Mapping[str, torch.Tensor]
) -> None:
    """Measure the SAEs at a rung, for the driver to decide; training goes on meanwhile."""
    assert job.probe is not None
    client.flush(PAUSE_SECONDS)
    deadline = time.monotonic() + PAUSE_SECONDS
    while not job.probe.is_there(job.storage, job.hook_points):  # a host has been asked to make it
        if time.monotonic() > deadline:
            raise SweepError(f"no model host has made the search activations within {PAUSE_SECONDS:.0f} s")
        time.sleep(0.5)
    inputs = {array: job.probe.load(job.storage, array) for array in job.hook_points}
    for sae_id, figures in pack.measure(step, inputs, latest).items():
        record = {"step": step, "tokens": step * job.training.batch_tokens, **figures}
        job.storage.write_json(job.probe.rung_file(sae_id, step), record)
        client.emit({"kind": "rung", "sae_id": sae_id, **record})
    client.flush(0.0)


def last_tokens(schedule: Schedule) -> slice:
    """Where, in the run's last block, its last tokens lie that are trained on: `TAIL_TOKENS` or as many as it has."""
    end = schedule.locate(schedule.steps - 1)[1] + schedule.batch_tokens
    return slice(max(0, end - TAIL_TOKENS), end)


def _calibrations(job: PackJob, client: StreamClient) -> dict[str, Calibration]:
    """The calibration of each array. A host stores it when it makes block 0; where block 0 comes from a spool that
    somebody else has filled, it is worked out here: the same numbers, from the same block."""
    storage, folder, arrays = job.storage, job.calibration_folder, job.hook_points
    if not all(storage.exists(calibration_file(folder, array)) for array in arrays):
        store_calibrations(storage, folder, client.block(0), job.dtype)
    return {array: load_calibration(storage, folder, array) for array in arrays}
