"""Every format that SAEs of the world come in, read as its authors compute it, by name, by folder and by file."""

import json
import warnings

import huggingface_hub.constants
import pretrained_formats as world
import pytest
import torch
from pretrained_formats import CASES, D_IN, D_OUT, D_SAE, activations, in_cache, in_folder

from sae_core import SAE, CheckpointError, ConfigError
from sae_core.pretrained import CrossLayerDecoder
from sae_core.pretrained.table import find

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FOLDERS = [name for name, case in CASES.items() if not find(case.release, case.sae_id).path.endswith((".pt", ".pth"))]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no way to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def assert_computes(sae, function):
    x = activations()
    with torch.no_grad():
        f, x_hat = function(x)
        assert (f > 0).any(1).float().mean() > 0.5
        torch.testing.assert_close(sae.encode(x), f, **CLOSE)
        torch.testing.assert_close(sae(x), x_hat, **CLOSE)


def loaded(load, name):
    """A cross-layer transcoder says that its reconstruction is none, every other SAE loads without a word."""
    if name == "circuit-tracer, cross-layer":
        with pytest.warns(CrossLayerDecoder, match="added up"):
            return load()
    return load()


@pytest.mark.parametrize("name", CASES)
def test_a_release_loads_from_the_cache_as_its_authors_compute_it(name, cache):
    case = CASES[name]
    entry = find(case.release, case.sae_id)
    written = case.write(entry.path)
    in_cache(cache, entry.repo_id, written)
    sae = loaded(lambda: SAE.from_pretrained(case.release, case.sae_id), name)
    assert_computes(sae, written.function)
    assert sae.cfg.dtype == "float32" and (sae.d_in, sae.d_sae) == (D_IN, D_SAE)
    metadata = sae.cfg.metadata
    assert metadata["source"] == {
        "repo_id": entry.repo_id, "path": entry.path, "revision": world.COMMIT, "release": case.release,
        "sae_id": case.sae_id, "format": entry.format,
    }  # fmt: skip
    assert metadata.get("neuronpedia_id") == entry.neuronpedia_id
    assert case.hook_name is None or metadata["hook_name"] == case.hook_name
    assert metadata["model_name"]
    _, cfg, sparsity = sae
    assert cfg["architecture"] == case.architecture
    assert (sparsity is not None) == any("sparsity" in file for file in written.files)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_known_by_its_files(name, cache):
    case = CASES[name]
    entry = find(case.release, case.sae_id)
    written = case.write(entry.path)
    snapshot = in_cache(cache, entry.repo_id, written)
    if name in ("SAELens, scale in the release", "SAELens, normalisation in the release"):
        return  # whose folder alone does not say enough
    place = entry.path if entry.format != "circuit_tracer_clt" else f"W_enc_{entry.path}.safetensors"
    if entry.format == "lm_saes":
        written.files[f"{entry.path}/config.json"]["norm_activation"] = "dataset-wise"
    sae = loaded(lambda: SAE.load(snapshot / place), name)
    assert_computes(sae, written.function)
    again = loaded(lambda: SAE.from_hub(entry.repo_id, entry.path), name)
    assert_computes(again, written.function)


@pytest.mark.parametrize("form", [torch.bfloat16, "float64"])
def test_dtype_is_of_the_result_and_scales_are_folded_before(form, tmp_path):
    written = world.llama_scope("sae")
    in_folder(tmp_path, written)
    sae = SAE.load(tmp_path / "sae", dtype=form)
    assert sae.W_enc.dtype == getattr(torch, str(form).removeprefix("torch."))
    x = activations()
    torch.testing.assert_close(sae(x).float(), written.function(x)[1], rtol=0.1, atol=0.5)


# ---- what the cases leave out ----


def load(tmp_path, written, path="sae"):
    in_folder(tmp_path, written)
    return SAE.load(tmp_path / path)


def test_an_embeddings_bias_is_scaled_as_its_latents_are(tmp_path):
    written = world.gemma_scope("embedding/width_4k/average_l0_6", embedding=True)
    assert_computes(load(tmp_path, written, "embedding/width_4k/average_l0_6"), written.function)


def test_a_users_own_folders_names_say_nothing(tmp_path):
    written = world.gemma_scope("transcoders/embedding-research/layer_3")
    sae = load(tmp_path, written, "transcoders/embedding-research/layer_3")
    assert not sae.cfg.is_transcoder and "hook_name" not in sae.cfg.metadata
    assert_computes(sae, written.function)


def test_a_copied_folder_of_gemma_scope_2_knows_what_it_is(tmp_path):
    """By its configuration, or by the folders that it was copied with."""
    written = world.gemma_scope_2("copied", transcoder=True)
    assert load(tmp_path, written, "copied").cfg.is_transcoder
    place = "resid_post/layer_17_width_16k_l0_big"
    sae = load(tmp_path, world.gemma_scope_2(place, config=False), place)
    assert sae.cfg.metadata["hook_name"] == "blocks.17.hook_resid_post"


@pytest.mark.parametrize("include_norms", [True, False])
def test_llama_scopes_threshold_holds_for_unit_rows_of_raw_activations(include_norms, tmp_path):
    written = world.llama_scope("sae", unit_rows=False, include_norms=include_norms)
    assert_computes(load(tmp_path, written), written.function)


def test_a_llama_scope_transcoder_has_two_scales(tmp_path):
    written = world.llama_scope("sae", norm_in=3.0, norm_out=0.4, unit_rows=False)
    sae = load(tmp_path, written)
    assert sae.cfg.is_transcoder and sae.cfg.metadata["hook_name_out"] == "blocks.7.hook_mlp_out"
    assert_computes(sae, written.function)


def test_newer_llama_scope_folders_know_their_scale_and_norms_themselves(tmp_path):
    written = world.lm_saes("sae", scale=2.5, include_norms=True)
    assert_computes(load(tmp_path, written), written.function)


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_lm_saes_of_today(activation, tmp_path):
    written = world.lm_saes_of_today("sae", activation)
    sae = load(tmp_path, written)
    assert sae.cfg.architecture == activation and sae.cfg.metadata["hook_name_out"] == "blocks.14.hook_mlp_out"
    assert_computes(sae, written.function)


@pytest.mark.parametrize("options", [{}, {"transcode": True}, {"transcode": True, "skip": True}])
def test_sparsify(options, tmp_path):
    written = world.sparsify("layers.5.mlp", **options)
    written.files["config.json"] = {"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "some/text", "ctx_len": 2048}
    sae = load(tmp_path, written, "layers.5.mlp")
    assert_computes(sae, written.function)
    metadata = sae.cfg.metadata
    assert metadata["model_name"] == "HuggingFaceTB/SmolLM2-135M" and metadata["context_size"] == 2048
    reads = "blocks.5.mlp.hook_in" if options else "blocks.5.hook_mlp_out"
    assert (metadata["hook_name"], metadata.get("hook_name_out")) == (
        reads, "blocks.5.hook_mlp_out" if options else None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "hook"), [("layers.5", "hook_resid_post"), ("embed_tokens", None), ("h.3.attn", "hook_attn_out")]
)
def test_a_sparsify_folder_is_named_after_its_module(name, hook, tmp_path):
    sae = load(tmp_path, world.sparsify(name), name)
    assert sae.cfg.metadata["hook_name"] == ("hook_embed" if hook is None else f"blocks.{name.split('.')[1]}.{hook}")


@pytest.mark.parametrize("options", [{}, {"activation": "ReLU"}, {"activation": "ReLU", "tied": True}])
def test_openais_own_files(options, tmp_path):
    path = "gpt2-small/resid_post_mlp_v5_32k/autoencoders/8.pt"
    written = world.openai(path, **options)
    sae = load(tmp_path, written, path)
    assert_computes(sae, written.function)
    assert sae.cfg.metadata["hook_name"] == "blocks.8.hook_resid_post"


def test_a_files_folder_is_enough_where_it_is_alone(tmp_path):
    written = world.openai("sae/8.pt")
    assert_computes(load(tmp_path, written), written.function)


def test_a_repository_of_one_file_in_no_release(cache):
    written = world.openai("autoencoders/8.pt")
    in_cache(cache, "someone/openai-saes", written)
    for path in ("autoencoders/8.pt", "autoencoders"):
        sae = SAE.from_hub("someone/openai-saes", path)
        assert_computes(sae, written.function)
        assert sae.cfg.metadata["source"]["path"] == "autoencoders/8.pt"


def test_a_repositorys_root_may_be_the_sae(cache):
    written = world.today("x")
    in_cache(cache, "someone/sae", world.Written({name[2:]: file for name, file in written.files.items()}, print))
    assert_computes(SAE.from_hub("someone/sae"), written.function)


def test_matryoshka_groups_become_prefixes(tmp_path):
    sae = load(tmp_path, world.dictionary("sae", "MatryoshkaBatchTopKSAE"))
    assert sae.prefix_widths == (10, 20)
    x = activations()
    torch.testing.assert_close(sae.prefix(10).encode(x), sae.encode(x)[:, :10])


def test_heads_come_flat_or_apart(cache):
    case = CASES["Gemma Scope, attention"]
    entry = find(case.release, case.sae_id)
    in_cache(cache, entry.repo_id, case.write(entry.path))
    sae = SAE.from_pretrained(case.release, case.sae_id)
    x = activations()
    torch.testing.assert_close(sae(x.view(-1, 4, D_IN // 4)), sae(x).view(-1, 4, D_IN // 4))


def test_a_transcoder_has_both_hook_points(cache):
    case = CASES["Gemma Scope 2, affine transcoder"]
    entry = find(case.release, case.sae_id)
    in_cache(cache, entry.repo_id, case.write(entry.path))
    sae = SAE.from_pretrained(case.release, case.sae_id)
    assert sae.d_out == D_OUT and sae.cfg.skip
    assert sae.cfg.metadata["hook_name_out"] == "blocks.9.hook_mlp_out"
    with pytest.raises(ConfigError, match="skip connection"):
        sae.decode(sae.encode(activations()))


def test_what_is_loaded_can_be_saved_and_loaded_again(tmp_path):
    written = world.llama_scope("sae")
    load(tmp_path, written).save(tmp_path / "ours")
    assert_computes(SAE.load(tmp_path / "ours"), written.function)


# ---- what cannot be read ----

FORMAT_FILES = {
    "gemma_scope": world.gemma_scope, "gemma_scope_2": world.gemma_scope_2, "llama_scope": world.llama_scope,
    "lm_saes": world.lm_saes, "dictionary_learning": lambda path: world.dictionary(path, "AutoEncoderTopK"),
    "sparsify": world.sparsify, "openai": lambda path: world.openai(f"{path}/8.pt"),
    "goodfire": lambda path: world.relu_pair(f"{path}/a.pt", "encoder_linear", "decoder_linear"),
    "attention_kk": lambda path: world.attention_kk(f"{path}/a.pt"),
    "circuit_tracer": lambda path: world.circuit_tracer(f"{path}/layer_3.safetensors"),
}  # fmt: skip
WEIGHTS = (".npz", ".safetensors", ".pt")


def weights_of(written):
    name = next(name for name in written.files if name.endswith(WEIGHTS))
    return name, written.files[name]


@pytest.mark.parametrize("name", FORMAT_FILES)
class TestHostileFolders:
    def test_a_missing_tensor_and_an_unknown_one(self, name, tmp_path):
        for change in (lambda state: state.pop(next(iter(state))), lambda state: state.update(extra=torch.ones(2))):
            written = FORMAT_FILES[name]("sae")
            change(weights_of(written)[1])
            with pytest.raises(CheckpointError, match="missing|unknown|no known format|claims|matrix"):
                load(tmp_path, written)

    def test_another_shape(self, name, tmp_path):
        written = FORMAT_FILES[name]("sae")
        state = weights_of(written)[1]
        matrix = next(key for key, value in state.items() if getattr(value, "ndim", 0) == 2)
        state[matrix] = state[matrix][1:, 1:] if torch.is_tensor(state[matrix]) else state[matrix][1:, 1:].copy()
        with pytest.raises(CheckpointError, match=r"shape|have|expected|missing"):
            load(tmp_path, written)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_no_numbers(self, name, value, tmp_path):
        written = FORMAT_FILES[name]("sae")
        state = weights_of(written)[1]
        matrix = next(key for key, tensor in state.items() if getattr(tensor, "ndim", 0) == 2)
        state[matrix][0, 0] = value
        with pytest.raises(CheckpointError, match="not finite|scale|above 0"):
            load(tmp_path, written)

    def test_a_truncated_file(self, name, tmp_path):
        written = FORMAT_FILES[name]("sae")
        in_folder(tmp_path, written)
        file = tmp_path / weights_of(written)[0]
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=file.name):
            SAE.load(tmp_path / "sae")

    def test_a_link_out_of_the_folder(self, name, tmp_path):
        written = FORMAT_FILES[name]("sae")
        in_folder(tmp_path, written)
        file = tmp_path / weights_of(written)[0]
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        file.rename(elsewhere / file.name)
        file.symlink_to(elsewhere / file.name)
        with pytest.raises(CheckpointError, match="links to"):
            SAE.load(tmp_path / "sae")


class Exploit:
    def __reduce__(self):
        return (exec, ("raise SystemExit('the file ran code')",))


@pytest.mark.parametrize("name", ["dictionary_learning", "openai", "goodfire", "attention_kk"])
def test_no_code_in_a_pickle_is_run(name, tmp_path):
    written = FORMAT_FILES[name]("sae")
    weights_of(written)[1]["more"] = Exploit()
    with pytest.raises(CheckpointError, match="weights_only"):
        load(tmp_path, written)


def test_a_tensor_that_claims_more_than_is_stored_of_it(tmp_path):
    written = FORMAT_FILES["openai"]("sae")
    weights_of(written)[1]["encoder.weight"] = torch.ones(1).expand(10**6, 10**6)
    with pytest.raises(CheckpointError, match="claims shape"):
        load(tmp_path, written)


def test_an_archive_that_unpacks_to_many_times_its_size(tmp_path):
    import numpy as np

    (tmp_path / "sae").mkdir()
    np.savez_compressed(tmp_path / "sae/params.npz", W_enc=np.zeros((3000, 1000), np.float32))
    with pytest.raises(CheckpointError, match="unpack to"):
        SAE.load(tmp_path / "sae")


def test_pickled_objects_in_an_npz(tmp_path):
    import numpy as np

    (tmp_path / "sae").mkdir()
    np.savez(tmp_path / "sae/params.npz", W_enc=np.array([Exploit()], dtype=object))
    with pytest.raises(CheckpointError, match="npz"):
        SAE.load(tmp_path / "sae")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: world.dictionary("sae", "AutoEncoderTopK", k=10**12), "trainer.k is 1000000000000, and ae.pt has"),
        (lambda: world.dictionary("sae", "AutoEncoderTopK", k="4"), "trainer.k is '4'"),
        (lambda: world.dictionary("sae", "AutoEncoder", dict_class="CrossCoder"), "dict_class is 'CrossCoder'"),
        (lambda: world.dictionary("sae", "AutoEncoder", dict_size=41), "dict_size is 41, and the weights have 40"),
        (lambda: world.sparsify("sae", activation="groupmax"), "activation is 'groupmax'; accepted is 'topk'"),
        (lambda: world.sparsify("sae", signed=True), "signed is True"),
        (lambda: world.sparsify("sae", skip=True), "skip_connection is true and transcode is false"),
        (lambda: world.sparsify("sae", num_latents=7), "num_latents is 7, and the weights have 40"),
        (lambda: world.llama_scope("sae", use_glu_encoder=True), "use_glu_encoder"),
        (lambda: world.llama_scope("sae", norm_activation="batch-wise"), "norm_activation is 'batch-wise'"),
        (lambda: world.llama_scope("sae", act_fn="gelu"), "act_fn is 'gelu'"),
        (lambda: world.llama_scope("sae", dataset_average_activation_norm={"in": 0}), "activation_norm.in is 0"),
        (lambda: world.llama_scope("sae", jump_relu_threshold=-1.0), "jump_relu_threshold is -1.0"),
        (lambda: world.openai("sae/8.pt", activation="Identity"), "activation is 'Identity'; accepted: ReLU, TopK"),
        (lambda: world.qwen_scope("sae/layer3.sae.pt"), "do not say what is done with them"),
    ],
)
def test_fields_that_are_not_accepted(make, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, make())


def test_a_k_above_the_width_is_the_width(tmp_path):
    assert load(tmp_path, world.sparsify("sae", k=10**15)).cfg.k == D_SAE


def test_a_cross_layer_transcoder_of_gemma_scope_2(tmp_path):
    written = world.gemma_scope_2("sae")
    weights_of(written)[1]["w_dec"] = torch.ones(D_SAE, 3, D_IN)
    with pytest.raises(CheckpointError, match="cross-layer"):
        load(tmp_path, written)


def test_a_skip_connection_that_only_one_of_two_files_knows(tmp_path):
    written = world.gemma_scope_2("sae", transcoder=True, affine=True)
    written.files["sae/config.json"]["affine_connection"] = False
    with pytest.raises(CheckpointError, match="affine_connection is False"):
        load(tmp_path, written)


def test_several_formats_in_one_folder(tmp_path):
    in_folder(tmp_path, world.gemma_scope("sae"))
    in_folder(tmp_path, world.sparsify("sae"))
    with pytest.raises(CheckpointError, match=r"several formats \(gemma_scope, sparsify\)"):
        SAE.load(tmp_path / "sae")


def test_a_config_beside_sae_lens_files_is_of_something_else(tmp_path):
    written = world.today("sae")
    written.files["sae/config.json"] = {"anything": 1}
    assert_computes(load(tmp_path, written), written.function)


def test_an_unknown_folder_is_told_what_it_has_and_what_is_accepted(tmp_path):
    for name in ("model.safetensors", "other.safetensors"):
        world.write_file(tmp_path / "sae" / name, {"x": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"has model.safetensors, other.safetensors; accepted is .*params.npz"):
        SAE.load(tmp_path / "sae")


def test_an_unknown_file(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(CheckpointError, match="no known format"):
        SAE.load(tmp_path / "notes.txt")
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"\['x'\] are those of no known format"):
        SAE.load(tmp_path / "x.pt")


def test_a_folder_of_folders_says_what_it_has(tmp_path):
    in_folder(tmp_path, world.gemma_scope("layer_3"))
    with pytest.raises(CheckpointError, match=r"no SAE; it has layer_3; accepted is a folder with cfg.json"):
        SAE.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty, or not there"):
        SAE.load(tmp_path / "empty")


def test_no_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        SAE.load(tmp_path / "nowhere")


def test_old_thresholds_of_one_for_all_latents(tmp_path):
    written = world.gemma_scope("sae")
    files = written.files["sae/params.npz"]
    files["threshold"] = files["threshold"][:1]
    assert load(tmp_path, written).threshold.shape == (D_SAE,)
    files["threshold"] = torch.ones(7).numpy()
    with pytest.raises(CheckpointError, match="threshold has shape"):
        load(tmp_path, written)


def test_loading_says_nothing_where_all_is_well(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path, world.gemma_scope("sae"))


def test_configurations_that_are_no_json(tmp_path):
    in_folder(tmp_path, world.sparsify("sae"))
    (tmp_path / "sae/cfg.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        SAE.load(tmp_path / "sae")
