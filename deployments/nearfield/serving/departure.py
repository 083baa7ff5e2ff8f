"""A replica whose machine will be taken away: takes nothing new, and ends what it has in time.

Ray drains the machine's node before it goes (`nearfield notices`, `ray drain-node`, a node
autoscaler), and Serve starts another replica elsewhere. What Serve does not do is stop sending
here, or end a stream before the machine is off. `follow` hears of the drain; `Departure` is what
the replica's routes go by.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nearfield.core.errors import Unavailable

log = logging.getLogger("nearfield.replica")

POLL_S = 0.5
"""How often the cluster is asked: the notice of a cloud is 30 s or more, refusal is due in one."""
LAST_WORD_S = 2.0
"""Before the machine goes, for the errors of what is not finished to get out."""
RETRY_AFTER_S = 1.0
LEAVES, STARTED = "leaves_at_s", "started_at_s"
"""What replicas tell scaling, as Unix time: when they will be gone (0: they stay, `LATER_S`: not
said), and since when they are there."""
LATER_S = 4e9

Leaving = Callable[[], Mapping[str, float]]
"""Nodes that are drained, by id, and when they will be gone: Unix time, infinite where not said."""


class Departure:
    """Whether and when this replica goes. One event loop's property.

    Attributes:
        due_s: when its machine will be gone, Unix time; infinite: not said. None: it stays.
    """

    def __init__(self, drain_s: float) -> None:
        """
        Args:
            drain_s: how long a stopping replica may finish what it accepted.
        """
        self.due_s: float | None = None
        self._drain_s = drain_s
        self._ends_s = math.inf  # on time.monotonic()
        self._running: set[asyncio.Timeout] = set()

    def announce(self, due_s: float) -> None:
        """The machine will be gone then. May be called again: the first word on when to end holds.

        What runs ends after `drain_s`, as Serve may stop the replica from now on and kills it
        after that; earlier where the machine goes earlier.
        """
        if self.due_s is None:
            left_s = min(self._drain_s, due_s - time.time() - LAST_WORD_S)
            self._ends_s = time.monotonic() + max(0.0, left_s)
            for timeout in self._running:
                self._hasten(timeout)
        self.due_s = due_s

    def withdraw(self) -> None:
        """It stays after all. What runs keeps the end it was given."""
        self.due_s, self._ends_s = None, math.inf

    def require_staying(self) -> None:
        """
        Raises:
            Unavailable: it goes; the request was not begun, and is welcome elsewhere.
        """
        if self.due_s is not None:
            raise Unavailable(
                "This replica's machine is being taken away. Send the request again: others take "
                "over.",
                code="draining",
                retry_after_s=RETRY_AFTER_S,
            )

    @contextmanager
    def ending(self, timeout: asyncio.Timeout) -> Iterator[None]:
        """A request runs under this timeout, which comes sooner if the replica goes."""
        self._running.add(timeout)
        self._hasten(timeout)
        try:
            yield
        finally:
            self._running.discard(timeout)

    def interrupted(self) -> Unavailable | None:
        """The error of a request that has just been timed out; None: its own deadline was it."""
        if time.monotonic() < self._ends_s - 0.01:
            return None
        return Unavailable(
            "The machine of this replica was taken away before the answer was complete. Send the "
            "request again: others have taken over.",
            code="interrupted",
            retry_after_s=RETRY_AFTER_S,
        )

    def _hasten(self, timeout: asyncio.Timeout) -> None:
        if math.isinf(self._ends_s):
            return
        ends_s = asyncio.get_running_loop().time() + self._ends_s - time.monotonic()
        when_s = timeout.when()
        if when_s is None or ends_s < when_s:
            timeout.reschedule(ends_s)


async def follow(departure: Departure, node_id: str, leaving: Leaving) -> None:
    """Tell `departure` when this node is drained, for as long as this runs.

    Args:
        leaving: asks the cluster; it may block, and raise RuntimeError.
    """
    while True:
        try:
            due_s = (await asyncio.to_thread(leaving)).get(node_id)
        except RuntimeError as error:  # the cluster's head is away: what was known holds
            log.debug("which nodes are drained is not known: %s", error)
        else:
            if due_s is not None:
                if departure.due_s is None:
                    log.warning("this node is drained: no more requests are taken here")
                departure.announce(due_s)
            elif departure.due_s is not None:
                log.warning("this node is drained no more")
                departure.withdraw()
        await asyncio.sleep(POLL_S)
