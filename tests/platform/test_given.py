"""Training on activations that somebody else made: a stream of a spool, and SAELens' cached activations."""

import importlib.util
import json
import shutil
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Array2D, Dataset, Features, List, Value
from datasets.utils.logging import disable_progress_bar
from safetensors.torch import load as load_tensors

from penstock.activations import from_wire
from penstock.cli import main
from penstock.errors import DataError
from penstock.given import GivenRows, GivenStream, open_given
from penstock.home import Home
from penstock.identity import code_hash
from penstock.model_host import ModelHost, norm_outliers
from penstock.plan import members, plan_packs, read_sweep, training_settings
from penstock.resolved import ResolvedSweep
from penstock.spec import DataSpec, TrainSpec
from penstock.spool import Spool
from penstock.storage import Storage
from penstock.tokens import build_token_store, load_tokenizer
from penstock.worker import PackJob, _train
from tiny_models import write_model

READS, WRITES = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
SITE = f"{{reads: {READS}, writes: {WRITES}}}"
CONTEXT, D = 16, 32
SPEC = """\
name: given
model: {name: MODEL, harvest_rows: 16}
data:
  dataset: DATASET
  context_size: 16
  block_tokens: 640
  search_tokens: 200
  report_tokens: 300
  exclude: {norm_over_median: 1.2}
hook_points: [HOOKS]
train: {tokens: 1500, batch_tokens: 50, lr: 1e-2}
saes: [{architecture: topk, d_sae: 2x, k: 6}]
baselines: {k: []}
"""


@pytest.fixture(scope="module")
def sweep_of(tmp_path_factory):
    """Writes a spec with replacements, or reads it into a sweep: `sweep_of(hooks, *changes, activations=FOLDER)`."""
    folder = tmp_path_factory.mktemp("given")
    model = write_model(folder / "model")
    documents = folder / "documents.txt"
    documents.write_text("\n\n".join(f"document{i} the wheel turns" + " the water" * (i % 7) for i in range(600)))

    def write(hooks: str, *changes: tuple[str, str], activations=None):
        text = SPEC.replace("MODEL", str(model)).replace("DATASET", str(documents)).replace("HOOKS", hooks)
        if activations is not None:
            text = text.replace("  context_size", f"  activations: {activations}\n  context_size")
        for old, new in changes:
            assert old in text, old
            text = text.replace(old, new)
        path = folder / "spec.yaml"
        path.write_text(text)
        return path

    def sweep_of(hooks: str, *changes: tuple[str, str], activations=None) -> ResolvedSweep:
        spec, description = read_sweep(write(hooks, *changes, activations=activations))
        home = Home(folder / "home")
        storage = Storage(folder / "storage")
        store = build_token_store(spec.data, spec.model, spec.train, storage)
        return ResolvedSweep(spec, description, store, storage, home)

    sweep_of.write, sweep_of.host = write, ModelHost(read_sweep(write(WRITES))[0].model, device="cpu")
    return sweep_of


def blocks_of(host: ModelHost, sweep: ResolvedSweep) -> list[dict[str, np.ndarray]]:
    arrays = sorted({name for pack in plan_packs(sweep.spec, sweep.saes) for name in pack.hook_points})
    return [host.harvest(sweep.store, sweep.spec.data, block, arrays) for block in range(sweep.schedule.n_blocks)]


@pytest.fixture(scope="module")
def spooled(sweep_of, tmp_path_factory):
    """A sweep of an SAE and a transcoder, its blocks, and the folder of their stream in a spool."""
    sweep = sweep_of(f"{WRITES}, {SITE}")
    blocks = blocks_of(sweep_of.host, sweep)
    root = tmp_path_factory.mktemp("spool")
    stream = Spool(Storage(root)).stream(sweep.stream_id)
    for number, arrays in enumerate(blocks):
        for name, values in arrays.items():
            assert stream.write(name, number, values, "float32")
    stream.describe(sweep.about_stream)
    return SimpleNamespace(sweep=sweep, blocks=blocks, folder=root / sweep.stream_id)


# ---- a stream of a spool ----


def test_a_stream_gives_the_bits_that_filled_it_without_a_forward_pass(sweep_of, spooled):
    given = sweep_of(f"{WRITES}, {SITE}", activations=spooled.folder)
    passes = sweep_of.host.forward_passes
    blocks = blocks_of(sweep_of.host, given)
    assert sweep_of.host.forward_passes == passes
    assert len(blocks) == len(spooled.blocks) > 1 and len(blocks[0]) == 3
    for ours, theirs in zip(blocks, spooled.blocks, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert given.schedule == spooled.sweep.schedule


class Blocks:
    """A pack's side of a stream whose blocks a model host makes as they are asked for."""

    def __init__(self, host: ModelHost, sweep: ResolvedSweep, arrays: tuple[str, ...]) -> None:
        self._make = lambda block: host.harvest(sweep.store, sweep.spec.data, block, arrays)
        self.about: dict[str, float] = {}
        self.stops: dict[str, str] = {}
        self.halt: str | None = None

    def blocks(self, first, stop):
        for block in range(first, stop):
            yield block, self._make(block)

    def block(self, block):
        return self._make(block)

    def emit(self, event):
        assert event["kind"] != "stopped", event

    def log(self, message):
        raise AssertionError(message)

    def flush(self, pause_seconds):
        pass

    def keep_alive(self):
        pass


def trained(sweep: ResolvedSweep, host: ModelHost) -> dict[str, torch.Tensor]:
    """The weights of a sweep's SAEs, trained as their worker trains them."""
    weights = {}
    for pack in plan_packs(sweep.spec, sweep.saes):
        job = PackJob(
            pack_id=pack.pack_id, members=tuple(members(pack, sweep.metadata)), hook_points=pack.hook_points,
            training=training_settings(sweep.spec.train), schedule=sweep.schedule, storage=sweep.storage,
            calibration_folder=sweep.calibration_folder, dtype="float32", checkpoints=0, micro_batch_tokens=None,
            threads=1, saes_at_once=1, on_gpu=False, spool=sweep.spool(2), allow_code_change=False, code=code_hash(),
            journal=sweep.journal,
        )  # fmt: skip
        _train(job, Blocks(host, sweep, pack.hook_points), lambda: None)
        for sae in pack.saes:
            final = sweep.storage.read_folder(f"saes/{sae.sae_id}/final")
            for name, tensor in load_tensors(final["sae_weights.safetensors"]).items():
                weights[f"{sae.hook_point} {name}"] = tensor
    return weights


def test_saes_trained_on_a_stream_are_those_of_the_sweep_that_filled_it(sweep_of, spooled):
    given = sweep_of(f"{WRITES}, {SITE}", activations=spooled.folder)
    ours, theirs = trained(given, sweep_of.host), trained(spooled.sweep, sweep_of.host)
    assert ours.keys() == theirs.keys() and len(ours) > 7
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # They are SAEs of their own all the same, which say where their activations came from.
    assert not {sae.sae_id for sae in given.saes} & {sae.sae_id for sae in spooled.sweep.saes}
    config = json.loads(given.storage.read(f"saes/{given.saes[0].sae_id}/final/cfg.json"))
    assert config["metadata"]["activations"] == {"folder": str(spooled.folder), "identity": given.store.given}
    assert config["metadata"]["dataset_path"] == spooled.sweep.spec.data.dataset


def test_a_stream_is_known_by_what_is_in_it_and_not_by_its_place(sweep_of, spooled, tmp_path):
    copy = shutil.copytree(spooled.folder, tmp_path / spooled.folder.name)
    here, there = (sweep_of(WRITES, activations=folder) for folder in (spooled.folder, copy))
    assert here.store.id == there.store.id and here.sweep_id == there.sweep_id
    assert here.spool(2) is None


def test_given_sweeps_are_evaluated_in_the_model_without_outliers(sweep_of, spooled):
    given = sweep_of(WRITES, activations=spooled.folder)
    data, host = given.spec.data, ModelHost(given.spec.model, device="cpu")
    rows = given.store.rows("report", 0, 10)
    kept = host._without_outliers(given.store, data, WRITES, "report", rows, given.store.kept(rows))
    norms = host._kept_activations(rows, given.store.kept(rows), WRITES).norm(dim=1)
    first = from_wire(spooled.blocks[0][WRITES], "float32").norm(dim=1)
    assert kept.sum() == (norms <= 1.2 * first.median()).sum() < len(norms)


# ---- SAELens' cached activations ----


def token_rows(sweep_of, n_rows: int) -> np.ndarray:
    """Rows with special tokens inside."""
    generator = np.random.default_rng(3)
    rows = generator.integers(1, 280, (n_rows, CONTEXT)).astype(np.int32)
    rows[:, 0] = 0
    rows[generator.random(rows.shape) < 0.1] = 0
    return rows


def write_cache(folder, hook_points, tokens: np.ndarray | None, n_rows: int, dtype="float32", d=D, context=CONTEXT):
    """A cache as sae_lens 6 saves it, in two files; channel 0 counts the stored tokens, 1 and 2 say the hook point."""
    features = {name: Array2D(shape=(context, d), dtype=dtype) for name in hook_points}
    values = {}
    for index, name in enumerate(hook_points):
        values[name] = torch.randn(n_rows, context, d, generator=torch.Generator().manual_seed(index)).to(
            getattr(torch, dtype)
        )
        values[name][:, :, 0] = torch.arange(n_rows * context).view(n_rows, context)
    columns = dict(values)
    if tokens is not None:
        features["token_ids"] = List(Value("int32"), length=context)
        columns["token_ids"] = torch.from_numpy(tokens)
    disable_progress_bar()
    Dataset.from_dict(columns, features=Features(features)).save_to_disk(folder, num_shards=2)
    return values


PLAIN = ("\n  exclude: {norm_over_median: 1.2}", "")


@pytest.fixture(scope="module")
def cached(sweep_of, tmp_path_factory):
    """A cache of two hook points with 120 rows, three blocks."""
    folder = tmp_path_factory.mktemp("cache") / "acts"
    tokens = token_rows(sweep_of, 120)
    return SimpleNamespace(folder=folder, tokens=tokens, values=write_cache(folder, (READS, WRITES), tokens, 120))


def test_a_cache_gives_every_kept_token_once_an_epoch_and_the_same_one_at_both_hook_points(sweep_of, cached):
    sweep = sweep_of(SITE, PLAIN, ("1500", "2700"), ("  context", "  epochs: 2\n  context"), activations=cached.folder)
    blocks = blocks_of(sweep_of.host, sweep)
    assert len(blocks) == 6 and [len(block[READS]) for block in blocks] == list(sweep.store.kept_per_block)
    kept = cached.tokens != 0
    kept[:, 0] = False
    for epoch in (blocks[:3], blocks[3:]):
        places = np.concatenate([block[READS][:, 0] for block in epoch]).astype(int)
        assert sorted(places) == list(np.flatnonzero(kept))
        assert list(places) != sorted(places)
        for name in (READS, WRITES):
            stored = cached.values[name].flatten(0, 1).numpy()
            assert np.array_equal(np.concatenate([block[name] for block in epoch]), stored[places])
    assert not np.array_equal(blocks[0][READS], blocks[3][READS])


def test_outliers_of_a_cache_are_replaced_at_both_hook_points(sweep_of, cached):
    sweep = sweep_of(SITE, activations=cached.folder)
    [block, *_] = blocks_of(sweep_of.host, sweep)
    plain = sweep_of(SITE, PLAIN, activations=cached.folder)
    found = sweep_of.host.harvest(plain.store, plain.spec.data, 0, [READS, WRITES])
    outliers = norm_outliers(torch.from_numpy(found[READS]), 1.2) | norm_outliers(torch.from_numpy(found[WRITES]), 1.2)
    read, written = (block[f"{name}@{READS}+{WRITES}"] for name in (READS, WRITES))
    stay = ~outliers.numpy()
    assert 0 < outliers.sum() < len(outliers)
    assert np.array_equal(read[stay], found[READS][stay]) and np.array_equal(written[stay], found[WRITES][stay])
    assert np.array_equal(read[:, 0], written[:, 0])
    assert set(read[:, 0]) == set(found[READS][stay][:, 0])


def test_an_sae_trains_on_a_cache(sweep_of, cached):
    sweep = sweep_of(f"{WRITES}, {SITE}", PLAIN, activations=cached.folder)
    weights = trained(sweep, sweep_of.host)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert {name.split(" ")[0] for name in weights} == {READS, WRITES}
    assert sweep.metadata["dataset_path"] is None and sweep.protocol["activations"] == sweep.store.given


def test_hook_points_that_were_cached_one_by_one_are_used_together(sweep_of, tmp_path):
    tokens = token_rows(sweep_of, 120)
    values = {name: write_cache(tmp_path / "acts" / name, [name], tokens, 120)[name] for name in (READS, WRITES)}
    sweep = sweep_of(SITE, PLAIN, activations=tmp_path / "acts")
    for block in blocks_of(sweep_of.host, sweep):
        places = block[READS][:, 0].astype(int)
        for name in (READS, WRITES):
            assert np.array_equal(block[name], values[name].flatten(0, 1).numpy()[places])


def test_half_precision_is_widened_without_a_change(sweep_of, tmp_path):
    values = write_cache(tmp_path / "acts", [WRITES], token_rows(sweep_of, 120), 120, dtype="float16")
    sweep = sweep_of(WRITES, PLAIN, activations=tmp_path / "acts")
    [block, *_] = blocks_of(sweep_of.host, sweep)
    assert block[WRITES].dtype == np.float32
    places = block[WRITES][:, 0].astype(int)
    assert np.array_equal(block[WRITES], values[WRITES].flatten(0, 1).float().numpy()[places])


def test_another_seed_is_another_order_and_another_folder_another_identity(sweep_of, cached, tmp_path):
    first, again, other = (
        sweep_of(WRITES, PLAIN, *change, activations=cached.folder)
        for change in ((), (), [("  context", "  seed: 5\n  context")])
    )
    assert first.store.train_id == again.store.train_id != other.store.train_id
    harvested = [sweep_of.host.harvest(one.store, one.spec.data, 0, [WRITES])[WRITES] for one in (first, other)]
    assert set(harvested[0][:, 0]) != set(harvested[1][:, 0])
    write_cache(tmp_path / "acts", [WRITES], cached.tokens[::-1].copy(), 120)
    assert sweep_of(WRITES, PLAIN, activations=tmp_path / "acts").store.train_id != first.store.train_id


def test_a_folder_that_changes_under_a_sweep_is_refused(sweep_of, tmp_path):
    write_cache(tmp_path / "acts", [WRITES], token_rows(sweep_of, 120), 120)
    sweep = sweep_of(WRITES, PLAIN, activations=tmp_path / "acts")
    shutil.rmtree(tmp_path / "acts")
    write_cache(tmp_path / "acts", [WRITES], token_rows(sweep_of, 130), 130)
    with pytest.raises(DataError, match=r"data.activations .* has changed since the sweep was planned"):
        sweep_of.host.harvest(sweep.store, sweep.spec.data, 0, [WRITES])


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
@pytest.mark.filterwarnings("ignore")
def test_what_the_released_sae_lens_caches_is_what_the_model_host_harvests(sweep_of, tmp_path, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig, cache_activations_runner

    # By name it loads only models of the hub.
    monkeypatch.setattr(cache_activations_runner, "load_model", lambda **_: sweep_of.host.model)
    spec = sweep_of(WRITES).spec
    rows = token_rows(sweep_of, 80)
    config = CacheActivationsRunnerConfig(
        dataset_path="none", model_name=spec.model.name, model_batch_size=8,
        hook_name=WRITES, d_in=D, training_tokens=80 * CONTEXT, context_size=CONTEXT, prepend_bos=False,
        new_cached_activations_path=str(tmp_path / "acts"), buffer_size_gb=40 * CONTEXT * D * 4 / 1e9, device="cpu",
        streaming=False,
    )  # fmt: skip
    dataset = Dataset.from_dict({"tokens": rows.tolist()})
    CacheActivationsRunner(config, override_dataset=dataset).run()
    given = sweep_of(WRITES, PLAIN, ("1500", "900"), activations=tmp_path / "acts")
    opened = open_given(given.spec.data)
    assert isinstance(opened, GivenRows) and opened.n_rows == 80
    tokens = opened.tokens(0)
    assert {row.tobytes() for row in tokens} <= {row.tobytes() for row in rows}
    kept = given.store.kept(tokens)
    expected = sweep_of.host._activations(tokens, kept, np.arange(kept.sum()), [WRITES])[WRITES]
    found = opened.activations(0, kept, np.arange(kept.sum()), [WRITES], np.float32)[WRITES]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# ---- the plan, and what is refused ----


def plan(sweep_of, capsys, tmp_path, *arguments, **options) -> tuple[int, str, str]:
    spec = sweep_of.write(*arguments, **options)
    status = main(["plan", str(spec), "--home", str(tmp_path / "home")])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_plan_says_where_activations_come_from_and_what_is_not_known(sweep_of, spooled, cached, capsys, tmp_path):
    status, out, _ = plan(sweep_of, capsys, tmp_path, WRITES, activations=spooled.folder)
    assert status == 0
    assert f"given      {spooled.folder}: a spool's stream, of model " in out
    assert "forward    0 rows (0 tokens) through the model for training" in out and "warning" not in out
    status, out, _ = plan(sweep_of, capsys, tmp_path, WRITES, PLAIN, activations=cached.folder)
    assert status == 0
    assert f"given      {cached.folder}: cached activations of SAELens, 120 rows in float32" in out
    assert "nothing in the folder says which model they come from" in out


BAD_STREAMS = [
    ("context_size: 16", "context_size: 8", ["data.context_size 8", "accepted: data.context_size: 16"], 6),
    ("block_tokens: 640", "block_tokens: 1280", ["data.block_tokens 1280", "accepted: data.block_tokens: 640"], 7),
    ("norm_over_median: 1.2", "norm_over_median: 2", ["data.exclude", "norm_over_median: 1.2}"], 10),
    ("harvest_rows: 16", "dtype: bfloat16", ["model.dtype bfloat16", "accepted: model.dtype: float32"], 2),
    ("harvest_rows: 16", "processing: fold_ln", ["model.processing fold_ln", "accepted: model.processing: none"], 2),
    (WRITES, READS, [f"has no '{READS}'; accepted: {WRITES}, "], 11),
    ("tokens: 1500", "tokens: 1M", ["train.tokens 1000000", "more than", "accepted: train.tokens of at most 1650"], 12),
    ("  exclude", "  spool: /x\n  exclude", ["spool '/x'", "accepted: one of them"], None),
]


@pytest.mark.parametrize(("old", "new", "parts", "line"), BAD_STREAMS, ids=[new.strip() for _, new, *_ in BAD_STREAMS])
def test_a_stream_that_is_not_what_the_spec_says_is_refused(
    sweep_of, spooled, capsys, tmp_path, old, new, parts, line
):
    status, _, error = plan(sweep_of, capsys, tmp_path, WRITES, (old, new), activations=spooled.folder)
    assert status == 2
    assert all(part in error for part in [*parts, "activations", str(spooled.folder)]), error
    assert f"spec.yaml, line {line}" in error if line else "spec.yaml, line " in error, error


def cut_off(folder):
    write_cache(folder, [WRITES], np.ones((120, CONTEXT), np.int32), 120)
    file = next(folder.glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:1000])


def differing(folder):
    write_cache(folder / "a", [WRITES], np.ones((120, CONTEXT), np.int32), 120)
    write_cache(folder / "b", [READS], np.full((120, CONTEXT), 2, np.int32), 120)


def unequal(folder):
    write_cache(folder / "a", [WRITES], np.ones((120, CONTEXT), np.int32), 120)
    write_cache(folder / "b", [READS], np.ones((60, CONTEXT), np.int32), 60)


ONES = np.ones((120, CONTEXT), np.int32)
BAD_FOLDERS = {
    "missing": (lambda folder: None, ["there is no such folder", "a stream of a spool"], 5),
    "empty": (lambda folder: folder.mkdir(), ["holds no activations that can be read", "SAELens"], 5),
    "width": (lambda folder: write_cache(folder, [WRITES], ONES, 120, d=24), ["width 24", "32"], None),
    "hook": (lambda folder: write_cache(folder, [READS], ONES, 120), [f"no column '{WRITES}'", READS], 10),
    "context": (
        lambda folder: write_cache(folder, [WRITES], np.ones((120, 8), np.int32), 120, context=8),
        ["data.context_size 16", "accepted: data.context_size: 8"], 6,
    ),
    "double": (
        lambda folder: write_cache(folder, [WRITES], ONES, 120, dtype="float64"),
        ["float64", "float32 and float16"], 5,
    ),
    "no ids": (
        lambda folder: write_cache(folder, [WRITES], None, 120),
        ["data.exclude.special_tokens true", "no token_ids", "{special_tokens: false}"], 5,
    ),
    "foreign ids": (
        lambda folder: write_cache(folder, [WRITES], ONES * 5000, 120), ["token id 5000", "ids up to 299"], 5,
    ),
    "few": (
        lambda folder: write_cache(folder, [WRITES], ONES[:80], 80),
        ["train.tokens 1500", "2 whole blocks of 40 rows, with 1200 tokens", "at most 1200", "data.epochs: about 2"],
        11,
    ),
    "cut off": (cut_off, ["cannot be read as cached activations"], 5),
    "differing": (differing, ["differ in their token_ids", "the same rows in the same order"], 5),
    "unequal": (unequal, ["has 60 rows", "120 rows", "datasets of the same rows"], 5),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused(sweep_of, capsys, tmp_path, kind):
    make, parts, line = BAD_FOLDERS[kind]
    folder = tmp_path / "acts"
    make(folder)
    status, _, error = plan(sweep_of, capsys, tmp_path, WRITES, PLAIN, activations=folder)
    assert status == 2
    assert all(part in error for part in [*parts, "data.activations", str(folder), "accepted"]), error
    assert f"spec.yaml, line {line}: " in error if line else "spec.yaml, line " in error, error


def test_a_cache_without_ids_is_trained_on_whole_where_special_tokens_count(sweep_of, tmp_path):
    write_cache(tmp_path / "acts", [WRITES], None, 120)
    change = (PLAIN[0], "\n  exclude: {special_tokens: false}")
    sweep = sweep_of(WRITES, change, activations=tmp_path / "acts")
    assert list(sweep.store.kept_per_block) == [40 * (CONTEXT - 1)] * 3


def test_a_spool_is_refused_with_its_streams_and_a_stream_by_another_name(sweep_of, spooled, capsys, tmp_path):
    _, _, error = plan(sweep_of, capsys, tmp_path, WRITES, activations=spooled.folder.parent)
    assert "is a whole spool; accepted: one of its streams" in error and spooled.folder.name in error
    renamed = shutil.copytree(spooled.folder, tmp_path / "ba9876543210")
    _, _, error = plan(sweep_of, capsys, tmp_path, WRITES, activations=renamed)
    assert "is of another block, or damaged: its stream is" in error
    (renamed / "about.json").write_text("{}")
    _, _, error = plan(sweep_of, capsys, tmp_path, WRITES, activations=renamed)
    assert "its about.json does not say" in error
    _, _, error = plan(sweep_of, capsys, tmp_path, WRITES, activations="''")
    assert "accepted is a folder of activations" in error


def test_a_missing_block_of_one_hook_point_is_named(sweep_of, spooled, capsys, tmp_path):
    copy = shutil.copytree(spooled.folder, tmp_path / spooled.folder.name)
    (copy / WRITES / "0000001.arrow").unlink()
    status, _, error = plan(sweep_of, capsys, tmp_path, WRITES, activations=copy)
    assert status == 2 and f"has no block 1 of {WRITES}" in error


def test_a_stream_is_found_by_its_uri_too(spooled, sweep_of):
    sweep = sweep_of(WRITES, activations=f"file://{spooled.folder}")
    given = open_given(sweep.spec.data)
    assert isinstance(given, GivenStream) and given.identity == sweep.store.given
    with pytest.raises(DataError, match="no stream of a spool"):
        open_given(DataSpec(activations=f"file://{spooled.folder.parent}/acts"))
    with pytest.raises(DataError, match="more than"):
        given.kept_per_block(sweep.spec.data, TrainSpec(tokens=10**6, batch_tokens=50))


def test_special_ids_are_those_of_the_models_tokenizer(sweep_of, cached):
    sweep = sweep_of(WRITES, PLAIN, activations=cached.folder)
    assert load_tokenizer(sweep.spec.model).special_ids == (0,)
    rows = open_given(sweep.spec.data).tokens(0)
    assert sweep.store.kept_per_block[0] == (rows[:, 1:] != 0).sum()
