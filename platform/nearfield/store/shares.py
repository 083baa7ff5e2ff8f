"""A gateway's shares of all limits: leased ahead of need, so that requests spend from memory.

A round renews what is due, in a thread, twice a second. Only the first request of a caller that
has been quiet, or one that wants more than was foreseen, waits for a round of its own: some
milliseconds, and never longer than `WAIT_S`, whatever the store does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from nearfield.api.keys import Principal
from nearfield.core.errors import Unavailable
from nearfield.policy.quota import (
    RENEW_S,
    UNBOUNDED,
    Claim,
    Dimension,
    Grant,
    Lack,
    Reservation,
    Share,
    rate_limit_headers,
    refusal,
    reserve,
)
from nearfield.store.ports import Quotas

log = logging.getLogger("nearfield.store")

WAIT_S = 0.5
"""Longest wait of a request for its share."""
ROUND_S = 1.0
"""Longest wait of a round for the store: shares are leased for three times as long."""
SWEEP_S = 600.0

_Waiter = tuple[int, "asyncio.Future[None]"]


class ShareKeeper:
    """Reserves for requests. One event loop's property.

    async with ShareKeeper(store.quotas) as keeper:
        reservation = keeper.reserve_now(principal, tokens=500, stream=True)  # no await
        reservation = await keeper.reserve(principal, tokens=500, stream=True)
        …
        reservation.settle(tokens_really_used)
    """

    def __init__(
        self,
        quotas: Quotas,
        *,
        renew_s: float = RENEW_S,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quotas = quotas
        self._renew_s = renew_s
        self._wait_s = wait_s
        self._clock = clock
        self._name = secrets.token_hex(6)
        self._terms = 0
        self._sharers = 1
        self._shares: dict[tuple[str, Dimension], Share] = {}
        self._of_caller: dict[str, tuple[Principal, list[Share]]] = {}
        self._waiting: dict[Share, list[_Waiter]] = {}
        self._wanted = asyncio.Event()
        self._swept_s = clock()
        self._thread = ThreadPoolExecutor(1, "nearfield-quotas")
        self._asking: asyncio.Future[list[Grant]] | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="quotas")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back what is not spent, if the store answers."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        held = [share for share in self._shares.values() if share.available(self._clock()) > 0]
        for share in held:
            share.retire()
        await self._renew(held)
        self._thread.shutdown(wait=False)

    # ---- a request's part ----

    def reserve_now(self, principal: Principal, *, tokens: int, stream: bool) -> Reservation | Lack:
        """Reserve from memory. A `Lack` may be made good by `reserve`."""
        if not principal.limits:
            return UNBOUNDED
        return reserve(self._of(principal), self._clock(), tokens=tokens, stream=stream)

    async def reserve(self, principal: Principal, *, tokens: int, stream: bool) -> Reservation:
        """Reserve; asks the store where memory has too little.

        Raises:
            RateLimited: it is used up; the error says what, and when to come back.
        """
        until_s = self._clock() + self._wait_s
        while True:
            done = self.reserve_now(principal, tokens=tokens, stream=stream)
            if isinstance(done, Reservation):
                return done
            now_s = self._clock()
            if not done.share.may_get(done.needed, now_s):
                raise refusal(done, now_s)
            await self._ask(done, until_s - now_s)

    def headers(self, principal: Principal) -> list[tuple[bytes, bytes]]:
        """The rate-limit headers for this caller's answer."""
        if not principal.limits:
            return []
        return rate_limit_headers(self._of(principal), self._clock())

    def _of(self, principal: Principal) -> Sequence[Share]:
        known = self._of_caller.get(principal.key_id)
        if known is not None and known[0] is principal:
            return known[1]
        now_s = self._clock()
        shares: list[Share] = []
        for subject, limits in principal.limits:
            for dimension in limits.bounded:
                limit = limits.of(dimension)
                assert limit is not None
                share = self._shares.get((subject, dimension))
                if share is None:
                    share = Share(subject, dimension, limit, now_s=now_s, sharers=self._sharers)
                    self._shares[subject, dimension] = share
                shares.append(share)
        self._of_caller[principal.key_id] = (principal, shares)
        return shares

    async def _ask(self, lack: Lack, timeout_s: float) -> None:
        """Wait for the next round; after `timeout_s` go on as if the store were gone."""
        answered = asyncio.get_running_loop().create_future()
        waiter = (lack.needed, answered)
        self._waiting.setdefault(lack.share, []).append(waiter)
        self._wanted.set()
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await answered
        except TimeoutError:
            lack.share.earn(self._clock())
            if lack.share.offline_since_s is None:
                raise refusal(lack, self._clock()) from None
        finally:
            waiters = self._waiting.get(lack.share, [])
            if waiter in waiters:
                waiters.remove(waiter)

    # ---- rounds ----

    async def _run(self) -> None:
        next_s = self._clock() + self._renew_s
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, next_s - self._clock())):
                    await self._wanted.wait()
            self._wanted.clear()
            try:
                if self._clock() >= next_s:
                    next_s = self._clock() + self._renew_s
                    now_s = self._clock()
                    await self._renew([s for s in self._shares.values() if s.due(now_s)])
                    self._forget_idle()
                    await self._sweep()
                elif self._waiting:
                    await self._renew([])
            except Exception:
                # A mistake of ours must not end the rounds: the next one may do.
                log.exception("the quotas could not be renewed")

    async def _renew(self, due: Sequence[Share]) -> None:
        """One round for the shares that are due and those that requests wait for."""
        waiting, self._waiting = self._waiting, {}
        asked_s = self._clock()
        shares = list(dict.fromkeys([*due, *waiting]))
        claims = []
        for share in shares:
            self._terms += 1
            needed = [amount for amount, answered in waiting.get(share, []) if not answered.done()]
            holder = f"{self._name}-{self._terms}"
            claims.append(share.claim(asked_s, holder=holder, waiting=needed))
        if not claims:
            return
        try:
            grants = await self._call(claims)
        except (Unavailable, TimeoutError):
            for share in shares:
                share.earn(self._clock())
        else:
            for share, claim, grant in zip(shares, claims, grants, strict=True):
                share.accept(claim, grant, asked_s=asked_s)
                self._sharers = max(grant.sharers, 1)
        finally:
            for waiters in waiting.values():
                for _, answered in waiters:
                    if not answered.done():
                        answered.set_result(None)

    async def _call(self, claims: Sequence[Claim]) -> Sequence[Grant]:
        """Ask the store, one round at a time; what comes too late is as good as lost.

        Raises:
            Unavailable, TimeoutError: no answer.
        """
        if self._asking is not None and not self._asking.done():
            raise TimeoutError  # the round before still waits
        self._asking = asyncio.get_running_loop().run_in_executor(
            self._thread, self._quotas.renew, claims
        )
        self._asking.add_done_callback(_seen)
        async with asyncio.timeout(ROUND_S):
            return await asyncio.shield(self._asking)

    def _forget_idle(self) -> None:
        for share in [share for share in self._shares.values() if share.idle]:
            if share not in self._waiting:
                self._forget(share)

    def _forget(self, share: Share) -> None:
        self._shares.pop((share.subject, share.dimension), None)
        self._of_caller.clear()  # made again as they come

    async def _sweep(self) -> None:
        if self._clock() < self._swept_s + SWEEP_S:
            return
        self._swept_s = self._clock()
        with contextlib.suppress(Unavailable):
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._thread, self._quotas.sweep)


def _seen(asking: asyncio.Future[list[Grant]]) -> None:
    """Nobody may be waiting any more for what went wrong."""
    if not asking.cancelled():
        asking.exception()
