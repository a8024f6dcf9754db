"""What a sweep has decided, in its storage, written before it takes effect: a driver that starts again decides nothing
anew that stands here.

    sweeps/<id>/pruned/<sae>.json        an SAE is stopped on the way: the rung, why, when
    sweeps/<id>/pruned/<sae>-run.json    what its pack says of it in the end: the step it was stopped at, its curve
    sweeps/<id>/filled.json              the SAEs that were added to the sweep, and why

An SAE that one sweep has stopped is not stopped in another one.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from penstock.search import Proposal, Stop
from penstock.sites import Site
from penstock.storage import Storage


@dataclass(frozen=True)
class Journal:
    """The decisions of the sweep `sweep_id`."""

    storage: Storage
    sweep_id: str

    # ---- pruning ----

    def write_stop(self, stop: Stop, tokens: int) -> None:
        """`tokens`: those that the SAE had been trained on at the rung."""
        record = {"status": "pruned", **asdict(stop), "tokens": tokens, "time": time.time()}
        self.storage.write_json(self._pruned(stop.sae_id), record)

    def write_run(self, sae_id: str, run: dict[str, Any]) -> None:
        """`run`: `step` and `history` of an SAE that has been stopped."""
        self.storage.write_json(self._pruned(sae_id).replace(".json", "-run.json"), run)

    def is_pruned(self, sae_id: str) -> bool:
        return self.storage.exists(self._pruned(sae_id))

    def pruned(self, sae_id: str) -> dict[str, Any]:
        """Why an SAE was stopped, at which step, and its curve; empty where it was not."""
        if not self.is_pruned(sae_id):
            return {}
        run = self._pruned(sae_id).replace(".json", "-run.json")
        found = self.storage.read_json(self._pruned(sae_id))
        return found | (self.storage.read_json(run) if self.storage.exists(run) else {"step": found["rung"]})

    # ---- filling ----

    def write_proposals(self, proposals: list[Proposal]) -> None:
        records = [{**asdict(one.site), "settings": dict(one.settings), "reason": one.reason} for one in proposals]
        self.storage.write_json(self._filled, {"proposals": records, "time": time.time()})

    def proposals(self) -> list[Proposal] | None:
        """The SAEs that were added; None where that has not been decided."""
        if not self.storage.exists(self._filled):
            return None
        records = self.storage.read_json(self._filled)["proposals"]
        return [Proposal(Site(one["reads"], one["writes"]), one["settings"], one["reason"]) for one in records]

    def _pruned(self, sae_id: str) -> str:
        return f"sweeps/{self.sweep_id}/pruned/{sae_id}.json"

    @property
    def _filled(self) -> str:
        return f"sweeps/{self.sweep_id}/filled.json"
