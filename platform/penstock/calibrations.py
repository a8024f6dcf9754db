"""Calibrations in storage: one an array of the stream, from its block 0, addressed by what made the block."""

from collections.abc import Mapping

import numpy as np
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from penstock.activations import from_wire
from penstock.storage import Storage
from sae_core import Calibration, calibrate


def calibration_file(folder: str, array: str) -> str:
    return f"{folder}/{array}.safetensors"


def store_calibrations(storage: Storage, folder: str, first_block: Mapping[str, np.ndarray], dtype: str) -> None:
    """Work out and store what is not there yet; every pack uses the same numbers, early or late."""
    for array, values in first_block.items():
        file = calibration_file(folder, array)
        if not storage.exists(file):
            storage.write(file, save_tensors(calibrate(from_wire(values, dtype)).to_tensors()))


def load_calibration(storage: Storage, folder: str, array: str) -> Calibration:
    return Calibration.from_tensors(load_tensors(storage.read(calibration_file(folder, array))))
