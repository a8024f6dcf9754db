"""The driver: from a spec to a front.

It resolves the spec, fills the token store, creates the model hosts and the stream, runs the packs as Tune trials, has
the hosts evaluate what comes out, and is the only writer to MLflow.
"""

import json
import math
import os
import pickle
import shlex
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.accounts import STARTING, Accounts
from penstock.batches import checkpoint_steps
from penstock.chronicle import Chronicle
from penstock.decisions import Pruner, add_saes
from penstock.errors import SweepError, UserError
from penstock.evaluation import bases, evaluate_on_hosts, evaluation_of
from penstock.fence import BEAT_SECONDS, Fence, Pulse, claim, release
from penstock.home import Home, remember
from penstock.identity import code_hash
from penstock.mirror import Mirror
from penstock.pack import KEPT
from penstock.placement import pack_request
from penstock.plan import (
    PlannedPack,
    PlannedSAE,
    describe,
    members,
    plan_packs,
    read_sweep,
    training_settings,
    warnings,
    waves,
)
from penstock.redaction import redacted
from penstock.resolved import ResolvedSweep
from penstock.session import Session, this_machine
from penstock.sharing import Sharing
from penstock.spec import SweepSpec
from penstock.stopping import IDLE_SECONDS, JOB_STOP_SECONDS, SAVE_SECONDS, STOPPED_STATUS, StopOrder, SweepStopped
from penstock.storage import Storage
from penstock.sweep_files import accounts_folder, attempt_file, control_file, result_file, spec_file, status_file
from penstock.text import last_line
from penstock.tokens import build_token_store

if TYPE_CHECKING:
    from penstock.actors import StreamConfig
    from penstock.meters import DriverMeters
    from penstock.tracking import TrackedSAE
    from penstock.trial import TrialJob, Trials

STATUS_SECONDS = 10.0
OFF_TARGET = 0.1  # of target_l0: what is farther off is said


def plan_command(
    spec_path: str | Path, home: Home, address: str | None = None, config: str | Path | None = None
) -> tuple[str, int]:
    """What `penstock plan` prints, for this machine or for the cluster at an address (see `live_cluster.look_at`), and
    its exit status: 2 where a model host or a pack could never be placed there. It runs nothing, and tokenises where
    that has not been done: a run finds it so."""
    from penstock.live_cluster import is_impossible, look_at, placement_table, placements

    spec, model = read_sweep(spec_path)
    live = look_at(address, config) if address is not None else None
    storage = Storage(home.storage_uri(spec.storage))
    say = partial(print, file=sys.stderr, flush=True)
    store = build_token_store(spec.data, spec.model, spec.train, storage, progress=say)
    sweep = ResolvedSweep(spec, model, store, storage, home)
    packs = plan_packs(spec, sweep.left())
    cluster = this_machine() if live is None else live.cluster
    try:
        text = _describe(sweep, packs, cluster.pack_slots(spec.resources))
    except SweepError as error:  # a spec for a cluster, planned on a laptop
        where = "here" if live is None else "there"
        note = f"warning    planned for a cluster where all packs run at once, since {where}: {error}"
        text = f"{_describe(sweep, packs, max(1, len(packs)))}\n{note}"
    if live is None or address is None:
        return text, 0
    found = placements(live, spec.resources, len(packs))
    return f"{text}\n{placement_table(live, found, address)}", 2 if is_impossible(live, found) else 0


def run(
    spec: str | Path | SweepSpec, home: Home, address: str | None = None, *, allow_code_change: bool = False
) -> int:
    """`penstock run`: the whole sweep, from this process. Returns the exit status: 1 when an SAE failed, 3 when
    somebody stopped it. `penstock.train` runs a `Driver` of its own."""
    driver = Driver(spec, home, allow_code_change)
    try:
        return driver.run(address)
    except SweepStopped as order:
        print(order, flush=True)
        return STOPPED_STATUS
    finally:
        driver.close()


def _describe(sweep: ResolvedSweep, packs: list[PlannedPack], slots: int) -> str:
    n_done = len(sweep.saes) - sum(len(pack.saes) for pack in packs)
    spool = sweep.spool(_passes(sweep, packs, slots))
    return describe(
        sweep.spec, sweep.model, sweep.saes, packs, slots, sweep.schedule, n_done, spool, sweep.store.epochs
    )


def _passes(sweep: ResolvedSweep, packs: list[PlannedPack], slots: int) -> int:
    """How often every block is needed: by each wave, and by the SAEs that are added later."""
    return len(waves(packs, slots)) + (sweep.spec.search.fill > 0)


class Driver(Session):
    """One sweep in one process."""

    def __init__(self, spec: str | Path | SweepSpec, home: Home, allow_code_change: bool) -> None:
        self._chronicle = Chronicle()
        super().__init__(spec, home)
        self._mirror = Mirror(self.spec.tracking, home, self.spec.name, self.say)
        self._allow_code_change = allow_code_change
        self._seconds: dict[str, float] = {}
        self._fence: Fence | None = None
        self._pulse: Pulse | None = None
        self._accounts: Accounts | None = None
        self._meters: DriverMeters | None = None
        self._phase_now = "start"
        self._stream_status: dict[str, Any] = {}
        self._asked_at = 0.0
        self._tracker: Any = None
        self._tokens_at: dict[str, int] = {}
        self._tokens_before: dict[str, int] = {}  # of these, what was in storage when this driver began
        self._stopped: dict[str, str] = {}  # SAE -> pruned, diverged, failed; in this attempt or before
        self._cost: dict[str, float] = {}
        self._first_step: float | None = None
        self._order = StopOrder()
        self._job_id: str | None = None  # of the Ray job that this is, where it was submitted
        self._folder = _working_folder()
        self._stream_restarts = 0
        self._halted_at: float | None = None
        self._halt_told: int | None = None  # the incarnation of the stream that knows
        self._phase_began = self._started
        self._evaluation_tokens = 0.0
        self._outcome: dict[str, Any] = {}
        self._trials: Trials | None = None
        self._sharing = Sharing(self.spec, self._started, self.fleet, self.say)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = self._phase_began = time.time()
        self._phase_now = name
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.time() - begun
            self._book()

    # ---- the whole ----

    def say(self, message: str) -> None:
        super().say(message)
        self._chronicle.log.add(message)

    def run(self, address: str | None) -> int:
        """The exit status: 1 when an SAE failed. Raises `SweepStopped` when the sweep was stopped."""
        self._order.listen()
        with self._phase("start"):
            self._prepare(address)
        if self._is_complete():
            self.say(f"sweep {self.spec.name} ({self.sweep.sweep_id}) is done already; nothing is left to do")
            self._print_front()
            return 0
        self._begin()
        try:
            with self._phase("train"):
                self._train()
            if self.spec.search.fill and self.sweep.journal.proposals() is None:
                with self._phase("search"):
                    self._add_saes()
                with self._phase("train"):
                    self._train()
            with self._phase("evaluate"):
                self._evaluate()
            status = self._finish()
            self._outcome = {"status": "failed" if status else "finished", "exit_status": status}
            return status
        except SweepStopped as order:
            left = self._what_is_left()
            self._outcome = {"status": "stopped", "exit_status": STOPPED_STATUS, "reason": str(order), "left": left}
            self._interrupt_tracking(str(order), "stopped")
            self.say(f"stopped: {left}")
            self._say_how_it_goes_on()
            raise
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._outcome = {"status": "failed", "exit_status": 2, "reason": redacted(reason)}
            if isinstance(error, KeyboardInterrupt):
                self._outcome = {"status": "interrupted", "exit_status": 130, "reason": "it was interrupted"}
                self._say_how_it_goes_on()  # before MLflow is told, during which there may be a second Ctrl-C
            self._chronicle.log.add(f"the sweep has failed: {reason}", detail=traceback.format_exc())
            self._interrupt_tracking(reason, "interrupted")
            raise

    def _say_how_it_goes_on(self) -> None:
        self.say(f"go on with: penstock resume {self.spec.name} --home {self.home.path}")

    def _interrupt_tracking(self, reason: str, status: str) -> None:
        """Tell MLflow that the sweep has not ended. That it cannot be told must not hide the reason."""
        if self._tracker is not None:
            from penstock.results import end_stopped

            try:
                try:
                    end_stopped(self.sweep, self._tracker, self._mirror)
                finally:
                    self._tracker.interrupt(reason, status)
            except Exception as error:
                self.say(f"MLflow could not be told that the sweep was {status}: {last_line(error)}")

    def close(self) -> None:
        """Stop what this driver started."""
        self._order.close()
        if self._joined:
            self.fleet.close()  # before it says that it has ended: who reads that may start the sweep again at once
        if self._pulse is not None:
            self._pulse.stop("stopped" if self._outcome.get("status") == "stopped" else "ended")
            with suppress(OSError):
                self._chronicle.write({"time": time.time(), **self._standing(), "phase": self._pulse.last}, now=True)
        if self._accounts is not None:
            self._accounts.write(over=True)
        if self._meters is not None:
            self._meters.end(time.time(), self._outcome.get("status", "failed"))
        if self._fence is not None:
            with suppress(OSError, ValueError):  # the next driver waits until this one is silent
                release(self._fence)
        self._mirror.close()
        super().close()

    # ---- before training ----

    def _connected(self) -> None:
        self._order.listen()  # Ray has taken SIGTERM for its own
        with suppress(ValueError, KeyError):
            about = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}"))
            self._job_id = about["metadata"]["job_submission_id"]

    def _make_room(self) -> None:
        if not self._own_ray:
            self.slots = self._sharing.begin(self.slots)

    def _prepare(self, address: str | None) -> None:
        self.join(address)
        self.left = self.sweep.left()
        self.packs = plan_packs(self.spec, self.left)
        self._spool = self.sweep.spool(_passes(self.sweep, self.packs, self.slots))
        if self.left:
            text = _describe(self.sweep, self.packs, self.slots)
            self.say("the plan\n" + "\n".join(f"           {line}" for line in text.splitlines()))
        else:
            for warning in warnings(self.spec, self.sweep.saes):
                self.say(f"warning: {warning}")
        self._say_not_kept()

    def _say_not_kept(self) -> None:
        """An SAE that was finished before `train.keep` asked for more is not trained again for it."""
        points = checkpoint_steps(self.spec.train.steps, self.spec.train.keep)
        wanted = {str(step * self.spec.train.batch_tokens) for step in points}
        lacking = [
            sae.sae_id
            for sae in self.sweep.saes
            if wanted and self.sweep.is_finished(sae)
            and wanted - set(self.storage.names(f"saes/{sae.sae_id}/{KEPT}"))
        ]  # fmt: skip
        if lacking:
            self.say(
                f"train.keep {self.spec.train.keep}: {len(lacking)} SAE(s) were finished before it asked for them, and "
                f"are not trained again: {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''}"
            )

    def _is_complete(self) -> bool:
        return not self.left and self.storage.exists(result_file(self.sweep.sweep_id)) and self._is_tracked()

    def _is_tracked(self) -> bool:
        from penstock.tracking import find_sweep

        try:
            return find_sweep(self.home, self.sweep.sweep_id) is not None
        except UserError:
            return False

    # ---- training ----

    def _begin(self) -> None:
        """Take the sweep over: start its stream, and close it to every other driver."""
        from penstock.meters import DriverMeters

        self._check_resumable()
        sweep = self.sweep
        config = self._stream_config()
        if self._spool is not None:
            self._spool.describe(sweep.about_stream)
        self.fleet.start_stream(config)  # first: its name is the lock on this cluster
        beat_file = status_file(sweep.sweep_id)
        self._fence = claim(self.storage, attempt_file(sweep.sweep_id), beat_file, self.say)
        self.storage.remove(control_file(sweep.sweep_id))
        self.storage.clean_staging()
        for sae in self.left:  # what failed before is tried again
            self.storage.remove(f"saes/{sae.sae_id}/stopped.json")
        self._note_reached()
        self._accounts = self._open_accounts(self._fence)
        self._meters = DriverMeters(sweep.sweep_id)
        self._order.watch(self.storage, sweep.sweep_id)
        self._open_chronicle(self._fence)
        self._pulse = Pulse(self.storage, beat_file, self._beat)
        remember(self.home, self.spec.name, sweep.sweep_id, self.storage)
        resumed = sum(cursor > 0 for cursor in config.cursors.values())
        again = f", {resumed} of them from checkpoints" if resumed else ""
        self.say(f"sweep id {sweep.sweep_id}: {len(self.packs)} pack(s) starting{again}")

    def _note_reached(self) -> None:
        """What is trained or stopped already is shown from the beginning, not once its pack reports."""
        from penstock.trial import steps_reached

        steps, journal = self.spec.train.steps, self.sweep.journal
        for sae in self.left:
            if reached := steps_reached(self.storage, sae.sae_id, steps, journal):
                self._tokens_at[sae.sae_id] = self._tokens_before[sae.sae_id] = reached * self.spec.train.batch_tokens
        left = {sae.sae_id for sae in self.left}
        for sae in self.sweep.saes:
            if sae.sae_id not in left and not self.sweep.is_finished(sae):
                self._stopped.setdefault(sae.sae_id, self.sweep.stopped(sae).get("status", "failed"))

    def _open_chronicle(self, fence: Fence) -> None:
        """The log and the spec, kept with the sweep: what `penstock logs` shows, and `penstock resume` goes on with."""
        attempt = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(self._started))}-{fence.token[:8]}"
        batch = self.spec.train.batch_tokens
        reached = {sae_id: tokens // batch for sae_id, tokens in self._tokens_before.items()}
        self._chronicle.open(self.storage, self.sweep.sweep_id, attempt, self.packs, reached)
        self.storage.write(spec_file(self.sweep.sweep_id), self.sweep.yaml.encode())
        context, n_rows = self.sweep.evaluated.context_size, evaluation_of(self.sweep).n_rows
        sites = [2 + len(bases(self.sweep, site)) for site in self.spec.sites]
        self._evaluation_tokens = float(n_rows * context * (len(self.left) + sum(sites)))

    def _open_accounts(self, fence: Fence) -> Accounts:
        resources = self.spec.resources
        about = {
            "started": self._started,
            "per_host": {"gpu_seconds": resources.gpus_per_host, "cpu_seconds": resources.cpus_per_host},
            "per_pack": {"gpu_seconds": resources.gpus_per_pack, "cpu_seconds": resources.cpus_per_pack},
            "gpu_hour_cost": resources.gpu_hour_cost,
        }
        name = f"{int(self._started):012d}-{fence.token[:8]}.json"
        accounts = Accounts(self.storage, f"{accounts_folder(self.sweep.sweep_id)}/{name}", about)
        accounts.add_saes({sae.sae_id: self._tracked(sae).title for sae in self.sweep.saes})
        return accounts

    def _book(self) -> None:
        """Note what the hosts are held for; the pulse does it too, from its thread."""
        if self._accounts is not None:
            hosts = self._stream_status.get("hosts") or dict.fromkeys(list(self.fleet.hosts), STARTING)
            self._accounts.tick(self._phase_now, hosts, self._stopped, self._cost)

    def _beat(self) -> dict[str, Any]:
        self._book()
        report = self._standing()
        self._chronicle.write({"time": time.time(), **report})
        if self._meters is not None:
            self._meters.update(report, time.time(), self.slots)
        return report

    def _train(self) -> None:
        """Run the packs to their end."""
        from penstock.trial import Trials

        assert self._fence is not None
        self._pruner = Pruner(self.sweep, self.fleet, self.say)
        self._pruner.begin(self.packs, self.slots)
        jobs = {pack.pack_id: self._job(pack) for pack in self.packs}
        name = f"{self.sweep.sweep_id}-{self._fence.token[:8]}-{len(self.sweep.added)}"
        at_once = min(self.most_slots, max(1, len(jobs)))
        self._follow(Trials(jobs, self.fleet.stream, at_once, self.storage, name, at_most=self.slots))

    def _add_saes(self) -> None:
        """Fill the front: what is added is the packs to train next."""
        add_saes(self.sweep, self._hosts_up(), self.say, self._check_evaluating)
        before = {sae.sae_id for sae in self.sweep.saes}
        self.sweep = replace(self.sweep)  # it has more SAEs now
        self.left = [sae for sae in self.sweep.left() if sae.sae_id not in before]
        self.packs = plan_packs(self.spec, self.left)
        self._note_reached()
        self._chronicle.add_packs(self.packs)
        if self._accounts is not None:
            self._accounts.add_saes({sae.sae_id: self._tracked(sae).title for sae in self.sweep.added})
        if self._tracker is not None:
            added = [self._tracked(sae) for sae in self.sweep.added]
            self._tracker.add(added)
            self._mirror.open(self.sweep.sweep_id, added)

    def _job(self, pack: PlannedPack) -> "TrialJob":
        from penstock.trial import TrialJob
        from penstock.worker import PackJob

        assert self._fence is not None
        training, resources = training_settings(self.spec.train), self.spec.resources
        work = PackJob(
            pack_id=pack.pack_id,
            members=tuple(members(pack, self.sweep.metadata)),
            hook_points=pack.hook_points,
            training=training,
            schedule=self.sweep.schedule,
            storage=self.storage,
            calibration_folder=self.sweep.calibration_folder,
            dtype=self.spec.model.dtype,
            checkpoints=self.spec.train.checkpoints,
            micro_batch_tokens=self.spec.train.micro_batch_tokens,
            threads=resources.pack_threads,
            saes_at_once=resources.saes_at_once,
            on_gpu=resources.gpus_per_pack > 0,
            spool=self._spool,
            journal=self.sweep.journal,
            probe=self.sweep.probe,
            rungs=self._pruner.rungs,
            keep=self.spec.train.keep,
            allow_code_change=self._allow_code_change,
            code=code_hash(),
        )
        return TrialJob(
            pack_id=pack.pack_id,
            sae_ids=tuple(sae.sae_id for sae in pack.saes),
            arrays=pack.hook_points,
            steps=training.steps,
            storage=self.storage,
            resources=pack_request(resources).bundle,
            labels=dict(resources.pack_labels),
            fence=self._fence,
            journal=self.sweep.journal,
            spool=self._spool,
            work=pickle.dumps(work),
        )

    def _stream_config(self) -> "StreamConfig":
        from penstock.actors import Source, StreamConfig
        from penstock.trial import steps_reached

        schedule, journal = self.sweep.schedule, self.sweep.journal
        last = schedule.steps - 1
        return StreamConfig(
            name=self.sweep.sweep_id,
            source=Source(self.sweep.store.id, self.sweep.calibration_folder, self._spool),
            n_blocks=schedule.n_blocks,
            window=self.window(plan_packs(self.spec, self.sweep.saes)),
            waves=tuple({pack.pack_id: pack.hook_points for pack in wave} for wave in waves(self.packs, self.slots)),
            cursors={
                pack.pack_id: schedule.locate(
                    min(last, *(steps_reached(self.storage, sae.sae_id, schedule.steps, journal) for sae in pack.saes))
                )[0]
                for pack in self.packs
            },
            lease_seconds=self.spec.resources.lease_seconds,
            code=code_hash(),
            demand=self._sharing.demand(self.sweep.sweep_id, len(self.packs)),
        )

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

    def _open_tracker(self) -> None:
        """MLflow is opened when training has begun: its seconds are the packs' while they start."""
        if self._tracker is not None:
            return
        from penstock.tracking import Tracker

        self._tracker = Tracker(self.home, self.spec.name, self.sweep.sweep_id)
        saes = self.sweep.saes
        tracked = [self._tracked(sae) for sae in saes]
        params = {
            "model": self.spec.model.name, "dataset": self.spec.data.label, "train_tokens": self.spec.train.tokens,
            "batch_tokens": self.spec.train.batch_tokens, "saes": len(saes), "code": code_hash(),
            "protocol": self.sweep.protocol_id,
        }  # fmt: skip
        self._tracker.open(self.sweep.yaml, params, tracked)
        self._mirror.open(self.sweep.sweep_id, tracked)

    def _tracked(self, sae: PlannedSAE) -> "TrackedSAE":
        from penstock.tracking import TrackedSAE

        proposed = 1 if sae in self.sweep.added else None
        return TrackedSAE(sae.sae_id, sae.hook_point, sae.params, sae.baseline, proposed)

    def _follow(self, trials: "Trials") -> None:
        """Pass on what the packs report until the last trial has ended. Raises what stopped the sweep."""
        shown, self._trials = time.time(), trials
        while True:
            alive = trials.wait(0.5)
            self._collect()
            if time.time() - shown > STATUS_SECONDS and self._tokens_at:
                shown = time.time()
                self._show_progress()
            if not alive or self._has_halted(trials):
                break
        self._trials = None
        self._share(now=True)
        self._collect()
        self._order.check()
        trials.check()
        self._open_tracker()

    def _has_halted(self, trials: "Trials") -> bool:
        """Where the sweep was asked to stop, have every pack save and end; whether to wait for them no longer."""
        from penstock.trial import STOP

        if not self._order.look():
            return False
        if self._halted_at is None:
            self._halted_at = time.time()
            self.say(f"stopping ({self._order.reason})" + ("" if self._order.now else ": every pack saves and ends"))
            trials.stop()
        if self._order.now:
            return True
        if self._halt_told != self.fleet.incarnation and self.fleet.halt_packs(None, STOP):
            self._halt_told = self.fleet.incarnation
        live = [pack for pack in self._stream_status.get("packs", {}).values() if pack["status"] == "live"]
        return time.time() - self._halted_at > (SAVE_SECONDS if live else IDLE_SECONDS)

    def _what_is_left(self) -> str:
        """How far a sweep has come that is stopped, in words."""
        from penstock.trial import steps_reached

        steps, journal = self.spec.train.steps, self.sweep.journal
        try:
            finished = {sae.sae_id for sae in self.sweep.saes if self.sweep.is_finished(sae)}
            stopped = {sae.sae_id: self.sweep.stopped(sae).get("status") for sae in self.sweep.saes}
            ends = Counter(why for sae_id, why in stopped.items() if why and sae_id not in finished)
            left = [sae for sae in self.sweep.saes if sae.sae_id not in finished and not stopped[sae.sae_id]]
            at = [steps_reached(self.storage, sae.sae_id, steps, journal) for sae in left]
        except OSError as error:
            return f"storage {self.storage.uri!r} cannot be asked what is done ({error})"
        begun = [step for step in at if step]
        where = "".join(f", {count} {why}" for why, count in ends.items())
        if begun:
            span = f"{min(begun):,}" if min(begun) == max(begun) else f"{min(begun):,} to {max(begun):,}"
            where += f", {len(begun)} saved at step {span} of {steps:,}"
        fresh = len(at) - len(begun)
        return (
            f"of {len(self.sweep.saes)} SAEs {len(finished)} done{where}"
            + (f", {fresh} not begun" if fresh else "")
            + ("" if left else "; what is left is to evaluate them")
        )

    def _collect(self) -> None:
        found = self.fleet.collect()
        if found is None:
            return
        self._cost.update(self.fleet.cost)
        if self.fleet.restarts > self._stream_restarts:
            self._stream_restarts = self.fleet.restarts
            self._chronicle.failures.note("the stream died", "it was started again; packs attach again")
        self._stream_status = found["status"]
        self._chronicle.note(time.time(), self._stream_status, self._cost)
        self._share()
        self._heed()
        if found["fatal"]:
            raise SweepError(f"the sweep is given up: {found['fatal']}")
        rows: dict[str, list[dict[str, Any]]] = {}
        for event in found["mail"]:
            self._pruner.heed(event)
            self._meters.heed(event)
            self._chronicle.heed(event)
            if event["kind"] == "metrics":
                rows.setdefault(event["sae_id"], []).append(event)
                self._tokens_at[event["sae_id"]] = event["tokens"]
            elif event["kind"] == "started":
                if self._first_step is None:
                    self._first_step = time.time() - self._started
                for sae_id in event["sae_ids"]:
                    self._tokens_before.setdefault(sae_id, event["step"] * self.spec.train.batch_tokens)
                at = f"step {event['step']}" if event["step"] else "its first step"
                super().say(f"pack {event['pack_id']} is at {at}")  # the chronicle has logged it
            elif event["kind"] == "time" and self._accounts is not None:
                self._accounts.heed(event)
            elif event["kind"] == "log":
                super().say(event["message"])
            elif event["kind"] == "fatal":
                raise SweepError(event["reason"])
            elif event["kind"] == "stopped":
                super().say(f"SAE {event['sae_id']} {event['status']}: {event['reason']}")
                self._tokens_at[event["sae_id"]] = event.get("tokens", self._tokens_at.get(event["sae_id"], 0))
                self._stopped[event["sae_id"]] = event["status"]
        self._pruner.decide()
        if rows:
            self._open_tracker()
        for sae_id, new in rows.items():
            self._mirror.log(sae_id, self._tracker.log_rows(sae_id, new))

    def _share(self, now: bool = False) -> None:
        if not self._own_ray:  # on which nobody else runs
            self._sharing.look(self._trials, self._stream_status, now)

    def _heed(self) -> None:
        """Do what `penstock scale` has asked for. Raises when another driver has taken the sweep over."""
        if time.time() - self._asked_at < BEAT_SECONDS:
            return
        self._asked_at = time.time()
        assert self._fence is not None
        try:
            self._fence.check()
            file = control_file(self.sweep.sweep_id)
            if not self.storage.exists(file):
                return
            wanted = self.storage.read_json(file)["model_hosts"]
            self.storage.remove(file)
        except OSError:  # a storage that does not answer now may do so in two seconds
            return
        if wanted != len(self.fleet.hosts):
            self.say(
                f"model hosts: {len(self.fleet.hosts)} -> {wanted}; new ones join when the cluster has room for them "
                "and they have loaded the model, others leave after the block at hand"
            )
            self.fleet.scale(wanted)

    def _standing(self) -> dict[str, Any]:
        """How the sweep stands, for `penstock status`. Called from the pulse's thread, hence the copies."""
        tokens_at, cost, stopped = dict(self._tokens_at), dict(self._cost), dict(self._stopped)
        return {
            "name": self.spec.name,
            "sweep_id": self.sweep.sweep_id,
            "phase": self._phase_now,
            "started": self._started,
            "pid": os.getpid(),
            "machine": socket.gethostname(),
            "saes": len(self.sweep.saes),
            "left": len(self.left),
            "tokens": self._run_tokens,
            "tokens_at": {
                site.label: [
                    tokens_at.get(sae.sae_id, 0)
                    for sae in self.left
                    if sae.site == site and sae.sae_id not in stopped
                ]
                for site in self.spec.sites
            },
            "stopped": dict(Counter(stopped.values())),
            "packs": {pack.pack_id: [pack.hook_point, len(pack.saes)] for pack in self.packs},
            "sae_tokens_per_second": self._average_rate(tokens_at),
            "cost": cost,
            "home": str(self.home.path),
            "storage": self.storage.uri,
            "folder": self._folder,
            "job": self._job_id,
            "job_stop_seconds": float(os.environ.get(JOB_STOP_SECONDS, 0)),
            "stopping": self._order.asked,
            "outcome": self._outcome,
            **self._chronicle.report(
                self._phase_now, time.time() - self._phase_began, self._stream_status, cost,
                steps=self.spec.train.steps, batch_tokens=self.spec.train.batch_tokens, slots=self.slots,
                ended=stopped, evaluation_tokens=self._evaluation_tokens,
            ),
            "share": self._sharing.report,
            "stream": self._stream_status,
        }

    def _show_progress(self) -> None:
        per_hook = []
        for site in self.spec.sites:
            here = [sae for sae in self.left if sae.site == site and sae.sae_id not in self._stopped]
            at = [self._tokens_at.get(sae.sae_id, 0) for sae in here]
            if at:
                per_hook.append(f"{site.label} {100 * sum(at) / len(at) / self._run_tokens:.0f}%")
        rate = self._average_rate(self._tokens_at)
        self.say(f"training: {', '.join(per_hook)} of {self._run_tokens:,} tokens; {rate:,.0f} SAE-tokens/s")

    def _average_rate(self, tokens_at: dict[str, int]) -> float:
        """SAE-tokens a second since the first step, of those that this driver has seen made."""
        return self._made(tokens_at) / max(1e-9, time.time() - self._started - (self._first_step or 0.0))

    def _made(self, tokens_at: dict[str, int]) -> int:
        """SAE-tokens that this driver has seen trained. An SAE whose checkpoint cannot be read begins before what was
        in storage, and has made nothing until it is there again."""
        return sum(max(0, tokens - self._tokens_before.get(sae_id, 0)) for sae_id, tokens in tokens_at.items())

    @property
    def _run_tokens(self) -> int:
        return self.spec.train.steps * self.spec.train.batch_tokens

    # ---- the result ----

    def _evaluate(self) -> None:
        self._chronicle.evaluated = 0.0
        self._cost["evaluated_tokens"] = evaluate_on_hosts(
            self.sweep, self._hosts_up(), self.say, check=self._check_evaluating
        )

    def _check_evaluating(self, share: float) -> None:
        """An evaluation is stopped at once: what it has no figures of yet is evaluated when the sweep goes on."""
        self._chronicle.evaluated = share
        self._order.check()

    def _hosts_up(self) -> list[Any]:
        """The hosts that answer: one that still waits for room, or could not be built, would keep its part of an
        evaluation from being done."""
        return self.fleet.hosts_up or list(self.fleet.hosts.values())

    def _finish(self) -> int:
        from penstock.results import SETTLED, publish

        trained = self._made(self._tokens_at)
        self._cost |= {f"seconds_{name}": value for name, value in self._seconds.items()}
        self._cost |= {
            "seconds_total": time.time() - self._started,
            "seconds_to_first_step": self._first_step or 0.0,
            "sae_tokens": trained,
            "sae_tokens_per_second": trained / max(1e-9, self._seconds["train"]),
            **self._saved(),
            **self._held(),
        }
        table = publish(self.sweep, self._tracker, self._cost, self._mirror)
        self._print_front()
        self._say_off_target(table)
        self._print_next(table)
        failed = sorted(table.loc[~table["status"].isin(SETTLED), "sae_id"])
        if failed:
            self.say(f"{len(failed)} SAE(s) failed: {', '.join(failed)}; the same command tries them again")
        return 1 if failed else 0

    def _held(self) -> dict[str, float]:
        """What all attempts have held of the cluster."""
        from penstock.cost import read_cost

        assert self._accounts is not None
        self._book()
        self._accounts.write()
        with suppress(UserError):  # a storage that is full costs the sweep nothing but its books
            return asdict(read_cost(self.storage, self.sweep.sweep_id, self.spec.name).total)
        return {}

    def _say_off_target(self, table: Any) -> None:
        """An SAE that was asked for an L0 and has another is no error, but nobody should have to look for it."""
        for row in table.to_dict("records"):
            asked, found = row.get("target_l0", math.nan), row["l0"]
            if row["status"] == "finished" and math.isnan(row["prefix"]) and abs(found / asked - 1) > OFF_TARGET:
                self.say(
                    f"SAE {row['sae_id']}: target_l0 is {asked:g}, and its L0 on the report split {found:.3g}; with "
                    "more train.tokens the controller comes nearer"
                )

    def _saved(self) -> dict[str, float]:
        """What pruning has spared, over all attempts. An SAE that finished before it heard of the decision counts as
        finished."""
        steps = self.spec.train.steps
        pruned = [self.sweep.stopped(sae) for sae in self.sweep.saes if not self.sweep.is_finished(sae)]
        spared = [steps - one["step"] for one in pruned if one.get("status") == "pruned"]
        if not spared:
            return {}
        return {"saes_pruned": len(spared), "sae_tokens_spared": sum(spared) * self.spec.train.batch_tokens}

    def _print_front(self) -> None:
        from penstock.front_table import format_front
        from penstock.tracking import sweep_table

        table = sweep_table(self.home, self.sweep.sweep_id)
        print(f"\n{format_front(table, self.sweep.spec.select.l0_band)}\n", flush=True)

    def _print_next(self, table: Any) -> None:
        from penstock.results import report_folder

        folder = report_folder(self.sweep)
        print(f"plot       {folder / 'pareto.png'}  and  {folder / 'report.html'}")
        front = table[table["on_front"]]
        if front.empty:
            return
        best = front.sort_values("ce_recovered").iloc[-1]
        command, home = _command("penstock"), f" --home {self.home.path}"
        print(
            "next\n"
            f"  {command} ui{home}\n"
            f"  {command} pull {self.spec.name} --hook-point {shlex.quote(best['hook_point'])} --to best-sae{home}\n"
            f"  {command} features best-sae --serve{home}",
            flush=True,
        )


def _working_folder() -> str | None:
    """None where somebody has removed it."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _command(name: str) -> str:
    """A command of this environment as its user types it here."""
    beside, here = Path(sys.executable).with_name(name), _working_folder()
    return os.path.relpath(beside) if beside.exists() and here and Path(here) in beside.parents else name
