"""`penstock harvest`: fill the spool with a spec's activations ahead of time, and train nothing."""

import threading
import time
from pathlib import Path

from penstock.errors import SweepError
from penstock.home import Home
from penstock.identity import code_hash
from penstock.plan import arrays_of, plan_packs
from penstock.session import Session
from penstock.sharing import Sharing

CONSUMER = "harvest"
STATUS_SECONDS = 10.0


def harvest(spec_path: str | Path, home: Home, address: str | None = None) -> int:
    """Put every block of the spec's hook points that is not there yet into the spool. Returns the exit status."""
    session = Session(spec_path, home)
    try:
        session.join(address)
        return _fill(session)
    finally:
        session.close()


def _fill(session: Session) -> int:
    from penstock.actors import Source, StreamConfig

    sweep = session.sweep
    spool = sweep.spool(n_waves=2)  # a harvest is for runs to come
    if spool is None:
        raise SweepError("data.spool is off, or data.activations are given: there is nothing to harvest into; "
                         "accepted: data.spool: DIR, or no data.spool for one in the storage")  # fmt: skip
    spool.describe(sweep.about_stream)
    packs = plan_packs(sweep.spec, sweep.saes)
    arrays = arrays_of(packs)
    n_blocks = sweep.schedule.n_blocks
    before = spool.count_whole(arrays, n_blocks)
    session.say(f"{before} of {n_blocks} blocks of {', '.join(arrays)} are in {spool.spool.place} already")
    name = f"{CONSUMER}-{sweep.stream_id}"
    config = StreamConfig(
        name=name,
        source=Source(sweep.store.id, sweep.calibration_folder, spool),
        n_blocks=n_blocks,
        window=session.window(packs),
        waves=({CONSUMER: arrays},),
        cursors={},
        lease_seconds=sweep.spec.resources.lease_seconds,
        code=code_hash(),
        demand=Sharing(sweep.spec, time.time(), session.fleet, session.say).demand(name, packs=0),
    )
    session.fleet.start_stream(config)
    consumer = _Consumer(session.fleet.stream, arrays, n_blocks)
    shown = time.time()
    while consumer.is_alive():
        consumer.join(0.5)
        found = session.fleet.collect()
        for event in found["mail"] if found else []:
            session.say(event["message"])
        if found and found["fatal"]:
            raise SweepError(f"the harvest is given up: {found['fatal']}")
        if time.time() - shown > STATUS_SECONDS:
            shown = time.time()
            session.say(f"harvest: block {consumer.block} of {n_blocks}")
    if consumer.error is not None:
        raise consumer.error
    after, cost = spool.count_whole(arrays, n_blocks), session.fleet.cost
    session.say(f"{after} of {n_blocks} blocks are in {spool.spool.place}: {cost['blocks_made']:.0f} made, "
                f"{cost['harvested_tokens']:,.0f} tokens, {cost['forward_passes']:,.0f} forward passes")  # fmt: skip
    if after < n_blocks:
        session.say(f"{n_blocks - after} blocks found no room (data.spool_gb {sweep.spec.data.spool_gb:g}); what is "
                    f"there: penstock spool list {spool.spool.place}")  # fmt: skip
    return int(after < n_blocks)


class _Consumer(threading.Thread):
    """Waits for one block after the other and reads none, while the driver looks after the hosts."""

    def __init__(self, stream: object, arrays: tuple[str, ...], n_blocks: int) -> None:
        super().__init__(name="consumer", daemon=True)
        self.block = 0
        self.error: Exception | None = None
        self._stream, self._arrays, self._n_blocks = stream, arrays, n_blocks
        self.start()

    def run(self) -> None:
        from penstock.consumer import StreamClient

        client = StreamClient(self._stream, CONSUMER, self._arrays, run=1)
        try:
            for block in client.passing(0, self._n_blocks):
                self.block = block
            client.close()
        except Exception as error:  # carried over to the driver's thread
            self.error = error
