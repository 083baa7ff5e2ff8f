"""How much work comes, how evenly, and what capacity it would have needed: measured, no forecast.

Work that came is kept in bins of five seconds. From them:

- the *level*: mean rate over the longest of a few windows that agrees with the shorter ones. In
  calm times it is long and steady; after a jump it is short and quick (the idea of ADWIN: Bifet and
  Gavaldà, "Learning from time-changing data with adaptive windowing", SDM 2007);
- the *need*: the least capacity with which no queue would have grown past the allowed wait, the
  largest of `work in a window / (window + allowed wait)` (the leaky bucket read backwards:
  Cruz, "A calculus for network delay", IEEE Trans. Inf. Theory 1991);
- the *noise*: how far the rate of a short window is off by chance. It falls with the square root of
  the load: the whole of square-root staffing (Halfin and Whitt, "Heavy-traffic limits for queues
  with many exponential servers", Operations Research 1981) until errors have been measured.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

BIN_S = 5.0
WINDOWS = (3, 6, 12, 24, 48)
"""Windows of the level, in bins: 15 s to 4 min."""
NEED_WINDOWS = (1, 2, 3, 6, 12, 24)
"""Windows of the need: 5 s to 2 min."""
PEAK = 12
"""Bins in which the peak is looked for: a minute."""
KEPT = WINDOWS[-1]
AGREE = 3.0
"""Two windows disagree when their means differ by more standard errors."""
UNEVEN_S = 1800.0
"""Time over which the unevenness is averaged."""
HOLE_S = 600.0
"""After a longer time without signals all is forgotten: it was another time."""


class Demand(NamedTuple):
    """What came lately. `Demand()` knows nothing.

    Attributes:
        open_s: when the open bin began. seen_s: up to when the work is known.
        open_work: work in it so far.
        bins: work of the last full bins, the newest last.
        variance: of the work in a second, from differences of neighbouring windows.
        closed: full bins seen in all.
    """

    open_s: float = -math.inf
    seen_s: float = -math.inf
    open_work: float = 0.0
    bins: tuple[float, ...] = ()
    variance: float = 0.0
    closed: int = 0

    def observe(self, now_s: float, work: float, last_s: float) -> Demand:
        """With the work that came between `last_s` and now, spread evenly over that time.

        What came between the last time and `last_s` nobody saw: it was as before.
        """
        if now_s - self.seen_s > HOLE_S:
            return Demand(open_s=now_s, seen_s=now_s)
        found = self._until(last_s, self.level) if last_s > self.seen_s else self
        return found._until(now_s, work / (now_s - last_s) if now_s > last_s else 0.0)

    def _until(self, now_s: float, rate: float) -> Demand:
        found = self
        while now_s >= found.open_s + BIN_S:
            end_s = found.open_s + BIN_S
            came = rate * (end_s - found.seen_s)
            found = found._closed(found.open_work + came, end_s)
        came = rate * (now_s - found.seen_s)
        return found._replace(open_work=found.open_work + came, seen_s=now_s)

    def _closed(self, work: float, end_s: float) -> Demand:
        bins = (*self.bins[1 - KEPT :], work)
        variance, short = self.variance, WINDOWS[0]
        closed = self.closed + 1
        if closed % short == 0 and len(bins) >= 2 * short:
            sum_a, sum_b = sum(bins[-short:]), sum(bins[-2 * short : -short])
            seen = (sum_a - sum_b) ** 2 / (2.0 * short * BIN_S)
            gain = max(short * BIN_S / UNEVEN_S, 2.0 * short / closed)
            variance += min(1.0, gain) * (seen - variance)
        return Demand(end_s, end_s, 0.0, bins, variance, closed)

    @property
    def level(self) -> float:
        """Work a second that comes now; 0.0 with no bin full."""
        bins = self.bins
        if not bins:
            return 0.0
        length = min(WINDOWS[0], len(bins))
        total = sum(bins[-length:])
        for longer in WINDOWS[1:]:
            if longer > len(bins):
                break
            rest = sum(bins[-longer:-length])
            extra = longer - length
            error = math.sqrt(self.variance * (1.0 / length + 1.0 / extra) / BIN_S)
            if abs(total / length - rest / extra) / BIN_S > AGREE * error:
                break
            total += rest
            length = longer
        return total / (length * BIN_S)

    @property
    def peak(self) -> float:
        """The busiest ten seconds of the last minute, work a second; 0.0 with no bin full."""
        last = self.bins[-PEAK:]
        if len(last) < 2:
            return sum(last) / BIN_S
        return max(a + b for a, b in pairwise(last)) / (2 * BIN_S)

    def need(self, wait_s: float) -> float:
        """Work a second that would have had to be done for nobody to wait longer until now."""
        bins = self.bins
        most, total, position = 0.0, 0.0, 0
        for length in NEED_WINDOWS:
            if length > len(bins):
                break
            while position < length:
                position += 1
                total += bins[-position]
            most = max(most, total / (length * BIN_S + wait_s))
        return most

    def noise(self, over_s: float) -> float:
        """Standard deviation of the mean rate over so many seconds, as a share of the level."""
        level = self.level
        return math.sqrt(self.variance / over_s) / level if level > 0.0 else 0.0
