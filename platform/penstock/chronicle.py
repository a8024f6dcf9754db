"""What the driver of a sweep writes down of it for those who watch: its log, failures, recent rates, the estimated end.

The driver's report (`penstock status`, the metrics) takes its share of this; see `Chronicle.report`.
"""

import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.eta import Rates, Work, evaluation_seconds, rest_of, training_seconds
from penstock.failures import Failures
from penstock.logs import SweepLog, session_file
from penstock.storage import Storage
from penstock.sweep_files import logs_folder

if TYPE_CHECKING:
    from penstock.plan import PlannedPack

ROWS_SHOWN = 3  # of a curve, where an SAE was stopped


def report_name(sweep_id: str) -> str:
    """The report's name in the log folder of a Ray session."""
    return f"penstock-{sweep_id}.json"


class Chronicle:
    """The record of one attempt. `heed` and `say` are called by the driver's main thread, `report` and `write` by its
    pulse too."""

    def __init__(self) -> None:
        self.log = SweepLog()
        self.failures = Failures()
        self.evaluated = 0.0  # share of the evaluation that is done
        self._lock = threading.Lock()
        self._rates = Rates()
        self._rows: dict[str, deque[Mapping[str, Any]]] = {}
        self._packs: dict[str, tuple[str, ...]] = {}
        self._steps: dict[str, float] = {}
        self._halted: set[str] = set()  # packs that were told to end, and go on another time
        self._session: Path | None = None
        self._sweep_id = ""

    def open(
        self, storage: Storage, sweep_id: str, attempt: str, packs: "Sequence[PlannedPack]",
        reached: Mapping[str, int] = {},
    ) -> None:  # fmt: skip
        """Keep it with the sweep, and in the log folder of this node's Ray session. reached: the steps that SAEs have
        made already, by id."""
        self._sweep_id, self._session = sweep_id, _session_logs()
        local = self._session / session_file(sweep_id) if self._session else None
        self.log.open(storage, f"{logs_folder(sweep_id)}/{attempt}", local)
        self.add_packs(packs)
        for pack_id, sae_ids in self._packs.items():
            self._steps[pack_id] = min(reached.get(sae_id, 0) for sae_id in sae_ids)

    def add_packs(self, packs: "Sequence[PlannedPack]") -> None:
        for pack in packs:
            self._packs[pack.pack_id] = tuple(sae.sae_id for sae in pack.saes)
            text = f"pack {pack.pack_id}: {len(pack.saes)} SAEs of {pack.hook_point}"
            self.log.add(text, pack=pack.pack_id, saes=list(self._packs[pack.pack_id]))

    # ---- what the packs report ----

    def heed(self, event: Mapping[str, Any]) -> None:
        """Take in an event of a pack; the driver says itself what a user should see at once."""
        kind, pack, sae = event["kind"], event.get("pack_id"), event.get("sae_id")
        if kind == "metrics":
            self._rows.setdefault(sae, deque(maxlen=ROWS_SHOWN)).append(event)
        elif kind == "started":
            self._packs[pack] = tuple(event["sae_ids"])
            self._halted.discard(pack)
            closed = self.failures.started(pack, event["step"])
            after = f" after: {closed['what']}" if closed else ""
            at = f"step {event['step']:,}" if event["step"] else "its first step"
            text = f"pack {pack} is at {at}{after}"
            self.log.add(text, pack=pack, saes=list(self._packs[pack]))
        elif kind == "saved":
            for step in sorted(set(event["saes"].values())):
                of = [sae_id for sae_id, at in event["saes"].items() if at == step]
                text = f"pack {pack}: {len(of)} SAE{'s' if len(of) > 1 else ''} saved at step {step:,}"
                self.log.add(text, pack=pack, of=of)
        elif kind == "halted":
            self._halted.add(pack)
            self.failures.ended(pack)
            text = f"pack {pack} has ended at step {event['step']:,} as it was told to ({event['why']})"
            self.log.add(text, pack=pack)
        elif kind == "finished":
            self.log.add(f"SAE {sae} finished", sae=sae, pack=pack)
        elif kind == "stopped":
            if event["status"] != "pruned":
                what = f"SAE {sae} {event['status']}: {event['reason']}"
                self.failures.note(what, "it is stopped, the rest of its pack goes on")
            detail = "\n".join(filter(None, [event.get("detail"), self._curve(sae)]))
            self.log.add(f"SAE {sae} {event['status']}: {event['reason']}", sae=sae, pack=pack, detail=detail or None)
        elif kind == "failure":
            self.failures.note(event["what"], event["done"], None if event.get("worker_lives") else pack)
            if not event.get("said"):
                self.log.add(f"{event['what']}: {event['done']}", pack=pack, sae=sae, detail=event.get("detail"))
        elif kind == "log":
            self.log.add(event["message"], pack=pack)

    def _curve(self, sae_id: str) -> str:
        """The last rows of an SAE's curve."""
        return "\n".join(
            f"{row['tokens']:,} tokens: " + ", ".join(f"{name} {value:.4g}" for name, value in row["metrics"].items())
            for row in self._rows.get(sae_id, ())
        )

    # ---- the report ----

    def note(self, now: float, stream: Mapping[str, Any], cost: Mapping[str, float]) -> None:
        """How far the packs are, by what the stream tells."""
        with self._lock:
            counts = {"harvested": cost.get("harvested_tokens", 0.0)}
            for pack_id, pack in stream.get("packs", {}).items():
                if "step" in pack:
                    self._steps[pack_id] = pack["step"]
                    counts |= {f"steps {pack_id}": pack["step"], f"tokens {pack_id}": pack["trained_tokens"]}
            self._rates.note(now, counts)

    def report(
        self, phase: str, phase_seconds: float, stream: Mapping[str, Any], cost: Mapping[str, float], *,
        steps: int, batch_tokens: int, slots: int, ended: Mapping[str, Any], evaluation_tokens: float,
    ) -> dict[str, Any]:  # fmt: skip
        """What the driver's report has of it: `eta_seconds`, `rates`, `halted`, `failures`, `failures_total`. ended:
        SAEs that need no more steps."""
        with self._lock:
            packs = stream.get("packs", {})
            live = [pack_id for pack_id, pack in packs.items() if pack["status"] == "live"]
            rates = {
                "seconds": self._rates.seconds,
                "sae_tokens_per_second": self._rates.total([f"tokens {pack_id}" for pack_id in live]),
                "harvested_tokens_per_second": self._rates.rate("harvested"),
                "packs": {pack_id: _tokens(self._rates.rate(f"steps {pack_id}"), batch_tokens) for pack_id in live},
            }
            eta = None
            if phase in ("train", "search", "start"):
                training = training_seconds(self._works(packs, steps, ended), slots)
                after = evaluation_seconds(evaluation_tokens, cost, len(stream.get("hosts", {})))
                eta = None if training is None or after is None else training + after
            elif phase == "evaluate":
                eta = rest_of(phase_seconds, self.evaluated)
        latest = self.failures.latest
        return {
            "eta_seconds": eta, "rates": rates, "halted": sorted(self._halted), "failures": latest,
            "failures_total": self.failures.total,
        }  # fmt: skip

    def _works(self, packs: Mapping[str, Any], steps: int, ended: Mapping[str, Any]) -> list[Work]:
        works = []
        for pack_id, sae_ids in list(self._packs.items()):
            status = packs.get(pack_id, {}).get("status", "expected")
            left = sum(sae_id not in ended for sae_id in sae_ids)
            at = self._steps.get(pack_id, 0.0)
            if status != "done" or pack_id in self._halted:
                running = status == "live"
                works.append(Work(steps - at, left, self._rates.rate(f"steps {pack_id}") if running else None, running))
        return works

    def write(self, report: Mapping[str, Any], *, now: bool = False) -> None:
        """Write the log, and the report into the session's log folder, whole at once."""
        self.log.flush(now=now)
        if self._session is not None:
            file = self._session / report_name(self._sweep_id)
            with contextlib.suppress(OSError):
                beside = file.with_name(f".{file.name}.{os.getpid()}")
                beside.write_text(json.dumps(report))
                beside.replace(file)


def _tokens(rate: float | None, batch_tokens: int) -> float | None:
    return None if rate is None else rate * batch_tokens


def _session_logs() -> Path | None:
    """The log folder of the Ray session on this node."""
    import ray

    node = ray._private.worker._global_node
    return Path(node.get_logs_dir_path()) if node is not None else None
