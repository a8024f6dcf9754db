import pytest

from penstock.home import Home
from tracked_sweep import make_sweep


@pytest.fixture(scope="session")
def finished_home(tmp_path_factory) -> Home:
    """A home with the finished sweep of `tracked_sweep`. Only read it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        home = Home(tmp_path_factory.mktemp("finished") / "home")
        make_sweep(home, tmp_path_factory.mktemp("saes"))
        return home
