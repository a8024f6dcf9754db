"""Activations as they travel between processes: numpy arrays, bfloat16 as its bits in uint16, as numpy has none."""

import warnings

import numpy as np
import torch
from torch import Tensor

_WIRE_DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.uint16}


def wire_dtype(dtype: torch.dtype) -> type[np.generic]:
    """The numpy type that stands for a model's type."""
    return _WIRE_DTYPES[dtype]


def to_wire(tensor: Tensor) -> np.ndarray:
    """A CPU tensor as the array that travels, without a copy."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def from_wire(array: np.ndarray, dtype: torch.dtype | str) -> Tensor:
    """The tensor of type `dtype` (or of that name) that an array stands for, without a copy.

    The object store hands arrays out read-only and torch cannot keep that: never change the result in place.
    """
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert array.dtype == _WIRE_DTYPES[dtype]
    if dtype is torch.bfloat16:
        array = array.view(np.int16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype is torch.bfloat16 else tensor
