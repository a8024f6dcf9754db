"""What scripts ask of an SAE's configuration and metadata, by the names of SAELens' several ages."""

import copy
import json
import pickle

import pytest
import torch

from sae_core import SAE, ConfigError, SAEConfig, StandardSAE, TopKSAE

ABOUT = {"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2", "context_size": 128, "prepend_bos": True}


def config(**fields) -> SAEConfig:
    return SAEConfig(**{"architecture": "standard", "d_in": 4, "d_sae": 6, "metadata": ABOUT, **fields})


def made(kind: type[SAE], cfg: SAEConfig) -> SAE:
    generator = torch.Generator().manual_seed(0)
    return kind(cfg, {name: torch.randn(shape, generator=generator) for name, shape in kind.shapes(cfg).items()})


def test_metadata_are_read_as_entries_and_as_attributes():
    cfg = config()
    assert cfg.metadata["hook_name"] == cfg.metadata.hook_name == cfg.hook_name == cfg.hook_point == ABOUT["hook_name"]
    assert (cfg.hook_layer, cfg.model_name, cfg.context_size, cfg.prepend_bos) == (8, "gpt2", 128, True)
    assert config(metadata={"hook_name": "ln_final.hook_normalized"}).hook_layer is None


def test_what_is_optional_is_none_and_a_typo_is_an_error():
    cfg = config()
    assert cfg.metadata.neuronpedia_id is cfg.neuronpedia_id is cfg.hook_head_index is None
    with pytest.raises(AttributeError, match=r"no 'hook_nme' \(did you mean 'hook_name'\?\); it has: hook_name, model"):
        _ = cfg.metadata.hook_nme
    with pytest.raises(AttributeError, match="hook_nme"):
        _ = cfg.hook_nme
    with pytest.raises(AttributeError, match="no 'context_size'"):
        _ = config(metadata={"hook_name": "x"}).context_size
    assert not hasattr(config(metadata={}), "hook_name")


def test_what_saelens_has_beside_is_here_or_says_what_is():
    sae = made(StandardSAE, config())
    as_dictionary = sae.cfg.to_dict()
    assert as_dictionary["d_sae"] == 6 and json.loads(json.dumps(as_dictionary))["metadata"] == ABOUT
    for name, instead in {"run_with_cache": "run_with_cache_with_saes", "hook_sae_acts_post": "with_saes"}.items():
        assert not hasattr(sae, name)
        with pytest.raises(AttributeError, match=f"no {name}: .*{instead}"):
            getattr(sae, name)
    with pytest.raises(AttributeError, match="sae.device"):
        _ = sae.cfg.device
    with pytest.raises(AttributeError, match="no attribute 'W_enk'"):
        _ = sae.W_enk


def test_metadata_stay_what_they_are_through_copies_and_files(tmp_path):
    sae = made(StandardSAE, config())
    sae.save(tmp_path / "sae")
    copies = [
        copy.deepcopy(sae.cfg),
        pickle.loads(pickle.dumps(sae.cfg)),
        sae.cfg.model_copy(update={"metadata": dict(ABOUT)}),
        sae.replaced(metadata=dict(ABOUT)).cfg,
        *(load(tmp_path / "sae").cfg for load in (SAE.load, SAE.load_from_disk, SAE.load_from_pretrained)),
    ]
    assert [one.metadata.hook_name for one in copies] == [ABOUT["hook_name"]] * len(copies)
    assert json.loads(json.dumps(sae.cfg.metadata)) == ABOUT


def test_where_and_in_what_type_an_sae_is():
    sae = made(StandardSAE, config()).to(torch.float64)
    assert sae.dtype == torch.float64 and sae.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(StandardSAE, {}), (TopKSAE, {"architecture": "topk", "k": 2, "rescale_acts_by_decoder_norm": True})],
)
def test_decoder_norms_fold_in_place(kind, fields):
    sae, x = made(kind, config(**fields)), torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    before = sae(x)
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(sae(x), before)


def test_decoder_norms_that_would_change_the_function_do_not_fold():
    sae = made(TopKSAE, config(architecture="topk", k=2))
    with pytest.raises(ConfigError, match="would change which latents"):
        sae.fold_W_dec_norm()
