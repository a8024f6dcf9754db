"""What the stream's own bookkeeping costs in a long run: memory of its state, and time to hand out a block."""

import statistics
import time
import tracemalloc

import common  # noqa: F401 - makes this checkout the one that is imported

from penstock.stream_state import BlockSet, StreamState


def measure_state(
    n_blocks: int = 1_000_000, n_packs: int = 64, n_arrays: int = 8, window: int = 8, cycles: int = 2000
) -> dict[str, float]:
    """A run of `n_blocks` whose packs read one array each, where every array has a set of spooled blocks.

    `memory_mb`: what the state takes, 10^6 bytes, once every pack has handed in blocks. `hand_out_ms`: median time of
    take, acknowledge, next_work and, where there was something to make, produced, of one pack; the packs take turns, so
    that each cycle but every `n_packs`-th leaves the window where it is.
    """
    arrays = [f"blocks.{index}.hook_resid_post" for index in range(n_arrays)]
    packs = {f"pack-{index}": (arrays[index % n_arrays],) for index in range(n_packs)}
    tracemalloc.start()
    try:
        spooled = {name: BlockSet(n_blocks, range(0, n_blocks // 2, 2)) for name in arrays}
        state = StreamState(n_blocks, window, spooled=spooled)
        state.host_up("host")
        first = n_blocks // 2  # what lies before is in the spool in parts, what follows is made
        for pack, names in packs.items():
            state.attach(pack, names, first, 0.0)
        _cycles(state, packs, first, 2 * window * n_packs)
        memory_mb = tracemalloc.get_traced_memory()[0] / 1e6
    finally:
        tracemalloc.stop()
    return {"memory_mb": memory_mb, "hand_out_ms": 1e3 * statistics.median(_cycles(state, packs, None, cycles))}


def _cycles(state: StreamState, packs: dict[str, tuple[str, ...]], first: int | None, cycles: int) -> list[float]:
    """Seconds of each of so many hand-outs, from block `first` on or where the packs stand."""
    names = list(packs)
    block = state.members[names[0]].cursor if first is None else first
    _produce(state)
    seconds = []
    for cycle in range(cycles):
        pack = names[cycle % len(names)]
        begun = time.perf_counter()
        assert state.take(pack, block, 0.0) is not None
        state.acknowledge(pack, block, 0.0)
        _produce(state)
        seconds.append(time.perf_counter() - begun)
        if pack == names[-1]:
            block += 1
    return seconds


def _produce(state: StreamState) -> None:
    while (work := state.next_work()) is not None:
        state.produced(work, dict.fromkeys(work.arrays, object()), work.arrays)
