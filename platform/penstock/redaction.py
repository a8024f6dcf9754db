"""Secrets in texts: what holds one is refused where it would be kept or sent, and whatever is printed, logged or handed
to MLflow goes through `redacted` first.

Secrets belong into the environment of the processes that need them (see cluster/SECURITY.md): a spec, a runtime
environment and a job's description are shown by Ray's dashboard and kept in MLflow.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HIDDEN = "***"
_LEAST_SECRET = 8  # characters of an environment variable's value; what is shorter stands in other texts by chance
_SECRET_VARIABLE = re.compile(r"(?i)(TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|SECRET_KEY)$")
_LEAST_PART = 4  # of a password that holds / or @
# user:password@ of a URI; the password may hold / and @. What looks like HOST:PORT/...@ is none.
_PASSWORD = re.compile(r"(?<=://)([^/\s:@'\"]*):(?!\d+/)([^\s'\"]*)@")
_OPTION = re.compile(
    r"(?i)([?&;](?:[a-z0-9_-]*(?:password|passwd|secret|secret_key|access_key|api_key|account_key|token)"
    r"|sig|x-amz-signature|x-goog-signature)=)([^&\s'\"]+)"
)
_KEYS = {
    "a key of the Hugging Face hub": r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}",
    "a key of AWS": r"(?:AKIA|ASIA)[A-Z0-9]{16}",
    "a key of Google's cloud": r"AIza[A-Za-z0-9_-]{35}|ya29\.[A-Za-z0-9_-]{20,}",
    "a key of GitHub or GitLab": r"gh[opusr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{30,}|glpat-[A-Za-z0-9_-]{20,}",
    "a key of Weights & Biases": r"wandb_v1_[A-Za-z0-9_]{20,}",
    "a key of an API": r"sk-(?:[a-z0-9]+-)*[A-Za-z0-9_]{24,}|xox[abpr]-[A-Za-z0-9-]{20,}",
    "a signed token": r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}(?:\.[A-Za-z0-9_-]+)?",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
}
_KEY = {what: re.compile(rf"(?<![A-Za-z0-9]){pattern if what == 'a private key' else f'(?:{pattern})'}")
        for what, pattern in _KEYS.items()}  # fmt: skip


def secret_in(text: str) -> str | None:
    """What secret a text plainly holds, in words that do not repeat it; None where there is none to be seen."""
    if any(match[2] for match in _PASSWORD.finditer(text)):
        return "a password in a URI"
    if _OPTION.search(text):
        return "a secret among the options of a URI"
    return next((what for what, pattern in _KEY.items() if pattern.search(text)), None)


def secrets_in(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """(where, what) of every secret in the texts of a nested value, keys included."""
    if isinstance(value, str):
        if what := secret_in(value):
            yield path, what
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(key, str) and (what := secret_in(key)):
                yield path, f"{what} as a key"
            else:
                yield from secrets_in(inner, (*path, key))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for index, inner in enumerate(value):
            yield from secrets_in(inner, (*path, index))


def redacted(text: str) -> str:
    """The text with `***` in place of passwords in URIs, keys that are known by their form, and what this process's
    environment holds: the values of variables that are named like secrets (AWS_SECRET_ACCESS_KEY, HF_TOKEN, PGPASSWORD,
    ...), and passwords in the URIs of others."""
    for value in _of_the_environment():
        text = text.replace(value, HIDDEN)
    text = _OPTION.sub(rf"\1{HIDDEN}", _PASSWORD.sub(rf"\1:{HIDDEN}@", text))
    for pattern in _KEY.values():
        text = pattern.sub(HIDDEN, text)
    return text


def without_user(uri: str) -> str:
    """The URI without the user and the password that it may have."""
    return re.sub(r"(?<=://)[^\s/@]*@", "", _PASSWORD.sub("", uri))


def _of_the_environment() -> list[str]:
    """Longest first, so that no value is cut in two by another that is a part of it."""
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    found = {value for value in found if len(value) >= _LEAST_SECRET}
    for value in os.environ.values():
        for match in _PASSWORD.finditer(value) if "://" in value else ():
            # Where / and @ stand in a password as they are, libraries take parts of it for a host or a path.
            parts = re.split("[/@]", match[2])
            found |= {part for part in parts if len(part) >= (_LEAST_SECRET if len(parts) == 1 else _LEAST_PART)}
            found |= {match[2]} if len(match[2]) >= _LEAST_SECRET else set()
    return sorted(found, key=len, reverse=True)
