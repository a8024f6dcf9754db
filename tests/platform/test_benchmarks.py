"""Every benchmark still runs and writes what `jobs/benchmarks/common.py` promises. Its figures are another matter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_core import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
FIGURE_KEYS = {"name", "value", "unit", "goal", "holds"}


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_sweep_benchmark_runs_both_sides(tmp_path):
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "jobs/benchmarks/sweep.py", "--quick", "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "These figures mean nothing" in done.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["quick"] is True
    assert written["machine"]["cores"] >= 1
    assert {"penstock", "sae-lens", "torch"} <= written["versions"].keys()
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert all(figure.keys() == FIGURE_KEYS for figure in figures.values())
    for name in ("wall, ours", "wall, opponent", "wall, ratio", "train, ours", "train, opponent"):
        assert figures[name]["value"] > 0
    for architecture in ("standard", "gated", "topk"):
        for side in ("ours", "opponent"):
            assert figures[f"{architecture}, L0, {side}"]["value"] > 0
    assert figures["topk, L0, ours"]["value"] <= 16  # both sides train what the spec says
    assert figures["topk, L0, opponent"]["value"] <= 16
    assert all(figure["holds"] is None for figure in figures.values())  # a quick run promises nothing


@pytest.mark.compat
@pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="needs the released sae_lens")
def test_the_step_benchmark_compares_every_architecture(tmp_path):
    path = tmp_path / "figures.json"
    done = subprocess.run(
        [sys.executable, "jobs/benchmarks/step.py", "--quick", "--json", str(path)],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "These figures mean nothing" in done.stdout
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["quick"] is True
    assert {"penstock", "sae-lens", "torch"} <= written["versions"].keys()
    figures = {figure["name"]: figure for figure in written["figures"]}
    assert all(figure.keys() == FIGURE_KEYS for figure in figures.values())
    sparse = ("topk", "batch_topk", "matryoshka", "standard", "jumprelu", "gated")
    sparse = tuple(name for name in sparse if name in ARCHITECTURES)
    dense = tuple(f"{name}-dense" for name in ("standard", "jumprelu", "gated") if name in ARCHITECTURES)
    timed = (*sparse, *dense, "topk-dead")
    others = ("topk against the encoder's GEMM alone", "topk, memory of a step")
    for name in (*timed, *others, *(f"{name}, rate" for name in timed)):
        assert figures[f"{name}, ours"]["value"] > 0 and figures[f"{name}, opponent"]["value"] > 0
    assert any(name.startswith("pack of ") and name.endswith(", ratio") for name in figures)
    for name in ("topk", "batch_topk", "matryoshka"):
        if name in sparse:
            assert figures[f"{name}, L0, ours"]["value"] == figures[f"{name}, L0, opponent"]["value"] == 8
    assert figures["topk-dead, dead latents, ours"]["value"] == figures["topk-dead, dead latents, opponent"]["value"]
    assert all(figure["holds"] is None for figure in figures.values())  # a quick run promises nothing


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
