"""What isolation costs, and what it is worth: products on shared, fair-queued and dedicated pools.

One model's products in one region, with the same requests at the same moments, on

    shared          one pool, first come, first served
    fair-queued     one pool, products in turn (`policy.fair`), prompt by prompt
    fair by chunk   likewise, chunk by chunk of the prompts
    dedicated       a pool for each product
    X apart         a pool for X, one for all others
    X first         a pool for X, that may use the others' as well
    limited         one pool, and a limit on some product's tokens (`policy.quota`)

each with more and more replicas, until the products that are to be protected keep what they were
promised. Pools that share nothing are simulated by themselves: what is in one changes nothing in
the other, so a few runs make up many layouts. Fleets are static, so that a cost is one number.

Latency is the time to the first token. A request that was refused, or given up, never had one: it
counts as slower than all others, in percentiles too.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product as combinations
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
MOST_FAILED = 0.02
"""A layout that refuses or gives up more of any product is none."""
MOST_MORE = 0.6
"""Replicas more than now, as a share, up to which layouts are looked at."""
SPILL_MS = 250.0
"""How much sooner the others' pool must promise an answer before X leaves its own for it."""
SHARED = "shared"
FAIR = "fair-queued"
FAIR_CHUNKS = "fair by chunk"
LIMITED = "limited"
ONE_POOL = (SHARED, FAIR, FAIR_CHUNKS)
POLICY_ONLY = (FAIR, FAIR_CHUNKS)
"""Layouts that no replica of nearfield's can be set to yet: shown, never chosen."""
Order = Literal["first come", "in turn", "in turn by chunk"]
Progress = Callable[[float], None]


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


@dataclass(frozen=True, slots=True)
class Row:
    """One layout of one size.

    Attributes:
        others: the protected products together; fares: each product by itself.
        kept: every promise is.
        dominated_by: a layout that costs no more and is no slower for the others, and can be had;
            None: it is on the frontier, or would be.
        ms_per_usd: on the frontier, milliseconds of the others' p99 that each further dollar an
            hour saves, from the cheaper one before it.
    """

    layout: str
    groups: tuple[Group, ...]
    usd_per_hour: float
    fares: Mapping[str, Fare]
    others: Fare
    kept: bool
    dominated_by: Row | None = None
    ms_per_usd: float | None = None

    @property
    def replicas(self) -> int:
        return sum(group.replicas for group in self.groups)

    @property
    def policy_only(self) -> bool:
        return self.layout in POLICY_ONLY

    @property
    def offered(self) -> bool:
        """Whether it may be chosen: replicas can be set to it, and it serves all products."""
        worst = max((fare.failed_share for fare in self.fares.values()), default=0.0)
        return not self.policy_only and worst <= MOST_FAILED

    @property
    def pools(self) -> str:
        """`assistant 3 + reports 5`."""
        return " + ".join(f"{whose} {n}" for group in self.groups for whose, n in group.pools)


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows, the cheapest first.

    Attributes:
        noisy: the product the others are protected from. now: the shared pool as it is.
        goals_s: the promised p99 by product.
        requests, runs: simulated in all.
    """

    case: Case
    noisy: str
    now: Row
    rows: tuple[Row, ...]
    goals_s: Mapping[str, float]
    requests: int
    runs: int

    @property
    def frontier(self) -> list[Row]:
        return [
            row
            for row in self.rows
            if row.dominated_by is None and (row.offered or row is self.now)
        ]

    @property
    def choice(self) -> Row | None:
        """The cheapest that keeps every promise."""
        return next((row for row in self.frontier if row.kept and row.offered), None)

    @property
    def hoped_for(self) -> Row | None:
        """A cheaper one that would, if replicas could be set to it."""
        found = next((row for row in self.rows if row.policy_only and row.kept), None)
        choice = self.choice
        if found is None or (choice is not None and choice.usd_per_hour <= found.usd_per_hour):
            return None
        return found


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
        by_chunk = group.order == "in turn by chunk"
        return FairWorld(scenario, self.folder, seed=self.seed, by_chunk=by_chunk)

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
            each.model_copy(update={"product": name, "shared": SHARED in dict(group.pools)})
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


# ---- comparing -----------------------------------------------------------------------------------


def compare(
    case: Case,
    *,
    noisy: str | None = None,
    goal_s: float = 0.7,
    goals_s: Mapping[str, float] | None = None,
    now: int | None = None,
    limits: Mapping[str, int] | None = None,
    thorough: bool = False,
    progress: Progress = lambda share: None,
) -> Comparison:
    """Every layout, in every size that is of interest.

    Args:
        noisy: the product that the others are protected from; absent: the noisiest.
        goal_s: the p99 that every other product is promised. goals_s: instead of it, by product;
            the noisy one has none unless it stands here.
        now: replicas of the shared pool as it is; absent: as the scenario begins.
        limits: tokens a minute that some products may have: compared too, and never chosen where
            it refuses much.
        thorough: look at every size of every layout. Else the search ends one replica beyond the
            first layouts that keep the promises: what the next dollar would buy.

    Raises:
        BadRequest: it knows no such product.
    """
    noisy = noisy or case.noisiest
    limited = tuple(sorted((limits or {}).items()))
    for name in (noisy, *(goals_s or ()), *(limits or ())):
        if name not in case.products:
            near = did_you_mean(name, case.products)
            raise BadRequest(
                f"--noisy, --slo-p99-ms, --limit: {name!r} is no product of this case: "
                + (f"did you mean {near}?" if near else f"it has {', '.join(case.products)}"),
                param="noisy",
            )
    promised = {name: goal_s for name in case.products if name != noisy} | dict(goals_s or {})
    pool = case.pool
    present = now or pool.initial_replicas or pool.min_replicas or case.least(case.products)
    search = _Search(case, noisy, promised, present, limited, thorough, progress)
    rows = list(search.rows())
    base = search.row(SHARED, (Group(case.products, ((SHARED, present),)),))
    if all(row.groups != base.groups for row in rows):
        rows.append(base)
    done = _frontier(rows, base)
    return Comparison(
        case,
        noisy,
        next(row for row in done if row.groups == base.groups),
        tuple(done),
        promised,
        case.requests,
        case.runs,
    )


class _Search:
    """The rows of one comparison."""

    def __init__(
        self,
        case: Case,
        noisy: str,
        goals_s: Mapping[str, float],
        present: int,
        limits: tuple[tuple[str, int], ...],
        thorough: bool,
        progress: Progress,
    ) -> None:
        self.case = case
        self.noisy = noisy
        self.others = tuple(name for name in case.products if name != noisy)
        self.goals_s = goals_s
        self.sizes = range(max(1, present - 1), math.ceil(present * (1 + MOST_MORE)) + 1)
        self._limits = limits
        self._thorough = thorough
        self._progress = progress

    def rows(self) -> Iterator[Row]:
        names = self.case.products
        apart = [(name,) for name in names]
        kinds: list[tuple[str, Callable[[int], list[tuple[Group, ...]]]]] = [
            (SHARED, lambda n: [(Group(names, ((SHARED, n),)),)]),
            (FAIR, lambda n: [(Group(names, ((SHARED, n),), "in turn"),)]),
            (FAIR_CHUNKS, lambda n: [(Group(names, ((SHARED, n),), "in turn by chunk"),)]),
            ("dedicated", lambda n: self._split(apart, n)),
        ]
        if self._limits:
            limited = self._limits
            kinds.append((LIMITED, lambda n: [(Group(names, ((SHARED, n),), limits=limited),)]))
        for name in names:
            rest = tuple(other for other in names if other != name)
            if len(rest) > 1:
                kinds.append((f"{name} apart", self._apart(name, rest)))
            kinds.append((f"{name} first", self._first(name)))
        kept: set[str] = set()
        settled: set[str] = set()
        last = self.sizes[-1]
        for done, replicas in enumerate(self.sizes):
            if replicas > last:
                break
            beyond = bool(kept) and not self._thorough
            for i, (layout, options) in enumerate(kinds):
                self._progress((done + i / len(kinds)) / (last - self.sizes[0] + 1))
                if layout in settled or (beyond and layout not in (*kept, *ONE_POOL)):
                    continue
                found = [self.row(layout, groups) for groups in options(replicas)]
                found = [row for row in found if self._serves(row)]
                if not found:
                    continue
                best = min(found, key=self._worth)
                yield best
                if best.kept:
                    (kept if best.offered else settled).add(layout)
            if kept and not self._thorough:
                last = min(last, replicas if beyond else replicas + 1)
        self._progress(1.0)

    def row(self, layout: str, groups: tuple[Group, ...]) -> Row:
        fares: dict[str, Fare] = {}
        for group in groups:
            fares |= self.case.fares(group)
        fares = {name: fares[name] for name in self.case.products}
        kept = all(fares[name].p99_s <= goal for name, goal in self.goals_s.items())
        replicas = sum(group.replicas for group in groups)
        usd = replicas * self.case.pool.usd_per_hour
        others = Fare.all_of([fares[name] for name in self.others])
        return Row(layout, groups, usd, fares, others, kept)

    def _serves(self, row: Row) -> bool:
        limited = dict(self._limits) if row.layout == LIMITED else {}
        return all(
            fare.failed_share <= MOST_FAILED or name in limited for name, fare in row.fares.items()
        )

    def _worth(self, row: Row) -> tuple[bool, float, float]:
        """Of one layout and size: the promises first. Where they are kept the noisy product gets
        the rest, else the others get what there is."""
        noisy_s = row.fares[self.noisy].p99_s
        if row.kept:
            return False, noisy_s, row.others.p99_s
        return True, row.others.p99_s, noisy_s

    def _split(self, parts: Sequence[tuple[str, ...]], total: int) -> list[tuple[Group, ...]]:
        """Every way to give each part a pool of its own."""
        leasts = [self.case.least(part) for part in parts]
        spare = total - sum(leasts)
        if spare < 0:
            return []
        names = [part[0] if len(part) == 1 else SHARED for part in parts]
        return [
            tuple(
                Group(part, ((name, least + more),))
                for part, name, least, more in zip(parts, names, leasts, extra, strict=True)
            )
            for extra in combinations(range(spare + 1), repeat=len(parts))
            if sum(extra) == spare
        ]

    def _apart(self, name: str, rest: tuple[str, ...]) -> Callable[[int], list[tuple[Group, ...]]]:
        return lambda total: self._split([(name,), rest], total)

    def _first(self, name: str) -> Callable[[int], list[tuple[Group, ...]]]:
        """A pool that is enough for its mean, or one replica more; it may use the others' too."""
        case = self.case
        least = case.least((name,))

        def options(total: int) -> list[tuple[Group, ...]]:
            return [
                (Group(case.products, ((name, own), (SHARED, total - own))),)
                for own in (least, least + 1)
                if total - own >= 1
            ]

        return options


def _frontier(rows: Sequence[Row], now: Row) -> list[Row]:
    """The rows by cost, each with what dominates it, or with what its last dollars have bought."""
    ordered = sorted(rows, key=lambda row: (row.usd_per_hour, row.others.p99_s, row.layout))
    done: list[Row] = []
    best: Row | None = None
    for row in ordered:
        if best is not None and row.others.p99_s >= best.others.p99_s:
            done.append(replace(row, dominated_by=best))
            continue
        if not row.offered and row.groups != now.groups:
            done.append(row)
            continue
        gained = None
        if best is not None and math.isfinite(best.others.p99_s):
            usd = row.usd_per_hour - best.usd_per_hour
            gained = 1000 * (best.others.p99_s - row.others.p99_s) / usd if usd > 0 else None
        best = replace(row, ms_per_usd=gained)
        done.append(best)
    return done
