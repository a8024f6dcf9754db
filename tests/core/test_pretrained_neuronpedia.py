"""Links to Neuronpedia."""

import json
import urllib.parse
import webbrowser

import pytest
import torch

from sae_core import ARCHITECTURES, ConfigError, SAEConfig, UserError
from sae_core.analysis import (
    feature_url,
    get_neuronpedia_quick_list,
    open_neuronpedia_feature_dashboard,
    quick_list_url,
)
from sae_core.pretrained import releases


def sae(**metadata):
    cfg = SAEConfig(architecture="standard", d_in=2, d_sae=10, metadata=metadata)
    return ARCHITECTURES["standard"](cfg, {n: torch.zeros(s) for n, s in ARCHITECTURES["standard"].shapes(cfg).items()})


KNOWN = {"neuronpedia_id": "gpt2-small/8-res-jb", "model_name": "gpt2-small"}


def test_the_page_of_a_latent():
    assert feature_url(sae(**KNOWN), 7) == "https://neuronpedia.org/gpt2-small/8-res-jb/7"
    assert feature_url(sae(**KNOWN), torch.tensor(7)).endswith("/7")
    assert feature_url(sae(**KNOWN), 7, embed=True).startswith(
        "https://neuronpedia.org/gpt2-small/8-res-jb/7?embed=true&"
    )


def test_a_list_of_latents():
    url = urllib.parse.urlsplit(quick_list_url([1, 5], sae(**KNOWN), name="a & b"))
    query = urllib.parse.parse_qs(url.query)
    assert (url.netloc, url.path, query["name"]) == ("neuronpedia.org", "/quick-list/", ["a & b"])
    assert json.loads(query["features"][0]) == [
        {"modelId": "gpt2-small", "layer": "8-res-jb", "index": index} for index in ("1", "5")
    ]
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(quick_list_url({3: "dates"}, sae(**KNOWN))).query)
    assert json.loads(query["features"][0])[0]["description"] == "dates"


def test_the_model_is_neuronpedias_not_the_hubs():
    of_hub = sae(neuronpedia_id="gemma-3-4b-it/9-gemmascope-2-res-16k", model_name="google/gemma-3-4b-it")
    assert "google" not in quick_list_url([1], of_hub)


def test_sae_lens_names_open_a_browser(monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert [get_neuronpedia_quick_list(sae(**KNOWN), [1, 2]), open_neuronpedia_feature_dashboard(sae(**KNOWN), 3)] == (
        opened
    )
    assert "temporary_list" in opened[0] and opened[1].endswith("/3")


@pytest.mark.parametrize("metadata", [{}, {"neuronpedia_id": None}, {"neuronpedia_id": "somewhere"}])
def test_an_sae_that_is_not_there(metadata):
    for link in (lambda: feature_url(sae(**metadata), 1), lambda: quick_list_url([1], sae(**metadata))):
        with pytest.raises(UserError, match="neuronpedia_id"):
            link()


@pytest.mark.parametrize("index", [-1, 10, 1.5, True])
def test_an_index_that_is_none(index):
    with pytest.raises(ConfigError, match=r"accepted: 0 to 9"):
        feature_url(sae(**KNOWN), index)


def test_no_latents():
    with pytest.raises(ConfigError, match="features is empty"):
        quick_list_url([], sae(**KNOWN))


def test_every_name_of_the_table_is_of_this_form():
    known = releases()["neuronpedia_id"].dropna()
    assert len(known) == 2438 and known.str.fullmatch(r"[^/]+/[^/]+").all()
