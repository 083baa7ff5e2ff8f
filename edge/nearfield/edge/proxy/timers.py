"""Timers for things that nearly always finish long before they are due.

A loop timer costs a request about as much as all its header checks. Here an entry is only put
into a set; once a second the set is looked through, and what is due before the next look gets a
timer of its own, to the millisecond. Moving a due time later is an assignment.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

LOOK_S = 1.0


class Timed(Protocol):
    """Something that is due at some time. `timer` belongs to `Timers`."""

    due_s: float
    timer: asyncio.TimerHandle | None

    def on_due(self, now_s: float) -> None:
        """It is past `due_s`. Still watched afterwards, if it wants to set another `due_s`."""
        ...


class Timers:
    """Watches entries of one event loop, by that loop's clock (`time.monotonic`)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: set[Timed] = set()
        self._horizon_s = loop.time() + LOOK_S
        self._look: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._watched)

    def watch(self, entry: Timed) -> None:
        """Call `entry.on_due` once `entry.due_s` has passed."""
        if self._look is None:
            self._look_around()
        self._watched.add(entry)
        if entry.due_s < self._horizon_s:
            self._arm(entry)

    def unwatch(self, entry: Timed) -> None:
        """Forget it. May be called for what is not watched."""
        self._watched.discard(entry)
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None

    def sooner(self, entry: Timed) -> None:
        """To be called when a watched entry's `due_s` was moved to an earlier time."""
        if entry.due_s < self._horizon_s and entry in self._watched:
            if entry.timer is not None:
                entry.timer.cancel()
            self._arm(entry)

    def _arm(self, entry: Timed) -> None:
        wait_s = max(0.0, entry.due_s - self._loop.time())
        entry.timer = self._loop.call_later(wait_s, self._fire, entry)

    def _fire(self, entry: Timed) -> None:
        entry.timer = None
        now_s = self._loop.time()
        if entry.due_s <= now_s + 0.001:  # the loop's clock ticks in milliseconds
            entry.on_due(now_s)
        # Moved meanwhile. One that is still due waits for the next look: never a busy loop.
        soon = now_s < entry.due_s < self._horizon_s
        if soon and entry.timer is None and entry in self._watched:
            self._arm(entry)

    def _look_around(self) -> None:
        if not self._watched and self._look is not None:
            self._look = None
            return
        self._horizon_s = self._loop.time() + 2 * LOOK_S
        for entry in [e for e in self._watched if e.timer is None and e.due_s < self._horizon_s]:
            self._arm(entry)
        self._look = self._loop.call_later(LOOK_S, self._look_around)
