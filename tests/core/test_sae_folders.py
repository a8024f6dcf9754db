import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_cases import SETTINGS
from sae_core import SAE, CheckpointError, SAETrainer, parse_settings
from sae_core.checkpoint import load_sparsity

FILES = {"cfg.json", "sae_weights.safetensors"}


@pytest.fixture
def folder(tmp_path, training, data):
    trainer = SAETrainer(parse_settings(SETTINGS["topk"]), training, data.calibration)
    trainer.export({"hook_name": "blocks.0.hook_resid_post", "model_name": "m"}).save(tmp_path / "sae")
    return tmp_path / "sae"


def edit(folder, **changes):
    raw = json.loads((folder / "cfg.json").read_text())
    raw = {key: value for key, value in {**raw, **changes}.items() if value is not ...}
    (folder / "cfg.json").write_text(json.dumps(raw))


def edit_weights(folder, change):
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")


def test_a_folder_holds_the_two_files_and_what_tools_read(folder):
    assert {path.name for path in folder.iterdir()} == FILES
    raw = json.loads((folder / "cfg.json").read_text())
    assert raw["dtype"] == "float32" and raw["k"] == 5 and raw["rescale_acts_by_decoder_norm"] is True
    assert raw["apply_b_dec_to_input"] is True and raw["normalize_activations"] == "none"
    assert raw["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    assert tuple(int(part) for part in raw["metadata"]["sae_lens_version"].split(".")) >= (6, 0, 0)


def test_sparsity_is_written_where_given_and_goes_with_a_new_save(folder):
    sae = SAE.load(folder)
    assert load_sparsity(folder) is None
    sae.save(folder, sparsity=torch.arange(48.0))
    assert {path.name for path in folder.iterdir()} == FILES | {"sparsity.safetensors"}
    assert torch.equal(load_sparsity(folder), torch.arange(48.0))
    sae.save(folder)
    assert load_sparsity(folder) is None


def test_an_interrupted_save_is_seen(folder, monkeypatch):
    sae = SAE.load(folder)
    monkeypatch.setattr("sae_core.checkpoint._written_config", lambda sae: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sae.save(folder)
    with pytest.raises(CheckpointError, match="cfg.json is missing"):
        SAE.load(folder)


def test_dtype_can_be_chosen(folder, data):
    sae = SAE.load(folder, dtype="bfloat16")
    assert sae.encode(data.x[:2]).dtype == torch.bfloat16 and sae.cfg.dtype == "bfloat16"
    sae.save(folder)
    assert SAE.load(folder).W_enc.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="int8"):
        SAE.load(folder, dtype="int8")


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        SAE.load(tmp_path / "nothing")


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        SAE.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 300, -10])
def test_truncated_weights(folder, keep):
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        SAE.load(folder)


def test_damaged_configuration(folder):
    (folder / "cfg.json").write_text('{"architecture": ')
    with pytest.raises(CheckpointError, match="not valid JSON"):
        SAE.load(folder)
    (folder / "cfg.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        SAE.load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "gatd"}, "unknown architecture 'gatd' .did you mean 'gated'"),
        ({"architecture": ...}, "unknown architecture None"),
        ({"d_sae": "48"}, "d_sae is '48'"),
        ({"d_in": ...}, "d_in is None"),
        ({"d_in": 17}, "W_dec has shape|W_enc has shape"),
        ({"k": ...}, "k is None"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm'"),
        ({"normalize_activations": "expected_average_only_in"}, "does not hold the scale"),
        ({"architecture": "jumprelu"}, "threshold"),
    ],
)
def test_configurations_that_cannot_be_read(folder, change, message):
    edit(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        SAE.load(folder)


def test_missing_and_unknown_tensors(folder):
    edit_weights(folder, lambda tensors: tensors.pop("b_enc"))
    with pytest.raises(CheckpointError, match="b_enc"):
        SAE.load(folder)
    edit_weights(folder, lambda tensors: tensors.update(b_enc=torch.zeros(48), extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="unknown tensors .'extra'"):
        SAE.load(folder)


def flat(folder, **changes):
    """Rewrites cfg.json in the flat form that SAELens wrote before 6.0.0."""
    raw = {
        "d_in": 16, "d_sae": 48, "dtype": "torch.float32", "device": "cpu", "model_name": "gpt2-small",
        "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "hook_point_head_index": None,
        "activation_fn_str": "relu", "context_size": 128, "prepend_bos": True, "dataset_path": "d", **changes,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(raw))


def test_the_old_flat_configuration_of_a_standard_sae(folder, data):
    topk = SAE.load(folder)
    flat(folder)
    edit_weights(folder, lambda tensors: tensors.update(scaling_factor=torch.ones(48)))
    sae = SAE.load(folder)
    assert sae.cfg.architecture == "standard"
    assert sae.cfg.metadata["hook_name"] == "blocks.8.hook_resid_pre"
    assert sae.cfg.metadata["context_size"] == 128
    x = data.x[:9]
    torch.testing.assert_close(sae.encode(x), torch.relu((x - topk.b_dec) @ topk.W_enc + topk.b_enc))


def test_the_old_flat_configuration_of_a_topk_sae(folder, data):
    flat(folder, activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    sae = SAE.load(folder)
    assert (sae.cfg.architecture, sae.cfg.k) == ("topk", 3)
    assert ((sae.encode(data.x[:9]) > 0).sum(1) <= 3).all()


def test_old_configurations_that_mean_another_function_are_refused(folder):
    flat(folder, normalize_activations=True)
    with pytest.raises(CheckpointError, match="expected_average_only_in"):
        SAE.load(folder)
    flat(folder, activation_fn_str="tanh-relu")
    with pytest.raises(CheckpointError, match="tanh-relu"):
        SAE.load(folder)


def test_old_scaling_factors_keep_the_reconstruction(folder, data):
    plain = SAE.load(folder)
    factor = torch.linspace(0.5, 2, 48)
    edit_weights(folder, lambda tensors: tensors.update(scaling_factor=factor))
    edit(folder, rescale_acts_by_decoder_norm=False)
    scaled = SAE.load(folder)
    f = plain.encode(data.x[:9])
    torch.testing.assert_close(scaled.decode(f), plain.decode(f * factor))


def test_without_apply_b_dec_to_input_the_bias_is_not_subtracted(folder, data):
    edit(folder, architecture="standard", apply_b_dec_to_input=False)
    sae = SAE.load(folder)
    torch.testing.assert_close(sae.encode(data.x), torch.relu(data.x @ sae.W_enc + sae.b_enc))
