import pytest

from penstock.errors import SweepError
from penstock.home import Home


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("PENSTOCK_HOME", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_argument_beats_the_environment_beats_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Home.resolve().path == tmp_path / "penstock-home"
    monkeypatch.setenv("PENSTOCK_HOME", "from-environment")
    assert Home.resolve().path == tmp_path / "from-environment"
    assert Home.resolve("x/../given").path == tmp_path / "given"
    assert list(tmp_path.iterdir()) == []


def test_a_home_holds_the_database_the_artifacts_and_the_storage(tmp_path, monkeypatch):
    home = Home(tmp_path / "my home")
    assert home.tracking_uri == f"sqlite:///{tmp_path}/my home/mlflow.db"
    assert home.artifact_location == f"file://{tmp_path}/my%20home/artifacts"
    assert home.storage_uri(None) == str(tmp_path / "my home")
    assert home.storage_uri("s3://bucket/x") == "s3://bucket/x"
    monkeypatch.chdir(tmp_path)
    assert home.storage_uri("data") == str(tmp_path / "data")


def test_a_tracking_server_keeps_its_own_artifacts(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert Home(tmp_path).tracking_uri == "http://mlflow:5000"
    assert Home(tmp_path).artifact_location is None


@pytest.mark.parametrize("cache", ["working_dir_files", "py_modules_files"])
def test_a_folder_that_ray_deletes_is_refused(cache, monkeypatch):
    unpacked = f"/tmp/ray/session_1/runtime_resources/{cache}/_ray_pkg_1/penstock-home"
    with pytest.raises(SweepError, match=r"--home '.*_ray_pkg_1/penstock-home' lies in the folder that Ray unpacked"):
        Home.resolve(unpacked)
    monkeypatch.setenv("PENSTOCK_HOME", unpacked)
    with pytest.raises(SweepError, match="PENSTOCK_HOME"):
        Home.resolve()


@pytest.mark.parametrize("bad", ["s3://bucket/home", "what?", "50%", "#1"])
def test_what_cannot_hold_a_database_is_refused(bad):
    with pytest.raises(SweepError, match="--home"):
        Home.resolve(bad)


def test_a_file_is_no_home(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match="is a file"):
        Home.resolve(str(tmp_path / "file"))
