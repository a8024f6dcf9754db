"""A feature browser served on this machine, to this machine: the page of `penstock_dashboards.features`, which here
asks for the examples of a latent when it is shown, so that an SAE of any size opens at once.

It listens on 127.0.0.1 alone and answers GET and HEAD of two kinds: `/` (the page) and `/examples/NUMBER`. A request
whose `Host` is another name than those of this machine's loopback is refused: else any web page could point a name of
its own at 127.0.0.1 and read what is served (DNS rebinding). No path leads to a file.
"""

import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from penstock.errors import SweepError

_LOOPBACK = "127.0.0.1"
_NAMES = (_LOOPBACK, "localhost", "[::1]")  # the last one of an SSH tunnel's other end
_EXAMPLES = re.compile(r"/examples/(\d{1,9})")
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class _Served(Protocol):
    page: bytes

    def examples(self, latent: int) -> bytes | None: ...


@contextmanager
def serve(features_folder: str | Path, port: int | None = None) -> Iterator[str]:
    """Serve the browser of a features folder as long as the context lasts. Yields its address, `http://127.0.0.1:N/`.

    `port`: a free one unless it is given. Raises `CheckpointError` for a folder that holds no features, `SweepError`
    for a port that cannot be listened on.
    """
    with _listening(features_folder, port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


def serve_until_interrupted(
    features_folder: str | Path, port: int | None = None, say: Callable[[str], None] | None = None
) -> None:
    """Serve the browser until Ctrl-C or SIGTERM, in the main thread. `say` is told the address; it is printed unless
    given. Errors as `serve`'s."""
    stopped = threading.Event()
    # Ctrl-C, too: a shell lets what it starts in the background ignore it.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in numbers}
    try:
        with serve(features_folder, port) as address:
            (say or _printed)(f"features: {address}  (Ctrl-C ends it)")
            while not stopped.wait(0.5):
                pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _printed(sentence: str) -> None:
    print(sentence, flush=True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, served: _Served, port: int):
        super().__init__((_LOOPBACK, port), _Handler)
        self.served = served
        number = self.server_address[1]
        self.address = f"http://{_LOOPBACK}:{number}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error of ours."""


@contextmanager
def _listening(features_folder: str | Path, port: int | None) -> Iterator[_Server]:
    from penstock_dashboards.features import ServedFeatures

    if port is not None and not 1 <= port < 65536:
        raise SweepError(f"port {port}: accepted is a number from 1 to 65535")
    served = ServedFeatures(features_folder)
    try:
        server = _Server(served, port or 0)
    except OSError as error:
        raise SweepError(f"port {port}: {error.strerror}; accepted is one that is free, or none given") from None
    try:
        yield server
    finally:
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "penstock", ""
    timeout = 30

    def do_GET(self) -> None:
        if not self._is_for_us():
            return self._answer(
                HTTPStatus.MISDIRECTED_REQUEST, b"this server answers to 127.0.0.1 and localhost alone\n"
            )
        path = self.path.partition("?")[0]
        examples = _EXAMPLES.fullmatch(path)
        if path == "/":
            return self._answer(HTTPStatus.OK, self.server.served.page, "text/html; charset=utf-8")
        found = self.server.served.examples(int(examples[1])) if examples else None
        if found is None:
            return self._answer(HTTPStatus.NOT_FOUND, b"there are / and /examples/NUMBER, of a latent that there is\n")
        return self._answer(HTTPStatus.OK, found, "application/octet-stream")

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        """Whether the request names this machine; through an SSH tunnel the port is another one."""
        hosts = self.headers.get_all("Host", [])
        return len(hosts) == 1 and re.sub(r":\d+$", "", hosts[0].strip().lower()) in _NAMES

    def _answer(self, status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
        self.send_response(status)
        for name, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: the terminal keeps the address in sight."""
