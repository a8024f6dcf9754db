import pytest

from sae_core import ConfigError, TopKSettings, TrainingSettings, parse_settings, read_settings

TOPK = {"architecture": "topk", "d_sae": 64, "k": 8}


def test_settings_are_of_their_architecture():
    settings = parse_settings(TOPK)
    assert settings == TopKSettings(d_sae=64, k=8, aux_coefficient=1.0, seed=0, lr=None, frozen_decoder=False)


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"d_sae": 64}, ["architecture is missing", "standard, gated, topk"]),
        ({**TOPK, "architecture": "tpk"}, ["'tpk'", "did you mean 'topk'", "standard, gated, topk"]),
        ({**TOPK, "architecture": 3}, ["unknown architecture 3"]),
        ({**TOPK, "frozen_decodr": True}, ["'frozen_decodr'", "did you mean 'frozen_decoder'", "aux_coefficient"]),
        ({**TOPK, "l1_coefficient": 1}, ["unknown key 'l1_coefficient'"]),
        ({**TOPK, "d_sae": 0}, ["d_sae is 0", "> 0"]),
        ({**TOPK, "d_sae": "8x"}, ["d_sae is '8x'", "integer"]),
        ({**TOPK, "k": 65}, ["k is 65", "1 to d_sae (64)"]),
        ({**TOPK, "k": 0}, ["k is 0", "> 0"]),
        ({"architecture": "topk", "d_sae": 64}, ["k is missing"]),
        ({**TOPK, "lr": -1}, ["lr is -1", "> 0"]),
        ({"architecture": "standard", "d_sae": 8, "l1_coefficient": 0}, ["l1_coefficient is 0", "> 0"]),
        ({"architecture": "gated", "d_sae": 8, "l1_warm_up_steps": -1}, ["l1_warm_up_steps is -1", ">= 0"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_accepted(mapping, parts):
    with pytest.raises(ConfigError) as error:
        parse_settings(mapping)
    for part in parts:
        assert part in str(error.value)


def test_all_mistakes_are_reported_at_once_with_their_place():
    with pytest.raises(ConfigError) as error:
        parse_settings({**TOPK, "d_sae": -1, "sed": 1}, file="spec.yaml", line=12)
    assert str(error.value).startswith("file spec.yaml, line 12: ")
    assert "d_sae is -1" in str(error.value) and "'seed'" in str(error.value)


def test_something_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigError, match="topk"):
        parse_settings(["topk"])
    with pytest.raises(ConfigError, match="expected a mapping"):
        read_settings(TrainingSettings, None)


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        parse_settings(TOPK).k = 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": 0}, "lr is 0"),
        ({"lr_warm_up_steps": 90}, "together exceed steps"),
        ({"lr_decay": "constant", "lr_decay_steps": 3}, "lr_decay_steps is 3"),
        ({"lr_decay": "square"}, "lr_decay is 'square'"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"warm_up": 3}, "unknown key 'warm_up'"),
        ({"dead_after_tokens": 0}, "dead_after_tokens is 0"),
    ],
)
def test_wrong_training_settings_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(TrainingSettings, {"steps": 100, "batch_tokens": 8, "dead_after_tokens": 50, **change})
