"""A forwarding process, upstreams that do as they are told, and clients that may lie."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import h11
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.listener import Listener, bind
from nearfield.edge.proxy.plain import Careful, OpenGate, Remember, Spread
from nearfield.edge.proxy.ports import Calls, Gate, Outcome, Pages, Retries, Router, Target
from nearfield.edge.proxy.proxy import Proxy

from tests.support.hosting import until

CHAT = "/v1/chat/completions"
SOON_S = 5.0


@dataclass
class Heard:
    """A request as an upstream got it. `connection`: its number, counted from 1."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    connection: int
    names: list[str] = field(default_factory=list)


Handler = Callable[[Heard, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def answer(body: bytes = b"ok", status: int = 200, **headers: str) -> bytes:
    """A whole answer as it goes over the wire."""
    head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"\r\n" + body


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Upstream:
    """A server of one handler. `heard`: all requests; `open`: connections now."""

    def __init__(self, handler: Handler | None = None) -> None:
        self.handler = handler or self.echo
        self.heard: list[Heard] = []
        self.connections = 0
        self.open = 0
        self.left = asyncio.Event()  # a connection ended before its request was answered
        self.target = Target("127.0.0.1", 0)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def echo(
        self, heard: Heard, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Answers with what it heard."""
        told = {"method": heard.method, "target": heard.target, "headers": heard.headers}
        told |= {"body": heard.body.decode("latin-1"), "connection": heard.connection}
        body = json.dumps(told).encode()
        writer.write(answer(b"" if heard.method == "HEAD" else body, content_type="a/b"))

    async def start(self, **options: Any) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, **options)
        port = self._server.sockets[0].getsockname()[1]
        self.target = Target("127.0.0.1", port, connect_s=0.5)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while True:
                heard = await self._hear(reader, number)
                self.heard.append(heard)
                gone = asyncio.ensure_future(self.handler(heard, reader, writer))
                await gone
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._tasks.discard(task)
            self.open -= 1
            writer.close()

    async def _hear(self, reader: asyncio.StreamReader, number: int) -> Heard:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *lines = head[:-4].split("\r\n")
        method, target, version = line.split(" ")
        assert version == "HTTP/1.1"
        pairs = [each.split(": ", 1) for each in lines]
        headers = dict(pairs)  # type: ignore[arg-type]
        assert len(headers) == len(pairs), f"a header came twice: {lines}"
        assert "transfer-encoding" not in headers
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        return Heard(method, target, headers, body, number, [name for name, _ in pairs])

    async def gone(self, reader: asyncio.StreamReader) -> None:
        """Wait until the proxy has ended the connection."""
        while await reader.read(65536):
            pass
        self.left.set()


@dataclass
class Answered:
    """An answer as h11, which is not the parser under test, reads it."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool = True

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's dialect: all four fields, always."""
        error: dict[str, Any] = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error


class Client:
    """One connection, over which anything can be sent."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self._left = b""

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, method: str = "POST") -> Answered:
        """The next final answer on this connection."""
        parser = h11.Connection(h11.CLIENT)
        parser.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
        parser.send(h11.EndOfMessage())
        found = Answered(0, {}, b"", complete=False)
        data, self._left = self._left, b""
        try:
            while True:
                if data:
                    parser.receive_data(data)
                while (event := parser.next_event()) is not h11.NEED_DATA:
                    if isinstance(event, h11.Response):
                        found.status = event.status_code
                        found.headers = {n.decode(): v.decode() for n, v in event.headers}
                    elif isinstance(event, h11.Data):
                        found.body += bytes(event.data)
                    elif isinstance(event, h11.EndOfMessage):
                        found.complete = True
                        self._left = parser.trailing_data[0]
                        return found
                async with asyncio.timeout(SOON_S):
                    data = await self.reader.read(65536)
                if not data:
                    parser.receive_data(b"")
        except (h11.RemoteProtocolError, ConnectionError):
            if not found.status:
                raise ConnectionResetError("no answer") from None
            return found

    async def rest(self) -> bytes:
        """Everything until the end of the connection."""
        async with asyncio.timeout(SOON_S):
            return self._left + await self.reader.read()

    async def until(self, end: bytes) -> bytes:
        async with asyncio.timeout(SOON_S):
            return await self.reader.readuntil(end)

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


@dataclass
class Forwarding:
    """A running proxy."""

    proxy: Proxy
    listener: Listener
    address: tuple[str, int]
    recorder: Remember
    sockets: list[socket.socket]
    clients: list[Client] = field(default_factory=list)

    @property
    def outcome(self) -> Outcome:
        """Of the last request that is over."""
        return self.recorder.outcomes[-1]

    async def client(self, **options: Any) -> Client:
        client = Client(*await asyncio.open_connection(*self.address, **options))
        self.clients.append(client)
        return client

    async def ask(self, request: bytes, method: str = "POST") -> Answered:
        """One request on a connection of its own."""
        client = await self.client()
        client.send(request)
        found = await client.answer(method)
        client.close()
        return found


def post(body: object = None, target: str = CHAT, **headers: str) -> bytes:
    """A well-formed request. A body that is no bytes is sent as JSON."""
    if body is None:
        body = {"model": "chat"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {target} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def get(target: str = "/v1/models", method: str = "GET", **headers: str) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\n"
    head += "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return head.encode() + b"\r\n"


@asynccontextmanager
async def forwarding(
    targets: Sequence[Target],
    *,
    gate: Gate | None = None,
    router: Router | None = None,
    retries: Retries | None = None,
    pages: Pages | None = None,
    calls: Calls | None = None,
    limits: Limits | None = None,
    tls: Any = None,
    sockets: list[socket.socket] | None = None,
) -> AsyncIterator[Forwarding]:
    """A proxy before these targets. Afterwards its books must balance."""
    recorder = Remember()
    spread = Spread(targets, seed=1)
    proxy = Proxy(
        gate or OpenGate(),
        router or spread,
        retries or Careful(),
        recorder,
        pages=pages,
        calls=calls,
        limits=limits,
    )
    listener = Listener(proxy)
    sockets = sockets or [bind("127.0.0.1", 0)]
    address = sockets[0].getsockname()
    await listener.open(sockets, tls)
    running = Forwarding(proxy, listener, address, recorder, sockets)
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        await proxy.deserted(SOON_S)
        await listener.drain(0.0)
        await until(lambda: not proxy.unbalanced())
        assert proxy.unbalanced() == []
        assert set(spread.running.values()) <= {0}
        for outcome in recorder.outcomes:
            assert outcome.ended_s >= outcome.request.started_s
            assert all(attempt.ended_s is not None for attempt in outcome.attempts)


def closed_port() -> int:
    """A port of this host where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port
