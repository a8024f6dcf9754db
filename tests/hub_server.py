"""A hub of one's own: the few requests by which huggingface_hub lists and downloads files, answered from a folder.

`folder/OWNER/REPO/...` are the files of the main branch, whose commit is COMMIT. Runs in a thread of this process.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"


@contextmanager
def hub_of(folder: Path, requests: list[str]) -> Iterator[str]:
    """The URL of a hub with the repositories of `folder`; what it is asked is added to `requests`."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, *given: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            requests.append(f"{self.command} {path}")
            if path == "/":
                return self._send(b"", body)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            if file is not None:
                return self._file(folder / file[1], file[2], file[3], body)
            info = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/([^/]+))?", path)
            if info is not None and (folder / info[1]).is_dir():
                content = {"id": info[1], "modelId": info[1], "sha": COMMIT, "siblings": [], "tags": []}
                return self._send(json.dumps(content).encode(), body, "application/json")
            tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", path)
            if tree is not None:
                return self._tree(folder / tree[1], tree[3] or "", body)
            return self._missing("RepoNotFound")

        def _file(self, repo: Path, revision: str, name: str, body: bool) -> None:
            if not repo.is_dir():
                return self._missing("RepoNotFound")
            if revision not in ("main", COMMIT):
                return self._missing("RevisionNotFound")
            if not (repo / name).is_file():
                return self._missing("EntryNotFound")
            content = (repo / name).read_bytes()
            return self._send(content, body, etag=hashlib.sha256(content).hexdigest())

        def _tree(self, repo: Path, path: str, body: bool) -> None:
            if not repo.is_dir():
                return self._missing("RepoNotFound")
            if not (repo / path).is_dir():
                return self._missing("EntryNotFound")
            items = [
                {"type": "file" if item.is_file() else "directory", "path": item.relative_to(repo).as_posix(),
                 "oid": "0" * 40, "size": item.stat().st_size}
                for item in sorted((repo / path).iterdir())
            ]  # fmt: skip
            return self._send(json.dumps(items).encode(), body, "application/json")

        def _send(self, content: bytes, body: bool, kind: str = "application/octet-stream", etag: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("X-Repo-Commit", COMMIT)
            if etag:
                self.send_header("ETag", f'"{etag}"')
            self.end_headers()
            if body:
                self.wfile.write(content)

        def _missing(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
