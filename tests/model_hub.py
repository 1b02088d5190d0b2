"""A model hub on this machine: the list of a repository's files and the files, over HTTP, for the
real client."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY, COMMIT = "someone/something", "0123456789abcdef0123456789abcdef01234567"
TREE = f"/api/models/{REPOSITORY}/tree/{COMMIT}"
FILES = f"/{REPOSITORY}/resolve/{COMMIT}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    root: Path
    asked: list[str]
    refuses: str | None  # the code of the error that files are answered with
    listed: bool  # whether the repository is there

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        if self.refuses is not None and (not self.listed or path.startswith(FILES)):
            self.send_response(403 if self.listed else 404)
            self.send_header("X-Error-Code", self.refuses)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if path in (TREE, TREE.replace("/tree/", "/revision/")):
            self._send(json.dumps(self._listed(whole="revision" in path)).encode(), body, {})
            return
        file = self.root / path.removeprefix(FILES)
        if not path.startswith(FILES) or not file.is_file():
            self.send_error(404)
            return
        if body:
            self.asked.append(path.removeprefix(FILES))
        data = file.read_bytes()
        own = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        self._send(data, body, own)

    def _listed(self, whole: bool) -> Any:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        names = [path.relative_to(self.root).as_posix() for path in files]
        if whole:
            siblings = [{"rfilename": name} for name in names]
            return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings}
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
            for name, path in zip(names, files, strict=True)
        ]

    def _send(self, data: bytes, body: bool, own: dict[str, str]) -> None:
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **own}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(
    root: Path, refuses: str | None = None, listed: bool = True
) -> Iterator[tuple[str, list[str]]]:
    """A hub whose one repository has the files of a folder: its address, and the names of the files
    that were fetched from it so far. refuses: the code of the hub's error in place of files, where
    not `listed` of their list too."""
    asked: list[str] = []
    own = {"root": root, "asked": asked, "refuses": refuses, "listed": listed}
    handler = type("Own", (_Handler,), own)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
