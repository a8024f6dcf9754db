"""Training without a spec file, on the cluster: SAELens' script, and `penstock.train`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ray_head import ROOT
from sae_core import SAE

pytestmark = pytest.mark.ray
SCRIPT = ROOT / "jobs" / "examples" / "5_train_like_saelens.py"
TWICE = """\
import runpy, sys
from penstock.compat import SAETrainingRunner

sys.argv[1:] = ["70_000"]
runner = SAETrainingRunner(runpy.run_path(SCRIPT)["cfg"])
print("once more")
runner.run()
print(f"L0 again: {runner.metrics['l0']:.1f}")
"""
TRAIN = """\
import json
import penstock
from penstock.errors import SweepError

settings = dict(
    hook_point="blocks.1.hook_resid_post", tokens="16k", batch_tokens=256, context_size=64, block_tokens=4096,
    search_tokens="1k", report_tokens="2k", cpus_per_host=0.5, cpus_per_pack=0.75, checkpoints=1, keep=1,
)
good = {"architecture": "topk", "d_sae": "2x", "k": [4, 16]}
bad = {"architecture": "standard", "d_sae": "2x", "l1_coefficient": 1, "lr": 1e6}
try:
    penstock.train(**settings, saes=[good, bad])
except SweepError as error:
    failed = str(error)
print("those that were trained")
trained = penstock.train(**settings, **good)
again = penstock.train(**settings, **good)
folder = trained.pull("out", sae=list(trained.saes)[0], at=7936)
print(json.dumps({
    "sweep": [trained.sweep, again.sweep], "metrics": trained.metrics, "ids": list(trained.saes),
    "k": [sae.cfg.k for sae in trained.saes.values()], "best": trained.sae.cfg.k, "failed": failed,
    "folder": str(folder),
}))
"""


def run(code: str, head, folder: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RAY_ADDRESS": head.address, "PENSTOCK_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, env=environment, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def test_the_script_of_sae_lens_users_trains_evaluates_and_saves(head, tmp_path):
    done = run(f"SCRIPT = {str(SCRIPT)!r}\n{TWICE}", head, tmp_path)
    assert "CompatibilityNotice" in done.stderr and "0.0014 * 128**1.5" in done.stderr
    once, again = done.stdout.split("once more\n")
    *_, l0, recovered, explained = (line for line in once.splitlines() if ": " in line and "/" not in line)
    assert 1 < float(l0.split(": ")[1]) < 512 and 0.2 < float(recovered.split(": ")[1]) < 1
    assert 0.2 < float(explained.split()[2].rstrip(",")) < 1
    (folder,) = (tmp_path / "checkpoints").iterdir()
    steps = 70_000 // 512
    points = [str(steps * part // 3 * 512) for part in (1, 2)]
    assert {path.name for path in folder.iterdir()} == {*points, f"final_{steps * 512}"}
    saes = [SAE.load(folder / name) for name in (*points, f"final_{steps * 512}")]
    assert all(sae.cfg.normalize_activations == "none" and sae.cfg.d_sae == 1024 for sae in saes)
    assert not torch.equal(saes[0].W_dec, saes[1].W_dec) and not torch.equal(saes[1].W_dec, saes[2].W_dec)
    assert "its first step" in once and "is done already" in again and "its first step" not in again
    assert again.splitlines()[-1] == f"L0 again: {l0.split(': ')[1]}"


def test_one_call_trains_hands_over_and_says_what_failed(head, tmp_path):
    done = run(TRAIN, head, tmp_path)
    assert "its first step" not in done.stdout.split("those that were trained\n")[1]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["sweep"][0] == found["sweep"][1]
    assert sorted(found["k"]) == [4, 16] and found["best"] == 16
    assert found["metrics"]["l0"] == pytest.approx(16, abs=0.5)
    assert found["metrics"]["ce_loss_score"] == found["metrics"]["ce_recovered"] > 0.2
    assert "1 of 3 SAE(s) were not trained to their end" in found["failed"] and "diverged" in found["failed"]
    sae = SAE.load(tmp_path / found["folder"])
    assert sae.cfg.metadata.kept_at_tokens == 7936
