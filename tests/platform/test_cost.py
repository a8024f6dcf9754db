"""What `penstock cost` makes of the books of a sweep's attempts, and how they are kept."""

import json

import pytest

from penstock.accounts import WRITE_SECONDS, Accounts, WorkerClock
from penstock.cost import Amount, Prices, cost, settle
from penstock.errors import SweepError
from penstock.home import Home, remember
from penstock.storage import Storage
from penstock.sweep_files import accounts_folder

SAES = {name: "topk k=4 · blocks.1.hook_resid_post" for name in ("a", "b")}


def worker(name, started, held, saes, waiting=0.0):
    return {"worker": name, "pack": "p", "started": started, "held": held, "waiting": waiting, "saes": saes}


def record(workers=(), phases=None, *, over=True, started=0.0, stopped=None, blocks=None, price=None):
    """An attempt on hosts of 1 GPU and 4 CPUs and packs of half a GPU and 1 CPU."""
    return {
        "started": started, "time": started + 100, "over": over,
        "per_host": {"gpu_seconds": 1, "cpu_seconds": 4}, "per_pack": {"gpu_seconds": 0.5, "cpu_seconds": 1},
        "gpu_hour_cost": price,
        "phases": {
            name: {"seconds": seconds, "hosts": dict(zip(("busy", "idle", "starting"), hosts, strict=True))}
            for name, (seconds, *hosts) in (phases or {}).items()
        },
        "workers": {one["worker"]: one for one in workers},
        "saes": SAES, "stopped": stopped or {}, "blocks": blocks or {},
    }  # fmt: skip


def settled(*records, **prices):
    return settle("small", "id", list(records), Prices(**prices), now=records[-1]["time"] + 1)


def shares(found):
    return {one.sae_id: one.amount.gpu_seconds for one in found.saes}


def test_the_phases_hold_hosts_and_packs_and_the_saes_bear_all_of_it():
    found = settled(
        record(
            [worker("w", 5, 80, {"a": [30, 30, 1000], "b": [10, 10, 3000]}, waiting=20)],
            {"start": (10, 0, 0, 20), "train": (90, 60, 30, 0), "evaluate": (10, 10, 0, 0)},
        )
    )
    assert found.phases["start"] == (10, Amount(20, 80), Amount())
    assert found.phases["train"] == (90, Amount(90, 360), Amount(40, 80))  # hosts of a GPU, a pack of half of one
    assert found.total == Amount(20 + 90 + 40 + 10, 80 + 360 + 80 + 40)
    # Half of start and evaluation each; the pack by its seconds, the hosts' training time by tokens.
    assert shares(found) == pytest.approx({"a": 15 + 30 + 22.5, "b": 15 + 10 + 67.5})
    assert sum(shares(found).values()) == pytest.approx(found.total.gpu_seconds)
    assert found.wasted["packs waiting for blocks"] == Amount(10, 20)
    assert found.wasted["packs starting, saving and looking up"] == Amount(10, 20)  # 80 - 20 - 40 s
    assert found.wasted["hosts idle"] == Amount(30, 120)
    assert found.wasted["hosts loading the model, or waiting for room"] == Amount(20, 80)
    assert "training lost to failures, and made again" not in found.wasted


def test_what_was_not_saved_is_lost_when_another_worker_or_attempt_makes_it_again():
    killed = worker("w1", 5, 40, {"a": [30, 15, 600], "b": [10, 10, 600]})  # half of a's time was never saved
    again = worker("w2", 50, 40, {"a": [40, 40, 900]})
    at_work = worker("w3", 95, 10, {"b": [10, 0, 10]})
    lost = "training lost to failures, and made again"
    assert settled(record([killed, again])).wasted[lost] == Amount(40 * 15 / 40 * 0.5, 40 * 15 / 40)
    # An attempt that still runs may yet save what its latest workers have done; one that is over cannot.
    assert lost not in settled(record([at_work], over=False)).wasted
    assert settled(record([at_work], over=True)).wasted[lost] == Amount(5, 10)
    # Of a driver that was killed nobody has written that it is over, but another attempt has followed.
    two = settled(record([at_work], over=False), record([worker("w4", 200, 20, {"b": [20, 20, 9]})], started=190))
    assert two.wasted[lost] == Amount(5, 10) and two.attempts == 2 and not two.running


def test_a_driver_that_writes_its_books_no_more_does_not_run():
    killed = record([worker("w1", 5, 40, {"a": [30, 15, 600], "b": [10, 10, 600]})], over=False)

    def after(seconds):
        return settle("small", "id", [killed], Prices(), now=killed["time"] + seconds)

    assert after(WRITE_SECONDS).running and "1 attempt, the last one still runs\n" in after(WRITE_SECONDS).as_text()
    dead = after(60.0)
    assert not dead.running and "the driver of the last is heard of no more\n" in dead.as_text()
    assert dead.wasted["training lost to failures, and made again"] == Amount(40 * 15 / 40 * 0.5, 40 * 15 / 40)


def test_what_a_dead_driver_left_open_is_lost_even_where_its_saes_are_never_trained_again():
    left = worker("w1", 5, 40, {"a": [30, 15, 600], "b": [10, 10, 600]})
    two = settled(record([left], over=False), record([], started=190, over=False))
    assert two.wasted["training lost to failures, and made again"] == Amount(40 * 15 / 40 * 0.5, 40 * 15 / 40)


def test_saes_that_gave_nothing_and_blocks_made_again_are_named():
    saes = {"a": [10, 0, 500], "b": [30, 30, 500]}
    found = settled(
        record([worker("w", 0, 40, saes)], {"train": (50, 40, 10, 0)}, stopped={"a": "diverged"},
               blocks={"blocks_made": 20, "blocks_remade": 5})
    )  # fmt: skip
    assert found.wasted["SAEs that diverged or failed"] == Amount(5 + 25, 10 + 100)
    assert found.wasted["blocks made again"] == Amount(10, 40)
    assert "training lost to failures, and made again" not in found.wasted  # it is counted as diverged
    pruned = settled(record([worker("w", 0, 40, saes)], stopped={"b": "pruned"}))
    assert pruned.wasted["SAEs that were pruned"] == Amount(15, 30)


def test_an_sae_that_failed_and_was_trained_in_another_attempt_is_no_loss():
    failed = record([worker("w1", 0, 40, {"a": [40, 40, 500]})], stopped={"a": "failed"})
    trained = record([worker("w2", 200, 40, {"a": [40, 40, 500]})], started=190)
    assert "SAEs that diverged or failed" in settled(failed).wasted
    found = settled(failed, trained)
    assert "SAEs that diverged or failed" not in found.wasted and not any(one.status for one in found.saes)


def test_money_is_shown_where_a_price_is_known():
    one = record([worker("w", 0, 3600, {"a": [3600, 3600, 10]})], {"train": (3600, 3600, 0, 0)})
    found = settled(one, gpu_hour=2.0, cpu_hour=0.1)
    assert json.loads(found.as_json())["total"]["money"] == pytest.approx(1.5 * 2 + 5 * 0.1)
    assert "3.50" in found.as_text() and "--gpu-hour" not in found.as_text()
    unpriced = settled(one)
    assert "money" not in json.loads(unpriced.as_json())["total"] and "--gpu-hour" in unpriced.as_text()


def test_the_books_are_kept_while_it_runs(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    storage = Storage(tmp_path)
    file = f"{accounts_folder('id')}/000000001000-token.json"
    about = {name: value for name, value in record(started=1000.0, price=1.5).items()
             if name in ("started", "per_host", "per_pack", "gpu_hour_cost")}  # fmt: skip
    books = Accounts(storage, file, about)

    def tick(seconds, phase, *states, stopped=None):
        now[0] += seconds
        books.tick(phase, {f"host-{n}": state for n, state in enumerate(states)}, stopped or {}, {"blocks_made": 1})

    tick(WRITE_SECONDS + 1, "start", "starting", "starting")
    assert storage.read_json(file)["phases"]["start"]["hosts"] == {"busy": 0, "idle": 0, "starting": 22}
    tick(2, "train", "block 7", "idle", "no such model")  # the last one could not be built: it holds nothing
    tick(3, "evaluate", "idle", "idle")  # the stream's word on them is an old one
    clock = WorkerClock("p")
    now[0] += 6
    books.heed(clock.event({"a": (1.0, 0.0, 10)}, 0.0))
    books.heed(clock.event({"a": (2.0, 2.0, 20)}, 0.5))
    books.write(over=True)
    written = storage.read_json(file)
    assert written["over"] and written["blocks"] == {"blocks_made": 1}
    assert written["phases"]["train"] == {"seconds": 2, "hosts": {"busy": 2, "idle": 2, "starting": 0}}
    assert written["phases"]["evaluate"]["hosts"] == {"busy": 6, "idle": 0, "starting": 0}
    (only,) = written["workers"].values()
    assert (only["held"], only["waiting"], only["saes"]) == (6, 0.5, {"a": [2.0, 2.0, 20]})
    # A disk that is full costs the sweep nothing but its books.
    monkeypatch.setattr(Storage, "write", lambda *_: (_ for _ in ()).throw(OSError("full")))
    books.write()


def test_prices_come_from_the_command_or_the_spec(tmp_path):
    storage, home = Storage(tmp_path / "there"), Home(tmp_path / "home")
    remember(home, "small", "id", storage)
    with pytest.raises(SweepError, match="has noted nothing of its cost"):
        cost(home, "small")
    storage.write_json(f"{accounts_folder('id')}/2.json", record(started=500, price=3.0))
    storage.write_json(f"{accounts_folder('id')}/1.json", record(started=20, price=1.0))
    assert cost(home, "small").prices == Prices(3.0, None)
    assert cost(home, "id", 0.5, 0.25).prices == Prices(0.5, 0.25)
    with pytest.raises(SweepError, match="no sweep 'other' was started"):
        cost(home, "other")
