"""What stands behind every proxy of the edge suite: as little of a server as can be.

    python -m benchmarks.edge_upstream PORT

Any request gets some JSON; one whose body asks for a stream gets tokens, one every 5 ms; one whose
user is `flood` gets events as fast as they are taken, for ever. For a gateway it is a region as
well: an agent that names two replicas, and each of them, which tell their load. Collectors of
traces are answered like everybody.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from functools import partial
from typing import ClassVar

import uvloop
from nearfield.api.load import LOAD_PATH, TARGETS_PATH, Application, ReplicaLoad, Target, Targets

MODEL = "chat"
REPLICAS = 2
SLOTS = 1024
"""Told, so that no gateway refuses what the other proxies let pass."""
TOKENS = 100
TOKEN_S = 0.005
BODY = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"hi"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":18,"completion_tokens":1,"total_tokens":19}}'
)
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
STREAMED, FLOODED = (b'"stream": true', b'"stream":true'), b'"user":"flood"'


def answer(body: bytes) -> bytes:
    """A whole answer with this JSON."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


ANSWER = answer(BODY)
TOKEN = _chunk(
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":'
    b'{"content":" token"},"finish_reason":null}]}\n\n'
)
LAST = _chunk(
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[],"usage":'
    b'{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (TOKENS, TOKENS + 1)
) + _chunk(b"data: [DONE]\n\n")
FLOOD = _chunk(b"data: " + b"x" * 4000 + b"\n\n")


def targets(ports: list[int]) -> bytes:
    """A region's agent's answer: one application, whose replicas are at these ports."""
    spec = {"model": MODEL, "engine": {"kind": "generate"}, "source": "builtin://abacus"}
    named = tuple(Target(f"cpu-{n}", "127.0.0.1", port) for n, port in enumerate(ports))
    told = Targets((Application(MODEL, f"/{MODEL}", "RUNNING", spec, named),), age_s=0.1)
    return answer(json.dumps(told.to_json()).encode())


def load(told: ReplicaLoad) -> bytes:
    """A replica's answer."""
    return answer(json.dumps(told.to_json()).encode())


class OneByOne(asyncio.Protocol):
    """One connection; requests come one at a time and, but for their bodies, whole."""

    def __init__(self) -> None:
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._data:
            data = self._data + data
        end = data.find(b"\r\n\r\n") + 4
        if end < 4:
            self._data = data
            return
        head = data[:end].lower()
        at = head.find(b"content-length: ")
        length = int(head[at + 16 : head.find(b"\r\n", at)]) if at >= 0 else 0
        if len(data) < end + length:
            self._data = data
            return
        self._data = b""
        self.asked(data, end)

    def asked(self, request: bytes, end: int) -> None:
        """A request is complete; `end` of its head."""
        raise NotImplementedError


class Answering(OneByOne):
    """Answers at once, or token by token, or without end."""

    running: ClassVar[int] = 0
    """Streams under way, over all connections."""

    def __init__(self, told: bytes) -> None:
        super().__init__()
        self._told = told
        self._left = 0
        self._full = False
        self._timer: asyncio.TimerHandle | None = None
        self._flooding = False

    def connection_lost(self, error: Exception | None) -> None:
        if self._left or self._flooding:
            Answering.running -= 1
        self._flooding, self._left = False, 0
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._flooding:
            self._flood()

    def asked(self, request: bytes, end: int) -> None:
        if request.startswith(b"GET"):
            self.transport.write(self._tell(request[:end]))
        elif FLOODED in request:
            Answering.running += 1
            self._flooding = True
            self.transport.write(STREAM)
            self._flood()
        elif any(each in request for each in STREAMED):
            Answering.running += 1
            self.transport.write(STREAM + TOKEN)
            self._left = TOKENS - 1
            self._next()
        else:
            self.transport.write(ANSWER)

    def _tell(self, head: bytes) -> bytes:
        if TARGETS_PATH.encode() in head:
            return self._told
        if LOAD_PATH.encode() not in head:
            return ANSWER
        idle = ReplicaLoad(MODEL, "1", 0, 0, 0, 0.0, 0.0, 0, 0)
        running = Answering.running // REPLICAS
        told = {**idle.to_json(), "running": running, "room": SLOTS - running, "slots": SLOTS}
        return answer(json.dumps(told).encode())

    def _next(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TOKEN_S, self._token)

    def _token(self) -> None:
        self._left -= 1
        if self._left:
            self.transport.write(TOKEN)
            self._next()
        else:
            Answering.running -= 1
            self.transport.write(TOKEN + LAST + b"0\r\n\r\n")

    def _flood(self) -> None:
        while not self._full:
            self.transport.write(FLOOD)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    make = partial(Answering, targets([port] * REPLICAS))
    server = await loop.create_server(make, "127.0.0.1", port, backlog=2048)
    print("bench: ready", flush=True)
    gc.freeze()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
