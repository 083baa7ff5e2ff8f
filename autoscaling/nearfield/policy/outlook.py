"""How much capacity is enough until one more replica could serve: forecast, errors, price in one.

There are several ways to say it. What is forecast may start from the level of now, from the peak of
the last minute, or from the mean of ten; and lateness may be worth little or much. Which way is
best differs from one traffic to the next, and nobody knows it beforehand. So all of them are tried
on paper: each has a *shadow*, a pool as large as it says, whose queue is worked out from the
traffic that really came, boots included. For each base the price is the one at which its shadow
kept the allowed lateness over the last half day; of the bases the cheapest decides. It is what an
operator does who tries settings on yesterday's traffic, done again every five seconds (following
the best expert: Littlestone and Warmuth, "The weighted majority algorithm", Information and
Computation 1994).

Shadows are fluids and see five seconds as one. How late requests really were, against what the
shadows said, corrects them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nearfield.policy.demand import BIN_S, Demand
from nearfield.policy.forecast import Forecast
from nearfield.policy.headroom import TICK_S, Choice, Errors, choices, first_price

BASES = ("level", "peak of a minute", "mean of 10 min")
LONG = (False, True, False)
"""Whether what was enough is kept for `hold_s`; else for a boot only."""
PRICES = (0.75, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0)
"""Of lateness: what having everybody wait is worth, in the price of serving them."""
MEMORY_S = 43_200.0
"""Over which the shadows' lateness and cost are averaged."""
PRIOR_S, PRIOR_UP_S = 28_800.0, 1800.0
"""What is believed of their lateness before counts as so much traffic: that lateness is worth no
less than at first is not given up soon, that it is worth no more is."""
FIRST = (1.0, 0.2, 1.0)
"""The first price of each base, as a share of the level's: a peak is more than will be needed."""
MARGIN = 0.8
"""Share of the allowed lateness that is aimed at."""
LENIENT, BELIEVED_S = 2.0, 10_800.0
"""Where less is late than the shadows say, they may say up to so many times as much; and after how
much traffic that is noticed."""
CHEAPER = 1.05
"""By so much another base must be cheaper than the first."""
BUNCHING, BUNCHED_S = 2.0, 4.0
"""How fast bunching is learnt, seconds for each mean bin that is late unexpectedly; the most."""
BUNCHING_S, MOST_BUNCH = 3600.0, 0.5
"""How fast it is forgotten; and where a larger share is late, it is not for bunching."""
EXCESS, SAME = 50.0, 1.15
"""What lateness beyond the allowed counts in comparing bases; shares that are about the same."""
AFTER_S = 10.0
"""Lateness counts from so long after the first boot: until then there was what there was."""
TRIED_S = 3600.0
"""Before so long the first base decides."""
DRAIN_S = 20.0
"""A backlog is to be gone so long after the replicas asked for now serve."""
QUEUE_S = 60.0
"""A shadow's queue holds so much; beyond it requests are refused."""
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
        late_price: what lateness is worth.
    """

    expected: float = 0.0
    amount: float = 0.0
    risk: float = 0.0
    held: float = 0.0
    base: int = 0
    late_price: float = 0.0


class Shadow(NamedTuple):
    """A pool on paper.

    Attributes:
        asked: what was enough lately; the first is what it has, in work a second.
        booting: what it had within the last boot, rising; the first is what serves.
        backlog: work that waits.
        late, cost: sums that fade: work that waited too long, and what it had times seconds.
    """

    asked: Amounts = ()
    booting: Amounts = ()
    backlog: float = 0.0
    late: float = 0.0
    cost: float = 0.0

    def after(
        self,
        now_s: float,
        seconds: float,
        came: float,
        wanted: float,
        level: float,
        *,
        lead_s: float,
        wait_s: float,
        hold_s: float,
        keep: float,
        bunched_s: float,
        counts: bool,
    ) -> Shadow:
        """So many seconds later, in which so much work came, if now so much is wanted."""
        backlog, late = self.backlog, 0.0
        if self.booting:
            serving = self.booting[0][1]
            allowed = wait_s * serving
            grows = came - serving * (seconds - bunched_s)  # while it comes
            if backlog > allowed:
                late = came
            elif backlog + grows > allowed:
                late = came * min(1.0, (backlog + grows - allowed) / grows)
            after = backlog + came - serving * seconds
            backlog = min(max(0.0, after), QUEUE_S * serving)
            if backlog > allowed:
                wanted = max(wanted, level + backlog / DRAIN_S)
        asked = holding(self.asked, now_s, wanted, hold_s)
        has = asked[0][1]
        booting = self.booting
        while booting and booting[-1][1] >= has:
            booting = booting[:-1]
        booting = (*booting, (now_s, has))
        while booting[0][0] < now_s - lead_s and len(booting) > 1:
            booting = booting[1:]
        return Shadow(
            asked,
            booting,
            backlog,
            self.late * keep + late * counts,
            self.cost * keep + has * seconds,
        )


class Aim(NamedTuple):
    """The price at which a base keeps the allowed lateness: between two shadows.

    Attributes:
        lower: the cheaper shadow, by position. share: of the way to the next one.
        cost: what it comes to, lateness beyond the allowed counted in.
    """

    lower: int
    share: float
    cost: float

    def between(self, values: list[float]) -> float:
        upper = min(self.lower + 1, len(values) - 1)
        return values[self.lower] + self.share * (values[upper] - values[self.lower])


class Outlook(NamedTuple):
    """What was learnt of one traffic.

    Attributes:
        forecast, errors: the latter by base.
        shadows: by base and price.
        came, span_s: work that came while there were shadows, and for how long; they fade as the
            shadows' sums do.
        bunched_s: by so much sooner the work of five seconds is there, since it does not come
            evenly: learnt from what was late unexpectedly.
        missed, expected: work that really was late, and what the shadows that decided said; they
            fade, too.
        late: work that really was late since the last bin.
        last: the last answer, given when so many bins were `closed`. Until the next one closes
            there is nothing new to decide on.
    """

    forecast: Forecast = Forecast()
    errors: tuple[Errors, ...] = (Errors(),) * len(BASES)
    shadows: tuple[tuple[Shadow, ...], ...] = ((Shadow(),) * len(PRICES),) * len(BASES)
    came: float = 0.0
    span_s: float = 0.0
    bunched_s: float = 0.0
    missed: float = 0.0
    expected: float = 0.0
    late: float = 0.0
    last: Enough = Enough()
    closed: int = -1

    def enough(
        self,
        demand: Demand,
        now_s: float,
        *,
        late: float,
        running: float,
        replica: float,
        lead_s: float,
        wait_s: float,
        hold_s: float,
        allowed: float,
    ) -> tuple[Outlook, Enough]:
        """The capacity that is enough now, and what was learnt on the way.

        Args:
            late: work that really was late since the last step.
            running: work a second that is done now. replica: what one replica does of it;
                capacity comes in these.
            lead_s: until one that is asked for now serves. wait_s: that a request may wait.
            hold_s: for how long what was enough is held at most.
            allowed: share of the work that may be late.
        """
        found = self._replace(late=self.late + late) if late > 0.0 else self
        if demand.closed == self.closed:
            return found, self.last
        fresh = 1 if self.closed < 0 else min(len(demand.bins), demand.closed - self.closed)
        found = found._replace(closed=demand.closed)
        if self.errors[0].judged == 0:
            unseen = Errors.unseen(lead_s, demand.noise(TICK_S + wait_s))
            found = found._replace(errors=(unseen,) * len(BASES))
        bases = self._bases(demand)
        if len(demand.bins) >= LEARN_BINS and self.forecast.due(now_s):
            found = found._judged(demand, now_s, lead_s, wait_s - self.bunched_s, bases)
        level_ahead = bases[0] * math.exp(found.forecast.growth)
        bases = (level_ahead, *bases[1:])
        if max(bases) <= TINY:
            return found._replace(last=Enough()), Enough()
        wanted = [
            choices(max(base, TINY), replica, e.scale_at(now_s + lead_s), e.tails(), PRICES)
            for base, e in zip(bases, found.errors, strict=True)
        ]
        if found.span_s == 0.0:
            found = found._replace(shadows=_begun(now_s, running, lead_s, hold_s))
        before = found
        found = found._cast(
            demand, now_s, fresh, wanted, replica, lead_s=lead_s, wait_s=wait_s, hold_s=hold_s
        )
        aims = [found._aim(b, lead_s, allowed) for b in range(len(BASES))]
        base = 0
        if found.span_s >= TRIED_S:
            costs = [aim.cost * (CHEAPER if b else 1.0) for b, aim in enumerate(aims)]
            base = costs.index(min(costs))
        aim, shadows = aims[base], found.shadows[base]
        missed = [
            new.late - old.late * _keep(fresh)
            for new, old in zip(shadows, before.shadows[base], strict=True)
        ]
        chosen = wanted[base][min(aim.lower + (aim.share > 0.0), len(PRICES) - 1)]
        last = Enough(
            bases[base],
            chosen.replicas * replica,
            chosen.risk,
            aim.between([shadow.asked[0][1] for shadow in shadows]),
            base,
            math.exp(aim.between([math.log(price) for price in PRICES])),
        )
        expected_late = max(0.0, aim.between(missed))
        begun = found.span_s > lead_s + AFTER_S
        return found._bunched(expected_late, fresh, begun=begun)._replace(last=last), last

    def _bunched(self, expected_late: float, fresh: int, *, begun: bool) -> Outlook:
        """With what was late in the last bins, and what the shadows that decided said of it."""
        mean = max(TINY, BIN_S * self.came / self.span_s)
        bunched_s = self.bunched_s * math.exp(-fresh * BIN_S / BUNCHING_S)
        if begun and self.late < MOST_BUNCH * mean * fresh:
            more = BUNCHING * (self.late - expected_late) / mean
            bunched_s = min(BUNCHED_S, max(0.0, bunched_s + more))
        return self._replace(
            bunched_s=bunched_s,
            missed=self.missed * _keep(fresh) + self.late,
            expected=self.expected * _keep(fresh) + expected_late,
            late=0.0,
        )

    def _bases(self, demand: Demand) -> tuple[float, ...]:
        means = self.forecast.means or (demand.level,)
        return demand.level, demand.peak, means[0]

    def _judged(
        self, demand: Demand, now_s: float, lead_s: float, wait_s: float, bases: tuple[float, ...]
    ) -> Outlook:
        need = demand.need(wait_s)
        forecast, missed = self.forecast.observe(now_s, bases, need, lead_s)
        errors = self.errors
        if missed:
            ticks = round(TICK_S / BIN_S)
            came = sum(demand.bins[-ticks:]) / TICK_S
            weight = min(HEAVIEST, came / max(TINY, forecast.means[-1]))
            errors = tuple(
                e.observe(miss, now_s, lead_s, weight)
                for e, miss in zip(errors, missed, strict=True)
            )
        return self._replace(forecast=forecast, errors=errors)

    def _cast(
        self,
        demand: Demand,
        now_s: float,
        fresh: int,
        wanted: list[list[Choice]],
        replica: float,
        *,
        lead_s: float,
        wait_s: float,
        hold_s: float,
    ) -> Outlook:
        """All shadows, `fresh` bins later."""
        seconds, came, keep = fresh * BIN_S, sum(demand.bins[-fresh:]), _keep(fresh)
        level = demand.level
        shadows = tuple(
            tuple(
                shadow.after(
                    now_s,
                    seconds,
                    came,
                    choice.replicas * replica,
                    level,
                    lead_s=lead_s,
                    wait_s=wait_s,
                    hold_s=hold_s if long else lead_s,
                    keep=keep,
                    bunched_s=self.bunched_s,
                    counts=self.span_s > lead_s + AFTER_S,
                )
                for shadow, choice in zip(row, options, strict=True)
            )
            for row, options, long in zip(self.shadows, wanted, LONG, strict=True)
        )
        return self._replace(
            shadows=shadows,
            came=self.came * keep + came,
            span_s=self.span_s * keep + seconds,
        )

    def _aim(self, base: int, lead_s: float, allowed: float) -> Aim:
        row = self.shadows[base]
        mean = self.came / self.span_s if self.span_s else 1.0
        first = FIRST[base] * first_price(lead_s)
        believed = mean * BELIEVED_S * allowed
        ratio = (self.expected + believed) / max(TINY, self.missed + believed)
        goal = allowed * MARGIN * min(LENIENT, max(1.0, ratio))
        shares = []
        for shadow, price in zip(row, PRICES, strict=True):
            prior = mean * (PRIOR_S if price < first else PRIOR_UP_S)
            late = shadow.late + prior * goal * first / price
            shares.append(late / max(TINY, self.came + prior))
        costs = [shadow.cost for shadow in row]
        upper = next((i for i, share in enumerate(shares) if share <= goal), None)
        if upper is None:  # no price helps: not to pay one that helps no more than a lower one
            least = next((i for i, price in enumerate(PRICES) if price >= first), len(row) - 1)
            lowest = SAME * min(shares[least:])
            at = next(i for i in range(least, len(row)) if shares[i] <= lowest)
            return Aim(at, 0.0, costs[at] + EXCESS * (shares[at] - goal) * self.came)
        if upper == 0:
            return Aim(0, 0.0, costs[0])
        above, below = math.log(shares[upper - 1]), math.log(max(TINY, shares[upper]))
        share = (above - math.log(goal)) / max(TINY, above - below)
        aim = Aim(upper - 1, min(1.0, share), 0.0)
        return aim._replace(cost=aim.between(costs))


def _begun(
    now_s: float, running: float, lead_s: float, hold_s: float
) -> tuple[tuple[Shadow, ...], ...]:
    """What runs at the beginning was asked for by somebody: all shadows have it for `hold_s`."""
    return tuple(
        (Shadow(((now_s + hold_s - kept_s, running),), ((now_s, running),)),) * len(PRICES)
        for kept_s in (hold_s if long else lead_s for long in LONG)
    )


def _keep(bins: int) -> float:
    return math.exp(-bins * BIN_S / MEMORY_S)


def holding(asked: Amounts, now_s: float, amount: float, hold_s: float) -> Amounts:
    """With one more amount; without those that are over or that a later one exceeds."""
    kept = [a for a in asked if a[0] > now_s - hold_s]
    while kept and kept[-1][1] <= amount:
        kept.pop()
    return (*kept, (now_s, amount))
