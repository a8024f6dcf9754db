import json
import sys
from pathlib import Path

import pytest
from filelock import FileLock

# Begun first, for they take longest: one that came last would leave the other processes of `make test` without work.
LONGEST = ["test_benchmarks.py", "test_mlflow_server.py", "test_attribution.py", "test_registry.py"]

# last, so that none of its names hides another module
sys.path.append(str(Path(__file__).resolve().parents[1] / "jobs/benchmarks"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def demo_saes(tmp_path_factory, worker_id: str) -> dict[str, Path]:
    """Folders of two SAEs of the demo model, by hook point (see `demo_saes`). Only read them. Test processes that run
    side by side share them."""
    from demo_saes import train_saes

    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent
    folder, about = shared / "demo-saes", shared / "demo-saes.json"
    with FileLock(str(about) + ".lock"):
        if not about.exists():
            folder.mkdir()
            about.write_text(json.dumps({name: str(path) for name, path in train_saes(folder).items()}))
    return {name: Path(path) for name, path in json.loads(about.read_text()).items()}
