"""What will be needed by the time that a replica asked for now serves.

    log(need in lead_s) = log(level now) + coefficients · features + error

The features say where the level stands: against its means of ten minutes and of an hour (what
jumped up often falls back), its slope, and how yesterday went on from this time of day. All
coefficients begin at 0, which is "it stays as it is", and a prior keeps them there until hours of
evidence say otherwise. They are fitted by recursive least squares with forgetting (Haykin,
"Adaptive Filter Theory", chapter on RLS). A feature without data is 0: it adds nothing and teaches
nothing. What is left as error goes to `nearfield.policy.headroom`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from nearfield.policy.headroom import TICK_S

DAY_S = 86_400.0
SLOTS = 144
"""Parts of a day whose level is remembered, ten minutes each."""
DAY_GAIN = 0.7
"""How much of a slot's memory one day replaces."""
MEANS_S = (600.0, 3600.0)
SLOPE_S = 1200.0
NAMES = ("mean of 10 min", "mean of 1 h", "slope", "time of day")
FEATURES = len(NAMES)
LARGEST = 1.5
"""Features and errors beyond this, in logs, are cut: a factor of 4.5 is an event, not a habit."""

PRIOR_VARIANCE = 0.0025
"""Of a coefficient before any evidence: 0 +- 0.05."""
NOISE = 0.1
"""Variance of one error; those of overlapping forecasts are not independent and count less."""
FORGET_S = 2 * DAY_S
KEPT_S = 1800.0
"""The longest lead that is learnt for."""


class Memo(NamedTuple):
    """A forecast that waits to be judged, in logs: the level then, what was added to it, and what
    each base of `nearfield.policy.outlook` forecast."""

    level: float
    growth: float
    features: tuple[float, ...]
    bases: tuple[float, ...]


def _prior_covariance() -> tuple[tuple[float, ...], ...]:
    each = range(FEATURES)
    return tuple(tuple(PRIOR_VARIANCE * (i == j) for j in each) for i in each)


class Forecast(NamedTuple):
    """What was learnt. `Forecast()` knows nothing.

    Attributes:
        tick: number of the last one; there is one every TICK_S.
        first: number of the first one.
        means: of the level, over MEANS_S. slope_from: mean log level over SLOPE_S.
        day: log level by time of day; None where it was never seen.
        coefficients, covariance: of the regression.
        memos: the last forecasts, the newest last.
    """

    tick: int = -1
    first: int = -1
    means: tuple[float, ...] = ()
    slope_from: float = 0.0
    day: tuple[float | None, ...] = (None,) * SLOTS
    coefficients: tuple[float, ...] = (0.0,) * FEATURES
    covariance: tuple[tuple[float, ...], ...] = _prior_covariance()
    memos: tuple[Memo, ...] = ()

    @property
    def growth(self) -> float:
        """Of the newest forecast: log of what will be needed over the level then."""
        return self.memos[-1].growth if self.memos else 0.0

    def due(self, now_s: float) -> bool:
        """Whether it is time for another tick."""
        return int(now_s // TICK_S) != self.tick

    def observe(
        self, now_s: float, bases: Sequence[float], need: float, lead_s: float
    ) -> tuple[Forecast, tuple[float, ...]]:
        """One tick: an old forecast is judged by what was needed, a new one is made.

        Args:
            bases: what may be said of now, work a second: the level, which is forecast, and others,
                which are taken to stay as they are.

        Returns:
            What was learnt, and the errors in logs of the old forecasts, by base; none if there is
            nothing to judge yet.
        """
        level = bases[0]
        small = 1e-9 + 0.02 * (self.means[-1] if self.means else level)
        log_level = math.log(level + small)
        found, errors = self._judged(math.log(need + small), lead_s)
        tick = int(now_s // TICK_S)
        first = self.first if self.first >= 0 else tick
        means, slope_from = self.means or (level,) * len(MEANS_S), self.slope_from
        if not self.means:
            slope_from = log_level
        means = tuple(
            mean + max(1.0 - math.exp(-TICK_S / over_s), 1.0 / (tick - first + 1)) * (level - mean)
            for mean, over_s in zip(means, MEANS_S, strict=True)
        )
        slope_from += TICK_S / SLOPE_S * (log_level - slope_from)
        features = [math.log((mean + small) / (level + small)) for mean in means]
        features.append((log_level - slope_from) * lead_s / SLOPE_S)
        features.append(self._seasonal(now_s, lead_s))
        features = [_cut(feature) for feature in features]
        growth = _dot(found.coefficients, features)
        logs = (log_level + growth, *(math.log(base + small) for base in bases[1:]))
        memo = Memo(log_level, growth, tuple(features), logs)
        return found._replace(
            tick=tick,
            first=first,
            means=means,
            slope_from=slope_from,
            day=self._with_today(now_s, log_level),
            memos=(*found.memos[1 - int(KEPT_S / TICK_S) :], memo),
        ), errors

    def _seasonal(self, now_s: float, lead_s: float) -> float:
        """How the day went on from here; 0 until a day has been seen."""
        if self.first < 0 or (self.tick - self.first) * TICK_S < DAY_S:
            return 0.0
        # The slots of now and of then, half a slot on: the current one is today's already.
        here = self.day[_slot(now_s + 0.5 * DAY_S / SLOTS)]
        ahead = self.day[_slot(now_s + lead_s + 0.5 * DAY_S / SLOTS)]
        return 0.0 if here is None or ahead is None else ahead - here

    def _with_today(self, now_s: float, log_level: float) -> tuple[float | None, ...]:
        slot = _slot(now_s)
        old = self.day[slot]
        gain = min(1.0, DAY_GAIN * TICK_S * SLOTS / DAY_S)
        new = log_level if old is None else old + gain * (log_level - old)
        return (*self.day[:slot], new, *self.day[slot + 1 :])

    def _judged(self, log_need: float, lead_s: float) -> tuple[Forecast, tuple[float, ...]]:
        back = min(int(KEPT_S / TICK_S), max(1, round(lead_s / TICK_S)))
        if len(self.memos) < back:
            return self, ()
        memo = self.memos[-back]
        error = _cut(log_need - memo.level - memo.growth)
        gains = [_dot(row, memo.features) for row in self.covariance]
        scale = NOISE * back + _dot(gains, memo.features)
        coefficients = tuple(
            c + gain / scale * error for c, gain in zip(self.coefficients, gains, strict=True)
        )
        forget = TICK_S / FORGET_S
        covariance = tuple(
            tuple(
                value - gains[i] * gains[j] / scale
                + (forget * (PRIOR_VARIANCE - value) if i == j else 0.0)
                for j, value in enumerate(row)
            )
            for i, row in enumerate(self.covariance)
        )  # fmt: skip
        return self._replace(coefficients=coefficients, covariance=covariance), tuple(
            _cut(log_need - base) for base in memo.bases
        )


def _cut(value: float) -> float:
    return min(LARGEST, max(-LARGEST, value))


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def _slot(at_s: float) -> int:
    return int(at_s % DAY_S / DAY_S * SLOTS)
