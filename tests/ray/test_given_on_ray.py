"""A sweep on the activations that another sweep has left in its spool, as a user runs both."""

import json

import pytest
from safetensors.numpy import load_file

from ray_head import penstock

pytestmark = pytest.mark.ray

DIVERGING = "  - {architecture: standard, d_sae: 2x, l1_coefficient: 2, lr: 1.0e+6}  # this one diverges\n"


def weights(home):
    """The trained weights of every SAE of the home, by where it reads and what it is."""
    found = {}
    for folder in home.glob("saes/*/final"):
        config = json.loads((folder / "cfg.json").read_text())
        hook_point = config.pop("metadata")["hook_name"]
        found[f"{hook_point} {json.dumps(config, sort_keys=True)}"] = load_file(folder / "sae_weights.safetensors")
    return found


def figures(home):
    rows = json.loads(penstock("front", "small", "--json", home=home).stdout)
    return sorted((row["l0"], row["ce_recovered"], row["explained_variance"]) for row in rows)


def passes(home):
    """The forward passes that harvesting took."""
    return json.loads(next(home.glob("sweeps/*/result.json")).read_text())["cost"]["forward_passes"]


def test_a_sweep_on_another_ones_spool_gives_the_same_weights_without_a_forward_pass(head, write_spec, tmp_path):
    first, second, spool = tmp_path / "first", tmp_path / "second", tmp_path / "spool"
    small = [(DIVERGING, ""), ("report_tokens: 2k", "report_tokens: 1k")]
    spec = write_spec(tokens="8k", replace=[*small, ("block_tokens", f"spool: {spool}, block_tokens")])
    done = penstock("run", spec, "--address", head.address, home=first)
    assert done.returncode == 0, done.stdout + done.stderr
    [stream] = [path for path in spool.iterdir() if (path / "about.json").exists()]

    spec = write_spec(tokens="8k", replace=[*small, ("block_tokens", f"activations: {stream}, block_tokens")])
    done = penstock("run", spec, "--address", head.address, home=second)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"given      {stream}: a spool's stream, of model demo over demo" in done.stdout
    assert "forward    0 rows (0 tokens)" in done.stdout
    ours, theirs = weights(second), weights(first)
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 5
    for sae, tensors in theirs.items():
        for name, tensor in tensors.items():
            assert (ours[sae][name] == tensor).all(), (sae, name)
    assert figures(second) == figures(first)
    assert passes(second) == 0 < passes(first)
