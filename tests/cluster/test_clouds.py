"""`cluster/aws.yaml` and `gcp.yaml`: valid for `ray up`, what Penstock asks for, and nothing open to the outside."""

import copy
import functools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.errors import SweepError
from penstock.live_cluster import growing, types_of
from penstock.placement import Cluster, Node
from penstock.spec import load_spec

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ("aws", "gcp")
# CPUs and GPUs of the machine types, from the clouds' own tables.
MACHINES = {
    "m6i.4xlarge": (16, 0),
    "g6.4xlarge": (16, 1),
    "g6e.4xlarge": (16, 1),
    "n2-standard-16": (16, 0),
    "g2-standard-16": (16, 1),
    "a2-highgpu-1g": (12, 1),
}
Config = dict[str, Any]


@functools.cache
def given(cloud: str) -> Config:
    """As written; only read it."""
    return yaml.safe_load((ROOT / f"cluster/{cloud}.yaml").read_text())


@functools.cache
def prepared(cloud: str) -> Config:
    """With Ray's defaults for the cloud filled in, as `ray up` does before it asks the cloud anything."""
    from ray.autoscaler._private.util import prepare_config

    return prepare_config(copy.deepcopy(given(cloud)))


def machine_type(node: Config) -> str:
    return node["node_config"].get("InstanceType") or node["node_config"]["machineType"]


def is_spot(node: Config) -> bool:
    scheduling = node["node_config"].get("scheduling", {})
    market = node["node_config"].get("InstanceMarketOptions", {}).get("MarketType")
    return market == "spot" or scheduling.get("provisioningModel") == "SPOT" or bool(scheduling.get("preemptible"))


def as_penstock_sees_it(config: Config) -> Cluster:
    """The nodes that are there at the least, and what may be added."""
    kinds = config["available_node_types"]
    types, at_most = types_of(config)
    workers = [kind.node for kind in types for _ in range(kinds[kind.name]["min_workers"])]
    return growing([Node(kinds[config["head_node_type"]]["resources"]), *workers], (types, at_most))


def commands(config: Config) -> list[str]:
    return [command for name, value in config.items() if name.endswith("_commands") for command in value]


# ---- valid


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_takes_the_file(cloud: str) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(cloud))
    assert set(given(cloud)) <= set(prepared(cloud))
    assert prepared(cloud)["docker"] == {}


def test_ec2_takes_every_nodes_settings() -> None:
    """By the request's own model, as botocore checks it before it sends anything."""
    botocore = pytest.importorskip("botocore.session")
    from botocore.validate import ParamValidator

    asked = botocore.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for name, kind in given("aws")["available_node_types"].items():
        request = kind["node_config"] | {"MinCount": 1, "MaxCount": 1}
        assert not (report := ParamValidator().validate(request, asked)).has_errors(), (name, report.generate_report())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_worker": 3}, "max_worker"),
        ({"max_workers": "3"}, "is not of type 'integer'"),
        ({"setup_commands": "pip install penstock"}, "is not of type 'array'"),
    ],
)
def test_rays_check_finds_mistakes(change: Config, said: str) -> None:
    import jsonschema
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(jsonschema.ValidationError, match=said):
        validate_config(prepared("aws") | change)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_default_of_rays_installs_or_starts_anything(cloud: str) -> None:
    """What a file leaves out comes from Ray's defaults, which install packages of no fixed version."""
    ours, run = given(cloud), prepared(cloud)
    assert run["head_setup_commands"] == run["worker_setup_commands"] == ours["setup_commands"]
    assert run["initialization_commands"] == []
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        assert run[name] == ours[name]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_commands_are_shell(cloud: str) -> None:
    for command in commands(given(cloud)):
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"
        if shutil.which("shellcheck"):
            # 1090: a file that is on the nodes; 2016: variables that are written to ~/.bashrc as they stand
            arguments = ["shellcheck", "--shell=bash", "--exclude=SC1090,SC2016", "-"]
            linted = subprocess.run(arguments, input=command, capture_output=True, text=True)
            assert linted.returncode == 0, f"{command}: {linted.stdout}"


# ---- what Penstock asks for


@pytest.mark.parametrize(("cloud", "at_most"), [("aws", 4), ("gcp", 4)])
def test_a_shipped_sweep_starts_on_the_smallest_cluster_and_fills_the_largest(cloud: str, at_most: int) -> None:
    resources = load_spec(ROOT / "cluster/kuberay/sweeps/small/sweep.yaml").resources
    cluster = as_penstock_sees_it(prepared(cloud))
    assert Cluster(cluster.nodes).pack_slots(resources) == 1
    assert cluster.pack_slots(resources) == at_most


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(("kind", "field"), [("model-host", "host_labels"), ("pack", "pack_labels")])
def test_without_a_label_the_sweep_is_refused(cloud: str, kind: str, field: str) -> None:
    resources = load_spec(ROOT / "cluster/kuberay/sweeps/small/sweep.yaml").resources
    bare = copy.deepcopy(prepared(cloud))
    del bare["available_node_types"][kind]["labels"]
    with pytest.raises(SweepError, match=rf"resources\.{field}: penstock/role"):
        as_penstock_sees_it(bare).pack_slots(resources)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_hosts_are_on_spot_machines_and_nothing_else_is(cloud: str) -> None:
    kinds = given(cloud)["available_node_types"]
    assert kinds.keys() == {"head", "model-host", "pack"} and given(cloud)["head_node_type"] == "head"
    assert {name for name, kind in kinds.items() if is_spot(kind)} == {"model-host"}
    for name, kind in kinds.items():
        cpus, gpus = MACHINES[machine_type(kind)]
        assert kind["resources"].get("GPU", 0) == gpus == (0 if name == "head" else 1), name
        assert kind["resources"]["CPU"] == (0 if name == "head" else cpus), name
        assert kind.get("labels", {}) == ({} if name == "head" else {"penstock/role": name})
    assert given(cloud)["provider"]["cache_stopped_nodes"] is False, "a stopped spot machine does not come back"
    if cloud == "gcp":  # machines with GPUs cannot be moved while they run
        for name in ("model-host", "pack"):
            assert kinds[name]["node_config"]["scheduling"]["onHostMaintenance"] == "TERMINATE"


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_get_the_locked_packages_and_this_projects_code(cloud: str) -> None:
    mounts = given(cloud)["file_mounts"]
    shipped = {remote: local for remote, local in mounts.items() if remote.startswith("~/penstock/")}
    for remote, local in shipped.items():
        assert remote == f"~/penstock/{local}" and (ROOT / local).exists(), local
    needed = {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "sae_core", "platform", "dashboards"}
    assert set(shipped.values()) == needed, "what `pip install .` reads, and no results or virtual environment"
    (install,) = [command for command in given(cloud)["setup_commands"] if "uv pip install" in command]
    assert "--constraint ~/penstock/constraints.txt ~/penstock" in install
    (environment,) = [command for command in given(cloud)["setup_commands"] if "uv venv" in command]
    assert "--python 3.11 ~/venv" in environment and "--python ~/venv" in install
    for command in given(cloud)["setup_commands"]:
        for wanted in re.findall(r"\b(uv|google-api-python-client)(?=[=<>])(\S+)", command):
            assert wanted[1].startswith("=="), wanted


# ---- safe


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_node_asks_for_the_token_which_is_a_file_of_the_user(cloud: str) -> None:
    config = given(cloud)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token", "where `ray get-auth-token` puts it"
    starts = [command for command in commands(config) if "ray start" in command]
    assert len(starts) == 2
    for start in starts:
        assert start.index("export RAY_AUTH_MODE=token;") < start.index("ray start")
        assert start.index("set -a; . ~/.penstock.env; set +a;") < start.index("ray start")
    protected = next(command for command in config["setup_commands"] if command.startswith("chmod 600"))
    assert {"~/.ray/auth_token", "~/.penstock.env"} <= set(protected.split())
    text = (ROOT / f"cluster/{cloud}.yaml").read_text()
    assert not re.search(r"RAY_AUTH_TOKEN=|AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|PASSWORD=|BEGIN [A-Z ]*PRIVATE", text)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_dashboard_is_on_the_heads_loopback_alone(cloud: str) -> None:
    config = given(cloud)
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1 " in head
    assert "0.0.0.0" not in yaml.safe_dump(config)
    assert "IpPermissions" not in yaml.safe_dump(config), "no port but those that Ray opens: ssh, and among the nodes"


def test_all_that_ray_opens_on_aws_is_ssh_and_the_nodes_among_themselves() -> None:
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    extended = given("aws")["provider"]["security_group"].get("IpPermissions", [])
    rules = _create_default_inbound_rules({"sg-of-the-cluster"}, extended)
    among, ssh = rules
    assert among["UserIdGroupPairs"] == [{"GroupId": "sg-of-the-cluster"}] and "IpRanges" not in among
    assert (ssh["FromPort"], ssh["ToPort"]) == (22, 22)


def test_machines_on_aws_are_closed_to_requests_forged_through_them() -> None:
    for kind in given("aws")["available_node_types"].values():
        machine = kind["node_config"]
        assert machine["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        for disk in machine["BlockDeviceMappings"]:
            assert disk["Ebs"]["Encrypted"] and disk["Ebs"]["DeleteOnTermination"]


# ---- what nodes may do


class _Template(yaml.SafeLoader):
    """CloudFormation's short forms (`!Ref NAME`) as mappings."""


for _form in ("Ref", "Sub", "GetAtt"):
    _Template.add_constructor(f"!{_form}", lambda loader, node, form=_form: {form: loader.construct_scalar(node)})


def test_nodes_on_aws_have_the_profiles_of_the_stack_which_allow_one_bucket() -> None:
    stack = yaml.load((ROOT / "cluster/aws-roles.yaml").read_text(), Loader=_Template)["Resources"]
    kinds = given("aws")["available_node_types"]
    wanted = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert wanted == {"head": "penstock-head", "model-host": "penstock-node", "pack": "penstock-node"}
    profiles = {each["Properties"]["InstanceProfileName"]: each["Properties"]["Roles"][0]["Ref"]
                for each in stack.values() if each["Type"] == "AWS::IAM::InstanceProfile"}  # fmt: skip
    assert set(profiles) == set(wanted.values())
    assert stack[profiles["penstock-node"]]["Properties"].get("Policies", []) == [], "the bucket alone"
    (machines,) = stack[profiles["penstock-head"]]["Properties"]["Policies"]
    statements = machines["PolicyDocument"]["Statement"] + stack["Storage"]["Properties"]["PolicyDocument"]["Statement"]
    for statement in statements:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        assert not any("*" in action for action in actions)
        if any(action.startswith("s3:") for action in actions):
            assert "${Bucket}" in statement["Resource"]["Sub"]
        if "ec2:TerminateInstances" in actions:
            tag = statement["Condition"]["StringEquals"]["ec2:ResourceTag/ray-cluster-name"]
            assert tag == given("aws")["cluster_name"]
        if "iam:PassRole" in actions:
            assert statement["Resource"] == {"GetAtt": f"{profiles['penstock-node']}.Arn"}
