"""Several nodes on one machine, one of which is taken away."""

import time
import uuid

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import stream_hosts
from penstock.actors import NAMESPACE, Source, StreamActor, StreamConfig
from penstock.identity import code_hash
from ray_head import penstock
from stream_hosts import NumberHost, read_all

pytestmark = pytest.mark.ray
A, B = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"


@pytest.fixture
def nodes(token):
    """A head without hosts and two nodes with room for one each: (cluster, the two nodes)."""
    store = 150 * 2**20
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": store, "include_dashboard": False}
    )
    two = [cluster.add_node(num_cpus=1, object_store_memory=store, resources={"host": 1}) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.cloudpickle.register_pickle_by_value(stream_hosts)
    ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    yield cluster, two
    ray.shutdown()
    cluster.shutdown()


def test_paths_of_one_machine_are_refused_where_there_are_several_nodes(nodes, write_spec, tmp_path):
    cluster, _ = nodes
    home = tmp_path / "home"
    done = penstock("run", write_spec(), "--address", cluster.address, home=home)
    assert done.returncode == 2 and f"storage '{home}' is a path of one machine" in done.stderr, done.stderr
    shared = [("name: small", f"name: small\nstorage: file://{home}"), ("block_tokens", "spool: /spool, block_tokens")]
    done = penstock("run", write_spec(replace=shared), "--address", cluster.address, home=home)
    assert done.returncode == 2 and "data.spool '/spool' is a path of one machine" in done.stderr, done.stderr


def test_a_node_that_holds_blocks_is_taken_away_and_they_are_made_again(nodes):
    cluster, two = nodes
    hosts = {f"host-{uuid.uuid4().hex[:8]}": node for node in two}
    there = {name: NodeAffinitySchedulingStrategy(node.node_id, soft=True) for name, node in hosts.items()}
    handles = [
        NumberHost.options(name=name, resources={"host": 0.5}, scheduling_strategy=there[name]).remote(seconds=0.1)
        for name in hosts
    ]  # one a node, and the one that loses its node goes to the other
    ray.get([handle.ping.remote() for handle in handles])
    config = StreamConfig(
        name="nodes", source=Source("", ""), n_blocks=12, window=6, waves=({"a": (A, B)},), cursors={},
        lease_seconds=60.0, code=code_hash(),
    )  # fmt: skip
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stream = StreamActor.options(scheduling_strategy=here).remote(config)
    ray.get(stream.set_hosts.remote(list(hosts)))

    def take_away(block):
        if block == 2:
            deadline = time.time() + 30
            # Two blocks that are still to be read: one of them may have been fetched ahead.
            while sum(made > block for made in ray.get(handles[0].made.remote())) < 2:
                assert time.time() < deadline
                time.sleep(0.1)
            cluster.remove_node(two[0], allow_graceful=False)

    assert read_all(stream, "a", [A, B], 12, between=take_away) == list(range(12))
    cost = ray.get(stream.collect.remote())["cost"]
    assert cost["blocks_lost"] >= 1 and cost["blocks_remade"] >= 1
    assert cost["blocks_made"] <= 12 + 6  # at most the window is made again
