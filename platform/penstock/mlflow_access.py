"""What an MLflow server with users and passwords refuses, in words that say what to do about it."""

import os
import re
from urllib.parse import urlsplit

_ANSWER_SECONDS = 10
USERNAME, PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"


def not_admitted(uri: str) -> str | None:
    """Why the server at `uri` does not let this user in; None where it does, and where that cannot be told.

    One request, not tried again, with the credentials that MLflow itself would send: of the environment, of
    ~/.mlflow/credentials, a token.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/experiments/search", "POST", json={"max_results": 1},
            max_retries=0, timeout=_ANSWER_SECONDS, raise_on_status=False,
        )  # fmt: skip
    except (MlflowException, OSError):
        return None
    return refusal(uri, f"failed with error code {answer.status_code} != 200. {answer.text}", "its sweeps")


def refusal(uri: str, complaint: str, what: str) -> str | None:
    """What MLflow's `complaint` means where the server has refused this user or the name it was called by; None for
    every other complaint. `what` is what the user was about to read or write."""
    found = re.search(r"failed with error code (401|403)\b|\b(401|403) Client Error", complaint)
    if found is None:
        return None
    user = os.environ.get(USERNAME)
    if "401" in found[0]:
        if not (user and os.environ.get(PASSWORD)):
            return f"it wants a user and a password: set {USERNAME} and {PASSWORD}, which its administrator gives out"
        return f"it refuses the user {user!r} of {USERNAME}, who is unknown there, or whose {PASSWORD} is wrong"
    if "Invalid Host header" in complaint:
        host = urlsplit(uri).netloc.rpartition("@")[2]
        return f"the server does not go by the name {host!r}: its MLFLOW_SERVER_ALLOWED_HOSTS has to hold it"
    who = f"user {user!r}" if user else "this user"
    return (
        f"{who} may not do this to {what}, which is somebody else's; give the sweep another name, or ask its owner or "
        "the server's administrator for EDIT on it"
    )
