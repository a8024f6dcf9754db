import json
import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ray.util.metrics import Counter, Metric

from penstock import meters
from penstock.meters import DriverMeters, Meters
from penstock.status import sae_counts

HERE = Path(__file__).parent
GRAFANA = HERE.parents[1] / "dashboards" / "grafana"
ALERTS = GRAFANA / "alerts.yaml"
# Labels that Ray 2.60 exports with every metric, beside the tags of its own, and what Prometheus adds.
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId", "instance", "job"}
# Ray's own metrics, as `test_prometheus.py` has found them at a real head (of GPUs as Ray's source has them).
OF_GPUS = {"GpuIndex", "GpuDeviceName", "GpuUuid", "ip", "RayNodeType", "IsHeadNode"}
RAYS = {
    "ray_resources": {"Name", "State"},
    "ray_object_store_memory": {"Location", "ObjectState"},
    "ray_object_store_used_memory": set(),
    "ray_object_store_available_memory": set(),
    "ray_cluster_active_nodes": {"node_type"},
    "ray_node_gpus_utilization": OF_GPUS,
    "ray_node_gram_used": OF_GPUS,
    "ray_node_gram_available": OF_GPUS,
    "ray_node_failure_total": set(),
    "ray_node_manager_unexpected_worker_failure_total": {"Type", "Name"},
    "ray_memory_manager_worker_eviction_total": {"Type", "Name"},
    "autoscaler_stopped_nodes_total": set(),
}
SERIES = re.compile(r"\b(?:ray|autoscaler)_\w+")
KINDS = {"timeseries", "stat", "table", "row"}
UNITS = {"short", "percentunit", "s", "bytes", "dateTimeAsLocal"}


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads((GRAFANA / "penstock.json").read_text())


@pytest.fixture(scope="module")
def panels(dashboard) -> list[dict]:
    """Every panel, those of collapsed rows included, rows left out."""
    found = [inside for panel in dashboard["panels"] for inside in (panel, *panel.get("panels", []))]
    return [panel for panel in found if panel["type"] != "row"]


@pytest.fixture(scope="module")
def rules() -> list[dict]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of every exported metric, by its name in Prometheus.

    Names are those that the metrics agent of Ray 2.60.0 serves at its `MetricsExportPort`: `ray_` before the name of
    each, `_total` after that of a counter (and no series without it, as earlier versions had), nothing after a gauge's.
    """
    ours: list[Metric] = []
    for made in (Meters("a-sweep"), DriverMeters("a-sweep")):
        for value in vars(made).values():
            ours += [one for one in (value.values() if isinstance(value, dict) else [value]) if isinstance(one, Metric)]
    assert len(ours) >= 30
    return RAYS | {
        f"ray_{meter.info['name']}{'_total' if isinstance(meter, Counter) else ''}": {*meter.info["tag_keys"], *OF_RAY}
        for meter in ours
    }


def expressions(panels: list[dict]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel["targets"]]


# ---- the dashboard --------------------------------------------------------------------------------------------------


def test_the_dashboard_is_the_one_that_its_script_makes(dashboard):
    assert runpy.run_path(str(GRAFANA / "make_dashboard.py"))["dashboard"]() == dashboard


def test_every_expression_names_metrics_that_are_exported(panels, exported):
    for expression in expressions(panels):
        names = SERIES.findall(expression)
        assert set(names) <= set(exported), expression
        assert names or "ALERTS" in expression, expression


def test_every_metric_of_penstock_is_shown_or_watched(panels, rules, exported):
    used = " ".join([*expressions(panels), *(rule["expr"] for rule in rules)])
    assert {name for name in exported if name.startswith("ray_penstock")} <= set(SERIES.findall(used))


def test_series_are_of_the_chosen_sweeps_or_of_the_clusters_they_run_on(panels):
    for expression in expressions(panels):
        for name, selector in re.findall(r"\b((?:ray|autoscaler)_\w+|ALERTS)\{([^}]*)\}", expression):
            mine = name.startswith("ray_penstock") or name == "ALERTS"
            assert ('sweep=~"$sweep"' if mine else 'SessionName=~"$cluster"') in selector, expression
        assert len(re.findall(r"\b(?:ray|autoscaler)_\w+|ALERTS\b", expression)) == expression.count("{")


def test_counters_are_shown_as_rates_or_totals_and_gauges_as_they_stand(panels):
    for expression in expressions(panels):
        for name in re.findall(r"\bray_penstock_\w+", expression):
            if name.endswith("_total"):
                assert f"rate({name}{{" in expression or "round(sum by (sweep)" in expression, expression
            else:
                assert f"rate({name}{{" not in expression, expression
        assert ("rate(" in expression) == ("[$__rate_interval]" in expression)


def test_legends_show_labels_that_the_aggregation_has_left(panels):
    for panel in panels:
        for target in panel["targets"]:
            grouped = re.findall(r"(?:by|group_left|on) \(([\w, ]+)\)", target["expr"])
            labels = {label for labels in grouped for label in labels.split(", ")}
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels, target["expr"]


def test_aggregations_use_labels_that_a_metric_has(panels, rules, exported):
    labels = set().union(*exported.values()) | {"alertname", "severity"} | OF_RAY
    for expression in [*expressions(panels), *(rule["expr"] for rule in rules)]:
        for grouped in re.findall(r"(?:by|group_left|on) \(([\w, ]+)\)", expression):
            assert set(grouped.split(", ")) <= labels, expression


def test_panels_are_of_a_form_that_grafana_takes(dashboard, panels):
    rows = [panel for panel in dashboard["panels"] if panel["type"] == "row"]
    every = rows + panels
    assert {panel["type"] for panel in every} <= KINDS
    assert len({panel["id"] for panel in every}) == len({panel["title"] for panel in every}) == len(every)
    for row in rows:
        assert isinstance(row["collapsed"], bool) and bool(row["panels"]) == row["collapsed"]
    for panel in panels:
        assert panel["description"].endswith(".") and panel["targets"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS and panel["fieldConfig"]["defaults"]["noValue"]
        first = panel["fieldConfig"]["defaults"]["thresholds"]["steps"][0]
        assert first["value"] is None  # Grafana's word for minus infinity
        references = [target["refId"] for target in panel["targets"]]
        assert references == [chr(ord("A") + number) for number in range(len(references))]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert target["instant"] == (target.get("format") == "table") == (not target["range"])


def test_panels_do_not_overlap_and_lie_below_their_rows(dashboard):
    for collapsed in (False, True):
        taken = set()
        for panel in dashboard["panels"]:
            # A collapsed row is one line; what is in it takes its place when it is opened.
            for one in (panel, *(panel.get("panels", []) if collapsed else [])):
                at = one["gridPos"]
                cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
                assert at["x"] + at["w"] <= 24
                if not collapsed:
                    assert not cells & taken
                taken |= cells
            inside = panel.get("panels", [])
            assert all(one["gridPos"]["y"] > panel["gridPos"]["y"] for one in inside)


def test_variables_pick_the_data_source_sweeps_by_name_and_their_clusters(dashboard, exported):
    source, sweep, cluster = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert (sweep["name"], cluster["name"]) == ("sweep", "cluster")
    assert {"name", "sweep"} <= exported["ray_penstock_sweep_info"]
    shown = '{name="gpt2 front", sweep="0a1b2c3d4e5f"} 1 1795305852000'  # a result, as Grafana writes it for the regex
    found = re.search(sweep["regex"].strip("/").replace("(?<", "(?P<"), shown)
    assert found.groupdict() == {"text": "gpt2 front", "value": "0a1b2c3d4e5f"}
    name, _, label = re.fullmatch(r"label_values\((\w+)\{(.*)\}, (\w+)\)", cluster["query"]["query"]).groups()
    assert label == "SessionName" and label in exported[name]
    for variable in (sweep, cluster):
        # Without a value of its own for All, All is what is listed: sweeps that ended before the time shown stay away.
        assert variable["includeAll"] and variable["multi"] and "allValue" not in variable


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
def test_gpus_of_several_nodes_are_lines_of_their_own_and_one_line_says_that_there_is_none(panels, tmp_path):
    use, memory = (
        next(panel for panel in panels if panel["title"] == title)["targets"][0]["expr"].replace("$cluster", ".+")
        for title in ("GPU utilisation", "GPU memory")
    )
    shown = {"ray_node_gpus_utilization": (50, 25), "ray_node_gram_used": (30, 10), "ray_node_gram_available": (10, 10)}
    gpus = [f'{{SessionName="s", instance="{node}", GpuIndex="0", GpuDeviceName="H200"}}' for node in "ab"]
    series = [
        {"series": name + gpu, "values": f"{value}x9"}
        for name, values in shown.items() for gpu, value in zip(gpus, values, strict=True)
    ]  # fmt: skip

    def case(input_series, answers):
        asked = [
            {"expr": expression, "eval_time": "1m",
             "exp_samples": [{"labels": labels, "value": value} for labels, value in expected.items()]}
            for expression, expected in answers
        ]  # fmt: skip
        return {"interval": "15s", "input_series": input_series, "promql_expr_test": asked}

    lines = [gpu.replace('SessionName="s", ', "") for gpu in gpus]
    none = {'{GpuDeviceName="no GPU"}': 0}
    both = [(use, dict(zip(lines, (0.5, 0.25), strict=True))), (memory, dict(zip(lines, (0.75, 0.5), strict=True)))]
    cases = [case(series, both), case([], [(use, none), (memory, none)])]
    (tmp_path / "gpus.yaml").write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": cases}))
    command = ["promtool", "test", "rules", tmp_path / "gpus.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the alerts -----------------------------------------------------------------------------------------------------


def test_alerts_say_of_which_sweep_they_are_and_what_to_type(rules, exported):
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        assert rule["alert"].startswith("Penstock") and rule["for"]
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert set(SERIES.findall(rule["expr"])) <= set(exported), rule["expr"]
        summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
        assert "{{ $labels.sweep }}" in summary and "First: penstock" in " ".join(description.split())
        assert "by (sweep" in rule["expr"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (apt-get install prometheus)")
@pytest.mark.parametrize("arguments", [
    ("check", "rules", ALERTS), ("check", "config", GRAFANA / "prometheus.yaml"),
    ("test", "rules", HERE / "alerts.test.yaml"),
])  # fmt: skip
def test_alerts_are_rules_that_prometheus_takes_and_fire_when_they_should(arguments):
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_it(rules):
    cases = yaml.safe_load((HERE / "alerts.test.yaml").read_text())["tests"]
    wanted = [sample for case in cases for one in case["promql_expr_test"] for sample in one["exp_samples"]]
    text = json.dumps([one for case in cases for one in case["promql_expr_test"] if one["exp_samples"]])
    assert wanted and all(rule["alert"] in text for rule in rules)


# ---- scraping -------------------------------------------------------------------------------------------------------


def test_no_scrape_drops_what_is_shown_and_none_is_too_slow(panels, rules):
    (plain,) = yaml.safe_load((GRAFANA / "prometheus.yaml").read_text())["scrape_configs"]
    pods = yaml.safe_load((GRAFANA / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    used = " ".join([*expressions(panels), *(rule["expr"] for rule in rules)])
    for relabelings in (plain["metric_relabel_configs"], *(endpoint["metricRelabelings"] for endpoint in pods)):
        (dropped,) = (one["regex"] for one in relabelings if one["action"] == "drop")
        assert not [name for name in SERIES.findall(used) if re.fullmatch(dropped, name)]
        (label,) = (one["regex"] for one in relabelings if one["action"] == "labeldrop")
        assert not [name for name in OF_RAY.union(*RAYS.values()) if re.fullmatch(label, name)]
    assert {endpoint["interval"] for endpoint in pods} == {"10s"}


def test_the_pod_monitor_names_the_ports_of_the_clusters_pods():
    pods = yaml.safe_load((GRAFANA / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    cluster = (GRAFANA.parents[1] / "cluster" / "kuberay" / "base" / "raycluster.yaml").read_text()
    named = dict(re.findall(r"\{name: ([\w-]+), containerPort: (\d+)\}", cluster))
    assert {endpoint["port"]: named[endpoint["port"]] for endpoint in pods} == {
        "metrics": "8080", "as-metrics": "44217", "dash-metrics": "44227",
    }  # fmt: skip


def test_the_readme_makes_the_rules_of_an_operator_from_the_alerts(rules):
    (command,) = re.findall(r"    (\(printf .*?)\| kubectl", (GRAFANA / "README.md").read_text(), re.DOTALL)
    made = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=GRAFANA.parents[1], check=True)
    manifest = yaml.safe_load(made.stdout)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("PrometheusRule", "penstock")
    assert manifest["spec"]["groups"][0]["rules"] == rules


# ---- the figures ----------------------------------------------------------------------------------------------------


class Kept:
    """What gauges and counters were given, in place of Ray's agent."""

    def __init__(self, monkeypatch) -> None:
        self.shown: dict[tuple[str, ...], float] = {}
        monkeypatch.setattr(meters, "Gauge", self._make(lambda old, new: new))
        monkeypatch.setattr(meters, "Counter", self._make(lambda old, new: old + new))

    def _make(self, combine):
        kept = self

        class Meter(Metric):
            def set(self, value, tags=None):
                key = self.info["name"].removeprefix("penstock_"), *sorted((tags or {}).values())
                kept.shown[key] = combine(kept.shown.get(key, 0.0), value)

            inc = set

        return Meter

    def __getitem__(self, key) -> float:
        return self.shown[key if isinstance(key, tuple) else (key,)]


REPORT = {
    "name": "front", "phase": "train", "started": 1000.0, "saes": 10, "tokens": 400,
    "tokens_at": {"a": [0, 100, 400], "b": [200, 400], "c": []}, "stopped": {"diverged": 2, "pruned": 1},
    "sae_tokens_per_second": 5.0, "eta_seconds": None, "share": {"slots": None, "sweeps": []},
}  # fmt: skip


def test_saes_are_counted_by_how_far_they_are():
    assert sae_counts(REPORT) == {
        "done before": 2, "waiting": 1, "training": 2, "trained": 2, "pruned": 1, "diverged": 2, "failed": 0,
    }  # fmt: skip
    assert sum(sae_counts(REPORT).values()) == REPORT["saes"]


def test_the_drivers_report_is_shown(monkeypatch):
    kept = Kept(monkeypatch)
    driver = DriverMeters("id")
    driver.update(REPORT, 1060.0, 4)
    assert kept["driver_report_timestamp_seconds"] == 1060.0 and kept["sweep_info", "front"] == 1.0
    assert [kept["phase", phase] for phase in meters.PHASES] == [0.0, 1.0, 0.0, 0.0]
    assert kept["hook_point_progress", "b"] == 0.75 and ("hook_point_progress", "c") not in kept.shown
    assert ("eta_seconds",) not in kept.shown and (kept["pack_slots"], kept["sweeps_sharing"]) == (4, 1)
    later = {"eta_seconds": 30.0, "failures_total": 7, "stopping": True, "share": {"slots": 3, "sweeps": ["other"]}}
    driver.update(REPORT | later, 1062.0, 4)
    assert (kept["eta_seconds"], kept["stopping"], kept["pack_slots"], kept["sweeps_sharing"]) == (30.0, 1.0, 3, 2)
    assert kept["failures"] == 7.0
    driver.end(1063.0, "stopped")
    assert kept["driver_end_timestamp_seconds", "stopped"] == 1063.0


def test_an_sae_worse_than_the_mean_is_counted_while_it_trains_and_past_its_first_tenth(monkeypatch):
    kept = Kept(monkeypatch)
    driver = DriverMeters("id")

    def row(sae_id, tokens, explained):
        metrics = {"explained_variance": explained}
        driver.heed({"kind": "metrics", "sae_id": sae_id, "tokens": tokens, "metrics": metrics})

    row("too early", 39, -5.0)
    row("fine", 100, 0.5)
    row("unfit", 40, -0.1)
    row("recovered", 60, -2.0)
    row("recovered", 80, 0.2)
    row("at its end", 400, -1.0)
    row("stopped", 100, -9.0)
    driver.heed({"kind": "stopped", "sae_id": "stopped", "status": "diverged"})
    driver.heed({"kind": "log", "message": "nothing of the kind"})
    driver.update(REPORT, 0.0, 4)
    assert kept["saes_unfit"] == 1


def stream(packs, **cost):
    status = {
        "blocks": 10, "window": 4, "blocks_in_store": 3, "hosts": {"h0": "block 3", "h1": "starting"},
        "packs": {name: {"status": "live", "block": 5, "lag": 1, **about} for name, about in packs.items()},
    }  # fmt: skip
    state = SimpleNamespace(members={name: SimpleNamespace(run=7) for name in packs})
    return SimpleNamespace(
        cost=dict.fromkeys(meters.COUNTED, 0) | cost, status=lambda: status, broken={}, state=state, paused_packs=1,
        spool_bytes=None, spool_is_full=False,
    )  # fmt: skip


def test_the_stream_is_shown(monkeypatch):
    kept = Kept(monkeypatch)
    shown = Meters("id", spool_limit_bytes=100)
    shown.update(stream({"p": {"trained_tokens": 500.0, "wait_seconds": 2.0}}, blocks_made=3))
    assert kept["trained_tokens", "p"] == 500.0 and kept["blocks_made"] == 3.0
    assert kept["window_occupancy"] == 0.75 and kept["pack_progress", "p"] == 0.5 and kept["packs_paused"] == 1
    assert kept["packs", "training"] == 1 and kept["model_hosts", "working"] == kept["model_hosts", "starting"] == 1
    # What has not happened yet is there as well, at next to nothing: a rate sees the first time.
    assert 0.0 < kept["blocks_lost"] < 1e-300 and 0.0 < kept["pack_restarts", "p"] < 1e-300
    assert ("spool_bytes",) not in kept.shown
    later = stream({"p": {"trained_tokens": 100.0}}, blocks_made=4)  # the pack starts again, and counts from zero
    later.state.members["p"].run = 8
    later.spool_bytes, later.spool_is_full = 60, True
    shown.update(later)
    assert kept["trained_tokens", "p"] == 500.0 and kept["blocks_made"] == 4.0 and kept["pack_restarts", "p"] == 1.0
    later.status()["packs"]["p"]["trained_tokens"] = 150.0
    shown.update(later)
    assert kept["trained_tokens", "p"] == 550.0
    assert (kept["spool_bytes"], kept["spool_limit_bytes"], kept["spool_full"]) == (60, 100, True)


def test_a_stream_that_was_started_again_does_not_show_twice_what_packs_have_counted(monkeypatch):
    kept = Kept(monkeypatch)
    shown = Meters("id", restarted=True)
    shown.update(stream({"p": {"trained_tokens": 500.0}}))
    assert kept["trained_tokens", "p"] < 1e-300
    shown.update(stream({"p": {"trained_tokens": 520.0}}))
    assert kept["trained_tokens", "p"] == 20.0
