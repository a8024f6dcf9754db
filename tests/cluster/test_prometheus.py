"""A real Prometheus scrapes a real sweep on a Ray of two nodes: every query of the dashboard has an answer, and alerts
fire for what really happens to it."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "ray"))
from ray_head import free_port, penstock, running_head, wait_for  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (apt-get install)"),
]

GRAFANA = ROOT / "dashboards" / "grafana"
# Two packs, each with an SAE of six (two are baselines) that diverges; checkpoints on the way.
SPEC = """\
name: watched
storage: file://HOME
model: {name: demo}
data:
  {dataset: demo, context_size: 64, search_tokens: 1k, report_tokens: 2k, block_tokens: 4096, spool: "file://HOME/spool"}
hook_points: [blocks.1.hook_resid_post, blocks.4.hook_resid_post]
train: {tokens: TOKENS, batch_tokens: 256, lr: 1.0e-3, checkpoints: 4}
saes:
  - {architecture: topk, d_sae: 8x, k: [4, 16]}
  - {architecture: standard, d_sae: 8x, l1_coefficient: 1}
  - {architecture: standard, d_sae: 8x, l1_coefficient: 2, lr: 1.0e+6}  # this one diverges
resources: {model_hosts: 1, cpus_per_host: 0.5, cpus_per_pack: 0.75}
"""
# What Grafana puts in place of its own variables.
IN_GRAFANA = {"$__rate_interval": "1m", "$__range": "1h", "$sweep": ".+", "$cluster": ".+"}


class Prometheus:
    """A running Prometheus, and what it answers."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression comes to now; `ValueError` where Prometheus cannot make sense of it."""
        return self._get("query", query=expression)["result"]

    def number(self, expression: str) -> float:
        (found,) = self.ask(expression)
        return float(found["value"][1])

    def firing(self) -> dict[str, dict[str, Any]]:
        """The alerts that fire, by name."""
        alerts = self._get("alerts")["alerts"]
        return {alert["labels"]["alertname"]: alert for alert in alerts if alert["state"] == "firing"}

    def failed_rules(self) -> dict[str, str]:
        rules = [rule for group in self._get("rules")["groups"] for rule in group["rules"]]
        return {rule["name"]: rule["lastError"] for rule in rules if rule["health"] == "err"}

    def _get(self, path: str, **query: str) -> dict[str, Any]:
        try:
            url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{query}: {error.read().decode()}") from None


@pytest.fixture(scope="module")
def token():
    """All that is started here shows Ray this token, but for Prometheus: metrics are not behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        yield


@pytest.fixture(scope="module")
def head(token, tmp_path_factory):
    """A head that says it has a GPU, and a port of its own for each of its metrics: the usual ones may be taken."""
    first = free_port(7400)
    ports = {"AUTOSCALER_METRIC_PORT": str(first), "DASHBOARD_METRIC_PORT": str(free_port(first + 1))}
    with running_head(tmp_path_factory.mktemp("head") / "log", "--num-gpus=1", **ports) as head:
        yield head


@pytest.fixture(scope="module")
def second_node(head):
    """A node without anything to run on, as a process group of its own."""
    agent = free_port(7500)
    process = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", f"--address={head.address}", "--block", "--num-cpus=0",
         "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--object-store-memory=100000000",
         f"--temp-dir={head.folder}/second", "--disable-usage-stats"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def prometheus(head, second_node, tmp_path_factory):
    """Scrapes what Ray's own list of its nodes names, as the shipped configuration does, only more often."""
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port(9390)
    config = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "2s"}
    (scrape,) = config["scrape_configs"]
    discovery = {"files": [str(head.folder / "prom_metrics_service_discovery.json")], "refresh_interval": "2s"}
    scrape["file_sd_configs"] = [discovery]
    config["rule_files"] = [str(GRAFANA / "alerts.yaml")]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    log = folder / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["prometheus", f"--config.file={folder}/prometheus.yaml", f"--storage.tsdb.path={folder}/data",
             f"--web.listen-address=127.0.0.1:{port}"],
            stdout=output, stderr=output, start_new_session=True, env=environment,
        )  # fmt: skip
    asked = Prometheus(f"http://127.0.0.1:{port}")

    def scraped() -> bool:
        try:
            return len(asked.ask("up == 1")) == 4  # two nodes, the autoscaler, the dashboard
        except OSError:
            return False

    try:
        wait_for(scraped, process, log, 120)
        yield asked
    finally:
        process.terminate()
        process.wait()


class Sweep:
    """A sweep that runs: its driver's process, log and home."""

    def __init__(self, folder: Path, address: str, tokens: str, name: str) -> None:
        self.home, self.log = folder / "home", folder / f"{name}.log"
        spec = folder / f"{name}.yaml"
        spec.write_text(SPEC.replace("TOKENS", tokens).replace("HOME", str(self.home)).replace("watched", name))
        with self.log.open("w") as output:
            self.driver = subprocess.Popen(
                [sys.executable, "-m", "penstock.cli", "run", spec, "--address", address, "--home", self.home],
                stdout=output, stderr=output, cwd=folder,
            )  # fmt: skip

    def wait_for(self, condition, seconds=300.0):
        wait_for(condition, self.driver, self.log, seconds)


def queries() -> dict[str, str]:
    """Every query of every panel, the dashboard's annotations and its variables, by what it is for."""
    dashboard = json.loads((GRAFANA / "penstock.json").read_text())
    found = {}
    for panel in (inside for one in dashboard["panels"] for inside in (one, *one.get("panels", []))):
        for target in panel.get("targets", []):
            found[f"{panel['title']}, {target['refId']}"] = target["expr"]
    for variable in dashboard["templating"]["list"][1:]:
        asked = variable["query"]["query"]
        values = re.fullmatch(r"label_values\((.*), (\w+)\)", asked)
        found[f"variable {variable['name']}"] = (
            f"count by ({values[2]}) ({values[1]})" if values else re.fullmatch(r"query_result\((.*)\)", asked)[1]
        )
    for name, value in IN_GRAFANA.items():
        found = {what: expression.replace(name, value) for what, expression in found.items()}
    assert len(found) > 60 and not any("$" in expression for expression in found.values())
    return found


def test_every_query_has_an_answer_while_a_sweep_runs_and_alerts_fire_for_what_happens(
    head, second_node, prometheus, tmp_path
):
    sweep = Sweep(tmp_path, head.address, "1500k", "watched")
    try:
        left = queries()

        def answered() -> bool:
            for what in [what for what, expression in left.items() if prometheus.ask(expression)]:
                del left[what]
            return not left

        try:
            sweep.wait_for(answered, 600)
        except AssertionError:
            pytest.fail(f"without an answer: {json.dumps(left, indent=1)}\n{sweep.log.read_text()}")
        run = re.search(r"sweep id (\w+)", sweep.log.read_text())[1]
        assert {one["metric"]["sweep"] for one in prometheus.ask("ray_penstock_phase")} == {run}
        assert prometheus.number('sum(ray_resources{Name="GPU"})') == 1  # one that is said to be there
        assert prometheus.number('sum(ray_resources{Name="CPU"})') == 2
        assert prometheus.number("sum(ray_cluster_active_nodes)") == 2
        assert prometheus.number("sum(ray_object_store_used_memory + ray_object_store_available_memory)") == 5e8
        assert prometheus.number("sum(ray_penstock_saes)") == 12
        sweep.wait_for(lambda: prometheus.ask('ray_penstock_saes{status="diverged"} == 2'), 120)
        assert 0 < prometheus.number("max(ray_penstock_pack_progress)") <= 1
        assert not prometheus.failed_rules()

        os.killpg(second_node.pid, signal.SIGKILL)
        sweep.wait_for(lambda: {"PenstockNodeLost", "PenstockSAEsDiverged"} <= prometheus.firing().keys(), 180)
        alerts = prometheus.firing()
        assert alerts.keys() <= {"PenstockNodeLost", "PenstockSAEsDiverged", "PenstockSAEsWorseThanMean"}
        said = {name: alert["annotations"]["summary"] for name, alert in alerts.items()}
        assert said["PenstockNodeLost"] == f"1 node(s) left the cluster of sweep {run} within 10 minutes"
        assert said["PenstockSAEsDiverged"] == f"16.67% of the SAEs of sweep {run} have diverged"

        stopped = penstock("stop", "watched", home=sweep.home)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        assert sweep.driver.wait(120) == 3, sweep.log.read_text()
        # A driver that ends says so last of all; then Ray forgets its gauges, and those of its stream.
        ended = f'last_over_time(ray_penstock_driver_end_timestamp_seconds{{sweep="{run}", outcome="stopped"}}[5m])'
        wait_for(lambda: prometheus.ask(ended) and not prometheus.ask("ray_penstock_phase"), None, sweep.log, 60)
        assert prometheus.ask(f'ray_penstock_trained_tokens_total{{sweep="{run}"}}')  # counters stay
        wait_for(lambda: "PenstockNodeLost" not in prometheus.firing(), None, sweep.log, 30)
        time.sleep(10)
        assert not prometheus.firing() and not prometheus.failed_rules()
    finally:
        sweep.driver.kill()
        sweep.driver.wait()


def test_a_killed_driver_is_missed(head, prometheus, tmp_path):
    sweep = Sweep(tmp_path, head.address, "1500k", "killed")
    try:
        sweep.wait_for(lambda: prometheus.ask("ray_penstock_driver_report_timestamp_seconds"))
    finally:
        sweep.driver.kill()
        sweep.driver.wait()
    run = re.search(r"sweep id (\w+)", sweep.log.read_text())[1]
    wait_for(lambda: not prometheus.ask("ray_penstock_phase"), None, sweep.log, 60)
    wait_for(lambda: "PenstockDriverSilent" in prometheus.firing(), None, sweep.log, 180)
    alert = prometheus.firing()["PenstockDriverSilent"]
    assert alert["labels"] == {"alertname": "PenstockDriverSilent", "sweep": run, "severity": "critical"}
    assert f"penstock resume {run}" in alert["annotations"]["description"]
