"""What a scenario becomes: regions with pools, gateways, sources of requests, scalers."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from nearfield.policy import health, scale
from nearfield.policy.endpoints import CRITICALITIES, Ask, Caller, Endpoint
from nearfield.policy.route import Plan
from nearfield.policy.serve_semantics import ServeState
from nearfield.simulator import arrivals
from nearfield.simulator import scenario as s
from nearfield.simulator.arrivals import Stream, stream
from nearfield.simulator.books import Tally
from nearfield.simulator.engine import Timing
from nearfield.simulator.fleet import Pool

Step = Callable[[scale.Signals, scale.State, scale.ScalingSpec], tuple[scale.Decision, scale.State]]
"""`policy.scale.step`, or a baseline of the same shape."""

Distances = dict[tuple[str, str], float]
"""Round trips in seconds, by (place, region)."""
NEVER = -math.inf
FEW = 64
"""Requests that a mean of lengths is taken from, at least."""


class Gateway:
    """What one gateway knows.

    Attributes:
        own: its requests in flight, by pool number. rtts_s: likewise.
        plans: by class of callers; used: classes that come here. due_s: when it polls next.
        beliefs: about the regions.
    """

    __slots__ = (
        "alive", "beliefs", "due_s", "index", "name", "own", "plans", "region", "rtts_s", "used",
    )  # fmt: skip

    def __init__(self, name: str, index: int, region: int | None, rtts_s: list[float]) -> None:
        self.name = name
        self.index = index
        self.region = region
        self.rtts_s = rtts_s
        self.own = [0] * len(rtts_s)
        self.plans: list[Plan | None] = []
        self.used: set[int] = set()
        self.due_s = 0.0
        self.beliefs = health.Group()
        self.alive = True

    def restart(self, regions: list[str], now_s: float) -> None:
        """Know nothing, and believe that all regions are up."""
        self.own[:] = [0] * len(self.own)
        self.plans = [None] * len(self.plans)
        self.due_s = 0.0
        self.beliefs = health.with_members(health.Group(), regions, now_s, start="up")


@dataclass(slots=True, eq=False)
class Source:
    """One class of callers at one place.

    Attributes:
        callers: position of its plan. open: numbers of the pools that law and product let it use.
        gateway: the nearest that is alive, None: there is none;
            way_s: to it.
    """

    name: str
    place: str
    model: str
    stream: Stream
    callers: int
    criticality: int
    timeout_s: float
    open: frozenset[int]
    tally: Tally
    nearest: list[tuple[float, Gateway]]
    gateway: Gateway | None = None
    way_s: float = 0.0

    def attach(self) -> None:
        """Go to the nearest gateway that is alive."""
        self.gateway, self.way_s = None, 0.0
        for way_s, gateway in self.nearest:
            if gateway.alive:
                self.gateway, self.way_s = gateway, way_s
                gateway.used.add(self.callers)
                if gateway.plans[self.callers] is None:
                    gateway.due_s = 0.0
                return


@dataclass(slots=True, eq=False)
class Region:
    name: str
    jurisdiction: str
    pools: list[Pool] = field(default_factory=list)
    alive: bool = True
    lost_s: float = NEVER
    back_s: float = NEVER


@dataclass(slots=True, eq=False)
class Scaler:
    """The scaling of one model in one region.

    Attributes:
        tokens: see `Pool.signals`.
    """

    region: Region
    model: str
    pools: list[Pool]
    spec: scale.ScalingSpec
    step: Step
    interval_s: float
    tokens: bool
    state: scale.State = field(default_factory=scale.State)
    serve: dict[int, ServeState] = field(default_factory=dict)
    decisions: int = 0


def make_regions(scenario: s.Scenario, folder: Path) -> list[Region]:
    """The regions, each with its pools; those are numbered in this order.

    Args:
        folder: what the scenario's files are relative to.
    """
    timings = {engine.engine: Timing.of(engine) for engine in scenario.engines}
    lengths = {model.model: _lengths(scenario, model.model, folder) for model in scenario.models}
    regions: list[Region] = []
    number = 0
    for index, of in enumerate(scenario.regions):
        region = Region(of.region, of.jurisdiction)
        regions.append(region)
        for spec in scenario.pools:
            if spec.regions is not None and region.name not in spec.regions:
                continue
            endpoint = Endpoint(
                region.name,
                spec.model,
                "1",
                spec.pool,
                region.jurisdiction,
                products=None if spec.products is None else frozenset(spec.products),
                unit_usd=spec.unit_usd,
                handicap_s=spec.handicap_ms / 1000,
            )
            pool = Pool(
                spec,
                endpoint,
                timings[spec.engine],
                arrivals.draws(spec.boot, folder),
                number=number,
                region=index,
                lengths=lengths[spec.model],
            )
            region.pools.append(pool)
            number += 1
    return regions


def _lengths(scenario: s.Scenario, model: str, folder: Path) -> tuple[float, float]:
    """Mean tokens of the model's first requests: what an operator would have planned with."""
    found: list[tuple[int, int]] = []
    for traffic in scenario.traffic:
        if traffic.model == model:
            sample = stream(traffic, folder, random.Random(0), start_s=0.0, utc_offset_h=0.0)
            seconds = 1.0
            part: list[tuple[int, int]] = []
            while len(part) < FEW and seconds < 1e7:
                part = sample.tick(seconds, 4 * FEW).lengths or part
                seconds *= 4.0
            found += part
    if not found:
        return 1.0, 1.0
    count = len(found)
    return sum(pair[0] for pair in found) / count, sum(pair[1] for pair in found) / count


def make_gateways(scenario: s.Scenario, regions: list[Region], table: Distances) -> list[Gateway]:
    """One for each region, in their order, then one for each site."""
    gateways: list[Gateway] = []
    places: list[tuple[str, int | None]] = [(r.name, i) for i, r in enumerate(regions)]
    places += [(site.site, None) for site in scenario.sites]
    for name, region in places:
        rtts_s = [table[name, r.name] for r in regions for _ in r.pools]
        gateway = Gateway(name, len(gateways), region, rtts_s)
        gateway.restart([r.name for r in regions], 0.0)
        gateways.append(gateway)
    return gateways


def make_sources(
    scenario: s.Scenario,
    folder: Path,
    regions: list[Region],
    gateways: list[Gateway],
    table: Distances,
    *,
    seed: int,
    window_s: float,
) -> tuple[list[Source], list[tuple[Ask, Caller]]]:
    """All sources, and the classes of callers that their `callers` counts."""
    offsets = {r.region: r.utc_offset_h for r in scenario.regions}
    offsets |= {site.site: site.utc_offset_h for site in scenario.sites}
    slos = {model.model: model.slo for model in scenario.models}
    classes: list[tuple[Ask, Caller]] = []
    sources: list[Source] = []
    for traffic in scenario.traffic:
        allowed = None if traffic.jurisdictions is None else frozenset(traffic.jurisdictions)
        slo = slos[traffic.model]
        caller = Caller(allowed, traffic.product, traffic.mode, slo.ttft_s)
        callers = (Ask(traffic.model), caller)
        if callers not in classes:
            classes.append(callers)
        open_ = frozenset(
            pool.number
            for region in regions
            for pool in region.pools
            if pool.spec.model == traffic.model and _may_use(caller, pool.endpoint)
        )
        draws = traffic.draws or traffic.traffic
        for place in traffic.origin or [region.name for region in regions]:
            nearest = [
                (0.0 if gateway.name == place else table[place, gateway.name], gateway)
                for gateway in gateways
                if gateway.name == place or _stands_in(gateway, regions, allowed)
            ]
            nearest.sort(key=lambda way: (way[0], way[1].index))
            requests = stream(
                traffic,
                folder,
                random.Random(f"{seed} {draws} {place}"),
                start_s=scenario.start_s,
                utc_offset_h=offsets[place],
            )
            sources.append(
                Source(
                    traffic.traffic,
                    place,
                    traffic.model,
                    requests,
                    classes.index(callers),
                    CRITICALITIES.index(traffic.criticality),
                    traffic.timeout_s,
                    open_,
                    Tally(window_s, slo.ttft_s, slo.total_s or math.inf),
                    nearest,
                )
            )
    for gateway in gateways:
        gateway.plans = [None] * len(classes)
    for source in sources:
        source.attach()
    return sources, classes


def _may_use(caller: Caller, endpoint: Endpoint) -> bool:
    """What must hold wherever a request is sent, written down apart from the policy's filters."""
    if caller.jurisdictions is not None and endpoint.jurisdiction not in caller.jurisdictions:
        return False
    return endpoint.products is None or caller.product in endpoint.products


def _stands_in(gateway: Gateway, regions: list[Region], allowed: frozenset[str] | None) -> bool:
    """Whether callers may come to it when their own gateway is gone."""
    if gateway.region is None:
        return False
    return allowed is None or regions[gateway.region].jurisdiction in allowed


def make_scalers(scenario: s.Scenario, regions: list[Region], step: Step) -> list[Scaler]:
    """One for each region and model. `step`: of those whose policy is `nearfield`."""
    scalers = []
    for region in regions:
        for model in scenario.models:
            pools = [pool for pool in region.pools if pool.spec.model == model.model]
            if not pools:
                continue
            scaling = model.scaling
            tokens = scaling.signals == "tokens"
            spec = scale.ScalingSpec(
                tuple(pool.scaling_spec(tokens=tokens) for pool in pools),
                max_wait_s=scaling.max_wait_s,
                max_late=scaling.max_late,
                max_usd_per_hour=scaling.max_usd_per_hour or math.inf,
                hold_s=scaling.hold_s,
                idle_s=scaling.idle_s,
            )
            chosen = step
            if scaling.policy == "static":
                chosen = static({pool.spec.pool: pool.initial for pool in pools})
            scalers.append(
                Scaler(region, model.model, pools, spec, chosen, scaling.interval_s, tokens)
            )
    return scalers


def static(initial: dict[str, int]) -> Step:
    """A baseline: always as many as at the beginning."""

    def step(
        signals: scale.Signals, state: scale.State, spec: scale.ScalingSpec
    ) -> tuple[scale.Decision, scale.State]:
        targets = tuple(
            scale.PoolTarget(pool.name, initial[pool.name], (), f"static: {initial[pool.name]}")
            for pool in spec.pools
        )
        return scale.Decision(targets, "static"), replace(state, now_s=signals.now_s)

    return step
