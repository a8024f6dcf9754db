"""What a dashboard's address is, what is said when it is none, and that the token goes along."""

import json
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from penstock.dashboard import Dashboard
from penstock.errors import SweepError

VERSION = json.dumps({"version": "4", "ray_version": "2.60.0", "session_name": "session_1"})


@contextmanager
def server(status=200, body=VERSION, token=None):
    """A server that answers everything alike, or refuses whoever shows another token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            shown = self.headers.get("Authorization")
            refused = token is not None and (401 if shown is None else 403 if shown != f"Bearer {token}" else 0)
            self.send_response(refused or status)
            self.end_headers()
            self.wfile.write(b"no" if refused else body.encode())

        def log_message(self, *arguments):
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8265", "is not the address of a dashboard; accepted: .* like http://127.0.0.1:8265"),
        ("auto", "is not the address of a dashboard"),
        ("ray://127.0.0.1:10001", "is not the address of a dashboard"),
        ("http://me:secret@127.0.0.1:8265", "has a user or a password in it.* accepted: a token in RAY_AUTH_TOKEN"),
        ("http://127.0.0.1:1", "no Ray dashboard answers there .*refused"),
    ],
)
def test_an_address_that_is_none_is_refused(address, said):
    with pytest.raises(SweepError, match=said) as refused:
        Dashboard(address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, "<html>hello</html>", "no Ray dashboard"),
        (200, "{}", "no Ray dashboard"),
        (404, "nothing here", "answered with 404: nothing here"),
        (401, "no", "wants its token, and none was sent; accepted: .*RAY_AUTH_TOKEN"),
        (403, "no", "refuses this token; accepted: its own"),
    ],
)
def test_what_answers_otherwise_is_refused_and_named(status, body, said):
    with server(status, body) as address, pytest.raises(SweepError, match=said):
        Dashboard(address)


def test_nodes_are_those_alive():
    nodes = [{"node_id": name, "state": state} for name, state in (("a", "ALIVE"), ("b", "DEAD"))]
    body = json.loads(VERSION) | {"data": {"result": {"result": nodes}}}
    with server(body=json.dumps(body)) as address:
        found = Dashboard(address + "/")
        assert found.address == address
        assert [node["node_id"] for node in found.nodes()] == ["a"]


@pytest.mark.parametrize("given", ["variable", "file", "none", "other"])
def test_the_token_goes_along_wherever_ray_looks_for_one(given, tmp_path, monkeypatch):
    """In a process of its own: Ray reads its mode when it is imported."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    token = "0123456789abcdef" * 2
    if given == "file":
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(token)
    elif given != "none":
        monkeypatch.setenv("RAY_AUTH_TOKEN", token if given == "variable" else "another")
    code = "import sys; from penstock.dashboard import Dashboard; print(Dashboard(sys.argv[1]).ray_version)"
    with server(token=token) as address:
        done = subprocess.run([sys.executable, "-c", code, address], capture_output=True, text=True, check=False)
    if given in ("variable", "file"):
        assert done.stdout == "2.60.0\n", done.stderr
    else:
        assert ("none was sent" if given == "none" else "refuses this token") in done.stderr
        assert token not in done.stderr + done.stdout
