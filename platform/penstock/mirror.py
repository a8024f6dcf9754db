"""Weights & Biases as a mirror of MLflow, where a spec asks for it (`tracking.wandb_project`).

MLflow stays the record: what is shown here is never read again. A run an SAE, those of a sweep in one group, with the
curves against tokens and the final figures as its summary. The driver alone writes, in the batches in which it writes
to MLflow; a thread of its own does the talking, so that a server that is slow, away or missing costs a sweep nothing
but one line. `WANDB_MODE=offline` and W&B's other variables mean what they mean there.
"""

import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from penstock.home import Home
from penstock.spec import TrackingSpec

if TYPE_CHECKING:
    from penstock.tracking import TrackedSAE

CLOSE_SECONDS = 60.0
INIT_SECONDS = 30.0


class Mirror:
    """The runs of one sweep. Does nothing unless the spec names a project, and nothing more after its first failure,
    which is said."""

    def __init__(self, tracking: TrackingSpec, home: Home, name: str, say: Callable[[str], None]) -> None:
        self._tracking, self._home, self._name, self._say = tracking, home, name, say
        self._project = tracking.wandb_project
        self._runs: dict[str, Any] = {}
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._failed = False

    def open(self, sweep_id: str, saes: "Sequence[TrackedSAE]") -> None:
        """Runs for these SAEs. One that an earlier driver has begun goes on."""
        for sae in saes:
            self._do(lambda sae=sae: self._open(sweep_id, sae))

    def log(self, sae_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add points to an SAE's curves: rows as `Tracker.log_rows` returns them."""
        if rows:
            self._do(lambda: self._log(sae_id, rows))

    def finish(self, sae_id: str, status: str, figures: Mapping[str, float]) -> None:
        """End an SAE's run with its final figures."""
        self._do(lambda: self._finish(sae_id, {**figures, "status": status}))

    def close(self) -> None:
        """End what has not ended, and wait a while for what is on its way."""
        if self._thread is None:
            return
        self._do(self._finish_all)
        self._jobs.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up(f"it has not answered for {CLOSE_SECONDS:.0f} s")
        self._thread = None

    # ---- the thread ----

    def _do(self, job: Callable[[], None]) -> None:
        if self._project is None or self._failed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._failed:
                try:
                    job()
                except BaseException as error:  # whatever it is: a mirror stops no sweep
                    self._give_up(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _give_up(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._say(f"tracking.wandb_project {self._project!r}: W&B shows no more of this sweep ({reason}); MLflow "
                      "has all of it")  # fmt: skip

    def _open(self, sweep_id: str, sae: "TrackedSAE") -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise ModuleNotFoundError("the package wandb is not installed: pip install 'penstock[wandb]'") from None
        if os.environ.get("WANDB_MODE", "online") == "online":  # else it would ask at the terminal
            wandb.login(prompt=False)
        run = wandb.init(
            project=self._project,
            entity=self._tracking.wandb_entity,
            group=f"{self._name} {sweep_id[:8]}",
            name=sae.title,
            id=f"{sweep_id}-{sae.sae_id}",
            resume="allow",
            reinit="create_new",
            config={"hook_point": sae.hook_point, **sae.params, "baseline": sae.baseline},
            dir=os.environ.get("WANDB_DIR") or self._home.path,
            settings=wandb.Settings(
                silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
                init_timeout=INIT_SECONDS,
            ),
        )  # fmt: skip
        run.define_metric("*", step_metric="tokens")
        self._runs[sae.sae_id] = run

    def _log(self, sae_id: str, rows: Sequence[Mapping[str, Any]]) -> None:
        for row in rows:
            curves = {name if "/" in name else f"train/{name}": value for name, value in row["metrics"].items()}
            self._runs[sae_id].log({"tokens": row["tokens"], **curves})

    def _finish_all(self) -> None:
        for sae_id in list(self._runs):
            self._finish(sae_id, {"status": "interrupted"})

    def _finish(self, sae_id: str, summary: Mapping[str, Any]) -> None:
        run = self._runs.pop(sae_id, None)
        if run is not None:
            run.summary.update(dict(summary))
            run.finish(exit_code=0 if summary["status"] in ("finished", "pruned") else 1)
