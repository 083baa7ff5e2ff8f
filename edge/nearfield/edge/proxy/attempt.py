"""One try at one target: connect or reuse, send, and report to the exchange. It ends once."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from nearfield.api.error_bodies import ERROR_CODE
from nearfield.edge.proxy.ports import REPLICA, Attempt, FailureKind, Grant, Leg, Request
from nearfield.edge.proxy.rewrite import upstream_head
from nearfield.edge.proxy.upstream import Upstream

if TYPE_CHECKING:
    from nearfield.edge.proxy.exchange import Exchange
    from nearfield.edge.proxy.proxy import Proxy


class Try(Attempt):
    """An attempt under way. `finish` or one of its likes is called exactly once."""

    __slots__ = ("_exchange", "_opening", "_proxy", "_request", "_upstream", "due_s", "timer")

    def __init__(self, exchange: Exchange, proxy: Proxy, leg: Leg) -> None:
        Attempt.__init__(self, leg, time.monotonic())
        self._exchange: Exchange | None = exchange
        self._proxy = proxy
        self._upstream: Upstream | None = None
        self._opening: asyncio.Task[None] | None = None
        self._request: tuple[Request, Grant] | None = None  # while there is no connection
        self.due_s = 0.0  # while connecting: when it must be done
        self.timer: asyncio.TimerHandle | None = None

    def launch(self, request: Request, grant: Grant, *, fresh: bool) -> None:
        """Go. `fresh`: trust no connection that was kept."""
        pool = self._proxy.pools.of(self.leg.target)
        if fresh:
            pool.close_idle()
        upstream = pool.take()
        if upstream is not None:
            self.reused = True
            self._send(upstream, request, grant)
            return
        self._request = request, grant
        self._opening = pool.connect(self)
        if self._opening is None:
            self._proxy.loop.call_soon(self.on_lost, "refused")
        else:
            self.due_s = self.started_s + self.leg.target.connect_s
            self._proxy.timers.watch(self)

    def _send(self, upstream: Upstream, request: Request, grant: Grant) -> None:
        self._upstream = upstream
        leg = self.leg
        body = request.body if leg.body is None else leg.body
        head = upstream_head(request, leg, grant, body, self.started_s)
        upstream.send(self, head, body, bodiless=request.method == b"HEAD")

    # ---- Receiver ---------------------------------------------------------------------------

    def on_connected(self, upstream: Upstream) -> None:
        self._opening = None
        self._proxy.timers.unwatch(self)
        if self._request is None:  # given up meanwhile: the connection can serve another
            upstream.pool.put(upstream)
            return
        request, grant = self._request
        self._request = None
        self._send(upstream, request, grant)

    def on_head(self, status: int, fields: list[tuple[bytes, bytes]], length: int | None) -> None:
        self.status = status
        self.first_byte_s = self.heard_s = time.monotonic()
        if status >= 429:
            for name, value in fields:
                if name == ERROR_CODE:
                    self.code = value
                elif name == REPLICA:
                    self.replica = value
                elif name == b"retry-after":
                    self.retry_after = status == 503
        if self._exchange is not None:
            self._exchange.on_head(self, status, fields, length)

    def on_data(self, data: bytes) -> None:
        self.heard_s = time.monotonic()
        if self._exchange is not None:
            self._exchange.on_data(data)

    def on_end(self) -> None:
        self._upstream = None
        if self._exchange is not None:
            self._exchange.on_end(self)

    def on_lost(self, kind: FailureKind) -> None:
        self._upstream = None
        if self._exchange is not None:
            self._exchange.on_failed(self, kind)

    # ---- for the exchange -------------------------------------------------------------------

    def pause(self) -> None:
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        if self._upstream is not None:
            self._upstream.resume()

    def on_due(self, now_s: float) -> None:
        """There is no connection in time."""
        exchange = self._exchange
        self._stop()
        if exchange is not None:
            exchange.on_failed(self, "connect_timeout")

    def abandon(self) -> None:
        """The target is given up."""
        exchange = self._exchange
        self._stop()
        if exchange is not None:
            exchange.on_failed(self, "abandoned")

    def cancel(self) -> None:
        """Its answer is no longer wanted: cut the connection, so that the target stops too."""
        self._stop()
        self.finish(self.failure or "cancelled")

    def discard(self) -> None:
        """Its answer is not wanted, but was given: keep the connection if it is soon over."""
        if self._upstream is not None:
            self._upstream.discard()
            self._upstream = None
        self.finish(self.failure)

    def finish(self, failure: FailureKind | None) -> None:
        """The end, for the books."""
        self._exchange = None
        if self.due_s:
            self._proxy.timers.unwatch(self)
        self.failure = failure
        self.ended_s = time.monotonic()
        self._proxy.router_ended(self)

    def _stop(self) -> None:
        self._exchange = None
        self._request = None
        if self._upstream is not None:
            self._upstream.drop()
            self._upstream = None
        if self._opening is not None:
            self._opening.cancel()
            self._opening = None
