"""An OpenAI-compatible server that misbehaves as its script prescribes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

GOOD = '{"pred": "yes", "score": 4}'


@dataclass
class Server:
    """url of the endpoint; every request's body and headers; `behave` answers each request."""

    url: str
    behave: Callable[[Handler, dict[str, Any]], None]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def prompts(self) -> list[str]:
        """The user message of each request."""
        return [body["messages"][1]["content"] for body in self.bodies]


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        record: Server = self.server.record
        with record.lock:
            record.bodies.append(body)
            record.headers.append(dict(self.headers))
        record.behave(self, body)

    def log_message(self, *_: object) -> None:
        pass

    def status(self, code: int, body: bytes = b"", **headers: str) -> None:
        """Answer with a status; `Retry_After` in `headers` is the header Retry-After."""
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def complete(self, reply: object = GOOD) -> None:
        """Answer with a completion."""
        self.status(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode())

    def truncated(self) -> None:
        """Announce more bytes than come."""
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [{"mess')

    def closed(self) -> None:
        """End the connection without a status."""
        self.close_connection = True

    def slow(self, seconds: float = 3.0) -> None:
        time.sleep(seconds)
        self.closed()

    def trickle(self, seconds: float = 1.5) -> None:
        """Spaces, one after the other, each before a socket's timeout, and then a completion."""
        self.send_response(200)
        self.end_headers()
        end = time.monotonic() + seconds
        try:
            while time.monotonic() < end:
                self.wfile.write(b" ")
                time.sleep(0.05)
            self.wfile.write(json.dumps({"choices": [{"message": {"content": "late"}}]}).encode())
        except OSError:
            return  # the client has gone


@contextmanager
def running(behave: Callable[[Handler, dict[str, Any]], None]) -> Iterator[Server]:
    """A server in a thread, on a free port of this machine."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    record = Server(f"http://127.0.0.1:{http.server_address[1]}/v1", behave)
    http.record = record  # type: ignore[attr-defined]
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield record
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def in_turn(*steps: Callable[[Handler], None]) -> Callable[[Handler, dict[str, Any]], None]:
    """The n-th request gets the n-th step; those after the last one get a completion."""
    rest = iter(steps)
    lock = threading.Lock()

    def behave(handler: Handler, _: dict[str, Any]) -> None:
        with lock:
            step = next(rest, Handler.complete)
        step(handler)

    return behave
