"""A model hub on loopback: the part of the Hugging Face protocol that a download needs."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def hub(repositories: dict[str, dict[str, bytes]]) -> Iterator[tuple[str, list[str]]]:
    """Serve {"org/model@revision": {file: content}}: (its URL, the paths it was asked for)."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                self.describe(path.removeprefix("api/models/"))
                return
            name, _, rest = path.partition("/resolve/")
            files = next((f for key, f in repositories.items() if key.startswith(f"{name}@")), {})
            content = files.get(rest.partition("/")[2])
            if content is None:
                self.refuse("EntryNotFound")
            else:
                self.answer(content, commit(name))

        do_HEAD = do_GET  # noqa: N815 (the name is http.server's)

        def describe(self, path: str) -> None:
            """A revision's commit, or the files of a commit."""
            name, _, revision = path.partition("/revision/")
            name, _, tree = name.partition("/tree/")
            files = repositories.get(f"{name}@{revision or 'main'}")
            if files is None:
                self.refuse("RepoNotFound")
                return
            answer: object = {"id": name, "sha": commit(name)}
            if tree:
                answer = [
                    {"type": "file", "path": file, "size": len(content), "oid": commit(file)}
                    for file, content in sorted(files.items())
                ]
            self.answer(json.dumps(answer).encode())

        def refuse(self, code: str) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: bytes, at: str = "") -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if at:
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                self.send_header("X-Repo-Commit", at)
            else:
                self.send_header("Content-Type", "application/json")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def commit(name: str) -> str:
    return hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest()
