"""The export for Neuronpedia against the format that its importer reads.

Fields and types are those of `NeuronpediaDashboardBatch`, `NeuronpediaDashboardFeature` and
`NeuronpediaDashboardActivation` of github.com/jbloomAus/SAEDashboard, commit 234ea3211ce7dbf84d101c4e8bfe844c3903b16a.
"""

import json

import pytest

from penstock.errors import ConfigError, SweepError
from penstock_dashboards.neuronpedia import export
from sample_features import DEAD, TOKENS, WORDS, write_features

BATCH = {"model_id": str, "layer": int, "sae_set": str, "features": list}
FEATURE = {
    "feature_index": int, "neuron_alignment_indices": [int], "neuron_alignment_values": [float],
    "neuron_alignment_l1": [float], "correlated_neurons_indices": [int], "correlated_neurons_l1": [float],
    "correlated_neurons_pearson": [float], "correlated_features_indices": [int], "correlated_features_l1": [float],
    "correlated_features_pearson": [float], "neg_str": [str], "neg_values": [float], "pos_str": [str],
    "pos_values": [float], "frac_nonzero": float, "freq_hist_data_bar_values": [float],
    "freq_hist_data_bar_heights": [float], "logits_hist_data_bar_heights": [float],
    "logits_hist_data_bar_values": [float], "n_prompts_total": int, "n_tokens_in_prompt": int, "dataset": str,
    "decoder_weights_dist": [float], "activations": [dict],
}  # fmt: skip
ACTIVATION = {"bin_min": float, "bin_max": float, "bin_contains": float, "tokens": [str], "values": [float],
              "qualifying_token_index": int}  # fmt: skip
ALIGNED = [("neg_str", "neg_values"), ("pos_str", "pos_values"),
           ("freq_hist_data_bar_values", "freq_hist_data_bar_heights")]  # fmt: skip


def check(found: dict, fields: dict) -> None:
    assert list(found) == list(fields)
    for name, kind in fields.items():
        if isinstance(kind, list):
            assert isinstance(found[name], list) and all(type(one) is kind[0] for one in found[name]), name
        else:
            assert type(found[name]) is kind, name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_features(tmp_path_factory.mktemp("features") / "made", 200, top=3, per_quantile=2)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    return export(folder, tmp_path_factory.mktemp("export") / "to")


def test_every_field_is_there_with_its_type(exported):
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["batch-0.json", "batch-1.json", "skipped_indexes.json"]
    seen = []
    for name in names[:2]:
        batch = json.loads((exported / name).read_text())
        check(batch, BATCH)
        for feature in batch["features"]:
            check(feature, FEATURE)
            seen.append(feature["feature_index"])
            assert all(len(feature[one]) == len(feature[other]) for one, other in ALIGNED)
            for activation in feature["activations"]:
                check(activation, ACTIVATION)
                assert len(activation["tokens"]) == len(activation["values"])
    skipped = json.loads((exported / "skipped_indexes.json").read_text())
    assert skipped["skipped_indexes"] == list(range(DEAD - 1, 200, DEAD)) and skipped["layer"] == "4"
    assert sorted(seen + skipped["skipped_indexes"]) == list(range(200))


def test_the_figures_are_those_of_the_dashboard(exported):
    batch = json.loads((exported / "batch-1.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("demo", 4, "demo")
    feature = next(one for one in batch["features"] if one["feature_index"] == 162)
    assert feature["pos_str"][0] == WORDS[162 % len(WORDS)]
    assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
    assert feature["n_prompts_total"] == TOKENS // 128 and feature["n_tokens_in_prompt"] == 128
    assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(feature["frac_nonzero"] * TOKENS)
    top, rest = feature["activations"][:3], feature["activations"][3:]
    assert all((one["bin_min"], one["bin_contains"]) == (-1, -1) for one in top) and len(rest) == 10
    assert top[0]["bin_max"] == max(top[0]["values"]) == top[0]["values"][top[0]["qualifying_token_index"]]
    assert top[0]["tokens"][top[0]["qualifying_token_index"]] == WORDS[162 % len(WORDS)]
    for one in rest:
        assert one["bin_min"] <= max(one["values"]) <= one["bin_max"]
        assert one["bin_contains"] == pytest.approx(feature["frac_nonzero"] / 5, rel=1e-3)
    assert [one["bin_max"] for one in rest] == sorted((one["bin_max"] for one in rest), reverse=True)


def test_names_come_from_the_saes_neuronpedia_id_or_are_asked_for(tmp_path):
    known = write_features(tmp_path / "known", 2, neuronpedia_id="gpt2-small/7-res-jb")
    names = json.loads((export(known, tmp_path / "a") / "batch-0.json").read_text())
    assert [names[name] for name in ("model_id", "layer", "sae_set")] == ["gpt2-small", 7, "res-jb"]
    given = export(known, tmp_path / "b", model_id="m", sae_set="s", layer=3)
    names = json.loads((given / "batch-0.json").read_text())
    assert [names[name] for name in ("model_id", "layer", "sae_set")] == ["m", 3, "s"]
    other = write_features(tmp_path / "other", 2, sae={"metadata": {"model_name": "m", "hook_name": "embed"}})
    with pytest.raises(ConfigError, match="layer None: the SAE at embed"):
        export(other, tmp_path / "c")


def test_a_folder_that_holds_something_is_left_alone(folder, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(SweepError, match="new or empty"):
        export(folder, tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]
