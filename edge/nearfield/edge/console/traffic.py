"""How much traffic went where in the last seconds, from the requests that ended in them."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from nearfield.edge.recent import Entry

TURNS: Final = 5
"""Turns (seconds) that a rate is taken over: few enough to see a failover, enough to be calm."""
MOST_TIMES: Final = 512
"""Times to the first byte kept of each turn: the last percent of five turns is 25 of them."""


@dataclass(slots=True, eq=False)
class _Turn:
    began_s: float
    ended_s: float = math.inf
    total: int = 0
    failed: int = 0
    at: Counter[str] = field(default_factory=Counter)
    times_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Flow:
    """Traffic per second over the last `seconds`; 0 of them at the very beginning.

    Attributes:
        failed_rps: those whose caller got something else than what it asked for.
        first_byte_p50_s, first_byte_p99_s: from a request's arrival; None: nothing was answered.
        at_rps: by endpoint.
    """

    seconds: float
    rps: float
    failed_rps: float
    first_byte_p50_s: float | None
    first_byte_p99_s: float | None
    at_rps: dict[str, float]


class Traffic:
    """Counts. `add` what has ended, `turn` once a second."""

    def __init__(self, now_s: float) -> None:
        self._past: deque[_Turn] = deque(maxlen=TURNS)
        self._now = _Turn(now_s)

    def add(self, entries: Iterable[Entry]) -> None:
        """These are over."""
        now = self._now
        times_s = now.times_s
        for entry in entries:
            now.total += 1
            if entry.failed:
                now.failed += 1
            elif entry.first_byte_s is not None and len(times_s) < MOST_TIMES:
                times_s.append(entry.first_byte_s - entry.started_s)
            if entry.endpoint:
                now.at[entry.endpoint] += 1

    def turn(self, now_s: float) -> None:
        """A second is over."""
        self._now.ended_s = now_s
        self._past.append(self._now)
        self._now = _Turn(now_s)

    def flow(self) -> Flow:
        """As it was in the last whole turns."""
        past = self._past
        seconds = past[-1].ended_s - past[0].began_s if past else 0.0
        if seconds <= 0.0:
            return Flow(0.0, 0.0, 0.0, None, None, {})
        at: Counter[str] = Counter()
        for turn in past:
            at.update(turn.at)
        times_s = sorted(time_s for turn in past for time_s in turn.times_s)
        return Flow(
            seconds,
            sum(turn.total for turn in past) / seconds,
            sum(turn.failed for turn in past) / seconds,
            _quantile(times_s, 0.5),
            _quantile(times_s, 0.99),
            {name: count / seconds for name, count in at.items()},
        )


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    """The least value that at least `share` of all do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
