"""What is in one pool in the fluid mode, and how long those wait who come to it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from nearfield.policy.limit import Limit
from nearfield.simulator.fleet import Pool
from nearfield.simulator.parts import Gateway, Source

HALVES = 2
"""Stages of an answer: lengths vary less than exponentially."""
BALANCED, CLUMPED = 0.7, 0.6
"""How much a request still meets where many replicas could have it: of prompts that are being
computed, and of the clump it comes in. Fitted to the events mode."""
MOST_BUSY = 0.97
"""Largest utilisation a steady state is reckoned for: beyond, the backlog itself is followed."""


class Packet:
    """Requests that are treated alike.

    Attributes:
        came_s: at the gateway. lag_s: what they have lost before they were sent.
    """

    __slots__ = ("answer", "came_s", "count", "gateway", "lag_s", "prompt", "rtt_s", "source")

    def __init__(
        self,
        source: Source,
        gateway: Gateway,
        count: int,
        came_s: float,
        prompt: int,
        answer: int,
    ) -> None:
        self.source = source
        self.gateway = gateway
        self.count = count
        self.came_s = came_s
        self.prompt = prompt
        self.answer = answer
        self.lag_s = 0.0
        self.rtt_s = 0.0

    def part(self, count: int) -> Packet:
        """So many of them, as a packet of their own."""
        part = Packet(self.source, self.gateway, count, self.came_s, self.prompt, self.answer)
        part.lag_s, part.rtt_s = self.lag_s, self.rtt_s
        return part


class Cohort:
    """Requests in service, and what their times will be told as."""

    __slots__ = ("count", "packet", "total_s", "ttft_s")

    def __init__(self, packet: Packet, count: int, ttft_s: float, total_s: float) -> None:
        self.packet = packet
        self.count = count
        self.ttft_s = ttft_s
        self.total_s = total_s


class Flow:
    """What is in one pool.

    Attributes:
        queue: packets without a place, queued requests in all. cohorts: those in service, the
            oldest first, inside requests in all.
        prompts, halves: of those inside, whose prompt or which half of whose answer is being
            computed: not whole numbers.
        cv2, prompt2: of arrivals, and the mean square of prompts' lengths, lately. rate_rps: at
            which requests begin, lately. limit: what a replica is sent at most.
        seen: requests that gateways believe to be there. done: those that ended in the last tick.
    """

    __slots__ = (
        "cohorts", "cv2", "done", "halves", "inside", "limit", "pool", "prompt2", "prompts",
        "queue", "queued", "rate_rps", "seen",
    )  # fmt: skip

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.queue: deque[Packet] = deque()
        self.queued = 0
        self.cohorts: deque[Cohort] = deque()
        self.inside = 0
        self.prompts = 0.0
        self.halves = [0.0] * HALVES
        self.cv2 = 1.0
        self.prompt2 = pool.prompt**2
        self.rate_rps = 0.0
        self.limit = Limit()
        self.seen = 0.0
        self.done = 0

    @property
    def load(self) -> int:
        return self.queued + self.inside

    @property
    def answers(self) -> float:
        return sum(self.halves)

    def shrink(self, count: int) -> None:
        """So many of those inside are gone, from all stages alike."""
        keep = 1.0 - count / self.inside
        self.prompts *= keep
        self.halves = [half * keep for half in self.halves]
        self.inside -= count


def median(weighted: list[tuple[float, int]]) -> float:
    weighted.sort()
    half = sum(count for _, count in weighted) / 2
    for value, count in weighted:
        half -= count
        if half <= 0:
            return value
    return weighted[-1][0]


def turn_s(busy: float, servers: int, service_s: float, cv2: float, work_cv2: float) -> float:
    """How long a prompt waits for its turn at its replica, in the mean.

    Whoever comes to a replica that computes a prompt waits for the rest of it: that happens in
    proportion to its utilisation, somewhat less where the choice is wide. The queue behind that is
    one of all replicas together, since a request goes where there is the least to do. With one
    server and random arrivals both add up to the formula of Pollaczek and Khinchine.
    """
    balance = BALANCED + (1.0 - BALANCED) / servers
    rest = busy * balance * (1.0 + work_cv2) / 2
    rest += CLUMPED * max(0.0, cv2 - 1.0) * busy / math.sqrt(servers)
    queue = busy ** math.sqrt(2.0 * (servers + 1.0)) / (servers * (1.0 - busy))
    return float(service_s * (rest + queue * (cv2 + work_cv2) / 2))


def steady(busy: float, servers: float, service_s: float, spread: float) -> tuple[float, float]:
    """(share of requests that wait, how long those do in the mean, seconds).

    Args:
        busy: utilisation. spread: mean of the squared variations of gaps and of service.
    """
    busy = min(busy, MOST_BUSY)
    share = float(busy ** (math.sqrt(2.0 * (servers + 1.0)) - 1.0)) if busy > 0.0 else 0.0
    return share, max(0.0, spread) * service_s / (servers * (1.0 - busy))


def drawn(wait: tuple[float, float], draw: Callable[[], float]) -> float:
    share, mean_s = wait
    return -math.log(1.0 - draw()) * mean_s if share > 1e-4 and draw() < share else 0.0
