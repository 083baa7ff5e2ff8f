"""What all connections of one gateway process share, and the books that must balance."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from nearfield.core.errors import EngineFailed, NearfieldError
from nearfield.edge.proxy.answers import Dates
from nearfield.edge.proxy.limits import Limits
from nearfield.edge.proxy.ports import (
    Attempt,
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
    from nearfield.edge.proxy.h1 import Connection

log = logging.getLogger("nearfield.edge.proxy")

SWEEP_S = 1.0


class Proxy:
    """The ports and the state of one event loop's forwarding.

    Attributes:
        live: exchanges under way. held_bytes: of request bodies in memory.
        clients: open client connections.
        draining: answers say `Connection: close`.
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
        limits: Limits | None = None,
        sample_ratio: float = 0.0,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.gate = gate
        self.router = router
        self.retries = retries
        self.recorder = recorder
        self.pages = pages
        self.limits = limits or Limits()
        self.sample_ratio = sample_ratio
        self.timers = Timers(self.loop)
        self.pools = Pools(self.limits)
        self.dates = Dates()
        self.live: set[Exchange] = set()
        self.held_bytes = 0
        self.clients: set[Connection] = set()
        self.draining = False
        self._sweeping: asyncio.TimerHandle | None = None
        self._deserted: asyncio.Event | None = None
        self._sweep()

    def enter(self, request: Request) -> NearfieldError | None:
        """Ask at the end of a request's head whether it may go on: a page's, or the Gate."""
        try:
            if self.pages is not None:
                request.page = self.pages.find(request)
                if request.page is not None:
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

    def client_gone(self, client: Connection) -> None:
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
