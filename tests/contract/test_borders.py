"""What the parts of the project must never know of each other."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"import sys, json\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("folder", ["platform", "dashboards"])
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_platform_is_the_standard_librarys_from_the_projects_root():
    assert modules_after("import platform; assert platform.system()") >= {"platform"}
    done = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.__file__)"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert ROOT not in Path(done.stdout.strip()).parents


def test_no_test_lies_below_a_source_root():
    for folder in ("platform", "dashboards", "sae_core"):
        assert not [path for path in (ROOT / folder).rglob("test_*.py")]


def test_sae_core_knows_no_ray_no_mlflow_and_no_platform():
    loaded = modules_after("import sae_core; [getattr(sae_core, name) for name in sae_core.__all__]")
    assert not loaded & {"ray", "mlflow", "penstock", "transformer_lens"}


def test_the_dashboards_know_nothing_of_training():
    assert not modules_after("import penstock_dashboards.pareto") & {"ray", "torch"}


def test_a_trial_and_its_controller_load_no_torch():
    assert "torch" not in modules_after("import penstock.trial")


def test_the_driver_imports_no_ray_before_it_has_asked_for_a_token():
    """Ray reads its authentication mode when it is imported (see `cluster.connect`)."""
    assert "ray" not in modules_after("import penstock.sweep, penstock.harvest, penstock.evaluate, penstock.features")


def test_only_actors_py_holds_ray_actors():
    holders = [
        path.relative_to(ROOT).as_posix()
        for folder in ("platform", "sae_core", "dashboards", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if "@ray.remote" in path.read_text()
    ]
    assert holders == ["platform/penstock/actors.py"]


def test_what_pytorch_saved_is_read_as_tensors_alone():
    """Others' formats come as PyTorch saves them; its unpickler could run what a file says."""
    sources = [path for folder in ("sae_core", "platform", "dashboards") for path in (ROOT / folder).rglob("*.py")]
    lines = [line for path in sources for line in path.read_text().splitlines()]
    assert not [line for line in lines if re.search(r"allow_pickle=True|weights_only=False", line)]
    loads = [line for line in lines if "torch.load(" in line]
    assert len(loads) == 1 and "weights_only=True" in loads[0]
