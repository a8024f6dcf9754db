"""Whole sweeps on a real cluster, with things killed under them: they end with the weights of an undisturbed one."""

import contextlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file

from ray_head import assert_same, cost, penstock, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture
def running(head, tmp_path):
    """Start `penstock run` in the background: running(spec, home) -> (process, log); it is ended with the test."""
    started = []

    def start(spec, home):
        log = tmp_path / f"log-{len(started)}"
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "penstock.cli", "run", spec, "--address", head.address, "--home", home],
                stdout=output, stderr=output, cwd=tmp_path, env={**os.environ},
            )  # fmt: skip
        started.append(process)
        return process, log

    yield start
    for process in started:
        process.kill()
        process.wait()


def kill_one(head, title):
    process = head.processes(title)[0]
    process.kill()
    return process.pid


def test_the_stream_a_trial_and_hosts_are_killed_while_hosts_come_and_go(
    submitted, head, running, write_spec, tmp_path
):
    home = tmp_path / "home"
    room = [("cpus_per_host: 0.5", "cpus_per_host: 0.2"), ("cpus_per_pack: 0.75", "cpus_per_pack: 0.7")]
    process, log = running(write_spec("16k", "8", room), home)

    def said(text):
        return lambda: text in log.read_text()

    wait_for(lambda: list(home.glob("saes/*/checkpoints/*/manifest.json")), process, log)
    workers = head.processes("ray::RayTrainWorker")
    for worker in workers:  # on a machine that is not busy the sweep would be over before all of this has happened
        worker.suspend()
    try:
        kill_one(head, "ray::StreamActor")
        wait_for(said("the stream was restarted"), process, log)
        asked = penstock("scale", "small", "--model-hosts", "2", home=home)
        assert asked.returncode == 0, asked.stderr
        wait_for(said("model hosts: 1 -> 2"), process, log)
        wait_for(lambda: len(head.processes("ray::HostActor")) == 2, process, log)
        kill_one(head, "ray::HostActor")
        kill_one(head, "ray::ImplicitFunc")  # a trial of Tune
        asked = penstock("scale", "small", "--model-hosts", "1", home=home)
        assert asked.returncode == 0, asked.stderr
        wait_for(said("has left"), process, log)
        status = penstock("status", "small", home=home)
        assert "blocks.4.hook_resid_post" in status.stdout, status.stdout + status.stderr
    finally:
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):  # one of them has died with its trial
                worker.resume()
    assert process.wait(timeout=240) == 0, log.read_text()
    assert assert_same(home, submitted[0]) == 2 * 5


def test_a_pack_without_memory_is_split_and_its_other_half_ends_as_if_alone(submitted, head, write_spec, tmp_path):
    """One SAE asks for 100 TB: its pack is halved, it stands alone and fails, the other half goes on."""
    home = tmp_path / "home"
    giant = "{architecture: topk, d_sae: 200B, k: 4}"
    spec = write_spec("16k", "2", [
        ("[blocks.1.hook_resid_post, blocks.4.hook_resid_post]", "[blocks.4.hook_resid_post]"),
        ("  - {architecture: standard, d_sae: 2x, l1_coefficient: 1}\n", ""),
        ("  - {architecture: gated, d_sae: 2x, l1_coefficient: 1}\n", ""),
        ("{architecture: standard, d_sae: 2x, l1_coefficient: 2, lr: 1.0e+6}", giant),
        ("baselines: {k: [8]}", "baselines: {k: []}"),
        ("cpus_per_pack: 0.75", "cpus_per_pack: 0.75, pack_memory_gb: 1e7"),
    ])  # fmt: skip
    done = penstock("run", spec, "--address", head.address, home=home)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "can't allocate memory" in done.stdout and "its 3 SAEs go on in two packs" in done.stdout
    assert "1 SAE(s) failed" in done.stdout
    assert assert_same(home, submitted[0]) == 2
    [stopped] = [json.loads(path.read_text()) for path in home.glob("saes/*/stopped.json")]
    assert stopped["status"] == "failed" and "can't allocate memory" in stopped["reason"]


@pytest.mark.slow
def test_a_sweep_on_activations_that_another_one_has_left_gives_the_same_weights(
    submitted, head, write_spec, tmp_path
):
    theirs, _, _ = submitted
    [stream] = [path for path in theirs.with_name("spool").iterdir() if (path / "about.json").exists()]
    home = tmp_path / "home"
    spec = write_spec("16k", "1", [("block_tokens", f"activations: {stream}, block_tokens")])
    done = penstock("run", spec, "--address", head.address, home=home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"given      {stream}: a spool's stream, of model demo over demo" in done.stdout
    assert cost(home)["forward_passes"] == 0
    ours, expected = by_settings(home), by_settings(theirs)  # their ids say where their activations come from
    assert len(ours) == 2 * 5
    for key, tensors in ours.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[key][name], err_msg=f"{key} {name}")


def by_settings(home):
    """The trained weights of every SAE of the home, by where it reads and what it is."""
    found = {}
    for folder in home.glob("saes/*/final"):
        config = json.loads((folder / "cfg.json").read_text())
        hook_point = config.pop("metadata")["hook_name"]
        found[f"{hook_point} {json.dumps(config, sort_keys=True)}"] = load_file(folder / "sae_weights.safetensors")
    return found


@pytest.mark.slow
def test_a_driver_on_another_cluster_is_told_that_the_sweep_is_running(head, running, write_spec, tmp_path):
    """Two clusters know nothing of each other's actors: the storage they share tells."""
    home = tmp_path / "home"
    spec = write_spec("256k", "1")
    process, log = running(spec, home)
    wait_for(lambda: "sweep id" in log.read_text(), process, log)
    second = subprocess.run(
        [sys.executable, "-m", "penstock.cli", "run", str(spec), "--home", str(home)], capture_output=True, text=True,
        timeout=200, cwd=tmp_path, check=False, env={**os.environ, "RAY_AUTH_MODE": "token"},
    )  # fmt: skip
    assert second.returncode == 2, second.stdout + second.stderr
    assert f"this sweep is running already: process {process.pid}" in second.stderr
    assert process.poll() is None


@pytest.mark.slow
def test_weights_are_the_same_after_twenty_kills(head, running, write_spec, tmp_path):
    """A seeded schedule of kills of everything that can be killed, one whenever the sweep has got on since the last."""
    random = np.random.default_rng(0)
    home, plain = tmp_path / "home", tmp_path / "plain"
    spec = write_spec("1M", "100")
    done = penstock("run", spec, "--address", head.address, home=plain, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    titles = ["ray::RayTrainWorker", "ray::HostActor", "ray::StreamActor", "ray::ImplicitFunc", "driver"]
    begun, kills = time.time(), list(random.permutation(4 * titles))
    process, log = running(spec, home)

    def checkpoints():
        return set(home.glob("saes/*/checkpoints/*/manifest.json"))

    for title in kills:
        before = checkpoints()
        wait_for(lambda: checkpoints() - before, process, log)  # noqa: B023
        time.sleep(random.uniform(0, 2))
        if title == "driver":
            process.kill()
            process.wait()
            wait_for(lambda: not head.processes("ray::HostActor"), None, log)
            process, log = running(spec, home)
        else:
            wait_for(lambda: head.processes(title), process, log)  # noqa: B023
            victims = head.processes(title)
            victims[random.integers(len(victims))].kill()
    assert process.wait(timeout=600) == 0, log.read_text()
    print(f"{len(kills)} kills in {time.time() - begun:.0f} s: {', '.join(kills)}".replace("ray::", ""))
    assert assert_same(home, plain) == 2 * 5
