"""Batch s is a pure function of (spec, step): which block it lies in, and where.

The number of kept tokens of every block is known from the token store before anything is harvested, so a step is found
by a search over integers, and nothing has to be remembered to resume, to replay, or to let a late consumer catch up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from penstock.errors import DataError


@dataclass(frozen=True)
class Schedule:
    """Where every batch lies. What of a block does not fill a batch is dropped.

    `kept_per_block`: tokens of each block after exclusion; `batch_tokens`: tokens of a batch; `steps`: of the run.
    """

    kept_per_block: tuple[int, ...]
    batch_tokens: int
    steps: int

    def __post_init__(self) -> None:
        if self._ends[-1] < self.steps:
            raise DataError(
                f"train.tokens: {self.steps} batches of {self.batch_tokens} are asked for, and the corpus holds "
                f"{self._ends[-1]} ({sum(self.kept_per_block):,} tokens after exclusion); accepted: "
                f"{self._ends[-1] * self.batch_tokens:,} tokens or fewer, or a larger dataset"
            )

    @cached_property
    def _ends(self) -> np.ndarray:
        """The first step after each block."""
        return np.cumsum([0] + [kept // self.batch_tokens for kept in self.kept_per_block])[1:]

    def locate(self, step: int) -> tuple[int, int]:
        """(block, offset in tokens) of a batch."""
        block = int(np.searchsorted(self._ends, step, side="right"))
        return block, (step - self.first_step(block)) * self.batch_tokens

    def first_step(self, block: int) -> int:
        """The first step whose batch lies in the block."""
        return int(self._ends[block - 1]) if block else 0

    def steps_of(self, block: int) -> range:
        """The steps whose batches lie in the block, none beyond the run."""
        return range(min(self.first_step(block), self.steps), min(int(self._ends[block]), self.steps))

    @cached_property
    def n_blocks(self) -> int:
        """Blocks that the run needs."""
        return self.locate(self.steps - 1)[0] + 1


def batches(schedule: Schedule, block: int, length: int, from_step: int) -> Iterator[tuple[int, slice]]:
    """(step, slice of the block) of each batch of a block of `length` tokens, from a step on."""
    expected = schedule.kept_per_block[block]
    if length != expected:
        raise RuntimeError(f"block {block} has {length} tokens, the token store counts {expected}")
    for step in schedule.steps_of(block):
        if step >= from_step:
            offset = schedule.locate(step)[1]
            yield step, slice(offset, offset + schedule.batch_tokens)


def checkpoint_steps(steps: int, checkpoints: int) -> Sequence[int]:
    """The steps after which a whole checkpoint is saved: evenly spaced, the end left to the final export."""
    return sorted({steps * (index + 1) // (checkpoints + 1) for index in range(checkpoints)} - {0, steps})
