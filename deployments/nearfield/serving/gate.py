"""Admission: at most so many requests inside the engine, so many behind them, the rest refused.

A request takes a `Place` before its body is read, so that a refusal costs nothing, waits for its
`turn`, and gives the place back on every way out. Turns go round (`policy.fair`): who sends much
waits behind itself, and within one flow the order is that of arrival.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Self

from nearfield.core.errors import RateLimited
from nearfield.policy.fair import FairQueue

SMOOTHING = 0.1
"""Weight of the newest service time in the mean that Retry-After is computed from."""
MAX_RETRY_AFTER_S = 60.0
WAITS_S = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Requests that waited longer for their turn are counted, for each of these."""


class Gate:
    """Counts the requests of one replica. One event loop's property."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.running = 0
        self._request_s = self._busy_s = 0.0
        self._counted_s = time.monotonic()  # up to when those two hold
        self._taken = 0
        self._arrived = self._refused = 0
        self._waited = [0] * len(WAITS_S)
        self._max_running = max_running
        self._max_queued = max_queued
        self._queue: FairQueue[Place] = FairQueue()
        self._service_s = 0.0

    @property
    def waiting(self) -> int:
        """Requests that hold a place and are not inside the engine."""
        return self._taken - self.running

    @property
    def room(self) -> int:
        """Places that are left."""
        return self._max_running + self._max_queued - self._taken

    @property
    def queue_age_s(self) -> float:
        """How long the oldest request in the queue has waited for its turn."""
        since = [place.queued_s for place in self._queue if place.queued_s is not None]
        return time.monotonic() - min(since) if since else 0.0

    def totals(self) -> dict[str, float]:
        """What scaling goes by. Those called `_total` only grow: requests that came, were refused,
        and had waited longer for their turn than each of `WAITS_S`."""
        waits = zip(WAITS_S, self._waited, strict=True)
        return {
            "arrived_total": self._arrived,
            "refused_total": self._refused,
            **{f"waited_{wait_s:g}_total": count for wait_s, count in waits},
        }

    def inside(self) -> tuple[float, float]:
        """Time that requests have spent inside the engine, and time with any inside; seconds."""
        self._count()
        return self._request_s, self._busy_s

    def _count(self) -> None:
        """To be called before `running` changes."""
        now_s = time.monotonic()
        elapsed_s, self._counted_s = now_s - self._counted_s, now_s
        if self.running:
            self._request_s += self.running * elapsed_s
            self._busy_s += elapsed_s

    def place(self, queue_share: float = 1.0) -> Place:
        """Take a place; leave its `with` block to give it back.

        Args:
            queue_share: of the queue that this caller may fill (`policy.endpoints.QUEUE_SHARES`).

        Raises:
            RateLimited: all are taken; `retry_after_s` is when one is likely to be free.
        """
        self._arrived += 1
        if self._taken >= self._max_running + int(queue_share * self._max_queued):
            self._refused += 1
            raise RateLimited(
                f"The model is busy: {self._taken} requests are running or waiting here. "
                "Send the request again later.",
                retry_after_s=self._relief_s(),
            )
        self._taken += 1
        return Place(self)

    def _relief_s(self) -> float:
        """When the requests now waiting will be inside, at the recent pace."""
        expected_s = self._service_s * max(1, self.waiting) / self._max_running
        return float(min(MAX_RETRY_AFTER_S, max(1, math.ceil(expected_s))))

    async def _enter(self, place: Place, flow: str, cost: float) -> None:
        self._queue.push(place, flow, cost)
        if self.running < self._max_running:
            self._queue.pop()  # nobody else waits; and its flow has had this
            self._count()
            self.running += 1
        else:
            place.queued_s = time.monotonic()
            place.called = asyncio.get_running_loop().create_future()
            await place.called  # whoever leaves hands its turn over
            waited_s = time.monotonic() - place.queued_s
            for i, wait_s in enumerate(WAITS_S):
                self._waited[i] += waited_s > wait_s
        place.entered_s = time.monotonic()

    def _leave(self, place: Place) -> None:
        self._taken -= 1
        called = place.called
        if place.entered_s is not None:
            took_s = time.monotonic() - place.entered_s
            self._service_s += (took_s - self._service_s) * (SMOOTHING if self._service_s else 1)
        elif called is None:
            return  # never asked for its turn
        elif not called.done() or called.cancelled():
            self._queue.remove(place)
            return
        self._count()
        self.running -= 1
        while self.running < self._max_running and (following := self._queue.pop()) is not None:
            assert following.called is not None
            if not following.called.done():
                self.running += 1
                following.called.set_result(None)


class Place:
    """One request's right to wait and then to run. See `Gate.place`."""

    __slots__ = ("_gate", "_released", "called", "entered_s", "queued_s")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._released = False
        self.called: asyncio.Future[None] | None = None
        self.queued_s: float | None = None
        self.entered_s: float | None = None

    async def turn(self, flow: str = "", cost: float = 1.0) -> None:
        """Wait until there is room inside the engine, and it is this flow's turn.

        Args:
            cost: of this request, in the same unit as of all others; above 0.
        """
        await self._gate._enter(self, flow, cost)

    def release(self) -> None:
        """Give the place back. May be called again."""
        if not self._released:
            self._released = True
            self._gate._leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
