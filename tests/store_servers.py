"""Stores on 127.0.0.1 for tests: moto's S3, and a proxy before it that loses, refuses, delays and forgets."""

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[str, str, int], int | str | None]
"""Method, path and number of a request -> a status to answer, "drop" (no answer), "cut" (half of the answer),
"lost" (it is done, and the answer is lost), "forget" (its condition is not passed on), "forget-match" (only If-Match
is not); None: as it is."""
_FORGOTTEN = {"forget": ("if-none-match", "if-match"), "forget-match": ("if-match",)}


class Faulty:
    """A proxy before a server. ``fault`` may be changed at any time; ``seen`` lists method and path."""

    def __init__(self, port: int) -> None:
        self.fault: Fault = lambda *_: None
        self.seen: list[tuple[str, str]] = []
        self._upstream = port
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def answer(self) -> None:
                outer.forward(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who asked was killed
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def forward(self, request: Any) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        self.seen.append((request.command, request.path))
        what = self.fault(request.command, request.path, len(self.seen))
        request.close_connection = what is not None
        if what == "drop":
            return
        if isinstance(what, int):
            request.send_response(what)
            text = (
                b"<Error><Code>SlowDown</Code></Error>"
                if what >= 500
                else b"<Error><Code>AccessDenied</Code></Error>"
            )
            request.send_header("Content-Length", str(len(text)))
            request.end_headers()
            request.wfile.write(text)
            return
        forgotten = _FORGOTTEN.get(str(what), ())
        headers = {k: v for k, v in request.headers.items() if k.lower() not in forgotten}
        upstream = http.client.HTTPConnection("127.0.0.1", self._upstream, timeout=60)
        upstream.request(request.command, request.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if what == "lost":
            return
        request.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                request.send_header(name, value)
        length = answer.getheader("Content-Length") if request.command == "HEAD" else str(len(data))
        request.send_header("Content-Length", length or "0")
        request.end_headers()
        request.wfile.write(data[: len(data) // 2] if what == "cut" else data)


@contextmanager
def s3() -> Iterator[Faulty]:
    """moto behind a proxy. What is in the environment of who asks: see :func:`environment`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Faulty(server.get_host_and_port()[1])
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        server.stop()


def environment(url: str) -> dict[str, str]:
    """By which obstore finds a server of :func:`s3`."""
    return {
        "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIDSECRETNAME", "AWS_SECRET_ACCESS_KEY": "very/secret+key",
    }  # fmt: skip
