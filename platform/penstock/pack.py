"""A pack: the SAEs that train together on one worker, each one on its own.

Every SAE has its own optimiser, schedules, step and fate: one that diverges or raises is stopped and marked, and the
others keep their bits. A pack may mix SAEs that stand at different steps (some resumed, some new): a batch is a pure
function of its step, so an SAE simply waits until the pack reaches its own.
"""

import json
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from penstock.errors import CheckpointError, SweepError
from penstock.identity import code_hash
from penstock.memory import is_out_of_memory
from penstock.probe import measure
from penstock.stopwatch import Stopwatch
from penstock.storage import Storage
from sae_core import SAE, Calibration, SAESettings, SAETrainer, TrainingSettings
from sae_core.errors import reason_of

KEEP_CHECKPOINTS = 2
KEPT = "kept"  # below an SAE's folder: what it was on the way, by the tokens that it had been trained on
LEAST_MICRO_BATCH = 64  # tokens, and an eighth of a batch; a pack that needs less is better split than slow
DEAD_OVER_TOKENS = 1_000_000


class PackOutOfMemoryError(Exception):
    """The pack's SAEs do not fit one worker together; fewer of them may."""


@dataclass(frozen=True)
class PackMember:
    """One SAE of a pack: its id, its settings, and what its `cfg.json` says of its origin.

    reads, writes: the inputs of the pack that it reads and that it reconstructs, by name; the same one for an SAE, two
    for a transcoder. reshape_activations: as the `cfg.json` has it.
    """

    sae_id: str
    reads: str
    writes: str
    settings: SAESettings
    metadata: Mapping[str, Any] = field(default_factory=dict)
    reshape_activations: str = "none"

    @property
    def is_transcoder(self) -> bool:
        return self.reads != self.writes


@dataclass
class _Slot:
    member: PackMember
    trainer: SAETrainer
    folder: str
    history: list[dict[str, Any]]
    watch: Stopwatch
    tokens_before: int = 0  # that it had been trained on when it came to this worker
    saved_seconds: float = 0.0  # of the watch, when it was last saved
    reason: str | None = None  # why it was stopped

    @property
    def active(self) -> bool:
        return self.reason is None


class Pack:
    """The SAEs of a pack, from their newest checkpoints or from the start.

    Args:
        members: the SAEs; those already finished or stopped for good must not be among them.
        calibrations: one an input.
        emit: called with every event: metric rows, and an SAE's end.
        saes_at_once: how many SAEs step at the same time, each with torch's threads; the results are the same.
        guard: raises when this pack may not write any more (see `fence.py`).
        allow_code_change: go on with checkpoints that other source code has written.
    """

    def __init__(
        self,
        members: Sequence[PackMember],
        training: TrainingSettings,
        calibrations: Mapping[str, Calibration],
        storage: Storage,
        *,
        device: str = "cpu",
        micro_batch_tokens: int | None = None,
        saes_at_once: int = 1,
        emit: Callable[[dict[str, Any]], None] = lambda event: None,
        log: Callable[[str], None] = print,
        guard: Callable[[], None] = lambda: None,
        allow_code_change: bool = False,
    ) -> None:
        self.training = training
        self._guard = guard
        self._storage = storage
        self._emit = emit
        self._log = log
        self._metrics_every = max(1, training.steps // 100)
        self._pool = ThreadPoolExecutor(saes_at_once) if saes_at_once > 1 else None
        self._slots: list[_Slot] = []
        self._pruned_tokens = 0
        self._pruned_laps: dict[str, tuple[float, float, int]] = {}
        for member in members:
            trainer = SAETrainer(
                member.settings,
                training,
                calibrations[member.reads],
                target_calibration=calibrations[member.writes] if member.is_transcoder else None,
                device=device,
                micro_batch_tokens=micro_batch_tokens,
            )
            watch = Stopwatch(on_gpu=device == "cuda")
            slot = _Slot(member, trainer, f"saes/{member.sae_id}", [], watch)
            self._resume(slot, allow_code_change)
            slot.tokens_before = trainer.tokens_seen
            self._slots.append(slot)

    @property
    def next_step(self) -> int:
        """The first step that an active SAE still has to make; `training.steps` when none has."""
        return min((slot.trainer.steps_done for slot in self._slots if slot.active), default=self.training.steps)

    @property
    def tokens_trained(self) -> int:
        """Tokens that the SAEs have been trained on, summed over them."""
        return self._pruned_tokens + sum(slot.trainer.tokens_seen for slot in self._slots)

    def laps(self) -> dict[str, tuple[float, float, int]]:
        """By SAE: the seconds that its steps have taken on this worker, those of them up to when it was last saved, and
        the tokens that it was trained on here."""
        return self._pruned_laps | {slot.member.sae_id: _lap(slot) for slot in self._slots}

    def step(self, step: int, inputs: Mapping[str, Tensor]) -> None:
        """Train every active SAE that stands at this step on its batch: an array [batch, d] an input, read-only, whose
        rows are the same tokens in all of them."""
        want_metrics = (step + 1) % self._metrics_every == 0 or step + 1 == self.training.steps
        due = [slot for slot in self._slots if slot.active and slot.trainer.steps_done == step]

        def train(slot: _Slot) -> dict[str, float] | Exception | None:
            target = inputs[slot.member.writes] if slot.member.is_transcoder else None
            try:
                with slot.watch.lap():
                    return self._step_within_memory(slot.trainer, inputs[slot.member.reads], target, want_metrics)
            except Exception as error:  # the border of one SAE: its fault stops it alone
                return error

        outcomes = list(self._pool.map(train, due) if self._pool else map(train, due))
        for slot, outcome in zip(due, outcomes, strict=True):
            if isinstance(outcome, Exception) and is_out_of_memory(outcome) and len(self._slots) > 1:
                raise PackOutOfMemoryError(f"{type(outcome).__name__} with micro-batches of "
                                           f"{slot.trainer.micro_batch_tokens} tokens") from outcome  # fmt: skip
            self._note(slot, outcome)

    def measure(
        self, step: int, inputs: Mapping[str, Tensor], latest: Mapping[str, Tensor]
    ) -> dict[str, dict[str, float]]:
        """The figures, by SAE, of those that have made `step` steps, as they would be used now, on search activations
        [n, d] an input: `l0`, `explained_variance`, and `dead_fraction` by the training tokens so far. `latest`: the
        training tokens that thresholds are calibrated on. What cannot be measured is stopped alone, as in a step."""
        found = {}
        for slot in [slot for slot in self._slots if slot.active and slot.trainer.steps_done == step]:
            if self._stop_if_diverged(slot):
                continue
            reads, writes = slot.member.reads, slot.member.writes
            try:
                figures = measure(slot.trainer.export(tokens=latest[reads]), inputs[reads], inputs[writes])
            except Exception as error:  # the border of one SAE
                if is_out_of_memory(error) and len(self._slots) > 1:
                    raise PackOutOfMemoryError(f"{type(error).__name__} at a rung") from error
                self._note(slot, error)
            else:
                found[slot.member.sae_id] = {**figures, "dead_fraction": float(_dead(slot.trainer).mean())}
        return found

    def prune(self, reasons: Mapping[str, str], write_history: Callable[[str, dict[str, Any]], None]) -> None:
        """Stop the SAEs that are named, of those that are here, and free what they hold. The decision is on record
        already; `write_history` is given each one's id, and its step and curve."""
        for slot in [slot for slot in self._slots if slot.active and slot.member.sae_id in reasons]:
            sae_id, reason, trainer = slot.member.sae_id, reasons[slot.member.sae_id], slot.trainer
            write_history(sae_id, {"step": trainer.steps_done, "history": slot.history})
            self._slots.remove(slot)
            self._pruned_tokens += trainer.tokens_seen
            self._pruned_laps[sae_id] = _lap(slot)
            about = {"step": trainer.steps_done, "tokens": trainer.tokens_seen}
            self._emit({"kind": "stopped", "sae_id": sae_id, "status": "pruned", "reason": reason, **about})

    def checkpoint(self) -> dict[str, int]:
        """Save every active SAE whole; a stopped one keeps its last checkpoint. The step of each that stands in storage
        as it stands here.

        A full disk stops no training: what could not be saved is said, and the last whole checkpoint stays.
        """
        saved: dict[str, int] = {}
        for slot in self._slots:
            if slot.active and slot.trainer.steps_done > 0 and not self._stop_if_diverged(slot):
                try:
                    self._save(slot)
                    saved[slot.member.sae_id] = slot.trainer.steps_done
                except OSError as error:
                    self._log(
                        f"SAE {slot.member.sae_id}: its checkpoint at step {slot.trainer.steps_done} could not be "
                        f"written to {self._storage.uri} ({reason_of(error)}); training goes on, and the last whole "
                        "one stays"
                    )
                    what = f"SAE {slot.member.sae_id}: its checkpoint could not be written ({reason_of(error)})"
                    done = "training goes on, the last whole one stays"
                    about = {"sae_id": slot.member.sae_id, "what": what, "done": done}
                    self._emit({"kind": "failure", **about, "worker_lives": True})
        self._emit({"kind": "saved", "saes": saved})
        return saved

    def keep(self, step: int, latest: Mapping[str, Tensor]) -> None:
        """Keep every active SAE that has made `step` steps as it would be used now: folded, in SAELens' format, below
        `kept/TOKENS`. `latest`: the training tokens [n, d] of every input that thresholds are calibrated on. One that
        is there already stays, and one that cannot be written stops no training."""
        for slot in [slot for slot in self._slots if slot.active and slot.trainer.steps_done == step]:
            tokens = slot.trainer.tokens_seen
            folder = f"{slot.folder}/{KEPT}/{tokens}"
            if self._stop_if_diverged(slot) or self._storage.is_committed(folder):
                continue
            metadata = {**slot.member.metadata, "kept_at_tokens": tokens}
            sae = slot.trainer.export(
                metadata, tokens=latest[slot.member.reads], reshape_activations=slot.member.reshape_activations
            )
            try:
                self._storage.commit_folder(folder, _saved(sae, slot.trainer.sparsity()), self._guard)
            except OSError as error:
                self._log(
                    f"SAE {slot.member.sae_id}: what it was at {tokens:,} tokens could not be kept in "
                    f"{self._storage.uri} ({reason_of(error)}); training goes on"
                )

    def finish(self, tails: Mapping[str, Tensor] = {}) -> None:
        """Export every SAE that has made all its steps: folded, in SAELens' format, with its history.

        `tails`: the last training tokens [n, d] of every input, on which thresholds are calibrated.
        """
        for slot in self._slots:
            if slot.active and not self._stop_if_diverged(slot):
                self._export(slot, tails.get(slot.member.reads))

    # ---- one SAE ----

    def _note(self, slot: _Slot, outcome: dict[str, float] | Exception | None) -> None:
        """What a step has come to: metrics, if they were wanted, or what it failed of."""
        if outcome is None:
            return
        if isinstance(outcome, Exception):
            traceback.print_exception(outcome)
            detail = "".join(traceback.format_exception(outcome))
            self._stop(slot, "failed", f"{type(outcome).__name__}: {outcome}", detail)
            return
        if slot.trainer.diverged:
            self._stop_diverged(slot)
            return
        row = {"tokens": slot.trainer.tokens_seen, "metrics": outcome}
        slot.history.append(row)
        self._emit({"kind": "metrics", "sae_id": slot.member.sae_id, **row})

    def _step_within_memory(
        self, trainer: SAETrainer, x: Tensor, target: Tensor | None, want_metrics: bool
    ) -> dict[str, float] | None:
        while True:
            try:
                return trainer.train_step(x, target, want_metrics=want_metrics)
            except (RuntimeError, MemoryError) as error:
                micro_batch = trainer.micro_batch_tokens or x.shape[0]
                least = max(1, min(LEAST_MICRO_BATCH, x.shape[0] // 8)) if len(self._slots) > 1 else 1
                if not is_out_of_memory(error) or micro_batch <= least:
                    raise
            trainer.micro_batch_tokens = micro_batch // 2
            if x.is_cuda:
                torch.cuda.empty_cache()
            done = f"train.micro_batch_tokens halved to {micro_batch // 2}, the step is made again"
            self._log(f"out of memory: {done}")
            self._emit({"kind": "failure", "what": "a step ran out of memory", "done": done, "worker_lives": True})

    def _stop_if_diverged(self, slot: _Slot) -> bool:
        if slot.trainer.diverged:
            self._stop_diverged(slot)
        return not slot.active

    def _stop_diverged(self, slot: _Slot) -> None:
        reason = f"the loss left every bound by step {slot.trainer.steps_done}; a lower lr may help"
        self._stop(slot, "diverged", reason)

    def _stop(self, slot: _Slot, status: str, reason: str, detail: str | None = None) -> None:
        slot.reason = reason
        self._guard()
        record = {"status": status, "reason": reason, "step": slot.trainer.steps_done, "history": slot.history}
        self._storage.write_json(f"{slot.folder}/stopped.json", record)
        print(f"SAE {slot.member.sae_id} {status}: {reason}; the rest of its pack goes on", flush=True)
        about = {"sae_id": slot.member.sae_id, "status": status, "reason": reason}
        self._emit({"kind": "stopped", **about, **({"detail": detail} if detail else {})})

    def _save(self, slot: _Slot) -> None:
        folder = f"{slot.folder}/checkpoints"
        name = f"step-{slot.trainer.steps_done:09d}"
        seconds = slot.watch.seconds
        if self._storage.is_committed(f"{folder}/{name}"):
            return
        about = {"code": code_hash(), "micro_batch_tokens": slot.trainer.micro_batch_tokens, "history": slot.history}
        files = {"state.safetensors": save_tensors(slot.trainer.state()), "about.json": json.dumps(about).encode()}
        self._storage.commit_folder(f"{folder}/{name}", files, self._guard)
        slot.saved_seconds = seconds
        for old in self._storage.names(folder)[:-KEEP_CHECKPOINTS]:
            self._storage.delete(f"{folder}/{old}")

    def _resume(self, slot: _Slot, allow_code_change: bool) -> None:
        folder = f"{slot.folder}/checkpoints"
        for name in reversed(self._storage.names(folder)):
            try:
                files = self._storage.read_folder(f"{folder}/{name}")
            except CheckpointError as error:
                self._log(f"{error}; an older checkpoint is used")
                self._storage.delete(f"{folder}/{name}")  # it will be written again
                continue
            about = json.loads(files["about.json"])
            if about["code"] != code_hash() and not allow_code_change:
                raise SweepError(
                    f"SAE {slot.member.sae_id} stands at {name}, written by source code {about['code']}, and this is "
                    f"{code_hash()}: the result would be neither's. Accepted: the same code, --allow-code-change to go "
                    f"on anyway, or removing {self._storage.path(folder)} to start this SAE again"
                )
            slot.trainer.load_state(load_tensors(files["state.safetensors"]))
            slot.trainer.micro_batch_tokens = about["micro_batch_tokens"]
            slot.history = about["history"]
            return

    def _export(self, slot: _Slot, tail: Tensor | None) -> None:
        dead = _dead(slot.trainer)
        sae = slot.trainer.export(
            slot.member.metadata, tokens=tail, reshape_activations=slot.member.reshape_activations
        )
        prefixes = getattr(slot.member.settings, "prefix_widths", ())
        summary = {
            "dead_fraction": float(dead.mean()),
            "dead_fraction_of_prefix": {str(width): float(dead[:width].mean()) for width in prefixes},
            "dead_over_tokens": _dead_over_tokens(slot.trainer),
            "tokens": slot.trainer.tokens_seen,
            "code": code_hash(),
            "history": slot.history,
        }
        files = _saved(sae, slot.trainer.sparsity())
        files["summary.json"] = (json.dumps(summary) + "\n").encode()
        self._storage.commit_folder(f"{slot.folder}/final", files, self._guard)
        slot.saved_seconds = slot.watch.seconds
        self._storage.delete(f"{slot.folder}/checkpoints")
        self._emit({"kind": "finished", "sae_id": slot.member.sae_id})


def _lap(slot: _Slot) -> tuple[float, float, int]:
    return slot.watch.seconds, slot.saved_seconds, slot.trainer.tokens_seen - slot.tokens_before


def _dead_over_tokens(trainer: SAETrainer) -> int:
    """Whatever window the run allows, so that a short run does not call rare latents dead."""
    return min(DEAD_OVER_TOKENS, trainer.tokens_seen // 2)


def _dead(trainer: SAETrainer) -> Tensor:
    """[d_sae] float64: 1 for latents that have not fired in the last `_dead_over_tokens` tokens, 0 for the others."""
    return (trainer.tokens_since_fired >= _dead_over_tokens(trainer)).double().cpu()


def _saved(sae: SAE, sparsity: Tensor) -> dict[str, bytes]:
    """The files of SAELens' format, by name."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "sae"
        sae.save(folder, sparsity=sparsity)
        return {path.name: path.read_bytes() for path in folder.iterdir()}
