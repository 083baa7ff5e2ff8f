"""The adaptive limit before a server that queues: it finds the server's size, and keeps its queue
short whatever is offered."""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from nearfield.policy.limit import SLACK_S, Limit, Window, full

PREFILL_S, HOLD_S = 0.05, 0.5


@dataclass
class Outcome:
    offered: list[int] = field(default_factory=lambda: [0, 0, 0])
    admitted: list[int] = field(default_factory=lambda: [0, 0, 0])
    first_token_s: list[float] = field(default_factory=list)
    finished: int = 0
    limit: Limit = field(default_factory=Limit)

    def quantile_s(self, q: float) -> float:
        """Of the times to the first token in the second half."""
        return sorted(self.first_token_s)[int(q * len(self.first_token_s))]


def serve(
    slots: int,
    load: float,
    seconds: float,
    *,
    limit: Limit | None = None,
    slower: float = 1.0,
    critical: float = 0.2,
    seed: int = 1,
) -> Outcome:
    """An open-loop stream to `slots` of 0.5 s a request; windows as the gateway makes them."""
    rng = random.Random(seed)
    got = Outcome(limit=limit or Limit())
    rate_rps = load * slots / (HOLD_S * slower)
    waiting: deque[float] = deque()
    events: list[tuple[float, int]] = [(0.0, 0)]
    busy = in_flight = peak = 0
    window: list[float] = []
    window_s = 0.0

    def start(now_s: float, came_s: float) -> None:
        nonlocal busy, peak, window, window_s
        busy += 1
        heapq.heappush(events, (now_s + slower * rng.expovariate(1 / HOLD_S), 1))
        window.append(now_s - came_s + slower * PREFILL_S * rng.uniform(0.7, 1.3))
        if now_s > seconds / 2:
            got.first_token_s.append(window[-1])
        if full(len(window), now_s - window_s):
            got.limit = got.limit.learn(Window(sorted(window)[len(window) // 2], peak))
            window, window_s, peak = [], now_s, in_flight

    while events[0][0] < seconds:
        now_s, kind = heapq.heappop(events)
        if kind == 1:
            busy -= 1
            in_flight -= 1
            got.finished += now_s > seconds / 2
            if waiting:
                start(now_s, waiting.popleft())
            continue
        heapq.heappush(events, (now_s + rng.expovariate(rate_rps), 0))
        criticality = 0 if rng.random() < critical else rng.choice([1, 2])
        got.offered[criticality] += 1
        if in_flight >= got.limit.room(criticality):
            continue
        got.admitted[criticality] += 1
        in_flight += 1
        peak = max(peak, in_flight)
        if busy < slots:
            start(now_s, now_s)
        else:
            waiting.append(now_s)
    return got


def use(got: Outcome, slots: int, seconds: float, slower: float = 1.0) -> float:
    """Share of the server's capacity that did finished work, in the second half."""
    return got.finished * HOLD_S * slower / (slots * seconds / 2)


@pytest.mark.parametrize("slots", [4, 16, 64])
@pytest.mark.parametrize("load", [1.5, 4.0])
def test_overload_keeps_the_server_busy_and_the_queue_short(slots: int, load: float) -> None:
    got = serve(slots, load, 240)
    assert use(got, slots, 240) > 0.9
    # Unbounded, the mean would be past 20 s.
    assert got.quantile_s(0.5) < 2.0 * SLACK_S
    assert got.quantile_s(0.99) < 5 * SLACK_S


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_what_the_server_can_do_is_not_refused(load: float) -> None:
    got = serve(64, load, 120)
    assert got.admitted == got.offered


def test_a_burst_that_the_queue_takes_is_not_refused() -> None:
    """A hundred at once, of whom the last waits for three seconds, and then quiet."""
    quiet = serve(16, 0.3, 60).limit
    assert quiet.room(2) > 100


def test_the_critical_are_shed_last() -> None:
    got = serve(32, 2.0, 240)
    shares = [a / o for a, o in zip(got.admitted, got.offered, strict=True)]
    assert shares[0] > 0.95
    assert shares[0] > shares[1] > shares[2]
    assert shares[2] < 0.3


def test_a_server_that_became_slower_for_good_is_used_again() -> None:
    """Twenty times the time without any queue is no overload, and is found out."""
    before = serve(16, 2.0, 120).limit
    got = serve(16, 2.0, 6000, limit=before, slower=20.0)
    assert use(got, 16, 6000, slower=20.0) > 0.85
    back = serve(16, 2.0, 300, limit=got.limit)
    assert use(back, 16, 300) > 0.9
    assert back.quantile_s(0.5) < 2 * SLACK_S


def test_a_limit_first_met_in_overload_finds_the_baseline() -> None:
    """The first windows already hold a queue: it must not be taken for normal."""
    queued = Limit(baseline_s=3.0)
    got = serve(16, 4.0, 300, limit=queued)
    assert got.quantile_s(0.5) < 3 * SLACK_S
