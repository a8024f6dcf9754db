"""The driver's side of search: what it takes over, writes down first, and tells the packs."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import ray

from penstock import decisions
from penstock.decisions import PROBE_TRIES, Pruner, add_saes
from penstock.errors import SweepError
from penstock.fleet import Fleet as RealFleet
from penstock.home import Home
from penstock.plan import plan_packs
from penstock.search import Stop
from penstock.storage import Storage
from penstock.sweep import Driver
from whole_sweeps import evaluate, quiet, resolve, train, write_inputs, write_spec

HOOK = "blocks.1.hook_resid_post"
ENTRY = "{architecture: topk, d_sae: 2x, k: [2, 6]}, {architecture: topk, d_sae: 2x, k: [3, 7], lr: 1.0e-6}"
SEARCH = "search: {prune: true, fill: 2}\n"
RUNG = 15  # half of the run's 30 steps
GOOD, BAD = (6.0, 0.9), (6.5, 0.5)  # L0, explained variance


class Fleet:
    """Takes note of what the packs are told. `answers` is what the stream answers, one a call."""

    def __init__(self, *answers: bool):
        self.incarnation, self.told, self.answers, self.hosts_up = 1, [], list(answers), []

    def stop_saes(self, stops):
        self.told.append(dict(stops))
        return self.answers.pop(0) if self.answers else True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def resolved(tmp_path, inputs):
    """A sweep of four SAEs and a baseline, with search activations that are there, and its model host."""
    sweep, host = resolve(write_spec(tmp_path / "s.yaml", inputs, "s", HOOK, ENTRY, rest=SEARCH), Home(tmp_path / "h"))
    sample = host.sample(sweep.store, sweep.spec.data, "search", 100, [HOOK])
    sweep.probe.store(sweep.storage, HOOK, sample[HOOK])
    return sweep, host


def candidates(sweep):
    return {sae.settings.k: sae.sae_id for sae in sweep.saes if sae.baseline is None}


def event(sae_id, l0, explained_variance, kind="rung"):
    return {"kind": kind, "sae_id": sae_id, "step": RUNG, "l0": l0, "explained_variance": explained_variance,
            "dead_fraction": 0.0, "tokens": RUNG * 50}  # fmt: skip


def started(sweep, fleet) -> Pruner:
    pruner = Pruner(sweep, fleet, quiet)
    pruner.begin(plan_packs(sweep.spec, sweep.left()), slots=2)
    return pruner


def test_a_stop_is_in_the_journal_before_the_packs_hear_of_it(resolved):
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet()
    pruner = started(sweep, fleet)
    told_when = []
    fleet.stop_saes = lambda stops: told_when.append([sweep.journal.is_pruned(sae_id) for sae_id in stops]) or True
    for k, figures in {2: (2.0, 0.5), 6: GOOD, 3: (3.0, 0.5), 7: BAD}.items():
        pruner.heed(event(ids[k], *figures))
    pruner.decide()
    assert told_when == [[True]]
    record = sweep.stopped(next(sae for sae in sweep.saes if sae.sae_id == ids[7]))
    assert record["status"] == "pruned" and record["rung"] == RUNG and record["tokens"] == RUNG * 50
    assert ids[6] in record["reason"]
    assert ids[7] not in [sae.sae_id for sae in sweep.left()]


def test_baselines_are_neither_waited_for_nor_compared(resolved):
    sweep, _ = resolved
    fleet = Fleet()
    pruner = started(sweep, fleet)
    baseline = next(sae.sae_id for sae in sweep.saes if sae.baseline is not None)
    pruner.heed(event(baseline, 1.0, 0.99))
    for sae_id in candidates(sweep).values():
        pruner.heed(event(sae_id, *GOOD))
    pruner.decide()
    assert fleet.told == []


def test_a_new_stream_is_told_again_and_so_is_one_that_did_not_answer(resolved):
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet(False, True)
    pruner = started(sweep, fleet)
    for k in ids:
        pruner.heed(event(ids[k], *(BAD if k == 7 else GOOD)))
    pruner.decide()
    assert len(fleet.told) == 1
    pruner.decide()
    assert len(fleet.told) == 2
    pruner.decide()
    assert len(fleet.told) == 2
    fleet.incarnation = 2
    pruner.decide()
    assert len(fleet.told) == 3 and set(fleet.told[-1]) == {ids[7]}


def test_a_driver_that_starts_again_takes_over_figures_and_stops(resolved):
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet()
    sweep.journal.write_stop(Stop(ids[3], RUNG, "as an earlier driver had it"), RUNG * 50)
    for k in (6, 3):
        record = {key: value for key, value in event(ids[k], *GOOD).items() if key not in ("kind", "sae_id")}
        sweep.storage.write_json(sweep.probe.rung_file(ids[k], RUNG), record)
    pruner = started(sweep, fleet)
    pruner.decide()
    assert fleet.told == []  # 2 and 7 have not reached the rung
    pruner.heed(event(ids[2], 2.0, 0.5))
    pruner.heed(event(ids[7], *BAD))
    pruner.decide()
    assert [set(told) for told in fleet.told] == [{ids[7]}]
    assert sweep.journal.pruned(ids[3])["reason"] == "as an earlier driver had it"


def test_saes_that_failed_or_finished_hold_nobody_up(resolved):
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet()
    pruner = started(sweep, fleet)
    pruner.heed(event(ids[6], *GOOD))
    pruner.heed(event(ids[7], *BAD))
    pruner.heed({"kind": "stopped", "sae_id": ids[2], "status": "diverged", "reason": "of a large lr"})
    pruner.decide()
    assert fleet.told == []
    pruner.heed({"kind": "finished", "sae_id": ids[3]})
    pruner.decide()
    assert [set(told) for told in fleet.told] == [{ids[7]}]


def test_what_a_stream_that_is_restarted_has_lost_is_read_in_storage(resolved):
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet()
    pruner = started(sweep, fleet)
    pruner.heed(event(ids[6], *GOOD))
    pruner.heed(event(ids[7], *BAD))
    record = {key: value for key, value in event(ids[2], 2.0, 0.5).items() if key not in ("kind", "sae_id")}
    sweep.storage.write_json(sweep.probe.rung_file(ids[2], RUNG), record)  # its report does not arrive
    sweep.storage.write_json(f"saes/{ids[3]}/stopped.json", {"status": "failed", "reason": "", "step": 3})
    pruner.decide()
    assert fleet.told == []
    fleet.incarnation = 2
    pruner.decide()
    assert [set(told) for told in fleet.told] == [{ids[7]}]


def test_an_sae_resumed_behind_a_rung_without_figures_holds_nobody_up_there(resolved):
    """Its checkpoint was written by a sweep that prunes nothing."""
    sweep, _ = resolved
    ids, fleet = candidates(sweep), Fleet()
    for k in (2, 3):
        sweep.storage.commit_folder(f"saes/{ids[k]}/checkpoints/step-{RUNG + 2:09d}", {"about.json": b"{}"})
    pruner = started(sweep, fleet)
    pruner.heed(event(ids[6], *GOOD))
    pruner.heed(event(ids[7], *BAD))
    pruner.decide()
    assert [set(told) for told in fleet.told] == [{ids[7]}]


def test_an_sae_that_fails_before_it_hears_that_it_is_stopped_is_not_tried_again(resolved):
    sweep, _ = resolved
    sae = next(sae for sae in sweep.saes if sae.baseline is None)
    sweep.journal.write_stop(Stop(sae.sae_id, RUNG, "beaten"), RUNG * 50)
    sweep.storage.write_json(f"saes/{sae.sae_id}/stopped.json", {"status": "failed", "reason": "disk", "step": 20})
    assert sweep.stopped(sae)["status"] == "pruned"
    assert sae.sae_id not in [one.sae_id for one in sweep.left()]


def test_an_sae_that_finished_before_it_heard_that_it_is_stopped_has_spared_nothing(resolved):
    sweep, _ = resolved
    driver = SimpleNamespace(spec=sweep.spec, sweep=sweep)
    finished, stopped = (sae.sae_id for sae in sweep.saes if sae.baseline is None and sae.settings.k in (3, 7))
    for sae_id in (finished, stopped):
        sweep.journal.write_stop(Stop(sae_id, RUNG, "beaten"), RUNG * 50)
    sweep.storage.commit_folder(f"saes/{finished}/final", {"summary.json": b"{}"})
    assert Driver._saved(driver) == {"saes_pruned": 1, "sae_tokens_spared": (30 - RUNG) * 50}


class MakesProbe:
    """A host whose answer is kept in `answer`."""

    def __init__(self, sweep, sample, dies):
        self.asked, self.make_probe = 0, self
        self._sweep, self._sample, self._dies = sweep, sample, dies

    def remote(self, tokens_id, probe, arrays):
        self.asked += 1
        if not self._dies:
            for array in arrays:
                probe.store(self._sweep.storage, array, self._sample[array])
        return self

    def answer(self):
        if self._dies:
            raise ray.exceptions.ActorDiedError()


@pytest.fixture
def answered(monkeypatch):
    monkeypatch.setattr(ray, "wait", lambda requests, timeout: (requests, []))
    monkeypatch.setattr(ray, "get", lambda host: host.answer())


def test_another_host_makes_the_search_activations_where_one_dies(tmp_path, inputs, answered):
    sweep, host = resolve(write_spec(tmp_path / "s.yaml", inputs, "s", HOOK, ENTRY, rest=SEARCH), Home(tmp_path / "h"))
    sample, fleet = host.sample(sweep.store, sweep.spec.data, "search", 100, [HOOK]), Fleet()
    fleet.hosts_up = [MakesProbe(sweep, sample, True), MakesProbe(sweep, sample, False)]
    pruner = started(sweep, fleet)
    for _ in range(PROBE_TRIES):
        pruner.decide()
    assert sweep.probe.is_there(sweep.storage, [HOOK])
    assert sum(one.asked for one in fleet.hosts_up) <= 2


def test_the_search_activations_are_asked_of_hosts_that_answer(tmp_path, inputs, answered):
    """One that waits for room would never make them."""
    sweep, host = resolve(write_spec(tmp_path / "s.yaml", inputs, "s", HOOK, ENTRY, rest=SEARCH), Home(tmp_path / "h"))
    fleet = Fleet()
    pruner = started(sweep, fleet)
    pruner.decide()
    assert not sweep.probe.is_there(sweep.storage, [HOOK])
    fleet.hosts_up = [MakesProbe(sweep, host.sample(sweep.store, sweep.spec.data, "search", 100, [HOOK]), False)]
    pruner.decide()
    assert sweep.probe.is_there(sweep.storage, [HOOK])


def test_a_host_is_up_when_the_stream_says_that_it_answers(tmp_path):
    fleet = RealFleet(None, Storage(tmp_path), quiet)
    fleet.hosts = {name: name for name in ("loading", "new", "free", "busy", "gone")}
    assert fleet.hosts_up == []
    fleet._states = {"loading": "starting", "free": "idle", "busy": "block 3", "gone": "ModelError: no such model"}
    assert fleet.hosts_up == ["free", "busy"]


def test_a_sweep_whose_hosts_die_of_the_search_activations_ends_with_the_reason(tmp_path, inputs, answered):
    sweep, _ = resolve(write_spec(tmp_path / "s.yaml", inputs, "s", HOOK, ENTRY, rest=SEARCH), Home(tmp_path / "h"))
    fleet = Fleet()
    fleet.hosts_up = [MakesProbe(sweep, {}, True)]
    pruner = started(sweep, fleet)
    with pytest.raises(SweepError, match="search activations could not be made"):
        for _ in range(PROBE_TRIES + 1):
            pruner.decide()


def test_the_front_is_filled_by_the_search_split_once_and_with_the_ids_of_a_grid(
    resolved, tmp_path, inputs, monkeypatch
):
    sweep, host = resolved
    train(sweep, host)

    def in_this_process(sweep, hosts, say, split, saes, check):
        return evaluate(sweep, host, split, saes)

    monkeypatch.setattr(decisions, "evaluate_on_hosts", in_this_process)
    said = []
    add_saes(sweep, [], said.append)
    again = replace(sweep)
    assert again.sweep_id == sweep.sweep_id
    assert again.journal.proposals() and again.added == again.saes[len(sweep.saes) :]
    assert said[0] == f"filling the front: {len(again.added)} more SAEs"
    assert {sae.sae_id for sae in again.left()} == {sae.sae_id for sae in again.added}
    added = again.added[0]
    lr = "" if added.settings.lr is None else f", lr: {added.settings.lr}"
    grid = f"{{architecture: topk, d_sae: 2x, k: {added.settings.k}{lr}}}"
    as_asked, _ = resolve(write_spec(tmp_path / "g.yaml", inputs, "g", HOOK, grid), Home(tmp_path / "h"))
    assert added.sae_id in {sae.sae_id for sae in as_asked.saes}
    evaluated = [path.name for path in (tmp_path / "h").glob("saes/*/evaluation-*.json")]
    assert len(evaluated) == 4  # on the search split, and none on the other
