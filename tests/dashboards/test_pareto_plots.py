import itertools
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from penstock.errors import SweepError
from penstock.pareto import mark_front
from penstock_dashboards.marks import OTHERS, STYLES
from penstock_dashboards.pareto import write_png
from sample_sweep import BAND, sample_sweep


def sae(sae_id: str, hook_point: str, architecture: str, l0: float, recovered: float, **more) -> dict:
    return {"sae_id": sae_id, "hook_point": hook_point, "architecture": architecture, "d_sae": 64, **more,
            "l0": l0, "ce_recovered": recovered, "dead_fraction": 0.1, "status": "finished"}  # fmt: skip


def table() -> pd.DataFrame:
    return mark_front(pd.DataFrame([
        sae("late-topk", "blocks.4", "topk", 8, 0.9, k=8),
        sae("late-gated", "blocks.4", "gated", 9, 0.8),
        sae("early-topk", "blocks.1", "topk", 16, 0.95, k=16),
        sae("early-new", "blocks.1", "brand_new", 0, 0.2),
        {**sae("lost", "blocks.1", "topk", math.nan, math.nan, k=4), "status": "diverged"},
    ]))  # fmt: skip


def baselines() -> pd.DataFrame:
    return pd.DataFrame([
        {"kind": kind, "hook_point": "blocks.4", "k": k, "l0": float(k), "ce_recovered": k / 64}
        for kind in ("neurons", "pca", "frozen_decoder", "target_pca") for k in (8, 32)
    ])  # fmt: skip


def test_the_png_is_a_picture_with_a_panel_a_hook_point(tmp_path):
    path = write_png(table(), baselines(), tmp_path / "new" / "p.png", title="demo", l0_band=(5.0, 20.0))
    height, width, _ = imread(path).shape
    assert width == 1600 and 700 < height < 1000
    one = write_png(table().query("hook_point == 'blocks.4'"), baselines(), tmp_path / "one.png", title="one")
    assert imread(one).shape[1] < width


def test_the_png_needs_neither_baselines_nor_a_finite_band(tmp_path):
    nothing = pd.DataFrame(columns=["kind", "hook_point", "k", "l0", "ce_recovered"])
    assert write_png(table(), nothing, tmp_path / "p.png", title="x", l0_band=(5.0, math.inf)).stat().st_size > 10_000


def test_intervals_are_drawn_as_bars(tmp_path):
    sample = sample_sweep()
    bare = sample.table.drop(columns=[name for name in sample.table if name.endswith(("_low", "_high"))])
    pictures = [imread(write_png(which, sample.baselines, tmp_path / f"{number}.png", title="x", l0_band=BAND))
                for number, which in enumerate((sample.table, bare))]  # fmt: skip
    changed = (pictures[0] != pictures[1]).any(axis=2)
    assert 500 < changed.sum() < 0.02 * changed.size  # thin bars, and nothing else


def test_nothing_evaluated_is_said(tmp_path):
    with pytest.raises(SweepError, match="no SAE of this sweep has been evaluated"):
        write_png(table().query("sae_id == 'lost'"), baselines(), tmp_path / "x", title="x")
    assert list(tmp_path.iterdir()) == []


_VISION = {  # Machado, Oliveira and Fernandes, 2009, severity 1, on linear RGB
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of #rrggbb."""
    values = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(_XYZ @ rgb.clip(0, 1) / _XYZ.sum(axis=1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("ground", ["colour", "dark"])
def test_colours_are_told_apart_in_every_kind_of_colour_vision(ground):
    colours = [linear(getattr(style, ground)) for style in STYLES.values()]
    for matrix in map(np.array, _VISION.values()):
        seen = [lab(matrix @ colour) for colour in colours]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 18


def test_colours_stand_out_from_the_ground():
    for grounds, name in ((("#ffffff", "#e9f1fc"), "colour"), (("#14171d", "#1b2a40"), "dark")):
        for style, ground in itertools.product((*STYLES.values(), *OTHERS), grounds):
            dim, bright = sorted(float(_XYZ[1] @ linear(colour)) for colour in (getattr(style, name), ground))
            assert (bright + 0.05) / (dim + 0.05) > 3


def test_every_architecture_has_a_marker_of_its_own():
    styles = [*STYLES.values(), *OTHERS]
    assert len({style.marker for style in styles}) == len({style.shape for style in styles}) == len(styles)
