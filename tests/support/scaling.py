"""A small fluid world around a scaling policy: pools, a queue, boots; one second a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nearfield.policy.scale import (
    NO_DATA,
    Decision,
    PoolSignals,
    ScalingSpec,
    Signals,
    State,
    step,
)


@dataclass
class Replicas:
    """Of one pool. ready: when those that start will serve, the oldest first."""

    running: int = 0
    starting: list[tuple[float, float]] = field(default_factory=list)  # asked, ready
    boots_s: list[float] = field(default_factory=list)


@dataclass
class World:
    """Pools that share a queue. `work_s`: what a replica of each does a second.

    Attributes:
        decisions: with their times.
    """

    spec: ScalingSpec
    work_s: Mapping[str, float]
    boot_s: float = 30.0
    now_s: float = 0.0
    pools: dict[str, Replicas] = field(default_factory=dict)
    state: State = field(default_factory=State)
    backlog: float = 0.0
    decisions: list[tuple[float, Decision]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for pool in self.spec.pools:
            self.pools.setdefault(pool.name, Replicas())

    def counts(self) -> dict[str, int]:
        """Running and starting ones, by pool."""
        return {n: p.running + len(p.starting) for n, p in self.pools.items()}

    @property
    def total(self) -> int:
        return sum(self.counts().values())

    def run(self, seconds: int, rate: Callable[[float], float] | float) -> World:
        """So many seconds of traffic, work a second."""
        for _ in range(seconds):
            self.tick(rate(self.now_s) if callable(rate) else rate)
        return self

    def tick(self, work: float, *, dark: bool = False) -> Decision:
        """One second in which so much work comes, and the decision at its end."""
        self.now_s += 1.0
        capacity = 0.0
        for name, pool in self.pools.items():
            for asked_s, ready_s in [s for s in pool.starting if s[1] <= self.now_s]:
                pool.starting.remove((asked_s, ready_s))
                pool.running += 1
                pool.boots_s.append(ready_s - asked_s)
            capacity += pool.running * self.work_s[name]
        late = work if self.backlog > self.spec.max_wait_s * capacity else 0.0
        done = min(self.backlog + work, capacity)
        self.backlog += work - done
        return self.decide(self.signals(work, late, capacity, dark=dark))

    def signals(self, work: float, late: float, capacity: float, *, dark: bool) -> Signals:
        found = []
        for name, pool in self.pools.items():
            own = pool.running * self.work_s[name]
            share = own / capacity if capacity else 1.0 / len(self.pools)
            boots, pool.boots_s = tuple(pool.boots_s), []
            found.append(
                PoolSignals(
                    name,
                    running=pool.running,
                    starting=tuple(self.now_s - asked_s for asked_s, _ in pool.starting),
                    ongoing=NO_DATA if dark else share * (self.backlog + work),
                    queued=NO_DATA if dark else share * self.backlog,
                    arrivals=NO_DATA if dark else share * work,
                    late=NO_DATA if dark else share * late,
                    replica_work_s=NO_DATA if dark else self.work_s[name],
                    queue_age_s=NO_DATA if dark else self.backlog / max(capacity, 1e-9),
                    boots_s=boots,
                )
            )
        return Signals(self.now_s, tuple(found))

    def decide(self, signals: Signals) -> Decision:
        """Ask the policy and do as it says."""
        decision, self.state = step(signals, self.state, self.spec)
        self.decisions.append((self.now_s, decision))
        for target in decision.targets:
            pool = self.pools[target.name]
            while pool.running + len(pool.starting) > target.replicas:
                if pool.starting:
                    pool.starting.pop()
                else:
                    pool.running -= 1
            while pool.running + len(pool.starting) < target.replicas:
                pool.starting.append((self.now_s, self.now_s + self.boot_s))
        return decision
