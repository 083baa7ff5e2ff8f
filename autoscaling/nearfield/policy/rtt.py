"""How far away a region is: round trips measured by probes, and when they have really changed.

A probe's round trip differs from the next one's by some per cent although nothing has happened,
and by a half when a route has changed. An average that is quick enough for the second follows the
first, and what follows noise makes routing flap. So the level is the mean of up to `MEMORY` probes
for as long as they agree with it, and a two-sided cumulative sum (Page, "Continuous inspection
schemes", Biometrika 1954) says when they no longer do: then the level starts anew from the probes
that disagreed. A step of 50 % is believed at the third probe, a step of two deviations after
about eight, and noise is taken for a step once in hundreds of thousands of probes.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMORY = 64
"""Most probes in the mean: 7 % of noise becomes 0.9 %."""

ALLOWANCE = 0.75
"""Deviations by which a probe may differ without counting against the level."""

ALARM = 9.0
"""Summed excess, in deviations, at which the level is given up."""

MOST = 4.0
"""Most deviations that one probe counts for: two wild ones in a row are not yet a step."""

LEAST_DEVIATION = 0.02
"""Smallest deviation believed in, as a share of the level."""

URGENT_S = 0.1
"""A way that seems so much longer costs every request more than a probe: ask again at once."""

DEVIATION_MEMORY = 32
"""Probes over which the deviation is averaged."""


@dataclass(frozen=True, slots=True)
class Rtt:
    """The round trip to one upstream, as far as probes have told.

    Attributes:
        level_s: what the next round trip is expected to take.
        deviation_s: mean absolute difference of a probe from the level.
        probes: how many the level is the mean of (counting up to `MEMORY`).
    """

    level_s: float = 0.0
    deviation_s: float = 0.0
    probes: int = 0
    # The cumulative sums upwards and downwards, with the count and sum of their probes.
    _up: float = 0.0
    _up_probes: int = 0
    _up_s: float = 0.0
    _down: float = 0.0
    _down_probes: int = 0
    _down_s: float = 0.0

    @property
    def urgent(self) -> bool:
        """The last probes say that the way is much longer, and are not yet believed."""
        doubtful = self._up >= MOST - ALLOWANCE
        return doubtful and self._up_s / self._up_probes - self.level_s >= URGENT_S

    def learn(self, measured_s: float) -> Rtt:
        """After one more probe that was answered in `measured_s`."""
        if self.probes == 0:
            return Rtt(measured_s, measured_s * 0.1, 1)
        error_s = measured_s - self.level_s
        # A mean absolute deviation is 0.8 of a normal's standard deviation.
        scale_s = max(1.25 * self.deviation_s, LEAST_DEVIATION * self.level_s, 1e-6)
        z = max(-MOST, min(MOST, error_s / scale_s))
        up, up_probes, up_s = _sum(self._up, self._up_probes, self._up_s, z, measured_s)
        down, down_probes, down_s = _sum(
            self._down, self._down_probes, self._down_s, -z, measured_s
        )
        if up >= ALARM or down >= ALARM:
            level_s = up_s / up_probes if up >= ALARM else down_s / down_probes
            noise = self.deviation_s / self.level_s  # noise is a share of the way, near enough
            return Rtt(level_s, noise * level_s, up_probes if up >= ALARM else down_probes)
        probes = min(self.probes + 1, MEMORY)
        deviation_s = self.deviation_s
        deviation_s += (abs(z) * scale_s - deviation_s) / min(probes, DEVIATION_MEMORY)
        return Rtt(
            # A probe moves the level by no more than it counts for: a lone spike is forgotten.
            self.level_s + z * scale_s / probes,
            deviation_s,
            probes,
            up,
            up_probes,
            up_s,
            down,
            down_probes,
            down_s,
        )


def _sum(
    total: float, probes: int, sum_s: float, z: float, measured_s: float
) -> tuple[float, int, float]:
    total += z - ALLOWANCE
    if total <= 0:
        return 0.0, 0, 0.0
    return total, probes + 1, sum_s + measured_s
