"""Writes `penstock.json`, the Grafana dashboard of running sweeps, from the panels listed here.

    python dashboards/grafana/make_dashboard.py

Queries show what chosen sweeps do (`$sweep`), and of what belongs to no sweep that of the Ray clusters they run on
(`$cluster`). Each is written so that it has an answer also where there is nothing to show: no GPU, no failure.
"""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("penstock.json")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
SWEEP, CLUSTER = 'sweep=~"$sweep"', 'SessionName=~"$cluster"'
GREEN, YELLOW, RED, GREY, BLUE = "green", "yellow", "red", "text", "blue"
PALETTE, BY_VALUE = {"mode": "palette-classic"}, {"mode": "thresholds"}
WIDTH = 24  # of Grafana's grid


# ---- queries --------------------------------------------------------------------------------------------------------


def named(expression: str) -> str:
    """An expression by sweep, with the sweep's name beside its id, for as long as its driver lives: counters stay in
    Ray's metrics after their sweep has ended."""
    return f"{expression} * on (sweep) group_left (name) max by (sweep, name) (ray_penstock_sweep_info{{{SWEEP}}})"


def gauge(name: str, *by: str, where: str = "") -> str:
    """A gauge of sweeps. It is shown once, though for some seconds after a restart two processes may export it."""
    return named(f"max by ({', '.join(('sweep', *by))}) (ray_penstock_{name}{{{SWEEP}{where}}})")


def rate(name: str, *by: str) -> str:
    """A counter of sweeps, a second."""
    return named(f"sum by ({', '.join(('sweep', *by))}) (rate(ray_penstock_{name}_total{{{SWEEP}}}[$__rate_interval]))")


def total(name: str) -> str:
    """A counter of sweeps, over the life of its stream; rounded, since counters begin with next to nothing."""
    return named(f"round(sum by (sweep) (ray_penstock_{name}_total{{{SWEEP}}}))")


def of_cluster(name: str, where: str = "") -> str:
    """A gauge of Ray's own, summed over the nodes; 0 where there is nothing of the kind."""
    return f"sum({name}{{{CLUSTER}{where}}}) or vector(0)"


def by_gpu(expression: str) -> str:
    """A figure of each GPU that Ray can read; a line at 0 where there is none."""
    none = 'label_replace(vector(0), "GpuDeviceName", "no GPU", "", "")'
    return f"avg by (instance, GpuIndex, GpuDeviceName) ({expression}) or on () {none}"


# ---- panels ---------------------------------------------------------------------------------------------------------


def target(expression: str, legend: str, number: int = 0, **options: Any) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + number), "datasource": SOURCE, "editorMode": "code", "expr": expression,
        "legendFormat": legend, "range": True, "instant": False, **options,
    }  # fmt: skip


def steps(*colours: tuple[str, float | None]) -> dict[str, Any]:
    """Thresholds: a colour, and the value from which it holds."""
    return {"mode": "absolute", "steps": [{"color": colour, "value": value} for colour, value in colours]}


def coloured(**colours: str) -> list[dict[str, Any]]:
    """Fixed colours for series of these names (`_` for a blank)."""
    return [
        {"matcher": {"id": "byName", "options": name.replace("_", " ")},
         "properties": [{"id": "color", "value": {"mode": "fixed", "fixedColor": colour}}]}
        for name, colour in colours.items()
    ]  # fmt: skip


def panel(kind: str, title: str, about: str, width: int, height: int, queries: list[tuple[str, str]], unit: str,
          *, thresholds: dict[str, Any] | None = None, none: str = "nothing yet", overrides: list[Any] | None = None,
          options: dict[str, Any] | None = None, custom: dict[str, Any] | None = None, **defaults: Any
          ) -> dict[str, Any]:  # fmt: skip
    """A panel without its place. queries: (expression, legend)."""
    fields = {"unit": unit, "noValue": none, "thresholds": thresholds or steps((GREY, None)), **defaults}
    return {
        "type": kind, "title": title, "description": about, "datasource": SOURCE, "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": fields | ({"custom": custom} if custom else {}), "overrides": overrides or []},
        "options": options or {},
        "targets": [target(expression, legend, number) for number, (expression, legend) in enumerate(queries)],
    }  # fmt: skip


def graph(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 12, axis: str = "",
          stacked: bool = False, line_at: float | None = None, **options: Any) -> dict[str, Any]:  # fmt: skip
    """Curves over time. line_at: from where on a value deserves a look; a dashed line is drawn there."""
    custom = {
        "drawStyle": "line", "lineInterpolation": "linear", "lineWidth": 1, "fillOpacity": 25 if stacked else 8,
        "showPoints": "never", "spanNulls": False, "axisLabel": axis, "axisPlacement": "auto",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "off" if line_at is None else "dashed"},
    }  # fmt: skip
    legend = {
        "displayMode": "table",
        "placement": "bottom",
        "showLegend": True,
        "calcs": ["lastNotNull", "mean", "max"],
    }
    return panel(
        "timeseries", title, about, width, 8, list(queries), unit, min=0, custom=custom, color=PALETTE,
        thresholds=None if line_at is None else steps((GREY, None), (RED, line_at)),
        options={"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}, **options,
    )  # fmt: skip


def stat(title: str, about: str, unit: str, *queries: tuple[str, str], width: int = 4, height: int = 4,
         colour: str = "value", **options: Any) -> dict[str, Any]:  # fmt: skip
    """Numbers as they stand now."""
    shown = {
        "colorMode": colour, "graphMode": "none", "justifyMode": "auto", "orientation": "auto",
        "textMode": "value_and_name", "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }  # fmt: skip
    return panel("stat", title, about, width, height, list(queries), unit, options=shown, color=BY_VALUE, **options)


def table(title: str, about: str, *columns: tuple[str, str, str, list[dict[str, Any]]], height: int) -> dict[str, Any]:
    """One row a sweep. columns: title, expression by sweep, unit, further properties of the column."""
    names = {f"Value #{chr(ord('A') + number)}": column[0] for number, column in enumerate(columns)}
    order = ["name", "sweep", "phase", *names]
    made = panel(
        "table", title, about, WIDTH, height, [], "short", none="-",
        custom={"align": "auto", "cellOptions": {"type": "auto"}, "filterable": True},
        options={"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""}},
        overrides=[
            {"matcher": {"id": "byName", "options": name},
             "properties": [{"id": "unit", "value": unit}, *properties]}
            for name, _, unit, properties in columns
        ],
    )  # fmt: skip
    made["targets"] = [
        target(expression, "", number, range=False, instant=True, format="table")
        for number, (_, expression, _, _) in enumerate(columns)
    ]
    made["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {
            "excludeByName": {"Time": True, "Value #A": True}, "renameByName": {"sweep": "id", "name": "sweep"} | names,
            "indexByName": {name: place for place, name in enumerate(order)},
        }},
    ]  # fmt: skip
    return made


# ---- the dashboard --------------------------------------------------------------------------------------------------

SAES = f"max by (sweep, status) (ray_penstock_saes{{{SWEEP}}})"
ENDED = 'status=~"done before|trained|pruned|diverged|failed"'
PROGRESS = (
    f"sum by (sweep) (max by (sweep, pack) (ray_penstock_pack_progress{{{SWEEP}}}))"
    f" / count by (sweep) (max by (sweep, pack) (ray_penstock_pack_progress{{{SWEEP}}}))"
)
FIRING = f'ALERTS{{alertname=~"Penstock.+", alertstate="firing", {SWEEP}}}'
BAR = [{"id": "custom.cellOptions", "value": {"type": "gauge", "mode": "basic"}},
       {"id": "min", "value": 0}, {"id": "max", "value": 1}]  # fmt: skip
RED_FROM_1 = [{"id": "thresholds", "value": steps((GREY, None), (RED, 1))},
              {"id": "custom.cellOptions", "value": {"type": "color-text"}}]  # fmt: skip
BY_NAME, BY_PACK = "{{name}} ({{sweep}})", "{{name}} {{pack}}"
BY_GPU = "{{GpuDeviceName}} {{GpuIndex}} {{instance}}"
STATES_OF_HOSTS = coloured(working=GREEN, idle=BLUE, starting=YELLOW, broken=RED)
STATES_OF_PACKS = coloured(training=GREEN, starting=YELLOW, no_step_for_too_long=RED, ended=GREY)
STATUS_OF_SAES = coloured(training=GREEN, trained=BLUE, done_before=GREY, waiting=YELLOW, pruned="purple", diverged=RED,
                          failed="dark-red")  # fmt: skip

ROWS: list[tuple[str, bool, list[dict[str, Any]]]] = [
    (
        "Sweeps",
        False,
        [
            table(
                "Sweeps that run",
                "One line a sweep. What one is doing in detail: penstock status SWEEP, with its name or id; what it "
                "says: penstock logs SWEEP.",
                ("phase of", f"max by (sweep, name, phase) ({gauge('phase', 'phase')} == 1)", "short", []),
                ("stream read", named(f"({PROGRESS})"), "percentunit", BAR),
                ("SAEs", named(f"sum by (sweep) ({SAES})"), "short", []),
                (
                    "of them ended",
                    named(f"sum by (sweep) (max by (sweep, status) (ray_penstock_saes{{{SWEEP}, {ENDED}}}))"),
                    "short",
                    [],
                ),
                ("SAE-tokens/s", gauge("sae_tokens_per_second"), "short", []),
                ("time left", gauge("eta_seconds"), "s", []),
                ("estimated end", f"({gauge('eta_seconds')} + time()) * 1000", "dateTimeAsLocal", []),
                ("failures", total("failures"), "short", RED_FROM_1),
                ("diverged", gauge("saes", where=', status="diverged"'), "short", RED_FROM_1),
                (
                    "alerts",
                    named(f"(count by (sweep) ({FIRING}) or 0 * max by (sweep) (ray_penstock_sweep_info{{{SWEEP}}}))"),
                    "short",
                    RED_FROM_1,
                ),
                height=6,
            ),
            stat(
                "Alerts firing",
                "Of alerts.yaml, for the chosen sweeps. Each says in its description what to type first.",
                "short",
                (f"count({FIRING}) or vector(0)", "alerts"),
                colour="background",
                thresholds=steps((GREEN, None), (RED, 1)),
            ),
            stat(
                "SAE-tokens a second",
                "Tokens a second times the SAEs that are trained on them, over the last minutes: what "
                "a sweep is about. All chosen sweeps together.",
                "short",
                (f"sum({rate('trained_tokens')}) or vector(0)", "SAE-tokens/s"),
            ),
            stat(
                "Model tokens a second",
                "Tokens a second that the language model is run over. One pass feeds all SAEs; what "
                "lies in the spool costs none.",
                "short",
                (f"sum({rate('harvested_tokens')}) or vector(0)", "tokens/s"),
            ),
            stat(
                "Time left",
                "To the estimated end of the last of the chosen sweeps, as their drivers see it; no figure "
                "before the first steps.",
                "s",
                (f"max({gauge('eta_seconds')})", "time left"),
                none="cannot be told yet",
            ),
            stat(
                "Estimated end",
                "The same by the clock of your browser.",
                "dateTimeAsLocal",
                (f"max({gauge('eta_seconds')} + time()) * 1000", "estimated end"),
                none="cannot be told yet",
            ),
            stat(
                "GPUs in use",
                "GPUs that Ray has given to somebody, of those in the clusters that the chosen sweeps run on. 0 "
                "of 0 on machines without.",
                "short",
                (of_cluster("ray_resources", ', Name="GPU", State="USED"'), "in use"),
                (of_cluster("ray_resources", ', Name="GPU"'), "of"),
            ),
        ],
    ),
    (
        "Throughput",
        False,
        [
            graph(
                "SAE-tokens trained",
                "Tokens a second that each pack's SAEs are trained on, summed over its SAEs. A pack is "
                "the SAEs that train together on one worker.",
                "short",
                (rate("trained_tokens", "pack"), BY_PACK),
                axis="SAE-tokens/s",
                stacked=True,
            ),
            graph(
                "Tokens harvested",
                "Tokens a second that the model hosts make activations of.",
                "short",
                (rate("harvested_tokens"), BY_NAME),
                axis="tokens/s",
            ),
            graph(
                "Progress by hook point",
                "Share of their tokens that a hook point's SAEs have been trained on, those that "
                "were stopped left out.",
                "percentunit",
                (gauge("hook_point_progress", "hook_point"), "{{name}} {{hook_point}}"),
                max=1,
            ),
            graph(
                "Progress by pack",
                "Share of the run's blocks that each pack has behind it. In a later wave, packs wait at 0 for room.",
                "percentunit",
                (gauge("pack_progress", "pack"), BY_PACK),
                max=1,
            ),
        ],
    ),
    (
        "Who waits for whom",
        False,
        [
            graph(
                "Window occupancy",
                "Blocks of activations that stand in the object store, as a share of those that may. Near "
                "1 the packs are the bottleneck, near 0 the model hosts are.",
                "percentunit",
                (gauge("window_occupancy"), BY_NAME),
            ),
            graph(
                "Time spent waiting",
                "Share of its time that a pack waits for blocks. High for all packs: more model hosts "
                "would help (penstock scale SWEEP --model-hosts N).",
                "percentunit",
                (rate("wait_seconds", "pack"), BY_PACK),
            ),
            graph(
                "Lag",
                "Blocks that a pack is behind the foremost one. The slowest pack holds up those that share the window "
                "with it.",
                "short",
                (gauge("consumer_lag_blocks", "pack"), BY_PACK),
                axis="blocks",
                decimals=0,
            ),
            graph(
                "Model hosts",
                "Hosts that make a block, wait for room in the window, load the model or wait for a GPU "
                "(starting), or could not be built (broken).",
                "short",
                (f"sum by (state) ({gauge('model_hosts', 'state')})", "{{state}}"),
                axis="hosts",
                stacked=True,
                decimals=0,
                overrides=STATES_OF_HOSTS,
            ),
            graph(
                "Packs",
                "Packs that train, start or wait for room, have made no step for too long, or have "
                "ended. Several sweeps share a cluster fairly: see the next panel.",
                "short",
                (f"sum by (state) ({gauge('packs', 'state')})", "{{state}}"),
                axis="packs",
                stacked=True,
                decimals=0,
                overrides=STATES_OF_PACKS,
            ),
            graph(
                "Packs that may run at once",
                "What each sweep may use of the cluster. Where several run, each has its share.",
                "short",
                (gauge("pack_slots"), BY_NAME),
                axis="packs",
                decimals=0,
                none="no limit by other sweeps",
            ),
        ],
    ),
    (
        "SAEs and failures",
        False,
        [
            graph(
                "SAEs by status",
                "pruned: stopped because others are better in every respect. diverged: the loss left every "
                "bound. failed: see penstock status SWEEP.",
                "short",
                (f"sum by (status) ({gauge('saes', 'status')})", "{{status}}"),
                axis="SAEs",
                stacked=True,
                decimals=0,
                overrides=STATUS_OF_SAES,
            ),
            graph(
                "SAEs that go wrong",
                "diverged ones, and those that reconstruct worse than the mean activation would "
                "(explained variance below 0) with more than a tenth of their tokens behind them: the next to diverge.",
                "percentunit",
                (
                    named(
                        f'(max by (sweep) (ray_penstock_saes{{{SWEEP}, status="diverged"}}) / sum by (sweep) ({SAES}))'
                    ),
                    "{{name}}: diverged",
                ),
                (
                    named(f"(max by (sweep) (ray_penstock_saes_unfit{{{SWEEP}}}) / sum by (sweep) ({SAES}))"),
                    "{{name}}: worse than the mean",
                ),
                axis="share of all SAEs",
                line_at=0.1,
            ),
            graph(
                "Failures so far",
                "What went wrong and was made up for: failures that the driver has noted, workers of packs "
                "that were started again, blocks that a pack could not read. penstock status SWEEP says what was done.",
                "short",
                (total("failures"), "{{name}}: failures"),
                (total("pack_restarts"), "{{name}}: packs restarted"),
                (total("blocks_lost"), "{{name}}: blocks lost"),
                (total("blocks_remade"), "{{name}}: blocks made again"),
                decimals=0,
            ),
            graph(
                "Processes that Ray lost",
                "On the clusters of the chosen sweeps: nodes that went away (the autoscaler's "
                "doing included), workers that died of themselves, and workers that Ray ended since memory ran out.",
                "short",
                (of_cluster("ray_node_failure_total"), "nodes gone"),
                (of_cluster("ray_node_manager_unexpected_worker_failure_total"), "workers that died"),
                (of_cluster("ray_memory_manager_worker_eviction_total"), "workers ended for memory"),
                decimals=0,
                overrides=coloured(nodes_gone=RED),
            ),
        ],
    ),
    (
        "Cluster",
        False,
        [
            graph(
                "GPU utilisation",
                "How busy each GPU is, as its driver says. Low on a host or pack that is the bottleneck: "
                "look at its data, block size or batch. One line at 0 where Ray finds no GPU.",
                "percentunit",
                (by_gpu(f"ray_node_gpus_utilization{{{CLUSTER}}} / 100"), BY_GPU),
                width=8,
                max=1,
            ),
            graph(
                "GPU memory",
                "Share of each GPU's memory in use. Much of it free on a pack: a larger train.micro_batch_tokens, or "
                "more SAEs a pack.",
                "percentunit",
                (
                    by_gpu(
                        f"ray_node_gram_used{{{CLUSTER}}} / (ray_node_gram_used{{{CLUSTER}}} + "
                        f"ray_node_gram_available{{{CLUSTER}}})"
                    ),
                    BY_GPU,
                ),
                width=8,
                max=1,
            ),
            graph(
                "GPUs given out",
                "By Ray, to model hosts and packs of all its jobs, and GPUs that there are.",
                "short",
                (of_cluster("ray_resources", ', Name="GPU", State="USED"'), "in use"),
                (of_cluster("ray_resources", ', Name="GPU"'), "in all"),
                width=8,
                axis="GPUs",
            ),
            graph(
                "CPUs given out",
                "By Ray, and CPUs that there are. Hosts or packs that start for ever while none is free wait "
                "for room: penstock plan SPEC --address says for what.",
                "short",
                (of_cluster("ray_resources", ', Name="CPU", State="USED"'), "in use"),
                (of_cluster("ray_resources", ', Name="CPU"'), "in all"),
                axis="CPUs",
            ),
            graph(
                "Nodes",
                "Alive in the clusters of the chosen sweeps, as Ray's head counts them.",
                "short",
                (of_cluster("ray_cluster_active_nodes"), "alive"),
                axis="nodes",
                decimals=0,
            ),
            graph(
                "Object store",
                "Shared memory that blocks stand in, all nodes together. Spilled to disk should stay at 0: the "
                "window is made to fit.",
                "bytes",
                (of_cluster("ray_object_store_used_memory"), "used"),
                (of_cluster("ray_object_store_available_memory"), "free"),
                (of_cluster("ray_object_store_memory", ', Location="SPILLED"'), "spilled to disk"),
                stacked=True,
                overrides=coloured(used=BLUE, free=GREY, spilled_to_disk=RED),
            ),
            graph(
                "Object store, fullest node",
                "Share of the object store in use, where it is highest. The window takes at most "
                "30% of the smallest; other jobs may take the rest.",
                "percentunit",
                (
                    f"max by (instance) (ray_object_store_used_memory{{{CLUSTER}}} / "
                    f"(ray_object_store_used_memory{{{CLUSTER}}} + ray_object_store_available_memory{{{CLUSTER}}}))",
                    "{{instance}}",
                ),
                max=1,
                line_at=0.8,
            ),
        ],
    ),
    (
        "Spool and blocks",
        True,
        [
            graph(
                "Spool",
                "Blocks a second: written to the spool, found there by a host that was about to make them, read there "
                "by packs.",
                "short",
                (rate("blocks_spooled"), "{{name}}: written"),
                (rate("spool_hits"), "{{name}}: found by hosts"),
                (rate("spool_reads"), "{{name}}: read by packs"),
                axis="blocks/s",
            ),
            graph(
                "Room in the spool",
                "Bytes it holds, those of other streams included, and bytes it may hold (data.spool_gb).",
                "bytes",
                (gauge("spool_bytes"), "{{name}}: held"),
                (gauge("spool_limit_bytes"), "{{name}}: limit"),
                none="no spool",
            ),
            graph(
                "Spool full",
                "1 while the spool takes no more blocks: training goes on, and later waves make them again. "
                "penstock spool prune makes room.",
                "short",
                (gauge("spool_full"), BY_NAME),
                max=1,
                decimals=0,
                line_at=1,
                none="no spool",
            ),
            graph(
                "Blocks",
                "Blocks a second. They are made again when a pack could not read them, and for packs that join late.",
                "short",
                (rate("blocks_made"), "{{name}}: made"),
                (rate("blocks_remade"), "{{name}}: made again"),
                (rate("blocks_lost"), "{{name}}: lost"),
                axis="blocks/s",
            ),
            graph(
                "Window",
                "Blocks that may stand in the object store, beyond the slowest pack.",
                "short",
                (gauge("window_blocks"), BY_NAME),
                axis="blocks",
                decimals=0,
            ),
            graph(
                "Announced pauses",
                "Packs that save a checkpoint or export SAEs. While one does, the alert for a stalled "
                "stream keeps quiet.",
                "short",
                (gauge("packs_paused"), BY_NAME),
                axis="packs",
                decimals=0,
            ),
        ],
    ),
    (
        "Driver, and so far",
        True,
        [
            graph(
                "Age of the driver's report",
                "The driver reports every 2 s, Ray passes that on every 10 s. Beyond a minute the "
                "driver hangs or is gone.",
                "s",
                (
                    named(f"(time() - max by (sweep) (ray_penstock_driver_report_timestamp_seconds{{{SWEEP}}}))"),
                    BY_NAME,
                ),
                line_at=60,
            ),
            graph(
                "Running for",
                "Since the driver started, this attempt at the sweep alone.",
                "s",
                (named(f"(time() - max by (sweep) (ray_penstock_driver_start_timestamp_seconds{{{SWEEP}}}))"), BY_NAME),
            ),
            graph(
                "Asked to stop",
                "1 once penstock stop SWEEP was heard: its packs save and end.",
                "short",
                (gauge("stopping"), BY_NAME),
                max=1,
                decimals=0,
            ),
            graph(
                "Sweeps that share the cluster",
                "As each driver sees it, itself included.",
                "short",
                (gauge("sweeps_sharing"), BY_NAME),
                decimals=0,
                none="none that it knows of",
            ),
            stat(
                "So far",
                "Since the stream's start. What earlier attempts at the sweep have come to stands in MLflow.",
                "short",
                (total("harvested_tokens"), "{{name}}: tokens harvested"),
                (total("trained_tokens"), "{{name}}: SAE-tokens trained"),
                (total("blocks_made"), "{{name}}: blocks made"),
                (total("spool_reads"), "{{name}}: spool reads"),
                width=WIDTH,
                colour="none",
                decimals=0,
            ),
        ],
    ),
]

VARIABLES: list[dict[str, Any]] = [
    {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "regex": "",
        "refresh": 1,
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "options": [],
        "current": {},
    },
    # Names to choose from, ids in the queries: all sweeps that ran in the time that is shown.
    {
        "name": "sweep",
        "label": "Sweep",
        "description": "Sweeps that ran in the time shown, by name.",
        "type": "query",
        "query": {
            "query": "query_result(max by (name, sweep) (last_over_time(ray_penstock_sweep_info[$__range])))",
            "refId": "sweep",
            "qryType": 3,
        },
        "regex": '/name="(?<text>[^"]+)".*sweep="(?<value>[^"]+)"/',
    },
    {
        "name": "cluster",
        "label": "Ray cluster",
        "description": "Ray sessions that the chosen sweeps run on.",
        "type": "query",
        "query": {
            "query": f"label_values(ray_penstock_sweep_info{{{SWEEP}}}, SessionName)",
            "refId": "cluster",
            "qryType": 1,
        },
        "regex": "",
    },
]
for _variable in VARIABLES[1:]:
    _variable |= {
        "datasource": SOURCE, "definition": _variable["query"]["query"], "refresh": 2, "sort": 1, "hide": 0,
        "includeAll": True, "multi": True, "options": [], "current": {"text": ["All"], "value": ["$__all"]},
    }  # fmt: skip

ANNOTATIONS: list[dict[str, Any]] = [
    {
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
        "name": "Annotations & Alerts",
        "type": "dashboard",
    },
    {
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": "red",
        "name": "Alerts of sweeps",
        "expr": FIRING,
        "step": "30s",
        "titleFormat": "{{alertname}}",
        "tagKeys": "sweep,severity",
        "textFormat": "sweep {{sweep}}",
        "useValueForTime": False,
    },
]


def place(panels: list[dict[str, Any]], y: int) -> int:
    """Give panels their places from row `y` of the grid on, from left to right; the first free row below them."""
    x = height = 0
    for one in panels:
        at = one["gridPos"]
        if x + at["w"] > WIDTH:
            x, y, height = 0, y + height, 0
        at |= {"x": x, "y": y}
        x, height = x + at["w"], max(height, at["h"])
    return y + height


def dashboard() -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    y = number = 0
    for title, collapsed, inside in ROWS:
        row = {"type": "row", "title": title, "collapsed": collapsed, "panels": inside if collapsed else [],
               "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}}  # fmt: skip
        below = place(inside, y + 1)
        y = y + 1 if collapsed else below
        for one in (row, *inside):
            number += 1
            one["id"] = number
        panels += [row] if collapsed else [row, *inside]
    return {
        "uid": "penstock",
        "title": "Penstock: sweeps",
        "description": "What sweeps of SAEs do: how far they are, who waits for whom, what failed, what they use.",
        "tags": ["penstock", "ray"],
        "schemaVersion": 41, "version": 2, "editable": True, "graphTooltip": 1, "refresh": "10s", "liveNow": False,
        "fiscalYearStartMonth": 0, "time": {"from": "now-1h", "to": "now"}, "timepicker": {}, "timezone": "",
        "weekStart": "", "links": [], "annotations": {"list": ANNOTATIONS}, "templating": {"list": VARIABLES},
        "panels": panels,
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=1) + "\n")
