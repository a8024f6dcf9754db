"""The stream as a Ray actor, with real hosts, consumers and objects, and without a language model."""

import re
import signal
import time
import uuid

import psutil
import pytest
import ray
from ray._private import internal_api

import stream_hosts
from penstock.actors import NAMESPACE, Source, StreamActor, StreamConfig
from penstock.consumer import StreamClient
from penstock.identity import code_hash
from penstock.spool import Spool
from penstock.storage import Storage
from penstock.stream_state import SupersededError
from stream_hosts import TOKENS, WIDTH, NumberHost, Reader, read_all

pytestmark = pytest.mark.ray
A, B = "blocks.1.hook_resid_post", "blocks.4.hook_resid_post"
BLOCK_BYTES = TOKENS * WIDTH * 4


@pytest.fixture(scope="module")
def cluster(head):
    ray.cloudpickle.register_pickle_by_value(stream_hosts)
    ray.init(address=head.address, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    yield head
    ray.shutdown()


@pytest.fixture
def start(cluster):
    """Start a stream: start(packs, n_blocks, ...) -> (stream, {host name: handle}); all are ended with the test."""
    actors = []

    def start(packs, n_blocks=8, window=3, hosts=((),), spool=None, lease_seconds=60.0, seconds=0.0):
        named = {}
        for deadly in hosts:
            name = f"host-{uuid.uuid4().hex[:8]}"
            named[name] = NumberHost.options(name=name).remote(deadly, seconds)
        config = StreamConfig(
            name=uuid.uuid4().hex[:8], source=Source("", "", spool), n_blocks=n_blocks, window=window,
            waves=({name: tuple(arrays) for name, arrays in packs.items()},), cursors={}, lease_seconds=lease_seconds,
            code=code_hash(),
        )  # fmt: skip
        stream = StreamActor.options(name=f"stream-{config.name}").remote(config)
        actors.extend([*named.values(), stream])
        ray.get(stream.set_hosts.remote(list(named)))
        return stream, named

    yield start
    for actor in actors:
        ray.kill(actor)


def collect(stream):
    return ray.get(stream.collect.remote())


def logs(found):
    return [event["message"] for event in found["mail"] if event["kind"] == "log"]


def test_a_block_that_kills_every_host_ends_the_sweep_by_its_name(start):
    stream, _ = start({"a": [A]}, hosts=[[2], [2]])
    with pytest.raises(ray.exceptions.RayTaskError, match="block 2 has failed 3 times and is given up"):
        read_all(stream, "a", [A], 8)
    found = collect(stream)
    assert "block 2 has failed 3 times" in found["fatal"]
    assert sum("lost block 2" in line for line in logs(found)) == 3
    assert found["cost"]["blocks_made"] >= 2  # the blocks before it were handed out


def test_the_stream_itself_is_killed_and_every_pack_goes_on_where_it_stands(start):
    stream, hosts = start({"a": [A]}, n_blocks=10)

    def kill(block):
        if block == 4:
            before = collect(stream)["incarnation"]
            ray.kill(stream, no_restart=False)
            deadline = time.time() + 60
            while True:  # as the driver does
                try:
                    if collect(stream)["incarnation"] != before:
                        break
                except ray.exceptions.RayActorError:
                    time.sleep(0.2)
                assert time.time() < deadline
            ray.get(stream.set_hosts.remote(list(hosts)))

    assert read_all(stream, "a", [A], 10, between=kill) == list(range(10))
    found = collect(stream)
    assert found["status"]["packs"]["a"]["status"] == "done"
    assert found["cost"]["blocks_made"] == 10 - 5  # none that the pack had read already is made again
    assert read_all(stream, "b", [B], 10) == list(range(10))  # the other one had not even begun


def test_blocks_in_the_spool_are_read_there_and_a_damaged_one_is_made_again(start, tmp_path):
    spool = Spool(Storage(tmp_path)).stream("0123456789ab")
    stream, _ = start({"a": [A, B]}, spool=spool)
    assert read_all(stream, "a", [A, B], 8, spool=spool) == list(range(8))
    assert spool.blocks(A) == spool.blocks(B) == list(range(8))
    file = next(tmp_path.glob(f"**/{B}/0000005.arrow"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    stream, _ = start({"a": [A, B]}, spool=spool)
    assert read_all(stream, "a", [A, B], 8, spool=spool) == list(range(8))
    found = collect(stream)
    assert found["cost"]["blocks_made"] == 1 and found["cost"]["blocks_lost"] == 1  # no other one is made again
    assert any("block 5 is lost" in line and "checksum" in line for line in logs(found))
    stream, _ = start({"a": [A, B]}, spool=spool)
    assert read_all(stream, "a", [A, B], 8, spool=spool) == list(range(8))  # it lies there again
    assert collect(stream)["cost"]["blocks_made"] == 0


def test_a_late_pack_reads_from_block_0_and_holds_nobody_up(start, tmp_path):
    for spool in (None, Spool(Storage(tmp_path)).stream("0123456789ab")):
        stream, _ = start({"a": [A]}, spool=spool)
        assert read_all(stream, "a", [A], 8, spool=spool) == list(range(8))
        assert read_all(stream, "late", [A], 8, spool=spool) == list(range(8))  # nobody had announced it
        cost = collect(stream)["cost"]
        assert cost["blocks_made"] == (16 if spool is None else 8)
        assert cost["blocks_remade"] == (8 if spool is None else 0)


def test_a_run_that_has_outlived_its_trial_is_sent_away(start):
    stream, _ = start({"a": [A]})
    old, new = (StreamClient(stream, "a", [A], run) for run in (1, 2))
    blocks = old.blocks(0, 8)
    next(blocks)
    taken = new.blocks(0, 8)
    assert next(taken)[0] == 0
    with pytest.raises(SupersededError):
        list(blocks)
    assert [block for block, _ in taken] == list(range(1, 8))


def test_hosts_join_and_leave_while_blocks_are_read(start):
    stream, hosts = start({"a": [A]}, n_blocks=12, seconds=0.05)
    name = f"host-{uuid.uuid4().hex[:8]}"
    joined = NumberHost.options(name=name).remote((), 0.05)
    first, left = next(iter(hosts)), []

    def scale(block):
        if block == 3:
            ray.get(stream.set_hosts.remote([first, name]))
        if block >= 6 and not left:
            busy = ray.get(stream.set_hosts.remote([name]))
            if not busy:
                left.append(first)
                ray.kill(hosts[first])

    assert read_all(stream, "a", [A], 12, between=scale) == list(range(12))
    found = collect(stream)
    assert left == [first] and list(found["status"]["hosts"]) == [name]
    assert found["cost"]["blocks_made"] == 12
    ray.kill(joined)


def store_bytes(head):
    """(bytes that the head's object store may not drop, bytes ever spilled)."""
    summary = internal_api.memory_summary(head.address, stats_only=True)
    size = next(node["Resources"]["object_store_memory"] for node in ray.nodes() if node["Alive"])
    needed = float(re.search(r"([\d.]+)% needed", summary)[1]) / 100 * size
    spilled = re.search(r"Spilled (\d+) MiB", summary)
    return needed, float(spilled[1]) * 2**20 if spilled else 0.0


@pytest.mark.parametrize("slow", ["consumer", "host"])
def test_a_store_too_small_for_the_run_neither_spills_nor_stops_anything(start, cluster, slow):
    """640 MB of blocks go through a window of 16 MB, in a store of 400 MB."""
    n_blocks, window = 160, 4
    spilled_before = store_bytes(cluster)[1]
    stream, _ = start({"a": [A]}, n_blocks=n_blocks, window=window, seconds=0.02 if slow == "host" else 0.0)
    needed = []

    def look(block):
        if slow == "consumer":
            time.sleep(0.02)
        if block % 20 == 10:
            needed.append(store_bytes(cluster)[0])

    assert read_all(stream, "a", [A], n_blocks, between=look) == list(range(n_blocks))
    assert store_bytes(cluster)[1] == spilled_before
    assert max(needed) <= (window + 1) * BLOCK_BYTES
    assert collect(stream)["cost"]["blocks_made"] == n_blocks


def test_a_consumer_that_hangs_loses_its_lease_and_the_others_go_on(start, cluster):
    stream, _ = start({"a": [A], "b": [A]}, n_blocks=12, lease_seconds=2.0)

    hung, free = Reader.remote(stream), Reader.remote(stream)
    process = psutil.Process(ray.get(hung.pid.remote()))
    reading = hung.read.remote("a", [A], 12, 0.2)
    deadline = time.time() + 30
    while collect(stream)["status"]["packs"]["a"]["block"] < 2:
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGSTOP)
    try:
        assert ray.get(free.read.remote("b", [A], 12), timeout=60) == list(range(12))
    finally:
        process.send_signal(signal.SIGCONT)
    assert ray.get(reading, timeout=60) == list(range(12))
    ray.kill(hung)
    ray.kill(free)
