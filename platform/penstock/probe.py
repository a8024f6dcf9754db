"""Search activations on which SAEs are compared while they train: a few thousand tokens of the `search` split, the same
for all. A model host makes them once, and the packs' workers read them from storage."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from penstock.storage import Storage
from sae_core import SAE

PROBE_TOKENS = 8192
_AT_ONCE = 1024


@dataclass(frozen=True)
class Probe:
    """Where the search activations lie, one file an array of the stream; `id` says what they are made of."""

    folder: str
    id: str

    def is_there(self, storage: Storage, arrays: Iterable[str]) -> bool:
        return all(storage.exists(self._file(array)) for array in arrays)

    def store(self, storage: Storage, array: str, activations: Tensor) -> None:
        storage.write(self._file(array), save_tensors({"activations": activations.contiguous()}))

    def load(self, storage: Storage, array: str) -> Tensor:
        """[n, d], float32."""
        return load_tensors(storage.read(self._file(array)))["activations"].float()

    def rung_file(self, sae_id: str, step: int) -> str:
        """Where an SAE's figures at a rung are kept: they are the same whatever sweep it is in."""
        return f"saes/{sae_id}/rung-{step:09d}-{self.id}.json"

    def _file(self, array: str) -> str:
        return f"{self.folder}/search-{self.id}/{array}.safetensors"


@torch.no_grad()
def measure(sae: SAE, x: Tensor, target: Tensor) -> dict[str, float]:
    """`l0` and `explained_variance` of an SAE that reads x [n, d_in] and reconstructs target [n, d_out], by the
    formulas of `sae_core.evaluation`."""
    active, squared_error = 0, 0.0
    device = next(sae.parameters()).device
    for read, wanted in zip(x.split(_AT_ONCE), target.split(_AT_ONCE), strict=True):
        f, x_hat = sae.reconstruct(read.to(device))
        active += int((f != 0).sum())
        squared_error += float((wanted.to(device) - x_hat).square().sum(dtype=torch.float64))
    variance = float((target.double() - target.double().mean(0)).square().sum())
    return {"l0": active / len(x), "explained_variance": 1 - squared_error / variance}
