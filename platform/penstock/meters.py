"""What a sweep shows of itself in Ray's metrics: on the dashboard, in Prometheus, and in `dashboards/grafana/`.

The stream shows what it sees (`Meters`), the driver what it reports (`DriverMeters`). Ray puts `ray_` before every
name. Every figure has the tag `sweep`, those of a pack the tag `pack` too.

Ray 2.60 drops a gauge 20 s after it was last set, so those of what has ended go by themselves, and those of a process
that hangs too. Counters stay for as long as the node's metrics agent lives: rules that could fire for ever on one join
it with a gauge.
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.util.metrics import Counter, Gauge

from penstock.status import sae_counts

if TYPE_CHECKING:
    from penstock.stream import Stream

COUNTED = {
    "harvested_tokens": "tokens that model hosts have made activations of",
    "blocks_made": "blocks that model hosts have made",
    "blocks_remade": "blocks that were made again: lost ones, and those of latecomers",
    "blocks_lost": "blocks that a pack could not read",
    "spool_hits": "blocks that a host found in the spool when it was about to make them",
    "blocks_spooled": "blocks that were put into the spool",
}
COUNTED_OF_PACKS = {
    "trained_tokens": "tokens that a pack's SAEs have been trained on, summed over its SAEs",
    "wait_seconds": "seconds that a pack has waited for blocks",
    "spool_reads": "blocks that a pack has read in the spool",
}
HOST_STATES = ("working", "idle", "starting", "broken")
# What `Member.status` says, as people who watch call it.
PACK_STATES = {"expected": "starting", "live": "training", "gone": "no step for too long", "done": "ended"}

PHASES = ("start", "train", "search", "evaluate")
UNFIT_FROM = 0.1  # of its tokens: before that an SAE's explained variance may well be below 0
# A counter exists from its first increment on, and a rate misses that one: each begins with next to nothing.
_NEXT_TO_NOTHING = sys.float_info.min


class _Tagged:
    """Makes gauges and counters that carry the sweep's id."""

    def __init__(self, sweep: str) -> None:
        self._sweep = {"sweep": sweep}
        self._shown: dict[tuple[str, str], float] = {}

    def counter(self, name: str, about: str, *tags: str) -> Counter:
        made = Counter(f"penstock_{name}", description=about, tag_keys=("sweep", *tags))
        made.set_default_tags(self._sweep)
        return made

    def gauge(self, name: str, about: str, *tags: str) -> Gauge:
        made = Gauge(f"penstock_{name}", description=about, tag_keys=("sweep", *tags))
        made.set_default_tags(self._sweep)
        return made

    def raise_to(self, counter: Counter, total: float, tags: dict[str, str], begin: float = 0.0) -> None:
        """Bring a counter up to a total; what starts again counts from zero. `begin` is where a counter that is met
        for the first time stands already."""
        key = counter.info["name"], " ".join(tags.values())
        if key not in self._shown:
            counter.inc(_NEXT_TO_NOTHING, tags)
        added = total - self._shown.get(key, begin)
        self._shown[key] = total
        if added > 0:
            counter.inc(added, tags)


class Meters:
    """Gauges and counters of one sweep's stream.

    Args:
        sweep: the sweep's id.
        spool_limit_bytes: what the spool may hold; None where there is no spool, or no limit.
        restarted: whether the stream has been started again. What packs have counted by then has been shown already.
    """

    def __init__(self, sweep: str, *, spool_limit_bytes: int | None = None, restarted: bool = False) -> None:
        self._tagged = tagged = _Tagged(sweep)
        self._spool_limit_bytes, self._restarted = spool_limit_bytes, restarted
        self._counters = {name: tagged.counter(name, about) for name, about in COUNTED.items()}
        self._of_packs = {name: tagged.counter(name, about, "pack") for name, about in COUNTED_OF_PACKS.items()}
        self._restarts = tagged.counter("pack_restarts", "times that a pack's worker was started again", "pack")
        self._runs: dict[str, tuple[int, int]] = {}  # pack -> its run, and how many others there were before
        self._window = tagged.gauge("window_occupancy", "blocks in the object store, as a share of the window")
        self._window_blocks = tagged.gauge("window_blocks", "blocks that may stand in the object store")
        self._hosts = tagged.gauge("model_hosts", "model hosts that work, idle, start, or could not be built", "state")
        self._packs = tagged.gauge("packs", "packs that start, train, hang, or have ended", "state")
        self._paused = tagged.gauge("packs_paused", "packs in a pause they have announced: a checkpoint, an export")
        self._lag = tagged.gauge("consumer_lag_blocks", "blocks that a pack is behind the foremost one", "pack")
        self._progress = tagged.gauge("pack_progress", "share of the run's blocks that a pack has behind it", "pack")
        self._spool_bytes = tagged.gauge("spool_bytes", "bytes in the spool, those of other streams included")
        self._spool_limit = tagged.gauge("spool_limit_bytes", "bytes that the spool may hold")
        self._spool_full = tagged.gauge("spool_full", "1 while the spool takes no more blocks")

    def update(self, stream: "Stream") -> None:
        """Show how the stream stands now; to be called more often than Ray forgets, every second or so."""
        cost, status = stream.cost, stream.status()
        for name, counter in self._counters.items():
            self._tagged.raise_to(counter, cost[name], {})
        self._window.set(status["blocks_in_store"] / status["window"])
        self._window_blocks.set(status["window"])
        self._show_hosts(stream, status)
        self._show_packs(stream, status)
        self._show_spool(stream)

    def _show_hosts(self, stream: "Stream", status: Mapping[str, Any]) -> None:
        states = [
            "broken" if name in stream.broken else "working" if state.startswith("block") else state
            for name, state in status["hosts"].items()
        ]
        for state in HOST_STATES:
            self._hosts.set(states.count(state), {"state": state})

    def _show_packs(self, stream: "Stream", status: Mapping[str, Any]) -> None:
        packs = status["packs"]
        states = [pack["status"] for pack in packs.values()]
        for state, called in PACK_STATES.items():
            self._packs.set(states.count(state), {"state": called})
        self._paused.set(stream.paused_packs)
        for pack_id, pack in packs.items():
            tags = {"pack": pack_id}
            self._progress.set(pack["block"] / max(1, status["blocks"]), tags)
            if pack["status"] == "live":
                self._lag.set(pack["lag"], tags)
            for name, counter in self._of_packs.items():
                if name in pack:
                    self._tagged.raise_to(counter, pack[name], tags, begin=pack[name] if self._restarted else 0.0)
            run, before = stream.state.members[pack_id].run, self._runs.get(pack_id, (0, 0))
            if run != before[0]:
                self._runs[pack_id] = run, before[1] + (before[0] > 0)
            self._tagged.raise_to(self._restarts, self._runs.get(pack_id, before)[1], tags)

    def _show_spool(self, stream: "Stream") -> None:
        if stream.spool_bytes is None:
            return
        self._spool_bytes.set(stream.spool_bytes)
        self._spool_full.set(stream.spool_is_full)
        if self._spool_limit_bytes is not None:
            self._spool_limit.set(self._spool_limit_bytes)


class DriverMeters:
    """Gauges and counters of one sweep's driver, set from the report that it writes for `penstock status`."""

    def __init__(self, sweep_id: str) -> None:
        self._tagged = tagged = _Tagged(sweep_id)
        self._info = tagged.gauge("sweep_info", "1 for each sweep that runs, with its name", "name")
        self._reported = tagged.gauge("driver_report_timestamp_seconds", "when the driver reported last, in Unix time")
        self._ended = tagged.gauge("driver_end_timestamp_seconds", "when the driver ended by itself", "outcome")
        self._started = tagged.gauge("driver_start_timestamp_seconds", "when the driver started, in Unix time")
        self._phase = tagged.gauge("phase", "1 for the phase that the sweep is in, 0 for the others", "phase")
        self._stopping = tagged.gauge("stopping", "1 once the sweep has been asked to stop")
        self._eta = tagged.gauge("eta_seconds", "seconds to the estimated end; absent while nobody can tell")
        self._saes = tagged.gauge("saes", "SAEs by how far they are, or what they were stopped for", "status")
        self._progress = tagged.gauge(
            "hook_point_progress", "share of their tokens that a hook point's SAEs have had", "hook_point"
        )
        self._rate = tagged.gauge("sae_tokens_per_second", "SAE-tokens a second, on average since the first step")
        self._unfit = tagged.gauge(
            "saes_unfit", "SAEs past their first tenth that reconstruct worse than the mean activation does"
        )
        self._slots = tagged.gauge("pack_slots", "packs that the sweep may run at once: its share of the cluster")
        self._sweeps = tagged.gauge("sweeps_sharing", "sweeps that share the cluster's packs, this one included")
        self._failures = tagged.counter("failures", "failures that the driver has noted; `penstock status` lists them")
        self._explained: dict[str, tuple[float, float]] = {}  # SAE -> tokens, explained variance

    def heed(self, event: Mapping[str, Any]) -> None:
        """Take in what a pack reports of one of its SAEs."""
        if event["kind"] == "metrics" and "explained_variance" in event["metrics"]:
            self._explained[event["sae_id"]] = event["tokens"], event["metrics"]["explained_variance"]
        elif event["kind"] == "stopped":
            self._explained.pop(event["sae_id"], None)

    def update(self, report: Mapping[str, Any], now: float, slots: int) -> None:
        """Show a report, made at the Unix time `now`; to be called every few seconds: see the top of the file. slots:
        how many packs may run at once where no other sweep shares the cluster."""
        self._info.set(1.0, {"name": report["name"]})
        self._reported.set(now)
        self._started.set(report["started"])
        for phase in PHASES:
            self._phase.set(float(phase == report["phase"]), {"phase": phase})
        self._stopping.set(float(bool(report.get("stopping"))))
        if report.get("eta_seconds") is not None:
            self._eta.set(report["eta_seconds"])
        self._rate.set(report["sae_tokens_per_second"])
        for status, count in sae_counts(report).items():
            self._saes.set(count, {"status": status})
        for hook_point, at in report["tokens_at"].items():
            if at:
                self._progress.set(sum(at) / len(at) / max(1, report["tokens"]), {"hook_point": hook_point})
        after = UNFIT_FROM * report["tokens"]
        explained = dict(self._explained).values()  # a copy: the driver's main thread adds to it
        self._unfit.set(sum(tokens >= after and share < 0 for tokens, share in explained if tokens < report["tokens"]))
        self._tagged.raise_to(self._failures, report.get("failures_total", 0), {})
        share = report["share"]
        self._slots.set(slots if share["slots"] is None else share["slots"])
        self._sweeps.set(1 + len(share["sweeps"]))

    def end(self, now: float, outcome: str) -> None:
        """The driver ends by itself, at the Unix time `now`: that it reports nothing more is no cause for alarm.
        outcome: `finished`, `stopped` or `failed`."""
        self._ended.set(now, {"outcome": outcome})
