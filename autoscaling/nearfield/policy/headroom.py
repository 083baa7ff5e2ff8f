"""How far above the forecast capacity should be: the price of a replica against that of waiting.

The errors that the forecast made are kept: how wide they were of late, and in units of that width
their distribution over days (filtered historical simulation: Barone-Adesi, Giannopoulos and
Vosper, "VaR without correlations for portfolios of derivative securities", J. Futures Markets
1999). So headroom is no constant that somebody set: a steady night gets little, a restless evening
much, and a few large replicas more than many small ones, since they come in whole numbers.

The amount is the newsvendor's: one replica more as long as the lateness that it prevents is worth
its price. What lateness is worth is learnt in `nearfield.policy.outlook`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

TICK_S = 15.0
"""How often a forecast is made and an old one judged."""

SPREAD_S = 1800.0
"""Time over which the width of the errors is averaged ..."""
LONG_SPREAD_S = 12 * 3600.0
"""... and the longer one that steadies it ..."""
LONG_SHARE = 0.3
"""... with this weight."""
SHAPE_S = 2 * 86_400.0
"""Time over which the shape of their distribution is remembered."""
PRIOR_SPREAD, PRIOR_WEIGHT, PRIOR_TICKS = 0.05, 40.0, 60
"""Before anything is known: 5 % a minute ahead, believed like so many errors seen."""
MEAN_ABSOLUTE = math.sqrt(2.0 / math.pi)
"""Of a Gaussian with standard deviation 1."""
LEADS = 6.0
"""The width is averaged over so many leads at least: within one, errors are one."""
LEAST_SPREAD = 0.01
EDGE, CELLS = 8.0, 96
"""The shape is a histogram from -EDGE to EDGE spreads."""
CELL = 2 * EDGE / CELLS

FIRST_PRICE, LONGER = 10.0, 0.4
"""What having everybody wait is worth before it is learnt, in the price of serving them, with a
boot of a minute; and the power of a boot it rises with: what is missed is missed for so long."""
CANDIDATES = 48

PERIOD_S = 600.0
"""Errors are wider at some times of each ten minutes than at others: what people schedule begins
then, and much of what is published changes then."""
PHASES = int(PERIOD_S / TICK_S)
PERIODS = 36.0
"""So many periods are remembered, ..."""
PHASE_WEIGHT = 8.0
"""... and so many with errors like at any other time are believed before the first."""
BEGINNING = 2 * PHASES
"""Errors before these say nothing of a time: a beginning is no habit."""
MOST_PHASE = 3.0
"""An error counts as so many usual ones at most: one event is no habit."""
LEAST_PHASE = 0.25
"""No time is taken to be calmer than this share of the whole."""


def _prior() -> tuple[float, ...]:
    """Laplace: tails heavier than a Gaussian's."""
    weights = [math.exp(-abs(-EDGE + (i + 0.5) * CELL)) for i in range(CELLS)]
    return tuple(PRIOR_WEIGHT * w / sum(weights) for w in weights)


class Errors(NamedTuple):
    """Errors of a forecast, in logs. `Errors()` is what is believed before any.

    Attributes:
        spread, long_spread: mean absolute error.
        phases: of each part of the period, in the spread then: sums that fade, and their weights.
        shape: histogram of errors in spreads, weights.
        judged: errors seen.
    """

    spread: float = PRIOR_SPREAD
    long_spread: float = PRIOR_SPREAD
    phases: tuple[tuple[float, float], ...] = ((PHASE_WEIGHT, PHASE_WEIGHT),) * PHASES
    shape: tuple[float, ...] = _prior()
    judged: int = 0

    @property
    def scale(self) -> float:
        """The spread that is expected now, at no time in particular."""
        both = self.spread + LONG_SHARE * (self.long_spread - self.spread)
        return max(LEAST_SPREAD, both)

    def scale_at(self, at_s: float) -> float:
        """The spread of a forecast for then."""
        total, weight = self.phases[_phase(at_s)]
        return max(LEAST_SPREAD, self.scale * max(LEAST_PHASE, total / weight))

    @classmethod
    def unseen(cls, lead_s: float, noise: float) -> Errors:
        """Before any: a random walk's, wider the longer the lead, and the noise of the load.

        Args:
            noise: standard deviation of what is needed, as a share, if the load stays as it is.
        """
        spread = math.hypot(PRIOR_SPREAD * math.sqrt(lead_s / 60.0), MEAN_ABSOLUTE * noise)
        return cls(spread, spread)

    def observe(self, error: float, now_s: float, lead_s: float, weight: float = 1.0) -> Errors:
        """With one more.

        Args:
            now_s: when it was made. lead_s: how long before the forecast was.
            weight: how many met it: what matters is the share of requests, not of time.
        """
        scale, usual = self.scale_at(now_s), self.scale
        keep = 1.0 - TICK_S / SHAPE_S
        shape = [weight * keep for weight in self.shape]
        shape[min(CELLS - 1, max(0, int((error / scale + EDGE) / CELL)))] += weight
        size = min(abs(error), 6.0 * scale)  # one outlier is not a restless hour
        gain = max(
            TICK_S / LONG_SPREAD_S, 1.0 / (self.judged + max(PRIOR_TICKS, LEADS * lead_s / TICK_S))
        )
        phases = self.phases
        if self.judged >= BEGINNING:
            phase, fade = _phase(now_s), 1.0 - 1.0 / PERIODS
            prior = (1.0 - fade) * PHASE_WEIGHT
            total, seen = phases[phase]
            own = (total * fade + prior + min(MOST_PHASE, size / usual), seen * fade + prior + 1.0)
            phases = (*phases[:phase], own, *phases[phase + 1 :])
        return Errors(
            self.spread + TICK_S / max(SPREAD_S, LEADS * lead_s) * (size - self.spread),
            self.long_spread + gain * (size - self.long_spread),
            phases,
            tuple(shape),
            self.judged + 1,
        )

    def tails(self) -> list[float]:
        """Share of the errors in each cell and above it; one more for those above all."""
        total = sum(self.shape)
        found, above = [0.0] * (CELLS + 1), 0.0
        for cell in range(CELLS - 1, -1, -1):
            above += self.shape[cell]
            found[cell] = above / total
        return found


def _phase(at_s: float) -> int:
    return int(at_s % PERIOD_S / TICK_S)


class Choice(NamedTuple):
    """How much capacity. replicas: of the given size. risk: that it is not enough."""

    replicas: int
    risk: float


def choices(
    forecast: float, replica: float, scale: float, tails: list[float], prices: Sequence[float]
) -> list[Choice]:
    """For each price of lateness: the number of replicas at which one more costs more than the
    lateness it prevents.

    Args:
        forecast: what will be needed, work a second, more than 0.
        replica: what one replica does, work a second.
        scale, tails: of the forecast's errors.
        prices: what having everybody wait costs, in the price of serving them; rising.
    """
    unit = replica / forecast
    least = max(1, math.ceil(math.exp(-2.0 * scale) / unit - 1e-9))
    most = max(least, math.ceil(math.exp(min(EDGE * scale, 2.0)) / unit))
    stride = max(1, (most - least) // CANDIDATES)
    # Only what is on the lower convex hull of cost and risk is best at some price.
    hull: list[tuple[int, float]] = []
    per_cell, offset = 1.0 / (scale * CELL), EDGE / CELL
    for replicas in range(least, most + stride, stride):
        position = math.log(replicas * unit) * per_cell + offset
        cell = int(position)
        if position <= 0.0:
            risk = 1.0
        elif cell >= CELLS:
            risk = 0.0
        else:
            risk = tails[cell] + (tails[cell + 1] - tails[cell]) * (position - cell)
        while len(hull) > 1:
            (n0, r0), (n1, r1) = hull[-2], hull[-1]
            if (r0 - r1) * (replicas - n1) > (r1 - risk) * (n1 - n0):
                break
            hull.pop()
        hull.append((replicas, risk))
        if risk == 0.0:
            break
    found, at = [], 0
    for price in prices:
        while at + 1 < len(hull):
            (n0, r0), (n1, r1) = hull[at], hull[at + 1]
            if price * (r0 - r1) <= (n1 - n0) * unit:
                break
            at += 1
        found.append(Choice(*hull[at]))
    return found


def first_price(lead_s: float) -> float:
    """The price of lateness before any is known, where a replica serves after so long."""
    return FIRST_PRICE * math.pow(lead_s / 60.0, LONGER)
