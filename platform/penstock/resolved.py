"""A sweep once its tokens are known: its SAEs by id, what is left of them, and where everything lies in storage."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import yaml

from penstock.batches import Schedule
from penstock.calibrations import calibration_file
from penstock.given import open_given
from penstock.home import Home
from penstock.identity import code_hash, content_id
from penstock.journal import Journal
from penstock.models import ModelDescription
from penstock.plan import PlannedSAE, plan_sae, plan_saes, stream_identity
from penstock.probe import PROBE_TOKENS, Probe
from penstock.search import Proposal
from penstock.spec import SweepSpec
from penstock.splits import Split
from penstock.spool import Spool, SpooledStream
from penstock.storage import Storage
from penstock.tokens import TokenStore, build_evaluation_store, in_context
from sae_core import parse_settings


@dataclass(frozen=True)
class ResolvedSweep:
    """What a spec comes to with its model and tokens."""

    spec: SweepSpec
    model: ModelDescription
    store: TokenStore
    storage: Storage
    home: Home

    @cached_property
    def saes(self) -> list[PlannedSAE]:
        """Every SAE, baselines with a frozen decoder and those that search has added included."""
        return [*self.asked_for, *self.added]

    @cached_property
    def asked_for(self) -> list[PlannedSAE]:
        """The SAEs of the spec."""
        return plan_saes(self.spec, self.model, self.store.train_id)

    @cached_property
    def added(self) -> list[PlannedSAE]:
        """The SAEs that search has added to fill the front."""
        proposals = self.journal.proposals() if self.spec.search.fill else None
        return [self.planned(one) for one in proposals or ()]

    def planned(self, proposal: Proposal) -> PlannedSAE:
        """A proposed SAE, with the id that it would have in a spec. Raises `ConfigError` for settings that do not
        fit."""
        return plan_sae(self.spec, self.model, self.store.train_id, proposal.site, parse_settings(proposal.settings))

    @cached_property
    def sweep_id(self) -> str:
        search = [self.spec.search.model_dump()] if self.spec.search.is_on else []
        return content_id([self.spec.name, sorted(sae.sae_id for sae in self.asked_for), self.protocol, *search])

    @property
    def journal(self) -> Journal:
        return Journal(self.storage, self.sweep_id)

    @property
    def probe(self) -> Probe | None:
        """The search activations on which SAEs are compared while they train, where they are."""
        if not self.spec.search.prune:
            return None
        made_of = [self.stream_id, self.protocol_of("search"), PROBE_TOKENS]
        return Probe(self.calibration_folder, content_id(made_of))

    @cached_property
    def schedule(self) -> Schedule:
        kept = tuple(int(count) for count in self.store.kept_per_block)
        return Schedule(kept, self.spec.train.batch_tokens, self.spec.train.steps)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """What the published figures depend on beside the SAE: it is recorded beside them."""
        return self.protocol_of("report")

    def protocol_of(self, split: Split) -> dict[str, Any]:
        """What figures depend on beside the SAE. Decisions are made on `search`, what is published is of `report`."""
        return protocol_of(self.spec, self.evaluated, split, self.store.given, self.stream_id)

    @cached_property
    def evaluated(self) -> TokenStore:
        """The rows that figures are of: the store's own, unless the spec asks for another context than trained on."""
        data = in_context(self.spec.data, self.spec.evaluate.context_size)
        if data.context_size == self.store.context_size:
            return self.store
        return build_evaluation_store(data, self.spec.model, ("search", "report"), self.storage)

    @property
    def protocol_id(self) -> str:
        return content_id(self.protocol)

    @property
    def yaml(self) -> str:
        """The spec with every default written out."""
        return yaml.safe_dump(self.spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def metadata(self) -> dict[str, Any]:
        """What every `cfg.json` says of its origin, in the names that SAELens' tools read and in ours."""
        data = self.spec.data
        given = None if data.activations is None else open_given(data)
        return {
            "model_name": self.spec.model.name,
            "model_class_name": "TransformerBridge",
            "model_processing": self.spec.model.processing,
            "model_dtype": self.spec.model.dtype,
            "model_fingerprint": self.model.fingerprint,
            "context_size": data.context_size,
            "prepend_bos": data.bos,
            "dataset_path": data.label if given is None else given.dataset,
            "exclude": data.exclude.model_dump(),
            "data": stream_identity(data, self.store.train_id),
            "code": code_hash(),
        } | ({} if given is None else {"activations": {"folder": data.activations, "identity": given.identity}})

    # ---- where things lie (its own files: `sweep_files.py`) ----

    @property
    def calibration_folder(self) -> str:
        """Calibrations lie by what their block 0 was made from."""
        return f"calibration/{self.stream_id}"

    @cached_property
    def stream_id(self) -> str:
        """The address of the blocks: what fixes their bytes at any hook point."""
        model = [self.model.fingerprint, self.spec.model.dtype, self.spec.model.processing]
        return content_id([model, stream_identity(self.spec.data, self.store.train_id)])

    def spool(self, n_waves: int) -> SpooledStream | None:
        """Where blocks are kept on disk: where the spec says, else in the storage if there is more than one wave, so
        that none is made twice, or if a harvest has put some there. Activations that are given lie on disk already."""
        data = self.spec.data
        if data.activations is not None:
            return None
        if data.spool == "off":
            return None
        if data.spool is None and n_waves < 2 and not self.storage.exists(f"spool/{self.stream_id}"):
            return None
        storage = Storage(self.home.storage_uri(data.spool)) if data.spool else self.storage.at("spool")
        return Spool(storage, int(data.spool_gb * 1e9)).stream(self.stream_id)

    @property
    def about_stream(self) -> dict[str, Any]:
        """What the spool's listing says of the blocks."""
        data, model = self.spec.data, self.spec.model
        return {
            "model": model.name, "dtype": model.dtype, "processing": model.processing, "dataset": data.label,
            "context_size": data.context_size, "exclude": data.exclude.model_dump(), "seed": data.seed,
            "block_tokens": data.block_tokens, "n_blocks": self.schedule.n_blocks, "tokens": self.store.id,
        }  # fmt: skip

    def calibration_file(self, array: str) -> str:
        return calibration_file(self.calibration_folder, array)

    # ---- what has become of its SAEs ----

    def is_finished(self, sae: PlannedSAE) -> bool:
        return self.storage.is_committed(f"saes/{sae.sae_id}/final")

    def stopped(self, sae: PlannedSAE) -> dict[str, Any]:
        """Why an SAE was stopped; empty where it was not. What this sweep has decided comes first: the SAE may fail
        before it hears of that, or in another sweep."""
        name = f"saes/{sae.sae_id}/stopped.json"
        pruned = self.journal.pruned(sae.sae_id)
        return pruned or (self.storage.read_json(name) if self.storage.exists(name) else {})

    def left(self) -> list[PlannedSAE]:
        """The SAEs still to be trained. One that diverged is none of them: the same numbers would diverge again. Nor
        is one that this sweep has pruned."""
        return [
            sae
            for sae in self.saes
            if not self.is_finished(sae) and self.stopped(sae).get("status") not in ("diverged", "pruned")
        ]


def protocol_of(
    spec: SweepSpec, store: TokenStore, split: Split, given: str | None, stream_id: str
) -> dict[str, Any]:
    """What figures measured on a split of `store` depend on beside the SAE, which was trained on the stream of that id
    and, where there are such, on the activations `given`."""
    data, model, evaluate = spec.data, spec.model, spec.evaluate
    protocol = {
        "version": 2,
        "dataset": data.label,
        "split": split,
        "tokens": store.id,
        f"{split}_tokens": getattr(data, f"{split}_tokens"),
        "context_size": evaluate.context_size or data.context_size,
        "bos": data.bos,
        "ablation": evaluate.ablation,
        "exclude": data.exclude.model_dump(),
        "dtype": model.dtype,
        "processing": model.processing,
    }
    if given is not None:
        protocol["activations"] = given
    if evaluate.ablation == "mean":
        protocol["mean_of"] = stream_id
    return protocol
