"""Connections to targets: kept alive, last in first out, and never trusted with a second chance.

A connection takes part in one try at a time. It reads the answer with llhttp and hands on head,
data and end; whatever looks wrong (bytes that nobody asked for, more than the answer, an end in
the middle) costs the connection, so that no answer can ever reach the wrong request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from typing import Protocol

import httptools
from nearfield.edge.proxy.head import HOP_BY_HOP
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import FailureKind, Target

log = logging.getLogger("nearfield.edge.proxy")

MAX_DISCARDED_BYTES = 64 * 1024
"""An unwanted answer longer than this costs the connection instead of the reading."""

_NOT_OURS = HOP_BY_HOP | {b"content-length", b"x-request-id"}
_LINGER_NONE = struct.pack("ii", 1, 0)


class _NotAnAnswer(ValueError):
    """What a callback found wrong with the bytes; everything else it raises is a bug."""


class Receiver(Protocol):
    """Who an answer is for."""

    def on_connected(self, upstream: Upstream) -> None:
        """The connection that was asked for is there."""
        ...

    def on_head(self, status: int, fields: list[tuple[bytes, bytes]], length: int | None) -> None:
        """The final answer's head; `length` of its body where it says so."""
        ...

    def on_data(self, data: bytes) -> None:
        """A part of the body."""
        ...

    def on_end(self) -> None:
        """The answer is complete. The connection is no longer the receiver's."""
        ...

    def on_lost(self, kind: FailureKind) -> None:
        """There is no (more) answer. The connection is no longer the receiver's."""
        ...


def reset(transport: asyncio.Transport) -> None:
    """Cut a connection so that the other side cannot take it for an orderly end."""
    plain = transport.get_extra_info("socket")
    if plain is not None and transport.get_extra_info("ssl_object") is None:
        with contextlib.suppress(OSError):  # it is gone already
            plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NONE)
    transport.abort()


class Upstream(asyncio.Protocol):
    """One connection to a target."""

    __slots__ = (
        "_bodiless", "_chunked", "_close", "_complete", "_fields", "_head_bytes", "_head_done",
        "_interim", "_length", "_listed", "_parser", "_paused", "_to_the_end", "counted", "idle_s",
        "pool", "receiver", "transport", "used",
    )  # fmt: skip
    transport: asyncio.Transport

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.receiver: Receiver | None = None
        self.counted = True  # by the pool, from before it is made until it has ended
        self.used = False  # has answered a request before
        self.idle_s = 0.0  # when it was put back
        self._paused = False
        self._parser = httptools.HttpResponseParser(self)
        self._begin()

    def _begin(self) -> None:
        self._fields: list[tuple[bytes, bytes]] = []
        self._length: int | None = None
        self._chunked = False
        self._listed: bytes | None = None  # the value of `Connection`
        self._close = False
        self._interim = False
        self._to_the_end = False
        self._head_done = False
        self._complete = False
        self._bodiless = False
        self._head_bytes = 0

    # ---- for the pool and the try -----------------------------------------------------------

    def send(self, receiver: Receiver, head: bytes, body: bytes, *, bodiless: bool) -> None:
        """Ask; `bodiless`: the answer to a HEAD has none, whatever it says."""
        self.receiver = receiver
        self._bodiless = bodiless
        self.transport.writelines((head, body) if body else (head,))  # one write each costs two

    def pause(self) -> None:
        """Read no more until `resume`, or until the answer is over."""
        if not self._paused and not self.transport.is_closing():
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused and not self.transport.is_closing():
            self._paused = False
            self.transport.resume_reading()

    def drop(self) -> None:
        """The receiver wants no more of it: the request is cancelled where it runs."""
        self.receiver = None
        self.transport.abort()

    def discard(self) -> None:
        """The receiver wants no more of this answer, but the connection may live on."""
        self.receiver = _Discard(self)
        self.resume()

    # ---- asyncio.Protocol -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport
        if not self.counted:
            self.transport.abort()  # given up while it was being made

    def data_received(self, data: bytes) -> None:
        if self.receiver is None:
            self.transport.abort()  # nobody asked
            return
        if not self._head_done:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if error.__context__ is not None and not isinstance(error.__context__, _NotAnAnswer):
                log.error("an answer could not be handed on", exc_info=error.__context__)
            self._close = True
            if not self._complete:
                self._lose("protocol")
                return
        if self._complete:
            self._finish()
        elif not self._head_done and self._head_bytes > self.pool.limits.max_response_head_bytes:
            self._lose("protocol")

    def eof_received(self) -> bool:
        if self.receiver is not None and self._head_done and self._to_the_end:
            self._close = True
            self._finish()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.pool.forget(self)
        receiver, self.receiver = self.receiver, None
        if receiver is not None:
            receiver.on_lost("truncated" if self._head_done else "closed")

    def _finish(self) -> None:
        """The answer is complete, and the parser has returned: only now may others have us."""
        receiver, self.receiver = self.receiver, None
        reusable = not self._close and not self.transport.is_closing()
        if reusable:
            self.used = True
            self.resume()  # its client may have been slow: the next one need not be
            if self._bodiless:
                self._parser = httptools.HttpResponseParser(self)  # it would wait for a body
            self._begin()
            self.pool.put(self)
        else:
            self.transport.close()
        if receiver is not None:
            receiver.on_end()

    def _lose(self, kind: FailureKind) -> None:
        receiver, self.receiver = self.receiver, None
        self.transport.abort()
        if receiver is not None:
            receiver.on_lost("truncated" if self._head_done else kind)

    # ---- llhttp -----------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            self._close = True
            raise _NotAnAnswer("more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name not in _NOT_OURS:
            self._fields.append((name, value))
        elif name == b"content-length":
            self._length = int(value)
        elif name == b"connection":
            self._listed = value.lower()
            self._close = self._close or b"close" in self._listed
        elif name == b"transfer-encoding":
            if value.lower() != b"chunked":
                raise _NotAnAnswer("a transfer coding that nobody asked for")
            self._chunked = True

    def on_headers_complete(self) -> None:
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            if status == 101:
                raise _NotAnAnswer("an upgrade that nobody asked for")
            self._interim = True
            self._fields = []
            return
        self._head_done = True
        if self._length is None and not self._chunked and status not in (204, 304):
            self._to_the_end = not self._bodiless
            self._close = self._close or self._to_the_end
        if not self._close and not self._bodiless and not parser.should_keep_alive():
            self._close = True
        fields = self._fields
        if self._listed is not None and self._listed not in (b"keep-alive", b"close"):
            listed = {token.strip() for token in self._listed.split(b",")}
            fields = [field for field in fields if field[0] not in listed]
        if self.receiver is not None:
            self.receiver.on_head(status, fields, self._length)
        if self._bodiless:
            self._complete = True

    def on_body(self, data: bytes) -> None:
        if self._bodiless:
            raise _NotAnAnswer("a body where none can be")
        if self.receiver is not None:
            self.receiver.on_data(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            self._listed = None
            self._length = None
            self._chunked = False
        else:
            self._complete = True


class _Discard:
    """The receiver of an answer that nobody wants."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream: Upstream | None = upstream
        self._left_bytes = MAX_DISCARDED_BYTES

    def on_connected(self, upstream: Upstream) -> None:
        raise AssertionError("nothing was asked for")

    def on_head(self, status: int, fields: list[tuple[bytes, bytes]], length: int | None) -> None:
        """Not wanted."""

    def on_data(self, data: bytes) -> None:
        self._left_bytes -= len(data)
        if self._left_bytes < 0 and self._upstream is not None:
            self._upstream.drop()
            self._upstream = None

    def on_end(self) -> None:
        self._upstream = None

    def on_lost(self, kind: FailureKind) -> None:
        self._upstream = None


class Pool:
    """The connections to one target."""

    __slots__ = ("_opening", "idle", "limits", "open", "target")

    def __init__(self, target: Target, limits: Limits) -> None:
        self.target = target
        self.limits = limits
        self.idle: list[Upstream] = []
        self.open = 0  # made or being made
        self._opening: set[asyncio.Task[None]] = set()

    def take(self) -> Upstream | None:
        """The connection that was used last, if one is idle."""
        idle = self.idle
        while idle:
            upstream = idle.pop()
            if not upstream.transport.is_closing():
                return upstream
        return None

    def put(self, upstream: Upstream) -> None:
        """An answer was complete; the connection can be used again."""
        if len(self.idle) >= self.limits.max_upstream_idle:
            upstream.transport.close()
            return
        upstream.idle_s = time.monotonic()
        self.idle.append(upstream)

    def forget(self, upstream: Upstream) -> None:
        """The connection has ended, or is given up. May be called again."""
        if upstream.counted:
            upstream.counted = False
            self.open -= 1
        if upstream in self.idle:
            self.idle.remove(upstream)

    def connect(self, receiver: Receiver) -> asyncio.Task[None] | None:
        """Open a connection for `receiver`; None where too many are open. Cancel it to give up."""
        if self.open >= self.limits.max_upstream_connections:
            return None
        self.open += 1
        upstream = Upstream(self)
        task = asyncio.get_running_loop().create_task(self._connect(upstream, receiver))
        self._opening.add(task)

        def over(task: asyncio.Task[None]) -> None:
            self._opening.discard(task)
            if task.cancelled():  # perhaps before a line of it was run
                self.forget(upstream)

        task.add_done_callback(over)
        return task

    async def _connect(self, upstream: Upstream, receiver: Receiver) -> None:
        target = self.target
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: upstream,
                target.host,
                target.port,
                ssl=target.tls,
                server_hostname=None if target.tls is None else target.server_name or target.host,
            )
        except OSError as error:
            # Why is for the log: whoever asked tries somewhere else.
            log.debug("no connection to %s: %s", target.authority.decode(), error)
            self.forget(upstream)
            receiver.on_lost("refused")
        except BaseException:
            # Cancelled. uvloop may have made it, and does not say that it has ended.
            self.forget(upstream)
            raise
        else:
            receiver.on_connected(upstream)

    def close_idle(self, before_s: float = float("inf")) -> None:
        """Close connections that have been idle since before that time."""
        idle = self.idle
        while idle and idle[0].idle_s < before_s:
            upstream = idle.pop(0)
            self.forget(upstream)  # the loop tells of its end one turn later
            upstream.transport.close()


class Pools:
    """The connections of one gateway process, by target."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pools: dict[Target, Pool] = {}

    def of(self, target: Target) -> Pool:
        """The target's pool."""
        pool = self._pools.get(target)
        if pool is None:
            pool = self._pools[target] = Pool(target, self._limits)
        return pool

    @property
    def open(self) -> int:
        """Connections, made or being made."""
        return sum(pool.open for pool in self._pools.values())

    @property
    def idle(self) -> int:
        return sum(len(pool.idle) for pool in self._pools.values())

    def sweep(self, now_s: float) -> None:
        """Close what has been idle too long, and forget targets without connections."""
        for target, pool in list(self._pools.items()):
            pool.close_idle(now_s - self._limits.upstream_idle_s)
            if pool.open == 0:
                del self._pools[target]

    def close(self) -> None:
        """Close what is idle. What is in use is its try's to end."""
        for pool in self._pools.values():
            pool.close_idle()
