"""How long each SAE of a pack keeps its worker busy."""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Seconds spent inside `lap()`. On a GPU they are the GPU's own, which works through its queue later than Python
    fills it; what it has not come to yet is not counted yet."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._seconds = 0.0
        self._running: deque[tuple[Any, Any]] = deque()  # CUDA events of the laps that may not be over

    @contextmanager
    def lap(self) -> Iterator[None]:
        if self._on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            try:
                yield
            finally:
                end.record()
                self._running.append((begin, end))
            return
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - begun

    @property
    def seconds(self) -> float:
        while self._running and self._running[0][1].query():
            begin, end = self._running.popleft()
            self._seconds += begin.elapsed_time(end) / 1e3
        return self._seconds
