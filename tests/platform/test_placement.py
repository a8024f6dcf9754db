import json

import pytest
import yaml

from penstock.errors import SpecError, SweepError
from penstock.live_cluster import (
    GROUP_LABEL,
    LiveCluster,
    _is_same,
    growing,
    is_impossible,
    placement_table,
    placements,
    read_types,
    types_of,
)
from penstock.models import ModelDescription
from penstock.placement import Cluster, Node, Room, host_request, pack_request
from penstock.plan import plan_saes
from penstock.spec import ResourceSpec, parse_spec

ROLE = "penstock/role"
HOST, PACK = {ROLE: "model-host"}, {ROLE: "pack"}
SPEC = """\
name: placed
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 1M}
saes: [{architecture: topk, d_sae: 8x, k: 4}]
resources: {FIELDS}
"""


def resources_of(fields):
    return parse_spec(SPEC.replace("FIELDS", fields)).resources


@pytest.mark.parametrize(("written", "read"), [
    ("pack", "pack"), ("'!pack'", "!pack"), ("'in(a, b)'", "in(a,b)"), ("'!in(a,b , c)'", "!in(a,b,c)"), ("''", ""),
])  # fmt: skip
def test_labels_are_what_ray_reads(written, read):
    """A blank inside of `in(...)` would keep Ray from ever matching it."""
    assert resources_of(f"pack_labels: {{{ROLE}: {written}}}").pack_labels == {ROLE: read}


@pytest.mark.parametrize(("fields", "message"), [
    ("pack_labels: {role: (pack)}", r"line 5: resources.pack_labels: the value '\(pack\)': accepted are a value, !val"),
    ("pack_labels: {role: in(a, b)}", r"resources.pack_labels: b\): None is no text; .*in quotes '!pack', 'in\(a,b\)'"),
    ("host_labels: {gen: 3}", "resources.host_labels: gen: 3 is no text"),
    ("host_labels: {-a: b}", "resources.host_labels: the key '-a': a name is made of"),
    ("host_labels: {a_/b: c}", "resources.host_labels: the key 'a_/b': what is before the / is made of"),
    ("host_labels: pack", "`resources.host_labels` is 'pack': accepted are labels and what they are to be"),
    ("gpus_per_pack: 1.5", r"`resources.gpus_per_pack` is 1.5: .*accepted: at most 1 \(0.5\), or a whole number"),
    ("gpus_per_host: 0.00001", "Ray counts in parts of 0.0001; accepted: 0, or at least 0.0001"),
    ("host_resources: {GPU: 1}", "GPU is no custom resource; accepted for it: gpus_per_host and gpus_per_pack"),
    ("host_resources: {memory: 1}", "memory is no custom resource"),
    ("pack_resources: {slot: 0}", "slot 0: accepted is an amount from 0.0001"),
    ("pack_resources: {slot: true}", "slot: True is no number"),
    ("pack_resources: {HPU: 1.5}", "Ray hands out a part of one HPU, or whole ones"),
    ("pack_resources: {'node:10.0.0.1': 1}", "'node:10.0.0.1' is the name of one node, not a resource of nodes"),
    ("pack_resource: {slot: 1}", "unknown key `resources.pack_resource`; did you mean `pack_resources`"),
])  # fmt: skip
def test_what_ray_would_refuse_or_never_place_is_refused_by_name(fields, message):
    with pytest.raises(SpecError, match=message):
        resources_of(fields)


@pytest.mark.parametrize(("selector", "chosen"), [
    ({}, "abc"), (PACK, "b"), ({ROLE: "!pack"}, "ac"), ({ROLE: "in(pack,model-host)"}, "ab"),
    ({ROLE: "!in(pack,model-host)"}, "c"), ({ROLE: "pack", "zone": "z1"}, "b"), ({ROLE: "pack", "zone": "!z1"}, ""),
])  # fmt: skip
def test_selectors_choose_nodes_as_ray_does(selector, chosen):
    """A node without the label meets what must not be, and nothing else (tried on Ray 2.60)."""
    nodes = {"a": HOST, "b": {**PACK, "zone": "z1"}, "c": {}}
    request = pack_request(ResourceSpec(pack_labels=selector))
    found = [name for name, labels in nodes.items() if Node({"CPU": 1}, labels).why_not(request) is None]
    assert "".join(found) == chosen


def test_hosts_and_packs_are_counted_on_the_nodes_that_they_may_run_on():
    cluster = Cluster((Node({"CPU": 16, "GPU": 4}, HOST), Node({"CPU": 16, "GPU": 8}, PACK), Node({"CPU": 4})))
    placed = ResourceSpec(model_hosts=4, gpus_per_host=1, gpus_per_pack=1, host_labels=HOST, pack_labels=PACK)
    assert cluster.pack_slots(placed) == 8
    anywhere = placed.model_copy(update={"host_labels": {}, "pack_labels": {}})
    assert cluster.pack_slots(anywhere) == 8  # 12 GPUs, 4 of them the hosts'
    with pytest.raises(SweepError, match=r"model_hosts 5: the cluster has room for 4 of 1 CPU, 1 GPU, penstock/role"):
        cluster.pack_slots(placed.model_copy(update={"model_hosts": 5}))


def test_hosts_spare_the_only_nodes_that_packs_can_use():
    cluster = Cluster((Node({"CPU": 1}, PACK), Node({"CPU": 1})))
    assert cluster.pack_slots(ResourceSpec(pack_labels=PACK)) == 1


@pytest.mark.parametrize(("gpus", "amount", "slots"), [(2, 0.4, 4), (2, 0.5, 4), (3, 1, 3), (5, 2, 2), (2, 0.75, 2)])
def test_a_part_of_a_gpu_is_a_part_of_one(gpus, amount, slots):
    cluster = Cluster((Node({"CPU": 100, "GPU": gpus}),))
    assert cluster.pack_slots(ResourceSpec(gpus_per_pack=amount)) == slots


def test_custom_resources_are_counted():
    cluster = Cluster((Node({"CPU": 16, "slot": 3}), Node({"CPU": 16, "slot": 1})))
    assert cluster.pack_slots(ResourceSpec(pack_resources={"slot": 1})) == 4
    assert cluster.pack_slots(ResourceSpec(pack_resources={"slot": 2})) == 1
    assert cluster.pack_slots(ResourceSpec(host_resources={"slot": 1}, pack_resources={"slot": 1})) == 3


@pytest.mark.parametrize(("fields", "message"), [
    ({"pack_labels": {ROLE: "packs"}}, r"resources.pack_labels: penstock/role: packs for a pack: nodes have "
                                       r"penstock/role: model-host, pack; the cluster has 16 CPU, 4 GPU, penstock/ro"),
    ({"pack_labels": {"zone": "a"}}, "resources.pack_labels: zone: a for a pack: no node has a label zone"),
    ({"host_labels": HOST, "gpus_per_host": 8}, "resources.gpus_per_host: 8 for a model host: the most that a node with"
                                                " penstock/role=model-host has is 4"),
    ({"gpus_per_pack": 16}, "resources.gpus_per_pack: 16 for a pack: the most that a node has is 8"),
    ({"cpus_per_pack": 99}, "resources.cpus_per_pack: 99 for a pack: the most that a node has is 16"),
    ({"pack_resources": {"slot": 1}}, "resources.pack_resources: slot 1 for a pack: no node has any"),
    ({"pack_labels": {ROLE: "pack", "zone": "!b", "disk": "ssd"}}, "disk: ssd for a pack: no node has a label disk"),
    ({"pack_labels": {ROLE: "pack", "zone": "a"}}, "zone: a for a pack: no node has a label zone"),
])  # fmt: skip
def test_what_can_never_be_met_is_said_by_field_value_and_what_there_is(fields, message):
    cluster = Cluster((Node({"CPU": 16, "GPU": 4}, HOST), *[Node({"CPU": 16, "GPU": 8}, PACK)] * 2))
    with pytest.raises(SweepError, match=message):
        cluster.pack_slots(ResourceSpec(**fields))


def test_parts_that_only_different_nodes_meet_are_never_met():
    cluster = Cluster((Node({"CPU": 32}), Node({"CPU": 4, "GPU": 1})))
    with pytest.raises(SweepError, match="cpus_per_pack / resources.gpus_per_pack: 8 CPU, 1 GPU for a pack: no one n"):
        cluster.pack_slots(ResourceSpec(cpus_per_pack=8, gpus_per_pack=1))


# ---- clusters that grow ----

UP = {
    "cluster_name": "c", "max_workers": 5, "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "node_config": {}},
        "hosts": {"resources": {"CPU": 8, "GPU": 1}, "labels": HOST, "min_workers": 0, "max_workers": 2},
        "packs": {"resources": {"CPU": 8, "GPU": 4}, "labels": PACK, "max_workers": 4},
    },
}  # fmt: skip
WANTED = ResourceSpec(model_hosts=2, gpus_per_host=1, gpus_per_pack=1, host_labels=HOST, pack_labels=PACK)
HEAD = Node({"CPU": 4}, {GROUP_LABEL: "head"})


def test_a_cluster_that_scales_from_nothing_has_what_its_autoscaler_may_add():
    cluster = growing([HEAD], types_of(UP))
    assert [(kind.name, kind.at_most) for kind in cluster.types] == [("hosts", 2), ("packs", 4)]
    assert cluster.pack_slots(WANTED) == 12  # at most five workers: two hosts, three times four packs
    there = Node({"CPU": 8, "GPU": 4}, {**PACK, GROUP_LABEL: "packs"})
    grown = growing([HEAD, there, there], types_of(UP))
    assert [(kind.name, kind.at_most) for kind in grown.types] == [("hosts", 2), ("packs", 2)]
    assert grown.at_most_more == 3 and grown.pack_slots(WANTED) == 12
    with pytest.raises(SweepError, match=r"room for 2 of .*; it has 4 CPU, 0 GPU.*; up to 2 more of hosts \(8 CPU, 1"):
        cluster.pack_slots(WANTED.model_copy(update={"model_hosts": 3}))
    with pytest.raises(SweepError, match="gpus_per_pack: 8 for a pack: the most that a node has is 4"):
        cluster.pack_slots(WANTED.model_copy(update={"gpus_per_pack": 8}))


RAY_CLUSTER = """\
apiVersion: ray.io/v1
kind: KIND
metadata: {name: penstock, namespace: default}
spec:
  enableInTreeAutoscaling: SCALES
  headGroupSpec:
    rayStartParams: {num-cpus: "0"}
    template: {spec: {containers: [{name: ray-head, resources: {limits: {cpu: "2", memory: 8Gi}}}]}}
  workerGroupSpecs:
    - groupName: hosts
      labels: {penstock/role: model-host}
      replicas: 1
      minReplicas: 0
      maxReplicas: 2
      rayStartParams: {}
      template: {spec: {containers: [{name: w, resources: {limits: {cpu: "8", memory: 8Gi, nvidia.com/gpu: "1"}}}]}}
    - groupName: packs
      labels: {penstock/role: pack}
      replicas: 0
      minReplicas: 0
      maxReplicas: 3
      rayStartParams: {resources: '"{\\\\"slot\\\\": 2}"'}
      template: {spec: {containers: [{name: w, resources: {limits: {cpu: "8", memory: 8Gi, nvidia.com/gpu: "4"}}}]}}
"""


def test_the_groups_of_a_kuberay_manifest_are_its_node_types(tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("kind: ConfigMap\n---\n" + RAY_CLUSTER.replace("KIND", "RayCluster").replace("SCALES", "true"))
    types, at_most = read_types(file)
    assert [(kind.name, kind.at_most, kind.node.labels[ROLE]) for kind in types] == [
        ("hosts", 2, "model-host"), ("packs", 3, "pack"),
    ]  # fmt: skip
    assert at_most is None and types[1].node.resources["slot"] == 2 and types[1].node.resources["GPU"] == 4
    assert growing([HEAD], (types, at_most)).pack_slots(WANTED) == 12
    fixed = yaml.safe_load(RAY_CLUSTER.replace("KIND", "RayCluster").replace("SCALES", "false"))
    job = {"kind": "RayJob", "spec": {"rayClusterSpec": fixed["spec"]}}
    assert [kind.at_most for kind in types_of(job)[0]] == [1, 0]  # its replicas


@pytest.mark.parametrize(("text", "message"), [
    ("- a", "holds no node types; accepted: the YAML of `ray up`"), ("a: [", "cannot be read: while parsing"),
    ("available_node_types: {a: 3}", "its node types cannot be read"), ("kind: RayCluster", "its node types cannot be"),
])  # fmt: skip
def test_a_file_that_says_nothing_of_nodes_is_refused(tmp_path, text, message):
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(SweepError, match=message):
        read_types(file)
    with pytest.raises(SweepError, match="cannot be read"):
        read_types(tmp_path / "absent.yaml")


# ---- the table of `penstock plan --address` ----


def table_of(live, resources, packs):
    found = placements(live, resources, packs)
    return placement_table(live, found, "http://h:8265"), is_impossible(live, found)


def live(nodes, free=None, types=None, may_grow=False):
    return LiveCluster(growing(nodes, types), tuple(nodes if free is None else free), may_grow)


def test_what_fits_now_and_what_fits_when_others_end():
    nodes = [Node({"CPU": 4, "GPU": 4}, HOST), Node({"CPU": 4, "GPU": 4}, PACK)]
    text, impossible = table_of(live(nodes), WANTED, 4)
    assert "hosts      2 x 1 CPU, 1 GPU, penstock/role=model-host: fit now" in text and not impossible
    assert "packs      4 x 1 CPU, 1 GPU, penstock/role=pack: fit now" in text
    busy = [nodes[0], Node({"CPU": 4, "GPU": 1}, PACK)]
    text, impossible = table_of(live(nodes, busy), WANTED, 6)
    assert "1 of 6 fit now, 4 when other work ends; the others take their turns" in text and not impossible


def test_what_the_autoscaler_adds_is_said_as_such():
    text, impossible = table_of(live([HEAD], types=types_of(UP)), WANTED, 4)
    assert "may add  up to 4 of packs: 8 CPU, 4 GPU, penstock/role=pack" in text and not impossible
    assert "0 of 2 fit now, 2 with nodes that the autoscaler adds" in text
    assert "0 of 4 fit now, 4 with nodes that the autoscaler adds" in text


def test_what_can_never_be_placed_is_said_with_its_part():
    nodes = [Node({"CPU": 4, "GPU": 4}, HOST)]
    text, impossible = table_of(live(nodes), WANTED, 4)
    assert impossible and "NEVER: resources.pack_labels: penstock/role: pack for a pack: nodes have pen" in text
    text, impossible = table_of(live(nodes), WANTED.model_copy(update={"model_hosts": 9, "pack_labels": {}}), 0)
    assert impossible and "4 of 9 fit now; NEVER as many as 9" in text
    text, impossible = table_of(live([HEAD], may_grow=True), WANTED, 4)
    assert not impossible and "--cluster FILE" in text and "an autoscaler may know of others" in text


def test_hosts_may_leave_no_room_for_packs():
    text, impossible = table_of(live([Node({"CPU": 1})]), ResourceSpec(), 1)
    assert impossible and "packs      1 x 1 CPU, 0 GPU: 0 of 1 fit now; NEVER as many as 1" in text


def test_either_all_requests_are_placed_or_none():
    room = Room(growing([HEAD], types_of(UP)))
    host, pack = host_request(WANTED), pack_request(WANTED)
    assert not room.take_all(host, pack, pack_request(WANTED.model_copy(update={"cpus_per_pack": 99})))
    assert room.added == [] and len(room.free) == 1
    assert room.take_all(host, pack) and sorted(room.added) == ["hosts", "packs"]


def test_where_it_runs_changes_no_identity():
    hook_point = "blocks.1.hook_resid_post"
    model = ModelDescription("m", 2, 16, None, 100, 1000, "fingerprint", {hook_point: 16})
    placed = f"pack_labels: {json.dumps(PACK)}, host_resources: {{slot: 1}}, yield_after_seconds: 9"
    plain, elsewhere = (
        [sae.sae_id for sae in plan_saes(parse_spec(SPEC.replace("FIELDS", fields)), model, "tokens")]
        for fields in ("", placed)
    )
    assert plain == elsewhere


def test_the_monitor_of_another_cluster_on_this_machine_is_not_asked():
    assert _is_same("10.0.0.1:6379", "10.0.0.1:6379") and _is_same("127.0.0.1:6379", "10.0.0.1:6379")
    assert not _is_same("127.0.0.1:6380", "127.0.0.1:6379") and not _is_same("203.0.113.9:6379", "10.0.0.1:6379")
