import numpy as np
import pytest
import torch

from penstock.activations import from_wire, to_wire
from penstock.errors import ModelError
from penstock.model_host import ModelHost, is_out_of_memory, norm_outliers, replace_rows
from penstock.sites import Site
from penstock.spec import DataSpec, ModelSpec, TrainSpec
from penstock.storage import Storage
from penstock.tokens import build_token_store
from sae_core import SAETrainer, TrainingSettings, calibrate, parse_settings
from sae_core.baselines import TopKBasis
from tiny_models import make_model, write_model

KINDS = ("gpt2", "llama", "neox")
TRANSCODED = ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
HOOK_POINTS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.2.mlp.hook_post")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: str(write_model(root / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataSpec:
    path = tmp_path_factory.mktemp("data") / "documents.txt"
    path.write_text("\n\n".join(f"document{i} the wheel turns" + " the water" * (i % 7) for i in range(600)))
    return DataSpec(dataset=str(path), context_size=16, block_tokens=640, search_tokens=200, report_tokens=400)


@pytest.fixture(scope="module")
def store(tmp_path_factory, folders, data):
    storage = Storage(tmp_path_factory.mktemp("storage"))
    return build_token_store(data, ModelSpec(name=folders["gpt2"]), TrainSpec(tokens=1_500, batch_tokens=50), storage)


def host(folder: str, **settings) -> ModelHost:
    return ModelHost(ModelSpec(name=folder, **{"harvest_rows": 12, **settings}), device="cpu")


def reference(kind: str, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The same activations taken from the Hugging Face model: hidden states, and what its linear layers read."""
    model = make_model(kind)
    block = {"gpt2": lambda i: model.transformer.h[i], "llama": lambda i: model.model.layers[i],
             "neox": lambda i: model.gpt_neox.layers[i]}[kind]  # fmt: skip
    attention_out = {"gpt2": lambda b: b.attn.c_proj, "llama": lambda b: b.self_attn.o_proj,
                     "neox": lambda b: b.attention.dense}[kind]  # fmt: skip
    mlp_out = {"gpt2": lambda b: b.mlp.c_proj, "llama": lambda b: b.mlp.down_proj,
               "neox": lambda b: b.mlp.dense_4h_to_h}[kind]  # fmt: skip
    read = {}
    attention_out(block(1)).register_forward_pre_hook(lambda _, args: read.update(z=args[0]))
    mlp_out(block(2)).register_forward_pre_hook(lambda _, args: read.update(post=args[0]))
    with torch.no_grad():
        states = model(torch.from_numpy(rows.astype(np.int64)), output_hidden_states=True).hidden_states
    return dict(zip(HOOK_POINTS, (states[0], states[2], read["z"], read["post"]), strict=True))


def in_order(expected: torch.Tensor, kept: np.ndarray, data: DataSpec, block: int) -> np.ndarray:
    """Kept tokens of [rows, context, d_in] in the order that the seed and the block give."""
    tokens = expected[torch.from_numpy(kept)].numpy()
    permuted = np.empty_like(tokens)
    permuted[np.random.default_rng([data.seed, block]).permutation(len(tokens))] = tokens
    return permuted


# ---- harvesting ----


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_holds_hugging_faces_activations(kind, folders, store, data):
    arrays = host(folders[kind]).harvest(store, data, 1, HOOK_POINTS)
    rows = store.rows("train", store.block_rows, 2 * store.block_rows)
    expected = reference(kind, rows)
    assert list(arrays) == list(HOOK_POINTS)
    for name, array in arrays.items():
        assert array.dtype == np.float32
        assert len(array) == store.kept_per_block[1]
        np.testing.assert_allclose(array, in_order(expected[name], store.kept(rows), data, 1), atol=1e-5, rtol=1e-4)


def test_a_block_is_the_same_bit_for_bit_whatever_is_asked_for_beside(folders, store, data):
    first = host(folders["gpt2"]).harvest(store, data, 0, HOOK_POINTS)
    again = host(folders["gpt2"])
    for names in ([HOOK_POINTS[1]], HOOK_POINTS[2:], HOOK_POINTS[::-1]):
        arrays = again.harvest(store, data, 0, names)
        assert list(arrays) == list(names)
        for name in names:
            assert arrays[name].tobytes() == first[name].tobytes()


def test_another_block_or_seed_is_permuted_otherwise(folders, store, data):
    some = host(folders["gpt2"])
    name = HOOK_POINTS[0]
    first = some.harvest(store, data, 0, [name])[name]
    other_seed = some.harvest(store, data.model_copy(update={"seed": 1}), 0, [name])[name]
    assert not np.array_equal(first, other_seed)
    np.testing.assert_array_equal(np.sort(first, axis=0), np.sort(other_seed, axis=0))
    assert not np.array_equal(
        np.sort(first, axis=0)[:500], np.sort(some.harvest(store, data, 1, [name])[name], axis=0)[:500]
    )


def test_the_model_runs_no_further_than_asked(folders, store, data):
    some = host(folders["gpt2"])
    reached = []
    for layer in range(3):
        some.model.hook_dict[f"blocks.{layer}.hook_in"].add_perma_hook(
            lambda x, hook, layer=layer: reached.append(layer)
        )
    some.harvest(store, data, 0, ["blocks.0.hook_resid_post"])
    assert set(reached) == {0}
    some.harvest(store, data, 0, ["blocks.1.hook_resid_post", "blocks.0.hook_resid_post"])
    assert set(reached) == {0, 1}


def test_every_forward_pass_has_one_shape_and_is_counted(folders, store, data, monkeypatch):
    some = host(folders["gpt2"])
    shapes = []
    forward = some.model.forward
    monkeypatch.setattr(
        some.model, "forward", lambda x, **kwargs: shapes.append(tuple(x.shape)) or forward(x, **kwargs)
    )
    some.harvest(store, data, 0, HOOK_POINTS[:1])
    assert shapes == [(12, 16)] * 4  # 40 rows
    assert (some.forward_passes, some.tokens) == (4, 4 * 12 * 16)
    assert not any(some.model.hook_dict[name].fwd_hooks for name in HOOK_POINTS)


def test_more_rows_a_forward_pass_than_a_block_has_will_do(folders, store, data):
    name = HOOK_POINTS[1]
    few = host(folders["gpt2"], harvest_rows=40).harvest(store, data, 0, [name])[name]
    many = host(folders["gpt2"], harvest_rows=1_000).harvest(store, data, 0, [name])[name]
    np.testing.assert_array_equal(few, many)


def test_excluded_tokens_are_absent(folders, store, data):
    """At hook_embed an activation is its token's embedding, so it tells which token it was."""
    some = host(folders["gpt2"])
    array = some.harvest(store, data, 0, ["hook_embed"])["hook_embed"]
    embedding = make_model("gpt2").transformer.wte.weight.detach()
    tokens = torch.cdist(torch.from_numpy(array), embedding).argmin(1).numpy()
    rows = store.rows("train", 0, store.block_rows)
    assert sorted(tokens) == sorted(rows[store.kept(rows)])
    assert 0 not in tokens


def test_bfloat16_travels_as_bits(folders, store, data):
    name = HOOK_POINTS[1]
    array = host(folders["llama"], dtype="bfloat16").harvest(store, data, 0, [name])[name]
    assert array.dtype == np.uint16
    activations = from_wire(array, torch.bfloat16)
    assert activations.dtype == torch.bfloat16
    rows = store.rows("train", 0, store.block_rows)
    expected = torch.from_numpy(in_order(reference("llama", rows)[name], store.kept(rows), data, 0))
    assert torch.nn.functional.cosine_similarity(activations.float(), expected).min() > 0.99


def test_float16_stays_float16(folders, store, data):
    name = HOOK_POINTS[0]
    assert host(folders["gpt2"], dtype="float16").harvest(store, data, 0, [name])[name].dtype == np.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_wire_arrays_and_tensors_share_memory(dtype):
    tensor = torch.arange(6, dtype=dtype).reshape(2, 3)
    array = to_wire(tensor)
    back = from_wire(array, dtype)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)
    assert back.data_ptr() == tensor.data_ptr()
    array.flags.writeable = False  # as the object store hands it out
    assert torch.equal(from_wire(array, str(dtype).removeprefix("torch.")), tensor)


def test_a_hook_point_that_is_lacking_or_never_reached_is_named(folders, store, data):
    some = host(folders["gpt2"])
    with pytest.raises(ModelError, match=r"no 'blocks\.9\.hook_resid_post'"):
        some.harvest(store, data, 0, ["blocks.9.hook_resid_post"])
    with pytest.raises(ModelError, match=r"'blocks\.0\.attn\.hook_result' is never reached"):
        some.harvest(store, data, 0, ["blocks.0.attn.hook_result"])


# ---- tokens of an unusual norm ----


def test_outliers_give_their_place_to_the_first_ordinary_rows():
    activations = torch.tensor([[90.0], [1.0], [2.0], [80.0], [1.0], [2.0], [70.0]])
    replace_rows(activations, norm_outliers(activations, 10.0))
    assert activations.squeeze(1).tolist() == [1, 1, 2, 2, 1, 2, 1]


def test_norm_exclusion_keeps_length_and_all_other_rows(folders, store, data):
    limited = data.model_copy(update={"exclude": data.exclude.model_copy(update={"norm_over_median": 1.2})})
    some = host(folders["gpt2"])
    for name in HOOK_POINTS[:2]:
        plain, cleaned = (some.harvest(store, spec, 0, HOOK_POINTS)[name] for spec in (data, limited))
        assert plain.shape == cleaned.shape
        norms = np.linalg.norm(plain, axis=1)
        ordinary = norms <= 1.2 * torch.from_numpy(norms).median().item()
        assert 0 < (~ordinary).sum() < len(plain) / 2
        np.testing.assert_array_equal(plain[ordinary], cleaned[ordinary])
        n_outliers = int((~ordinary).sum())
        np.testing.assert_array_equal(cleaned[~ordinary], plain[ordinary][:n_outliers])
        np.testing.assert_array_equal(some.harvest(store, limited, 0, [name])[name], cleaned)


def test_a_transcoders_arrays_lose_the_same_rows_and_stay_aligned(folders, store, data):
    """Outliers of either hook point give up their row in both, and an SAE of one of the two gets its own array."""
    limited = data.model_copy(update={"exclude": data.exclude.model_copy(update={"norm_over_median": 1.05})})
    some, site = host(folders["gpt2"]), Site(*TRANSCODED)
    names = [site.array(name, 1.05) for name in site.hook_points]
    plain = some.harvest(store, data, 0, site.hook_points)
    cleaned = some.harvest(store, limited, 0, [*names, TRANSCODED[0]])
    norms = [torch.from_numpy(np.linalg.norm(array, axis=1)) for array in plain.values()]
    outliers = np.stack([(norm > 1.05 * norm.median()).numpy() for norm in norms])
    assert (outliers[0] & ~outliers[1]).any() and (outliers[1] & ~outliers[0]).any()
    either = outliers.any(0)
    for name, array in zip(names, plain.values(), strict=True):
        expected = array.copy()
        expected[either] = array[~either][: either.sum()]
        np.testing.assert_array_equal(cleaned[name], expected)
    alone = some.harvest(store, limited, 0, [TRANSCODED[0]])[TRANSCODED[0]]
    np.testing.assert_array_equal(cleaned[TRANSCODED[0]], alone)
    assert not np.array_equal(alone, cleaned[names[0]])
    np.testing.assert_array_equal(some.harvest(store, limited, 0, names[::-1])[names[0]], cleaned[names[0]])


# ---- memory ----


def limit_rows(monkeypatch, some: ModelHost, most: int, error: BaseException) -> None:
    forward = some.model.forward

    def limited(tokens, *args, **kwargs):
        if len(tokens) > most:
            raise error
        return forward(tokens, *args, **kwargs)

    monkeypatch.setattr(some.model, "forward", limited)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")],
)  # fmt: skip
def test_out_of_memory_halves_the_rows_and_gives_the_same(error, folders, store, data, monkeypatch, caplog):
    expected = host(folders["gpt2"]).harvest(store, data, 0, HOOK_POINTS)
    some = host(folders["gpt2"])
    limit_rows(monkeypatch, some, 4, error)
    arrays = some.harvest(store, data, 0, HOOK_POINTS)
    assert some.rows_per_forward == 3
    assert "going on with 3 rows" in caplog.text
    for name in HOOK_POINTS:
        np.testing.assert_allclose(arrays[name], expected[name], atol=1e-5, rtol=1e-5)


def test_a_row_that_does_not_fit_is_said_so(folders, store, data, monkeypatch):
    some = host(folders["gpt2"])
    limit_rows(monkeypatch, some, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ModelError, match="not even one row fits into the memory of cpu"):
        some.harvest(store, data, 0, HOOK_POINTS)


def test_other_errors_are_not_taken_for_memory(folders, store, data, monkeypatch):
    some = host(folders["gpt2"])
    limit_rows(monkeypatch, some, 0, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        some.harvest(store, data, 0, HOOK_POINTS)
    assert some.rows_per_forward == 12
    assert not is_out_of_memory(ValueError("can't allocate memory"))


# ---- evaluation ----


class Same(torch.nn.Module):
    """An SAE that changes nothing."""

    def encode(self, x):
        return x

    def decode(self, features):
        return features


def test_evaluation_of_slices_adds_up_to_the_whole(folders, store, data):
    some = host(folders["gpt2"])
    saes = {"same": Same(), "top": TopKBasis(torch.zeros(32), torch.eye(32), 4)}
    n_rows = store.n_rows("report")
    evaluated = [some.evaluate(store, data, HOOK_POINTS[1], saes, "report", *span)
                 for span in ((0, n_rows), (0, 5), (5, n_rows))]  # fmt: skip
    for name in saes:
        whole = evaluated[0][name].metrics()
        parts = evaluated[1][name].merge(evaluated[2][name]).metrics()
        assert whole == pytest.approx(parts, rel=1e-4, abs=1e-6)
    assert evaluated[0]["same"].n_tokens.sum() == store.kept(store.rows("report", 0, n_rows)).sum()
    assert evaluated[0]["same"].metrics()["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert evaluated[0]["top"].metrics()["l0"] == pytest.approx(4)


def test_evaluation_halves_too(folders, store, data, monkeypatch):
    saes = {"top": TopKBasis(torch.zeros(32), torch.eye(32), 4)}
    arguments = (store, data, HOOK_POINTS[1], saes, "report", 0, store.n_rows("report"))
    expected = host(folders["gpt2"]).evaluate(*arguments)["top"].metrics()
    some = host(folders["gpt2"])
    limit_rows(monkeypatch, some, 4, torch.OutOfMemoryError("CUDA out of memory"))
    assert some.evaluate(*arguments)["top"].metrics() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert some.rows_per_forward == 3


def test_evaluation_leaves_out_tokens_of_an_unusual_norm(folders, store, data):
    limited = data.model_copy(update={"exclude": data.exclude.model_copy(update={"norm_over_median": 1.2})})
    some = host(folders["gpt2"])
    name, n_rows = HOOK_POINTS[1], store.n_rows("report")
    counted = some.evaluate(store, limited, name, {"same": Same()}, "report", 0, n_rows)["same"].n_tokens.sum()
    block = some.harvest(store, data, 0, [name])[name]
    limit = 1.2 * torch.from_numpy(np.linalg.norm(block, axis=1)).median().item()
    rows = store.rows("report", 0, n_rows)
    norms = reference("gpt2", rows)[name].norm(dim=-1).numpy()
    assert counted == (store.kept(rows) & (norms <= limit)).sum()
    assert counted < store.kept(rows).sum()
    slices = [some.evaluate(store, limited, name, {"same": Same()}, "report", *span)["same"].n_tokens.sum()
              for span in ((0, 5), (5, n_rows))]  # fmt: skip
    assert sum(slices) == counted


@pytest.mark.parametrize("limit", [None, 1.05])
def test_a_site_is_evaluated_where_it_writes_on_the_same_tokens_as_the_bases(limit, folders, store, data):
    exclude = data.exclude.model_copy(update={"norm_over_median": limit})
    limited, some = data.model_copy(update={"exclude": exclude}), host(folders["gpt2"])
    n_rows = store.n_rows("report")
    bases = {"top": TopKBasis(torch.zeros(32), torch.eye(32), 32)}
    sums = some.evaluate_site(store, limited, Site(*TRANSCODED), {"mlp": MLP()}, bases, "report", 0, n_rows)
    for name in ("mlp", "top"):  # each knows what is written, from what is read or from itself
        assert sums[name].metrics()["ce_recovered"] == pytest.approx(1, abs=1e-3)
        assert sums[name].metrics()["explained_variance"] == pytest.approx(1, abs=1e-4)
    assert (sums["mlp"].n_tokens == sums["top"].n_tokens).all()
    if limit is not None:
        kept = [some.evaluate_site(store, limited, Site(name, name), {}, bases, "report", 0, n_rows)["top"]
                for name in TRANSCODED]  # fmt: skip
        assert sums["mlp"].n_tokens.sum() < min(one.n_tokens.sum() for one in kept)
    only = some.evaluate_site(store, limited, Site(*TRANSCODED), {}, bases, "report", 0, n_rows)
    assert only["top"].metrics() == sums["top"].metrics()
    at_one = some.evaluate_site(store, limited, Site(*TRANSCODED[1:] * 2), {"same": Same()}, bases, "report", 0, n_rows)
    assert list(at_one) == ["same", "top"]


class MLP(torch.nn.Module):
    """What the model itself makes of what a transcoder reads."""

    def __init__(self):
        super().__init__()
        self.mlp = make_model("gpt2").transformer.h[1].mlp

    def reconstruct(self, x):
        return x, self.mlp(x)


def test_all_heads_together_are_harvested_trained_on_and_evaluated(folders, store, data):
    some, name = host(folders["llama"]), "blocks.1.attn.hook_z"
    x = torch.from_numpy(some.harvest(store, data, 0, [name])[name])
    settings = parse_settings({"architecture": "topk", "d_sae": 64, "k": 8})
    trainer = SAETrainer(settings, TrainingSettings(steps=5, batch_tokens=100, dead_after_tokens=100), calibrate(x))
    for step in range(5):
        trainer.train_step(x[100 * step : 100 * (step + 1)])
    sae = trainer.export({"hook_name": name}, reshape_activations="hook_z")
    metrics = some.evaluate(store, data, name, {"z": sae}, "report", 0, store.n_rows("report"))["z"].metrics()
    assert metrics["l0"] <= 8 and metrics["ce_recovered"] > 0
    heads = x[:3].view(3, 4, 8)
    assert sae(heads).shape == heads.shape
    torch.testing.assert_close(sae(heads).flatten(1), sae(x[:3]))
