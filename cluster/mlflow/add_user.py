#!/usr/bin/env python3
"""Make a user of the team's MLflow server, or give one a new password. Needs nothing but Python.

    export MLFLOW_TRACKING_URI=https://mlflow.example.org MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=...
    python3 cluster/mlflow/add_user.py alice           # a password is made up and printed, once
    python3 cluster/mlflow/add_user.py alice --reset   # for one that is there
    python3 cluster/mlflow/add_user.py alice --may EDIT --experiment gpt2-small-front
    ... < FILE                                         # the password from the first line of a file or pipe

No password is taken from the command line, which other users of the machine can read.
"""

import argparse
import base64
import json
import os
import secrets
import sys
import urllib.error
import urllib.parse
import urllib.request

PERMISSIONS = ("READ", "EDIT", "MANAGE", "NO_PERMISSIONS")


def call(method: str, path: str, **fields: str) -> dict:
    """The server's answer. Leaves with a message where it refuses or is not there."""
    names = ("URI", "USERNAME", "PASSWORD")
    address, user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in names)
    if not address.startswith(("http://", "https://")) or not user or not password:
        sys.exit("MLFLOW_TRACKING_URI (http:// or https://), MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD "
                 "have to be set, the last two to an administrator's")  # fmt: skip
    url = f"{address.rstrip('/')}/api/{path}"
    if method == "GET":
        url = f"{url}?{urllib.parse.urlencode(fields)}"
    request = urllib.request.Request(url, method=method, data=None if method == "GET" else json.dumps(fields).encode())
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace").strip()
        try:
            text = json.loads(text)["message"].splitlines()[0].split(" Error: ")[0]  # what follows shows the hash
        except (ValueError, KeyError, TypeError):
            pass
        if "already exists" in text:
            text = f"{text} Give it a new password with --reset"
        hint = {401: " (MLFLOW_TRACKING_USERNAME or MLFLOW_TRACKING_PASSWORD is wrong)",
                403: f" ({user} is no administrator)"}.get(error.code, "")  # fmt: skip
        sys.exit(f"{address} refuses ({error.code}): {text}{hint}")
    except OSError as error:
        sys.exit(f"{address} does not answer: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("--reset", action="store_true", help="the user is there and gets a new password")
    parser.add_argument("--may", choices=PERMISSIONS, help="what the user, who is there, may do with --experiment")
    parser.add_argument("--experiment", help="the experiment (a sweep's name) that --may is about")
    arguments = parser.parse_args()
    if (arguments.may is None) != (arguments.experiment is None) or (arguments.may and arguments.reset):
        parser.error("--may and --experiment go together, and without --reset")
    if arguments.may:
        found = call("GET", "2.0/mlflow/experiments/get-by-name", experiment_name=arguments.experiment)
        call("POST", "3.0/mlflow/users/permissions/grant", username=arguments.name, resource_type="experiment",
             resource_id=found["experiment"]["experiment_id"], permission=arguments.may)  # fmt: skip
        print(f"{arguments.name} has {arguments.may} on {arguments.experiment}")
        return
    given = "" if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    password = given or secrets.token_urlsafe(18)
    if arguments.reset:
        own = arguments.name == os.environ.get("MLFLOW_TRACKING_USERNAME")
        known = {"current_password": os.environ.get("MLFLOW_TRACKING_PASSWORD", "")} if own else {}
        call("PATCH", "2.0/mlflow/users/update-password", username=arguments.name, password=password, **known)
    else:
        call("POST", "2.0/mlflow/users/create", username=arguments.name, password=password)
    print(f"{arguments.name}: {'the password is set' if given else f'password {password}'}")


if __name__ == "__main__":
    main()
