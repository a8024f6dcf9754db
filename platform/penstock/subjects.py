"""What is evaluated: trained SAEs, prefixes of them, and the baselines they have to beat, by one protocol."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load as load_tensors
from torch import nn

from penstock.storage import Storage
from sae_core import SAE, Calibration
from sae_core.baselines import TopKBasis

BASES = ("neurons", "pca")


@dataclass(frozen=True)
class Subject:
    """Something to evaluate: a finished SAE's folder, the first `prefix` latents of it, or the top k of a basis.

    `source`: the storage folder of an SAE, or of the calibration that a basis is made from.
    """

    name: str
    source: str
    basis: str | None = None
    k: int | None = None
    prefix: int | None = None


def load_subject(subject: Subject, storage: Storage) -> nn.Module:
    """The SAE or the baseline, ready to encode and decode raw activations."""
    if subject.basis is not None:
        calibration = Calibration.from_tensors(load_tensors(storage.read(subject.source)))
        return getattr(TopKBasis, subject.basis)(calibration, subject.k)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in storage.read_folder(subject.source).items():
            (Path(folder) / name).write_bytes(data)
        sae = SAE.load(folder)
    return sae if subject.prefix is None else sae.prefix(subject.prefix)
