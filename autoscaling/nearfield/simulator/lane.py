"""What a region's gateway knows of one pool's replicas, in the events mode."""

from __future__ import annotations

import math
from collections import deque

from nearfield.policy import health, limit
from nearfield.policy.rank import Place
from nearfield.simulator.engine import Batch, Request
from nearfield.simulator.fleet import Pool, Replica


class EventReplica(Replica):
    """A replica with a batch.

    Attributes:
        armed_s: of the earliest event that is due for it; infinite: none.
        answered: requests since it was last looked at. limit: what its gateway sends it at most;
            rooms: likewise, by criticality; times_s, window_s, peak: what that is learnt from.
    """

    __slots__ = (
        "answered", "armed_s", "batch", "lane", "limit", "peak", "rooms", "times_s", "window_s",
    )  # fmt: skip

    def __init__(self, lane: Lane, number: int, name: str, now_s: float, max_wait_s: float) -> None:
        super().__init__(lane.pool, number, name, now_s)
        self.lane = lane
        self.batch = Batch(lane.pool.timing, max_wait_s)
        self.armed_s = math.inf
        self.answered = 0
        self.limit = limit.Limit()
        self.rooms = rooms(self.limit)
        self.times_s: list[float] = []
        self.window_s = now_s
        self.peak = 0


def rooms(of: limit.Limit) -> tuple[int, ...]:
    """What it lets in, by criticality."""
    return of.room(0), of.room(1), of.room(2)


class Lane:
    """What a region's gateway knows of one pool's replicas.

    Attributes:
        own, work: requests and their tokens, by replica number.
        places: the replicas that may have requests, as the policy reads them; at_s: as of when;
            touched: a request has come or gone since.
        speeds: tokens of a request, places in a batch, tokens a second of a full replica and of one
            request alone, as of speeds_s.
        pending: requests that found no replica.
        beliefs: about the replicas, where one of them is not as it should be.
    """

    __slots__ = (
        "at_s", "beliefs", "by_number", "own", "pending", "places", "pool", "speeds", "speeds_s",
        "touched", "work",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.own: list[int] = []
        self.work: list[float] = []
        self.places: tuple[Place, ...] = ()
        self.by_number: dict[int, EventReplica] = {}
        self.at_s = -math.inf
        self.touched = True
        self.speeds_s = -math.inf
        self.speeds = (0.0, 0, 0.0, 0.0)
        self.pending: deque[Request] = deque()
        self.beliefs: health.Group | None = None


def speeds(pool: Pool) -> tuple[float, int, float, float]:
    """What a gateway has learnt of a pool's replicas: see `Lane.speeds`."""
    timing, prompt, answer = pool.timing, pool.prompt, pool.answer
    tokens = prompt + answer
    full = timing.full_rps(prompt, answer) * tokens
    alone = min(full, tokens / max(1e-9, timing.alone_s(prompt, answer)))
    return tokens, int(timing.rows(prompt, answer)), full, alone
