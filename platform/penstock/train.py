"""A pack at work: a Tune trial (`run_pack`) around a Ray Train run of one worker (`train_pack`)."""

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from safetensors.torch import load as load_tensors

from penstock.activations import from_wire
from penstock.batches import Schedule, batches, checkpoint_steps
from penstock.errors import SweepError, UserError
from penstock.identity import check_code
from penstock.pack import Pack, PackMember
from penstock.storage import Storage
from sae_core import Calibration, TrainingSettings

TRIES_WITHOUT_PROGRESS = 3
REPORT_SECONDS = 1.0
PAUSE_SECONDS = 600.0

# Blocks are shared memory, read-only by nature; nothing here writes to them.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable")


@dataclass(frozen=True)
class PackJob:
    """Everything a pack's worker needs; the stream's handle travels beside it."""

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
    cpus: float
    gpus: float
    attempt: int
    attempt_file: str
    allow_code_change: bool
    code: str


def run_pack(config: Mapping[str, Any], *, jobs: Mapping[str, PackJob], stream: Any) -> None:
    """The Tune trial: run the pack's worker until it ends; give up after failures that bring no progress.

    Failures are counted here and not by a lifetime limit of Ray Train, so that a long run may lose many workers.
    """
    from ray import train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    job = jobs[config["pack"]]
    fruitless = 0
    for run in range(10_000):
        before = progress(job)
        trainer = DataParallelTrainer(
            train_pack,
            train_loop_config={"job": job, "stream": stream},
            scaling_config=train.ScalingConfig(
                num_workers=1, use_gpu=job.gpus > 0, resources_per_worker=_resources(job)
            ),
            run_config=train.RunConfig(
                storage_path=job.storage.path("ray") if job.storage.is_local else f"{job.storage.uri}/ray",
                name=f"{job.pack_id}-{job.attempt}-{run}",
                failure_config=train.FailureConfig(max_failures=2),
            ),
        )
        try:
            trainer.fit()
            return
        except Exception as error:  # the border of one pack
            fruitless = 0 if progress(job) > before else fruitless + 1
            client = StreamClient(stream, job.pack_id)
            client.log(f"its worker failed ({error}), {fruitless} time(s) without progress")
            client.flush(PAUSE_SECONDS)
            if fruitless >= TRIES_WITHOUT_PROGRESS:
                raise


def progress(job: PackJob) -> tuple[int, ...]:
    """How far the pack's SAEs have come, by what is safe in storage."""
    reached = []
    for member in job.members:
        folder = f"saes/{member.sae_id}"
        if job.storage.is_committed(f"{folder}/final") or job.storage.exists(f"{folder}/stopped.json"):
            reached.append(job.training.steps)
        else:
            names = job.storage.names(f"{folder}/checkpoints")
            reached.append(int(names[-1].removeprefix("step-")) if names else 0)
    return tuple(reached)


def _resources(job: PackJob) -> dict[str, float]:
    return {"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})}


def train_pack(config: Mapping[str, Any]) -> None:
    """The Ray Train worker: resume, read blocks, train, checkpoint, export."""
    job: PackJob = config["job"]
    client = StreamClient(config["stream"], job.pack_id)
    try:
        check_code(job.code)
        _train(job, client)
    except UserError as error:  # trying again would not help: the driver ends the sweep
        client.emit({"kind": "fatal", "reason": str(error)})
    client.close()


def _train(job: PackJob, client: "StreamClient") -> None:
    from ray import train

    torch.set_num_threads(job.threads)
    device = "cuda" if job.gpus and torch.cuda.is_available() else "cpu"
    reached = progress(job)
    left = [member for member, steps in zip(job.members, reached, strict=True) if steps < job.training.steps]
    pack = Pack(
        left,
        job.training,
        _calibrations(job, client),
        job.storage,
        device=device,
        micro_batch_tokens=job.micro_batch_tokens,
        emit=client.emit,
        log=client.log,
        allow_code_change=job.allow_code_change,
    )
    save_after = set(checkpoint_steps(job.training.steps, job.checkpoints))
    first_step = pack.next_step
    if first_step < job.training.steps:
        client.emit({"kind": "started", "pack_id": job.pack_id, "step": first_step})
        first_block = job.schedule.locate(first_step)[0]
        for block, arrays in client.blocks(first_block, job.schedule.n_blocks, job.hook_points):
            views = {name: from_wire(array, job.dtype) for name, array in arrays.items()}
            length = len(next(iter(views.values())))
            for step, batch in batches(job.schedule, block, length, first_step):
                inputs = {name: view[batch].to(device, torch.float32) for name, view in views.items()}
                pack.step(step, inputs)
                client.keep_alive()
                if step + 1 in save_after:
                    client.flush(PAUSE_SECONDS)
                    _check_attempt(job)
                    pack.checkpoint()
                    train.report({"tokens": (step + 1) * job.training.batch_tokens})
            if pack.next_step >= job.training.steps:
                break
    client.flush(PAUSE_SECONDS)
    _check_attempt(job)
    pack.finish()


def _check_attempt(job: PackJob) -> None:
    """Raise when a newer driver has taken the sweep over: a trial that outlived its own must not write any more."""
    current = job.storage.read_json(job.attempt_file)["attempt"]
    if current != job.attempt:
        raise SweepError(f"pack {job.pack_id} belongs to attempt {job.attempt}, and attempt {current} has taken over")


def _calibrations(job: PackJob, client: "StreamClient") -> dict[str, Calibration]:
    """The calibration of each hook point; a host stores it when it makes block 0, which is asked for if need be."""
    names = {hook_point: f"{job.calibration_folder}/{hook_point}.safetensors" for hook_point in job.hook_points}
    if not all(job.storage.exists(name) for name in names.values()):
        client.wait_for(0)
    return {hook: Calibration.from_tensors(load_tensors(job.storage.read(name))) for hook, name in names.items()}


class StreamClient:
    """A pack's side of the stream: blocks in order, whatever happens to the stream or its hosts meanwhile."""

    def __init__(self, stream: Any, pack_id: str) -> None:
        self._stream = stream
        self._pack_id = pack_id
        self._events: list[dict[str, Any]] = []
        self._sent = time.monotonic()
        self._report: Any = None

    def blocks(self, first: int, stop: int, hook_points: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(block, {hook point: read-only array}) in order; a block counts as used up when the next one is asked for."""
        self._attach(first)
        request = self._request(first)
        for block in range(first, stop):
            arrays = self._fetch(request, block, hook_points)
            request = self._request(block + 1) if block + 1 < stop else None
            yield block, arrays
            del arrays  # the object store may only drop what no process maps
            self._call_quietly(self._stream.acknowledge, block)

    def wait_for(self, block: int) -> None:
        """Return when a block has been made."""
        self._attach(block)
        self._resolve(self._request(block), block)

    def emit(self, event: dict[str, Any]) -> None:
        """Tell the driver something; sent with the next sign of life."""
        self._events.append(event)

    def log(self, message: str) -> None:
        """Say something where the user sees it."""
        print(message, flush=True)
        self.emit({"kind": "log", "message": f"pack {self._pack_id}: {message}"})

    def keep_alive(self) -> None:
        """Send what was emitted, about once a second."""
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self._send(0.0)

    def flush(self, pause_seconds: float) -> None:
        """Send what was emitted now, and announce a pause of up to that long."""
        self._send(pause_seconds)

    def close(self) -> None:
        """Send the rest and leave the stream."""
        self._send(0.0)
        self._call_quietly(self._stream.detach)

    # ---- inside ----

    def _send(self, pause_seconds: float) -> None:
        events, self._events = self._events, []
        self._sent = time.monotonic()
        self._call_quietly(self._stream.report, events, pause_seconds)

    def _call_quietly(self, method: Any, *args: Any) -> None:
        """A call whose loss does no harm: what it says is repeated, or stands in storage as well."""
        try:
            ray.get(method.remote(self._pack_id, *args), timeout=60)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError):
            pass

    def _request(self, block: int) -> Any:
        return self._stream.next_block.remote(self._pack_id, block)

    def _attach(self, block: int) -> None:
        for _ in range(120):
            try:
                ray.get(self._stream.attach.remote(self._pack_id, block))
                return
            except ray.exceptions.RayActorError:
                time.sleep(1.0)  # the stream is being restarted
        raise SweepError(f"pack {self._pack_id}: the stream has been away for two minutes")

    def _resolve(self, request: Any, block: int) -> dict[str, Any]:
        while True:
            try:
                refs = ray.get(request)
                if refs is not None:
                    return refs
            except ray.exceptions.RayActorError:
                self._attach(block)
            except ray.exceptions.RayTaskError as error:
                if "LeaseLostError" not in str(error):
                    raise
                self._attach(block)
            request = self._request(block)

    def _fetch(self, request: Any, block: int, hook_points: Sequence[str]) -> dict[str, Any]:
        while True:
            refs = self._resolve(request, block)
            try:
                return dict(zip(hook_points, ray.get([refs[name] for name in hook_points]), strict=True))
            except (ray.exceptions.ObjectLostError, ray.exceptions.ReferenceCountingAssertionError):
                self._call_quietly(self._stream.forget, block)
                request = self._request(block)


