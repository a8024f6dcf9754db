from eight_sweeps import check_everything_is_there, run_sweeps
from penstock.home import Home
from penstock.tracking import Tracker


def test_eight_sweeps_at_once_into_one_sqlite_database(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = Home(tmp_path / "home")
    Tracker(home, "sweep-0", "id-of-sweep-0").open("name: small\n", {}, [])  # makes the database
    check_everything_is_there(home, run_sweeps(home, tmp_path))
