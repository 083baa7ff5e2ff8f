"""One request over HTTP/2 and its answer, as the exchange's client sees it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from h2.errors import ErrorCodes
from h2.exceptions import StreamClosedError
from nearfield.core.errors import EngineFailed, NearfieldError
from nearfield.edge.proxy import fields as request_fields
from nearfield.edge.proxy import head
from nearfield.edge.proxy.answers import NO_BODY, fields_of, refusal
from nearfield.edge.proxy.collector import Collector
from nearfield.edge.proxy.exchange import Exchange
from nearfield.edge.proxy.head import Bad
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import Answer, Call, Fields, Request

if TYPE_CHECKING:
    from nearfield.edge.proxy.exchange import Client
    from nearfield.edge.proxy.h2 import Connection

log = logging.getLogger("nearfield.edge.proxy")

FRAME_BYTES = 2**14
"""Of a part of an answer, so that streams take turns."""

_CONTINUE = ((b":status", b"100"),)


class Stream:
    """One request and its answer. The far side of `Exchange.Client`.

    Attributes:
        answered: the head of the answer is sent. unsent_bytes: of the answer, for want of windows.
    """

    __slots__ = (
        "_all_sent", "_bodiless", "_call", "_connection", "_exchange", "_held_bytes", "_known",
        "_left_bytes", "_listening", "_parts", "_paused", "_request", "_since_s", "_trailers",
        "_unread", "_unsent", "_whole", "answered", "due_s", "number", "timer", "unsent_bytes",
    )  # fmt: skip

    def __init__(self, connection: Connection, number: int) -> None:
        self.number = number
        self.answered = False
        self.unsent_bytes = 0
        self._connection = connection
        self._request: Request | None = None
        self._call: Call | None = None
        self._exchange: Exchange | None = None
        self._known = False  # the caller was asked about
        self._listening = True  # to the body
        self._unread = True  # part of the request is still to come
        self._parts: list[bytes] = []
        self._held_bytes = 0  # as counted by the proxy
        self._since_s = 0.0
        self._bodiless = False  # the present answer has no body, whatever is written
        self._left_bytes: int | None = None  # of a body of known length
        self._unsent: deque[bytes | memoryview] = deque()
        self._whole = False  # all of the answer was written here
        self._trailers: Fields | None = None
        self._all_sent = False
        self._paused = False
        self.due_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    # ---- the request ------------------------------------------------------------------------

    def on_head(self, fields: Sequence[tuple[bytes, bytes]], *, complete: bool) -> None:
        """The request begins; `complete`: it has no body, and `on_end` follows."""
        connection = self._connection
        proxy = connection.proxy
        self._since_s = time.monotonic()
        try:
            method, target, headers = request_fields.read(fields, proxy.limits)
            if proxy.calls is not None:
                self._call = proxy.calls.find(target, headers)
            request = proxy.receive(method, target, headers, connection.peer, self._since_s)
            self._request = request
            if not self._enter(request, early=True):
                return
            if head.wants_continue(headers) and not complete:
                connection.wire.send_headers(self.number, _CONTINUE)
        except Bad as refused:
            self._refuse(refused.error)
            return
        self.due_s = proxy.limits.body_due_s(self._since_s, 0)
        proxy.timers.watch(self)

    def _enter(self, request: Request, *, early: bool) -> bool:
        """Ask whether the request may go on, as soon as it is known what it asks for.

        Raises:
            Bad: it asks for a deadline that is none.
        """
        call = self._call
        refused: NearfieldError | None = None
        if call is not None:
            request.dialect = "oip"
            refused = call.refused
        if refused is None and not self._known:
            if early and call is not None and not call.at_once:
                return True
            self._known = True
            refused = self._connection.proxy.enter(request)
        if refused is None:
            return True
        self._listening = False
        exchange = self._open(request)
        exchange.refuse(refused)
        return False

    def on_data(self, data: bytes) -> None:
        """A part of the request's body."""
        if not self._listening:
            return
        limits = self._connection.proxy.limits
        most = limits.max_body_bytes if self._call is None else self._call.max_bytes
        self._parts.append(data)
        try:
            if self._held_bytes + len(data) > most:
                raise head.too_large(most)
            self.hold(len(data))
        except Bad as refused:
            self._refuse(refused.error)
            return
        self.due_s = limits.body_due_s(self._since_s, self._held_bytes)

    def on_end(self) -> None:
        """The request is complete."""
        self._unread = False
        if not self._listening:
            return
        self._listening = False
        self._connection.proxy.timers.unwatch(self)
        request, call = self._request, self._call
        assert request is not None
        length = request.headers.get(b"content-length")
        if length is not None and int(length) != self._held_bytes:
            self._refuse(head.bad("content-length is not the length of the body.").error)
            return
        request.body = b"".join(self._parts)
        self._parts = []
        if call is not None:
            refused = self._read(call, request)
            if refused is not None:
                self._open(request).refuse(refused)
                return
            try:
                if not self._enter(request, early=False):
                    return
            except Bad as bad:
                self._refuse(bad.error)
                return
        self._open(request).start()

    def _read(self, call: Call, request: Request) -> NearfieldError | None:
        try:
            return call.read(request)
        except Exception:
            log.exception("a call could not be read")
            return EngineFailed("Something went wrong in the gateway.", code="internal_error")

    def _open(self, request: Request) -> Exchange:
        client: Client = self if self._call is None else Collector(self, self._call)
        self._exchange = exchange = Exchange(self._connection.proxy, client, request)
        return exchange

    def hold(self, size: int) -> None:
        """Count what is kept in memory.

        Raises:
            Bad: it is too much, of all requests together.
        """
        self._held_bytes += size
        self._connection.proxy.hold(size)

    def _let_go(self) -> None:
        self._connection.proxy.held_bytes -= self._held_bytes
        self._held_bytes = 0
        self._parts = []
        self._request = None

    def _refuse(self, error: NearfieldError) -> None:
        """This is no request that is taken: say why."""
        self._listening = False
        self._connection.proxy.timers.unwatch(self)
        self._connection.proxy.recorder.malformed(error.code or "malformed_request")
        answer = refusal(error, "openai" if self._request is None else self._request.dialect)
        if self._call is None:
            self.answer(answer)
        else:
            self.send_reply(self._call, answer.status, answer.headers, answer.body)
        self._let_go()
        self._settle()

    # ---- Client, for the exchange -----------------------------------------------------------

    def begin(self, status: int, fields: Fields, length: int | None) -> None:
        head_fields = [(b":status", b"%d" % status), *fields]
        if length is not None and status != 204:
            head_fields.append((b"content-length", b"%d" % length))
        asked_for_head = self._request is not None and self._request.method == b"HEAD"
        self._bodiless = length == 0 or status in NO_BODY or asked_for_head
        self._left_bytes = length
        self._send_head(head_fields, last=self._bodiless)

    def write(self, data: bytes) -> None:
        if self._all_sent or self._bodiless:
            return
        if self._left_bytes is not None:
            self._left_bytes -= len(data)
            self._whole = self._left_bytes <= 0
        self._send_data(data)
        if self.unsent_bytes > self._connection.proxy.limits.client_buffer_bytes:
            self._paused = True
            if self._exchange is not None:
                self._exchange.pause()

    def end(self) -> None:
        if not self._all_sent and not self._whole:
            self._whole = True
            self._send_rest()

    def abort(self) -> None:
        self._reset(ErrorCodes.INTERNAL_ERROR)

    def answer(self, answer: Answer) -> None:
        self.begin(
            answer.status,
            fields_of(answer, self._connection.proxy.dates.now()),
            len(answer.body),
        )
        if answer.body:
            self.write(answer.body)
        self.end()

    def over(self) -> None:
        self._exchange = None
        self._let_go()
        self._settle()

    # ---- for the collector ------------------------------------------------------------------

    def send_reply(self, call: Call, status: int, fields: Fields, body: bytes) -> None:
        """A whole answer, in the form of another protocol."""
        if self._all_sent:
            return
        try:
            reply = call.reply(status, fields, body)
        except Exception:
            log.exception("the answer to a call could not be written")
            self.abort()
            return
        if not reply.data and not reply.trailers:
            self._send_head(list(reply.head), last=True)
            return
        self._send_head(list(reply.head), last=False)
        self._trailers = reply.trailers
        self._whole = True
        self._send_data(reply.data)

    def leave(self) -> None:
        """The rest of the answer is not wanted."""
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_left()
        self.over()

    @property
    def limits(self) -> Limits:
        return self._connection.proxy.limits

    @property
    def error(self) -> str | None:
        """Why the exchange breaks its answer off, in one word."""
        return None if self._exchange is None else self._exchange.outcome.error

    # ---- sending ----------------------------------------------------------------------------

    def _send_head(self, fields: list[tuple[bytes, bytes]], *, last: bool) -> None:
        if self._all_sent:
            return
        self.answered = True
        told = [(name, value.strip(b" \t")) for name, value in fields]
        self._connection.wire.send_headers(self.number, told, end_stream=last)
        self._connection.flush()
        if last:
            self._whole = True
            self._complete()

    def _send_data(self, data: bytes) -> None:
        """Send what the windows allow, and keep the rest."""
        if self._all_sent:
            return
        if data:
            if self.unsent_bytes == 0:
                self._watch_stall()
            self._unsent.append(data)
            self.unsent_bytes += len(data)
        self._send_rest()

    def _send_rest(self) -> None:
        while self.unsent_bytes and not self._connection.choked:
            if not self.send_part():
                return
        if not self.unsent_bytes and self._whole and not self._all_sent:
            self._send_end()

    def send_part(self) -> bool:
        """Send a part, if the windows allow; whether there is more to send."""
        connection, unsent = self._connection, self._unsent
        if not unsent:
            return False
        wire = connection.wire
        room = min(wire.local_flow_control_window(self.number), wire.max_outbound_frame_size)
        room = min(room, FRAME_BYTES)
        if room <= 0:
            return False
        part = unsent.popleft()
        if len(part) > room:
            whole = memoryview(part)
            unsent.appendleft(whole[room:])
            part = whole[:room]
        self.unsent_bytes -= len(part)
        last = self._whole and not unsent and self._trailers is None
        wire.send_data(self.number, part, end_stream=last)
        connection.sent()
        if last:
            self._complete()
            return False
        if unsent:
            self.due_s = connection.proxy.loop.time() + connection.proxy.limits.stall_s
            return True
        connection.proxy.timers.unwatch(self)
        if self._whole:
            self._send_end()
        elif self._paused:
            self._paused = False
            if self._exchange is not None:
                self._exchange.resume()
        return False

    def _send_end(self) -> None:
        wire = self._connection.wire
        if self._trailers is None:
            wire.end_stream(self.number)
        else:
            wire.send_headers(self.number, self._trailers, end_stream=True)
        self._connection.flush()
        self._complete()

    def _watch_stall(self) -> None:
        """The client must open its windows from time to time."""
        proxy = self._connection.proxy
        self.due_s = proxy.loop.time() + proxy.limits.stall_s
        proxy.timers.watch(self)

    # ---- ending -----------------------------------------------------------------------------

    def _complete(self) -> None:
        """All of the answer is sent. A client that is still sending is told that nobody listens."""
        self._all_sent = True
        self._connection.proxy.timers.unwatch(self)
        if self._unread:
            # Its end may have come in the same packet as what was just answered: h2 knows.
            with contextlib.suppress(StreamClosedError):
                self._connection.wire.reset_stream(self.number, ErrorCodes.NO_ERROR)
            self._connection.flush()
        self._settle()

    def _settle(self) -> None:
        if self._all_sent and self._exchange is None:
            self._connection.forget(self)

    def _reset(self, code: ErrorCodes) -> None:
        if not self._all_sent:
            self._drop()
            self._connection.wire.reset_stream(self.number, code)
            self._connection.flush()

    def _drop(self) -> None:
        self._all_sent = True
        self._listening = False
        self._unsent.clear()
        self.unsent_bytes = 0
        self._connection.proxy.timers.unwatch(self)

    def on_lost(self) -> None:
        """The client has left, or taken its request back."""
        self._drop()
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_left()
        self._let_go()
        self._settle()

    def cut(self) -> None:
        """The process stops."""
        if self._exchange is not None:
            self._exchange.cut()

    def on_due(self, now_s: float) -> None:
        if self.unsent_bytes:
            self._reset(ErrorCodes.CANCEL)  # it takes nothing
            self.on_lost()
        elif self._listening:
            self._refuse(head.RequestTimeout("The body came too slowly."))
