"""A Ray cluster by the address of its dashboard (http://HOST:8265), from any machine: it joins nothing.

The one place that knows how to reach a dashboard, how to show it the cluster's token, and what to say when it refuses.
"""

import contextlib
import os
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from penstock.errors import SweepError

ANSWER_SECONDS = 30.0
CONNECT_SECONDS = 10.0
MOST_NODES = 10_000
ACCEPTED = "accepted: the address of a cluster's dashboard, like http://127.0.0.1:8265"
TOKEN_SOURCES = "RAY_AUTH_TOKEN, the file that RAY_AUTH_TOKEN_PATH names, or ~/.ray/auth_token"
# Ray would take these in place of the address that the user has typed.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def use_token() -> None:
    """Have Ray show the cluster's token wherever one is set and nothing else was asked for. Ray decides when it is
    imported, so this comes first."""
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"


class Dashboard:
    """The dashboard at `address`, http://HOST:PORT or https://HOST.

    Raises `SweepError` when the address is no such, when nothing or something else answers there, when it wants a token
    and none is set, or refuses this one.
    """

    def __init__(self, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SweepError(f"--address {address!r} is not the address of a dashboard; {ACCEPTED}")
        if parts.username or parts.password:
            raise SweepError(f"--address {parts.hostname!r} has a user or a password in it, and a dashboard knows "
                             f"neither; accepted: a token in {TOKEN_SOURCES}")  # fmt: skip
        self.address = address.rstrip("/")
        self._jobs: Any = None
        use_token()
        version = self.get("/api/version")
        if "ray_version" not in version:
            raise SweepError(f"--address {address!r}: what answers there is no Ray dashboard; {ACCEPTED}")
        self.ray_version: str = version["ray_version"]
        self.session: str = version.get("session_name", "")

    @property
    def jobs(self) -> Any:
        """A `ray.job_submission.JobSubmissionClient` of it."""
        if self._jobs is None:
            import ray.exceptions
            from ray.job_submission import JobSubmissionClient

            try:
                with _without(_OVERRIDING):
                    self._jobs = JobSubmissionClient(self.address)
            except (RuntimeError, OSError, ray.exceptions.AuthenticationError) as error:
                raise SweepError(
                    f"--address {self.address!r}: no Ray job server answers there ({readable(error)}); {ACCEPTED}"
                ) from None
        return self._jobs

    def get(self, path: str, **params: Any) -> dict[str, Any]:
        """The JSON object at a path. Raises `SweepError` when the dashboard does not give it."""
        response = self._request(path, params)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise SweepError(f"--address {self.address!r}: what answers there is no Ray dashboard (no JSON object at "
                             f"{path}); {ACCEPTED}")  # fmt: skip
        return found

    def text(self, path: str, **params: Any) -> str:
        """What is at a path, as text. Raises `SweepError` when the dashboard does not give it."""
        return self._request(path, params).content.decode("utf-8", "replace")

    def nodes(self) -> list[dict[str, Any]]:
        """The nodes that are alive, as Ray's State API tells of them: `node_id`, `node_ip`, `is_head_node`,
        `resources_total` (by name), `labels` and more."""
        found = self.get("/api/v0/nodes", detail="true", limit=MOST_NODES)
        return [node for node in found["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def _request(self, path: str, params: dict[str, Any]) -> Any:
        import requests

        try:
            response = requests.get(
                f"{self.address}{path}", params=params, headers=_headers(), timeout=(CONNECT_SECONDS, ANSWER_SECONDS)
            )
        except requests.RequestException as error:
            raise SweepError(
                f"--address {self.address!r}: no Ray dashboard answers there ({_reason(error)}); {ACCEPTED}"
            ) from None
        if response.status_code == 401:
            raise SweepError(
                f"--address {self.address!r}: the cluster wants its token, and none was sent; accepted: the token in "
                f"{TOKEN_SOURCES}, with RAY_AUTH_MODE=token or unset"
            )
        if response.status_code == 403:
            raise SweepError(
                f"--address {self.address!r}: the cluster refuses this token; accepted: its own, in {TOKEN_SOURCES} "
                "(the first that is set counts)"
            )
        if response.status_code != 200:
            text = " ".join(response.text.split())[:200]
            raise SweepError(f"--address {self.address!r}: {path} was answered with {response.status_code}: {text}")
        return response


def _headers() -> dict[str, str]:
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    try:
        return dict(get_auth_headers_if_auth_enabled({}))
    except AuthenticationError:  # the mode says token, and there is none: the cluster may want none
        return {}


def _has_token() -> bool:
    """Whether there is a token where Ray looks for one."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


def _reason(error: Exception) -> str:
    """The innermost cause: what requests wraps around it is of no use to anybody."""
    inner: Any = error
    while True:
        reason = getattr(inner, "reason", None) or inner.__cause__ or inner.__context__
        if not isinstance(reason, BaseException):
            return readable(inner)
        inner = reason


def readable(error: BaseException) -> str:
    """What an error says, on one line; a server of another kind may have answered with anything."""
    text = " ".join(str(error).split())
    return text[:300] if text.isprintable() and text else "it does not speak HTTP"


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
