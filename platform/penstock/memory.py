"""Telling that memory ran out, on a GPU or in main memory."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; PyTorch's CPU allocator has no exception of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return isinstance(error, RuntimeError) and ("can't allocate memory" in message or "out of memory" in message)
