"""Handing slices of work out to model hosts, and again when a host dies."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from penstock.errors import SweepError, UserError
from penstock.text import last_line

STATUS_SECONDS = 10.0
TRIES = 3  # as many hosts as a slice may kill

Slice = TypeVar("Slice")


def over_hosts(
    slices: Sequence[Slice], hosts: Sequence[Any], ask: Callable[[Any, Slice], Any], say: Callable[[str], None],
    what: str, check: Callable[[float], None] = lambda share: None,
) -> Iterator[tuple[Slice, Any]]:  # fmt: skip
    """Each slice with its result, in the order in which they are done. `ask(host, slice)` gives a reference to a
    result; it is called when the host has nothing else to do, after the results before were taken in.

    The slice of a host that dies goes to another one; the host is waited for while it is restarted. Raises `SweepError`
    when a slice has been lost three times, or no host is left; `what` names the work. `check` is called about once a
    second with the share that is done, and ends it by raising.
    """
    import ray

    todo, idle = list(range(len(slices))), list(hosts)
    shown, lost, done = time.monotonic(), Counter[int](), 0
    asked: dict[Any, tuple[Any, int | None]] = {}  # the host and the slice; None: whether it is up again
    reason = ""
    while done < len(slices):
        check(done / len(slices))
        while todo and idle:
            host, number = idle.pop(), todo.pop(0)
            asked[ask(host, slices[number])] = host, number
        if not asked and not idle:
            raise SweepError(f"all model hosts have died at {what}: {reason}")
        finished, _ = ray.wait(list(asked), timeout=1.0)
        for reference in finished:
            host, number = asked.pop(reference)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError as error:
                reason = last_line(error)
                if number is None and isinstance(error, ray.exceptions.ActorDiedError):
                    continue  # for good: it could not be built again
                if number is not None:
                    lost[number] += 1
                    if lost[number] >= TRIES:
                        raise SweepError(f"{what}: {TRIES} model hosts have died at one slice: {reason}") from None
                    say(f"a model host died at {what}; its slice is made again")
                    todo.insert(0, number)
                else:
                    time.sleep(0.5)
                asked[host.ping.remote()] = host, None
                continue
            except UserError as error:  # it comes with the host's traceback around it
                raise getattr(error, "cause", error) from None
            idle.append(host)
            if number is not None:
                done += 1
                del reference  # or the store keeps what it refers to
                yield slices[number], result
        if time.monotonic() - shown > STATUS_SECONDS:
            shown = time.monotonic()
            say(f"{what}: {done} of {len(slices)} slices")
