"""Pruning and filling on a running cluster, and a driver that is killed between the two rounds."""

import json
import math
import subprocess
import sys

import pytest

import penstock as platform_api
from ray_head import cost, penstock, wait_for

pytestmark = pytest.mark.ray

SPEC = """\
name: searched
model: {name: demo}
data: {dataset: demo, context_size: 64, search_tokens: 4k, report_tokens: 2k, block_tokens: 16k}
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 192k, batch_tokens: 256, lr: 4.0e-3, checkpoints: 1}
saes:
  - {architecture: topk, d_sae: 4x, k: [4, 24]}
  - {architecture: topk, d_sae: 4x, k: 25, lr: 1.0e-6}  # the same, and it learns nothing
  - {architecture: standard, d_sae: 4x, l1_coefficient: 500}  # explains nothing, and is dead soon
baselines: {k: [8]}
select: {l0_band: 4:32}
search: {prune: true, fill: 2}
resources: {model_hosts: 1, cpus_per_host: 0.5, cpus_per_pack: 0.75}
"""
STEPS = 750


def test_a_sweep_killed_between_its_rounds_goes_on_with_the_same_decisions(head, tmp_path):
    home, spec, log = tmp_path / "home", tmp_path / "searched.yaml", tmp_path / "log"
    spec.write_text(SPEC)
    command = [sys.executable, "-m", "penstock.cli", "run", str(spec), "--address", head.address, "--home", str(home)]
    with log.open("w") as output:
        driver = subprocess.Popen(command, stdout=output, stderr=output, cwd=tmp_path)
        try:
            wait_for(lambda: list(home.glob("sweeps/*/filled.json")), driver, log)
        finally:
            driver.kill()
            driver.wait()
    first_round = {path: path.read_bytes() for path in home.glob("sweeps/*/pruned/*.json")}
    [filled] = home.glob("sweeps/*/filled.json")
    proposals = json.loads(filled.read_text())["proposals"]
    evaluated = [json.loads(path.read_text())["protocol"]["split"] for path in home.glob("saes/*/evaluation-*.json")]
    assert evaluated and set(evaluated) == {"search"}  # decisions know nothing of the report split
    written = filled.stat().st_mtime_ns

    done = penstock("run", spec, "--address", head.address, home=home)
    assert done.returncode == 0, log.read_text() + done.stdout + done.stderr
    assert filled.stat().st_mtime_ns == written
    assert first_round.items() <= {path: path.read_bytes() for path in home.glob("sweeps/*/pruned/*.json")}.items()

    rows = platform_api.front("searched", home=home).to_dict("records")
    added = [row for row in rows if row["proposed"] == 1]
    assert len(rows) == 4 + len(proposals)
    assert [proposal["settings"]["architecture"] for proposal in proposals] == ["topk", "topk"]
    ks = sorted(proposal["settings"]["k"] for proposal in proposals)
    assert 4 < ks[0] < ks[1] <= 32 and 24 not in ks
    assert len(added) == len(proposals) and {row["status"] for row in added} <= {"finished", "pruned"}
    pruned = {row["sae_id"]: row for row in rows if row["status"] == "pruned"}
    reasons = sorted(json.loads(path.read_text())["reason"] for path in home.glob("sweeps/*/pruned/????????????.json"))
    assert any(reason.startswith(("dead: L0 0", "it explains nothing")) for reason in reasons)
    assert any("beats it at equal tokens" in reason for reason in reasons)
    for path in home.glob("sweeps/*/pruned/*-run.json"):
        run = json.loads(path.read_text())
        sae_id = path.name.removesuffix("-run.json")
        assert sae_id in pruned and math.isnan(pruned[sae_id]["l0"]) and not pruned[sae_id]["on_front"]
        assert 0 < run["step"] < STEPS and run["history"][-1]["tokens"] <= run["step"] * 256
    # The second driver trained what was added, and nothing else.
    assert cost(home)["sae_tokens"] <= len(proposals) * STEPS * 256
