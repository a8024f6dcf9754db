"""The Kubernetes manifests: valid for a real API server and for KubeRay, and what Penstock asks for."""

import functools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kuberay_schema import problems, schema_of
from kustomizing import Manifest, changed, render, render_with_kubectl
from penstock.errors import SweepError
from penstock.live_cluster import growing, types_of
from penstock.models import ModelDescription
from penstock.placement import Cluster, Node
from penstock.plan import memory_of_block, plan_packs, plan_saes
from penstock.session import WINDOW_LIMITS, WINDOW_SHARE
from penstock.spec import SweepSpec, load_spec

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster/kuberay"
CLUSTERS, SWEEPS = ("overlays/small", "overlays/large"), ("sweeps/small", "sweeps/large")
SIZES = ("small", "large")
BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# d_model and layers of the models that shipped sweeps name; their configuration lies on the hub.
MODELS = {"gpt2": (768, 12), "EleutherAI/pythia-1.4b": (2048, 24)}


@functools.cache
def manifests(folder: str) -> list[Manifest]:
    """Of one folder; only read them."""
    return render(FOLDER / folder)


def rendered(folder: str, kind: str) -> Manifest:
    (only,) = [each for each in manifests(folder) if each["kind"] == kind]
    return only


def ray_cluster(size: str) -> Manifest:
    return rendered(f"overlays/{size}", "RayCluster")


def shipped_spec(size: str) -> SweepSpec:
    return load_spec(FOLDER / f"sweeps/{size}/sweep.yaml")


def amount(quantity: str) -> float:
    """A Kubernetes quantity as a number."""
    number, suffix = re.fullmatch(r"([0-9.]+)(m|[KMGT]i)?", quantity).groups()
    return float(number) * (0.001 if suffix == "m" else BINARY.get(suffix, 1))


def groups(cluster: Manifest) -> dict[str, Manifest]:
    spec = cluster["spec"]
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def pods(manifest: Manifest) -> dict[str, Manifest]:
    """The pod specs of a RayCluster's groups, or of a RayJob's submitter."""
    if manifest["kind"] == "RayJob":
        return {"submitter": manifest["spec"]["submitterPodTemplate"]["spec"]}
    return {name: group["template"]["spec"] for name, group in groups(manifest).items()}


def all_pods() -> Iterator[tuple[str, Manifest]]:
    for size in SIZES:
        for manifest in (ray_cluster(size), rendered(f"sweeps/{size}", "RayJob")):
            for name, pod in pods(manifest).items():
                yield f"{size} {name}", pod


def as_penstock_sees_it(cluster: Manifest) -> Cluster:
    """The nodes that are there at the least, and what may be added, as Ray's own autoscaler reads the manifest."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    types, at_most = types_of(cluster)
    workers = [kind.node for kind in types for _ in range(kinds[kind.name]["min_workers"])]
    return growing([Node(kinds["headgroup"]["resources"]), *workers], (types, at_most))


# ---- well-formed


@pytest.mark.parametrize("folder", ["base", *CLUSTERS, *SWEEPS])
def test_the_renderer_of_these_tests_and_kubectl_agree(folder: str) -> None:
    if (real := render_with_kubectl(FOLDER / folder)) is None:
        pytest.skip("no kubectl with kustomize 4.5 or newer")

    def by_name(each: Manifest) -> tuple[str, str]:
        return each["kind"], each["metadata"]["name"]

    assert sorted(manifests(folder), key=by_name) == sorted(real, key=by_name)


@pytest.mark.parametrize("folder", [*CLUSTERS, *SWEEPS])
def test_an_api_server_takes_every_manifest(folder: str) -> None:
    namespaces = {each["metadata"]["namespace"] for each in manifests(folder) if each["kind"] != "Namespace"}
    assert namespaces == {"penstock"}
    found = {each["kind"]: problems(each, schema_of(each["kind"])) for each in manifests(folder)}
    assert not any(found.values()), found


HOSTS = "/spec/workerGroupSpecs/0"
BOX = f"{HOSTS}/template/spec/containers/0"


@pytest.mark.parametrize(
    ("operation", "said"),
    [
        ({"op": "add", "path": f"{BOX}/imagePullpolicy", "value": "Always"}, "imagePullpolicy"),
        ({"op": "add", "path": f"{HOSTS}/minReplica", "value": 1}, "minReplica"),
        ({"op": "remove", "path": f"{HOSTS}/maxReplicas"}, "maxReplicas"),
        ({"op": "replace", "path": f"{HOSTS}/maxReplicas", "value": "4"}, "'4' is not of type 'integer'"),
        ({"op": "replace", "path": f"{HOSTS}/rayStartParams/object-store-memory", "value": 2}, "not of type 'string'"),
        ({"op": "replace", "path": "/spec/authOptions/mode", "value": "password"}, "'password' is not one of"),
        ({"op": "replace", "path": "/spec/autoscalerOptions/version", "value": "v3"}, "'v3' is not one of"),
        ({"op": "replace", "path": f"{BOX}/resources/limits/memory", "value": "48 GB"}, "48 GB"),
        ({"op": "add", "path": f"{BOX}/ports/-", "value": {"name": "two", "containerPort": 8080}}, "stands twice"),
        ({"op": "add", "path": "/metadata/lables", "value": {}}, "lables"),
    ],
)  # fmt: skip
def test_the_schema_finds_what_an_api_server_would_refuse(operation: Manifest, said: str) -> None:
    found = problems(changed(ray_cluster("small"), operation), schema_of("RayCluster"))
    assert found and said in found[0]


@pytest.mark.parametrize("size", SIZES)
def test_kuberay_takes_the_cluster_and_the_job(size: str) -> None:
    """What the operator checks beyond the schema (`ValidateRayClusterSpec`, `ValidateRayJobSpec`)."""
    cluster, job = ray_cluster(size), rendered(f"sweeps/{size}", "RayJob")
    for manifest in (cluster, job):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", manifest["metadata"]["name"])
        assert len(manifest["metadata"]["name"]) <= 47
    for name, group in groups(cluster).items():
        given = group["rayStartParams"].keys()
        assert "labels" not in given, f"{name}: labels are the group's own field"
        assert not (group.get("resources") and given & {"num-cpus", "num-gpus", "memory", "resources"}), name
        assert group["template"]["spec"].get("restartPolicy", "Never") == "Never", "autoscaler v2 takes no other"
    job = job["spec"]
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["backoffLimit"] == 0 and job["submissionMode"] == "K8sJobMode", "all that a clusterSelector takes"
    assert not job["shutdownAfterJobFinishes"] and "ttlSecondsAfterFinished" not in job
    assert job["submitterPodTemplate"]["spec"]["restartPolicy"] in ("Never", "OnFailure")
    assert job["activeDeadlineSeconds"] > 0


# ---- what Penstock asks for


@pytest.mark.parametrize(("size", "at_least", "at_most"), [("small", 1, 2), ("large", 4, 16)], ids=SIZES)
def test_the_sweep_starts_on_the_smallest_cluster_and_fills_the_largest(size: str, at_least: int, at_most: int) -> None:
    """`at_least` and `at_most` packs side by side."""
    resources, cluster = shipped_spec(size).resources, as_penstock_sees_it(ray_cluster(size))
    assert Cluster(cluster.nodes).pack_slots(resources) == at_least
    assert cluster.pack_slots(resources) == at_most


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("group", "field"), [("model-hosts", "host_labels"), ("packs", "pack_labels")])
def test_without_a_groups_label_its_sweep_is_refused(size: str, group: str, field: str) -> None:
    resources, whole = shipped_spec(size).resources, ray_cluster(size)
    index = [each["groupName"] for each in whole["spec"]["workerGroupSpecs"]].index(group)
    bare = changed(whole, {"op": "remove", "path": f"/spec/workerGroupSpecs/{index}/labels"})
    with pytest.raises(SweepError, match=rf"resources\.{field}: penstock/role"):
        as_penstock_sees_it(bare).pack_slots(resources)


@pytest.mark.parametrize("size", SIZES)
def test_each_group_holds_its_own_kind_and_nothing_else(size: str) -> None:
    """GPUs of one role are not taken by the other, and nothing runs on the head."""
    resources = shipped_spec(size).resources
    by_role = {group["labels"]["penstock/role"]: group for group in ray_cluster(size)["spec"]["workerGroupSpecs"]}
    assert by_role.keys() == {"model-host", "pack"}
    assert resources.host_labels == {"penstock/role": "model-host"} and resources.gpus_per_host > 0
    assert resources.pack_labels == {"penstock/role": "pack"} and resources.gpus_per_pack > 0
    (head, *_) = as_penstock_sees_it(ray_cluster(size)).nodes
    assert head.resources["CPU"] == 0 and not head.resources.get("GPU") and not head.labels
    assert by_role["model-host"]["minReplicas"] >= resources.model_hosts, "a sweep begins with them"
    assert all(group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] for group in by_role.values())


@pytest.mark.parametrize("size", SIZES)
def test_object_stores_fit_shared_memory_which_fits_the_container(size: str) -> None:
    for name, group in groups(ray_cluster(size)).items():
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        store = int(group["rayStartParams"]["object-store-memory"])
        (mount,) = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm"]
        (volume,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == mount]
        assert volume["medium"] == "Memory"
        shared, memory = amount(volume["sizeLimit"]), amount(container["resources"]["limits"]["memory"])
        assert store < shared, f"{name}: Ray would put its objects on disk"
        assert memory - shared >= 12 * 2**30, f"{name}: too little is left for processes"


def described(spec: SweepSpec) -> ModelDescription:
    width, layers = MODELS[spec.model.name]
    hooks = {f"blocks.{layer}.hook_resid_post": width for layer in range(layers)}
    return ModelDescription(spec.model.name, layers, width, 1024, 50257, 10**8, "", hooks)


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_object_store_holds_the_window_of_the_shipped_sweep(size: str) -> None:
    spec = shipped_spec(size)
    model = described(spec)
    packs = plan_packs(spec, plan_saes(spec, model, train_id=""))
    stores = [int(group["rayStartParams"]["object-store-memory"]) for group in groups(ray_cluster(size)).values()]
    blocks = min(stores) * WINDOW_SHARE / memory_of_block(spec, model, packs)
    assert blocks >= WINDOW_LIMITS[0]


@pytest.mark.parametrize("size", SIZES)
def test_the_shipped_sweep_makes_the_saes_and_packs_that_it_speaks_of(size: str) -> None:
    text = (FOLDER / f"sweeps/{size}/sweep.yaml").read_text()
    spec = shipped_spec(size)
    model = described(spec)
    assert {site.reads for site in spec.sites} <= model.hook_points.keys()
    trained = [sae for sae in plan_saes(spec, model, train_id="") if sae.baseline is None]
    assert len(trained) == int(re.search(r"(\d+) SAEs", text)[1])
    assert len(plan_packs(spec, plan_saes(spec, model, train_id=""))) == len(spec.sites), "a GPU's memory is enough"


@pytest.mark.parametrize("size", SIZES)
def test_every_pod_mounts_the_same_volume_and_the_sweeps_paths_lie_on_it(size: str) -> None:
    claim = rendered(f"overlays/{size}", "PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    places = set()
    for pod in pods(ray_cluster(size)).values():
        (volume,) = [each for each in pod["volumes"] if "persistentVolumeClaim" in each]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        (mount,) = [each for each in container["volumeMounts"] if each["name"] == volume["name"]]
        assert not mount.get("readOnly")
        places.add(mount["mountPath"])
        home = {each["name"]: each.get("value") for each in container["env"]}
        assert home["PENSTOCK_HOME"].startswith(f"{mount['mountPath']}/")
        assert home["HF_HOME"].startswith(f"{mount['mountPath']}/")
        assert pod["securityContext"]["fsGroup"] == 1000, "the image's user writes there"
    (place,) = places
    assert shipped_spec(size).storage.startswith(f"file://{place}/")


@pytest.mark.parametrize("size", SIZES)
def test_the_job_runs_the_spec_of_the_config_map(size: str) -> None:
    job, config = (rendered(f"sweeps/{size}", kind) for kind in ("RayJob", "ConfigMap"))
    pod = job["spec"]["submitterPodTemplate"]["spec"]
    (volume,) = pod["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"] == job["metadata"]["name"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]) == {"working_dir": mount["mountPath"]}
    program, command, file = shlex.split(job["spec"]["entrypoint"])
    assert (program, command) == ("penstock", "run") and set(config["data"]) == {file}
    assert program in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert shipped_spec(size).name == job["metadata"]["name"]
    assert config["data"][file] == (FOLDER / f"sweeps/{size}/sweep.yaml").read_text()


# ---- versions


def test_manifests_name_the_images_version_and_the_pinned_ray() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    labels = re.findall(r'image\.title="(\S+)" \S+image\.version="(\S+)"', text)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert ("penstock", version) in labels
    images = {container["image"] for _, pod in all_pods() for container in pod["containers"]}
    assert images == {f"registry.example.com/penstock:{version}"}
    bare = {each["image"] for pod in pods(rendered("base", "RayCluster")).values() for each in pod["containers"]}
    assert bare == {"penstock"}, "what `images:` of the overlays replaces"
    (pinned,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {ray_cluster(size)["spec"]["rayVersion"] for size in SIZES} == {pinned}


# ---- safe


@pytest.mark.parametrize("size", SIZES)
def test_ray_asks_for_a_token_that_no_manifest_holds(size: str) -> None:
    cluster = ray_cluster(size)
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for name, pod in pods(cluster).items():
        for variable in pod["containers"][0]["env"]:
            if not {"PENSTOCK_HOME", "HF_HOME"} & {variable["name"]}:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference == {"name": "penstock-secrets", "key": variable["name"], "optional": True}, name
    kinds = {each["kind"] for folder in (*CLUSTERS, *SWEEPS) for each in manifests(folder)}
    assert "Secret" not in kinds


def test_only_the_head_gets_what_only_the_driver_needs() -> None:
    given = {
        name: {each["name"] for each in pod["containers"][0]["env"] if "valueFrom" in each}
        for name, pod in pods(ray_cluster("small")).items()
    }
    storage = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "HF_TOKEN"}
    tracking = {"MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY"}
    assert given == {"head": storage | tracking, "model-hosts": storage, "packs": storage}


def test_pods_meet_the_restricted_pod_security_standard() -> None:
    namespace = rendered("base", "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    allowed = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    autoscaler = ray_cluster("small")["spec"]["autoscalerOptions"]
    contexts = [("autoscaler", autoscaler["securityContext"])]
    for name, pod in all_pods():
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys(), name
        assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"]), name
        contexts += [(name, container["securityContext"]) for container in pod["containers"]]
        assert not any("hostPort" in port for each in pod["containers"] for port in each.get("ports", [])), name
    for name, context in contexts:
        assert context["runAsNonRoot"] and context["runAsUser"] == 1000, name
        assert context["allowPrivilegeEscalation"] is False and not context.get("privileged"), name
        assert context["capabilities"] == {"drop": ["ALL"]}, name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, name


def test_only_the_autoscaler_may_talk_to_kubernetes() -> None:
    account = rendered("overlays/small", "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    for name, pod in all_pods():
        assert pod["automountServiceAccountToken"] is False, name
        head = name.endswith(" head")
        assert head or pod["serviceAccountName"] == account["metadata"]["name"], name
        tokens = {each["name"] for each in pod["volumes"] if "projected" in each}
        assert tokens == ({"kubernetes-api"} if head else set()), name
        assert not any(mount["name"] in tokens for each in pod["containers"] for mount in each["volumeMounts"]), name
    from ray.autoscaler._private.kuberay import node_provider

    for size in SIZES:
        (mount,) = ray_cluster(size)["spec"]["autoscalerOptions"]["volumeMounts"]
        files = {"token", "ca.crt", "namespace"}
        assert mount["name"] == "kubernetes-api" and mount["readOnly"]
        for path in (node_provider.IN_CLUSTER_TOKEN_PATH, node_provider.IN_CLUSTER_CA_CERT_PATH):
            folder, _, file = path.rpartition("/")
            assert folder == mount["mountPath"] and file in files


def test_pods_get_what_they_ask_for_and_no_more() -> None:
    spec = ray_cluster("small")["spec"]["autoscalerOptions"]
    resources = [("autoscaler", spec["resources"])]
    resources += [(name, container["resources"]) for name, pod in all_pods() for container in pod["containers"]]
    for name, given in resources:
        assert given["requests"] == given["limits"] and {"cpu", "memory"} <= given["limits"].keys(), name


@pytest.mark.parametrize("size", SIZES)
def test_nothing_is_reachable_from_outside_the_cluster(size: str) -> None:
    assert {each["kind"] for each in manifests(f"overlays/{size}")} == {
        *("Namespace", "PersistentVolumeClaim", "ServiceAccount", "NetworkPolicy", "RayCluster"),
    }, "no Ingress, no Service of our own"
    head = ray_cluster(size)["spec"]["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and not head.get("enableIngress") and "headService" not in head
    policy = rendered(f"overlays/{size}", "NetworkPolicy")["spec"]
    assert policy["podSelector"] == {} and policy["policyTypes"] == ["Ingress"]
    own, operator, metrics = policy["ingress"]
    assert own == {"from": [{"podSelector": {}}]}, "pods of this namespace"
    assert operator["from"] == [{
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }]  # fmt: skip
    assert [port["port"] for port in operator["ports"]] == [8265]
    assert metrics["from"] == [{"namespaceSelector": {"matchLabels": {"penstock/metrics": "allowed"}}}]
    declared = {port["name"]: port["containerPort"] for port in head["template"]["spec"]["containers"][0]["ports"]}
    scraped = {declared[name] for name in ("metrics", "as-metrics", "dash-metrics")}
    assert {port["port"] for port in metrics["ports"]} == scraped and 8265 not in scraped


def test_the_readme_names_folders_and_objects_that_are_there() -> None:
    text = (FOLDER / "README.md").read_text()
    for folder in re.findall(r"-k (cluster/[\w/-]+)", text):
        assert (ROOT / folder).is_dir(), folder
    cluster: Any = ray_cluster("small")
    assert f"svc/{cluster['metadata']['name']}-head-svc" in text
    assert f"secret {cluster['metadata']['name']} " in text, "where the operator puts Ray's token"
    for name in re.findall(r"get rayjob ([a-z0-9-]+)", text):
        assert name in {rendered(folder, "RayJob")["metadata"]["name"] for folder in SWEEPS}
