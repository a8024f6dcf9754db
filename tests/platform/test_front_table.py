import json
import math

import pandas as pd
import pytest

from penstock.errors import SweepError
from penstock.front_table import format_front, format_over_all, front_json, hypervolume_band, why_not_on_front


def sae(sae_id, architecture, l0, ce_recovered, **more):
    return {"sae_id": sae_id, "hook_point": "a", "architecture": architecture, "d_sae": 64, "prefix": math.nan,
            "k": None, "l1_coefficient": None, "l0_coefficient": None, "lr": None, "seed": 0,
            "pre_act_coefficient": None, "widths": None, "l0": l0, "ce_recovered": ce_recovered,
            "kl_recovered": ce_recovered,
            "explained_variance": 0.7, "dead_fraction": 0.1, "ce_increase": 4 * (1 - ce_recovered), "on_front": True,
            "on_overall_front": True, "dominated_by": None, "certain": False, "status": "finished", **more}  # fmt: skip


def lines(table, *arguments, **options):
    return format_front(pd.DataFrame(table), *arguments, **options).splitlines()


def head(table):
    return lines(table)[1].split()


def test_a_setting_at_its_architectures_default_is_no_column():
    rows = [
        sae("s", "standard", 4.0, 0.8, l1_coefficient=1.0, pre_act_coefficient=0.03),
        sae("j", "jumprelu", 5.0, 0.9, l0_coefficient=1.0, pre_act_coefficient=0.001),
        sae("m", "matryoshka", 6.0, 0.9, k=6, widths="(16, 32, 64)"),  # one architecture's, and always the same
    ]
    assert not {"pre_act_coefficient", "widths", "lr", "seed"} & set(head(rows))
    rows[0]["pre_act_coefficient"] = 0.5
    assert "pre_act_coefficient" in head(rows)
    row = next(line for line in lines(rows) if line.endswith("  j"))
    assert row.split()[:3] == ["*", "jumprelu", "l0_coefficient=1"]
    assert row.split()[3] == "5.00"  # the default leaves its cell empty


def test_a_width_that_all_have_stands_in_the_title():
    rows = [sae("s", "topk", 4.0, 0.8, k=4), sae("t", "topk", 5.0, 0.9, k=5)]
    assert lines(rows)[0] == "a, d_sae 64" and "d_sae" not in head(rows)
    rows[1]["d_sae"] = 128
    assert lines(rows)[0] == "a" and "d_sae" in head(rows)


def test_what_was_set_for_some_architectures_alone_is_a_column():
    rows = [sae("s", "standard", 4.0, 0.8, lr=0.008), sae("t", "topk", 5.0, 0.9, k=5)]
    assert "lr" in head(rows)
    assert "lr" not in head([row | {"lr": 0.008} for row in rows])


def test_intervals_stand_compactly_behind_their_figures():
    rows = [sae("x", "topk", 8.0, 0.971, ce_recovered_low=0.967, ce_recovered_high=0.975, l0_low=7.9, l0_high=8.1),
            sae("y", "topk", 9.0, 0.98, on_front=False, dominated_by="x")]  # fmt: skip
    out = lines(rows)
    assert "8.00 ±.10  0.971 ±.004" in out[2] and "9.00       0.980      " in out[3]
    assert out[3].endswith("y       x") and out[1].endswith("sae_id  dominated by")
    assert "± half of the 95% interval over documents" in "\n".join(out)
    narrow = [row | {"ce_recovered_low": 0.9708, "ce_recovered_high": 0.9712} for row in rows[:1]]
    assert "0.9710 ±.0002" in lines(narrow)[2]


def test_what_is_not_on_the_front_says_why():
    rows = [sae("x", "topk", 8.0, 0.9), sae("z", "topk", 3.0, 0.7, on_front=False),
            sae("y", "topk", 9.0, 0.8, on_front=False, dominated_by="0123456789ab[32]"),
            sae("w", "topk", 9.0, -0.1, on_front=False),
            sae("v", "topk", math.nan, math.nan, on_front=False)]  # fmt: skip
    assert why_not_on_front(pd.DataFrame(rows), (4, 40)) == [
        "", "(L0 not in 4:40)", "01234567[32]", "(recovers nothing)", ""
    ]  # fmt: skip
    out = lines(rows[:2], (4, 40))
    assert out[1].endswith("sae_id  dominated by") and out[2].endswith("z       (L0 not in 4:40)")


def test_the_knee_certainty_and_the_hypervolume_are_marked():
    rows = [sae("a1", "topk", 1.0, 0.1), sae("a2", "topk", 2.0, 0.6, certain=True), sae("a3", "topk", 16.0, 0.9)]
    out = lines(rows, (1, 100))
    assert [line.split()[0] for line in out[2:5]] == ["*", "*k!", "*"]
    expected = (0.1 * math.log(2) + 0.6 * math.log(8) + 0.9 * math.log(100 / 16)) / math.log(100)
    assert out[5] == f"   hypervolume {expected:.4f} (log L0 in 1:100, from CE recovered 0)"
    first = json.loads(front_json(pd.DataFrame(rows), (1, 100)))
    assert [record["knee"] for record in first] == [False, True, False]
    assert first[0]["hypervolume"] == pytest.approx(expected)


def test_open_bands_end_where_the_saes_do():
    table = pd.DataFrame([sae("a", "topk", 2.0, 0.5), sae("b", "topk", 8.0, 0.9), sae("c", "topk", 50.0, -1.0)])
    assert hypervolume_band(table, None) == (2, 8)
    assert hypervolume_band(table, (4, math.inf)) == (4, 8)
    assert hypervolume_band(table, (0, 20)) == (2, 20)
    assert hypervolume_band(table.iloc[:1], None) is None
    assert "hypervolume" not in format_front(table.iloc[:1])


def test_seeds_are_error_bars():
    rows = [sae(f"k{k}s{seed}", "topk", float(k), 0.8 + k / 100 + seed / 50, k=k, seed=seed)
            for k, seed in ((4, 0), (4, 1), (8, 0))]  # fmt: skip
    out = "\n".join(lines(rows))
    assert "Over seeds: mean (lowest to highest)" in out
    row = next(line for line in out.splitlines() if "k=4" in line and " to " in line)
    assert "2  4.00 (4.00 to 4.00)  0.8500 (0.8400 to 0.8600)" in row
    assert not any("k=8" in line and " to " in line for line in out.splitlines())
    assert "Over seeds" not in "\n".join(lines(rows[:1]))


def test_missed_targets_are_marked_and_their_remedies_listed():
    rows = [
        sae("0123456789", "topk", 4.0, 0.8, missed="l0 4 < 5; dead_fraction 0.1 > 0.05", remedy="denser: try k 6"),
        sae("good", "topk", 6.0, 0.9, missed="", remedy=""),
        sae("off", "topk", 7.0, 0.5, missed="ce_recovered 0.5 < 0.6", remedy="more", on_front=False),
    ]
    out = lines(rows)
    assert "  L0 dead  0123456789" in out[2] and "  -        good" in out[3] and "  CE       off" in out[4]
    assert out[-3:] == [
        "01234567: l0 4 < 5; dead_fraction 0.1 > 0.05", "  denser: try k 6",
        "1 that are not on the front miss some, too; --json has all of it",
    ]  # fmt: skip


def test_each_architecture_can_have_a_part_of_its_own():
    rows = [sae("t", "topk", 4.0, 0.8), sae("g", "gated", 3.0, 0.7), sae("u", "topk", 5.0, 0.9)]
    out = lines(rows, by_architecture=True)
    titles = [line for line in out if line.startswith("a · ")]
    assert titles == ["a · gated, d_sae 64", "a · topk, d_sae 64"]
    assert out.index("a · topk, d_sae 64") < next(at for at, line in enumerate(out) if line.endswith("  t"))


def test_the_table_over_all_hook_points_is_by_ce_increase():
    rows = [sae("a", "topk", 4.0, 0.9), sae("b", "topk", 4.0, 0.8, hook_point="b", ce_increase=0.01),
            sae("c", "topk", 9.0, math.nan, ce_increase=math.nan, on_overall_front=False)]  # fmt: skip
    out = format_over_all(pd.DataFrame(rows)).splitlines()
    assert [line.split()[1] for line in out[2:4]] == ["b", "a"]
    assert "0.0100" in out[2] and "2 of 2" in out[5]
    with pytest.raises(SweepError, match="from before the CE increase was kept"):
        format_over_all(pd.DataFrame(rows).assign(ce_increase=math.nan))
    assert format_over_all(pd.DataFrame(rows).iloc[:0]) == "no SAEs"


def test_forty_saes_fit_a_wide_terminal():
    rows = [
        sae(f"{at:016x}", "matryoshka", 20.0 + at, 0.9, k=20 + at, lr=0.008 if at % 2 else None, seed=at % 2,
            prefix=256.0 if at % 3 else math.nan, d_sae=1024, ce_recovered_low=0.89, ce_recovered_high=0.91,
            l0_low=19.0, l0_high=21.0, dominated_by=f"{at:016x}" if at % 4 else None, on_front=at % 4 == 0)
        for at in range(40)
    ]  # fmt: skip
    rows[0]["d_sae"] = 2048
    out = lines(rows)
    assert len(out) < 60 and max(len(line) for line in out) <= 140


def test_json_has_plain_values_for_everything():
    rows = pd.DataFrame([sae("x", "topk", 4.0, 0.8, widths=(16, 64), missed=None, remedy=None)])
    record = json.loads(front_json(rows))[0]
    assert record["widths"] == [16, 64] and record["missed"] is None and record["certain"] is False
    assert record["prefix"] is None and type(record["seed"]) is int
