"""What is known of a model's pools, how they are to be scaled, and what was decided: plain data.

`nearfield.policy.scale` reads the first two and makes the third. A signal that was not measured is
`NO_DATA`, which is not 0: nothing is scaled down on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

CapacityKind = Literal["spot", "on_demand"]


class NoData(Enum):
    """The type of what nobody measured."""

    NO_DATA = "no data"

    def __repr__(self) -> str:
        return "NO_DATA"


NO_DATA: Final = NoData.NO_DATA

Measured = float | NoData
"""A number, or `NO_DATA`."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A running replica that its cloud will take back.

    Attributes:
        replica: its id.
        due_s: when it will be gone, on the signals' clock.
    """

    replica: str
    due_s: float


@dataclass(frozen=True, slots=True)
class PoolSignals:
    """What is known of one pool now.

    "Since the last step" means since the signals before these, whatever the time between.

    Attributes:
        name: as in the spec.
        running: replicas that can serve, without those draining.
        starting: ages of the replicas that were asked for and cannot serve yet, seconds. Infinite:
            it waits for a machine that cannot be had now.
        draining: replicas that finish what they have and get nothing new. They cost, and count
            for no target.
        ongoing: requests in the pool, queued ones included.
        queued: those of them that no replica computes yet.
        arrivals: requests that came since the last step.
        late: requests since the last step that began to be computed after `max_wait_s`, or were
            refused because the queue was full.
        work_in: work that came since the last step, in the pool's unit of work (a token, a
            request): whatever `replica_work_s` counts.
        replica_work_s: work a second that one replica gets done when it is full, measured.
        queue_age_s: for how long the longest-waiting request has waited.
        boots_s: what each boot that ended well since the last step took, from asking for a replica
            to its serving, seconds.
        usd_per_hour: price of one replica now. `NO_DATA`: the spec's.
        notices: running replicas that will be taken back. They are in `running`.
        lost: running replicas that their cloud began to take back since the last step: they got a
            notice, or were gone without one.
        refused: launches that failed since the last step for want of capacity, or were taken back
            before they served. They are not in `starting` any more.
    """

    name: str
    running: int
    starting: tuple[float, ...] = ()
    draining: int = 0
    ongoing: Measured = NO_DATA
    queued: Measured = NO_DATA
    arrivals: Measured = NO_DATA
    late: Measured = NO_DATA
    work_in: Measured = NO_DATA
    replica_work_s: Measured = NO_DATA
    queue_age_s: Measured = NO_DATA
    boots_s: tuple[float, ...] = ()
    usd_per_hour: Measured = NO_DATA
    notices: tuple[Notice, ...] = ()
    lost: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True)
class Signals:
    """What is known of one model now.

    Attributes:
        now_s: seconds on a clock that never runs backwards and whose day of 86,400 s begins at
            some local midnight: Unix time will do.
        pools: one for each pool of the spec that answers. One that is left out is `NO_DATA`
            altogether: its target stays.
    """

    now_s: float
    pools: tuple[PoolSignals, ...]


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One pool of the model: replicas on one class of accelerators, of one kind, in one zone.

    Attributes:
        kind: what its machines are. zone: where: spot pools of several zones are spread over.
        products: whose traffic it takes; empty: everybody's. Pools with the same products are
            scaled together.
        min_replicas, max_replicas: bounds that nothing breaks.
        usd_per_hour: price of one replica where the signals bring none.
        target_ongoing: requests that one replica should have at once.
        work_s: work a second of one full replica, until it is measured. Pools that are scaled
            together are compared by it: give it for all or none of them.
        boot_s: what a boot takes, until one is measured.
    """

    name: str
    kind: CapacityKind = "on_demand"
    zone: str = ""
    products: frozenset[str] = frozenset()
    min_replicas: int = 0
    max_replicas: int = 1
    usd_per_hour: float = 1.0
    target_ongoing: float = 2.0
    work_s: Measured = NO_DATA
    boot_s: float = 60.0


@dataclass(frozen=True, slots=True)
class ScalingSpec:
    """How one model is scaled. The defaults are meant for every model: see docs/autoscaling.md.

    Attributes:
        pools: the preferred ones first among equally cheap.
        max_wait_s: a request that waits longer is late.
        max_late: share of requests that may be late.
        max_usd_per_hour: the bill of all pools together never passes it, draining replicas
            counted. Only `min_replicas` stay whatever they cost.
        hold_s: capacity is given up when nothing of so long asked for it.
        idle_s: a pool that may go to zero does when nothing came for so long.
    """

    pools: tuple[PoolSpec, ...]
    max_wait_s: float = 2.0
    max_late: float = 0.01
    max_usd_per_hour: float = float("inf")
    hold_s: float = 600.0
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        names = [pool.name for pool in self.pools]
        if len(set(names)) < len(names):
            raise ValueError(f"pools must have different names, found {', '.join(names)}")
        for pool in self.pools:
            if not 0 <= pool.min_replicas <= pool.max_replicas:
                raise ValueError(
                    f"{pool.name}: min_replicas {pool.min_replicas} and max_replicas "
                    f"{pool.max_replicas} must be 0 <= min <= max"
                )
            _above_zero(pool.name, target_ongoing=pool.target_ongoing, boot_s=pool.boot_s)
            if pool.work_s is not NO_DATA:
                _above_zero(pool.name, work_s=pool.work_s)
            if not 0.0 <= pool.usd_per_hour < float("inf"):
                raise ValueError(f"{pool.name}: usd_per_hour {pool.usd_per_hour} is not a price")
        _above_zero("scaling", max_wait_s=self.max_wait_s, max_usd_per_hour=self.max_usd_per_hour)
        if not 0.0 < self.max_late < 1.0:
            raise ValueError(f"max_late {self.max_late} must be a share between 0 and 1")


def _above_zero(owner: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0.0:
            raise ValueError(f"{owner}: {name} {value} must be above 0")


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """What one pool should have.

    Attributes:
        replicas: running and starting ones together, without those draining.
        drain: ids of the replicas to stop first: those with a notice, the earliest first. They may
            be more than the target gives up: their replacements are in it.
        reason: why, one sentence with its numbers.
    """

    name: str
    replicas: int
    drain: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What all pools should have.

    Attributes:
        targets: one for each pool of the spec, in its order.
        reason: the whole in one line.
        terms: the numbers that led there, by name, for dashboards and tests: for instance
            `level`, `expected`, `enough`, in work a second.
    """

    targets: tuple[PoolTarget, ...]
    reason: str
    terms: Mapping[str, float] = field(default_factory=dict)

    def target(self, name: str) -> PoolTarget:
        """The target of the pool so named. Raises: KeyError, where there is none."""
        for target in self.targets:
            if target.name == name:
                return target
        raise KeyError(name)
