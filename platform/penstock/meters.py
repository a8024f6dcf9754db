"""What the stream shows of itself in Ray's metrics: on the dashboard, in Prometheus, and in `dashboards/grafana/`.

Ray puts `ray_` before every name. Every figure has the tag `sweep`, those of a pack the tag `pack` too.
"""

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

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


class Meters:
    """Gauges and counters of one sweep."""

    def __init__(self, sweep: str) -> None:
        def counter(name: str, about: str, *tags: str) -> Counter:
            made = Counter(f"penstock_{name}", description=about, tag_keys=("sweep", *tags))
            made.set_default_tags({"sweep": sweep})
            return made

        def gauge(name: str, about: str, *tags: str) -> Gauge:
            made = Gauge(f"penstock_{name}", description=about, tag_keys=("sweep", *tags))
            made.set_default_tags({"sweep": sweep})
            return made

        self._counters = {name: counter(name, about) for name, about in COUNTED.items()}
        self._of_packs = {name: counter(name, about, "pack") for name, about in COUNTED_OF_PACKS.items()}
        self._window = gauge("window_occupancy", "blocks in the object store, as a share of the window")
        self._hosts = gauge("model_hosts", "model hosts that work, idle, start, or could not be built", "state")
        self._lag = gauge("consumer_lag_blocks", "blocks that a pack is behind the foremost one", "pack")
        self._shown: dict[tuple[str, str], float] = {}

    def update(self, stream: "Stream") -> None:
        """Show how the stream stands now."""
        cost = stream.cost
        for name, counter in self._counters.items():
            self._raise(counter, (name, ""), cost[name], {})
        status = stream.status()
        self._window.set(status["blocks_in_store"] / status["window"])
        states = [
            "broken" if name in stream.broken else "working" if state.startswith("block") else state
            for name, state in status["hosts"].items()
        ]
        for state in ("working", "idle", "starting", "broken"):
            self._hosts.set(states.count(state), {"state": state})
        for pack_id, pack in status["packs"].items():
            self._lag.set(pack["lag"] if pack["status"] == "live" else 0, {"pack": pack_id})
            for name, counter in self._of_packs.items():
                self._raise(counter, (name, pack_id), pack.get(name, 0.0), {"pack": pack_id})

    def _raise(self, counter: Counter, key: tuple[str, str], total: float, tags: dict[str, str]) -> None:
        """Bring a counter up to a total; a pack that starts again counts from zero."""
        added = total - self._shown.get(key, 0.0)
        self._shown[key] = total
        if added > 0:
            counter.inc(added, tags)
