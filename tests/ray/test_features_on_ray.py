"""Feature dashboards by two model hosts of a cluster, one of which dies on the way."""

import threading
import time

import pytest
import ray
from demo_saes import train_saes

import penstock.features as features_module
from penstock.evaluate import Asked
from penstock.features import Workers, features_of_folder
from penstock.home import Home
from sae_core.analysis.feature_files import read_features
from sae_core.analysis.features import FeatureSettings

pytestmark = pytest.mark.ray
HOOK = "blocks.4.hook_resid_post"
ASKED = Asked(tokens=30_000)
SETTINGS = FeatureSettings(top=5, quantiles=3, per_quantile=2)


@pytest.fixture
def small_slices(monkeypatch):
    monkeypatch.setattr(features_module, "SLICE_TOKENS", 4096)  # eight of them
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_hosts_of_a_cluster_give_what_one_process_gives(head, tmp_path, small_slices, capsys):
    import torch

    torch.set_num_threads(1)  # as the hosts have
    home, sae = Home(tmp_path / "home"), train_saes(tmp_path, tokens=16_384)[HOOK]
    alone = features_of_folder(home, str(sae), ASKED, settings=SETTINGS, to=tmp_path / "alone")
    killed = []

    def kill_one() -> None:
        """A host, as soon as two are at work."""
        deadline = time.time() + 120
        while not killed and time.time() < deadline:
            hosts = head.processes("ray::HostActor.features")
            if len(hosts) == 2:
                hosts[0].kill()
                killed.append(hosts[0].pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        workers = Workers(n=2, address=head.address)
        together = features_of_folder(
            home, str(sae), ASKED, settings=SETTINGS, to=tmp_path / "together", workers=workers
        )
    finally:
        killed.append(0)
        killer.join()
    assert not ray.is_initialized()  # what was joined is left
    assert killed[0] and "a model host died at features; its slice is made again" in capsys.readouterr().err
    one, other = read_features(alone), read_features(together)
    assert one.about == other.about
    for name in ("latents", "examples", "vocabulary"):
        assert getattr(one, name).equals(getattr(other, name)), name
