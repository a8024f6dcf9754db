import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BertConfig, T5Config

from penstock.errors import ModelError
from penstock.models import check_context_size, check_hook_points, describe_model, load_model, location
from penstock.spec import ModelSpec
from tiny_models import CONTEXT, VOCAB, make_model, write_model

KINDS = ("gpt2", "llama", "neox")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: write_model(root / kind, kind) for kind in KINDS}


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a network connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_says_what_the_loaded_model_is(folders, kind):
    model = make_model(kind)
    description = describe_model(ModelSpec(name=str(folders[kind])))
    assert (description.n_layers, description.d_model) == (3, 32)
    assert (description.context_limit, description.vocab_size) == (CONTEXT, VOCAB)
    assert description.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    bridge = load_model(ModelSpec(name=str(folders[kind])), "cpu")
    seen = {}
    for name in description.hook_points:
        bridge.hook_dict[name].add_hook(lambda x, hook, name=name: seen.update({name: x.flatten(2).shape[-1]}))
    bridge(torch.zeros(1, 4, dtype=torch.long))
    assert seen == description.hook_points


def test_widths_of_hook_points_follow_the_architecture(folders):
    llama = describe_model(ModelSpec(name=str(folders["llama"]))).hook_points
    assert llama["blocks.2.mlp.hook_post"] == 48
    assert llama["blocks.0.attn.hook_z"] == 4 * 8
    assert "blocks.0.hook_resid_mid" not in describe_model(ModelSpec(name=str(folders["neox"]))).hook_points


def test_a_wider_head_widens_hook_z(tmp_path, folders):
    shutil.copytree(folders["llama"], tmp_path / "wide")
    config = json.loads((tmp_path / "wide/config.json").read_text())
    (tmp_path / "wide/config.json").write_text(json.dumps({**config, "head_dim": 16}))
    description = describe_model(ModelSpec(name=str(tmp_path / "wide")))
    assert description.hook_points["blocks.0.attn.hook_z"] == 4 * 16


def test_parameters_are_estimated_where_only_a_config_is_there(tmp_path, folders):
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        shutil.copy(folders[kind] / "config.json", tmp_path / kind)
        estimate = describe_model(ModelSpec(name=str(tmp_path / kind))).n_parameters
        exact = describe_model(ModelSpec(name=str(folders[kind]))).n_parameters
        assert math.isclose(estimate, exact, rel_tol=0.1)


def test_the_fingerprint_changes_with_weights_and_not_with_place(tmp_path, folders):
    copy = Path(shutil.copytree(folders["gpt2"], tmp_path / "copy"))
    first = describe_model(ModelSpec(name=str(folders["gpt2"]))).fingerprint
    assert describe_model(ModelSpec(name=str(copy))).fingerprint == first
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert describe_model(ModelSpec(name=str(copy))).fingerprint != first


def test_a_lacking_hook_point_is_named_with_the_nearest(folders):
    description = describe_model(ModelSpec(name=str(folders["gpt2"])))
    check_hook_points(description, ["blocks.2.hook_resid_post", "blocks.0.mlp.hook_post"])
    with pytest.raises(ModelError, match=r"has no 'blocks\.3\.hook_resid_post'.*blocks\.2\.hook_resid_post"):
        check_hook_points(description, ["blocks.3.hook_resid_post"])
    with pytest.raises(ModelError, match=r"3 layers.*'block\.1\.resid_post'.*blocks\.1\.hook_resid_post"):
        check_hook_points(description, ["block.1.resid_post"])


def test_rows_longer_than_the_model_reads_are_refused(folders):
    description = describe_model(ModelSpec(name=str(folders["gpt2"])))
    check_context_size(description, CONTEXT)
    with pytest.raises(ModelError, match=r"data.context_size 65.*at most 64"):
        check_context_size(description, CONTEXT + 1)


def test_short_names_of_transformer_lens_are_known():
    assert location(ModelSpec(name="gpt2-small")) == ("gpt2", None, False)
    assert location(ModelSpec(name="pythia-70m", revision="step1000")) == ("EleutherAI/pythia-70m", "step1000", False)
    assert location(ModelSpec(name="meta-llama/Llama-3.2-1B")).name == "meta-llama/Llama-3.2-1B"
    assert location(ModelSpec(name="demo")).is_local


@pytest.mark.parametrize("kind", KINDS)
def test_without_processing_logits_are_hugging_faces(folders, kind, no_network):
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    bridge = load_model(ModelSpec(name=str(folders[kind])), "cpu")
    assert not bridge.training
    assert not any(parameter.requires_grad for parameter in bridge.original_model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), make_model(kind)(tokens).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "processing"),
    [
        *((kind, "fold_ln") for kind in KINDS),
        *((kind, processing) for kind in ("gpt2", "neox") for processing in ("center", "fold_ln_center")),
    ],
)
def test_processing_changes_weights_and_keeps_predictions(folders, kind, processing):
    tokens = torch.randint(0, VOCAB, (4, 32), generator=torch.Generator().manual_seed(1))
    bridge = load_model(ModelSpec(name=str(folders[kind]), processing=processing), "cpu")
    seen = {}
    for name in ("blocks.1.hook_resid_post", "blocks.1.ln1.hook_out"):
        bridge.hook_dict[name].add_hook(lambda x, hook, name=name: seen.update({name: x}))
    expected = make_model(kind)(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(bridge(tokens).log_softmax(-1), expected, atol=1e-4, rtol=1e-4)
    if "center" in processing:
        assert seen["blocks.1.hook_resid_post"].mean(-1).abs().max() < 1e-5
    if "fold_ln" in processing:
        scale = seen["blocks.1.ln1.hook_out"].square().mean(-1)
        torch.testing.assert_close(scale, torch.ones_like(scale), atol=1e-2, rtol=0)


def test_centring_a_model_with_rms_norms_is_refused(folders):
    with pytest.raises(ModelError, match=r"model.processing 'center'.*accepted: none, fold_ln"):
        load_model(ModelSpec(name=str(folders["llama"]), processing="center"), "cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_is_loaded_in_the_type_asked_for(folders, dtype):
    bridge = load_model(ModelSpec(name=str(folders["llama"]), dtype=dtype), "cpu")
    assert {parameter.dtype for parameter in bridge.original_model.parameters()} == {getattr(torch, dtype)}
    assert bridge(torch.zeros(1, 4, dtype=torch.long)).dtype == getattr(torch, dtype)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"model.name '.*/nowhere'.*no such folder; accepted: `demo`"):
        describe_model(ModelSpec(name=str(tmp_path / "nowhere")))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="not a complete model"):
        describe_model(ModelSpec(name=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(ModelError, match="not a complete model"):
        describe_model(ModelSpec(name=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "abacus"}')
    with pytest.raises(ModelError, match="abacus"):
        describe_model(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("config", [T5Config(d_model=32, num_layers=1)])
def test_what_is_no_causal_language_model_is_refused(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="accepted: causal language models"):
        describe_model(ModelSpec(name=str(tmp_path)))


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_an_incomplete_folder_is_refused(tmp_path, folders, missing):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    (folder / missing).unlink()
    with pytest.raises(ModelError, match="not a complete model"):
        load_model(ModelSpec(name=str(folder)), "cpu")


def test_a_truncated_weight_file_is_refused(tmp_path, folders):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="not a complete model"):
        load_model(ModelSpec(name=str(folder)), "cpu")
    (folder / "model.safetensors").write_bytes(weights[:100])
    with pytest.raises(ModelError, match="cut short"):
        describe_model(ModelSpec(name=str(folder)))


def test_weights_that_would_be_random_are_refused(tmp_path, folders):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    AutoConfig.from_pretrained(folder, n_layer=4).save_pretrained(folder)
    with pytest.raises(ModelError, match="the folder is not complete"):
        load_model(ModelSpec(name=str(folder)), "cpu")


def test_an_architecture_that_transformer_lens_does_not_know_is_refused(tmp_path, folders):
    folder = Path(shutil.copytree(folders["gpt2"], tmp_path / "model"))
    BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "model_type": "roc_bert", "architectures": ["RoCBertForCausalLM"]})
    )
    with pytest.raises(ModelError, match="supports no model of this architecture"):
        load_model(ModelSpec(name=str(folder)), "cpu")


def test_an_unreachable_hub_is_said_so(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'nobody/nothing' is not a folder, and the hub does not give it"):
        describe_model(ModelSpec(name="nobody/nothing"))
    with pytest.raises(ModelError, match="nobody/nothing"):
        load_model(ModelSpec(name="nobody/nothing"), "cpu")


def test_describing_a_model_imports_no_transformer_lens(folders):
    code = (
        "import sys\nfrom penstock.models import describe_model, location\nfrom penstock.spec import ModelSpec\n"
        f"describe_model(ModelSpec(name={str(folders['gpt2'])!r})); location(ModelSpec(name='gpt2-small'))\n"
        "assert 'transformer_lens' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
