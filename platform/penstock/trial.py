"""The packs as Tune trials. `Trials` is the driver's side; `run_pack`, the trial itself, runs a Ray Train run of one
worker and starts it again while that helps.

Light on purpose: the trial's process and Ray Train's controller load this module and neither needs torch. What the
worker needs travels pickled, and only the worker opens it.
"""

import logging
import pickle
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.consumer import StreamClient
from penstock.storage import Storage

TRIES_WITHOUT_PROGRESS = 3
PAUSE_SECONDS = 600.0
TRIAL_MEMORY = 512 * 2**20


@dataclass(frozen=True)
class TrialJob:
    """What a trial needs to know of its pack. `work` is a pickled `penstock.train.PackJob`."""

    pack_id: str
    sae_ids: tuple[str, ...]
    steps: int
    storage: Storage
    cpus: float
    gpus: float
    attempt: int
    work: bytes


def run_pack(config: Mapping[str, Any], *, jobs: Mapping[str, TrialJob], stream: Any) -> None:
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
            run_worker,
            train_loop_config={"work": job.work, "stream": stream},
            scaling_config=train.ScalingConfig(
                num_workers=1,
                use_gpu=job.gpus > 0,
                resources_per_worker={"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})},
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


def run_worker(config: Mapping[str, Any]) -> None:
    """What Ray Train runs on the pack's worker."""
    from penstock.train import train_pack

    train_pack(pickle.loads(config["work"]), config["stream"])


def has_ended(storage: Storage, sae_id: str) -> bool:
    """Whether an SAE is finished, or was stopped: either way its pack has nothing more to do for it."""
    folder = f"saes/{sae_id}"
    return storage.is_committed(f"{folder}/final") or storage.exists(f"{folder}/stopped.json")


def progress(job: TrialJob) -> tuple[int, ...]:
    """The step that each SAE of the pack has safely reached, by what is in storage."""
    reached = []
    for sae_id in job.sae_ids:
        if has_ended(job.storage, sae_id):
            reached.append(job.steps)
        else:
            names = job.storage.names(f"saes/{sae_id}/checkpoints")
            reached.append(int(names[-1].removeprefix("step-")) if names else 0)
    return tuple(reached)


class Trials:
    """The packs as Tune trials, in a thread of their own: Tune blocks until the last one has ended."""

    def __init__(self, jobs: Mapping[str, Any], stream: Any, slots: int, storage: Storage, name: str) -> None:
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._run, args=(jobs, stream, slots, storage, name), name="tune", daemon=True
        )
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait a while; whether the trials are still running."""
        self._thread.join(seconds)
        return self._thread.is_alive()

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

            # A trial reports nothing to Tune itself: what it has to say goes through the stream.
            logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)

            class Silent(TrialProgressCallback):
                """The driver shows the progress of the packs itself."""

                def _print(self, msg: str) -> None:
                    pass

            trainable = tune.with_resources(
                tune.with_parameters(run_pack, jobs=dict(jobs), stream=stream), {"cpu": 0, "memory": TRIAL_MEMORY}
            )
            results = tune.Tuner(
                trainable,
                param_space={"pack": tune.grid_search(list(jobs))},
                tune_config=tune.TuneConfig(max_concurrent_trials=slots),
                run_config=tune.RunConfig(
                    name=f"tune-{name}",
                    storage_path=storage.path("ray") if storage.is_local else f"{storage.uri}/ray",
                    failure_config=tune.FailureConfig(max_failures=3),
                    callbacks=[Silent()],
                    verbose=0,
                ),
            ).fit()
            for error in results.errors:
                traceback.print_exception(error)
        except BaseException as error:  # carried over to the driver's thread
            self._error = error
