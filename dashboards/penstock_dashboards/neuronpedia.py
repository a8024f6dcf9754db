"""Feature dashboards in the JSON that Neuronpedia imports: that of SAEDashboard's Neuronpedia runner.

    batch-N.json            {"model_id", "layer", "sae_set", "features": [...]}, of up to 128 latents that fired
    skipped_indexes.json    the latents that never fired, which Neuronpedia shows as dead

Fields of features and activations: `NeuronpediaDashboardFeature` and `NeuronpediaDashboardActivation` at
github.com/jbloomAus/SAEDashboard, commit 234ea3211ce7dbf84d101c4e8bfe844c3903b16a,
sae_dashboard/neuronpedia/neuronpedia_dashboard.py. Their meaning: neuronpedia_converter.py beside it (commit
03a615f7c70a6f6e634845dab4051874698fac5b) and neuronpedia_runner.py (a160bff204b7464d2de00e3f80c255123d11171b).
neuronpedia_export.py (3ea1249ac0e31c3f8433c6c270c40d4e3bec9169) makes Neuronpedia's bulk upload of such a folder.

Where the two differ:

- An interval of the runner's is a fifth of the range of activations, one of ours a fifth of the firings: `bin_min` and
  `bin_max` are the weakest and the strongest example of it, `bin_contains` its share of all tokens, as the runner's is.
- The histogram's bins are logarithmic: `freq_hist_data_bar_values` are their geometric centres.
- Empty are, as where the runner was not asked for them: alignment with neurons, correlated neurons and latents (which
  are by activations; our neighbours are by decoder direction), the logits' histogram, the decoder's weights by head.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from penstock.errors import ConfigError, SweepError
from sae_core.analysis.feature_files import EXAMPLES, Features, read_features

_A_BATCH = 128
_NEVER = -10.0  # log10 of the firing rate of a latent that never fired, as the runner takes it


def export(
    features_folder: str | Path,
    to: str | Path,
    *,
    model_id: str | None = None,
    sae_set: str | None = None,
    layer: int | None = None,
) -> Path:
    """Write a features folder's dashboards into the folder `to`, which is new or empty, and return it.

    `model_id` and `sae_set` are Neuronpedia's names (`gpt2-small`, `res-jb`), `layer` the block's number. Unless given
    they come from the SAE's `neuronpedia_id`, or else from its model's name, its sweep or folder, and its hook point.

    Raises `CheckpointError` for a folder that holds no features, `ConfigError` where a name is neither given nor found,
    `SweepError` where `to` cannot be written or holds something.
    """
    features, to = read_features(features_folder), Path(to)
    named = _names(features.about["sae"], model_id, sae_set, layer)
    try:
        if to.exists() and any(to.iterdir()):
            raise SweepError(f"{str(to)!r} holds something already; accepted: a new or empty folder")
        to.mkdir(parents=True, exist_ok=True)
        rows = features.latents.to_pylist()
        dead = [row["latent"] for row in rows if not row["fired"]]
        _write(to / "skipped_indexes.json", {**named, "layer": str(named["layer"]), "log_sparsity": _NEVER,
                                             "skipped_indexes": dead})  # fmt: skip
        alive = [row for row in rows if row["fired"]]
        lots = _examples(features)
        ahead: tuple[float, list[dict[str, Any]]] = (-1, [])
        for number, first in enumerate(range(0, len(alive), _A_BATCH)):
            batch = []
            for row in alive[first : first + _A_BATCH]:
                while ahead[0] < row["latent"]:
                    ahead = next(lots, (math.inf, []))
                batch.append(_feature(features, row, ahead[1] if ahead[0] == row["latent"] else []))
            _write(to / f"batch-{number}.json", {**named, "features": batch})
    except OSError as error:
        raise SweepError(f"{str(to)!r} cannot be written: {error}") from None
    return to


def _names(sae: Mapping[str, Any], model_id: str | None, sae_set: str | None, layer: int | None) -> dict[str, Any]:
    metadata = sae.get("metadata") or {}
    known = re.fullmatch(r"([^/]+)/(\d+)-(.+)", str(metadata.get("neuronpedia_id") or ""))
    hook_point = str(metadata.get("hook_name_out") or metadata.get("hook_name") or "")
    block = re.search(r"blocks\.(\d+)\.", hook_point)
    found = {
        "model_id": model_id or (known and known[1]) or metadata.get("model_name"),
        "layer": layer if layer is not None else int(known[2]) if known else int(block[1]) if block else None,
        "sae_set": sae_set or (known and known[3]) or sae.get("sweep") or sae.get("folder") or sae.get("id"),
    }
    for name, value in found.items():
        if value is None:
            raise ConfigError(f"{name} None: the SAE at {hook_point or 'no hook point'} does not say it; give {name}=")
    return found


def _examples(features: Features) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each latent's examples, in the order of latents; some at a time."""
    batches = pq.ParquetFile(features.folder / EXAMPLES).iter_batches(batch_size=4096)
    every = (row for batch in batches for row in batch.to_pylist())
    return ((latent, list(rows)) for latent, rows in groupby(every, key=lambda row: row["latent"]))


def _feature(features: Features, row: Mapping[str, Any], there: list[dict[str, Any]]) -> dict[str, Any]:
    data, texts = features.about["data"], features.texts
    bins = features.about["bins"]
    filled = [index for index, count in enumerate(row["histogram"]) if count]
    shown = range(filled[0], filled[-1] + 1) if filled else range(0)
    return {
        "feature_index": row["latent"],
        "neuron_alignment_indices": [],
        "neuron_alignment_values": [],
        "neuron_alignment_l1": [],
        "correlated_neurons_indices": [],
        "correlated_neurons_l1": [],
        "correlated_neurons_pearson": [],
        "correlated_features_indices": [],
        "correlated_features_l1": [],
        "correlated_features_pearson": [],
        "neg_str": [texts[token] for token in row["bottom_tokens"]],
        "neg_values": _rounded(row["bottom_logits"]),
        "pos_str": [texts[token] for token in row["top_tokens"]],
        "pos_values": _rounded(row["top_logits"]),
        "frac_nonzero": float(row["firing_rate"]),
        "freq_hist_data_bar_values": _rounded(math.sqrt(bins[index] * bins[index + 1]) for index in shown),
        "freq_hist_data_bar_heights": [float(row["histogram"][index]) for index in shown],
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": int(data.get("rows") or 0),
        "n_tokens_in_prompt": int(data.get("context_size") or 0),
        "dataset": str(data.get("dataset") or ""),
        "decoder_weights_dist": [],
        "activations": _activations(features, row, there),
    }


def _activations(features: Features, row: Mapping[str, Any], there: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the top group first, then of the intervals, the strongest first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in there:
        groups.setdefault(example["group"], []).append(example)
    quantiles = int(features.about["settings"]["quantiles"])
    found = []
    for name in ["top", *(f"q{number}" for number in range(quantiles, 0, -1))]:
        for example in groups.get(name, []):
            peaks = [other["activation"] for other in groups[name]]
            bounds = (-1.0, row["max_activation"], -1.0) if name == "top" else (
                min(peaks), max(peaks), row["firing_rate"] / quantiles)  # fmt: skip
            found.append({
                **dict(zip(("bin_min", "bin_max", "bin_contains"), _rounded(bounds), strict=True)),
                "tokens": [features.texts[token] for token in example["tokens"]],
                "values": _rounded(example["activations"]),
                "qualifying_token_index": example["peak"],
            })  # fmt: skip
    return found


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, allow_nan=False, separators=(",", ":")), encoding="utf-8")
