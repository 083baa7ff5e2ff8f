"""Spot capacity: how far it is trusted, how many more to have, and where.

After SkyServe's SpotHedge (Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with
Spot Instances", EuroSys 2025): spread over zones, have some replicas more than needed, and let
on-demand take over what spot does not deliver, for as long as it does not. Here the number of
spares is not a constant: it follows from how often replicas were lost and how long a boot takes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

PRIOR_LOST, PRIOR_HOURS = 0.5, 10.0
"""Before any history: one loss in twenty replica-hours."""
MEMORY_HOURS = 200.0
"""Replica-hours after which history fades."""
BUNCH_GAIN = 0.2
BACKOFF_S = (30.0, 900.0)
"""How long a pool that refused a launch is let be: at first, and at most; doubled in between."""
OVERDUE, OVERDUE_S = 2.0, 30.0
"""A replica that starts for longer than so many boots and so many seconds has found no machine."""


class Trust(NamedTuple):
    """What one pool's capacity did so far. `Trust()` is a pool nobody has tried.

    Attributes:
        lost, hours: replicas taken back, in so many replica-hours.
        bunch: how many go at once.
        blocked_s: until when no more are asked for. backoff_s: for how long, if it refuses again.
    """

    lost: float = 0.0
    hours: float = 0.0
    bunch: float = 1.0
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
        all_lost, hours, bunch = (
            self.lost + lost,
            self.hours + running * elapsed_s / 3600.0,
            self.bunch,
        )
        if hours > MEMORY_HOURS:
            all_lost, hours = all_lost * MEMORY_HOURS / hours, MEMORY_HOURS
        if lost:
            bunch += BUNCH_GAIN * (lost - bunch)
        blocked_s, backoff_s = self.blocked_s, self.backoff_s
        if booted:
            blocked_s, backoff_s = -math.inf, 0.0
        if refused and now_s >= blocked_s:
            backoff_s = min(BACKOFF_S[1], max(BACKOFF_S[0], 2.0 * backoff_s))
            blocked_s = now_s + backoff_s
        return Trust(all_lost, hours, bunch, blocked_s, backoff_s)

    @property
    def losses_per_hour(self) -> float:
        """Of one replica."""
        return (self.lost + PRIOR_LOST) / (self.hours + PRIOR_HOURS)


def overdue(age_s: float, boot_s: float) -> bool:
    """Whether a replica has been starting for so long that it must be waiting for a machine."""
    return age_s > OVERDUE * boot_s + OVERDUE_S


def spares(replicas: int, trust: Trust, boot_s: float, risk: float) -> int:
    """How many more to have, so that losses during one boot exceed them with this probability.

    Losses are taken as a Poisson process of bunches.
    """
    if replicas <= 0:
        return 0
    mean = replicas * trust.losses_per_hour / trust.bunch * boot_s / 3600.0
    term = total = math.exp(-mean)
    bunches = 0
    while 1.0 - total > risk and bunches < replicas:
        bunches += 1
        term *= mean / bunches
        total += term
    return min(replicas, math.ceil(bunches * trust.bunch))


def spread(
    total: int, have: tuple[int, ...], room: tuple[int, ...], risks: tuple[float, ...]
) -> tuple[int, ...]:
    """`total` replicas over several zones: evenly, fewer where losses are frequent.

    Those that are there stay, unless one zone has two more than its share: then one moves.

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
        if counts[here] / weights[here] >= (counts[there] + 2) / weights[there]:
            counts[here] -= 1
            counts[there] += 1
    return tuple(counts)
