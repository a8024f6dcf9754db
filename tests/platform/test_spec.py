from pathlib import Path

import pytest
import yaml

from penstock.errors import SpecError
from penstock.spec import expand_axes, load_spec, parse_band, parse_spec

GOOD = """\
name: front
hook_points: [blocks.1.hook_resid_post]
train: {tokens: 500k, batch_tokens: 512, lr: 4e-4}
saes:
  - {architecture: topk, d_sae: 8x, k: [8, 16], seed: [0, 1]}
  - {architecture: standard, d_sae: 1024, l1_coefficient: 1}
"""


def refused(text, *parts):
    with pytest.raises(SpecError) as caught:
        parse_spec(text, "sweep.yaml")
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


def test_counts_and_axes_are_read():
    spec = parse_spec(GOOD)
    assert (spec.train.tokens, spec.train.lr, spec.train.steps) == (500_000, 4e-4, 976)
    settings = spec.sae_settings(d_in=128)
    assert len(settings) == 5
    assert settings[1] == {"architecture": "topk", "d_sae": 1024, "k": 8, "seed": 1}


@pytest.mark.parametrize(
    ("tokens", "block"), [("16k", 65_536), ("500k", 65_536), ("1M", 125_000), ("10M", 262_144), ("1B", 262_144)]
)
def test_a_block_is_an_eighth_of_the_run_within_bounds_unless_given(tokens, block):
    text = GOOD.replace("500k", tokens)
    assert parse_spec(text).data.block_tokens == block
    assert parse_spec(text + "data: {seed: 1}\n").data.block_tokens == block
    assert parse_spec(text + "data: {block_tokens: 32k}\n").data.block_tokens == 32_000


@pytest.mark.parametrize(
    "data",
    ["{}", "{mixture: [{dataset: a, weight: 2}, {dataset: b}]}", "{spool: off}", "{activations: /x}", "{epochs: 3}"],
)
def test_a_spec_with_its_defaults_written_out_is_the_same_spec(data):
    """A submitted job reads it so, and so do people who run it again."""
    spec = parse_spec(f"{GOOD}data: {data}\n")
    assert parse_spec(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


def test_axes_expand_in_the_order_written():
    expanded = list(expand_axes({"d_sae": ["4x", "8x"], "k": [1, 2]}, d_in=10))
    assert [(one["d_sae"], one["k"]) for one in expanded] == [(40, 1), (40, 2), (80, 1), (80, 2)]


def test_a_hook_point_may_read_one_place_and_write_another():
    text = GOOD.replace("[blocks.1.hook_resid_post]", "[a, {reads: a, writes: b}, {reads: c, writes: c}]")
    spec = parse_spec(text)
    assert [site.label for site in spec.sites] == ["a", "a -> b", "c"]
    assert spec.hook_points == ["a", {"reads": "a", "writes": "b"}, "c"]
    assert parse_spec(yaml.safe_dump(spec.model_dump(mode="json"))) == spec


def test_a_list_is_the_value_of_a_setting_that_is_one_and_a_list_of_them_an_axis():
    entry = {"architecture": "matryoshka", "d_sae": "8x", "k": [2, 4], "widths": ["2x", "8x"]}
    assert [(one["k"], one["widths"]) for one in expand_axes(entry, 10)] == [(2, [20, 80]), (4, [20, 80])]
    axis = entry | {"k": 2, "widths": [[20, 80], ["4x", "8x"], None]}
    assert [one["widths"] for one in expand_axes(axis, 10)] == [[20, 80], [40, 80], None]
    either = {"architecture": ["topk", "batch_topk"], "d_sae": 8, "k": [1, 2]}
    assert len(list(expand_axes(either, 10))) == 4


def test_widths_of_prefixes_are_checked_as_far_as_they_can_be():
    entry = "{architecture: matryoshka, d_sae: 8x, k: 4, widths: WIDTHS}"
    text = GOOD.replace("{architecture: topk, d_sae: 8x, k: [8, 16], seed: [0, 1]}", entry)
    settings = parse_spec(text.replace("WIDTHS", "[2x, 1024]")).sae_settings(d_in=128)[0]
    assert settings["widths"] == [256, 1024]
    refused(text.replace("WIDTHS", "[4x, 2x, 8x]"), "line 5", "saes[0]", "widths", "above the one before it")
    refused(text.replace("WIDTHS", "[]"), "line 5", "widths is an empty list")
    refused(text.replace("WIDTHS", "[[2x, 8x], [2x, 8x]]"), "line 5", "stands twice")
    refused(text.replace("WIDTHS", "[3y, 8x]"), "line 5", "widths '3y'", "multiple of d_in")


def test_a_misspelt_key_is_named_with_its_line_and_the_nearest_one():
    text = GOOD.replace("batch_tokens", "batch_token")
    refused(text, "sweep.yaml, line 3", "`train.batch_token`", "did you mean `batch_tokens`", "lr_warm_up_steps")


def test_a_misspelt_key_of_an_sae_is_named_with_its_line():
    refused(GOOD.replace("l1_coefficient", "l1_coeficient"), "sweep.yaml, line 6", "l1_coeficient", "l1_coefficient")


def test_an_unknown_architecture_lists_the_known_ones():
    refused(GOOD.replace("topk", "topq"), "line 5", "topq", "standard", "gated", "topk")


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("k: [8, 16]", "k: []", ("line 5", "k is an empty list")),
        ("k: [8, 16]", "k: [8, 8]", ("line 5", "stands twice")),
        ("k: [8, 16]", "k: [8, -1]", ("line 5", "-1", "k")),
        ("d_sae: 1024", "d_sae: 8y", ("line 6", "8y", "8x")),
        ("tokens: 500k", "tokens: 500q", ("line 3", "train.tokens", "500q", "500k, 100M")),
        ("tokens: 500k", "tokens: -5", ("line 3", "train.tokens", "-5", "greater than 0")),
        ("tokens: 500k", "tokens: 100", ("line 3", "100", "batch_tokens 512")),
        ("batch_tokens: 512", "batch_tokens: 100k", ("batch_tokens 100000", "65024", "block")),
        ("[blocks.1.hook_resid_post]", "[]", ("line 2", "hook_points")),
        ("[blocks.1.hook_resid_post]", "[a, a]", ("line 2", "named twice: a")),
        ("[blocks.1.hook_resid_post]", "[{reads: a}]", ("line 2", "hook_points.0", "{reads: NAME, writes: NAME}")),
        ("[blocks.1.hook_resid_post]", "[{reads: a, writes: [b]}]", ("line 2", "hook_points.0", "two names")),
        ("[blocks.1.hook_resid_post]", "[3]", ("line 2", "hook_points.0", "3", "a name")),
        ("[blocks.1.hook_resid_post]", "[a, {reads: a, writes: a}]", ("line 2", "named twice: a")),
        ("lr: 4e-4", "lr_decay: sine", ("line 3", "lr_decay", "'sine'", "'cosine'")),
        ("lr: 4e-4", "lr_decay: constant, lr_decay_steps: 5", ("line 3", "lr_decay_steps 5", "constant")),
        ("lr: 4e-4", "encoder_dtype: int8", ("line 3", "encoder_dtype", "'bfloat16'")),
        ("name: front", "name: 'a b'", ("line 1", "name", "a b")),
        ("lr: 4e-4", "lr: fast", ("line 3", "train.lr", "fast")),
    ],
)
def test_an_impossible_value_is_refused_with_its_line(old, new, parts):
    refused(GOOD.replace(old, new), *parts)


def test_dead_after_more_than_a_quarter_of_the_run_is_refused():
    text = GOOD.replace("lr: 4e-4", "dead_after_tokens: 400k")
    refused(text, "line 3", "dead_after_tokens 400000", "125000 of 500000")


def test_a_key_given_twice_is_refused():
    refused(GOOD + "name: again\n", "line 7", "'name' stands twice")


def test_what_is_no_mapping_or_no_yaml_is_refused():
    refused("- a\n- b\n", "holds no sweep spec")
    refused("name: [a\n", "is not YAML")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"nowhere\.yaml"):
        load_spec(tmp_path / "nowhere.yaml")


def test_bands():
    assert parse_band("50:200") == (50.0, 200.0)
    assert parse_band("50:") == (50.0, float("inf"))
    with pytest.raises(ValueError, match="LO:HI"):
        parse_band("200:50")
    with pytest.raises(ValueError, match="LO:HI"):
        parse_band("around 50")


SHIPPED = sorted(Path(__file__).parents[2].glob("jobs/specs/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_spec_is_valid(path):
    assert load_spec(path).saes
