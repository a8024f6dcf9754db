"""Hosts and packs on the nodes that a spec names; sweeps that share a cluster."""

import subprocess
import sys
import time

import pytest
import ray
from ray.cluster_utils import Cluster

from penstock.actors import NAMESPACE
from penstock.cluster import describe_cluster, free_nodes
from penstock.errors import SweepError
from penstock.fleet import Fleet
from penstock.live_cluster import look_at, placements
from penstock.placement import host_request, pack_request
from penstock.spec import ResourceSpec, load_spec
from penstock.storage import Storage
from penstock.trial import one_worker
from ray_head import assert_same, penstock, wait_for, weights

pytestmark = pytest.mark.ray
ROLE = "penstock/role"
PLACED = """resources:
  model_hosts: 1
  cpus_per_host: 0.5
  cpus_per_pack: 0.5
  host_labels: {penstock/role: "!pack", zone: a}
  pack_labels: {penstock/role: "in(other, pack)"}
  pack_resources: {slot: 1}
"""
RESOURCES = "resources: {model_hosts: 1, cpus_per_host: 0.5, cpus_per_pack: 0.75}\n"


@pytest.fixture(scope="module")
def labelled(token):
    """A head, a node for hosts and one for two packs: (address, node ids by role)."""
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    nodes = {
        "model-host": cluster.add_node(**options, labels={ROLE: "model-host", "zone": "a"}),
        "pack": cluster.add_node(**options, labels={ROLE: "pack"}, resources={"slot": 2}),
    }
    cluster.wait_for_nodes()
    yield cluster.address, {role: node.node_id for role, node in nodes.items()}
    cluster.shutdown()


def test_hosts_and_packs_run_on_the_nodes_that_their_labels_name(labelled, write_spec, tmp_path):
    address, nodes = labelled
    spec = load_spec(write_spec(replace=[(RESOURCES, PLACED)]))
    ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    try:
        cluster, _ = describe_cluster()
        assert cluster.pack_slots(spec.resources) == 2
        with pytest.raises(SweepError, match=r"nodes have penstock/role: model-host, pack; the cluster has"):
            cluster.pack_slots(ResourceSpec(pack_labels={ROLE: "packs"}))
        fleet = Fleet(spec, Storage(str(tmp_path / "storage")), print)
        fleet.scale(1)
        [host] = fleet.hosts.values()
        assert _pack_ran_on(spec.resources, tmp_path) == nodes["pack"]
        ray.get(host.ping.remote(), timeout=120)
        about = ray._private.state.actors(host._actor_id.hex())
        assert about["Address"]["NodeID"] == nodes["model-host"]
        deadline = time.time() + 10
        while sum(node.resources.get("CPU", 0) for node in free_nodes()) != 2.5:  # of three, the host has a half
            assert time.time() < deadline, free_nodes()
            time.sleep(0.2)
        fleet.close()
    finally:
        ray.shutdown()


def _pack_ran_on(resources, folder):
    from ray import train
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    found = folder / "node"
    request = pack_request(resources)
    DataParallelTrainer(
        lambda: found.write_text(ray.get_runtime_context().get_node_id()),
        scaling_config=one_worker(request.bundle, request.labels),
        run_config=train.RunConfig(storage_path=str(folder / "train"), name="where"),
    ).fit()
    return found.read_text()


def test_a_plan_for_a_running_cluster_says_what_fits_and_what_never_will(labelled, write_spec, tmp_path):
    address, _ = labelled
    spec = write_spec(replace=[(RESOURCES, PLACED.replace("zone: a", "zone: b"))])
    done = penstock("plan", spec, "--address", address, home=tmp_path / "home")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "hosts      1 x 0.5 CPU, 0 GPU, penstock/role=!pack, zone=b: NEVER: resources.host_labels: zone: b for a m" \
           "odel host: nodes have zone: a" in done.stdout, done.stdout  # fmt: skip
    assert "packs      2 x 0.5 CPU, 0 GPU, 1 slot, penstock/role=in(other,pack): fit now" in done.stdout, done.stdout


def test_a_job_is_waited_for_until_it_reports_and_what_ended_it_before_is_told(head, write_spec, tmp_path):
    spec = write_spec(replace=[("name: small", "name: misplaced"), (RESOURCES, PLACED.replace("zone: a", "zone: b"))])
    done = penstock("submit", spec, "--address", head.jobs, home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    for command in (["status", "misplaced", "--watch"], ["logs", "misplaced", "--follow"], ["status", "misplaced"]):
        told = penstock(*command, "--address", head.jobs, home=tmp_path / "elsewhere")
        assert told.returncode == 2 and "has FAILED before it could report: resources.host_labels" in told.stderr, told


def test_a_cluster_is_looked_at_through_its_dashboard(head):
    live = look_at(head.jobs)
    [node] = live.cluster.nodes
    assert node.resources["CPU"] == 2 and not live.may_grow
    assert live.free[0].resources["CPU"] <= 2
    hosts, packs = placements(live, ResourceSpec(cpus_per_pack=3), packs=1)
    assert (hosts.fits_empty, packs.fits) == (1, 0) and "the most that a node has is 2" in packs.never
    assert hosts.request == host_request(ResourceSpec())


@pytest.mark.slow
def test_two_sweeps_share_a_cluster_and_each_has_the_weights_that_it_has_alone(head, submitted, write_spec, tmp_path):
    """The first holds the whole head; when the second comes it gives a pack back, and goes on with it afterwards."""
    reference, _, _ = submitted
    sharing = RESOURCES.replace("0.75", "0.5, packs_per_hook_point: 2, yield_after_seconds: 5")
    second = write_spec(replace=[("name: small", "name: second"), (RESOURCES, sharing)])
    second = second.rename(tmp_path / "second.yaml")
    first = write_spec(tokens="200k", replace=[
        ("name: small", "name: first"), ("block_tokens", "seed: 1, block_tokens"), (RESOURCES, sharing),
    ])  # fmt: skip
    alone = tmp_path / "alone"
    done = penstock("run", first, "--address", head.address, home=alone, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr  # one SAE diverges
    homes = {name: tmp_path / name for name in ("first", "second")}
    running = {}
    try:
        for name, spec in (("first", first), ("second", second)):
            log = tmp_path / f"{name}.log"
            with log.open("wb") as output:
                running[name] = subprocess.Popen(
                    [sys.executable, "-m", "penstock.cli", "run", spec, "--address", head.address, "--home",
                     homes[name]], stdout=output, stderr=output, cwd=tmp_path,
                )  # fmt: skip
            if name == "first":
                wait_for(lambda log=log: log.read_text().count("is at its first step") >= 3, running[name], log, 600)
        said = {}
        for name, process in running.items():
            process.wait(900)
            said[name] = (tmp_path / f"{name}.log").read_text()
            assert process.returncode == 1, said[name]
    finally:
        for process in running.values():
            process.kill()
    assert "sharing the cluster with sweep second" in said["first"], said["first"]
    assert "sweep second waits for its share: " in said["first"], said["first"]
    assert "sharing the cluster with sweep first" in said["second"], said["second"]
    assert assert_same(homes["first"], alone) == len(weights(alone)) > 0
    assert assert_same(homes["second"], reference) == len(weights(reference)) > 0
