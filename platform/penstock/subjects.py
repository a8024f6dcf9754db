"""What is evaluated: trained SAEs, prefixes of them, and the baselines they have to beat, by one protocol."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from penstock.sites import Site
from penstock.spec import DataSpec
from penstock.splits import Split
from penstock.storage import Storage
from penstock.tokens import TokenStore
from sae_core import SAE, Calibration
from sae_core.baselines import TopKBasis

if TYPE_CHECKING:
    from penstock.model_host import ModelHost
    from sae_core.evaluation import EvaluationSums

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
        return getattr(TopKBasis, subject.basis)(_calibration(storage, subject.source), subject.k)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in storage.read_folder(subject.source).items():
            (Path(folder) / name).write_bytes(data)
        sae = SAE.load(folder)
    return sae if subject.prefix is None else sae.prefix(subject.prefix)


def load_mean(storage: Storage, calibration_file: str) -> Tensor:
    """The mean activation [d] of a calibration."""
    return _calibration(storage, calibration_file).mean


def evaluate_subjects(
    host: "ModelHost", store: TokenStore, data: DataSpec, site: Site, subjects: Mapping[Subject, nn.Module],
    split: Split, start_row: int, stop_row: int, ablation: Tensor | None,
) -> "dict[str, EvaluationSums]":  # fmt: skip
    """The sums of subjects of one site, by their names, over some rows of a split; see `ModelHost.evaluate_site`."""
    saes, bases = (
        {subject.name: module for subject, module in subjects.items() if (subject.basis is not None) == is_basis}
        for is_basis in (False, True)
    )
    return host.evaluate_site(store, data, site, saes, bases, split, start_row, stop_row, ablation)


def _calibration(storage: Storage, file: str) -> Calibration:
    return Calibration.from_tensors(load_tensors(storage.read(file)))
