"""What nearfield's way with spot capacity is compared with: policies of the shape of `scale.step`.

All of them get the same answer to "how many replicas?": production's own, `policy.scale.step`, for
one pool that is never lost. They differ in where those replicas come from only:

    SpotHedge    SkyServe's: spot spread over zones, some more than needed, on demand meanwhile
    SpotOnly     evenly over some zones, whatever happens there
    Base         a fixed share on demand, the rest evenly over the zones that have machines

Each is made anew for a run. Replicas with a notice are drained first by all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from nearfield.policy import scale
from nearfield.policy.scale import (
    NO_DATA,
    Decision,
    Measured,
    PoolSignals,
    PoolSpec,
    PoolTarget,
    ScalingSpec,
    Signals,
    State,
)

REFUSED_S = 300.0
"""For how long `Base` asks a zone for nothing more that has refused."""


class Placer:
    """How many replicas production wants; subclasses say where."""

    def __init__(self) -> None:
        self._state = State()

    def __call__(self, signals: Signals, state: State, spec: ScalingSpec) -> tuple[Decision, State]:
        spot = [p for p in spec.pools if p.kind == "spot"]
        steady = [p for p in spec.pools if p.kind != "spot"]
        decided, self._state = scale.step(
            Signals(signals.now_s, (_one(signals.pools),)),
            self._state,
            replace(spec, pools=(_pool(spec.pools),)),
        )
        needed = decided.targets[0].replicas
        seen = {pool.name: pool for pool in signals.pools}
        counts = self.place(needed, signals.now_s, [(p, seen[p.name]) for p in spot])
        on_demand = self.on_demand(needed, [seen[p.name] for p in spot])
        counts |= {p.name: on_demand if i == 0 else 0 for i, p in enumerate(steady)}
        targets = tuple(
            PoolTarget(
                pool.name,
                max(pool.min_replicas, min(pool.max_replicas, counts[pool.name])),
                tuple(n.replica for n in seen[pool.name].notices),
                decided.reason,
            )
            for pool in spec.pools
        )
        return Decision(targets, decided.reason), replace(state, now_s=signals.now_s)

    def place(
        self, needed: int, now_s: float, zones: Sequence[tuple[PoolSpec, PoolSignals]]
    ) -> dict[str, int]:
        """Replicas of each spot pool."""
        raise NotImplementedError

    def on_demand(self, needed: int, zones: Sequence[PoolSignals]) -> int:
        return 0


def good(zone: PoolSignals) -> int:
    """Replicas that run and stay."""
    return zone.running - len(zone.notices)


def alive(zone: PoolSignals) -> int:
    return good(zone) + len(zone.starting)


def evenly(total: int, names: Sequence[str]) -> dict[str, int]:
    share, more = divmod(total, len(names)) if names else (0, 0)
    return {name: share + (i < more) for i, name in enumerate(names)}


class SpotHedge(Placer):
    """SpotHedge: Mao et al., "SkyServe: Serving AI Models across Regions and Clouds with Spot
    Instances", EuroSys 2025, section 3.

    Dynamic placement: the next replica goes to a zone that is not known to take machines back, one
    with the fewest replicas, the cheapest of those; a zone that takes one back or refuses is left
    out until a replica comes up there, or fewer than two are left. Dynamic fallback: `extra` spot
    replicas more than needed, and as many on demand as are not ready of these, at most as many as
    are needed.
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self._extra = extra
        self._taking: set[str] = set()

    def place(
        self, needed: int, now_s: float, zones: Sequence[tuple[PoolSpec, PoolSignals]]
    ) -> dict[str, int]:
        for spec, zone in zones:
            if zone.boots_s:
                self._taking.discard(spec.name)
            if zone.lost or zone.refused or zone.notices:
                self._taking.add(spec.name)
                if len(zones) - len(self._taking) < min(2, len(zones)):
                    self._taking.clear()
        counts = {spec.name: alive(zone) for spec, zone in zones}
        prices = {spec.name: spec.usd_per_hour for spec, _ in zones}
        room = {spec.name: spec.max_replicas for spec, _ in zones}
        wanted = needed + self._extra if needed else 0
        while sum(counts.values()) > wanted:
            counts[max(counts, key=lambda z: (counts[z], prices[z]))] -= 1
        while sum(counts.values()) < wanted:
            open_ = [z for z in counts if z not in self._taking and counts[z] < room[z]]
            if not open_:
                break
            counts[min(open_, key=lambda z: (counts[z], prices[z]))] += 1
        return counts

    def on_demand(self, needed: int, zones: Sequence[PoolSignals]) -> int:
        ready = sum(good(zone) for zone in zones)
        return max(0, min(needed, needed + self._extra - ready))


class SpotOnly(Placer):
    """Spot and nothing else, evenly over the first so many zones, the cheapest first."""

    def __init__(self, zones: int | None = None) -> None:
        super().__init__()
        self._zones = zones

    def place(
        self, needed: int, now_s: float, zones: Sequence[tuple[PoolSpec, PoolSignals]]
    ) -> dict[str, int]:
        cheapest = sorted(zones, key=lambda zone: zone[0].usd_per_hour)
        names = [spec.name for spec, _ in cheapest[: self._zones]]
        return {spec.name: 0 for spec, _ in zones} | evenly(needed, names)


class Base(Placer):
    """A fixed share on demand, as an autoscaling group with a base has it; the rest evenly over the
    zones that have not refused lately."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        self._share = share
        self._refused_s: dict[str, float] = {}

    def place(
        self, needed: int, now_s: float, zones: Sequence[tuple[PoolSpec, PoolSignals]]
    ) -> dict[str, int]:
        for spec, zone in zones:
            if zone.refused:
                self._refused_s[spec.name] = now_s
        open_ = [
            spec.name
            for spec, _ in zones
            if now_s - self._refused_s.get(spec.name, -math.inf) >= REFUSED_S
        ]
        kept = {spec.name: alive(zone) for spec, zone in zones if spec.name not in open_}
        rest = max(0, needed - self.on_demand(needed, ()) - sum(kept.values()))
        return kept | evenly(rest, open_)

    def on_demand(self, needed: int, zones: Sequence[PoolSignals]) -> int:
        return math.ceil(self._share * needed)


def _pool(pools: Sequence[PoolSpec]) -> PoolSpec:
    """One pool in place of all, that is never lost."""
    last = pools[-1]
    return replace(
        last,
        name="all",
        kind="on_demand",
        zone="",
        min_replicas=0,
        max_replicas=sum(p.max_replicas for p in pools),
    )


def _one(seen: Sequence[PoolSignals]) -> PoolSignals:
    """What that pool would have signalled: replicas with a notice are none."""
    running = sum(good(p) for p in seen)
    known = [(good(p), p.replica_work_s) for p in seen if p.replica_work_s is not NO_DATA]
    weight = sum(count for count, _ in known)
    work_s: Measured = NO_DATA
    if weight:
        work_s = math.fsum(count * each for count, each in known) / weight
    ages = [p.queue_age_s for p in seen if p.queue_age_s is not NO_DATA]
    return PoolSignals(
        "all",
        running=running,
        starting=tuple(age_s for p in seen for age_s in p.starting),
        draining=sum(p.draining + len(p.notices) for p in seen),
        ongoing=_sum(p.ongoing for p in seen),
        queued=_sum(p.queued for p in seen),
        arrivals=_sum(p.arrivals for p in seen),
        late=_sum(p.late for p in seen),
        work_in=_sum(p.work_in for p in seen),
        replica_work_s=work_s,
        queue_age_s=max(ages) if ages else NO_DATA,
        boots_s=tuple(took_s for p in seen for took_s in p.boots_s),
    )


def _sum(values: Iterable[Measured]) -> Measured:
    """NO_DATA where any is."""
    total = 0.0
    for value in values:
        if value is NO_DATA:
            return NO_DATA
        total += value
    return total
