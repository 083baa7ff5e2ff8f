"""What stands behind every proxy of the edge suite: as little of a server as can be.

    python -m benchmarks.edge_upstream PORT

Any request gets 131 bytes of JSON; one whose body asks for a stream gets tokens, one every 5 ms;
one to a path with `flood` gets events as fast as they are taken, for ever.
"""

from __future__ import annotations

import asyncio
import gc
import sys

import uvloop

TOKENS = 100
TOKEN_S = 0.005
BODY = (
    b'{"id":"x","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"hi"}}]}'
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(BODY),
    BODY,
)
STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-store\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


TOKEN = _chunk(
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":'
    b'{"content":" token"},"finish_reason":null}]}\n\n'
)
LAST = _chunk(
    b'data: {"id":"x","object":"chat.completion.chunk","choices":[],"usage":'
    b'{"prompt_tokens":1,"completion_tokens":%d,"total_tokens":%d}}\n\n' % (TOKENS, TOKENS + 1)
) + _chunk(b"data: [DONE]\n\n")
FLOOD = _chunk(b"data: " + b"x" * 4000 + b"\n\n")


class Answering(asyncio.Protocol):
    """One connection; requests come one at a time and, but for their bodies, whole."""

    def __init__(self) -> None:
        self._data = b""
        self._left = 0
        self._full = False
        self._timer: asyncio.TimerHandle | None = None
        self._flooding = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def connection_lost(self, error: Exception | None) -> None:
        self._flooding = False
        if self._timer is not None:
            self._timer.cancel()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._flooding:
            self._flood()

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
        if b"flood" in head[:100]:
            self._flooding = True
            self._transport.write(STREAM)
            self._flood()
        elif b'"stream": true' in data or b'"stream":true' in data:
            self._transport.write(STREAM + TOKEN)
            self._left = TOKENS - 1
            self._next()
        else:
            self._transport.write(ANSWER)

    def _next(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TOKEN_S, self._token)

    def _token(self) -> None:
        self._left -= 1
        if self._left:
            self._transport.write(TOKEN)
            self._next()
        else:
            self._transport.write(TOKEN + LAST + b"0\r\n\r\n")

    def _flood(self) -> None:
        while not self._full:
            self._transport.write(FLOOD)


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Answering, "127.0.0.1", port, backlog=2048)
    print("bench: ready", flush=True)
    gc.freeze()
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
