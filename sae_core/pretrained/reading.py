"""What the readers of all formats share: finding files, reading tensors safely, and making an SAE of them.

A reader turns a place into `Weights`: tensors in this library's layout, and what they mean. `build` checks them as a
whole. Whatever is wrong with a file is a CheckpointError that names file and field. Pickles are read by torch's
weights_only alone, archives that unpack to far more than they hold are refused, and so are tensors that claim to be
larger than what is stored of them.
"""

import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from sae_core.architectures import ARCHITECTURES
from sae_core.errors import CheckpointError, one_line
from sae_core.files import check_tensors, dtype_of, find_file, load_tensors, read_json, whole
from sae_core.sae import SAE, SAEConfig

_LARGEST_TEXT = 10_000_000  # bytes of a configuration
_INFLATION = 20  # times its size that an archive may unpack to


@dataclass(frozen=True)
class Place:
    """Where an SAE lies: `path` (a folder, a file, or '' for the root) in `root`, a folder that may be a repository at
    one commit. norm_scaling_factor: what its activations are multiplied by, where a release says so."""

    root: Path
    path: str = ""
    repo_id: str | None = None
    norm_scaling_factor: float | None = None

    @property
    def name(self) -> str:
        """What stands before a message."""
        return str(self.root / self.path)

    @property
    def words(self) -> str:
        """Repository and path: of some formats nothing else says what the SAE is of."""
        if self.repo_id is not None:
            return f"{self.repo_id}/{self.path}"
        return "/".join((self.root / self.path).absolute().parts[-5:])

    def near(self, name: str) -> str:
        """`name` in the folder that `path` is; or that it lies in, if it is a file."""
        return str(PurePosixPath(self.path) / name) if self.path else name

    def has(self, name: str) -> bool:
        return (self.root / name).is_file()

    def layer(self, pattern: str = r"layers?[._-]?(\d+)") -> int | None:
        """The last number that the path has after a word for layer, or by a pattern of the format's own."""
        found = re.findall(pattern, self.words)
        return int(found[-1]) if found else None

    def json(self, name: str) -> dict[str, Any]:
        folder, last = self._split(name)
        return read_json(folder, last)

    def yaml(self, name: str) -> dict[str, Any]:
        folder, last = self._split(name)
        path = Path(find_file(folder, last))
        if path.stat().st_size > _LARGEST_TEXT:
            raise CheckpointError(f"{folder / last}: {path.stat().st_size} bytes; no configuration is so large")
        try:
            content = yaml.safe_load(path.read_bytes())
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{folder / last}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{folder / last}: expected a mapping, got {type(content).__name__}")
        return content

    def safetensors(self, name: str) -> dict[str, Tensor]:
        folder, last = self._split(name)
        return load_tensors(folder, last)

    def npz(self, name: str) -> dict[str, Tensor]:
        folder, last = self._split(name)
        path = Path(find_file(folder, last))
        _refuse_inflated(path, folder / last)
        try:
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = {key: file[key] for key in file.files}
            return {key: torch.from_numpy(array) for key, array in arrays.items()}
        except Exception as error:  # a damaged archive fails in a dozen ways, all of them its own fault
            raise CheckpointError(f"{folder / last}: not a whole .npz file of numbers ({one_line(error)})") from None

    def pickle(self, name: str) -> dict[str, Any]:
        """What torch.save wrote, by weights_only: tensors and plain values, nothing that runs code."""
        folder, last = self._split(name)
        path = Path(find_file(folder, last))
        _refuse_inflated(path, folder / last)
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file fails in a dozen ways, all of them its own fault
            raise CheckpointError(
                f"{folder / last}: not a file of tensors that torch.save wrote (read with weights_only, so that no "
                f"code in it runs): {one_line(error)}"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{folder / last}: holds a {type(content).__name__}; expected is a state dict")
        return dict(content)

    def _split(self, name: str) -> tuple[Path, str]:
        relative = PurePosixPath(name)
        return self.root / relative.parent, relative.name


@dataclass
class Weights:
    """What a reader found: tensors in this library's layout and units (see sae.py).

    config: fields of SAEConfig beside sizes, architecture and metadata.
    scales: what the activations read, and those reconstructed, are multiplied by before the tensors see them.
    notice: what a user has to know before trusting the SAE.
    """

    architecture: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    scales: tuple[float, float] = (1.0, 1.0)
    transcoder: bool = False
    sparsity: Tensor | None = None
    format: str | None = None
    notice: str | None = None


def build(place: Place, weights: Weights, device: str | torch.device, dtype: str | torch.dtype | None) -> SAE:
    """The SAE of what a reader found, in `dtype` (None: float32), in which scales are folded in at full precision."""
    target = dtype_of("float32" if dtype is None else dtype, "dtype")
    d_in, d_sae = matrix(weights.tensors, "W_enc", place.name)
    _, d_out = matrix(weights.tensors, "W_dec", place.name)
    config = dict(weights.config)
    if config.get("k") is not None:
        config["k"] = min(config["k"], d_sae)
    cfg = SAEConfig(
        architecture=weights.architecture,
        d_in=d_in,
        d_sae=d_sae,
        d_out=d_out if weights.transcoder else None,
        dtype=str(target).removeprefix("torch."),
        metadata={name: value for name, value in weights.metadata.items() if value is not None},
        **{"apply_b_dec_to_input": not weights.transcoder, **config},
    )
    sae_class = ARCHITECTURES[weights.architecture]
    shapes = sae_class.shapes(cfg)
    check_tensors(weights.tensors, shapes, Path(place.name))
    scaled = weights.scales != (1.0, 1.0)
    middle = torch.promote_types(target, torch.float32) if scaled else target
    # contiguous: a transposed view would keep another layout in memory than training and kernels expect
    sae = sae_class(cfg, {name: weights.tensors[name].to(middle).contiguous() for name in shapes})
    sae = sae.folded(*weights.scales) if scaled else sae
    return sae.to(device=device, dtype=target)


# ---- tensors ----


def tensors_only(content: Mapping[str, Any], path: str) -> dict[str, Tensor]:
    """The tensors of a state dict, each of them dense and no larger than what is stored of it."""
    found = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in found.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is no plain dense tensor ({tensor.layout}, {tensor.device})")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} claims shape {list(tensor.shape)} and the file holds "
                f"{tensor.untyped_storage().nbytes()} bytes of it"
            )
    return found


def take(tensors: Mapping[str, Tensor], names: Mapping[str, str], path: str, *, left: Sequence[str] = ()) -> dict:
    """The tensors under this library's names, by those they have in the file. `left`: what else it may hold. A name
    that ends in .T is of a transposed matrix. CheckpointError for what is missing, or not known."""
    plain = {ours: theirs.removesuffix(".T") for ours, theirs in names.items()}
    if missing := sorted(set(plain.values()) - tensors.keys()):
        raise CheckpointError(f"{path}: the tensors {missing} are missing; it has {sorted(tensors)}")
    if unknown := sorted(tensors.keys() - set(plain.values()) - set(left)):
        raise CheckpointError(f"{path}: unknown tensors {unknown}; expected are {sorted(plain.values())}")
    taken = {}
    for ours, theirs in names.items():
        tensor = tensors[plain[ours]]
        if theirs.endswith(".T"):
            if tensor.ndim != 2:
                raise CheckpointError(f"{path}: {plain[ours]} has shape {list(tensor.shape)}; expected is a matrix")
            tensor = tensor.T
        taken[ours] = tensor
    return taken


def matrix(tensors: Mapping[str, Tensor], name: str, path: str) -> tuple[int, int]:
    """The shape of a matrix that must be there."""
    if name not in tensors:
        raise CheckpointError(f"{path}: the tensor {name!r} is missing; it has {sorted(tensors)}")
    shape = tensors[name].shape
    if len(shape) != 2 or min(shape) == 0:
        raise CheckpointError(f"{path}: {name} has shape {list(shape)}; expected is a matrix")
    return shape[0], shape[1]


def per_latent(threshold: Tensor, tensors: Mapping[str, Tensor], path: str) -> Tensor:
    """A threshold of all latents [] or [1], or of each, as one of each [d_sae]."""
    d_sae, _ = matrix(tensors, "W_dec", path)
    if threshold.numel() == 1:
        return threshold.reshape(()).float().expand(d_sae).clone()
    if threshold.shape != (d_sae,):
        raise CheckpointError(f"{path}: threshold has shape {list(threshold.shape)}; expected is [] or [{d_sae}]")
    return threshold


# ---- fields ----


def positive(value: Any, name: str, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {name} is {value!r}; accepted is a number above 0")
    return float(value)


def count(value: Any) -> int | None:
    """A field that only describes: itself if it is a whole number from 0 on, else nothing."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def text(value: Any) -> str | None:
    """A field that only describes: itself if it is text, else nothing."""
    return value if isinstance(value, str) and value else None


def part(raw: Mapping[str, Any], name: str, path: str) -> dict[str, Any]:
    """A field that is an object."""
    value = raw.get(name)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is {value!r}; accepted is an object")
    return value


def same_sizes(raw: Mapping[str, Any], tensors: Mapping[str, Tensor], d_in: str, d_sae: str, path: str) -> None:
    """Refuse a configuration whose sizes, where it has them, are not those of the tensors."""
    there = dict(zip((d_in, d_sae), matrix(tensors, "W_enc", path), strict=True))
    for name, size in there.items():
        if raw.get(name) is not None and whole(raw[name], name, path) != size:
            raise CheckpointError(f"{path}: {name} is {raw[name]}, and the weights have {size}")


def _refuse_inflated(path: Path, name: Path) -> None:
    """Weights do not compress: an archive that unpacks to many times its size is made to fill a memory."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except Exception as error:  # as above
        raise CheckpointError(f"{name}: a damaged archive ({one_line(error)})") from None
    if unpacked > _INFLATION * path.stat().st_size + 1_000_000:
        raise CheckpointError(f"{name}: {path.stat().st_size} bytes that unpack to {unpacked}; weights do not")
