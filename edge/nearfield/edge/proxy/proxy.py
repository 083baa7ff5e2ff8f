"""What all connections of one gateway process share, and the books that must balance."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol

from nearfield.core.errors import EngineFailed, NearfieldError, Unavailable
from nearfield.core.standstill import Standstill
from nearfield.edge.proxy import head, identity
from nearfield.edge.proxy.answers import Dates
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import (
    Attempt,
    Calls,
    Gate,
    Pages,
    Recorder,
    Request,
    Retries,
    Router,
    Target,
)
from nearfield.edge.proxy.timers import Timers
from nearfield.edge.proxy.upstream import Pools

if TYPE_CHECKING:
    from nearfield.edge.proxy.exchange import Exchange

log = logging.getLogger("nearfield.edge.proxy")

SWEEP_S = 1.0


class Connected(Protocol):
    """A client's connection, whatever protocol it speaks."""

    def drain(self) -> None:
        """The process is stopping: finish what runs, and soon take nothing more."""
        ...

    def cut(self) -> None:
        """The time to drain is over."""
        ...


class Proxy:
    """The ports and the state of one event loop's forwarding.

    Attributes:
        live: exchanges under way. held_bytes: of request bodies and collected answers in memory.
        clients: open client connections.
        draining: answers say that their connection will be closed.
        sample_ratio: share of new traces that are sampled.
    """

    def __init__(
        self,
        gate: Gate,
        router: Router,
        retries: Retries,
        recorder: Recorder,
        *,
        pages: Pages | None = None,
        calls: Calls | None = None,
        limits: Limits | None = None,
        sample_ratio: float = 0.0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.gate = gate
        self.router = router
        self.retries = retries
        self.recorder = recorder
        self.pages = pages
        self.calls = calls
        self.limits = limits or Limits()
        self.sample_ratio = sample_ratio
        self.timers = Timers(self.loop)
        self.standstill = Standstill(self.loop)
        self.pools = Pools(self.limits)
        self.dates = Dates()
        self.live: set[Exchange] = set()
        self.held_bytes = 0
        self.clients: set[Connected] = set()
        self.draining = False
        self._sweeping: asyncio.TimerHandle | None = None
        self._deserted: asyncio.Event | None = None
        self._sweep()

    def receive(
        self,
        method: bytes,
        target: bytes,
        headers: dict[bytes, bytes],
        peer: str,
        started_s: float,
    ) -> Request:
        """The request that a well-formed head begins.

        Raises:
            Bad: its target could be read as another one.
        """
        place = head.read_path(target)
        return Request(
            method,
            target,
            place.path,
            place.dialect,
            headers,
            identity.request_id(headers),
            identity.trace(headers, self.sample_ratio),
            started_s,
            started_s + self.limits.timeout_s,
            place.model,
            place.says_model,
            peer,
        )

    def hold(self, size: int) -> None:
        """Count bytes that are kept in memory. Count them off again, also those that were refused.

        Raises:
            Bad: there are too many.
        """
        self.held_bytes += size
        if self.held_bytes > self.limits.max_held_bytes:
            raise head.Bad(Unavailable("Too much is being sent here at once.", retry_after_s=1.0))

    def enter(self, request: Request) -> NearfieldError | None:
        """Ask at the end of a request's head whether it may go on: a page's, or the Gate.

        Raises:
            Bad: it asks for a deadline that is none.
        """
        timeout = request.headers.get(b"x-request-timeout-ms")
        if timeout is not None:
            allowed_s = head.timeout_s(timeout, self.limits.max_timeout_s)
            request.deadline_s = request.started_s + allowed_s
        try:
            if self.pages is not None:
                request.page = self.pages.find(request)
                if request.page is not None:
                    request.says_model = False  # its body is for the page to read
                    return None
            return self.gate.enter(request)
        except Exception:
            log.exception("a request could not be looked at")
            return EngineFailed("Something went wrong in the gateway.", code="internal_error")

    def router_ended(self, attempt: Attempt) -> None:
        """Tell the Router, whose mistakes must not stop the bookkeeping around it."""
        try:
            self.router.ended(attempt)
        except Exception:
            log.exception("the router could not take note of a try's end")

    def abandon(self, target: Target) -> None:
        """Give up every try at `target`, and its kept connections: it is believed dead.

        What has not begun to answer is tried elsewhere where that is allowed; streams end with
        an explicit error.
        """
        self.pools.of(target).close_idle()
        for exchange in tuple(self.live):
            exchange.abandon(target)

    def client_gone(self, client: Connected) -> None:
        """A client's connection has ended."""
        self.clients.discard(client)
        if self._deserted is not None and not self.clients:
            self._deserted.set()

    async def deserted(self, within_s: float) -> bool:
        """Wait until no client is connected any more; whether that came to be in time."""
        if not self.clients:
            return True
        self._deserted = asyncio.Event()
        try:
            async with asyncio.timeout(within_s):
                await self._deserted.wait()
        except TimeoutError:
            return False
        finally:
            self._deserted = None
        return True

    def close(self) -> None:
        """Close kept connections and stop the clock. Exchanges must be over."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self.pools.close()

    def unbalanced(self) -> list[str]:
        """What is still counted although no client is connected; empty when the books balance."""
        books = {
            "exchanges": len(self.live),
            "held bytes": self.held_bytes,
            "client connections": len(self.clients),
            "timers": len(self.timers),
            "busy upstream connections": self.pools.open - self.pools.idle,
        }
        return [f"{count} {name}" for name, count in books.items() if count]

    def _sweep(self) -> None:
        self.pools.sweep(self.loop.time())
        self._sweeping = self.loop.call_later(SWEEP_S, self._sweep)
