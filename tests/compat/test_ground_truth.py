"""Known features: Penstock's SAEs find at least as many as the released SAELens' do, by SAELens' own measures.

Batches, schedules and evaluation are those of `jobs/benchmarks/ground_truth.py`, which prints the whole table; here
each side trains once a seed, near the true L0, with the learning rate that suits it best there.
"""

import importlib.util
import statistics
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("sae_lens") is None:
    pytest.skip("sae_lens is not installed (extra `compat`)", allow_module_level=True)

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs/benchmarks"))
import ground_truth  # noqa: E402
import sides  # noqa: E402

K, SEEDS, NOISE = 5, (0, 1), 0.02
LR = 3e-3
# The MCC that ours reached over ten seeds, at the least, less a margin; chance is 0.40.
CASES = {
    "topk": ({"k": K}, 0.76),
}


@pytest.fixture(scope="module")
def task():
    return ground_truth.world()


def figures(side: sides.Side, architecture: str, settings: dict, task) -> dict[str, float]:
    """Means over the seeds."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        recipes = [sides.Recipe(architecture, ground_truth.N_FEATURES, settings, LR, seed) for seed in SEEDS]
        saes = [sides.train(side, recipe, ground_truth.SCHEDULE, task.x, task.calibration) for recipe in recipes]
        found = [ground_truth.evaluate(task, sae) for sae in saes]
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.mean(one[name] for one in found) for name in found[0]}


@pytest.mark.parametrize("architecture", sorted(CASES))
def test_features_are_found_at_least_as_well_as_by_sae_lens(architecture, task):
    settings, least = CASES[architecture]
    ours, theirs = (figures(side, architecture, settings, task) for side in sides.SIDES)
    assert ours["l0"] == pytest.approx(K, rel=0.1)
    assert ours["mcc"] >= least
    for name in ("mcc", "precision", "recall"):
        assert ours[name] >= theirs[name] - NOISE, (name, ours, theirs)


def test_absorption_counts_silent_parents_whose_child_is_seen():
    active = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 1], [0, 0, 0]], dtype=torch.bool)  # parent 0, children 1 and 2
    nearest = torch.tensor([2, 0, 1])
    fires = torch.tensor([[1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    # absorbed in the first sample; the second sees the parent, the third no child; in the fourth nothing is active
    assert ground_truth.absorbed_share(fires, active, nearest, {0: [1, 2]}) == pytest.approx(1 / 3)
