import json
import re
from pathlib import Path

import pytest
from ray.util.metrics import Counter

from penstock.meters import Meters

DASHBOARD = Path(__file__).parents[2] / "dashboards" / "grafana" / "penstock.json"
# Labels that Ray 2.60 exports with every metric, beside the tags of its own.
OF_RAY = {"Component", "NodeAddress", "SessionName", "Version", "WorkerId"}


@pytest.fixture(scope="module")
def dashboard() -> dict:
    return json.loads(DASHBOARD.read_text())


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The labels of every exported metric, by its name in Prometheus.

    Names are those that the metrics agent of Ray 2.60.0 serves at its `MetricsExportPort`: `ray_` before the name of
    each, `_total` after that of a counter (and no series without it, as earlier versions had), nothing after a gauge's.
    """
    meters = []
    for value in vars(Meters("a-sweep")).values():
        found = value.values() if isinstance(value, dict) else [value]
        meters += [one for one in found if hasattr(one, "info")]
    assert len(meters) >= 12
    return {
        f"ray_{meter.info['name']}{'_total' if isinstance(meter, Counter) else ''}": {*meter.info["tag_keys"], *OF_RAY}
        for meter in meters
    }


def expressions(dashboard: dict) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def named(expression: str) -> list[str]:
    return re.findall(r"\bray_\w+", expression)


def test_every_expression_names_a_metric_that_is_exported(dashboard, exported):
    for expression in expressions(dashboard):
        assert named(expression) and set(named(expression)) <= set(exported), expression


def test_every_metric_is_on_a_panel(dashboard, exported):
    assert {name for expression in expressions(dashboard) for name in named(expression)} == set(exported)


def test_counters_are_shown_as_rates_or_totals_and_gauges_as_they_stand(dashboard, exported):
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (name,) = named(target["expr"])
            is_rate = f"rate({name}{{" in target["expr"] and "[$__rate_interval]" in target["expr"]
            assert is_rate == (name.endswith("_total") and panel["type"] != "stat"), target["expr"]


def test_expressions_use_labels_that_the_metric_has(dashboard, exported):
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            (name,) = named(target["expr"])
            grouped = re.findall(r"by \(([\w, ]+)\)", target["expr"])
            used = {label for labels in grouped for label in labels.split(", ")}
            assert used <= exported[name]
            assert f'{name}{{sweep=~"$sweep"}}' in target["expr"]
            if panel["type"] != "stat":  # a legend can show what the aggregation has left
                assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= used


def test_variables_pick_the_data_source_and_the_sweeps(dashboard, exported):
    source, sweep = dashboard["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    assert sweep["name"] == "sweep" and sweep["datasource"]["uid"] == "${datasource}"
    name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", sweep["query"]["query"]).groups()
    assert label == "sweep" and label in exported[name]
    parts = [part for panel in dashboard["panels"] for part in (panel, *panel["targets"])]
    assert all(part["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for part in parts)


def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({panel["title"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken
        taken |= cells
