"""Products that share a model, and how each fares on the pools they are given.

Latency is the time to the first token. A request that was refused, or given up, never had one: it
counts as slower than all others, in percentiles too.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from nearfield.core.errors import BadRequest
from nearfield.core.problems import did_you_mean
from nearfield.simulator import scenario as s
from nearfield.simulator.arrivals import stream
from nearfield.simulator.books import Histogram, merged
from nearfield.simulator.engine import Timing
from nearfield.simulator.events import EventWorld
from nearfield.simulator.fairness import FairWorld
from nearfield.simulator.limited import LimitedWorld

PEAK = 0.1
"""The busiest tenth of the time, by the work that arrives, is the peak."""
WINDOW_S = 10.0
OVER_S = 2.0
"""What takes longer than this has lost its user's patience. Assumed."""
SPILL_MS = 250.0
"""How much sooner the others' pool must promise an answer before X leaves its own for it."""
SHARED = "shared"
Order = Literal["first come", "in turn"]


# ---- what came out -------------------------------------------------------------------------------


@dataclass(slots=True)
class Fare:
    """How one product fared, or several together.

    Attributes:
        over: of those that ended, slower than `OVER_S` or failed. failed: refused or given up.
        peak, peak_over: likewise, in the peak only.
    """

    ttft: Histogram = field(default_factory=Histogram)
    ended: int = 0
    over: int = 0
    failed: int = 0
    peak: int = 0
    peak_over: int = 0

    def quantile_s(self, q: float) -> float:
        """Infinite where so many failed."""
        total = self.ttft.count + self.failed
        if not total or q * total > self.ttft.count:
            return math.inf if total else 0.0
        return self.ttft.quantile(q * total / self.ttft.count) or 0.0

    @property
    def p99_s(self) -> float:
        return self.quantile_s(0.99)

    @property
    def over_share(self) -> float:
        return self.over / self.ended if self.ended else 0.0

    @property
    def peak_over_share(self) -> float:
        return self.peak_over / self.peak if self.peak else 0.0

    @property
    def failed_share(self) -> float:
        return self.failed / self.ended if self.ended else 0.0

    @classmethod
    def all_of(cls, fares: Sequence[Fare]) -> Fare:
        whole = cls()
        for fare in fares:
            whole.ttft.merge(fare.ttft)
            whole.ended += fare.ended
            whole.over += fare.over
            whole.failed += fare.failed
            whole.peak += fare.peak
            whole.peak_over += fare.peak_over
        return whole


@dataclass(frozen=True, slots=True)
class Group:
    """Pools that share nothing with others, and who uses them.

    Attributes:
        pools: (whose, replicas); of `SHARED` everybody's in the group.
        order: of the prompts in a replica: first come, or products in turn.
        limits: tokens a minute by product, for those that have a limit.
    """

    products: tuple[str, ...]
    pools: tuple[tuple[str, int], ...]
    order: Order = "first come"
    limits: tuple[tuple[str, int], ...] = ()

    @property
    def replicas(self) -> int:
        return sum(count for _, count in self.pools)


# ---- the case ------------------------------------------------------------------------------------


class Case:
    """One model's products in one region, and what runs of them have shown.

    Attributes:
        pool: the one that is shared now; its engine and price are every pool's.
        work: tokens that arrive, by product and window.
    """

    def __init__(
        self,
        scenario: s.Scenario,
        folder: Path,
        *,
        model: str | None = None,
        usd_per_hour: float | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            folder: what its files are relative to.
            model: where it has several. usd_per_hour, seed: instead of the scenario's.

        Raises:
            BadRequest: it is no case of several products on one pool in one region.
            TraceError: a recorded file cannot be used.
        """
        self.model = _model(scenario, model)
        pools = [pool for pool in scenario.pools if pool.model == self.model]
        shared = [pool for pool in pools if pool.products is None]
        if not shared:
            raise BadRequest(
                f"pools: no pool of {self.model} is everybody's: leave out `products` of the pool "
                "whose engine and price are to be compared",
                param="pools",
            )
        if len(scenario.regions) != 1:
            raise BadRequest(
                f"regions: {len(scenario.regions)} regions; layouts are compared in one: keep one",
                param="regions",
            )
        self.pool = shared[0]
        if usd_per_hour is not None:
            self.pool = self.pool.model_copy(update={"usd_per_hour": usd_per_hour})
        self.scenario = scenario
        self.folder = folder
        self.seed = scenario.seed if seed is None else seed
        self.traffic: dict[str, list[s.Traffic]] = {}
        for traffic in scenario.traffic:
            if traffic.model == self.model:
                self.traffic.setdefault(traffic.product or traffic.traffic, []).append(traffic)
        self.products = tuple(self.traffic)
        if len(self.products) < 2:
            raise BadRequest(
                f"traffic: {self.model} has {len(self.products)} product: give traffic a "
                "`product`, at least two of them",
                param="traffic",
            )
        self.window_s = scenario.window_s or WINDOW_S
        self.requests = self.runs = 0
        self.work = self._work()
        self._fared: dict[Group, dict[str, Fare]] = {}

    def _work(self) -> dict[str, Counter[int]]:
        scenario = self.scenario
        place = scenario.regions[0]
        offsets = {site.site: site.utc_offset_h for site in scenario.sites}
        offsets[place.region] = place.utc_offset_h
        found: dict[str, Counter[int]] = defaultdict(Counter)
        self.lengths: dict[str, tuple[float, float, float]] = {}
        for name, traffics in self.traffic.items():
            count = prompts = answers = 0
            for traffic in traffics:
                for origin in traffic.origin or [place.region]:
                    # The same draws as `World`'s of this seed.
                    rng = random.Random(f"{self.seed} {traffic.draws or traffic.traffic} {origin}")
                    source = stream(
                        traffic,
                        self.folder,
                        rng,
                        start_s=scenario.start_s,
                        utc_offset_h=offsets[origin],
                    )
                    for came_s, prompt, answer in source.take(scenario.duration_s):
                        found[name][int(came_s / self.window_s)] += prompt + answer
                        count, prompts, answers = count + 1, prompts + prompt, answers + answer
            if not count:
                raise BadRequest(f"traffic: {name} sends nothing in this time", param="traffic")
            rate = count / scenario.duration_s
            self.lengths[name] = (rate, prompts / count, answers / count)
        return found

    @cached_property
    def peak(self) -> frozenset[int]:
        """The busiest windows."""
        whole: Counter[int] = Counter()
        for work in self.work.values():
            whole.update(work)
        count = math.ceil(PEAK * self.scenario.duration_s / self.window_s)
        return frozenset(sorted(whole, key=lambda i: (-whole[i], i))[:count])

    @cached_property
    def noisiest(self) -> str:
        """The product whose work exceeds its own mean the most while it is busiest."""
        windows = self.scenario.duration_s / self.window_s

        def excess(name: str) -> float:
            work = self.work[name]
            mean = sum(work.values()) / windows
            return sum(work[i] for i in self.peak) / len(self.peak) - mean

        return max(self.products, key=excess)

    def least(self, products: Sequence[str]) -> int:
        """Replicas that can do the mean of the products' work."""
        return max(1, math.ceil(self._busy(products)))

    def enough(self, utilisation: float) -> int:
        """Replicas of a pool for everybody that are so busy in the mean."""
        return max(1, math.ceil(self._busy(self.products) / utilisation))

    def _busy(self, products: Sequence[str]) -> float:
        """Replicas that the products keep busy in the mean."""
        timing = Timing.of(next(e for e in self.scenario.engines if e.engine == self.pool.engine))
        rates = [self.lengths[name] for name in products]
        rps = sum(rate for rate, _, _ in rates)
        prompt = sum(rate * prompt for rate, prompt, _ in rates) / rps
        answer = sum(rate * answer for rate, _, answer in rates) / rps
        return rps / timing.full_rps(prompt, answer)

    def fares(self, group: Group) -> dict[str, Fare]:
        """How each product fares there. Simulated once, event by event."""
        if group not in self._fared:
            world = self._world(group)
            world.run()
            self.runs += 1
            self.requests += sum(source.tally.arrived for source in world.sources)
            fares = {name: Fare() for name in group.products}
            owner = {t.traffic: name for name in group.products for t in self.traffic[name]}
            for source in world.sources:
                tally, fare = source.tally, fares[owner[source.name]]
                ttft, _ = merged([tally])
                fare.ttft.merge(ttft)
                fare.ended += tally.ended
                fare.over += tally.late
                fare.failed += tally.refused + tally.expired + tally.lost
                for i in self.peak:
                    if i in tally.windows:
                        fare.peak += tally.windows[i].ended
                        fare.peak_over += tally.windows[i].late
            self._fared[group] = fares
        return self._fared[group]

    def _world(self, group: Group) -> EventWorld:
        scenario = self._scenario(group)
        if group.limits:
            limits = {
                traffic.traffic: (name, tokens)
                for name, tokens in group.limits
                for traffic in self.traffic[name]
            }
            return LimitedWorld(scenario, self.folder, seed=self.seed, limits=limits)
        if group.order == "first come":
            return EventWorld(scenario, self.folder, seed=self.seed)
        return FairWorld(scenario, self.folder, seed=self.seed)

    def _scenario(self, group: Group) -> s.Scenario:
        """The case with the group's pools and products alone. Faults are left out."""
        apart = {whose for whose, _ in group.pools} - {SHARED}
        pools = [
            self.pool.model_copy(
                update={
                    "pool": whose,
                    "products": None if whose == SHARED else [whose],
                    "handicap_ms": SPILL_MS if whose == SHARED and apart else 0.0,
                    "capacity": "on_demand",
                    "spot": None,
                    "regions": None,
                    "min_replicas": count,
                    "max_replicas": count,
                    "initial_replicas": count,
                }
            )
            for whose, count in group.pools
        ]
        traffic = [
            each.model_copy(update={"product": name})
            for name in group.products
            for each in self.traffic[name]
        ]
        model = next(m for m in self.scenario.models if m.model == self.model)
        return self.scenario.model_copy(
            update={
                "mode": "events",
                "window_s": self.window_s,
                "models": [
                    model.model_copy(
                        update={
                            "slo": s.Slo(ttft_s=OVER_S),
                            "scaling": s.Scaling(policy="static"),
                        }
                    )
                ],
                "pools": pools,
                "traffic": traffic,
                "faults": [],
            }
        )


def _model(scenario: s.Scenario, name: str | None) -> str:
    names = [model.model for model in scenario.models]
    if name is None:
        if len(names) > 1:
            raise BadRequest(
                f"--model: the scenario has {', '.join(names)}: say which", param="model"
            )
        return names[0]
    if name not in names:
        near = did_you_mean(name, names)
        remedy = f"did you mean {near}?" if near else f"it has {', '.join(names)}"
        raise BadRequest(f"--model: {name!r} is none of the scenario's: {remedy}", param="model")
    return name
