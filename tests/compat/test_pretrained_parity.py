"""The released sae_lens loads the same files of the same cache of the hub: same latents, same reconstructions."""

import json
import warnings
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pretrained_formats as world
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from pretrained_formats import CASES, activations, in_cache, in_folder
from safetensors import safe_open

from sae_core import SAE
from sae_core.pretrained.formats import FORMATS
from sae_core.pretrained.reading import Place
from sae_core.pretrained.table import FORMATS_THERE, entries, find, releases

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sae_lens = pytest.importorskip("sae_lens", reason="sae_lens is not installed (extra `compat`)")
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

pytestmark = [pytest.mark.compat, pytest.mark.filterwarnings("ignore")]

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Of these it takes the sizes for what no tiny SAE has, even where it is told otherwise, or it cannot read them at all.
READ_BY_BOTH = [name for name, case in CASES.items() if case.sae_lens_reads_it]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # it asks the hub for the headers of some files, by HTTP alone; the same headers, from the cache
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes_in_cache)
    return tmp_path / "hub"


def shapes_in_cache(repo_id, filename):
    with safe_open(huggingface_hub.hf_hub_download(repo_id, filename), framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def theirs(release, sae_id, sizes):
    """By their own way; widths that it takes from names, where a tiny SAE has another, are told to its own loader."""
    loader = loaders.NAMED_PRETRAINED_SAE_LOADERS[loaders.get_conversion_loader_name(release)]

    def converter(**given):
        return loader(**{**given, "cfg_overrides": {**(given["cfg_overrides"] or {}), **sizes}})

    return sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(release, sae_id, converter=converter)


def corrected(hook_name: str | None, is_gemma_scope_2: bool) -> str | None:
    """Transcoders of Gemma Scope 2 read `pre_feedforward_layernorm.output`, which lies behind that norm; hook_mlp_in,
    which sae_lens names, lies before it in TransformerLens' models."""
    return hook_name and hook_name.replace("hook_mlp_in", "mlp.hook_in") if is_gemma_scope_2 else hook_name


@pytest.mark.parametrize("name", READ_BY_BOTH)
@torch.no_grad()
def test_the_same_function_of_the_same_cache(name, cache):
    case = CASES[name]
    entry = find(case.release, case.sae_id)
    written = case.write(entry.path)
    in_cache(cache, entry.repo_id, written)
    there, _, sparsity_there = theirs(case.release, case.sae_id, written.sizes)
    ours, cfg, sparsity = SAE.from_pretrained(case.release, case.sae_id)
    x = activations().view(-1, 4, 4) if there.cfg.reshape_activations == "hook_z" else activations()
    f = there.encode(x)
    assert (f > 0).any(1).float().mean() > 0.5
    torch.testing.assert_close(ours.encode(x), f, **CLOSE)
    torch.testing.assert_close(ours(x), there(x), **CLOSE)
    if not ours.cfg.skip and ours.cfg.normalize_activations == "none":
        torch.testing.assert_close(ours.decode(f, x), there.decode(f), **CLOSE)
    assert (sparsity is None) == (sparsity_there is None)
    assert sparsity is None or torch.equal(sparsity, sparsity_there)
    about = there.cfg.metadata
    assert ours.cfg.metadata.get("hook_name") == corrected(about.hook_name, entry.format == "gemma_scope_2")
    for field in ("hook_name_out", "neuronpedia_id", "model_from_pretrained_kwargs", "prepend_bos"):
        assert (ours.cfg.metadata.get(field) or None) == (getattr(about, field) or None), field
    if name != "Llama Scope R1":  # of which its loader names the base model, and its directory the right one
        assert cfg["model_name"].split("/")[-1] == str(about.model_name).split("/")[-1]
    assert cfg["architecture"] == there.cfg.architecture()


@torch.no_grad()
def test_sparsify_where_sae_lens_reads_it(tmp_path):
    """It takes normalize_decoder for whether b_dec is subtracted, and reads decoder.weight alone as it lies."""
    written = world.sparsify("layers.5", normalize_decoder=False)
    state = written.files["layers.5/sae.safetensors"]
    state["decoder.weight"] = state.pop("W_dec").T.contiguous()
    in_folder(tmp_path, written)
    cfg, weights = loaders.sparsify_disk_loader(tmp_path / "layers.5", cfg_overrides={"dtype": "float32"})
    there = sae_lens.SAE.from_dict(loaders.handle_config_defaulting(cfg))
    there.load_state_dict(weights)
    ours, x = SAE.load(tmp_path / "layers.5"), activations()
    torch.testing.assert_close(ours.encode(x), there.encode(x), **CLOSE)
    torch.testing.assert_close(ours(x), there(x), **CLOSE)
    assert ours.cfg.metadata["hook_name"] == there.cfg.metadata.hook_name


@torch.no_grad()
def test_where_rows_are_no_unit_vectors_llama_scopes_thresholds_differ_from_sae_lens(cache):
    """As its authors use it (see formats/llama_scope.py); the latents that fire in both are the same."""
    case = CASES["Llama Scope"]
    entry = find(case.release, case.sae_id)
    in_cache(cache, entry.repo_id, world.llama_scope(entry.path, unit_rows=False))
    there, x = theirs(case.release, case.sae_id, {})[0], activations()
    ours = SAE.from_pretrained(case.release, case.sae_id)
    f, g = ours.encode(x), there.encode(x)
    both = (f > 0) & (g > 0)
    assert both.any() and ((f > 0) != (g > 0)).any()
    torch.testing.assert_close(f[both], g[both], **CLOSE)


# ---- names ----


def test_every_path_says_what_sae_lens_takes_from_it(monkeypatch):
    """Of Gemma Scope, Gemma Scope 2 and Qwen Scope, where nothing but the path does: 12,187 SAEs, none of them read."""
    w = world.plain()
    skip = torch.zeros(world.D_IN, world.D_IN)
    of_google = {name.lower(): tensor for name, tensor in w.items()}
    of_qwen = {name: tensor.T if tensor.ndim == 2 else tensor for name, tensor in w.items() if name != "threshold"}
    monkeypatch.setattr(Place, "has", lambda self, name: False)
    monkeypatch.setattr(Place, "npz", lambda self, name: dict(w))
    monkeypatch.setattr(Place, "pickle", lambda self, name: dict(of_qwen))
    monkeypatch.setattr(
        Place, "safetensors",
        lambda self, name: {**of_google, **({"affine_skip_connection": skip} if "affine" in self.path else {})},
    )  # fmt: skip

    def no_file(*given, **options):
        raise EntryNotFoundError("none")

    monkeypatch.setattr(loaders, "hf_hub_download", no_file)
    sizes = {"w_enc": [world.D_IN, world.D_SAE], "w_dec": [world.D_SAE, world.D_IN]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *given: sizes)
    fields = ("hook_name", "hook_name_out", "hf_hook_name", "hf_hook_name_out", "context_size", "prepend_bos")
    read = 0
    for release in get_pretrained_saes_directory():
        get_config = loaders.NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loaders.get_conversion_loader_name(release)]
        for entry in entries(release).values():
            if entry.format not in ("gemma_scope", "gemma_scope_2", "qwen_scope"):
                break
            there = get_config(entry.repo_id, entry.path, "cpu", False, None)
            ours = FORMATS[entry.format].read(Place(Path("/nowhere"), entry.path, entry.repo_id))
            where = (release, entry.sae_id)
            taken = {f: there.get(f) for f in fields}
            taken["hook_name"] = corrected(taken["hook_name"], entry.format == "gemma_scope_2")
            assert {f: ours.metadata.get(f) for f in fields} == taken, where
            assert ours.metadata["model_name"].split("/")[-1] == there["model_name"].split("/")[-1], where
            assert ours.transcoder == ("transcoder" in there["architecture"]), where
            assert ours.config.get("skip", False) == ("skip" in there["architecture"]), where
            read += 1
    assert read == 12187


# ---- the table ----


def test_the_table_is_that_of_the_released_directory():
    directory = get_pretrained_saes_directory()
    seen = set()
    for name, there in directory.items():
        format = FORMATS_THERE.get(there.conversion_func, there.conversion_func)
        known = entries(name)
        assert {sae_id: entry.path for sae_id, entry in known.items()} == there.saes_map
        for sae_id, entry in known.items():
            assert (entry.repo_id, entry.model, entry.format) == (there.repo_id, there.model, format)
            assert entry.neuronpedia_id == there.neuronpedia_id[sae_id]
            assert entry.norm_scaling_factor == there.norm_scaling_factor.get(sae_id)
            assert (entry.l0 or 0.0) == there.expected_l0[sae_id]
            assert dict(entry.overrides) == (there.config_overrides or {})
            seen.add((name, sae_id))
    readable = releases()
    assert len(seen) == 13857 and len(readable) == 13854 and readable["release"].nunique() == 168


def test_the_table_is_made_by_its_script(tmp_path):
    import runpy
    import sys

    from sae_core.pretrained.table import FILE

    script = Path(__file__).parents[2] / "jobs" / "build_releases.py"
    given, sys.argv = sys.argv, [str(script), "--to", str(tmp_path / "made.json")]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = given
    assert (tmp_path / "made.json").read_bytes() == FILE.read_bytes()
    assert json.loads(FILE.read_text()) and FILE.stat().st_size < 600_000


# ---- Neuronpedia ----


def test_links_are_those_of_sae_lens(monkeypatch, tmp_path):
    import webbrowser

    from sae_lens.analysis.neuronpedia_integration import (
        get_neuronpedia_quick_list,
        open_neuronpedia_feature_dashboard,
    )

    from sae_core.analysis import feature_url, quick_list_url

    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    there = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=2, d_sae=10))
    there.cfg.metadata.model_name, there.cfg.metadata.neuronpedia_id = "gpt2-small", "gpt2-small/8-res-jb"
    there.save_model(tmp_path)
    ours = SAE.load(tmp_path)
    open_neuronpedia_feature_dashboard(there, 3)
    assert opened == [feature_url(ours, 3)]
    assert get_neuronpedia_quick_list(there, [1, 2], name="my list") == quick_list_url([1, 2], ours, name="my list")

