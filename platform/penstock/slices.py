"""Handing slices of work out to model hosts, and again when a host dies."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from penstock.errors import SweepError, UserError

STATUS_SECONDS = 10.0
TRIES_PER_HOST = 3

Slice = TypeVar("Slice")


def over_hosts(
    slices: Sequence[Slice], hosts: Sequence[Any], ask: Callable[[Any, Slice], Any], say: Callable[[str], None],
    what: str,
) -> Iterator[tuple[Slice, Any]]:  # fmt: skip
    """Each slice with its result, in the order in which they are done. `ask(host, slice)` gives a reference to a
    result; it is called when the host has nothing else to do, after the results before were taken in.

    A host that dies is given its slice again. Raises `SweepError` when they keep dying; `what` names the work.
    """
    import ray

    todo, idle = list(slices), list(hosts)
    total, shown, failures = len(todo), time.monotonic(), 0
    asked: dict[Any, tuple[Any, Slice]] = {}
    while todo or asked:
        while todo and idle:
            host, one = idle.pop(), todo.pop(0)
            asked[ask(host, one)] = host, one
        finished, _ = ray.wait(list(asked), timeout=1.0)
        for reference in finished:
            host, one = asked.pop(reference)
            idle.append(host)
            try:
                result = ray.get(reference)
            except ray.exceptions.RayActorError:
                failures += 1
                if failures > TRIES_PER_HOST * len(hosts):
                    raise SweepError(f"the model hosts die at {what}; Ray's logs say of what") from None
                say(f"a model host died at {what}; its slice is made again")
                todo.insert(0, one)
                time.sleep(1.0)
            except UserError as error:  # it comes with the host's traceback around it
                raise getattr(error, "cause", error) from None
            else:
                del reference  # or the store keeps what it refers to
                yield one, result
        if time.monotonic() - shown > STATUS_SECONDS:
            shown = time.monotonic()
            say(f"{what}: {total - len(todo) - len(asked)} of {total} slices")
