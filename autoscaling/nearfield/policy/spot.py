"""Spot capacity: how far it is trusted, how many more to have, and where.

After SkyServe's SpotHedge (Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with
Spot Instances", EuroSys 2025): spread over zones, have some replicas more than needed, and let
on-demand take over what spot does not deliver, for as long as it does not. Here the number of
spares is not a constant. What goes, goes together: a zone's capacity is taken back at once. So what
is learnt of a zone is how often that happens and how much of it goes; `mix` weighs spares, other
zones and on-demand capacity against the lateness of those whom a loss leaves without a replica.
"""

from __future__ import annotations

import math
from typing import NamedTuple

PRIOR_LOSSES, PRIOR_HOURS, PRIOR_SHARE = 0.5, 10.0, 0.5
"""Before any history: once in twenty hours half of what a zone has is taken back."""
MEMORY_HOURS = 48.0
"""Hours of use after which history fades."""
BACKOFF_S = (30.0, 300.0)
"""How long a pool that refused a launch is let be: at first, and at most; doubled in between."""
STEADY = 1.05
"""By so much a zone must be fuller, lest replicas move whenever a loss is learnt or forgotten."""
OVERDUE, OVERDUE_S = 2.0, 30.0
"""A replica that starts for longer than so many boots and so many seconds has found no machine."""


class Trust(NamedTuple):
    """What one pool's capacity did so far. `Trust()` is a pool nobody has tried.

    Attributes:
        losses, hours: how often something was taken back, in so many hours in which something ran.
        share: of those there were, which go at once. ran: how many there were.
        lost_s: when the last were.
        blocked_s: until when no more are asked for. backoff_s: for how long, if it refuses again.
    """

    losses: float = 0.0
    hours: float = 0.0
    share: float = PRIOR_SHARE
    ran: int = 0
    lost_s: float = -math.inf
    blocked_s: float = -math.inf
    backoff_s: float = 0.0

    def observe(
        self,
        now_s: float,
        elapsed_s: float,
        *,
        running: int,
        lost: int,
        refused: bool,
        booted: bool,
    ) -> Trust:
        """With what happened since the last step.

        Args:
            refused: a launch failed, or a replica is overdue.
            booted: a replica came up.
        """
        losses, hours, share = self.losses, self.hours, self.share
        if self.ran:
            hours += elapsed_s / 3600.0
        if lost:
            losses += 1.0
            share += (min(1.0, lost / max(1, self.ran)) - share) / (losses + PRIOR_LOSSES)
        if hours > MEMORY_HOURS:
            losses, hours = losses * MEMORY_HOURS / hours, MEMORY_HOURS
        lost_s = now_s if lost else self.lost_s
        blocked_s, backoff_s = self.blocked_s, self.backoff_s
        if booted:
            blocked_s, backoff_s = -math.inf, 0.0
        if refused and now_s >= blocked_s:
            backoff_s = min(BACKOFF_S[1], max(BACKOFF_S[0], 2.0 * backoff_s))
            blocked_s = now_s + backoff_s
        return Trust(losses, hours, share, running, lost_s, blocked_s, backoff_s)

    @property
    def losses_per_hour(self) -> float:
        """Of the zone, however many replicas go at once."""
        return (self.losses + PRIOR_LOSSES) / (self.hours + PRIOR_HOURS)

    def missing(self, boot_s: float) -> float:
        """Share of the zone's capacity that is missing in the mean, where a boot takes so long."""
        return min(1.0, self.losses_per_hour * boot_s / 3600.0) * self.share


def overdue(age_s: float, boot_s: float) -> bool:
    """Whether a replica has been starting for so long that it must be waiting for a machine."""
    return age_s > OVERDUE * boot_s + OVERDUE_S


def spread(
    total: int, have: tuple[int, ...], room: tuple[int, ...], risks: tuple[float, ...]
) -> tuple[int, ...]:
    """`total` replicas over several zones: evenly, fewer where losses are frequent.

    Those that are there stay, unless the fullest zone would still be no less full than another that
    takes one from it: then one moves.

    Args:
        have, room, risks: by zone: replicas there, most that can be there, losses per hour.
    """
    zones = range(len(have))
    least_risk = min(risks, default=1.0)
    weights = [math.sqrt(least_risk / risk) for risk in risks]
    counts = [min(h, r) for h, r in zip(have, room, strict=True)]

    def fullest() -> int:
        return max(zones, key=lambda z: (counts[z] / weights[z], z))

    def emptiest() -> int | None:
        """Of those that have room."""
        open_ = [z for z in zones if counts[z] < room[z]]
        return min(open_, key=lambda z: ((counts[z] + 1) / weights[z], z), default=None)

    while sum(counts) > total:
        counts[fullest()] -= 1
    while sum(counts) < total and (zone := emptiest()) is not None:
        counts[zone] += 1
    if (there := emptiest()) is not None:
        here = fullest()
        if STEADY * (counts[there] + 1) / weights[there] < counts[here] / weights[here]:
            counts[here] -= 1
            counts[there] += 1
    return tuple(counts)
