"""Whether this process stood still a moment ago: it was stopped, or its machine was.

What lies in its sockets then was sent to another time: the callers may have left, and that they
have is told behind it. Who starts work waits until that has been read, too: a deadline that is
given as so many milliseconds begins when a request is read, however long ago it was sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

LATE_S = 1.0
"""A timer that fires so much too late. Busy loops are late, too, but not by so much."""
TICK_S = 0.5
SETTLE_S = 0.25
"""How long what was sent meanwhile is read before any of it is begun."""


class Loop(Protocol):
    """The part of an event loop that is needed."""

    def time(self) -> float: ...
    def call_later(self, delay: float, callback: Callable[[], None], /) -> object: ...


class Standstill:
    """Of one event loop."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ticked_s = self._settled_s = self._loop.time()
        self._loop.call_later(TICK_S, self._tick)

    def wait_s(self) -> float:
        """How long to wait before what has just been read is begun; nearly always 0."""
        now_s = self._loop.time()
        self._look(now_s)
        return max(0.0, self._settled_s - now_s)

    def _tick(self) -> None:
        now_s = self._loop.time()
        self._look(now_s)
        self._ticked_s = now_s
        self._loop.call_later(TICK_S, self._tick)

    def _look(self, now_s: float) -> None:
        # Before the timer fires, too: what is read first after a standstill comes before it.
        if now_s - self._ticked_s > TICK_S + LATE_S:
            self._ticked_s = now_s
            self._settled_s = now_s + SETTLE_S
