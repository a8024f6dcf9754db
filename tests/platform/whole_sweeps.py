"""Whole sweeps of a tiny model in one process: everything but Ray."""

from pathlib import Path

from safetensors.torch import save as save_tensors

from penstock.activations import from_wire
from penstock.batches import batches
from penstock.evaluation import evaluation_of, in_process
from penstock.home import Home
from penstock.model_host import ModelHost
from penstock.pack import Pack
from penstock.plan import PlannedPack, arrays_of, members, plan_packs, read_sweep, training_settings
from penstock.resolved import ResolvedSweep
from penstock.results import publish
from penstock.search import rung_steps
from penstock.storage import Storage
from penstock.tokens import build_token_store
from penstock.tracking import TrackedSAE, Tracker
from penstock.worker import last_tokens
from sae_core import calibrate
from tiny_models import write_model

SPEC = """\
name: NAME
model: {name: MODEL, harvest_rows: 16}
data: {dataset: DATA, context_size: 16, block_tokens: 640, search_tokens: 200, report_tokens: 300EXCLUDE}
hook_points: [HOOKS]
train: {tokens: 1500, batch_tokens: 50, lr: 1e-2}
saes: [ENTRY]
baselines: {k: [4]}
"""


def quiet(message: str) -> None:
    pass


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A tiny model and a file of documents."""
    data = folder / "documents.txt"
    data.write_text("\n\n".join(f"document{i} the wheel turns" + " the water" * (i % 7) for i in range(600)))
    return write_model(folder / "model"), data


def write_spec(path: Path, inputs: tuple[Path, Path], name: str, hooks: str, entry: str, **more: str) -> Path:
    """`more`: `exclude`, that follows the data, and `rest`, further sections."""
    text = SPEC + more.get("rest", "")
    for word, value in (("NAME", name), ("MODEL", inputs[0]), ("DATA", inputs[1]), ("HOOKS", hooks), ("ENTRY", entry),
                        ("EXCLUDE", more.get("exclude", ""))):  # fmt: skip
        text = text.replace(word, str(value))
    path.write_text(text)
    return path


def resolve(spec_path: Path, home: Home) -> tuple[ResolvedSweep, ModelHost]:
    spec, description = read_sweep(spec_path)
    storage = Storage(home.storage_uri(None))
    store = build_token_store(spec.data, spec.model, spec.train, storage)
    return ResolvedSweep(spec, description, store, storage, home), ModelHost(spec.model, device="cpu")


def train(sweep: ResolvedSweep, host: ModelHost) -> dict[str, dict[int, dict[str, float]]]:
    """Train what is left. Returns the figures at the rungs, by SAE and step, where the spec asks for pruning."""
    packs, figures = plan_packs(sweep.spec, sweep.left()), {}
    if sweep.probe is not None:
        for name, found in host.sample(sweep.store, sweep.spec.data, "search", 200, arrays_of(packs)).items():
            sweep.probe.store(sweep.storage, name, found)
    for planned in packs:
        for step, at_rung in _train_pack(sweep, host, planned).items():
            for sae_id, found in at_rung.items():
                figures.setdefault(sae_id, {})[step] = found
    return figures


def _train_pack(
    sweep: ResolvedSweep, host: ModelHost, planned: PlannedPack
) -> dict[int, dict[str, dict[str, float]]]:
    tails, pack, probe, found = {}, None, {}, {}
    rungs = rung_steps(sweep.schedule.steps) if sweep.probe is not None else ()
    for block in range(sweep.schedule.n_blocks):
        arrays = host.harvest(sweep.store, sweep.spec.data, block, planned.hook_points)
        views = {name: from_wire(array, "float32") for name, array in arrays.items()}
        if pack is None:
            calibrations = {name: calibrate(view) for name, view in views.items()}
            for name, calibration in calibrations.items():
                sweep.storage.write(sweep.calibration_file(name), save_tensors(calibration.to_tensors()))
            settings = training_settings(sweep.spec.train)
            pack = Pack(members(planned, sweep.metadata), settings, calibrations, sweep.storage)
            if rungs:
                probe = {name: sweep.probe.load(sweep.storage, name) for name in planned.hook_points}
        length = len(next(iter(views.values())))
        for step, batch in batches(sweep.schedule, block, length, 0):
            inputs = {name: view[batch] for name, view in views.items()}
            pack.step(step, inputs)
            if step + 1 in rungs:
                found[step + 1] = pack.measure(step + 1, probe, inputs)
        tails = {name: view[last_tokens(sweep.schedule)] for name, view in views.items()}
    pack.finish(tails)
    return found


def evaluate(sweep: ResolvedSweep, host: ModelHost, split: str = "report", saes=None) -> int:
    return in_process(evaluation_of(sweep, split, saes), host, sweep.spec.data, quiet)


def publish_sweep(sweep: ResolvedSweep) -> None:
    tracker = Tracker(sweep.home, sweep.spec.name, sweep.sweep_id)
    tracker.open(sweep.yaml, {}, [TrackedSAE(sae.sae_id, sae.hook_point, sae.params, sae.baseline)
                                  for sae in sweep.saes])  # fmt: skip
    publish(sweep, tracker, {"seconds_total": 1.0})


def run_sweep(spec_path: Path, home: Home) -> ResolvedSweep:
    """From the spec to what is in MLflow."""
    sweep, host = resolve(spec_path, home)
    train(sweep, host)
    evaluate(sweep, host)
    publish_sweep(sweep)
    return sweep
