"""A local server that plays the clouds' metadata servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

GCP = "/computeMetadata/v1/instance/preempted"
AWS = "/latest/meta-data/spot/instance-action"
AZURE_NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
AZURE_EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"


class Metadata(BaseHTTPRequestHandler):
    """Answers by path; a path without an answer is a 404. Refuses who lacks the cloud's header."""

    answers: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []
    token: ClassVar[str] = "one"

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"] == "21600"
        self._answer(200, self.token)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        given = self.headers
        if self.path.startswith("/latest") and given["X-aws-ec2-metadata-token"] != self.token:
            self._answer(401, "")
        elif self.path.startswith("/compute") and given["Metadata-Flavor"] != "Google":
            self._answer(403, "")
        elif self.path.startswith("/metadata") and given["Metadata"] != "true":
            self._answer(400, "")
        elif self.path in self.answers:
            self._answer(200, self.answers[self.path])
        else:
            self._answer(404, "")

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        """Not into the tests' output."""


@contextmanager
def metadata_server() -> Iterator[str]:
    """Its base URL. It has no answers at first."""
    Metadata.answers, Metadata.asked, Metadata.token = {}, [], "one"
    served = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=served.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        thread.join()
        served.server_close()
