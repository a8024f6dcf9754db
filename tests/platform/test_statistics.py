import math

import numpy as np
import pandas as pd
import pytest

from penstock.errors import SweepError
from penstock.statistics import HEADLINE, Bootstrap, add_intervals
from sae_core.evaluation import ROW_SUMS, metrics_of


def rows_of(sae, document, ce_clean=1.0, ce_ablated=5.0, ce_sae=2.0, l0=10.0, tokens=1.0, hook_point="a"):
    """Evaluation rows with a token each: figures are numbers or one a row."""
    n = len(document)
    frame = pd.DataFrame({name: np.ones(n) for name in ROW_SUMS})
    given = {"ce_clean": ce_clean, "ce_ablated": ce_ablated, "ce_sae": ce_sae, "l0": l0, "kl_ablated": 4.0,
             "square_centred": 2.0, "n_tokens": tokens, "n_predictions": tokens}  # fmt: skip
    return frame.assign(**given, sae=sae, hook_point=hook_point, row=range(n), document=document)


def synthetic(generator, n_documents, per_document=4, effect=0.0, names=("a", "b")):
    """Rows of SAEs that share their documents' difficulty; `effect` a SAE's CE above the one before it.

    A document's CE moves by 0.5 (standard deviation), a row's by 0.1, an SAE's on a document by 0.02.
    """
    document = np.repeat(np.arange(n_documents), per_document)
    n = len(document)
    hard = generator.normal(size=n_documents)[document] * 0.5 + generator.normal(size=n) * 0.1
    frames = []
    for i, name in enumerate(names):
        own = generator.normal(size=n_documents)[document] * 0.02
        frames.append(rows_of(name, document, 1 + hard * 0.1, 5 + hard, 2 + hard * 0.4 + effect * i + own))
    return pd.concat(frames)


def test_with_equal_documents_every_replicate_is_the_figure():
    bootstrap = Bootstrap(rows_of("x", [0, 0, 1, 2, 3]))
    assert bootstrap.documents == 4 and bootstrap.names == ["x"]
    assert bootstrap.figures("x")["ce_recovered"] == 0.75
    assert np.allclose(bootstrap.replicates("x")["ce_recovered"], 0.75)
    intervals = bootstrap.intervals("x")
    assert set(intervals) == {f"{metric}_{end}" for metric in HEADLINE for end in ("low", "high")}
    assert intervals["l0_low"] == intervals["l0_high"] == pytest.approx(10)


def test_a_replicate_is_the_figures_of_whole_documents_drawn_again():
    # Two documents of 1 and 3 tokens: a replicate is one of three, the mixed one in half of the cases.
    rows = rows_of("x", ["p", "q"], l0=[4.0, 36.0], tokens=[1.0, 3.0])
    found = Bootstrap(rows, replicates=4000).replicates("x")["l0"]
    values, counts = np.unique(found, return_counts=True)
    assert list(values) == [4, 10, 12]
    assert np.allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)
    # Each document as one unit, its rows together: there is no replicate that has some of them only.
    split = rows_of("x", ["p", "q", "q"], l0=[4.0, 6.0, 30.0], tokens=[1.0, 1.0, 2.0])
    assert np.array_equal(Bootstrap(split, replicates=4000).replicates("x")["l0"], found)


def test_an_ordinary_sum_has_the_textbook_standard_error():
    generator = np.random.default_rng(0)
    l0 = generator.normal(10, 2, size=400)
    low, high = (Bootstrap(rows_of("x", range(400), l0=l0)).intervals("x")[f"l0_{end}"] for end in ("low", "high"))
    assert (high - low) / 2 == pytest.approx(1.96 * l0.std() / 20, rel=0.08)
    assert (high + low) / 2 == pytest.approx(l0.mean(), abs=0.02)


def test_the_same_rows_have_the_same_intervals_in_any_order_and_company():
    rows = synthetic(np.random.default_rng(1), 20)
    intervals = Bootstrap(rows).intervals("a")
    assert Bootstrap(rows.sample(frac=1, random_state=0)).intervals("a") == intervals
    alone = Bootstrap(rows[rows["sae"] == "a"]).intervals("a")
    assert alone == {name: pytest.approx(value, rel=1e-12) for name, value in intervals.items()}
    assert Bootstrap(rows, seed=1).intervals("a") != intervals


@pytest.mark.parametrize("documents", [8, 60])
def test_the_interval_of_a_ratio_covers_the_truth_in_about_95_of_100_draws(documents):
    generator = np.random.default_rng(documents)
    truth, covered, difference = 0.75, 0, 0
    for _ in range(200):
        bootstrap = Bootstrap(synthetic(generator, documents, effect=0.1), replicates=400)
        found = bootstrap.intervals("a")
        covered += found["ce_recovered_low"] <= truth <= found["ce_recovered_high"]
        low, high = bootstrap.difference("a", "b", "ce_recovered")
        difference += low <= 0.1 / 4 <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert 0.90 <= difference / 200 <= 0.99


def test_rows_as_units_would_cover_the_truth_less_often():
    generator = np.random.default_rng(5)
    covered = 0
    for _ in range(200):
        rows = synthetic(generator, 60, names=("a",))
        found = Bootstrap(rows.assign(document=rows["row"]), replicates=400).intervals("a")
        covered += found["ce_recovered_low"] <= 0.75 <= found["ce_recovered_high"]
    assert covered / 200 < 0.85


def unpaired_width(bootstrap, metric):
    a, b = (bootstrap.replicates(name)[metric] for name in ("a", "b"))
    return np.diff(np.quantile(a - np.random.default_rng(0).permutation(b), [0.025, 0.975]))[0]


def test_paired_differences_are_much_narrower_than_unpaired_ones():
    bootstrap = Bootstrap(synthetic(np.random.default_rng(2), 50, effect=0.05))
    low, high = bootstrap.difference("a", "b", "ce_recovered")
    assert 0 < low < 0.05 / 4 < high
    assert high - low < 0.75 * unpaired_width(bootstrap, "ce_recovered")
    less, more = bootstrap.difference("b", "a", "ce_increase")
    assert 0 < less < 0.05 < more
    assert more - less < 0.25 * unpaired_width(bootstrap, "ce_increase")
    assert bootstrap.difference("b", "a", "ce_recovered") == pytest.approx((-high, -low))
    assert bootstrap.difference("a", "a", "l0") == (0, 0)


def test_one_document_leaves_nothing_to_resample():
    bootstrap = Bootstrap(rows_of("x", [7, 7, 7], l0=[1.0, 2.0, 3.0]))
    assert bootstrap.figures("x")["l0"] == 2
    assert all(math.isnan(value) for value in bootstrap.intervals("x").values())
    assert all(math.isnan(value) for value in bootstrap.difference("x", "x", "l0"))


def test_a_figure_that_some_draw_does_not_have_has_no_interval():
    rows = rows_of("x", [0, 1], tokens=[0.0, 2.0], l0=[0.0, 6.0])  # a quarter of the draws has no token at all
    bootstrap = Bootstrap(rows)
    assert bootstrap.figures("x")["l0"] == 3
    assert math.isnan(bootstrap.intervals("x")["l0_low"])


def test_the_figures_are_those_of_the_evaluation():
    rows = synthetic(np.random.default_rng(3), 10)
    totals = {name: rows.loc[rows["sae"] == "b", name].sum() for name in ROW_SUMS}
    found = Bootstrap(rows).figures("b")
    assert found == {name: pytest.approx(float(value)) for name, value in metrics_of(totals).items()}


def test_saes_that_saw_other_rows_are_refused():
    rows = pd.concat([rows_of("x", [0, 1, 2]), rows_of("y", [0, 1])])
    with pytest.raises(SweepError, match=r"rows of 'x' \(3\) and of 'y' \(2\) are not the same"):
        Bootstrap(rows)
    with pytest.raises(SweepError, match="'x' are there more than once"):
        Bootstrap(pd.concat([rows_of("x", [0, 1])] * 2))
    with pytest.raises(SweepError, match="no evaluation rows of SAE 'z'; there are those of x"):
        Bootstrap(rows_of("x", [0, 1])).replicates("z")


def test_a_tables_intervals_stand_beside_its_figures():
    rows = synthetic(np.random.default_rng(4), 12, names=("s", "s[16]"))
    table = pd.DataFrame({"sae_id": ["s", "s", "other"], "prefix": [math.nan, 16.0, math.nan]})
    marked = add_intervals(table, rows)
    of_prefix = Bootstrap(rows).intervals("s[16]")
    assert marked.loc[1, "l0_low"] == of_prefix["l0_low"] and marked.loc[1, "mse_high"] == of_prefix["mse_high"]
    assert marked.loc[0, "ce_recovered_low"] < marked.loc[0, "ce_recovered_high"]
    assert marked.loc[2, [f"{metric}_low" for metric in HEADLINE]].isna().all()
