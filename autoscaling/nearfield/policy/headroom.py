"""How far above the forecast capacity should be: the price of a replica against that of waiting.

The errors that the forecast made are kept: how wide they were of late, and in units of that width
their distribution over days (filtered historical simulation: Barone-Adesi, Giannopoulos and
Vosper, "VaR without correlations for portfolios of derivative securities", J. Futures Markets
1999). So headroom is no constant that somebody set: a steady night gets little, a restless evening
much, and a few large replicas more than many small ones, since they come in whole numbers.

The amount is the newsvendor's: one replica more as long as the lateness that it prevents is worth
its price. What lateness is worth is learnt: it rises while more than the allowed share is late and
falls while there is less, over hours, so that the share allowed is what is bought.
"""

from __future__ import annotations

import math
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

FIRST_PRICE, LONGER = 15.0, 0.4
"""What having everybody wait is worth before it is learnt, in the price of serving them, with a
boot of a minute; and the power of a boot it rises with: what is missed is missed for so long."""
PRICES = (2.0, 300.0)
REPRICE = 0.003
"""How fast it is learnt: logs per five seconds in which everybody is late."""
MARGIN = 0.8
"""Share of the allowed lateness that is aimed at."""
CANDIDATES = 64


def _prior() -> tuple[float, ...]:
    """Laplace: tails heavier than a Gaussian's."""
    weights = [math.exp(-abs(-EDGE + (i + 0.5) * CELL)) for i in range(CELLS)]
    return tuple(PRIOR_WEIGHT * w / sum(weights) for w in weights)


class Errors(NamedTuple):
    """Errors of a forecast, in logs. `Errors()` is what is believed before any.

    Attributes:
        spread, long_spread: mean absolute error.
        shape: histogram of errors in spreads, weights.
        judged: errors seen.
    """

    spread: float = PRIOR_SPREAD
    long_spread: float = PRIOR_SPREAD
    shape: tuple[float, ...] = _prior()
    judged: int = 0

    @property
    def scale(self) -> float:
        """The spread that is expected now."""
        both = self.spread + LONG_SHARE * (self.long_spread - self.spread)
        return max(LEAST_SPREAD, both)

    @classmethod
    def unseen(cls, lead_s: float, noise: float) -> Errors:
        """Before any: a random walk's, wider the longer the lead, and the noise of the load.

        Args:
            noise: standard deviation of what is needed, as a share, if the load stays as it is.
        """
        spread = math.hypot(PRIOR_SPREAD * math.sqrt(lead_s / 60.0), MEAN_ABSOLUTE * noise)
        return cls(spread, spread)

    def observe(self, error: float, lead_s: float, weight: float = 1.0) -> Errors:
        """With one more.

        Args:
            lead_s: how far ahead the forecast was.
            weight: how many met it: what matters is the share of requests, not of time.
        """
        scale = self.scale
        keep = 1.0 - TICK_S / SHAPE_S
        shape = [weight * keep for weight in self.shape]
        shape[min(CELLS - 1, max(0, int((error / scale + EDGE) / CELL)))] += weight
        size = min(abs(error), 6.0 * scale)  # one outlier is not a restless hour
        gain = max(
            TICK_S / LONG_SPREAD_S, 1.0 / (self.judged + max(PRIOR_TICKS, LEADS * lead_s / TICK_S))
        )
        return Errors(
            self.spread + TICK_S / max(SPREAD_S, LEADS * lead_s) * (size - self.spread),
            self.long_spread + gain * (size - self.long_spread),
            tuple(shape),
            self.judged + 1,
        )

    def above(self, error: float, tails: list[float] | None = None) -> float:
        """Share of the errors above this one. tails: if they are there already."""
        tails = self.tails() if tails is None else tails
        position = (error / self.scale + EDGE) / CELL
        cell = int(position)
        if position <= 0.0:
            return 1.0
        if cell >= CELLS:
            return 0.0
        return tails[cell] + (tails[cell + 1] - tails[cell]) * (position - cell)

    def tails(self) -> list[float]:
        """Share of the errors in each cell and above it; one more for those above all."""
        total = sum(self.shape)
        found, above = [0.0] * (CELLS + 1), 0.0
        for cell in range(CELLS - 1, -1, -1):
            above += self.shape[cell]
            found[cell] = above / total
        return found


class Choice(NamedTuple):
    """How much capacity. replicas: of the given size. risk: that it is not enough."""

    replicas: int
    risk: float


def choose(forecast: float, replica: float, errors: Errors, late_price: float) -> Choice:
    """The number of replicas at which one more costs more than the lateness it prevents.

    Args:
        forecast: what will be needed, work a second, more than 0.
        replica: what one replica does, work a second.
        late_price: what having everybody wait costs, in the price of serving them.
    """
    scale, tails = errors.scale, errors.tails()
    least = max(1, math.ceil(forecast * math.exp(-2.0 * scale) / replica - 1e-9))
    most = max(least, math.ceil(forecast * math.exp(min(EDGE * scale, 2.0)) / replica))
    stride = max(1, (most - least) // CANDIDATES)
    best, best_cost = Choice(least, 1.0), math.inf
    for replicas in range(least, most + stride, stride):
        risk = errors.above(math.log(replicas * replica / forecast), tails)
        cost = replicas * replica / forecast + late_price * risk
        if cost < best_cost:
            best, best_cost = Choice(replicas, risk), cost
    return best


def first_price(lead_s: float) -> float:
    """The price of lateness before any is known, where a replica serves after so long."""
    return FIRST_PRICE * math.pow(lead_s / 60.0, LONGER)


def reprice(late_price: float, weight: float, late_share: float, allowed: float) -> float:
    """The price of lateness after some more requests.

    Args:
        weight: how many they were, in mean five-second bins.
        late_share: of them. allowed: the share that may be late.
    """
    change = REPRICE * min(3.0, weight) * (late_share - MARGIN * allowed) * (0.01 / allowed)
    return min(PRICES[1], max(PRICES[0], late_price * math.exp(change)))
