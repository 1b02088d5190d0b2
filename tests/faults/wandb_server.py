"""A server that wandb can begin a run with: it answers what the client asks, and keeps nothing.

python tests/faults/wandb_server.py    # prints its port
"""

from __future__ import annotations

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROJECT = {"id": "cA==", "name": "p", "entity": {"id": "ZQ==", "name": "me"}}
BUCKET = {
    "id": "aWQ=", "displayName": "x", "description": None, "config": "{}", "sweepName": None,
    "historyLineCount": 0, "project": PROJECT,
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer({})

    def do_PUT(self) -> None:
        self.read()
        self.answer({})

    def do_POST(self) -> None:
        asked = self.read()
        if not self.path.endswith("/graphql"):
            self.answer({})
            return
        query = json.loads(asked)
        name = (query.get("variables") or {}).get("name") or "x"
        made = {"upsertBucket": {"bucket": {**BUCKET, "name": name}, "inserted": True}}
        features = {"serverInfo": {"features": []}}
        self.answer({"data": made if "upsertBucket" in query["query"] else features})

    def read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, tree: Any) -> None:
        data = json.dumps(tree).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
