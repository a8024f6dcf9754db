"""SAELens' ActivationsStore and run_evals, in one process."""

import numpy as np
import pytest
import torch

from penstock.activations import from_wire
from penstock.batches import batches
from penstock.compat import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    get_eval_everything_config,
    run_evals,
)
from penstock.errors import ConfigError, DataError
from penstock.model_host import ModelHost
from penstock.spool import Spool
from penstock.storage import Storage
from sae_core import evaluate_rows

HOOK = "blocks.1.hook_resid_post"
OPEN = {"exclude_special_tokens": True, "seqpos_slice": (1, None)}  # as it is unless given, and so not said


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model():
    return HookedSAETransformer.from_pretrained_no_processing("demo")


def configured(**keywords) -> LanguageModelSAERunnerConfig:
    given = {
        "model_name": "demo", "hook_name": HOOK, "dataset_path": "demo", "training_tokens": 70_000, "context_size": 64,
        "train_batch_size_tokens": 4096, "store_batch_size_prompts": 8, "n_eval_batches": 5,
    }  # fmt: skip
    return LanguageModelSAERunnerConfig(**(given | OPEN | keywords))


@pytest.fixture(scope="module")
def store(model, home):
    return ActivationsStore.from_config(model, configured(), home=home)


def test_the_batches_are_those_that_a_sweep_trains_on(store):
    sweep = store.sweep
    host = ModelHost(sweep.spec.model, device="cpu")
    trained = []
    for block in range(sweep.schedule.n_blocks):
        activations = from_wire(host.harvest(sweep.store, sweep.spec.data, block, [HOOK])[HOOK], "float32")
        trained += [activations[where] for _, where in batches(sweep.schedule, block, len(activations), 0)]
    found = list(store)
    assert len(found) == len(store) == 17 and found[0].shape == (4096, 128) and found[0].dtype == torch.float32
    torch.testing.assert_close(torch.cat(found), torch.cat(trained), rtol=1e-5, atol=1e-5)


def test_after_the_last_batch_the_first_comes_again(store):
    store.reset_input_dataset()
    first = [store.next_batch() for _ in range(len(store))]
    assert torch.equal(next(store), first[0]) and not torch.equal(first[0], first[1])
    assert torch.equal(next(iter(store)), first[0])
    store.reset_input_dataset()
    assert torch.equal(store.next_batch(), first[0])


def test_tokens_come_in_order_and_their_activations_are_the_models(store, model):
    store.reset_input_dataset()
    tokens = store.get_batch_tokens()
    assert tokens.shape == (8, 64) and tokens.dtype == torch.int64
    again = store.get_batch_tokens(3)
    rows = store.sweep.store.rows("train", 0, 11).astype(np.int64)
    assert torch.equal(torch.cat([tokens, again]), torch.from_numpy(rows))
    activations = store.get_activations(tokens)
    _, cache = model.run_with_cache(tokens, names_filter=[HOOK])
    assert activations.shape == (8, 64, 128) and torch.equal(activations, cache[HOOK])


def test_heads_lie_side_by_side(model, home):
    store = ActivationsStore(model, configured(hook_name="blocks.1.attn.hook_z"), home=home)
    tokens = store.get_batch_tokens(2)
    _, cache = model.run_with_cache(tokens, names_filter=["blocks.1.attn.hook_z"])
    assert torch.equal(store.get_activations(tokens), cache["blocks.1.attn.hook_z"].flatten(2))


def test_the_spool_is_read_where_a_run_has_filled_it(model, home, tmp_path):
    """Marked activations in the spool show that they, and not the model, are where the batches come from."""
    plain = ActivationsStore(model, configured(), home=home)
    stream = Spool(plain.sweep.storage.at("spool")).stream(plain.sweep.stream_id)
    stream.describe(plain.sweep.about_stream)
    for block, kept in enumerate(plain.sweep.store.kept_per_block):
        stream.write(HOOK, block, np.full((int(kept), 128), block + 7.0, dtype=np.float32), "float32")
    spooled = ActivationsStore(None, configured(), home=home)
    assert [batch.unique().tolist() for batch in spooled][:1] == [[7.0]]
    assert "_host" not in vars(spooled)  # the model was never loaded
    Storage(home / "spool").delete(plain.sweep.stream_id)


def test_cached_activations_of_sae_lens_are_read(model, home, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, context = 1100, 64
    generator = np.random.default_rng(0)
    values = generator.normal(size=(rows, context, 128)).astype(np.float32)
    tokens = generator.integers(3, 4000, size=(rows, context)).astype(np.int32)
    features = datasets.Features({
        HOOK: datasets.Array2D(shape=(context, 128), dtype="float32"),
        "token_ids": datasets.Sequence(datasets.Value("int32"), length=context),
    })  # fmt: skip
    table = datasets.Dataset.from_dict({HOOK: values, "token_ids": tokens}, features=features)
    table.save_to_disk(tmp_path / "cached")
    cfg = configured(
        use_cached_activations=True, cached_activations_path=str(tmp_path / "cached"), training_tokens=50_000,
    )  # fmt: skip
    store = ActivationsStore(model, cfg, home=home)
    batch = next(iter(store))
    known = {row.tobytes() for row in values[:, 1:].reshape(-1, 128)}
    assert all(row.tobytes() in known for row in batch.numpy()[:50])
    assert {row.tobytes() for row in store.get_batch_tokens(20).numpy().astype(np.int32)} <= {
        row.tobytes() for row in tokens
    }


def test_a_stream_of_a_spool_has_no_tokens(model, home, tmp_path):
    plain = ActivationsStore(model, configured(), home=home)
    stream = Spool(Storage(tmp_path / "spool")).stream(plain.sweep.stream_id)
    stream.describe(plain.sweep.about_stream)
    for block in range(plain.sweep.schedule.n_blocks):
        stream.write(HOOK, block, plain._block(block), "float32")
    cfg = configured(
        use_cached_activations=True, cached_activations_path=str(tmp_path / "spool" / plain.sweep.stream_id)
    )
    given = ActivationsStore(None, cfg, home=home)
    assert torch.equal(next(given), next(iter(plain)))
    with pytest.raises(DataError, match="holds activations and no tokens"):
        given.get_batch_tokens()


def test_a_store_for_an_sae_takes_what_its_metadata_say(demo_saes, model, home):
    sae = SAE.load(demo_saes[HOOK])
    store = ActivationsStore.from_sae(
        model, sae, store_batch_size_prompts=4, train_batch_size_tokens=512, total_tokens=70_000, home=home
    )
    assert (store.hook_name, store.context_size, len(store)) == (HOOK, 128, 70_000 // 512)
    assert store.sweep.spec.data.exclude.model_dump() == sae.cfg.metadata["exclude"]
    x = next(store)
    assert 1 - (sae(x) - x).square().sum() / (x - x.mean(0)).square().sum() > 0.5


def test_evaluation_by_sae_lens_names(demo_saes, store, model):
    sae = SAE.load(demo_saes[HOOK])
    config = get_eval_everything_config(n_eval_reconstruction_batches=3)
    metrics, latents = run_evals(sae, store, model, eval_config=config)
    rows = store.sweep.store.rows("report", 0, 24)
    expected = evaluate_rows(
        model, {"sae": sae}, HOOK, torch.from_numpy(rows.astype(np.int64)),
        torch.from_numpy(store.sweep.store.kept(rows)), rows_per_forward=8,
    )["sae"]  # fmt: skip
    figures = expected.metrics()
    assert metrics["model_performance_preservation"]["ce_loss_score"] == pytest.approx(figures["ce_recovered"])
    assert metrics["model_behavior_preservation"]["kl_div_score"] == pytest.approx(figures["kl_recovered"])
    assert metrics["sparsity"]["l0"] == pytest.approx(figures["l0"]) and metrics["sparsity"]["l0"] == 16
    assert metrics["reconstruction_quality"]["explained_variance"] == pytest.approx(figures["explained_variance"])
    assert metrics["token_stats"]["total_tokens_eval_reconstruction"] == 24 * 64
    assert latents["feature_density"] == pytest.approx(expected.feature_density.tolist())
    assert len(latents["encoder_norm"]) == len(latents["encoder_bias"]) == 512


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda: HookedSAETransformer.from_pretrained("demo"), "was loaded with center_writing_weights"),
        (lambda: HookedSAETransformer.from_pretrained_no_processing("demo", center_writing_weights=True), "was loaded"),
    ],
)
def test_another_model_than_the_configurations_is_refused(load, message, home):
    with pytest.raises(ConfigError, match=message):
        ActivationsStore(load(), configured(), home=home)


def test_a_model_with_saes_in_it_is_refused(demo_saes, model, home):
    model.add_sae(SAE.load(demo_saes[HOOK]))
    try:
        with pytest.raises(ConfigError, match="SAEs spliced in"):
            ActivationsStore(model, configured(), home=home)
    finally:
        model.reset_saes()
