"""One pool of replicas and its queue, as a fluid, a second at a time: what the benchmark replays.

Work of a second comes evenly over it and is served first come, first served, by whatever runs. It
waits as long as the backlog ahead of it takes at that second's capacity; work that waits longer
than `WAIT_S` is late. A queue holds `MOST_S` of its capacity; what is beyond is refused, and late
as well. A replica costs from the moment it is asked for; it serves once it has booted; those asked
for last go first. `Replay` runs a policy in it, decision by decision. `late_share` and `running` do
the same for a schedule that is known beforehand, fast.

How it compares with the simulator's events mode is a test: tests/simulation/test_traces_bench.py.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
from nearfield.policy.scale import PoolSignals, PoolSpec, ScalingSpec, Signals, State
from nearfield.simulator.parts import Step
from numpy.typing import NDArray

from benchmarks.autoscaling.traffic import Series

WAIT_S = 2.0
MOST_S = 60.0
DECIDE_S = 5
"""Seconds between two decisions, unless a policy has a pace of its own."""
SERVICE_S = 4.0
"""Assumed: how long a request is in a full engine. A replica's batch is what it serves in so long;
what concurrency is measured in."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Boots:
    """What boots take, seconds: `fixed_s` and, one after the other, a recorded `loads_s`."""

    fixed_s: float
    loads_s: tuple[float, ...] = ()

    @classmethod
    def around(cls, boot_s: float, loads_s: tuple[float, ...]) -> Boots:
        """Boots of about so long of which loading takes what was recorded: a machine's share is
        what the median load leaves of it."""
        if not loads_s:
            return cls(boot_s)
        return cls(max(0.0, boot_s - float(np.median(loads_s))), loads_s)

    @property
    def mean_s(self) -> float:
        return self.fixed_s + (float(np.mean(self.loads_s)) if self.loads_s else 0.0)


@dataclass(frozen=True, slots=True)
class Outcome:
    """late: share of the work. cost: replicas in the mean, starting ones counted. boots, most:
    replicas started, and at once."""

    late: float
    cost: float
    boots: int = 0
    most: int = 0


@dataclass
class Replay:
    """A policy in this world.

    Attributes:
        work: what comes in each second. speed: what a replica does in one.
        first: replicas that run at the beginning.
        every_s: seconds between decisions.
    """

    work: Series
    speed: float
    boots: Boots
    first: int
    every_s: int = DECIDE_S
    spec: ScalingSpec = field(init=False)

    def __post_init__(self) -> None:
        self.spec = ScalingSpec(
            (
                PoolSpec(
                    "pool",
                    min_replicas=1,
                    max_replicas=1_000_000,
                    target_ongoing=self.speed * SERVICE_S,
                    work_s=self.speed,
                    boot_s=self.boots.mean_s,
                ),
            ),
            max_wait_s=WAIT_S,
        )

    def run(self, policy: Step) -> Outcome:
        """Every decision is the policy's, on the signals of this world."""
        speed, every_s, spec = self.speed, self.every_s, self.spec
        fixed_s = self.boots.fixed_s
        loads_s = islice(cycle(self.boots.loads_s or (0.0,)), len(self.work), None)
        state = State()
        running, starting = self.first, deque[tuple[float, int]]()  # when it serves, was asked for
        backlog = late = paid = served = 0.0
        came = missed = done = 0.0
        booted: list[float] = []
        boots, most = 0, running
        for now_s, work in enumerate(self.work.tolist()):
            if now_s % every_s == 0:
                signals = PoolSignals(
                    "pool",
                    running,
                    starting=tuple([float(now_s - asked_s) for _, asked_s in starting]),
                    ongoing=backlog + done / every_s * SERVICE_S,
                    queued=backlog,
                    arrivals=came,
                    late=missed,
                    work_in=came,
                    replica_work_s=speed,
                    queue_age_s=backlog / (running * speed) if running else 0.0,
                    boots_s=tuple(booted),
                )
                decision, state = policy(Signals(float(now_s), (signals,)), state, spec)
                target = decision.targets[0].replicas
                came = missed = done = 0.0
                booted.clear()
                more = target - running - len(starting)
                boots += max(0, more)
                for _ in range(more):
                    starting.append((now_s + fixed_s + next(loads_s), now_s))
                while more < 0 and starting:
                    starting.pop()
                    more += 1
                running += min(0, more)
                most = max(most, target)
            if starting:
                ready = [start for start in starting if start[0] <= now_s]
                for start in ready:
                    starting.remove(start)
                    booted.append(start[0] - start[1])
                running += len(ready)
            capacity = running * speed
            if work > 0.0:
                waits = _late(backlog, work, capacity)
                late += waits
                missed += waits
                came += work
            backlog += work
            served = min(backlog, capacity)
            done += served
            backlog = min(backlog - served, MOST_S * max(capacity, speed))
            paid += running + len(starting)
        total = float(self.work.sum())
        return Outcome(late / total if total else 0.0, paid / len(self.work), boots, most)


def _late(backlog: float, work: float, capacity: float) -> float:
    """How much of a second's work waits too long."""
    allowed = WAIT_S * capacity
    if backlog > allowed or capacity <= 0.0:
        return work
    over = backlog + work - capacity - allowed
    # The queue grows evenly through the second: the last part of it comes too late.
    return work * min(1.0, over / (work - capacity)) if over > 0.0 else 0.0


# ---- schedules known beforehand ------------------------------------------------------------------


def largest(values: Counts, window: int) -> Counts:
    """The largest of each value and the `window - 1` before it."""
    found, width = values.copy(), 1
    while width < window:
        shift = min(width, window - width)
        wider = found.copy()
        np.maximum(found[shift:], found[:-shift], out=wider[shift:])
        found, width = wider, width + shift
    return found


def running(targets: Counts, first: int, boot_s: int, seconds: int) -> Counts:
    """Replicas that serve in each second: those wanted ever since a boot ago.

    Args:
        targets: one each DECIDE_S. first: that run at the beginning.
    """
    wanted = np.repeat(targets, DECIDE_S)[:seconds]
    whole = np.concatenate([np.full(boot_s, first), wanted])
    return -largest(-whole, boot_s + 1)[boot_s:]


def late_share(work: Series, capacity: Series) -> float:
    """Share of the work that waits too long, where each second has this capacity."""
    grows = work - capacity
    total = np.cumsum(grows)
    floor = np.minimum.accumulate(np.minimum(total, 0.0))
    after = total - floor
    before = np.concatenate([[0.0], after[:-1]])
    most = MOST_S * capacity
    if (after > most).any():
        before = _bounded(work, capacity, before, after, most)
    allowed = WAIT_S * capacity
    over = before + grows - allowed
    suspects = np.flatnonzero((over > 0.0) | (before > allowed))
    late = sum(
        _late(b, w, c)
        for b, w, c in zip(
            before[suspects].tolist(),
            work[suspects].tolist(),
            capacity[suspects].tolist(),
            strict=True,
        )
    )
    return float(late / work.sum())


def _bounded(work: Series, capacity: Series, before: Series, after: Series, most: Series) -> Series:
    """The backlog before each second if the queue is bounded: only stretches in which an unbounded
    one would have been too long are gone through."""
    found = before.copy()
    empty = np.concatenate([[0], np.flatnonzero(after <= 0.0) + 1, [len(work)]])
    for at in np.unique(np.searchsorted(empty, np.flatnonzero(after > most), side="right")):
        first, last = int(empty[at - 1]), int(empty[at])
        backlog = 0.0
        rows = zip(
            work[first:last].tolist(),
            capacity[first:last].tolist(),
            most[first:last].tolist(),
            strict=True,
        )
        for second, (came, done, bound) in enumerate(rows, start=first):
            found[second] = backlog
            backlog = min(max(0.0, backlog + came - done), bound)
    return found


def first_replicas(work: Series, speed: float) -> int:
    """What runs at the beginning, for every policy: what the first five minutes need, and 15 %."""
    return max(1, math.ceil(1.15 * float(work[:300].mean()) / speed))
