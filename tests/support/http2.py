"""A client of HTTP/2 that does as it is told: whole requests, or any frames at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    DataReceived,
    InformationalResponseReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
)
from hpack import Encoder
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, SettingsFrame

from tests.support.edge import CHAT, SOON_S, Forwarding

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
Fields = list[tuple[bytes, bytes]]


@dataclass
class Reply:
    """What has come on one stream. `reset`: the code it was reset with."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    informed: int = 0
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        return int(self.headers.get(":status", 0))

    def json(self) -> Any:
        return json.loads(self.body)


class Peer:
    """One connection. `acknowledge`: open windows for what is received."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.wire = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.replies: dict[int, Reply] = {}
        self.goodbyes: list[tuple[int, int]] = []  # the last stream, and the code, of each
        self.closed = False
        self.acknowledge = True
        self._encoder = Encoder()
        self._buffer = b""

    def flush(self) -> None:
        self.writer.write(self.wire.data_to_send())

    def greet(self) -> None:
        self.wire.initiate_connection()
        self.flush()

    def open(self, fields: Iterable[tuple[bytes, bytes]], *, end: bool = False) -> int:
        """The head of a request. Its stream."""
        number = self.wire.get_next_available_stream_id()
        self.replies[number] = Reply()
        self.wire.send_headers(number, list(fields), end_stream=end)
        self.flush()
        return number

    def send(self, fields: Iterable[tuple[bytes, bytes]], body: bytes | None = None) -> int:
        """A request; None: without a body. Its stream."""
        number = self.open(fields, end=body is None)
        if body is not None:
            self.send_data(number, body, end=True)
        return number

    def send_data(self, number: int, data: bytes, *, end: bool = False) -> None:
        for at in range(0, max(1, len(data)), 16384):
            part = data[at : at + 16384]
            self.wire.send_data(number, part, end_stream=end and at + 16384 >= len(data))
        self.flush()

    def cancel(self, number: int, code: int = 8) -> None:
        self.wire.reset_stream(number, code)
        self.flush()

    async def read(self) -> bool:
        """What comes next; False at the end of the connection."""
        try:
            async with asyncio.timeout(SOON_S):
                data = await self.reader.read(2**18)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return False
        for event in self.wire.receive_data(self._without_goodbyes(data)):
            reply = self.replies.get(getattr(event, "stream_id", None) or 0)
            if reply is None:
                continue
            if isinstance(event, InformationalResponseReceived):
                reply.informed += 1
            elif isinstance(event, ResponseReceived):
                reply.headers = dict(event.headers)  # type: ignore[arg-type]
            elif isinstance(event, TrailersReceived):
                reply.trailers = dict(event.headers)  # type: ignore[arg-type]
            elif isinstance(event, DataReceived):
                reply.body += event.data
                if self.acknowledge:
                    self.wire.acknowledge_received_data(
                        event.flow_controlled_length, event.stream_id
                    )
            elif isinstance(event, StreamEnded):
                reply.ended = True
            elif isinstance(event, StreamReset):
                reply.reset = int(event.error_code)
        self.flush()
        return True

    def _without_goodbyes(self, data: bytes) -> bytes:
        """h2 takes nothing after a GOAWAY, not even the answers that it announces."""
        data = self._buffer + data
        kept, at = b"", 0
        while len(data) - at >= 9:
            frame, length = Frame.parse_frame_header(memoryview(data[at : at + 9]))
            end = at + 9 + length
            if end > len(data):
                break
            if isinstance(frame, GoAwayFrame):
                frame.parse_body(memoryview(data[at + 9 : end]))
                self.goodbyes.append((frame.last_stream_id, frame.error_code))
            else:
                kept += data[at:end]
            at = end
        self._buffer = data[at:]
        return kept

    async def reply(self, number: int) -> Reply:
        """The whole answer on this stream."""
        reply = self.replies[number]
        while not reply.ended and reply.reset is None:
            if not await self.read():
                raise ConnectionResetError("no answer")
        return reply

    async def until(self, number: int, end: bytes) -> None:
        while not self.replies[number].body.endswith(end):
            assert await self.read()

    async def ask(self, fields: Fields, body: bytes | None = None) -> Reply:
        return await self.reply(self.send(fields, body))

    async def rest(self) -> None:
        """Everything until the end of the connection, which need not be well-formed."""
        while await self.read():
            pass

    # ---- frames that no library would send --------------------------------------------------

    def block(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        """Fields as they are, compressed."""
        return self._encoder.encode(list(fields), huffman=False)

    def raw_head(self, number: int, fields: Iterable[tuple[bytes, bytes]], *flags: str) -> None:
        frame = HeadersFrame(number, self.block(fields), flags=["END_HEADERS", *flags])
        self.replies[number] = Reply()
        self.raw(frame)

    def raw(self, *frames: Frame) -> None:
        self.writer.write(b"".join(frame.serialize() for frame in frames))

    def raw_greet(self) -> None:
        """As `greet`, for a connection that is only written to by hand."""
        self.writer.write(PREFACE + SettingsFrame(0).serialize())


async def peer(proxy: Forwarding, *, greet: bool = True, **options: Any) -> Peer:
    client = await proxy.client(**options)
    found = Peer(client.reader, client.writer)
    if greet:
        found.greet()
    return found


def request(
    method: bytes = b"POST", path: bytes = CHAT.encode(), *more: tuple[bytes, bytes]
) -> Fields:
    """The head of a well-formed request."""
    return [
        (b":method", method),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"x"),
        *more,
    ]


JSON = (b"content-type", b"application/json")
