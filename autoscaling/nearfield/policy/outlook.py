"""How much capacity is enough until one more replica could serve: forecast, errors, price in one.

What is forecast is compared from several bases: the level of now with what was learnt of how it
goes on, and the mean rates of ten minutes and of an hour. For most traffic the first is best. For
traffic in bursts shorter than a boot it is worst: it asks for much when a burst is over, and for
little before the next one. So each base keeps its own errors, and what it would have cost, the
capacity it held and the lateness it risked, is averaged. A mean is preferred only where it would
have been much cheaper.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nearfield.policy.demand import BIN_S, Demand
from nearfield.policy.forecast import MEANS_S, Forecast
from nearfield.policy.headroom import TICK_S, Errors, choose, first_price, reprice

BASES = ("level", "mean of 10 min", "mean of 1 h")
COSTS_S = 7200.0
"""Over which what the bases cost is averaged."""
CHEAPER = 1.3
"""By so much a mean must be cheaper than the level."""
TRIED = 20
"""Errors that must have been seen before the bases are compared."""
LEARN_BINS = 24
"""Bins that must be full before forecasts are made and judged: a beginning is no habit."""
HEAVIEST = 10.0
"""An error counts as often as requests met it, in mean bins, up to this."""
TINY = 1e-9

Amounts = tuple[tuple[float, float], ...]
"""When how much was asked for; falling amounts, the oldest first."""


class Enough(NamedTuple):
    """An answer: work a second.

    Attributes:
        expected: the forecast. amount: capacity that is enough but for `risk`.
        held: the most that was enough lately. base: of BASES, by position.
    """

    expected: float = 0.0
    amount: float = 0.0
    risk: float = 0.0
    held: float = 0.0
    base: int = 0


class Outlook(NamedTuple):
    """What was learnt of one traffic. By base: errors, what it costs, what it asked for lately.

    late_price: what lateness is worth; 0 before anything was asked. last: the last answer, given
    when so many bins were `closed`. Until the next one closes there is nothing new to decide on.
    """

    forecast: Forecast = Forecast()
    errors: tuple[Errors, ...] = (Errors(),) * len(BASES)
    costs: tuple[float, ...] = (0.0,) * len(BASES)
    asked: tuple[Amounts, ...] = ((),) * len(BASES)
    late_price: float = 0.0
    last: Enough = Enough()
    closed: int = -1

    def priced(self, work: float, late_share: float, allowed: float) -> Outlook:
        """With the lateness of the work that came since the last step."""
        means = self.forecast.means
        if work <= 0.0 or self.late_price == 0.0 or not means or means[0] <= TINY:
            return self
        weight = work / BIN_S / means[0]
        return self._replace(late_price=reprice(self.late_price, weight, late_share, allowed))

    def enough(
        self,
        demand: Demand,
        now_s: float,
        *,
        replica: float,
        lead_s: float,
        wait_s: float,
        hold_s: float,
    ) -> tuple[Outlook, Enough]:
        """The capacity that is enough now, and what was learnt on the way.

        Args:
            replica: work a second of one; capacity comes in these.
            lead_s: until one that is asked for now serves. wait_s: that a request may wait.
            hold_s: for how long what was enough is held.
        """
        if demand.closed == self.closed:
            return self, self.last
        level = demand.level
        found, ticked = self._replace(closed=demand.closed), False
        if self.late_price == 0.0:
            found = found._replace(late_price=first_price(lead_s))
        if self.errors[0].judged == 0:
            unseen = Errors.unseen(lead_s, demand.noise(TICK_S + wait_s))
            found = found._replace(errors=(unseen,) * len(BASES))
        if len(demand.bins) >= LEARN_BINS and self.forecast.due(now_s):
            ticked = True
            found = found._judged(demand, now_s, lead_s, wait_s)
        forecast, errors = found.forecast, found.errors
        means = forecast.means or (level,) * len(MEANS_S)
        bases = (level * math.exp(forecast.growth), *means)
        if max(bases) <= TINY:
            return found._replace(last=Enough()), Enough()
        choices = [
            choose(max(base, TINY), replica, e, found.late_price)
            for base, e in zip(bases, errors, strict=True)
        ]
        asked = tuple(
            holding(a, now_s, choice.replicas * replica, hold_s)
            for a, choice in zip(found.asked, choices, strict=True)
        )
        found = found._replace(asked=asked)
        if ticked:
            found = found._weighed(bases)
        base = 0
        if errors[0].judged >= TRIED:
            level_first = [cost * (CHEAPER if i else 1.0) for i, cost in enumerate(found.costs)]
            base = level_first.index(min(level_first))
        chosen = choices[base]
        last = Enough(bases[base], chosen.replicas * replica, chosen.risk, asked[base][0][1], base)
        return found._replace(last=last), last

    def _judged(self, demand: Demand, now_s: float, lead_s: float, wait_s: float) -> Outlook:
        need = demand.need(wait_s)
        forecast, missed = self.forecast.observe(now_s, demand.level, need, lead_s)
        errors = self.errors
        if missed:
            ticks = round(TICK_S / BIN_S)
            came = sum(demand.bins[-ticks:]) / TICK_S
            weight = min(HEAVIEST, came / max(TINY, forecast.means[-1]))
            errors = tuple(
                e.observe(miss, lead_s, weight) for e, miss in zip(errors, missed, strict=True)
            )
        return self._replace(forecast=forecast, errors=errors)

    def _weighed(self, bases: tuple[float, ...]) -> Outlook:
        """With what each base costs now: capacity in hours' means, and lateness at its price."""
        reference = bases[-1] if bases[-1] > TINY else max(bases)
        ticks = self.forecast.tick - self.forecast.first + 1
        gain = max(TICK_S / COSTS_S, 1.0 / ticks)
        costs = []
        for cost, base, e, asked in zip(self.costs, bases, self.errors, self.asked, strict=True):
            held = asked[0][1]
            now = held / reference + self.late_price * e.above(math.log(held / max(base, TINY)))
            costs.append(cost + gain * (now - cost))
        return self._replace(costs=tuple(costs))


def holding(asked: Amounts, now_s: float, amount: float, hold_s: float) -> Amounts:
    """With one more amount; without those that are over or that a later one exceeds."""
    kept = [a for a in asked if a[0] > now_s - hold_s]
    while kept and kept[-1][1] <= amount:
        kept.pop()
    return (*kept, (now_s, amount))
