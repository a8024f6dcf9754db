"""The driver: from a spec to a front.

It resolves the spec, fills the token store, creates the model hosts and the stream, runs the packs as Tune trials, has
the hosts evaluate what comes out, and is the only writer to MLflow.
"""

import json
import logging
import os
import pickle
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from penstock.batches import Schedule
from penstock.errors import SweepError, UserError
from penstock.evaluate import BASES, Subject, protocol, protocol_id
from penstock.home import Home
from penstock.identity import code_hash, content_id
from penstock.models import ModelDescription
from penstock.plan import (
    FROZEN_DECODER,
    Cluster,
    PlannedSAE,
    describe,
    members,
    memory_of_block,
    plan_packs,
    plan_saes,
    read_sweep,
    stream_identity,
    training_settings,
    warnings,
    waves,
)
from penstock.spec import SweepSpec
from penstock.storage import Storage
from penstock.tokens import TokenStore, build_token_store

STATUS_SECONDS = 10.0
WINDOW_SHARE = 0.3  # of the smallest object store
WINDOW_LIMITS = (2, 8)  # blocks
TRIAL_MEMORY = 512 * 2**20


def plan_command(spec_path: str | Path, home: Home) -> str:
    """What `penstock plan` prints. It runs nothing, and tokenises where that has not been done: a run finds it so."""
    spec, model = read_sweep(spec_path)
    storage = Storage(home.storage_uri(spec.storage))
    say = partial(print, file=sys.stderr, flush=True)
    store = build_token_store(spec.data, spec.model, spec.train, storage, progress=say)
    saes = plan_saes(spec, model, store.train_id)
    left = [sae for sae in saes if not _is_done(storage, sae)]
    packs = plan_packs(spec, left)
    slots = Cluster(({"CPU": os.cpu_count() or 1, "GPU": _local_gpus()},)).pack_slots(spec.resources)
    schedule = _schedule(spec, store)
    return describe(spec, model, saes, packs, slots, schedule, len(saes) - len(left))


def run(spec_path: str | Path, home: Home, address: str | None = None, *, allow_code_change: bool = False) -> int:
    """`penstock run`: the whole sweep, from this process. Returns the exit status: 1 when an SAE failed."""
    started = time.time()
    spec, model = read_sweep(spec_path)
    storage = Storage(home.storage_uri(spec.storage))
    driver = Driver(spec, model, home, storage, started, allow_code_change)
    try:
        return driver.run(address)
    finally:
        driver.close()


def _is_done(storage: Storage, sae: PlannedSAE) -> bool:
    """Finished, or diverged: a run of the same numbers would diverge again."""
    folder = f"saes/{sae.sae_id}"
    return storage.is_committed(f"{folder}/final") or _stopped(storage, sae).get("status") == "diverged"


def _stopped(storage: Storage, sae: PlannedSAE) -> dict[str, Any]:
    name = f"saes/{sae.sae_id}/stopped.json"
    return storage.read_json(name) if storage.exists(name) else {}


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _schedule(spec: SweepSpec, store: TokenStore) -> Schedule:
    return Schedule(tuple(int(kept) for kept in store.kept_per_block), spec.train.batch_tokens, spec.train.steps)


@dataclass
class _Evaluation:
    """The evaluation of one hook point: what is still to be asked of the hosts, and the sums so far."""

    subjects: tuple[Subject, ...]
    slices: list[tuple[int, int]]
    left: int
    sums: dict[str, Any] = field(default_factory=dict)


class Driver:
    """One sweep in one process."""

    def __init__(
        self,
        spec: SweepSpec,
        model: ModelDescription,
        home: Home,
        storage: Storage,
        started: float,
        allow_code_change: bool,
    ) -> None:
        self.spec, self.model, self.home, self.storage = spec, model, home, storage
        self._started = started
        self._allow_code_change = allow_code_change
        self._seconds: dict[str, float] = {}
        self._hosts: dict[str, Any] = {}
        self._stream: Any = None
        self._own_ray = False
        self._tracker: Any = None
        self._tokens_at: dict[str, int] = {}
        self._cost: dict[str, float] = {}
        self._first_step: float | None = None

    def say(self, message: str) -> None:
        print(f"[{time.time() - self._started:6.1f} s] {message}", flush=True)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.time()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.time() - begun

    # ---- the whole ----

    def run(self, address: str | None) -> int:
        with self._phase("start"):
            self._prepare(address)
        if self._is_complete():
            self.say(f"sweep {self.spec.name} ({self.sweep_id}) is done already; nothing is left to do")
            self._print_front()
            return 0
        trials = self._start_trials()
        try:
            with self._phase("train"):
                self._follow(trials)
            with self._phase("evaluate"):
                self._evaluate()
            return self._finish()
        except BaseException as error:
            if self._tracker is not None:
                self._tracker.interrupt(f"{type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Stop what this driver started."""
        if self._own_ray or self._hosts:
            import ray

            for actor in [*self._hosts.values(), *([self._stream] if self._stream else [])]:
                ray.kill(actor)
            ray.shutdown()

    # ---- before training ----

    def _prepare(self, address: str | None) -> None:
        from penstock.cluster import connect, describe_cluster, map_on_cluster

        local = address is None and "RAY_ADDRESS" not in os.environ
        self.say(f"sweep {self.spec.name}: " + ("starting Ray" if local else "joining the Ray cluster"))
        with ThreadPoolExecutor(1) as beside:
            # A local Ray takes seconds to start in processes of its own; the tokens are read meanwhile.
            store = beside.submit(self._build_store) if local else None
            self._own_ray = connect(address)
            cluster, store_bytes = describe_cluster()
            if not local and len(cluster.nodes) > 1 and "://" not in self.storage.uri:
                self._refuse_local_storage()
            slots = cluster.pack_slots(self.spec.resources)
            self._start_hosts()
            self.say(f"{len(self._hosts)} model host(s) booting")
            self.store = store.result() if store else self._build_store(parallel_map=map_on_cluster)
        self.schedule = _schedule(self.spec, self.store)
        self.saes = plan_saes(self.spec, self.model, self.store.train_id)
        self.sweep_id = content_id([self.spec.name, sorted(sae.sae_id for sae in self.saes), self._protocol()])
        self.left = [sae for sae in self.saes if not _is_done(self.storage, sae)]
        self.packs = plan_packs(self.spec, self.left)
        self.slots = max(1, min(slots, len(self.packs)))
        hook_points = sorted({pack.hook_point for pack in self.packs})
        block = max(1, memory_of_block(self.spec, self.model, hook_points))
        self.window = int(min(max(store_bytes * WINDOW_SHARE // block, WINDOW_LIMITS[0]), WINDOW_LIMITS[1]))
        if self.left:
            text = describe(
                self.spec, self.model, self.saes, self.packs, self.slots, self.schedule, len(self.saes) - len(self.left)
            )
            self.say("the plan\n" + "\n".join(f"           {line}" for line in text.splitlines()))
        else:
            for warning in warnings(self.spec, self.saes):
                self.say(f"warning: {warning}")

    def _build_store(self, **parallel: Any) -> TokenStore:
        return build_token_store(
            self.spec.data, self.spec.model, self.spec.train, self.storage, progress=self.say, **parallel
        )

    def _refuse_local_storage(self) -> None:
        raise SweepError(
            f"storage {self.storage.uri!r} is a path of one machine, and this cluster has several nodes; accepted: a "
            "URI that every node reaches (s3://..., gs://...), or file:///... for a file system that all nodes mount"
        )

    def _start_hosts(self) -> None:
        from penstock.actors import NAMESPACE, HostActor, HostConfig

        resources = self.spec.resources
        config = HostConfig(self.spec.model, self.spec.data, self.storage, resources.host_threads, code_hash())
        for index in range(resources.model_hosts):
            name = f"host-{uuid.uuid4().hex[:12]}-{index}"
            options = {"num_cpus": resources.cpus_per_host, "num_gpus": resources.gpus_per_host}
            self._hosts[name] = HostActor.options(name=name, namespace=NAMESPACE, **options).remote(config)

    def _calibration_folder(self) -> str:
        """Calibrations lie by what their block 0 was made from."""
        model = [self.model.fingerprint, self.spec.model.dtype, self.spec.model.processing]
        return f"calibration/{content_id([model, stream_identity(self.spec.data, self.store.train_id)])}"

    def _protocol(self) -> dict[str, Any]:
        return protocol(self.spec, self.store.id)

    def _is_complete(self) -> bool:
        name = f"sweeps/{self.sweep_id}/result.json"
        return not self.left and self.storage.exists(name) and self._is_tracked()

    def _is_tracked(self) -> bool:
        from penstock.tracking import find_sweep

        try:
            return find_sweep(self.home, self.sweep_id) is not None
        except UserError:
            return False

    # ---- training ----

    def _start_trials(self) -> "_Trials":
        import ray

        from penstock.actors import NAMESPACE, StreamActor, StreamConfig
        from penstock.train import PackJob
        from penstock.trial import TrialJob, progress

        attempt_file = f"sweeps/{self.sweep_id}/attempt.json"
        attempt = (self.storage.read_json(attempt_file)["attempt"] if self.storage.exists(attempt_file) else 0) + 1
        training = training_settings(self.spec.train)
        resources = self.spec.resources
        jobs = {}
        for pack in self.packs:
            work = PackJob(
                pack_id=pack.pack_id,
                members=tuple(members(pack, self._metadata())),
                hook_points=pack.hook_points,
                training=training,
                schedule=self.schedule,
                storage=self.storage,
                calibration_folder=self._calibration_folder(),
                dtype=self.spec.model.dtype,
                checkpoints=self.spec.train.checkpoints,
                micro_batch_tokens=self.spec.train.micro_batch_tokens,
                threads=resources.pack_threads,
                on_gpu=resources.gpus_per_pack > 0,
                attempt=attempt,
                attempt_file=attempt_file,
                allow_code_change=self._allow_code_change,
                code=code_hash(),
            )
            jobs[pack.pack_id] = TrialJob(
                pack.pack_id,
                tuple(sae.sae_id for sae in pack.saes),
                training.steps,
                self.storage,
                resources.cpus_per_pack,
                resources.gpus_per_pack,
                attempt,
                pickle.dumps(work),
            )
        self._check_resumable()
        for sae in self.left:  # what failed before is tried again
            self.storage.remove(f"saes/{sae.sae_id}/stopped.json")
        cursors = {
            pack_id: self.schedule.locate(min(min(progress(job)), self.schedule.steps - 1))[0]
            for pack_id, job in jobs.items()
        }
        config = StreamConfig(
            tokens_id=self.store.id,
            calibration_folder=self._calibration_folder(),
            n_blocks=self.schedule.n_blocks,
            window=self.window,
            waves=tuple({pack.pack_id: pack.hook_points for pack in wave} for wave in waves(self.packs, self.slots)),
            cursors=cursors,
            hosts=tuple(self._hosts),
            code=code_hash(),
        )
        try:
            self._stream = StreamActor.options(name=f"sweep-{self.sweep_id}", namespace=NAMESPACE).remote(config)
        except ValueError:
            raise SweepError(
                f"sweep {self.spec.name} ({self.sweep_id}) is running on this cluster already; accepted: wait for it, "
                "or stop its job first"
            ) from None
        ray.get(self._stream.start.remote())
        about = {"attempt": attempt, "machine": socket.gethostname(), "pid": os.getpid(), "started": time.time()}
        self.storage.write_json(attempt_file, about)
        resumed = sum(cursor > 0 for cursor in cursors.values())
        again = f", {resumed} of them from checkpoints" if resumed else ""
        self.say(f"sweep id {self.sweep_id}: {len(jobs)} pack(s) starting{again}")
        return _Trials(jobs, self._stream, self.slots, self.storage, f"{self.sweep_id}-{attempt}")

    def _check_resumable(self) -> None:
        """Refuse checkpoints of other source code before anything is started for them."""
        if self._allow_code_change:
            return
        for sae in self.left:
            folder = f"saes/{sae.sae_id}/checkpoints"
            for name in self.storage.names(folder)[-1:]:
                about = f"{folder}/{name}/about.json"
                if self.storage.exists(about) and (code := self.storage.read_json(about)["code"]) != code_hash():
                    raise SweepError(
                        f"SAE {sae.sae_id} stands at {name}, written by source code {code}, and this is {code_hash()}: "
                        "the result would be neither's. Accepted: the same code, --allow-code-change to go on anyway, "
                        f"or removing {self.storage.path(folder)} to start it again"
                    )

    def _metadata(self) -> dict[str, Any]:
        data = self.spec.data
        return {
            "model_name": self.spec.model.name,
            "model_class_name": "TransformerBridge",
            "model_processing": self.spec.model.processing,
            "model_dtype": self.spec.model.dtype,
            "model_fingerprint": self.model.fingerprint,
            "context_size": data.context_size,
            "prepend_bos": data.bos,
            "dataset_path": data.dataset,
            "exclude": data.exclude.model_dump(),
            "data": stream_identity(data, self.store.train_id),
            "code": code_hash(),
        }

    def _open_tracker(self) -> None:
        """MLflow is opened when training has begun: its seconds are the packs' while they start."""
        if self._tracker is not None:
            return
        from penstock.tracking import TrackedSAE, Tracker

        self._tracker = Tracker(self.home, self.spec.name, self.sweep_id)
        tracked = [TrackedSAE(sae.sae_id, sae.hook_point, sae.params, sae.baseline) for sae in self.saes]
        params = {
            "model": self.spec.model.name, "dataset": self.spec.data.dataset, "train_tokens": self.spec.train.tokens,
            "batch_tokens": self.spec.train.batch_tokens, "saes": len(self.saes), "code": code_hash(),
            "protocol": protocol_id(self._protocol()),
        }  # fmt: skip
        self._tracker.open(self._resolved_spec(), params, tracked)

    def _follow(self, trials: "_Trials") -> None:
        """Pass on what the packs report until the last trial has ended. Raises what stopped the sweep."""
        shown = time.time()
        while True:
            alive = trials.wait(0.5)
            self._collect()
            if time.time() - shown > STATUS_SECONDS and self._tokens_at:
                shown = time.time()
                self._show_progress()
            if not alive:
                break
        self._collect()
        trials.check()
        self._open_tracker()

    def _collect(self) -> None:
        import ray

        try:
            events, cost, fatal = ray.get(self._stream.collect.remote(), timeout=60)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return  # the stream is being restarted; what it lost stands in the checkpoints' histories
        self._cost.update(cost)
        if fatal:
            raise SweepError(f"the sweep is given up: {fatal}")
        rows: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if event["kind"] == "metrics":
                rows.setdefault(event["sae_id"], []).append(event)
                self._tokens_at[event["sae_id"]] = event["tokens"]
            elif event["kind"] == "started":
                if self._first_step is None:
                    self._first_step = time.time() - self._started
                at = f"step {event['step']}" if event["step"] else "its first step"
                self.say(f"pack {event['pack_id']} is at {at}")
            elif event["kind"] == "log":
                self.say(event["message"])
            elif event["kind"] == "fatal":
                raise SweepError(event["reason"])
            elif event["kind"] == "stopped":
                self.say(f"SAE {event['sae_id']} {event['status']}: {event['reason']}")
        if rows:
            self._open_tracker()
        for sae_id, new in rows.items():
            self._tracker.log_rows(sae_id, new)

    def _show_progress(self) -> None:
        per_hook = []
        for hook_point in self.spec.hook_points:
            at = [self._tokens_at.get(sae.sae_id, 0) for sae in self.left if sae.hook_point == hook_point]
            if at:
                per_hook.append(f"{hook_point} {100 * sum(at) / len(at) / self._run_tokens:.0f}%")
        done = sum(self._tokens_at.values())
        rate = done / max(1e-9, time.time() - self._started - (self._first_step or 0.0))
        self.say(f"training: {', '.join(per_hook)} of {self._run_tokens:,} tokens; {rate:,.0f} SAE-tokens/s")

    @property
    def _run_tokens(self) -> int:
        return self.spec.train.steps * self.spec.train.batch_tokens

    # ---- evaluation ----

    def _subjects(self, hook_point: str) -> list[Subject]:
        """What of a hook point has no figures under this protocol yet."""
        subjects = [
            Subject(sae.sae_id, f"saes/{sae.sae_id}/final")
            for sae in self.saes
            if sae.hook_point == hook_point and self.storage.is_committed(f"saes/{sae.sae_id}/final")
        ]
        calibration = f"{self._calibration_folder()}/{hook_point}.safetensors"
        subjects += [
            Subject(f"{basis}-{k}", calibration, basis, k)
            for basis in BASES
            for k in self.spec.baselines.k
            if k <= self.model.hook_points[hook_point]
        ]
        return [subject for subject in subjects if not self.storage.exists(self._figures_file(subject, hook_point))]

    def _figures_file(self, subject: Subject, hook_point: str) -> str:
        protocol_key = protocol_id(self._protocol())
        if subject.basis is None:
            return f"saes/{subject.name}/evaluation-{protocol_key}.json"
        return f"{self._calibration_folder()}/{hook_point}/{subject.name}-{protocol_key}.json"

    def _report_rows(self) -> int:
        """Rows of the report split that hold `report_tokens` kept tokens."""
        import numpy as np

        total = self.store.n_rows("report")
        kept = np.cumsum(self.store.kept(self.store.rows("report", 0, total)).sum(1))
        return min(total, int(np.searchsorted(kept, self.spec.data.report_tokens)) + 1)

    def _evaluate(self) -> None:
        """Every SAE and baseline on the same report tokens; the hosts share the work in slices of rows."""
        import ray

        rows = self._report_rows()
        todo: list[tuple[str, int, int]] = []
        running: dict[str, _Evaluation] = {}
        for hook_point in self.spec.hook_points:
            subjects = tuple(self._subjects(hook_point))
            if not subjects:
                continue
            # A slice lasts about as long as harvesting a block, so that neither kind of work starves the other.
            step = max(1, min(rows, max(self.spec.model.harvest_rows, self.spec.data.block_rows // len(subjects))))
            slices = [(start, min(start + step, rows)) for start in range(0, rows, step)]
            running[hook_point] = _Evaluation(subjects, slices, len(slices))
            todo += [(hook_point, *part) for part in slices]
        if not todo:
            return
        total, shown = len(todo), time.time()
        self.say(f"evaluating {sum(len(one.subjects) for one in running.values())} SAEs and baselines on "
                 f"{self.spec.data.report_tokens:,} tokens of the report split")  # fmt: skip
        idle, asked = list(self._hosts.values()), {}
        failures = 0
        while todo or asked:
            while todo and idle:
                host, part = idle.pop(), todo.pop(0)
                subjects = running[part[0]].subjects
                reference = host.evaluate.remote(self.store.id, part[0], subjects, "report", part[1], part[2])
                asked[reference] = (host, part)
            finished, _ = ray.wait(list(asked), timeout=1.0)
            for reference in finished:
                host, part = asked.pop(reference)
                try:
                    sums = ray.get(reference)
                except ray.exceptions.RayActorError:
                    failures += 1
                    if failures > 3 * len(self._hosts):
                        raise SweepError("the model hosts die while evaluating; see their logs") from None
                    self.say("a model host died while evaluating; its slice is made again")
                    todo.insert(0, part)
                    time.sleep(1.0)
                except UserError as error:  # it comes with the host's traceback around it
                    raise getattr(error, "cause", error) from None
                else:
                    self._add(running[part[0]], part[0], sums)
                idle.append(host)
            if time.time() - shown > STATUS_SECONDS:
                shown = time.time()
                self.say(f"evaluation: {total - len(todo) - len(asked)} of {total} slices")

    def _add(self, evaluation: _Evaluation, hook_point: str, sums: Mapping[str, Any]) -> None:
        """Take in the sums of a slice; after the last one the figures are written."""
        for name, part in sums.items():
            evaluation.sums[name] = evaluation.sums[name].merge(part) if name in evaluation.sums else part
        evaluation.left -= 1
        if evaluation.left == 0:
            for subject in evaluation.subjects:
                metrics = evaluation.sums[subject.name].metrics()
                self._cost["evaluated_tokens"] = self._cost.get("evaluated_tokens", 0.0) + metrics["n_tokens"]
                record = {"protocol": self._protocol(), "metrics": metrics}
                self.storage.write_json(self._figures_file(subject, hook_point), record)

    # ---- the result ----

    def _finish(self) -> int:
        import pandas as pd

        from penstock.pareto import mark_front

        rows = []
        for sae in self.saes:
            status, metrics, reason = self._outcome(sae)
            self._publish(sae, status, metrics, reason)
            if sae.baseline is None:
                rows.append({"sae_id": sae.sae_id, **sae.params, **metrics, "status": status})
        table = pd.DataFrame(rows)
        for column in ("l0", "ce_recovered"):
            if column not in table:
                table[column] = float("nan")
        table = mark_front(table, self.spec.select.l0_band)
        baselines = self._baselines()
        failed = sorted(table.loc[~table["status"].isin(["finished", "diverged"]), "sae_id"])
        seconds = {f"seconds_{name}": value for name, value in self._seconds.items()}
        train_seconds = max(1e-9, self._seconds.get("train", 0.0))
        trained = sum(self._tokens_at.values())
        self._cost |= seconds | {
            "seconds_total": time.time() - self._started,
            "seconds_to_first_step": self._first_step or 0.0,
            "sae_tokens": float(trained),
            "sae_tokens_per_second": trained / train_seconds,
        }
        status = "failed" if failed else "finished"
        self._tracker.finish_sweep(
            status=status, front=table, baselines=baselines, cost=self._cost, files=self._plots(table, baselines)
        )
        result = {"status": status, "saes": [sae.sae_id for sae in self.saes], "cost": self._cost}
        if not failed:
            self.storage.write_json(f"sweeps/{self.sweep_id}/result.json", result)
        self._print_front()
        self._print_next(table)
        if failed:
            self.say(f"{len(failed)} SAE(s) failed: {', '.join(failed)}; the same command tries them again")
        return 1 if failed else 0

    def _outcome(self, sae: PlannedSAE) -> tuple[str, dict[str, float], str | None]:
        """(status, final figures, why it was stopped)."""
        folder = f"saes/{sae.sae_id}"
        if self.storage.is_committed(f"{folder}/final"):
            summary = self.storage.read_json(f"{folder}/final/summary.json")
            figures = self.storage.read_json(f"{folder}/evaluation-{protocol_id(self._protocol())}.json")["metrics"]
            # Whether a latent is dead shows over more tokens than the report split has.
            figures |= {name: summary[name] for name in ("dead_fraction", "dead_over_tokens")}
            return "finished", figures, None
        stopped = _stopped(self.storage, sae)
        return stopped.get("status", "failed"), {}, stopped.get("reason", "its pack never finished it")

    def _publish(self, sae: PlannedSAE, status: str, metrics: Mapping[str, float], reason: str | None) -> None:
        import tempfile

        folder = f"saes/{sae.sae_id}"
        if status == "finished":
            files = self.storage.read_folder(f"{folder}/final")
            history = json.loads(files.pop("summary.json"))["history"]
        else:
            files, history = {}, _stopped(self.storage, sae).get("history", [])
        self._tracker.log_rows(sae.sae_id, history)
        with tempfile.TemporaryDirectory() as temporary:
            for name, data in files.items():
                (Path(temporary) / name).write_bytes(data)
            self._tracker.finish_sae(
                sae.sae_id, status=status, metrics=metrics, folder=Path(temporary) if files else None, reason=reason
            )

    def _baselines(self) -> Any:
        """One row a baseline: kind, hook_point, k and its figures."""
        import pandas as pd

        rows = []
        for hook_point in self.spec.hook_points:
            for basis in BASES:
                for k in self.spec.baselines.k:
                    name = self._figures_file(Subject(f"{basis}-{k}", "", basis, k), hook_point)
                    if self.storage.exists(name):
                        figures = self.storage.read_json(name)["metrics"]
                        rows.append({"kind": basis, "hook_point": hook_point, "k": k, **figures})
        for sae in self.saes:
            if sae.baseline is not None:
                status, figures, _ = self._outcome(sae)
                if status == "finished":
                    k = sae.settings.model_dump()["k"]
                    rows.append({"kind": FROZEN_DECODER, "hook_point": sae.hook_point, "k": k, **figures})
        return pd.DataFrame(rows, columns=None if rows else ["kind", "hook_point", "k", "l0", "ce_recovered"])

    def _plots(self, table: Any, baselines: Any) -> Sequence[Path]:
        from penstock_dashboards.pareto import write_html, write_png

        folder = self.home.path / "reports" / self.sweep_id
        folder.mkdir(parents=True, exist_ok=True)
        png, page, protocol_file = (folder / name for name in ("pareto.png", "pareto.html", "protocol.json"))
        band = self.spec.select.l0_band
        write_png(table, baselines, png, title=self.spec.name, l0_band=band)
        write_html(table, baselines, page, title=self.spec.name, l0_band=band, spec=self._resolved_spec())
        protocol_file.write_text(json.dumps(self._protocol(), indent=1) + "\n")
        return [png, page, protocol_file]

    def _resolved_spec(self) -> str:
        return yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def _print_front(self) -> None:
        from penstock.cli import format_front
        from penstock.tracking import sweep_table

        print("\n" + format_front(sweep_table(self.home, self.sweep_id)) + "\n", flush=True)

    def _print_next(self, table: Any) -> None:
        folder = self.home.path / "reports" / self.sweep_id
        print(f"plot       {folder / 'pareto.png'}  and  {folder / 'pareto.html'}")
        best = table[table["on_front"]]
        if best.empty:
            return
        row = best.sort_values("ce_recovered").iloc[-1]
        home = f" --home {self.home.path}"
        print(
            "next\n"
            f"  .venv/bin/penstock ui{home}\n"
            f"  .venv/bin/penstock pull {self.spec.name} --hook-point {row['hook_point']} --to best-sae{home}\n"
            f"  .venv/bin/python -c 'import sae_core; print(sae_core.SAE.load(\"best-sae\"))'",
            flush=True,
        )


class _Trials:
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

            from penstock.trial import run_pack

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


