"""`penstock evaluate`: a sweep's SAEs by another protocol. (SAE folders: `sae_folders`.)

The finished SAEs of a sweep are evaluated again on model hosts, on other data, in another context, against another
ablation; what was published stays as it is.

Only documents of the `report` split are used, whatever the dataset. The split is decided by a document's content, so
the documents that a sweep of Penstock was trained on are never among them, also where two datasets share some; unless
one has them as texts and the other as token ids, which are not known to be the same. Of an SAE from elsewhere nobody
here knows the documents; the split is no worse for it than any other choice.

Whatever has been evaluated by a protocol is found again in storage and not computed anew.
"""

import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.errors import DataError, SweepError, UserError
from penstock.evaluated import Evaluated
from penstock.evaluation import Evaluation, evaluation_of, on_hosts
from penstock.home import Home
from penstock.models import ModelDescription, check_context_size, describe_model
from penstock.plan import absolute
from penstock.redaction import redacted
from penstock.resolved import ResolvedSweep, protocol_of
from penstock.results import baseline_table, sae_table
from penstock.session import Session, this_machine
from penstock.spec import DataSpec, EvaluateSpec, ModelSpec, ResourceSpec, SweepSpec, parse_spec
from penstock.storage import Storage
from penstock.sweep_files import published_file
from penstock.tokens import TokenStore, build_evaluation_store, build_token_store, in_context
from penstock.tracking import SweepRuns, connect, find_sweep, reported

FOLDER = "evaluations"  # of the parent run's artifacts
_OPTIONS = {  # how messages about a spec's field name the option that sets it
    "data.report_tokens": "--tokens",
    "data.dataset": "--dataset",
    "data.text_column": "--text-column",
    ", or data.tokens_column for token ids": "",
    "data.context_size": "--context",
    "model.name": "--model",
}


@dataclass(frozen=True)
class Asked:
    """What of a protocol is asked for on the command line; None leaves it as it is."""

    dataset: str | None = None
    text_column: str | None = None
    tokens: int | None = None
    context_size: int | None = None
    ablation: str | None = None

    def data(self, data: DataSpec) -> DataSpec:
        given = {"text_column": self.text_column, "report_tokens": self.tokens}
        changes = {name: value for name, value in given.items() if value is not None}
        if self.dataset is not None and (data.mixture is not None or absolute(self.dataset) != data.dataset):
            fresh = ("mixture", "subset", "hub_split", "text_column", "tokens_column", "activations")
            defaults = {name: DataSpec.model_fields[name].default for name in fresh}
            changes = {**defaults, "dataset": absolute(self.dataset), **changes}
        return data.model_copy(update=changes)

    def evaluate(self, evaluate: EvaluateSpec) -> EvaluateSpec:
        given = {"context_size": self.context_size, "ablation": self.ablation}
        return evaluate.model_copy(update={name: value for name, value in given.items() if value is not None})


def say(message: str) -> None:
    """On stderr: what a command prints may be JSON."""
    print(redacted(message), file=sys.stderr, flush=True)


def evaluate_sweep(home: Home, name: str, asked: Asked, address: str | None = None) -> Evaluated:
    """Evaluate the finished SAEs of a sweep, and its baselines, by its own protocol but for what is asked for. The
    figures are kept in its storage, and in MLflow below `evaluations/` of its parent run.

    Raises `SweepError` for a sweep that is not there or has nothing finished, and `DataError` or `ModelError` for a
    dataset, an amount of tokens or a context that cannot be had.
    """
    runs = find_sweep(home, name)
    sweep = resolve(home, runs)
    evaluation = _by_another_protocol(sweep, asked)
    if evaluation.left():
        _on_a_cluster(sweep, evaluation, address)
    else:
        say("all of these figures are there already")
    table = sae_table(sweep, evaluation)
    finished = table[table["status"] == "finished"].reset_index(drop=True)
    found = Evaluated(evaluation.protocol, finished, baseline_table(sweep, evaluation), runs.l0_band)
    _keep(home, runs, found, evaluation)
    return found


def resolve(home: Home, runs: SweepRuns) -> ResolvedSweep:
    """A sweep as it was run, of which something is finished. Its token store is opened by its id: the dataset may have
    changed since. Raises `SweepError` where its storage holds no finished SAE, or it would be another one now."""
    spec = parse_spec(runs.spec, source=f"the spec of sweep {runs.name}")
    if spec.model.trust_remote_code:  # whoever may write to MLflow may have written it
        say(f"warning: the spec of sweep {runs.name}, as MLflow has it, lets Python code that comes with model "
            f"{spec.model.name!r} run here (model.trust_remote_code)")  # fmt: skip
    storage = Storage(home.storage_uri(spec.storage))
    finished = {
        run.data.tags["sae_id"]
        for run in runs.children()
        if run.data.tags.get("status") == "finished" and "baseline" not in run.data.tags
    }
    if not any(storage.is_committed(f"saes/{sae_id}/final") for sae_id in finished):
        raise SweepError(
            f"sweep {runs.name!r} has no finished SAE to evaluate"
            + (f": its storage {storage.uri!r} no longer holds them" if finished else "")
        )
    published = published_file(runs.sweep_id)
    if storage.exists(published):
        store = TokenStore.open(storage, storage.read_json(published)["store"])
    else:  # it has not come to its end
        store = build_token_store(spec.data, spec.model, spec.train, storage, progress=say)
    sweep = ResolvedSweep(spec, describe_model(spec.model), store, storage, home)
    if not finished & {sae.sae_id for sae in sweep.saes}:
        raise SweepError(
            f"the SAEs of sweep {runs.name!r} are not those that its spec comes to now: its model, its dataset or what "
            "an SAE's id is made of has changed; accepted: what it was run with"
        )
    return sweep


def evaluation_store(
    data: DataSpec, model: ModelSpec, description: ModelDescription, storage: Storage
) -> TokenStore:
    """The report rows of what is asked for. Raises `DataError` and `ModelError`, which name the command's options."""
    first_positions = data.exclude.first_positions
    if data.context_size <= first_positions:
        raise DataError(f"--context {data.context_size} leaves nothing of a row: its first {first_positions} positions "
                        "are excluded")  # fmt: skip
    try:
        check_context_size(description, data.context_size)
        return build_evaluation_store(data, model, ("report",), storage, progress=say)
    except UserError as error:
        raise type(error)(with_options(str(error))) from None


def with_options(message: str) -> str:
    """A message about a spec, as one about the command's options."""
    for field, option in _OPTIONS.items():
        message = message.replace(field, option)
    return message


def _by_another_protocol(sweep: ResolvedSweep, asked: Asked) -> Evaluation:
    spec = sweep.spec
    store = store_asked_for(sweep, asked)
    changes = {"data": asked.data(spec.data), "evaluate": asked.evaluate(spec.evaluate)}
    protocol = protocol_of(spec.model_copy(update=changes), store, "report", sweep.store.given, sweep.stream_id)
    return replace(evaluation_of(sweep), store=store, protocol=protocol)


def store_asked_for(sweep: ResolvedSweep, asked: Asked) -> TokenStore:
    """The report rows of what is asked for: the sweep's own, where it is nothing else. Raises as `evaluation_store`."""
    spec = sweep.spec
    rows = in_context(asked.data(spec.data), asked.evaluate(spec.evaluate).context_size)
    for known, context_size in ((sweep.evaluated, spec.evaluate.context_size), (sweep.store, None)):
        if rows.model_dump() == in_context(spec.data, context_size).model_dump():
            return known
    return evaluation_store(rows, spec.model, sweep.model, sweep.storage)


class Hosts(Session):
    """The model hosts that a spec asks for, without anything that trains. With `address` None and no `RAY_ADDRESS`
    they are on this machine, as many as it has room for."""

    def __init__(self, spec: SweepSpec, store: TokenStore, home: Home, address: str | None) -> None:
        no_packs = {"cpus_per_pack": 0, "gpus_per_pack": 0, "pack_labels": {}, "pack_resources": {}}
        resources = spec.resources.model_copy(update=no_packs)
        resources = _fitting(resources) if address is None and "RAY_ADDRESS" not in os.environ else resources
        super().__init__(spec.model_copy(update={"resources": resources}), home)
        self._built = store

    def say(self, message: str) -> None:
        say(message)

    def _build_store(self, **parallel: Any) -> TokenStore:
        return self._built


def _fitting(resources: ResourceSpec) -> ResourceSpec:
    """As many of the sweep's hosts as this machine has room for; at least one, on what there is. Labels and custom
    resources are those of the cluster that the sweep ran on."""
    machine = this_machine()
    resources = resources.model_copy(update={"host_labels": {}, "host_resources": {}})
    for n_hosts in range(resources.model_hosts, 0, -1):
        fewer = resources.model_copy(update={"model_hosts": n_hosts})
        try:
            machine.pack_slots(fewer)
        except SweepError:
            continue
        return fewer
    [node] = machine.nodes
    cpus, gpus = (
        min(getattr(resources, f"{name.lower()}s_per_host"), node.resources[name]) for name in ("CPU", "GPU")
    )
    return resources.model_copy(update={"model_hosts": 1, "cpus_per_host": cpus, "gpus_per_host": gpus})


def _on_a_cluster(sweep: ResolvedSweep, evaluation: Evaluation, address: str | None) -> None:
    hosts = Hosts(sweep.spec, sweep.store, sweep.home, address)
    try:
        hosts.join(address)
        on_hosts(evaluation, list(hosts.fleet.hosts.values()), say)
    finally:
        hosts.close()


def _keep(home: Home, runs: SweepRuns, found: Evaluated, evaluation: Evaluation) -> None:
    """Beside what was published, in the parent run's artifacts."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / f"{found.protocol_id}.json").write_text(found.as_json() + "\n", encoding="utf-8")
        evaluation.rows().to_parquet(folder / f"{found.protocol_id}.parquet", index=False)
        with reported(home):
            connect(home).log_artifacts(runs.run_id, str(folder), FOLDER)
