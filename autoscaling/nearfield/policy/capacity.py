"""What one replica of a pool gets done and how long it boots: the spec's, until it is measured.

Where nobody measures work, requests are the work, and what a replica does follows from the
concurrency it should have (Little's law): with `target_ongoing` requests at once, each taking as
long as they take now, it finishes `target_ongoing / time in the engine` a second. That is Knative's
and Ray Serve's concurrency target, said as a rate.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from nearfield.policy.pools import NO_DATA, Measured, PoolSignals, PoolSpec
from nearfield.policy.spot import Trust, overdue

SMOOTH_S = 120.0
"""Over which a measured speed and the time in the engine are averaged."""
LONGER, SHORTER = 0.5, 0.1
"""How much of a boot is learnt that took longer than expected, and shorter."""
QUEUED = 0.1
"""Beyond this share of queued requests, time in the engine says nothing of the arrivals' rate."""


class Pool(NamedTuple):
    """What was learnt of one pool. `Pool()` knows nothing.

    Attributes:
        work_s: what one replica does; NO_DATA: only the spec may say.
        boot_s: what a boot takes, likewise. target: what was last decided; -1: nothing.
        inside: requests in the engines, smoothed; rate: their arrivals a second, likewise.
        trust: in its capacity.
    """

    work_s: float | None = None
    boot_s: float | None = None
    target: int = -1
    inside: float = 0.0
    rate: float = 0.0
    trust: Trust = Trust()

    def observe(self, signals: PoolSignals, spec: PoolSpec, now_s: float, elapsed_s: float) -> Pool:
        """With the signals of one more step."""
        boot_s = self.boot_s
        for took_s in signals.boots_s:
            if boot_s is None:
                boot_s = took_s
            boot_s += (LONGER if took_s > boot_s else SHORTER) * (took_s - boot_s)
        expected_s = spec.boot_s if boot_s is None else boot_s
        trust = self.trust.observe(
            now_s,
            elapsed_s,
            running=signals.running,
            lost=signals.lost,
            refused=signals.refused > 0 or any(overdue(a, expected_s) for a in signals.starting),
            booted=bool(signals.boots_s),
        )
        found = self._replace(boot_s=boot_s, trust=trust)
        gain = 1.0 - math.exp(-elapsed_s / SMOOTH_S)
        measured = signals.replica_work_s
        if measured is not NO_DATA:
            if measured <= 0.0:
                return found
            if self.work_s is None:
                return found._replace(work_s=measured)
            return found._replace(work_s=self.work_s + gain * (measured - self.work_s))
        if spec.work_s is not NO_DATA:
            return found
        return found._little(signals, spec, elapsed_s, gain)

    def _little(self, signals: PoolSignals, spec: PoolSpec, elapsed_s: float, gain: float) -> Pool:
        ongoing, queued, arrivals = signals.ongoing, signals.queued, signals.arrivals
        if ongoing is NO_DATA or arrivals is NO_DATA or elapsed_s <= 0.0:
            return self
        waiting = 0.0 if queued is NO_DATA else queued
        if waiting > QUEUED * ongoing:
            return self
        inside = self.inside + gain * (ongoing - waiting - self.inside)
        rate = self.rate + gain * (arrivals / elapsed_s - self.rate)
        work_s = self.work_s
        if inside > 1e-3 and rate > 1e-6:
            work_s = spec.target_ongoing * rate / inside
        return self._replace(inside=inside, rate=rate, work_s=work_s)

    def speed(self, spec: PoolSpec) -> Measured:
        """Work a second of one replica."""
        return spec.work_s if self.work_s is None else self.work_s

    def boots_in(self, spec: PoolSpec) -> float:
        """Seconds from asking for a replica to its serving."""
        return spec.boot_s if self.boot_s is None else self.boot_s
