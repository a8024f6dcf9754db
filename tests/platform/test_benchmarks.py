"""Every benchmark still runs and writes what `jobs/benchmarks/common.py` promises. Its figures are another matter."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIGURE_KEYS = {"name", "value", "unit", "goal", "holds"}


def quick_run(name, tmp_path, *options, versions=("penstock", "sae-lens", "torch"), **environment):
    """What `--quick` of a benchmark has written, and its figures by name; what every benchmark promises is checked."""
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, f"jobs/benchmarks/{name}.py", "--quick", "--json", str(path), *options],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "These figures mean nothing" in done.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["quick"] is True
    assert written["machine"]["cores"] >= 1
    assert set(versions) <= written["versions"].keys()
    assert written["figures"] and all(figure.keys() == FIGURE_KEYS for figure in written["figures"])
    assert all(figure["holds"] is None for figure in written["figures"])  # a quick run promises nothing
    return written, {figure["name"]: figure for figure in written["figures"]}


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_sweep_benchmark_runs_both_sides(tmp_path):
    _, figures = quick_run("sweep", tmp_path)
    for name in ("wall, ours", "wall, opponent", "wall, ratio", "train, ours", "train, opponent"):
        assert figures[name]["value"] > 0
    for architecture in ("standard", "gated", "topk"):
        for side in ("ours", "opponent"):
            assert figures[f"{architecture}, L0, {side}"]["value"] > 0
    assert figures["topk, L0, ours"]["value"] <= 16  # both sides train what the spec says
    assert figures["topk, L0, opponent"]["value"] <= 16


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_step_benchmark_compares_every_architecture(tmp_path):
    _, figures = quick_run("step", tmp_path)
    sparse = ("topk", "batch_topk", "matryoshka", "standard", "jumprelu", "gated")
    dense = ("standard-dense", "jumprelu-dense", "gated-dense")
    timed = (*sparse, *dense, "topk-dead")
    others = ("topk against the encoder's GEMM alone", "topk, memory of a step")
    encoders = tuple(f"{name}, bf16 encoder" for name in sparse)
    for name in (*timed, *encoders, *others, *(f"{name}, rate" for name in timed)):
        assert figures[f"{name}, ours"]["value"] > 0 and figures[f"{name}, opponent"]["value"] > 0
    assert figures["pack of 16, ratio"]["value"] > 0
    for name in ("topk", "batch_topk", "matryoshka"):
        assert figures[f"{name}, L0, ours"]["value"] == figures[f"{name}, L0, opponent"]["value"] == 8
    assert figures["topk-dead, dead latents, ours"]["value"] == figures["topk-dead, dead latents, opponent"]["value"]


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_target_l0_benchmark_trains_both_sides(tmp_path):
    _, figures = quick_run("target_l0", tmp_path, OMP_NUM_THREADS="1")
    for architecture, side in (("standard", "ours"), ("gated", "ours"), ("jumprelu", "ours"), ("jumprelu", "opponent")):
        name = f"blocks.1.hook_resid_post, {architecture}, target L0 8"
        l0, error = (figures[f"{name}, {figure}, {side}"]["value"] for figure in ("l0", "error of L0"))
        assert l0 > 0 and error == pytest.approx(abs(l0 / 8 - 1))


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_evaluation_benchmark_finds_equal_figures(tmp_path):
    _, figures = quick_run("evaluation", tmp_path, "--threads", "1", OMP_NUM_THREADS="1")
    assert figures["deep-70: 20 SAEs at blocks.2.hook_resid_post, ratio"]["value"] > 0
    assert figures["deep-70: multiplications below, ours"]["value"] >= 70
    assert figures["deep-70: greatest difference of a figure, ours"]["value"] <= 100  # millionths


def test_a_ratio_says_how_many_times_better_ours_is():
    spec = importlib.util.spec_from_file_location("benchmark_common", ROOT / "jobs/benchmarks/common.py")
    assert spec is not None and spec.loader is not None
    common = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = common  # dataclasses look their module up
    spec.loader.exec_module(common)

    seconds = common.Comparison("wall", "s", ours=2.0, opponent=5.0, goal=1.5)
    assert (seconds.ratio, seconds.holds) == (2.5, True)
    rate = common.Comparison("tokens", "1/s", ours=10.0, opponent=20.0, goal=1.0, lower_is_better=False)
    assert (rate.ratio, rate.holds) == (0.5, False)
    within = common.Comparison("memory", "MB", ours=2.0, opponent=5.0, goal=0.5, at_most=True)
    assert (within.ratio, within.holds) == (0.4, True)
    beyond = common.Comparison("GEMM", "s", ours=4.0, opponent=2.0, goal=1.8, at_most=True)
    assert (beyond.ratio, beyond.holds) == (2.0, False)
    context = common.Comparison("L0", "", ours=8.0, opponent=9.0, lower_is_better=None)
    assert (context.ratio, context.holds) == (None, None)
    assert [figure["name"] for figure in context.figures()] == ["L0, ours", "L0, opponent"]
    assert common.medians([{"wall": 1.0}, {"wall": 5.0}, {"wall": 2.0}]) == {"wall": 2.0}
    assert "2.50" in common.table([seconds]) and "MISSED" in common.table([rate])


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
@pytest.mark.parametrize("name", ["frontier", "ground_truth"])
def test_a_benchmark_of_quality_trains_and_evaluates_both_sides(name, tmp_path):
    picture = tmp_path / "fronts.png"
    options = ["--plot", str(picture), "--cache", str(tmp_path / "cache")] if name == "frontier" else []
    written, _ = quick_run(name, tmp_path, *options, OMP_NUM_THREADS="1")
    sides = written["fronts" if name == "frontier" else "points"]
    for side in ("ours", "theirs"):
        points = [point for one in sides if one["side"] == side and one["architecture"] == "topk"
                  for point in one["points"]]  # fmt: skip
        assert len(points) >= 2
        assert all(0 < point["l0"] <= point["k"] for point in points)  # both sides train what was asked for
    if name == "frontier":
        assert picture.read_bytes()[:4] == b"\x89PNG"
        assert len(list((tmp_path / "cache/saes").glob("*/cfg.json"))) == 9  # 4 a side and a baseline


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="comes with sae_lens")
def test_the_mixing_benchmark_compares_block_sizes_with_a_full_shuffle(tmp_path):
    written, figures = quick_run("mixing", tmp_path, versions=("penstock", "torch"), OMP_NUM_THREADS="1")
    error = {(one["sae"], one["block_tokens"], one["seed"]): one["figures"]["mse"] for one in written["points"]}
    assert error.keys() == set(product(("topk", "standard"), (640, 4096, None), (0, 1)))
    for sae in ("topk", "standard"):
        ratios = [error[sae, 640, seed] / error[sae, None, seed] for seed in (0, 1)]  # of one seed, so paired
        assert figures[f"{sae}, block 640, mse_ratio"]["value"] == pytest.approx(sum(ratios) / 2)
    # A batch of five rows is far from independent tokens, one of the full shuffle is not.
    assert figures["block 640, design effect"]["value"] > 4
    assert figures["block all, design effect"]["value"] == pytest.approx(1, abs=0.3)
    assert figures["block 4,096, memory at d_in 128"]["value"] == pytest.approx(4096 * 128 * 4 / 1e6)


def test_the_stream_benchmark_hands_blocks_out_on_a_ray_of_its_own(tmp_path):
    _, figures = quick_run("stream", tmp_path, versions=("penstock", "ray", "torch"), OMP_NUM_THREADS="1")
    for name in ("harvest against the bare forward pass", "rate to one consumer against bare Ray, blocks of 1.0 MB",
                 "spool, read with checksums against plain, blocks of 1.0 MB"):  # fmt: skip
        assert figures[f"{name}, ours"]["value"] > 0 and figures[f"{name}, opponent"]["value"] > 0
    # What no other load on the machine can change.
    assert figures["written to the store for 2 consumers against activations, ratio"]["value"] < 1.05
    twice = figures["batches trained on twice after a kill against those since the checkpoint, ours"]["value"]
    assert twice == 3  # saved after 12 of 24 steps, killed after 15
    assert figures["memory of the state against its limit, ratio"]["value"] < 1


def test_a_verdict_needs_a_difference_beyond_the_noise(monkeypatch):
    pytest.importorskip("scipy", reason="comes with sae_lens")
    monkeypatch.syspath_prepend(ROOT / "jobs/benchmarks")
    import fronts

    assert fronts.interpolate([(4, 0.5), (16, 0.9)], 8) == pytest.approx(0.7)  # half way in log L0
    assert fronts.interpolate([(4, 0.5), (16, 0.9)], 17) == pytest.approx(0.9 + 0.4 * math.log(17 / 16) / math.log(4))
    assert fronts.interpolate([(4, 0.5), (16, 0.9)], 20) is None  # more than a tenth beyond
    assert fronts.interpolate([(4, 0.5), (20, 0.9)], 8) is None  # neighbours too far apart
    mean, half = fronts.mean_interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3), rel=1e-3))  # t of 2 degrees of freedom
    mean, half = fronts.difference_interval([1.0, 2.0, 3.0], [0.0, 1.0, 2.0])
    assert (mean, half) == (1.0, pytest.approx(2.776 * math.sqrt(2 / 3), rel=1e-3))  # Welch: 4 degrees of freedom
    assert fronts.verdict((2, 0), (1, 0), (1.0, 2.3)) == "within noise"
    assert fronts.verdict((2, 0), (1, 0), (1.0, 0.9)) == "above"
    assert not fronts.holds(fronts.verdict((1, 0), (2, 0), (-1.0, 0.9)))
    assert not fronts.holds(fronts.verdict(None, (2, 0), None))


def test_the_search_benchmark_prunes_fills_and_compares_hypervolumes(tmp_path):
    _, figures = quick_run("search", tmp_path, versions=("penstock", "torch"))
    volume = "hypervolume, blocks.1.hook_resid_post"
    assert 0 < figures[f"{volume}, ours"]["value"] < 1 and 0 < figures[f"{volume}, opponent"]["value"] < 1
    assert figures["the grid, pruned: stopped wrongly, of those stopped, opponent"]["value"] >= 1
    assert figures["the grid, pruned: SAE-tokens, ratio"]["value"] < 1
    # Seven in the grid; two of every third and the one that learns nothing, and three at most that are added.
    assert figures["SAEs trained to the end, opponent"]["value"] == 7
    assert 3 < figures["SAEs trained to the end, ours"]["value"] <= 6
    assert figures["SAE-tokens, ours"]["value"] < (1 + figures["SAEs trained to the end, ours"]["value"]) * 0.004096


def test_the_features_benchmark_compares_with_harvesting_alone(tmp_path):
    _, figures = quick_run("features", tmp_path, versions=("penstock", "torch"), OMP_NUM_THREADS="1")
    for name in ("the features pass against harvesting", "with the reconstruction's error"):
        assert figures[f"{name}, ours"]["value"] > 0 and figures[f"{name}, opponent"]["value"] > 0
    assert figures["kept of each latent, ratio"]["value"] <= 1
    assert 0 < figures["L0 of the SAE, ours"]["value"] < 256


def test_the_attribution_benchmark_compares_estimates_with_ablations(tmp_path):
    written, figures = quick_run(
        "attribution", tmp_path, versions=("penstock", "torch", "transformer-lens"), OMP_NUM_THREADS="1"
    )
    for hook_point, prompts, norm in product(
        ("blocks.1.hook_resid_post", "blocks.4.hook_resid_post"), ("short", "long"), ("free", "frozen")
    ):
        by_method = {method: figures[f"{hook_point}, {prompts}, norm {norm}, {method}, recall"]["value"]
                     for method in ("gradient", "integrated_gradients", "direct")}  # fmt: skip
        # 50 of some 180 nodes: by chance 0.28. Of SAEs that have learnt little no method misses much.
        assert by_method["integrated_gradients"] > 0.6 and by_method["gradient"] > 0.5, by_method
        assert figures[f"{hook_point}, {prompts}, ablation, CPU seconds"]["value"] > 0
    layers = "blocks.1.hook_resid_post to blocks.4.hook_resid_post"
    assert figures[f"edges, {layers}, short, norm free, all edges, recall"]["value"] > 0.4
    # 11 errors a prompt, as the first token has no nodes; at most 16 features at each of the other positions
    assert all(11 < point["n_nodes"] <= 11 * 17 for point in written["points"] if " to " not in point["sae"])


def test_the_scale_benchmark_runs_on_emulated_nodes_and_simulates_more(tmp_path):
    written, figures = quick_run(
        "scale", tmp_path, "--only", "measured,simulated", versions=("penstock", "ray"), OMP_NUM_THREADS="1"
    )
    for regime, unit in (("harvest-bound", "tokens/s"), ("training-bound", "SAE-tokens/s")):
        alone, both = (figures[f"{regime}, trained on {n} node(s), ours"] for n in (1, 2))
        assert alone["value"] > 0 and both["value"] > 0 and both["unit"] == unit
    assert written["constants"]["call_ms"] > 0
    # What no other load on the machine can change: by the store's own counter each block is written once and copied to
    # the other node, and simulated time is the stream's alone.
    per_node = {one["nodes"]: one["written_mb_a_block"] for one in written["measured"]
                if one["regime"] == "training-bound"}  # fmt: skip
    assert per_node[2] == pytest.approx(2 * per_node[1], rel=0.2)
    assert all(row["efficiency"] > 0.9 for row in written["simulated"] if row["nodes"] == 1)


def test_simulated_packs_are_held_up_by_what_the_setting_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "jobs/benchmarks")
    from scale_simulation import CALLS, NETWORK, WINDOW, Setting, bottlenecks, simulate

    # Four hosts make a block each 4 s, one a second, which packs take in half of that.
    setting = Setting(nodes=4, harvest_seconds=4.0, step_seconds=0.5, block_bytes=1e9, window=8, nic_bytes=1e12,
                      call_seconds=1e-4)  # fmt: skip
    found = simulate(setting, 8, 16)
    assert found.rate == pytest.approx(1.0, rel=0.05)
    assert found.actor_busy < 0.1 and found.leases_lost == 0
    # Each block goes to three other nodes: 6 s of its host's network, and a pack has one block on its way at a time.
    slow = bottlenecks(replace(setting, nic_bytes=5e8), 8, 16, enough=0.95)
    assert slow[0][1].rate < 0.5 and [limit for limit, _ in slow[1:]] == [NETWORK]
    # A hand-out takes two calls, each of which keeps the actor for 0.4 s: four packs wait 3.2 s for a block.
    busy = bottlenecks(replace(setting, call_seconds=0.4), 8, 16, enough=0.95)
    assert busy[0][1].rate < 0.4 and busy[1][0] == CALLS
    # Beyond the slowest pack stand two blocks, so that two of the hosts have nothing to do.
    narrow = bottlenecks(replace(setting, window=2), 8, 16, enough=0.95)
    assert narrow[0][1].rate < 0.6 and [limit for limit, _ in narrow[1:]] == [WINDOW]
