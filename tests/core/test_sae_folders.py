import json
import os
import pickle
import shutil
import struct
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_cases import SETTINGS
from sae_core import ARCHITECTURES, SAE, CheckpointError, ConfigError, SAEConfig, SAETrainer, parse_settings
from sae_core.checkpoint import load_sparsity
from sae_core.normalization import PER_TOKEN

FILES = {"cfg.json", "sae_weights.safetensors"}
WEIGHTS = "sae_weights.safetensors"


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
    monkeypatch.setattr("sae_core.checkpoint._save_tensors", lambda tensors, path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sae.save(folder)
    with pytest.raises(CheckpointError, match="cfg.json is missing"):
        SAE.load(folder)


def test_what_has_no_form_on_disk_is_refused_before_anything_is_touched(folder, data):
    sae = SAE.load(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    cases = [
        (sae.replaced(metadata={"dtype": torch.float32}), "metadata cannot be written"),
        (sae.replaced(architecture="batch_topk"), "'batch_topk' has no form on disk"),
        (sae.replaced(reshape_activations="hook_z", metadata={"hook_name": "blocks.0.hook_resid_pre"}), "ends in _z"),
    ]
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=message):
            wrong.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_saving_replaces_links_and_does_not_write_through_them(folder, tmp_path):
    sae = SAE.load(folder)
    other = tmp_path / "other"
    other.write_text("kept")
    for name in (WEIGHTS, WEIGHTS + ".partial", "cfg.json.partial"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(other)
    sae.save(folder)
    assert other.read_text() == "kept"
    assert {path.name for path in folder.iterdir()} == FILES and torch.equal(SAE.load(folder).W_enc, sae.W_enc)


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


# ---- what is wrong with a folder: a CheckpointError that names the file, and the field where it is one ----


def cfg(**changes):
    return lambda folder: edit(folder, **changes)


def text(content):
    return lambda folder: (folder / "cfg.json").write_bytes(content)


def cut(keep):
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:keep])


def tensor(name, value):
    """Replaces a tensor, or takes it out."""

    def change(tensors):
        tensors[name] = value(tensors) if callable(value) else value
        if value is ...:
            del tensors[name]

    return lambda folder: edit_weights(folder, change)


def header(change=lambda header: None, length=lambda n: n, data=lambda data: data):
    """Rewrites the head of the weights' file: its JSON, and the length that stands before it."""

    def damage(folder):
        raw = (folder / WEIGHTS).read_bytes()
        n = struct.unpack("<Q", raw[:8])[0]
        entries = json.loads(raw[8 : 8 + n])
        change(entries)
        head = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length(len(head))) + head + data(raw[8 + n :]))

    return damage


def entry(name="W_enc", **fields):
    return header(lambda entries: entries[name].update(fields))


def link(name, target):
    def replace(folder):
        outside = folder.parent / "outside"
        outside.mkdir()
        shutil.move(folder / name, outside / name)
        (folder / name).symlink_to(target)

    return replace


def replaced_by_folder(name):
    def replace(folder):
        (folder / name).unlink()
        (folder / name).mkdir()

    return replace


DAMAGED = f"{WEIGHTS}: not a whole safetensors file"
WRONG_FOLDERS = {
    # cfg.json: as a file
    "no cfg.json": (lambda folder: (folder / "cfg.json").unlink(), "cfg.json is missing"),
    "cfg.json is a folder": (replaced_by_folder("cfg.json"), "cfg.json: not a file"),
    "cfg.json is empty": (text(b""), "cfg.json: not valid JSON"),
    "cfg.json is cut off": (text(b'{"architecture": '), "cfg.json: not valid JSON"),
    "cfg.json is no UTF-8": (text(b'{"architecture": "\xff\xfe"}'), "cfg.json: not valid JSON"),
    "cfg.json is a list": (text(b"[]"), "cfg.json: expected a JSON object, got list"),
    "cfg.json is a number": (text(b"1"), "cfg.json: expected a JSON object, got int"),
    "cfg.json nests without end": (text(b"[" * 100_000), "cfg.json: not valid JSON"),
    "a number of many digits": (text(b'{"d_in": ' + b"9" * 5000 + b"}"), "cfg.json: not valid JSON"),
    "a field stands twice": (text(b'{"d_in": 16, "d_in": 17}'), "'d_in' stands there twice"),
    "cfg.json links out": (link("cfg.json", "../outside/cfg.json"), "cfg.json: links to .*outside/cfg.json"),
    "cfg.json links to itself": (link("cfg.json", "cfg.json"), "cfg.json: cannot be read"),
    # cfg.json: its fields
    "unknown architecture": (cfg(architecture="gatd"), "unknown architecture 'gatd' .did you mean 'gated'"),
    "no architecture": (cfg(architecture=...), "unknown architecture None"),
    "architecture is no text": (cfg(architecture=["topk"]), "unknown architecture"),
    "other SAEs of SAELens": (cfg(architecture="matching_pursuit"), "'matching_pursuit'.*accepted: standard, gated"),
    "d_sae is text": (cfg(d_sae="48"), "cfg.json: d_sae is '48'"),
    "d_sae is a float": (cfg(d_sae=48.0), "cfg.json: d_sae is 48.0"),
    "d_sae is NaN": (cfg(d_sae=float("nan")), "cfg.json: d_sae is nan"),
    "d_in is infinite": (cfg(d_in=float("inf")), "cfg.json: d_in is inf"),
    "no d_in": (cfg(d_in=...), "cfg.json: d_in is None"),
    "d_in is 0": (cfg(d_in=0), "cfg.json: d_in is 0"),
    "d_in is a truth value": (cfg(d_in=True), "cfg.json: d_in is True"),
    "another d_in": (cfg(d_in=17), f"{WEIGHTS}: W_enc has shape .16, 48.; expected is .17, 48."),
    "d_in without measure": (cfg(d_in=10**12), f"{WEIGHTS}: W_enc has shape .16, 48.; expected is .1000000000000"),
    "d_sae without measure": (cfg(d_sae=10**12), f"{WEIGHTS}: W_enc has shape"),
    "no k": (cfg(k=...), "cfg.json: k is None"),
    "k is 0": (cfg(k=0), "cfg.json: k is 0"),
    "k is negative": (cfg(k=-3), "cfg.json: k is -3"),
    "k is a truth value": (cfg(k=True), "cfg.json: k is True"),
    "k is a float": (cfg(k=2.5), "cfg.json: k is 2.5"),
    "k is infinite": (cfg(k=float("inf")), "cfg.json: k is inf"),
    "dtype of whole numbers": (cfg(dtype="int8"), "cfg.json: dtype is 'int8'"),
    "dtype is a list": (cfg(dtype=["float32"]), "cfg.json: dtype is"),
    "another normalisation": (cfg(normalize_activations="softmax"), "normalize_activations is 'softmax'; accepted:"),
    "normalisation is no text": (cfg(normalize_activations=["none"]), "normalize_activations is"),
    "a scale that is not there": (
        cfg(normalize_activations="expected_average_only_in"), "activation_scaler.json is missing.*not hold the scale"
    ),
    "whitening that is not there": (
        cfg(normalize_activations="covariance_whitening"), "activation_scaler.json is missing"
    ),
    "another reshaping": (cfg(reshape_activations="hook_q"), "reshape_activations is 'hook_q'; accepted: none, hook_z"),
    "a truth value as text": (cfg(apply_b_dec_to_input="false"), "apply_b_dec_to_input is 'false'"),
    "a truth value as number": (cfg(rescale_acts_by_decoder_norm=1), "rescale_acts_by_decoder_norm is 1"),
    "metadata is a list": (cfg(metadata=[1]), "cfg.json: metadata is .1.; accepted is an object"),
    "transcoder without d_out": (cfg(architecture="topk_transcoder", apply_b_dec_to_input=False), "d_out is None"),
    "transcoder that subtracts its output": (
        cfg(architecture="transcoder", d_out=16), "apply_b_dec_to_input is True; a transcoder's is false"
    ),
    "transcoder normalised by token": (
        cfg(architecture="transcoder", d_out=16, apply_b_dec_to_input=False, normalize_activations="layer_norm"),
        "normalize_activations is 'layer_norm'; accepted: none",
    ),
    "threshold that is not there": (cfg(architecture="jumprelu"), f"{WEIGHTS}: the tensors .'threshold'. are missing"),
    "W_skip that is not there": (
        cfg(architecture="topk_skip_transcoder", d_out=16, apply_b_dec_to_input=False), "'W_skip'. are missing"
    ),
    # the weights: as a file
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "weights are a folder": (replaced_by_folder(WEIGHTS), f"{WEIGHTS}: not a file"),
    **{f"weights cut at {keep}": (cut(keep), DAMAGED) for keep in (0, 5, 8, 300, -1, -4000)},
    "a pickle": (lambda folder: (folder / WEIGHTS).write_bytes(pickle.dumps({"W_enc": 1})), DAMAGED),
    "a file of torch.save": (lambda folder: torch.save({"W_enc": torch.ones(2)}, folder / WEIGHTS), DAMAGED),
    "weights link out": (link(WEIGHTS, f"../outside/{WEIGHTS}"), f"{WEIGHTS}: links to .*outside"),
    "weights link to nothing": (link(WEIGHTS, "gone"), f"{WEIGHTS} is missing"),
    # the weights: a header that lies
    "header of 2**63 bytes": (header(length=lambda n: 2**63), DAMAGED),
    "header beyond the end": (header(length=lambda n: 10**6), DAMAGED),
    "header cut short": (header(length=lambda n: n - 7), DAMAGED),
    "more bytes than tensors": (header(data=lambda data: data + b"0000"), DAMAGED),
    "another shape": (entry(shape=[16, 47]), DAMAGED),
    "a shape of 10**24": (entry(shape=[10**12, 10**12]), DAMAGED),
    "a negative shape": (entry(shape=[-16, -48]), DAMAGED),
    "offsets beyond the end": (entry(data_offsets=[0, 10**12]), DAMAGED),
    "offsets backwards": (entry(data_offsets=[8, 0]), DAMAGED),
    "an unknown type": (entry(dtype="Q7"), DAMAGED),
    "transposed": (entry(shape=[48, 16]), f"{WEIGHTS}: W_enc has shape .48, 16.; expected is .16, 48."),
    "whole numbers for floats": (entry(dtype="I32"), f"{WEIGHTS}: W_enc has type torch.int32; accepted: float32"),
    # the weights: their tensors
    "no b_enc": (tensor("b_enc", ...), "the tensors .'b_enc'. are missing"),
    "one too many": (tensor("extra", torch.zeros(1)), "unknown tensors .'extra'"),
    "a truth value as bias": (tensor("b_enc", torch.zeros(48, dtype=torch.bool)), "b_enc has type torch.bool"),
    "complex biases": (tensor("b_enc", torch.zeros(48, dtype=torch.complex64)), "b_enc has type torch.complex64"),
    "a weight that is no number": (
        tensor("W_dec", lambda tensors: tensors["W_dec"] * float("nan")),
        f"{WEIGHTS}: W_dec has values that are not finite",
    ),
    "an infinite bias": (tensor("b_enc", torch.full((48,), float("inf"))), "b_enc has values that are not finite"),
    "a scaling factor of another size": (tensor("scaling_factor", torch.ones(3)), "scaling_factor has shape .3."),
    "no tensor at all": (lambda folder: save_file({}, folder / WEIGHTS), "the tensors .*'W_enc'.* are missing"),
}  # fmt: skip


def test_a_latent_may_be_switched_off_by_its_threshold(tmp_path):
    sae = random_sae("jumprelu")
    sae.threshold[3] = float("inf")
    sae.save(tmp_path / "sae")
    assert not SAE.load(tmp_path / "sae").encode(torch.randn(50, 16) * 100)[:, 3].any()
    sae.threshold[3] = -float("inf")
    sae.save(tmp_path / "sae")
    with pytest.raises(CheckpointError, match="threshold has values that are not finite"):
        SAE.load(tmp_path / "sae")


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "sae"
    random_sae("topk", k=5, rescale_acts_by_decoder_norm=True).save(folder)
    return folder


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_by_name(case, good_folder, tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(good_folder, folder)
    damage, message = WRONG_FOLDERS[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        SAE.load(folder)
    assert str(folder) in str(raised.value)


def test_any_bit_of_the_header_may_be_wrong(good_folder, tmp_path):
    folder = tmp_path / "sae"
    shutil.copytree(good_folder, folder)
    raw = (good_folder / WEIGHTS).read_bytes()
    generator = torch.Generator().manual_seed(0)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    refused = 0
    for place, bit in zip(
        torch.randint(end, (300,), generator=generator), torch.randint(8, (300,), generator=generator), strict=True
    ):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << int(bit)
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            SAE.load(folder)
        except CheckpointError:
            refused += 1
    assert refused > 250  # the rest: spaces, metadata


@pytest.mark.parametrize("forbidden", [".", "cfg.json", WEIGHTS])
def test_without_permission_to_read(good_folder, forbidden):
    root = os.geteuid() == 0  # may read all: the test becomes somebody else, for whom pytest's folders are closed
    with TemporaryDirectory() as base:
        folder = Path(base) / "sae"
        shutil.copytree(good_folder, folder)
        for path in (Path(base), folder, *folder.iterdir()):
            path.chmod(0o755)
        (folder / forbidden).chmod(0)
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied"):
                SAE.load(folder)
        finally:
            if root:
                os.seteuid(0)
            (folder / forbidden).chmod(0o755)


def test_paths_in_the_configuration_are_never_followed(folder, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not these")
    expected = SAE.load(folder)
    edit(folder, weights_path="../x.safetensors", checkpoint_path="../../x", path="/etc/passwd")
    assert torch.equal(SAE.load(folder).W_enc, expected.W_enc)


def test_links_within_the_folder_and_within_a_hugging_face_cache_are_followed(folder, tmp_path):
    expected = SAE.load(folder)
    (folder / "real").mkdir()
    shutil.move(folder / WEIGHTS, folder / "real" / "weights")
    (folder / WEIGHTS).symlink_to("real/weights")
    assert torch.equal(SAE.load(folder).W_enc, expected.W_enc)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123" / "layer_0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    for source, name in ((folder / "real" / "weights", WEIGHTS), (folder / "cfg.json", "cfg.json")):
        shutil.copy(source, tmp_path / "models--a--b" / "blobs" / f"sha-{name}")
        (snapshot / name).symlink_to(f"../../../blobs/sha-{name}")
    assert torch.equal(SAE.load(snapshot).W_enc, expected.W_enc)
    (tmp_path / "link").symlink_to(snapshot)
    assert torch.equal(SAE.load(tmp_path / "link").W_enc, expected.W_enc)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(48)}, "no tensor 'sparsity'"),
        ({"sparsity": torch.zeros(48, dtype=torch.int64)}, "sparsity is torch.int64"),
        ({"sparsity": torch.zeros(6, 8)}, "of shape .6, 8."),
    ],
)
def test_wrong_firing_rates_are_refused(folder, tensors, message):
    save_file(tensors, folder / "sparsity.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_sparsity(folder)


# ---- every form there and back ----


def random_sae(architecture, d_in=16, d_sae=48, **fields):
    generator = torch.Generator().manual_seed(4)
    cls = ARCHITECTURES[architecture]
    config = SAEConfig(architecture=architecture, d_in=d_in, d_sae=d_sae, **fields)
    weights = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in cls.shapes(config).items()}
    return cls(config, weights)


TRANSCODER = {"d_out": 12, "apply_b_dec_to_input": False}
FORMS = {
    "standard": ("standard", {}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {}),
    "topk": ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "transcoder": ("standard", TRANSCODER),
    "skip_transcoder": ("standard", {**TRANSCODER, "skip": True}),
    "jumprelu_transcoder": ("jumprelu", TRANSCODER),
    "jumprelu_skip_transcoder": ("jumprelu", {**TRANSCODER, "skip": True}),
    "topk_transcoder": ("topk", {**TRANSCODER, "k": 5}),
    "topk_skip_transcoder": ("topk", {**TRANSCODER, "k": 5, "skip": True, "rescale_acts_by_decoder_norm": True}),
}


@pytest.mark.parametrize(
    ("name", "normalize"),
    [(name, "none") for name in FORMS]
    + [(name, mode) for name in FORMS if not name.endswith("transcoder") for mode in PER_TOKEN],
)
def test_every_form_there_and_back(name, normalize, tmp_path, data):
    architecture, fields = FORMS[name]
    sae = random_sae(architecture, normalize_activations=normalize, metadata={"hook_name": "a"}, **fields)
    sae.save(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == name
    loaded = SAE.load(tmp_path)
    assert loaded.cfg == sae.cfg.model_copy(update={"metadata": loaded.cfg.metadata})
    x = data.x[:20]
    assert torch.equal(loaded.encode(x), sae.encode(x)) and torch.equal(loaded(x), sae(x))


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


def test_names_of_the_hub_are_no_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, how in (("gpt2-small-res-jb", "from_pretrained"), ("someone/saes", "from_hub")):
        with pytest.raises(CheckpointError, match=rf"{name}: no such folder; if it is on the hub: SAE.{how}\("):
            SAE.load(name)
    random_sae("topk", k=4).save_model("someone/saes")
    assert SAE.load("someone/saes").cfg.k == 4


def test_latents_are_decoded_in_the_saes_own_type_and_width():
    sae, f = random_sae("standard"), torch.rand(3, 48)
    coarse = SAE.replaced(sae, {}).to(torch.bfloat16)
    assert coarse.decode(f).dtype == torch.bfloat16
    torch.testing.assert_close(coarse.decode(f).float(), sae.decode(f), rtol=0.05, atol=0.05)
    for wrong in (torch.rand(3, 96), torch.rand(())):
        with pytest.raises(ConfigError, match=r"latents have shape .*; accepted: \[..., d_sae\] with d_sae 48"):
            sae.decode(wrong)
