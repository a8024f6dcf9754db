"""Feature dashboards: every accumulator against brute force, exact merging, and the folder."""

import json
import random
import tracemalloc
from dataclasses import asdict, replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from sae_core import SAE, CheckpointError, ConfigError, SAEConfig
from sae_core.analysis.feature_files import ABOUT, EXAMPLES, VOCABULARY, FeatureWriter, is_features, read_features
from sae_core.analysis.features import (
    BINS,
    FeaturePass,
    FeatureSettings,
    MergedFeatures,
    add_rows,
    decoder_neighbours,
    example_tables,
    latent_groups,
    latent_logits,
    latents_table,
    place_hash,
    to_residual,
)
from sae_core.analysis.final_norm import read_norm
from sae_core.architectures import ARCHITECTURES

ROWS, CONTEXT, LATENTS = 40, 12, 10
SETTINGS = FeatureSettings(top=6, quantiles=3, per_quantile=2, before=3, after=2, logits=4, neighbours=3)


def activations(rows: int = ROWS, context: int = CONTEXT, latents: int = LATENTS) -> torch.Tensor:
    """[rows, context, latents], with a dead latent, one that fires once, one of ties, and an excluded position."""
    f = (torch.randn(rows, context, latents, generator=torch.Generator().manual_seed(0)) - 1.2).relu()
    f[:, :, 3] = 0
    f[:, :, 4] = 0
    f[7, 5, 4] = 0.5
    f[:, :, 5] = (f[:, :, 5] > 0) * 2.0 + (f[:, :, 5] > 0.6) * 1.0  # ties everywhere
    f[:, 0] = 0
    return f


F = activations()
TOKENS = np.arange(ROWS * CONTEXT).reshape(ROWS, CONTEXT) % 50


def merged(f=F, slices=((0, ROWS),), order=None, latents=None, settings=SETTINGS, limits=True) -> MergedFeatures:
    """Parts of some slices of rows, merged in some order."""
    latents = latents or range(f.shape[2])
    found = MergedFeatures(len(latents), settings)
    for number in order or range(len(slices)):
        start, stop = slices[number]
        one = FeaturePass(len(latents), f.shape[1], settings, first_latent=latents.start,
                          limits=found.limits if limits else None)  # fmt: skip
        for row in range(start, stop, 3):  # in batches of rows
            batch = f[row : min(row + 3, stop), :, latents.start : latents.stop]
            one.add(batch, row, len(batch) * (f.shape[1] - 1))
        found.add(number, one.part())
    return found


def same_bits(a: MergedFeatures, b: MergedFeatures) -> None:
    for one, other in ((a.totals, b.totals), (a.top, b.top), (a.sample, b.sample)):
        for name, value in vars(one).items():
            np.testing.assert_array_equal(value, getattr(other, name), err_msg=name)


def of_latent(examples, latent):
    return examples.take(examples.latent == latent)


# ---- against brute force --------------------------------------------------------------------------------------------


def test_counts_sums_and_histograms_are_those_of_all_tokens():
    totals = merged().totals
    assert totals.n_tokens == ROWS * (CONTEXT - 1)
    np.testing.assert_array_equal(totals.fired, (F > 0).sum((0, 1)))
    np.testing.assert_allclose(totals.total, F.double().sum((0, 1)), rtol=1e-12)
    np.testing.assert_array_equal(totals.greatest, F.amax((0, 1)))
    for latent in range(LATENTS):
        values = F[:, :, latent][F[:, :, latent] > 0].numpy()
        inside = values.clip(BINS[0], np.nextafter(BINS[-1], np.float32(0)))  # the ends take what lies beyond
        np.testing.assert_array_equal(totals.histogram[latent], np.histogram(inside, BINS)[0])
    assert totals.l0 == pytest.approx(float((F > 0).sum()) / (ROWS * (CONTEXT - 1)))


def test_what_lies_beyond_the_bins_counts_in_the_first_and_the_last():
    f = torch.tensor([[[1e-9, 1e9, BINS[0], BINS[1]]]])
    histogram = merged(f, ((0, 1),)).totals.histogram
    assert [int(row.argmax()) for row in histogram] == [0, len(BINS) - 2, 0, 1] and histogram.sum() == 4


def test_top_examples_are_the_strongest_peaks_one_a_row_and_of_equal_ones_the_first():
    top = merged().top
    for latent in range(LATENTS):
        peaks = [(-float(F[row, :, latent].max()), row, int(np.argmax(F[row, :, latent].numpy())))
                 for row in range(ROWS) if F[row, :, latent].max() > 0]  # fmt: skip
        expected = sorted(peaks)[: SETTINGS.top]
        own = of_latent(top, latent)
        assert [(-float(a), int(row), int(position)) for a, row, position in
                zip(own.activation, own.row, own.position, strict=True)] == expected  # fmt: skip
    assert len(of_latent(top, 3)) == 0 and len(of_latent(top, 4)) == 1


def test_the_sample_is_the_firing_places_of_the_smallest_hashes():
    sample = merged().sample
    assert SETTINGS.sample == 12
    for latent in range(LATENTS):
        places = (F[:, :, latent].flatten() > 0).nonzero()[:, 0]
        hashes = place_hash(places, torch.full_like(places, latent))
        expected = places[hashes.argsort()[: SETTINGS.sample]].tolist()
        own = of_latent(sample, latent)
        assert list(own.row * CONTEXT + own.position) == expected
        np.testing.assert_array_equal(own.activation, F[own.row, own.position, latent])


def test_windows_hold_the_latents_own_activations_and_end_with_the_row():
    for examples in (merged().top, merged().sample):
        for latent, row, position, window in zip(examples.latent, examples.row, examples.position, examples.window,
                                                 strict=True):  # fmt: skip
            padded = np.pad(F[row, :, latent].numpy(), (SETTINGS.before, SETTINGS.after))
            np.testing.assert_array_equal(window, padded[position : position + SETTINGS.window])


def test_sampled_places_are_uniform_over_firing_tokens():
    """Of 4000 firing places in rows of very different density, the 300 sampled are spread like the places, over
    positions and rows alike, for every latent in another way."""
    f = torch.zeros(200, 40, 3)
    f[:100, :30] = 1.0
    f[100:, ::10] = 1.0
    f[150:, 1:7] = 1.0
    n = int((f[:, :, 0] > 0).sum())
    settings = FeatureSettings(top=0, quantiles=3, per_quantile=50)
    sample = merged(f, ((0, 200),), settings=settings).sample
    chosen = [of_latent(sample, latent) for latent in range(3)]
    for own in chosen:
        assert len(own) == 300
        for share, expected in ((own.row < 100, 3000), (own.row >= 150, 50 * 10), (own.position < 3, 550)):
            spread = np.sqrt(300 * expected / n * (1 - expected / n))
            assert abs(share.sum() - 300 * expected / n) < 4 * spread
    places = [set(zip(own.row.tolist(), own.position.tolist(), strict=True)) for own in chosen]
    assert len(places[0] & places[1]) < 60  # independent samples share 300^2 / 3700 = 24 on average


def test_hashes_are_spread_evenly_and_differ_by_place_and_latent():
    places, latents = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    hashes = place_hash(places.flatten(), latents.flatten())
    assert len(hashes.unique()) == 300 * 300 and int(hashes.min()) >= 0
    counts = np.histogram((hashes.double() / 2**63).numpy(), 20, (0, 1))[0]
    assert ((counts - 4500) ** 2 / 4500).sum() < 50  # chi square of 19 degrees of freedom: p < 1e-4


def test_hashes_are_splitmix64s():
    def mixed(z):
        z = (z + 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for place, latent in ((0, 0), (1, 0), (12345678901, 131071)):
        expected = mixed((mixed(place) + latent) % 2**64) % 2**63
        assert int(place_hash(torch.tensor([place]), torch.tensor([latent]))) == expected


# ---- merging --------------------------------------------------------------------------------------------------------


SLICES = ((0, 6), (6, 15), (15, 16), (16, 30), (30, ROWS))


@pytest.mark.parametrize("limits", [True, False], ids=["limits", "no-limits"])
def test_parts_in_any_order_give_the_same_bits(limits):
    expected = merged(slices=SLICES)
    generator = random.Random(0)
    for _ in range(6):
        order = generator.sample(range(len(SLICES)), len(SLICES))
        same_bits(merged(slices=SLICES, order=order, limits=limits), expected)


def test_slices_change_nothing_but_the_last_bits_of_float_sums():
    one, many = merged(), merged(slices=SLICES)
    for name in ("top", "sample"):
        for key, value in vars(getattr(one, name)).items():
            np.testing.assert_array_equal(value, getattr(getattr(many, name), key))
    np.testing.assert_array_equal(one.totals.histogram, many.totals.histogram)
    np.testing.assert_allclose(one.totals.total, many.totals.total, rtol=1e-14)


def test_groups_of_latents_are_all_at_once(monkeypatch):
    monkeypatch.setattr("sae_core.analysis.features._LEAST_PENDING", 4)  # the best are picked all the time
    whole = merged(slices=SLICES)
    for latents in (range(0, 4), range(4, 7), range(7, LATENTS)):
        group = merged(slices=SLICES, latents=latents)
        for name in ("top", "sample"):
            own = getattr(whole, name)
            own = own.take((own.latent >= latents.start) & (own.latent < latents.stop))
            for key, value in vars(getattr(group, name)).items():
                np.testing.assert_array_equal(value + (latents.start if key == "latent" else 0), getattr(own, key))
        np.testing.assert_array_equal(group.totals.total, whole.totals.total[latents.start : latents.stop])


def test_groups_keep_within_the_budget_and_cover_every_latent():
    each = SETTINGS.bytes_per_latent
    assert latent_groups(10, SETTINGS, 10 * each) == [range(10)]
    assert latent_groups(10, SETTINGS, 4 * each) == [range(0, 4), range(4, 8), range(8, 10)]
    assert latent_groups(3, SETTINGS, 1) == [range(0, 1), range(1, 2), range(2, 3)]


def test_what_is_held_at_most_is_what_was_announced():
    """Every latent fires everywhere: the fullest state there is, and the most candidates."""
    settings, generator, latents = FeatureSettings(top=8, quantiles=4, per_quantile=4), torch.Generator(), 1500
    found = MergedFeatures(latents, settings)
    tracemalloc.start()
    try:
        for number in range(6):
            one = FeaturePass(latents, 20, settings, limits=found.limits)
            for row in range(0, 16, 8):
                f = torch.rand(8, 20, latents, generator=generator.manual_seed(100 * number + row))
                one.add(f, 16 * number + row, 160)
            found.add(number, one.part())
        held, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(found.top) == 8 * latents and len(found.sample) == 32 * latents
    announced, candidates = latents * settings.bytes_per_latent, 4 << 20  # of a batch, whatever the latents
    assert 0.2 * announced < held < most < announced + candidates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_device_finds_what_a_cpu_finds():
    here, there = merged(), merged(F.to("cuda"))
    for name in ("top", "sample"):
        for key, value in vars(getattr(here, name)).items():
            np.testing.assert_array_equal(value, getattr(getattr(there, name), key))
    np.testing.assert_array_equal(here.totals.histogram, there.totals.histogram)
    np.testing.assert_allclose(here.totals.total, there.totals.total, rtol=1e-14)


# ---- running an SAE -------------------------------------------------------------------------------------------------


def make_sae(architecture="standard", d_in=8, d_sae=16, **config) -> SAE:
    cls, cfg = ARCHITECTURES[architecture], SAEConfig(architecture=architecture, d_in=d_in, d_sae=d_sae, **config)
    generator = torch.Generator().manual_seed(1)
    return cls(cfg, {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in cls.shapes(cfg).items()})


@pytest.mark.parametrize("entries", [1 << 22, 150], ids=["rows", "tokens"])
def test_rows_go_through_the_sae_as_all_tokens_at_once(monkeypatch, entries):
    monkeypatch.setattr("sae_core.analysis.features._CPU_ENTRIES", entries)
    sae, x = make_sae("topk", k=3), torch.randn(20, CONTEXT, 8, generator=torch.Generator().manual_seed(2))
    kept = torch.rand(20, CONTEXT, generator=torch.Generator().manual_seed(3)) > 0.3
    x[~kept] *= 100  # what is excluded is not seen anywhere
    passes = [FeaturePass(10, CONTEXT, SETTINGS), FeaturePass(6, CONTEXT, SETTINGS, first_latent=10)]
    add_rows(list(zip(passes, (range(10), range(10, 16)), strict=True)), sae, x, kept, 0, x)
    f, x_hat = sae.reconstruct(x)
    f = f * kept[..., None]
    totals = passes[0].part().totals
    fired = np.concatenate([one.part().totals.fired for one in passes])
    np.testing.assert_array_equal(fired, (f > 0).sum((0, 1)))
    assert totals.n_tokens == int(kept.sum())
    error, centred = (x - x_hat)[kept].double(), x[kept].double() - x[kept].double().mean(0)
    expected = 1 - float(error.square().sum() / centred.square().sum())
    assert totals.explained_variance == pytest.approx(expected, rel=1e-6)
    assert passes[1].part().totals.explained_variance is None
    top = passes[1].part().top
    np.testing.assert_allclose(top.activation, f[top.row, top.position, top.latent + 10], rtol=1e-6)


def test_a_transcoder_is_held_against_what_it_writes():
    sae = make_sae("standard", d_in=8, d_out=5, apply_b_dec_to_input=False)
    generator = torch.Generator().manual_seed(4)
    x, target = torch.randn(6, CONTEXT, 8, generator=generator), torch.randn(6, CONTEXT, 5, generator=generator)
    one, kept = FeaturePass(16, CONTEXT, SETTINGS), torch.ones(6, CONTEXT, dtype=torch.bool)
    add_rows([(one, range(16))], sae, x, kept, 0, target)
    error = (sae(x) - target).double().square().sum()
    centred = (target - target.mean((0, 1))).double().square().sum()
    assert one.totals.explained_variance == pytest.approx(1 - float(error / centred), rel=1e-5)


# ---- what latents write ---------------------------------------------------------------------------------------------


class _Norm(nn.Module):
    def __init__(self, kind: str, d_model: int):
        super().__init__()
        self.kind, self.gain = kind, torch.linspace(0.5, 2, d_model)

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.gain + 0.3


class _Model(nn.Module):
    """What of a model the logits need."""

    def __init__(self, kind: str, d_model: int = 6, vocabulary: int = 30):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.cfg = type("cfg", (), {"d_model": d_model})
        self.ln_final = _Norm(kind, d_model)
        self.unembed = nn.Module()
        self.unembed.W_U = nn.Parameter(torch.randn(d_model, vocabulary, generator=generator) + 1)
        self.blocks = nn.ModuleList([nn.Module()])
        self.blocks[0].attn, self.blocks[0].mlp = nn.Module(), nn.Module()
        self.blocks[0].attn.W_O = nn.Parameter(torch.randn(2, 4, d_model, generator=generator))
        self.blocks[0].mlp.W_out = nn.Parameter(torch.randn(9, d_model, generator=generator))


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("d_model", [6, 7])
def test_the_final_norm_is_known_by_what_it_does(kind, d_model):
    gain, bias, centred = read_norm(_Norm(kind, d_model), torch.empty(d_model))
    torch.testing.assert_close(gain, torch.linspace(0.5, 2, d_model), rtol=1e-4, atol=1e-4)
    assert bias.shape == (d_model,) and centred == (kind == "layer")


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_logits_are_what_a_small_step_along_the_row_does(kind):
    """Against the model itself: the change of its logits, where the norm's scale is held."""
    model, rows = _Model(kind), torch.randn(5, 6, generator=torch.Generator().manual_seed(6))
    found = latent_logits(model, "blocks.0.hook_resid_post", rows, 4)
    centred = rows - rows.mean(1, keepdim=True) if kind == "layer" else rows
    logits = (centred * torch.linspace(0.5, 2, 6)) @ model.unembed.W_U.detach()
    logits = logits - logits.mean(1, keepdim=True)
    for sign, tokens, values in ((1, found.top_tokens, found.top_logits), (-1, found.bottom_tokens,
                                                                           found.bottom_logits)):  # fmt: skip
        order = (sign * logits).argsort(1, descending=True)[:, :4]
        np.testing.assert_array_equal(tokens, order)
        np.testing.assert_allclose(values, logits.gather(1, order), rtol=1e-3, atol=1e-3)


def test_heads_and_neurons_write_through_their_weights_and_norms_inputs_nowhere():
    model, generator = _Model("layer"), torch.Generator().manual_seed(7)
    z, neurons = torch.randn(3, 8, generator=generator), torch.randn(3, 9, generator=generator)
    attn, mlp = model.blocks[0].attn, model.blocks[0].mlp
    torch.testing.assert_close(to_residual(model, "blocks.0.attn.hook_z", z), z @ attn.W_O.reshape(8, 6))
    torch.testing.assert_close(to_residual(model, "blocks.0.mlp.hook_post", neurons), neurons @ mlp.W_out)
    assert to_residual(model, "blocks.0.ln2.hook_normalized", z) is None
    assert latent_logits(model, "blocks.0.mlp.hook_in", neurons, 4) is None


def test_neighbours_are_the_rows_of_the_greatest_cosine(monkeypatch):
    W = torch.randn(30, 6, generator=torch.Generator().manual_seed(8))
    W[7] = 2 * W[3]
    W[9] = 0
    expected = torch.nn.functional.cosine_similarity(W[:, None], W[None], dim=-1)
    expected.fill_diagonal_(-2)
    monkeypatch.setattr("sae_core.analysis.features._CPU_ENTRIES", 100)  # 3 rows at a time
    latents, cosines = decoder_neighbours(W, 4)
    values, order = expected.sort(1, descending=True)
    np.testing.assert_allclose(cosines, values[:, :4], atol=1e-6)
    keep = [row for row in range(30) if row != 9]  # which is equally far from all
    np.testing.assert_array_equal(latents[keep], order[keep, :4])
    assert latents[3, 0] == 7 and cosines[3, 0] == pytest.approx(1)
    part = decoder_neighbours(W, 4, range(10, 20))
    np.testing.assert_array_equal(part[0], latents[10:20])
    assert decoder_neighbours(W[:3], 8)[0].shape == (3, 2)


# ---- the folder -----------------------------------------------------------------------------------------------------


ABOUT_IT = {"sae": {}, "data": {}, "settings": asdict(SETTINGS), "bins": [float(edge) for edge in BINS], "figures": {}}


def write(folder, found, groups=None, settings=SETTINGS):
    W = torch.randn(LATENTS, 6, generator=torch.Generator().manual_seed(9))
    with FeatureWriter(folder) as writer:
        for latents, one in groups or [(range(LATENTS), found)]:
            logits = latent_logits(_Model("layer"), "blocks.0.hook_resid_post", W[latents.start : latents.stop], 4)
            table = latents_table(one, latents, logits, decoder_neighbours(W, settings.neighbours, latents))
            writer.add(table, example_tables(one, latents, lambda rows: TOKENS[rows]))
        return writer.close(ABOUT_IT, lambda tokens: [f"<{token}>\x00é" for token in tokens])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("features") / "made", merged())


def test_a_folder_comes_back_as_it_was_written(folder):
    features, found = read_features(folder), merged()
    assert features.about == {"format": 1, **ABOUT_IT} and is_features(folder)
    latents = features.latents.to_pylist()
    assert [row["latent"] for row in latents] == list(range(LATENTS))
    assert [row["fired"] for row in latents] == found.totals.fired.tolist()
    for row in latents:
        own = F[:, :, row["latent"]]
        assert row["firing_rate"] == row["fired"] / (ROWS * (CONTEXT - 1))
        assert row["max_activation"] == float(own.max()) and sum(row["histogram"]) == row["fired"]
        mean = float(own[own > 0].mean()) if row["fired"] else None
        assert row["mean_activation"] == (None if mean is None else pytest.approx(mean, rel=1e-6))
        assert len(row["top_tokens"]) == len(row["bottom_logits"]) == 4 and len(row["neighbours"]) == 3
    named = {token for column in ("top_tokens", "bottom_tokens") for row in latents for token in row[column]}
    named |= {token for row in features.examples["tokens"].to_pylist() for token in row}
    assert set(features.texts) == named and features.texts[min(named)] == f"<{min(named)}>\x00é"
    assert sorted(path.name for path in folder.iterdir()) == sorted((ABOUT, "latents.parquet", EXAMPLES, VOCABULARY))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # nothing is left beside it


def test_examples_show_places_with_their_tokens_and_activations(folder):
    features = read_features(folder)
    examples = features.examples.to_pylist()
    keys = [(row["latent"], row["group"], row["rank"]) for row in examples]
    assert keys == sorted(keys)
    for row in examples:
        start = max(0, row["position"] - SETTINGS.before)
        stop = min(CONTEXT, row["position"] + SETTINGS.after + 1)
        assert row["tokens"] == TOKENS[row["row"], start:stop].tolist()
        assert row["activations"] == F[row["row"], start:stop, row["latent"]].tolist()
        assert row["activations"][row["peak"]] == row["activation"] == float(F[row["row"], row["position"],
                                                                               row["latent"]])  # fmt: skip
    assert features.examples_of(5).to_pylist() == [row for row in examples if row["latent"] == 5]
    assert features.examples_of(3).num_rows == 0  # it is dead
    assert [row["group"] for row in features.examples_of(4).to_pylist()] == ["q1", "top"]  # it fired once


def test_quantiles_are_cut_by_activation_from_the_sample(folder):
    features, sample = read_features(folder), merged().sample
    for latent in (0, 1, 2, 6):
        strength = np.sort(of_latent(sample, latent).activation)
        groups = np.array_split(strength, 3)
        rows = [row for row in features.examples_of(latent).to_pylist() if row["group"] != "top"]
        for index, values in enumerate(groups):
            own = [row for row in rows if row["group"] == f"q{index + 1}"]
            assert len(own) == 2 and [row["rank"] for row in own] == [0, 1]
            assert all(values[0] <= row["activation"] <= values[-1] for row in own)
            assert own[0]["activation"] >= own[1]["activation"]
        assert len({row["row"] for row in rows}) == len(rows)  # of different rows, where there are enough


def test_a_folder_written_in_groups_is_the_same(folder, tmp_path):
    groups = [(latents, merged(latents=latents)) for latents in (range(0, 4), range(4, LATENTS))]
    other = read_features(write(tmp_path / "groups", None, groups))
    there = read_features(folder)
    for name in ("latents", "examples", "vocabulary"):
        assert getattr(there, name).equals(getattr(other, name)), name


def test_nothing_but_counts_is_a_folder_too(tmp_path):
    settings = FeatureSettings(top=0, quantiles=0, per_quantile=0, logits=0, neighbours=0)
    found = merged(settings=settings)
    with FeatureWriter(tmp_path / "counts") as writer:
        latents = range(LATENTS)
        table = latents_table(found, latents, None, decoder_neighbours(torch.eye(LATENTS), 0))
        writer.add(table, example_tables(found, latents, lambda rows: TOKENS[rows]))
        writer.close(ABOUT_IT, lambda tokens: [])
    features = read_features(tmp_path / "counts")
    assert features.examples.num_rows == features.vocabulary.num_rows == 0
    assert features.latents["fired"].to_pylist() == found.totals.fired.tolist()
    assert features.latents["max_activation"].to_pylist() == F.amax((0, 1)).tolist()


def test_a_folder_that_is_written_again_is_replaced_and_an_interrupted_one_leaves_nothing(tmp_path):
    write(tmp_path / "made", merged())
    before = read_features(tmp_path / "made").examples
    with pytest.raises(KeyboardInterrupt), FeatureWriter(tmp_path / "made"):
        raise KeyboardInterrupt
    assert read_features(tmp_path / "made").examples.equals(before)
    write(tmp_path / "made", merged(F[:20], ((0, 20),)))
    assert not read_features(tmp_path / "made").examples.equals(before)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_what_is_no_folder_of_features_is_refused_by_name(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        read_features(tmp_path / "none")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    read_features(copy)
    (copy / VOCABULARY).rename(copy / "away")
    with pytest.raises(CheckpointError, match=f"lacks {VOCABULARY}"):
        read_features(copy)
    (copy / "away").rename(copy / VOCABULARY)
    (copy / ABOUT).write_text(json.dumps({"format": 2, **ABOUT_IT}))
    with pytest.raises(CheckpointError, match="format 2; accepted: 1"):
        read_features(copy)
    (copy / ABOUT).write_text('{"format": 1, "sae": {}}')
    with pytest.raises(CheckpointError, match="lacks data, settings, bins, figures"):
        read_features(copy)
    (copy / ABOUT).write_bytes((folder / ABOUT).read_bytes())
    (copy / EXAMPLES).write_bytes(b"PAR1 no such thing")
    with pytest.raises(CheckpointError, match=f"{EXAMPLES} is damaged"):
        read_features(copy)
    pq.write_table(read_features(folder).vocabulary, copy / EXAMPLES)
    with pytest.raises(CheckpointError, match="accepted are the columns latent int32"):
        read_features(copy)


def test_settings_and_shapes_are_checked():
    with pytest.raises(ConfigError, match="top -1: accepted is a whole number"):
        replace(SETTINGS, top=-1)
    with pytest.raises(ConfigError, match=r"shape \[2, 3, 4\]; accepted: \[rows, 12, 10\]"):
        FeaturePass(LATENTS, CONTEXT, SETTINGS).add(torch.zeros(2, 3, 4), 0, 6)
    for wrong in (float("nan"), float("inf")):
        f = torch.zeros(2, CONTEXT, LATENTS)
        f[1, 3, 2] = wrong
        with pytest.raises(ConfigError, match="activations in rows 7 to 8 are not finite"):
            FeaturePass(LATENTS, CONTEXT, SETTINGS).add(f, 7, 24)
