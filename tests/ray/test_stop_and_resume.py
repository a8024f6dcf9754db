"""A sweep that is stopped from afar, and gone on with: it ends with the weights of one that nobody stopped."""

import json
import os
import re

import pytest

from penstock.home import Home
from penstock.tracking import find_sweep
from ray_head import assert_same, penstock, wait_for

pytestmark = pytest.mark.ray


def test_a_job_is_stopped_watched_and_gone_on_with_by_the_clusters_address(submitted, head, write_spec, tmp_path):
    """A checkpoint a step makes the steps slow enough to be stopped between two of them."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere" / "home"
    elsewhere.parent.mkdir()
    spec = write_spec("16k", "62", [("name: small", "name: halted")])
    started = penstock("submit", spec, "--address", head.jobs, home=home)
    assert started.returncode == 0, started.stdout + started.stderr
    wait_for(lambda: list(home.glob("saes/*/checkpoints/step-*/manifest.json")), None, spec)

    def far(*arguments, **options):
        return penstock(*arguments, "--address", head.jobs, home=elsewhere, **options)

    asked = far("stop", "halted")
    assert asked.returncode == 0, asked.stdout + asked.stderr
    assert "every pack saves and ends" in asked.stdout and "go on with: penstock resume halted" in asked.stdout
    steps = [int(step) for step in re.search(r"saved at step (\d+)(?: to (\d+))? of 62", asked.stdout).groups("0")]
    assert 0 < steps[0] < 62
    watched = far("status", "halted", "--watch")
    assert watched.returncode == 3 and "stopped: the sweep was stopped: SIGTERM" in watched.stdout, watched.stderr
    runs = find_sweep(Home.resolve(str(home)), "halted").children()
    assert {run.info.status for run in runs if run.data.tags["status"] == "stopped"} == {"KILLED"}

    done = penstock("resume", "halted", "--address", head.address, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was stopped; of 12 SAEs" in done.stdout and re.search(r"is at step [1-9]", done.stdout)
    # The sweep's name is no part of an SAE's identity.
    assert assert_same(home, submitted[0]) == 2 * 5
    report = json.loads(far("status", "halted", "--json").stdout)
    assert report["phase"] == "ended" and report["outcome"] == {"status": "finished", "exit_status": 0}

    log, near = far("logs", "halted"), penstock("logs", "halted", home=home)
    for part in ("stopping (SIGTERM)", "has ended at step", "go on with: penstock resume", "diverged", "evaluating"):
        assert part in log.stdout and part in near.stdout
    sae = sorted(path.parent.name for path in home.glob("saes/*/final"))[0]
    of_sae = far("logs", "halted", "--sae", sae[:8]).stdout
    assert f"SAE {sae} finished" in of_sae and "saved at step" in of_sae and "evaluating" not in of_sae
    assert "has finished" in penstock("resume", "halted", home=home).stdout
    without = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    refused = far("status", "halted", env={**without, "HOME": str(tmp_path)})
    assert refused.returncode == 2 and "wants its token, and none was sent" in refused.stderr
