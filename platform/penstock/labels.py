"""Labels of nodes and custom resources: what Ray takes, and which nodes a label selector chooses.

The rules are Ray's (`ray._private.label_utils`, `NodeResources::NodeLabelMatchesConstraint`), said here without it: a
spec is checked where no Ray runs. Two values that Ray accepts and that no node ever matches are dealt with: the blanks
in `in(a, b)` are taken out, and `(a)` without an operator is refused.
"""

import re
from collections.abc import Mapping

# A label's value, and the name in its key: Kubernetes' syntax.
_VALUE = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_NAME = re.compile(_VALUE)
_PREFIX = re.compile(rf"{_VALUE}(?:\.{_VALUE})*")
_SELECTOR = re.compile(rf"(!?)(?:in\(\s*({_VALUE}(?:\s*,\s*{_VALUE})*)\s*\)|({_VALUE})|)")
_RESERVED = ("CPU", "GPU", "memory", "object_store_memory", "TPU")
# Devices that Ray hands out whole, as it does GPUs.
_ACCELERATORS = ("neuron_cores", "HPU", "NPU", "RBLN", "FURIOSA", "MBLT", "TTNPU")
LEAST_AMOUNT = 0.0001  # Ray counts in these
MOST_AMOUNT = 100e12


def check_label_key(key: str) -> str:
    """A label's key: `name` or `prefix/name`. Raises `ValueError`."""
    prefix, slash, name = key.rpartition("/")
    if slash and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix)):
        raise ValueError(f"the key {key!r}: what is before the / is made of letters, digits, `-`, `_` and `.`, at most "
                         "253 of them, a letter or a digit first and last (penstock, example.com)")  # fmt: skip
    if not _NAME.fullmatch(name):
        raise ValueError(f"the key {key!r}: a name is made of letters, digits, `-`, `_` and `.`, at most 63 of them, a "
                         "letter or a digit first and last, with or without a prefix (penstock/role)")  # fmt: skip
    return key


def check_selector(value: str) -> str:
    """What a label is to be: `value`, `!value`, `in(a,b)` or `!in(a,b)`, as Ray reads it. Raises `ValueError`."""
    negated, values, many = _read(value)
    return ("!" if negated else "") + (f"in({','.join(values)})" if many else values[0])


def matches(labels: Mapping[str, str], selector: Mapping[str, str]) -> bool:
    """Whether a node of these labels is one that a selector chooses."""
    return all(meets(labels, key, value) for key, value in selector.items())


def meets(labels: Mapping[str, str], key: str, value: str) -> bool:
    """Whether the node's label of that key is as one entry of a selector asks. A node without the label is none that
    has a value, and one that has not."""
    negated, values, _ = _read(value)
    return (labels.get(key) in values) != negated


def _read(value: str) -> tuple[bool, list[str], bool]:
    """(whether it must not be one of the values, the values, whether they were given by `in`)."""
    found = _SELECTOR.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"the value {value!r}: accepted are a value, !value, in(a,b) and !in(a,b), where a value is "
                         "made of letters, digits, `-`, `_` and `.`, at most 63 of them, a letter or a digit first and "
                         "last")  # fmt: skip
    operator, among, one = found.groups()
    values = [part.strip() for part in among.split(",")] if among is not None else [one or ""]
    return operator == "!", values, among is not None


def check_resource(name: str, amount: float) -> None:
    """A custom resource of which a host or a pack takes so much. Raises `ValueError`."""
    if name in _RESERVED:
        instead = {"CPU": "cpus_per_host and cpus_per_pack", "GPU": "gpus_per_host and gpus_per_pack"}
        raise ValueError(f"{name} is no custom resource; accepted for it: {instead[name]}" if name in instead else
                         f"{name} is no custom resource, and nothing here asks Ray for it")  # fmt: skip
    if name != name.strip() or not name:
        raise ValueError(f"{name!r} is no name; accepted: a custom resource that nodes were started with")
    if name.startswith("node:"):
        raise ValueError(f"{name!r} is the name of one node, not a resource of nodes; accepted: a custom resource that "
                         "nodes were started with (`ray start --resources`), or a label that they carry")  # fmt: skip
    if not LEAST_AMOUNT <= amount <= MOST_AMOUNT:
        raise ValueError(f"{name} {amount:g}: accepted is an amount from {LEAST_AMOUNT:g}, the least that Ray counts, "
                         f"to {MOST_AMOUNT:g}")  # fmt: skip
    if name in _ACCELERATORS:
        check_devices(amount, name)


def check_devices(amount: float, name: str = "GPU") -> float:
    """An amount of devices that Ray hands out: a part of one, or whole ones. Raises `ValueError`."""
    if amount > 1 and not float(amount).is_integer():
        raise ValueError(f"Ray hands out a part of one {name}, or whole ones; accepted: at most 1 (0.5), or a whole "
                         f"number ({amount // 1:g}, {amount // 1 + 1:g})")  # fmt: skip
    if 0 < amount < LEAST_AMOUNT:
        raise ValueError(f"Ray counts in parts of {LEAST_AMOUNT:g}; accepted: 0, or at least {LEAST_AMOUNT:g}")
    return amount
