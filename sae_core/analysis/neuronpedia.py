"""Links to Neuronpedia, for SAEs that are there: those that SAE.from_pretrained loads know their name on it.

    https://neuronpedia.org/gpt2-small/8-res-jb/1234                 the page of a latent
    https://neuronpedia.org/quick-list/?name=...&features=[...]      a list of latents

Nothing here asks the site anything. `get_neuronpedia_quick_list` and `open_neuronpedia_feature_dashboard` have SAELens'
names and, as those, open a browser.
"""

import json
import urllib.parse
import webbrowser
from collections.abc import Iterable, Mapping

from sae_core.errors import ConfigError, UserError
from sae_core.sae import SAE

SITE = "https://neuronpedia.org"
_EMBEDDED = {"embed": "true", "embedexplanation": "true", "embedplots": "true", "embedtest": "true", "height": "300"}


def feature_url(sae: SAE, index: int, *, embed: bool = False) -> str:
    """The page of latent `index` of `sae` (0 to d_sae - 1); `embed`: as a frame of a notebook shows it. UserError where
    the SAE has no name on Neuronpedia."""
    url = f"{SITE}/{neuronpedia_id(sae)}/{_checked(sae, index)}"
    return f"{url}?{urllib.parse.urlencode(_EMBEDDED)}" if embed else url


def quick_list_url(
    features: Iterable[int] | Mapping[int, str], sae: SAE, *, name: str = "latents"
) -> str:
    """A page that shows several latents of `sae` under one name; with a mapping, each with its own description."""
    model, layer = neuronpedia_id(sae).split("/", 1)
    described = features if isinstance(features, Mapping) else dict.fromkeys(features)
    if not described:
        raise ConfigError("features is empty; accepted: indices of one latent or more")
    listed = [
        {"modelId": model, "layer": layer, "index": str(_checked(sae, index))}
        | ({"description": text} if text is not None else {})
        for index, text in described.items()
    ]
    query = {"name": name, "features": json.dumps(listed)}
    return f"{SITE}/quick-list/?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"


def neuronpedia_id(sae: SAE) -> str:
    """The SAE's name on Neuronpedia, "gpt2-small/8-res-jb": model, and layer with set."""
    found = sae.cfg.metadata.get("neuronpedia_id")
    if isinstance(found, str) and found.count("/") == 1 and all(found.split("/")):
        return found
    if found is not None:
        raise UserError(f"metadata.neuronpedia_id is {found!r}; accepted is MODEL/LAYER-SET, as 'gpt2-small/8-res-jb'")
    raise UserError(
        "this SAE has no name on Neuronpedia (metadata.neuronpedia_id), or is not there; SAEs that are: "
        "releases = sae_core.pretrained.releases(); releases[releases.neuronpedia_id.notna()]"
    )


def get_neuronpedia_quick_list(sae: SAE, features: Iterable[int], name: str = "temporary_list") -> str:
    """Open the quick list in a browser, and return its URL."""
    url = quick_list_url(features, sae, name=name)
    webbrowser.open(url)
    return url


def open_neuronpedia_feature_dashboard(sae: SAE, index: int) -> str:
    """Open the page of a latent in a browser, and return its URL."""
    url = feature_url(sae, index)
    webbrowser.open(url)
    return url


def _checked(sae: SAE, index: int) -> int:
    whole = int(index)
    if isinstance(index, bool) or whole != index or not 0 <= whole < sae.d_sae:
        raise ConfigError(f"index is {index!r}; accepted: 0 to {sae.d_sae - 1}")
    return whole
