"""Replicas from launch to end: boots, spot capacity, drains, and what all of it costs.

    starting --boot--> ready --drain--> draining --empty--> gone
                         +--- taken back, lost ------------> gone

A replica costs its pool's price from the moment it is asked for until it is gone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import Literal

from nearfield.policy.endpoints import Endpoint
from nearfield.policy.scale import NO_DATA, Notice, PoolSignals, PoolSpec
from nearfield.simulator import scenario as s
from nearfield.simulator.arrivals import Draw
from nearfield.simulator.engine import Timing

Stage = Literal["starting", "ready", "draining", "gone"]

SPEED_MEMORY = 0.02
"""Weight of the newest request in what a pool knows of its requests: about the last fifty."""
LEARN_COLD = 0.5
"""Weight of the newest boot in what is expected of the next, as a gateway has it."""
TARGET_SHARE = 0.7
"""Of a batch's places: the requests a replica should have, where the scenario names none."""
BOOT_DRAWS = 64


class Replica:
    """One replica.

    Attributes:
        number: its position in the pool's lists, free again when it is gone.
        asked_s, ready_s, drained_s: when it was asked for, could serve, got nothing new any more.
        due_s: when it will be taken back; infinite: nobody said so.
        factor: times as slow as its engine. known: as far as that has been noticed.
    """

    __slots__ = (
        "asked_s", "drained_s", "due_s", "factor", "id", "known", "number", "pool", "ready_s",
        "stage",
    )  # fmt: skip

    def __init__(self, pool: Pool, number: int, name: str, now_s: float) -> None:
        self.pool = pool
        self.number = number
        self.id = name
        self.stage: Stage = "starting"
        self.asked_s = now_s
        self.ready_s = self.drained_s = math.inf
        self.due_s = math.inf
        self.factor = self.known = 1.0


class Pool:
    """One endpoint: the replicas of a model on one engine in one region.

    Attributes:
        number: the endpoint's, for all gateways. region: its region's index.
        target: what the last decision wants.
        usd, seconds: what it has cost, and replica-seconds by stage.
        capacity: replicas that can be had now; infinite where nothing bounds them.
        refused: whether the last launch found none.
        load: requests there now, running and waiting; waiting: those of them without a place.
        prompt, answer, first_byte_s, hold_s: of its requests lately, mean.
    """

    __slots__ = (
        "_numbers",
        "_since_s",
        "answer",
        "arrivals",
        "boot",
        "boots_s",
        "capacity",
        "cold_start_s",
        "draining",
        "endpoint",
        "first_byte_s",
        "hold_s",
        "late",
        "launched",
        "load",
        "lost",
        "lost_all",
        "number",
        "price_usd_s",
        "prompt",
        "queue_age_s",
        "ready",
        "refusals",
        "refused",
        "region",
        "replicas",
        "seconds",
        "served",
        "slots",
        "spec",
        "starting",
        "target",
        "timing",
        "usd",
        "waiting",
        "work_in",
    )  # fmt: skip

    def __init__(
        self,
        spec: s.Pool,
        endpoint: Endpoint,
        timing: Timing,
        boot: Draw,
        *,
        number: int,
        region: int,
        lengths: tuple[float, float],
    ) -> None:
        """
        Args:
            lengths: mean tokens of the prompts and answers that are expected.
        """
        self.spec = spec
        self.endpoint = endpoint
        self.timing = timing
        self.boot = boot
        self.number = number
        self.region = region
        self.price_usd_s = spec.usd_per_hour / 3600
        self.replicas: dict[str, Replica] = {}
        self.starting = self.ready = self.draining = 0
        self.target = 0
        self.launched = self.lost_all = self.served = 0
        self.usd = 0.0
        self.seconds = {"starting": 0.0, "ready": 0.0, "draining": 0.0}
        self.capacity = math.inf
        self.refused = False
        self.slots = 0
        self.load = self.waiting = 0
        self.queue_age_s = 0.0
        self.prompt, self.answer = lengths
        self.first_byte_s = timing.mean_prefill_s(self.prompt, 0.0)
        self.hold_s = timing.alone_s(self.prompt, self.answer)
        sample = random.Random(0)
        self.cold_start_s = sum(boot(sample) for _ in range(BOOT_DRAWS)) / BOOT_DRAWS
        # Since the last decision.
        self.arrivals = self.late = self.lost = self.refusals = 0
        self.work_in = 0.0
        self.boots_s: list[float] = []
        self._since_s = 0.0
        self._numbers: list[int] = []

    # ---- replicas -------------------------------------------------------------------------------

    @property
    def present(self) -> int:
        """Replicas that cost."""
        return self.starting + self.ready + self.draining

    @property
    def serving(self) -> int:
        """Replicas that count for the target."""
        return self.starting + self.ready

    @property
    def initial(self) -> int:
        """Replicas at the beginning."""
        return max(self.spec.initial_replicas or 0, self.spec.min_replicas)

    @property
    def kept(self) -> int:
        """Replicas that hold capacity and will not be taken back."""
        return sum(1 for replica in self.replicas.values() if replica.due_s == math.inf)

    def take_number(self) -> int:
        return self._numbers.pop() if self._numbers else len(self.replicas)

    def accrue(self, now_s: float) -> None:
        """Count what the replicas cost up to now. Before every change of their stages."""
        passed_s = now_s - self._since_s
        if passed_s > 0.0:
            seconds = self.seconds
            seconds["starting"] += self.starting * passed_s
            seconds["ready"] += self.ready * passed_s
            seconds["draining"] += self.draining * passed_s
            self.usd += self.present * passed_s * self.price_usd_s
            self._since_s = now_s

    def reprice(self, usd_per_hour: float, now_s: float) -> None:
        """A replica costs so much from now on."""
        self.accrue(now_s)
        self.price_usd_s = usd_per_hour / 3600

    def to(self, replica: Replica, stage: Stage, now_s: float) -> None:
        """Change a replica's stage."""
        self.accrue(now_s)
        before = replica.stage
        if before != "gone" and replica.id in self.replicas:
            setattr(self, before, getattr(self, before) - 1)
        replica.stage = stage
        if stage == "gone":
            del self.replicas[replica.id]
            self._numbers.append(replica.number)
        else:
            self.replicas[replica.id] = replica
            setattr(self, stage, getattr(self, stage) + 1)
        self.slots = self.ready * self.timing.slots

    def to_stop(self, count: int, load_of: dict[str, int]) -> Iterator[Replica]:
        """Which replicas are given up first: those that start, the youngest first; then those that
        will be taken back, then the emptiest."""
        stages = {"starting": 0, "ready": 1}
        found = [r for r in self.replicas.values() if r.stage in stages]
        found.sort(
            key=lambda r: (
                stages[r.stage],
                -r.asked_s if r.stage == "starting" else r.due_s,
                load_of.get(r.id, 0),
                -r.asked_s,
                r.id,
            )
        )
        yield from found[:count]

    # ---- what it knows of its requests ----------------------------------------------------------

    def learn(self, prompt: float, answer: float, first_byte_s: float, hold_s: float) -> None:
        """One more request was answered."""
        self.prompt += SPEED_MEMORY * (prompt - self.prompt)
        self.answer += SPEED_MEMORY * (answer - self.answer)
        self.first_byte_s += SPEED_MEMORY * (first_byte_s - self.first_byte_s)
        self.hold_s += SPEED_MEMORY * (hold_s - self.hold_s)

    def booted(self, took_s: float) -> None:
        self.boots_s.append(took_s)
        self.cold_start_s += LEARN_COLD * (took_s - self.cold_start_s)

    @property
    def replica_work_s(self) -> float:
        """Tokens a second of one full replica, of requests as they are now."""
        tokens = self.prompt + self.answer
        return self.timing.full_rps(self.prompt, self.answer) * tokens

    # ---- for the policy -------------------------------------------------------------------------

    def scaling_spec(self, *, tokens: bool) -> PoolSpec:
        """As `policy.scale` is told of it once.

        Args:
            tokens: replicas tell of their work in tokens, and their speed is known.
        """
        spec = self.spec
        target = spec.target_ongoing
        return PoolSpec(
            name=spec.pool,
            kind=spec.capacity,
            zone=spec.zone,
            products=frozenset(spec.products or ()),
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            usd_per_hour=spec.usd_per_hour,
            target_ongoing=TARGET_SHARE * self.timing.slots if target is None else target,
            work_s=self.replica_work_s if tokens else NO_DATA,
            boot_s=self.cold_start_s,
        )

    def signals(self, now_s: float, *, tokens: bool) -> PoolSignals:
        """What happened since the last call, and how it stands."""
        notices = tuple(
            Notice(replica.id, replica.due_s)
            for replica in self.replicas.values()
            if replica.due_s < math.inf and replica.stage == "ready"
        )
        signals = PoolSignals(
            name=self.spec.pool,
            running=self.ready,
            starting=tuple(
                now_s - r.asked_s for r in self.replicas.values() if r.stage == "starting"
            )
            if self.starting
            else (),
            draining=self.draining,
            ongoing=float(self.load),
            queued=float(self.waiting),
            arrivals=float(self.arrivals),
            late=float(self.late),
            work_in=self.work_in if tokens else NO_DATA,
            replica_work_s=self.replica_work_s if tokens else NO_DATA,
            queue_age_s=self.queue_age_s,
            boots_s=tuple(self.boots_s),
            usd_per_hour=3600 * self.price_usd_s,
            notices=notices,
            lost=self.lost,
            refused=self.refusals,
        )
        self.arrivals = self.late = self.lost = self.refusals = 0
        self.work_in = 0.0
        self.boots_s = []
        return signals


def usd(pools: Iterable[Pool]) -> float:
    """What they cost in an hour as they stand."""
    return 3600 * sum(pool.present * pool.price_usd_s for pool in pools)
