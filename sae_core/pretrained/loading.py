"""Loading SAEs: from a release, from any repository of the hub, from a folder or file."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sae_core.checkpoint import CONFIG, FLAT_WEIGHT_KEYS, WEIGHTS, load_sae, load_sparsity
from sae_core.errors import CheckpointError
from sae_core.pretrained import hub
from sae_core.pretrained.formats import ACCEPTED, FORMATS, Format, of_file, of_folder
from sae_core.pretrained.reading import Place, build
from sae_core.pretrained.table import Entry, at, find, is_release
from sae_core.sae import SAE

Device = str | torch.device
DType = str | torch.dtype | None


class CrossLayerDecoder(UserWarning):
    """An SAE's latents are right, and its reconstruction is not of its hook point alone."""


def from_pretrained(
    release: str,
    sae_id: str,
    device: Device = "cpu",
    dtype: DType = None,
    *,
    revision: str | None = None,
    force_download: bool = False,
) -> SAE:
    """See SAE.from_pretrained."""
    if isinstance(release, str) and "/" in release and not is_release(release):
        return from_hub(release, sae_id, revision=revision, device=device, dtype=dtype, force_download=force_download)
    entry = find(release, sae_id)
    format = FORMATS[entry.format]
    required, optional = format.files_of(entry.path)
    snapshot = hub.fetch(entry.repo_id, required, optional, revision=revision, force_download=force_download)
    return _loaded(_place(snapshot, entry.path, entry), format, device, dtype or "float32", snapshot, entry)


def from_hub(
    repo_id: str,
    path: str = "",
    *,
    revision: str | None = None,
    device: Device = "cpu",
    dtype: DType = None,
    force_download: bool = False,
) -> SAE:
    """See SAE.from_hub."""
    path = hub.checked(path)
    entry = at(repo_id, path)
    if entry is not None:
        of = (entry.release, entry.sae_id)
        return from_pretrained(*of, device, dtype, revision=revision, force_download=force_download)
    format = of_file(path)
    if format is None:
        names = hub.names_in(repo_id, path, revision)
        if "checkpoints" in names:
            below = hub.names_in(repo_id, f"{path}/checkpoints", revision)
            names = [*names, *(f"checkpoints/{name}" for name in below)]
        where = f"{repo_id}/{path}".rstrip("/")
        found = of_folder(names, where)
        if found is None:
            raise CheckpointError(f"{where}: {_nothing(names)}; accepted is {ACCEPTED}")
        format, file = found
        path = path if file is None else f"{path}/{file}".lstrip("/")
    required, optional = format.files_of(path)
    snapshot = hub.fetch(repo_id, required, optional, revision=revision, force_download=force_download)
    return _loaded(_place(snapshot, path), format, device, dtype or "float32", snapshot)


def load(path: str | Path, device: Device = "cpu", dtype: DType = None) -> SAE:
    """See SAE.load."""
    folder = Path(path)
    if folder.is_file():
        format = of_file(folder.name)
        if format is None:
            raise CheckpointError(f"{folder}: a file in no known format; accepted is {ACCEPTED}")
        return _read(_local(folder), format, device, dtype)
    names = _names(folder)
    if names is None and not folder.exists() and (is_release(str(path)) or re.fullmatch(r"[\w.-]+/[\w.-]+", str(path))):
        how = "SAE.from_pretrained(release, sae_id)" if is_release(str(path)) else "SAE.from_hub(repo_id, path)"
        raise CheckpointError(f"{folder}: no such folder; if it is on the hub: {how}")
    if names is None:  # as reading it will say
        return load_sae(folder, device=device, dtype=dtype)
    found = of_folder(names, str(folder))
    if found is None and not {CONFIG, WEIGHTS} & set(names):
        raise CheckpointError(f"{folder}: {_nothing(names)}; accepted is {ACCEPTED}")
    if found is None or found[0].read is None:
        return load_sae(folder, device=device, dtype=dtype)
    format, file = found
    return _read(_local(folder if file is None else folder / file), format, device, dtype)


def _names(folder: Path) -> list[str] | None:
    """What lies in a folder, and in its `checkpoints`; None if it cannot be listed."""
    try:
        names = sorted(os.listdir(folder))
        below = sorted(os.listdir(folder / "checkpoints")) if "checkpoints" in names else []
    except OSError:
        return None
    return [*names, *(f"checkpoints/{name}" for name in below)]


def _nothing(names: list[str]) -> str:
    if not names:
        return "empty, or not there"
    return f"no SAE; it has {', '.join(sorted(names)[:12])}{', ...' if len(names) > 12 else ''}"


def _local(path: Path) -> Place:
    """A place on disk. A folder of the hub's cache says which repository it belongs to, and so what the SAE is of."""
    path = path.absolute()
    cached = re.fullmatch(r"(.*/models--([^/]+?)--([^/]+)/snapshots/[^/]+)/?(.*)", path.as_posix())
    if cached is not None:
        return Place(Path(cached[1]), cached[4], f"{cached[2]}/{cached[3]}")
    return Place(path.parent, path.name)


def _place(snapshot: hub.Snapshot, path: str, entry: Entry | None = None) -> Place:
    return Place(snapshot.root, path, snapshot.repo_id, entry.norm_scaling_factor if entry else None)


def _read(place: Place, format: Format, device: Device, dtype: DType) -> SAE:
    assert format.read is not None
    weights = format.read(place)
    if weights.notice is not None:
        warnings.warn(f"{place.name}: {weights.notice}", CrossLayerDecoder, stacklevel=4)
    return build(place, weights, device, dtype)


def _loaded(
    place: Place, format: Format, device: Device, dtype: DType, snapshot: hub.Snapshot, entry: Entry | None = None
) -> SAE:
    """The SAE, with what its release says and where it came from in its metadata, ready to be unpacked."""
    overrides = dict(entry.overrides) if entry else {}
    sparsity = None
    if format.read is None:
        folder = place.root / place.path
        scale = place.norm_scaling_factor
        of_weights = {name: value for name, value in overrides.items() if name in FLAT_WEIGHT_KEYS}
        sae = load_sae(folder, device=device, dtype=dtype, overrides=of_weights, norm_scaling_factor=scale)
        sparsity = load_sparsity(folder)
    else:
        sae = _read(place, format, device, dtype)
    metadata = {**sae.cfg.metadata, **{name: v for name, v in overrides.items() if name not in FLAT_WEIGHT_KEYS}}
    if entry is not None:
        metadata["neuronpedia_id"] = entry.neuronpedia_id or metadata.get("neuronpedia_id")
        metadata["model_name"] = metadata.get("model_name") or entry.model
    metadata["source"] = {
        "repo_id": snapshot.repo_id,
        "path": place.path,
        "revision": snapshot.commit,
        "release": entry.release if entry else None,
        "sae_id": entry.sae_id if entry else None,
        "format": entry.format if entry else format.name,
    }
    sae.cfg = sae.cfg.model_copy(update={"metadata": {k: v for k, v in metadata.items() if v is not None}})
    if sparsity is not None and sparsity.shape != (sae.d_sae,):
        raise CheckpointError(
            f"{place.name}: sparsity has shape {list(sparsity.shape)}; expected is [d_sae], [{sae.d_sae}]"
        )
    sae.loaded = (described(sae), None if sparsity is None else sparsity.to(device))
    return sae


def described(sae: SAE) -> dict[str, Any]:
    """What SAELens' users know as `cfg`: one flat dictionary of the SAE's fields and of its metadata."""
    cfg = sae.cfg
    fields = cfg.model_dump(exclude={"metadata", "dtype"})
    flat: dict[str, Any] = {**cfg.metadata, **fields, "dtype": cfg.dtype, "device": str(sae.W_enc.device)}
    flat["metadata"] = dict(cfg.metadata)  # where today's scripts look
    flat["activation_fn_str"] = "topk" if cfg.architecture == "topk" else "relu"
    layer = re.search(r"(?:blocks|layers)\.(\d+)", str(flat.get("hook_name")))
    if layer is not None:
        flat.setdefault("hook_layer", int(layer[1]))
    if cfg.is_transcoder:
        kinds = {"standard": "transcoder"}
        name = kinds.get(cfg.architecture, f"{cfg.architecture}_transcoder")
        flat["architecture"] = name.replace("transcoder", "skip_transcoder") if cfg.skip else name
    else:
        flat.pop("d_out")
    return flat
