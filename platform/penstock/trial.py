"""The packs as Tune trials. `Trials` is the driver's side; `run_pack`, the trial itself, runs a Ray Train run of one
worker and starts it again while that helps.

Light on purpose: the trial's process and Ray Train's controller load this module and neither needs torch. What the
worker needs travels pickled, and only the worker opens it.
"""

import contextlib
import logging
import math
import pickle
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from penstock.consumer import StreamClient
from penstock.fence import Fence, FencedError
from penstock.identity import content_id
from penstock.journal import Journal
from penstock.spool import SpooledStream
from penstock.storage import Storage
from penstock.text import last_line

TRIES_WITHOUT_PROGRESS = 3
CAUSE_CHARACTERS = 200  # of what a worker died of
TRIAL_FAILURES = 100  # of the trial's own process; what it runs is counted by progress
PAUSE_SECONDS = 600.0
TRIAL_MEMORY = 512 * 2**20
# Why a pack is to save and to end: it is queued again after the first, and not after the second.
YIELD, STOP = "yield", "stop"


@dataclass(frozen=True)
class TrialJob:
    """What a trial needs to know of its pack. `work` is a pickled `penstock.worker.PackJob`."""

    pack_id: str
    sae_ids: tuple[str, ...]
    arrays: tuple[str, ...]
    steps: int
    storage: Storage
    resources: Mapping[str, float]  # of its worker
    labels: Mapping[str, str]  # of the nodes that its worker may run on
    fence: Fence
    journal: Journal
    spool: SpooledStream | None
    work: bytes

    def part(self, sae_ids: Sequence[str]) -> "TrialJob":
        """The job of some of the pack's SAEs."""
        if tuple(sae_ids) == self.sae_ids:
            return self
        return replace(self, pack_id=content_id(list(sae_ids)), sae_ids=tuple(sae_ids))


@dataclass(frozen=True)
class Unfinished:
    """Why a pack's worker has ended before its SAEs have: they do not fit it (`memory`), or it was told to save and to
    end (`halt`)."""

    kind: Literal["memory", "halt"]
    reason: str


def run_pack(config: Mapping[str, Any], *, jobs: Mapping[str, TrialJob], stream: Any) -> dict[str, Any]:
    """The Tune trial: run the pack's worker until it ends; give up after failures that bring no progress.

    Failures are counted here and not by a lifetime limit of Ray Train, so that a long run may lose many workers. Where
    the SAEs do not fit one worker, or keep it from getting on, it returns those that are left, to be split; one that
    stands alone is stopped and marked. A pack that was told to save and to end returns why, as `halted`.
    """
    job = jobs[config["pack"]].part(config["saes"])
    fruitless = 0
    while True:
        before, fence = progress(job), job.fence.of(job.pack_id, time.time_ns())
        client = StreamClient(stream, job.pack_id, job.arrays, fence.run)
        if why := client.ask_halted():
            return {"halted": why}
        try:
            fence.check()
            _end_earlier_run(fence)
            fence.close_to_others()
            unfinished = _run_worker_group(job, stream, fence, client)
        except FencedError as error:
            print(error, flush=True)
            return {}
        except Exception as error:  # the border of one pack
            fruitless = 0 if progress(job) > before else fruitless + 1
            client.log(f"its worker failed ({error}), {fruitless} time(s) without progress")
            client.emit({**_death(job.pack_id, error), "detail": "".join(traceback.format_exception(error))})
            client.flush(PAUSE_SECONDS)
            if _ran_out_of_memory(error):
                reason = "the node ran out of memory"
            elif fruitless < TRIES_WITHOUT_PROGRESS:
                continue
            else:
                reason = f"its worker failed {fruitless} times without progress, the last time of: {error}"
            unfinished = Unfinished("memory", reason)
        if unfinished is None:
            return {}
        if unfinished.kind == "halt":
            return {"halted": unfinished.reason}
        return _give_up(job, stream, fence, unfinished.reason)


def _run_worker_group(job: TrialJob, stream: Any, fence: Fence, client: StreamClient) -> Unfinished | None:
    """A Ray Train run of one worker, to its end; why the pack's SAEs have not ended, where they have not. Raises what
    the worker died of, after it was started three times."""
    from ray import train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    DataParallelTrainer(
        run_worker,
        train_loop_config={"job": job, "stream": stream, "fence": fence},
        scaling_config=one_worker(job.resources, job.labels),
        run_config=train.RunConfig(
            storage_path=job.storage.path("ray") if job.storage.is_local else f"{job.storage.uri}/ray",
            name=f"{job.pack_id}-{fence.run}",
            failure_config=train.FailureConfig(max_failures=2),
            callbacks=[_told_of_deaths(client)],
        ),
    ).fit()
    file = _reason_file(fence)
    return Unfinished(**job.storage.read_json(file)) if job.storage.exists(file) else None


def _told_of_deaths(client: StreamClient) -> Any:
    """Has Ray Train tell the driver what a worker has died of that it starts again by itself."""
    from ray.train import UserCallback

    class Deaths(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
            for error in worker_exceptions.values():
                client.emit(_death(client.pack_id, error))
            client.flush(PAUSE_SECONDS)

    return Deaths()


def _death(pack_id: str, error: Exception) -> dict[str, Any]:
    """What the driver is told of a worker that died."""
    inner = getattr(error, "worker_failures", None)
    causes = list(inner.values()) if isinstance(inner, Mapping) else [error]
    what = f"the worker of pack {pack_id} died ({_cause(causes[0])})"
    return {"kind": "failure", "what": what, "done": "it is started again"}


def _cause(error: Exception) -> str:
    """What an error says in the end; of a process that is gone Ray says in many words that it does not know."""
    text = " ".join(str(error).split())
    if _ran_out_of_memory(error):
        return "the node ran out of memory"
    if "node has died" in text or "node was terminated" in text:
        return "its node died"
    if "worker process has died" in text:
        return "its process was killed, or crashed"
    return last_line(error)[:CAUSE_CHARACTERS]


def one_worker(resources: Mapping[str, float], labels: Mapping[str, str]) -> Any:
    """A Ray Train `ScalingConfig` of one worker that takes these of a node with these labels."""
    from ray import train

    return train.ScalingConfig(
        num_workers=1,
        use_gpu=resources.get("GPU", 0) > 0,
        resources_per_worker=dict(resources),
        label_selector=dict(labels) or None,
    )


def _give_up(job: TrialJob, stream: Any, fence: Fence, reason: str) -> dict[str, Any]:
    """What becomes of a pack that cannot go on as it is: see `run_pack`."""
    client = StreamClient(stream, job.pack_id, job.arrays, fence.run)
    left = [sae_id for sae_id in job.sae_ids if not has_ended(job.storage, sae_id, job.journal)]
    if len(left) == 1:
        record = {"status": "failed", "reason": reason, "step": min(progress(job)), "history": []}
        job.storage.write_json(f"saes/{left[0]}/stopped.json", record)
        client.emit({"kind": "stopped", "sae_id": left[0], "status": "failed", "reason": reason})
    elif left:
        client.log(f"{reason}; its {len(left)} SAEs go on in two packs")
        what = f"pack {job.pack_id}: {reason.splitlines()[0]}"
        client.emit({"kind": "failure", "what": what, "done": f"split: its {len(left)} SAEs go on in two packs"})
    client.close()
    return {"split": left} if len(left) > 1 else {}


def run_worker(config: Mapping[str, Any]) -> None:
    """What Ray Train runs on the pack's worker."""
    from ray.util import get_current_placement_group

    from penstock.worker import train_pack

    job, fence = config["job"], config["fence"]
    job.storage.write_json(_group_file(fence), {"placement_group": get_current_placement_group().id.hex()})
    unfinished = train_pack(pickle.loads(job.work).part(job.pack_id, job.sae_ids), config["stream"], fence)
    if unfinished is not None:
        job.storage.write_json(_reason_file(fence), asdict(unfinished))


def _end_earlier_run(fence: Fence) -> None:
    """Free what an earlier run of the pack holds, its worker included, in case its trial was killed.

    Ray Train leaves that to a process which asks the cluster's State API; it has none to ask, or another cluster's,
    where several run on one machine, and the next run would wait for its resources for ever.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if fence.storage.exists(_group_file(fence)):
        group = fence.storage.read_json(_group_file(fence))["placement_group"]
        fence.storage.remove(_group_file(fence))
        with contextlib.suppress(ray.exceptions.RayError, ValueError):  # of a cluster that is gone
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group))))


def _group_file(fence: Fence) -> str:
    return fence.run_file.replace(".json", "-group.json")


def _reason_file(fence: Fence) -> str:
    return fence.run_file.replace(".json", f"-{fence.run}-reason.json")


def _ran_out_of_memory(error: Exception) -> bool:
    """Whether Ray's memory monitor has ended the worker."""
    return "OutOfMemoryError" in str(error) or "running low on memory" in str(error)


def has_ended(storage: Storage, sae_id: str, journal: Journal) -> bool:
    """Whether an SAE is finished, or was stopped: either way its pack has nothing more to do for it."""
    folder = f"saes/{sae_id}"
    stopped = storage.exists(f"{folder}/stopped.json") or journal.is_pruned(sae_id)
    return stopped or storage.is_committed(f"{folder}/final")


def steps_reached(storage: Storage, sae_id: str, steps: int, journal: Journal) -> int:
    """The step that an SAE has safely reached, by what is in storage; all of them where nothing more is to be done."""
    if has_ended(storage, sae_id, journal):
        return steps
    names = storage.names(f"saes/{sae_id}/checkpoints")
    return int(names[-1].removeprefix("step-")) if names else 0


def progress(job: TrialJob) -> tuple[int, ...]:
    """The step that each SAE of the pack has safely reached."""
    return tuple(steps_reached(job.storage, sae_id, job.steps, job.journal) for sae_id in job.sae_ids)


class Trials:
    """The packs as Tune trials, in a thread of their own: Tune blocks until the last one has ended."""

    def __init__(
        self, jobs: Mapping[str, Any], stream: Any, slots: int, storage: Storage, name: str, at_most: float = math.inf
    ) -> None:
        self._error: BaseException | None = None
        self._queue: Any = None
        self._stopping = False
        self._at_most = at_most
        self._jobs = len(jobs)
        self._thread = threading.Thread(
            target=self._run, args=(jobs, stream, slots, storage, name), name="tune", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait a while; whether the trials are still running."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def stop(self) -> None:
        """Start no more packs. Those that run end by themselves, once the stream has been told to halt them."""
        self._stopping = True
        if self._queue is not None:
            self._queue.waiting.clear()

    @property
    def at_most(self) -> float:
        """Packs that may run at once, of those that there is room for; more start when this grows, none ends when it
        shrinks."""
        return self._at_most

    @at_most.setter
    def at_most(self, packs: float) -> None:
        self._at_most = packs
        if self._queue is not None:
            self._queue.at_most = packs

    @property
    def waiting(self) -> list[str]:
        """Packs that have not started, or not again."""
        return [] if self._queue is None else [name for name, _ in list(self._queue.waiting)]

    @property
    def left(self) -> int:
        """Packs that have not ended."""
        return self._jobs if self._queue is None else len(self._queue.waiting) + len(self._queue.running)

    @property
    def is_full(self) -> bool:
        """Whether no more packs start until one ends or more may run."""
        return self._queue is not None and len(self._queue.running) >= self._at_most

    def check(self) -> None:
        """Raise what Tune itself died of; a trial's own failure is seen in its SAEs."""
        if self._error is not None:
            raise self._error

    def _run(self, jobs: Mapping[str, Any], stream: Any, slots: int, storage: Storage, name: str) -> None:
        if not jobs:
            return
        try:
            from ray import tune
            from ray.tune.progress_reporter import TrialProgressCallback

            _keep_keys_to_the_nodes()
            # A trial reports nothing to Tune itself: what it has to say goes through the stream.
            logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)

            class Silent(TrialProgressCallback):
                """The driver shows the progress of the packs itself."""

                def _print(self, msg: str) -> None:
                    pass

            self._queue = pack_queue([(name, job.sae_ids) for name, job in jobs.items()])
            self._queue.at_most = self._at_most
            if self._stopping:
                return
            trainable = tune.with_resources(
                tune.with_parameters(run_pack, jobs=dict(jobs), stream=stream), {"cpu": 0, "memory": TRIAL_MEMORY}
            )
            results = tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=self._queue,
                    max_concurrent_trials=slots,
                    num_samples=-1,  # until the queue says that it is over
                ),
                run_config=tune.RunConfig(
                    name=f"tune-{name}",
                    storage_path=storage.path("ray") if storage.is_local else f"{storage.uri}/ray",
                    failure_config=tune.FailureConfig(max_failures=TRIAL_FAILURES),
                    callbacks=[Silent()],
                    verbose=0,
                ),
            ).fit()
            for error in results.errors:
                traceback.print_exception(error)
        except BaseException as error:  # carried over to the driver's thread
            self._error = error


def _keep_keys_to_the_nodes() -> None:
    """Tune would copy the driver's keys of AWS into the runtime environment of every trial, where Ray's dashboard and
    its logs show them. The trials' processes have those of their node."""
    from ray.tune.execution import class_cache

    names = class_cache.ENV_VARS_TO_PROPAGATE
    class_cache.ENV_VARS_TO_PROPAGATE = {name for name in names if not name.startswith("AWS_")}


def pack_queue(packs: Iterable[tuple[str, tuple[str, ...]]]) -> Any:
    """A search algorithm of Tune that proposes packs, in order, then the halves of those that had to be split, and
    those again that had to yield to another sweep."""
    from ray.tune.search import Searcher

    class PackQueue(Searcher):
        def __init__(self) -> None:
            super().__init__()
            self.waiting = deque(packs)
            self.at_most = math.inf
            self.running: dict[str, tuple[str, tuple[str, ...]]] = {}  # trial -> name of its job, its SAEs

        def set_search_properties(self, metric: Any, mode: Any, config: Any, **spec: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
            if not self.waiting and not self.running:
                return Searcher.FINISHED
            if not self.waiting or len(self.running) >= self.at_most:
                return None
            name, sae_ids = self.running[trial_id] = self.waiting.popleft()
            return {"pack": name, "saes": sae_ids}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            if trial_id not in self.running:
                return
            name, sae_ids = self.running.pop(trial_id)
            if left := (result or {}).get("split"):
                middle = (len(left) + 1) // 2
                self.waiting.extend([(name, tuple(left[:middle])), (name, tuple(left[middle:]))])
            elif (result or {}).get("halted") == YIELD:
                self.waiting.append((name, sae_ids))

        def save(self, checkpoint_path: str) -> None:
            """Nothing is kept: a restarted driver begins anew, with what storage says is left."""
            Path(checkpoint_path).touch()  # Tune moves the file to its place

        def restore(self, checkpoint_path: str) -> None:
            pass

    return PackQueue()
