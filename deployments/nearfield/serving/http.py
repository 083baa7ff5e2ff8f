"""One HTTP exchange: ids, deadline, body, answer, errors. Plain ASGI, nothing buffered.

Every route is an `Endpoint`: it begins the exchange's record, runs a handler under the request's
deadline, and turns whatever goes wrong into one error in the caller's dialect. Middlewares would
cost a task and several wrappers a request, and Starlette's would hold back streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from nearfield.api.error_bodies import code_header
from nearfield.core.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    EngineFailed,
    NearfieldError,
    PayloadTooLarge,
    Unauthenticated,
    UnsupportedMedia,
)
from nearfield.core.ids import new_id
from nearfield.core.standstill import Standstill
from nearfield.serving.access import Access, Door
from nearfield.serving.departure import Departure
from nearfield.telemetry import logs, names
from nearfield.telemetry.requests import Recorder, RequestRecord
from starlette.types import Receive, Scope, Send

log = logging.getLogger("nearfield.http")

ANY = "*"
"""In place of a method: whichever comes."""
JSON = b"application/json"
OCTETS = b"application/octet-stream"
MAX_TIMEOUT_S = 3600.0
LAST_WORD_S = 5.0
"""How long a client that reads slowly may take for the error that ends its stream."""
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
EVENT_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)

Header = tuple[bytes, bytes]
Handler = Callable[["Exchange"], Awaitable[None]]
ErrorBody = Callable[[NearfieldError], bytes]


class Exchange:
    """A request and its answer.

    Attributes:
        headers: the request's, names in lower case; of repeated ones the last.
        deadline_s: when the answer must be complete, on `time.monotonic()`.
        queue_share: of the replica's queue that this request may fill.
        flow: whose it is: a product, or a tenant; they are served in turn.
        size: bytes of its body, once that is read.
        record: what telemetry will be told.
        started: the status line has been sent; an error can no longer have one of its own.
    """

    __slots__ = (
        "_receive",
        "_send",
        "_shows_request_id",
        "_stream_error",
        "deadline_s",
        "flow",
        "headers",
        "path_params",
        "queue_share",
        "record",
        "size",
        "started",
    )

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        headers: dict[bytes, bytes],
        record: RequestRecord,
        deadline_s: float,
        shows_request_id: bool,
    ) -> None:
        self._receive = receive
        self._send = send
        self._shows_request_id = shows_request_id
        self.path_params: dict[str, str] = scope.get("path_params") or {}
        self.headers = headers
        self.record = record
        self.deadline_s = deadline_s
        self.queue_share = 1.0
        self.flow = ""
        self.size = 0
        self.started = False
        self._stream_error: ErrorBody | None = None

    # ---- the request ------------------------------------------------------------------------

    def require_content_type(self, allowed: Sequence[bytes], *, optional: bool = False) -> None:
        """Refuse a body of any other type.

        Raises:
            UnsupportedMedia: the message names what is taken.
        """
        encoding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding not in (b"identity", b""):
            raise UnsupportedMedia(
                f"content-encoding {_shown(encoding)} is not taken: send the body as it is.",
                param="content-encoding",
            )
        given = self.headers.get(b"content-type", b"")
        if given in allowed or (optional and not given):
            return
        media, _, parameters = given.partition(b";")
        if media.strip().lower() not in allowed:
            wanted = " or ".join(kind.decode() for kind in allowed)
            raise UnsupportedMedia(
                f"content-type is {_shown(given) or 'missing'}: send {wanted}.",
                param="content-type",
            )
        charset = re.search(rb"charset\s*=\s*\"?([\w-]+)", parameters.lower())
        if charset is not None and charset[1] not in (b"utf-8", b"utf8"):
            raise UnsupportedMedia(
                f"charset {_shown(charset[1])} is not taken: send UTF-8.", param="content-type"
            )

    async def body(self, max_bytes: int) -> bytes:
        """Read the whole body.

        Raises:
            PayloadTooLarge: it is longer than `max_bytes`; if it says so itself, nothing is read.
            Cancelled: the client went away.
        """
        announced = self.headers.get(b"content-length", b"0")
        if not announced.isdigit():
            raise BadRequest("content-length must be a number.", param="content-length")
        if _number(announced) > max_bytes:
            raise _too_large(max_bytes)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] != "http.request":
                raise Cancelled("The client went away before its request was complete.")
            chunk: bytes = message.get("body", b"")
            size += len(chunk)
            if size > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
            if not message.get("more_body", False):
                self.size = size
                return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    # ---- the answer -------------------------------------------------------------------------

    async def answer(
        self,
        body: bytes,
        *,
        status: int = 200,
        content_type: bytes = JSON,
        headers: Iterable[Header] = (),
    ) -> None:
        """Send a complete answer."""
        await self._start(
            status,
            [
                (b"content-type", content_type),
                (b"content-length", b"%d" % len(body)),
                *headers,
            ],
        )
        await self._send({"type": "http.response.body", "body": body})

    async def open_stream(self, render_error: ErrorBody) -> None:
        """Begin a stream of server-sent events; `render_error` makes the event that ends it if
        something goes wrong from here on."""
        self._stream_error = render_error
        await self._start(200, [*EVENT_STREAM_HEADERS])

    async def write(self, data: bytes) -> None:
        """Send a part of the stream now. Waits while the client is slow to read."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_stream(self, data: bytes = b"") -> None:
        """Send the last part."""
        self._stream_error = None
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self, status: int, headers: list[Header]) -> None:
        self.started = True
        self.record.status = status
        headers.append((b"traceparent", self.record.traceparent.encode()))
        if self._shows_request_id:
            headers.append((b"x-request-id", self.record.request_id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def fail(self, error: NearfieldError, render: ErrorBody) -> None:
        """Answer with an error; in a stream that has begun, end it with an error event."""
        self.record.error = error.code or error.type
        if self._stream_error is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_S):
                    await self.end_stream(self._stream_error(error))
        if self.started:
            return
        headers: list[Header] = code_header(error)
        if error.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after_s))))
        if error.status == Unauthenticated.status:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.answer(render(error), status=error.status, headers=headers)


def _standstill() -> Standstill:
    return Standstill(asyncio.get_running_loop())


@dataclass(frozen=True, slots=True)
class Frontend:
    """What all routes of a replica share.

    Attributes:
        timeout_s: the deadline of a request that brings none of its own.
        ingress_returns_id: whoever called us puts the request's id into the answer (Serve does).
        access: who may call; None: everybody.
        departure: when this replica goes; None: nobody would know.
        standstill: of this event loop.
    """

    recorder: Recorder
    timeout_s: float
    ingress_returns_id: bool = False
    access: Access | None = None
    departure: Departure | None = None
    standstill: Standstill = field(default_factory=_standstill)


class Endpoint:
    """One route as an ASGI application: methods, deadline, errors, record."""

    def __init__(
        self,
        path: str,
        handlers: dict[str, Handler],
        errors: ErrorBody,
        frontend: Frontend,
        *,
        door: Door | None = "inference",
    ) -> None:
        """
        Args:
            path: the route's pattern, for telemetry.
            handlers: by method. HEAD is answered as GET; what is missing is a 405.
            errors: renders an error in the dialect of this route.
            door: who may call, where not everybody may; None: everybody always may.
        """
        self.path = path
        self._handlers = handlers
        if "GET" in handlers:
            handlers.setdefault("HEAD", handlers["GET"])
        self._errors = errors
        self._frontend = frontend
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given_id = headers.get(b"x-request-id", b"")
        sane = REQUEST_ID.fullmatch(given_id) is not None
        request_id = given_id.decode() if sane else new_id("req")
        recorder = self._frontend.recorder
        record = recorder.begin(scope["method"], self.path, request_id, _carrier(headers))
        logs.bind(request_id, f"{record.context.trace_id:032x}", f"{record.context.span_id:016x}")
        exchange = Exchange(
            scope,
            receive,
            send,
            headers=headers,
            record=record,
            deadline_s=record.started_s + self._frontend.timeout_s,
            shows_request_id=not (sane and self._frontend.ingress_returns_id),
        )
        try:
            await self._run(exchange, scope["method"])
        except asyncio.CancelledError:
            record.error = record.error or "cancelled"
            record.status = record.status or Cancelled.status
            raise
        finally:
            recorder.end(record)
            _log(record)

    async def _run(self, exchange: Exchange, method: str) -> None:
        try:
            latest_s = self._admit(exchange)
            handler = self._handlers.get(method) or self._handlers.get(ANY)
            if handler is None:
                await self._refuse_method(exchange, method)
                return
            exchange.deadline_s = min(latest_s, self._deadline_s(exchange))
            if wait_s := self._frontend.standstill.wait_s():
                await asyncio.sleep(wait_s)  # a caller that has left is noticed as its body is read
            async with asyncio.timeout(exchange.deadline_s - time.monotonic()) as timeout:
                await self._handle(handler, exchange, timeout)
        except NearfieldError as error:
            await exchange.fail(error, self._errors)
        except TimeoutError:
            await exchange.fail(self._out_of_time(), self._errors)
        except Exception:
            # The one place where a mistake of ours meets a caller: it gets an id to report.
            log.exception("a request failed unexpectedly")
            request_id = exchange.record.request_id
            failure = EngineFailed(
                f"Something went wrong in this replica. Its log has it under {request_id}.",
                code="internal_error",
            )
            await exchange.fail(failure, self._errors)

    async def _handle(self, handler: Handler, exchange: Exchange, timeout: asyncio.Timeout) -> None:
        departure = self._frontend.departure
        if departure is None or self._door != "inference":
            await handler(exchange)
            return
        departure.require_staying()
        with departure.ending(timeout):
            await handler(exchange)

    def _out_of_time(self) -> NearfieldError:
        departure = self._frontend.departure
        return (departure and departure.interrupted()) or deadline_exceeded()

    def _admit(self, exchange: Exchange) -> float:
        """Let the request in; returns when its answer must be complete at the latest.

        Raises:
            Unauthenticated, Forbidden: as `Access.admit`.
        """
        access = self._frontend.access
        if access is None or self._door is None:
            return math.inf
        caller = access.admit(exchange.headers, self._door)
        exchange.queue_share = caller.queue_share
        exchange.flow = caller.product or caller.tenant
        attributes = exchange.record.attributes
        attributes[names.TENANT] = caller.tenant
        attributes[names.KEY_ID] = caller.key_id
        if caller.product is not None:
            attributes[names.PRODUCT] = caller.product
        if caller.timeout_s is None:
            return math.inf
        return exchange.record.started_s + caller.timeout_s

    async def _refuse_method(self, exchange: Exchange, method: str) -> None:
        allowed = ", ".join(sorted(self._handlers))
        error = BadRequest(
            f"{method} does not go with {self.path}: use {allowed}.", code="method_not_allowed"
        )
        exchange.record.error = error.code
        await exchange.answer(
            self._errors(error),
            status=405,
            headers=[(b"allow", allowed.encode()), *code_header(error)],
        )

    def _deadline_s(self, exchange: Exchange) -> float:
        given = exchange.headers.get(b"x-request-timeout-ms")
        if given is None:
            return exchange.deadline_s
        timeout_ms = _number(given)
        if not 0 < timeout_ms <= MAX_TIMEOUT_S * 1000:
            raise BadRequest(
                f"x-request-timeout-ms is {_shown(given)}: send a whole number of milliseconds "
                f"from 1 to {MAX_TIMEOUT_S * 1000:.0f}.",
                param="x-request-timeout-ms",
            )
        return exchange.record.started_s + timeout_ms / 1000


def deadline_exceeded() -> DeadlineExceeded:
    """The request ran out of time."""
    return DeadlineExceeded(
        "The request's deadline passed before its answer was complete. Ask for less, or allow "
        "more time with x-request-timeout-ms.",
    )


def _log(record: RequestRecord) -> None:
    if record.operation == names.OTHER and record.error is None:
        return  # a health check's or scraper's, every few seconds
    level = logging.ERROR if record.status >= 500 else logging.INFO
    if log.isEnabledFor(level):
        took_s = round(time.monotonic() - record.started_s, 6)
        fields = {
            "route": record.route,
            "status": record.status,
            "code": record.error,
            "tenant": record.attributes.get(names.TENANT),
            "duration_s": took_s,
            "input_tokens": record.input_tokens,
            "output_tokens": record.output_tokens,
        }
        log.log(level, "%s", record.method, extra=fields)


def _too_large(max_bytes: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"The body is larger than {max_bytes} bytes. Send a smaller one.")


def _number(digits: bytes) -> float:
    """A header's whole number; infinite where it is absurdly long, 0 where it is none."""
    if not digits.isdigit():
        return 0
    return int(digits) if len(digits) <= 18 else math.inf


def _shown(value: bytes) -> str:
    """A header's value as far as it can be repeated in a message."""
    return ascii(value.decode("latin-1")[:80]).strip("'\"")


def _carrier(headers: dict[bytes, bytes]) -> dict[str, str]:
    if b"traceparent" not in headers:
        return {}
    carrier = {"traceparent": headers[b"traceparent"].decode("latin-1")}
    if b"tracestate" in headers:
        carrier["tracestate"] = headers[b"tracestate"].decode("latin-1")
    return carrier
