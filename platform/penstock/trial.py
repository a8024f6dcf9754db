"""A pack as a Tune trial: `run_pack` runs a Ray Train run of one worker, and starts it again while that helps.

Light on purpose: the trial's process and Ray Train's controller load this module and neither needs torch. What the
worker needs travels pickled, and only the worker opens it.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.consumer import StreamClient
from penstock.storage import Storage

TRIES_WITHOUT_PROGRESS = 3
PAUSE_SECONDS = 600.0


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


def progress(job: TrialJob) -> tuple[int, ...]:
    """The step that each SAE of the pack has safely reached, by what is in storage."""
    reached = []
    for sae_id in job.sae_ids:
        folder = f"saes/{sae_id}"
        if job.storage.is_committed(f"{folder}/final") or job.storage.exists(f"{folder}/stopped.json"):
            reached.append(job.steps)
        else:
            names = job.storage.names(f"{folder}/checkpoints")
            reached.append(int(names[-1].removeprefix("step-")) if names else 0)
    return tuple(reached)
