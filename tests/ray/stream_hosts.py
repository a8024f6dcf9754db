"""Model hosts and packs without a model: real Ray actors, and blocks that can be told by their numbers."""

import os
import time

import numpy as np
import ray

from penstock.consumer import StreamClient
from penstock.stream import BlockInfo

TOKENS, WIDTH = 4096, 256  # 4 MB a block and array


def content(block: int, array: str) -> np.ndarray:
    """What a block holds: the same whoever makes it."""
    return np.full((TOKENS, WIDTH), block + sum(map(ord, array)) / 1000, dtype=np.float32)


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0)
class NumberHost:
    """Makes blocks of numbers; dies over every block of `deadly`."""

    def __init__(self, deadly=(), seconds=0.0):
        self.deadly, self.seconds = set(deadly), seconds
        self._made = []

    def ping(self):
        return True

    def made(self):
        return self._made

    def harvest(self, source, block, arrays):
        time.sleep(self.seconds)
        if block in self.deadly:
            os._exit(1)
        made = {name: content(block, name) for name in arrays}
        if source.spool is not None:
            for name, array in made.items():
                source.spool.write(name, block, array, "float32")
        spooled = tuple(arrays) if source.spool is not None else ()
        self._made.append(block)
        return *made.values(), BlockInfo(TOKENS, 1, self.seconds, spooled=spooled)


def read_all(stream, pack, arrays, n_blocks, first=0, run=1, spool=None, between=lambda block: None):
    """Read blocks to the end and check every one; the blocks in the order they came."""
    client = StreamClient(stream, pack, arrays, run, spool)
    seen = []
    for block, found in client.blocks(first, n_blocks):
        assert found.keys() == set(arrays)
        for name in arrays:
            np.testing.assert_array_equal(found[name][::512, 0], content(block, name)[::512, 0])
        del found
        seen.append(block)
        between(block)
    client.close()
    return seen


@ray.remote(num_cpus=0)
class Reader:
    """A pack in a process of its own."""

    def __init__(self, stream):
        self.stream = stream

    def pid(self):
        return os.getpid()

    def read(self, pack, arrays, n_blocks, pause=0.0):
        return read_all(self.stream, pack, arrays, n_blocks, between=lambda block: time.sleep(pause))
