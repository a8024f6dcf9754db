import json
import math

import pandas as pd
import pytest
import torch

from penstock.compare import (
    Dictionary,
    compare,
    compare_dictionaries,
    format_comparison,
    read_dictionary,
    seed_stability,
    write_latents,
)
from penstock.errors import CheckpointError, SweepError
from penstock.sites import Site
from penstock.storage import Storage
from sae_core import SAEConfig, TopKSAE
from sae_core.architectures import TopKSettings
from sae_core.matching import directions

D, WIDTH = 64, 200


def weights(n=WIDTH, d=D, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def save(folder, W_dec, sparsity=None, hook_point="blocks.1.hook_resid_post"):
    n, d = W_dec.shape
    cfg = SAEConfig(
        architecture="topk", d_in=d, d_sae=n, k=2, rescale_acts_by_decoder_norm=True, metadata={"hook_name": hook_point}
    )
    tensors = {name: torch.zeros(shape) for name, shape in TopKSAE.shapes(cfg).items()}
    TopKSAE(cfg, {**tensors, "W_dec": W_dec}).save(folder, sparsity=sparsity)
    return str(folder)


def test_a_permuted_copy_a_random_one_and_one_with_half_of_the_features(tmp_path):
    a = weights()
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    folders = [
        save(tmp_path / "a", a), save(tmp_path / "permuted", 3 * a[order]),
        save(tmp_path / "half", torch.cat([a[: WIDTH // 2], weights(WIDTH // 2, seed=2)])),
        save(tmp_path / "random", weights(seed=3)),
    ]  # fmt: skip
    found = compare(folders)
    assert found.shares()[0] == [1, 1, 0.5, 0]
    of_permuted, of_half, of_random = found.pairs[:3]
    assert (of_permuted.shared, of_half.shared, of_random.shared) == (200, 100, 0)
    assert of_permuted.mean_max_cosine_a == pytest.approx(1) and of_permuted.hungarian_cosine == pytest.approx(1)
    assert of_half.hungarian_shared == 0.5
    assert of_random.mean_max_cosine_a == pytest.approx(math.sqrt(2 * math.log(WIDTH) / D), rel=0.2)  # by chance
    of_a = found.latents[found.latents["sae"] == folders[0]]
    assert list(of_a["found_in"]) == [2] * 100 + [1] * 100 and set(of_a["of"]) == {3}
    assert found.stability(found.dictionaries[0]) == pytest.approx(0.5)


def test_a_folder_goes_by_the_architecture_that_it_was_trained_as(tmp_path):
    folder = save(tmp_path / "a", weights())
    assert read_dictionary(tmp_path / "a", "a").architecture == "topk"
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    cfg["metadata"]["sae_settings"] = {"architecture": "batch_topk"}
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
    assert read_dictionary(tmp_path / "a", folder).architecture == "batch_topk"


def test_widths_may_differ(tmp_path):
    a = weights()
    found = compare([save(tmp_path / "narrow", a[:50]), save(tmp_path / "wide", a)])
    assert found.shares() == [[1, 1], [0.25, 1]]
    assert found.pairs[0].hungarian_shared == 1  # of the narrower one


def test_dead_latents_are_no_features(tmp_path):
    a = weights()
    sparsity = torch.full((WIDTH,), -2.0)
    sparsity[::2] = -10.0
    found = compare([save(tmp_path / "a", a), save(tmp_path / "b", a, sparsity)])
    assert found.shares() == [[1, 0.5], [1, 1]]
    assert list(found.latents["latent"][WIDTH:]) == list(range(1, WIDTH, 2))
    dead = save(tmp_path / "dead", a, torch.full((WIDTH,), -10.0))
    with pytest.raises(CheckpointError, match="none of its 200 latents has ever fired"):
        compare([str(tmp_path / "a"), dead])


def test_the_threshold_decides_what_is_shared(tmp_path):
    a = directions(weights())
    near = directions(a + 0.1 * weights(seed=1) / math.sqrt(D) * 8)  # cosines of about 0.78
    folders = [save(tmp_path / "a", a), save(tmp_path / "near", near)]
    assert compare(folders).shares()[0][1] > 0.9
    assert compare(folders, threshold=0.95).shares()[0][1] == 0


def test_saes_of_other_spaces_too_few_or_twice_the_same_are_refused(tmp_path):
    a, b = save(tmp_path / "a", weights()), save(tmp_path / "b", weights(d=32))
    with pytest.raises(SweepError, match="/a has d_in 64 and .*/b 32: features can only be compared in one space"):
        compare([a, b])
    with pytest.raises(SweepError, match="1 SAE to compare; accepted: two or more"):
        compare([a])
    with pytest.raises(SweepError, match="is named twice"):
        compare([a, a])
    with pytest.raises(SweepError, match="threshold 2: accepted is a cosine"):
        compare([a, b], threshold=2)
    with pytest.raises(CheckpointError, match="cfg.json"):
        (tmp_path / "empty").mkdir()
        compare([a, str(tmp_path / "empty")])


def test_the_text_has_the_saes_a_matrix_and_a_line_a_pair(tmp_path, monkeypatch):
    a = weights()
    folders = [save(tmp_path / "a", a), save(tmp_path / "b", a[:100], hook_point="blocks.2.hook_resid_post")]
    text = format_comparison(compare(folders))
    first, second = text.splitlines()[2:4]
    assert first.split()[1:] == [folders[0], "topk", "200", "200", "0.500", "-", "0.500"]
    assert second.split()[1:] == [folders[1], "topk", "100", "100", "1.000", "1.000", "-"]
    pair = next(line for line in text.splitlines() if line.startswith("1 - 2"))
    assert pair.split()[3:6] == ["100", "0.500", "1.000"]
    assert "several hook points (blocks.1.hook_resid_post, blocks.2.hook_resid_post)" in text
    monkeypatch.setattr("sae_core.matching.HUNGARIAN_LATENTS", 150)
    found = compare(folders)
    assert found.pairs[0].hungarian_shared is None
    assert "The Hungarian method is left out above 150 live latents" in format_comparison(found)


def test_of_many_saes_the_text_has_the_matrix_alone():
    many = [Dictionary(str(n), "topk", "a", 8, torch.arange(8), directions(weights(8, seed=n))) for n in range(9)]
    text = format_comparison(compare_dictionaries(many, 0.7))
    assert "in 9" in text and "The 36 pairs" in text and "8 - 9" not in text
    assert "7 - 8" in format_comparison(compare_dictionaries(many[:8], 0.7))


def test_each_latents_stability_is_written(tmp_path):
    names = ["a", "b"]
    parts = [Dictionary(name, "topk", "", 5, torch.arange(5), directions(weights(5, 8, seed))) for name, seed in
             zip(names, (0, 0), strict=True)]  # fmt: skip
    found = compare_dictionaries(parts, 0.7)
    write_latents(found, tmp_path / "latents.parquet")
    table = pd.read_parquet(tmp_path / "latents.parquet")
    assert list(table.columns) == ["sae", "latent", "found_in", "of", "mean_cosine"]
    assert list(table["sae"]) == ["a"] * 5 + ["b"] * 5 and set(table["found_in"]) == {1}
    with pytest.raises(SweepError, match="cannot write"):
        write_latents(found, tmp_path / "no" / "latents.parquet")


# ---- a sweep's seeds ----


def planned(sae_id, seed, k=2, site="blocks.1.hook_resid_post"):
    from penstock.plan import PlannedSAE

    settings = TopKSettings(d_sae=WIDTH, k=k, seed=seed)
    return PlannedSAE(sae_id, Site(site, site), D, D, settings)


def stored(storage, folder, sae_id, W_dec, sparsity=None):
    save(folder / sae_id, W_dec, sparsity)
    files = {path.name: path.read_bytes() for path in (folder / sae_id).iterdir()}
    storage.commit_folder(f"saes/{sae_id}/final", files)


def test_seed_stability_is_the_share_found_again_in_the_siblings(tmp_path):
    storage, a = Storage(str(tmp_path / "storage")), weights()
    half = torch.cat([a[: WIDTH // 2], weights(WIDTH // 2, seed=2)])
    for sae_id, W_dec in {"s0": a, "s1": half, "s2": weights(seed=3), "other": a, "elsewhere": a}.items():
        stored(storage, tmp_path / "folders", sae_id, W_dec)
    stored(storage, tmp_path / "folders", "dead", a, torch.full((WIDTH,), -10.0))
    saes = [planned("s0", 0), planned("s1", 1), planned("s2", 2), planned("other", 0, k=3),
            planned("elsewhere", 3, site="blocks.2.hook_resid_post"), planned("dead", 4)]  # fmt: skip
    found = seed_stability(storage, saes)
    assert found == {"s0": pytest.approx(0.25), "s1": pytest.approx(0.25), "s2": 0}
    assert seed_stability(storage, saes[3:]) == {}


# ---- by name ----


def test_saes_are_named_as_folders_and_by_sweep_and_id(finished_home, tmp_path, monkeypatch):
    from penstock.pull import pull

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = str(pull("demo", sae="early-8", to=tmp_path / "pulled", home=finished_home))
    found = compare([folder, "demo:early-4", "0123456789ab:early-9"], home=finished_home)
    assert [one.name for one in found.dictionaries] == [folder, "demo:early-4", "0123456789ab:early-9"]
    assert found.shares() == [[1] * 3] * 3  # they are all made from one seed
    assert found.dictionaries[0].hook_point == "blocks.1.hook_resid_post"
    for name, message in (
        ("demo:late-16", "SAE late-16 is diverged: only finished ones"), ("demo:x", "no SAE 'x'"),
        (":early-4", "there is no such folder"), ("nosuch:early-4", "no sweep 'nosuch'"),
    ):  # fmt: skip
        with pytest.raises(SweepError, match=message):
            compare([folder, name], home=finished_home)
