"""An object server on the loopback, moto's, behind a door that can fail: it answers 503, cuts a
connection, is slow, or refuses, as `faults` says of each path."""

from __future__ import annotations

import http.client
import http.server
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from moto.server import ThreadedMotoServer

BUCKET = "shards"


@dataclass
class Door:
    """address: of the server, http://host:port. faults: by the end of a path, what its next
    requests with GET meet, one word each: a status, "cut", or "slow". asked: every path and range
    of a GET."""

    address: str = ""
    faults: dict[str, list[str]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    slow: float = 1.0

    def fault(self, path: str) -> str:
        name = path.partition("?")[0].rpartition("/")[2]
        waiting = self.faults.get(name, [])
        if waiting[:1] == ["always 503"]:
            return "503"
        return waiting.pop(0) if waiting else ""

    def gets(self, name: str) -> int:
        return sum(path.endswith(name) for path, _ in self.asked)


class Outer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that waits no longer for a slow answer is gone when it comes."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def object_server() -> Iterator[Door]:
    """The server with an empty bucket, until the block ends."""
    inner = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    inner.start()
    host, port = inner.get_host_and_port()
    door = Door()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            door.asked.append((self.path, self.headers["Range"]))
            fault = door.fault(self.path)
            if fault == "slow":
                time.sleep(door.slow)
            if fault.isdigit():
                self._answer(int(fault), {}, b"")
                return
            self._pass_on(cut=fault == "cut")

        def do_HEAD(self) -> None:
            self._pass_on()

        def do_PUT(self) -> None:
            self._pass_on()

        def _pass_on(self, cut: bool = False) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"] or 0))
            inside = http.client.HTTPConnection(host, port)
            inside.request(self.command, self.path, sent, dict(self.headers))
            answer = inside.getresponse()
            data = answer.read()
            self._answer(answer.status, dict(answer.getheaders()), data, cut=cut)
            inside.close()

        def _answer(
            self, status: int, headers: dict[str, str], data: bytes, cut: bool = False
        ) -> None:
            self.send_response(status)
            length = headers.pop("Content-Length", str(len(data)))
            kept = {name: value for name, value in headers.items() if name != "Transfer-Encoding"}
            for name, value in (kept | {"Content-Length": length}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    outer = Outer(("127.0.0.1", 0), Handler)
    threading.Thread(target=outer.serve_forever, daemon=True).start()
    door.address = f"http://127.0.0.1:{outer.server_address[1]}"
    try:
        put(door, "")
        yield door
    finally:
        outer.shutdown()
        outer.server_close()
        inner.stop()


def put(door: Door, name: str, data: bytes = b"") -> None:
    """Puts an object into the bucket, readable by all; without a name, makes the bucket."""
    request = http.client.HTTPConnection(door.address.removeprefix("http://"))
    request.request("PUT", f"/{BUCKET}/{name}", data, {"x-amz-acl": "public-read"})
    answer = request.getresponse()
    assert answer.status == 200, answer.read()
    request.close()
