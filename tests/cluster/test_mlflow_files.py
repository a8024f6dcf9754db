"""compose.yaml and the Kubernetes manifests of the MLflow server: well-formed, closed by default, and both the same
server, which is serve.sh (test_mlflow_server.py runs that one)."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "cluster/mlflow"
SECRETS = {"PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
STORES, SPARE, RESERVED = 3, 5, 3  # as serve.sh counts, and what PostgreSQL keeps for its administrator
# Of https://github.com/compose-spec/compose-spec/blob/main/05-services.md; docker compose refuses others.
SERVICE_KEYS = {
    "image", "build", "command", "environment", "volumes", "networks", "shm_size", "healthcheck", "restart",
    "security_opt", "depends_on", "ports", "stop_grace_period", "read_only", "cap_drop",
}  # fmt: skip
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def manifests() -> dict[tuple[str, str], dict[str, Any]]:
    """By (kind, name), as kubectl would send them."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "k8s"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = list(yaml.safe_load_all(done.stdout))
    return {(item["kind"], re.sub(r"-[a-z0-9]{10}$", "", item["metadata"]["name"])): item for item in found}


def variables(text: str) -> set[str]:
    return set(re.findall(r"\b(?:MLFLOW_[A-Z0-9_]+|PGPASSWORD)\b", text))


def connections(settings: dict[str, str]) -> int:
    workers, pool, overflow = (int(settings[name]) for name in (
        "MLFLOW_WORKERS", "MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW"))  # fmt: skip
    return STORES * (workers * (pool + overflow) + 1) + SPARE


def max_connections(command: list[str]) -> int:
    return int(re.search(r"max_connections=(\d+)", " ".join(command))[1])


def default_of(text: str) -> str:
    """What compose puts in for `${NAME:-default}` where NAME is not set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


# ---- compose --------------------------------------------------------------------------------------------------------


def test_compose_has_no_key_that_it_would_refuse_and_every_reference_is_there(compose):
    assert compose.keys() <= {"name", "services", "networks", "volumes"}
    for name, service in compose["services"].items():
        assert service.keys() <= SERVICE_KEYS, name
        assert service["healthcheck"].keys() <= HEALTH_KEYS and service["healthcheck"]["test"][0] == "CMD"
        assert all(isinstance(value, str) for value in service["environment"].values())
        assert set(service["networks"]) <= compose["networks"].keys()
        named = {volume.split(":")[0] for volume in service["volumes"]}
        assert named <= compose["volumes"].keys()
        for needed, condition in service.get("depends_on", {}).items():
            assert needed in compose["services"] and condition == {"condition": "service_healthy"}
    build = compose["services"]["mlflow"]["build"]
    context = (FOLDER / build["context"]).resolve()
    dockerfile = (context / build["dockerfile"]).read_text()
    assert f" AS {build['target']}\n" in dockerfile and "COPY --chmod=755 cluster/mlflow/serve.sh" in dockerfile


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="docker's compose plugin is not installed",
)
def test_docker_compose_takes_the_file(tmp_path):
    environment = tmp_path / ".env"
    environment.write_text("".join(f"{name}=0123456789abcdef\n" for name in sorted(SECRETS)))
    command = ["docker", "compose", "--file", FOLDER / "compose.yaml", "--env-file", environment, "config", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_compose_publishes_on_loopback_only_and_takes_secrets_from_the_environment_alone(compose):
    postgres, mlflow = compose["services"]["postgres"], compose["services"]["mlflow"]
    assert "ports" not in postgres and postgres["networks"] == ["database"]
    assert compose["networks"]["database"] == {"internal": True}
    assert mlflow["ports"] == ["127.0.0.1:5000:5000"]
    for name in SECRETS:
        assert mlflow["environment"][name].startswith(f"${{{name}:?")  # refused where it is not set
    assert postgres["environment"]["POSTGRES_PASSWORD"].startswith("${PGPASSWORD:?")
    assert mlflow["read_only"] and mlflow["cap_drop"] == ["ALL"]


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def pods(manifests):
    for (kind, name), item in manifests.items():
        if kind in ("Deployment", "StatefulSet"):
            yield name, item["spec"]["template"]


def test_manifests_point_at_what_is_there(manifests):
    assert {item["metadata"].get("namespace", "") for (kind, _), item in manifests.items() if kind != "Namespace"} == {
        manifests["Namespace", "penstock-mlflow"]["metadata"]["name"]
    }
    of_pods = {name: pod["metadata"]["labels"] for name, pod in pods(manifests)}
    for (kind, name), item in manifests.items():
        spec = item.get("spec", {})
        if kind == "Service":
            assert spec["selector"].items() <= of_pods[name].items()
            ports = {port.get("name"): port["containerPort"] for port in containers(manifests, name)[0]["ports"]}
            assert all(port["port"] in ports.values() for port in spec["ports"])
        if kind in ("Deployment", "StatefulSet"):
            assert spec["selector"]["matchLabels"].items() <= of_pods[name].items()
            assert spec["replicas"] == 1
        if kind == "NetworkPolicy" and spec["podSelector"]:
            assert spec["podSelector"]["matchLabels"].items() <= of_pods[name].items()
    generated = manifests["ConfigMap", "mlflow"]["metadata"]["name"]
    assert containers(manifests, "mlflow")[0]["envFrom"] == [
        {"configMapRef": {"name": generated}}, {"secretRef": {"name": "mlflow"}}]  # fmt: skip
    for name, pod in pods(manifests):
        claims = {claim["metadata"]["name"] for claim in spec_of(manifests, name).get("volumeClaimTemplates", [])}
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]} | claims
        assert {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]} == volumes
    assert not [kind for kind, _ in manifests if kind in ("Secret", "Ingress")]  # the group's own


def containers(manifests, name: str) -> list[dict[str, Any]]:
    return next(pod for of, pod in pods(manifests) if of == name)["spec"]["containers"]


def spec_of(manifests, name: str) -> dict[str, Any]:
    return next(item["spec"] for (kind, of), item in manifests.items()
                if of == name and kind in ("Deployment", "StatefulSet"))  # fmt: skip


def test_pods_keep_to_the_restricted_standard_and_are_probed(manifests):
    labels = manifests["Namespace", "penstock-mlflow"]["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    for _, pod in pods(manifests):
        assert pod["spec"]["automountServiceAccountToken"] is False
        for container in pod["spec"]["containers"]:
            secured = container["securityContext"]
            assert secured["runAsNonRoot"] and secured["runAsUser"] > 0 and secured["readOnlyRootFilesystem"]
            assert secured["allowPrivilegeEscalation"] is False and secured["capabilities"] == {"drop": ["ALL"]}
            assert secured["seccompProfile"] == {"type": "RuntimeDefault"}
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]


def test_postgresql_is_reached_by_mlflow_alone_and_mlflow_by_namespaces_that_are_let_in(manifests):
    assert manifests["NetworkPolicy", "nothing"]["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    database = manifests["NetworkPolicy", "postgres"]["spec"]
    (rule,) = database["ingress"]
    assert rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": 5432}]
    assert "Egress" in database["policyTypes"] and not database.get("egress")
    (rule,) = manifests["NetworkPolicy", "mlflow"]["spec"]["ingress"]
    assert all(set(source) == {"namespaceSelector"} and source["namespaceSelector"] for source in rule["from"])
    assert manifests["Service", "mlflow"]["spec"]["type"] == "ClusterIP"


# ---- both -----------------------------------------------------------------------------------------------------------


def test_both_run_serve_with_settings_it_knows_and_pools_that_the_database_can_hold(compose, manifests):
    known = variables((FOLDER / "serve.sh").read_text())
    of_compose = {name: default_of(value) for name, value in compose["services"]["mlflow"]["environment"].items()}
    of_pods = manifests["ConfigMap", "mlflow"]["data"]
    assert compose["services"]["mlflow"]["command"] == containers(manifests, "mlflow")[0]["command"] == ["serve.sh"]
    for settings, command in (
        (of_compose, compose["services"]["postgres"]["command"]),
        (of_pods, containers(manifests, "postgres")[0]["args"]),
    ):
        assert variables(" ".join(settings)) <= known
        assert connections(settings) <= max_connections(command) - RESERVED
        assert connections(settings | {"MLFLOW_WORKERS": "3"}) <= max_connections(command) - RESERVED
    for name in of_pods.keys() & of_compose.keys() - {"MLFLOW_SERVER_ALLOWED_HOSTS"}:
        assert of_pods[name] == of_compose[name], name
    assert f"{connections(of_pods)} for MLflow" in (FOLDER / "compose.yaml").read_text()
    assert f"{connections(of_pods)} for MLflow" in (FOLDER / "k8s/postgres.yaml").read_text()


def test_shell_scripts_are_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", FOLDER / "serve.sh"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
