"""A client's connection over HTTP/1.1: one exchange at a time, answers framed anew, and its clock.

READING ──request──→ BUSY ──answered──→ READING (or closed)
   └── refused: the answer is sent, what still comes is thrown away, closed

Every client begins here. One that speaks HTTP/2 says so in the TLS handshake, or in its first
bytes (RFC 9113, 3.3), and is handed on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from nearfield.core.errors import NearfieldError, Unavailable
from nearfield.edge.proxy import h2, head
from nearfield.edge.proxy.answers import (
    CONTINUE,
    NO_BODY,
    STATUS_LINES,
    fields_of,
    refusal,
)
from nearfield.edge.proxy.exchange import Exchange
from nearfield.edge.proxy.head import Bad
from nearfield.edge.proxy.ports import Answer, Fields, Request
from nearfield.edge.proxy.reading import COMPLETE, HEAD, MORE, Reader
from nearfield.edge.proxy.upstream import reset

if TYPE_CHECKING:
    from nearfield.edge.proxy.proxy import Proxy

log = logging.getLogger("nearfield.edge.proxy")

MAX_AHEAD_BYTES = 64 * 1024
"""Pipelined requests that are read while another is answered."""
SMALL_WRITE_BYTES = 4096

READING, BUSY, CLOSING = range(3)


class Connection(asyncio.Protocol):
    """One client. The far side of `Exchange.Client`."""

    __slots__ = (
        "_ahead", "_chunked", "_close", "_exchange", "_first", "_head", "_held_bytes", "_minor",
        "_paused", "_peer", "_proxy", "_reader", "_request", "_since_s", "_state", "_too_much",
        "_transport", "_unread", "due_s", "timer",
    )  # fmt: skip
    _transport: asyncio.Transport

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._reader = Reader(proxy.limits)
        self._state = READING
        self._ahead = b""  # after the request that is being answered
        self._request: Request | None = None
        self._exchange: Exchange | None = None
        self._held_bytes = 0  # of the body, as counted by the proxy
        self._minor = b"1"
        self._close = False  # after the present answer
        self._chunked = False  # the present answer
        self._head = b""  # of an answer whose body comes with it: not sent yet
        self._too_much = False  # the client does not read
        self._paused = False  # we do not read
        self._unread = False  # part of the request is still to come, and not wanted
        self._first = True  # nothing was asked yet
        self._peer = ""
        self._since_s = 0.0  # when the body began
        self.due_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    # ---- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport
        proxy = self._proxy
        proxy.clients.add(self)
        self.due_s = proxy.loop.time() + proxy.limits.head_s
        proxy.timers.watch(self)
        self._transport.set_write_buffer_limits(high=proxy.limits.client_buffer_bytes)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self._first = False  # which protocol it is was settled in the handshake
            if tls.selected_alpn_protocol() == h2.ALPN:
                self._hand_on()
                return
        peer = transport.get_extra_info("peername")
        self._peer = peer[0] if isinstance(peer, tuple) else ""
        if len(proxy.clients) > proxy.limits.max_connections:
            self._refuse(
                Unavailable("Too many connections are open here.", retry_after_s=1.0), "overload"
            )

    def data_received(self, data: bytes) -> None:
        if self._state == READING:
            self._read(data)
        elif self._state == BUSY:
            self._ahead += data
            if len(self._ahead) > MAX_AHEAD_BYTES and not self._paused:
                self._paused = True
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """The client sends no more. It may have left, and for a proxy it has."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        proxy = self._proxy
        proxy.client_gone(self)
        proxy.timers.unwatch(self)
        self._state = CLOSING
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_left()
        self._let_go()

    def pause_writing(self) -> None:
        self._too_much = True
        self.due_s = self._proxy.loop.time() + self._proxy.limits.stall_s
        self._proxy.timers.sooner(self)
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        self._too_much = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._state == BUSY:
            self._next()

    # ---- reading ----------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        reader = self._reader
        try:
            step = reader.feed(data)
            if step == HEAD:
                self._since_s = time.monotonic()
                request = self._enter()
                if request is None:
                    return  # turned away
                step = reader.read_body()
                if step == MORE and reader.wants_continue:
                    self._transport.write(CONTINUE)
            if reader.body_bytes:
                self._hold()
        except Bad as refused:
            if self._first and refused.data.startswith(h2.PREFACE_BEGINS):
                self._hand_on(refused.data)
                return
            self._refuse(refused.error, refused.error.code or "malformed_request")
            return
        if step == COMPLETE:
            self._run()
        else:
            self._wait()

    def _hand_on(self, data: bytes = b"") -> None:
        """The client speaks HTTP/2: `data` is what it has said so far."""
        proxy, transport = self._proxy, self._transport
        proxy.clients.discard(self)
        proxy.timers.unwatch(self)
        self._state = CLOSING
        connection = h2.Connection(proxy)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if data:
            connection.data_received(data)

    def _enter(self) -> Request | None:
        """The head is there: the request as far as it is known, unless the Gate refuses it."""
        proxy, reader = self._proxy, self._reader
        request = proxy.receive(
            reader.method, reader.target, reader.headers, self._peer, self._since_s
        )
        self._request = request
        self._first = False
        self._minor = reader.minor
        self._close = reader.close
        refused = proxy.enter(request)
        if refused is None:
            return request
        self._state = BUSY
        self._unread = reader.unread
        self._close = self._close or self._unread
        self._exchange = Exchange(proxy, self, request)
        self._exchange.refuse(refused)
        return None

    def _hold(self) -> None:
        """Count what has come of the body."""
        size = self._reader.body_bytes
        more, self._held_bytes = size - self._held_bytes, size
        self._proxy.hold(more)

    def _let_go(self) -> None:
        """The request is needed no longer."""
        self._proxy.held_bytes -= self._held_bytes
        self._held_bytes = 0
        self._request = None

    def _wait(self) -> None:
        """Part of a request is there: by when must there be more?"""
        limits = self._proxy.limits
        if self._request is not None:
            # Each part of a body moves this on, at the least rate.
            self.due_s = limits.body_due_s(self._since_s, self._held_bytes)
        elif self._since_s == 0.0 and self._reader.started:
            self._since_s = time.monotonic()
            self.due_s = self._since_s + limits.head_s
        self._proxy.timers.sooner(self)

    # ---- the exchange -----------------------------------------------------------------------

    def _run(self) -> None:
        """The request is complete: start its exchange."""
        request, reader = self._request, self._reader
        assert request is not None
        self._state = BUSY
        self._close = reader.close  # chunks may have changed it
        request.body = reader.body
        if reader.ahead:
            self._ahead = reader.ahead
            reader.ahead = b""
        reader.body = b""
        self._exchange = exchange = Exchange(self._proxy, self, request)
        exchange.start()

    def over(self) -> None:
        self._exchange = None
        self._let_go()
        if self._state == BUSY and not self._too_much:  # else: gone, or has to read first
            self._next()

    def _next(self) -> None:
        """The connection is free for another request, if it is to be kept."""
        if self._close or self._transport.is_closing():
            self._shut()
            return
        proxy = self._proxy
        self._reader.restart()
        self._since_s = 0.0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
        if self._ahead:
            # Not at once: a client that pipelines must not keep the loop from others.
            proxy.loop.call_soon(self._read_ahead)
            return
        self._state = READING
        self.due_s = proxy.loop.time() + proxy.limits.idle_s
        if proxy.draining:
            self.drain()

    def _read_ahead(self) -> None:
        if self._state == BUSY:
            ahead, self._ahead = self._ahead, b""
            self._state = READING
            self._read(ahead)

    # ---- Client, for the exchange -----------------------------------------------------------

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        request = self._request
        assert request is not None
        parts = [b"%b: %b\r\n" % field for field in fields]
        self._chunked = False
        if length is not None:
            if status != 204:
                parts.append(b"content-length: %d\r\n" % length)
        elif status not in NO_BODY and request.method != b"HEAD":
            if self._minor == b"1":
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
            else:
                self._close = True  # HTTP/1.0: the end of the connection is the end of the body
        if self._close or self._proxy.draining:
            self._close = True
            parts.append(b"connection: close\r\n")
        elif self._minor == b"0":
            parts.append(b"connection: keep-alive\r\n")
        line = STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        whole = b"%b%b\r\n" % (line, b"".join(parts))
        if length:
            self._head = whole  # each write goes to the kernel at once: one will do
        else:
            self._transport.write(whole)

    def write(self, data: bytes) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.writelines((head, data))
        elif not self._chunked:
            self._transport.write(data)
        elif len(data) <= SMALL_WRITE_BYTES:
            self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            self._transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))

    def end(self) -> None:
        if self._chunked:
            self._transport.write(b"0\r\n\r\n")
        else:
            self._send_head()  # of a HEAD's answer, which has a length and no body

    def abort(self) -> None:
        self._close = True
        self._send_head()
        reset(self._transport)

    def _send_head(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def answer(self, answer: Answer) -> None:
        self.begin(answer.status, fields_of(answer, self._proxy.dates.now()), len(answer.body))
        request = self._request
        if answer.body and request is not None and request.method != b"HEAD":
            self.write(answer.body)
        self.end()

    # ---- refusing and closing ---------------------------------------------------------------

    def _refuse(self, error: NearfieldError, code: str) -> None:
        """These bytes are no request that is taken: say why, and close."""
        self._proxy.recorder.malformed(code)
        dialect = "openai" if self._request is None else self._request.dialect
        answer = refusal(error, dialect)
        fields = fields_of(answer, self._proxy.dates.now())
        parts = [STATUS_LINES[answer.status], *(b"%b: %b\r\n" % field for field in fields)]
        parts.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(answer.body))
        self._transport.write(b"".join(parts) + answer.body)
        self._let_go()
        self._unread = True
        self._shut()

    def _shut(self) -> None:
        """Close when what was written is sent. A client that is still sending is listened to for a
        while: closing at once would reset the connection, and the answer with it."""
        self._state = CLOSING
        self._ahead = b""
        transport = self._transport
        if not self._unread:
            transport.close()
        if transport.is_closing():
            return
        if self._paused:
            self._paused = False
            transport.resume_reading()
        if transport.can_write_eof():
            transport.write_eof()
        self.due_s = self._proxy.loop.time() + self._proxy.limits.linger_s
        self._proxy.timers.sooner(self)

    def drain(self) -> None:
        """The process is stopping: an idle connection may bring one more request, soon."""
        if self._state == READING:
            due_s = self._proxy.loop.time() + self._proxy.limits.drain_idle_s
            self.due_s = min(self.due_s, due_s)
            self._proxy.timers.sooner(self)

    def cut(self) -> None:
        """The time to drain is over."""
        exchange = self._exchange
        if exchange is not None:
            exchange.cut()
        self._transport.abort()

    def on_due(self, now_s: float) -> None:
        if self._too_much:
            reset(self._transport)  # it takes nothing
        elif self._state == BUSY:
            self.due_s = now_s + self._proxy.limits.idle_s  # the exchange has its own
        elif self._state == CLOSING:
            self._transport.abort()
        elif self._request is not None:
            self._refuse(head.RequestTimeout("The body came too slowly."), "request_timeout")
        elif self._reader.started:
            self._refuse(head.RequestTimeout("The head came too slowly."), "request_timeout")
        else:
            self._transport.close()
