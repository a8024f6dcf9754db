import math

import pandas as pd
import pytest
import torch

from penstock.errors import ModelError, SpecError
from penstock.evaluate import Asked
from penstock.evaluated import Evaluated
from penstock.home import Home
from penstock.sae_folders import evaluate_folders
from sae_core import SAEConfig, TopKSAE

PROTOCOL = {"dataset": "demo", "split": "report", "report_tokens": 30000, "context_size": 128, "bos": True,
            "ablation": "zero", "dtype": "float32", "processing": "none",
            "exclude": {"special_tokens": True, "first_positions": 1, "norm_over_median": None}}  # fmt: skip


def row(sae_id, l0, **more):
    figures = {"l0": l0, "ce_recovered": 0.9, "ce_increase": 0.61, "explained_variance": 0.8}
    ends = {f"{name}_{end}": value + sign * 0.01 for name, value in figures.items()
            for end, sign in (("low", -1), ("high", 1))}  # fmt: skip
    return {"sae_id": sae_id, "hook_point": "blocks.4.hook_resid_post", "architecture": "jumprelu", "d_sae": 1024,
            "prefix": math.nan, "target_l0": 32.0, "run_id": "r", **figures, **ends, "on_front": False,
            "dominated_by": None, **more}  # fmt: skip


def test_the_text_fits_a_terminal_and_says_which_are_the_folders():
    table = pd.DataFrame([
        row("0123456789ab", 3.0), row("a/long/folder", 7.0, run_id=None, on_front=True),
        row("ba9876543210", 8.0, dominated_by="a/long/folder"),
    ])  # fmt: skip
    baselines = pd.DataFrame([{"kind": "pca", "hook_point": "blocks.4.hook_resid_post", "l0": 5.0, "ce_recovered": 0.5,
                               "ce_increase": 3.0, "explained_variance": 0.4}])  # fmt: skip
    text = Evaluated(PROTOCOL, table, baselines, (4, 40), "grid").as_text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 125 and lines[0].startswith("protocol   ")
    assert lines[1].startswith("           ")  # the protocol goes on
    head, sparse, pca, folder, beaten = lines[lines.index("blocks.4.hook_resid_post") + 1 :][:5]
    assert head.split()[:3] == ["architecture", "d_sae", "sparsity"] and head.endswith("SAE            dominated by")
    assert sparse.endswith("0123456789ab   (L0 not in 4:40)") and pca.split()[0] == "pca"
    assert folder.startswith(">*  jumprelu") and "7.00 ±.01" in folder and "0.900 ±.010" in folder
    assert beaten.startswith("    jumprelu") and beaten.endswith("ba9876543210   a/long/folder")
    assert "> evaluated here; the others are those of the sweep grid" in text
    assert "* not dominated at its hook point and width: 1 of 3" in text
    alone = Evaluated(PROTOCOL, table[1:2].drop(columns="run_id"), baselines[:0]).as_text()
    assert ">" not in alone and "dominated by" not in alone


@pytest.mark.parametrize(
    ("metadata", "asked", "message"),
    [
        ({}, Asked(context_size=1), r"^--context 1: input should be greater than 1$"),
        ({"context_size": "long"}, Asked(), r"folder: its cfg\.json: context_size 'long': input should be a valid int"),
        ({}, Asked(tokens=9), r"folder: its cfg\.json: model './no-model'.*no such folder"),
    ],
)
def test_what_a_folder_says_wrongly_is_told_of_the_folder(metadata, asked, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    about = {"model_name": "./no-model", "hook_name": "blocks.0.hook_resid_post", "context_size": 16,
             "dataset_path": "demo", **metadata}  # fmt: skip
    cfg = SAEConfig(architecture="topk", d_in=4, d_sae=8, k=2, metadata=about)
    TopKSAE(cfg, {name: torch.ones(shape) for name, shape in TopKSAE.shapes(cfg).items()}).save("folder")
    with pytest.raises((SpecError, ModelError), match=message):
        evaluate_folders(Home(tmp_path / "home"), ["folder"], asked)
