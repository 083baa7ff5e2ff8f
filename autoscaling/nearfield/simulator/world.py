"""The simulated world around the policy: its clock, gateways, health, scaling and faults.

What decides is production's: `policy.route` plans and picks, `policy.health` says who is alive,
`policy.scale` says how many replicas there should be, and Ray Serve's own rules around it are
`policy.serve_semantics`. What a gateway knows is as old here as it is there: a poll a second, and
what it has sent itself. How requests are computed is the modes' part: `events` and `fluid`.

Assumed, as everywhere else in nearfield's simulations: a request reaches its region the moment it
is sent, and its round trip is added to what the client waits.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from nearfield.policy import health, scale
from nearfield.policy.endpoints import EndpointState
from nearfield.policy.route import plan
from nearfield.policy.serve_semantics import ServeOptions, ServeState, serve_target
from nearfield.simulator import scenario as s
from nearfield.simulator.books import Change, InvariantError, Sample
from nearfield.simulator.fleet import Pool, Replica, usd
from nearfield.simulator.parts import (
    NEVER,
    Gateway,
    Region,
    Scaler,
    Source,
    Step,
    make_gateways,
    make_regions,
    make_scalers,
    make_sources,
)
from nearfield.simulator.traces import distances, price_changes, spot_changes

POLL_S = (0.8, 1.2)
"""A gateway's polls, spread as `policy.health` spreads its probes."""
CONNECT_TIMEOUT_S = 1.0
"""How long a region that is silent keeps a request before it is sent elsewhere. Assumed."""
WINDOWS = 240
"""Of a report, where the scenario does not say how long they are."""


class World:
    """One run. Subclasses compute the requests.

    Attributes:
        now_s: the clock. in_flight: requests that have come and not ended.
        history: decisions that changed something, faults, losses. samples: pools by window.
    """

    def __init__(
        self,
        scenario: s.Scenario,
        folder: Path,
        *,
        step: Step = scale.step,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            folder: what the scenario's files are relative to.
            step: how models are scaled whose policy is `nearfield`.
            seed: instead of the scenario's.

        Raises:
            TraceError: a recorded file cannot be used.
        """
        self.scenario = scenario
        self.seed = scenario.seed if seed is None else seed
        self.now_s = 0.0
        self.end_s = scenario.duration_s
        self.window_s = scenario.window_s or max(1.0, scenario.duration_s / WINDOWS)
        self.in_flight = 0
        self.checks = 0
        self.history: list[Change] = []
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._ties = 0
        self._rng = random.Random(f"{self.seed} choices")
        self._boots = random.Random(f"{self.seed} boots")
        self._lives = random.Random(f"{self.seed} lives")
        self.draw = self._rng.random
        table = distances(scenario, folder)
        self.regions = make_regions(scenario, folder)
        self._by_region = {region.name: region for region in self.regions}
        self.pools = [pool for region in self.regions for pool in region.pools]
        self.samples: list[list[Sample]] = [[] for _ in self.pools]
        self._sampled: list[tuple[float, float, float]] = [(0.0, 0.0, 0.0)] * len(self.pools)
        self.gateways = make_gateways(scenario, self.regions, table)
        self.sources, self._callers = make_sources(
            scenario,
            folder,
            self.regions,
            self.gateways,
            table,
            seed=self.seed,
            window_s=self.window_s,
        )
        self.scalers = make_scalers(scenario, self.regions, step)
        self._max_wait_s = {m.model: m.scaling.max_wait_s for m in scenario.models}
        self._folder = folder

    def begin(self) -> None:
        """The state at time 0, and what is known to happen."""
        for pool in self.pools:
            spot = pool.spec.spot
            if spot is not None and spot.file is not None:
                for at_s, replicas in spot_changes(spot, self._folder):
                    if at_s <= 0:
                        pool.capacity = replicas
                    elif at_s < self.end_s:
                        self.at(at_s, self._supply, (pool, replicas))
            if pool.spec.prices is not None:
                for at_s, usd_per_hour in price_changes(pool.spec.prices, self._folder):
                    if at_s <= 0:
                        pool.reprice(usd_per_hour, 0.0)
                    elif at_s < self.end_s:
                        self.at(at_s, self._reprice, (pool, usd_per_hour))
            pool.target = pool.initial
            for _ in range(int(min(pool.target, pool.capacity))):  # they run when it begins
                replica = self._new_replica(pool)
                self._boot(replica)
        for scaler in self.scalers:
            self.at(self.draw() * scaler.interval_s, self._scale, scaler)
        for fault in self.scenario.faults:
            self.at(fault.at_s, self._fault, fault)
        self.at(self.window_s, self._sample, None)

    # ---- the clock ------------------------------------------------------------------------------

    def at(self, when_s: float, act: Callable[[Any], None], about: Any) -> None:
        """Do something then. What is due at once is done in the order it was asked for."""
        self._ties += 1
        heappush(self._events, (when_s, self._ties, act, about))

    def run(self, progress: Callable[[float], None] = lambda share: None) -> None:
        """To the end. `progress` is told the share that is done, now and then."""
        raise NotImplementedError

    def _until(self, stop_s: float) -> None:
        """All events before that moment."""
        events = self._events
        while events and events[0][0] < stop_s:
            self.now_s, _, act, about = heappop(events)
            act(about)
        self.now_s = stop_s

    # ---- gateways -------------------------------------------------------------------------------

    def refresh(self, pool: Pool) -> None:
        """Bring `load`, `waiting` and `queue_age_s` up to date."""
        raise NotImplementedError

    def poll(self, gateway: Gateway) -> None:
        """Hear from all regions, and plan anew."""
        now_s = self.now_s
        low_s, high_s = POLL_S
        gateway.due_s = now_s + low_s + (high_s - low_s) * self.draw()
        members, rules = gateway.beliefs.members, gateway.beliefs.rules
        believed = []
        for region in self.regions:
            upstream = members[region.name]
            weight = health.weight(upstream, now_s, rules)
            back_s = 0.0
            if upstream.health != "up":
                back_s = health.back_s(upstream, now_s, rules)
            believed.append((upstream.health, weight, back_s))
        own, rtts_s = gateway.own, gateway.rtts_s
        by_model: dict[str, list[EndpointState]] = {}
        for pool in self.pools:
            self.refresh(pool)
            number = pool.number
            alive, weight, back_s = believed[pool.region]
            ready = pool.ready
            by_model.setdefault(pool.spec.model, []).append(
                EndpointState(
                    pool.endpoint,
                    number,
                    rtts_s[number],
                    alive,
                    weight,
                    back_s,
                    False,
                    ready,
                    pool.slots if ready else pool.timing.slots,
                    pool.timing.max_queued * max(1, ready),
                    pool.load,
                    own[number],
                    pool.first_byte_s,
                    pool.hold_s,
                    pool.queue_age_s,
                    self._cold_start_s(pool),
                    0.0,
                )
            )
        for i in sorted(gateway.used):
            ask, caller = self._callers[i]
            states = by_model.get(ask.model, [])
            gateway.plans[i] = plan(states, ask, caller, now_s=now_s, previous=gateway.plans[i])

    def _cold_start_s(self, pool: Pool) -> float | None:
        """None: as its region says, it cannot start."""
        if pool.refused and not pool.starting:
            return None
        return pool.cold_start_s

    def _probe(self, about: tuple[Gateway, Region]) -> None:
        """One probe of a region that is not as it should be; and the next, until it is again."""
        gateway, region = about
        if not gateway.alive:
            return
        if region.alive:
            self._probed((gateway, region, True, self.now_s))
        else:
            rules = gateway.beliefs.rules
            self.at(
                self.now_s + rules.probe_timeout_s,
                self._probed,
                (gateway, region, False, self.now_s),
            )
        upstream = gateway.beliefs.members[region.name]
        steady = upstream.health == "up" and not upstream.fails and upstream.ramp_s is None
        if not (region.alive and steady):
            after_s = health.probe_after_s(gateway.beliefs.rules, self.draw())
            self.at(self.now_s + after_s, self._probe, about)

    def _probed(self, about: tuple[Gateway, Region, bool, float]) -> None:
        gateway, region, passed, sent_s = about
        in_flight = sum(gateway.own[pool.number] for pool in region.pools)
        event = health.Probed(
            region.name,
            passed,
            sent_s,
            in_flight=in_flight,
            heard_s=region.lost_s if region.lost_s > NEVER else None,
            reason="" if passed else "no answer",
        )
        self._hear(gateway, event)
        self._hear(gateway, health.Tick())

    def _hear(self, gateway: Gateway, event: health.Event) -> None:
        """What the gateway believes after it; where that is something else it plans anew."""
        gateway.beliefs, changes = health.step(gateway.beliefs, event, self.now_s, self.draw())
        for change in changes:
            gateway.due_s = self.now_s
            self._note("health", gateway.name, change.name, f"{change.after}: {change.reason}")

    # ---- scaling --------------------------------------------------------------------------------

    def _scale(self, scaler: Scaler) -> None:
        self.at(self.now_s + scaler.interval_s, self._scale, scaler)
        if not scaler.region.alive:
            return
        now_s = self.now_s
        for pool in scaler.pools:
            self.refresh(pool)
        signals = scale.Signals(
            self.scenario.start_s + now_s,
            tuple(pool.signals(now_s, tokens=scaler.tokens) for pool in scaler.pools),
        )
        before_usd = usd(scaler.pools)
        decision, scaler.state = scaler.step(signals, scaler.state, scaler.spec)
        scaler.decisions += 1
        changed: dict[str, tuple[int, int]] = {}
        forced_usd = 0.0
        for pool, target in zip(scaler.pools, decision.targets, strict=True):
            bounds = pool.spec.min_replicas, pool.spec.max_replicas
            if not bounds[0] <= target.replicas <= bounds[1]:
                raise InvariantError(
                    f"{pool.endpoint.name}: a target of {target.replicas} is not within {bounds}"
                )
            wanted = self._as_serve(scaler, pool, target.replicas)
            forced_usd += max(0, wanted - target.replicas) * 3600 * pool.price_usd_s
            if wanted != pool.target:
                changed[target.name] = (pool.target, wanted)
            pool.target = wanted
            for name in target.drain:
                replica = pool.replicas.get(name)
                if replica is not None and replica.stage == "ready":
                    self._drain(replica)
        if changed:
            words = decision.reason
            self._note("scale", scaler.region.name, scaler.model, words, changed)
        for pool in scaler.pools:  # first those that give something up: it may be what pays
            surplus = pool.serving - pool.target
            if surplus > 0:
                for replica in list(pool.to_stop(surplus, self.loads(pool))):
                    if replica.stage == "starting":
                        self._gone(replica)
                    else:
                        self._drain(replica)
        for pool in scaler.pools:
            for _ in range(pool.target - pool.serving):
                if not self._launch(pool):
                    break
        bill_usd = usd(scaler.pools)
        least_usd = sum(p.spec.min_replicas * 3600 * p.price_usd_s for p in scaler.pools)
        # What Serve started by itself costs until it is drained: no decision may add to it.
        allowed_usd = max(scaler.spec.max_usd_per_hour, least_usd, before_usd) + forced_usd
        if bill_usd > allowed_usd * (1 + 1e-9):
            raise InvariantError(
                f"{scaler.region.name}/{scaler.model}: {bill_usd:.2f} USD an hour, and "
                f"{scaler.spec.max_usd_per_hour:.2f} are allowed ({decision.reason})"
            )

    def _as_serve(self, scaler: Scaler, pool: Pool, wanted: int) -> int:
        """What Ray Serve makes of a target: at zero replicas with traffic it starts one unasked."""
        target, scaler.serve[pool.number] = serve_target(
            lambda: float(wanted),
            running=pool.ready,
            target=pool.target,
            requests=float(pool.load),
            now_s=self.now_s,
            state=scaler.serve.get(pool.number, ServeState()),
            options=ServeOptions(pool.spec.min_replicas, pool.spec.max_replicas, 0.0, 0.0, 0.0),
        )
        return target

    def _launch(self, pool: Pool) -> bool:
        """Ask for one more replica; whether there is capacity for it."""
        pool.refused = pool.capacity < math.inf and pool.kept >= pool.capacity
        if pool.refused:
            pool.refusals += 1
            return False
        replica = self._new_replica(pool)
        self.at(self.now_s + max(0.0, pool.boot(self._boots)), self._booted, replica)
        return True

    def _new_replica(self, pool: Pool) -> Replica:
        pool.launched += 1
        name = f"{pool.endpoint.region}/{pool.spec.pool}-{pool.launched}"
        replica = self.replica(pool, pool.take_number(), name)
        pool.to(replica, "starting", self.now_s)
        return replica

    def _booted(self, replica: Replica) -> None:
        if replica.stage == "starting":
            replica.pool.booted(self.now_s - replica.asked_s)
            self._boot(replica)

    def _boot(self, replica: Replica) -> None:
        pool = replica.pool
        pool.to(replica, "ready", self.now_s)
        replica.ready_s = self.now_s
        spot = pool.spec.spot
        if spot is not None and spot.mean_life_s is not None:
            life_s = self._lives.expovariate(1 / spot.mean_life_s)
            self.at(self.now_s + life_s, self._reclaim, replica)
        self.ready(replica)
        if pool.ready == 1:  # those that wait for another pool of the model to start come here
            products = pool.endpoint.products
            for other in self.regions[pool.region].pools:
                same = other.spec.model == pool.spec.model and not other.ready
                if same and products in (None, other.endpoint.products):
                    self.strand(other)

    def _drain(self, replica: Replica) -> None:
        replica.pool.to(replica, "draining", self.now_s)
        replica.drained_s = self.now_s
        self.drained(replica)
        if replica.stage == "draining":
            self.at(self.now_s + replica.pool.spec.drain_s, self._cut, replica)

    def _cut(self, replica: Replica) -> None:
        """It had its time to finish."""
        if replica.stage == "draining":
            self._gone(replica)

    def _gone(self, replica: Replica) -> None:
        if replica.stage != "gone":
            replica.pool.to(replica, "gone", self.now_s)
            self.vanished(replica)

    def _reprice(self, about: tuple[Pool, float]) -> None:
        pool, usd_per_hour = about
        pool.reprice(usd_per_hour, self.now_s)

    # ---- spot -----------------------------------------------------------------------------------

    def _supply(self, about: tuple[Pool, int]) -> None:
        """There is more or less spot capacity from now on."""
        pool, replicas = about
        pool.capacity = replicas
        pool.refused = pool.refused and pool.kept >= replicas
        excess = pool.kept - replicas
        if excess <= 0:
            return
        kept = [r for r in pool.replicas.values() if r.due_s == math.inf]
        kept.sort(key=lambda r: r.id)
        for replica in self._lives.sample(kept, excess):
            self._reclaim(replica)

    def _reclaim(self, replica: Replica) -> None:
        """It will be taken back."""
        spot = replica.pool.spec.spot
        assert spot is not None
        if replica.stage == "gone" or replica.due_s < math.inf:
            return
        replica.due_s = self.now_s + spot.notice_s
        if replica.stage == "ready":
            replica.pool.lost += 1
        self._note("notice", replica.pool.endpoint.region, replica.id, f"in {spot.notice_s:g} s")
        self.at(replica.due_s, self._lose, replica)

    def _lose(self, replica: Replica) -> None:
        if replica.stage == "gone":
            return
        pool = replica.pool
        if replica.stage == "starting":
            pool.refusals += 1
        elif replica.due_s == math.inf:
            pool.lost += 1  # one that was noticed has been counted
        pool.lost_all += 1
        self._note("lost", pool.endpoint.region, replica.id, f"while {replica.stage}")
        self._gone(replica)

    # ---- faults ---------------------------------------------------------------------------------

    def _fault(self, fault: s.LoseReplicas | s.SlowReplicas | s.LoseRegion) -> None:
        region = self._by_region[fault.region]
        if isinstance(fault, s.LoseRegion):
            region.back_s = max(region.back_s, self.now_s + fault.lasts_s)
            self._lose_region(region)
            self.at(self.now_s + fault.lasts_s, self._regain, region)
            return
        for pool in region.pools:
            if pool.spec.pool != fault.pool:
                continue
            ready = [r for r in pool.replicas.values() if r.stage == "ready"]
            for replica in ready[: fault.count]:
                if isinstance(fault, s.LoseReplicas):
                    self._lose(replica)
                else:
                    self._note("slow", region.name, replica.id, f"{fault.factor:g} times")
                    self.pace(replica, fault.factor)
                    self.at(self.now_s + fault.lasts_s, self._heal, replica)

    def _heal(self, replica: Replica) -> None:
        if replica.stage != "gone":
            self.pace(replica, 1.0)

    def _lose_region(self, region: Region) -> None:
        if not region.alive:
            return
        self._note("region lost", region.name, region.name, "it is silent")
        region.alive, region.lost_s = False, self.now_s
        index = self.regions.index(region)
        gone = self.gateways[index]
        gone.alive = False
        for source in self.sources:
            source.attach()
        self.cancel(gone)
        gone.own[:] = [0] * len(gone.own)
        for pool in region.pools:
            for replica in list(pool.replicas.values()):
                pool.lost_all += 1
                self._gone(replica)
            self.strand(pool)
        for gateway in self.gateways:
            if gateway.alive:
                self.at(self.now_s + self.draw(), self._probe, (gateway, region))

    def _regain(self, region: Region) -> None:
        if region.alive or self.now_s < region.back_s:
            return  # another fault keeps it away
        self._note("region back", region.name, region.name, "empty")
        region.alive = True
        back = self.gateways[self.regions.index(region)]
        back.alive = True
        back.restart([each.name for each in self.regions], self.now_s)
        for source in self.sources:
            source.attach()
        for other in self.regions:
            if not other.alive:
                self.at(self.now_s + self.draw(), self._probe, (back, other))
        for scaler in self.scalers:
            if scaler.region is region:
                scaler.state = scale.State()
                for pool in scaler.pools:
                    pool.target = 0
                    # What was before is nobody's news any more.
                    pool.signals(self.now_s, tokens=scaler.tokens)

    # ---- what the modes do ----------------------------------------------------------------------

    def replica(self, pool: Pool, number: int, name: str) -> Replica:
        return Replica(pool, number, name, self.now_s)

    def loads(self, pool: Pool) -> dict[str, int]:
        """Requests by replica."""
        return {}

    def ready(self, replica: Replica) -> None:
        """It can serve from now on."""

    def drained(self, replica: Replica) -> None:
        """It gets nothing new; if it has nothing, it goes at once."""

    def vanished(self, replica: Replica) -> None:
        """It is gone, with what it had."""

    def strand(self, pool: Pool) -> None:
        """What waits there for a replica waits in vain: its region is gone, or others serve."""

    def cancel(self, gateway: Gateway) -> None:
        """The gateway is gone, and with it the connections of all whose requests it took."""

    def pace(self, replica: Replica, factor: float) -> None:
        """It takes so many times as long from now on."""
        replica.factor = factor

    # ---- books ----------------------------------------------------------------------------------

    def _note(
        self,
        kind: str,
        region: str,
        subject: str,
        reason: str,
        targets: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        self.history.append(Change(self.now_s, kind, region, subject, reason, targets or {}))

    def _sample(self, _: None) -> None:
        """The end of a window."""
        for pool, samples in zip(self.pools, self.samples, strict=True):
            pool.accrue(self.now_s)
            seconds = (pool.seconds["ready"], pool.seconds["starting"], pool.seconds["draining"])
            before = self._sampled[pool.number]
            ready, starting, draining = (
                (a - b) / self.window_s for a, b in zip(seconds, before, strict=True)
            )
            samples.append(Sample(ready, starting, draining, pool.usd))
            self._sampled[pool.number] = seconds
        self.check()
        if self.now_s + self.window_s <= self.end_s * (1 + 1e-9):
            self.at(self.now_s + self.window_s, self._sample, None)

    def check(self) -> None:
        """Everything that must be true, counted anew.

        Raises:
            InvariantError: it is not.
        """
        self.checks += 1
        open_ = sum(source.tally.arrived - source.tally.ended for source in self.sources)
        if open_ != self.in_flight or open_ < 0:
            raise InvariantError(f"{open_} requests are open, {self.in_flight} are counted")
        done = sum(source.tally.done for source in self.sources)
        if done != sum(pool.served for pool in self.pools):
            raise InvariantError(f"{done} requests are answered, and pools have served others")
        for pool in self.pools:
            stages = [replica.stage for replica in pool.replicas.values()]
            counted = (stages.count("starting"), stages.count("ready"), stages.count("draining"))
            if counted != (pool.starting, pool.ready, pool.draining):
                raise InvariantError(f"{pool.endpoint.name}: replicas are miscounted: {counted}")
            if pool.kept > pool.capacity:
                raise InvariantError(f"{pool.endpoint.name}: more replicas than capacity")
            if pool.serving > pool.spec.max_replicas:
                raise InvariantError(f"{pool.endpoint.name}: more replicas than allowed")
            numbers = {replica.number for replica in pool.replicas.values()}
            if len(numbers) != len(pool.replicas):
                raise InvariantError(f"{pool.endpoint.name}: two replicas share a number")
        for gateway in self.gateways:
            if min(gateway.own, default=0) < 0:
                raise InvariantError(f"{gateway.name}: a count of requests is below zero")
        if self.now_s >= self.end_s:
            for source in self.sources:
                if not source.tally.adds_up():
                    raise InvariantError(f"{source.name}: its windows do not add up")

    def allowed(self, source: Source, gateway: Gateway, pool: Pool) -> None:
        """Whether a request may be sent there, by law, by product and as far as it lives.

        Raises:
            InvariantError: it may not.
        """
        if pool.number not in source.open:
            raise InvariantError(
                f"{source.name}: sent to {pool.endpoint.name}, outside of its law, or another's"
            )
        name = self.regions[pool.region].name
        if gateway.beliefs.members[name].health in ("down", "unknown"):
            raise InvariantError(f"{source.name}: sent to {name}, which is believed dead")
