"""The decisions of a running sweep, as pure functions."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.journal import Journal
from penstock.search import (
    Figures,
    Peer,
    Point,
    Proposal,
    Pruning,
    Stop,
    propose,
    rung_steps,
    stops,
    with_l0,
)
from penstock.sites import Site
from penstock.storage import Storage

HOOK = "blocks.1.hook_resid_post"
SITE = Site(HOOK, HOOK)


def peer(name: str, *, group: str = "a", variant: str | None = None, hook: str = HOOK, settled_after: int = 0) -> Peer:
    return Peer(name, hook, (hook, group), variant or name, settled_after)


def at(l0: float, explained_variance: float, dead: float = 0.0) -> Figures:
    return Figures(l0, explained_variance, dead)


def test_rungs_are_geometric_parts_of_a_run() -> None:
    assert rung_steps(976) == (61, 122, 244, 488)
    assert rung_steps(3) == (1,)
    assert rung_steps(1) == ()


# ---- stops ----------------------------------------------------------------------------------------------------------


def test_an_sae_that_needs_more_latents_and_leaves_more_unexplained_is_stopped_with_the_reason() -> None:
    found = stops({peer("good"): at(16, 0.90), peer("bad"): at(17, 0.85)}, margin=0.1)
    assert found == {
        "bad": "SAE good beats it at equal tokens: L0 16.0, explained variance 0.9000 against L0 17.0, 0.8500"
    }


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (at(15, 0.5), "fewer latents a token"),
        (at(17, 0.895), "within the margin: 0.105 unexplained against 0.1"),
        (at(17, 0.8901), "still within it"),
    ],
)
def test_an_sae_stays_that_is_not_beaten_by_the_margin(own: Figures, why: str) -> None:
    assert stops({peer("good"): at(16, 0.90), peer("other"): own}, margin=0.1) == {}, why


def test_just_beyond_the_margin_is_stopped() -> None:
    assert set(stops({peer("good"): at(16, 0.90), peer("other"): at(16, 0.8899)}, margin=0.1)) == {"other"}


def test_saes_of_another_width_or_another_seed_of_the_same_settings_stop_nobody() -> None:
    figures = {
        peer("wide", group="wide"): at(8, 0.99),
        peer("seed 0", variant="topk k=16"): at(16, 0.95),
        peer("seed 1", variant="topk k=16"): at(16.1, 0.80),
    }
    assert stops(figures, margin=0.1) == {}


def test_dead_and_useless_saes_are_stopped_and_beat_nobody() -> None:
    figures = {
        peer("silent"): at(0.01, 0.2),
        peer("dead"): at(5, 0.9, dead=0.995),
        peer("worse than the mean"): at(4, -0.1),
        peer("not a number"): at(4, math.nan),
        peer("fine"): at(20, 0.5),
    }
    found = stops(figures, margin=0.0)
    assert set(found) == {"silent", "dead", "worse than the mean", "not a number"}
    assert found["silent"].startswith("dead: L0 0.01")
    assert found["worse than the mean"] == "it explains nothing: explained variance -0.100"


def test_where_no_sae_explains_anything_yet_all_go_on_but_the_dead() -> None:
    """Early in a short run, or of transcoders, which begin further away: they end as a front."""
    figures = {
        peer("slow"): at(6, -0.8),
        peer("slower"): at(7, -1.2),
        peer("dead"): at(0.01, -0.1),
        peer("not a number"): at(4, math.nan),
        peer("of another width", group="wide"): at(4, 0.5),
    }
    assert set(stops(figures, margin=0.1)) == {"dead", "not a number"}
    seeds = {peer("seed 0", variant="one"): at(6, -0.1), peer("seed 1", variant="one"): at(6, 0.1)}
    assert stops(seeds, margin=0.1) == {}


FIGURES = st.builds(Figures, st.floats(0.2, 100), st.floats(-0.5, 0.999), st.floats(0, 0.9))


@given(st.lists(FIGURES, min_size=1, max_size=12), st.floats(0, 0.5))
def test_what_no_other_sae_beats_always_stays(all_figures: list[Figures], margin: float) -> None:
    figures = {peer(str(index)): own for index, own in enumerate(all_figures)}
    stopped = stops(figures, margin)
    useful = {one: own for one, own in figures.items() if own.explained_variance > 0}
    for one, own in useful.items():
        better = [other for other in useful.values() if other.explained_variance > own.explained_variance]
        if not any(other.l0 <= own.l0 for other in better):
            assert one.sae_id not in stopped
    for name in stopped:  # each is beaten by one that goes on
        own = figures[peer(name)]
        assert own.explained_variance <= 0 or any(
            other.l0 <= own.l0 and other.explained_variance > own.explained_variance
            for one, other in useful.items()
            if one.sae_id not in stopped
        )


# ---- rungs ----------------------------------------------------------------------------------------------------------


def pruning(*peers: Peer) -> Pruning:
    state = Pruning({one.sae_id: one for one in peers}, margin=0.1)
    for one in peers:
        state.begin(one.sae_id)
    return state


def test_a_rung_is_decided_when_every_live_sae_of_the_hook_point_has_reached_it() -> None:
    state = pruning(peer("a"), peer("b"), peer("c", hook="elsewhere"))
    state.reach("a", 61, at(16, 0.9))
    assert state.decide() == []
    state.reach("b", 61, at(20, 0.5))
    assert [(stop.sae_id, stop.rung) for stop in state.decide()] == [("b", 61)]
    assert state.decide() == []
    state.reach("a", 122, at(16, 0.9))  # b is not waited for any more
    assert state.decide() == []
    assert not state._undecided


def test_an_sae_that_failed_is_not_waited_for() -> None:
    state = pruning(peer("a"), peer("b"), peer("gone"))
    state.reach("a", 61, at(16, 0.9))
    state.reach("b", 61, at(20, 0.5))
    assert state.decide() == []
    state.fail("gone")
    assert [stop.sae_id for stop in state.decide()] == ["b"]


def test_saes_whose_warm_up_is_not_over_neither_stop_nor_are_stopped() -> None:
    state = pruning(peer("a"), peer("warming up", settled_after=100), peer("b"))
    state.reach("warming up", 61, at(10, 0.99))
    state.reach("a", 61, at(16, 0.9))
    state.reach("b", 61, at(20, 0.89))
    assert state.decide() == []
    for name, figures in (("warming up", at(10, 0.99)), ("a", at(16, 0.9)), ("b", at(20, 0.89))):
        state.reach(name, 122, figures)
    assert {stop.sae_id for stop in state.decide()} == {"a", "b"}


def test_a_later_wave_is_compared_with_those_that_passed_the_rung_before() -> None:
    state = Pruning({name: peer(name) for name in ("first", "second")}, margin=0.1)
    state.begin("first")
    state.reach("first", 61, at(16, 0.9))
    assert state.decide() == []
    state.end("first")
    state.begin("second")
    state.reach("second", 61, at(20, 0.5))
    assert [stop.sae_id for stop in state.decide()] == ["second"]


def test_a_later_wave_does_not_stop_what_has_finished() -> None:
    state = Pruning({name: peer(name) for name in ("first", "second")}, margin=0.1)
    state.begin("first")
    state.reach("first", 61, at(20, 0.5))
    state.end("first")
    state.begin("second")
    state.reach("second", 61, at(16, 0.9))
    assert state.decide() == []


def test_an_sae_that_was_stopped_beats_nobody_at_the_rungs_behind() -> None:
    """It gets there where it trains on until it hears of the decision, or where another sweep has trained it."""
    state = pruning(peer("a"), peer("stopped"), peer("sparse"))
    for name, figures in (("a", at(16, 0.9)), ("stopped", at(20, 0.5)), ("sparse", at(12, 0.6))):
        state.reach(name, 61, figures)
    assert [stop.sae_id for stop in state.decide()] == ["stopped"]
    for name, figures in (("stopped", at(10, 0.99)), ("a", at(16, 0.92)), ("sparse", at(12, 0.9))):
        state.reach(name, 122, figures)
    assert state.decide() == []


def test_an_sae_that_has_failed_beats_nobody() -> None:
    state = pruning(peer("diverges"), peer("b"))
    state.reach("diverges", 61, at(16, 0.9))
    state.fail("diverges")
    state.reach("b", 61, at(20, 0.5))
    assert state.decide() == []


def test_an_sae_resumed_behind_a_rung_where_it_was_not_measured_is_not_waited_for_there() -> None:
    """Its checkpoint is of a sweep that pruned nothing."""
    state = pruning(peer("a"), peer("b"), peer("resumed"))
    state.begin("resumed", 61)
    state.reach("a", 61, at(16, 0.9))
    state.reach("b", 61, at(20, 0.5))
    assert [stop.sae_id for stop in state.decide()] == ["b"]
    state.reach("a", 122, at(16, 0.9))
    assert state.decide() == [] and state._undecided


def test_an_sae_of_a_later_wave_that_stood_behind_a_rung_when_it_was_decided_is_decided_on_as_it_goes_on() -> None:
    state = Pruning({name: peer(name) for name in ("first", "second")}, margin=0.1)
    state.begin("first")
    for name, figures in (("first", at(16, 0.9)), ("second", at(20, 0.5))):
        state.reach(name, 61, figures)  # second's as an earlier driver had left it
    assert state.decide() == []
    state.begin("second", 80)
    assert [(stop.sae_id, stop.rung) for stop in state.decide()] == [("second", 61)]


@given(st.randoms(use_true_random=False), st.lists(st.tuples(FIGURES, FIGURES, FIGURES), min_size=2, max_size=8))
def test_the_order_of_reports_decides_nothing(
    order: random.Random, all_figures: list[tuple[Figures, Figures, Figures]]
) -> None:
    """Nor how far an SAE gets before it hears that it is stopped, nor a driver that starts again on the way."""
    names, rungs = [str(index) for index in range(len(all_figures))], (61, 122, 244)

    def decided(turns: list[str], restarts: bool) -> set[tuple[str, int]]:
        state = pruning(*(peer(name) for name in names))
        at_rung, found = dict.fromkeys(names, 0), []
        for name in turns:
            if name in state.stopped and order.random() < 0.5:
                continue
            if at_rung[name] < len(rungs):
                state.reach(name, rungs[at_rung[name]], all_figures[int(name)][at_rung[name]])
                at_rung[name] += 1
            if restarts and order.random() < 0.2:
                state = pruning(*(peer(one) for one in names))
                for one in names:
                    for index in range(at_rung[one]):
                        state.reach(one, rungs[index], all_figures[int(one)][index])
                for stop in found:
                    state.stop(stop.sae_id, stop.rung)
            found += state.decide()
        assert len({stop.sae_id for stop in found}) == len(found)
        return {(stop.sae_id, stop.rung) for stop in found}

    shuffled = names * 3
    order.shuffle(shuffled)
    in_step = decided(names * 3, restarts=False)
    assert decided(shuffled, restarts=False) == in_step
    assert decided(shuffled, restarts=True) == in_step


def test_a_driver_that_starts_again_comes_to_the_same_decisions() -> None:
    """What stood in the journal and at the rungs is taken over; of three to be stopped one had been written."""
    peers = [peer("good"), *(peer(f"bad {index}") for index in range(3))]
    figures = {"good": at(16, 0.9), **{f"bad {index}": at(20 + index, 0.5) for index in range(3)}}
    before = pruning(*peers)
    for name, own in figures.items():
        before.reach(name, 61, own)
    first = before.decide()
    after = pruning(*peers)
    after.stop("bad 1", 61)
    for name, own in figures.items():
        after.reach(name, 61, own)
    assert after.decide() == [stop for stop in first if stop.sae_id != "bad 1"]


# ---- filling --------------------------------------------------------------------------------------------------------


def point(l0: float, ce_recovered: float, settings: dict[str, object] | None = None, site: Site = SITE) -> Point:
    settings = settings or {"architecture": "topk", "d_sae": 64, "k": round(l0)}
    return Point(f"{settings['architecture']}-{l0}", site, settings, l0, ce_recovered)


def test_the_widest_gap_is_filled_first() -> None:
    points = [point(4, 0.80), point(8, 0.90), point(64, 0.98)]
    first, second = propose(points, None, 2)
    # Between 4 and 8: log 2 * 0.1 = 0.069; between 8 and 64: log 8 * 0.08 = 0.166, and a quarter of it then.
    assert first.settings["k"] == 23
    assert second.settings["k"] == 6
    assert first.reason == f"between L0 8 and 64 of the front at {HOOK}, d_sae 64"


def test_a_band_opens_gaps_at_its_ends_and_leaves_out_what_lies_outside() -> None:
    points = [point(2, 0.5), point(20, 0.9), point(40, 0.95), point(500, 0.999)]
    first, second = propose(points, (5, 100), 2)
    assert first.settings["k"] == 6 and first.reason.startswith("at the band's lower end, L0 5 at ")
    # Between 6 and 20, expected to rise from 0.807 to 0.9, is more to be won than beyond 40.
    assert second.settings["k"] == 10
    many = propose(points, (5, 100), 8)
    assert all(5 <= proposal.settings["k"] <= 100 for proposal in many)
    assert any(proposal.reason.startswith("between the front's end, L0 40, and the band's, 100") for proposal in many)
    assert propose(points, (30, 40), 1)[0].settings["k"] == 33  # one SAE in the band: only its level is known


def test_a_dominated_sae_lends_its_settings_to_nobody() -> None:
    gated = {"architecture": "gated", "d_sae": 64, "l1_coefficient": 1.0}
    points = [point(4, 0.8), point(30, 0.7, gated), point(64, 0.98)]
    assert [proposal.settings["architecture"] for proposal in propose(points, None, 3)] == ["topk"] * 3


def test_the_architecture_that_is_on_the_front_more_often_fills_its_gaps() -> None:
    jump = {"architecture": "jumprelu", "d_sae": 64, "target_l0": 64.0}
    points = [point(4, 0.8), point(8, 0.9), point(64, 0.98, jump)]
    assert propose(points, None, 1)[0].settings == {"architecture": "topk", "d_sae": 64, "k": 23}


def test_a_coefficient_gives_way_to_a_target_and_every_other_setting_stays() -> None:
    settings = {"architecture": "standard", "d_sae": 64, "lr": 8e-3, "l1_coefficient": 2.0, "l1_warm_up_steps": 200}
    assert with_l0(settings, 22.627) == {"architecture": "standard", "d_sae": 64, "lr": 8e-3, "target_l0": 22.6}
    assert with_l0({"architecture": "jumprelu", "d_sae": 64, "l0_coefficient": 1.0, "l0_warm_up_steps": 5}, 8.0) == {
        "architecture": "jumprelu", "d_sae": 64, "target_l0": 8.0,
    }  # fmt: skip


def test_what_is_there_already_is_not_proposed_and_does_not_end_the_search() -> None:
    points = [point(4, 0.8), point(8, 0.9), point(64, 0.98)]

    def refused(proposal: Proposal) -> bool:
        return proposal.settings["k"] == 23

    assert 23 not in [proposal.settings["k"] for proposal in propose(points, None, 3, refused)]
    assert propose([point(4, 0.8)], None, 3) == []
    assert propose([], (1, 10), 3) == []


def test_hook_points_and_widths_have_fronts_of_their_own() -> None:
    other = Site("blocks.4.hook_resid_post", "blocks.4.hook_resid_post")
    wide = {"architecture": "topk", "d_sae": 128, "k": 4}
    points = [point(4, 0.8), point(64, 0.98), point(5, 0.9, wide)]
    points += [point(4, 0.5, site=other), point(64, 0.95, site=other)]
    found = propose(points, None, 2)
    assert [proposal.site for proposal in found] == [other, SITE]
    assert all(proposal.settings["d_sae"] == 64 for proposal in found)


# ---- the journal ----------------------------------------------------------------------------------------------------


def test_the_journal_keeps_decisions_and_what_became_of_them(tmp_path) -> None:
    journal = Journal(Storage(tmp_path), "abc")
    assert journal.pruned("x") == {} and journal.proposals() is None
    journal.write_stop(Stop("x", 61, "beaten"), tokens=31232)
    found = journal.pruned("x")
    assert (found["status"], found["reason"], found["rung"], found["step"]) == ("pruned", "beaten", 61, 61)
    journal.write_run("x", {"step": 70, "history": [{"tokens": 512, "metrics": {"l0": 3.0}}]})
    assert journal.pruned("x")["step"] == 70 and journal.pruned("x")["history"][0]["tokens"] == 512
    proposals = [Proposal(Site("a", "b"), {"architecture": "topk", "d_sae": 8, "k": 2}, "a gap")]
    journal.write_proposals(proposals)
    assert journal.proposals() == proposals
    assert Journal(Storage(tmp_path), "another").proposals() is None
