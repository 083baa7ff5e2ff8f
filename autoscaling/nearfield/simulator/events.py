"""Every request by itself: where it goes, who computes it, when it is done.

The gateway picks the endpoint (`policy.route`), the region's own gateway the replica
(`policy.rank`), within the limit that it has learnt for it (`policy.limit`). A request whose
replica dies is sent again where `policy.retry` allows it.

After every event what it has touched is checked: nothing is lost, computed twice, counted below
zero or computed outside its jurisdiction. `World.check` counts everything anew, once a window.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from nearfield.policy import health, limit
from nearfield.policy.endpoints import Health, Refusal
from nearfield.policy.rank import ReplicaState, choose, places
from nearfield.policy.retry import Cause, History, may_replay
from nearfield.policy.route import alternatives, pick
from nearfield.simulator.books import InvariantError
from nearfield.simulator.engine import Request
from nearfield.simulator.fleet import Pool, Replica
from nearfield.simulator.lane import EventReplica, Lane, rooms, speeds
from nearfield.simulator.parts import Gateway, Source
from nearfield.simulator.world import CONNECT_TIMEOUT_S, World

READ_S = 0.25
"""Age of what a gateway knows of the replicas at home, at most."""
HALF_DONE = 0.5
"""Share of its work that a running request still needs, on average: as a gateway counts it."""
NOTICED_S = 30.0
"""Time after which a gateway has seen half of a change of a replica's speed."""
SPEEDS_S = 1.0
"""How often a gateway reckons the speed of replicas anew."""
WATCH_S = 1.0
TRIES = 5
"""Replicas that are tried where each has reached its limit, as `edge.limiter` does (its DETOURS and
the first one): then the request is refused, whatever else there is."""
AHEAD = 20_000
"""Requests that are drawn ahead, about: few enough to hold, many enough to be quick."""
LONGEST_S = 60.0
"""For how long at most: a burst may follow a quiet night."""


class EventWorld(World):
    """A run, event by event."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lanes = [Lane(pool) for pool in self.pools]
        self._connecting: dict[Request, Pool] = {}
        self._tries = 0  # left to the request that looks for a replica

    # ---- the clock ------------------------------------------------------------------------------

    def run(self, progress: Callable[[float], None] = lambda share: None) -> None:
        self.begin()
        sources = self.sources
        events = self._events
        span_s = min(1.0, self.end_s)
        begun_s = 0.0
        while begun_s < self.end_s:
            stop_s = min(self.end_s, begun_s + span_s)
            arrivals = [
                (came_s, i, prompt, answer)
                for i, source in enumerate(sources)
                for came_s, prompt, answer in source.stream.take(stop_s)
            ]
            arrivals.sort()
            for came_s, i, prompt, answer in arrivals:
                while events and events[0][0] <= came_s:
                    self.now_s, _, act, about = heappop(events)
                    act(about)
                self.now_s = came_s
                self._arrive(sources[i], prompt, answer)
            self._until(stop_s)
            begun_s = stop_s
            if len(arrivals) * 2 < AHEAD:
                span_s = min(LONGEST_S, 2 * span_s)
            elif len(arrivals) > 2 * AHEAD:
                span_s /= 2
            progress(begun_s / self.end_s)
        self._until(math.nextafter(self.end_s, math.inf))
        self.now_s = self.end_s
        self.check()

    # ---- a request's way ------------------------------------------------------------------------

    def _arrive(self, source: Source, prompt: int, answer: int) -> None:
        now_s = self.now_s
        source.tally.came(now_s)
        gateway = source.gateway
        if gateway is None:
            source.tally.failed("refused", now_s, 1, "no gateway")
            return
        self.in_flight += 1
        request = Request(now_s, source, gateway, prompt, answer)
        if now_s >= gateway.due_s:
            self.poll(gateway)
        plan = gateway.plans[source.callers]
        assert plan is not None
        found = pick(
            plan,
            gateway.own,
            self.draw(),
            criticality=source.criticality,
            allowed_s=source.timeout_s,
        )
        if isinstance(found, Refusal):
            self._fail(request, "refused", found.filter)
            return
        number = found.candidate.state.number
        self._tries = TRIES
        if not self._send(request, self.lanes[number]):
            pool = self.pools[number]
            pool.arrivals += 1
            pool.late += 1
            self._elsewhere(request, number)
            if request.ended:  # nobody took it: it is work that came all the same
                pool.work_in += request.tokens

    def _send(self, request: Request, lane: Lane) -> bool:
        """To that endpoint; whether it takes it."""
        pool, source = lane.pool, request.source
        self.allowed(source, request.gateway, pool)
        request.tokens = request.prompt + pool.answer
        if not self.regions[pool.region].alive:
            self._count(request, pool)
            self._connecting[request] = pool
            self.at(self.now_s + CONNECT_TIMEOUT_S, self._unanswered, request)
            return True
        if pool.ready == 0 or lane.pending:
            if len(lane.pending) >= pool.timing.max_queued:
                return False
            self._count(request, pool)
            lane.pending.append(request)
            lane.touched = True
        elif not self._place(request, lane):
            return False
        else:
            self._count(request, pool)
        if not request.region:
            request.region = pool.endpoint.region
        pool.arrivals += 1
        pool.work_in += request.tokens
        return True

    def _count(self, request: Request, pool: Pool) -> None:
        request.pool = pool
        rtt_s = request.gateway.rtts_s[pool.number] + request.source.way_s
        request.rtt_s = rtt_s + pool.timing.request_s
        request.gateway.own[pool.number] += 1
        pool.load += 1

    def _place(self, request: Request, lane: Lane) -> bool:
        """To the best of the replicas; whether one has room."""
        if self.now_s - lane.at_s >= READ_S:
            self.refresh(lane.pool)
        open_ = lane.places
        criticality = request.source.criticality
        while self._tries:
            choice = choose(
                open_,
                lane.own,
                lane.work,
                self.draw(),
                tokens=request.tokens,
                criticality=criticality,
            )
            if choice is None:
                return False
            number = choice.state.number
            replica = lane.by_number[number]
            mine = lane.own[number]
            if mine < replica.rooms[criticality]:
                break
            self._tries -= 1
            open_ = tuple(place for place in open_ if place.number != number)
        else:
            return False
        lane.touched = True
        lane.own[number] = mine + 1
        lane.work[number] += request.tokens
        if mine >= replica.peak:
            replica.peak = mine + 1
        request.replica = replica
        if replica.batch.add(request, self.now_s):
            self._arm(replica)
        return True

    def _elsewhere(self, request: Request, tried: int | None, cause: Cause | None = None) -> None:
        """To another endpoint, or the end of it.

        Args:
            tried: the endpoint that had no room. cause: what happened to it before, if it did.
        """
        gateway, now_s = request.gateway, self.now_s
        reason = "full"
        if cause is not None:
            self._tries = TRIES
        if gateway.alive:
            if now_s >= gateway.due_s:
                self.poll(gateway)
            plan = gateway.plans[request.source.callers]
            assert plan is not None
            begun = 0.0 <= request.first_s <= now_s
            for candidate in alternatives(
                plan, gateway.own, tried=() if tried is None else (tried,)
            ):
                if not self._tries:
                    reason = "overloaded"
                    break
                pool = self.pools[candidate.state.number]
                crosses = request.region not in ("", pool.endpoint.region)
                if cause is not None:
                    history = History(
                        begun=begun,
                        runs=request.runs,
                        crossings=request.crossings,
                        left_s=request.deadline_s - now_s,
                    )
                    verdict = may_replay(history, cause, crosses=crosses, needs_s=candidate.idle_s)
                    if not verdict.allowed:
                        reason = verdict.reason
                        continue
                if self._send(request, self.lanes[pool.number]):
                    request.crossings += cause is not None and crosses
                    request.source.tally.replayed += cause is not None
                    return
        self._fail(request, "refused" if cause is None else "lost", reason)

    def _unanswered(self, request: Request) -> None:
        """No connection to a region that is silent came about."""
        if self._connecting.pop(request, None) is None:
            return  # nobody waits for it any more
        pool = self._uncount(request)
        self._hear(request.gateway, health.Failed(pool.endpoint.region, "no connection"))
        self._elsewhere(request, pool.number, "refused")

    def _uncount(self, request: Request) -> Pool:
        """It is at no endpoint any more."""
        pool, gateway = request.pool, request.gateway
        assert pool is not None
        pool.load -= 1
        if gateway.alive:
            left = gateway.own[pool.number] - 1
            gateway.own[pool.number] = left
            if left < 0:
                raise InvariantError(f"{gateway.name}: fewer than no requests")
        request.pool = None
        return pool

    def _fail(self, request: Request, how: str, reason: str) -> None:
        if request.ended:
            raise InvariantError("a request ends twice")
        request.ended = True
        self.in_flight -= 1
        request.source.tally.failed(how, self.now_s, 1, reason)

    # ---- replicas at work -----------------------------------------------------------------------

    def _arm(self, replica: EventReplica) -> None:
        """See to it that somebody looks when the next of its requests is done."""
        next_s = replica.batch.next_s
        if next_s < replica.armed_s:
            replica.armed_s = next_s
            self._ties += 1
            heappush(self._events, (next_s, self._ties, self._work, replica))

    def _work(self, replica: EventReplica) -> None:
        """A prompt or an answer is done, if nothing has slowed it since."""
        now_s = self.now_s
        if now_s != replica.armed_s:
            return  # an earlier event has taken the place of this one
        replica.armed_s = math.inf
        batch = replica.batch
        if batch.next_s <= now_s:
            for request in batch.run(now_s):
                self._finish(request, replica)
            if batch.expired:
                self._expire(replica)
            lane = replica.lane
            running = batch.running
            load = running + len(batch.waiting)
            if running > batch.timing.slots or lane.own[replica.number] != load:
                raise InvariantError(f"{replica.id}: its requests are miscounted")
            if not load and replica.stage == "draining":
                self._gone(replica)
                return
            if lane.pending:
                self._unpark(lane)
        self._arm(replica)

    def _finish(self, request: Request, replica: EventReplica) -> None:
        now_s = self.now_s
        if request.ended or request.replica is not replica:
            raise InvariantError("a request is computed twice")
        request.ended = True
        lane, number = replica.lane, replica.number
        lane.touched = True
        lane.own[number] -= 1
        lane.work[number] -= request.tokens
        pool = self._uncount(request)
        self.in_flight -= 1
        came_s, first_s, rtt_s = request.came_s, request.first_s, request.rtt_s
        tally = request.source.tally
        tally.answered(first_s - came_s + rtt_s, now_s - came_s + rtt_s, now_s)
        if pool.region != request.gateway.region:
            tally.abroad += 1
        joined_s = request.joined_s
        pool.learn(request.prompt, request.answer, first_s - joined_s, now_s - joined_s)
        pool.served += 1
        replica.answered += 1
        times_s = replica.times_s
        times_s.append(limit.comparable_s(first_s - came_s, request.prompt))
        age_s = now_s - replica.window_s
        if age_s >= limit.WINDOW_S and limit.full(len(times_s), age_s):
            times_s.sort()
            replica.limit = replica.limit.learn(
                limit.Window(times_s[len(times_s) // 2], replica.peak)
            )
            replica.rooms = rooms(replica.limit)
            replica.times_s = []
            replica.window_s = now_s
            replica.peak = lane.own[number]

    def _expire(self, replica: EventReplica) -> None:
        """Their deadline passed before their turn."""
        lane, number = replica.lane, replica.number
        for request in replica.batch.expired:
            lane.own[number] -= 1
            lane.work[number] -= request.tokens
            self._too_late(request)
        replica.batch.expired.clear()

    def _too_late(self, request: Request) -> None:
        self._uncount(request).late += 1
        self._fail(request, "expired", "")

    def _unpark(self, lane: Lane) -> None:
        """Those that found no replica go to one that has room now."""
        pending = lane.pending
        while pending and lane.pool.ready:
            request = pending[0]
            if request.deadline_s < self.now_s:
                self._too_late(pending.popleft())
                continue
            self._tries = TRIES
            if not self._place(request, lane):
                return
            pending.popleft()

    # ---- the world's questions ------------------------------------------------------------------

    def refresh(self, pool: Pool) -> None:
        lane = self.lanes[pool.number]
        now_s = self.now_s
        passed_s = now_s - lane.at_s
        if passed_s < READ_S:
            return
        lane.at_s = now_s
        if not lane.touched and not pool.waiting and lane.beliefs is None:
            return  # nothing has changed since the last look
        lane.touched = False
        while lane.pending and lane.pending[0].deadline_s < now_s:
            self._too_late(lane.pending.popleft())
        timing = pool.timing
        if now_s - lane.speeds_s >= SPEEDS_S:
            lane.speeds_s, lane.speeds = now_s, speeds(pool)
        tokens, rows, full, alone = lane.speeds
        kv_total = timing.kv_tokens or 0
        beliefs = lane.beliefs
        own, work = lane.own, lane.work
        by_number: dict[int, EventReplica] = {}
        states = []
        waiting, least_age_s = len(lane.pending), math.inf
        for replica in pool.replicas.values():
            if replica.stage == "starting":
                continue
            assert isinstance(replica, EventReplica)
            batch = replica.batch
            queue = batch.waiting
            age_s = 0.0
            if queue:
                batch.expire(now_s)
                if batch.expired:
                    self._expire(replica)
                waiting += len(queue)
                age_s = now_s - queue[0].came_s if queue else 0.0
            pool.late += batch.late
            batch.late = 0
            if replica.stage != "ready":
                continue
            if age_s < least_age_s:
                least_age_s = age_s
            number = replica.number
            by_number[number] = replica
            factor = replica.known
            if factor != replica.factor:
                half = 0.5 ** (min(passed_s, NOTICED_S) / NOTICED_S)
                factor = replica.known = replica.factor + half * (factor - replica.factor)
            load, mine = batch.load, work[number]
            left = mine
            if load:
                left *= (len(queue) + HALF_DONE * (load - len(queue))) / load
            alive: Health = "up"
            weight = 1.0
            if beliefs is not None:
                upstream = beliefs.members[replica.id]
                alive = upstream.health
                weight = health.weight(upstream, now_s, beliefs.rules)
            states.append(
                ReplicaState(
                    number,
                    replica.id,
                    full / factor,
                    alone / factor,
                    rows,
                    timing.max_queued,
                    alive,
                    weight,
                    False,
                    load,
                    left,
                    own[number],
                    mine,
                    age_s,
                    int(tokens * batch.running) if kv_total else 0,
                    kv_total,
                )
            )
        lane.by_number = by_number
        lane.places = places(states)
        pool.waiting = waiting
        pool.queue_age_s = 0.0 if least_age_s == math.inf else least_age_s
        if lane.pending:
            pool.queue_age_s = max(pool.queue_age_s, now_s - lane.pending[0].came_s)

    def replica(self, pool: Pool, number: int, name: str) -> Replica:
        lane = self.lanes[pool.number]
        while len(lane.own) <= number:
            lane.own.append(0)
            lane.work.append(0.0)
        lane.own[number], lane.work[number] = 0, 0.0
        return EventReplica(lane, number, name, self.now_s, self._max_wait_s[pool.spec.model])

    def loads(self, pool: Pool) -> dict[str, int]:
        own = self.lanes[pool.number].own
        return {name: own[replica.number] for name, replica in pool.replicas.items()}

    def _stale(self, lane: Lane) -> None:
        """Another set of replicas: nobody may choose from the old one."""
        lane.at_s, lane.touched = -math.inf, True
        lane.places = ()
        if lane.beliefs is not None:
            names = [r.id for r in lane.pool.replicas.values() if r.stage == "ready"]
            lane.beliefs = health.with_members(lane.beliefs, names, self.now_s, start="up")

    def ready(self, replica: Replica) -> None:
        lane = self.lanes[replica.pool.number]
        self._stale(lane)
        self._unpark(lane)

    def drained(self, replica: Replica) -> None:
        assert isinstance(replica, EventReplica)
        self._stale(replica.lane)
        if not replica.batch.load:
            self._gone(replica)

    def vanished(self, replica: Replica) -> None:
        assert isinstance(replica, EventReplica)
        lane, number = replica.lane, replica.number
        self._stale(lane)
        replica.armed_s = math.inf
        victims = replica.batch.clear()
        lane.own[number], lane.work[number] = 0, 0.0
        for request in victims:
            self._uncount(request)
            request.replica = None
            self._elsewhere(request, None, "died")

    def strand(self, pool: Pool) -> None:
        lane = self.lanes[pool.number]
        pending, lane.pending = lane.pending, deque()
        for request in pending:
            self._uncount(request)
            self._elsewhere(request, None, "died")

    def cancel(self, gateway: Gateway) -> None:
        for request in [each for each in self._connecting if each.gateway is gateway]:
            del self._connecting[request]
            self._uncount(request)
            self._fail(request, "lost", "its gateway is gone")
        for lane in self.lanes:
            kept: deque[Request] = deque()
            for request in lane.pending:
                if request.gateway is gateway:
                    self._uncount(request)
                    self._fail(request, "lost", "its gateway is gone")
                else:
                    kept.append(request)
            lane.pending = kept
            lane.touched = True
            for replica in list(lane.pool.replicas.values()):
                assert isinstance(replica, EventReplica)
                for request in replica.batch.remove(gateway, self.now_s):
                    lane.own[replica.number] -= 1
                    lane.work[replica.number] -= request.tokens
                    self._uncount(request)
                    self._fail(request, "lost", "its gateway is gone")
                self._arm(replica)

    # ---- slow replicas --------------------------------------------------------------------------

    def pace(self, replica: Replica, factor: float) -> None:
        assert isinstance(replica, EventReplica)
        super().pace(replica, factor)
        replica.batch.change(replica.pool.timing.slower(factor), self.now_s)
        self._arm(replica)
        lane = replica.lane
        if lane.beliefs is None:
            names = [r.id for r in lane.pool.replicas.values() if r.stage == "ready"]
            lane.beliefs = health.with_members(health.Group(), names, self.now_s, start="up")
            self.at(self.now_s + WATCH_S, self._watch, lane)

    def _watch(self, lane: Lane) -> None:
        """Compare the replicas with each other while one of them is not as fast as it should be.

        Where all are, health has nothing to find: then it isn't asked.
        """
        beliefs = lane.beliefs
        if beliefs is None:
            return
        watched = [r for r in lane.pool.replicas.values() if r.id in beliefs.members]
        for replica in watched:
            assert isinstance(replica, EventReplica)
            answered = health.Answered(replica.id, replica.answered, replica.factor / replica.known)
            replica.answered = 0
            beliefs, _ = health.step(beliefs, answered, self.now_s, self.draw())
        beliefs, changes = health.step(beliefs, health.Tick(), self.now_s, self.draw())
        lane.beliefs = beliefs
        for change in changes:
            lane.at_s, lane.touched = -math.inf, True
            region = lane.pool.endpoint.region
            self._note("health", region, change.name, f"{change.after}: {change.reason}")
        steady = all(u.health == "up" and u.ramp_s is None for u in beliefs.members.values())
        if steady and all(r.factor == 1.0 for r in watched):
            lane.beliefs, lane.touched = None, True
            return
        self.at(self.now_s + WATCH_S, self._watch, lane)

    # ---- what must be true ----------------------------------------------------------------------

    def check(self) -> None:
        super().check()
        connecting = list(self._connecting.values())
        for lane in self.lanes:
            pool = lane.pool
            inside = len(lane.pending) + connecting.count(pool)
            for replica in pool.replicas.values():
                assert isinstance(replica, EventReplica)
                inside += replica.batch.load
                if lane.own[replica.number] != replica.batch.load:
                    raise InvariantError(f"{replica.id}: its requests are miscounted")
                if replica.stage == "starting" and replica.batch.load:
                    raise InvariantError(f"{replica.id} has requests and has not started")
            known = sum(gateway.own[pool.number] for gateway in self.gateways)
            if not inside == pool.load == known:
                raise InvariantError(
                    f"{pool.endpoint.name}: {inside} requests are there, {pool.load} are counted "
                    f"and gateways know of {known}"
                )
        if sum(pool.load for pool in self.pools) != self.in_flight:
            raise InvariantError("requests in flight are at no endpoint, or at two")
