import math

import numpy as np
import pandas as pd
import pytest

from penstock.errors import SweepError
from penstock.pareto import (
    by_hook_point,
    find_sae,
    hypervolume,
    kind_of,
    knee,
    mark_front,
    pareto_front,
    resolve_hook_point,
    sae_key,
    seed_groups,
    select,
)
from sae_core.evaluation import ROW_SUMS


def table(*points, hook_point="a", architecture="topk", status="finished"):
    rows = [{"sae_id": f"{hook_point}-{l0}", "hook_point": hook_point, "architecture": architecture, "l0": l0,
             "ce_recovered": recovered, "status": status} for l0, recovered in points]  # fmt: skip
    return pd.DataFrame(rows)


def test_the_front_is_what_no_other_beats():
    points = table((10, 0.9), (5, 0.7), (12, 0.85), (20, 0.95), (5, 0.6), (30, 0.95))
    assert list(pareto_front(points)) == [True, True, False, True, False, False]


def test_equals_do_not_beat_each_other():
    assert list(pareto_front(table((5, 0.7), (5, 0.7), (6, 0.7)))) == [True, True, False]


@pytest.mark.parametrize("missing", [(math.nan, 0.9), (1, math.nan), (1, -0.1), (0, 0.0)])
def test_what_has_no_figure_or_recovers_nothing_is_never_on_the_front(missing):
    assert list(pareto_front(table(missing, (5, 0.5)))) == [False, True]


@pytest.mark.parametrize("status", ["diverged", "failed"])
def test_what_diverged_or_failed_is_never_on_the_front(status):
    points = pd.concat([table((1, 0.99), status=status), table((5, 0.5))])
    assert list(pareto_front(points)) == [False, True]


def test_the_front_in_a_band_ignores_what_lies_outside():
    points = table((4, 0.9), (5, 0.8), (10, 0.85), (11, 0.99))
    assert list(pareto_front(points)) == [True, False, False, True]
    assert list(pareto_front(points, (5, 10))) == [False, True, True, False]


def test_a_front_keeps_the_tables_index_also_where_it_repeats():
    points = table((5, 0.7), (6, 0.6)).set_axis([3, 3])
    front = pareto_front(points)
    assert list(front.index) == [3, 3] and list(front) == [True, False]


def test_an_empty_table_has_an_empty_front():
    assert mark_front(table((1, 0.5)).iloc[:0]).empty


def test_each_hook_point_has_its_front_and_over_all_ce_increase_decides():
    saes = pd.concat([table((5, 0.9), (9, 0.95)), table((6, 0.8), (10, 0.99), hook_point="b")])
    # What leaving b out costs is a tenth of what it is at a, so that all of b's SAEs cost less than any of a's.
    marked = mark_front(saes.assign(ce_increase=[1.0, 0.5, 0.2, 0.01]))
    assert list(marked["on_front"]) == [True, True, True, True]
    assert list(marked["on_overall_front"]) == [True, False, True, True]
    split = mark_front(saes.assign(ce_sae=[4.0, 3.5, 3.2, 3.01], ce_clean=3.0))
    assert list(split["on_overall_front"]) == [True, False, True, True]
    assert not mark_front(saes)["on_overall_front"].any()  # CE recovered is no measure over hook points
    assert list(mark_front(saes.iloc[:2])["on_overall_front"]) == [True, True]  # at one, it is


def test_saes_of_other_widths_and_protocols_do_not_dominate():
    saes = table((5, 0.9), (6, 0.8), (7, 0.7), (8, 0.6)).assign(
        sae_id=list("wxyz"), d_sae=[64, 128, 128, 128], prefix=[math.nan, math.nan, 64.0, math.nan],
        protocol=["p", "p", "p", "q"],
    )  # fmt: skip
    marked = mark_front(saes)
    assert list(marked["on_front"]) == [True, True, False, True]
    assert list(marked["dominated_by"]) == [None, None, "w", None]  # the prefix by the SAE of the same width
    assert not marked["certain"].any()


def test_what_dominates_is_named_by_the_best_that_is_on_the_front():
    saes = table((5, 0.7), (6, 0.9), (8, 0.8), (9, 0.85), (math.nan, 0.9)).assign(sae_id=list("abcde"))
    marked = mark_front(saes)
    assert list(marked["dominated_by"]) == [None, None, "b", "b", None]
    assert list(mark_front(saes, (7, 10))["dominated_by"]) == [None, None, None, None, None]
    assert list(mark_front(saes, (7, 10))["on_front"]) == [False, False, True, True, False]


# ---- with evaluation rows -------------------------------------------------------------------------------------------

DOCUMENTS = 40


def evaluated(*saes, documents=DOCUMENTS, noise=0.004):
    """A table and its evaluation rows: `saes` are dicts with sae_id, l0, ce_recovered, and any column of the table.

    A document's CE moves by a tenth for all SAEs alike; each SAE's CE recovered on a document by `noise` around its
    figure, without moving the figure.
    """
    generator = np.random.default_rng(0)
    hard = generator.normal(size=documents) * 0.1
    frames, records = [], []
    for sae in saes:
        own = generator.normal(size=documents) * noise
        recovered = sae["ce_recovered"] + own - own.mean()
        frame = pd.DataFrame({name: np.ones(documents) for name in ROW_SUMS})
        frames.append(frame.assign(
            ce_clean=2 + hard, ce_ablated=6 + hard, ce_sae=6 + hard - 4 * recovered, kl_ablated=4.0, l0=sae["l0"],
            square_centred=2.0, row=range(documents), document=range(documents), sae=sae_key(sae["sae_id"], None),
            hook_point=sae.get("hook_point", "a"),
        ))  # fmt: skip
        records.append({"hook_point": "a", "architecture": "topk", "d_sae": 64, "status": "finished",
                        "ce_increase": 4 * (1 - sae["ce_recovered"]), **sae})  # fmt: skip
    return pd.DataFrame(records), pd.concat(frames)


def sae(sae_id, l0, ce_recovered, **more):
    return {"sae_id": sae_id, "l0": l0, "ce_recovered": ce_recovered, **more}


def test_with_rows_only_a_certain_difference_dominates():
    table, rows = evaluated(sae("best", 8, 0.90), sae("near", 9, 0.899), sae("far", 10, 0.88), sae("sparse", 4, 0.5))
    assert list(mark_front(table)["on_front"]) == [True, False, False, True]
    marked = mark_front(table, rows=rows)
    assert list(marked["on_front"]) == [True, True, False, True]
    assert list(marked["dominated_by"]) == [None, None, "best", None]
    # The order of the table's rows, and rows of SAEs that are not in it, change nothing.
    again = mark_front(table.iloc[[2, 0]], rows=rows)
    assert list(again["dominated_by"]) == ["best", None]


def test_a_denser_sae_dominates_nothing_however_much_better():
    table, rows = evaluated(sae("dense", 8.1, 0.99), sae("sparse", 8, 0.5))
    assert list(mark_front(table, rows=rows)["on_front"]) == [True, True]


def test_too_few_documents_dominate_nothing():
    table, rows = evaluated(sae("best", 8, 0.90), sae("far", 9, 0.5), documents=5)
    assert list(mark_front(table, rows=rows)["on_front"]) == [True, True]
    table, rows = evaluated(sae("best", 8, 0.90), sae("far", 9, 0.5), documents=6)
    assert list(mark_front(table, rows=rows)["on_front"]) == [True, False]


def test_an_sae_without_rows_is_not_judged():
    table, rows = evaluated(sae("best", 8, 0.90), sae("far", 9, 0.5))
    for gone in ("best", "far"):
        assert list(mark_front(table, rows=rows[rows["sae"] != gone])["on_front"]) == [True, True]
    assert list(mark_front(table, rows=pd.DataFrame())["on_front"]) == [True, False]  # none at all: by the figures


def test_protocols_have_rows_of_their_own():
    table, rows = evaluated(sae("p1", 8, 0.90, protocol="p"), sae("p2", 9, 0.5, protocol="p"))
    other, its_rows = evaluated(sae("q1", 8, 0.4, protocol="q"), sae("q2", 9, 0.3, protocol="q"), documents=20)
    marked = mark_front(pd.concat([table, other]), rows=pd.concat([rows, its_rows]))
    assert list(marked["dominated_by"]) == [None, "p1", None, "q1"]


def test_hook_points_have_rows_of_their_own():
    table, rows = evaluated(
        sae("a1", 8, 0.90), sae("a2", 9, 0.5), sae("b1", 8, 0.4, hook_point="b"), sae("b2", 9, 0.3, hook_point="b")
    )
    assert list(mark_front(table, rows=rows)["dominated_by"]) == [None, "a1", None, "b1"]


def test_no_circle_of_near_equals_empties_a_front():
    for seed in range(20):
        points = np.random.default_rng(seed).normal(0.9, 0.003, size=8)
        table, rows = evaluated(*(sae(f"s{i}", 8, point) for i, point in enumerate(points)), noise=0.003)
        front = mark_front(table, rows=rows)
        assert front.loc[front["ce_recovered"].idxmax(), "on_front"]
        assert set(front["dominated_by"].dropna()) <= set(front.loc[front["on_front"], "sae_id"])


def seeds(k, *recovered, l0=None):
    return [sae(f"k{k}s{i}", l0 or k, point, k=k, seed=i) for i, point in enumerate(recovered)]


def certain(*saes):
    table, rows = evaluated(*saes)
    return dict(zip(table["sae_id"], mark_front(table, rows=rows)["certain"], strict=True))


def test_certain_is_what_all_seeds_of_both_sides_say():
    found = certain(*seeds(8, 0.9, 0.9001), *seeds(9, 0.80, 0.81))
    assert found == {"k8s0": True, "k8s1": True, "k9s0": True, "k9s1": True}


def test_with_one_seed_on_either_side_nothing_is_certain():
    assert not any(certain(*seeds(8, 0.90), *seeds(9, 0.80)).values())
    found = certain(*seeds(8, 0.90), *seeds(9, 0.80, 0.81))
    assert not any(found.values())
    found = certain(*seeds(8, 0.9, 0.9001), *seeds(9, 0.80))
    # That k 9 is beaten rests on one seed of it; that k 8 is not beaten needs nothing of the denser k 9.
    assert found == {"k8s0": True, "k8s1": True, "k9s0": False}


def test_one_pairing_that_says_otherwise_makes_it_uncertain():
    assert not certain(*seeds(8, 0.90, 0.80), *seeds(9, 0.80, 0.81))["k9s0"]
    # One seed beats the other: the settings decide nothing, and neither verdict is certain.
    assert certain(*seeds(8, 0.90, 0.95)) == {"k8s0": False, "k8s1": False}
    # Not dominated, but not better than the sparser one for sure: neither verdict is certain.
    found = certain(*seeds(8, 0.9, 0.9001), *seeds(9, 0.9005, 0.9006))
    assert found == {"k8s0": True, "k8s1": True, "k9s0": False, "k9s1": False}
    found = certain(*seeds(8, 0.9, 0.9001), *seeds(9, 0.95, 0.9501))
    assert all(found.values())


def test_the_same_seed_twice_is_one_seed():
    table, rows = evaluated(*seeds(8, 0.90, 0.91), *seeds(9, 0.80, 0.81))
    assert not mark_front(table.assign(seed=0), rows=rows)["certain"].any()
    assert not mark_front(table)["certain"].any()  # nor anything without rows


def test_select_takes_of_what_is_as_good_as_the_best_the_least_dead_and_then_the_sparsest():
    table, rows = evaluated(
        sae("best", 20, 0.9002, dead_fraction=0.3), sae("alive", 18, 0.9, dead_fraction=0.013),
        sae("sparse", 15, 0.8998, dead_fraction=0.009), sae("worse", 10, 0.85, dead_fraction=0.0),
    )  # fmt: skip
    assert select(table, "a")["sae_id"] == "best"  # without rows the figures are taken as they are
    assert select(table, "a", rows=rows)["sae_id"] == "sparse"
    assert select(table.assign(dead_fraction=[0.3, 0.001, 0.02, 0]), "a", rows=rows)["sae_id"] == "alive"
    assert select(table, "a", l0_band=(16, 30), rows=rows)["sae_id"] == "alive"
    assert select(table.drop(columns="dead_fraction"), "a", rows=rows)["sae_id"] == "sparse"
    equal = table.assign(ce_recovered=0.9, l0=12.0)
    assert select(equal, "a")["sae_id"] == "worse"  # of equals, the one without a dead latent


# ---- a front as numbers ---------------------------------------------------------------------------------------------


def test_the_hypervolume_is_the_area_under_the_steps():
    assert hypervolume(table((1, 1.0)), (1, 100)) == pytest.approx(1)
    assert hypervolume(table((10, 0.8)), (1, 100)) == pytest.approx(0.4)
    assert hypervolume(table((1, 0.4), (10, 0.8)), (1, 100)) == pytest.approx(0.6)
    assert hypervolume(table((1, 0.4), (10, 0.8), (20, 0.7)), (1, 100)) == pytest.approx(0.6)
    assert hypervolume(table((0.5, 0.9), (200, 0.9)), (1, 100)) == 0  # outside
    assert hypervolume(table((1, 0.4), (10, 0.8)), (1, 100), reference=0.6) == pytest.approx(0.25)
    assert hypervolume(table().reindex(columns=["l0", "ce_recovered"]), (1, 100)) == 0


def test_one_more_sae_never_makes_a_hypervolume_smaller():
    generator = np.random.default_rng(0)
    points = [(float(l0), float(recovered)) for l0, recovered in generator.uniform([1, 0], [100, 1], size=(30, 2))]
    volumes = [hypervolume(table(*points[:n]), (2, 80)) for n in range(1, 31)]
    assert volumes == sorted(volumes) and 0 < volumes[-1] < 1


@pytest.mark.parametrize("band", [(0, 10), (5, math.inf), (7, 7)])
def test_a_hypervolume_needs_a_band_with_two_ends(band):
    with pytest.raises(SweepError, match="needs two different finite ends above 0"):
        hypervolume(table((6, 0.9)), band)


def test_the_knee_is_the_point_farthest_above_the_chord():
    points = table((1, 0.1), (2, 0.6), (4, 0.8), (8, 0.85), (16, 0.9)).set_axis(list("abcde"))
    assert knee(points) == "b"  # at a quarter of the way 0.625 up; c is at half of it, 0.875 up: 0.375 above both
    assert knee(points.assign(ce_recovered=[0.1, 0.6, 0.82, 0.85, 0.9])) == "c"
    beaten = table((3, 0.55), (12, 0.3)).set_axis(["x", "y"])  # what is not on the front does not count
    assert knee(pd.concat([points, beaten])) == "b"


def test_a_front_without_a_bend_or_of_two_has_no_knee():
    assert knee(table((1, 0.1), (2, 0.2), (4, 0.3))) is None
    assert knee(table((1, 0.1), (2, 0.12), (4, 0.3))) is None
    assert knee(table((1, 0.1), (2, 0.6))) is None


def test_seeds_are_one_group_with_their_spread():
    rows = [
        {"sae_id": f"k{k}s{seed}", "hook_point": "a", "architecture": "topk", "d_sae": 64, "k": k, "seed": seed,
         "l0": float(k), "ce_recovered": point, "status": "finished", "run_id": f"run-{k}-{seed}"}
        for k, points in ((4, (0.5, 0.7)), (8, (0.9,))) for seed, point in enumerate(points)
    ]  # fmt: skip
    rows += [rows[0] | {"sae_id": "k4s2", "seed": 2, "status": "diverged", "l0": 4.0, "ce_recovered": math.nan}]
    groups = seed_groups(pd.DataFrame(rows))
    assert list(groups["sae"]) == ["k4s0", "k8s0"] and list(groups["seeds"]) == [2, 1]
    assert groups["members"][0] == ["k4s0", "k4s1", "k4s2"]
    assert groups["ce_recovered_mean"][0] == pytest.approx(0.6)
    assert groups["ce_recovered_std"][0] == pytest.approx(math.sqrt(0.02))
    assert (groups["ce_recovered_min"][0], groups["ce_recovered_max"][0]) == (0.5, 0.7)
    assert groups["ce_recovered_mean"][1] == 0.9 and math.isnan(groups["ce_recovered_std"][1])


def test_hook_points_are_in_the_models_order_and_their_saes_by_l0():
    rows = pd.concat([table((9, 0.9), (5, 0.8), hook_point=f"blocks.{block}.hook_mlp_out") for block in (10, 4)])
    ordered = by_hook_point(rows)
    assert list(ordered["hook_point"].str[7:9]) == ["4.", "4.", "10", "10"]
    assert list(ordered["l0"]) == [5, 9, 5, 9] and list(ordered.index) == [0, 1, 2, 3]


def test_select_takes_the_highest_recovery_in_the_band_and_of_equals_the_sparsest():
    points = table((5, 0.7), (10, 0.9), (12, 0.9), (40, 0.99))
    assert select(points, "a")["l0"] == 40
    assert select(points, "a", l0_band=(0, 20))["l0"] == 10


def test_select_looks_at_one_architecture_alone():
    points = pd.concat([table((5, 0.9)), table((6, 0.8), architecture="gated")], ignore_index=True)
    assert select(points, "a", "gated")["l0"] == 6


def test_select_says_what_there_is():
    points = pd.concat([table((5, 0.7), (8, 0.9)), table((math.nan, math.nan), hook_point="b", status="diverged")])
    with pytest.raises(SweepError, match="no hook point 'c' in this sweep; it has a, b"):
        select(points, "c")
    with pytest.raises(SweepError, match="architecture 'gated' in this sweep; it has topk"):
        select(points, "a", "gated")
    with pytest.raises(SweepError, match="no topk at a has an L0 in 50:200; there are 5, 8"):
        select(points, "a", "topk", (50, 200))
    with pytest.raises(SweepError, match=r"no SAE at b has been evaluated \(1 diverged\)"):
        select(points, "b")
    with pytest.raises(SweepError, match="recovers any CE loss"):
        select(table((5, -0.2)), "a")


def test_a_transcoders_site_may_be_named_by_what_it_reads():
    points = pd.concat([table((5, 0.9), hook_point=label) for label in ("a -> b", "c", "d -> b", "d -> e", "c -> f")])
    for given, meant in (("a", "a -> b"), ("a -> b", "a -> b"), ("c", "c")):
        assert resolve_hook_point(points, given) == meant
        assert select(points, given)["hook_point"] == meant
    with pytest.raises(SweepError, match="hook point 'd' is read at several sites: d -> b, d -> e"):
        select(points, "d")
    with pytest.raises(SweepError, match="no hook point 'b' in this sweep; it has a -> b, c, c -> f"):
        select(points, "b")


def test_an_sae_is_found_by_its_id_the_beginning_of_it_and_a_prefix_by_its_width():
    saes = table((5, 0.9), (6, 0.9), (7, 0.9)).assign(sae_id=["ab12", "ab12", "ab3"], prefix=[math.nan, 16.0, math.nan])
    assert [find_sae(saes, asked)["l0"] for asked in ("ab12", "ab1", "ab12[16]", "ab1[16]", "ab3")] == [5, 5, 6, 6, 7]
    assert [kind_of(record) for record in saes.to_dict("records")] == ["topk", "topk[16]", "topk"]
    for asked, message in (
        ("ab", "SAE 'ab' is the beginning of several: ab12, ab3"),
        ("c", "no SAE 'c' in this sweep; it has ab12, ab3"),
        ("", "no SAE '' in this sweep"),
        ("ab12[8]", r"SAE 'ab12\[8\]': there is ab12, ab12\[16\]"),
    ):
        with pytest.raises(SweepError, match=message):
            find_sae(saes, asked)
