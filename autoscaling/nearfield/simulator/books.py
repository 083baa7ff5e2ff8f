"""What came out: counts, latencies, costs and decisions; and what must be true at every moment.

Counts are whole requests in both modes. At any time, of each class of callers,

    arrived = done + refused + expired + lost + in flight

`expired` waited beyond its deadline, `lost` was in a replica or came through a gateway that died
and could not be sent again. Each of those is late, whatever its time would have been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

GROWTH = 1.02
"""Width of a bin: a quantile is right to 1 %."""
LEAST_S = 1e-5
_SCALE = 1.0 / math.log(GROWTH)
_SHIFT = -math.log(LEAST_S) * _SCALE


class InvariantError(AssertionError):
    """What must be true is not: a mistake in the simulator or the policy, never in a scenario."""


class Histogram:
    """Times, in bins that grow."""

    __slots__ = ("bins", "count", "total_s")

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.count = 0
        self.total_s = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        place = int(math.log(seconds) * _SCALE + _SHIFT) if seconds > LEAST_S else 0
        bins = self.bins
        bins[place] = bins.get(place, 0) + count
        self.count += count
        self.total_s += seconds * count

    def merge(self, other: Histogram) -> None:
        for place, count in other.bins.items():
            self.bins[place] = self.bins.get(place, 0) + count
        self.count += other.count
        self.total_s += other.total_s

    def quantile(self, q: float) -> float | None:
        """Seconds; None of nothing."""
        if not self.count:
            return None
        wanted, seen = q * self.count, 0
        for place in sorted(self.bins):
            here = self.bins[place]
            if seen + here >= wanted:
                inside = min(1.0, max(0.0, (wanted - seen) / here))
                return float(LEAST_S * GROWTH ** (place + inside))
            seen += here
        return float(LEAST_S * GROWTH ** (max(self.bins) + 1))

    @property
    def mean_s(self) -> float | None:
        return self.total_s / self.count if self.count else None


@dataclass(slots=True)
class Window:
    """What one class of callers saw in a window. By when a request came, or ended."""

    arrived: int = 0
    ended: int = 0
    late: int = 0
    ttft: Histogram = field(default_factory=Histogram)


class Tally:
    """Counts of one class of callers from one place.

    Attributes:
        replayed: sent again after their replica died. spilled: answered elsewhere than first meant.
        abroad: answered in another region than the nearest gateway's.
        reasons: of those refused.
    """

    __slots__ = (
        "_end_s", "_window", "_window_s", "abroad", "arrived", "done", "expired", "late", "lost",
        "reasons", "refused", "replayed", "slo_total_s", "slo_ttft_s", "total", "windows",
    )  # fmt: skip

    def __init__(self, window_s: float, slo_ttft_s: float, slo_total_s: float) -> None:
        self._window_s = window_s
        self.slo_ttft_s = slo_ttft_s
        self.slo_total_s = slo_total_s
        self.arrived = self.done = self.refused = self.expired = self.lost = 0
        self.late = self.replayed = self.abroad = 0
        self.reasons: dict[str, int] = {}
        self.total = Histogram()
        self.windows: dict[int, Window] = {}
        self._window = self.windows.setdefault(0, Window())
        self._end_s = window_s

    def window(self, now_s: float) -> Window:
        if now_s >= self._end_s:
            index = int(now_s / self._window_s)
            self._window = self.windows.setdefault(index, Window())
            self._end_s = (index + 1) * self._window_s
        return self._window

    def came(self, now_s: float, count: int = 1) -> None:
        self.arrived += count
        window = self._window if now_s < self._end_s else self.window(now_s)
        window.arrived += count

    def answered(self, ttft_s: float, total_s: float, now_s: float, count: int = 1) -> None:
        self.done += count
        window = self._window if now_s < self._end_s else self.window(now_s)
        window.ended += count
        window.ttft.add(ttft_s, count)
        self.total.add(total_s, count)
        if ttft_s > self.slo_ttft_s or total_s > self.slo_total_s:
            self.late += count
            window.late += count

    def failed(self, how: str, now_s: float, count: int = 1, reason: str = "") -> None:
        """`how`: refused, expired or lost."""
        setattr(self, how, getattr(self, how) + count)
        if reason:
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.late += count
        window = self.window(now_s)
        window.ended += count
        window.late += count

    def adds_up(self) -> bool:
        """Whether the windows tell of the same requests."""
        windows = self.windows.values()
        counts = [(w.arrived, w.ended, w.late, w.ttft.count) for w in windows]
        sums = tuple(sum(column) for column in zip(*counts, strict=True))
        return sums == (self.arrived, self.ended, self.late, self.done) and (
            self.total.count == self.done
        )

    @property
    def ended(self) -> int:
        return self.done + self.refused + self.expired + self.lost


@dataclass(frozen=True, slots=True)
class Change:
    """A decision that changed a target, or something that happened."""

    at_s: float
    kind: str
    region: str
    subject: str
    reason: str
    targets: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def plain(self) -> dict[str, object]:
        shown: dict[str, object] = {
            "at_s": round(self.at_s, 3),
            "kind": self.kind,
            "region": self.region,
            "subject": self.subject,
            "reason": self.reason,
        }
        if self.targets:
            shown["targets"] = {name: list(pair) for name, pair in self.targets.items()}
        return shown


@dataclass(frozen=True, slots=True)
class Sample:
    """A pool at the end of a window: means over it, and what it has cost so far."""

    ready: float
    starting: float
    draining: float
    usd: float


def merged(tallies: Iterable[Tally]) -> tuple[Histogram, Histogram]:
    """Times to the first token and to the end, of all of them."""
    ttft, total = Histogram(), Histogram()
    for tally in tallies:
        total.merge(tally.total)
        for window in tally.windows.values():
            ttft.merge(window.ttft)
    return ttft, total
