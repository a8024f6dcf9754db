"""`penstock cost`: what a sweep has held of the cluster, by phase, by SAE, and what of it was to no use.

A GPU-second is a second for which a model host or a pack has kept one GPU, whatever it did with it; likewise for
CPU cores. Hosts count from when they were asked for, packs from when their worker's code runs. An SAE bears of its
pack's worker what its steps took there, of the hosts' training time its share by tokens (they serve every SAE alike),
and of everything else an even share: the SAEs together bear all of it. What a cluster bills for nodes that stand
empty is not known here.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.accounts import BUSY, IDLE, STARTING, WRITE_SECONDS
from penstock.errors import SweepError
from penstock.fence import SILENT_SECONDS
from penstock.home import Home, recall
from penstock.storage import Storage
from penstock.sweep_files import accounts_folder
from penstock.text import text_table

SHOWN = 15  # SAEs of the table
GPU, CPU = "gpu_seconds", "cpu_seconds"
TRAIN = "train"
PRUNED = "pruned"


@dataclass(frozen=True)
class Amount:
    """What was held."""

    gpu_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(self.gpu_seconds + other.gpu_seconds, self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, factor: float) -> "Amount":
        return Amount(self.gpu_seconds * factor, self.cpu_seconds * factor)


@dataclass(frozen=True)
class Prices:
    """Currency units an hour of one GPU, or of one CPU core; None where nobody has said."""

    gpu_hour: float | None = None
    cpu_hour: float | None = None

    @property
    def known(self) -> bool:
        return self.gpu_hour is not None or self.cpu_hour is not None

    def of(self, amount: Amount) -> float:
        hours = amount.gpu_seconds * (self.gpu_hour or 0.0) + amount.cpu_seconds * (self.cpu_hour or 0.0)
        return hours / 3600


@dataclass
class SAECost:
    """What one SAE has come to: its share of everything that was held."""

    sae_id: str
    title: str
    status: str = ""  # diverged, failed, pruned; empty for one that was not stopped
    tokens: int = 0
    amount: Amount = Amount()


@dataclass
class Cost:
    """What a sweep has come to, over all its attempts. `phases`: (seconds, hosts, packs) by name; `wasted`: what was
    to no use, by reason; the reasons may overlap, as a host idles also for an SAE that diverges."""

    sweep: str
    sweep_id: str
    attempts: int
    running: bool
    prices: Prices
    phases: dict[str, tuple[float, Amount, Amount]] = field(default_factory=dict)
    saes: list[SAECost] = field(default_factory=list)
    wasted: dict[str, Amount] = field(default_factory=dict)
    lost: bool = False  # the driver of the last attempt has not said that it ended, and writes no more

    @property
    def total(self) -> Amount:
        return _sum(amount for _, hosts, packs in self.phases.values() for amount in (hosts, packs))

    def as_json(self) -> str:
        def held(amount: Amount) -> dict[str, float]:
            priced = {"money": self.prices.of(amount)} if self.prices.known else {}
            return {GPU: amount.gpu_seconds, CPU: amount.cpu_seconds, **priced}

        return json.dumps({
            "sweep": self.sweep, "sweep_id": self.sweep_id, "attempts": self.attempts, "running": self.running,
            "prices": {"gpu_hour": self.prices.gpu_hour, "cpu_hour": self.prices.cpu_hour},
            "total": held(self.total),
            "phases": {
                name: {"seconds": seconds, "hosts": held(hosts), "packs": held(packs)}
                for name, (seconds, hosts, packs) in self.phases.items()
            },
            "saes": [
                {"sae_id": one.sae_id, "title": one.title, "status": one.status or None, "tokens": one.tokens,
                 **held(one.amount)}
                for one in self.saes
            ],
            "wasted": {reason: held(amount) for reason, amount in self.wasted.items()},
        }, indent=1)  # fmt: skip

    def as_text(self) -> str:
        attempts = f"{self.attempts} attempt{'s' * (self.attempts != 1)}"
        last = ", the last one still runs" * self.running or ", the driver of the last is heard of no more" * self.lost
        title = f"sweep {self.sweep} ({self.sweep_id}): {attempts}{last}"
        phases = [
            [name, f"{seconds:,.0f}", *self._row(hosts), *self._row(packs), *self._money(hosts + packs)]
            for name, (seconds, hosts, packs) in self.phases.items()
        ]
        hosts, packs = (_sum(phase[which] for phase in self.phases.values()) for which in (1, 2))
        wall = sum(phase[0] for phase in self.phases.values())
        phases.append(["all", f"{wall:,.0f}", *self._row(hosts), *self._row(packs), *self._money(self.total)])
        header = ["phase", "s", "hosts GPU-s", "CPU-s", "packs GPU-s", "CPU-s", *["money"] * self.prices.known]
        parts = [title, text_table(header, phases, right=set(header[1:])), self._sae_table(), self._waste_table()]
        if not self.prices.known:
            parts.append("with --gpu-hour PRICE and --cpu-hour PRICE, or resources.gpu_hour_cost in the spec, in money")
        return "\n\n".join(parts)

    def _sae_table(self) -> str:
        rows = [
            [one.sae_id, one.title, one.status or "-", f"{one.tokens:,}", *self._row(one.amount),
             *self._money(one.amount)]
            for one in self.saes[:SHOWN]
        ]  # fmt: skip
        if rest := self.saes[SHOWN:]:
            more = _sum(one.amount for one in rest)
            rows.append([f"{len(rest)} more", "", "", f"{sum(one.tokens for one in rest):,}", *self._row(more),
                         *self._money(more)])  # fmt: skip
        header = ["SAE", "settings", "stopped", "tokens", "GPU-s", "CPU-s", *["money"] * self.prices.known]
        return text_table(header, rows, right={"tokens", "GPU-s", "CPU-s", "money"})

    def _waste_table(self) -> str:
        rows = [[reason, *self._row(amount), *self._money(amount)] for reason, amount in self.wasted.items()]
        header = ["of it to no use (may overlap)", "GPU-s", "CPU-s", *["money"] * self.prices.known]
        return text_table(header, rows, right=set(header[1:]))

    def _row(self, amount: Amount) -> list[str]:
        return [f"{amount.gpu_seconds:,.0f}", f"{amount.cpu_seconds:,.0f}"]

    def _money(self, amount: Amount) -> list[str]:
        return [f"{self.prices.of(amount):,.2f}"] if self.prices.known else []


def cost(home: Home, sweep: str, gpu_hour: float | None = None, cpu_hour: float | None = None) -> Cost:
    """What a sweep, by its name or id, has come to. Prices that are not given: the spec's `resources.gpu_hour_cost`.

    Raises `SweepError` when none of that name was started from this home, or nothing was noted of its cost.
    """
    return read_cost(*recall(home, sweep), sweep, Prices(gpu_hour, cpu_hour))


def read_cost(storage: Storage, sweep_id: str, sweep: str, prices: Prices = Prices()) -> Cost:
    """See `cost`."""
    folder = accounts_folder(sweep_id)
    try:
        records = [storage.read_json(f"{folder}/{name}") for name in storage.names(folder) if name.endswith(".json")]
    except OSError as error:
        raise SweepError(f"storage {storage.uri!r} of sweep {sweep!r} cannot be read: {error}") from None
    if not records:
        raise SweepError(f"sweep {sweep!r} ({sweep_id}) has noted nothing of its cost; accepted: a sweep that has "
                         "begun to train")  # fmt: skip
    records.sort(key=lambda record: record["started"])
    if prices.gpu_hour is None:
        prices = replace(prices, gpu_hour=records[-1]["gpu_hour_cost"])
    return settle(sweep, sweep_id, records, prices, time.time())


def settle(sweep: str, sweep_id: str, records: Sequence[Mapping[str, Any]], prices: Prices, now: float) -> Cost:
    """The books of a sweep's attempts, in their order (`accounts.Accounts.write`), closed at `now` (Unix time)."""
    is_silent = now - records[-1]["time"] > WRITE_SECONDS + SILENT_SECONDS
    running, lost = not records[-1]["over"] and not is_silent, not records[-1]["over"] and is_silent
    settled = Cost(sweep, sweep_id, len(records), running=running, prices=prices, lost=lost)
    shares: dict[str, Amount] = defaultdict(Amount)
    tokens: dict[str, int] = defaultdict(int)
    wasted: dict[str, Amount] = defaultdict(Amount)
    saes, stopped = {}, {}
    for record in records:
        saes |= record["saes"]
        again = {sae_id for worker in record["workers"].values() for sae_id in worker["saes"]}
        stopped = {sae_id: why for sae_id, why in stopped.items() if sae_id not in again} | record["stopped"]
        per_host, per_pack = Amount(**record["per_host"]), Amount(**record["per_pack"])
        workers = record["workers"].values()
        trained: dict[str, float] = defaultdict(float)
        packs = Amount()
        for worker in workers:
            packs += per_pack * worker["held"]
            shares_of_worker = _shares({sae_id: spent for sae_id, (spent, _, _) in worker["saes"].items()})
            for sae_id, share in shares_of_worker.items():
                shares[sae_id] += per_pack * (worker["held"] * share)
                trained[sae_id] += worker["saes"][sae_id][2]
                tokens[sae_id] += worker["saes"][sae_id][2]
            stepping = sum(spent for spent, _, _ in worker["saes"].values())
            wasted["packs waiting for blocks"] += per_pack * worker["waiting"]
            rest = max(0.0, worker["held"] - worker["waiting"] - stepping)  # SAEs may step side by side
            wasted["packs starting, saving and looking up"] += per_pack * rest
        for name, phase in record["phases"].items():
            hosts = per_host * sum(phase["hosts"].values())
            seconds, hosts_before, packs_before = settled.phases.get(name, (0.0, Amount(), Amount()))
            in_packs = packs if name == TRAIN else Amount()
            settled.phases[name] = (seconds + phase["seconds"], hosts_before + hosts, packs_before + in_packs)
            borne = _shares(trained) if name == TRAIN and any(trained.values()) else _shares(dict.fromkeys(saes, 1.0))
            for sae_id, share in borne.items():
                shares[sae_id] += hosts * share
            wasted["hosts loading the model, or waiting for room"] += per_host * phase["hosts"][STARTING]
            if name == TRAIN:
                wasted["hosts idle"] += per_host * phase["hosts"][IDLE]
                made = record["blocks"].get("blocks_made", 0.0)
                remade = min(1.0, record["blocks"].get("blocks_remade", 0.0) / made) if made else 0.0
                wasted["blocks made again"] += per_host * (phase["hosts"][BUSY] * remade)
    wasted["training lost to failures, and made again"] = _lost(records, stopped, running)
    for sae_id in saes.keys() | shares.keys():
        status = stopped.get(sae_id, "")
        settled.saes.append(SAECost(sae_id, saes.get(sae_id, "-"), status, tokens[sae_id], shares[sae_id]))
        if status:
            wasted["SAEs that were pruned" if status == PRUNED else "SAEs that diverged or failed"] += shares[sae_id]
    settled.saes.sort(key=lambda one: (-one.amount.gpu_seconds, -one.amount.cpu_seconds, one.sae_id))
    settled.wasted = {reason: amount for reason, amount in sorted(wasted.items()) if amount != Amount()}
    return settled


def _lost(records: Sequence[Mapping[str, Any]], stopped: Mapping[str, str], running: bool) -> Amount:
    """What workers have trained beyond their SAEs' last checkpoints, and then ended without saving it."""
    at_work: dict[str, tuple[Amount, Mapping[str, Any], float]] = {}
    lost = Amount()

    def settle_worker(sae_id: str) -> Amount:
        per_pack, worker, stepping = at_work.pop(sae_id)
        spent, saved, _ = worker["saes"][sae_id]
        unsaved = (spent - saved) / stepping if stepping else 0.0
        return Amount() if sae_id in stopped else per_pack * (worker["held"] * unsaved)

    for record in records:
        for worker in sorted(record["workers"].values(), key=lambda one: one["started"]):
            stepping = sum(spent for spent, _, _ in worker["saes"].values())
            for sae_id in worker["saes"]:
                if sae_id in at_work:
                    lost += settle_worker(sae_id)
                at_work[sae_id] = (Amount(**record["per_pack"]), worker, stepping)
        if not running or record is not records[-1]:
            lost += _sum([settle_worker(sae_id) for sae_id in list(at_work)])
    return lost


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights as shares of their sum; even ones where they are all 0."""
    total = sum(weights.values())
    return {name: weight / total if total else 1 / len(weights) for name, weight in weights.items()}


def _sum(amounts: Iterable[Amount]) -> Amount:
    found = Amount()
    for amount in amounts:
        found += amount
    return found
