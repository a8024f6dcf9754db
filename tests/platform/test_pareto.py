import math

import pandas as pd
import pytest

from penstock.errors import SweepError
from penstock.pareto import by_hook_point, find_sae, kind_of, mark_front, pareto_front, resolve_hook_point, select


def table(*points, hook_point="a", architecture="topk", status="finished"):
    rows = [{"hook_point": hook_point, "architecture": architecture, "l0": l0, "ce_recovered": recovered,
             "status": status} for l0, recovered in points]  # fmt: skip
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


def test_each_hook_point_has_its_front_and_all_have_one_together():
    marked = mark_front(pd.concat([table((5, 0.9), (9, 0.95)), table((6, 0.8), (10, 0.99), hook_point="b")]))
    assert list(marked["on_front"]) == [True, True, True, True]
    assert list(marked["on_overall_front"]) == [True, True, False, True]


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
